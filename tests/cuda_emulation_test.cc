// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels, run on the CPU by cuda_emulation.h, compared bit for bit
// with the definition of their results, walked column by column: the tree of
// batch_entropy.h, and the orders of summation there and in activations.h. What
// an epilogue makes is compared with the CPU's kernels, too, bit for bit, and
// with the formula in double; so are the shards of a batch that is spread over
// replicas, and their merge, and with one call for the whole batch.
//
// test_cuda_emulation.py compiles this with and without sanitizers, and with
// faults planted into the kernels, which this must then find. Every buffer has
// exactly the size that the kernels are promised.

#include "cuda_emulation.h"

#include "cpu_loops.h"
#include "kernels.h"
#ifdef LBE_QUICK  // fewer kernels to compile: of the dtypes that are tested
                  // then
namespace lbe {
template <typename Body>
auto WithTestedTypes(DType dtype, const Body& body) {
  return dtype == DType::kFloat16 ? body(Types<Half, float>())
                                  : body(Types<float, float>());
}
}  // namespace lbe
#define WithTypes WithTestedTypes
#endif
#include LBE_CUDA_SOURCE
#include LBE_CUDA_SYSTEM_SOURCE

namespace lbe {

// The CPU kernels are compiled for one instruction set here.
const CpuLoops* CpuLoopsAvx2() { return CpuLoopsBaseline(); }
const CpuLoops* CpuLoopsAvx512() { return CpuLoopsBaseline(); }

namespace {

int failures = 0;
int cases = 0;

// Memory of exactly `count` values, aligned to 16 bytes, full of NaNs at first.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count), data_(new T[count]) {
    std::memset(static_cast<void*>(get()), 0xff, sizeof(T) * count);
  }
  T* get() { return data_.get(); }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t count() const { return count_; }

 private:
  const int64_t count_;
  const std::unique_ptr<T[]> data_;
};

// A NaN is a NaN: GPUs have one, CPUs many.
template <typename T>
bool SameBits(const T& a, const T& b) {
  return (a != a && b != b) || std::memcmp(&a, &b, sizeof(T)) == 0;
}
bool SameBits(Half a, Half b) {
  return SameBits(Convert<Half>::Load(a), Convert<Half>::Load(b));
}
bool SameBits(BFloat16 a, BFloat16 b) {
  return SameBits(Convert<BFloat16>::Load(a), Convert<BFloat16>::Load(b));
}

// The moments of leaves [first, first + leaves) of one column.
template <typename Scalar>
Moments<Scalar> Tree(const std::vector<Scalar>& column, int64_t first,
                     int64_t leaves) {
  const int64_t rows = static_cast<int64_t>(column.size());
  if (leaves == 1) {
    const int64_t row = first * kLeafRows;
    const int count = static_cast<int>(std::min<int64_t>(8, rows - row));
    Scalar values[kLeafRows] = {};
    std::copy_n(&column[row], count, values);
    return LeafMoments<Scalar>(values, count);
  }
  const int64_t left = LeftLeaves(leaves);
  const int64_t middle = first + left;
  const int64_t end = std::min((first + leaves) * kLeafRows, rows);
  return Merge(Tree(column, first, left), Tree(column, middle, leaves - left),
               WeightsOf<Scalar>(left * kLeafRows, end - middle * kLeafRows));
}

struct Case {
  int64_t rows;
  int64_t units;
  int blocks;
  int64_t misaligned;  // by so many elements
  bool hard = false;   // see Test
};

// While it lives, subnormal numbers are zero, as they are in the kernels.
class SubnormalsAreZero {
 public:
  SubnormalsAreZero() : saved_(_mm_getcsr()) {
    _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON | 0x0040);
  }
  ~SubnormalsAreZero() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
};

// The results of a forward pass over x [rows, units], by their definition.
template <typename Scalar>
struct Defined {
  std::vector<Scalar> mean, variance;
  Scalar entropy;

  template <typename Element>
  Defined(const Element* x, const Problem& problem) {
    const SubnormalsAreZero zeros;
    const auto factors = EntropyFactorsOf<Scalar>(problem.formula);
    std::vector<double> groups(CeilDiv(problem.units, kGroupUnits) *
                               kGroupUnits);
    for (int64_t u = 0; u < problem.units; ++u) {
      std::vector<Scalar> column(problem.rows);
      for (int64_t n = 0; n < problem.rows; ++n) {
        column[n] = Convert<Element>::Load(x[n * problem.units + u]);
      }
      const auto moments = Tree(column, 0, CeilDiv(problem.rows, kLeafRows));
      mean.push_back(moments.mean);
      variance.push_back(
          Variance<Scalar>(moments.m2, problem.rows, problem.formula));
      groups[u] = UnitEntropy<Scalar>(variance[u], factors);
    }
    double lanes[kSumLanes] = {};
    for (size_t group = 0; group * kGroupUnits < groups.size(); ++group) {
      lanes[group % kSumLanes] +=
          SumHalves<kGroupUnits>(&groups[group * kGroupUnits]);
    }
    entropy = static_cast<Scalar>(SumHalves<kSumLanes>(lanes) /
                                  static_cast<double>(problem.units));
  }
};

// The kernels of the CPU run on this thread alone, in a workspace of at least
// so many bytes that is aligned to 64.
const Parallel kAlone = {
    1, nullptr,
    [](void*, int, void (*body)(void*), void* argument) { body(argument); }};

class CpuWorkspace {
 public:
  explicit CpuWorkspace(int64_t bytes) : doubles_((bytes + 7) / 8 + 8) {}
  void* get() {
    return reinterpret_cast<void*>(
        (reinterpret_cast<uintptr_t>(doubles_.get()) + 63) / 64 * 64);
  }

 private:
  Buffer<double> doubles_;
};

// Counts a failure, one for each case, and says of what.
class Expect {
 public:
  Expect(DType dtype, const Case& c, const std::string& what)
      : dtype_(dtype), case_(c), of_(what) {
    ++cases;
  }
  void operator()(bool holds, const char* what, int64_t at) {
    if (holds || !ok_) return;
    ok_ = false;
    ++failures;
    std::fprintf(stderr,
                 "FAILED: %s %lld%s; dtype %d, x [%lld, %lld], %d blocks, "
                 "misaligned by %lld elements\n",
                 what, static_cast<long long>(at), of_.c_str(),
                 static_cast<int>(dtype_), static_cast<long long>(case_.rows),
                 static_cast<long long>(case_.units), case_.blocks,
                 static_cast<long long>(case_.misaligned));
  }

