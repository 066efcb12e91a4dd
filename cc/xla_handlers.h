// SPDX-License-Identifier: Apache-2.0
//
// The handlers of the custom calls by which XLA programs run the kernels.
//
// Called by xla_custom_call.cc, for XLA within TensorFlow, and by the tests,
// for that of JAX: nothing here but XLA's foreign function interface (FFI), a C
// interface in headers only.

#ifndef LBE_OPS_CC_XLA_HANDLERS_H_
#define LBE_OPS_CC_XLA_HANDLERS_H_

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/c_api.h"

namespace lbe {

struct Handler {
  const char* target;    // one of xla_custom_call.h
  const char* platform;  // as XLA calls it
  XLA_FFI_Handler* run;
};

// Those for the platforms for which this library has kernels.
const std::vector<Handler>& Handlers();

}  // namespace lbe

#endif  // LBE_OPS_CC_XLA_HANDLERS_H_
