// SPDX-License-Identifier: Apache-2.0
//
// The gradient kernels: dx, dz of an epilogue, and the sums of dz for its bias.
// Included by launch.cu.

#ifndef LBE_OPS_CUDA_GRADIENT_CUH_
#define LBE_OPS_CUDA_GRADIENT_CUH_

#include "elements.cuh"

namespace lbe {
namespace {

// Rows that a thread of Gradient handles at most.
constexpr int kGradientRows = 64;

// Of what Gradient makes the gradient.
enum class GradientOf {
  kEntropy,
  kStatistics,    // the entropy, mean and variance
  kEpilogue,      // y = activation(z), and the entropy of y
  kBiasEpilogue,  // y = activation(z + bias), and the entropy of y
};

// GradientArguments as the kernel takes them.
template <typename Element>
struct DeviceGradient {
  using Scalar = ScalarOf<Element>;
  const Element* x;  // may be dx; y of an epilogue
  Element* dx;       // dz of an epilogue
  const Scalar* mean;
  const Scalar* variance;
  const Scalar* entropy_grad;       // scalar
  const Scalar* mean_grad;          // null without kStatistics
  const Scalar* variance_grad;      // null without kStatistics
  GradientFactors<Scalar> factors;  // unless there is a count
  const Scalar* count;              // scalar, or null
  Formula formula;
  // Of an epilogue alone.
  const Element* dy;  // may be dx
  Activation activation;
  Scalar slope;
  // Of kBiasEpilogue: [rows / kSumRows, units], rounded up; its only row goes
  // to dbias unless that is null.
  Scalar* sums;
  Element* dbias;
};

// Rows that a thread has in flight, fewer where each is read in many pieces,
// and blocks on a multiprocessor.
template <typename Element, int kVector>
constexpr int kGradientBatch = kVector == 1 ? 2 : 4;
template <typename Element, int kVector, GradientOf kOf>
constexpr int kGradientBlocks =
    sizeof(Element) == 2 && kVector == 1                     ? 1
    : kVector < kColumns<Element>                            ? 2
    : kOf >= GradientOf::kEpilogue                           ? 2
    : sizeof(Element) == 2 && kOf == GradientOf::kStatistics ? 3
                                                             : 4;

// Adds up the sums of a thread's columns over the leaf of each group to those
// over kSumRows rows, the first of which is `first`. Has barriers.
template <int kCount, int kVector, typename Element, typename Scalar>
__device__ void WriteSums(const DeviceGradient<Element>& a, const Cut& cut,
                          const Place& place, const Pieces<kVector>& pieces,
                          int64_t first, const Scalar (&sums)[kCount]) {
  LBE_SHARED(Scalar, leaves, kThreads * kCount);
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    const int column = pieces.column(c / kVector) + c % kVector;
    leaves[place.group * cut.tile_columns + column] = sums[c];
  }
  __syncthreads();
  // The leaves of these kSumRows rows are those of eight groups.
  const int part = Thread() / cut.tile_columns;
  const int column = Thread() % cut.tile_columns;
  const int64_t row = first + part * kSumRows;
  if ((part + 1) * kLeafRows <= cut.groups && row < cut.rows &&
      column < pieces.columns) {
    Scalar of_leaves[kLeafRows];
#pragma unroll
    for (int leaf = 0; leaf < kLeafRows; ++leaf) {
      of_leaves[leaf] =
          leaves[(part * kLeafRows + leaf) * cut.tile_columns + column];
    }
    const Scalar sum = PairwiseSum(of_leaves);
    const int64_t unit = place.first_column(cut) + column;
    if (a.dbias != nullptr) {
      a.dbias[unit] = Convert<Element>::Round(sum);
    } else {
      a.sums[row / kSumRows * cut.units + unit] = sum;
    }
  }
  __syncthreads();
}

// Writes zeros to the rows of a block: the gradient of a batch without an
// entropy, whatever x holds.
template <typename Element, int kVector>
__device__ void WriteZeros(const Cut& cut, const Place& place,
                           const Pieces<kVector>& pieces, Element* dx) {
  constexpr int kPieces = kColumns<Element> / kVector;
  const int rows = place.rows(cut);
  dx += place.first_row(cut) * cut.units + place.first_column(cut);
#pragma unroll 1
  for (int row = place.group; row < rows; row += cut.groups) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (!pieces.inside(piece)) continue;
      WriteWords<Element, kVector>({},
                                   dx + row * cut.units + pieces.column(piece));
    }
  }
}

