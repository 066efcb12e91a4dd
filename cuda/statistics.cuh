// SPDX-License-Identifier: Apache-2.0
//
// The forward kernel: the moments of every column, their merge, the entropy,
// and on the way y of an epilogue. Included by launch.cu.
//
// A block has an aligned, power-of-two number of leaves, so that its moments
// are a node of the canonical tree: how the rows are split never changes a bit
// of the result. Blocks below each other then meet in a tree of tickets: of
// each kMergeNodes * (groups of threads) nodes of a tile, the block that comes
// last merges them and goes on with the result, and the block that finishes the
// last tile adds up the entropies. Who that is changes nothing: whatever is
// merged or added up has its place.

#ifndef LBE_OPS_CUDA_STATISTICS_CUH_
#define LBE_OPS_CUDA_STATISTICS_CUH_

#include "elements.cuh"

namespace lbe {
namespace {

static_assert(kSumLanes == kThreads, "SumGroups has a thread for each lane");

// A thread reads at most 2^kRunLevels leaves, whose moments it keeps in
// registers.
constexpr int kRunLevels = 2;
constexpr int kRunRows = kLeafRows << kRunLevels;

// Nodes of a column that a thread merges at once in MergeSplits.
constexpr int kMergeNodes = 8;

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

// Merges `count` <= kNodes neighbours of `node_rows` rows each into the first
// of them; the last one has `last_rows`. At each level at most one merge is not
// of two whole nodes: its weights are computed once, as they take a division.
template <int kNodes, typename Scalar>
__device__ void MergeNeighbours(Moments<Scalar>* nodes, int count,
                                int64_t node_rows, int64_t last_rows) {
#pragma unroll
  for (int width = 1; width < kNodes; width *= 2) {
    const int64_t rows = width * node_rows;
    const MergeWeights<Scalar> whole = WeightsOf<Scalar>(rows, rows);
    const int last_right = (count - 1) % (2 * width) + 1 - width;
    const MergeWeights<Scalar> last =
        last_right > 0
            ? WeightsOf<Scalar>(rows, (last_right - 1) * node_rows + last_rows)
            : whole;
#pragma unroll
    for (int i = 0; i < kNodes; i += 2 * width) {
      const int right = count - (i + width);
      if (right > 0) {
        nodes[i] =
            Merge(nodes[i], nodes[i + width], right > width ? whole : last);
      }
    }
  }
}

// Merges the nodes [kCount] of all groups of a block, each over its run, which
// together have `block_rows` rows: thread t returns the moments of column
// t of the tile, if the tile has as many. Vectors of kVector columns of a
// thread are contiguous. Has barriers: all threads must call it.
template <int kCount, int kVector, typename Scalar>
__device__ Moments<Scalar> MergeGroups(const Cut& cut, const Place& place,
                                       const Pieces<kVector>& pieces,
                                       int block_rows, Moments<Scalar>* node) {
  // Padded, so that neither threads kVector columns apart nor neighbours meet
  // in a bank.
  constexpr int kPadding = 16;
  constexpr int kWarpSlots = kLanes * kCount * (kPadding + 1) / kPadding;
  LBE_SHARED(Moments<Scalar>, shared, kWarps * kWarpSlots);
  // The groups of a warp, pairwise; the result is in the first lanes.
  const int below = block_rows - place.group * cut.run_rows;
  int rows = cut.run_rows;
  for (int lanes = cut.lanes; lanes < kLanes; lanes *= 2, rows *= 2) {
    const int right_rows = min(below - rows, rows);
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
  if (Thread() < cut.tile_columns) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      nodes[w] = shared[w * kWarpSlots + Thread() + Thread() / kPadding];
    }
    const int count = (block_rows - 1) / rows + 1;
    MergeNeighbours<kWarps>(nodes, count, rows,
                            block_rows - (count - 1) * rows);
  }
  return nodes[0];
}

// Where results go, and how they are made of moments.
template <typename Scalar>
struct Results {
  Formula formula;
  EntropyFactors<Scalar> factors;
  Scalar* mean;        // [units]
  Scalar* variance;    // [units]
  Scalar* m2;          // [units]: the moments alone are wanted; or null
  Scalar* count;       // scalar, with m2; or null
  Scalar* entropy;     // scalar
  Scalar* valid;       // scalar, or null
  double* group_sums;  // [units / kGroupUnits], rounded up
};

// What blocks leave for each other where there are several.
template <typename Scalar>
struct Partials {
  // [splits, units], of a split of the rows each. What is merged of several
  // stands in the place of the first of them.
  Moments<Scalar>* nodes;
  // Zeros at first: one of the tiles, then for each level of MergeSplits one of
  // each tile and cluster.
  unsigned* tickets;
};

// A block merges 2^ClusterBits nodes of a tile at once: each of its groups of
// threads kMergeNodes.
static_assert(kThreads == 256 && kMergeNodes == 8, "2^8 and 2^3");
__host__ __device__ inline int ClusterBits(const Cut& cut) {
  return 8 + 3 - cut.tile_bits;
}

// Whether this block is the last of `count` to come here with this ticket. What
// the others wrote before they came can then be read, by __ldcg: the first
// cache may hold what was there before. Has barriers: all threads must call it.
__device__ inline bool IsLast(unsigned* ticket, int64_t count) {
  LBE_SHARED(bool, is_last, 1);
  // All threads have written, and nobody reads the answer of the last call.
  __syncthreads();
  if (Thread() == 0) {
    __threadfence();
    is_last[0] = atomicAdd(ticket, 1u) + 1 == count;
    if (is_last[0]) __threadfence();
  }
  __syncthreads();
  return is_last[0];
}

// Moments that another block may have written.
__device__ inline Moments<float> ReadNode(const Moments<float>* node) {
  const float2 read = __ldcg(reinterpret_cast<const float2*>(node));
  return {read.x, read.y};
}
__device__ inline Moments<double> ReadNode(const Moments<double>* node) {
  const double2 read = __ldcg(reinterpret_cast<const double2*>(node));
  return {read.x, read.y};
}

// Merges the moments of this block, thread t for column t of the tile, with
// those of the blocks above and below it. Returns false in blocks that are not
// the last of their tile, and the moments of all rows in the one that is:
//
//   nodes = the moments of the splits, in their order
//   while there are several nodes:
//     each 2^ClusterBits neighbours, the last ones fewer, become one, by the
//     canonical tree; the block that wrote the last of them does it
//
// Has barriers: all threads must call it.
template <typename Scalar>
__device__ bool MergeSplits(const Cut& cut, const Place& place,
                            const Partials<Scalar>& partials,
                            Moments<Scalar>* moments) {
  LBE_SHARED(Moments<Scalar>, shared, kThreads);
  const int cluster_bits = ClusterBits(cut);
  const int group = Thread() >> cut.tile_bits;
  const int64_t column =
      place.first_column(cut) + (Thread() & (cut.tile_columns - 1));
  const bool inside = column < cut.units;
  unsigned* tickets = partials.tickets + 1;
  int nodes = static_cast<int>(cut.splits);  // of this level
  int own = place.split;                     // of them, this block's
  int64_t node_rows = cut.block_rows();
  int64_t pitch = cut.units;  // from a node to the next one
#pragma unroll 1
  while (nodes > 1) {
    if (group == 0 && inside) partials.nodes[own * pitch + column] = *moments;
    own >>= cluster_bits;
    const int first = own << cluster_bits;
    const int present = min(nodes - first, 1 << cluster_bits);
    if (!IsLast(&tickets[own * cut.tiles + place.tile], present)) return false;
    // Only the last node of all may be short.
    const int64_t last_rows = first + present < nodes
                                  ? node_rows
                                  : cut.rows - (nodes - 1) * node_rows;
    // Each group of threads has kMergeNodes of the cluster's nodes, one thread
    // for each column.
    const int own_present = present - group * kMergeNodes;
    if (inside && own_present > 0) {
      Moments<Scalar> own_nodes[kMergeNodes] = {};
      const Moments<Scalar>* from =
          partials.nodes + (first + group * kMergeNodes) * pitch + column;
#pragma unroll
      for (int i = 0; i < kMergeNodes; ++i, from += pitch) {
        if (i < own_present) own_nodes[i] = ReadNode(from);
      }
      MergeNeighbours<kMergeNodes>(
          own_nodes, min(own_present, kMergeNodes), node_rows,
          own_present <= kMergeNodes ? last_rows : node_rows);
      *moments = own_nodes[0];
    }
    // The groups, pairwise, through shared memory.
#pragma unroll 1
    for (int width = 1; width < kThreads >> cut.tile_bits; width *= 2) {
      shared[Thread()] = *moments;
      __syncthreads();
      const int right = own_present - width * kMergeNodes;  // nodes there
      if (group % (2 * width) == 0 && right > 0) {
        const int64_t rows = width * kMergeNodes * node_rows;
        const int64_t right_rows = right > width * kMergeNodes
                                       ? rows
                                       : (right - 1) * node_rows + last_rows;
        MergeColumns<1>(moments, rows,
                        &shared[Thread() + (width << cut.tile_bits)],
                        right_rows, moments);
      }
      __syncthreads();
    }
    nodes = ((nodes - 1) >> cluster_bits) + 1;
    tickets += cut.tiles * nodes;
    node_rows <<= cluster_bits;
    pitch <<= cluster_bits;
  }
  return true;
}

// Adds up the sums of all groups to the entropy, in the order of
// batch_entropy.h. Has barriers.
template <typename Scalar>
__device__ void SumGroups(int64_t units, const Results<Scalar>& results) {
  const int64_t groups = CeilDiv(units, kGroupUnits);
  double sum = 0;
#pragma unroll 8
  for (int64_t group = Thread(); group < groups; group += kSumLanes) {
    sum += __ldcg(&results.group_sums[group]);
  }
  sum = SumHalvesInBlock<kSumLanes>(sum);
  if (Thread() == 0) {
    *results.entropy = static_cast<Scalar>(sum / static_cast<double>(units));
    if (results.valid != nullptr) *results.valid = Scalar(1);
  }
}

// Makes mean and variance of the moments of all rows, thread t for column t of
// the tile, and the sum of each group's entropies. Has barriers.
template <typename Scalar>
__device__ void Finish(const Cut& cut, int tile, const Moments<Scalar>& moments,
                       const Results<Scalar>& results) {
  const int64_t column = int64_t{tile} * cut.tile_columns + Thread();
  double entropy = 0;
  if (Thread() < cut.tile_columns && column < cut.units) {
    const Scalar variance =
        Variance<Scalar>(moments.m2, cut.rows, results.formula);
    results.mean[column] = moments.mean;
    results.variance[column] = variance;
    entropy = UnitEntropy<Scalar>(variance, results.factors);
  }
  const double sum = SumHalvesInBlock<kGroupUnits>(entropy);
  if (Thread() % kGroupUnits == 0 && Thread() < cut.tile_columns &&
      column < cut.units) {
    results.group_sums[column / kGroupUnits] = sum;
  }
}

// Writes the moments of all rows, thread t for column t of the tile.
template <typename Scalar>
__device__ void WriteMoments(const Cut& cut, int tile,
                             const Moments<Scalar>& moments,
                             const Results<Scalar>& results) {
  const int64_t column = int64_t{tile} * cut.tile_columns + Thread();
  if (Thread() < cut.tile_columns && column < cut.units) {
    results.mean[column] = moments.mean;
    results.m2[column] = moments.m2;
  }
  if (column == 0 && results.count != nullptr) {
    *results.count = static_cast<Scalar>(cut.rows);
  }
}

// A forward pass as the kernel takes it.
template <typename Scalar>
struct DeviceForward {
  Cut cut;
  Partials<Scalar> partials;
  Results<Scalar> results;
};

// What a block does with its moments, thread t with those of column t of the
// tile. A function of its own, and not part of each kernel: its code is the
// same for all that have these results, and its registers are needed after
// those of the loop over the rows. Has barriers: all threads must call it.
template <typename Scalar>
__device__ __noinline__ void FinishBlock(const DeviceForward<Scalar>& forward,
                                         Moments<Scalar> moments) {
  const Cut& cut = forward.cut;
  const Place place(cut);
  // All threads of a block return, or none.
  if (!MergeSplits(cut, place, forward.partials, &moments)) return;
  if (forward.results.m2 != nullptr) {
    WriteMoments(cut, place.tile, moments, forward.results);
    return;
  }
  Finish(cut, place.tile, moments, forward.results);
  if (cut.tiles == 1) {
    __syncthreads();
  } else if (!IsLast(&forward.partials.tickets[0], cut.tiles)) {
    return;
  }
  SumGroups(cut.units, forward.results);
}

// An Epilogue as the kernel takes it: what makes y = activation(z + bias) of
// what it reads.
template <typename Element>
struct DeviceEpilogue {
  Element* y;           // [rows, units], may be z; null without an epilogue
  const Element* bias;  // [channels], or null
  int64_t channels;
  Activation activation;
  ScalarOf<Element> slope;
};

// Makes y of the columns of a thread.
template <typename Element, int kVector>
class Maker {
 public:
  // `first` is the tile's first column.
  __device__ Maker(const DeviceEpilogue<Element>& epilogue,
                   const Pieces<kVector>& pieces, int64_t first)
      : epilogue_(epilogue) {
    // Each thread has a place of its own; no register is left for it.
    constexpr int kPieces = kColumns<Element> / kVector;
    LBE_SHARED(PieceWords, shared, kThreads * kPieces);
    bias_ = shared + Thread();
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Vector<Element, kVector> bias = {};
      if (epilogue.bias != nullptr && pieces.inside(piece)) {
        int64_t channel = (first + pieces.column(piece)) % epilogue.channels;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          bias.elements[i] = epilogue.bias[channel];
          channel = channel + 1 == epilogue.channels ? 0 : channel + 1;
        }
      }
      bias_[piece * kThreads] = BitCast<PieceWords>(bias);
    }
  }

  // Makes y of leaf rows [0, rows) of z in `values` and writes it to where the
  // first of them has it, `offset` elements into y. The code of the activations
  // that take a few instructions is unrolled for whole vectors; any other
  // stands once, which keeps compilation short.
  __device__ __forceinline__ void operator()(
      int piece, int64_t offset, int rows, int64_t pitch,
      Words<Element, kVector> (&values)[kLeafRows]) const {
    Element* to = epilogue_.y + offset;
    const auto bias =
        BitCast<Vector<Element, kVector>>(bias_[piece * kThreads]);
    WithActivation(epilogue_.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      constexpr bool kUnrolled =
          kVector == kColumns<Element> && kIsCheap<kActivation>;
      constexpr int kUnroll = kUnrolled ? kLeafRows : 1;
      ForEachRow<kUnroll>(values, [&](int r, PieceWords* row) {
        if (r >= rows) return;
        const auto z = BitCast<Vector<Element, kVector>>(*row);
        Scalar y[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          y[i] = Activate<kActivation>(
              Convert<Element>::Load(z.elements[i]) +
                  Convert<Element>::Load(bias.elements[i]),
              epilogue_.slope);
        }
        *row = RoundToWords<Element>(y);
        WriteWords<Element, kVector>(*row, to);
        to += pitch;
      });
    });
  }

 private:
  using Scalar = ScalarOf<Element>;
  using PieceWords = Words<Element, kVector>;

  const DeviceEpilogue<Element>& epilogue_;
  PieceWords* bias_;
};

