// SPDX-License-Identifier: Apache-2.0
//
// Runs CUDA kernels on the CPU, for tests on machines without a GPU.
//
// Compile cuda/launch.cu as C++ with this file before it (g++ -x c++ -include
// tests/cuda_emulation.h). Each CUDA thread is a fiber; a few blocks are under
// way at a time; who goes on at a barrier is drawn at random. Device
// memory is host memory, streams do nothing. Shared memory is as large as it is
// declared and full of NaNs at first. A thread that does not come to a barrier
// or a shuffle for which others wait is an error.
//
// ThreadSanitizer sees fibers as threads that are ordered by barriers,
// shuffles, atomics and launches alone; AddressSanitizer sees each array of
// shared memory. What cannot be seen here: faults of weak memory (a missing
// __threadfence) and speed.

#ifndef LBE_OPS_TESTS_CUDA_EMULATION_H_
#define LBE_OPS_TESTS_CUDA_EMULATION_H_

#include <immintrin.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define LBE_CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (::emulation::Current().thread_index)
#define blockIdx (::emulation::Current().block_index)
#define LBE_SHARED(type, name, size)                         \
  static char name##_declaration;                            \
  type* const name = static_cast<type*>(::emulation::Shared( \
      &name##_declaration, sizeof(type) * static_cast<size_t>(size)))
#define LBE_LAUNCH(kernel, blocks, threads, stream, ...)         \
  ((void)(stream), ::emulation::Launch(#kernel, blocks, threads, \
                                       [=] { kernel(__VA_ARGS__); }))

namespace emulation {

constexpr unsigned kWarp = 32;

[[noreturn]] inline void Fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::exit(3);
}

// The number of the fault that is to be there, in kernels that
// test_cuda_emulation.py has planted faults in; less than 0 for none.
inline const int planted = [] {
  const char* number = std::getenv("LBE_PLANTED");
  return number == nullptr ? -1 : std::atoi(number);
}();

// While it lives, ThreadSanitizer does not look at what the caller reads and
// writes: the emulation's own data, which one thread at a time uses.
class Unseen {
 public:
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
};

// What orders the threads that pass it: a barrier of a block or a warp.
struct Barrier {
  unsigned arrived = 0;
  unsigned passed = 0;  // how often all have
  // For ThreadSanitizer, in turns: who comes to the next barrier must not be
  // ordered before those who have yet to leave this one.
  char turns[2];

  void Release() {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&turns[passed % 2]);
#endif
  }
  void Acquire(unsigned turn) {
    (void)turn;
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&turns[turn % 2]);
#endif
  }
};

struct Warp {
  Barrier barrier;
  uint64_t values[kWarp];
};

// What a block may have of shared memory on every GPU.
constexpr size_t kSharedBytes = 48 << 10;

struct Block {
  unsigned threads;
  Barrier barrier;
  std::vector<Warp> warps;
  std::map<const void*, char*> arrays;  // by their declaration
  std::vector<char> shared = std::vector<char>(2 * kSharedBytes, '\xff');
  size_t shared_used = 0;
  unsigned finished = 0;
};

struct Index {
  unsigned x;
};

constexpr size_t kStackBytes = 64 << 10;

struct Context {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
};

// Sanitizers know swapcontext. It calls the system each time to keep the signal
// mask, which took three quarters of the time of a program without them.
__attribute__((noinline)) inline void Switch(Context* from, Context* to) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  swapcontext(&from->start, &to->start);
#else
  from->started = true;
  if (_setjmp(from->place) != 0) return;
  if (to->started) _longjmp(to->place, 1);
  setcontext(&to->start);
#endif
}

struct Fiber {
  Index thread_index;
  Index block_index;
  Block* block;
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const Barrier* waits_for = nullptr;
  unsigned waits_until = 0;
  bool finished = false;
  void* tsan = nullptr;  // ThreadSanitizer's, which is dear to make

  bool runnable() const {
    return !finished &&
           (waits_for == nullptr ||
            static_cast<int>(waits_for->passed - waits_until) >= 0);
  }
};

// What a stream was given to do: a kernel's name, blocks and threads a block,
// or the bytes of a memset.
struct Operation {
  std::string name;
  unsigned blocks;
  unsigned threads;
  size_t bytes;
};

// In which order blocks start: those of a GPU may do so in any.
enum class Order { kRandom, kAscending, kDescending };

