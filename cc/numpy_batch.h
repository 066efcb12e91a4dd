// SPDX-License-Identifier: Apache-2.0
//
// The arrays of one call of lbe_ops_numpy, and what they must be like. What
// NumPy arrays and CUDA arrays have in common is checked here, once; what they
// do not is in two classes derived from Arrays, one in numpy_module.cc and one
// in cuda_arrays.cc.

#ifndef LBE_OPS_CC_NUMPY_BATCH_H_
#define LBE_OPS_CC_NUMPY_BATCH_H_

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace lbe {

using Shape = std::vector<pybind11::ssize_t>;

inline std::string Text(const Shape& shape) {
  pybind11::tuple sizes(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) sizes[i] = shape[i];
  return pybind11::str(sizes);
}

inline std::string TypeOf(const pybind11::object& object) {
  return pybind11::str(pybind11::type::of(object));
}

// The name that NumPy has for a dtype.
inline const char* NameOf(DType dtype) {
  switch (dtype) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  case DType::name:                                                   \
    return numpy_name;
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  }
  return "";
}

inline int64_t ElementBytes(DType dtype) {
  return WithTypes(dtype, [](auto types) -> int64_t {
    return sizeof(typename decltype(types)::Element);
  });
}

inline int64_t Elements(const Shape& shape) {
  int64_t elements = 1;
  for (const pybind11::ssize_t size : shape) elements *= size;
  return elements;
}

// What is wrong with an array, in the same words wherever it lies.
[[noreturn]] inline void ReadOnly(const std::string& name) {
  throw pybind11::value_error(name + " is read-only");
}
[[noreturn]] inline void NotAligned(const std::string& name) {
  throw pybind11::value_error(name + " is not aligned to its elements");
}
[[noreturn]] inline void NotContiguous(const std::string& name,
                                       const Shape& shape,
                                       const std::string& strides) {
  throw pybind11::value_error(
      name +
      " must be contiguous, in C order: copy it first. Received: shape " +
      Text(shape) + ", strides " + strides);
}

// The memory of a NumPy array in C order and aligned: its own, or that of a
// copy. NumPy's own error where there is no memory for one.
inline pybind11::array Contiguous(const pybind11::array& array) {
  constexpr int kAligned = pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_;
  constexpr int kWanted = pybind11::array::c_style | kAligned;
  if ((array.flags() & kWanted) == kWanted) return array;
  return pybind11::module_::import("numpy").attr("require")(
      array, pybind11::none(), pybind11::make_tuple("C", "A"));
}

// What Python passes beside arrays; None where it is not given.
struct Options {
  Formula formula;
  int threads;              // for NumPy arrays; the others are for CUDA arrays
  pybind11::object dtype;   // what x holds, where its interface cannot say
  pybind11::object stream;  // a cudaStream_t as an integer
  int blocks;
  pybind11::object workspace = pybind11::none();  // a CUDA array
};

// x as [rows, units]. `name` is what the call has for x: x, y or z.
struct Batch {
  const char* name;
  Shape shape;        // of x
  Shape unit_shape;   // of one sample
  Shape channels;     // (the size of the last dimension,)
  Shape scalar = {};  // ()
  Problem problem;

  Batch(const char* x_name, DType dtype, Shape x_shape, const Formula& formula)
      : name(x_name), shape(std::move(x_shape)) {
    namespace py = pybind11;
    if (shape.empty()) {
      throw py::value_error(std::string(name) +
                            " must have shape [batch, ...]. Received: a "
                            "scalar");
    }
    unit_shape.assign(shape.begin() + 1, shape.end());
    channels = {unit_shape.empty() ? 1 : unit_shape.back()};
    problem = {dtype, shape[0], Elements(unit_shape), formula};
    if (problem.rows < 2 || problem.units < 1) {
      throw py::value_error(
          std::string(name) +
          " must have at least 2 samples and 1 unit. Received: " +
          std::to_string(problem.rows) + " samples, " +
          std::to_string(problem.units) + " units");
    }
    if (!IsServed(formula)) {
      throw py::value_error(
          "ddof must be 0 or 1, scale from 1e-12 to 1e12, offset 0 or in the "
          "same range. Received: ddof=" +
          std::to_string(formula.ddof) +
          ", scale=" + std::string(py::str(py::float_(formula.scale))) +
          ", offset=" + std::string(py::str(py::float_(formula.offset))));
    }
  }

  // For what has a bias, or the gradient of one.
  void CheckChannels() const {
    if (shape.size() >= 2) return;
    throw pybind11::value_error(
        std::string(name) +
        " must have shape [batch, ..., channels] for a bias. Received: shape " +
        Text(shape));
  }
};

// What an array of a call must be like.
enum class Form {
  kLikeX,     // x's shape and dtype
  kSample,    // the shape of one sample and the results' dtype
  kChannels,  // as many elements as x's last dimension has, of x's dtype
  kScalar,    // one number of the results' dtype
};

inline bool IsOfResultType(Form form) {
  return form == Form::kSample || form == Form::kScalar;
}

