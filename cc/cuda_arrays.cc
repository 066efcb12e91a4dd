// SPDX-License-Identifier: Apache-2.0

#include "cuda_arrays.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "numpy_batch.h"

#ifndef LBE_CUDA_EMULATION
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace lbe {
namespace {

void Check(int error, const char* what) {
  if (error != 0) {
    throw std::runtime_error(std::string(what) +
                             " failed: " + CudaErrorMessage(error));
  }
}

// The legacy default stream has two names, 0 and 1; 0 is not one that other
// libraries take.
constexpr uintptr_t kLegacyStream = 1;

uintptr_t StreamNumber(const py::object& stream) {
  if (stream.is_none()) return kLegacyStream;
  if (!py::isinstance<py::int_>(stream) ||
      py::cast<py::int_>(stream) < py::int_(0)) {
    throw py::type_error(
        "stream must be None or a cudaStream_t as an integer "
        "(torch.cuda.Stream.cuda_stream, cupy.cuda.Stream.ptr). Received: " +
        std::string(py::repr(stream)));
  }
  const auto number = stream.cast<uintptr_t>();
  return number == 0 ? kLegacyStream : number;
}

cudaStream_t Stream(uintptr_t number) {
  return reinterpret_cast<cudaStream_t>(number);
}

// Whether a GPU has a context in this process. True where the driver cannot
// say.
bool HasContext(int device) {
  using GetState = int (*)(int device, unsigned* flags, int* active);
  static const auto get_state = [] {
    const char* const name = "cuDevicePrimaryCtxGetState";
    void* function = nullptr;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion(name, &function, 7000, cudaEnableDefault);
#else
    cudaGetDriverEntryPoint(name, &function, cudaEnableDefault);
#endif
    return reinterpret_cast<GetState>(function);
  }();
  unsigned flags = 0;
  int active = 1;
  if (get_state != nullptr) get_state(device, &flags, &active);
  return active != 0;
}

// The current GPU, or one that has a context where the current one has none.
int DeviceWithContext() {
  int current = 0, count = 0;
  if (cudaGetDevice(&current) != 0 || HasContext(current)) return current;
  if (cudaGetDeviceCount(&count) != 0) return current;
  for (int device = 0; device < count; ++device) {
    if (HasContext(device)) return device;
  }
  return current;
}

// Makes a GPU the current one for a while. The one before it becomes current
// again, unless it has no context: cudaSetDevice would create one, which takes
// hundreds of megabytes of a GPU that the process may not use at all.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (cudaGetDevice(&previous_) != 0) previous_ = device;
    if (previous_ != device) error_ = cudaSetDevice(device);
    changed_ = previous_ != device && error_ == 0;
  }
  ~OnDevice() {
    if (changed_ && HasContext(previous_)) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;

  int error() const { return error_; }

 private:
  int previous_ = 0;
  int error_ = 0;
  bool changed_ = false;
};

const char* TypestrOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return "<f2";
    case DType::kBFloat16:
      return "<V2";  // as ml_dtypes and PyTorch write it
    case DType::kFloat32:
      return "<f4";
    case DType::kFloat64:
      return "<f8";
  }
  return "";
}

const char* ResultTypestr(DType dtype) {
  return dtype == DType::kFloat64 ? "<f8" : "<f4";
}

int64_t ItemSize(const std::string& typestr) {
  return std::stoll(typestr.substr(2));
}

py::ssize_t SizeOf(const py::handle& value) {
  return value.cast<py::ssize_t>();
}

// An array of somebody's, as its interface describes it.
struct View {
  std::string name;  // of the argument
  void* data;
  Shape shape;
  std::string typestr;
  bool read_only;
  std::optional<uintptr_t> stream;  // on which its values are made

