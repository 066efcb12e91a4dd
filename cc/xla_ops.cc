// SPDX-License-Identifier: Apache-2.0
//
// How XLA compiles the ops of tf_ops.cc (jit_compile=True).
//
// LBE>BatchEntropy, LBE>Epilogue and LBE>EpilogueGrad are custom calls of the
// kernels in kernels.h wherever there are some for the platform, and the HLO of
// hlo_formula.h elsewhere. LBE>BatchEntropyGrad, and an epilogue's gradient
// without activation and bias, are HLO always: XLA fuses them with what comes
// before and after.
//
// Not known: whether the custom call of an epilogue is the faster way on a GPU.
// Where XLA fuses bias and activation into the product (an epilogue of cuBLASLt
// or Triton), the call costs two more passes, since z is written and read
// again; statistics of the product's y would cost one, that of reading y. To be
// measured there, before anyone calls the epilogue free.
//
// A library of its own, beside that of tf_ops.cc: it takes minutes to compile,
// needs headers that TensorFlow does not ship, and where it cannot be loaded
// the op still works outside of XLA.

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "hlo_formula.h"
#include "kernels.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/kernel_def_builder.h"
#include "tf_checks.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"
#include "xla_custom_call.h"

// native.py reads this from the file before it loads it.
extern "C" const char kLbeOpsXlaMarker[] __attribute__((used)) =
    "lbe_ops was built for TensorFlow " LBE_TENSORFLOW_VERSION ";";

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

absl::StatusOr<ManyDims> InputDims(XlaOpKernelContext* context) {
  ManyDims inputs;
  for (int i = 0; i < context->num_inputs(); ++i) {
    const absl::StatusOr<Shape> shape = context->InputXlaShape(i);
    TF_RETURN_IF_ERROR(shape.status());
    inputs.emplace_back(shape->dimensions().begin(), shape->dimensions().end());
  }
  return inputs;
}

