// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels and their launchers. Plain CUDA: no TensorFlow header.
//
// Statistics reads x once, leaf by leaf of the canonical tree, and writes the
// moments of each split of the rows; MergeSplits makes one of all splits;
// Gradient reads x and writes dx. With an epilogue, Statistics reads z and
// makes y of it on the way, Gradient reads dy as well and adds up dz for the
// bias, and SumBias finishes that. A block owns an aligned, power-of-two number
// of leaves, so that its moments are a node of the tree: how the rows are split
// never changes a bit of the result. No floating-point atomics; one integer
// ticket says which block is the last, which then adds up in a fixed order.
//
// tests/cuda_emulation.h runs this file on the CPU. It asks for shared memory
// through LBE_SHARED, launches through LBE_LAUNCH, full-mask shuffles, no
// inline PTX.

#ifndef LBE_CUDA_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LBE_SHARED(type, name, size) __shared__ type name[size]
#define LBE_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

#include <initializer_list>
#include <type_traits>

#include "kernels.h"

namespace lbe {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;  // of a warp
constexpr int kWarps = kThreads / kLanes;
constexpr unsigned kAllLanes = 0xffffffff;
static_assert(kSumLanes == kThreads, "SumGroups has a thread for each lane");

// The 16 bytes that a thread reads of a row.
template <typename Element>
constexpr int kColumns = 16 / sizeof(Element);

// A thread of Statistics reads at most 2^kRunLevels leaves, whose moments it
// keeps in registers.
constexpr int kRunLevels = 2;
constexpr int kRunRows = kLeafRows << kRunLevels;

// Splits of 2^kMergeLevels nodes are more than there can be.
constexpr int kMergeColumns = 2;
constexpr int kMergeLevels = 40;
static_assert(kMergeColumns * kLanes == kGroupUnits, "a block is a group");

// Rows that a thread of Gradient handles at most.
constexpr int kGradientRows = 64;

// Elements widened to the type of accumulators, and rounded from it to nearest,
// ties to even. Two 16-bit elements are rounded by one instruction.
template <typename Element>
struct Numbers {
  using Scalar = Element;
  static __device__ Element Load(Element x) { return x; }
  static __device__ Element Round(Element x) { return x; }
  static __device__ void RoundTwo(const Element* from, Element* to) {
    to[0] = from[0];
    to[1] = from[1];
  }
};
template <>
struct Numbers<Half> {
  using Scalar = float;
  static __device__ float Load(Half x) {
    return __half2float(__ushort_as_half(x.bits));
  }
  static __device__ Half Round(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
  }
  static __device__ void RoundTwo(const float* from, Half* to) {
    const __half2 both = __floats2half2_rn(from[0], from[1]);
    to[0] = {__half_as_ushort(both.x)};
    to[1] = {__half_as_ushort(both.y)};
  }
};
template <>
struct Numbers<BFloat16> {
  using Scalar = float;
  static __device__ float Load(BFloat16 x) {
    return BitCast<float>(static_cast<uint32_t>(x.bits) << 16);
  }
  static __device__ BFloat16 Round(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  }
  static __device__ void RoundTwo(const float* from, BFloat16* to) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(from[0], from[1]);
    to[0] = {__bfloat16_as_ushort(both.x)};
    to[1] = {__bfloat16_as_ushort(both.y)};
  }
};

// Elements that are read or written at once; aligned as the hardware wants it.
template <typename Element, int kVector>
struct alignas(kVector * sizeof(Element)) Vector {
  Element elements[kVector];
};

// The same while it waits in registers: two 16-bit elements in one.
template <int kBytes>
struct alignas(kBytes) Packed {
  uint32_t words[kBytes / 4];
};
template <>
struct alignas(2) Packed<2> {
  uint16_t word;
};

template <typename Element, int kVector>
__device__ Vector<Element, kVector> RoundVector(
    const typename Numbers<Element>::Scalar (&values)[kVector]) {
  Vector<Element, kVector> rounded;
  if constexpr (kVector == 1) {
    rounded.elements[0] = Numbers<Element>::Round(values[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; i += 2) {
      Numbers<Element>::RoundTwo(&values[i], &rounded.elements[i]);
    }
  }
  return rounded;
}

// Calls body(r, &rows[r]) for each row, one after the other, kUnroll of them in
// the code. The rows move up in between, so that they stay in registers
// wherever the loop is.
template <int kUnroll, int kRows, typename Row, typename Body>
__device__ __forceinline__ void ForEachRow(Row (&rows)[kRows],
                                           const Body& body) {
#pragma unroll kUnroll
  for (int r = 0; r < kRows; ++r) {
    Row row = rows[0];
#pragma unroll
    for (int i = 1; i < kRows; ++i) rows[i - 1] = rows[i];
    body(r, &row);
    rows[kRows - 1] = row;
  }
}

// Calls `body` with the activation as a constant. All threads branch alike.
template <typename Body>
__device__ __forceinline__ void WithActivation(Activation activation,
                                               const Body& body) {
  switch (activation) {
#define LBE_ACTIVATION(name, keras_name) \
  case Activation::name:                 \
    return body(std::integral_constant<Activation, Activation::name>());
    LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
  }
}

__host__ __device__ constexpr int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The rows of [first, first + count) that there are.
LBE_MATH int64_t RowsOf(int64_t first, int64_t count, int64_t rows) {
  const int64_t rest = rows - first;
  return rest < 0 ? 0 : rest < count ? rest : count;
}

// How x [rows, units] is cut. A block has `lanes` threads side by side, each
// with so many columns, and kThreads / lanes groups of such threads one below
// the other, each with `run_rows` rows.
struct Cut {
  int64_t rows;
  int64_t units;
  int lanes;
  int groups;  // kThreads / lanes
  int64_t run_rows;
  int64_t tiles;   // blocks side by side
  int64_t splits;  // blocks one below the other

  __host__ __device__ int64_t block_rows() const { return groups * run_rows; }
};

__device__ int Thread() { return static_cast<int>(threadIdx.x); }

// The place of a thread in its block, and of its block in x.
struct Place {
  int lane;   // of the threads side by side
  int group;  // of those one below the other
  int64_t tile;
  int64_t split;

  __device__ explicit Place(const Cut& cut) {
    const unsigned lanes = cut.lanes,
                   tiles = cut.tiles;  // 32 bits divide faster
    lane = threadIdx.x % lanes;
    group = threadIdx.x / lanes;
    tile = blockIdx.x % tiles;
    split = blockIdx.x / tiles;
  }
};

// The vectors of a thread in each row: where they start in the tile, and
// whether x goes so far. Those of threads side by side are contiguous.
template <int kVector>
struct Pieces {
  int first;
  int step;
  int columns;  // of the tile that x has

  __device__ Pieces(const Cut& cut, const Place& place, int tile_columns)
      : first(place.lane * kVector),
        step(cut.lanes * kVector),
        columns(static_cast<int>(
            RowsOf(place.tile * tile_columns, tile_columns, cut.units))) {}
  __device__ int column(int piece) const { return first + piece * step; }
  __device__ bool inside(int piece) const { return column(piece) < columns; }
};

template <int kCount, typename Scalar>
__device__ void MergeColumns(const Moments<Scalar>* left, int64_t left_rows,
                             const Moments<Scalar>* right, int64_t right_rows,
                             Moments<Scalar>* result) {
  const MergeWeights<Scalar> weights = WeightsOf<Scalar>(left_rows, right_rows);
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    result[c] = Merge(left[c], right[c], weights);
  }
}