// Leaf rows [0, rows) of the columns of a thread, the first of which is `first`
// elements into x; zeros where x has none. All is read before any is used.
template <typename Element, int kVector>
__device__ __forceinline__ void ReadLeaf(
    const Element* x, int64_t first, int64_t pitch, int rows,
    const Pieces<kVector>& pieces,
    Words<Element, kVector> (*values)[kLeafRows]) {
#pragma unroll
  for (int piece = 0; piece < kColumns<Element> / kVector; ++piece) {
    const Element* from = x + first + pieces.column(piece);
#pragma unroll
    for (int r = 0; r < kLeafRows; ++r, from += pitch) {
      values[piece][r] = {};
      if (r < rows && pieces.inside(piece)) {
        values[piece][r] = ReadWords<Element, kVector>(from);
      }
    }
  }
}

template <typename Element, int kVector, typename Scalar>
__device__ __forceinline__ void MomentsOfLeaf(
    const Words<Element, kVector> (*values)[kLeafRows], int rows,
    Moments<Scalar>* node) {
#pragma unroll
  for (int piece = 0; piece < kColumns<Element> / kVector; ++piece) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      Scalar of_column[kLeafRows];
#pragma unroll
      for (int r = 0; r < kLeafRows; ++r) {
        of_column[r] = Convert<Element>::Load(
            BitCast<Vector<Element, kVector>>(values[piece][r]).elements[i]);
      }
      node[piece * kVector + i] = LeafMoments<Scalar>(of_column, rows);
    }
  }
}