// The results of LBE>BatchEntropy, in the order of its outputs: entropy, mean,
// variance, valid.
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
                          const Problem& problem, const Epilogue& epilogue,
                          bool in_place, int64_t index = 0) const {
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
        CustomCallConfig(problem, epilogue, MaxThreads(), index),
        /*has_side_effect=*/false, aliasing, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    std::vector<XlaOp> outputs;
    for (size_t i = 0; i + 1 < results.size(); ++i) {
      outputs.push_back(xla::GetTupleElement(call, static_cast<int64_t>(i)));
    }
    return outputs;
  }

  // REQUIRES: Callable(shape).
  Problem ProblemOf(const Shape& shape) const {
    return {dtype_, shape.dimensions(0), Units(shape), formula_};
  }
  int64_t ForwardWorkspace(const Problem& problem, bool has_epilogue) const {
    return ForwardCallWorkspace(platform_, problem, has_epilogue, MaxThreads());
  }

  // Shapes of the statistics: of one sample, in the type of the results.
  std::vector<Shape> StatisticsShapes(const Shape& shape) const {
    const Shape scalar = ShapeUtil::MakeShape(hlo::ResultType(dtype_), {});
    return {scalar, UnitShape(shape), UnitShape(shape), scalar};
  }
  Shape UnitShape(const Shape& shape) const {
    return RowMajor(hlo::ResultType(dtype_), shape.dimensions().subspan(1));
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
    if (shape.is_dynamic()) return OfUnknownSize(x, shape, zero_small_batch);
    if (shape.dimensions(0) < 2 || Units(shape) < 1) {
      if (!zero_small_batch) {
        return SmallBatchError(TensorShape(shape.dimensions()).DebugString());
      }
      const XlaOp zero = xla::Zero(x.builder(), hlo::ResultType(dtype_));
      const XlaOp zeros = xla::Zeros(x.builder(), UnitShape(shape));
      return Results{zero, zeros, zeros, zero};
    }
    if (Callable(shape)) {
      const Problem problem = ProblemOf(shape);
      const std::vector<XlaOp> outputs =
          Call(kStatisticsCall, {x}, StatisticsShapes(shape),
               ForwardWorkspace(problem, /*has_epilogue=*/false), problem,
               Epilogue(), /*in_place=*/false);
      return Results{outputs[0], outputs[1], outputs[2], outputs[3]};
    }
    const hlo::Batch batch(x, shape, dtype_, formula_);
    const auto [entropy, mean, variance] = hlo::StatisticsOf(batch, formula_);
    return Results{entropy, mean, variance, batch.Scalar(1)};
  }

 private:
  // With sizes that are known at run time only, a small batch cannot be an
  // error: its entropy is NaN.
  Results OfUnknownSize(XlaOp x, const Shape& shape,
                        bool zero_small_batch) const {
    const hlo::Batch batch(x, shape, dtype_, formula_);
    const auto [entropy, mean, variance] = hlo::StatisticsOf(batch, formula_);
    const XlaOp too_small = batch.Scalar(
        zero_small_batch ? 0 : std::numeric_limits<double>::quiet_NaN());
    const auto or_zero = [&](XlaOp value) {
      return xla::Select(batch.enough, value, xla::ZerosLike(value));
    };
    return {xla::Select(batch.enough, entropy, too_small), or_zero(mean),
            or_zero(variance),
            xla::ConvertElementType(batch.enough, batch.type)};
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

// Refuses what has no lowering: the statistics of a batch that is spread over
// replicas.
absl::Status CheckNotSynchronized(OpKernelConstruction* context) {
  bool synchronized = false;
  TF_RETURN_IF_ERROR(ReadSynchronized(context, &synchronized));
  if (!synchronized) return absl::OkStatus();
  return absl::UnimplementedError(
      "lbe_ops cannot compile the gradient of a synchronized entropy with XLA "
      "(jit_compile=True); native=False uses plain TensorFlow, which can");
}

class BatchEntropyGradLowering : public Lowering {
 public:
  explicit BatchEntropyGradLowering(OpKernelConstruction* context)
      : Lowering(context) {
    OP_REQUIRES_OK(context, CheckNotSynchronized(context));
  }

  void Compile(XlaOpKernelContext* context) override {
    const absl::StatusOr<Shape> shape = context->InputXlaShape(0);
    OP_REQUIRES_OK(context, shape.status());
    const absl::StatusOr<ManyDims> inputs = InputDims(context);
    OP_REQUIRES_OK(context, inputs.status());
    OP_REQUIRES_OK(context, CheckGradInputs(*inputs));
    const hlo::Batch batch(context->Input(0), *shape, dtype_, formula_);
    const XlaOp mean = context->Input(1);
    XlaOp dx = hlo::EntropyGradient(batch, formula_, mean, context->Input(2),
                                    context->Input(3));
    if (context->num_inputs() == 6) {
      dx = xla::Add(dx, hlo::StatisticsGradient(batch, mean, context->Input(4),
                                                context->Input(5)));
    }
    dx = xla::ConvertElementType(dx, shape->element_type());
    // XLA folds this where the sizes are constants.
    context->SetOutput(0, xla::Select(batch.enough, dx, xla::ZerosLike(dx)));
  }
};

// What an epilogue and its gradient share.
class EpilogueAttributes {
 public:
  explicit EpilogueAttributes(OpKernelConstruction* context) {
    OP_REQUIRES_OK(context, ReadEpilogue(context, &epilogue_, &has_bias_));
  }

 protected:
  // Without an activation and a bias y is z: XLA fuses more than we do.
  bool IsTap() const {
    return epilogue_.activation == Activation::kLinear && !has_bias_;
  }

  Epilogue epilogue_;
  bool has_bias_ = false;
};

// The HLO is in the type of the results: XLA fuses it with the product before
// it.
class EpilogueLowering : public StatisticsLowering, EpilogueAttributes {
 public:
  explicit EpilogueLowering(OpKernelConstruction* context)
      : StatisticsLowering(context), EpilogueAttributes(context) {}

  void Compile(XlaOpKernelContext* context) override {
    const absl::StatusOr<Shape> shape = context->InputXlaShape(0);
    OP_REQUIRES_OK(context, shape.status());
    OP_REQUIRES_OK(context, CheckBatch(shape->dimensions()));
    const int64_t last = shape->dimensions().size() - 1;
    if (has_bias_) {
      const absl::StatusOr<Shape> bias = context->InputXlaShape(1);
      OP_REQUIRES_OK(context, bias.status());
      OP_REQUIRES_OK(context,
                     CheckBias(shape->dimensions(), bias->dimensions()));
    }
    if (!IsTap() && Callable(*shape)) {
      std::vector<XlaOp> operands = {context->Input(0)};
      if (has_bias_) operands.push_back(context->Input(1));
      std::vector<Shape> results = StatisticsShapes(*shape);
      results.insert(results.begin(),
                     RowMajor(shape->element_type(), shape->dimensions()));
      const Problem problem = ProblemOf(*shape);
      const std::vector<XlaOp> outputs =
          Call(kEpilogueCall, operands, results,
               ForwardWorkspace(problem, /*has_epilogue=*/true), problem,
               epilogue_, /*in_place=*/true);
      for (int i = 0; i < 5; ++i) context->SetOutput(i, outputs[i]);
      return;
    }
    const PrimitiveType type = hlo::ResultType(dtype_);
    XlaOp z = xla::ConvertElementType(context->Input(0), type);
    if (has_bias_) {
      z = xla::Add(z, xla::ConvertElementType(context->Input(1), type), {last});
    }
    const XlaOp y = xla::ConvertElementType(hlo::Activate(epilogue_, z),
                                            shape->element_type());
    const absl::StatusOr<Results> results = Statistics(y, *shape, true);
    OP_REQUIRES_OK(context, results.status());
    context->SetOutput(0, y);
    for (int i = 0; i < 4; ++i) context->SetOutput(i + 1, (*results)[i]);
  }
};

class EpilogueGradLowering : public Lowering, EpilogueAttributes {
 public:
  explicit EpilogueGradLowering(OpKernelConstruction* context)
      : Lowering(context), EpilogueAttributes(context) {
    OP_REQUIRES_OK(context, CheckNotSynchronized(context));
    OP_REQUIRES_OK(context, ReadIndex(context, &index_));
  }

  void Compile(XlaOpKernelContext* context) override {
    const absl::StatusOr<Shape> shape = context->InputXlaShape(1);
    OP_REQUIRES_OK(context, shape.status());
    const absl::StatusOr<ManyDims> inputs = InputDims(context);
    OP_REQUIRES_OK(context, inputs.status());
    OP_REQUIRES_OK(context, CheckEpilogueGradInputs(*inputs, index_));
    if (has_bias_) {
      OP_REQUIRES_OK(context, CheckChannels(shape->dimensions()));
    }
    if (!IsTap() && Callable(*shape)) {
      CallKernel(context, *shape);
      return;
    }
    XlaOp entropy_grad = context->Input(4);
    if (index_ >= 0) {
      entropy_grad = xla::Reshape(
          xla::SliceInDim(entropy_grad, index_, index_ + 1, /*stride=*/1,
                          /*dimno=*/0),
          {});
    }
    const hlo::Batch batch(context->Input(1), *shape, dtype_, formula_);
    const XlaOp dy = xla::ConvertElementType(context->Input(0), batch.type);
    const XlaOp share = hlo::EntropyGradient(batch, formula_, context->Input(2),
                                             context->Input(3), entropy_grad);
    const XlaOp dz = xla::Mul(
        hlo::Derivative(epilogue_, batch.x),
        xla::Add(dy, xla::Select(batch.enough, share, xla::ZerosLike(share))));
    context->SetOutput(0, xla::ConvertElementType(dz, shape->element_type()));
    if (!has_bias_) return;
    std::vector<int64_t> positions;
    for (size_t d = 0; d + 1 < shape->dimensions().size(); ++d) {
      positions.push_back(static_cast<int64_t>(d));
    }
    context->SetOutput(1, xla::ConvertElementType(batch.Sum(dz, positions),
                                                  shape->element_type()));
  }

 private:
  void CallKernel(XlaOpKernelContext* context, const Shape& shape) const {
    std::vector<XlaOp> operands;
    for (int i = 0; i < 5; ++i) operands.push_back(context->Input(i));
    const PrimitiveType type = shape.element_type();
    std::vector<Shape> results = {RowMajor(type, shape.dimensions())};
    const int64_t channels = has_bias_ ? shape.dimensions().back() : 0;
    if (has_bias_) results.push_back(RowMajor(type, {channels}));
    const Problem problem = ProblemOf(shape);
    const std::vector<XlaOp> outputs = Call(
        kEpilogueGradCall, operands, results,
        GradientCallWorkspace(platform_, problem, channels), problem, epilogue_,
        /*in_place=*/true, std::max<int64_t>(index_, 0));
    for (size_t i = 0; i < outputs.size(); ++i) {
      context->SetOutput(static_cast<int>(i), outputs[i]);
    }
  }

  int64_t index_;
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