 private:
  const DType dtype_;
  const Case case_;
  const std::string of_;
  bool ok_ = true;
};

// What a stream is given to do by `call`.
template <typename Call>
std::vector<emulation::Operation> Operations(const Call& call) {
  auto& operations = emulation::TheMachine().operations;
  operations.clear();
  call();
  return operations;
}

int64_t Doubles(int64_t bytes) { return (bytes + 7) / 8; }

// Runs a forward pass in several orders of its blocks, all of them with one
// workspace, as a CUDA graph does that is launched again. Calls `compare` each
// time.
template <typename Compare>
void ForwardInEachOrder(const Problem& problem, ForwardArguments arguments,
                        int blocks, Expect* expect, const Compare& compare) {
  emulation::Machine& machine = emulation::TheMachine();
  Buffer<double> workspace(Doubles(
      ForwardCudaWorkspace(problem, arguments.epilogue != nullptr, blocks)));
  arguments.workspace = workspace.get();
  using emulation::Order;
  for (const Order order :
       {Order::kRandom, Order::kAscending, Order::kDescending}) {
    machine.order = order;
    machine.resident = order == Order::kRandom ? 3 : 1;
    int error = 0;
    EmulatedLastError() = cudaErrorMemoryAllocation;  // of a call before
    const auto operations = Operations(
        [&] { error = ForwardCuda(nullptr, problem, arguments, blocks); });
    (*expect)(error == 0, "success", error);
    (*expect)(operations.back().name.find("Statistics") == 1 &&
                  operations.size() <= 2 &&
                  (operations.size() == 1 || (operations[0].name == "memset" &&
                                              operations[1].blocks > 1)),
              "operations", static_cast<int64_t>(operations.size()));
    compare();
    // An epilogue in place has no z any more.
    if (operations.back().blocks == 1 || arguments.y == arguments.x) break;
  }
  machine.order = Order::kRandom;
  machine.resident = 3;
}

template <typename Element, typename Scalar>
void Test(DType dtype, const Case& c) {
  Expect expect(dtype, c, "");
  const Problem problem = {dtype, c.rows, c.units, {8.5, 0.75, c.units % 2}};
  const int64_t elements = c.rows * c.units;
  std::mt19937 random(static_cast<unsigned>(elements));
  std::normal_distribution<float> normal(3.f, 2.f);
  Buffer<Element> storage(elements + c.misaligned),
      in_place_storage(elements + c.misaligned),
      dx_storage(elements + c.misaligned);
  Element* x = storage.get() + c.misaligned;
  Element* in_place = in_place_storage.get() + c.misaligned;
  Element* dx = dx_storage.get() + c.misaligned;
  for (int64_t i = 0; i < elements; ++i) {
    x[i] = Convert<Element>::Round(static_cast<Scalar>(normal(random)));
  }
  if (c.hard) {  // columns that vary little, not at all, or are not finite
    for (int64_t n = 0; n < c.rows; ++n) {
      Element* row = x + n * c.units;
      row[0] = Convert<Element>::Round(7);
      if (c.units > 3) row[3] = Convert<Element>::Round(n % 2 * Scalar(1e-6));
    }
    const Scalar infinity = std::numeric_limits<Scalar>::infinity();
    if (c.units > 1) x[1] = Convert<Element>::Round(infinity);
    if (c.units > 2) {
      x[(c.rows - 1) * c.units + 2] =
          Convert<Element>::Round(infinity - infinity);
    }
  }
  std::copy_n(x, elements, in_place);
  Buffer<Scalar> mean(c.units), variance(c.units), entropy(1), valid(1);
  Buffer<Scalar> entropy_grad(1), mean_grad(c.units), variance_grad(c.units);
  entropy_grad[0] = 1000;
  for (int64_t u = 0; u < c.units; ++u) {
    mean_grad[u] = static_cast<Scalar>(u % 3);
    variance_grad[u] = static_cast<Scalar>(u % 5);
  }
  const Defined<Scalar> expected(x, problem);
  ForwardArguments forward;
  forward.x = x;
  forward.entropy = entropy.get();
  forward.mean = mean.get();
  forward.variance = variance.get();
  forward.valid = valid.get();
  ForwardInEachOrder(problem, forward, c.blocks, &expect, [&] {
    expect(valid[0] == 1, "valid", 0);
    for (int64_t u = 0; u < c.units; ++u) {
      expect(SameBits(mean[u], expected.mean[u]), "mean of unit", u);
      expect(SameBits(variance[u], expected.variance[u]), "variance of unit",
             u);
      mean[u] = variance[u] = -1;
    }
    expect(SameBits(entropy[0], expected.entropy), "entropy", 0);
    entropy[0] = valid[0] = -1;
  });

  GradientArguments backward;
  backward.x = x;
  backward.mean = expected.mean.data();
  backward.variance = expected.variance.data();
  backward.entropy_grad = entropy_grad.get();
  backward.dx = dx;
  const auto factors =
      GradientFactorsOf<Scalar>(c.rows, c.units, problem.formula);
  const Scalar share = EntropyShare(entropy_grad[0], factors);
  for (bool statistics : {false, true}) {
    if (statistics) {
      backward.mean_grad = mean_grad.get();
      backward.variance_grad = variance_grad.get();
    }
    const int error = GradientCuda(nullptr, problem, backward, c.blocks);
    expect(error == 0, "success of the gradient", error);
    const SubnormalsAreZero zeros;
    for (int64_t i = 0; i < elements; ++i) {
      const int64_t u = i % c.units;
      const Scalar value = Convert<Element>::Load(x[i]);
      const Scalar reciprocal = Reciprocal(expected.variance[u], factors);
      const Scalar gradient =
          statistics ? UnitGradient(value, expected.mean[u], reciprocal, share,
                                    VarianceSlope(variance_grad[u], factors),
                                    MeanOffset(mean_grad[u], factors))
                     : UnitGradient(value, expected.mean[u], reciprocal, share);
      expect(SameBits(dx[i], Convert<Element>::Round(gradient)),
             statistics ? "gradient with statistics" : "gradient", i);
    }
  }
  backward.x = backward.dx = in_place;
  const int error = GradientCuda(nullptr, problem, backward, c.blocks);
  expect(error == 0, "success of the gradient in place", error);
  for (int64_t i = 0; i < elements; ++i) {
    expect(SameBits(in_place[i], dx[i]), "gradient in place", i);
  }
  SetScalarCuda(nullptr, dtype, 2.5, entropy.get());
  expect(entropy[0] == Scalar(2.5), "scalar", 0);
}

