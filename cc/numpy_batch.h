// SPDX-License-Identifier: Apache-2.0
//
// What a call of lbe_ops_numpy has to know of x, wherever x lies. Checked here,
// once for NumPy and CUDA arrays.

#ifndef LBE_OPS_CC_BATCH_H_
#define LBE_OPS_CC_BATCH_H_

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

// x as [rows, units].
struct Batch {
  DType dtype;
  Shape shape;       // of x
  Shape unit_shape;  // of one sample
  int64_t rows;
  int64_t units;
  Formula formula;

  Batch(DType x_dtype, Shape x_shape, const Formula& x_formula)
      : dtype(x_dtype),
        shape(std::move(x_shape)),
        units(1),
        formula(x_formula) {
    namespace py = pybind11;
    if (shape.empty()) {
      throw py::value_error(
          "x must have shape [batch, ...]. Received: a scalar");
    }
    rows = shape[0];
    unit_shape.assign(shape.begin() + 1, shape.end());
    for (const py::ssize_t size : unit_shape) units *= size;
    if (rows < 2 || units < 1) {
      throw py::value_error(
          "x must have at least 2 samples and 1 unit. Received: " +
          std::to_string(rows) + " samples, " + std::to_string(units) +
          " units");
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
  Batch(const Batch&) = delete;

  int64_t result_size() const { return dtype == DType::kFloat64 ? 8 : 4; }
};

}  // namespace lbe

#endif  // LBE_OPS_CC_BATCH_H_
