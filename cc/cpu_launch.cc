// SPDX-License-Identifier: Apache-2.0
//
// The CPU launchers: picks the instruction set, cuts the work into parts and
// runs them on the caller's threads. How it is cut never changes a result.

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu_kernels.h"
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

struct Simd {
  const char* name;
  const CpuLoops* loops;
};

Simd ChooseSimd() {
  const Simd known[] = {{"avx512", CpuLoopsAvx512()},
                        {"avx2", CpuLoopsAvx2()},
                        {"baseline", CpuLoopsBaseline()}};
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
  const int best = avx512 ? 0 : avx2 ? 1 : 2;
  const char* wanted = std::getenv("LBE_OPS_SIMD");
  for (int level = best; level < 3 && wanted != nullptr; ++level) {
    if (std::strcmp(wanted, known[level].name) == 0) return known[level];
  }
  return known[best];
}

const Simd& ChosenSimd() {
  static const Simd simd = ChooseSimd();
  return simd;
}

const CpuLoops& LoopsFor(DType dtype) {
  return ChosenSimd().loops[static_cast<int>(dtype)];
}

// Rounds to nearest and flushes subnormal numbers to zero while it lives,
// whatever the thread's own mode is: the same bits on every thread, and no slow
// arithmetic where a dead network's activations shrink to 1e-40.
class FloatingPointMode {
 public:
  FloatingPointMode() : saved_(_mm_getcsr()) {
    _mm_setcsr((saved_ & ~_MM_ROUND_MASK) | _MM_FLUSH_ZERO_ON |
               kDenormalsAreZero);
  }
  ~FloatingPointMode() { _mm_setcsr(saved_); }
  FloatingPointMode(const FloatingPointMode&) = delete;
  FloatingPointMode& operator=(const FloatingPointMode&) = delete;

 private:
  static constexpr unsigned kDenormalsAreZero = 0x0040;
  const unsigned saved_;
};

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
// tree, and tiles of columns.
struct ForwardCut {
  int64_t tile_columns;
  int64_t tiles;
  int64_t part_rows;
  int64_t parts;
};

