// SPDX-License-Identifier: Apache-2.0
//
// How XLA compiles LBE>BatchEntropy and LBE>BatchEntropyGrad
// (jit_compile=True).
//
// The forward pass is a custom call of the kernels in kernels.h wherever there
// is one for the platform, and plain HLO elsewhere. The gradient is plain HLO
// always: XLA fuses it with what comes before and after.
//
// A library of its own, beside that of tf_ops.cc: it takes minutes to compile,
// needs headers that TensorFlow does not ship, and where it cannot be loaded
// the op still works outside of XLA.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/kernel_def_builder.h"
#include "tf_attributes.h"
#include "xla/hlo/builder/lib/arithmetic.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"
#include "xla_custom_call.h"

#ifdef LBE_XLA_FFI
#define LBE_XLA_CUSTOM_CALL "1"
#else
#define LBE_XLA_CUSTOM_CALL "0"
#endif

// native.py reads this from the file before it loads it.
extern "C" const char kLbeOpsXlaMarker[] __attribute__((used)) =
    "lbe_ops was built for TensorFlow " LBE_TENSORFLOW_VERSION
    "; custom call: " LBE_XLA_CUSTOM_CALL ";";

namespace lbe {
namespace {

using ::tensorflow::OpKernelConstruction;
using ::tensorflow::TensorShape;
using ::tensorflow::XlaOpKernel;
using ::tensorflow::XlaOpKernelContext;
using ::xla::PrimitiveType;
using ::xla::Shape;
using ::xla::ShapeUtil;
using ::xla::XlaOp;

Platform PlatformOf(absl::string_view device) {
  if (device == tensorflow::DEVICE_CPU_XLA_JIT) return Platform::kHost;
  return Platform::kCuda;
}

PrimitiveType ResultType(DType dtype) {
  return dtype == DType::kFloat64 ? xla::F64 : xla::F32;
}

absl::StatusOr<ManyDims> InputDims(XlaOpKernelContext* context) {
  ManyDims inputs;
  for (int i = 0; i < context->num_inputs(); ++i) {
    const absl::StatusOr<Shape> shape = context->InputXlaShape(i);
    TF_RETURN_IF_ERROR(shape.status());
    inputs.emplace_back(shape->dimensions().begin(), shape->dimensions().end());
  }
  return inputs;
}

// x in the type of the results, its sizes as scalars of that type, and what
// every lowering does with them. A size is a constant unless XLA knows a bound
// of it only (after tf.boolean_mask, for one).
struct Activations {
  Activations(XlaOp input, const Shape& shape, DType dtype,
              const Formula& formula)
      : type(ResultType(dtype)), x(xla::ConvertElementType(input, type)) {
    const auto size = [&](int first, int last) {
      XlaOp product = Scalar(1);
      for (int d = first; d < last; ++d) {
        const XlaOp factor =
            shape.is_dynamic_dimension(d)
                ? xla::ConvertElementType(xla::GetDimensionSize(input, d), type)
                : Scalar(shape.dimensions(d));
        product = xla::Mul(product, factor);
      }
      return product;
    };
    const int rank = shape.dimensions().size();
    rows = size(0, 1);
    units = size(1, rank);
    freedom = xla::Max(xla::Sub(rows, Scalar(formula.ddof)), Scalar(1));
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

  PrimitiveType type;
  XlaOp x;
  XlaOp rows, units, freedom;  // freedom = max(rows - ddof, 1)
  XlaOp enough;                // rows >= 2 and units >= 1
  std::vector<int64_t> unit_dimensions;
};

// The results of LBE>BatchEntropy, in the order of its outputs.
using Results = std::array<XlaOp, 4>;

// What all lowerings share.
class Lowering : public XlaOpKernel {
 public:
  explicit Lowering(OpKernelConstruction* context)
      : XlaOpKernel(context),
        platform_(PlatformOf(context->device_type().type_string())) {
    OP_REQUIRES_OK(context, ReadAttributes(context, &dtype_, &formula_));
  }

 protected:
  // Whether the kernels can do it, and not plain HLO. They need sizes that are
  // known, and an entropy.
  bool Callable(const Shape& shape) const {
    return !shape.is_dynamic() && shape.dimensions(0) >= 2 &&
           Units(shape) >= 1 && HasCustomCall(platform_);
  }

