// SPDX-License-Identifier: Apache-2.0
//
// The custom call by which XLA programs run the forward kernels.
//
// Called by xla_ops.cc. No type of XLA or TensorFlow crosses it, so that each
// side includes its own headers only.

#ifndef LBE_OPS_CC_XLA_CUSTOM_CALL_H_
#define LBE_OPS_CC_XLA_CUSTOM_CALL_H_

#include <cstdint>
#include <string>

#include "kernels.h"

namespace lbe {

constexpr char kCustomCallTarget[] = "lbe_batch_entropy";

enum class Platform { kHost, kCuda };

// What the call carries beside its buffers: x -> entropy, mean, variance,
// valid, workspace (bytes).
struct CustomCallOptions {
  DType dtype;
  Formula formula;
  int64_t threads;  // for which the work is cut; on the host only
};

// Whether this library can run the call there: it has the kernels, and XLA has
// accepted the handler. Never if the environment says
// LBE_OPS_XLA_CUSTOM_CALL=0, for comparisons with plain HLO.
bool HasCustomCall(Platform platform);

// Size of the workspace in bytes, at least 1.
int64_t CustomCallWorkspace(Platform platform, const CustomCallOptions& options,
                            int64_t rows, int64_t units);

// The options in the form that XLA hands on: a dictionary in MLIR's syntax.
std::string CustomCallConfig(const CustomCallOptions& options);

}  // namespace lbe

#endif  // LBE_OPS_CC_XLA_CUSTOM_CALL_H_
