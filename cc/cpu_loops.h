// SPDX-License-Identifier: Apache-2.0
//
// The table of CPU loops that each instruction set provides.
//
// cpu_kernels.cc fills one per instruction set; cpu_dispatch.cc picks one.

#ifndef LBE_OPS_CC_CPU_KERNELS_H_
#define LBE_OPS_CC_CPU_KERNELS_H_

#include <cstdint>

#include "activations.h"
#include "kernels.h"

namespace lbe {

// `moments` works on at most kTile columns and kPartRows rows, a whole node of
// the tree, `gradient` on at most kGradientTile columns.
constexpr int64_t kTile = 2048;
constexpr int64_t kPartRows = 8192;
constexpr int64_t kGradientTile = 4096;

// The operands of one gradient; see BatchEntropyGradCpu.
struct GradientOperands {
  const void* x;  // [rows, units]
  int64_t rows;
  int64_t units;
  const Formula* formula;
  const void* mean;
  const void* variance;
  const void* entropy_grad;
  const void* mean_grad;
  const void* variance_grad;
  void* dx;
};

// The operands of one epilogue; see EpilogueForwardCpu and EpilogueGradCpu.
struct EpilogueOperands {
  const Epilogue* epilogue;
  const void* z;  // [rows, units]; dy in the gradient
  void* y;        // [rows, units], may be z
  void* dz;       // [rows, units], may be dy
  int64_t rows;
  int64_t units;
};

// The loops for one dtype. Moments and statistics are arrays of its result
// type.
struct CpuLoops {
  int64_t element_bytes;
  int64_t result_bytes;

  // Moments of columns [column, column + columns) over rows [row, row + rows)
  // of x [.., units], to mean and m2 [columns]. With an epilogue, whose y is x,
  // that part of x is made on the way.
  void (*moments)(const void* x, const EpilogueOperands* epilogue,
                  int64_t units, int64_t row, int64_t rows, int64_t column,
                  int64_t columns, void* mean, void* m2);
  // Merges the moments of b_rows rows into those of a_rows rows, all [columns].
  void (*merge)(int64_t a_rows, int64_t b_rows, int64_t columns,
                const void* b_mean, const void* b_m2, void* mean, void* m2);
  // m2 [columns] of all rows to variance, in place, and the entropies of each
  // kGroupUnits columns to one sum.
  void (*finish)(int64_t rows, int64_t columns, const Formula& formula,
                 void* m2, double* group_sums);
  // Rows [row, row + rows) and columns [column, column + columns) of dx; with
  // `stream`, written around the caches, for which every row of dx and `column`
  // must start at a multiple of 64 bytes.
  void (*gradient)(const GradientOperands& operands, int64_t row, int64_t rows,
                   int64_t column, int64_t columns, bool stream);
  // The same for dz of an epilogue, `row` being a multiple of kSumRows. Unless
  // `sums` is null, the sum of each kSumRows rows goes to one of its rows
  // [rows / kSumRows, units].
  void (*epilogue_gradient)(const EpilogueOperands& operands,
                            const GradientOperands& statistics, int64_t row,
                            int64_t rows, int64_t column, int64_t columns,
                            void* sums);
  // `count` numbers of the result type to elements.
  void (*round)(const void* from, int64_t count, void* to);
};

// One entry for each dtype, in the order of DType.
const CpuLoops* CpuLoopsBaseline();
const CpuLoops* CpuLoopsAvx2();
const CpuLoops* CpuLoopsAvx512();

}  // namespace lbe

#endif  // LBE_OPS_CC_CPU_KERNELS_H_
