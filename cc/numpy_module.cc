// SPDX-License-Identifier: Apache-2.0
//
// The Python module lbe_ops_numpy: the CPU kernels for NumPy arrays and,
// through cuda_arrays.h, the CUDA kernels for arrays on a GPU, without
// TensorFlow; and what the build was made for.
//
// For tests, benchmarks and users who have no TensorFlow at hand.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "batch.h"
#include "cuda_arrays.h"
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

// Whether an array is in the memory of a GPU. An error that is no lack of the
// attribute says why not: PyTorch's, for a tensor that requires a gradient.
bool IsCudaArray(const py::object& array) {
  PyObject* const interface =
      PyObject_GetAttrString(array.ptr(), "__cuda_array_interface__");
  if (interface == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
      throw py::error_already_set();
    }
    PyErr_Clear();
    return false;
  }
  Py_DECREF(interface);
  return true;
}

// The arguments of a call that are neither arrays nor the formula.
struct Options {
  int threads;
  CudaOptions cuda;
};

// Whether to run on a GPU. Throws where x is no array, or one of the other kind
// than the arguments.
bool RunsOnGpu(const py::object& x, const Options& options) {
  if (IsCudaArray(x)) {
#ifdef LBE_CUDA
    return true;
#else
    throw std::runtime_error(
        "x is a CUDA array, and this lbe_ops_numpy was built without CUDA: "
        "rebuild it where there is a CUDA compiler (LBE_CUDA=ON pip install "
        "...)");
#endif
  }
  if (!py::isinstance<py::array>(x)) {
    throw py::type_error(
        "x must be a NumPy array, or a CUDA array with "
        "__cuda_array_interface__. Received: " +
        std::string(py::str(py::type::of(x))));
  }
  if (!options.cuda.dtype.is_none() || !options.cuda.stream.is_none() ||
      !options.cuda.workspace.is_none()) {
    throw py::value_error(
        "dtype, stream and workspace are for CUDA arrays. Received: a NumPy "
        "array");
  }
  if (options.threads < 1) {
    throw py::value_error("threads must be at least 1. Received: " +
                          std::to_string(options.threads));
  }
  return false;
}

py::array AsNumPy(const py::object& array, const char* name) {
  if (IsCudaArray(array)) {
    throw py::type_error(std::string("x is a NumPy array and ") + name +
                         " is a CUDA array: all of them must lie in the same "
                         "memory");
  }
  return py::array(array);
}

Shape ShapeOf(const py::array& array) {
  return Shape(array.shape(), array.shape() + array.ndim());
}

py::dtype ResultType(const Batch& batch) {
  return batch.dtype == DType::kFloat64 ? py::dtype::of<double>()
                                        : py::dtype::of<float>();
}

// `array` as statistics or their gradients: the units' shape, the result's
// type.
py::array Statistics(const Batch& batch, const py::object& array,
                     const char* name) {
  const py::array values =
      Contiguous(AsNumPy(array, name).attr("astype")(ResultType(batch)));
  if (ShapeOf(values) != batch.unit_shape) {
    throw py::value_error(std::string(name) +
                          " must have the shape of one sample, x.shape[1:]. "
                          "Received: " +
                          std::string(py::str(values.attr("shape"))));
  }
  return values;
}

// `array` as what a kernel writes to; a new one where it is none.
py::array Output(const py::object& array, const char* name, const Shape& shape,
                 const py::dtype& dtype) {
  if (array.is_none()) return py::array(dtype, shape);
  py::array output = AsNumPy(array, name);
  if (output.ptr() != array.ptr() || ShapeOf(output) != shape ||
      !output.dtype().equal(dtype) || !output.writeable() ||
      !(output.flags() & py::array::c_style)) {
    throw py::value_error(
        std::string(name) + " must be a writable array in C order of shape " +
        Text(shape) + " and dtype " + std::string(py::str(dtype)) +
        ". Received: shape " + std::string(py::str(output.attr("shape"))) +
        " and dtype " + std::string(py::str(output.dtype())));
  }
  return output;
}