// Blocks on a multiprocessor at once, for which the compiler leaves registers.
template <typename Element, int kVector, bool kEpilogue>
constexpr int kStatisticsBlocks = sizeof(Element) == 2 && kVector == 1  ? 1
                                  : kEpilogue                           ? 2
                                  : sizeof(Element) == 4 && kVector > 1 ? 3
                                                                        : 2;

template <typename Element, int kVector, bool kEpilogue>
__global__ void __launch_bounds__(
    kThreads, kStatisticsBlocks<Element, kVector, kEpilogue>)
    Statistics(
        const Element* x, DeviceEpilogue<Element> epilogue,
        const __grid_constant__ DeviceForward<ScalarOf<Element>> forward) {
  const Cut& cut = forward.cut;
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = kColumns<Element>;
  const Place place(cut);
  const int block_rows = place.rows(cut);
  const int own_first = place.group * cut.run_rows;
  const int own_rows = RowsOf(own_first, cut.run_rows, block_rows);
  const Pieces<kVector> pieces(cut, place);

  Moments<Scalar> node[kCount] = {};
  Moments<Scalar> stack[kRunLevels][kCount];
  const auto for_each_leaf = [&](const auto& moments_of_leaf) {
    int64_t offset = (place.first_row(cut) + own_first) * cut.units +
                     place.first_column(cut);
#pragma unroll 1
    for (int k = 0; k * kLeafRows < own_rows; ++k) {
      const int rows = min(own_rows - k * kLeafRows, kLeafRows);
      moments_of_leaf(offset, rows);
      Push<0>(k, (k + 1) * kLeafRows >= own_rows, rows, stack, node);
      offset += kLeafRows * cut.units;
    }
  };
  // Whole leaves, without a condition for each row, and the last one.
  Words<Element, kVector> values[kCount / kVector][kLeafRows];
  const auto with_rows = [](int rows, const auto& body) {
    if (rows == kLeafRows) {
      body(kLeafRows);
    } else {
      body(rows);
    }
  };
  if constexpr (kEpilogue) {
    const Maker<Element, kVector> make(epilogue, pieces,
                                       place.first_column(cut));
    for_each_leaf([&](int64_t offset, int rows) {
      with_rows(rows, [&](int rows) {
        ReadLeaf<Element>(x, offset, cut.units, rows, pieces, values);
      });
#pragma unroll
      for (int piece = 0; piece < kCount / kVector; ++piece) {
        if (pieces.inside(piece)) {
          make(piece, offset + pieces.column(piece), rows, cut.units,
               values[piece]);
        }
      }
      with_rows(rows, [&](int rows) {
        MomentsOfLeaf<Element, kVector>(values, rows, node);
      });
    });
  } else {
    for_each_leaf([&](int64_t offset, int rows) {
      with_rows(rows, [&](int rows) {
        ReadLeaf<Element>(x, offset, cut.units, rows, pieces, values);
        MomentsOfLeaf<Element, kVector>(values, rows, node);
      });
    });
  }

  FinishBlock(forward,
              MergeGroups<kCount>(cut, place, pieces, block_rows, node));
}

}  // namespace
}  // namespace lbe

#endif  // LBE_OPS_CUDA_STATISTICS_CUH_
