// SPDX-License-Identifier: Apache-2.0
//
// All that depends on the processor, x86-64 or aarch64: a port to another one
// begins here and in CMakeLists.txt. The loops are written in the compiler's
// own vectors, which know none.
//
// Included by cpu_vectors.h, which is compiled once for each instruction set,
// and by cpu_launch.cc, which picks one at run time: everything is local or
// always inlined. Each processor has to define:
//
//   kVectorBytes           bytes of a vector: as wide as a register, since the
//                          compiler keeps wider ones in memory
//   LBE_VECTOR_REGISTER    what the compiler's asm calls such a register
//   LoadHalves,            a vector of floats from elements of kFloat16 and to
//     StoreHalves          them, rounded to nearest; with
//                          LBE_HALF_INSTRUCTIONS, else cpu_vectors.h has them
//   LoadUpperHalves,       the same for kBFloat16, storing the upper halves of
//     StoreUpperHalves     32 bits; with LBE_BFLOAT16_INSTRUCTIONS
//   StreamLine             writes an aligned line around the caches
//   EndStream              makes such lines visible to other threads
//   ReadMode, WriteMode,   the register that says how numbers are rounded, and
//     KernelMode           what it is in a kernel
//   InstructionSets        the tables of loops, the best first
//   kSimdLevels            their names, the lowest first

#ifndef LBE_OPS_CC_CPU_PROCESSOR_H_
#define LBE_OPS_CC_CPU_PROCESSOR_H_

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "lbe_ops has CPU kernels for x86-64 and aarch64 only"
#endif

#include <array>
#include <cstdint>

#include "batch_entropy.h"
#include "cpu_loops.h"

