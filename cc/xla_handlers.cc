// SPDX-License-Identifier: Apache-2.0
//
// The handlers of the custom calls, and the workspaces that they need.
//
// Glue: takes the buffers, calls the launchers of kernels.h, reports.

#include "xla_handlers.h"

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"
#include "xla_custom_call.h"

namespace lbe {
namespace {

namespace ffi = ::xla::ffi;

constexpr int64_t kAlignment = 64;  // the most that a kernel wants

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

// The launchers of kernels.h for one platform, with one signature for both.
// `threads` and not the size of the pool: the workspace was made for it.
class Host {
 public:
  static constexpr char kName[] = "Host";
  using Context = ffi::ThreadPool;

  Host(Context pool, int64_t threads)
      : pool_{pool, static_cast<int>(pool.num_threads())},
        parallel_{static_cast<int>(threads), &pool_, Run} {}

  ffi::Error Forward(const Problem& problem,
                     const ForwardArguments& arguments) const {
    ForwardCpu(parallel_, problem, arguments);
    return ffi::Error::Success();
  }
  ffi::Error Gradient(const Problem& problem,
                      const GradientArguments& arguments) const {
    GradientCpu(parallel_, problem, arguments);
    return ffi::Error::Success();
  }

 private:
  Pool pool_;
  Parallel parallel_;
};

#ifdef LBE_CUDA
class Cuda {
 public:
  static constexpr char kName[] = "CUDA";
  using Context = void*;  // the stream

  Cuda(Context stream, int64_t /*threads*/) : stream_(stream) {}

  ffi::Error Forward(const Problem& problem,
                     const ForwardArguments& arguments) const {
    return Status(ForwardCuda(stream_, problem, arguments));
  }
  ffi::Error Gradient(const Problem& problem,
                      const GradientArguments& arguments) const {
    return Status(GradientCuda(stream_, problem, arguments));
  }

 private:
  static ffi::Error Status(int error) {
    if (error == 0) return ffi::Error::Success();
    return ffi::Error::Internal(std::string("lbe_ops on the GPU: ") +
                                CudaErrorMessage(error));
  }