// Merges eight nodes of `node_rows` rows each, the first of which starts at row
// `first`, into the first.
template <typename Scalar>
__device__ void MergeEight(Moments<Scalar>* nodes, int64_t first,
                           int64_t node_rows, int64_t rows) {
#pragma unroll
  for (int width = 1; width < 8; width *= 2) {
#pragma unroll
    for (int i = 0; i < 8; i += 2 * width) {
      const int64_t right_rows =
          RowsOf(first + (i + width) * node_rows, width * node_rows, rows);
      if (right_rows > 0) {
        MergeColumns<1>(&nodes[i], width * node_rows, &nodes[i + width],
                        right_rows, &nodes[i]);
      }
    }
  }
}

// Merges the nodes [kCount] of all groups of a block, each over its run, the
// first of which starts at row `first`: thread t returns the moments of column
// t of the tile, if the tile has as many. Vectors of kVector columns of a
// thread are contiguous. Has barriers: all threads must call it.
template <int kCount, int kVector, typename Scalar>
__device__ Moments<Scalar> MergeGroups(const Cut& cut, const Place& place,
                                       const Pieces<kVector>& pieces,
                                       int64_t first, Moments<Scalar>* node) {
  // Padded, so that neither threads kVector columns apart nor neighbours meet
  // in a bank.
  constexpr int kPadding = 16;
  constexpr int kWarpSlots = kLanes * kCount * (kPadding + 1) / kPadding;
  LBE_SHARED(Moments<Scalar>, shared, kWarps * kWarpSlots);
  // The groups of a warp, pairwise; the result is in the first lanes.
  const int64_t own_first = first + place.group * cut.run_rows;
  int64_t rows = cut.run_rows;
  for (int lanes = cut.lanes; lanes < kLanes; lanes *= 2, rows *= 2) {
    const int64_t right_rows = RowsOf(own_first + rows, rows, cut.rows);
    Moments<Scalar> right[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      right[c].mean = __shfl_down_sync(kAllLanes, node[c].mean, lanes);
      right[c].m2 = __shfl_down_sync(kAllLanes, node[c].m2, lanes);
    }
    if (right_rows > 0) {
      MergeColumns<kCount>(node, rows, right, right_rows, node);
    }
  }
  // The warps, of `rows` rows each, through shared memory.
  const int tile_columns = cut.lanes * kCount;
  const int warp = Thread() / kLanes;
  if (Thread() % kLanes < cut.lanes) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int column = pieces.column(c / kVector) + c % kVector;
      shared[warp * kWarpSlots + column + column / kPadding] = node[c];
    }
  }
  __syncthreads();
  Moments<Scalar> nodes[kWarps] = {};
  if (Thread() < tile_columns) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      nodes[w] = shared[w * kWarpSlots + Thread() + Thread() / kPadding];
    }
    MergeEight(nodes, first, rows, cut.rows);
  }
  return nodes[0];
}

// The sum of the values of each kWidth threads, by halves, for the first of
// them. Has barriers.
template <int kWidth>
__device__ double SumHalvesInBlock(double value) {
  LBE_SHARED(double, values, kThreads);
  const int place = Thread() % kWidth;
#pragma unroll
  for (int half = kWidth / 2; half >= kLanes; half /= 2) {
    // Nobody reads these any more: the last step read from 2 * half on.
    if (place < 2 * half) values[Thread()] = value;
    __syncthreads();
    if (place < half) value += values[Thread() + half];
  }
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) {
    value += __shfl_down_sync(kAllLanes, value, half);
  }
  return value;
}

// Where results go, and how they are made of moments.
template <typename Scalar>
struct Results {
  Formula formula;
  EntropyFactors<Scalar> factors;
  Scalar* mean;        // [units]
  Scalar* variance;    // [units]
  Scalar* entropy;     // scalar
  Scalar* valid;       // scalar, or null
  double* group_sums;  // [units / kGroupUnits], rounded up
};

// The sums of all groups to the entropy, in the order of batch_entropy.h. Has
// barriers.
template <typename Scalar>
__device__ void SumGroups(int64_t units, const Results<Scalar>& results) {
  const int64_t groups = CeilDiv(units, kGroupUnits);
  double sum = 0;
  for (int64_t group = Thread(); group < groups; group += kSumLanes) {
    // Past the first cache, which may not see what other blocks wrote.
    sum += __ldcg(&results.group_sums[group]);
  }
  sum = SumHalvesInBlock<kSumLanes>(sum);
  if (Thread() == 0) {
    *results.entropy = static_cast<Scalar>(sum / static_cast<double>(units));
    if (results.valid != nullptr) *results.valid = Scalar(1);
  }
}

