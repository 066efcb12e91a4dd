// SPDX-License-Identifier: Apache-2.0
//
// The launchers of kernels.h: how x is cut, workspaces, launches. All kernels
// are compiled here. Plain CUDA: no TensorFlow header.
//
// A forward pass is one launch of Statistics, after one small memset where it
// needs several blocks: their tickets have to be zeros, and no memory that
// outlives a call could be shared by calls on two streams. A gradient is one
// launch of Gradient, and where a bias wants one, one of SumBias. The moments
// of all layers and replicas merge in one launch of MergeMoments. Nothing but
// kernels and memsets: all of it can be captured in a CUDA graph, and each
// replay starts with tickets of its own.
//
// A kernel may be launched for the first time, and then loaded, while a stream
// is being captured: XLA does so. Drivers for CUDA 12.3 and newer allow that;
// DescribeCuda refuses older ones.
//
// No floating-point atomics; an integer ticket says which block is the last,
// never in which order it adds up. Results have the bits of the CPU's, unless
// they lie within half a unit in the last place of the smallest normal number:
// which of these become zero, each processor decides in its own way.
//
// tests/cuda_emulation.h runs the kernels on the CPU. It asks for shared memory
// through LBE_SHARED, launches through LBE_LAUNCH, full-mask shuffles, no
// inline PTX.

#include <initializer_list>

#include "gradient.cuh"
#include "merge.cuh"
#include "statistics.cuh"

namespace lbe {
namespace {

// Multiprocessors of the GPU that `blocks` = 0 is for, an H100.
constexpr int64_t kMultiprocessors = 132;

int PowerOfTwoFrom(int64_t value, int largest) {
  int power = 1;
  while (power < value && power < largest) power *= 2;
  return power;
}

Cut CutColumns(const Problem& problem, int columns, int lanes) {
  const int tile_columns = lanes * columns;
  int tile_bits = 0;
  while (1 << tile_bits < tile_columns) ++tile_bits;
  return {problem.rows,
          problem.units,
          lanes,
          kThreads / lanes,
          tile_columns,
          tile_bits,
          0,
          CeilDiv(problem.units, tile_columns),
          1};
}

// The blocks that a cut into `tiles` tiles should have at least: `blocks`, or,
// where that is 0, two waves of the `resident` blocks that a multiprocessor has
// at once, so that some read while others compute or wait. An eighth less will
// do, as cuts double from one to the next. Where the tiles already make a wave,
// no more than these: rows that are not split need no merge.
int64_t EnoughBlocks(int blocks, int resident, int64_t tiles) {
  if (blocks > 0) return blocks;
  const int64_t wave = resident * kMultiprocessors;
  return tiles >= wave ? tiles : 2 * wave - 2 * wave / 8;
}

// Halves the runs, from `longest` down to `shortest` rows, where a block would
// have more rows than there are, or where there would be too few blocks.
void CutRows(int longest, int shortest, int64_t enough, Cut* cut) {
  cut->run_rows = longest;
  cut->splits = CeilDiv(cut->rows, cut->block_rows());
  while (cut->run_rows > shortest && (cut->block_rows() / 2 >= cut->rows ||
                                      cut->tiles * cut->splits < enough)) {
    cut->run_rows /= 2;
    cut->splits = CeilDiv(cut->rows, cut->block_rows());
  }
}

template <typename Element>
Cut CutStatistics(const Problem& problem, bool has_epilogue, int blocks) {
  constexpr int kCount = kColumns<Element>;
  Cut cut = CutColumns(problem, kCount,
                       PowerOfTwoFrom(CeilDiv(problem.units, kCount), kLanes));
  // Two leaves in each thread of a single block, rather than a merge of two.
  const bool one_block =
      cut.tiles == 1 && problem.rows <= 2 * kLeafRows * cut.groups;
  const int resident = has_epilogue ? kStatisticsBlocks<Element, kCount, true>
                                    : kStatisticsBlocks<Element, kCount, false>;
  CutRows(kRunRows, one_block ? 2 * kLeafRows : kLeafRows,
          EnoughBlocks(blocks, resident, cut.tiles), &cut);
  return cut;
}

// As many threads side by side as leave few of them without a column: rows are
// then read and written in long pieces. Where rows are added up, at least a
// leaf for each group and kSumRows rows for each block.
template <typename Element, GradientOf kOf>
Cut CutGradient(const Problem& problem, int blocks) {
  constexpr int kCount = kColumns<Element>;
  constexpr bool kSums = kOf == GradientOf::kBiasEpilogue;
  const int64_t vectors = CeilDiv(problem.units, kCount);
  int lanes = PowerOfTwoFrom(vectors, kSums ? kLanes : kThreads);
  while (lanes > kLanes &&
         CeilDiv(vectors, lanes) * lanes > vectors + vectors / 8) {
    lanes /= 2;
  }
  Cut cut = CutColumns(problem, kCount, lanes);
  CutRows(
      kGradientRows, kSums ? kLeafRows : 4,
      EnoughBlocks(blocks, kGradientBlocks<Element, kCount, kOf>, cut.tiles),
      &cut);
  return cut;
}
static_assert(kThreads / kLanes * kLeafRows == kSumRows, "see WriteSums");

constexpr int64_t kMostBlocks = 0x7fffffff;

bool Launchable(const Cut& cut) {
  return cut.splits <= kMostBlocks / cut.tiles;
}

// Parts of the workspace of a forward pass, in bytes from its start.
struct Workspace {
  int64_t tickets;
  int64_t ticket_bytes;  // 0 where a block is alone
  int64_t nodes;
  int64_t bytes;

