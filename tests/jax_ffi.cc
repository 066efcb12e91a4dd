// SPDX-License-Identifier: Apache-2.0
//
// The handlers of cc/xla_handlers.cc as C functions, which test_jax_ffi.py
// gives to the XLA within JAX.

#include "xla_custom_call.h"
#include "xla_handlers.h"

#define LBE_EXPORT extern "C" __attribute__((visibility("default")))

LBE_EXPORT int LbeHandlers() {
  return static_cast<int>(lbe::Handlers().size());
}
LBE_EXPORT const char* LbeTarget(int i) { return lbe::Handlers()[i].target; }
LBE_EXPORT const char* LbePlatform(int i) {
  return lbe::Handlers()[i].platform;
}
LBE_EXPORT XLA_FFI_Handler* LbeHandler(int i) { return lbe::Handlers()[i].run; }

// Bytes of the workspaces, as xla_ops.cc asks for them.
LBE_EXPORT int64_t LbeForwardWorkspace(int cuda, int dtype, int64_t rows,
                                       int64_t units, int has_epilogue,
                                       int64_t threads) {
  return lbe::ForwardCallWorkspace(
      cuda != 0 ? lbe::Platform::kCuda : lbe::Platform::kHost,
      {static_cast<lbe::DType>(dtype), rows, units, lbe::Formula()},
      has_epilogue != 0, threads);
}
LBE_EXPORT int64_t LbeGradientWorkspace(int cuda, int dtype, int64_t rows,
                                        int64_t units, int64_t channels) {
  return lbe::GradientCallWorkspace(
      cuda != 0 ? lbe::Platform::kCuda : lbe::Platform::kHost,
      {static_cast<lbe::DType>(dtype), rows, units, lbe::Formula()}, channels);
}
