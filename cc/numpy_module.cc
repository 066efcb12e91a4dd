// SPDX-License-Identifier: Apache-2.0
//
// The Python module lbe_ops_numpy: the CPU kernels for NumPy arrays and,
// through cuda_arrays.h, the CUDA kernels for arrays on a GPU, without
// TensorFlow; and what the build was made for.
//
// For tests, benchmarks and users who have no TensorFlow at hand.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_arrays.h"
#include "kernels.h"
#include "numpy_batch.h"

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

// Memory for intermediate results, as the CPU kernels want it.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes == 0) return;
    data_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  void* data() const { return data_.get(); }

 private:
  struct FreeDeleter {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, FreeDeleter> data_;
};

std::string NameOf(const py::dtype& dtype) { return py::str(dtype); }

DType DTypeOf(const py::array& x, const char* argument) {
  const py::dtype dtype = x.dtype();
  const bool native = dtype.byteorder() == '=' || dtype.byteorder() == '|';
  // Several times faster than the dtype's own name.
  const py::object name = dtype.attr("type").attr("__name__");
#define LBE_DTYPE(value, element, result, tensorflow_name, numpy_name)         \
  if (native && PyUnicode_CompareWithASCIIString(name.ptr(), numpy_name) == 0) \
    return DType::value;
  LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  throw py::type_error(
      std::string(argument) +
      " must be a float16, bfloat16 (ml_dtypes), float32 or float64 array in "
      "the machine's byte order. Received: dtype " +
      std::string(py::str(dtype.attr("name"))) +
      (native ? "" : " in the other byte order"));
}

// The interface of an array in the memory of a GPU; None where it is no such
// array. An error that is no lack of the attribute says why not: PyTorch's, for
// a tensor that requires a gradient.
py::object CudaInterfaceOf(const py::object& array) {
  if (py::isinstance<py::array>(array)) return py::none();
  PyObject* const interface =
      PyObject_GetAttrString(array.ptr(), "__cuda_array_interface__");
  if (interface == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
      throw py::error_already_set();
    }
    PyErr_Clear();
    return py::none();
  }
  return py::reinterpret_steal<py::object>(interface);
}

Shape ShapeOfArray(const py::array& array) {
  return Shape(array.shape(), array.shape() + array.ndim());
}

bool AreEqual(const py::dtype& a, const py::dtype& b) {
  return a.is(b) || a.equal(b);
}

// Arrays in the memory of the host. What is read is copied where it is not in C
// order; statistics may be anything that NumPy makes an array of their type of.
class NumPyArrays : public Arrays {
 public:
  NumPyArrays(const py::array& x, const char* name, const Options& options)
      : NumPyArrays(
            Contiguous(x),
            Batch(name, DTypeOf(x, name), ShapeOfArray(x), options.formula),
            options.threads) {}

  const void* ReadEntropyGrad(const py::object& value) override {
    if (!CudaInterfaceOf(value).is_none()) {
      WrongMemory("entropy_grad", "number or a NumPy", value);
    }
    const double number = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    SetScalar(batch().problem.dtype, number, entropy_grad_);
    return entropy_grad_;
  }

 protected:
  Found Input(const py::object& array, const char* name, Form form) override {
    if (!CudaInterfaceOf(array).is_none()) WrongMemory(name, "NumPy", array);
    py::array values(array);
    const py::dtype dtype = DTypeFor(form);
    if (IsOfResultType(form) && !AreEqual(values.dtype(), dtype)) {
      values = values.attr("astype")(dtype);
    }
    CheckForm(values, name, form, dtype);
    values = Contiguous(values);
    return {values, const_cast<void*>(values.data())};
  }

  Found Output(const py::object& array, const char* name, Form form) override {
    if (!py::isinstance<py::array>(array)) WrongMemory(name, "NumPy", array);
    auto output = py::reinterpret_borrow<py::array>(array);
    CheckForm(output, name, form, DTypeFor(form));
    if (!output.writeable()) ReadOnly(name);
    if (!Contiguous(output).is(output)) {
      if (output.flags() & py::array::c_style) NotAligned(name);
      NotContiguous(name, ShapeOfArray(output),
                    py::str(output.attr("strides")));
    }
    return {output, output.mutable_data()};
  }

  Found New(Form form) override {
    py::array array(DTypeFor(form), ShapeOf(form));
    return {array, array.mutable_data()};
  }