class Arrays {
 public:
  Arrays(const Arrays&) = delete;
  virtual ~Arrays() = default;

  const Batch& batch() const { return batch_; }
  const void* x() const { return x_; }

  // Where a kernel finds what `array` holds.
  const void* Read(const pybind11::object& array, const char* name, Form form) {
    Found found = Input(array, name, form);
    Add(name, found.data, BytesOf(form), form == Form::kLikeX, false);
    copies_.push_back(std::move(found.array));
    return found.data;
  }
  const void* ReadUnlessNone(const pybind11::object& array, const char* name,
                             Form form) {
    return array.is_none() ? nullptr : Read(array, name, form);
  }

  // Where a kernel finds the scalar entropy_grad: a number, or an array.
  virtual const void* ReadEntropyGrad(const pybind11::object& value) = 0;

  // Where a kernel writes `*array`; where that is none, it becomes a new array.
  void* Write(pybind11::object* array, const char* name, Form form) {
    Found found = array->is_none() ? New(form) : Output(*array, name, form);
    Add(name, found.data, BytesOf(form), form == Form::kLikeX, true);
    *array = std::move(found.array);
    return found.data;
  }

  // The kernels, in memory for intermediate results that they are given here.
  void Run(const ForwardArguments& arguments) {
    CheckThatOutputsAreApart();
    Launch(arguments);
  }
  void Run(const GradientArguments& arguments) {
    CheckThatOutputsAreApart();
    Launch(arguments);
  }

 protected:
  struct Found {
    pybind11::object array;
    void* data;
  };

  Arrays(Batch batch, void* x) : batch_(std::move(batch)), x_(x) {
    ranges_.reserve(10);
    Add(batch_.name, x, BytesOf(Form::kLikeX), true, false);
  }

  virtual Found Input(const pybind11::object& array, const char* name,
                      Form form) = 0;
  virtual Found Output(const pybind11::object& array, const char* name,
                       Form form) = 0;
  virtual Found New(Form form) = 0;
  virtual void Launch(ForwardArguments arguments) = 0;
  virtual void Launch(GradientArguments arguments) = 0;

  const Shape& ShapeOf(Form form) const {
    switch (form) {
      case Form::kLikeX:
        return batch_.shape;
      case Form::kSample:
        return batch_.unit_shape;
      case Form::kChannels:
        return batch_.channels;
      case Form::kScalar:
        break;
    }
    return batch_.scalar;
  }

  int64_t BytesOf(Form form) const {
    const DType dtype = batch_.problem.dtype;
    return Elements(ShapeOf(form)) *
           (IsOfResultType(form) ? ResultBytes(dtype) : ElementBytes(dtype));
  }

  // Memory that a kernel reads or writes; `like_x` where it does so element by
  // element of x.
  void Add(const char* name, void* data, int64_t bytes, bool like_x,
           bool is_written) {
    char* const begin = static_cast<char*>(data);
    ranges_.push_back({name, begin, begin + bytes, like_x, is_written});
  }

  [[noreturn]] void WrongForm(const char* name, Form form,
                              const std::string& wanted_dtype,
                              const Shape& shape,
                              const std::string& dtype) const {
    const std::string x = batch_.name;
    const std::string meaning[] = {
        "those of " + x, "the shape of one sample, " + x + ".shape[1:]",
        "the size of " + x + "'s last dimension", "one number"};
    throw pybind11::value_error(
        std::string(name) + " must have shape " + Text(ShapeOf(form)) +
        " and dtype " + wanted_dtype + ": " + meaning[static_cast<int>(form)] +
        ". Received: shape " + Text(shape) + " and dtype " + dtype);
  }
  [[noreturn]] void WrongMemory(const char* name, const char* kind,
                                const pybind11::object& array) const {
    throw pybind11::type_error(std::string(name) + " must be a " + kind +
                               " array: all arrays must lie in the memory of " +
                               batch_.name + ". Received: " + TypeOf(array));
  }

 private:
  struct Range {
    const char* name;
    const char* begin;
    const char* end;
    bool like_x;
    bool is_written;
  };

  // A kernel reads each element of such an array in the thread that writes to
  // its place, and before it does; anything else would be overwritten too
  // early.
  void CheckThatOutputsAreApart() const {
    for (const Range& output : ranges_) {
      if (!output.is_written) continue;
      for (const Range& other : ranges_) {
        if (&other == &output || output.end <= other.begin ||
            other.end <= output.begin) {
          continue;
        }
        const bool in_place = output.like_x && other.like_x &&
                              !other.is_written && output.begin == other.begin;
        if (!in_place) {
          throw pybind11::value_error(
              std::string(output.name) + " shares memory with " + other.name +
              ": what is written must lie apart from all other arrays, or be "
              "the whole of one that is read and has the shape of " +
              batch_.name);
        }
      }
    }
  }

  Batch batch_;
  void* x_;
  std::vector<Range> ranges_;
  std::vector<pybind11::object> copies_;  // live until the kernel has run
};

}  // namespace lbe

#endif  // LBE_OPS_CC_NUMPY_BATCH_H_
