// SPDX-License-Identifier: Apache-2.0
//
// The part of lbe_ops_numpy that serves arrays in the memory of a GPU: objects
// with __cuda_array_interface__, such as those of CuPy, PyTorch and JAX.
// https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html

#ifndef LBE_OPS_CC_CUDA_ARRAYS_H_
#define LBE_OPS_CC_CUDA_ARRAYS_H_

#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels.h"

namespace lbe {

// Arguments of a call, as Python passes them; none where they are not given.
struct CudaOptions {
  pybind11::object dtype;      // what x holds, where its interface cannot say
  pybind11::object stream;     // a cudaStream_t as an integer
  pybind11::object workspace;  // a CUDA array, for the forward pass
  int blocks = kCudaBlocks;
};

// (entropy, mean, variance); `out` is none or three arrays to write them to.
pybind11::tuple CudaForward(const pybind11::object& x, const Formula& formula,
                            const CudaOptions& options,
                            const pybind11::object& out);

// dx; the argument of that name is none or the array to write it to.
pybind11::object CudaGradient(
    const pybind11::object& x, const pybind11::object& mean,
    const pybind11::object& variance, const pybind11::object& entropy_grad,
    const pybind11::object& mean_grad, const pybind11::object& variance_grad,
    const pybind11::object& dx, const Formula& formula,
    const CudaOptions& options);

int64_t CudaWorkspaceBytes(const pybind11::object& x,
                           const CudaOptions& options);

// The class CudaArray and the functions that only a build with CUDA has.
void DefineCudaArrays(pybind11::module_& module);

}  // namespace lbe

#endif  // LBE_OPS_CC_CUDA_ARRAYS_H_