  void Launch(ForwardArguments arguments) override {
    const Problem& problem = batch().problem;
    const Workspace workspace(ForwardCpuWorkspace(problem, parallel_.threads));
    arguments.workspace = workspace.data();
    const py::gil_scoped_release release;
    ForwardCpu(parallel_, problem, arguments);
  }

  void Launch(GradientArguments arguments) override {
    const Problem& problem = batch().problem;
    const Workspace workspace(
        arguments.dbias == nullptr
            ? 0
            : GradientCpuWorkspace(problem, arguments.epilogue->channels));
    arguments.workspace = workspace.data();
    const py::gil_scoped_release release;
    GradientCpu(parallel_, problem, arguments);
  }

 private:
  NumPyArrays(py::array x, Batch batch, int threads)
      : Arrays(std::move(batch), const_cast<void*>(x.data())),
        x_(std::move(x)),
        parallel_{threads, nullptr, RunOnThreads} {
    if (threads < 1) {
      throw py::value_error("threads must be at least 1. Received: " +
                            std::to_string(threads));
    }
  }

  py::dtype DTypeFor(Form form) const {
    if (!IsOfResultType(form)) return x_.dtype();
    return batch().problem.dtype == DType::kFloat64 ? py::dtype::of<double>()
                                                    : py::dtype::of<float>();
  }

  void CheckForm(const py::array& array, const char* name, Form form,
                 const py::dtype& dtype) const {
    const Shape& shape = ShapeOf(form);
    if (!std::equal(shape.begin(), shape.end(), array.shape(),
                    array.shape() + array.ndim()) ||
        !AreEqual(array.dtype(), dtype)) {
      WrongForm(name, form, NameOf(dtype), ShapeOfArray(array),
                NameOf(array.dtype()));
    }
  }

  py::array x_;
  Parallel parallel_;
  alignas(8) char entropy_grad_[8];
};

// The arrays of a call with x, which it calls `name`. Throws where x is no
// array, or options are for arrays of the other kind.
std::unique_ptr<Arrays> MakeArrays(const py::object& x, const char* name,
                                   const Options& options) {
  const py::object interface = CudaInterfaceOf(x);
  if (!interface.is_none()) {
#ifdef LBE_CUDA
    return MakeCudaArrays(x, interface, name, options);
#else
    throw std::runtime_error(
        std::string(name) +
        " is a CUDA array, and this lbe_ops_numpy was built without CUDA: "
        "rebuild it where there is a CUDA compiler (LBE_CUDA=ON pip install "
        "...)");
#endif
  }
  if (!py::isinstance<py::array>(x)) {
    throw py::type_error(std::string(name) +
                         " must be a NumPy array, or a CUDA array with "
                         "__cuda_array_interface__. Received: " +
                         TypeOf(x));
  }
  if (!options.dtype.is_none() || !options.stream.is_none() ||
      !options.workspace.is_none()) {
    throw py::value_error(
        "dtype, stream and workspace are for CUDA arrays. Received: a NumPy "
        "array");
  }
  return std::make_unique<NumPyArrays>(py::reinterpret_borrow<py::array>(x),
                                       name, options);
}

// Runs the forward pass. Returns (entropy, mean, variance): what is in `out`,
// unless it is None.
py::tuple RunForward(Arrays* arrays, const py::object& out,
                     ForwardArguments arguments) {
  py::object entropy = py::none(), mean = py::none(), variance = py::none();
  if (!out.is_none()) {
    const py::tuple given(out);
    if (given.size() != 3) {
      throw py::value_error(
          "out must be (entropy, mean, variance). Received: " +
          std::to_string(given.size()) + " arrays");
    }
    entropy = given[0];
    mean = given[1];
    variance = given[2];
  }
  arguments.x = arrays->x();
  arguments.entropy = arrays->Write(&entropy, "out[0]", Form::kScalar);
  arguments.mean = arrays->Write(&mean, "out[1]", Form::kSample);
  arguments.variance = arrays->Write(&variance, "out[2]", Form::kSample);
  arrays->Run(arguments);
  if (out.is_none() && py::isinstance<py::array>(entropy)) {
    entropy = entropy[py::make_tuple()];
  }
  return py::make_tuple(entropy, mean, variance);
}

py::object BatchEntropy(Options options, const py::object& x,
                        const py::object& out, const py::object& workspace) {
  options.workspace = workspace;
  return RunForward(MakeArrays(x, "x", options).get(), out, {});
}