  View(const py::dict& interface, std::string argument)
      : name(std::move(argument)) {
    for (const py::handle size : interface["shape"]) {
      shape.push_back(SizeOf(size));
    }
    typestr = interface["typestr"].cast<std::string>();
    if (typestr.size() < 3 || typestr.size() > 5 || typestr[2] == '0' ||
        typestr.find_first_not_of("0123456789", 2) != std::string::npos) {
      throw py::type_error(name + " has no dtype of a fixed size. Received: " +
                           "typestr '" + typestr + "'");
    }
    const auto pointer = interface["data"].cast<py::tuple>();
    data = reinterpret_cast<void*>(pointer[0].cast<uintptr_t>());
    read_only = pointer[1].cast<bool>();
    if (interface.contains("mask") && !interface["mask"].is_none()) {
      throw py::value_error(name + " has a mask, which no kernel serves");
    }
    if (interface.contains("strides") && !interface["strides"].is_none()) {
      CheckStrides(interface["strides"].cast<py::tuple>());
    }
    if (interface.contains("stream") && !interface["stream"].is_none()) {
      stream = StreamNumber(interface["stream"]);
    }
    if (reinterpret_cast<uintptr_t>(data) % ItemSize(typestr) != 0) {
      NotAligned(name);
    }
  }

  int64_t bytes() const { return Elements(shape) * ItemSize(typestr); }

 private:
  void CheckStrides(const py::tuple& strides) const {
    int64_t expected = ItemSize(typestr);
    for (size_t i = shape.size(); i-- > 0;) {
      // A step that is never taken may be anything.
      if (shape[i] > 1 && SizeOf(strides[i]) != expected) {
        NotContiguous(name, shape, py::str(strides));
      }
      expected *= shape[i];
    }
  }
};

DType DTypeOf(const View& x, const py::object& dtype) {
  const bool half_bits =
      x.typestr[0] != '>' && ItemSize(x.typestr) == 2 &&
      std::string("uiV").find(x.typestr[1]) != std::string::npos;
  const bool given = !dtype.is_none();
  const std::string wanted = given ? std::string(py::str(dtype)) : "";
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  {                                                                   \
    const bool is_it =                                                \
        x.typestr == TypestrOf(DType::name) ||                        \
        (DType::name == DType::kBFloat16 && x.typestr == "|V2");      \
    if (given ? wanted == numpy_name &&                               \
                    (is_it || (half_bits && sizeof(element) == 2))    \
              : is_it) {                                              \
      return DType::name;                                             \
    }                                                                 \
  }
  LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  throw py::type_error(
      x.name +
      " must be a float16, bfloat16, float32 or float64 array in the "
      "machine's byte order; where it holds the bits of half-precision numbers "
      "under another type, say dtype=\"bfloat16\". Received: typestr '" +
      x.typestr + "'" +
      (given ? ", dtype " + std::string(py::repr(dtype)) : ""));
}

// The pool that memory on a GPU comes from: one of our own, since how much a
// pool keeps is decided for all who use it. The default pool keeps nothing, so
// that a caller who waits for the GPU between two calls would have memory
// mapped anew by each.
cudaMemPool_t PoolOf(int device) {
  // Beyond that much, memory that is free goes back to the driver whenever the
  // process waits for the GPU.
  constexpr uint64_t kKeptBytes = uint64_t{1} << 30;
  static std::mutex mutex;
  // Never destroyed: at the end of the process CUDA may be gone first.
  static auto* const pools = new std::map<int, cudaMemPool_t>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = pools->find(device);
  if (found != pools->end()) return found->second;
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool;
  Check(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
  uint64_t kept_bytes = kKeptBytes;
  Check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold,
                                &kept_bytes),
        "cudaMemPoolSetAttribute");
  return (*pools)[device] = pool;
}

// Memory of our own on the current GPU, made and freed in the order of a
// stream, which must outlive it.
class Memory {
 public:
  Memory(int64_t bytes, int device, uintptr_t stream)
      : device_(device), stream_(stream) {
    if (bytes > 0) {
      Check(cudaMallocFromPoolAsync(&data_, bytes, PoolOf(device),
                                    Stream(stream)),
            "cudaMallocFromPoolAsync");
    }
  }
  ~Memory() {
    if (data_ == nullptr) return;
    const OnDevice guard(device_);
    cudaFreeAsync(data_, Stream(stream_));  // may fail while a process ends
  }
  Memory(const Memory&) = delete;

  void* data() const { return data_; }
  int device() const { return device_; }
  uintptr_t stream() const { return stream_; }

 private:
  void* data_ = nullptr;
  int device_;
  uintptr_t stream_;
};