// The moments of all rows to mean and variance, thread t for column t of the
// tile, and the entropies to the sum of each group. Has barriers.
template <typename Scalar>
__device__ void Finish(const Cut& cut, int64_t tile, int tile_columns,
                       const Moments<Scalar>& moments,
                       const Results<Scalar>& results) {
  const int64_t column = tile * tile_columns + Thread();
  double entropy = 0;
  if (Thread() < tile_columns && column < cut.units) {
    const Scalar variance =
        Variance<Scalar>(moments.m2, cut.rows, results.formula);
    results.mean[column] = moments.mean;
    results.variance[column] = variance;
    entropy = UnitEntropy<Scalar>(variance, results.factors);
  }
  const double sum = SumHalvesInBlock<kGroupUnits>(entropy);
  if (Thread() % kGroupUnits == 0 && Thread() < tile_columns &&
      column < cut.units) {
    results.group_sums[column / kGroupUnits] = sum;
  }
}

// The moments of each split of the rows, and what tells the last block.
template <typename Scalar>
struct Partials {
  Scalar* mean;  // [splits, units]
  Scalar* m2;    // [splits, units]
  unsigned* ticket;
};

// What makes y = activation(z + bias) of what Statistics reads.
template <typename Element>
struct EpilogueArguments {
  Element* y;           // [rows, units], may be z; null without an epilogue
  const Element* bias;  // [channels], or null
  int64_t channels;
  Activation activation;
  typename Numbers<Element>::Scalar alpha;
};

// The epilogue of the columns of a thread: none.
template <typename Element, int kVector, bool kEpilogue>
struct Maker {
  __device__ Maker(const EpilogueArguments<Element>&, const Pieces<kVector>&,
                   int64_t) {}
  template <typename Values>
  __device__ void operator()(int, int64_t, int, int64_t, Values&) const {}
};

template <typename Element, int kVector>
class Maker<Element, kVector, true> {
 public:
  // `first` is the tile's first column.
  __device__ Maker(const EpilogueArguments<Element>& arguments,
                   const Pieces<kVector>& pieces, int64_t first)
      : arguments_(arguments) {
    // Each thread has a place of its own; no register is left for it.
    constexpr int kPieces = kColumns<Element> / kVector;
    LBE_SHARED(PackedPiece, shared, kThreads * kPieces);
    bias_ = shared + Thread();
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Piece bias = {};
      if (arguments.bias != nullptr && pieces.inside(piece)) {
        int64_t channel = (first + pieces.column(piece)) % arguments.channels;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          bias.elements[i] = arguments.bias[channel];
          channel = channel + 1 == arguments.channels ? 0 : channel + 1;
        }
      }
      bias_[piece * kThreads] = BitCast<PackedPiece>(bias);
    }
  }

  // Makes y of leaf rows [0, rows) of z in `values` and writes it to where the
  // first of them has it, `offset` elements into y.
  template <typename Values>
  __device__ __forceinline__ void operator()(int piece, int64_t offset,
                                             int rows, int64_t pitch,
                                             Values& values) const {
    using Scalar = typename Numbers<Element>::Scalar;
    Element* to = arguments_.y + offset;
    ForEachRow<1>(values, [&](int r, auto* row) {
      if (r >= rows) return;
      const Piece z = BitCast<Piece>(*row);
      const Piece bias = BitCast<Piece>(bias_[piece * kThreads]);
      Scalar y[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        y[i] = Numbers<Element>::Load(z.elements[i]) +
               Numbers<Element>::Load(bias.elements[i]);
      }
      WithActivation(arguments_.activation, [&](auto activation) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          y[i] = Activate<activation.value>(y[i], arguments_.alpha);
        }
      });
      *row = BitCast<PackedPiece>(RoundVector<Element>(y));
      *reinterpret_cast<PackedPiece*>(to) = *row;
      to += pitch;
    });
  }

 private:
  using Piece = Vector<Element, kVector>;
  using PackedPiece = Packed<sizeof(Piece)>;

  const EpilogueArguments<Element>& arguments_;
  PackedPiece* bias_;
};

// Moments of leaf rows [0, rows) of the columns of a thread, of what `make`
// makes of them; the tile's first row is `first` elements into x.
template <typename Element, int kVector, typename Make, typename Scalar>
__device__ __forceinline__ void LoadLeaf(const Element* x, int64_t first,
                                         int64_t pitch, int rows,
                                         const Pieces<kVector>& pieces,
                                         const Make& make,
                                         Moments<Scalar>* node) {
  using Piece = Vector<Element, kVector>;
#pragma unroll
  for (int piece = 0; piece < kColumns<Element> / kVector; ++piece) {
    Packed<sizeof(Piece)> values[kLeafRows] = {};
    if (pieces.inside(piece)) {
      const int64_t offset = first + pieces.column(piece);
      const Element* from = x + offset;
#pragma unroll
      for (int r = 0; r < kLeafRows; ++r, from += pitch) {
        if (r < rows) {
          values[r] = *reinterpret_cast<const Packed<sizeof(Piece)>*>(from);
        }
      }
      make(piece, offset, rows, pitch, values);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      Scalar of_column[kLeafRows];
#pragma unroll
      for (int r = 0; r < kLeafRows; ++r) {
        of_column[r] =
            Numbers<Element>::Load(BitCast<Piece>(values[r]).elements[i]);
      }
      node[piece * kVector + i] = LeafMoments<Scalar>(of_column, rows);
    }
  }
}

// The tree over a thread's leaves, as a binary counter: level l of the stack
// holds the node over 2^l leaves where bit l of their count, k before this one,
// is set. The node of leaf k merges with those that it completes, the last one
// with all that are left. Unrolled, so that the stack stays in registers.
template <int kLevel, int kCount, typename Scalar>
__device__ __forceinline__ void Push(int k, bool last, int rows,
                                     Moments<Scalar> (*stack)[kCount],
                                     Moments<Scalar>* node) {
  if constexpr (kLevel < kRunLevels) {
    if (k >> kLevel & 1) {
      MergeColumns<kCount>(stack[kLevel], kLeafRows << kLevel, node, rows,
                           node);
      rows += kLeafRows << kLevel;
    } else if (!last) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) stack[kLevel][c] = node[c];
      return;
    }
    Push<kLevel + 1>(k, last, rows, stack, node);
  }
}

