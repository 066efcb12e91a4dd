// SPDX-License-Identifier: Apache-2.0
//
// The CPU kernels without TensorFlow and Python, for sanitizers (make sanitize)
// and for another processor (make test-aarch64).
//
// Every buffer has exactly the size that the kernels are promised, so that a
// step outside is seen; values are compared with sums in double, and results of
// several threads with those of one, bit for bit.
//
// With the argument `digests` it prints those of the results' bits instead, to
// be compared with what another instruction set or processor prints.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

namespace lbe {
namespace {

int failures = 0;

void Check(bool ok, const char* what, DType dtype, int64_t rows, int64_t units,
           int threads) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s; dtype %d, x [%lld, %lld], %d threads\n",
               what, static_cast<int>(dtype), static_cast<long long>(rows),
               static_cast<long long>(units), threads);
}

void RunOnThreads(void*, int workers, void (*body)(void*), void* argument) {
  std::vector<std::thread> threads;
  for (int t = 1; t < workers; ++t) {
    threads.emplace_back(body, argument);
  }
  body(argument);
  for (std::thread& thread : threads) thread.join();
}

// Memory of exactly `bytes` bytes, aligned to 64.
struct Buffer {
  explicit Buffer(size_t bytes) : size(bytes) {
    if (posix_memalign(&data, 64, std::max<size_t>(bytes, 1)) != 0)
      std::abort();
    std::memset(data, 0xff, bytes);  // NaN in every dtype
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  bool operator==(const Buffer& other) const {
    return size == other.size && std::memcmp(data, other.data, size) == 0;
  }
  void* data = nullptr;
  size_t size;
};

// float to the nearest element and back, written for clarity.
void Put(float value, float* x) { *x = value; }
void Put(float value, double* x) { *x = value; }
void Put(float value, BFloat16* x) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  x->bits = static_cast<uint16_t>(bits >> 16);
}
void Put(float value, Half* x) {
  int exponent;
  const float mantissa = std::frexp(std::fabs(value), &exponent);
  const int bits = static_cast<int>(mantissa * 2048);  // 1024 <= bits < 2048
  x->bits = static_cast<uint16_t>((std::signbit(value) ? 0x8000 : 0) |
                                  ((exponent + 13) << 10 | (bits & 1023)));
}
double Get(const float& x) { return x; }
double Get(const double& x) { return x; }
double Get(const BFloat16& x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
double Get(const Half& x) {
  const int exponent = x.bits >> 10 & 31;
  const int mantissa = x.bits & 1023;
  const double magnitude = exponent == 0
                               ? std::ldexp(mantissa, -24)
                               : std::ldexp(1024 + mantissa, exponent - 25);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

constexpr struct {
  Activation value;
  const char* name;
} kActivations[] = {
#define LBE_ACTIVATION(name, keras_name) {Activation::name, keras_name},
    LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
};

template <typename Element, typename Result>
void Test(DType dtype, int64_t rows, int64_t units, double grad_tolerance) {
  const Formula formula = {8.5, 0.75, 1};
  const Problem problem = {dtype, rows, units, formula};
  const double tolerance = sizeof(Result) == 8 ? 1e-12 : 1e-5;
  // One element off alignment: no result may need more than an element's.
  Buffer storage((rows * units + 1) * sizeof(Element));
  Element* values = static_cast<Element*>(storage.data) + 1;
  const size_t bytes = rows * units * sizeof(Element);
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(0.5f, 4.f);
  for (int64_t i = 0; i < rows * units; ++i) Put(uniform(random), values + i);
  Buffer mean_grad(units * sizeof(Result)),
      variance_grad(units * sizeof(Result));
  for (int64_t u = 0; u < units; ++u) {
    static_cast<Result*>(mean_grad.data)[u] = static_cast<Result>(u % 3);
    static_cast<Result*>(variance_grad.data)[u] = static_cast<Result>(u % 5);
  }
  const Result entropy_grad = 1000;

  Buffer first_mean(units * sizeof(Result)),
      first_variance(units * sizeof(Result));
  Buffer first_entropy(sizeof(Result)), first_dx(bytes);
  for (int threads : {1, 2, 7}) {
    const Parallel parallel = {threads, nullptr, RunOnThreads};
    Buffer mean(units * sizeof(Result)), variance(units * sizeof(Result));
    Buffer entropy(sizeof(Result)), dx(bytes), in_place(bytes);
    Buffer workspace(ForwardCpuWorkspace(problem, threads));
    ForwardArguments forward;
    forward.x = values;
    forward.workspace = workspace.data;
    forward.entropy = entropy.data;
    forward.mean = mean.data;
    forward.variance = variance.data;
    ForwardCpu(parallel, problem, forward);
    GradientArguments gradient;
    gradient.x = values;
    gradient.mean = mean.data;
    gradient.variance = variance.data;
    gradient.entropy_grad = &entropy_grad;
    gradient.mean_grad = mean_grad.data;
    gradient.variance_grad = variance_grad.data;
    gradient.dx = dx.data;
    GradientCpu(parallel, problem, gradient);
    std::memcpy(in_place.data, values, bytes);
    gradient.x = gradient.dx = in_place.data;
    GradientCpu(parallel, problem, gradient);
    Check(in_place == dx, "gradient in place", dtype, rows, units, threads);
    // Without gradients of the statistics, as training calls it: the same as
    // with zeros.
    Buffer zeros(units * sizeof(Result)), with_zeros(bytes), without(bytes);
    std::memset(zeros.data, 0, zeros.size);
    gradient.x = values;
    gradient.mean_grad = gradient.variance_grad = zeros.data;
    gradient.dx = with_zeros.data;
    GradientCpu(parallel, problem, gradient);
    gradient.mean_grad = gradient.variance_grad = nullptr;
    gradient.dx = without.data;
    GradientCpu(parallel, problem, gradient);
    Check(without == with_zeros, "gradient of the entropy alone", dtype, rows,
          units, threads);
    if (threads == 1) {
      std::memcpy(first_mean.data, mean.data, mean.size);
      std::memcpy(first_variance.data, variance.data, variance.size);
      std::memcpy(first_entropy.data, entropy.data, entropy.size);
      std::memcpy(first_dx.data, dx.data, dx.size);
    } else {
      Check(mean == first_mean && variance == first_variance &&
                entropy == first_entropy && dx == first_dx,
            "same bits", dtype, rows, units, threads);
      continue;
    }
    double entropy_sum = 0;
    for (int64_t u = 0; u < units; ++u) {
      double sum = 0, squares = 0;
      for (int64_t n = 0; n < rows; ++n) sum += Get(values[n * units + u]);
      const double m = sum / static_cast<double>(rows);
      for (int64_t n = 0; n < rows; ++n) {
        squares += std::pow(Get(values[n * units + u]) - m, 2);
      }
      const double v = squares / static_cast<double>(rows - 1);
      const double inner = formula.scale * v + formula.offset;
      entropy_sum += 0.5 * std::log(inner);
      Check(std::fabs(static_cast<Result*>(mean.data)[u] - m) <= tolerance * m,
            "mean", dtype, rows, units, threads);
      Check(std::fabs(static_cast<Result*>(variance.data)[u] - v) <=
                tolerance * (v + 1),
            "variance", dtype, rows, units, threads);
      const double slope =
          1000 * formula.scale /
              (static_cast<double>(units) * static_cast<double>(rows - 1) *
               inner) +
          static_cast<double>(u % 5) * 2 / static_cast<double>(rows - 1);
      for (int64_t n = 0; n < rows; ++n) {
        const double expected =
            static_cast<double>(u % 3) / static_cast<double>(rows) +
            slope * (Get(values[n * units + u]) - m);
        const double actual =
            Get(static_cast<Element*>(dx.data)[n * units + u]);
        Check(std::fabs(actual - expected) <=
                  grad_tolerance * (std::fabs(expected) + slope) + 1e-7,
              "gradient", dtype, rows, units, threads);
      }
    }
    entropy_sum /= static_cast<double>(units);
    Check(std::fabs(*static_cast<Result*>(entropy.data) - entropy_sum) <=
              tolerance * (std::fabs(entropy_sum) + 1),
          "entropy", dtype, rows, units, threads);
  }
}

// A shard's moments are the ones that its variance is made of, also of one row;
// merged over two replicas beside one without a row, and differentiated with
// the count of the whole batch, they are the whole batch's: here to rounding,
// since test_synchronized_ops.py compares bits.
template <typename Element, typename Result>
void TestShards(DType dtype, int64_t rows, int64_t units, int64_t first_rows,
                double grad_tolerance) {
  const Formula formula = {8.5, 0.75, 1};
  const Problem whole = {dtype, rows, units, formula};
  const double tolerance = sizeof(Result) == 8 ? 1e-12 : 1e-5;
  const size_t row_bytes = units * sizeof(Element);
  Buffer x(rows * row_bytes);
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(0.5f, 4.f);
  for (int64_t i = 0; i < rows * units; ++i) {
    Put(uniform(random), static_cast<Element*>(x.data) + i);
  }
  const Result entropy_grad = 1000;
  Buffer mean(units * sizeof(Result)), variance(units * sizeof(Result));
  Buffer entropy(sizeof(Result)), dx(rows * row_bytes);
  const MergeProblem problem = {dtype, 3, 1, units, formula};
  Buffer gathered(problem.replicas * PitchOf(problem) * sizeof(Result));
  const auto replica = [&](int64_t r) {
    return static_cast<Result*>(gathered.data) + r * PitchOf(problem);
  };
  replica(1)[0] = 0;  // and NaNs, which nobody may use
  for (int threads : {1, 7}) {
    const Parallel parallel = {threads, nullptr, RunOnThreads};
    Buffer workspace(ForwardCpuWorkspace(whole, threads));
    ForwardArguments forward;
    forward.x = x.data;
    forward.workspace = workspace.data;
    forward.entropy = entropy.data;
    forward.mean = mean.data;
    forward.variance = variance.data;
    ForwardCpu(parallel, whole, forward);
    for (int64_t r : {0, 2}) {
      const int64_t begin = r == 0 ? 0 : first_rows;
      const Problem shard = {dtype, r == 0 ? first_rows : rows - first_rows,
                             units, formula};
      Buffer shard_mean(units * sizeof(Result)), m2(units * sizeof(Result)),
          count(sizeof(Result));
      Buffer of_shard(ForwardCpuWorkspace(shard, threads));
      ForwardArguments moments;
      moments.x = static_cast<Element*>(x.data) + begin * units;
      moments.workspace = of_shard.data;
      moments.mean = shard_mean.data;
      moments.m2 = m2.data;
      moments.count = count.data;
      ForwardCpu(parallel, shard, moments);
      Result* const row = replica(r);
      std::memcpy(row, count.data, count.size);
      std::memcpy(row + 1, shard_mean.data, shard_mean.size);
      std::memcpy(row + 1 + units, m2.data, m2.size);
      Check(row[0] == static_cast<Result>(shard.rows), "count of a shard",
            dtype, rows, units, threads);
      if (shard.rows > 1) {
        // A variance is m2 divided, with the same rounding.
        Buffer of_variance(units * sizeof(Result));
        moments.m2 = moments.count = nullptr;
        moments.entropy = count.data;
        moments.variance = of_variance.data;
        ForwardCpu(parallel, shard, moments);
        for (int64_t u = 0; u < units; ++u) {
          static_cast<Result*>(m2.data)[u] /=
              static_cast<Result>(shard.rows - formula.ddof);
        }
        Check(m2 == of_variance, "m2 of a shard", dtype, rows, units, threads);
      } else {
        for (int64_t u = 0; u < units; ++u) {
          Check(row[1 + u] == static_cast<Result>(Get(
                                  static_cast<const Element*>(moments.x)[u])) &&
                    row[1 + units + u] == 0,
                "moments of a row", dtype, rows, units, threads);
        }
      }
    }
    Buffer merged_mean(units * sizeof(Result)),
        merged_variance(units * sizeof(Result)), count(sizeof(Result)),
        merged_entropy(sizeof(Result)), valid(sizeof(Result));
    const int64_t end = units;
    const MergeArguments merge = {gathered.data,    &end,
                                  merged_mean.data, merged_variance.data,
                                  count.data,       merged_entropy.data,
                                  valid.data};
    MergeMomentsCpu(parallel, problem, merge);
    const auto near = [&](const Buffer& a, const Buffer& b, double size) {
      const auto *p = static_cast<const Result*>(a.data),
                 *q = static_cast<const Result*>(b.data);
      bool near = true;
      for (size_t i = 0; i < a.size / sizeof(Result); ++i) {
        near = near && std::fabs(p[i] - q[i]) <= tolerance * size;
      }
      return near;
    };
    Check(near(merged_mean, mean, 4) && near(merged_variance, variance, 4) &&
              near(merged_entropy, entropy, 4) &&
              *static_cast<Result*>(count.data) == static_cast<Result>(rows) &&
              *static_cast<Result*>(valid.data) == 1,
          "merged statistics", dtype, rows, units, threads);
    GradientArguments gradient;
    gradient.x = x.data;
    gradient.mean = mean.data;
    gradient.variance = variance.data;
    gradient.entropy_grad = &entropy_grad;
    gradient.dx = dx.data;
    GradientCpu(parallel, whole, gradient);
    for (int64_t begin : {int64_t{0}, first_rows}) {
      const int64_t shard_rows = begin == 0 ? first_rows : rows - first_rows;
      Buffer dx_of_shard(shard_rows * row_bytes);
      gradient.x = static_cast<Element*>(x.data) + begin * units;
      gradient.dx = dx_of_shard.data;
      gradient.mean = merged_mean.data;
      gradient.variance = merged_variance.data;
      gradient.count = count.data;
      GradientCpu(parallel, {dtype, shard_rows, units, formula}, gradient);
      for (int64_t i = 0; i < shard_rows * units; ++i) {
        const double found = Get(static_cast<Element*>(dx_of_shard.data)[i]);
        const double expected =
            Get(static_cast<Element*>(dx.data)[begin * units + i]);
        Check(std::fabs(found - expected) <=
                  grad_tolerance * (std::fabs(expected) + 1e-1) + 1e-7,
              "gradient of a shard", dtype, rows, units, threads);
      }
    }
    // Without an entropy dx is 0, whatever there is.
    const Result one = 1;
    gradient.count = &one;
    gradient.mean = gradient.variance = replica(1) + 1;  // NaNs
    gradient.x = x.data;
    gradient.dx = dx.data;
    GradientCpu(parallel, whole, gradient);
    Buffer zeros(dx.size);
    std::memset(zeros.data, 0, zeros.size);
    Check(dx == zeros, "gradient without an entropy", dtype, rows, units,
          threads);
  }
}

// The epilogue: y of every activation, statistics of y, and a gradient that
// adds up. Again in buffers of exactly the promised sizes.
template <typename Element, typename Result>
void TestEpilogue(DType dtype, int64_t rows, int64_t units, int64_t channels,
                  double tolerance) {
  const Problem problem = {dtype, rows, units, {8.5, 0.75, 1}};
  const size_t bytes = rows * units * sizeof(Element);
  Buffer z(bytes), dy(bytes), bias(channels * sizeof(Element));
  std::mt19937 random(2);
  std::uniform_real_distribution<float> uniform(0.5f, 2.f);
  // Values on either side of 0, none near it.
  for (int64_t i = 0; i < rows * units; ++i) {
    const float sign = random() % 2 == 0 ? 1.f : -1.f;
    Put(sign * uniform(random), static_cast<Element*>(z.data) + i);
    Put(uniform(random), static_cast<Element*>(dy.data) + i);
  }
  for (int64_t c = 0; c < channels; ++c) {
    Put(0.125f, static_cast<Element*>(bias.data) + c);
  }
  const Result entropy_grad = 30;
  for (const auto& activation : kActivations) {
    for (int threads : {1, 5}) {
      const Parallel parallel = {threads, nullptr, RunOnThreads};
      Epilogue epilogue;
      epilogue.activation = activation.value;
      epilogue.slope = 0.5;
      epilogue.bias = bias.data;
      epilogue.channels = channels;
      Buffer y(bytes), dz(bytes), dbias(channels * sizeof(Element));
      Buffer mean(units * sizeof(Result)), variance(units * sizeof(Result));
      Buffer entropy(sizeof(Result)), same_mean(units * sizeof(Result)),
          same_variance(units * sizeof(Result)), same_entropy(sizeof(Result));
      Buffer workspace(ForwardCpuWorkspace(problem, threads));
      ForwardArguments forward;
      forward.x = z.data;
      forward.epilogue = &epilogue;
      forward.y = y.data;
      forward.workspace = workspace.data;
      forward.entropy = entropy.data;
      forward.mean = mean.data;
      forward.variance = variance.data;
      ForwardCpu(parallel, problem, forward);
      ForwardArguments same = forward;
      same.x = y.data;
      same.epilogue = nullptr;
      same.entropy = same_entropy.data;
      same.mean = same_mean.data;
      same.variance = same_variance.data;
      ForwardCpu(parallel, problem, same);
      Check(mean == same_mean && variance == same_variance &&
                entropy == same_entropy,
            (std::string("statistics of y, ") + activation.name).c_str(), dtype,
            rows, units, threads);
      Buffer in_place(bytes);
      std::memcpy(in_place.data, z.data, bytes);
      forward.x = forward.y = in_place.data;
      ForwardCpu(parallel, problem, forward);
      Check(in_place == y,
            (std::string("epilogue in place, ") + activation.name).c_str(),
            dtype, rows, units, threads);
      Buffer sums(GradientCpuWorkspace(problem, channels));
      GradientArguments gradient;
      gradient.x = y.data;
      gradient.mean = mean.data;
      gradient.variance = variance.data;
      gradient.entropy_grad = &entropy_grad;
      gradient.epilogue = &epilogue;
      gradient.dy = dy.data;
      gradient.workspace = sums.data;
      gradient.dx = dz.data;
      gradient.dbias = dbias.data;
      GradientCpu(parallel, problem, gradient);
      Buffer without_bias(bytes);
      gradient.dx = without_bias.data;
      gradient.dbias = gradient.workspace = nullptr;
      GradientCpu(parallel, problem, gradient);
      Check(without_bias == dz,
            (std::string("epilogue's gradient without a bias, ") +
             activation.name)
                .c_str(),
            dtype, rows, units, threads);
      std::memcpy(in_place.data, dy.data, bytes);
      gradient.dy = gradient.dx = in_place.data;
      gradient.workspace = sums.data;
      gradient.dbias = dbias.data;
      GradientCpu(parallel, problem, gradient);
      Check(in_place == dz,
            (std::string("epilogue's gradient in place, ") + activation.name)
                .c_str(),
            dtype, rows, units, threads);
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0, size = 0;
        for (int64_t i = c; i < rows * units; i += channels) {
          const double value = Get(static_cast<Element*>(dz.data)[i]);
          sum += value;
          size += std::fabs(value);
        }
        Check(std::fabs(Get(static_cast<Element*>(dbias.data)[c]) - sum) <=
                  tolerance * (size + 1),
              (std::string("gradient of the bias, ") + activation.name).c_str(),
              dtype, rows, units, threads);
      }
    }
  }
}

// Units that do not vary have a variance of exactly 0 and a mean of exactly
// their value, whatever the number of rows.
template <typename Element, typename Result>
void TestConstant(DType dtype, int64_t rows) {
  const int64_t units = 21;
  Buffer x(rows * units * sizeof(Element)), mean(units * sizeof(Result)),
      variance(units * sizeof(Result)), entropy(sizeof(Result));
  for (int64_t i = 0; i < rows * units; ++i) {
    Put(7.1310568f * static_cast<float>(1 + i % units),
        static_cast<Element*>(x.data) + i);
  }
  const Problem problem = {dtype, rows, units, {80, 1.3e-3, 1}};
  Buffer workspace(ForwardCpuWorkspace(problem, 1));
  ForwardArguments forward;
  forward.x = x.data;
  forward.workspace = workspace.data;
  forward.entropy = entropy.data;
  forward.mean = mean.data;
  forward.variance = variance.data;
  ForwardCpu({1, nullptr, RunOnThreads}, problem, forward);
  for (int64_t u = 0; u < units; ++u) {
    Check(static_cast<Result*>(variance.data)[u] == 0 &&
              static_cast<Result*>(mean.data)[u] ==
                  static_cast<Result>(Get(static_cast<Element*>(x.data)[u])),
          "a unit that does not vary", dtype, rows, units, 1);
  }
}

// How the bits of a number are laid out.
template <typename Integer, int kMantissaBits>
struct Layout {
  using Bits = Integer;
  static constexpr int kMantissa = kMantissaBits;
  static constexpr Bits kSign = Bits(Bits{1} << (8 * sizeof(Bits) - 1));
  static constexpr Bits kInfinity = Bits((kSign - 1) >> kMantissa << kMantissa);
  static constexpr int kMostExponent = kInfinity >> kMantissa;
  static constexpr int kOne = kMostExponent / 2;  // the exponent of 1
};
template <typename T>
struct Format;
template <>
struct Format<Half> : Layout<uint16_t, 10> {};
template <>
struct Format<BFloat16> : Layout<uint16_t, 7> {};
template <>
struct Format<float> : Layout<uint32_t, 23> {};
template <>
struct Format<double> : Layout<uint64_t, 52> {};

// Which numbers are drawn: exponents [least, most] as they stand in the bits,
// and one number in so many is infinite.
struct Range {
  int least;
  int most;
  int infinite = 0;
};

// Made of integers, since arithmetic is what is under test.
template <typename T>
void Draw(std::mt19937_64& random, const Range& range, Buffer& numbers) {
  using F = Format<T>;
  for (size_t i = 0; i < numbers.size / sizeof(T); ++i) {
    const uint64_t drawn = random();
    const uint64_t exponent =
        range.least + (drawn >> 52 & 0x7ff) % (range.most - range.least + 1);
    uint64_t bits = exponent << F::kMantissa |
                    (drawn & ((uint64_t{1} << F::kMantissa) - 1));
    if (range.infinite > 0 && random() % range.infinite == 0) {
      bits = F::kInfinity;
    }
    if (drawn >> 63 != 0) bits |= F::kSign;
    const auto number = static_cast<typename F::Bits>(bits);
    std::memcpy(static_cast<T*>(numbers.data) + i, &number, sizeof(number));
  }
}

// FNV-1a of all bits. A NaN is a NaN: its sign and payload are the processor's.
class Digest {
 public:
  template <typename T>
  Digest& Add(const Buffer& numbers) {
    using F = Format<T>;
    for (size_t i = 0; i < numbers.size / sizeof(T); ++i) {
      typename F::Bits bits;
      std::memcpy(&bits, static_cast<const T*>(numbers.data) + i, sizeof(bits));
      if ((bits & (F::kSign - 1)) > F::kInfinity) bits = F::kInfinity + 1;
      for (size_t byte = 0; byte < sizeof(bits); ++byte) {
        value_ ^= bits >> (8 * byte) & 0xff;
        value_ *= 0x100000001b3;
      }
    }
    return *this;
  }
  unsigned long long value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325;
};

// Prints a line for each kernel, each formula and each activation.
template <typename Element, typename Result>
void PrintDigests(const char* dtype_name, DType dtype, int64_t rows,
                  int64_t units, int64_t channels) {
  using F = Format<Element>;
  const struct {
    const char* name;
    Range exponents;
  } ranges[] = {{"near 1", {F::kOne - 3, F::kOne + 2}},
                {"near 0", {0, 7}},  // 0 is that of subnormal numbers
                {"any", {0, F::kMostExponent - 1}},
                {"infinite", {F::kOne - 3, F::kOne + 2, 50}}};
  const Parallel parallel = {2, nullptr, RunOnThreads};
  const Problem problem = {dtype, rows, units, {8.5, 0.75, 1}};
  const size_t bytes = rows * units * sizeof(Element);
  const size_t result_bytes = units * sizeof(Result);
  for (const auto& range : ranges) {
    const auto print = [&](const std::string& kernel, const Digest& digest) {
      std::printf("%016llx %s [%lld, %lld] %s: %s\n", digest.value(),
                  dtype_name, static_cast<long long>(rows),
                  static_cast<long long>(units), range.name, kernel.c_str());
    };
    std::mt19937_64 random(4);
    Buffer x(bytes), dy(bytes), bias(channels * sizeof(Element));
    for (Buffer* buffer : {&x, &dy, &bias}) {
      Draw<Element>(random, range.exponents, *buffer);
    }
    const auto run = [&](const Problem& of, ForwardArguments forward) {
      Buffer workspace(ForwardCpuWorkspace(of, parallel.threads));
      forward.workspace = workspace.data;
      ForwardCpu(parallel, of, forward);
    };
    Buffer entropy(sizeof(Result)), mean(result_bytes), variance(result_bytes);
    const auto add_statistics = [&](Digest digest) {
      return digest.Add<Result>(entropy)
          .template Add<Result>(mean)
          .template Add<Result>(variance);
    };
    ForwardArguments forward;
    forward.x = x.data;
    forward.entropy = entropy.data;
    forward.mean = mean.data;
    forward.variance = variance.data;
    run(problem, forward);
    print("forward", add_statistics({}));
    run({dtype, rows, units, {8.5, 0, 0}}, forward);
    print("forward without an offset", add_statistics({}));

    const MergeProblem shards = {dtype, 3, 1, units, problem.formula};
    Buffer gathered(shards.replicas * PitchOf(shards) * sizeof(Result));
    for (int64_t r = 0; r < shards.replicas; ++r) {
      const int64_t begin = r * rows / shards.replicas;
      const int64_t end = (r + 1) * rows / shards.replicas;
      Result* const to =
          static_cast<Result*>(gathered.data) + r * PitchOf(shards);
      ForwardArguments moments;
      moments.x = static_cast<Element*>(x.data) + begin * units;
      moments.count = to;
      moments.mean = to + 1;
      moments.m2 = to + 1 + units;
      run({dtype, end - begin, units, problem.formula}, moments);
    }
    print("moments", Digest().Add<Result>(gathered));
    Buffer count(sizeof(Result)), valid(sizeof(Result));
    MergeMomentsCpu(parallel, shards,
                    {gathered.data, &units, mean.data, variance.data,
                     count.data, entropy.data, valid.data});
    print("merge", add_statistics({}));

    // Of given statistics: those of x may be NaN, and then all of dx is.
    Buffer given_mean(result_bytes), given_variance(result_bytes);
    Buffer mean_grad(result_bytes), variance_grad(result_bytes);
    for (Buffer* buffer :
         {&given_mean, &given_variance, &mean_grad, &variance_grad}) {
      const int one = Format<Result>::kOne;
      Draw<Result>(random, {one - 3, one + 2}, *buffer);
    }
    for (int64_t u = 0; u < units; ++u) {
      Result& v = static_cast<Result*>(given_variance.data)[u];
      v = std::fabs(v);
    }
    const Result entropy_grad = 1000;
    Buffer dx(bytes);
    GradientArguments gradient;
    gradient.x = x.data;
    gradient.mean = given_mean.data;
    gradient.variance = given_variance.data;
    gradient.entropy_grad = &entropy_grad;
    gradient.dx = dx.data;
    GradientCpu(parallel, problem, gradient);
    print("gradient", Digest().Add<Element>(dx));
    gradient.mean_grad = mean_grad.data;
    gradient.variance_grad = variance_grad.data;
    GradientCpu(parallel, problem, gradient);
    print("gradient of all statistics", Digest().Add<Element>(dx));
    gradient.mean_grad = gradient.variance_grad = nullptr;

    Epilogue epilogue;
    epilogue.slope = 0.3;
    epilogue.bias = bias.data;
    epilogue.channels = channels;
    Buffer y(bytes), dbias(channels * sizeof(Element));
    Buffer workspace(GradientCpuWorkspace(problem, channels));
    forward.epilogue = gradient.epilogue = &epilogue;
    forward.y = y.data;
    gradient.x = y.data;
    gradient.dy = dy.data;
    gradient.workspace = workspace.data;
    gradient.dbias = dbias.data;
    for (const auto& activation : kActivations) {
      epilogue.activation = activation.value;
      run(problem, forward);
      print(std::string("epilogue, ") + activation.name,
            add_statistics(Digest().Add<Element>(y)));
      GradientCpu(parallel, problem, gradient);
      print(std::string("epilogue's gradient, ") + activation.name,
            Digest().Add<Element>(dx).template Add<Element>(dbias));
    }
  }
}

void PrintAllDigests() {
  for (const auto& shape : {std::array<int64_t, 3>{3, 17, 17},
                            {9, 65, 5},
                            {70, 5, 5},
                            {31, 130, 26},
                            {130, 700, 700},
                            {8200, 20, 4},
                            {20, 4500, 2250}}) {
    const auto [rows, units, channels] = shape;
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  PrintDigests<element, result>(numpy_name, DType::name, rows, units, channels);
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
}

int Main() {
  for (int64_t rows = 2; rows <= 70; ++rows) {
    TestConstant<Half, float>(DType::kFloat16, rows);
    TestConstant<BFloat16, float>(DType::kBFloat16, rows);
    TestConstant<float, float>(DType::kFloat32, rows);
    TestConstant<double, double>(DType::kFloat64, rows);
  }
  const int64_t shapes[][2] = {
      {2, 1},     {3, 17},      {8, 16},     {9, 65},    {31, 130},
      {512, 128}, {300, 1000},  {1100, 300}, {8200, 20}, {60000, 9},
      {64, 4500}, {2100, 4352}, {70, 5},     {67, 200},  {17, 9000}};
  for (const auto& shape : shapes) {
    Test<Half, float>(DType::kFloat16, shape[0], shape[1], 2e-3);
    Test<BFloat16, float>(DType::kBFloat16, shape[0], shape[1], 1e-2);
    Test<float, float>(DType::kFloat32, shape[0], shape[1], 1e-4);
    Test<double, double>(DType::kFloat64, shape[0], shape[1], 1e-10);
  }
  for (const auto& shape : {std::array<int64_t, 3>{65, 33, 33},
                            {130, 60, 5},
                            {40, 3, 3},
                            {700, 1100, 1100},
                            {90, 8300, 4150}}) {
    const auto [rows, units, channels] = shape;
    TestEpilogue<Half, float>(DType::kFloat16, rows, units, channels, 1e-3);
    TestEpilogue<BFloat16, float>(DType::kBFloat16, rows, units, channels,
                                  8e-3);
    TestEpilogue<float, float>(DType::kFloat32, rows, units, channels, 1e-5);
    TestEpilogue<double, double>(DType::kFloat64, rows, units, channels, 1e-13);
  }
  for (const auto& shape : {std::array<int64_t, 3>{2, 17, 1},
                            {9, 130, 8},
                            {11, 1100, 2},
                            {72, 33, 71},
                            {8260, 70, 8195}}) {
    const auto [rows, units, first_rows] = shape;
    TestShards<Half, float>(DType::kFloat16, rows, units, first_rows, 2e-3);
    TestShards<BFloat16, float>(DType::kBFloat16, rows, units, first_rows,
                                1e-2);
    TestShards<float, float>(DType::kFloat32, rows, units, first_rows, 1e-4);
    TestShards<double, double>(DType::kFloat64, rows, units, first_rows, 1e-10);
  }
  std::printf(
      "kernel_test (%s): %zu shapes, 4 dtypes, 1, 2 and 7 threads: %s\n",
      CpuSimdLevel(), std::size(shapes), failures ? "FAILED" : "passed");
  return failures != 0;
}

}  // namespace
}  // namespace lbe

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "digests") == 0) {
    lbe::PrintAllDigests();
    return 0;
  }
  return lbe::Main();
}