py::object BatchEntropyGrad(Options options, const py::object& x,
                            const py::object& mean, const py::object& variance,
                            const py::object& entropy_grad,
                            const py::object& mean_grad,
                            const py::object& variance_grad, py::object dx) {
  const auto arrays = MakeArrays(x, "x", options);
  if (mean_grad.is_none() != variance_grad.is_none()) {
    throw py::value_error("mean_grad and variance_grad must be given together");
  }
  GradientArguments arguments;
  arguments.x = arrays->x();
  arguments.mean = arrays->Read(mean, "mean", Form::kSample);
  arguments.variance = arrays->Read(variance, "variance", Form::kSample);
  arguments.entropy_grad = arrays->ReadEntropyGrad(entropy_grad);
  arguments.mean_grad =
      arrays->ReadUnlessNone(mean_grad, "mean_grad", Form::kSample);
  arguments.variance_grad =
      arrays->ReadUnlessNone(variance_grad, "variance_grad", Form::kSample);
  arguments.dx = arrays->Write(&dx, "dx", Form::kLikeX);
  arrays->Run(arguments);
  return dx;
}

#define LBE_ACTIVATION(value, keras_name) " '" keras_name "'"
constexpr char kServedActivations[] = LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION);
#undef LBE_ACTIVATION

Activation ActivationOf(const py::object& name) {
  const bool is_text = py::isinstance<py::str>(name);
#define LBE_ACTIVATION(value, keras_name)                              \
  if (is_text &&                                                       \
      PyUnicode_CompareWithASCIIString(name.ptr(), keras_name) == 0) { \
    return Activation::value;                                          \
  }
  LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
  throw py::value_error(std::string("activation must be one of") +
                        kServedActivations +
                        ". Received: " + std::string(py::repr(name)));
}

Epilogue EpilogueOf(const py::object& activation, double slope,
                    const Batch& batch) {
  if (!(slope >= 0 && slope < HUGE_VAL)) {
    throw py::value_error("slope must be a number of at least 0. Received: " +
                          std::string(py::str(py::float_(slope))));
  }
  Epilogue epilogue;
  epilogue.activation = ActivationOf(activation);
  epilogue.slope = slope;
  epilogue.channels = batch.channels[0];
  return epilogue;
}

py::object EpilogueForward(Options options, const py::object& z,
                           const py::object& bias, const py::object& activation,
                           double slope, py::object y, const py::object& out,
                           const py::object& workspace) {
  options.workspace = workspace;
  const auto arrays = MakeArrays(z, "z", options);
  Epilogue epilogue = EpilogueOf(activation, slope, arrays->batch());
  if (!bias.is_none()) arrays->batch().CheckChannels();
  epilogue.bias = arrays->ReadUnlessNone(bias, "bias", Form::kChannels);
  ForwardArguments arguments;
  arguments.epilogue = &epilogue;
  arguments.y = arrays->Write(&y, "y", Form::kLikeX);
  const py::tuple results = RunForward(arrays.get(), out, arguments);
  return py::make_tuple(y, results[0], results[1], results[2]);
}

py::object EpilogueGrad(Options options, const py::object& dy,
                        const py::object& y, const py::object& mean,
                        const py::object& variance,
                        const py::object& entropy_grad,
                        const py::object& activation, double slope,
                        bool bias_grad, py::object dz, py::object dbias,
                        const py::object& workspace) {
  options.workspace = workspace;
  const auto arrays = MakeArrays(y, "y", options);
  const Epilogue epilogue = EpilogueOf(activation, slope, arrays->batch());
  GradientArguments arguments;
  arguments.x = arrays->x();
  arguments.epilogue = &epilogue;
  arguments.dy = arrays->Read(dy, "dy", Form::kLikeX);
  arguments.mean = arrays->Read(mean, "mean", Form::kSample);
  arguments.variance = arrays->Read(variance, "variance", Form::kSample);
  arguments.entropy_grad = arrays->ReadEntropyGrad(entropy_grad);
  arguments.dx = arrays->Write(&dz, "dz", Form::kLikeX);
  if (bias_grad || !dbias.is_none()) {
    arrays->batch().CheckChannels();
    arguments.dbias = arrays->Write(&dbias, "dbias", Form::kChannels);
  }
  arrays->Run(arguments);
  return py::make_tuple(dz, dbias);
}

#ifdef LBE_CUDA
// CUDA's way to write a version: 13020 is 13.2.
std::string CudaVersion(int number) {
  if (number == 0) return "none";
  return std::to_string(number / 1000) + "." +
         std::to_string(number % 1000 / 10);
}
#endif

py::dict CudaSystemInfo([[maybe_unused]] int device) {
  py::dict info;
#ifdef LBE_CUDA
  const CudaSystem system = DescribeCuda(device);
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
  info["simd"] = CpuSimdLevels();
  info["cuda"] = LBE_CUDA_TARGETS;
  return info;
}

