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

class BatchEntropyLowering : public XlaOpKernel {
 public:
  explicit BatchEntropyLowering(OpKernelConstruction* context)
      : XlaOpKernel(context),
        platform_(PlatformOf(context->device_type().type_string())) {
    OP_REQUIRES_OK(context, ReadAttributes(context, &dtype_, &formula_));
    OP_REQUIRES_OK(context, ReadSmallBatch(context, &zero_small_batch_));
  }

  void Compile(XlaOpKernelContext* context) override {
    const absl::StatusOr<Shape> shape = context->InputXlaShape(0);
    OP_REQUIRES_OK(context, shape.status());
    OP_REQUIRES(
        context, !shape->dimensions().empty(),
        InvalidArgument("x must have shape [batch, ...]. Received: a scalar"));
    if (shape->is_dynamic()) return CompileHlo(context, *shape);
    const int64_t rows = shape->dimensions(0);
    int64_t units = 1;
    for (const int64_t size : shape->dimensions().subspan(1)) units *= size;
    if (rows < 2 || units < 1) {
      OP_REQUIRES(
          context, zero_small_batch_,
          SmallBatchError(TensorShape(shape->dimensions()).DebugString()));
      return CompileZeros(context, *shape);
    }
    if (HasCustomCall(platform_)) {
      return CompileCustomCall(context, *shape, rows, units);
    }
    CompileHlo(context, *shape);
  }

 private:
  void CompileZeros(XlaOpKernelContext* context, const Shape& shape) {
    const PrimitiveType type = ResultType(dtype_);
    const XlaOp zero = xla::Zero(context->builder(), type);
    const XlaOp zeros = xla::Zeros(context->builder(), UnitShape(shape));
    context->SetOutput(0, zero);
    context->SetOutput(1, zeros);
    context->SetOutput(2, zeros);
    context->SetOutput(3, zero);
  }

  void CompileCustomCall(XlaOpKernelContext* context, const Shape& shape,
                         int64_t rows, int64_t units) {
    const Shape scalar = ShapeUtil::MakeShape(ResultType(dtype_), {});
    const CustomCallOptions options{dtype_, formula_, MaxThreads()};
    // The kernels' row-major layout, whatever XLA would like best here. The
    // workspace is one more result, so that XLA plans its memory with that of
    // everything else: nothing is allocated when the program runs.
    const Shape result = ShapeUtil::MakeTupleShape(
        {scalar, UnitShape(shape), UnitShape(shape), scalar,
         ShapeUtil::MakeShape(
             xla::S8, {CustomCallWorkspace(platform_, options, rows, units)})});
    const Shape operand = ShapeUtil::MakeShapeWithDescendingLayout(
        shape.element_type(), shape.dimensions());
    const XlaOp call = xla::CustomCallWithLayout(
        context->builder(), kCustomCallTarget, {context->Input(0)}, result,
        {operand}, CustomCallConfig(options), /*has_side_effect=*/false,
        /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (int i = 0; i < 4; ++i) {
      context->SetOutput(i, xla::GetTupleElement(call, i));
    }
  }

  // Two passes, the formula of batch_entropy.h. With sizes that are known at
  // run time only, a small batch cannot be an error: its entropy is NaN.
  void CompileHlo(XlaOpKernelContext* context, const Shape& shape) {
    const Activations a(context->Input(0), shape, dtype_, formula_);
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
        zero_small_batch_ ? a.Scalar(0)
                          : a.Scalar(std::numeric_limits<double>::quiet_NaN());
    const auto or_zero = [&](XlaOp value) {
      return shape.is_dynamic()
                 ? xla::Select(a.enough, value, xla::ZerosLike(value))
                 : value;
    };
    context->SetOutput(0, shape.is_dynamic()
                              ? xla::Select(a.enough, entropy, too_small)
                              : entropy);
    context->SetOutput(1, or_zero(mean));
    context->SetOutput(2, or_zero(variance));
    context->SetOutput(3, xla::ConvertElementType(a.enough, a.type));
  }

  // Of one sample, in the type of the results.
  Shape UnitShape(const Shape& shape) const {
    return ShapeUtil::MakeShapeWithDescendingLayout(
        ResultType(dtype_), shape.dimensions().subspan(1));
  }

  static int64_t MaxThreads() {
    return std::max(1u, std::thread::hardware_concurrency());
  }

  const Platform platform_;
  DType dtype_;
  Formula formula_;
  bool zero_small_batch_;
};

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
    OP_REQUIRES_OK(context, CheckInputs(context, *shape));
    const Activations a(context->Input(0), *shape, dtype_, formula_);
    const XlaOp factor =
        xla::Div(a.Scalar(formula_.scale), xla::Mul(a.units, a.freedom));
    const XlaOp variance = context->Input(2);
    XlaOp slope =
        xla::Div(xla::Mul(context->Input(3), factor),
                 xla::Add(xla::Mul(variance, a.Scalar(formula_.scale)),
                          a.Scalar(formula_.offset)));
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
  static absl::Status CheckInputs(XlaOpKernelContext* context, const Shape& x) {
    if (x.dimensions().empty()) {
      return InvalidArgument(
          "x must have shape [batch, ...]. Received: a scalar");
    }
    const int inputs = context->num_inputs();
    if (inputs != 4 && inputs != 6) {
      return InvalidArgument(
          "statistic_grads must be empty or the gradients of mean and "
          "variance. Received: ",
          inputs - 4, " tensors");
    }
    for (int i = 1; i < inputs; ++i) {
      const absl::StatusOr<Shape> shape = context->InputXlaShape(i);
      TF_RETURN_IF_ERROR(shape.status());
      const absl::Span<const int64_t> expected =
          i == 3 ? absl::Span<const int64_t>() : x.dimensions().subspan(1);
      if (shape->dimensions() != expected) {
        return InvalidArgument(
            "input ", i, " must have the shape ",
            TensorShape(expected).DebugString(),
            ". Received: ", TensorShape(shape->dimensions()).DebugString());
      }
    }
    return absl::OkStatus();
  }

  DType dtype_;
  Formula formula_;
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

}  // namespace
}  // namespace lbe
