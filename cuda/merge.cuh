// SPDX-License-Identifier: Apache-2.0
//
// The kernel that merges the moments of all layers and replicas, and makes the
// statistics of the whole batch of them. Included by launch.cu.

#ifndef LBE_OPS_CUDA_MERGE_CUH_
#define LBE_OPS_CUDA_MERGE_CUH_

#include "elements.cuh"

namespace lbe {
namespace {

// A MergeProblem and its arguments as the kernel takes them.
template <typename Scalar>
struct DeviceMerge {
  MergeProblem problem;
  EntropyFactors<Scalar> factors;
  const Scalar* gathered;
  const int64_t* ends;
  Scalar* mean;
  Scalar* variance;
  Scalar* count;
  Scalar* entropy;
  Scalar* valid;
};

// The moments of so many rows.
template <typename Scalar>
struct Counted {
  Moments<Scalar> moments;
  int64_t rows;
};

// What has no row is passed over.
template <typename Scalar>
__device__ Counted<Scalar> MergeCounted(const Counted<Scalar>& a,
                                        const Counted<Scalar>& b) {
  if (a.rows == 0) return b;
  if (b.rows == 0) return a;
  return {Merge(a.moments, b.moments, WeightsOf<Scalar>(a.rows, b.rows)),
          a.rows + b.rows};
}

// The levels of a tree over kMostReplicas replicas.
constexpr int kMergeLevels = 16;
static_assert(int64_t{1} << kMergeLevels == kMostReplicas, "see the stack");

// Adds the node of replica k to the tree, which is a binary counter as in
// statistics.cuh. Unrolled for as many levels as there can be, so that the
// stack stays in registers.
template <int kLevel, typename Scalar>
__device__ __forceinline__ void PushCounted(int k, bool last,
                                            Counted<Scalar>* stack,
                                            Counted<Scalar>* node) {
  if constexpr (kLevel < kMergeLevels) {
    if (k >> kLevel & 1) {
      *node = MergeCounted(stack[kLevel], *node);
    } else if (!last) {
      stack[kLevel] = *node;
      return;
    }
    PushCounted<kLevel + 1>(k, last, stack, node);
  }
}

// The moments of a unit of all replicas.
template <typename Scalar>
__device__ Moments<Scalar> MergeReplicas(const DeviceMerge<Scalar>& a,
                                         int64_t layer, int64_t unit) {
  const int64_t pitch = PitchOf(a.problem);
  const int replicas = static_cast<int>(a.problem.replicas);
  const Scalar* from = a.gathered;
  Counted<Scalar> node = {};
  Counted<Scalar> stack[kMergeLevels];
#pragma unroll 1
  for (int k = 0; k < replicas; ++k, from += pitch) {
    const Scalar* const means = from + a.problem.layers + unit;
    node = {{means[0], means[a.problem.units]}, RowsOfCount(from[layer])};
    PushCounted<0>(k, k + 1 == replicas, stack, &node);
  }
  return node.moments;
}

// A block has a layer. The groups' sums are added up in the order of
// batch_entropy.h: a lane is always that of the same thread.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    MergeMoments(const __grid_constant__ DeviceMerge<Scalar> a) {
  LBE_SHARED(double, lanes, kSumLanes);
  static_assert(kSumLanes == kThreads, "a thread for each lane");
  lanes[Thread()] = 0;
  const int64_t layer = blockIdx.x;
  const UnitsOfLayer of_layer = FindLayer(a.ends, layer, a.problem.units);
  const int64_t units = of_layer.end - of_layer.begin;
  int64_t rows = 0;
  for (int64_t r = 0; r < a.problem.replicas; ++r) {
    rows += RowsOfCount(a.gathered[r * PitchOf(a.problem) + layer]);
  }
  const bool valid = rows >= 2 && units >= 1;
#pragma unroll 1
  for (int64_t first = 0; first < units; first += kThreads) {
    double entropy = 0;
    if (first + Thread() < units) {
      const int64_t unit = of_layer.begin + first + Thread();
      const Moments<Scalar> moments = MergeReplicas(a, layer, unit);
      Scalar variance = 0;
      if (valid) {
        variance = Variance<Scalar>(moments.m2, rows, a.problem.formula);
        entropy = UnitEntropy<Scalar>(variance, a.factors);
      }
      a.mean[unit] = moments.mean;
      a.variance[unit] = variance;
    }
    // Nobody reads what the sum before has left, and the lanes are zeros.
    __syncthreads();
    const double sum = SumHalvesInBlock<kGroupUnits>(entropy);
    if (Thread() % kGroupUnits == 0) {
      lanes[(first + Thread()) / kGroupUnits % kSumLanes] += sum;
    }
  }
  __syncthreads();
  const double sum = SumHalvesInBlock<kSumLanes>(lanes[Thread()]);
  if (Thread() == 0) {
    a.count[layer] = static_cast<Scalar>(rows);
    a.valid[layer] = valid ? Scalar(1) : Scalar(0);
    a.entropy[layer] =
        valid ? static_cast<Scalar>(sum / static_cast<double>(units))
              : Scalar(0);
  }
}

}  // namespace
}  // namespace lbe

#endif  // LBE_OPS_CUDA_MERGE_CUH_