// One launch at a time, from one thread.
struct Machine {
  std::mt19937 random{1};
  Order order = Order::kRandom;
  size_t resident = 3;                // blocks at a time
  bool runs = true;                   // or only writes down what it is given
  std::vector<Operation> operations;  // so far
  std::vector<std::unique_ptr<Fiber>> idle;
  Fiber* current = nullptr;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  void* scheduler_tsan = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

inline Machine& TheMachine() {
  static Machine machine;
  return machine;
}

inline Fiber& Current() { return *TheMachine().current; }

// To the scheduler and back some time.
inline void SwitchToScheduler() {
  Machine& machine = TheMachine();
  Fiber* fiber = machine.current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.scheduler_tsan,
                         __tsan_switch_to_fiber_no_sync);
#endif
  Switch(&fiber->context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Returns when `threads` fibers have come.
inline void Wait(Barrier* barrier, unsigned threads) {
  Unseen unseen;
  Fiber& fiber = Current();
  barrier->Release();
  const unsigned turn = barrier->passed;
  fiber.waits_for = barrier;
  fiber.waits_until = turn + 1;
  if (++barrier->arrived == threads) {
    barrier->arrived = 0;
    ++barrier->passed;
  }
  SwitchToScheduler();
  fiber.waits_for = nullptr;
  barrier->Acquire(turn);
}

inline void* Shared(const void* declaration, size_t bytes) {
  Unseen unseen;
  Block& block = *Current().block;
  char*& array = block.arrays[declaration];
  if (array == nullptr) {
    constexpr size_t kAlignment = 64;
    array = block.shared.data() + block.shared_used;
    block.shared_used += (bytes / kAlignment + 1) * kAlignment;
    if (block.shared_used > kSharedBytes) Fail("too much shared memory");
#if defined(__SANITIZE_ADDRESS__)
    // Up to the next array, and after the last one.
    ASAN_POISON_MEMORY_REGION(
        array + bytes,
        block.shared.data() + block.shared.size() - (array + bytes));
    ASAN_UNPOISON_MEMORY_REGION(array, bytes);
#endif
  }
  return array;
}

inline void RunFiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &TheMachine().scheduler_stack,
                                  &TheMachine().scheduler_stack_bytes);
#endif
  // A thread of one block after the other.
  for (;;) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&TheMachine().body);
#endif
    (*TheMachine().body)();
    {
      Unseen unseen;
      Current().finished = true;
      ++Current().block->finished;
    }
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&TheMachine());
#endif
    SwitchToScheduler();
  }
}

inline std::unique_ptr<Fiber> MakeFiber() {
  auto fiber = std::make_unique<Fiber>();
  getcontext(&fiber->context.start);
  fiber->context.start.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.start.uc_stack.ss_size = kStackBytes;
  fiber->context.start.uc_link = nullptr;
  makecontext(&fiber->context.start, RunFiber, 0);
#if defined(__SANITIZE_THREAD__)
  fiber->tsan = __tsan_create_fiber(0);
#endif
  return fiber;
}

// One that is idle, if there is one.
inline std::unique_ptr<Fiber> TakeFiber(Block* block, unsigned block_index,
                                        unsigned thread_index) {
  auto& idle = TheMachine().idle;
  if (idle.empty()) idle.push_back(MakeFiber());
  std::unique_ptr<Fiber> fiber = std::move(idle.back());
  idle.pop_back();
  fiber->thread_index.x = thread_index;
  fiber->block_index.x = block_index;
  fiber->block = block;
  fiber->finished = false;
  return fiber;
}

inline void Resume(Fiber* fiber) {
  Machine& machine = TheMachine();
  machine.current = fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber->stack.get(), kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  machine.scheduler_tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber->tsan, __tsan_switch_to_fiber_no_sync);
#endif
  Switch(&machine.scheduler, &fiber->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
}

// Runs all blocks, some of them at a time.
inline void Launch(const char* name, unsigned blocks, unsigned threads,
                   const std::function<void()>& body) {
  Unseen unseen;
  Machine& machine = TheMachine();
  machine.operations.push_back({name, blocks, threads, 0});
  if (!machine.runs) return;
  machine.body = &body;
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&machine.body);  // what was before this launch
#endif
  // Subnormal floats are zero, as with nvcc -ftz=true; fibers inherit this.
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(saved | _MM_FLUSH_ZERO_ON | 0x0040);
  std::vector<unsigned> order(blocks);
  for (unsigned b = 0; b < blocks; ++b) order[b] = b;
  if (machine.order == Order::kRandom) {
    std::shuffle(order.begin(), order.end(), machine.random);
  } else if (machine.order == Order::kDescending) {
    std::reverse(order.begin(), order.end());
  }

  std::vector<std::unique_ptr<Block>> resident;
  std::vector<std::unique_ptr<Fiber>> fibers, finished;
  size_t next = 0;
  while (next < blocks || !resident.empty()) {
    while (next < blocks && resident.size() < machine.resident) {
      auto block = std::make_unique<Block>();
      block->threads = threads;
      block->warps.resize(threads / kWarp);
      for (unsigned t = 0; t < threads; ++t) {
        fibers.push_back(TakeFiber(block.get(), order[next], t));
      }
      resident.push_back(std::move(block));
      ++next;
    }
    // Everyone who can go on does, in random order.
    std::vector<Fiber*> runnable;
    for (const auto& fiber : fibers) {
      if (fiber->runnable()) runnable.push_back(fiber.get());
    }
    if (runnable.empty()) {
      Fail(
          "threads wait at a barrier or a shuffle to which others of their "
          "block do not come");
    }
    std::shuffle(runnable.begin(), runnable.end(), machine.random);
    for (Fiber* fiber : runnable) Resume(fiber);
    for (size_t b = 0; b < resident.size();) {
      Block* block = resident[b].get();
      if (block->finished < threads) {
        ++b;
        continue;
      }
      // ThreadSanitizer would take the next block's threads for this one's.
#if defined(__SANITIZE_THREAD__)
      auto& idle = finished;
#else
      auto& idle = machine.idle;
#endif
      for (auto& fiber : fibers) {
        if (fiber->block == block) idle.push_back(std::move(fiber));
      }
      fibers.erase(std::remove(fibers.begin(), fibers.end(), nullptr),
                   fibers.end());
      resident.erase(resident.begin() + static_cast<ptrdiff_t>(b));
    }
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&machine);
  std::move(finished.begin(), finished.end(), std::back_inserter(machine.idle));
