// SPDX-License-Identifier: Apache-2.0
//
// The custom calls by which XLA programs run the kernels.
//
// Called by xla_ops.cc. No type of XLA or TensorFlow crosses it, so that each
// side includes its own headers only.

#ifndef LBE_OPS_CC_XLA_CUSTOM_CALL_H_
#define LBE_OPS_CC_XLA_CUSTOM_CALL_H_

#include <cstdint>
#include <string>

#include "kernels.h"

namespace lbe {

// The calls, by their targets, with buffers as the ops have them and then the
// workspace (bytes) as one more result:
// x -> entropy, mean, variance, valid.
constexpr char kStatisticsCall[] = "lbe_batch_entropy";
// z, bias or none -> y in place of z, entropy, mean, variance, valid.
constexpr char kEpilogueCall[] = "lbe_epilogue";
// dy, y, mean, variance, entropy_grad -> dz in place of dy, dbias or none. The
// gradient of the entropy may be a vector, of which the call says the index.
constexpr char kEpilogueGradCall[] = "lbe_epilogue_grad";

enum class Platform { kHost, kCuda };

// Whether this library can run the calls there: it has the kernels, and XLA has
// accepted the handlers. Never if the environment says
// LBE_OPS_XLA_CUSTOM_CALL=0, for comparisons with plain HLO.
bool HasCustomCall(Platform platform);

// Size of the workspace in bytes, at least 1: of the forward passes, whose work
// is cut for so many threads on the host, and of a gradient with a bias of so
// many channels, or 0.
int64_t ForwardCallWorkspace(Platform platform, const Problem& problem,
                             bool has_epilogue, int64_t threads);
int64_t GradientCallWorkspace(Platform platform, const Problem& problem,
                              int64_t channels);

// What a call carries beside its buffers, in the form that XLA hands on: a
// dictionary in MLIR's syntax. Sizes come from the buffers.
std::string CustomCallConfig(const Problem& problem, const Epilogue& epilogue,
                             int64_t threads, int64_t index);

}  // namespace lbe

#endif  // LBE_OPS_CC_XLA_CUSTOM_CALL_H_