// What an epilogue writes.
template <typename Element, typename Scalar>
struct EpilogueResults {
  EpilogueResults(const Case& c, int64_t channels)
      : y_storage(c.rows * c.units + c.misaligned),
        dz_storage(c.rows * c.units + c.misaligned),
        dbias(channels),
        mean(c.units),
        variance(c.units),
        entropy(1),
        y(y_storage.get() + c.misaligned),
        dz(dz_storage.get() + c.misaligned) {}
  Buffer<Element> y_storage, dz_storage, dbias;
  Buffer<Scalar> mean, variance, entropy;
  Element* y;
  Element* dz;
};

// Calls `body` with the activation as a constant, on the host.
template <typename Body>
void WithEachActivation(Activation activation, const Body& body) {
#define LBE_ACTIVATION(name, keras_name)                          \
  if (activation == Activation::name) {                           \
    body(std::integral_constant<Activation, Activation::name>()); \
  }
  LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
}

// The same by their definition, of z and dy.
template <typename Element, typename Scalar>
void DefineEpilogue(const Problem& problem, const Epilogue& epilogue,
                    const Element* z, const Element* dy, Scalar entropy_grad,
                    EpilogueResults<Element, Scalar>* to) {
  using C = Convert<Element>;
  const SubnormalsAreZero zeros;
  const int64_t units = problem.units, elements = problem.rows * units;
  const auto* bias = static_cast<const Element*>(epilogue.bias);
  const Scalar slope = static_cast<Scalar>(epilogue.slope);
  WithEachActivation(epilogue.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    for (int64_t i = 0; i < elements; ++i) {
      const Scalar b =
          bias == nullptr ? 0 : C::Load(bias[i % units % epilogue.channels]);
      to->y[i] =
          C::Round(Activate<kActivation, Scalar>(C::Load(z[i]) + b, slope));
    }
    const Defined<Scalar> statistics(to->y, problem);
    std::copy_n(statistics.mean.data(), units, to->mean.get());
    std::copy_n(statistics.variance.data(), units, to->variance.get());
    to->entropy[0] = statistics.entropy;
    const auto factors =
        GradientFactorsOf<Scalar>(problem.rows, units, problem.formula);
    const Scalar share = EntropyShare(entropy_grad, factors);
    const int64_t row_blocks = CeilDiv(problem.rows, kSumRows);
    std::vector<Scalar> sums(row_blocks * units);
    for (int64_t u = 0; u < units; ++u) {
      for (int64_t k = 0; k < row_blocks; ++k) {
        Scalar leaves[kLeafRows] = {};
        for (int64_t r = 0; r < kSumRows; ++r) {
          const int64_t n = k * kSumRows + r;
          if (n >= problem.rows) break;
          const int64_t i = n * units + u;
          const Scalar y = C::Load(to->y[i]);
          const Scalar gradient = UnitGradient(
              y, to->mean[u], Reciprocal(to->variance[u], factors), share);
          const Scalar dz = Derivative<kActivation, Scalar>(y, slope) *
                            (C::Load(dy[i]) + gradient);
          to->dz[i] = C::Round(dz);
          leaves[r / kLeafRows] += dz;
        }
        sums[k * units + u] = PairwiseSum(leaves);
      }
    }
    for (int64_t channel = 0; channel < to->dbias.count(); ++channel) {
      const int64_t count = row_blocks * units / epilogue.channels;
      double parts[kSumParts] = {};
      for (int64_t i = 0; i < count; ++i) {
        parts[i % kSumParts] += sums[i * epilogue.channels + channel];
      }
      to->dbias[channel] =
          C::Round(static_cast<Scalar>(SumHalves<kSumParts>(parts)));
    }
  });
}

// The same by the kernels of the CPU.
template <typename Element, typename Scalar>
void CpuEpilogue(const Problem& problem, const Epilogue& epilogue,
                 const Element* z, const Element* dy, Scalar entropy_grad,
                 EpilogueResults<Element, Scalar>* to) {
  CpuWorkspace workspace(
      std::max(ForwardCpuWorkspace(problem, 1),
               GradientCpuWorkspace(problem, epilogue.channels)));
  ForwardArguments forward;
  forward.x = z;
  forward.epilogue = &epilogue;
  forward.y = to->y;
  forward.workspace = workspace.get();
  forward.entropy = to->entropy.get();
  forward.mean = to->mean.get();
  forward.variance = to->variance.get();
  ForwardCpu(kAlone, problem, forward);
  GradientArguments backward;
  backward.x = to->y;
  backward.mean = to->mean.get();
  backward.variance = to->variance.get();
  backward.entropy_grad = &entropy_grad;
  backward.epilogue = &epilogue;
  backward.dy = dy;
  backward.workspace = workspace.get();
  backward.dx = to->dz;
  if (epilogue.bias != nullptr) backward.dbias = to->dbias.get();
  GradientCpu(kAlone, problem, backward);
}

// activation(z) and its derivative.
std::pair<double, double> Exact(Activation activation, double z, double slope) {
  const double sigmoid = 1 / (1 + std::exp(-z));
  switch (activation) {
    case Activation::kLinear:
      return {z, 1};
    case Activation::kRelu:
      return {z > 0 ? z : 0, z > 0};
    case Activation::kLeakyRelu:
      return {z > 0 ? z : slope * z, z > 0 ? 1 : slope};
    case Activation::kElu:
      return {z < 0 ? slope * std::expm1(z) : z,
              z < 0 ? slope * std::exp(z) : 1};
    case Activation::kSelu:
      return {kSeluScale * (z < 0 ? kSeluAlpha * std::expm1(z) : z),
              kSeluScale * (z < 0 ? kSeluAlpha * std::exp(z) : 1)};
    case Activation::kTanh:
      return {std::tanh(z), 1 - std::tanh(z) * std::tanh(z)};
    case Activation::kSigmoid:
      return {sigmoid, sigmoid * (1 - sigmoid)};
    case Activation::kSoftplus:
      return {std::log1p(std::exp(z)), sigmoid};
  }
  return {};
}