  // `scalar_bytes` are those of a result. The tickets are those of MergeSplits.
  Workspace(const Cut& cut, int64_t scalar_bytes) {
    const auto align = [](int64_t bytes) { return CeilDiv(bytes, 16) * 16; };
    int64_t count = cut.tiles > 1 || cut.splits > 1 ? 1 : 0;
    for (int64_t left = cut.splits; left > 1;) {
      left = CeilDiv(left, int64_t{1} << ClusterBits(cut));
      count += cut.tiles * left;
    }
    ticket_bytes = count * static_cast<int64_t>(sizeof(unsigned));
    tickets = align(CeilDiv(cut.units, kGroupUnits) * sizeof(double));
    nodes = tickets + align(ticket_bytes);
    const int64_t splits = cut.splits == 1 ? 0 : cut.splits;
    bytes = nodes + 2 * splits * cut.units * scalar_bytes;
  }
};

// Calls `body` with how many elements can be read at once, as a constant: 16
// bytes, or 4 bytes of 16-bit elements, or one element. `arrays` may hold
// nulls.
template <typename Element, typename Body>
int WithVector(int64_t units, std::initializer_list<const void*> arrays,
               const Body& body) {
  uintptr_t all = units * sizeof(Element);
  for (const void* array : arrays) all |= reinterpret_cast<uintptr_t>(array);
  if (all % 16 == 0) {
    return body(std::integral_constant<int, kColumns<Element>>());
  }
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

template <typename Element>
int Forward(cudaStream_t stream, const Problem& problem,
            const ForwardArguments& arguments, int blocks) {
  using Scalar = ScalarOf<Element>;
  const Cut cut =
      CutStatistics<Element>(problem, arguments.epilogue != nullptr, blocks);
  if (!Launchable(cut)) return cudaErrorInvalidConfiguration;
  const Workspace parts(cut, sizeof(Scalar));
  char* base = static_cast<char*>(arguments.workspace);
  const DeviceForward<Scalar> forward = {
      cut,
      {reinterpret_cast<Moments<Scalar>*>(base + parts.nodes),
       reinterpret_cast<unsigned*>(base + parts.tickets)},
      {problem.formula, EntropyFactorsOf<Scalar>(problem.formula),
       static_cast<Scalar*>(arguments.mean),
       static_cast<Scalar*>(arguments.variance),
       static_cast<Scalar*>(arguments.m2),
       static_cast<Scalar*>(arguments.count),
       static_cast<Scalar*>(arguments.entropy),
       static_cast<Scalar*>(arguments.valid), reinterpret_cast<double*>(base)},
  };
  if (parts.ticket_bytes > 0) {
    const int error =
        SetZeroCuda(stream, forward.partials.tickets, parts.ticket_bytes);
    if (error != cudaSuccess) return error;
  }
  DeviceEpilogue<Element> epilogue = {};
  if (MakesY(arguments)) {
    const Epilogue& given = *arguments.epilogue;
    epilogue = {static_cast<Element*>(arguments.y),
                static_cast<const Element*>(given.bias), given.channels,
                given.activation, static_cast<Scalar>(given.slope)};
  }
  const Element* x = static_cast<const Element*>(arguments.x);
  const unsigned grid = static_cast<unsigned>(cut.tiles * cut.splits);
  return WithVector<Element>(cut.units, {x, epilogue.y}, [&](auto vector) {
    constexpr int kVector = decltype(vector)::value;
    return Launched([&] {
      if (epilogue.y != nullptr) {
        LBE_LAUNCH((Statistics<Element, kVector, true>), grid, kThreads, stream,
                   x, epilogue, forward);
      } else {
        LBE_LAUNCH((Statistics<Element, kVector, false>), grid, kThreads,
                   stream, x, epilogue, forward);
      }
    });
  });
}

template <GradientOf kOf, typename Element>
int LaunchGradient(cudaStream_t stream, const Problem& problem,
                   const DeviceGradient<Element>& gradient, int blocks) {
  const Cut cut = CutGradient<Element, kOf>(problem, blocks);
  if (!Launchable(cut)) return cudaErrorInvalidConfiguration;
  const unsigned grid = static_cast<unsigned>(cut.tiles * cut.splits);
  return WithVector<Element>(
      cut.units,
      {gradient.x, gradient.dx, gradient.dy, gradient.mean, gradient.variance,
       gradient.mean_grad, gradient.variance_grad},
      [&](auto vector) {
        constexpr int kVector = decltype(vector)::value;
        return Launched([&] {
          LBE_LAUNCH((Gradient<Element, kVector, kOf>), grid, kThreads, stream,
                     gradient, cut);
        });
      });
}

// Channels side by side in a block, so that reads are long, where the sums of a
// channel are few or the channels make a wave of blocks even so; elsewhere a
// block for each channel, so that a thread has few sums one after the other.
template <typename Element>
int LaunchSumBias(cudaStream_t stream, int64_t count, int64_t channels,
                  const ScalarOf<Element>* sums, Element* dbias) {
  const int64_t side_by_side = CeilDiv(channels, kLanes);
  return Launched([&] {
    if (count <= 4 * kSumParts || side_by_side >= kMultiprocessors) {
      LBE_LAUNCH((SumBias<Element, kLanes>),
                 static_cast<unsigned>(side_by_side), kThreads, stream, sums,
                 count, channels, dbias);
    } else {
      LBE_LAUNCH((SumBias<Element, 1>), static_cast<unsigned>(channels),
                 kThreads, stream, sums, count, channels, dbias);
    }
  });
}

template <typename Element>
int Backward(cudaStream_t stream, const Problem& problem,
             const GradientArguments& arguments, int blocks) {
  using Scalar = ScalarOf<Element>;
  DeviceGradient<Element> gradient = {};
  gradient.x = static_cast<const Element*>(arguments.x);
  gradient.dx = static_cast<Element*>(arguments.dx);
  gradient.mean = static_cast<const Scalar*>(arguments.mean);
  gradient.variance = static_cast<const Scalar*>(arguments.variance);
  gradient.entropy_grad = static_cast<const Scalar*>(arguments.entropy_grad);
  gradient.count = static_cast<const Scalar*>(arguments.count);
  gradient.formula = problem.formula;
  if (gradient.count == nullptr) {
    gradient.factors =
        GradientFactorsOf<Scalar>(problem.rows, problem.units, problem.formula);
  }
  if (arguments.epilogue == nullptr) {
    if (arguments.mean_grad == nullptr) {
      return LaunchGradient<GradientOf::kEntropy>(stream, problem, gradient,
                                                  blocks);
    }
    gradient.mean_grad = static_cast<const Scalar*>(arguments.mean_grad);
    gradient.variance_grad =
        static_cast<const Scalar*>(arguments.variance_grad);
    return LaunchGradient<GradientOf::kStatistics>(stream, problem, gradient,
                                                   blocks);
  }
  const Epilogue& epilogue = *arguments.epilogue;
  gradient.dy = static_cast<const Element*>(arguments.dy);
  gradient.activation = epilogue.activation;
  gradient.slope = static_cast<Scalar>(epilogue.slope);
  if (arguments.dbias == nullptr) {
    return LaunchGradient<GradientOf::kEpilogue>(stream, problem, gradient,
                                                 blocks);
  }
  const int64_t positions = problem.units / epilogue.channels;
  const int64_t count = CeilDiv(problem.rows, kSumRows) * positions;
  Element* const dbias = static_cast<Element*>(arguments.dbias);
  gradient.sums = static_cast<Scalar*>(arguments.workspace);
  if (count == 1) gradient.dbias = dbias;
  const int error = LaunchGradient<GradientOf::kBiasEpilogue>(stream, problem,
                                                              gradient, blocks);
  if (error != cudaSuccess || count == 1) return error;
  return LaunchSumBias<Element>(stream, count, epilogue.channels, gradient.sums,
                                dbias);
}

template <typename Scalar>
int LaunchMerge(cudaStream_t stream, const MergeProblem& problem,
                const MergeArguments& arguments) {
  if (problem.layers > kMostBlocks || problem.replicas > kMostReplicas) {
    return cudaErrorInvalidConfiguration;
  }
  const DeviceMerge<Scalar> merge = {
      problem,
      EntropyFactorsOf<Scalar>(problem.formula),
      static_cast<const Scalar*>(arguments.gathered),
      arguments.ends,
      static_cast<Scalar*>(arguments.mean),
      static_cast<Scalar*>(arguments.variance),
      static_cast<Scalar*>(arguments.count),
      static_cast<Scalar*>(arguments.entropy),
      static_cast<Scalar*>(arguments.valid),
  };
  return Launched([&] {
    LBE_LAUNCH(MergeMoments<Scalar>, static_cast<unsigned>(problem.layers),
               kThreads, stream, merge);
  });
}

template <typename Scalar>
__global__ void Write(Scalar value, Scalar* to) {
  *to = value;
}

}  // namespace

int ForwardCuda(void* stream, const Problem& problem,
                const ForwardArguments& arguments, int blocks) {
  return WithTypes(problem.dtype, [&](auto types) {
    using Element = typename decltype(types)::Element;
    return Forward<Element>(static_cast<cudaStream_t>(stream), problem,
                            arguments, blocks);
  });
}

int GradientCuda(void* stream, const Problem& problem,
                 const GradientArguments& arguments, int blocks) {
  return WithTypes(problem.dtype, [&](auto types) {
    using Element = typename decltype(types)::Element;
    return Backward<Element>(static_cast<cudaStream_t>(stream), problem,
                             arguments, blocks);
  });
}

int MergeMomentsCuda(void* stream, const MergeProblem& problem,
                     const MergeArguments& arguments) {
  return WithTypes(problem.dtype, [&](auto types) {
    return LaunchMerge<typename decltype(types)::Result>(
        static_cast<cudaStream_t>(stream), problem, arguments);
  });
}

int64_t ForwardCudaWorkspace(const Problem& problem, bool has_epilogue,
                             int blocks) {
  return WithTypes(problem.dtype, [&](auto types) {
    using Element = typename decltype(types)::Element;
    const Cut cut = CutStatistics<Element>(problem, has_epilogue, blocks);
    return Workspace(cut, sizeof(typename decltype(types)::Result)).bytes;
  });
}

// A sum for each unit and each kSumRows rows; none where a channel has but one.
int64_t GradientCudaWorkspace(const Problem& problem, int64_t channels) {
  const int64_t row_blocks = CeilDiv(problem.rows, kSumRows);
  if (row_blocks == 1 && problem.units == channels) return 0;
  return row_blocks * problem.units * ResultBytes(problem.dtype);
}

int SetScalarCuda(void* stream, DType dtype, double value, void* scalar) {
  return WithTypes(dtype, [&](auto types) {
    using Scalar = typename decltype(types)::Result;
    return Launched([&] {
      LBE_LAUNCH(Write<Scalar>, 1, 1, static_cast<cudaStream_t>(stream),
                 static_cast<Scalar>(value), static_cast<Scalar*>(scalar));
    });
  });
}

}  // namespace lbe
