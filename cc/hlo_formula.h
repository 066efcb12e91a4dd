// SPDX-License-Identifier: Apache-2.0
//
// The maths of batch_entropy.h and activations.h in XLA's own operations (HLO):
// for platforms and sizes that no kernel serves, and where XLA fuses more than
// a kernel can.
//
// Called by xla_ops.cc. Everything is computed in the type of the results.

#ifndef LBE_OPS_CC_HLO_FORMULA_H_
#define LBE_OPS_CC_HLO_FORMULA_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels.h"
#include "xla/hlo/builder/lib/arithmetic.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape.h"
#include "xla/xla_data.pb.h"

namespace lbe {
namespace hlo {

using ::xla::XlaOp;

inline xla::PrimitiveType ResultType(DType dtype) {
  return dtype == DType::kFloat64 ? xla::F64 : xla::F32;
}

// Activations [N, ...] in the type of the results, and their sizes as scalars
// of that type. A size is a constant, unless XLA knows only a bound of it
// (after tf.boolean_mask, for one).
struct Batch {
  Batch(XlaOp input, const xla::Shape& shape, DType dtype,
        const Formula& formula)
      : type(ResultType(dtype)),
        x(xla::ConvertElementType(input, type)),
        most_rows(shape.dimensions(0)) {
    const int rank = static_cast<int>(shape.dimensions().size());
    const auto size = [&](int first, int last) {
      XlaOp product = Scalar(1);
      for (int d = first; d < last; ++d) {
        const XlaOp factor =
            shape.is_dynamic_dimension(d)
                ? xla::ConvertElementType(xla::GetDimensionSize(input, d), type)
                : Scalar(static_cast<double>(shape.dimensions(d)));
        product = xla::Mul(product, factor);
      }
      return product;
    };
    rows = size(0, 1);
    units = size(1, rank);
    freedom = xla::Max(
        xla::Sub(rows, Scalar(static_cast<double>(formula.ddof))), Scalar(1));
    enough = xla::And(xla::Ge(rows, Scalar(2)), xla::Ge(units, Scalar(1)));
    for (int d = 1; d < rank; ++d) unit_dimensions.push_back(d);
  }

  XlaOp Scalar(double value) const {
    return xla::ConstantR0WithType(x.builder(), type, value);
  }

  XlaOp Sum(XlaOp value, absl::Span<const int64_t> dimensions) const {
    return xla::Reduce(value, Scalar(0),
                       xla::CreateScalarAddComputation(type, x.builder()),
                       dimensions);
  }