// A block has the rows of its split: its groups one row each in turn, or, where
// rows are added up, one leaf. In kernels for whole vectors, the statistics
// start at multiples of 16 bytes, too.
template <typename Element, int kVector, GradientOf kOf>
__global__ void __launch_bounds__(kThreads,
                                  kGradientBlocks<Element, kVector, kOf>)
    Gradient(DeviceGradient<Element> a, Cut cut) {
  using Scalar = ScalarOf<Element>;
  using PieceWords = Words<Element, kVector>;
  constexpr int kCount = kColumns<Element>;
  constexpr int kPieces = kCount / kVector;
  constexpr int kBatch = kGradientBatch<Element, kVector>;
  constexpr bool kOffset = kOf == GradientOf::kStatistics;
  constexpr bool kEpilogue = kOf >= GradientOf::kEpilogue;
  constexpr bool kSums = kOf == GradientOf::kBiasEpilogue;
  const Place place(cut);
  const int64_t tile_column = place.first_column(cut);
  const Pieces<kVector> pieces(cut, place);
  const int64_t first = place.first_row(cut);
  const int rows = place.rows(cut);
  // Rows of a block from one of a thread's to the next one, and those that all
  // groups have done when each has done some batches.
  const int step = kSums ? 1 : cut.groups;
  constexpr int kBatches = kSums ? kLeafRows / kBatch : 1;
  const int pass_rows = cut.groups * kBatch * kBatches;
  int row = kSums ? place.group * kLeafRows : place.group;
  int64_t offset = (first + row) * cut.units + tile_column;

  GradientFactors<Scalar> factors = a.factors;
  if (a.count != nullptr) {
    factors = GradientFactorsOfCount(*a.count, cut.units, a.formula);
    if constexpr (!kEpilogue) {
      if (factors.entropy == 0) return WriteZeros(cut, place, pieces, a.dx);
    }
  }

  // A batch is read before it is written, since dx may be x or dy, and the
  // first one before the thread waits for its columns' statistics.
  struct Row {
    PieceWords x[kPieces];
    PieceWords dy[kEpilogue ? kPieces : 1];
  };
  Row batch[kBatch];
  const auto read = [&] {
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      if (row + r * step >= rows) continue;
      const int64_t from = offset + r * step * cut.units;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (!pieces.inside(piece)) continue;
        const int64_t at = from + pieces.column(piece);
        batch[r].x[piece] = ReadWords<Element, kVector>(a.x + at);
        if constexpr (kEpilogue) {
          batch[r].dy[piece] = ReadWords<Element, kVector>(a.dy + at);
        }
      }
    }
  };
  read();

  const Scalar share = EntropyShare(*a.entropy_grad, factors);
  Scalar mean[kPieces][kVector] = {}, reciprocal[kPieces][kVector] = {};
  Scalar slope[kPieces][kVector] = {}, unit_offset[kPieces][kVector] = {};
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    if (!pieces.inside(piece)) continue;
    constexpr bool kWide = kPieces == 1;
    const int64_t column = tile_column + pieces.column(piece);
    ReadScalars<kWide>(a.mean + column, mean[piece]);
    ReadScalars<kWide>(a.variance + column, reciprocal[piece]);
    if constexpr (kOffset) {
      ReadScalars<kWide>(a.variance_grad + column, slope[piece]);
      ReadScalars<kWide>(a.mean_grad + column, unit_offset[piece]);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      reciprocal[piece][i] = Reciprocal(reciprocal[piece][i], factors);
      slope[piece][i] = VarianceSlope(slope[piece][i], factors);
      unit_offset[piece][i] = MeanOffset(unit_offset[piece][i], factors);
    }
  }