  // One of the calls of xla_custom_call.h; its results but for the workspace,
  // which is one so that XLA plans its memory with that of everything else:
  // nothing is allocated when the program runs. In place: the first result is
  // to have the memory of the first operand.
  std::vector<XlaOp> Call(const char* target, absl::Span<const XlaOp> operands,
                          std::vector<Shape> results, int64_t workspace,
                          const Epilogue& epilogue, bool in_place) const {
    xla::XlaBuilder* const builder = operands[0].builder();
    // The kernels' row-major layout, whatever XLA would like best here.
    std::vector<Shape> shapes;
    for (const XlaOp operand : operands) {
      const absl::StatusOr<Shape> shape = builder->GetShape(operand);
      if (!shape.ok()) {
        return std::vector<XlaOp>(results.size(),
                                  builder->ReportError(shape.status()));
      }
      shapes.push_back(RowMajor(shape->element_type(), shape->dimensions()));
    }
    results.push_back(ShapeUtil::MakeShape(xla::S8, {workspace}));
    std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>>
        aliasing;
    if (in_place) aliasing = {{{0}, {0, {}}}};
    const XlaOp call = xla::CustomCallWithLayout(
        builder, target, operands, ShapeUtil::MakeTupleShape(results), shapes,
        CustomCallConfig({dtype_, formula_, MaxThreads(), epilogue}),
        /*has_side_effect=*/false, aliasing, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    std::vector<XlaOp> outputs;
    for (size_t i = 0; i + 1 < results.size(); ++i) {
      outputs.push_back(xla::GetTupleElement(call, static_cast<int64_t>(i)));
    }
    return outputs;
  }

  int64_t ForwardWorkspace(const Shape& shape) const {
    return ForwardCallWorkspace(platform_,
                                {dtype_, formula_, MaxThreads(), Epilogue()},
                                shape.dimensions(0), Units(shape));
  }

  // Shapes of the statistics: of one sample, in the type of the results.
  std::vector<Shape> StatisticsShapes(const Shape& shape) const {
    const Shape scalar = ShapeUtil::MakeShape(ResultType(dtype_), {});
    return {scalar, UnitShape(shape), UnitShape(shape), scalar};
  }
  Shape UnitShape(const Shape& shape) const {
    return RowMajor(ResultType(dtype_), shape.dimensions().subspan(1));
  }
  static Shape RowMajor(PrimitiveType type, absl::Span<const int64_t> sizes) {
    return ShapeUtil::MakeShapeWithDescendingLayout(type, sizes);
  }
  static int64_t Units(const Shape& shape) {
    int64_t units = 1;
    for (const int64_t size : shape.dimensions().subspan(1)) units *= size;
    return units;
  }

  DType dtype_;
  Formula formula_;
  const Platform platform_;

 private:
  static int64_t MaxThreads() {
    return std::max(1u, std::thread::hardware_concurrency());
  }
};

// What both forward passes share: the statistics of activations x.
class StatisticsLowering : public Lowering {
 public:
  using Lowering::Lowering;

 protected:
  absl::StatusOr<Results> Statistics(XlaOp x, const Shape& shape,
                                     bool zero_small_batch) const {
    if (shape.is_dynamic()) return Hlo(x, shape, zero_small_batch);
    if (shape.dimensions(0) < 2 || Units(shape) < 1) {
      if (!zero_small_batch) {
        return SmallBatchError(TensorShape(shape.dimensions()).DebugString());
      }
      return Zeros(x, shape);
    }
    if (!Callable(shape)) return Hlo(x, shape, zero_small_batch);
    const std::vector<XlaOp> outputs =
        Call(kStatisticsCall, {x}, StatisticsShapes(shape),
             ForwardWorkspace(shape), Epilogue(), /*in_place=*/false);
    return Results{outputs[0], outputs[1], outputs[2], outputs[3]};
  }

 private:
  Results Zeros(XlaOp x, const Shape& shape) const {
    const XlaOp zero = xla::Zero(x.builder(), ResultType(dtype_));
    const XlaOp zeros = xla::Zeros(x.builder(), UnitShape(shape));
    return {zero, zeros, zeros, zero};
  }

