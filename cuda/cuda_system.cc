// SPDX-License-Identifier: Apache-2.0
//
// What kernels.h offers of CUDA without a kernel: zeros, error texts, and what
// there is to know of a GPU. C++, so that it is compiled once and not for each
// architecture.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

#ifndef LBE_CUDA_EMULATION
#include <cuda_runtime_api.h>
#endif

namespace lbe {
namespace {

// The oldest driver that may load a kernel while a stream is being captured.
constexpr int kOldestDriver = 12030;

// Whether one of the architectures for which kernels were built, as in "sm_90
// sm_100 compute_120", has code for a GPU of this compute capability. Machine
// code runs on GPUs of the same major version and the same minor version or a
// newer one; PTX on all that are newer; both on no other where they end in a
// letter, which then is an `a` or, for a family, an `f`.
bool HasCodeFor(const char* architectures, int compute_capability) {
  for (const char* at = architectures; *at != '\0'; at += strcspn(at, " ")) {
    at += strspn(at, " ");
    const bool is_ptx = strncmp(at, "compute_", 8) == 0;
    char* end = nullptr;
    const int built =
        static_cast<int>(strtol(at + strcspn(at, "0123456789 "), &end, 10));
    const bool same_major = built / 10 == compute_capability / 10;
    const bool served = *end == 'a' ? built == compute_capability
                        : *end == 'f' || !is_ptx
                            ? same_major && built <= compute_capability
                            : built <= compute_capability;
    if (built > 0 && served) return true;
  }
  return false;
}

}  // namespace

int SetZeroCuda(void* stream, void* data, int64_t bytes) {
  if (bytes == 0) return cudaSuccess;
  return cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
}

const char* CudaErrorMessage(int error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "the NVIDIA driver is too old: lbe_ops needs one for CUDA 12.3 or "
             "newer that is not older than the CUDA toolkit which it was built "
             "with; update the driver, or build lbe_ops with an older CUDA "
             "toolkit (`python -m lbe_ops info` names both)";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "lbe_ops has no code for this GPU: build it with a CUDA toolkit "
             "that knows the GPU (`python -m lbe_ops info` names what it was "
             "built for)";
    case cudaErrorNoDevice:
      return "there is no GPU that CUDA can use: see nvidia-smi and "
             "CUDA_VISIBLE_DEVICES";
    // CUDA keeps these for the rest of the process, and every call returns
    // them, whoever asks.
    case cudaErrorIllegalAddress:
      return "a kernel of lbe_ops, or an earlier kernel of this process, "
             "accessed memory that is not its own; compute-sanitizer finds it";
    case cudaErrorMisalignedAddress:
      return "a kernel of lbe_ops, or an earlier kernel of this process, "
             "accessed memory at an address that is not aligned; "
             "compute-sanitizer finds it";
    case cudaErrorLaunchFailure:
      return "a kernel of lbe_ops, or an earlier kernel of this process, "
             "failed; compute-sanitizer finds it";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
}

// Neither the driver's version nor the properties of a GPU need a context on
// it, which would take some hundred MB of its memory. Whether there is code for
// the GPU is therefore not asked of CUDA, which would load it.
CudaSystem DescribeCuda(int device) {
  CudaSystem system = {};
  system.toolkit = CUDART_VERSION;
  cudaDriverGetVersion(&system.driver);
  cudaDeviceProp properties;
  system.error = cudaGetDeviceProperties(&properties, device);
  cudaGetLastError();  // reported; must not meet the next launch
  if (system.error != cudaSuccess) return system;
  static_assert(sizeof(system.device) == sizeof(properties.name), "see memcpy");
  memcpy(system.device, properties.name, sizeof(system.device));
  system.compute_capability = properties.major * 10 + properties.minor;
  if (system.driver < kOldestDriver) {
    system.error = cudaErrorInsufficientDriver;
  } else if (!HasCodeFor(LBE_CUDA_ARCHITECTURES, system.compute_capability)) {
    system.error = cudaErrorNoKernelImageForDevice;
  }
  return system;
}

}  // namespace lbe