// With `channels` of a bias, or without one where that is 0.
template <typename Element, typename Scalar>
void TestEpilogue(DType dtype, const Case& c, Activation activation,
                  int64_t channels) {
  Expect expect(dtype, c,
                ", activation " + std::to_string(static_cast<int>(activation)) +
                    ", " + std::to_string(channels) + " channels");
  using C = Convert<Element>;
  const Problem problem = {dtype, c.rows, c.units, {8.5, 0.75, c.units % 2}};
  const int64_t elements = c.rows * c.units;
  Buffer<Element> z_storage(elements + c.misaligned),
      dy_storage(elements + c.misaligned), bias(channels);
  Element* z = z_storage.get() + c.misaligned;
  Element* dy = dy_storage.get() + c.misaligned;
  std::mt19937 random(static_cast<unsigned>(elements));
  std::normal_distribution<float> normal(0.25f, 2.f);
  for (int64_t i = 0; i < elements; ++i) {
    z[i] = C::Round(static_cast<Scalar>(normal(random)));
    dy[i] = C::Round(static_cast<Scalar>(normal(random)));
  }
  for (int64_t i = 0; i < channels; ++i) {
    bias[i] = C::Round(static_cast<Scalar>(normal(random)));
  }
  if (c.hard) {
    const Scalar infinity = std::numeric_limits<Scalar>::infinity();
    const Scalar hard[] = {infinity, -infinity, infinity - infinity, 1e-30f,
                           1000,     -1000,     -Scalar(0),          0};
    for (int64_t i = 0; i < elements; i += 5) {
      z[i] = C::Round(hard[i / 5 % 8]);
    }
  }
  Epilogue epilogue;
  epilogue.activation = activation;
  epilogue.slope = 0.3;
  epilogue.bias = channels == 0 ? nullptr : bias.get();
  epilogue.channels = std::max<int64_t>(channels, 1);
  const Scalar entropy_grad = 40;

  using Outputs = EpilogueResults<Element, Scalar>;
  Outputs defined(c, channels), cuda(c, channels), in_place(c, channels);
  DefineEpilogue(problem, epilogue, z, dy, entropy_grad, &defined);
  const auto compare = [&](Outputs* found, Outputs* expected) {
    for (int64_t i = 0; i < elements; ++i) {
      expect(SameBits(found->y[i], expected->y[i]), "y", i);
    }
    for (int64_t u = 0; u < c.units; ++u) {
      expect(SameBits(found->mean[u], expected->mean[u]), "mean of unit", u);
      expect(SameBits(found->variance[u], expected->variance[u]),
             "variance of unit", u);
    }
    expect(SameBits(found->entropy[0], expected->entropy[0]), "entropy", 0);
  };
  const auto compare_gradient = [&](Outputs* found, Outputs* expected) {
    for (int64_t i = 0; i < elements; ++i) {
      expect(SameBits(found->dz[i], expected->dz[i]), "dz", i);
    }
    for (int64_t i = 0; i < channels; ++i) {
      expect(SameBits(found->dbias[i], expected->dbias[i]), "dbias", i);
    }
  };
  Outputs cpu(c, channels);
  CpuEpilogue(problem, epilogue, z, dy, entropy_grad, &cpu);
  compare(&cpu, &defined);
  compare_gradient(&cpu, &defined);

  const auto run = [&](const Element* z, const Element* dy, Outputs* to) {
    Buffer<Scalar> valid(1);
    ForwardArguments forward;
    forward.x = z;
    forward.epilogue = &epilogue;
    forward.y = to->y;
    forward.entropy = to->entropy.get();
    forward.mean = to->mean.get();
    forward.variance = to->variance.get();
    forward.valid = valid.get();
    ForwardInEachOrder(problem, forward, c.blocks, &expect,
                       [&] { compare(to, &defined); });
    expect(valid[0] == 1, "valid", 0);
    Buffer<double> sums(Doubles(
        GradientCudaWorkspace(problem, channels == 0 ? c.units : channels)));
    GradientArguments backward;
    backward.x = to->y;
    backward.mean = to->mean.get();
    backward.variance = to->variance.get();
    backward.entropy_grad = &entropy_grad;
    backward.epilogue = &epilogue;
    backward.dy = dy;
    backward.workspace = sums.get();
    backward.dx = to->dz;
    if (channels > 0) backward.dbias = to->dbias.get();
    int error = 0;
    const auto operations = Operations(
        [&] { error = GradientCuda(nullptr, problem, backward, c.blocks); });
    expect(error == 0, "success of the gradient", error);
    expect(operations.size() <= (channels == 0 ? 1 : 2),
           "operations of the gradient",
           static_cast<int64_t>(operations.size()));
    compare_gradient(to, &defined);
  };
  run(z, dy, &cuda);
  // The tap writes no y: -0 stays, which an addition makes 0.
  if (activation == Activation::kLinear && channels == 0) {
    std::copy_n(z, elements, defined.y);
  }
  std::copy_n(z, elements, in_place.y);
  std::copy_n(dy, elements, in_place.dz);
  run(in_place.y, in_place.dz, &in_place);
  if (c.hard) return;

  // The formula in double: for dz, of the statistics, which other tests check.
  const double rounding = sizeof(Element) == 8       ? 1e-12
                          : sizeof(Element) == 4     ? 1e-5
                          : dtype == DType::kFloat16 ? 2e-3
                                                     : 2e-2;
  std::vector<double> sums(channels), sizes(channels);
  for (int64_t i = 0; i < elements; ++i) {
    const int64_t u = i % c.units;
    const double b = channels == 0 ? 0 : C::Load(bias[u % channels]);
    const auto [y, derivative] =
        Exact(activation, static_cast<double>(C::Load(z[i])) + b, 0.3);
    const double found = C::Load(cuda.y[i]);
    expect(std::fabs(found - y) <= rounding * (std::fabs(y) + 1e-2),
           "the value of y", i);
    const double slope =
        entropy_grad * problem.formula.scale /
        (static_cast<double>(c.units * (c.rows - problem.formula.ddof)) *
         (problem.formula.scale * cuda.variance[u] + problem.formula.offset));
    const double into_y = C::Load(dy[i]) + slope * (found - cuda.mean[u]);
    const double dz = C::Load(cuda.dz[i]);
    expect(std::fabs(dz - derivative * into_y) <=
               rounding * (std::fabs(into_y) + 1),
           "the value of dz", i);
    if (channels == 0) continue;
    sums[u % channels] += dz;
    sizes[u % channels] += std::fabs(dz);
  }
  for (int64_t i = 0; i < channels; ++i) {
    expect(std::fabs(C::Load(cuda.dbias[i]) - sums[i]) <=
               rounding * (sizes[i] + 1),
           "the value of dbias", i);
  }
}

