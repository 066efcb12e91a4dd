// SPDX-License-Identifier: Apache-2.0
//
// The handlers of the custom calls: they run the kernels within XLA programs.
// XLA calls them through its foreign function interface (FFI), which is a C
// interface in headers only.
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

// The buffers of a call, in the order of xla_custom_call.h.
struct Buffers {
  ffi::RemainingArgs arguments;
  ffi::RemainingRets results;

  ffi::AnyBuffer argument(size_t i) const {
    return *arguments.get<ffi::AnyBuffer>(i);
  }
  const void* input(size_t i) const { return argument(i).untyped_data(); }
  void* output(size_t i) const {
    return (*results.get<ffi::AnyBuffer>(i))->untyped_data();
  }
  void* workspace() const {
    const auto address =
        reinterpret_cast<std::uintptr_t>(output(results.size() - 1));
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment *
                                   kAlignment);
  }

  // Of the first argument: x, z or dy.
  int64_t rows() const { return argument(0).dimensions()[0]; }
  int64_t units() const { return argument(0).element_count() / rows(); }
  int64_t channels() const { return argument(0).dimensions().back(); }
};

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

// What the program says, which this file wrote, unless another version did.
bool IsKnown(int64_t dtype, int64_t activation) {
  bool known_dtype = false, known_activation = false;
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  known_dtype |= dtype == static_cast<int64_t>(DType::name);
  LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
#define LBE_ACTIVATION(name, keras_name) \
  known_activation |= activation == static_cast<int64_t>(Activation::name);
  LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
  return known_dtype && known_activation;
}

ffi::Error Unknown(int64_t dtype, int64_t activation) {
  return ffi::Error::InvalidArgument(
      "lbe_ops has no dtype " + std::to_string(dtype) + " or no activation " +
      std::to_string(activation));
}

enum class Call { kStatistics, kEpilogue, kEpilogueGrad };

Epilogue EpilogueOf(int64_t activation, double alpha, const void* bias,
                    const Buffers& buffers) {
  return {static_cast<Activation>(activation), alpha, bias, buffers.channels()};
}

template <Call kCall>
ffi::Error OnHost(ffi::ThreadPool pool_threads, int64_t dtype, int64_t ddof,
                  double scale, double offset, int64_t threads,
                  int64_t activation, double alpha, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  if (!IsKnown(dtype, activation)) return Unknown(dtype, activation);
  const Buffers b{args, rets};
  const DType type = static_cast<DType>(dtype);
  const Formula formula{scale, offset, ddof};
  Pool pool{pool_threads, static_cast<int>(pool_threads.num_threads())};
  // `threads` and not the size of the pool: the workspace was made for it.
  const Parallel parallel{static_cast<int>(threads), &pool, Run};
  if constexpr (kCall == Call::kStatistics) {
    BatchEntropyForwardCpu(parallel, type, b.input(0), b.rows(), b.units(),
                           formula, b.workspace(), b.output(1), b.output(2),
                           b.output(0));
    SetScalar(type, 1, b.output(3));
  } else if constexpr (kCall == Call::kEpilogue) {
    const void* const bias = args.size() > 1 ? b.input(1) : nullptr;
    EpilogueForwardCpu(parallel, type, b.input(0),
                       EpilogueOf(activation, alpha, bias, b), b.rows(),
                       b.units(), formula, b.workspace(), b.output(0),
                       b.output(2), b.output(3), b.output(1));
    SetScalar(type, 1, b.output(4));
  } else {
    void* const dbias = rets.size() > 2 ? b.output(1) : nullptr;
    EpilogueGradCpu(parallel, type, b.input(0), b.input(1),
                    EpilogueOf(activation, alpha, dbias, b), b.rows(),
                    b.units(), formula, b.input(2), b.input(3), b.input(4),
                    b.workspace(), b.output(0), dbias);
  }
  return ffi::Error::Success();
}

