// SPDX-License-Identifier: Apache-2.0
//
// The part of lbe_ops_numpy that serves arrays in the memory of a GPU: objects
// with __cuda_array_interface__, such as those of CuPy, PyTorch and JAX.
// https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html

#ifndef LBE_OPS_CC_CUDA_ARRAYS_H_
#define LBE_OPS_CC_CUDA_ARRAYS_H_

#include <pybind11/pybind11.h>

#include <memory>

#include "numpy_batch.h"

namespace lbe {

// The arrays of a call with x, whose __cuda_array_interface__ is given; `name`
// is what the call has for x. Until it is destroyed, the thread's current GPU
// is that of x.
std::unique_ptr<Arrays> MakeCudaArrays(const pybind11::object& x,
                                       const pybind11::object& interface,
                                       const char* name,
                                       const Options& options);

// The class CudaArray and the functions that only a build with CUDA has.
void DefineCudaArrays(pybind11::module_& module);

}  // namespace lbe

#endif  // LBE_OPS_CC_CUDA_ARRAYS_H_
