// SPDX-License-Identifier: Apache-2.0
//
// The boundary between kernels and frameworks: what the launchers take.
//
// Called by tf_ops.cc, xla_custom_call.cc, numpy_module.cc and cuda_arrays.cc;
// no type of TensorFlow, XLA, pybind11 or CUDA crosses it. Kernels do not
// allocate, do not throw and know no framework.

#ifndef LBE_OPS_CC_KERNELS_H_
#define LBE_OPS_CC_KERNELS_H_

#include <cstdint>

#include "activations.h"
#include "batch_entropy.h"

namespace lbe {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Every dtype that the ops serve: name, element, type of accumulators and
// results, the names that TensorFlow and NumPy have for it.
#define LBE_FOR_EACH_DTYPE(DO)                            \
  DO(kFloat16, Half, float, DT_HALF, "float16")           \
  DO(kBFloat16, BFloat16, float, DT_BFLOAT16, "bfloat16") \
  DO(kFloat32, float, float, DT_FLOAT, "float32")         \
  DO(kFloat64, double, double, DT_DOUBLE, "float64")

enum class DType {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) name,
  LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
};

// The type of a dtype's elements, and that of its accumulators and results.
template <typename ElementType, typename ResultType>
struct Types {
  using Element = ElementType;
  using Result = ResultType;
};

// Returns body(Types<...>()) for the types of `dtype`. REQUIRES: a dtype of the
// list.
template <typename Body>
auto WithTypes(DType dtype, const Body& body) {
  switch (dtype) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  case DType::name:                                                   \
    return body(Types<element, result>());
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
  __builtin_unreachable();
}

// Bytes of a result: those of a float, or of a double for kFloat64.
inline int64_t ResultBytes(DType dtype) {
  return WithTypes(dtype, [](auto types) -> int64_t {
    return sizeof(typename decltype(types)::Result);
  });
}

// Writes `value` to a scalar of the result type in the memory of the host.
inline void SetScalar(DType dtype, double value, void* scalar) {
  WithTypes(dtype, [&](auto types) {
    using Result = typename decltype(types)::Result;
    *static_cast<Result*>(scalar) = static_cast<Result>(value);
  });
}

// What every launcher has to know of the activations x [rows, units], which are
// row-major. REQUIRES of all launchers: units >= 1, and rows > formula.ddof, or
// rows >= 1 where x is a shard of a batch: see `m2` and `count` below.
struct Problem {
  DType dtype;
  int64_t rows;
  int64_t units;
  Formula formula;
};

// What a layer does after its product: y = activation(z + bias). Its launchers
// make the statistics of y in the same pass.
struct Epilogue {
  Activation activation = Activation::kLinear;
  double slope = 0;            // of leaky_relu and elu; see activations.h
  const void* bias = nullptr;  // [channels], of the dtype of z; or null
  int64_t channels = 1;        // unit u has bias u modulo channels
};

// The arguments of a forward pass: mean and variance of every unit, and the
// entropy. Results have the dtype's result type. x is read once.
//
// Of a shard of a batch its moments are wanted, to be merged with those of the
// other shards: with `m2`, the results are mean, m2 and count alone. Not the
// variance, whose division would cost the bits of the whole batch. A single row
// has an m2 of 0.
struct ForwardArguments {
  const void* x = nullptr;             // [rows, units]; z of an epilogue
  const Epilogue* epilogue = nullptr;  // or null: the statistics of x itself
  void* y = nullptr;                   // [rows, units] of an epilogue; may be x
  void* workspace = nullptr;
  void* entropy = nullptr;   // scalar
  void* mean = nullptr;      // [units]
  void* variance = nullptr;  // [units]
  void* valid = nullptr;     // scalar that becomes 1, or null
  void* m2 = nullptr;        // [units], sums of squared deviations; or null
  void* count = nullptr;     // scalar that becomes rows, with m2; or null
};