// What the functions return: an array in memory of its own.
class CudaArray {
 public:
  CudaArray(Shape shape, py::object dtype, const std::string& typestr,
            int device, uintptr_t stream)
      : shape_(std::move(shape)),
        dtype_(std::move(dtype)),
        typestr_(typestr),
        memory_(Elements(shape_) * ItemSize(typestr), device, stream) {}

  static std::unique_ptr<CudaArray> FromNumPy(const py::object& values,
                                              const py::object& stream) {
    const py::array array = Contiguous(py::array(values));
    // Not objects, whose addresses mean nothing there, nor text.
    if (std::string("biufV").find(array.dtype().kind()) == std::string::npos) {
      throw py::type_error("array must hold numbers. Received: dtype " +
                           std::string(py::str(array.dtype())));
    }
    const uintptr_t number = StreamNumber(stream);
    int device = 0;
    Check(cudaGetDevice(&device), "cudaGetDevice");
    auto copy = std::make_unique<CudaArray>(
        Shape(array.shape(), array.shape() + array.ndim()), array.dtype(),
        array.dtype().attr("str").cast<std::string>(), device, number);
    if (array.nbytes() > 0) {
      Check(cudaMemcpyAsync(copy->memory_.data(), array.data(), array.nbytes(),
                            cudaMemcpyHostToDevice, Stream(number)),
            "cudaMemcpyAsync");
      // The array may be gone when the call has returned.
      Check(cudaStreamSynchronize(Stream(number)), "cudaStreamSynchronize");
    }
    return copy;
  }

  py::array ToNumPy() const {
    py::array array(py::reinterpret_borrow<py::dtype>(dtype_), shape_);
    const OnDevice guard(memory_.device());
    Check(guard.error(), "cudaSetDevice");
    if (array.nbytes() > 0) {
      Check(
          cudaMemcpyAsync(array.mutable_data(), memory_.data(), array.nbytes(),
                          cudaMemcpyDeviceToHost, Stream(memory_.stream())),
          "cudaMemcpyAsync");
    }
    Check(cudaStreamSynchronize(Stream(memory_.stream())),
          "cudaStreamSynchronize");
    return array;
  }

  py::dict Interface() const {
    py::dict interface;
    interface["version"] = 3;
    interface["shape"] = shape();
    interface["typestr"] = typestr_;
    interface["data"] =
        py::make_tuple(reinterpret_cast<uintptr_t>(memory_.data()), false);
    interface["strides"] = py::none();
    interface["stream"] = memory_.stream();
    return interface;
  }

  void* data() const { return memory_.data(); }
  py::tuple shape() const {
    py::tuple sizes(shape_.size());
    for (size_t i = 0; i < shape_.size(); ++i) sizes[i] = shape_[i];
    return sizes;
  }
  py::object dtype() const { return dtype_; }
  std::string Repr() const {
    return "<lbe_ops_numpy.CudaArray of shape " + Text(shape_) + " and dtype " +
           std::string(py::str(dtype_)) + ">";
  }

 private:
  Shape shape_;
  py::object dtype_;
  std::string typestr_;
  Memory memory_;
};

void CheckBlocks(int blocks) {
  if (blocks < 0) {
    throw py::value_error("blocks must be at least 0. Received: " +
                          std::to_string(blocks));
  }
}

// The GPU on which an array lies.
int DeviceOf(const View& array) {
  // The query needs a context on the current GPU, and creates one there if need
  // be; that of the array has one.
  const OnDevice guard(DeviceWithContext());
  cudaPointerAttributes attributes;
  Check(cudaPointerGetAttributes(&attributes, array.data),
        "cudaPointerGetAttributes");
  if (attributes.type != cudaMemoryTypeDevice &&
      attributes.type != cudaMemoryTypeManaged) {
    throw py::value_error(array.name + " is not in the memory of a GPU");
  }
  return attributes.device;
}

// Arrays in the memory of a GPU, used on a stream that waits for theirs. Theirs
// wait for it, too: what is read from an array or done with its memory
// afterwards, in the order of its own stream, comes after the call.
class CudaArrays : public Arrays {
 public:
  CudaArrays(const py::object& x, const View& view, const char* name,
             const Options& options)
      : Arrays(Batch(name, DTypeOf(view, options.dtype), view.shape,
                     options.formula),
               view.data),
        x_(x),
        x_typestr_(view.typestr),
        stream_(StreamNumber(options.stream)),
        device_(DeviceOf(view)),
        guard_(device_),
        blocks_(options.blocks) {
    Check(guard_.error(), "cudaSetDevice");
    CheckBlocks(blocks_);
    WaitFor(view);
    if (options.workspace.is_none()) return;
    workspace_.emplace(ViewOf(options.workspace, "workspace"));
    if (workspace_->read_only) ReadOnly("workspace");
    Add("workspace", workspace_->data, workspace_->bytes(), false, true);
  }