// Blocks on a multiprocessor at once, for which the compiler leaves registers.
template <typename Element, int kVector, bool kEpilogue>
constexpr int kStatisticsBlocks = kEpilogue                              ? 2
                                  : sizeof(Element) == 2 && kVector == 1 ? 1
                                  : sizeof(Element) == 4 && kVector > 1  ? 3
                                                                         : 2;

template <typename Element, int kVector, bool kEpilogue>
__global__ void __launch_bounds__(
    kThreads, kStatisticsBlocks<Element, kVector, kEpilogue>)
    Statistics(const Element* x, EpilogueArguments<Element> epilogue, Cut cut,
               Results<typename Numbers<Element>::Scalar> results,
               Partials<typename Numbers<Element>::Scalar> partials) {
  using Scalar = typename Numbers<Element>::Scalar;
  constexpr int kCount = kColumns<Element>;
  const Place place(cut);
  const int tile_columns = cut.lanes * kCount;
  const int64_t tile_column = place.tile * tile_columns;
  const int64_t first = place.split * cut.block_rows();
  const int64_t own_first = first + place.group * cut.run_rows;
  const int own_rows =
      static_cast<int>(RowsOf(own_first, cut.run_rows, cut.rows));
  const Pieces<kVector> pieces(cut, place, tile_columns);
  const Maker<Element, kVector, kEpilogue> make(epilogue, pieces, tile_column);

  Moments<Scalar> node[kCount] = {};
  Moments<Scalar> stack[kRunLevels][kCount];
#pragma unroll 1
  for (int k = 0; k * kLeafRows < own_rows; ++k) {
    const int rows = min(own_rows - k * kLeafRows, kLeafRows);
    const int64_t offset =
        (own_first + k * kLeafRows) * cut.units + tile_column;
    if (!kEpilogue && rows == kLeafRows) {  // without a condition for each row
      LoadLeaf(x, offset, cut.units, kLeafRows, pieces, make, node);
    } else {
      LoadLeaf(x, offset, cut.units, rows, pieces, make, node);
    }
    Push<0>(k, (k + 1) * kLeafRows >= own_rows, rows, stack, node);
  }
  const Moments<Scalar> moments =
      MergeGroups<kCount>(cut, place, pieces, first, node);

  if (cut.splits == 1) {
    Finish(cut, place.tile, tile_columns, moments, results);
    if (cut.tiles == 1) {
      __syncthreads();
      SumGroups(cut.units, results);
    }
    return;  // all threads of all blocks do
  }
  const int64_t column = tile_column + Thread();
  if (Thread() < tile_columns && column < cut.units) {
    partials.mean[place.split * cut.units + column] = moments.mean;
    partials.m2[place.split * cut.units + column] = moments.m2;
  }
  if (blockIdx.x == 0 && Thread() == 0) *partials.ticket = 0;
}

// The moments of all splits to one. The last block to finish adds up the
// groups.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 2)
    MergeSplits(Cut cut, int64_t split_rows, int64_t run_splits,
                Results<Scalar> results, Partials<Scalar> partials) {
  LBE_SHARED(bool, is_last, 1);
  constexpr int kAtOnce = 8;
  const Place place(cut);
  const int tile_columns = cut.lanes * kMergeColumns;
  const int64_t tile_column = place.tile * tile_columns;
  const Pieces<1> pieces(cut, place, tile_columns);
  const int64_t own_first = place.group * cut.run_rows;
  const int64_t own_rows = RowsOf(own_first, cut.run_rows, cut.rows);
  const int64_t node_rows = kAtOnce * split_rows;

  // The tree over the nodes of kAtOnce splits each, again as a binary counter.
  // The stack is in local memory: few batches are so long that a thread has
  // more than one node.
  Moments<Scalar> node[kMergeColumns] = {};
  Moments<Scalar> stack[kMergeLevels][kMergeColumns];
#pragma unroll 1
  for (int64_t k = 0; k * node_rows < own_rows; ++k) {
    const int64_t node_first = own_first + k * node_rows;
    const int64_t node_split = place.group * run_splits + k * kAtOnce;
    int64_t rows = RowsOf(node_first, node_rows, cut.rows);
#pragma unroll
    for (int c = 0; c < kMergeColumns; ++c) {
      const int64_t column = tile_column + pieces.column(c);
      Moments<Scalar> nodes[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (pieces.inside(c) && i * split_rows < rows) {
          const int64_t at = (node_split + i) * cut.units + column;
          nodes[i] = {partials.mean[at], partials.m2[at]};
        }
      }
      MergeEight(nodes, node_first, split_rows, cut.rows);
      node[c] = nodes[0];
    }
    const bool last = (k + 1) * node_rows >= own_rows;
    int level = 0;
#pragma unroll 1
    for (; k >> level != 0; ++level) {
      if (k >> level & 1) {
        const int64_t left_rows = node_rows << level;
        MergeColumns<kMergeColumns>(stack[level], left_rows, node, rows, node);
        rows += left_rows;
      } else if (!last) {
        break;
      }
    }
    if (!last) {
      for (int c = 0; c < kMergeColumns; ++c) stack[level][c] = node[c];
    }
  }
  const Moments<Scalar> moments =
      MergeGroups<kMergeColumns>(cut, place, pieces, 0, node);
  Finish(cut, place.tile, tile_columns, moments, results);
  // Thread 0 wrote the only sum of this block.
  if (Thread() == 0) {
    __threadfence();
    is_last[0] = atomicAdd(partials.ticket, 1u) == cut.tiles - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last[0]) SumGroups(cut.units, results);
}

// The sum alone, where several blocks have finished their columns.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    Sum(int64_t units, Results<Scalar> results) {
  SumGroups(units, results);
}

template <typename Scalar>
__global__ void Write(Scalar value, Scalar* to) {
  *to = value;
}

// Of what Gradient makes the gradient.
enum class GradientOf {
  kEntropy,
  kStatistics,    // the entropy, mean and variance
  kEpilogue,      // y = activation(z), and the entropy of y
  kBiasEpilogue,  // y = activation(z + bias), and the entropy of y
};

