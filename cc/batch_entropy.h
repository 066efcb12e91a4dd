// SPDX-License-Identifier: Apache-2.0
//
// The maths of batch entropy: moments, their merge, entropy and gradient.
//
// Called by every kernel, on the host and on the device. `V` is float or
// double, or a vector of them on which the arithmetic operators and ?: work
// lane by lane. Compile callers without contraction to fused multiply-adds
// (-ffp-contract=off, -fmad=false): then every caller computes the same bits.
//
// Definitions: Peer et al., TMLR 2022 (arXiv 2208.01134). The tree of merges:
// Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for
// Computing Sample Variances", 1979.

#ifndef LBE_OPS_CC_BATCH_ENTROPY_H_
#define LBE_OPS_CC_BATCH_ENTROPY_H_

#include <cmath>
#include <cstdint>

// Always inlined and never merged by the linker: callers are compiled for
// different instruction sets.
#ifdef __CUDACC__
#define LBE_MATH static __host__ __device__ __forceinline__
#else
#define LBE_MATH static inline __attribute__((always_inline))
#endif

namespace lbe {

// Rows [8k, 8k + 8) of a batch are leaf k; the last leaf may be shorter.
constexpr int kLeafRows = 8;

// H = mean_u h_u,  h_u = 1/2 ln(scale * v_u + offset),  v_u = M2_u / (N -
// ddof).
constexpr double kPiE = 8.539734222673566;  // the usual scale: H is in nats

struct Formula {
  double scale = 0;
  double offset = 0;
  int64_t ddof = 0;
};

// What is served: numbers whose quotients float can hold, and no others.
constexpr double kSmallest = 1e-12;
constexpr double kLargest = 1e12;

LBE_MATH bool IsServed(const Formula& formula) {
  return formula.scale >= kSmallest && formula.scale <= kLargest &&
         (formula.offset == 0 ||
          (formula.offset >= kSmallest && formula.offset <= kLargest)) &&
         (formula.ddof == 0 || formula.ddof == 1);
}

// Mean and sum of squared deviations from it (M2) of some rows of one unit.
template <typename V>
struct Moments {
  V mean;
  V m2;
};

// ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
template <typename V>
LBE_MATH V PairwiseSum(const V x[kLeafRows]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Moments of the first `rows` of eight. REQUIRES: 1 <= rows <= 8, and x[r] = 0
// for r >= rows.
//
// Equal values have a mean of exactly that value and M2 = 0. The sum of eight
// of them is exact; that of three is not, so the mean of a short leaf is taken
// relative to its first row.
//
// Written out rather than as loops: compilers keep an array in registers only
// where its indices are constants from the start.
template <typename Scalar, typename V>
LBE_MATH Moments<V> LeafMoments(const V x[kLeafRows], int rows) {
  if (rows == kLeafRows) {
    const V mean = PairwiseSum(x) * Scalar(1.0 / kLeafRows);
    const V d[kLeafRows] = {x[0] - mean, x[1] - mean, x[2] - mean, x[3] - mean,
                            x[4] - mean, x[5] - mean, x[6] - mean, x[7] - mean};
    const V squares[kLeafRows] = {d[0] * d[0], d[1] * d[1], d[2] * d[2],
                                  d[3] * d[3], d[4] * d[4], d[5] * d[5],
                                  d[6] * d[6], d[7] * d[7]};
    return {mean, PairwiseSum(squares)};
  }
  V relative[kLeafRows] = {}, squares[kLeafRows] = {};
  for (int r = 1; r < rows; ++r) relative[r] = x[r] - x[0];
  const V mean = x[0] + PairwiseSum(relative) / static_cast<Scalar>(rows);
  for (int r = 0; r < rows; ++r) {
    const V difference = x[r] - mean;
    squares[r] = difference * difference;
  }
  return {mean, PairwiseSum(squares)};
}

// The weights with which the moments of `b` rows merge into those of `a` rows.
template <typename Scalar>
struct MergeWeights {
  Scalar mean;
  Scalar m2;
};

template <typename Scalar>
LBE_MATH MergeWeights<Scalar> WeightsOf(int64_t a, int64_t b) {
  // As below, without a division.
  if (a == b) return {Scalar(0.5), Scalar(0.5) * static_cast<Scalar>(a)};
  const double share = static_cast<double>(b) / static_cast<double>(a + b);
  return {static_cast<Scalar>(share),
          static_cast<Scalar>(share * static_cast<double>(a))};
}

template <typename Scalar, typename V>
LBE_MATH Moments<V> Merge(const Moments<V>& a, const Moments<V>& b,
                          const MergeWeights<Scalar>& weights) {
  const V difference = b.mean - a.mean;
  return {a.mean + difference * weights.mean,
          (a.m2 + b.m2) + difference * difference * weights.m2};
}

// The tree: T(n) = Merge(T(p), T(n - p)), p the largest power of two below n,
// over n leaves. It depends on the number of rows alone, so that the result
// does not depend on who computes which part. Returns p. REQUIRES: leaves >= 2.
LBE_MATH int64_t LeftLeaves(int64_t leaves) {
  int64_t p = 1;
  while (2 * p < leaves) p *= 2;
  return p;
}

// The rows that a count, a number of the results' type, stands for: 0 where it
// is none. A float holds counts up to 2^24 exactly.
template <typename Scalar>
LBE_MATH int64_t RowsOfCount(Scalar count) {
  return count >= Scalar(1) ? static_cast<int64_t>(count) : 0;
}

// The unsigned integers, scalar or vector, with as many bits as V, and their
// conversion to V as signed ones. Callers specialize it for their vectors.
template <typename V>
struct Integers;
template <>
struct Integers<float> {
  using type = uint32_t;
  LBE_MATH float Convert(type k) {
    return static_cast<float>(static_cast<int32_t>(k));
  }
};
template <>
struct Integers<double> {
  using type = uint64_t;
  LBE_MATH double Convert(type k) {
    return static_cast<double>(static_cast<int64_t>(k));
  }
};

template <typename To, typename From>
LBE_MATH To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// What the logarithm needs to know of IEEE 754 binary32 and binary64.
template <typename Scalar>
struct Ieee;
template <>
struct Ieee<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr uint32_t kOne = 0x3f800000;
  static constexpr uint32_t kSqrtHalf = 0x3f3504f3;
  static constexpr int kTerms = 5;  // z^5 / 11 < 3e-9
};
template <>
struct Ieee<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr uint64_t kOne = 0x3ff0000000000000;
  static constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr int kTerms = 10;  // z^10 / 21 < 3e-17
};