  const void* ReadEntropyGrad(const py::object& value) override {
    if (py::isinstance<py::float_>(value) ||
        !py::hasattr(value, "__cuda_array_interface__")) {
      const double number = PyFloat_AsDouble(value.ptr());
      if (PyErr_Occurred()) throw py::error_already_set();
      entropy_grad_.emplace(sizeof(double), device_, stream_);
      Check(SetScalarCuda(Stream(stream_), batch().problem.dtype, number,
                          entropy_grad_->data()),
            "writing entropy_grad");
      return entropy_grad_->data();
    }
    return Read(value, "entropy_grad", Form::kScalar);
  }

 protected:
  Found Input(const py::object& array, const char* name, Form form) override {
    return {array, Checked(ViewOf(array, name), form).data};
  }

  Found Output(const py::object& array, const char* name, Form form) override {
    const View view = Checked(ViewOf(array, name), form);
    if (view.read_only) ReadOnly(name);
    return {array, view.data};
  }

  Found New(Form form) override {
    const py::object dtype =
        IsOfResultType(form) ? py::dtype(TypestrFor(form)) : XDType();
    auto array = std::make_unique<CudaArray>(
        ShapeOf(form), dtype, TypestrFor(form), device_, stream_);
    void* const data = array->data();
    return {py::cast(std::move(array)), data};
  }

  void Launch(ForwardArguments arguments) override {
    const Problem& problem = batch().problem;
    arguments.workspace = Workspace(
        ForwardCudaWorkspace(problem, arguments.epilogue != nullptr, blocks_));
    Launched(ForwardCuda(Stream(stream_), problem, arguments, blocks_));
  }

  void Launch(GradientArguments arguments) override {
    const Problem& problem = batch().problem;
    if (arguments.dbias != nullptr) {
      arguments.workspace = Workspace(
          GradientCudaWorkspace(problem, arguments.epilogue->channels));
    }
    Launched(GradientCuda(Stream(stream_), problem, arguments, blocks_));
  }

 private:
  // What comes next in `after` waits for what is in `before` now.
  static void Order(uintptr_t before, uintptr_t after) {
    cudaEvent_t event;
    Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming),
          "cudaEventCreateWithFlags");
    int error = cudaEventRecord(event, Stream(before));
    if (error == 0) error = cudaStreamWaitEvent(Stream(after), event, 0);
    cudaEventDestroy(event);
    Check(error, "waiting for the stream of an array");
  }

  void WaitFor(const View& array) {
    if (!array.stream || *array.stream == stream_) return;
    for (const uintptr_t other : others_) {
      if (other == *array.stream) return;
    }
    Order(*array.stream, stream_);
    others_.push_back(*array.stream);
  }

  View ViewOf(const py::object& array, const char* name) {
    if (!py::hasattr(array, "__cuda_array_interface__")) {
      WrongMemory(name, "CUDA", array);
    }
    View view(array.attr("__cuda_array_interface__"), name);
    const int device = DeviceOf(view);
    if (device != device_) {
      throw py::value_error("all arrays must be on one GPU. Received: " +
                            std::string(batch().name) + " on device " +
                            std::to_string(device_) + ", " + name +
                            " on device " + std::to_string(device));
    }
    WaitFor(view);
    return view;
  }

  const char* TypestrFor(Form form) const {
    return IsOfResultType(form) ? ResultTypestr(batch().problem.dtype)
                                : x_typestr_.c_str();
  }

  // The dtype of x, for an array that is made like it.
  py::object XDType() const {
    if (py::isinstance<CudaArray>(x_)) return x_.attr("dtype");
    return py::dtype(x_typestr_);
  }

  View Checked(View view, Form form) const {
    const char* const typestr = TypestrFor(form);
    if (view.shape != ShapeOf(form) || view.typestr != typestr) {
      WrongForm(view.name.c_str(), form, typestr, view.shape, view.typestr);
    }
    return view;
  }

  // That of the caller, or else memory of our own.
  void* Workspace(int64_t bytes) {
    if (!workspace_) {
      return own_workspace_.emplace(bytes, device_, stream_).data();
    }
    const bool aligned =
        reinterpret_cast<uintptr_t>(workspace_->data) % 16 == 0;
    if (workspace_->bytes() < bytes || !aligned) {
      throw py::value_error("workspace must have at least " +
                            std::to_string(bytes) +
                            " bytes, aligned to 16. Received: " +
                            std::to_string(workspace_->bytes()) + " bytes" +
                            (aligned ? "" : ", not aligned"));
    }
    return workspace_->data;
  }

  // To be called after the last launch.
  void Launched(int error) const {
    Check(error, "launching a kernel");
    for (const uintptr_t other : others_) Order(stream_, other);
  }

  const py::object x_;
  const std::string x_typestr_;
  const uintptr_t stream_;
  const int device_;
  const OnDevice guard_;
  const int blocks_;
  std::vector<uintptr_t> others_;  // streams that arrays name
  std::optional<View> workspace_;
  std::optional<Memory> own_workspace_;
  std::optional<Memory> entropy_grad_;
};