#pragma unroll 1
  for (int pass = 0; pass < rows; pass += pass_rows) {
    Scalar sums[kCount] = {};
#pragma unroll 1
    for (int b = 0; b < kBatches; ++b) {
      // Unrolled as in Maker.
      const auto write = [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
        constexpr bool kUnrolled =
            !kEpilogue || (kPieces == 1 && kIsCheap<kActivation>);
        constexpr int kUnroll = kUnrolled ? kBatch : 1;
        ForEachRow<kUnroll>(batch, [&](int r, Row* words) {
          if (row + r * step >= rows) return;
          Element* to = a.dx + offset + r * step * cut.units;
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            if (!pieces.inside(piece)) continue;
            const auto x = BitCast<Vector<Element, kVector>>(words->x[piece]);
            Scalar gradient[kVector];
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              const Scalar value = Convert<Element>::Load(x.elements[i]);
              if constexpr (kOffset) {
                gradient[i] =
                    UnitGradient(value, mean[piece][i], reciprocal[piece][i],
                                 share, slope[piece][i], unit_offset[piece][i]);
              } else {
                gradient[i] = UnitGradient(value, mean[piece][i],
                                           reciprocal[piece][i], share);
              }
              if constexpr (kEpilogue) {
                const auto dy =
                    BitCast<Vector<Element, kVector>>(words->dy[piece]);
                gradient[i] =
                    Derivative<kActivation>(value, a.slope) *
                    (Convert<Element>::Load(dy.elements[i]) + gradient[i]);
              }
              if constexpr (kSums) sums[piece * kVector + i] += gradient[i];
            }
            WriteWords<Element, kVector>(RoundToWords<Element>(gradient),
                                         to + pieces.column(piece));
          }
        });
      };
      if constexpr (kEpilogue) {
        WithActivation(a.activation, write);
      } else {
        write(std::integral_constant<Activation, Activation::kLinear>());
      }
      // To the rows of the next batch: of this leaf, or of the next pass.
      const int batch_rows = kBatch * step;
      const int next = !kSums             ? batch_rows
                       : b + 1 < kBatches ? batch_rows
                                          : pass_rows - kLeafRows + batch_rows;
      row += next;
      offset += next * cut.units;
      read();
    }
    if constexpr (kSums) {
      WriteSums<kCount>(a, cut, place, pieces, first + pass, sums);
    }
  }
}

// Makes dbias [channels] of the sums [count, channels] over kSumRows rows of a
// unit each, in the order of activations.h. A block has kChannels channels side
// by side and, for each of them, kThreads / kChannels threads; thread t of
// these has the parts t, t + kThreads / kChannels, ..., which are kChannels
// parts. So the first halvings of the parts are within a thread, the others
// between threads.
template <typename Element, int kChannels>
__global__ void __launch_bounds__(kThreads)
    SumBias(const ScalarOf<Element>* sums, int64_t count, int64_t channels,
            Element* dbias) {
  static_assert(kSumParts == kThreads, "a block has a thread for each part");
  constexpr int kStep = kThreads / kChannels;
  const int lane = Thread() % kChannels;
  const int64_t channel = int64_t{blockIdx.x} * kChannels + lane;
  double parts[kChannels] = {};
  if (channel < channels) {
    // Reads are in flight together, the additions to a part are in order. A sum
    // that is missing is 0, which changes no part.
#pragma unroll(kChannels == 1 ? 16 : 1)
    for (int64_t i = Thread() / kChannels; i < count; i += kSumParts) {
      ScalarOf<Element> read[kChannels];
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        read[j] = i + j * kStep < count
                      ? sums[(i + j * kStep) * channels + channel]
                      : 0;
      }
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        parts[j] += static_cast<double>(read[j]);
      }
    }
  }
  double sum = SumHalves<kChannels>(parts);
  if constexpr (kChannels == 1) {
    sum = SumHalvesInBlock<kSumParts>(sum);
  } else {
    LBE_SHARED(double, shared, kThreads);
    shared[Thread()] = sum;
    __syncthreads();
    double of_threads[kStep];
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      of_threads[t] = shared[t * kChannels + lane];
    }
    sum = SumHalves<kStep>(of_threads);
  }
  if (Thread() < kChannels && channel < channels) {
    dbias[channel] =
        Convert<Element>::Round(static_cast<ScalarOf<Element>>(sum));
  }
}

}  // namespace
}  // namespace lbe

#endif  // LBE_OPS_CUDA_GRADIENT_CUH_