// Of each shape every activation without a bias, with one for each unit and
// with one for several positions; or, unless `thorough`, each of these in turn.
template <typename Element, typename Scalar>
void TestEpilogues(DType dtype, const std::vector<Case>& all, bool thorough) {
  constexpr Activation kActivations[] = {
#define LBE_ACTIVATION(name, keras_name) Activation::name,
      LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
  };
  size_t turn = static_cast<size_t>(dtype);
  for (const Case& c : all) {
    int64_t positions = 1;
    for (int64_t p : {2, 3, 11, 25}) {
      if (c.units % p == 0) positions = p;
    }
    const int64_t channels[] = {c.units / positions, 0, c.units};
    ++turn;
    for (size_t i = 0; i < 3; ++i) {
      for (size_t j = 0; j < 8; ++j) {
        if (thorough || (i == (turn + turn / 3) % 3 && j == turn % 8)) {
          TestEpilogue<Element, Scalar>(dtype, c, kActivations[j], channels[i]);
        }
      }
    }
  }
}

// A merge by both kernels, into buffers of exactly the promised sizes.
template <typename Scalar>
struct MergeResults {
  explicit MergeResults(const MergeProblem& problem)
      : mean(problem.units),
        variance(problem.units),
        count(problem.layers),
        entropy(problem.layers),
        valid(problem.layers) {}
  MergeArguments Arguments(Buffer<Scalar>* gathered, Buffer<int64_t>* ends) {
    return {gathered->get(), ends->get(),   mean.get(), variance.get(),
            count.get(),     entropy.get(), valid.get()};
  }
  Buffer<Scalar> mean, variance, count, entropy, valid;
};

// Runs it, and compares the results of CUDA with those of the CPU.
template <typename Scalar>
void Merge(const MergeProblem& problem, Buffer<Scalar>* gathered,
           Buffer<int64_t>* ends, Expect* expect, MergeResults<Scalar>* cuda) {
  MergeResults<Scalar> cpu(problem);
  MergeMomentsCpu(kAlone, problem, cpu.Arguments(gathered, ends));
  int error = 0;
  const auto operations = Operations([&] {
    error = MergeMomentsCuda(nullptr, problem, cuda->Arguments(gathered, ends));
  });
  (*expect)(error == 0, "success of the merge", error);
  (*expect)(operations.size() == 1 && operations[0].blocks == problem.layers,
            "operations of the merge", static_cast<int64_t>(operations.size()));
  for (int64_t u = 0; u < problem.units; ++u) {
    (*expect)(SameBits(cuda->mean[u], cpu.mean[u]), "merged mean of unit", u);
    (*expect)(SameBits(cuda->variance[u], cpu.variance[u]),
              "merged variance of unit", u);
  }
  for (int64_t layer = 0; layer < problem.layers; ++layer) {
    (*expect)(SameBits(cuda->count[layer], cpu.count[layer]), "count of layer",
              layer);
    (*expect)(SameBits(cuda->entropy[layer], cpu.entropy[layer]),
              "entropy of layer", layer);
    (*expect)(SameBits(cuda->valid[layer], cpu.valid[layer]), "valid of layer",
              layer);
  }
}

// Layers of these widths, of random moments; in some replicas a layer has no
// row, and then numbers that nobody may use.
template <typename Scalar>
void TestMerge(DType dtype, int64_t replicas, std::vector<int64_t> widths) {
  const int64_t layers = static_cast<int64_t>(widths.size());
  Buffer<int64_t> ends(layers);
  int64_t units = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    ends[layer] = units += widths[layer];
  }
  Expect expect(dtype, {replicas, units, 0, 0},
                ", a merge of so many replicas");
  const MergeProblem problem = {
      dtype, replicas, layers, units, {8.5, replicas % 2 * 0.75, units % 2}};
  const int64_t pitch = PitchOf(problem);
  Buffer<Scalar> gathered(replicas * pitch);
  std::mt19937 random(static_cast<unsigned>(replicas + units));
  std::normal_distribution<float> normal(3.f, 2.f);
  for (int64_t r = 0; r < replicas; ++r) {
    Scalar* const row = gathered.get() + r * pitch;
    int64_t unit = layers;
    for (int64_t layer = 0; layer < layers; ++layer) {
      row[layer] = static_cast<Scalar>(random() % 3 * (random() % 50));
      for (int64_t u = 0; u < widths[layer]; ++u, ++unit) {
        if (row[layer] == 0) continue;
        row[unit] = normal(random);
        row[unit + units] = std::fabs(normal(random));
      }
    }
  }
  MergeResults<Scalar> merged(problem);
  Merge(problem, &gathered, &ends, &expect, &merged);
  for (int64_t layer = 0; layer < layers; ++layer) {
    Scalar rows = 0;
    for (int64_t r = 0; r < replicas; ++r) rows += gathered[r * pitch + layer];
    expect(merged.count[layer] == rows, "the sum of counts", layer);
    expect(merged.valid[layer] == (rows >= 2 && widths[layer] > 0),
           "whether there is an entropy", layer);
    expect(merged.valid[layer] == 1 || merged.entropy[layer] == 0, "no entropy",
           layer);
  }
#if !defined(__SANITIZE_THREAD__)
  // Nothing outside is read or written, whatever the ends are. Blocks may then
  // write to the same units.
  for (int64_t layer = 0; layer < layers; ++layer) {
    ends[layer] = static_cast<int64_t>(random() % (4 * units + 1)) - units;
  }
  const int error =
      MergeMomentsCuda(nullptr, problem, merged.Arguments(&gathered, &ends));
  expect(error == 0, "success with ends that do not fit", error);
#endif
}

