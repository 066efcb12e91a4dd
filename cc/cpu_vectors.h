// SPDX-License-Identifier: Apache-2.0
//
// Vectors of one instruction set, and elements of each dtype read into them and
// rounded from them.
//
// Included by cpu_loops.cc alone, which is compiled once for each instruction
// set: everything is local or always inlined.

#ifndef LBE_OPS_CC_CPU_VECTORS_H_
#define LBE_OPS_CC_CPU_VECTORS_H_

#include <immintrin.h>

#include "kernels.h"

namespace lbe {
namespace {

// As wide as a register. The compiler keeps wider ones in memory.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLineBytes = 64;  // of the caches

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Vector __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Vector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Uint32Vector __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Uint64Vector __attribute__((vector_size(kVectorBytes)));
// As many as a vector has floats.
typedef uint16_t Uint16Vector __attribute__((vector_size(kVectorBytes / 2)));

}  // namespace

template <>
struct Integers<FloatVector> {
  using type = Uint32Vector;
  LBE_MATH FloatVector Convert(const type& k) {
    return __builtin_convertvector(BitCast<Int32Vector>(k), FloatVector);
  }
};
template <>
struct Integers<DoubleVector> {
  using type = Uint64Vector;
  LBE_MATH DoubleVector Convert(const type& k) {
    return __builtin_convertvector(BitCast<Int64Vector>(k), DoubleVector);
  }
};

namespace {

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

// Keeps the compiler from reading from memory a second time what it has read.
template <typename... Vectors>
LBE_MATH void KeepInRegisters(Vectors&... vectors) {
  const auto keep = [](auto& v) __attribute__((always_inline)) {
    asm("" : "+v"(v));
  };
  (keep(vectors), ...);
}

// Elements widened to a vector of accumulators, and one rounded to elements.
template <typename Element>
struct Convert;

template <>
struct Convert<float> {
  using Vector = FloatVector;
  LBE_MATH Vector Load(const float* x) { return LoadVector<Vector>(x); }
  LBE_MATH void Store(const Vector& v, float* x) { StoreVector(v, x); }
};

template <>
struct Convert<double> {
  using Vector = DoubleVector;
  LBE_MATH Vector Load(const double* x) { return LoadVector<Vector>(x); }
  LBE_MATH void Store(const Vector& v, double* x) { StoreVector(v, x); }
};

template <>
struct Convert<BFloat16> {
  using Vector = FloatVector;
#if defined(__AVX512F__)
  LBE_MATH Vector Load(const BFloat16* x) {
    const __m512i bits = _mm512_cvtepu16_epi32(LoadVector<__m256i>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  LBE_MATH void StoreUpperHalves(const Uint32Vector& bits, BFloat16* x) {
    StoreVector(_mm512_cvtepi32_epi16(BitCast<__m512i>(bits >> 16)), x);
  }
#elif defined(__AVX2__)
  LBE_MATH Vector Load(const BFloat16* x) {
    const __m256i bits = _mm256_cvtepu16_epi32(LoadVector<__m128i>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  LBE_MATH void StoreUpperHalves(const Uint32Vector& bits, BFloat16* x) {
    // Each half of a register is shuffled by itself.
    const __m256i order = _mm256_set1_epi64x(0x0f0e0b0a07060302);
    const __m256i halves = _mm256_shuffle_epi8(BitCast<__m256i>(bits), order);
    StoreVector(
        _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0b1000)), x);
  }
#else
  LBE_MATH Vector Load(const BFloat16* x) {
    const auto bits = LoadVector<Uint16Vector>(x);
    return BitCast<Vector>(__builtin_convertvector(bits, Uint32Vector) << 16);
  }
  LBE_MATH void StoreUpperHalves(const Uint32Vector& bits, BFloat16* x) {
    StoreVector(__builtin_convertvector(bits >> 16, Uint16Vector), x);
  }
#endif
  LBE_MATH void Store(const Vector& v, BFloat16* x) {
    const auto bits = BitCast<Uint32Vector>(v);
    // To nearest, ties to even; a NaN keeps its sign and stays a NaN.
    const Uint32Vector rounded = (bits + 0x7fff) + ((bits >> 16) & 1);
    const Uint32Vector nan = bits | 0x400000;
    StoreUpperHalves(v == v ? rounded : nan, x);
  }
};

template <>
struct Convert<Half> {
  using Vector = FloatVector;
#if defined(__AVX512F__)
  LBE_MATH Vector Load(const Half* x) {
    return _mm512_cvtph_ps(LoadVector<__m256i>(x));
  }
  LBE_MATH void Store(const Vector& v, Half* x) {
    StoreVector(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), x);
  }
#elif defined(__F16C__)
  LBE_MATH Vector Load(const Half* x) {
    return _mm256_cvtph_ps(LoadVector<__m128i>(x));
  }
  LBE_MATH void Store(const Vector& v, Half* x) {
    StoreVector(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), x);
  }
#else
  LBE_MATH Vector Load(const Half* x) {
    const auto bits =
        __builtin_convertvector(LoadVector<Uint16Vector>(x), Uint32Vector);
    const Uint32Vector magnitude = bits & 0x7fff;
    // Rebias the exponent from 15 to 127; Inf and NaN get the largest one.
    const Uint32Vector normal = (magnitude << 13) + (112u << 23);
    const Uint32Vector special = (magnitude << 13) | 0x7f800000;
    // A subnormal is its mantissa times 2^-24: by arithmetic, since the
    // processor may be flushing subnormal floats.
    const Vector small =
        __builtin_convertvector(BitCast<Int32Vector>(magnitude), Vector) *
        5.9604644775390625e-8f;
    Uint32Vector result = magnitude >= 0x7c00 ? special : normal;
    result = magnitude < 0x400 ? BitCast<Uint32Vector>(small) : result;
    return BitCast<Vector>(result | ((bits & 0x8000) << 16));
  }
  LBE_MATH void Store(const Vector& v, Half* x) {
    const auto bits = BitCast<Uint32Vector>(v);
    const Uint32Vector magnitude = bits & 0x7fffffff;
    // To nearest, ties to even. Normal: drop 13 bits of the mantissa. Below
    // 2^-14: adding 1/2 leaves the subnormal's mantissa, rounded, in the lowest
    // bits.
    const Uint32Vector normal =
        (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    const Uint32Vector small =
        BitCast<Uint32Vector>(BitCast<Vector>(magnitude) + 0.5f) - 0x3f000000;
    const Uint32Vector nan = (magnitude >> 13 & 0x3ff) | 0x7e00;
    const Uint32Vector infinity = Uint32Vector{} + 0x7c00;
    Uint32Vector result = magnitude < 0x38800000 ? small : normal;
    result = magnitude >= 0x477ff000 ? infinity : result;
    result = magnitude > 0x7f800000 ? nan : result;
    result |= (bits >> 16) & 0x8000;
    StoreVector(__builtin_convertvector(result, Uint16Vector), x);
  }
#endif
};

// 64 aligned bytes written around the caches.
LBE_MATH void StreamLine(const void* line, void* to) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), LoadVector<__m512i>(line));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    _mm256_stream_si256(
        static_cast<__m256i*>(to) + i,
        LoadVector<__m256i>(static_cast<const __m256i*>(line) + i));
  }
#else
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(
        static_cast<__m128i*>(to) + i,
        LoadVector<__m128i>(static_cast<const __m128i*>(line) + i));
  }
#endif
}

}  // namespace
}  // namespace lbe

#endif  // LBE_OPS_CC_CPU_VECTORS_H_