ForwardCut CutForward(const CpuLoops& loops, int64_t rows, int64_t units,
                      int threads) {
  const bool serial = rows * units * loops.element_bytes < kSerialBytes;
  const int64_t wanted = serial ? 1 : threads * kPartsPerThread;
  // Long pieces of rows are read fastest: cut the rows first, then the columns.
  int64_t tile = std::min(kTile, CeilDiv(units, kGroupUnits) * kGroupUnits);
  int64_t part = kPartRows;
  while (part > kMinPartRows &&
         CeilDiv(units, tile) * CeilDiv(rows, part) < wanted) {
    part /= 2;
  }
  const int64_t parts = CeilDiv(rows, part);
  if (CeilDiv(units, tile) * parts < wanted) {
    tile = std::max(
        CeilDiv(CeilDiv(units * parts, wanted), kGroupUnits) * kGroupUnits,
        std::min(tile, kMinTile));
  }
  return {tile, CeilDiv(units, tile), part, parts};
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

void Forward(const Parallel& parallel, DType dtype, const void* x,
             const EpilogueOperands* epilogue, int64_t rows, int64_t units,
             const Formula& formula, void* workspace, void* mean,
             void* variance, void* entropy) {
  const CpuLoops& loops = LoopsFor(dtype);
  const ForwardCut cut = CutForward(loops, rows, units, parallel.threads);
  const int64_t groups = CeilDiv(units, kGroupUnits);
  double* sums = static_cast<double*>(workspace);
  const auto at = [&loops](void* base, int64_t index) {
    return static_cast<char*>(base) + index * loops.result_bytes;
  };
  const auto finish = [&](int64_t column, int64_t columns) {
    loops.finish(rows, columns, formula, at(variance, column),
                 sums + column / kGroupUnits);
  };
  const auto columns_of = [&](int64_t tile) {
    return std::min(cut.tile_columns, units - tile * cut.tile_columns);
  };
  const int64_t bytes = rows * units * loops.element_bytes;
  if (cut.parts == 1) {
    Run(parallel, cut.tiles, bytes, [&](int64_t tile) {
      const int64_t column = tile * cut.tile_columns;
      const int64_t columns = columns_of(tile);
      loops.moments(x, epilogue, units, 0, rows, column, columns,
                    at(mean, column), at(variance, column));
      finish(column, columns);
    });
  } else {
    // Part p's moments: means at part_mean + p * pitch, m2 alike.
    const int64_t pitch = units * loops.result_bytes;
    char* part_mean = static_cast<char*>(workspace) +
                      CeilDiv(groups * sizeof(double), 64) * 64;
    char* part_m2 = part_mean + cut.parts * pitch;
    Run(parallel, cut.tiles * cut.parts, bytes, [&](int64_t item) {
      const int64_t part = item / cut.tiles;
      const int64_t column = item % cut.tiles * cut.tile_columns;
      const int64_t row = part * cut.part_rows;
      loops.moments(
          x, epilogue, units, row, std::min(cut.part_rows, rows - row), column,
          columns_of(item % cut.tiles), at(part_mean + part * pitch, column),
          at(part_m2 + part * pitch, column));
    });
    Run(parallel, cut.tiles, 2 * cut.parts * pitch, [&](int64_t tile) {
      const int64_t column = tile * cut.tile_columns;
      const int64_t columns = columns_of(tile);
      char* tile_mean = at(part_mean, column);
      char* tile_m2 = at(part_m2, column);
      MergeParts(loops, cut, rows, 0, cut.parts, columns, pitch, tile_mean,
                 tile_m2);
      std::memcpy(at(mean, column), tile_mean, columns * loops.result_bytes);
      std::memcpy(at(variance, column), tile_m2, columns * loops.result_bytes);
      finish(column, columns);
    });
  }
  FloatingPointMode mode;
  double lanes[kSumLanes] = {};
  for (int64_t group = 0; group < groups; ++group) {
    lanes[group % kSumLanes] += sums[group];
  }
  const double sum = SumHalves<kSumLanes>(lanes);
  SetScalar(dtype, sum / static_cast<double>(units), entropy);
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

}  // namespace

const char* CpuSimdLevel() { return ChosenSimd().name; }

int64_t BatchEntropyForwardCpuWorkspace(DType dtype, int64_t rows,
                                        int64_t units, int threads) {
  const CpuLoops& loops = LoopsFor(dtype);
  const ForwardCut cut = CutForward(loops, rows, units, threads);
  const int64_t sums = CeilDiv(units, kGroupUnits) * sizeof(double);
  const int64_t moments =
      cut.parts > 1 ? 2 * cut.parts * units * loops.result_bytes : 0;
  return CeilDiv(sums, 64) * 64 + moments;
}

void BatchEntropyForwardCpu(const Parallel& parallel, DType dtype,
                            const void* x, int64_t rows, int64_t units,
                            const Formula& formula, void* workspace, void* mean,
                            void* variance, void* entropy) {
  Forward(parallel, dtype, x, nullptr, rows, units, formula, workspace, mean,
          variance, entropy);
}

void EpilogueForwardCpu(const Parallel& parallel, DType dtype, const void* z,
                        const Epilogue& epilogue, int64_t rows, int64_t units,
                        const Formula& formula, void* workspace, void* y,
                        void* mean, void* variance, void* entropy) {
  const EpilogueOperands operands = {&epilogue, z, y, nullptr, rows, units};
  const bool nothing_to_make = y == z &&
                               epilogue.activation == Activation::kLinear &&
                               epilogue.bias == nullptr;
  Forward(parallel, dtype, y, nothing_to_make ? nullptr : &operands, rows,
          units, formula, workspace, mean, variance, entropy);
}

void BatchEntropyGradCpu(const Parallel& parallel, DType dtype, const void* x,
                         int64_t rows, int64_t units, const Formula& formula,
                         const void* mean, const void* variance,
                         const void* entropy_grad, const void* mean_grad,
                         const void* variance_grad, void* dx) {
  const CpuLoops& loops = LoopsFor(dtype);
  const GradientOperands operands = {
      x,        rows,         units,     &formula,      mean,
      variance, entropy_grad, mean_grad, variance_grad, dx};
  const int64_t pitch = units * loops.element_bytes;
  const int64_t bytes = rows * pitch;
  const bool stream = dx != x && bytes > kStreamBytes && pitch % 64 == 0 &&
                      reinterpret_cast<uintptr_t>(dx) % 64 == 0;
  if (stream) AdviseHugePages(dx, bytes);
  const int64_t tiles = CeilDiv(units, kGradientTile);
  // The slopes are made anew for each item, at the price of a few rows.
  const int64_t wanted = parallel.threads * kPartsPerThread;
  const int64_t item_rows =
      std::min(rows, std::max<int64_t>(32, CeilDiv(rows * tiles, wanted)));
  const int64_t row_items = CeilDiv(rows, item_rows);
  Run(parallel, row_items * tiles, bytes, [&](int64_t item) {
    const int64_t row = item / tiles * item_rows;
    const int64_t column = item % tiles * kGradientTile;
    loops.gradient(operands, row, std::min(item_rows, rows - row), column,
                   std::min(kGradientTile, units - column), stream);
  });
}

int64_t EpilogueGradCpuWorkspace(DType dtype, const Epilogue& epilogue,
                                 int64_t rows, int64_t units) {
  if (epilogue.bias == nullptr) return 0;
  return CeilDiv(rows, kSumRows) * units * LoopsFor(dtype).result_bytes;
}

void EpilogueGradCpu(const Parallel& parallel, DType dtype, const void* dy,
                     const void* y, const Epilogue& epilogue, int64_t rows,
                     int64_t units, const Formula& formula, const void* mean,
                     const void* variance, const void* entropy_grad,
                     void* workspace, void* dz, void* dbias) {
  const CpuLoops& loops = LoopsFor(dtype);
  const EpilogueOperands operands = {&epilogue, dy,   const_cast<void*>(y),
                                     dz,        rows, units};
  const GradientOperands statistics = {
      y,        rows,         units,   &formula, mean,
      variance, entropy_grad, nullptr, nullptr,  nullptr};
  void* sums = epilogue.bias == nullptr ? nullptr : workspace;
  const int64_t bytes = 2 * rows * units * loops.element_bytes;
  const int64_t tiles = CeilDiv(units, kGradientTile);
  const int64_t wanted = parallel.threads * kPartsPerThread;
  const int64_t item_rows =
      CeilDiv(CeilDiv(rows * tiles, wanted), kSumRows) * kSumRows;
  const int64_t row_items = CeilDiv(rows, item_rows);
  Run(parallel, row_items * tiles, bytes, [&](int64_t item) {
    const int64_t row = item / tiles * item_rows;
    const int64_t column = item % tiles * kGradientTile;
    loops.epilogue_gradient(operands, statistics, row,
                            std::min(item_rows, rows - row), column,
                            std::min(kGradientTile, units - column), sums);
  });
  if (sums == nullptr) return;
  const auto add = [&](auto* typed) {
    AddSums(parallel, CeilDiv(rows, kSumRows) * (units / epilogue.channels),
            epilogue.channels, typed);
  };
  if (loops.result_bytes == sizeof(double)) {
    add(static_cast<double*>(sums));
  } else {
    add(static_cast<float*>(sums));
  }
  loops.round(sums, epilogue.channels, dbias);
}

}  // namespace lbe
