// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels, run on the CPU by cuda_emulation.h, compared bit for bit
// with the definition of their result: the tree of batch_entropy.h, walked
// column by column. Those of an epilogue are compared with the CPU's, bit for
// bit, and with the formula in double.
//
// test_cuda_emulation.py compiles this with and without sanitizers, and with
// faults planted into the kernels, which this must then find. Every buffer has
// exactly the size that the kernels are promised.

#include "cuda_emulation.h"

#include "kernels.h"
#ifdef LBE_QUICK  // fewer kernels to compile: of the dtypes that are tested
                  // then
#undef LBE_FOR_EACH_DTYPE
#define LBE_FOR_EACH_DTYPE(DO)                  \
  DO(kFloat16, Half, float, DT_HALF, "float16") \
  DO(kFloat32, float, float, DT_FLOAT, "float32")
#endif
#include LBE_CUDA_SOURCE
#include "cpu_kernels.h"

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
  return SameBits(Numbers<Half>::Load(a), Numbers<Half>::Load(b));
}
bool SameBits(BFloat16 a, BFloat16 b) {
  return SameBits(Numbers<BFloat16>::Load(a), Numbers<BFloat16>::Load(b));
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

template <typename Element, typename Scalar>
void Test(DType dtype, const Case& c) {
  ++cases;
  bool ok = true;
  const auto expect = [&](bool holds, const char* what, int64_t unit) {
    if (holds || !ok) return;
    ok = false;
    ++failures;
    std::fprintf(stderr,
                 "FAILED: %s of unit %lld; dtype %d, x [%lld, %lld], %d "
                 "blocks, misaligned by %lld elements\n",
                 what, static_cast<long long>(unit), static_cast<int>(dtype),
                 static_cast<long long>(c.rows),
                 static_cast<long long>(c.units), c.blocks,
                 static_cast<long long>(c.misaligned));
  };
  const Formula formula = {8.5, 0.75, c.units % 2};
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
    x[i] = Numbers<Element>::Round(static_cast<Scalar>(normal(random)));
  }
  if (c.hard) {  // columns that vary little, not at all, or are not finite
    for (int64_t n = 0; n < c.rows; ++n) {
      Element* row = x + n * c.units;
      row[0] = Numbers<Element>::Round(7);
      if (c.units > 3) row[3] = Numbers<Element>::Round(n % 2 * Scalar(1e-6));
    }
    const Scalar infinity = std::numeric_limits<Scalar>::infinity();
    if (c.units > 1) x[1] = Numbers<Element>::Round(infinity);
    if (c.units > 2) {
      x[(c.rows - 1) * c.units + 2] =
          Numbers<Element>::Round(infinity - infinity);
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
  const int64_t bytes =
      BatchEntropyForwardCudaWorkspace(dtype, c.rows, c.units, c.blocks);
  Buffer<double> workspace((bytes + 7) / 8);
  EmulatedLastError() = cudaErrorMemoryAllocation;  // of a call before this one
  int error = BatchEntropyForwardCuda(
      nullptr, dtype, x, c.rows, c.units, formula, workspace.get(), mean.get(),
      variance.get(), entropy.get(), valid.get(), c.blocks);
  expect(error == 0 && valid[0] == 1, "success", 0);

  const auto factors = EntropyFactorsOf<Scalar>(formula);
  const auto gradient = GradientFactorsOf<Scalar>(c.rows, c.units, formula);
  const Scalar share = EntropyShare(entropy_grad[0], gradient);
  std::vector<double> groups(CeilDiv(c.units, kGroupUnits) * kGroupUnits);
  for (bool statistics : {false, true}) {
    error = BatchEntropyGradCuda(
        nullptr, dtype, x, c.rows, c.units, formula, mean.get(), variance.get(),
        entropy_grad.get(), statistics ? mean_grad.get() : nullptr,
        statistics ? variance_grad.get() : nullptr, dx, c.blocks);
    expect(error == 0, "success of the gradient", 0);
    for (int64_t u = 0; u < c.units; ++u) {
      std::vector<Scalar> column(c.rows);
      for (int64_t n = 0; n < c.rows; ++n) {
        column[n] = Numbers<Element>::Load(x[n * c.units + u]);
      }
      const auto moments = Tree(column, 0, CeilDiv(c.rows, kLeafRows));
      const Scalar v = Variance<Scalar>(moments.m2, c.rows, formula);
      expect(SameBits(mean[u], moments.mean), "mean", u);
      expect(SameBits(variance[u], v), "variance", u);
      groups[u] = UnitEntropy<Scalar>(v, factors);
      const Scalar slope = EntropySlope(v, share, gradient);
      const Scalar both = slope + VarianceSlope(variance_grad[u], gradient);
      const Scalar offset = MeanOffset(mean_grad[u], gradient);
      for (int64_t n = 0; n < c.rows; ++n) {
        const Scalar expected =
            statistics ? UnitGradient(column[n], moments.mean, both, offset)
                       : UnitGradient(column[n], moments.mean, slope);
        expect(SameBits(dx[n * c.units + u], Numbers<Element>::Round(expected)),
               statistics ? "gradient with statistics" : "gradient", u);
      }
    }
  }
  double lanes[kSumLanes] = {};
  for (size_t group = 0; group * kGroupUnits < groups.size(); ++group) {
    lanes[group % kSumLanes] +=
        SumHalves<kGroupUnits>(&groups[group * kGroupUnits]);
  }
  expect(
      SameBits(entropy[0], static_cast<Scalar>(SumHalves<kSumLanes>(lanes) /
                                               static_cast<double>(c.units))),
      "entropy", 0);
  error = BatchEntropyGradCuda(nullptr, dtype, in_place, c.rows, c.units,
                               formula, mean.get(), variance.get(),
                               entropy_grad.get(), mean_grad.get(),
                               variance_grad.get(), in_place, c.blocks);
  expect(error == 0, "success of the gradient in place", 0);
  for (int64_t i = 0; i < elements; ++i) {
    expect(SameBits(in_place[i], dx[i]), "gradient in place", i % c.units);
  }
  error = SetScalarCuda(nullptr, dtype, 2.5, entropy.get());
  expect(error == 0 && entropy[0] == Scalar(2.5), "scalar", 0);
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

// activation(z) and its derivative.
std::pair<double, double> Exact(Activation activation, double z, double alpha) {
  const double sigmoid = 1 / (1 + std::exp(-z));
  switch (activation) {
    case Activation::kLinear:
      return {z, 1};
    case Activation::kRelu:
      return {z > 0 ? z : 0, z > 0};
    case Activation::kLeakyRelu:
      return {z > 0 ? z : alpha * z, z > 0 ? 1 : alpha};
    case Activation::kElu:
      return {z < 0 ? alpha * std::expm1(z) : z,
              z < 0 ? alpha * std::exp(z) : 1};
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
  ++cases;
  bool ok = true;
  const auto expect = [&](bool holds, const char* what, int64_t at) {
    if (holds || !ok) return;
    ok = false;
    ++failures;
    std::fprintf(stderr,
                 "FAILED: %s %lld; dtype %d, z [%lld, %lld], %lld channels, "
                 "activation %d, %d blocks, misaligned by %lld elements\n",
                 what, static_cast<long long>(at), static_cast<int>(dtype),
                 static_cast<long long>(c.rows),
                 static_cast<long long>(c.units),
                 static_cast<long long>(channels), static_cast<int>(activation),
                 c.blocks, static_cast<long long>(c.misaligned));
  };
  using N = Numbers<Element>;
  const Formula formula = {8.5, 0.75, c.units % 2};
  const int64_t elements = c.rows * c.units;
  Buffer<Element> z_storage(elements + c.misaligned),
      dy_storage(elements + c.misaligned), bias(channels);
  Element* z = z_storage.get() + c.misaligned;
  Element* dy = dy_storage.get() + c.misaligned;
  std::mt19937 random(static_cast<unsigned>(elements));
  std::normal_distribution<float> normal(0.25f, 2.f);
  for (int64_t i = 0; i < elements; ++i) {
    z[i] = N::Round(static_cast<Scalar>(normal(random)));
    dy[i] = N::Round(static_cast<Scalar>(normal(random)));
  }
  for (int64_t i = 0; i < channels; ++i) {
    bias[i] = N::Round(static_cast<Scalar>(normal(random)));
  }
  if (c.hard) {
    const Scalar infinity = std::numeric_limits<Scalar>::infinity();
    const Scalar hard[] = {infinity, -infinity, infinity - infinity, 1e-30f,
                           1000,     -1000,     -Scalar(0),          0};
    for (int64_t i = 0; i < elements; i += 5) {
      z[i] = N::Round(hard[i / 5 % 8]);
    }
  }
  Epilogue epilogue;
  epilogue.activation = activation;
  epilogue.alpha = 0.3;
  epilogue.bias = channels == 0 ? nullptr : bias.get();
  epilogue.channels = std::max<int64_t>(channels, 1);
  const Scalar entropy_grad = 40;

  using Outputs = EpilogueResults<Element, Scalar>;
  Outputs cpu(c, channels), cuda(c, channels), in_place(c, channels);
  const Parallel alone = {
      1, nullptr,
      [](void*, int, void (*body)(void*), void* argument) { body(argument); }};
  const auto bytes_of = [](int64_t bytes) { return (bytes + 7) / 8; };
  Buffer<double> cpu_workspace(bytes_of(
      std::max(BatchEntropyForwardCpuWorkspace(dtype, c.rows, c.units, 1),
               EpilogueGradCpuWorkspace(dtype, epilogue, c.rows, c.units))));
  EpilogueForwardCpu(alone, dtype, z, epilogue, c.rows, c.units, formula,
                     cpu_workspace.get(), cpu.y, cpu.mean.get(),
                     cpu.variance.get(), cpu.entropy.get());
  EpilogueGradCpu(alone, dtype, dy, cpu.y, epilogue, c.rows, c.units, formula,
                  cpu.mean.get(), cpu.variance.get(), &entropy_grad,
                  cpu_workspace.get(), cpu.dz, cpu.dbias.get());

  const auto run = [&](const Element* z, const Element* dy, Outputs* to) {
    Buffer<double> workspace(bytes_of(
        BatchEntropyForwardCudaWorkspace(dtype, c.rows, c.units, c.blocks)));
    Buffer<Scalar> valid(1);
    const int& launches = emulation::TheMachine().launches;
    int before = launches;
    int error = EpilogueForwardCuda(nullptr, dtype, z, epilogue, c.rows,
                                    c.units, formula, workspace.get(), to->y,
                                    to->mean.get(), to->variance.get(),
                                    to->entropy.get(), valid.get(), c.blocks);
    expect(error == 0 && valid[0] == 1, "success", 0);
    expect(launches - before <= 2, "kernels launched", launches - before);
    before = launches;
    Buffer<double> sums(
        bytes_of(EpilogueGradCudaWorkspace(dtype, epilogue, c.rows, c.units)));
    error = EpilogueGradCuda(nullptr, dtype, dy, to->y, epilogue, c.rows,
                             c.units, formula, to->mean.get(),
                             to->variance.get(), &entropy_grad, sums.get(),
                             to->dz, to->dbias.get(), c.blocks);
    expect(error == 0, "success of the gradient", 0);
    expect(launches - before <= (channels == 0 ? 1 : 2),
           "kernels launched by the gradient", launches - before);
    for (int64_t i = 0; i < elements; ++i) {
      expect(SameBits(to->y[i], cpu.y[i]), "y", i);
      expect(SameBits(to->dz[i], cpu.dz[i]), "dz", i);
    }
    for (int64_t i = 0; i < channels; ++i) {
      expect(SameBits(to->dbias[i], cpu.dbias[i]), "dbias", i);
    }
    for (int64_t u = 0; u < c.units; ++u) {
      expect(SameBits(to->mean[u], cpu.mean[u]), "mean", u);
      expect(SameBits(to->variance[u], cpu.variance[u]), "variance", u);
    }
    expect(SameBits(to->entropy[0], cpu.entropy[0]), "entropy", 0);
  };
  run(z, dy, &cuda);
  // The tap writes no y: -0 stays, which an addition makes 0.
  if (activation == Activation::kLinear && channels == 0) {
    std::copy_n(z, elements, cpu.y);
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
    const double b = channels == 0 ? 0 : N::Load(bias[u % channels]);
    const auto [y, derivative] =
        Exact(activation, static_cast<double>(N::Load(z[i])) + b, 0.3);
    const double found = N::Load(cuda.y[i]);
    expect(std::fabs(found - y) <= rounding * (std::fabs(y) + 1e-2),
           "the value of y", i);
    const double slope =
        entropy_grad * formula.scale /
        (static_cast<double>(c.units * (c.rows - formula.ddof)) *
         (formula.scale * cuda.variance[u] + formula.offset));
    const double into_y = N::Load(dy[i]) + slope * (found - cuda.mean[u]);
    const double dz = N::Load(cuda.dz[i]);
    expect(std::fabs(dz - derivative * into_y) <=
               rounding * (std::fabs(into_y) + 1),
           "the value of dz", i);
    if (channels == 0) continue;
    sums[u % channels] += dz;
    sizes[u % channels] += std::fabs(dz);
  }
  for (int64_t i = 0; i < channels; ++i) {
    expect(std::fabs(N::Load(cuda.dbias[i]) - sums[i]) <=
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
  for (const Case& c : all) {
    Test<Half, float>(DType::kFloat16, c);
    Test<float, float>(DType::kFloat32, c);
    if (quick && failures != 0) break;
    if (quick) continue;
    Test<BFloat16, float>(DType::kBFloat16, c);
    Test<double, double>(DType::kFloat64, c);
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
  std::printf("cuda_emulation_test: %d cases, %d failed\n", cases, failures);
  return failures != 0;
}

}  // namespace
}  // namespace lbe

int main() { return lbe::Main(); }
