// SPDX-License-Identifier: Apache-2.0
//
// The table of CPU loops that each instruction set provides.
//
// cpu_loops.cc fills one per instruction set; cpu_launch.cc picks one.

#ifndef LBE_OPS_CC_CPU_LOOPS_H_
#define LBE_OPS_CC_CPU_LOOPS_H_

#include <cstdint>

#include "kernels.h"

namespace lbe {

// `moments` works on at most kPartRows rows, a whole node of the tree, and all
// loops on fewer than kTile + kGroupUnits columns.
constexpr int64_t kTile = 4096;
constexpr int64_t kPartRows = 8192;

// A part of x [rows, units], and of what has its shape.
struct Block {
  int64_t row;
  int64_t rows;
  int64_t column;
  int64_t columns;
};

// The loops for one dtype. Moments and statistics are arrays of its result
// type.
struct CpuLoops {
  int64_t element_bytes;

  // The moments of the columns of a block, to mean and m2 [columns]. With an
  // epilogue, that block of y is made on the way.
  void (*moments)(const Problem& problem, const ForwardArguments& arguments,
                  const Block& block, void* mean, void* m2);
  // Merges the moments of b_rows rows into those of a_rows rows, all [columns].
  void (*merge)(int64_t a_rows, int64_t b_rows, int64_t columns,
                const void* b_mean, const void* b_m2, void* mean, void* m2);
  // m2 [columns] of all rows to variance, in place, and the entropies of each
  // kGroupUnits columns to one sum.
  void (*finish)(const Problem& problem, int64_t columns, void* m2,
                 double* group_sums);
  // A block of dx. With `stream` it is written around the caches, for which the
  // rows of dx must be a multiple of 64 bytes apart.
  void (*gradient)(const Problem& problem, const GradientArguments& arguments,
                   const Block& block, bool stream);
  // A block of dx of an epilogue, whose first row is a multiple of kSumRows.
  // Where dbias is wanted, the sum of each kSumRows rows goes to one row of the
  // workspace [rows / kSumRows, units].
  void (*epilogue_gradient)(const Problem& problem,
                            const GradientArguments& arguments,
                            const Block& block);
  // `count` numbers of the result type to elements.
  void (*round)(const void* from, int64_t count, void* to);
};

// One entry for each dtype, in the order of DType. Which of these tables there
// are depends on the processor: see cpu_processor.h.
const CpuLoops* CpuLoopsBaseline();
const CpuLoops* CpuLoopsAvx2();
const CpuLoops* CpuLoopsAvx512();

}  // namespace lbe

#endif  // LBE_OPS_CC_CPU_LOOPS_H_
