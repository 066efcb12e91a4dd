// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels and their launchers. Plain CUDA: no TensorFlow header.
//
// Statistics reads x once, leaf by leaf of the canonical tree, and writes the
// moments of each split of the rows; Merge makes one of all splits; Gradient
// reads x and writes dx. A block owns an aligned, power-of-two number of
// leaves, so that its moments are a node of the tree: how the rows are split
// never changes a bit of the result. No floating-point atomics; one integer
// ticket says which block is the last, which then adds up in a fixed order.
//
// tests/cuda_emulation.h runs this file on the CPU. It asks for shared memory
// through LBE_SHARED, launches through LBE_LAUNCH, full-mask shuffles, no
// inline PTX.

#ifndef LBE_CUDA_EMULATION
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LBE_SHARED(type, name, size) __shared__ type name[size]
#define LBE_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

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

// A thread of Statistics holds at most 2^kRunLevels leaves' worth of moments in
// registers; one of Merge, which rarely has more than one node, as many as
// there can be, in local memory.
constexpr int kRunLevels = 3;
constexpr int kMergeLevels = 40;
constexpr int kMergeColumns = 2;
static_assert(kMergeColumns * kLanes == kGroupUnits, "a block is a group");

// Rows that a thread of Gradient has in flight, and handles at most.
constexpr int kGradientBatch = 8;
constexpr int kGradientRows = 64;

template <typename Element>
struct Numbers;
template <>
struct Numbers<float> {
  using Scalar = float;
  static __device__ float Load(float x) { return x; }
  static __device__ float Round(float x) { return x; }
};
template <>
struct Numbers<double> {
  using Scalar = double;
  static __device__ double Load(double x) { return x; }
  static __device__ double Round(double x) { return x; }
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
};
template <>
struct Numbers<BFloat16> {
  using Scalar = float;
  static __device__ float Load(BFloat16 x) {
    return BitCast<float>(static_cast<uint32_t>(x.bits) << 16);
  }
  static __device__ BFloat16 Round(float x) {
    const uint32_t bits = BitCast<uint32_t>(x);
    // To nearest, ties to even; a NaN stays a NaN.
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40;
    return {static_cast<uint16_t>(x == x ? rounded : nan)};
  }
};

// Elements that are read or written at once; aligned as the hardware wants it.
template <typename Element, int kVector>
struct alignas(kVector * sizeof(Element)) Vector {
  Element elements[kVector];
};

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
// the other. A group has `run` leaves, a power of two.
struct Cut {
  int64_t rows;
  int64_t units;
  int lanes;
  int run;
  int64_t leaf_rows;
  int64_t tiles;   // blocks side by side
  int64_t splits;  // blocks one below the other

  __host__ __device__ int groups() const { return kThreads / lanes; }
  __host__ __device__ int64_t run_rows() const { return run * leaf_rows; }
  __host__ __device__ int64_t block_rows() const {
    return groups() * run_rows();
  }
};

// The place of a thread in its block, and of its block in x.
struct Place {
  int lane;   // of the threads side by side
  int group;  // of those one below the other
  int64_t tile;
  int64_t split;

  __device__ explicit Place(const Cut& cut)
      : lane(threadIdx.x % cut.lanes),
        group(threadIdx.x / cut.lanes),
        tile(blockIdx.x % cut.tiles),
        split(blockIdx.x / cut.tiles) {}
};

// Column of the tile at which vector `piece` of a thread starts: the vectors of
// threads side by side are, too.
template <int kVector>
__device__ int ColumnInTile(const Cut& cut, int lane, int piece) {
  return (piece * cut.lanes + lane) * kVector;
}

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