// An array of which no more is asked than its form.
Batch BatchOf(const py::object& x, const char* name, const py::object& dtype) {
  if (!py::hasattr(x, "__cuda_array_interface__")) {
    throw py::type_error(std::string(name) +
                         " must be a CUDA array, with "
                         "__cuda_array_interface__. Received: " +
                         TypeOf(x));
  }
  const View view(x.attr("__cuda_array_interface__"), name);
  return Batch(name, DTypeOf(view, dtype), view.shape, {1, 1, 0});
}

}  // namespace

std::unique_ptr<Arrays> MakeCudaArrays(const py::object& x,
                                       const py::object& interface,
                                       const char* name,
                                       const Options& options) {
  return std::make_unique<CudaArrays>(x, View(interface, name), name, options);
}

void DefineCudaArrays(py::module_& module) {
  py::class_<CudaArray>(
      module, "CudaArray", py::module_local(),
      R"(An array in the memory of a GPU, as batch_entropy returns it.

Other libraries take it by its __cuda_array_interface__: cupy.asarray(array),
torch.as_tensor(array, device="cuda"). Its memory goes back to a pool of this module's
in the order of the stream on which it was made; that stream must live as long as the
array. The pool keeps up to 1 GiB for the arrays to come.)")
      .def_property_readonly("__cuda_array_interface__", &CudaArray::Interface)
      .def_property_readonly("shape", &CudaArray::shape)
      .def_property_readonly("dtype", &CudaArray::dtype)
      .def("numpy", &CudaArray::ToNumPy,
           "A copy in NumPy; waits for the array's stream.")
      .def("__repr__", &CudaArray::Repr);
  module.def(
      "cuda_array", &CudaArray::FromNumPy, py::arg("array"), py::kw_only(),
      py::arg("stream") = py::none(),
      "A CudaArray with the values of a NumPy array, on the current GPU.");
  module.def(
      "cuda_workspace_bytes",
      [](const py::object& x, bool epilogue, const py::object& dtype,
         int blocks) {
        CheckBlocks(blocks);
        return ForwardCudaWorkspace(BatchOf(x, "x", dtype).problem, epilogue,
                                    blocks);
      },
      py::arg("x"), py::kw_only(), py::arg("epilogue") = false,
      py::arg("dtype") = py::none(), py::arg("blocks") = 0,
      "Bytes of the workspace of batch_entropy for a CUDA array x, or of that "
      "of epilogue for z = x. dtype and blocks as there.");
  module.def(
      "cuda_grad_workspace_bytes",
      [](const py::object& y, const py::object& dtype) {
        const Batch batch = BatchOf(y, "y", dtype);
        return GradientCudaWorkspace(batch.problem, batch.channels[0]);
      },
      py::arg("y"), py::kw_only(), py::arg("dtype") = py::none(),
      "Bytes of the workspace of epilogue_grad with bias_grad for a CUDA array "
      "y, for any number of blocks.");
}

}  // namespace lbe