// ln(u) + correction for a normal, positive, finite u: u = 2^k m with m in
// [sqrt(1/2), sqrt(2)), ln m = 2 artanh(s), s = (m - 1) / (m + 1), by the
// series of artanh in z = s^2 <= 0.0295. A few units in the last place.
template <typename Scalar, typename V>
LBE_MATH V LogPlus(const V& u, const V& correction) {
  using F = Ieee<Scalar>;
  using Bits = typename Integers<V>::type;
  constexpr auto kMask =
      (static_cast<decltype(F::kOne)>(1) << F::kMantissaBits) - 1;
  const Bits bits = BitCast<Bits>(u) + (F::kOne - F::kSqrtHalf);
  const V k = Integers<V>::Convert((bits >> F::kMantissaBits) -
                                   (F::kOne >> F::kMantissaBits));
  const V f = BitCast<V>((bits & kMask) + F::kSqrtHalf) - Scalar(1);
  const V s = f / (f + Scalar(2));
  const V z = s * s;
  V series = V{} + Scalar(1.0 / (2 * F::kTerms - 1));
  for (int term = F::kTerms - 2; term > 0; --term) {
    series = series * z + Scalar(1.0 / (2 * term + 1));
  }
  const V twice = s + s;
  // ln 2 in two parts, the first with zeros at its end, so that k times it is
  // exact.
  constexpr Scalar kLn2High = Scalar(0.693145751953125);
  constexpr Scalar kLn2Low = Scalar(1.42860682030941723212e-6);
  return k * kLn2High +
         (twice + (twice * z * series + (k * kLn2Low + correction)));
}

// v = M2 / (N - ddof). REQUIRES: rows > ddof.
template <typename Scalar, typename V>
LBE_MATH V Variance(const V& m2, int64_t rows, const Formula& formula) {
  return m2 / static_cast<Scalar>(rows - formula.ddof);
}

// The constants of the entropy in the type of the results. The logarithm is the
// C library's, the only function here that is: glibc's with and without fused
// multiply-adds differ in a double's last bit, for one offset in 170,000.
template <typename Scalar>
struct EntropyFactors {
  Scalar variance;    // scale / offset, or scale where offset is 0
  Scalar log_offset;  // ln offset
  bool has_offset;
};

template <typename Scalar>
LBE_MATH EntropyFactors<Scalar> EntropyFactorsOf(const Formula& formula) {
  if (formula.offset > 0) {
    return {static_cast<Scalar>(formula.scale / formula.offset),
            static_cast<Scalar>(log(formula.offset)), true};
  }
  return {static_cast<Scalar>(formula.scale), Scalar(0), false};
}

