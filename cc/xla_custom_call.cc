// SPDX-License-Identifier: Apache-2.0
//
// Registers the handlers with the XLA within TensorFlow, and writes what a call
// carries.

#include "xla_custom_call.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "absl/strings/str_format.h"
#include "kernels.h"
#include "xla/ffi/api/ffi.h"
#include "xla_handlers.h"

namespace xla::ffi {
// Of xla/ffi/ffi_api.h, which includes headers that TensorFlow does not ship.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace lbe {
namespace {

constexpr const char* PlatformName(Platform platform) {
  return platform == Platform::kCuda ? "CUDA" : "Host";
}

bool Register(const Handler& handler) {
  const XLA_FFI_Api* api = xla::ffi::GetXlaFfiApi();
  XLA_FFI_Error* error = xla::ffi::Ffi::RegisterStaticHandler(
      api, handler.target, handler.platform, handler.run);
  if (error == nullptr) return true;
  XLA_FFI_Error_Destroy_Args args{};
  args.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
  args.error = error;
  api->XLA_FFI_Error_Destroy(&args);
  return false;
}

// The number of handlers that XLA has accepted for a platform: none, too, where
// another copy of this library came first, which then serves.
int RegisterAll(Platform platform) {
  int accepted = 0;
  for (const Handler& handler : Handlers()) {
    if (std::strcmp(handler.platform, PlatformName(platform)) != 0) continue;
    accepted += Register(handler);
  }
  return accepted;
}

const bool on_host = RegisterAll(Platform::kHost) == 3;
const bool on_cuda = RegisterAll(Platform::kCuda) == 3;

}  // namespace

bool HasCustomCall(Platform platform) {
  const char* wanted = std::getenv("LBE_OPS_XLA_CUSTOM_CALL");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return false;
  return platform == Platform::kCuda ? on_cuda : on_host;
}

std::string CustomCallConfig(const Problem& problem, const Epilogue& epilogue,
                             int64_t threads, int64_t index) {
  // 17 digits are a double; with a point in each, whatever the locale: MLIR
  // wants it.
  const auto text = [](double value) {
    return absl::StrFormat("%.16e", value);
  };
  return "{dtype = " + std::to_string(static_cast<int>(problem.dtype)) +
         " : i64, ddof = " + std::to_string(problem.formula.ddof) +
         " : i64, scale = " + text(problem.formula.scale) +
         " : f64, offset = " + text(problem.formula.offset) +
         " : f64, threads = " + std::to_string(threads) +
         " : i64, activation = " +
         std::to_string(static_cast<int>(epilogue.activation)) +
         " : i64, slope = " + text(epilogue.slope) +
         " : f64, index = " + std::to_string(index) + " : i64}";
}

}  // namespace lbe