// Defines `function`, whose first argument is the options: Python's come after
// its own arguments, which `extra` names.
template <typename... Own, typename... Extra>
void Define(py::module_& module, const char* name, const char* documentation,
            py::object (*function)(Options, Own...), const Extra&... extra) {
  module.def(
      name,
      [function](Own... own, double scale, double offset, int64_t ddof,
                 int threads, const py::object& dtype, const py::object& stream,
                 int blocks) {
        return function({{scale, offset, ddof}, threads, dtype, stream, blocks},
                        std::forward<Own>(own)...);
      },
      extra..., py::arg("scale") = kPiE, py::arg("offset") = 1.0,
      py::arg("ddof") = 0, py::arg("threads") = 1,
      py::arg("dtype") = py::none(), py::arg("stream") = py::none(),
      py::arg("blocks") = 0, documentation);
}

void DefineBatchEntropy(py::module_& module) {
  const py::none none;
  Define(module, "batch_entropy",
         R"(Batch entropy and the statistics of every unit, in one pass over x.

Args:
    x: [batch, ...], at least 2 samples; float16, bfloat16, float32 or float64. A
        NumPy array (bfloat16: ml_dtypes), copied if it is not C-contiguous and aligned;
        or an array on a GPU, contiguous, with __cuda_array_interface__: CuPy, PyTorch,
        JAX.
    scale, offset, ddof: see lbe_ops.batch_entropy.
    threads: how many threads for NumPy arrays; the result has the same bits for any
        number, and on a GPU.
    out: (entropy, mean, variance), arrays to write the results to.

For CUDA arrays:
    dtype: "bfloat16" or "float16" where x holds such bits as integers: for libraries
        that have no name for bfloat16 in that interface.
    stream: a cudaStream_t as an integer, by default the legacy default stream. Nothing
        waits for the GPU. An array is read and written after what its own stream, where
        its interface names one, has been given so far; what that stream is given later
        comes after this call.
    workspace: memory for intermediate results, of cuda_workspace_bytes(x) bytes. One
        workspace, one stream: calls that may run at the same time, on two streams or in
        two CUDA graphs, need two.
    blocks: how many blocks of threads to aim for, 0 for as many as suit the kernels;
        the result never depends on it.

Returns:
    (entropy, mean, variance): a scalar and two arrays of shape x.shape[1:], float32
    (float64 for float64). On a GPU, three CudaArrays.

Raises:
    TypeError: an array of a dtype that is not served, or in other memory than x.
    ValueError: arrays of wrong shapes, outputs that are read-only or share memory with
        other arrays, a formula that is not served.
    RuntimeError: x is a CUDA array and lbe_ops_numpy was built without CUDA, or CUDA
        reports an error, maybe of an earlier kernel.

Example:
    >>> lbe_ops_numpy.batch_entropy(np.float32([[0, 1], [2, 1]]))[2]
    array([1., 0.], dtype=float32))",
         BatchEntropy, py::arg("x"), py::kw_only(), py::arg("out") = none,
         py::arg("workspace") = none);
  Define(module, "batch_entropy_grad",
         R"(Gradient with respect to x, of x's shape and dtype, of

    entropy_grad * entropy + sum(mean_grad * mean + variance_grad * variance).

Args:
    x, scale, offset, ddof, threads, dtype, stream, blocks: as for batch_entropy.
    mean, variance: what batch_entropy returned for x.
    entropy_grad: a number; for CUDA arrays also one on the GPU, of the entropy's type.
    mean_grad, variance_grad: arrays of shape x.shape[1:], both or none.
    dx: an array to write the gradient to; may be x itself, as a whole.

Raises:
    As batch_entropy.)",
         BatchEntropyGrad, py::arg("x"), py::arg("mean"), py::arg("variance"),
         py::arg("entropy_grad") = 1.0, py::kw_only(),
         py::arg("mean_grad") = none, py::arg("variance_grad") = none,
         py::arg("dx") = none);
}