#ifdef LBE_CUDA
template <Call kCall>
ffi::Error OnCuda(void* stream, int64_t dtype, int64_t ddof, double scale,
                  double offset, int64_t /*threads*/, int64_t activation,
                  double alpha, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  if (!IsKnown(dtype, activation)) return Unknown(dtype, activation);
  const Buffers b{args, rets};
  const DType type = static_cast<DType>(dtype);
  const Formula formula{scale, offset, ddof};
  int error;
  if constexpr (kCall == Call::kStatistics) {
    error = BatchEntropyForwardCuda(
        stream, type, b.input(0), b.rows(), b.units(), formula, b.workspace(),
        b.output(1), b.output(2), b.output(0), b.output(3));
  } else if constexpr (kCall == Call::kEpilogue) {
    const void* const bias = args.size() > 1 ? b.input(1) : nullptr;
    error = EpilogueForwardCuda(
        stream, type, b.input(0), EpilogueOf(activation, alpha, bias, b),
        b.rows(), b.units(), formula, b.workspace(), b.output(0), b.output(2),
        b.output(3), b.output(1), b.output(4));
  } else {
    void* const dbias = rets.size() > 2 ? b.output(1) : nullptr;
    error = EpilogueGradCuda(stream, type, b.input(0), b.input(1),
                             EpilogueOf(activation, alpha, dbias, b), b.rows(),
                             b.units(), formula, b.input(2), b.input(3),
                             b.input(4), b.workspace(), b.output(0), dbias);
  }
  if (error != 0) return ffi::Error::Internal(CudaErrorMessage(error));
  return ffi::Error::Success();
}
#endif

// All have the same attributes, after the context of each platform.
template <typename Binding>
auto Bind(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("dtype")
      .template Attr<int64_t>("ddof")
      .template Attr<double>("scale")
      .template Attr<double>("offset")
      .template Attr<int64_t>("threads")
      .template Attr<int64_t>("activation")
      .template Attr<double>("alpha")
      .RemainingArgs()
      .RemainingRets();
}

#define LBE_HOST_HANDLER(name, call)         \
  XLA_FFI_DEFINE_HANDLER(name, OnHost<call>, \
                         Bind(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()))
LBE_HOST_HANDLER(kStatisticsOnHost, Call::kStatistics);
LBE_HOST_HANDLER(kEpilogueOnHost, Call::kEpilogue);
LBE_HOST_HANDLER(kEpilogueGradOnHost, Call::kEpilogueGrad);
#undef LBE_HOST_HANDLER

#ifdef LBE_CUDA
// Launches only, so that XLA may record them in a CUDA graph.
#define LBE_CUDA_HANDLER(name, call)                            \
  XLA_FFI_DEFINE_HANDLER(                                       \
      name, OnCuda<call>,                                       \
      Bind(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>()), \
      {ffi::Traits::kCmdBufferCompatible})
LBE_CUDA_HANDLER(kStatisticsOnCuda, Call::kStatistics);
LBE_CUDA_HANDLER(kEpilogueOnCuda, Call::kEpilogue);
LBE_CUDA_HANDLER(kEpilogueGradOnCuda, Call::kEpilogueGrad);
#undef LBE_CUDA_HANDLER
#endif

// False where another copy of this library came first: that one serves.
bool Register(const char* platform, const char* target,
              XLA_FFI_Handler* handler) {
  const XLA_FFI_Api* api = ffi::GetXlaFfiApi();
  XLA_FFI_Error* error =
      ffi::Ffi::RegisterStaticHandler(api, target, platform, handler);
  if (error == nullptr) return true;
  XLA_FFI_Error_Destroy_Args args{};
  args.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
  args.error = error;
  api->XLA_FFI_Error_Destroy(&args);
  return false;
}

bool RegisterAll(const char* platform, XLA_FFI_Handler* statistics,
                 XLA_FFI_Handler* epilogue, XLA_FFI_Handler* epilogue_grad) {
  return Register(platform, kStatisticsCall, statistics) &&
         Register(platform, kEpilogueCall, epilogue) &&
         Register(platform, kEpilogueGradCall, epilogue_grad);
}

const bool on_host = RegisterAll("Host", kStatisticsOnHost, kEpilogueOnHost,
                                 kEpilogueGradOnHost);
#ifdef LBE_CUDA
const bool on_cuda = RegisterAll("CUDA", kStatisticsOnCuda, kEpilogueOnCuda,
                                 kEpilogueGradOnCuda);
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

int64_t ForwardCallWorkspace(Platform platform,
                             const CustomCallOptions& options, int64_t rows,
                             int64_t units) {
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

int64_t EpilogueGradCallWorkspace(Platform platform, DType dtype,
                                  const Epilogue& epilogue, int64_t rows,
                                  int64_t units) {
#ifdef LBE_CUDA
  if (platform == Platform::kCuda) {
    return kAlignment + EpilogueGradCudaWorkspace(dtype, epilogue, rows, units);
  }
#endif
  (void)platform;
  return kAlignment + EpilogueGradCpuWorkspace(dtype, epilogue, rows, units);
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
         " : f64, threads = " + std::to_string(options.threads) +
         " : i64, activation = " +
         std::to_string(static_cast<int>(options.epilogue.activation)) +
         " : i64, alpha = " + text(options.epilogue.alpha) + " : f64}";
}

}  // namespace lbe