namespace lbe {
namespace {

constexpr int kLineBytes = 64;  // of the caches

// An instruction set, and whether the processor at hand has it.
struct Simd {
  const char* name;
  const CpuLoops* loops;
  bool is_there;
};

template <typename V>
LBE_MATH V LoadVector(const void* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename V>
LBE_MATH void StoreVector(const V& vector, void* to) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

#if defined(__x86_64__)

#define LBE_VECTOR_REGISTER "v"

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;

#define LBE_HALF_INSTRUCTIONS
LBE_MATH __m512 LoadHalves(const void* x) {
  return _mm512_cvtph_ps(LoadVector<__m256i>(x));
}
LBE_MATH void StoreHalves(__m512 v, void* x) {
  StoreVector(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), x);
}

#define LBE_BFLOAT16_INSTRUCTIONS
LBE_MATH __m512 LoadUpperHalves(const void* x) {
  const __m512i bits = _mm512_cvtepu16_epi32(LoadVector<__m256i>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
template <typename Bits>
LBE_MATH void StoreUpperHalves(const Bits& bits, void* x) {
  StoreVector(_mm512_cvtepi32_epi16(BitCast<__m512i>(bits >> 16)), x);
}

LBE_MATH void StreamLine(const void* line, void* to) {
  _mm512_stream_si512(static_cast<__m512i*>(to), LoadVector<__m512i>(line));
}

#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;

#ifdef __F16C__
#define LBE_HALF_INSTRUCTIONS
LBE_MATH __m256 LoadHalves(const void* x) {
  return _mm256_cvtph_ps(LoadVector<__m128i>(x));
}
LBE_MATH void StoreHalves(__m256 v, void* x) {
  StoreVector(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), x);
}
#endif

#define LBE_BFLOAT16_INSTRUCTIONS
LBE_MATH __m256 LoadUpperHalves(const void* x) {
  const __m256i bits = _mm256_cvtepu16_epi32(LoadVector<__m128i>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
template <typename Bits>
LBE_MATH void StoreUpperHalves(const Bits& bits, void* x) {
  // Each half of a register is shuffled by itself.
  const __m256i order = _mm256_set1_epi64x(0x0f0e0b0a07060302);
  const __m256i halves = _mm256_shuffle_epi8(BitCast<__m256i>(bits), order);
  StoreVector(_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0b1000)),
              x);
}

LBE_MATH void StreamLine(const void* line, void* to) {
  for (int i = 0; i < 2; ++i) {
    _mm256_stream_si256(
        static_cast<__m256i*>(to) + i,
        LoadVector<__m256i>(static_cast<const __m256i*>(line) + i));
  }
}

#else
constexpr int kVectorBytes = 16;

LBE_MATH void StreamLine(const void* line, void* to) {
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(
        static_cast<__m128i*>(to) + i,
        LoadVector<__m128i>(static_cast<const __m128i*>(line) + i));
  }
}
#endif

LBE_MATH void EndStream() { _mm_sfence(); }

using Mode = unsigned;
LBE_MATH Mode ReadMode() { return _mm_getcsr(); }
LBE_MATH void WriteMode(Mode mode) { _mm_setcsr(mode); }
LBE_MATH Mode KernelMode(Mode mode) {
  constexpr Mode kDenormalsAreZero = 0x0040;
  return (mode & ~_MM_ROUND_MASK) | _MM_FLUSH_ZERO_ON | kDenormalsAreZero;
}

constexpr char kSimdLevels[] = "baseline avx2 avx512";
LBE_MATH std::array<Simd, 3> InstructionSets() {
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
  return {Simd{"avx512", CpuLoopsAvx512(), avx512},
          Simd{"avx2", CpuLoopsAvx2(), avx2},
          Simd{"baseline", CpuLoopsBaseline(), true}};
}

#else  // aarch64, all of which have NEON

#define LBE_VECTOR_REGISTER "w"
constexpr int kVectorBytes = 16;

#define LBE_HALF_INSTRUCTIONS
LBE_MATH float32x4_t LoadHalves(const void* x) {
  return vcvt_f32_f16(LoadVector<float16x4_t>(x));
}
LBE_MATH void StoreHalves(float32x4_t v, void* x) {
  StoreVector(vcvt_f16_f32(v), x);
}

// Plain stores: such a processor sees itself that many lines are written whole,
// and then does not read them first.
LBE_MATH void StreamLine(const void* line, void* to) {
  __builtin_memcpy(to, line, kLineBytes);
}
LBE_MATH void EndStream() {}

// FZ alone of the register FPCR. Zero elsewhere means: rounding to nearest,
// half types of IEEE 754 that keep their subnormals, no traps.
//
// FZ flushes what is below the smallest normal number before it is rounded,
// x86-64 after that: what rounding would lift to exactly this number, 2^-126 or
// 2^-1022, is 0 here. No other bits are known to differ, but for the signs and
// payloads of NaNs. Some newer processors can be told to do as x86-64
// (FPCR.AH); then two of aarch64 would differ instead.
using Mode = uint64_t;
LBE_MATH Mode ReadMode() {
  Mode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
LBE_MATH void WriteMode(Mode mode) {
  asm volatile("msr fpcr, %0" : : "r"(mode) : "memory");
}
LBE_MATH Mode KernelMode(Mode) { return Mode{1} << 24; }

constexpr char kSimdLevels[] = "neon";
LBE_MATH std::array<Simd, 1> InstructionSets() {
  return {Simd{"neon", CpuLoopsBaseline(), true}};
}

#endif

// Rounds to nearest and flushes subnormal numbers to zero while it lives,
// whatever the thread's own mode is: the same bits on every thread, and no slow
// arithmetic where a dead network's activations shrink to 1e-40.
class FloatingPointMode {
 public:
  FloatingPointMode() : saved_(ReadMode()) { WriteMode(KernelMode(saved_)); }
  ~FloatingPointMode() { WriteMode(saved_); }
  FloatingPointMode(const FloatingPointMode&) = delete;
  FloatingPointMode& operator=(const FloatingPointMode&) = delete;

 private:
  const Mode saved_;
};

}  // namespace
}  // namespace lbe

#endif  // LBE_OPS_CC_CPU_PROCESSOR_H_