void DefineEpilogue(py::module_& module) {
  const py::none none;
  Define(
      module, "epilogue",
      R"(y = activation(z + bias), and batch entropy and statistics of y, in one pass.

The statistics are those of y as it is stored, rounded to its dtype: the same bits as
batch_entropy(y). y, too, has the same bits for any number of threads, and on a GPU.

Args:
    z: [batch, ..., channels], as x of batch_entropy.
    bias: [channels], of z's dtype, or None.
    activation: "linear", "relu", "leaky_relu", "elu", "selu", "tanh", "sigmoid" or
        "softplus".
    slope: of leaky_relu below 0; the factor of elu; at least 0.
    y: an array of z's shape and dtype to write to; may be z itself, as a whole.
    out: (entropy, mean, variance), arrays to write the statistics to.
    scale, offset, ddof, threads, dtype, stream, blocks: as for batch_entropy.
    workspace: as for batch_entropy, of cuda_workspace_bytes(z, epilogue=True) bytes.

Returns:
    (y, entropy, mean, variance): y has z's shape and dtype, the others are as those of
    batch_entropy. On a GPU, CudaArrays.

Raises:
    As batch_entropy; also ValueError for an unknown activation.

Example:
    >>> z, bias = np.float32([[-2, 1], [1, 1]]), np.float32([1, 0])
    >>> y, _, mean, _ = lbe_ops_numpy.epilogue(z, bias, activation="relu")
    >>> y, mean
    (array([[0., 1.],
           [2., 1.]], dtype=float32), array([1., 1.], dtype=float32)))",
      EpilogueForward, py::arg("z"), py::arg("bias") = none, py::kw_only(),
      py::arg("activation") = "linear", py::arg("slope") = 0.0,
      py::arg("y") = none, py::arg("out") = none, py::arg("workspace") = none);
  Define(module, "epilogue_grad",
         R"(Gradients with respect to z and bias of

    sum(dy * y) + entropy_grad * entropy,

where y and entropy are those of epilogue. z is not needed. dz and dbias have the same
bits for any number of threads, and on a GPU.

Args:
    dy: of y's shape and dtype.
    y, mean, variance: what epilogue returned.
    entropy_grad: a number; for CUDA arrays also one on the GPU, of the entropy's type.
    activation, slope, scale, offset, ddof: as for epilogue.
    bias_grad: whether to compute dbias, too.
    dz: an array of y's shape and dtype to write to; may be dy or y itself, as a whole.
    dbias: an array [channels] of y's dtype to write to; then bias_grad may be left out.
    threads, dtype, stream, blocks: as for batch_entropy.
    workspace: as for batch_entropy, of cuda_grad_workspace_bytes(y) bytes; needed for
        dbias alone.

Returns:
    (dz, dbias): dz has y's shape and dtype, dbias the shape [channels] and y's dtype, or
    is None. On a GPU, CudaArrays.

Raises:
    As epilogue.

Example:
    >>> z, bias = np.float32([[-2, 1], [1, 1]]), np.float32([1, 0])
    >>> y, _, *statistics = lbe_ops_numpy.epilogue(z, bias, activation="relu")
    >>> lbe_ops_numpy.epilogue_grad(
    ...     np.ones_like(y), y, *statistics, 0.0, activation="relu", bias_grad=True)
    (array([[0., 1.],
           [1., 1.]], dtype=float32), array([1., 2.], dtype=float32)))",
         EpilogueGrad, py::arg("dy"), py::arg("y"), py::arg("mean"),
         py::arg("variance"), py::arg("entropy_grad") = 1.0, py::kw_only(),
         py::arg("activation") = "linear", py::arg("slope") = 0.0,
         py::arg("bias_grad") = false, py::arg("dz") = none,
         py::arg("dbias") = none, py::arg("workspace") = none);
}

void DefineSystem(py::module_& module) {
  module.def(
      "simd_level", &CpuSimdLevel,
      "The instruction set in use: 'avx512', 'avx2' or 'baseline' on x86-64, "
      "'neon' on aarch64. The environment variable LBE_OPS_SIMD, read once, "
      "names a lower one.");
  module.def("build_info", &BuildInfo,
             "What the library was built for and with, as a dict of strings.");
  module.def("cuda_system", &CudaSystemInfo, py::arg("device") = 0,
             "A GPU, by default the first one that CUDA sees, as a dict of "
             "strings; 'problem' is why the kernels cannot run there, or "
             "empty.");
}

}  // namespace
}  // namespace lbe

PYBIND11_MODULE(LBE_MODULE, module) {
  module.doc() =
      "Batch entropy of NumPy arrays by the CPU kernels of lbe_ops, and of "
      "CUDA arrays by its CUDA kernels, without TensorFlow.";
  lbe::DefineBatchEntropy(module);
  lbe::DefineEpilogue(module);
  lbe::DefineSystem(module);
#ifdef LBE_CUDA
  lbe::DefineCudaArrays(module);
#endif
}
