// SPDX-License-Identifier: Apache-2.0

#include "cuda_arrays.h"

#include <pybind11/numpy.h>

#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "batch.h"

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

// Makes a GPU the current one for a while.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (cudaGetDevice(&previous_) != 0) previous_ = device;
    if (previous_ != device) error_ = cudaSetDevice(device);
    changed_ = previous_ != device && error_ == 0;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(previous_);
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

const char* ResultTypestr(const Batch& batch) {
  return batch.dtype == DType::kFloat64 ? "<f8" : "<f4";
}

int64_t Elements(const Shape& shape) {
  int64_t elements = 1;
  for (const py::ssize_t size : shape) elements *= size;
  return elements;
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

  View(const py::object& array, std::string argument)
      : name(std::move(argument)) {
    if (!py::hasattr(array, "__cuda_array_interface__")) {
      throw py::type_error("x is a CUDA array and " + name +
                           " is not: all of them must lie in "
                           "the GPU's memory. Received: " +
                           std::string(py::str(py::type::of(array))));
    }
    const auto interface =
        array.attr("__cuda_array_interface__").cast<py::dict>();
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
      throw py::value_error(name + " is not aligned to its elements");
    }
  }

  void CheckIs(const Shape& wanted_shape, const char* wanted_typestr,
               const char* what) const {
    if (shape != wanted_shape || typestr != wanted_typestr) {
      throw py::value_error(name + " must have " + what + ", shape " +
                            Text(wanted_shape) + " and dtype " +
                            wanted_typestr + ". Received: shape " +
                            Text(shape) + " and dtype " + typestr);
    }
  }

  void CheckIsWritable() const {
    if (read_only) throw py::value_error(name + " is read-only");
  }

  int64_t bytes() const { return Elements(shape) * ItemSize(typestr); }

 private:
  void CheckStrides(const py::tuple& strides) const {
    int64_t expected = ItemSize(typestr);
    for (size_t i = shape.size(); i-- > 0;) {
      // A step that is never taken may be anything.
      if (shape[i] > 1 && SizeOf(strides[i]) != expected) {
        throw py::value_error(
            name +
            " must be contiguous, in C order: copy it first. Received: shape " +
            Text(shape) + ", strides " + std::string(py::str(strides)));
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
      "x must be a float16, bfloat16, float32 or float64 array in the "
      "machine's byte order; where it holds the bits of half-precision numbers "
      "under another type, say dtype=\"bfloat16\". Received: typestr '" +
      x.typestr + "'" +
      (given ? ", dtype " + std::string(py::repr(dtype)) : ""));
}

// Memory of our own on a GPU, from the memory pool of CUDA, made and freed in
// the order of a stream, which must outlive it.
class Memory {
 public:
  Memory(int64_t bytes, int device, uintptr_t stream)
      : device_(device), stream_(stream) {
    if (bytes > 0) {
      Check(cudaMallocAsync(&data_, bytes, Stream(stream)), "cudaMallocAsync");
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
    const py::array array =
        py::module_::import("numpy").attr("ascontiguousarray")(values).attr(
            "reshape")(py::module_::import("numpy").attr("shape")(values));
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

// The dtype of x for an array that is made like it.
py::object NumPyDType(const py::object& x, const View& view) {
  if (py::isinstance<CudaArray>(x)) return x.attr("dtype");
  return py::module_::import("numpy").attr("dtype")(view.typestr);
}

// One call on the arrays' device and on a stream that waits for theirs. Theirs
// wait for it, too: what is read from an array or done with its memory
// afterwards, in the order of its own stream, comes after the call.
class Call {
 public:
  Call(std::initializer_list<const View*> arrays, const CudaOptions& options)
      : stream_(StreamNumber(options.stream)),
        device_(DeviceOf(arrays)),
        guard_(device_) {
    Check(guard_.error(), "cudaSetDevice");
    if (options.blocks < 1) {
      throw py::value_error("blocks must be at least 1. Received: " +
                            std::to_string(options.blocks));
    }
    for (const View* array : arrays) {
      if (array == nullptr || !array->stream) continue;
      if (*array->stream == stream_) continue;
      others_.push_back(*array->stream);
      Order(*array->stream, stream_);
    }
  }

  // To be called after the last launch.
  void Done() const {
    for (const uintptr_t other : others_) Order(stream_, other);
  }

  uintptr_t stream() const { return stream_; }
  int device() const { return device_; }

  std::unique_ptr<CudaArray> NewArray(const Shape& shape,
                                      const py::object& dtype,
                                      const std::string& typestr) const {
    return std::make_unique<CudaArray>(shape, dtype, typestr, device_, stream_);
  }

 private:
  static int DeviceOf(std::initializer_list<const View*> arrays) {
    int device = -1;
    for (const View* array : arrays) {
      if (array == nullptr) continue;
      cudaPointerAttributes attributes;
      Check(cudaPointerGetAttributes(&attributes, array->data),
            "cudaPointerGetAttributes");
      if (attributes.type != cudaMemoryTypeDevice &&
          attributes.type != cudaMemoryTypeManaged) {
        throw py::value_error(array->name + " is not in the memory of a GPU");
      }
      if (device >= 0 && attributes.device != device) {
        throw py::value_error(
            "all arrays must be on one GPU. Received: x on device " +
            std::to_string(device) + ", " + array->name + " on device " +
            std::to_string(attributes.device));
      }
      device = attributes.device;
    }
    return device;
  }

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

  std::vector<uintptr_t> others_;
  uintptr_t stream_;
  int device_;
  OnDevice guard_;
};

std::optional<View> OptionalView(const py::object& array, const char* name) {
  if (array.is_none()) return std::nullopt;
  return View(array, name);
}

const View* Address(const std::optional<View>& view) {
  return view ? &*view : nullptr;
}

const void* Data(const std::optional<View>& view) {
  return view ? view->data : nullptr;
}

// The scalar entropy_grad in the GPU's memory: an array that is there, or a
// copy of a number.
class EntropyGrad {
 public:
  EntropyGrad(const py::object& value, const Batch& batch)
      : dtype_(batch.dtype) {
    if (py::hasattr(value, "__cuda_array_interface__")) {
      array_.emplace(value, "entropy_grad");
      array_->CheckIs({}, ResultTypestr(batch), "the form of the entropy");
      return;
    }
    number_ = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
  }

  const View* array() const { return Address(array_); }

  const void* OnStream(const Call& call) {
    if (array_) return array_->data;
    copy_.emplace(sizeof(double), call.device(), call.stream());
    Check(SetScalarCuda(Stream(call.stream()), dtype_, number_, copy_->data()),
          "writing entropy_grad");
    return copy_->data();
  }

 private:
  const DType dtype_;
  std::optional<View> array_;
  double number_ = 0;
  std::optional<Memory> copy_;
};

}  // namespace

py::tuple CudaForward(const py::object& x, const Formula& formula,
                      const CudaOptions& options, const py::object& out) {
  const View view(x, "x");
  const Batch batch(DTypeOf(view, options.dtype), view.shape, formula);
  const char* const typestr = ResultTypestr(batch);
  const Shape shapes[] = {{}, batch.unit_shape, batch.unit_shape};
  std::optional<View> outputs[3];
  if (!out.is_none()) {
    const auto arrays = py::tuple(out);
    if (arrays.size() != 3) {
      throw py::value_error(
          "out must be (entropy, mean, variance). Received: " +
          std::to_string(arrays.size()) + " arrays");
    }
    const char* const names[] = {"out[0]", "out[1]", "out[2]"};
    for (int i = 0; i < 3; ++i) {
      outputs[i].emplace(arrays[i], names[i]);
      outputs[i]->CheckIs(shapes[i], typestr, "the form of the result");
      outputs[i]->CheckIsWritable();
    }
  }
  const std::optional<View> given =
      OptionalView(options.workspace, "workspace");
  const Call call({&view, Address(outputs[0]), Address(outputs[1]),
                   Address(outputs[2]), Address(given)},
                  options);

  void* data[3];
  py::object results[3];
  const py::object dtype = py::module_::import("numpy").attr("dtype")(typestr);
  for (int i = 0; i < 3; ++i) {
    if (outputs[i]) {
      results[i] = py::tuple(out)[i];
      data[i] = outputs[i]->data;
    } else {
      auto array = call.NewArray(shapes[i], dtype, typestr);
      data[i] = array->data();
      results[i] = py::cast(std::move(array));
    }
  }
  const int64_t bytes = BatchEntropyForwardCudaWorkspace(
      batch.dtype, batch.rows, batch.units, options.blocks);
  std::optional<Memory> own;
  void* workspace;
  if (given) {
    workspace = given->data;
    given->CheckIsWritable();
    if (given->bytes() < bytes ||
        reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
      throw py::value_error(
          "workspace must have at least " + std::to_string(bytes) +
          " bytes, aligned to 16. Received: " + std::to_string(given->bytes()) +
          " bytes");
    }
  } else {
    own.emplace(bytes, call.device(), call.stream());
    workspace = own->data();
  }
  Check(BatchEntropyForwardCuda(Stream(call.stream()), batch.dtype, view.data,
                                batch.rows, batch.units, formula, workspace,
                                data[1], data[2], data[0], nullptr,
                                options.blocks),
        "batch_entropy");
  call.Done();
  return py::make_tuple(results[0], results[1], results[2]);
}

py::object CudaGradient(const py::object& x, const py::object& mean,
                        const py::object& variance,
                        const py::object& entropy_grad,
                        const py::object& mean_grad,
                        const py::object& variance_grad, const py::object& dx,
                        const Formula& formula, const CudaOptions& options) {
  const View view(x, "x");
  const Batch batch(DTypeOf(view, options.dtype), view.shape, formula);
  const View means(mean, "mean"), variances(variance, "variance");
  const std::optional<View> mean_grads = OptionalView(mean_grad, "mean_grad");
  const std::optional<View> variance_grads =
      OptionalView(variance_grad, "variance_grad");
  const std::optional<View> given = OptionalView(dx, "dx");
  for (const View* statistics :
       {&means, &variances, Address(mean_grads), Address(variance_grads)}) {
    if (statistics == nullptr) continue;
    statistics->CheckIs(batch.unit_shape, ResultTypestr(batch),
                        "the form of one sample, x.shape[1:]");
  }
  if (given) {
    given->CheckIs(batch.shape, view.typestr.c_str(), "the form of x");
    given->CheckIsWritable();
  }
  EntropyGrad entropy_grads(entropy_grad, batch);
  const Call call(
      {&view, &means, &variances, entropy_grads.array(), Address(mean_grads),
       Address(variance_grads), Address(given)},
      options);

  py::object result = dx;
  void* data = given ? given->data : nullptr;
  if (!given) {
    auto array = call.NewArray(batch.shape, NumPyDType(x, view), view.typestr);
    data = array->data();
    result = py::cast(std::move(array));
  }
  Check(BatchEntropyGradCuda(Stream(call.stream()), batch.dtype, view.data,
                             batch.rows, batch.units, formula, means.data,
                             variances.data, entropy_grads.OnStream(call),
                             Data(mean_grads), Data(variance_grads), data,
                             options.blocks),
        "batch_entropy_grad");
  call.Done();
  return result;
}

int64_t CudaWorkspaceBytes(const py::object& x, const CudaOptions& options) {
  const View view(x, "x");
  const Batch batch(DTypeOf(view, options.dtype), view.shape, {1, 1, 0});
  return BatchEntropyForwardCudaWorkspace(batch.dtype, batch.rows, batch.units,
                                          options.blocks);
}

void DefineCudaArrays(py::module_& module) {
  py::class_<CudaArray>(
      module, "CudaArray", py::module_local(),
      R"(An array in the memory of a GPU, as batch_entropy returns it.

Other libraries take it by its __cuda_array_interface__: cupy.asarray(array),
torch.as_tensor(array, device="cuda"). Its memory goes back to CUDA's pool in the order
of the stream on which it was made; that stream must live as long as the array.)")
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
}

}  // namespace lbe