// Whether there is something to make of x: not without an epilogue, and not
// with one that leaves x as it is, where it is.
inline bool MakesY(const ForwardArguments& arguments) {
  const Epilogue* const epilogue = arguments.epilogue;
  return epilogue != nullptr && (arguments.y != arguments.x ||
                                 epilogue->activation != Activation::kLinear ||
                                 epilogue->bias != nullptr);
}

// The arguments of a gradient. Without an epilogue, dx is that of
//   entropy_grad * entropy + sum_u(mean_grad * mean + variance_grad * variance)
// and with one, dx = activation'(x) * (dy + the gradient of entropy_grad *
// entropy), and dbias the sum of dx over all positions of a channel.
//
// With `count`, x is a shard of a batch of so many rows, and mean and variance
// are those of the whole batch: dx is that of one call with all of it, bit for
// bit. Where count < 2 there is no entropy, and dx without an epilogue is 0,
// whatever x holds. With one, the entropy adds 0 for every finite x.
struct GradientArguments {
  const void* x = nullptr;             // [rows, units]; y of an epilogue
  const void* mean = nullptr;          // [units], of the forward pass
  const void* variance = nullptr;      // [units], of the forward pass
  const void* entropy_grad = nullptr;  // scalar
  const void* mean_grad = nullptr;     // [units], or null; not with an epilogue
  const void* variance_grad = nullptr;  // [units], null where mean_grad is
  const Epilogue* epilogue = nullptr;   // or null; its bias is not read
  const void* dy = nullptr;             // [rows, units] with an epilogue
  void* workspace = nullptr;            // where dbias is wanted
  void* dx = nullptr;                   // [rows, units]; may be x or dy
  void* dbias = nullptr;                // [epilogue->channels], or null
  const void* count = nullptr;          // scalar of the result type, or null
};

// What a merge has to know of the moments of all shards of a batch, one shard
// for each replica and several layers in each: gathered
// [replicas, layers + 2 * units] of the result type. A row has first the number
// of rows of each layer, then the means of the units of all layers, then their
// m2. A layer may have another number of rows than its neighbours, and in some
// replicas none: what is there is passed over then. REQUIRES: layers >= 1,
// 1 <= replicas <= kMostReplicas.
struct MergeProblem {
  DType dtype;  // of the moments: kFloat32 or kFloat64
  int64_t replicas;
  int64_t layers;
  int64_t units;  // of all layers
  Formula formula;
};
constexpr int64_t kMostReplicas = 1 << 16;

// From one row of `gathered` to the next one.
LBE_MATH int64_t PitchOf(const MergeProblem& problem) {
  return problem.layers + 2 * problem.units;
}

// The arguments of a merge. The moments of the replicas merge in their order by
// the tree of batch_entropy.h: where the rows of every replica but the last are
// the same number, 8 * 2^k, the results are those of one call with the whole
// batch, bit for bit. Where a batch has fewer than two rows, or the layer no
// unit, variance, entropy and valid are 0.
struct MergeArguments {
  const void* gathered = nullptr;
  const int64_t* ends = nullptr;  // [layers], where the units of each end
  void* mean = nullptr;           // [units]
  void* variance = nullptr;       // [units]
  void* count = nullptr;          // [layers], rows of the whole batch
  void* entropy = nullptr;        // [layers]
  void* valid = nullptr;          // [layers], 1 or 0
};

// Where a layer's units are among those of all layers: [begin, end). Inside of
// these whatever `ends` holds, since nobody can check it in a GPU's memory.
struct UnitsOfLayer {
  int64_t begin;
  int64_t end;
};

LBE_MATH UnitsOfLayer FindLayer(const int64_t* ends, int64_t layer,
                                int64_t units) {
  const int64_t before = layer == 0 ? 0 : ends[layer - 1], end = ends[layer];
  const int64_t begin = before < 0 ? 0 : before > units ? units : before;
  return {begin, end < begin ? begin : end > units ? units : end};
}

