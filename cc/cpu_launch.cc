// SPDX-License-Identifier: Apache-2.0
//
// The CPU launchers: picks the instruction set, cuts the work into parts and
// runs them on the caller's threads. How it is cut never changes a result.

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu_loops.h"
#include "cpu_processor.h"
#include "kernels.h"

namespace lbe {
namespace {

// Below this many bytes waking another thread costs more than it saves.
constexpr int64_t kSerialBytes = 1 << 20;
// Parts a thread, so that a thread that is late does not hold up the others.
constexpr int64_t kPartsPerThread = 4;
// Pieces smaller than these are not worth a part of their own.
constexpr int64_t kMinPartRows = 512;
constexpr int64_t kMinTile = 256;
// A gradient larger than this would push everything else out of the caches.
constexpr int64_t kStreamBytes = 16 << 20;

Simd ChooseSimd() {
  const char* const wanted = std::getenv("LBE_OPS_SIMD");
  Simd best = {};
  for (const Simd& simd : InstructionSets()) {
    if (!simd.is_there) continue;
    if (best.loops == nullptr) best = simd;
    if (wanted != nullptr && std::strcmp(wanted, simd.name) == 0) return simd;
  }
  return best;
}

const Simd& ChosenSimd() {
  static const Simd simd = ChooseSimd();
  return simd;
}

const CpuLoops& LoopsFor(DType dtype) {
  return ChosenSimd().loops[static_cast<int>(dtype)];
}

// Asks for huge pages where a large result is about to be written, as a rule
// for the first time: the system then clears 2 MB a fault instead of 4 KB.
// Advice only; nothing is lost where it is not taken.
void AdviseHugePages(void* data, int64_t bytes) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (first + bytes) / kHugePage * kHugePage;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs the items: one after the other where all of them read or write few
// bytes, else on a worker a thread, which take the next item until there is
// none. One call of the pool for each thread, not for each item: waking threads
// is what costs.
template <typename Body>
void Run(const Parallel& parallel, int64_t items, int64_t bytes,
         const Body& body) {
  struct Shared {
    const Body& body;
    const int64_t items;
    std::atomic<int64_t> next{0};
  } shared{body, items};
  const auto work = [](void* argument) {
    FloatingPointMode mode;
    Shared& shared = *static_cast<Shared*>(argument);
    for (int64_t item = shared.next++; item < shared.items;
         item = shared.next++) {
      shared.body(item);
    }
  };
  const int workers =
      static_cast<int>(std::min<int64_t>(parallel.threads, items));
  if (workers == 1 || bytes < kSerialBytes) {
    work(&shared);
  } else {
    parallel.run(parallel.pool, workers, work, &shared);
  }
}

// How the forward pass is cut: into parts of rows that are whole nodes of the
// tree, and tiles of columns. The last tile also has what is left of fewer than
// kGroupUnits columns.
struct ForwardCut {
  int64_t tile_columns;
  int64_t tiles;
  int64_t part_rows;
  int64_t parts;
};

int64_t TilesOf(int64_t units, int64_t tile) {
  return std::max<int64_t>(1, CeilDiv(units - kGroupUnits + 1, tile));
}

ForwardCut CutForward(const Problem& problem, int threads) {
  const int64_t rows = problem.rows, units = problem.units;
  const bool serial =
      rows * units * LoopsFor(problem.dtype).element_bytes < kSerialBytes;
  const int64_t wanted = serial ? 1 : threads * kPartsPerThread;
  // Long pieces of rows are read fastest: cut the rows first, then the columns.
  int64_t tile = std::min(kTile, CeilDiv(units, kGroupUnits) * kGroupUnits);
  int64_t part = kPartRows;
  while (part > kMinPartRows &&
         TilesOf(units, tile) * CeilDiv(rows, part) < wanted) {
    part /= 2;
  }
  const int64_t parts = CeilDiv(rows, part);
  if (TilesOf(units, tile) * parts < wanted) {
    tile = std::max(
        CeilDiv(CeilDiv(units * parts, wanted), kGroupUnits) * kGroupUnits,
        std::min(tile, kMinTile));
  }
  return {tile, TilesOf(units, tile), part, parts};
}

// Merges the moments of parts [first, first + parts) into those of the first.
void MergeParts(const CpuLoops& loops, const ForwardCut& cut, int64_t rows,
                int64_t first, int64_t parts, int64_t columns, int64_t pitch,
                char* mean, char* m2) {
  if (parts == 1) return;
  const int64_t left = LeftLeaves(parts);
  const int64_t middle = first + left;
  MergeParts(loops, cut, rows, first, left, columns, pitch, mean, m2);
  MergeParts(loops, cut, rows, middle, parts - left, columns, pitch, mean, m2);
  const int64_t end = std::min((first + parts) * cut.part_rows, rows);
  loops.merge(left * cut.part_rows, end - middle * cut.part_rows, columns,
              mean + middle * pitch, m2 + middle * pitch, mean + first * pitch,
              m2 + first * pitch);
}

// The entropy of a layer, of its groups' sums: in the order of batch_entropy.h.
class EntropySum {
 public:
  // The sums of the groups that follow. REQUIRES: a FloatingPointMode.
  void Add(const double* group_sums, int64_t groups) {
    for (int64_t i = 0; i < groups; ++i) {
      lanes_[added_++ % kSumLanes] += group_sums[i];
    }
  }
  // Once, at the end.
  double Mean(int64_t units) {
    return SumHalves<kSumLanes>(lanes_) / static_cast<double>(units);
  }