  void* stream_;
};
#endif

enum class Call { kStatistics, kEpilogue, kEpilogueGrad };

// Checks what a program says: another version of this library may have written
// it, or another framework.
ffi::Error Check(int64_t dtype, int64_t activation, const Formula& formula,
                 ffi::Span<const int64_t> sizes) {
  bool known_dtype = false, known_activation = false;
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  known_dtype |= dtype == static_cast<int64_t>(DType::name);
  LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
#define LBE_ACTIVATION(name, keras_name) \
  known_activation |= activation == static_cast<int64_t>(Activation::name);
  LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
  if (!known_dtype || !known_activation) {
    return ffi::Error::InvalidArgument(
        "lbe_ops has no dtype " + std::to_string(dtype) + " or no activation " +
        std::to_string(activation));
  }
  if (!IsServed(formula) || sizes.size() == 0 ||
      sizes.front() <= formula.ddof) {
    return ffi::Error::InvalidArgument(
        "lbe_ops needs a batch of more than ddof samples, and a formula that "
        "it serves");
  }
  return ffi::Error::Success();
}

template <typename Device, Call kCall>
ffi::Error Handle(typename Device::Context context, int64_t dtype, int64_t ddof,
                  double scale, double offset, int64_t threads,
                  int64_t activation, double slope, int64_t index,
                  ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  const Buffers b{arguments, results};
  // x, z or dy: all of one shape.
  const ffi::AnyBuffer first = b.argument(0);
  const ffi::Span<const int64_t> sizes = first.dimensions();
  const Formula formula{scale, offset, ddof};
  ffi::Error error = Check(dtype, activation, formula, sizes);
  if (error.failure()) return error;
  const int64_t rows = sizes.front();
  const int64_t units = static_cast<int64_t>(first.element_count()) / rows;
  const Problem problem{static_cast<DType>(dtype), rows, units, formula};
  Epilogue epilogue;
  epilogue.activation = static_cast<Activation>(activation);
  epilogue.slope = slope;
  epilogue.channels = sizes.back();
  const Device device(context, threads);
  if constexpr (kCall == Call::kEpilogueGrad) {
    if (index < 0 ||
        index >= static_cast<int64_t>(b.argument(4).element_count())) {
      return ffi::Error::InvalidArgument("lbe_ops: index is out of range");
    }
    GradientArguments gradient;
    gradient.dy = b.input(0);
    gradient.x = b.input(1);
    gradient.mean = b.input(2);
    gradient.variance = b.input(3);
    gradient.entropy_grad = static_cast<const char*>(b.input(4)) +
                            index * ResultBytes(problem.dtype);
    gradient.epilogue = &epilogue;
    gradient.dx = b.output(0);
    if (results.size() > 2) gradient.dbias = b.output(1);
    gradient.workspace = b.workspace();
    return device.Gradient(problem, gradient);
  } else {
    ForwardArguments forward;
    forward.x = b.input(0);
    size_t next = 0;
    if constexpr (kCall == Call::kEpilogue) {
      if (arguments.size() > 1) epilogue.bias = b.input(1);
      forward.epilogue = &epilogue;
      forward.y = b.output(next++);
    }
    forward.entropy = b.output(next++);
    forward.mean = b.output(next++);
    forward.variance = b.output(next++);
    forward.valid = b.output(next++);
    forward.workspace = b.workspace();
    return device.Forward(problem, forward);
  }
}

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
      .template Attr<double>("slope")
      .template Attr<int64_t>("index")
      .RemainingArgs()
      .RemainingRets();
}

#define LBE_HOST_HANDLER(name, call)                 \
  XLA_FFI_DEFINE_HANDLER(name, (Handle<Host, call>), \
                         Bind(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()))
LBE_HOST_HANDLER(kStatisticsOnHost, Call::kStatistics);
LBE_HOST_HANDLER(kEpilogueOnHost, Call::kEpilogue);
LBE_HOST_HANDLER(kEpilogueGradOnHost, Call::kEpilogueGrad);
#undef LBE_HOST_HANDLER

#ifdef LBE_CUDA
// Launches only, so that XLA may record them in a CUDA graph.
#define LBE_CUDA_HANDLER(name, call)                            \
  XLA_FFI_DEFINE_HANDLER(                                       \
      name, (Handle<Cuda, call>),                               \
      Bind(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>()), \
      {ffi::Traits::kCmdBufferCompatible})
LBE_CUDA_HANDLER(kStatisticsOnCuda, Call::kStatistics);
LBE_CUDA_HANDLER(kEpilogueOnCuda, Call::kEpilogue);
LBE_CUDA_HANDLER(kEpilogueGradOnCuda, Call::kEpilogueGrad);
#undef LBE_CUDA_HANDLER
#endif

}  // namespace

const std::vector<Handler>& Handlers() {
  static const auto* const handlers = new std::vector<Handler>{
      {kStatisticsCall, Host::kName, kStatisticsOnHost},
      {kEpilogueCall, Host::kName, kEpilogueOnHost},
      {kEpilogueGradCall, Host::kName, kEpilogueGradOnHost},
#ifdef LBE_CUDA
      {kStatisticsCall, Cuda::kName, kStatisticsOnCuda},
      {kEpilogueCall, Cuda::kName, kEpilogueOnCuda},
      {kEpilogueGradCall, Cuda::kName, kEpilogueGradOnCuda},
#endif
  };
  return *handlers;
}

int64_t ForwardCallWorkspace(Platform platform, const Problem& problem,
                             bool has_epilogue, int64_t threads) {
#ifdef LBE_CUDA
  if (platform == Platform::kCuda) {
    return kAlignment + ForwardCudaWorkspace(problem, has_epilogue);
  }
#endif
  (void)platform;
  (void)has_epilogue;
  return kAlignment + ForwardCpuWorkspace(problem, static_cast<int>(threads));
}

int64_t GradientCallWorkspace(Platform platform, const Problem& problem,
                              int64_t channels) {
  if (channels == 0) return kAlignment;
#ifdef LBE_CUDA
  if (platform == Platform::kCuda) {
    return kAlignment + GradientCudaWorkspace(problem, channels);
  }
#endif
  (void)platform;
  return kAlignment + GradientCpuWorkspace(problem, channels);
}

}  // namespace lbe