template <typename Element>
struct GradientArguments {
  using Scalar = typename Numbers<Element>::Scalar;
  const Element* x;  // may be dx; y of an epilogue
  Element* dx;       // dz of an epilogue
  const Scalar* mean;
  const Scalar* variance;
  const Scalar* entropy_grad;   // scalar
  const Scalar* mean_grad;      // null without kStatistics
  const Scalar* variance_grad;  // null without kStatistics
  GradientFactors<Scalar> factors;
  // Of an epilogue alone.
  const Element* dy;  // may be dx
  Activation activation;
  Scalar alpha;
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
constexpr int kGradientBlocks = kVector < kColumns<Element>    ? 2
                                : kOf >= GradientOf::kEpilogue ? 2
                                : sizeof(Element) == 2         ? 3
                                                               : 4;

// Sums of a thread's columns over the leaf of each group to those over kSumRows
// rows, the first of which is `first`. Has barriers.
template <int kCount, int kVector, typename Element, typename Scalar>
__device__ void WriteSums(const GradientArguments<Element>& a, const Cut& cut,
                          const Place& place, const Pieces<kVector>& pieces,
                          int64_t first, const Scalar (&sums)[kCount]) {
  LBE_SHARED(Scalar, leaves, kThreads * kCount);
  const int tile_columns = cut.lanes * kCount;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    const int column = pieces.column(c / kVector) + c % kVector;
    leaves[place.group * tile_columns + column] = sums[c];
  }
  __syncthreads();
  // The leaves of these kSumRows rows are those of eight groups.
  const int part = Thread() / tile_columns;
  const int column = Thread() % tile_columns;
  const int64_t row = first + part * kSumRows;
  if ((part + 1) * kLeafRows <= cut.groups && row < cut.rows &&
      column < pieces.columns) {
    Scalar of_leaves[kLeafRows];
#pragma unroll
    for (int leaf = 0; leaf < kLeafRows; ++leaf) {
      of_leaves[leaf] =
          leaves[(part * kLeafRows + leaf) * tile_columns + column];
    }
    const Scalar sum = PairwiseSum(of_leaves);
    const int64_t unit = place.tile * tile_columns + column;
    if (a.dbias != nullptr) {
      a.dbias[unit] = Numbers<Element>::Round(sum);
    } else {
      a.sums[row / kSumRows * cut.units + unit] = sum;
    }
  }
  __syncthreads();
}

// A block has the rows of its split: its groups one row each in turn, or, where
// rows are added up, one leaf.
template <typename Element, int kVector, GradientOf kOf>
__global__ void __launch_bounds__(kThreads,
                                  kGradientBlocks<Element, kVector, kOf>)
    Gradient(GradientArguments<Element> a, Cut cut) {
  using Scalar = typename Numbers<Element>::Scalar;
  using Piece = Vector<Element, kVector>;
  constexpr int kCount = kColumns<Element>;
  constexpr int kPieces = kCount / kVector;
  constexpr int kBatch = kGradientBatch<Element, kVector>;
  constexpr bool kOffset = kOf == GradientOf::kStatistics;
  constexpr bool kEpilogue = kOf >= GradientOf::kEpilogue;
  constexpr bool kSums = kOf == GradientOf::kBiasEpilogue;
  const Place place(cut);
  const int tile_columns = cut.lanes * kCount;
  const int64_t tile_column = place.tile * tile_columns;
  const Pieces<kVector> pieces(cut, place, tile_columns);
  const int64_t first = place.split * cut.block_rows();
  const int rows = static_cast<int>(RowsOf(first, cut.block_rows(), cut.rows));
  // Rows of a block from one of a thread's to the next one, and those that all
  // groups have done when each has done some batches.
  const int step = kSums ? 1 : cut.groups;
  constexpr int kBatches = kSums ? kLeafRows / kBatch : 1;
  const int pass_rows = cut.groups * kBatch * kBatches;
  int row = kSums ? place.group * kLeafRows : place.group;
  int64_t offset = (first + row) * cut.units + tile_column;

  // A batch is read before it is written, since dx may be x or dy, and the
  // first one before the thread waits for its columns' statistics.
  struct Row {
    Packed<sizeof(Piece)> x[kPieces];
    Packed<sizeof(Piece)> dy[kEpilogue ? kPieces : 1];
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
        using Read = const Packed<sizeof(Piece)>*;
        batch[r].x[piece] = *reinterpret_cast<Read>(a.x + at);
        if constexpr (kEpilogue) {
          batch[r].dy[piece] = *reinterpret_cast<Read>(a.dy + at);
        }
      }
    }
  };
  read();

  const Scalar entropy_share = EntropyShare(*a.entropy_grad, a.factors);
  Scalar mean[kCount] = {}, slope[kCount] = {}, unit_offset[kCount] = {};
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    if (!pieces.inside(c / kVector)) continue;
    const int64_t column =
        tile_column + pieces.column(c / kVector) + c % kVector;
    mean[c] = a.mean[column];
    slope[c] = EntropySlope(a.variance[column], entropy_share, a.factors);
    if constexpr (kOffset) {
      slope[c] += VarianceSlope(a.variance_grad[column], a.factors);
      unit_offset[c] = MeanOffset(a.mean_grad[column], a.factors);
    }
  }