py::tuple Forward(const py::object& x, const Formula& formula,
                  const Options& options, const py::object& out) {
#ifdef LBE_CUDA
  if (RunsOnGpu(x, options)) {
    return CudaForward(x, formula, options.cuda, out);
  }
#else
  RunsOnGpu(x, options);
#endif
  const py::array array = Contiguous(x);
  const Batch batch(DTypeOf(array), ShapeOf(array), formula);
  py::object outputs[3];
  if (!out.is_none()) {
    const auto given = py::tuple(out);
    if (given.size() != 3) {
      throw py::value_error(
          "out must be (entropy, mean, variance). Received: " +
          std::to_string(given.size()) + " arrays");
    }
    for (int i = 0; i < 3; ++i) outputs[i] = given[i];
  } else {
    for (py::object& output : outputs) output = py::none();
  }
  const py::dtype result = ResultType(batch);
  py::array entropy = Output(outputs[0], "out[0]", {}, result);
  py::array mean = Output(outputs[1], "out[1]", batch.unit_shape, result);
  py::array variance = Output(outputs[2], "out[2]", batch.unit_shape, result);
  const int64_t bytes = BatchEntropyForwardCpuWorkspace(
      batch.dtype, batch.rows, batch.units, options.threads);
  const std::unique_ptr<void, FreeDeleter> workspace(
      std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (workspace == nullptr) throw std::bad_alloc();
  const void* data = array.data();
  void* mean_data = mean.mutable_data();
  void* variance_data = variance.mutable_data();
  void* entropy_data = entropy.mutable_data();
  {
    py::gil_scoped_release release;
    BatchEntropyForwardCpu({options.threads, nullptr, RunOnThreads},
                           batch.dtype, data, batch.rows, batch.units, formula,
                           workspace.get(), mean_data, variance_data,
                           entropy_data);
  }
  if (!out.is_none()) return py::make_tuple(entropy, mean, variance);
  return py::make_tuple(entropy[py::make_tuple()], mean, variance);
}

py::object Gradient(const py::object& x, const py::object& mean,
                    const py::object& variance, const py::object& entropy_grad,
                    const py::object& mean_grad,
                    const py::object& variance_grad, const py::object& dx,
                    const Formula& formula, const Options& options) {
  const bool gpu = RunsOnGpu(x, options);
  if (mean_grad.is_none() != variance_grad.is_none()) {
    throw py::value_error("mean_grad and variance_grad must be given together");
  }
#ifdef LBE_CUDA
  if (gpu) {
    return CudaGradient(x, mean, variance, entropy_grad, mean_grad,
                        variance_grad, dx, formula, options.cuda);
  }
#else
  static_cast<void>(gpu);
#endif
  const py::array array = Contiguous(x);
  const Batch batch(DTypeOf(array), ShapeOf(array), formula);
  const py::array means = Statistics(batch, mean, "mean");
  const py::array variances = Statistics(batch, variance, "variance");
  py::array mean_grads, variance_grads;
  const bool statistics = !mean_grad.is_none();
  if (statistics) {
    mean_grads = Statistics(batch, mean_grad, "mean_grad");
    variance_grads = Statistics(batch, variance_grad, "variance_grad");
  }
  py::array output = Output(dx, "dx", batch.shape, array.dtype());
  if (IsCudaArray(entropy_grad)) AsNumPy(entropy_grad, "entropy_grad");
  const double number = PyFloat_AsDouble(entropy_grad.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  alignas(8) char grad[8];
  SetScalar(batch.dtype, number, grad);
  void* dx_data = output.mutable_data();
  {
    py::gil_scoped_release release;
    BatchEntropyGradCpu({options.threads, nullptr, RunOnThreads}, batch.dtype,
                        array.data(), batch.rows, batch.units, formula,
                        means.data(), variances.data(), grad,
                        statistics ? mean_grads.data() : nullptr,
                        statistics ? variance_grads.data() : nullptr, dx_data);
  }
  return std::move(output);
}

#ifdef LBE_CUDA
// CUDA's way to write a version: 13020 is 13.2.
std::string CudaVersion(int number) {
  if (number == 0) return "none";
  return std::to_string(number / 1000) + "." +
         std::to_string(number % 1000 / 10);
}
#endif

py::dict CudaSystemInfo() {
  py::dict info;
#ifdef LBE_CUDA
  const CudaSystem system = DescribeCuda();
  info["toolkit"] = CudaVersion(system.toolkit);
  info["driver"] = CudaVersion(system.driver);
  info["device"] = system.device;
  info["compute_capability"] = std::to_string(system.compute_capability / 10) +
                               "." +
                               std::to_string(system.compute_capability % 10);
  const char* problem = "";
  if (system.error != 0) {
    problem = system.driver == 0 ? "there is no NVIDIA driver"
                                 : CudaErrorMessage(system.error);
  }
  info["problem"] = problem;
#else
  for (const char* name :
       {"toolkit", "driver", "device", "compute_capability"}) {
    info[name] = "";
  }
  info["problem"] = "built without CUDA";
#endif
  return info;
}

py::dict BuildInfo() {
  py::dict info;
  info["version"] = LBE_VERSION;
  info["tensorflow"] = LBE_TENSORFLOW_VERSION;
  info["compiler"] = LBE_COMPILER;
  info["build_type"] = LBE_BUILD_TYPE;
  info["simd"] = "baseline avx2 avx512";
  info["cuda"] = LBE_CUDA_TARGETS;
  return info;
}

}  // namespace
}  // namespace lbe

