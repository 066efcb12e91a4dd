// SPDX-License-Identifier: Apache-2.0
//
// The boundary between kernels and frameworks: what the launchers take.
//
// Called by tf_ops.cc, xla_custom_call.cc and numpy_module.cc; no type of
// TensorFlow, XLA, pybind11 or CUDA crosses it. Kernels do not allocate, do not
// throw and know no framework.

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

// The value of a result scalar: float, or double for kFloat64.
inline void SetScalar(DType dtype, double value, void* scalar) {
  switch (dtype) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  case DType::name:                                                   \
    *static_cast<result*>(scalar) = static_cast<result>(value);       \
    break;
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
}

// Where a CPU kernel runs: `run(pool, workers, body, argument)` calls
// body(argument) at least once and at most `workers` times, each on a thread of
// its own where that is possible, and returns when all have returned. `threads`
// is the most workers that a kernel asks for. Results never depend on it.
struct Parallel {
  int threads;
  void* pool;
  void (*run)(void* pool, int workers, void (*body)(void* argument),
              void* argument);
};

// Kernels use up to 400 KB of each thread's stack.

// Bytes of workspace, 64-byte aligned, for BatchEntropyForwardCpu.
int64_t BatchEntropyForwardCpuWorkspace(DType dtype, int64_t rows,
                                        int64_t units, int threads);

// Reads x [rows, units], row-major, once. Writes mean [units] and variance
// [units] and the scalar entropy, all of the dtype's result type. REQUIRES:
// rows > formula.ddof, units >= 1.
void BatchEntropyForwardCpu(const Parallel& parallel, DType dtype,
                            const void* x, int64_t rows, int64_t units,
                            const Formula& formula, void* workspace, void* mean,
                            void* variance, void* entropy);

// Writes dx [rows, units], the gradient of
//   entropy_grad * entropy + sum_u(mean_grad * mean + variance_grad * variance)
// with entropy_grad a scalar and mean_grad, variance_grad [units] or both null.
// dx may be x itself. REQUIRES: as above.
void BatchEntropyGradCpu(const Parallel& parallel, DType dtype, const void* x,
                         int64_t rows, int64_t units, const Formula& formula,
                         const void* mean, const void* variance,
                         const void* entropy_grad, const void* mean_grad,
                         const void* variance_grad, void* dx);

// The epilogue of a layer: y = activation(z + bias), and the statistics of y in
// the same pass.
struct Epilogue {
  Activation activation = Activation::kLinear;
  double alpha = 0;            // of leaky_relu and elu; see activations.h
  const void* bias = nullptr;  // [channels], of the dtype of z; or null
  int64_t channels = 1;        // unit u has bias u modulo channels
};

// As BatchEntropyForwardCpu with x = y, which is written: y is z [rows, units]
// itself or another array. Workspace: that of BatchEntropyForwardCpu.
void EpilogueForwardCpu(const Parallel& parallel, DType dtype, const void* z,
                        const Epilogue& epilogue, int64_t rows, int64_t units,
                        const Formula& formula, void* workspace, void* y,
                        void* mean, void* variance, void* entropy);

// Bytes of workspace, 64-byte aligned, for EpilogueGradCpu.
int64_t EpilogueGradCpuWorkspace(DType dtype, const Epilogue& epilogue,
                                 int64_t rows, int64_t units);

// Writes dz = activation'(y) * (dy + the gradient of entropy_grad * entropy),
// and dbias [channels], its sum, unless there is no bias. Both have the dtype
// of y; dz may be dy itself. dbias has the same bits for any number of threads.
void EpilogueGradCpu(const Parallel& parallel, DType dtype, const void* dy,
                     const void* y, const Epilogue& epilogue, int64_t rows,
                     int64_t units, const Formula& formula, const void* mean,
                     const void* variance, const void* entropy_grad,
                     void* workspace, void* dz, void* dbias);

// The instruction set in use: "avx512", "avx2" or "baseline". The best one that
// the processor has, unless the environment variable LBE_OPS_SIMD names a lower
// one.
const char* CpuSimdLevel();

// The same on a GPU, in libraries that are built with CUDA (LBE_CUDA is then
// defined). Pointers are to memory of the current device, `stream` is one of
// its streams (a cudaStream_t). Nothing but launches on that stream: no
// allocation, no synchronisation, so that calls can be captured in a CUDA
// graph. Returns a cudaError_t: 0, or what CudaErrorMessage explains.
//
// Results are those of the CPU, bit for bit. `blocks` is how many blocks of
// threads to aim for; results never depend on it.
constexpr int kCudaBlocks = 1024;

// Bytes of workspace, 16-byte aligned, for BatchEntropyForwardCuda.
int64_t BatchEntropyForwardCudaWorkspace(DType dtype, int64_t rows,
                                         int64_t units,
                                         int blocks = kCudaBlocks);

// `valid`, a scalar of the result type that becomes 1, may be null.
int BatchEntropyForwardCuda(void* stream, DType dtype, const void* x,
                            int64_t rows, int64_t units, const Formula& formula,
                            void* workspace, void* mean, void* variance,
                            void* entropy, void* valid,
                            int blocks = kCudaBlocks);

int BatchEntropyGradCuda(void* stream, DType dtype, const void* x, int64_t rows,
                         int64_t units, const Formula& formula,
                         const void* mean, const void* variance,
                         const void* entropy_grad, const void* mean_grad,
                         const void* variance_grad, void* dx,
                         int blocks = kCudaBlocks);

// `valid` as above. Workspace: that of BatchEntropyForwardCuda.
int EpilogueForwardCuda(void* stream, DType dtype, const void* z,
                        const Epilogue& epilogue, int64_t rows, int64_t units,
                        const Formula& formula, void* workspace, void* y,
                        void* mean, void* variance, void* entropy, void* valid,
                        int blocks = kCudaBlocks);

// Bytes of workspace, 16-byte aligned, for EpilogueGradCuda.
int64_t EpilogueGradCudaWorkspace(DType dtype, const Epilogue& epilogue,
                                  int64_t rows, int64_t units);

int EpilogueGradCuda(void* stream, DType dtype, const void* dy, const void* y,
                     const Epilogue& epilogue, int64_t rows, int64_t units,
                     const Formula& formula, const void* mean,
                     const void* variance, const void* entropy_grad,
                     void* workspace, void* dz, void* dbias,
                     int blocks = kCudaBlocks);

// Writes zeros.
int SetZeroCuda(void* stream, void* data, int64_t bytes);

// SetScalar in the order of the stream.
int SetScalarCuda(void* stream, DType dtype, double value, void* scalar);

// What went wrong and what to do about it. Static text.
const char* CudaErrorMessage(int error);

// The GPU that a process would use. Versions as CUDA has them: 13020 is 13.2.
struct CudaSystem {
  int toolkit;             // that built the kernels
  int driver;              // the newest CUDA that the driver serves; 0: none
  int error;               // why the kernels cannot run here, or 0
  char device[256];        // name, empty where there is none
  int compute_capability;  // 90 is 9.0
};
CudaSystem DescribeCuda();

}  // namespace lbe

#endif  // LBE_OPS_CC_KERNELS_H_