  // Two passes, the formula of batch_entropy.h. With sizes that are known at
  // run time only, a small batch cannot be an error: its entropy is NaN.
  Results Hlo(XlaOp x, const Shape& shape, bool zero_small_batch) const {
    const Activations a(x, shape, dtype_, formula_);
    const XlaOp mean = xla::Div(a.Sum(a.x, {0}), a.rows);
    const XlaOp difference = xla::Sub(a.x, mean, a.unit_dimensions);
    const XlaOp m2 = a.Sum(xla::Mul(difference, difference), {0});
    const XlaOp variance = xla::Div(m2, a.freedom);
    XlaOp log;
    if (formula_.offset > 0) {
      // ln offset + log1p(t) keeps small variances, which log(offset + tiny)
      // loses.
      const XlaOp ratio = a.Scalar(formula_.scale / formula_.offset);
      log = xla::Add(xla::Log1p(xla::Mul(variance, ratio)),
                     a.Scalar(std::log(formula_.offset)));
    } else {
      log = xla::Log(xla::Mul(variance, a.Scalar(formula_.scale)));
    }
    std::vector<int64_t> all;
    for (const int64_t d : a.unit_dimensions) all.push_back(d - 1);
    const XlaOp entropy =
        xla::Div(xla::Mul(a.Sum(log, all), a.Scalar(0.5)), a.units);
    const XlaOp too_small =
        zero_small_batch ? a.Scalar(0)
                         : a.Scalar(std::numeric_limits<double>::quiet_NaN());
    const auto or_zero = [&](XlaOp value) {
      return shape.is_dynamic()
                 ? xla::Select(a.enough, value, xla::ZerosLike(value))
                 : value;
    };
    return {shape.is_dynamic() ? xla::Select(a.enough, entropy, too_small)
                               : entropy,
            or_zero(mean), or_zero(variance),
            xla::ConvertElementType(a.enough, a.type)};
  }
};

class BatchEntropyLowering : public StatisticsLowering {
 public:
  explicit BatchEntropyLowering(OpKernelConstruction* context)
      : StatisticsLowering(context) {
    OP_REQUIRES_OK(context, ReadSmallBatch(context, &zero_small_batch_));
  }

  void Compile(XlaOpKernelContext* context) override {
    const absl::StatusOr<Shape> shape = context->InputXlaShape(0);
    OP_REQUIRES_OK(context, shape.status());
    OP_REQUIRES_OK(context, CheckBatch(shape->dimensions()));
    const absl::StatusOr<Results> results =
        Statistics(context->Input(0), *shape, zero_small_batch_);
    OP_REQUIRES_OK(context, results.status());
    for (int i = 0; i < 4; ++i) context->SetOutput(i, (*results)[i]);
  }

 private:
  bool zero_small_batch_;
};

// entropy_grad * scale / (U (N - ddof) (scale * v_u + offset)) of each unit.
XlaOp EntropySlope(const Activations& a, const Formula& formula, XlaOp variance,
                   XlaOp entropy_grad) {
  const XlaOp factor =
      xla::Div(a.Scalar(formula.scale), xla::Mul(a.units, a.freedom));
  return xla::Div(xla::Mul(entropy_grad, factor),
                  xla::Add(xla::Mul(variance, a.Scalar(formula.scale)),
                           a.Scalar(formula.offset)));
}

class BatchEntropyGradLowering : public XlaOpKernel {
 public:
  explicit BatchEntropyGradLowering(OpKernelConstruction* context)
      : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(context, &dtype_, &formula_));
  }

  // dx = slope_u (x - mean_u) + offset_u, as in batch_entropy.h.
  void Compile(XlaOpKernelContext* context) override {
    const absl::StatusOr<Shape> shape = context->InputXlaShape(0);
    OP_REQUIRES_OK(context, shape.status());
    const absl::StatusOr<ManyDims> inputs = InputDims(context);
    OP_REQUIRES_OK(context, inputs.status());
    OP_REQUIRES_OK(context, CheckGradInputs(*inputs));
    const Activations a(context->Input(0), *shape, dtype_, formula_);
    XlaOp slope =
        EntropySlope(a, formula_, context->Input(2), context->Input(3));
    const bool statistics = context->num_inputs() == 6;
    if (statistics) {
      slope = xla::Add(
          slope, xla::Mul(context->Input(5), xla::Div(a.Scalar(2), a.freedom)));
    }
    XlaOp dx = xla::Mul(xla::Sub(a.x, context->Input(1), a.unit_dimensions),
                        slope, a.unit_dimensions);
    if (statistics) {
      dx = xla::Add(dx, xla::Div(context->Input(4), a.rows), a.unit_dimensions);
    }
    dx = xla::ConvertElementType(dx, shape->element_type());
    // XLA folds this where the sizes are constants.
    context->SetOutput(0, xla::Select(a.enough, dx, xla::ZerosLike(dx)));
  }

 private:
  DType dtype_;
  Formula formula_;
};

// An epilogue in the type of the results: XLA fuses it with the product before
// it. The maths of activations.h.
class EpilogueLowering : public StatisticsLowering {
 public:
  explicit EpilogueLowering(OpKernelConstruction* context)
      : StatisticsLowering(context) {
    OP_REQUIRES_OK(context, ReadEpilogue(context, &epilogue_));
  }