  xla::PrimitiveType type;
  XlaOp x;
  int64_t most_rows;  // rows, or their bound
  XlaOp rows, units;
  XlaOp freedom;  // max(rows - ddof, 1)
  XlaOp enough;   // rows >= 2 and units >= 1
  std::vector<int64_t> unit_dimensions;
};

struct Statistics {
  XlaOp entropy, mean, variance;
};

// In two passes. The mean is taken relative to the first row, so that a unit
// that does not vary has a variance of exactly 0: the mean of N equal numbers
// is that number for no N but powers of two.
inline Statistics StatisticsOf(const Batch& batch, const Formula& formula) {
  const XlaOp row = xla::SliceInDim(
      batch.x, 0, std::min<int64_t>(batch.most_rows, 1), /*stride=*/1,
      /*dimno=*/0);
  const XlaOp first = batch.Sum(row, {0});  // the row, without its dimension
  const XlaOp from_first = xla::Sub(batch.x, first, batch.unit_dimensions);
  const XlaOp mean =
      xla::Add(first, xla::Div(batch.Sum(from_first, {0}), batch.rows));
  const XlaOp difference = xla::Sub(batch.x, mean, batch.unit_dimensions);
  const XlaOp variance =
      xla::Div(batch.Sum(xla::Mul(difference, difference), {0}), batch.freedom);
  XlaOp log;
  if (formula.offset > 0) {
    // ln offset + log1p(t) keeps small variances, which log(offset + tiny)
    // loses.
    const XlaOp ratio = batch.Scalar(formula.scale / formula.offset);
    log = xla::Add(xla::Log1p(xla::Mul(variance, ratio)),
                   batch.Scalar(std::log(formula.offset)));
  } else {
    log = xla::Log(xla::Mul(variance, batch.Scalar(formula.scale)));
  }
  std::vector<int64_t> all;
  for (const int64_t d : batch.unit_dimensions) all.push_back(d - 1);
  const XlaOp sum = batch.Sum(log, all);
  return {xla::Div(xla::Mul(sum, batch.Scalar(0.5)), batch.units), mean,
          variance};
}

// The gradient of entropy_grad * entropy:
//   share * (reciprocal_u * (x_nu - mean_u)),
// in this order, as batch_entropy.h says why.
inline XlaOp EntropyGradient(const Batch& batch, const Formula& formula,
                             XlaOp mean, XlaOp variance, XlaOp entropy_grad) {
  const XlaOp scale = batch.Scalar(formula.scale);
  const XlaOp share = xla::Mul(
      entropy_grad, xla::Div(scale, xla::Mul(batch.units, batch.freedom)));
  const XlaOp reciprocal = xla::Div(
      batch.Scalar(1),
      xla::Add(xla::Mul(variance, scale), batch.Scalar(formula.offset)));
  const XlaOp difference = xla::Sub(batch.x, mean, batch.unit_dimensions);
  return xla::Mul(xla::Mul(difference, reciprocal, batch.unit_dimensions),
                  share);
}

// The gradient of sum_u(mean_grad * mean + variance_grad * variance).
inline XlaOp StatisticsGradient(const Batch& batch, XlaOp mean, XlaOp mean_grad,
                                XlaOp variance_grad) {
  const XlaOp slope =
      xla::Mul(variance_grad, xla::Div(batch.Scalar(2), batch.freedom));
  const XlaOp difference = xla::Sub(batch.x, mean, batch.unit_dimensions);
  return xla::Add(xla::Mul(difference, slope, batch.unit_dimensions),
                  xla::Div(mean_grad, batch.rows), batch.unit_dimensions);
}

inline XlaOp Activate(const Epilogue& epilogue, XlaOp z) {
  const XlaOp zero = xla::ZerosLike(z);
  const XlaOp slope = xla::ScalarLike(z, epilogue.slope);
  const XlaOp negative = xla::Lt(z, zero);
  switch (epilogue.activation) {
    case Activation::kLinear:
      return z;
    case Activation::kRelu:
      return xla::Select(negative, zero, z);
    case Activation::kLeakyRelu:
      return xla::Select(negative, xla::Mul(z, slope), z);
    case Activation::kElu:
      return xla::Select(negative,
                         xla::Mul(xla::Expm1(xla::Min(z, zero)), slope), z);
    case Activation::kSelu: {
      const XlaOp below = xla::Mul(xla::Expm1(xla::Min(z, zero)),
                                   xla::ScalarLike(z, kSeluAlpha));
      return xla::Mul(xla::Select(negative, below, z),
                      xla::ScalarLike(z, kSeluScale));
    }
    case Activation::kTanh:
      return xla::Tanh(z);
    case Activation::kSigmoid:
      return xla::Logistic(z);
    case Activation::kSoftplus:
      return xla::Add(xla::Max(z, zero),
                      xla::Log1p(xla::Exp(xla::Neg(xla::Abs(z)))));
  }
  return z;
}

// d activation(z) / dz, of y = activation(z).
inline XlaOp Derivative(const Epilogue& epilogue, XlaOp y) {
  const XlaOp zero = xla::ZerosLike(y);
  const XlaOp one = xla::ScalarLike(y, 1);
  const XlaOp slope = xla::ScalarLike(y, epilogue.slope);
  switch (epilogue.activation) {
    case Activation::kLinear:
      return one;
    case Activation::kRelu:
      return xla::Select(xla::Gt(y, zero), one, zero);
    case Activation::kLeakyRelu:
      return xla::Select(xla::Gt(y, zero), one, slope);
    case Activation::kElu:
      return xla::Select(xla::Lt(y, zero), xla::Add(y, slope), one);
    case Activation::kSelu: {
      const XlaOp below =
          xla::Add(y, xla::ScalarLike(y, kSeluScale * kSeluAlpha));
      return xla::Select(xla::Lt(y, zero), below,
                         xla::ScalarLike(y, kSeluScale));
    }
    case Activation::kTanh:
      return xla::Sub(one, xla::Mul(y, y));
    case Activation::kSigmoid:
      return xla::Mul(y, xla::Sub(one, y));
    case Activation::kSoftplus:
      return xla::Neg(xla::Expm1(xla::Neg(y)));
  }
  return one;
}

}  // namespace hlo
}  // namespace lbe

#endif  // LBE_OPS_CC_HLO_FORMULA_H_