 private:
  double lanes_[kSumLanes] = {};
  int64_t added_ = 0;
};

// Units of a layer that are merged at once: whole groups, and so few that what
// each level of the tree keeps of them fits into a cache.
constexpr int64_t kMergeUnits = 16 * kGroupUnits;

// Merges the moments of `units` <= kMergeUnits units of a layer, from `unit`
// on, to mean and m2, by the tree over so many replicas, whose rows are
// `gathered`. A replica that has no row of the layer is passed over. Returns
// their rows.
template <typename Scalar>
int64_t MergeReplicas(const MergeProblem& problem, const Scalar* gathered,
                      int64_t replicas, int64_t layer, int64_t unit,
                      int64_t units, Scalar* mean, Scalar* m2) {
  if (replicas == 1) {
    const Scalar* means = gathered + problem.layers + unit;
    std::copy_n(means, units, mean);
    std::copy_n(means + problem.units, units, m2);
    return RowsOfCount(gathered[layer]);
  }
  const int64_t left = LeftLeaves(replicas);
  const int64_t a =
      MergeReplicas(problem, gathered, left, layer, unit, units, mean, m2);
  Scalar b_mean[kMergeUnits], b_m2[kMergeUnits];
  const int64_t b =
      MergeReplicas(problem, gathered + left * PitchOf(problem),
                    replicas - left, layer, unit, units, b_mean, b_m2);
  if (a == 0) {
    std::copy_n(b_mean, units, mean);
    std::copy_n(b_m2, units, m2);
  } else if (b > 0) {
    LoopsFor(problem.dtype).merge(a, b, units, b_mean, b_m2, mean, m2);
  }
  return a + b;
}

// Merges the moments of one layer, and makes its results of them.
template <typename Scalar>
void MergeLayer(const MergeProblem& problem, const MergeArguments& arguments,
                int64_t layer) {
  const auto at = [](void* base, int64_t index) {
    return static_cast<Scalar*>(base) + index;
  };
  const Scalar* gathered = static_cast<const Scalar*>(arguments.gathered);
  const auto [begin, end] = FindLayer(arguments.ends, layer, problem.units);
  int64_t rows = 0;
  for (int64_t r = 0; r < problem.replicas; ++r) {
    rows += RowsOfCount(gathered[r * PitchOf(problem) + layer]);
  }
  const bool valid = rows >= 2 && begin < end;
  const Problem merged = {problem.dtype, rows, end - begin, problem.formula};
  EntropySum sum;
  for (int64_t unit = begin; unit < end; unit += kMergeUnits) {
    const int64_t units = std::min(kMergeUnits, end - unit);
    Scalar* const variance = at(arguments.variance, unit);
    MergeReplicas(problem, gathered, problem.replicas, layer, unit, units,
                  at(arguments.mean, unit), variance);
    if (valid) {
      double group_sums[kMergeUnits / kGroupUnits];
      LoopsFor(problem.dtype).finish(merged, units, variance, group_sums);
      sum.Add(group_sums, CeilDiv(units, kGroupUnits));
    } else {
      std::fill_n(variance, units, Scalar(0));
    }
  }
  *at(arguments.count, layer) = static_cast<Scalar>(rows);
  *at(arguments.valid, layer) = valid ? Scalar(1) : Scalar(0);
  *at(arguments.entropy, layer) =
      valid ? static_cast<Scalar>(sum.Mean(end - begin)) : Scalar(0);
}

// Adds up the sums [count, channels] of a bias's gradient into the first ones,
// in the order of activations.h.
template <typename Scalar>
void AddSums(const Parallel& parallel, int64_t count, int64_t channels,
             Scalar* sums) {
  constexpr int64_t kAtOnce = 64;
  Run(parallel, CeilDiv(channels, kAtOnce), count * channels * sizeof(Scalar),
      [&](int64_t item) {
        const int64_t begin = item * kAtOnce;
        const int64_t width = std::min(kAtOnce, channels - begin);
        const int64_t parts = std::min<int64_t>(kSumParts, count);
        std::array<double, kAtOnce> totals[kSumParts];
        std::fill_n(totals, parts, std::array<double, kAtOnce>{});
        for (int64_t i = 0; i < count; ++i) {
          const Scalar* from = sums + i * channels + begin;
          auto& to = totals[i % kSumParts];
          for (int64_t c = 0; c < width; ++c) to[c] += from[c];
        }
        for (int64_t half = kSumParts / 2; half > 0; half /= 2) {
          for (int64_t i = half; i < std::min(2 * half, parts); ++i) {
            for (int64_t c = 0; c < width; ++c) {
              totals[i - half][c] += totals[i][c];
            }
          }
        }
        for (int64_t c = 0; c < width; ++c) {
          sums[begin + c] = static_cast<Scalar>(totals[0][c]);
        }
      });
}

// Whether a batch of so many rows has an entropy.
bool HasEntropy(const Problem& problem, const void* count) {
  return WithTypes(problem.dtype, [&](auto types) {
    using Scalar = typename decltype(types)::Result;
    return RowsOfCount(*static_cast<const Scalar*>(count)) >= 2;
  });
}

int64_t SumsOf(const Problem& problem) {
  return CeilDiv(problem.rows, kSumRows) * problem.units;
}

void EpilogueGradient(const Parallel& parallel, const Problem& problem,
                      const GradientArguments& arguments) {
  const CpuLoops& loops = LoopsFor(problem.dtype);
  const int64_t rows = problem.rows, units = problem.units;
  const int64_t tiles = CeilDiv(units, kTile);
  const int64_t wanted = parallel.threads * kPartsPerThread;
  const int64_t item_rows =
      CeilDiv(CeilDiv(rows * tiles, wanted), kSumRows) * kSumRows;
  Run(parallel, CeilDiv(rows, item_rows) * tiles,
      2 * rows * units * loops.element_bytes, [&](int64_t item) {
        const int64_t row = item / tiles * item_rows;
        const int64_t column = item % tiles * kTile;
        loops.epilogue_gradient(problem, arguments,
                                {row, std::min(item_rows, rows - row), column,
                                 std::min(kTile, units - column)});
      });
  if (arguments.dbias == nullptr) return;
  const int64_t channels = arguments.epilogue->channels;
  WithTypes(problem.dtype, [&](auto types) {
    AddSums(
        parallel, SumsOf(problem) / channels, channels,
        static_cast<typename decltype(types)::Result*>(arguments.workspace));
  });
  loops.round(arguments.workspace, channels, arguments.dbias);
}

}  // namespace

const char* CpuSimdLevel() { return ChosenSimd().name; }

const char* CpuSimdLevels() { return kSimdLevels; }

int64_t ForwardCpuWorkspace(const Problem& problem, int threads) {
  const ForwardCut cut = CutForward(problem, threads);
  const int64_t sums = CeilDiv(problem.units, kGroupUnits) * sizeof(double);
  const int64_t moments =
      cut.parts > 1 ? 2 * cut.parts * problem.units * ResultBytes(problem.dtype)
                    : 0;
  return CeilDiv(sums, 64) * 64 + moments;
}

void ForwardCpu(const Parallel& parallel, const Problem& problem,
                const ForwardArguments& given) {
  ForwardArguments arguments = given;
  if (!MakesY(given)) arguments.epilogue = nullptr;
  const CpuLoops& loops = LoopsFor(problem.dtype);
  const int64_t rows = problem.rows, units = problem.units;
  const ForwardCut cut = CutForward(problem, parallel.threads);
  const int64_t result_bytes = ResultBytes(problem.dtype);
  const int64_t groups = CeilDiv(units, kGroupUnits);
  double* sums = static_cast<double*>(arguments.workspace);
  const auto at = [&](void* base, int64_t index) {
    return static_cast<char*>(base) + index * result_bytes;
  };
  const bool moments_alone = arguments.m2 != nullptr;
  void* const m2 = moments_alone ? arguments.m2 : arguments.variance;
  const auto finish = [&](int64_t column, int64_t columns) {
    if (moments_alone) return;
    loops.finish(problem, columns, at(arguments.variance, column),
                 sums + column / kGroupUnits);
  };
  const auto columns_of = [&](int64_t tile) {
    return tile + 1 == cut.tiles ? units - tile * cut.tile_columns
                                 : cut.tile_columns;
  };
  const int64_t bytes = rows * units * loops.element_bytes;
  if (cut.parts == 1) {
    Run(parallel, cut.tiles, bytes, [&](int64_t tile) {
      const int64_t column = tile * cut.tile_columns;
      const int64_t columns = columns_of(tile);
      loops.moments(problem, arguments, {0, rows, column, columns},
                    at(arguments.mean, column), at(m2, column));
      finish(column, columns);
    });
  } else {
    // Part p's moments: means at part_mean + p * pitch, m2 alike.
    const int64_t pitch = units * result_bytes;
    char* part_mean = static_cast<char*>(arguments.workspace) +
                      CeilDiv(groups * sizeof(double), 64) * 64;
    char* part_m2 = part_mean + cut.parts * pitch;
    Run(parallel, cut.tiles * cut.parts, bytes, [&](int64_t item) {
      const int64_t part = item / cut.tiles;
      const int64_t column = item % cut.tiles * cut.tile_columns;
      const int64_t row = part * cut.part_rows;
      loops.moments(problem, arguments,
                    {row, std::min(cut.part_rows, rows - row), column,
                     columns_of(item % cut.tiles)},
                    at(part_mean + part * pitch, column),
                    at(part_m2 + part * pitch, column));
    });
    Run(parallel, cut.tiles, 2 * cut.parts * pitch, [&](int64_t tile) {
      const int64_t column = tile * cut.tile_columns;
      const int64_t columns = columns_of(tile);
      char* tile_mean = at(part_mean, column);
      char* tile_m2 = at(part_m2, column);
      MergeParts(loops, cut, rows, 0, cut.parts, columns, pitch, tile_mean,
                 tile_m2);
      std::memcpy(at(arguments.mean, column), tile_mean,
                  columns * result_bytes);
      std::memcpy(at(m2, column), tile_m2, columns * result_bytes);
      finish(column, columns);
    });
  }
  if (moments_alone) {
    if (arguments.count != nullptr) {
      SetScalar(problem.dtype, static_cast<double>(rows), arguments.count);
    }
    return;
  }
  FloatingPointMode mode;
  EntropySum sum;
  sum.Add(sums, groups);
  SetScalar(problem.dtype, sum.Mean(units), arguments.entropy);
  if (arguments.valid != nullptr) SetScalar(problem.dtype, 1, arguments.valid);
}

int64_t GradientCpuWorkspace(const Problem& problem, int64_t /*channels*/) {
  return SumsOf(problem) * ResultBytes(problem.dtype);
}

void GradientCpu(const Parallel& parallel, const Problem& problem,
                 const GradientArguments& arguments) {
  if (arguments.epilogue != nullptr) {
    return EpilogueGradient(parallel, problem, arguments);
  }
  const CpuLoops& loops = LoopsFor(problem.dtype);
  const int64_t rows = problem.rows, units = problem.units;
  const int64_t pitch = units * loops.element_bytes;
  const int64_t bytes = rows * pitch;
  if (arguments.count != nullptr && !HasEntropy(problem, arguments.count)) {
    std::memset(arguments.dx, 0, bytes);
    return;
  }
  const bool stream =
      arguments.dx != arguments.x && bytes > kStreamBytes && pitch % 64 == 0;
  if (stream) AdviseHugePages(arguments.dx, bytes);
  const int64_t tiles = CeilDiv(units, kTile);
  // What is needed of columns is made anew for each item, at the price of a few
  // rows.
  const int64_t wanted = parallel.threads * kPartsPerThread;
  const int64_t item_rows =
      std::min(rows, std::max<int64_t>(32, CeilDiv(rows * tiles, wanted)));
  Run(parallel, CeilDiv(rows, item_rows) * tiles, bytes, [&](int64_t item) {
    const int64_t row = item / tiles * item_rows;
    const int64_t column = item % tiles * kTile;
    loops.gradient(problem, arguments,
                   {row, std::min(item_rows, rows - row), column,
                    std::min(kTile, units - column)},
                   stream);
  });
}

void MergeMomentsCpu(const Parallel& parallel, const MergeProblem& problem,
                     const MergeArguments& arguments) {
  WithTypes(problem.dtype, [&](auto types) {
    using Scalar = typename decltype(types)::Result;
    Run(parallel, problem.layers,
        problem.replicas * PitchOf(problem) * sizeof(Scalar),
        [&](int64_t layer) { MergeLayer<Scalar>(problem, arguments, layer); });
  });
}

}  // namespace lbe
