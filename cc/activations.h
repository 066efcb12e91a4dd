// SPDX-License-Identifier: Apache-2.0
//
// The activations of an epilogue y = activation(z + bias), and their
// derivatives written with y alone, so that z need not be kept.
//
// Called by every kernel, on the host and on the device; `V` as in
// batch_entropy.h.

#ifndef LBE_OPS_CC_ACTIVATIONS_H_
#define LBE_OPS_CC_ACTIVATIONS_H_

#include "batch_entropy.h"

namespace lbe {

// Name, and the name that Keras has for it.
#define LBE_FOR_EACH_ACTIVATION(DO) \
  DO(kLinear, "linear")             \
  DO(kRelu, "relu")                 \
  DO(kLeakyRelu, "leaky_relu")      \
  DO(kElu, "elu")                   \
  DO(kSelu, "selu")                 \
  DO(kTanh, "tanh")                 \
  DO(kSigmoid, "sigmoid")           \
  DO(kSoftplus, "softplus")

enum class Activation {
#define LBE_ACTIVATION(name, keras_name) name,
  LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
};

// Whether an activation takes a few instructions, and not an exponential.
template <Activation kActivation>
constexpr bool kIsCheap =
    kActivation == Activation::kLinear || kActivation == Activation::kRelu ||
    kActivation == Activation::kLeakyRelu;

// Klambauer et al., "Self-Normalizing Neural Networks", 2017.
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
constexpr double kSeluScale = 1.0507009873554804934193349852946;

// What exp needs to know: k = round(x / ln 2), with which x - k ln 2 is exact
// enough for as many terms of the series of expm1 as reach the last bit.
template <typename Scalar>
struct ExpOf;
template <>
struct ExpOf<float> {
  static constexpr int kTerms = 8;  // 0.35^9 / 9! < 2e-10
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440054690583e-4f;
  static constexpr float kLeast = -87.0f;      // exp of less is 0, nearly
  static constexpr float kShifter = 12582912;  // 1.5 * 2^23
};
template <>
struct ExpOf<double> {
  static constexpr int kTerms = 14;  // 0.35^15 / 15! < 2e-19
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLeast = -708.0;
  static constexpr double kShifter = 6755399441055744;  // 1.5 * 2^52
};

template <int n>
constexpr double kFactorial = n * kFactorial<n - 1>;
template <>
constexpr double kFactorial<0> = 1;

// sum_{n >= kTerm} r^(n - kTerm) / n!, by Horner's scheme: a multiplication and
// an addition a term.
template <typename Scalar, int kTerm, typename V>
LBE_MATH V ExpSeries(const V& r) {
  constexpr Scalar kCoefficient = static_cast<Scalar>(1 / kFactorial<kTerm>);
  if constexpr (kTerm == ExpOf<Scalar>::kTerms) {
    return V{} + kCoefficient;
  } else {
    return r * ExpSeries<Scalar, kTerm + 1>(r) + kCoefficient;
  }
}

// exp(x) - 1 for x <= 0, accurate near 0. NaN stays. A few units in the last
// place.
template <typename Scalar, typename V>
LBE_MATH V ExpMinusOne(const V& x) {
  using E = ExpOf<Scalar>;
  using F = Ieee<Scalar>;
  using Bits = typename Integers<V>::type;
  const V bounded = x < E::kLeast ? V{} + E::kLeast : x;
  // Adding 1.5 * 2^p rounds to an integer, which then stands in the low bits.
  const V shifted = bounded * Scalar(1.44269504088896340736) + E::kShifter;
  const V k = shifted - E::kShifter;
  const V r = (bounded - k * E::kLn2High) - k * E::kLn2Low;
  const V minus_one = r * ExpSeries<Scalar, 1>(r);
  const Bits exponent = BitCast<Bits>(shifted) << F::kMantissaBits;
  const V power = BitCast<V>(exponent + F::kOne);  // 2^k
  return power * minus_one + (power - Scalar(1));
}

template <typename Scalar, typename V>
LBE_MATH V Magnitude(const V& x) {
  return x < Scalar(0) ? -x : x;
}

// activation(z); `slope` is that of leaky_relu below 0, and for elu its factor.
// NaN stays NaN.
template <Activation kActivation, typename Scalar, typename V>
LBE_MATH V Activate(const V& z, Scalar slope) {
  if constexpr (kActivation == Activation::kLinear) {
    return z;
  } else if constexpr (kActivation == Activation::kRelu) {
    return z < Scalar(0) ? V{} : z;
  } else if constexpr (kActivation == Activation::kLeakyRelu) {
    return z < Scalar(0) ? V(z * slope) : z;
  } else if constexpr (kActivation == Activation::kElu) {
    const V negative = z < Scalar(0) ? z : V{};
    return z < Scalar(0) ? V(ExpMinusOne<Scalar>(negative) * slope) : z;
  } else if constexpr (kActivation == Activation::kSelu) {
    const V negative = z < Scalar(0) ? z : V{};
    const V below =
        ExpMinusOne<Scalar>(negative) * static_cast<Scalar>(kSeluAlpha);
    return V(z < Scalar(0) ? below : z) * static_cast<Scalar>(kSeluScale);
  } else if constexpr (kActivation == Activation::kTanh) {
    const V e = ExpMinusOne<Scalar>(V(Magnitude<Scalar>(z) * Scalar(-2)));
    const V magnitude = -e / (e + Scalar(2));
    return z < Scalar(0) ? V(-magnitude) : magnitude;
  } else if constexpr (kActivation == Activation::kSigmoid) {
    const V t = ExpMinusOne<Scalar>(V(-Magnitude<Scalar>(z))) + Scalar(1);
    const V below = t / (t + Scalar(1));
    return z < Scalar(0) ? below : V(Scalar(1) / (t + Scalar(1)));
  } else {
    // max(z, 0) + log1p(exp(-|z|))
    const V t = ExpMinusOne<Scalar>(V(-Magnitude<Scalar>(z))) + Scalar(1);
    const V u = t + Scalar(1);
    const V lost = t - (u - Scalar(1));
    return (z < Scalar(0) ? V{} : z) + LogPlus<Scalar>(u, V(lost / u));
  }
}

// d activation(z) / dz, of y = activation(z). relu'(0) = 0.
template <Activation kActivation, typename Scalar, typename V>
LBE_MATH V Derivative(const V& y, Scalar slope) {
  const V one = V{} + Scalar(1);
  if constexpr (kActivation == Activation::kLinear) {
    return one;
  } else if constexpr (kActivation == Activation::kRelu) {
    return y > Scalar(0) ? one : V{};
  } else if constexpr (kActivation == Activation::kLeakyRelu) {
    return y > Scalar(0) ? one : V(V{} + slope);
  } else if constexpr (kActivation == Activation::kElu) {
    return y < Scalar(0) ? V(y + slope) : one;
  } else if constexpr (kActivation == Activation::kSelu) {
    return y < Scalar(0) ? V(y + static_cast<Scalar>(kSeluScale * kSeluAlpha))
                         : V(V{} + static_cast<Scalar>(kSeluScale));
  } else if constexpr (kActivation == Activation::kTanh) {
    return one - y * y;
  } else if constexpr (kActivation == Activation::kSigmoid) {
    return y * (one - y);
  } else {
    return -ExpMinusOne<Scalar>(V(-y));
  }
}

// The gradient of a bias is the sum of dz, as it is before it is rounded, over
// all rows and all positions of a channel, in this order:
//
//   for each unit, for each kSumRows rows, k = 0, 1, ...:
//     leaf[l] = the sum of dz of rows kSumRows * k + 8 l + (0, 1, ..., 7)
//     sums[k][unit] = PairwiseSum(leaf)
//   for each channel, sums[k][unit] seen as list[i], with i = k * positions +
//   position and unit = position * channels + channel, in double:
//     part[p] = the sum of list[p], list[p + kSumParts], ..., one by one
//     dbias[channel] = SumHalves<kSumParts>(part), what is missing being 0
constexpr int kSumRows = kLeafRows * kLeafRows;
constexpr int kSumParts = 256;

}  // namespace lbe

#endif  // LBE_OPS_CC_ACTIVATIONS_H_