  void Compile(XlaOpKernelContext* context) override {
    const absl::StatusOr<Shape> shape = context->InputXlaShape(0);
    OP_REQUIRES_OK(context, shape.status());
    OP_REQUIRES_OK(context, CheckBatch(shape->dimensions()));
    const int64_t last = shape->dimensions().size() - 1;
    const bool has_bias = context->num_inputs() == 2;
    if (has_bias) {
      const absl::StatusOr<Shape> bias = context->InputXlaShape(1);
      OP_REQUIRES_OK(context, bias.status());
      OP_REQUIRES_OK(context,
                     CheckBias(shape->dimensions(), bias->dimensions()));
    }
    const bool tap = epilogue_.activation == Activation::kLinear && !has_bias;
    if (!tap && Callable(*shape)) {
      std::vector<XlaOp> operands = {context->Input(0)};
      if (has_bias) operands.push_back(context->Input(1));
      std::vector<Shape> results = StatisticsShapes(*shape);
      results.insert(results.begin(),
                     RowMajor(shape->element_type(), shape->dimensions()));
      const std::vector<XlaOp> outputs =
          Call(kEpilogueCall, operands, results, ForwardWorkspace(*shape),
               epilogue_, /*in_place=*/true);
      for (int i = 0; i < 5; ++i) context->SetOutput(i, outputs[i]);
      return;
    }
    XlaOp z = xla::ConvertElementType(context->Input(0), ResultType(dtype_));
    if (has_bias) {
      z = xla::Add(
          z, xla::ConvertElementType(context->Input(1), ResultType(dtype_)),
          {last});
    }
    const XlaOp y = xla::ConvertElementType(Activate(z), shape->element_type());
    const absl::StatusOr<Results> results = Statistics(y, *shape, true);
    OP_REQUIRES_OK(context, results.status());
    context->SetOutput(0, y);
    for (int i = 0; i < 4; ++i) context->SetOutput(i + 1, (*results)[i]);
  }