#pragma unroll 1
  for (int pass = 0; pass < rows; pass += pass_rows) {
    Scalar sums[kCount] = {};
#pragma unroll 1
    for (int b = 0; b < kBatches; ++b) {
      // The code of all activations stands once in that of an epilogue.
      ForEachRow<kEpilogue ? 1 : kBatch>(batch, [&](int r, Row* values) {
        if (row + r * step >= rows) return;
        const int64_t to = offset + r * step * cut.units;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          if (!pieces.inside(piece)) continue;
          const Piece x = BitCast<Piece>(values->x[piece]);
          Scalar gradient[kVector];
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const int c = piece * kVector + i;
            const Scalar value = Numbers<Element>::Load(x.elements[i]);
            if constexpr (kOffset) {
              gradient[i] =
                  UnitGradient(value, mean[c], slope[c], unit_offset[c]);
            } else {
              gradient[i] = UnitGradient(value, mean[c], slope[c]);
            }
          }
          if constexpr (kEpilogue) {
            const Piece dy = BitCast<Piece>(values->dy[piece]);
            WithActivation(a.activation, [&](auto activation) {
#pragma unroll
              for (int i = 0; i < kVector; ++i) {
                const Scalar y = Numbers<Element>::Load(x.elements[i]);
                gradient[i] =
                    Derivative<activation.value>(y, a.alpha) *
                    (Numbers<Element>::Load(dy.elements[i]) + gradient[i]);
              }
            });
          }
          if constexpr (kSums) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              sums[piece * kVector + i] += gradient[i];
            }
          }
          *reinterpret_cast<Piece*>(a.dx + to + pieces.column(piece)) =
              RoundVector<Element>(gradient);
        }
      });
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

// The gradient of a bias, from the sums [count, channels] of kSumRows rows
// each: a warp for each channel.
template <typename Element, typename Scalar>
__global__ void __launch_bounds__(kThreads)
    SumBias(const Scalar* sums, int64_t count, int64_t channels,
            Element* dbias) {
  static_assert(kSumParts == kLanes, "a warp has a thread for each part");
  const int64_t channel = int64_t{blockIdx.x} * kWarps + Thread() / kLanes;
  double sum = 0;
  if (channel < channels) {
#pragma unroll 8
    for (int64_t i = Thread() % kLanes; i < count; i += kSumParts) {
      sum += static_cast<double>(sums[i * channels + channel]);
    }
  }
  sum = SumHalvesInBlock<kSumParts>(sum);
  if (Thread() % kLanes == 0 && channel < channels) {
    dbias[channel] = Numbers<Element>::Round(static_cast<Scalar>(sum));
  }
}

int PowerOfTwoFrom(int64_t value, int largest) {
  int power = 1;
  while (power < value && power < largest) power *= 2;
  return power;
}

Cut CutColumns(int64_t rows, int64_t units, int columns, int lanes) {
  const int64_t tiles = CeilDiv(units, int64_t{lanes} * columns);
  return {rows, units, lanes, kThreads / lanes, 0, tiles, 1};
}

// Halves the runs, down to `shortest` rows, where a block would have more rows
// than there are, or where there would be fewer blocks than wanted.
void CutRows(int64_t longest, int64_t shortest, int64_t blocks, Cut* cut) {
  cut->run_rows = longest;
  cut->splits = CeilDiv(cut->rows, cut->block_rows());
  while (cut->run_rows > shortest && (cut->block_rows() / 2 >= cut->rows ||
                                      cut->tiles * cut->splits < blocks)) {
    cut->run_rows /= 2;
    cut->splits = CeilDiv(cut->rows, cut->block_rows());
  }
}

// Cuts for threads of `columns` columns.
Cut CutStatistics(int64_t rows, int64_t units, int columns, int64_t blocks) {
  Cut cut = CutColumns(rows, units, columns,
                       PowerOfTwoFrom(CeilDiv(units, columns), kLanes));
  // Two leaves in each thread of a single block, rather than a second launch.
  const bool one_block = cut.tiles == 1 && rows <= 2 * kLeafRows * cut.groups;
  CutRows(kRunRows, one_block ? 2 * kLeafRows : kLeafRows, blocks, &cut);
  return cut;
}

// All splits in one block, for each group of columns.
Cut CutMerge(const Cut& statistics) {
  Cut cut = CutColumns(
      statistics.rows, statistics.units, kMergeColumns,
      PowerOfTwoFrom(CeilDiv(statistics.units, kMergeColumns), kLanes));
  cut.run_rows = 8 * statistics.block_rows();
  while (cut.block_rows() < cut.rows) cut.run_rows *= 2;
  return cut;
}

// As many threads side by side as leave few of them without a column: rows are
// then read and written in long pieces.
Cut CutGradient(int64_t rows, int64_t units, int columns, int64_t blocks) {
  const int64_t vectors = CeilDiv(units, columns);
  int lanes = PowerOfTwoFrom(vectors, kThreads);
  while (lanes > kLanes &&
         CeilDiv(vectors, lanes) * lanes > vectors + vectors / 8) {
    lanes /= 2;
  }
  Cut cut = CutColumns(rows, units, columns, lanes);
  CutRows(kGradientRows, 4, blocks, &cut);
  return cut;
}

// With at least a leaf for each group and kSumRows rows for each block.
Cut CutBiasGradient(int64_t rows, int64_t units, int columns, int64_t blocks) {
  Cut cut = CutColumns(rows, units, columns,
                       PowerOfTwoFrom(CeilDiv(units, columns), kLanes));
  CutRows(kGradientRows, kLeafRows, blocks, &cut);
  return cut;
}
static_assert(kThreads / kLanes * kLeafRows == kSumRows, "see WriteSums");

constexpr int64_t kMostBlocks = 0x7fffffff;

bool Launchable(const Cut& cut) {
  return cut.splits <= kMostBlocks / cut.tiles;
}

// Parts of the workspace, in bytes from its start.
struct Workspace {
  int64_t ticket;
  int64_t mean;
  int64_t m2;
  int64_t bytes;

  Workspace(const Cut& cut, int64_t scalar_bytes) {
    const auto align = [](int64_t bytes) { return CeilDiv(bytes, 16) * 16; };
    const int64_t splits = cut.splits == 1 ? 0 : cut.splits;
    ticket = align(CeilDiv(cut.units, kGroupUnits) * sizeof(double));
    mean = ticket + align(sizeof(unsigned));
    m2 = mean + align(splits * cut.units * scalar_bytes);
    bytes = m2 + align(splits * cut.units * scalar_bytes);
  }
};

// Calls `body` with how many elements can be read at once, as a constant: 16
// bytes, or 4 bytes of 16-bit elements, or one element.
template <typename Element, typename Body>
int WithVector(int64_t units, std::initializer_list<const void*> arrays,
               const Body& body) {
  uintptr_t all = units * sizeof(Element);
  for (const void* array : arrays) all |= reinterpret_cast<uintptr_t>(array);
  if (all % 16 == 0)
    return body(std::integral_constant<int, kColumns<Element>>());
  if constexpr (sizeof(Element) == 2) {
    if (all % 4 == 0) return body(std::integral_constant<int, 2>());
  }
  return body(std::integral_constant<int, 1>());
}