// The moments of a block's rows, for the columns of its tile: thread t returns
// those of column t of the tile, if the tile has as many. `leaf(k, rows, node)`
// makes the node [kCount] of leaf k of the thread's run, of `rows` rows;
// vectors of kVector columns are contiguous. Has barriers: all threads must
// call it.
template <typename Scalar, int kCount, int kVector, int kLevels, typename Leaf>
__device__ Moments<Scalar> BlockMoments(const Cut& cut, const Place& place,
                                        const Leaf& leaf) {
  LBE_SHARED(Moments<Scalar>, shared, kWarps * kLanes * kCount);
  const int64_t block_first = place.split * cut.block_rows();
  const int64_t first = block_first + place.group * cut.run_rows();
  const int64_t own_rows = RowsOf(first, cut.run_rows(), cut.rows);

  // The tree over the thread's own leaves, as a binary counter: level l of the
  // stack holds the node over 2^l leaves where bit l of their count is set. The
  // last leaf merges with all that is left.
  Moments<Scalar> node[kCount] = {};
  Moments<Scalar> stack[kLevels][kCount];
  for (int64_t k = 0; k * cut.leaf_rows < own_rows; ++k) {
    int64_t merged = RowsOf(k * cut.leaf_rows, cut.leaf_rows, own_rows);
    const bool last = (k + 1) * cut.leaf_rows >= own_rows;
    leaf(k, merged, node);
#pragma unroll(kLevels <= kRunLevels ? kLevels : 1)
    for (int level = 0; level < kLevels; ++level) {
      const int64_t left_rows = cut.leaf_rows << level;
      if (k >> level & 1) {
        MergeColumns<kCount>(stack[level], left_rows, node, merged, node);
        merged += left_rows;
      } else if (!last) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) stack[level][c] = node[c];
        break;
      } else if (k >> level == 0) {
        break;
      }
    }
  }

  // The groups of a warp, pairwise; the result is in the first lanes.
  int64_t rows = cut.run_rows();
  for (int lanes = cut.lanes; lanes < kLanes; lanes *= 2, rows *= 2) {
    const int64_t right_rows = RowsOf(first + rows, rows, cut.rows);
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

  // The warps, through shared memory. A warp has `rows` rows.
  const int tile_columns = cut.lanes * kCount;
  const int warp = threadIdx.x / kLanes;
  if (threadIdx.x % kLanes < cut.lanes) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int column =
          ColumnInTile<kVector>(cut, place.lane, c / kVector) + c % kVector;
      shared[warp * tile_columns + column] = node[c];
    }
  }
  __syncthreads();
  Moments<Scalar> nodes[kWarps] = {};
  if (threadIdx.x < tile_columns) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      nodes[w] = shared[w * tile_columns + threadIdx.x];
    }
    MergeEight(nodes, block_first, rows, cut.rows);
  }
  return nodes[0];
}

// v[0] of each kWidth of the block's values becomes their sum, by halves. Has
// barriers.
template <int kWidth>
__device__ void SumHalvesInBlock(double* values) {
  __syncthreads();
  for (int half = kWidth / 2; half > 0; half /= 2) {
    if (threadIdx.x % kWidth < half) {
      values[threadIdx.x] += values[threadIdx.x + half];
    }
    __syncthreads();
  }
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
  LBE_SHARED(double, lanes, kThreads);
  const int64_t groups = CeilDiv(units, kGroupUnits);
  double sum = 0;
  for (int64_t group = threadIdx.x; group < groups; group += kSumLanes) {
    // Past the first cache, which may not see what other blocks wrote.
    sum += __ldcg(&results.group_sums[group]);
  }
  lanes[threadIdx.x] = sum;
  SumHalvesInBlock<kSumLanes>(lanes);
  if (threadIdx.x == 0) {
    *results.entropy =
        static_cast<Scalar>(lanes[0] / static_cast<double>(units));
    if (results.valid != nullptr) *results.valid = Scalar(1);
  }
}

// The moments of all rows to mean and variance, thread t for column t of the
// tile, and the entropies to the sum of each group. Has barriers.
template <typename Scalar>
__device__ void Finish(const Cut& cut, int64_t tile, int tile_columns,
                       const Moments<Scalar>& moments,
                       const Results<Scalar>& results) {
  LBE_SHARED(double, entropies, kThreads);
  const int64_t column = tile * tile_columns + threadIdx.x;
  double entropy = 0;
  if (threadIdx.x < tile_columns && column < cut.units) {
    const Scalar variance =
        Variance<Scalar>(moments.m2, cut.rows, results.formula);
    results.mean[column] = moments.mean;
    results.variance[column] = variance;
    entropy = UnitEntropy<Scalar>(variance, results.factors);
  }
  entropies[threadIdx.x] = entropy;
  SumHalvesInBlock<kGroupUnits>(entropies);
  if (threadIdx.x % kGroupUnits == 0 && threadIdx.x < tile_columns &&
      column < cut.units) {
    results.group_sums[column / kGroupUnits] = entropies[threadIdx.x];
  }
}

// The moments of each split of the rows, and what tells the last block.
template <typename Scalar>
struct Partials {
  Scalar* mean;  // [splits, units]
  Scalar* m2;    // [splits, units]
  unsigned* ticket;
};