 private:
  XlaOp Activate(XlaOp z) const {
    const XlaOp zero = xla::ZerosLike(z);
    const XlaOp alpha = xla::ScalarLike(z, epilogue_.alpha);
    const XlaOp negative = xla::Lt(z, zero);
    switch (epilogue_.activation) {
      case Activation::kLinear:
        return z;
      case Activation::kRelu:
        return xla::Select(negative, zero, z);
      case Activation::kLeakyRelu:
        return xla::Select(negative, xla::Mul(z, alpha), z);
      case Activation::kElu:
        return xla::Select(negative,
                           xla::Mul(xla::Expm1(xla::Min(z, zero)), alpha), z);
      case Activation::kSelu:
        return xla::Mul(xla::Select(negative,
                                    xla::Mul(xla::Expm1(xla::Min(z, zero)),
                                             xla::ScalarLike(z, kSeluAlpha)),
                                    z),
                        xla::ScalarLike(z, kSeluScale));
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

  Epilogue epilogue_;
};

class EpilogueGradLowering : public Lowering {
 public:
  explicit EpilogueGradLowering(OpKernelConstruction* context)
      : Lowering(context) {
    OP_REQUIRES_OK(context, ReadEpilogue(context, &epilogue_));
  }

  void Compile(XlaOpKernelContext* context) override {
    const absl::StatusOr<Shape> shape = context->InputXlaShape(1);
    OP_REQUIRES_OK(context, shape.status());
    const absl::StatusOr<ManyDims> inputs = InputDims(context);
    OP_REQUIRES_OK(context, inputs.status());
    OP_REQUIRES_OK(context, CheckEpilogueGradInputs(*inputs));
    const bool has_bias = num_outputs() == 2;
    const bool tap = epilogue_.activation == Activation::kLinear && !has_bias;
    if (!tap && Callable(*shape)) {  // of a tap, XLA fuses more than we do
      CallKernel(context, *shape, has_bias);
      return;
    }
    const Activations y(context->Input(1), *shape, dtype_, formula_);
    const XlaOp dy = xla::ConvertElementType(context->Input(0), y.type);
    const XlaOp share = xla::Mul(
        xla::Sub(y.x, context->Input(2), y.unit_dimensions),
        EntropySlope(y, formula_, context->Input(3), context->Input(4)),
        y.unit_dimensions);
    const XlaOp dz = xla::Mul(
        Derivative(y.x),
        xla::Add(dy, xla::Select(y.enough, share, xla::ZerosLike(share))));
    context->SetOutput(0, xla::ConvertElementType(dz, shape->element_type()));
    if (!has_bias) return;
    std::vector<int64_t> positions;
    for (size_t d = 0; d + 1 < shape->dimensions().size(); ++d) {
      positions.push_back(static_cast<int64_t>(d));
    }
    context->SetOutput(1, xla::ConvertElementType(y.Sum(dz, positions),
                                                  shape->element_type()));
  }

 private:
  void CallKernel(XlaOpKernelContext* context, const Shape& shape,
                  bool has_bias) const {
    std::vector<XlaOp> operands;
    for (int i = 0; i < 5; ++i) operands.push_back(context->Input(i));
    const int64_t channels = shape.dimensions().back();
    std::vector<Shape> results = {
        RowMajor(shape.element_type(), shape.dimensions())};
    if (has_bias) results.push_back(RowMajor(shape.element_type(), {channels}));
    Epilogue epilogue = epilogue_;
    epilogue.bias = has_bias ? this : nullptr;  // any address: there is one
    epilogue.channels = channels;
    const std::vector<XlaOp> outputs =
        Call(kEpilogueGradCall, operands, results,
             EpilogueGradCallWorkspace(platform_, dtype_, epilogue,
                                       shape.dimensions(0), Units(shape)),
             epilogue_, /*in_place=*/true);
    for (size_t i = 0; i < outputs.size(); ++i) {
      context->SetOutput(static_cast<int>(i), outputs[i]);
    }
  }

  XlaOp Derivative(XlaOp y) const {
    const XlaOp zero = xla::ZerosLike(y);
    const XlaOp one = xla::ScalarLike(y, 1);
    const XlaOp alpha = xla::ScalarLike(y, epilogue_.alpha);
    const auto constant = [&](double value) {
      return xla::ScalarLike(y, value);
    };
    switch (epilogue_.activation) {
      case Activation::kLinear:
        return one;
      case Activation::kRelu:
        return xla::Select(xla::Gt(y, zero), one, zero);
      case Activation::kLeakyRelu:
        return xla::Select(xla::Gt(y, zero), one, alpha);
      case Activation::kElu:
        return xla::Select(xla::Lt(y, zero), xla::Add(y, alpha), one);
      case Activation::kSelu:
        return xla::Select(xla::Lt(y, zero),
                           xla::Add(y, constant(kSeluScale * kSeluAlpha)),
                           constant(kSeluScale));
      case Activation::kTanh:
        return xla::Sub(one, xla::Mul(y, y));
      case Activation::kSigmoid:
        return xla::Mul(y, xla::Sub(one, y));
      case Activation::kSoftplus:
        return xla::Neg(xla::Expm1(xla::Neg(y)));
    }
    return one;
  }

  Epilogue epilogue_;
};

// Straight into TensorFlow's registry of kernels, for the devices as which XLA
// compiles. REGISTER_XLA_OP keeps a list of its own that is read once, before
// the first compilation in the process: an op that is loaded later never gets
// there. It also aborts where a second copy of this library is loaded.
class Registrar {
 public:
  Registrar(const char* op,
            tensorflow::OpKernel* (*create)(OpKernelConstruction*)) {
    for (const char* device :
         {tensorflow::DEVICE_CPU_XLA_JIT, tensorflow::DEVICE_GPU_XLA_JIT}) {
      if (IsRegistered(op, device)) continue;
      tensorflow::kernel_factory::OpKernelRegistrar(
          tensorflow::KernelDefBuilder(op)
              .Device(device)
              .TypeConstraint("T", kDTypes)
              .Build(),
          "LbeXlaOp", create);
    }
  }

 private:
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  tensorflow::tensorflow_name,
  static constexpr tensorflow::DataType kDTypes[] = {
      LBE_FOR_EACH_DTYPE(LBE_DTYPE)};
#undef LBE_DTYPE

  static bool IsRegistered(const char* op, absl::string_view device) {
    const tensorflow::KernelList list =
        tensorflow::GetRegisteredKernelsForOp(op);
    for (const tensorflow::KernelDef& kernel : list.kernel()) {
      if (kernel.device_type() == device) return true;
    }
    return false;
  }
};

template <typename Kernel>
tensorflow::OpKernel* Create(OpKernelConstruction* context) {
  return new Kernel(context);
}

const Registrar forward("LBE>BatchEntropy", Create<BatchEntropyLowering>);
const Registrar gradient("LBE>BatchEntropyGrad",
                         Create<BatchEntropyGradLowering>);
const Registrar epilogue("LBE>Epilogue", Create<EpilogueLowering>);
const Registrar epilogue_gradient("LBE>EpilogueGrad",
                                  Create<EpilogueGradLowering>);

}  // namespace
}  // namespace lbe
