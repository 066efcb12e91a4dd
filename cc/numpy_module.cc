// SPDX-License-Identifier: Apache-2.0
//
// The Python module lbe_ops_numpy: the CPU kernels for NumPy arrays, without
// TensorFlow, and what the build was made for.
//
// For tests, benchmarks and users who have no TensorFlow at hand.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace lbe {
namespace {

// Workers on threads that live for one call.
void RunOnThreads(void*, int workers, void (*body)(void*), void* argument) {
  std::vector<std::thread> threads;
  for (int t = 1; t < workers; ++t) {
    try {
      threads.emplace_back(body, argument);
    } catch (const std::system_error&) {
      break;  // the system has no more; those that run do the rest
    }
  }
  body(argument);
  for (std::thread& thread : threads) thread.join();
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

DType DTypeOf(const py::array& x) {
  const std::string name = py::str(x.dtype().attr("name"));
  const bool native = x.dtype().attr("isnative").cast<bool>();
#define LBE_DTYPE(dtype, element, result, tensorflow_name, numpy_name) \
  if (native && name == numpy_name) return DType::dtype;
  LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  throw py::type_error(
      "x must be a float16, bfloat16 (ml_dtypes), float32 or float64 array in "
      "the machine's byte order. Received: dtype " +
      name + (native ? "" : " in the other byte order"));
}

// The array in C order; numpy's own error where there is no memory for a copy.
py::array Contiguous(const py::array& array) {
  return py::module_::import("numpy").attr("asarray")(array,
                                                      py::arg("order") = "C");
}

// x as [rows, units] with what every call needs to know of it.
struct Batch {
  py::array x;  // C-contiguous
  DType dtype;
  int64_t rows;
  int64_t units;
  std::vector<py::ssize_t> unit_shape;
  py::dtype result;
  Formula formula;
  int threads;
  Parallel parallel;

  Batch(const py::array& array, double scale, double offset, int64_t ddof,
        int thread_count)
      : x(Contiguous(array)), threads(thread_count) {
    dtype = DTypeOf(x);
    if (x.ndim() < 1) {
      throw py::value_error(
          "x must have shape [batch, ...]. Received: a scalar");
    }
    rows = x.shape(0);
    units = 1;
    for (py::ssize_t i = 1; i < x.ndim(); ++i) {
      unit_shape.push_back(x.shape(i));
      units *= x.shape(i);
    }
    if (rows < 2 || units < 1) {
      throw py::value_error(
          "x must have at least 2 samples and 1 unit. Received: " +
          std::to_string(rows) + " samples, " + std::to_string(units) +
          " units");
    }
    formula = {scale, offset, ddof};
    if (!IsServed(formula)) {
      throw py::value_error(
          "ddof must be 0 or 1, scale from 1e-12 to 1e12, offset 0 or in the "
          "same range. Received: ddof=" +
          std::to_string(ddof) +
          ", scale=" + std::string(py::str(py::float_(scale))) +
          ", offset=" + std::string(py::str(py::float_(offset))));
    }
    if (threads < 1) {
      throw py::value_error("threads must be at least 1. Received: " +
                            std::to_string(threads));
    }
    result = dtype == DType::kFloat64 ? py::dtype::of<double>()
                                      : py::dtype::of<float>();
    parallel = {threads, nullptr, RunOnThreads};
  }
  Batch(const Batch&) = delete;

  // `array` as statistics or their gradients: the units' shape, the result's
  // type.
  py::array Statistics(const py::object& array, const char* name) const {
    const py::array values =
        Contiguous(py::array(array).attr("astype")(result));
    if (std::vector<py::ssize_t>(
            values.shape(), values.shape() + values.ndim()) != unit_shape) {
      throw py::value_error(std::string(name) +
                            " must have the shape of one sample, x.shape[1:]. "
                            "Received: " +
                            std::string(py::str(values.attr("shape"))));
    }
    return values;
  }
};

py::tuple Forward(const py::array& x, double scale, double offset, int64_t ddof,
                  int threads) {
  Batch batch(x, scale, offset, ddof, threads);
  py::array mean(batch.result, batch.unit_shape);
  py::array variance(batch.result, batch.unit_shape);
  py::array entropy(batch.result, std::vector<py::ssize_t>{});
  const int64_t bytes = BatchEntropyForwardCpuWorkspace(batch.dtype, batch.rows,
                                                        batch.units, threads);
  const std::unique_ptr<void, FreeDeleter> workspace(
      std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (workspace == nullptr) throw std::bad_alloc();
  const void* data = batch.x.data();
  void* mean_data = mean.mutable_data();
  void* variance_data = variance.mutable_data();
  void* entropy_data = entropy.mutable_data();
  {
    py::gil_scoped_release release;
    BatchEntropyForwardCpu(batch.parallel, batch.dtype, data, batch.rows,
                           batch.units, batch.formula, workspace.get(),
                           mean_data, variance_data, entropy_data);
  }
  return py::make_tuple(entropy[py::make_tuple()], mean, variance);
}

py::array Gradient(const py::array& x, const py::object& mean,
                   const py::object& variance, double entropy_grad,
                   const py::object& mean_grad, const py::object& variance_grad,
                   double scale, double offset, int64_t ddof, int threads) {
  Batch batch(x, scale, offset, ddof, threads);
  if (mean_grad.is_none() != variance_grad.is_none()) {
    throw py::value_error("mean_grad and variance_grad must be given together");
  }
  const py::array means = batch.Statistics(mean, "mean");
  const py::array variances = batch.Statistics(variance, "variance");
  py::array mean_grads, variance_grads;
  const bool statistics = !mean_grad.is_none();
  if (statistics) {
    mean_grads = batch.Statistics(mean_grad, "mean_grad");
    variance_grads = batch.Statistics(variance_grad, "variance_grad");
  }
  py::array dx(batch.x.dtype(),
               std::vector<py::ssize_t>(batch.x.shape(),
                                        batch.x.shape() + batch.x.ndim()));
  const float narrow_grad = static_cast<float>(entropy_grad);
  const void* grad = batch.dtype == DType::kFloat64
                         ? static_cast<const void*>(&entropy_grad)
                         : static_cast<const void*>(&narrow_grad);
  void* dx_data = dx.mutable_data();
  {
    py::gil_scoped_release release;
    BatchEntropyGradCpu(batch.parallel, batch.dtype, batch.x.data(), batch.rows,
                        batch.units, batch.formula, means.data(),
                        variances.data(), grad,
                        statistics ? mean_grads.data() : nullptr,
                        statistics ? variance_grads.data() : nullptr, dx_data);
  }
  return dx;
}

py::dict BuildInfo() {
  py::dict info;
  info["version"] = LBE_VERSION;
  info["tensorflow"] = LBE_TENSORFLOW_VERSION;
  info["compiler"] = LBE_COMPILER;
  info["build_type"] = LBE_BUILD_TYPE;
  info["simd"] = "baseline avx2 avx512";
  info["cuda"] = "no";
  info["xla"] = "no";
  return info;
}

}  // namespace
}  // namespace lbe

PYBIND11_MODULE(lbe_ops_numpy, module) {
  module.doc() =
      "Batch entropy of NumPy arrays by the CPU kernels of lbe_ops, without "
      "TensorFlow.";
  const double pi_e = 8.539734222673566;
  module.def(
      "batch_entropy", &lbe::Forward, py::arg("x"), py::kw_only(),
      py::arg("scale") = pi_e, py::arg("offset") = 1.0, py::arg("ddof") = 0,
      py::arg("threads") = 1,
      R"(Batch entropy and the statistics of every unit, in one pass over x.

Args:
    x: [batch, ...], at least 2 samples; float16, bfloat16 (ml_dtypes), float32 or
        float64. Copied if it is not C-contiguous.
    scale, offset, ddof: see lbe_ops.batch_entropy.
    threads: how many threads; the result has the same bits for any number.

Returns:
    (entropy, mean, variance): a scalar and two arrays of shape x.shape[1:], float32
    (float64 for float64).

Example:
    >>> lbe_ops_numpy.batch_entropy(np.float32([[0, 1], [2, 1]]))[2]
    array([1., 0.], dtype=float32))");
  module.def(
      "batch_entropy_grad", &lbe::Gradient, py::arg("x"), py::arg("mean"),
      py::arg("variance"), py::arg("entropy_grad") = 1.0, py::kw_only(),
      py::arg("mean_grad") = py::none(), py::arg("variance_grad") = py::none(),
      py::arg("scale") = pi_e, py::arg("offset") = 1.0, py::arg("ddof") = 0,
      py::arg("threads") = 1,
      R"(Gradient with respect to x, of x's shape and dtype, of

    entropy_grad * entropy + sum(mean_grad * mean + variance_grad * variance).

Args:
    x, scale, offset, ddof, threads: as for batch_entropy.
    mean, variance: what batch_entropy returned for x.
    entropy_grad: scalar.
    mean_grad, variance_grad: arrays of shape x.shape[1:], both or none.)");
  module.def(
      "simd_level", &lbe::CpuSimdLevel,
      "The instruction set in use: 'avx512', 'avx2' or 'baseline'. The "
      "environment variable LBE_OPS_SIMD, read once, names a lower one.");
  module.def("build_info", &lbe::BuildInfo,
             "What the library was built for and with, as a dict of strings.");
}