// A batch of which each shard makes y = relu(z + bias): moments, merge and
// gradients by both kernels, and by one call with the whole batch, whose bits
// they have where the shards are nodes of its tree.
template <typename Element, typename Scalar>
void TestShards(DType dtype, const std::vector<int64_t>& shards, int64_t units,
                int64_t channels, int blocks, bool same_bits) {
  using C = Convert<Element>;
  int64_t rows = 0;
  for (const int64_t shard : shards) rows += shard;
  const Case c = {rows, units, blocks, 0};
  Expect expect(dtype, c,
                ", " + std::to_string(shards.size()) + " shards, the first " +
                    std::to_string(shards[0]));
  const Formula formula = {8.5, rows < 2 ? 0 : 0.75, units % 2};
  const int64_t elements = rows * units;
  Buffer<Element> z(elements), dy(elements), y(elements), bias(channels);
  Buffer<Element> whole_dx(elements), whole_dbias(channels);
  std::mt19937 random(static_cast<unsigned>(elements));
  std::normal_distribution<float> normal(0.25f, 2.f);
  for (int64_t i = 0; i < elements; ++i) {
    z[i] = C::Round(static_cast<Scalar>(normal(random)));
    dy[i] = C::Round(static_cast<Scalar>(normal(random)));
  }
  for (int64_t i = 0; i < channels; ++i) {
    bias[i] = C::Round(static_cast<Scalar>(normal(random)));
  }
  Buffer<Scalar> mean_grad(units), variance_grad(units);
  for (int64_t u = 0; u < units; ++u) {
    mean_grad[u] = static_cast<Scalar>(u % 3);
    variance_grad[u] = static_cast<Scalar>(u % 5);
  }
  Epilogue epilogue;
  epilogue.activation = Activation::kRelu;
  epilogue.bias = bias.get();
  epilogue.channels = channels;

  // Beside the layer another one of the same moments, and one without a unit.
  const MergeProblem merge = {
      sizeof(Scalar) == 8 ? DType::kFloat64 : DType::kFloat32,
      static_cast<int64_t>(shards.size()), 3, 2 * units, formula};
  Buffer<Scalar> gathered(merge.replicas * PitchOf(merge));
  Buffer<int64_t> ends(3);
  ends[0] = ends[1] = units;
  ends[2] = 2 * units;
  const SubnormalsAreZero zeros;
  int64_t first = 0;
  for (size_t r = 0; r < shards.size(); first += shards[r] * units, ++r) {
    Scalar* const row =
        gathered.get() + static_cast<int64_t>(r) * PitchOf(merge);
    std::fill_n(row, 3, static_cast<Scalar>(shards[r]));
    if (shards[r] == 0) continue;
    const Problem problem = {dtype, shards[r], units, formula};
    Buffer<Scalar> mean(units), m2(units), count(1);
    Buffer<Scalar> cpu_mean(units), cpu_m2(units), cpu_count(1);
    Buffer<Element> y_of_shard(shards[r] * units);
    ForwardArguments forward;
    forward.x = z.get() + first;
    forward.epilogue = &epilogue;
    forward.y = y.get() + first;
    forward.mean = cpu_mean.get();
    forward.m2 = cpu_m2.get();
    forward.count = cpu_count.get();
    CpuWorkspace workspace(ForwardCpuWorkspace(problem, 1));
    forward.workspace = workspace.get();
    ForwardCpu(kAlone, problem, forward);
    forward.y = y_of_shard.get();
    forward.mean = mean.get();
    forward.m2 = m2.get();
    forward.count = count.get();
    ForwardInEachOrder(problem, forward, blocks, &expect, [&] {
      expect(count[0] == static_cast<Scalar>(shards[r]) &&
                 cpu_count[0] == count[0],
             "count of a shard", shards[r]);
      for (int64_t i = 0; i < y_of_shard.count(); ++i) {
        expect(SameBits(y_of_shard[i], y[first + i]), "y of a shard", i);
      }
      for (int64_t u = 0; u < units; ++u) {
        std::vector<Scalar> column(shards[r]);
        for (int64_t n = 0; n < shards[r]; ++n) {
          column[n] = C::Load(y[first + n * units + u]);
        }
        const auto moments =
            Tree(column, 0, CeilDiv(shards[r], int64_t{kLeafRows}));
        expect(SameBits(mean[u], moments.mean) &&
                   SameBits(cpu_mean[u], moments.mean),
               "mean of a shard's unit", u);
        expect(SameBits(m2[u], moments.m2) && SameBits(cpu_m2[u], moments.m2),
               "m2 of a shard's unit", u);
      }
    });
    for (int64_t copy = 0; copy < 2; ++copy) {
      std::copy_n(mean.get(), units, row + 3 + copy * units);
      std::copy_n(m2.get(), units, row + 3 + (2 + copy) * units);
    }
  }
  MergeResults<Scalar> merged(merge);
  Merge(merge, &gathered, &ends, &expect, &merged);
  expect(merged.valid[0] == (rows >= 2) && merged.valid[1] == 0 &&
             merged.valid[2] == merged.valid[0] &&
             SameBits(merged.entropy[2], merged.entropy[0]),
         "which layers have an entropy", 0);
  const Problem whole = {dtype, rows, units, formula};
  if (same_bits) {
    const Defined<Scalar> defined(y.get(), whole);
    for (int64_t u = 0; u < units; ++u) {
      expect(SameBits(merged.mean[u], defined.mean[u]),
             "mean of the batch's unit", u);
      expect(SameBits(merged.variance[u], defined.variance[u]),
             "variance of the batch's unit", u);
    }
    expect(SameBits(merged.entropy[0], defined.entropy), "entropy of the batch",
           0);
  }

  const Scalar entropy_grad = 40;
  for (const char* of : {"entropy", "statistics", "epilogue", "bias"}) {
    GradientArguments backward;
    backward.mean = merged.mean.get();
    backward.variance = merged.variance.get();
    backward.entropy_grad = &entropy_grad;
    if (*of == 's') {
      backward.mean_grad = mean_grad.get();
      backward.variance_grad = variance_grad.get();
    }
    const bool has_bias = *of == 'b';
    const bool has_epilogue = has_bias || std::strcmp(of, "epilogue") == 0;
    if (has_epilogue) backward.epilogue = &epilogue;
    const auto run_cpu = [&](const Problem& problem, int64_t first, Element* dx,
                             Element* dbias) {
      CpuWorkspace workspace(GradientCpuWorkspace(problem, channels));
      GradientArguments arguments = backward;
      arguments.x = y.get() + first;
      if (has_epilogue) arguments.dy = dy.get() + first;
      arguments.workspace = workspace.get();
      arguments.dx = dx;
      if (has_bias) arguments.dbias = dbias;
      GradientCpu(kAlone, problem, arguments);
    };
    if (same_bits) run_cpu(whole, 0, whole_dx.get(), whole_dbias.get());
    backward.count = merged.count.get();
    int64_t first = 0;
    for (const int64_t shard : shards) {
      if (shard == 0) continue;
      const Problem problem = {dtype, shard, units, formula};
      Buffer<Element> dx(shard * units), cpu_dx(shard * units);
      Buffer<Element> dbias(channels), cpu_dbias(channels);
      run_cpu(problem, first, cpu_dx.get(), cpu_dbias.get());
      Buffer<double> sums(Doubles(GradientCudaWorkspace(problem, channels)));
      GradientArguments arguments = backward;
      arguments.x = y.get() + first;
      if (has_epilogue) arguments.dy = dy.get() + first;
      arguments.workspace = sums.get();
      arguments.dx = dx.get();
      if (has_bias) arguments.dbias = dbias.get();
      const int error = GradientCuda(nullptr, problem, arguments, blocks);
      expect(error == 0, "success of a shard's gradient", error);
      for (int64_t i = 0; i < dx.count(); ++i) {
        expect(SameBits(dx[i], cpu_dx[i]), of, i);
        expect(!same_bits || SameBits(dx[i], whole_dx[first + i]),
               "dx of the batch", i);
        const Scalar value = C::Load(dx[i]);
        const Scalar of_y =
            C::Load(y[first + i]) > 0 ? C::Load(dy[first + i]) : Scalar(0);
        expect(rows >= 2 || value == (has_epilogue ? of_y : Scalar(0)),
               "dx without an entropy", i);
      }
      for (int64_t i = 0; has_bias && i < channels; ++i) {
        expect(SameBits(dbias[i], cpu_dbias[i]), "dbias of a shard", i);
      }
      first += shard * units;
    }
  }
}