#endif
  _mm_setcsr(saved);
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::Block* block = emulation::Current().block;
  emulation::Wait(&block->barrier, block->threads);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a number");
  emulation::Unseen unseen;
  if (mask != 0xffffffff) emulation::Fail("a shuffle of a part of a warp");
  const emulation::Fiber& fiber = emulation::Current();
  const unsigned lane = fiber.thread_index.x % emulation::kWarp;
  emulation::Warp& warp =
      fiber.block->warps[fiber.thread_index.x / emulation::kWarp];
  std::memcpy(&warp.values[lane], &value, sizeof(T));
  emulation::Wait(&warp.barrier, emulation::kWarp);
  T result = value;
  if (lane + delta < emulation::kWarp) {
    std::memcpy(&result, &warp.values[lane + delta], sizeof(T));
  }
  emulation::Wait(&warp.barrier, emulation::kWarp);
  return result;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline void __threadfence() {}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}
using std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31;
  const int mantissa = x.bits & 1023;
  const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent == 0
                               ? std::ldexp(mantissa, -24)
                               : std::ldexp(1024 + mantissa, exponent - 25);
  return static_cast<float>(x.bits & 0x8000 ? -magnitude : magnitude);
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  // In units of the last place of what it becomes, to nearest, ties to even.
  const int exponent = std::max(x == 0 ? -14 : std::ilogb(x), -14);
  const double units = std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent));
  const int bits = std::isinf(x) || exponent > 15
                       ? 0x7c00
                       : static_cast<int>(units) + ((exponent + 14) << 10);
  return {static_cast<uint16_t>(sign | std::min(bits, 0x7c00))};
}

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// What the launchers and the NumPy module need of the CUDA runtime.
#define CUDART_VERSION 0
#define LBE_CUDA_ARCHITECTURES "sm_90 compute_120"
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaDeviceProp {
  char name[256];
  int major;
  int minor;
};

// The error of the last call that failed, as CUDA keeps it until it is asked
// for.
inline cudaError_t& EmulatedLastError() {
  static cudaError_t error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(EmulatedLastError(), cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12030;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"emulated on the CPU", 9, 0};
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes,
                                   cudaStream_t) {
  emulation::Machine& machine = emulation::TheMachine();
  machine.operations.push_back({"memset", 0, 0, bytes});
  if (machine.runs) std::memset(data, value, bytes);
  return cudaSuccess;
}

// What cc/cuda_arrays.cc needs on top: memory, streams, events.
constexpr unsigned cudaEventDisableTiming = 2;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaMemoryType { cudaMemoryTypeDevice = 2, cudaMemoryTypeManaged = 3 };
using cudaEvent_t = void*;
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMallocAsync(void** data, size_t bytes, cudaStream_t) {
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (*data == nullptr) EmulatedLastError() = cudaErrorMemoryAllocation;
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* data, cudaStream_t) {
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes,
                                   cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                            const void*) {
  *attributes = {cudaMemoryTypeDevice, 0};
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

// One device, which has a context: no driver is there to be asked.
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPoint(const char*, void** function,
                                           unsigned long long) {
  *function = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

// Memory pools, all of which are the process's own memory.
enum cudaMemAllocationType { cudaMemAllocationTypePinned = 1 };
enum cudaMemLocationType { cudaMemLocationTypeDevice = 1 };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold = 4 };
struct cudaMemPoolProps {
  cudaMemAllocationType allocType;
  struct {
    cudaMemLocationType type;
    int id;
  } location;
};
using cudaMemPool_t = void*;
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool,
                                     const cudaMemPoolProps*) {
  *pool = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr,
                                           void*) {
  return cudaSuccess;
}
inline cudaError_t cudaMallocFromPoolAsync(void** data, size_t bytes,
                                           cudaMemPool_t, cudaStream_t stream) {
  return cudaMallocAsync(data, bytes, stream);
}

#endif  // LBE_OPS_TESTS_CUDA_EMULATION_H_