// 1/2 ln(scale * v + offset), in nats; -Inf where that is 0. NaN and +Inf stay.
// REQUIRES: v >= 0 or NaN.
template <typename Scalar, typename V>
LBE_MATH V UnitEntropy(const V& variance,
                       const EntropyFactors<Scalar>& factors) {
  constexpr Scalar kInfinity = static_cast<Scalar>(__builtin_huge_val());
  const V t = variance * factors.variance;
  if (factors.has_offset) {
    // ln offset + log1p(t) keeps small variances, which log(offset + tiny)
    // loses.
    const V u = t + Scalar(1);
    const V lost = t - (u - Scalar(1));  // what rounding took from u
    const V log1p = LogPlus<Scalar>(u, V(lost / u));
    return (V(t < kInfinity ? log1p : t) + factors.log_offset) * Scalar(0.5);
  }
  const V log_t = LogPlus<Scalar>(t, V{});
  const V defined = t > Scalar(0) ? log_t : V{} - kInfinity;
  // NaN > 0 and NaN < Inf are false: NaN comes from t itself.
  return V(t < kInfinity ? defined : t) * Scalar(0.5);
}

// The sum of the entropies of all units: those of each kGroupUnits units by
// halves (v[i] += v[i + 32], v[i] += v[i + 16], ...), a missing one as 0; then
// every kSumLanes-th group's sum one after the other, and those sums by halves.
constexpr int kGroupUnits = 64;
constexpr int kSumLanes = 256;

template <int kWidth>
LBE_MATH double SumHalves(double values[kWidth]) {
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

// The gradient of g * H and of g_mean * mean and g_variance * variance is
//   dx_nu = share * (reciprocal_u * (x_nu - mean_u))
//           + slope_u * (x_nu - mean_u) + offset_u:
//   share        = g * scale / (U (N - ddof))
//   reciprocal_u = 1 / (scale * v_u + offset)
//   slope_u      = 2 * g_variance_u / (N - ddof)
//   offset_u     = g_mean_u / N
// The share and the reciprocal are not multiplied with each other first: for
// activations of 1e18 their product is too small for a float, and dx is not.
template <typename Scalar>
struct GradientFactors {
  double entropy;   // scale / (U (N - ddof))
  Scalar variance;  // 2 / (N - ddof)
  Scalar mean;      // 1 / N
  Scalar scale;
  Scalar offset;
};

// REQUIRES: rows > ddof.
template <typename Scalar>
LBE_MATH GradientFactors<Scalar> GradientFactorsOf(int64_t rows, int64_t units,
                                                   const Formula& formula) {
  const double freedom = static_cast<double>(rows - formula.ddof);
  return {formula.scale / (static_cast<double>(units) * freedom),
          static_cast<Scalar>(2 / freedom),
          static_cast<Scalar>(1 / static_cast<double>(rows)),
          static_cast<Scalar>(formula.scale),
          static_cast<Scalar>(formula.offset)};
}

// The same of a batch of which x is a shard: `count` says how many rows it has.
// Fewer than two have no entropy: then the share, the reciprocal of any finite
// variance, the slope and the offset are all 0.
template <typename Scalar>
LBE_MATH GradientFactors<Scalar> GradientFactorsOfCount(
    Scalar count, int64_t units, const Formula& formula) {
  const int64_t rows = RowsOfCount(count);
  if (rows >= 2) return GradientFactorsOf<Scalar>(rows, units, formula);
  return {0, 0, 0, 0, static_cast<Scalar>(__builtin_huge_val())};
}

template <typename Scalar>
LBE_MATH Scalar EntropyShare(Scalar entropy_grad,
                             const GradientFactors<Scalar>& factors) {
  if (factors.entropy == 0) return 0;  // whatever entropy_grad is
  return static_cast<Scalar>(static_cast<double>(entropy_grad) *
                             factors.entropy);
}

template <typename Scalar, typename V>
LBE_MATH V Reciprocal(const V& variance,
                      const GradientFactors<Scalar>& factors) {
  return Scalar(1) / (variance * factors.scale + factors.offset);
}

template <typename Scalar, typename V>
LBE_MATH V VarianceSlope(const V& variance_grad,
                         const GradientFactors<Scalar>& factors) {
  return variance_grad * factors.variance;
}

template <typename Scalar, typename V>
LBE_MATH V MeanOffset(const V& mean_grad,
                      const GradientFactors<Scalar>& factors) {
  return mean_grad * factors.mean;
}

// dx of the entropy alone, and of the entropy, mean and variance.
template <typename Scalar, typename V>
LBE_MATH V UnitGradient(const V& x, const V& mean, const V& reciprocal,
                        Scalar share) {
  return (x - mean) * reciprocal * share;
}

template <typename Scalar, typename V>
LBE_MATH V UnitGradient(const V& x, const V& mean, const V& reciprocal,
                        Scalar share, const V& slope, const V& offset) {
  const V difference = x - mean;
  return (difference * reciprocal * share + difference * slope) + offset;
}

}  // namespace lbe

#endif  // LBE_OPS_CC_BATCH_ENTROPY_H_
