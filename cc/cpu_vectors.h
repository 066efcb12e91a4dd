// SPDX-License-Identifier: Apache-2.0
//
// Vectors of one instruction set, and elements of each dtype read into them and
// rounded from them.
//
// Included by cpu_loops.cc alone, which is compiled once for each instruction
// set: everything is local or always inlined.

#ifndef LBE_OPS_CC_CPU_VECTORS_H_
#define LBE_OPS_CC_CPU_VECTORS_H_

#include "cpu_processor.h"
#include "kernels.h"

namespace lbe {
namespace {

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

// Keeps the compiler from reading from memory a second time what it has read.
template <typename... Vectors>
LBE_MATH void KeepInRegisters(Vectors&... vectors) {
  const auto keep = [](auto& v) __attribute__((always_inline)) {
    asm("" : "+" LBE_VECTOR_REGISTER(v));
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
#ifdef LBE_BFLOAT16_INSTRUCTIONS
  LBE_MATH Vector Load(const BFloat16* x) { return LoadUpperHalves(x); }
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
#ifdef LBE_HALF_INSTRUCTIONS
  LBE_MATH Vector Load(const Half* x) { return LoadHalves(x); }
  LBE_MATH void Store(const Vector& v, Half* x) { StoreHalves(v, x); }
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

}  // namespace
}  // namespace lbe

#endif  // LBE_OPS_CC_CPU_VECTORS_H_