// Moments of leaf rows [0, rows) of the columns of a thread, which start at
// x + offset[piece] where column[piece] < units.
template <typename Element, int kVector, typename Scalar>
__device__ void LoadLeaf(const Element* x, int64_t pitch, int64_t rows,
                         const bool* inside, const int* column,
                         Moments<Scalar>* node) {
  constexpr int kPieces = kColumns<Element> / kVector;
  Vector<Element, kVector> values[kLeafRows][kPieces];
#pragma unroll
  for (int r = 0; r < kLeafRows; ++r) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      values[r][piece] = {};
      if (r < rows && inside[piece]) {
        values[r][piece] = *reinterpret_cast<const Vector<Element, kVector>*>(
            x + r * pitch + column[piece]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns<Element>; ++c) {
    Scalar of_column[kLeafRows];
#pragma unroll
    for (int r = 0; r < kLeafRows; ++r) {
      of_column[r] =
          Numbers<Element>::Load(values[r][c / kVector].elements[c % kVector]);
    }
    node[c] = LeafMoments<Scalar>(of_column, static_cast<int>(rows));
  }
}

// 16-bit elements have twice the columns in registers.
template <typename Element>
constexpr int kStatisticsBlocks = sizeof(Element) == 2 ? 2 : 3;

template <typename Element, int kVector>
__global__ void __launch_bounds__(kThreads, kStatisticsBlocks<Element>)
    Statistics(const Element* x, Cut cut,
               Results<typename Numbers<Element>::Scalar> results,
               Partials<typename Numbers<Element>::Scalar> partials) {
  using Scalar = typename Numbers<Element>::Scalar;
  constexpr int kCount = kColumns<Element>;
  constexpr int kPieces = kCount / kVector;
  const Place place(cut);
  const int tile_columns = cut.lanes * kCount;
  const int64_t tile_column = place.tile * tile_columns;
  const Element* run =
      x +
      (place.split * cut.block_rows() + place.group * cut.run_rows()) *
          cut.units +
      tile_column;
  bool inside[kPieces];
  int columns[kPieces];
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    columns[piece] = ColumnInTile<kVector>(cut, place.lane, piece);
    inside[piece] = tile_column + columns[piece] < cut.units;
  }
  const auto leaf = [&](int64_t k, int64_t rows, Moments<Scalar>* node) {
    const Element* from = run + k * kLeafRows * cut.units;
    // A full leaf without a condition for each row.
    LoadLeaf<Element, kVector>(from, cut.units,
                               rows == kLeafRows ? kLeafRows : rows, inside,
                               columns, node);
  };
  const Moments<Scalar> moments =
      BlockMoments<Scalar, kCount, kVector, kRunLevels>(cut, place, leaf);
  if (cut.splits == 1) {
    Finish(cut, place.tile, tile_columns, moments, results);
    if (cut.tiles == 1) {
      __syncthreads();
      SumGroups(cut.units, results);
    }
    return;  // the whole grid does
  }
  const int64_t column = tile_column + threadIdx.x;
  if (threadIdx.x < tile_columns && column < cut.units) {
    partials.mean[place.split * cut.units + column] = moments.mean;
    partials.m2[place.split * cut.units + column] = moments.m2;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *partials.ticket = 0;
}

// The moments of all splits to one; a leaf is the node over eight of them. The
// last block to finish adds up the groups.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    MergeSplits(Cut cut, int64_t split_rows, Results<Scalar> results,
                Partials<Scalar> partials) {
  LBE_SHARED(bool, is_last, 1);
  const Place place(cut);
  const int tile_columns = cut.lanes * kMergeColumns;
  const int64_t tile_column = place.tile * tile_columns;
  const int64_t first_split = place.group * int64_t{cut.run} * 8;
  const int64_t all_splits = CeilDiv(cut.rows, split_rows);
  const auto leaf = [&](int64_t k, int64_t, Moments<Scalar>* node) {
    const int64_t split = first_split + k * 8;
#pragma unroll
    for (int c = 0; c < kMergeColumns; ++c) {
      const int64_t column = tile_column + ColumnInTile<1>(cut, place.lane, c);
      Moments<Scalar> nodes[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        nodes[i] = {};
        if (column < cut.units && split + i < all_splits) {
          const int64_t at = (split + i) * cut.units + column;
          nodes[i] = {partials.mean[at], partials.m2[at]};
        }
      }
      MergeEight(nodes, split * split_rows, split_rows, cut.rows);
      node[c] = nodes[0];
    }
  };
  const Moments<Scalar> moments =
      BlockMoments<Scalar, kMergeColumns, 1, kMergeLevels>(cut, place, leaf);
  Finish(cut, place.tile, tile_columns, moments, results);
  // Thread 0 wrote the only sum of this block.
  if (threadIdx.x == 0) {
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

template <typename Element>
struct GradientArguments {
  using Scalar = typename Numbers<Element>::Scalar;
  const Element* x;  // may be dx
  Element* dx;
  const Scalar* mean;
  const Scalar* variance;
  const Scalar* entropy_grad;   // scalar
  const Scalar* mean_grad;      // null without kOffset
  const Scalar* variance_grad;  // null without kOffset
  GradientFactors<Scalar> factors;
};

// A block has the rows of its split, its groups one row each in turn.
template <typename Element, int kVector, bool kOffset>
__global__ void __launch_bounds__(kThreads, 3)
    Gradient(GradientArguments<Element> a, Cut cut) {
  using Scalar = typename Numbers<Element>::Scalar;
  using Piece = Vector<Element, kVector>;
  constexpr int kCount = kColumns<Element>;
  constexpr int kPieces = kCount / kVector;
  const Place place(cut);
  const int64_t tile_column = place.tile * cut.lanes * kCount;
  const Scalar entropy_share = EntropyShare(*a.entropy_grad, a.factors);
  bool inside[kPieces];
  int columns[kPieces];
  Scalar mean[kCount], slope[kCount], offset[kOffset ? kCount : 1];
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    const int piece = c / kVector;
    columns[piece] = ColumnInTile<kVector>(cut, place.lane, piece);
    inside[piece] = tile_column + columns[piece] < cut.units;
    mean[c] = slope[c] = 0;
    if constexpr (kOffset) offset[c] = 0;
    if (inside[piece]) {
      const int64_t column = tile_column + columns[piece] + c % kVector;
      mean[c] = a.mean[column];
      slope[c] = EntropySlope(a.variance[column], entropy_share, a.factors);
      if constexpr (kOffset) {
        slope[c] += VarianceSlope(a.variance_grad[column], a.factors);
        offset[c] = MeanOffset(a.mean_grad[column], a.factors);
      }
    }
  }
  const int groups = cut.groups();
  const int64_t split_first = place.split * cut.block_rows();
  const int64_t end =
      split_first + RowsOf(split_first, cut.block_rows(), cut.rows);
  for (int64_t row = split_first + place.group; row < end;
       row += groups * kGradientBatch) {
    // All rows are read before one is written: dx may be x.
    Piece values[kGradientBatch][kPieces];
#pragma unroll
    for (int r = 0; r < kGradientBatch; ++r) {
      const Element* from = a.x + (row + r * groups) * cut.units + tile_column;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (row + r * groups < end && inside[piece]) {
          values[r][piece] =
              *reinterpret_cast<const Piece*>(from + columns[piece]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kGradientBatch; ++r) {
      Element* to = a.dx + (row + r * groups) * cut.units + tile_column;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (row + r * groups < end && inside[piece]) {
          Piece result;
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const int c = piece * kVector + i;
            const Scalar value =
                Numbers<Element>::Load(values[r][piece].elements[i]);
            if constexpr (kOffset) {
              result.elements[i] = Numbers<Element>::Round(
                  UnitGradient(value, mean[c], slope[c], offset[c]));
            } else {
              result.elements[i] = Numbers<Element>::Round(
                  UnitGradient(value, mean[c], slope[c]));
            }
          }
          *reinterpret_cast<Piece*>(to + columns[piece]) = result;
        }
      }
    }
  }
}

int PowerOfTwoFrom(int64_t value, int largest) {
  int power = 1;
  while (power < value && power < largest) power *= 2;
  return power;
}

// Cuts for threads of `columns` columns and for leaves of `leaf_rows` rows.
// Shorter runs where there would be too few blocks; but two leaves rather than
// a second launch.
Cut CutStatistics(int64_t rows, int64_t units, int columns, int64_t leaf_rows,
                  int64_t blocks) {
  Cut cut = {rows, units, 0, 1 << kRunLevels, leaf_rows, 0, 0};
  cut.lanes = PowerOfTwoFrom(CeilDiv(units, columns), kLanes);
  cut.tiles = CeilDiv(units, cut.lanes * columns);
  cut.splits = CeilDiv(rows, cut.block_rows());
  while (cut.run > 1 && cut.tiles * cut.splits < blocks &&
         !(cut.tiles * cut.splits == 1 && cut.run == 2)) {
    cut.run /= 2;
    cut.splits = CeilDiv(rows, cut.block_rows());
  }
  return cut;
}

// All splits in one block, for each group of columns.
Cut CutMerge(const Cut& statistics) {
  Cut cut = {statistics.rows,
             statistics.units,
             0,
             1,
             8 * statistics.block_rows(),
             0,
             1};
  cut.lanes = PowerOfTwoFrom(CeilDiv(cut.units, kMergeColumns), kLanes);
  cut.tiles = CeilDiv(cut.units, cut.lanes * kMergeColumns);
  while (cut.block_rows() < cut.rows) cut.run *= 2;
  return cut;
}

// As many threads side by side as leave few of them without a column: rows are
// then read and written in long pieces.
Cut CutGradient(int64_t rows, int64_t units, int columns, int64_t blocks) {
  Cut cut = {rows, units, 0, kGradientRows, 1, 0, 0};
  const int64_t vectors = CeilDiv(units, columns);
  cut.lanes = PowerOfTwoFrom(vectors, kThreads);
  while (cut.lanes > kLanes &&
         CeilDiv(vectors, cut.lanes) * cut.lanes > vectors + vectors / 8) {
    cut.lanes /= 2;
  }
  cut.tiles = CeilDiv(vectors, cut.lanes);
  cut.splits = CeilDiv(rows, cut.block_rows());
  while (cut.run > kGradientBatch && cut.tiles * cut.splits < blocks) {
    cut.run /= 2;
    cut.splits = CeilDiv(rows, cut.block_rows());
  }
  return cut;
}

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

// Elements that can be read at once: 16 bytes, or 4 bytes of 16-bit elements,
// or one element. Calls body(std::integral_constant-like) with the number.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <typename Element, typename Body>
int WithVector(int64_t units, const void* x, const void* dx, const Body& body) {
  const uintptr_t pitch = units * sizeof(Element);
  const uintptr_t all =
      pitch | reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(dx);
  if (all % 16 == 0) return body(Constant<kColumns<Element>>());
  if constexpr (sizeof(Element) == 2) {
    if (all % 4 == 0) return body(Constant<2>());
  }
  return body(Constant<1>());
}

template <typename Element>
int Forward(cudaStream_t stream, const void* x, const Cut& cut,
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
      WithVector<Element>(cut.units, x, nullptr, [&](auto vector) -> int {
        LBE_LAUNCH((Statistics<Element, decltype(vector)::value>), blocks,
                   kThreads, stream, static_cast<const Element*>(x), cut,
                   results, partials);
        return cudaGetLastError();
      });
  if (error != cudaSuccess || blocks == 1) return error;
  if (cut.splits == 1) {
    LBE_LAUNCH(Sum<Scalar>, 1, kThreads, stream, cut.units, results);
  } else {
    const Cut merge = CutMerge(cut);
    LBE_LAUNCH(MergeSplits<Scalar>, static_cast<unsigned>(merge.tiles),
               kThreads, stream, merge, cut.block_rows(), results, partials);
  }
  return cudaGetLastError();
}

template <typename Element>
int Backward(cudaStream_t stream, const void* x, const Cut& cut,
             const Formula& formula, const void* mean, const void* variance,
             const void* entropy_grad, const void* mean_grad,
             const void* variance_grad, void* dx) {
  using Scalar = typename Numbers<Element>::Scalar;
  if (!Launchable(cut)) return cudaErrorInvalidConfiguration;
  const GradientArguments<Element> arguments = {
      static_cast<const Element*>(x),
      static_cast<Element*>(dx),
      static_cast<const Scalar*>(mean),
      static_cast<const Scalar*>(variance),
      static_cast<const Scalar*>(entropy_grad),
      static_cast<const Scalar*>(mean_grad),
      static_cast<const Scalar*>(variance_grad),
      GradientFactorsOf<Scalar>(cut.rows, cut.units, formula),
  };
  const unsigned blocks = static_cast<unsigned>(cut.tiles * cut.splits);
  return WithVector<Element>(cut.units, x, dx, [&](auto vector) -> int {
    constexpr int kVector = decltype(vector)::value;
    if (mean_grad != nullptr) {
      LBE_LAUNCH((Gradient<Element, kVector, true>), blocks, kThreads, stream,
                 arguments, cut);
    } else {
      LBE_LAUNCH((Gradient<Element, kVector, false>), blocks, kThreads, stream,
                 arguments, cut);
    }
    return cudaGetLastError();
  });
}

template <typename Element>
Cut CutForward(int64_t rows, int64_t units, int blocks) {
  return CutStatistics(rows, units, kColumns<Element>, kLeafRows, blocks);
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
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name)       \
  case DType::name:                                                         \
    return Backward<element>(                                               \
        static_cast<cudaStream_t>(stream), x,                               \
        CutGradient(rows, units, kColumns<element>, blocks), formula, mean, \
        variance, entropy_grad, mean_grad, variance_grad, dx);
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
  return cudaErrorInvalidValue;
}

int SetZeroCuda(void* stream, void* data, int64_t bytes) {
  return cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
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