// Runs `launch` and says whether that launch failed, and not a call before it:
// CUDA keeps an error until it is asked for.
template <typename Launch>
int Launched(const Launch& launch) {
  cudaGetLastError();
  launch();
  return cudaGetLastError();
}

// With an epilogue, x is z.
template <typename Element>
int Forward(cudaStream_t stream, const void* x,
            const EpilogueArguments<Element>& epilogue, const Cut& cut,
            const Formula& formula, void* workspace, void* mean, void* variance,
            void* entropy, void* valid) {
  using Scalar = typename Numbers<Element>::Scalar;
  if (!Launchable(cut)) return cudaErrorInvalidConfiguration;
  const Workspace parts(cut, sizeof(Scalar));
  char* base = static_cast<char*>(workspace);
  const Results<Scalar> results = {
      formula,
      EntropyFactorsOf<Scalar>(formula),
      static_cast<Scalar*>(mean),
      static_cast<Scalar*>(variance),
      static_cast<Scalar*>(entropy),
      static_cast<Scalar*>(valid),
      reinterpret_cast<double*>(base),
  };
  const Partials<Scalar> partials = {
      reinterpret_cast<Scalar*>(base + parts.mean),
      reinterpret_cast<Scalar*>(base + parts.m2),
      reinterpret_cast<unsigned*>(base + parts.ticket),
  };
  const unsigned blocks = static_cast<unsigned>(cut.tiles * cut.splits);
  const int error =
      WithVector<Element>(cut.units, {x, epilogue.y}, [&](auto vector) {
        constexpr int kVector = vector.value;
        const Element* elements = static_cast<const Element*>(x);
        return Launched([&] {
          if (epilogue.y != nullptr) {
            LBE_LAUNCH((Statistics<Element, kVector, true>), blocks, kThreads,
                       stream, elements, epilogue, cut, results, partials);
          } else {
            LBE_LAUNCH((Statistics<Element, kVector, false>), blocks, kThreads,
                       stream, elements, epilogue, cut, results, partials);
          }
        });
      });
  if (error != cudaSuccess || blocks == 1) return error;
  if (cut.splits == 1) {
    return Launched([&] {
      LBE_LAUNCH(Sum<Scalar>, 1, kThreads, stream, cut.units, results);
    });
  }
  const Cut merge = CutMerge(cut);
  return Launched([&] {
    LBE_LAUNCH(MergeSplits<Scalar>, static_cast<unsigned>(merge.tiles),
               kThreads, stream, merge, cut.block_rows(),
               merge.run_rows / cut.block_rows(), results, partials);
  });
}

template <GradientOf kOf, typename Element>
int LaunchGradient(cudaStream_t stream, const Cut& cut,
                   const GradientArguments<Element>& arguments) {
  if (!Launchable(cut)) return cudaErrorInvalidConfiguration;
  const unsigned blocks = static_cast<unsigned>(cut.tiles * cut.splits);
  return WithVector<Element>(
      cut.units, {arguments.x, arguments.dx, arguments.dy}, [&](auto vector) {
        return Launched([&] {
          LBE_LAUNCH((Gradient<Element, vector.value, kOf>), blocks, kThreads,
                     stream, arguments, cut);
        });
      });
}

template <typename Element>
GradientArguments<Element> ArgumentsOf(const void* x, int64_t rows,
                                       int64_t units, const Formula& formula,
                                       const void* mean, const void* variance,
                                       const void* entropy_grad, void* dx) {
  using Scalar = typename Numbers<Element>::Scalar;
  GradientArguments<Element> arguments = {};
  arguments.x = static_cast<const Element*>(x);
  arguments.dx = static_cast<Element*>(dx);
  arguments.mean = static_cast<const Scalar*>(mean);
  arguments.variance = static_cast<const Scalar*>(variance);
  arguments.entropy_grad = static_cast<const Scalar*>(entropy_grad);
  arguments.factors = GradientFactorsOf<Scalar>(rows, units, formula);
  return arguments;
}

template <typename Element>
int Backward(cudaStream_t stream, GradientArguments<Element> arguments,
             int64_t rows, int64_t units, const void* mean_grad,
             const void* variance_grad, int blocks) {
  using Scalar = typename Numbers<Element>::Scalar;
  const Cut cut = CutGradient(rows, units, kColumns<Element>, blocks);
  if (mean_grad == nullptr) {
    return LaunchGradient<GradientOf::kEntropy>(stream, cut, arguments);
  }
  arguments.mean_grad = static_cast<const Scalar*>(mean_grad);
  arguments.variance_grad = static_cast<const Scalar*>(variance_grad);
  return LaunchGradient<GradientOf::kStatistics>(stream, cut, arguments);
}

template <typename Element>
int EpilogueBackward(cudaStream_t stream, GradientArguments<Element> arguments,
                     int64_t rows, int64_t units, const void* dy,
                     const Epilogue& epilogue, void* workspace, void* dbias,
                     int blocks) {
  using Scalar = typename Numbers<Element>::Scalar;
  arguments.dy = static_cast<const Element*>(dy);
  arguments.activation = epilogue.activation;
  arguments.alpha = static_cast<Scalar>(epilogue.alpha);
  if (epilogue.bias == nullptr) {
    return LaunchGradient<GradientOf::kEpilogue>(
        stream, CutGradient(rows, units, kColumns<Element>, blocks), arguments);
  }
  const int64_t channels = epilogue.channels;
  const int64_t count = CeilDiv(rows, kSumRows) * (units / channels);
  Element* const elements = static_cast<Element*>(dbias);
  arguments.sums = static_cast<Scalar*>(workspace);
  if (count == 1) arguments.dbias = elements;
  const int error = LaunchGradient<GradientOf::kBiasEpilogue>(
      stream, CutBiasGradient(rows, units, kColumns<Element>, blocks),
      arguments);
  if (error != cudaSuccess || count == 1) return error;
  return Launched([&] {
    LBE_LAUNCH((SumBias<Element, Scalar>),
               static_cast<unsigned>(CeilDiv(channels, kWarps)), kThreads,
               stream, arguments.sums, count, channels, elements);
  });
}

