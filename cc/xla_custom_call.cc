// SPDX-License-Identifier: Apache-2.0
//
// The handlers of the custom call: they run the forward kernels within XLA
// programs. XLA calls them through its foreign function interface (FFI), which
// is a C interface in headers only.
//
// Glue: takes the buffers, calls the launchers of kernels.h, reports.

#include "xla_custom_call.h"

#include <algorithm>
#include <charconv>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "kernels.h"

#ifdef LBE_XLA_FFI
#include "xla/ffi/api/ffi.h"

namespace xla::ffi {
// Of xla/ffi/ffi_api.h, which includes headers that TensorFlow does not ship.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi
#endif

namespace lbe {
namespace {

constexpr int64_t kAlignment = 64;  // the most that a kernel wants

#ifdef LBE_XLA_FFI
namespace ffi = ::xla::ffi;

using Result = ffi::Result<ffi::AnyBuffer>;

struct Sizes {
  explicit Sizes(const ffi::AnyBuffer& x)
      : rows(x.dimensions()[0]), units(x.element_count() / rows) {}
  int64_t rows;
  int64_t units;
};

void* Aligned(Result& workspace) {
  const auto address =
      reinterpret_cast<std::uintptr_t>(workspace->untyped_data());
  return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment *
                                 kAlignment);
}

// The pool in which XLA runs the program, and its number of threads.
struct Pool {
  ffi::ThreadPool threads;
  int size;
};

// Of one call of Run. Shared, since a task may start after Run has returned.
struct Fork {
  std::mutex mutex;
  std::condition_variable idle;
  int running = 0;
  bool closed = false;
};

// Parallel::run: the calling thread, which may be one of the pool, does the
// work, and those that are free help. It waits only for helpers that have
// started: a full pool costs speed and can never be waited for.
void Run(void* pool, int workers, void (*body)(void*), void* argument) {
  Pool& on = *static_cast<Pool*>(pool);
  const auto fork = std::make_shared<Fork>();
  for (int i = 1; i < std::min(workers, on.size); ++i) {
    on.threads.Schedule([fork, body, argument] {
      {
        const std::lock_guard<std::mutex> lock(fork->mutex);
        if (fork->closed) return;
        ++fork->running;
      }
      body(argument);
      const std::lock_guard<std::mutex> lock(fork->mutex);
      if (--fork->running == 0) fork->idle.notify_one();
    });
  }
  body(argument);
  std::unique_lock<std::mutex> lock(fork->mutex);
  fork->closed = true;
  fork->idle.wait(lock, [&] { return fork->running == 0; });
}

// The program's dtype, which this file wrote, unless another version did.
bool IsDType(int64_t dtype) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  if (dtype == static_cast<int64_t>(DType::name)) return true;
  LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  return false;
}

ffi::Error UnknownDType(int64_t dtype) {
  return ffi::Error::InvalidArgument("lbe_batch_entropy has no dtype " +
                                     std::to_string(dtype));
}

ffi::Error OnHost(ffi::ThreadPool pool_threads, int64_t dtype, int64_t ddof,
                  double scale, double offset, int64_t threads,
                  ffi::AnyBuffer x, Result entropy, Result mean,
                  Result variance, Result valid, Result workspace) {
  if (!IsDType(dtype)) return UnknownDType(dtype);
  const DType type = static_cast<DType>(dtype);
  const Sizes sizes(x);
  Pool pool{pool_threads, static_cast<int>(pool_threads.num_threads())};
  // `threads` and not the size of the pool: the workspace was made for it.
  const Parallel parallel{static_cast<int>(threads), &pool, Run};
  BatchEntropyForwardCpu(parallel, type, x.untyped_data(), sizes.rows,
                         sizes.units, Formula{scale, offset, ddof},
                         Aligned(workspace), mean->untyped_data(),
                         variance->untyped_data(), entropy->untyped_data());
  SetScalar(type, 1, valid->untyped_data());
  return ffi::Error::Success();
}

#ifdef LBE_CUDA
ffi::Error OnCuda(void* stream, int64_t dtype, int64_t ddof, double scale,
                  double offset, int64_t /*threads*/, ffi::AnyBuffer x,
                  Result entropy, Result mean, Result variance, Result valid,
                  Result workspace) {
  if (!IsDType(dtype)) return UnknownDType(dtype);
  const Sizes sizes(x);
  const int error = BatchEntropyForwardCuda(
      stream, static_cast<DType>(dtype), x.untyped_data(), sizes.rows,
      sizes.units, Formula{scale, offset, ddof}, Aligned(workspace),
      mean->untyped_data(), variance->untyped_data(), entropy->untyped_data(),
      valid->untyped_data());
  if (error != 0) return ffi::Error::Internal(CudaErrorMessage(error));
  return ffi::Error::Success();
}
#endif

// Both have the same attributes and buffers, after the context of each.
template <typename Binding>
auto Bind(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("dtype")
      .template Attr<int64_t>("ddof")
      .template Attr<double>("scale")
      .template Attr<double>("offset")
      .template Attr<int64_t>("threads")
      .template Arg<ffi::AnyBuffer>()   // x
      .template Ret<ffi::AnyBuffer>()   // entropy
      .template Ret<ffi::AnyBuffer>()   // mean
      .template Ret<ffi::AnyBuffer>()   // variance
      .template Ret<ffi::AnyBuffer>()   // valid
      .template Ret<ffi::AnyBuffer>();  // workspace
}

XLA_FFI_DEFINE_HANDLER(kOnHost, OnHost,
                       Bind(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

#ifdef LBE_CUDA
// Launches only, so that XLA may record it in a CUDA graph.
XLA_FFI_DEFINE_HANDLER(kOnCuda, OnCuda,
                       Bind(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>()),
                       {ffi::Traits::kCmdBufferCompatible});
#endif

// False where another copy of this library came first: that one serves.
bool Register(const char* platform, XLA_FFI_Handler* handler) {
  const XLA_FFI_Api* api = ffi::GetXlaFfiApi();
  XLA_FFI_Error* error = ffi::Ffi::RegisterStaticHandler(api, kCustomCallTarget,
                                                         platform, handler);
  if (error == nullptr) return true;
  XLA_FFI_Error_Destroy_Args args{};
  args.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
  args.error = error;
  api->XLA_FFI_Error_Destroy(&args);
  return false;
}

const bool on_host = Register("Host", kOnHost);
#ifdef LBE_CUDA
const bool on_cuda = Register("CUDA", kOnCuda);
#else
constexpr bool on_cuda = false;
#endif

#else  // LBE_XLA_FFI
constexpr bool on_host = false;
constexpr bool on_cuda = false;
#endif

}  // namespace

bool HasCustomCall(Platform platform) {
  const char* wanted = std::getenv("LBE_OPS_XLA_CUSTOM_CALL");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return false;
  return platform == Platform::kCuda ? on_cuda : on_host;
}

int64_t CustomCallWorkspace(Platform platform, const CustomCallOptions& options,
                            int64_t rows, int64_t units) {
#ifdef LBE_CUDA
  if (platform == Platform::kCuda) {
    return kAlignment +
           BatchEntropyForwardCudaWorkspace(options.dtype, rows, units);
  }
#endif
  (void)platform;
  return kAlignment +
         BatchEntropyForwardCpuWorkspace(options.dtype, rows, units,
                                         static_cast<int>(options.threads));
}

std::string CustomCallConfig(const CustomCallOptions& options) {
  // 17 digits are a double; with a point in each, whatever the locale: MLIR
  // wants it.
  const auto text = [](double value) {
    char digits[32];
    const auto end = std::to_chars(digits, digits + sizeof(digits), value,
                                   std::chars_format::scientific, 16);
    return std::string(digits, end.ptr);
  };
  return "{dtype = " + std::to_string(static_cast<int>(options.dtype)) +
         " : i64, ddof = " + std::to_string(options.formula.ddof) +
         " : i64, scale = " + text(options.formula.scale) +
         " : f64, offset = " + text(options.formula.offset) +
         " : f64, threads = " + std::to_string(options.threads) + " : i64}";
}

}  // namespace lbe