template <typename Element, typename Scalar>
void TestReplicas(DType dtype, bool quick) {
  const DType results = sizeof(Scalar) == 8 ? DType::kFloat64 : DType::kFloat32;
  TestShards<Element, Scalar>(dtype, {16, 5}, 17, 17, 1, true);
  TestShards<Element, Scalar>(dtype, {0, 1}, 33, 33, 1, false);
  TestMerge<Scalar>(results, 5, {3, 0, 300});
  if (quick) return;
  TestShards<Element, Scalar>(dtype, {64, 64, 21}, 17, 17, 9, true);
  TestShards<Element, Scalar>(dtype, {16, 1, 0, 9}, 66, 33, 1, false);
  TestShards<Element, Scalar>(dtype, {128, 128, 128, 1}, 130, 26, 1 << 20,
                              true);
  TestShards<Element, Scalar>(dtype, {256, 128}, 200, 200, 20, true);
  TestShards<Element, Scalar>(dtype, {32, 32, 32, 32, 0}, 64, 8, 1, true);
  TestShards<Element, Scalar>(dtype, {1, 1}, 40, 40, 1, false);
  TestShards<Element, Scalar>(dtype, {8195, 2}, 5, 5, 9, false);
  for (int64_t replicas : {1, 2, 3, 4, 7, 8, 9, 33}) {
    TestMerge<Scalar>(results, replicas, {1, 64, 257, 0, 1100});
  }
  // More groups than lanes; more than one tile of the CPU's.
  TestMerge<Scalar>(results, 3, {17000, 1, 5000});
}

// Launches of the default cut, without running them. A forward pass has a block
// for each wave of its tiles and splits; how many tickets there are says how
// the splits are merged: one, and one for each cluster of each level of each
// tile.
void TestLaunches(bool quick) {
  enum What { kForward, kEpilogueForward, kGradient, kBiasGradient };
  struct Launches {
    DType dtype;
    int64_t rows, units, channels;
    What what;
    std::vector<emulation::Operation> expected;
  };
  const auto forward = [](unsigned blocks, size_t tickets) {
    std::vector<emulation::Operation> operations;
    if (tickets > 0) operations.push_back({"memset", 0, 0, 4 * tickets});
    operations.push_back({"Statistics", blocks, kThreads, 0});
    return operations;
  };
  const auto gradient = [](unsigned blocks, unsigned sum_blocks = 0) {
    std::vector<emulation::Operation> operations;
    operations.push_back({"Gradient", blocks, kThreads, 0});
    if (sum_blocks > 0) {
      operations.push_back({"SumBias", sum_blocks, kThreads, 0});
    }
    return operations;
  };
  constexpr DType kF16 = DType::kFloat16, kF32 = DType::kFloat32,
                  kF64 = DType::kFloat64;
  const std::vector<Launches> all = {
      // A tile whose splits one block merges.
      {kF32, 512, 128, 1, kForward, forward(8, 1 + 1)},
      {kF16, 512, 128, 1, kForward, forward(4, 1 + 1)},
      {kF32, 128, 128, 1, kForward, forward(1, 0)},
      // 32 tiles of 32 splits, merged by 16; 16 tiles of 32 splits, by 8.
      {kF32, 4096, 4096, 1, kForward, forward(1024, 1 + 32 * (2 + 1))},
      {kF16, 4096, 4096, 1, kForward, forward(512, 1 + 16 * (4 + 1))},
      {kF64, 4096, 4096, 1, kForward, forward(1024, 1 + 64)},
      {kF32, 4096, 4096, 1, kEpilogueForward, forward(512, 1 + 32)},
      // Tiles that fill the GPU are not split.
      {kF32, 128, 200704, 1, kForward, forward(1568, 1)},
      {kF16, 128, 200704, 1, kForward, forward(784, 1)},
      {kF16, 128, 100352, 1, kForward, forward(392, 1)},
      // One tile of many splits, merged by 32 in as many blocks as that takes.
      {kF32, 65536, 64, 1, kForward, forward(512, 1 + 16 + 1)},
      {kF16, 65536, 64, 1, kForward, forward(256, 1 + 8 + 1)},
      {kF64, 65536, 64, 1, kForward, forward(512, 1 + 16 + 1)},
      {kF32, 4096, 4096, 1, kGradient, gradient(1024)},
      {kF16, 4096, 4096, 1, kGradient, gradient(1024)},
      {kF32, 128, 200704, 1, kGradient, gradient(1568)},
      {kF16, 128, 200704, 1, kGradient, gradient(1568)},
      {kF32, 65536, 64, 1, kGradient, gradient(1024)},
      // Channels side by side, or a block for each.
      {kF32, 4096, 4096, 4096, kBiasGradient, gradient(512, 128)},
      {kF32, 64, 256, 256, kBiasGradient, gradient(2)},
      {kF32, 256, 224 * 224 * 3, 3, kBiasGradient, gradient(1176, 3)},
      {kF32, 32, 112 * 112 * 32, 32, kBiasGradient, gradient(3136, 32)},
  };
  emulation::Machine& machine = emulation::TheMachine();
  machine.runs = false;
  for (const Launches& launches : all) {
    if (quick && launches.dtype == kF64) continue;
    const Case c = {launches.rows, launches.units, 0, 0};
    Expect expect(launches.dtype, c, "");
    const Problem problem = {launches.dtype, c.rows, c.units, {8.5, 0.75, 0}};
    Epilogue epilogue;
    epilogue.activation = Activation::kRelu;
    epilogue.channels = launches.channels;
    void* const somewhere = reinterpret_cast<void*>(uintptr_t{4096});
    ForwardArguments to_forward;
    GradientArguments to_gradient;
    to_forward.y = somewhere;
    if (launches.what == kEpilogueForward) to_forward.epilogue = &epilogue;
    if (launches.what == kBiasGradient) {
      to_gradient.epilogue = &epilogue;
      to_gradient.dbias = somewhere;
    }
    const auto found = Operations([&] {
      const int error = launches.what <= kEpilogueForward
                            ? ForwardCuda(nullptr, problem, to_forward)
                            : GradientCuda(nullptr, problem, to_gradient);
      expect(error == 0, "success", error);
    });
    bool same = found.size() == launches.expected.size();
    for (size_t i = 0; same && i < found.size(); ++i) {
      const emulation::Operation& one = found[i];
      const emulation::Operation& expected = launches.expected[i];
      // Of a kernel the name starts with a bracket.
      same = one.name.find(expected.name) <= 1 &&
             one.blocks == expected.blocks && one.threads == expected.threads &&
             one.bytes == expected.bytes;
    }
    expect(same, "operations", static_cast<int64_t>(found.size()));
    if (same) continue;
    for (const emulation::Operation& one : found) {
      std::fprintf(stderr, "  %s: %u blocks, %zu bytes\n", one.name.c_str(),
                   one.blocks, one.bytes);
    }
  }
  machine.runs = true;
}