template <typename Element>
Cut CutForward(int64_t rows, int64_t units, int blocks) {
  return CutStatistics(rows, units, kColumns<Element>, blocks);
}

template <typename Element>
EpilogueArguments<Element> ArgumentsOf(const Epilogue& epilogue, void* y) {
  return {static_cast<Element*>(y), static_cast<const Element*>(epilogue.bias),
          epilogue.channels, epilogue.activation,
          static_cast<typename Numbers<Element>::Scalar>(epilogue.alpha)};
}

}  // namespace

int64_t BatchEntropyForwardCudaWorkspace(DType dtype, int64_t rows,
                                         int64_t units, int blocks) {
  switch (dtype) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name)          \
  case DType::name:                                                            \
    return Workspace(CutForward<element>(rows, units, blocks), sizeof(result)) \
        .bytes;
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
  return 0;
}

int BatchEntropyForwardCuda(void* stream, DType dtype, const void* x,
                            int64_t rows, int64_t units, const Formula& formula,
                            void* workspace, void* mean, void* variance,
                            void* entropy, void* valid, int blocks) {
  switch (dtype) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name)          \
  case DType::name:                                                            \
    return Forward<element>(static_cast<cudaStream_t>(stream), x,              \
                            EpilogueArguments<element>{},                      \
                            CutForward<element>(rows, units, blocks), formula, \
                            workspace, mean, variance, entropy, valid);
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
  return cudaErrorInvalidValue;
}

int EpilogueForwardCuda(void* stream, DType dtype, const void* z,
                        const Epilogue& epilogue, int64_t rows, int64_t units,
                        const Formula& formula, void* workspace, void* y,
                        void* mean, void* variance, void* entropy, void* valid,
                        int blocks) {
  const bool nothing_to_make = y == z &&
                               epilogue.activation == Activation::kLinear &&
                               epilogue.bias == nullptr;
  switch (dtype) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name)          \
  case DType::name:                                                            \
    return Forward<element>(static_cast<cudaStream_t>(stream), z,              \
                            nothing_to_make                                    \
                                ? EpilogueArguments<element>{}                 \
                                : ArgumentsOf<element>(epilogue, y),           \
                            CutForward<element>(rows, units, blocks), formula, \
                            workspace, mean, variance, entropy, valid);
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
  return cudaErrorInvalidValue;
}

int BatchEntropyGradCuda(void* stream, DType dtype, const void* x, int64_t rows,
                         int64_t units, const Formula& formula,
                         const void* mean, const void* variance,
                         const void* entropy_grad, const void* mean_grad,
                         const void* variance_grad, void* dx, int blocks) {
  switch (dtype) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name)   \
  case DType::name:                                                     \
    return Backward(static_cast<cudaStream_t>(stream),                  \
                    ArgumentsOf<element>(x, rows, units, formula, mean, \
                                         variance, entropy_grad, dx),   \
                    rows, units, mean_grad, variance_grad, blocks);
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
  return cudaErrorInvalidValue;
}

int64_t EpilogueGradCudaWorkspace(DType dtype, const Epilogue& epilogue,
                                  int64_t rows, int64_t units) {
  if (epilogue.bias == nullptr) return 0;
  const int64_t sums = CeilDiv(rows, kSumRows) * units;
  return sums * (dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

int EpilogueGradCuda(void* stream, DType dtype, const void* dy, const void* y,
                     const Epilogue& epilogue, int64_t rows, int64_t units,
                     const Formula& formula, const void* mean,
                     const void* variance, const void* entropy_grad,
                     void* workspace, void* dz, void* dbias, int blocks) {
  switch (dtype) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  case DType::name:                                                   \
    return EpilogueBackward(                                          \
        static_cast<cudaStream_t>(stream),                            \
        ArgumentsOf<element>(y, rows, units, formula, mean, variance, \
                             entropy_grad, dz),                       \
        rows, units, dy, epilogue, workspace, dbias, blocks);
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
  return cudaErrorInvalidValue;
}

int SetZeroCuda(void* stream, void* data, int64_t bytes) {
  if (bytes == 0) return cudaSuccess;
  return cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
}

int SetScalarCuda(void* stream, DType dtype, double value, void* scalar) {
  switch (dtype) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name)       \
  case DType::name:                                                         \
    return Launched([&] {                                                   \
      LBE_LAUNCH(Write<result>, 1, 1, static_cast<cudaStream_t>(stream),    \
                 static_cast<result>(value), static_cast<result*>(scalar)); \
    });
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
  return cudaErrorInvalidValue;
}

const char* CudaErrorMessage(int error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "the NVIDIA driver is older than the CUDA toolkit that lbe_ops "
             "was "
             "built with: update the driver, or build lbe_ops with an older "
             "CUDA toolkit (`python -m lbe_ops info` names both)";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "lbe_ops has no code for this GPU: build it with a CUDA toolkit "
             "that knows the GPU (`python -m lbe_ops info` names what it was "
             "built for)";
    case cudaErrorNoDevice:
      return "there is no GPU that CUDA can use: see nvidia-smi and "
             "CUDA_VISIBLE_DEVICES";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
}

CudaSystem DescribeCuda() {
  CudaSystem system = {};
  system.toolkit = CUDART_VERSION;
  cudaDriverGetVersion(&system.driver);
  int device = 0;
  cudaDeviceProp properties;
  int error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaGetDeviceProperties(&properties, device);
  }
  if (error == cudaSuccess) {
    const size_t length = sizeof(system.device) - 1;
    for (size_t i = 0; i < length && properties.name[i] != '\0'; ++i) {
      system.device[i] = properties.name[i];
    }
    system.compute_capability = properties.major * 10 + properties.minor;
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, Sum<float>);
  }
  system.error = error;
  cudaGetLastError();  // reported; must not meet the next launch
  return system;
}

}  // namespace lbe