PYBIND11_MODULE(LBE_MODULE, module) {
  using lbe::kCudaBlocks;
  using py::object;
  module.doc() =
      "Batch entropy of NumPy arrays by the CPU kernels of lbe_ops, and of "
      "CUDA "
      "arrays by its CUDA kernels, without TensorFlow.";
  const double pi_e = 8.539734222673566;
  module.def(
      "batch_entropy",
      [](const object& x, double scale, double offset, int64_t ddof,
         int threads, const object& out, const object& dtype,
         const object& stream, const object& workspace, int blocks) {
        return lbe::Forward(x, {scale, offset, ddof},
                            {threads, {dtype, stream, workspace, blocks}}, out);
      },
      py::arg("x"), py::kw_only(), py::arg("scale") = pi_e,
      py::arg("offset") = 1.0, py::arg("ddof") = 0, py::arg("threads") = 1,
      py::arg("out") = py::none(), py::arg("dtype") = py::none(),
      py::arg("stream") = py::none(), py::arg("workspace") = py::none(),
      py::arg("blocks") = kCudaBlocks,
      R"(Batch entropy and the statistics of every unit, in one pass over x.

Args:
    x: [batch, ...], at least 2 samples; float16, bfloat16, float32 or float64. A
        NumPy array (bfloat16: ml_dtypes), copied if it is not C-contiguous; or an
        array on a GPU, contiguous, with __cuda_array_interface__: CuPy, PyTorch, JAX.
    scale, offset, ddof: see lbe_ops.batch_entropy.
    threads: how many threads for NumPy arrays; the result has the same bits for any
        number, and on a GPU.
    out: (entropy, mean, variance), arrays to write the results to.

For CUDA arrays:
    dtype: "bfloat16" or "float16" where x holds such bits as integers: for libraries
        that have no name for bfloat16 in that interface.
    stream: a cudaStream_t as an integer, by default the legacy default stream. Nothing
        waits for the GPU. x is read after what its own stream, where the interface
        names one, has been given so far.
    workspace: memory for intermediate results, of cuda_workspace_bytes(x) bytes.
    blocks: how many blocks of threads to aim for; the result never depends on it.

Returns:
    (entropy, mean, variance): a scalar and two arrays of shape x.shape[1:], float32
    (float64 for float64). On a GPU, three CudaArrays.

Example:
    >>> lbe_ops_numpy.batch_entropy(np.float32([[0, 1], [2, 1]]))[2]
    array([1., 0.], dtype=float32))");
  module.def(
      "batch_entropy_grad",
      [](const object& x, const object& mean, const object& variance,
         const object& entropy_grad, const object& mean_grad,
         const object& variance_grad, const object& dx, double scale,
         double offset, int64_t ddof, int threads, const object& dtype,
         const object& stream, int blocks) {
        return lbe::Gradient(x, mean, variance, entropy_grad, mean_grad,
                             variance_grad, dx, {scale, offset, ddof},
                             {threads, {dtype, stream, py::none(), blocks}});
      },
      py::arg("x"), py::arg("mean"), py::arg("variance"),
      py::arg("entropy_grad") = 1.0, py::kw_only(),
      py::arg("mean_grad") = py::none(), py::arg("variance_grad") = py::none(),
      py::arg("dx") = py::none(), py::arg("scale") = pi_e,
      py::arg("offset") = 1.0, py::arg("ddof") = 0, py::arg("threads") = 1,
      py::arg("dtype") = py::none(), py::arg("stream") = py::none(),
      py::arg("blocks") = kCudaBlocks,
      R"(Gradient with respect to x, of x's shape and dtype, of

    entropy_grad * entropy + sum(mean_grad * mean + variance_grad * variance).

Args:
    x, scale, offset, ddof, threads, dtype, stream, blocks: as for batch_entropy.
    mean, variance: what batch_entropy returned for x.
    entropy_grad: a number; for CUDA arrays also one on the GPU, of the entropy's type.
    mean_grad, variance_grad: arrays of shape x.shape[1:], both or none.
    dx: an array to write the gradient to; may be x itself.)");
  module.def(
      "simd_level", &lbe::CpuSimdLevel,
      "The instruction set in use: 'avx512', 'avx2' or 'baseline'. The "
      "environment variable LBE_OPS_SIMD, read once, names a lower one.");
  module.def("build_info", &lbe::BuildInfo,
             "What the library was built for and with, as a dict of strings.");
  module.def("cuda_system", &lbe::CudaSystemInfo,
             "The GPU that CUDA arrays would be on, as a dict of strings; "
             "'problem' is why there is none, or empty.");
#ifdef LBE_CUDA
  lbe::DefineCudaArrays(module);
  module.def(
      "cuda_workspace_bytes",
      [](const object& x, const object& dtype, int blocks) {
        return lbe::CudaWorkspaceBytes(x,
                                       {dtype, py::none(), py::none(), blocks});
      },
      py::arg("x"), py::kw_only(), py::arg("dtype") = py::none(),
      py::arg("blocks") = kCudaBlocks,
      "Bytes of batch_entropy's workspace for a CUDA array x.");
#endif
}