// Which GPUs have code, and how a driver that is too old is reported.
void TestSystem() {
  const auto expect = [](bool holds, const char* what) {
    ++cases;
    if (holds) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what);
  };
  expect(HasCodeFor("sm_75 sm_80 sm_90", 90), "the same architecture");
  expect(HasCodeFor("sm_80 sm_90", 86), "a newer minor version");
  expect(!HasCodeFor("sm_86 sm_90", 80), "not an older minor version");
  expect(!HasCodeFor("sm_90", 100), "not another major version");
  expect(HasCodeFor("sm_90 compute_90", 121), "PTX, for newer ones");
  expect(!HasCodeFor("sm_90 compute_90", 89), "PTX, not for older ones");
  expect(HasCodeFor("sm_90a", 90) && !HasCodeFor("sm_100a", 103),
         "of one architecture alone");
  expect(HasCodeFor("sm_100f", 103) && !HasCodeFor("compute_100f", 120),
         "of a family alone");
  expect(!HasCodeFor("", 90), "none");
  expect(DescribeCuda().error == 0 && DescribeCuda().compute_capability == 90,
         "the emulated GPU");
}

int Main() {
#ifdef LBE_QUICK
  constexpr bool quick = true;
#else
  constexpr bool quick = false;
#endif
  // All ways through the kernels, in few blocks: one or many, one split or
  // many, vectors of each width, threads and groups with nothing to do.
  std::vector<Case> all = {
      {3, 17, 1, 1}, {9, 66, 9, 0},  {70, 130, 9, 1},       {150, 130, 1, 0},
      {40, 3, 1, 0}, {9, 264, 1, 0}, {70, 130, 9, 0, true}, {150, 128, 9, 0}};
  if (!quick) {
    for (const Case& c : std::vector<Case>{{2, 1, 1, 0},
                                           {8, 16, 1, 0},
                                           {31, 130, 1, 0},
                                           {64, 256, 1, 0},
                                           {257, 132, 1, 3},
                                           {512, 128, 1, 0},
                                           {1100, 300, 1, 0},
                                           {300, 1000, 1, 2},
                                           {33, 17000, 1, 0},
                                           {9000, 70, 1, 0},
                                           {40000, 1, 1, 0}}) {
      // Runs of 32, 16 and 8 rows.
      for (int blocks : {1, 20, 1 << 20}) {
        all.push_back({c.rows, c.units, blocks, c.misaligned});
      }
    }
  }
  TestSystem();
  TestLaunches(quick);
  for (const Case& c : all) {
    Test<Half, float>(DType::kFloat16, c);
    Test<float, float>(DType::kFloat32, c);
    if (quick && failures != 0) break;
    if (quick) continue;
    Test<BFloat16, float>(DType::kBFloat16, c);
    Test<double, double>(DType::kFloat64, c);
  }
  // Splits that are merged in two levels.
  Test<float, float>(DType::kFloat32, {1090, 66, 17, 0});
  // Six channels side by side, with several sums each.
  TestEpilogue<float, float>(DType::kFloat32, {70, 66, 9, 0}, Activation::kRelu,
                             6);
  // Two channels of so many positions that each has a block of SumBias.
  const Case positions = {9, 2200, 1, 0};
  TestEpilogue<float, float>(DType::kFloat32, positions, Activation::kRelu, 2);
  if (!quick) {
    TestEpilogue<Half, float>(DType::kFloat16, positions, Activation::kElu, 2);
    TestEpilogue<double, double>(DType::kFloat64, positions, Activation::kTanh,
                                 2);
  }
  // Every activation on small shapes, each other shape with some of them.
  const std::vector<Case> small = {{19, 6, 1, 0}, {9, 33, 1, 1, true}};
  if (!quick || failures == 0) {
    TestEpilogues<Half, float>(DType::kFloat16, small, !quick);
    TestEpilogues<Half, float>(DType::kFloat16, all, false);
    TestEpilogues<float, float>(DType::kFloat32, all, false);
  }
  if (!quick) {
    TestEpilogues<float, float>(DType::kFloat32, small, true);
    TestEpilogues<BFloat16, float>(DType::kBFloat16, small, true);
    TestEpilogues<BFloat16, float>(DType::kBFloat16, all, false);
    TestEpilogues<double, double>(DType::kFloat64, small, true);
    TestEpilogues<double, double>(DType::kFloat64, all, false);
  }
  if (!quick || failures == 0) {
    TestReplicas<float, float>(DType::kFloat32, quick);
  }
  if (!quick) {
    TestReplicas<Half, float>(DType::kFloat16, false);
    TestReplicas<BFloat16, float>(DType::kBFloat16, false);
    TestReplicas<double, double>(DType::kFloat64, false);
  }
  std::printf("cuda_emulation_test: %d cases, %d failed\n", cases, failures);
  return failures != 0;
}

}  // namespace
}  // namespace lbe

int main() { return lbe::Main(); }