// Where a CPU kernel runs: `run(pool, workers, body, argument)` calls
// body(argument) at least once and at most `workers` times, each on a thread of
// its own where that is possible, and returns when all have returned. `threads`
// is the most workers that a kernel asks for. Results never depend on it.
// Kernels use up to 800 KB of each thread's stack.
struct Parallel {
  int threads;
  void* pool;
  void (*run)(void* pool, int workers, void (*body)(void* argument),
              void* argument);
};

// What the library of the kernels has to offer; everything else in it is
// hidden.
#define LBE_EXPORT __attribute__((visibility("default")))

LBE_EXPORT void ForwardCpu(const Parallel& parallel, const Problem& problem,
                           const ForwardArguments& arguments);
LBE_EXPORT void GradientCpu(const Parallel& parallel, const Problem& problem,
                            const GradientArguments& arguments);
LBE_EXPORT void MergeMomentsCpu(const Parallel& parallel,
                                const MergeProblem& problem,
                                const MergeArguments& arguments);

// Bytes of their workspaces, which are 64-byte aligned: that of a forward pass
// on so many threads, and that of a gradient with dbias [channels].
LBE_EXPORT int64_t ForwardCpuWorkspace(const Problem& problem, int threads);
LBE_EXPORT int64_t GradientCpuWorkspace(const Problem& problem,
                                        int64_t channels);

// The instruction set in use: "avx512", "avx2" or "baseline" on x86-64, "neon"
// on aarch64. The best one that the processor has, unless the environment
// variable LBE_OPS_SIMD names a lower one.
LBE_EXPORT const char* CpuSimdLevel();

// Those that there are kernels for, the lowest first, with spaces between them.
LBE_EXPORT const char* CpuSimdLevels();

// The same on a GPU, in libraries that are built with CUDA (LBE_CUDA is then
// defined). Pointers are to memory of the current device, `stream` is one of
// its streams (a cudaStream_t). Nothing but launches and a memset on that
// stream: no allocation, no synchronisation, so that calls can be captured in a
// CUDA graph. Returns a cudaError_t: 0, or what CudaErrorMessage explains.
//
// Results are those of the CPU, bit for bit. `blocks` is how many blocks of
// threads to aim for, 0 for as many as suit an H100; results never depend on
// it. A workspace serves one call at a time: calls on two streams, or two CUDA
// graphs, need two.
LBE_EXPORT int ForwardCuda(void* stream, const Problem& problem,
                           const ForwardArguments& arguments, int blocks = 0);
LBE_EXPORT int GradientCuda(void* stream, const Problem& problem,
                            const GradientArguments& arguments, int blocks = 0);
LBE_EXPORT int MergeMomentsCuda(void* stream, const MergeProblem& problem,
                                const MergeArguments& arguments);

// Bytes of their workspaces, which are 16-byte aligned; see above.
LBE_EXPORT int64_t ForwardCudaWorkspace(const Problem& problem,
                                        bool has_epilogue, int blocks = 0);
LBE_EXPORT int64_t GradientCudaWorkspace(const Problem& problem,
                                         int64_t channels);

// Writes zeros.
LBE_EXPORT int SetZeroCuda(void* stream, void* data, int64_t bytes);

// SetScalar in the order of the stream.
LBE_EXPORT int SetScalarCuda(void* stream, DType dtype, double value,
                             void* scalar);

// What went wrong and what to do about it. Static text.
LBE_EXPORT const char* CudaErrorMessage(int error);

// A GPU. Versions as CUDA has them: 13020 is 13.2.
struct CudaSystem {
  int toolkit;             // that built the kernels
  int driver;              // the newest CUDA that the driver serves; 0: none
  int error;               // why the kernels cannot run here, or 0
  char device[256];        // name, empty where there is none
  int compute_capability;  // 90 is 9.0
};

// What there is to know of one GPU, without creating a context on it: by
// default the first one that CUDA sees.
LBE_EXPORT CudaSystem DescribeCuda(int device = 0);

}  // namespace lbe

#endif  // LBE_OPS_CC_KERNELS_H_
