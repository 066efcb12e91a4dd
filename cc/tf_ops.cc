// SPDX-License-Identifier: Apache-2.0
//
// The TensorFlow ops LBE>BatchEntropy, LBE>Epilogue and their gradients, by the
// names with Grad at the end: schema, shape function, kernel for CPU and GPU.
//
// Glue: checks, allocates, calls the launchers of kernels.h, reports.

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "tf_checks.h"

#ifdef LBE_CUDA
#include "xla/stream_executor/stream.h"
#endif

// native.py reads this from the file before it loads it.
extern "C" const char kLbeOpsMarker[] __attribute__((used)) =
    "lbe_ops was built for TensorFlow " LBE_TENSORFLOW_VERSION ";";

// Why the ops cannot run on a GPU, by its number, or "". native.py asks it
// about every GPU that TensorFlow uses: without an answer TensorFlow would move
// every layer's activations to the CPU and back.
extern "C" __attribute__((visibility("default"))) const char* LbeGpuProblem(
    int device) {
#ifdef LBE_CUDA
  const int error = lbe::DescribeCuda(device).error;
  return error == 0 ? "" : lbe::CudaErrorMessage(error);
#else
  (void)device;
  return "it was built without CUDA: put nvcc into PATH";
#endif
}

namespace lbe {
namespace {

using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

// "T: {half, ...}", with every dtype of the kernels.
std::string DTypesAttr() {
  const std::vector<std::string> names = {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  tensorflow::DataTypeString(tensorflow::tensorflow_name),
      LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  };
  return absl::StrCat("T: {", absl::StrJoin(names, ", "), "}");
}

// The attributes that all ops have, and those of an epilogue and its gradient.
#define LBE_ATTRIBUTES                                             \
  Attr(DTypesAttr())                                               \
      .Attr("result_type: {float, double} = DT_FLOAT")             \
      .Attr("ddof: int >= 0 = 0")                                  \
      .Attr(absl::StrFormat("scale: string = '%.17g'", lbe::kPiE)) \
      .Attr("offset: string = '1.0'")
#define LBE_EPILOGUE_ATTRIBUTES               \
  LBE_ATTRIBUTES.Attr("biases: int >= 0 = 0") \
      .Attr("activation: string = 'linear'")  \
      .Attr("slope: string = '0.0'")

// The shape of one sample: that of x without its first dimension.
absl::Status UnitShape(InferenceContext* c, ShapeHandle* units) {
  ShapeHandle x;
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(0), 1, &x));
  return c->Subshape(x, 1, units);
}

REGISTER_OP("LBE>BatchEntropy")
    .Input("x: T")
    .Output("entropy: result_type")
    .Output("mean: result_type")
    .Output("variance: result_type")
    .Output("valid: result_type")
    .LBE_ATTRIBUTES.Attr("small_batch: {'error', 'zero'} = 'error'")
    .Attr("statistics_grad: bool = false")
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      ShapeHandle units;
      TF_RETURN_IF_ERROR(UnitShape(c, &units));
      c->set_output(0, c->Scalar());
      c->set_output(1, units);
      c->set_output(2, units);
      c->set_output(3, c->Scalar());
      return absl::OkStatus();
    })
    .Doc(R"doc(
Batch entropy of a layer's activations, and the statistics of every unit.

With v the variance of a unit over the batch, the entropy is the mean over all units
of 1/2 ln(scale * v + offset), in nats. One pass over x; the same bits whatever the
number of threads. NaN and Inf in x come out as NaN.

x: Activations [N, ...]; every later position is a unit.
entropy: A scalar.
mean: The mean of every unit, of the shape of one sample.
variance: The variance of every unit.
valid: 1, or 0 where small_batch is 'zero' and x has N < 2 or no unit.
result_type: double if T is double, else float.
ddof: The sum of squares is divided by N - ddof; 0 or 1.
scale: A positive number, as text: attributes of type float have 32 bits.
offset: A number >= 0, as text.
small_batch: Where N < 2 or x has no unit, 'error' fails and 'zero' returns zeros.
statistics_grad: Whether gradients flow through mean and variance, too.
)doc");

REGISTER_OP("LBE>BatchEntropyGrad")
    .Input("x: T")
    .Input("mean: result_type")
    .Input("variance: result_type")
    .Input("entropy_grad: result_type")
    .Input("statistic_grads: statistics * result_type")
    .Output("dx: T")
    .LBE_ATTRIBUTES.Attr("statistics: int >= 0 = 0")
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      ShapeHandle units, scalar;
      TF_RETURN_IF_ERROR(UnitShape(c, &units));
      for (int i = 1; i < c->num_inputs(); ++i) {
        if (i == 3) continue;
        TF_RETURN_IF_ERROR(c->Merge(units, c->input(i), &units));
      }
      TF_RETURN_IF_ERROR(c->WithRank(c->input(3), 0, &scalar));
      c->set_output(0, c->input(0));
      return absl::OkStatus();
    })
    .Doc(R"doc(
Gradient of LBE>BatchEntropy.

x: The activations [N, ...] that LBE>BatchEntropy received.
mean: The mean that it returned.
variance: The variance that it returned.
entropy_grad: The gradient with respect to the entropy, a scalar.
statistic_grads: None, or the gradients with respect to mean and variance.
dx: The gradient with respect to x; 0 where N < 2.
)doc");

REGISTER_OP("LBE>Epilogue")
    .Input("z: T")
    .Input("bias: biases * T")
    .Output("y: T")
    .Output("entropy: result_type")
    .Output("mean: result_type")
    .Output("variance: result_type")
    .Output("valid: result_type")
    .LBE_EPILOGUE_ATTRIBUTES
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      ShapeHandle units;
      TF_RETURN_IF_ERROR(UnitShape(c, &units));
      c->set_output(0, c->input(0));
      c->set_output(1, c->Scalar());
      c->set_output(2, units);
      c->set_output(3, units);
      c->set_output(4, c->Scalar());
      return absl::OkStatus();
    })
    .Doc(R"doc(
y = activation(z + bias), and the batch entropy of y in the same pass.

z: The layer's products [N, ..., C].
bias: None, or one of shape [C].
y: Of the shape of z, whose memory it takes where nobody else needs z.
entropy: Of y; 0 where y has fewer than two samples or no unit.
mean: The mean of every unit of y.
variance: The variance of every unit of y.
valid: 1, or 0 where the entropy is not defined.
activation: linear, relu, leaky_relu, elu, selu, tanh, sigmoid or softplus.
slope: The slope of leaky_relu below 0, the factor of elu; as text.
ddof: As for LBE>BatchEntropy.
scale: As for LBE>BatchEntropy.
offset: As for LBE>BatchEntropy.
)doc");

REGISTER_OP("LBE>EpilogueGrad")
    .Input("dy: T")
    .Input("y: T")
    .Input("mean: result_type")
    .Input("variance: result_type")
    .Input("entropy_grad: result_type")
    .Output("dz: T")
    .Output("dbias: biases * T")
    .LBE_EPILOGUE_ATTRIBUTES.Attr("index: int >= -1 = -1")
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      ShapeHandle y, units, scalar;
      TF_RETURN_IF_ERROR(c->Merge(c->input(0), c->input(1), &y));
      TF_RETURN_IF_ERROR(UnitShape(c, &units));
      for (int i : {2, 3}) {
        TF_RETURN_IF_ERROR(c->Merge(units, c->input(i), &units));
      }
      int64_t index;
      TF_RETURN_IF_ERROR(c->GetAttr("index", &index));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(4), index < 0 ? 0 : 1, &scalar));
      c->set_output(0, y);
      for (int i = 1; i < c->num_outputs(); ++i) {
        c->set_output(i, c->RankKnown(y) ? c->Vector(c->Dim(y, -1))
                                         : c->UnknownShapeOfRank(1));
      }
      return absl::OkStatus();
    })
    .Doc(R"doc(
Gradient of LBE>Epilogue: activation'(y) * (dy + the gradient of the entropy).

dy: The gradient with respect to y.
y: What LBE>Epilogue returned.
mean: The mean that it returned.
variance: The variance that it returned.
entropy_grad: The gradient with respect to the entropy, a scalar; or a vector of
  those of many layers.
index: Of this layer in that vector, or -1.
dz: The gradient with respect to z; in the memory of dy where nobody else needs it.
dbias: That with respect to the bias, the sum of dz, if there is one.
)doc");

// The sizes of a batch.
struct Sizes {
  int64_t rows;
  int64_t units;
  TensorShape unit_shape;
  bool empty() const { return rows == 0 || units == 0; }
  bool have_entropy() const { return rows >= 2 && units >= 1; }
};

absl::Status SizesOf(const Tensor& x, Sizes* sizes) {
  const Dims dims = x.shape().dim_sizes();
  TF_RETURN_IF_ERROR(CheckBatch(dims));
  sizes->rows = dims[0];
  // Not RemoveDim, which aborts where the product of the others overflows.
  TF_RETURN_IF_ERROR(TensorShape::BuildTensorShape(
      absl::MakeConstSpan(dims).subspan(1), &sizes->unit_shape));
  sizes->units = sizes->unit_shape.num_elements();
  return absl::OkStatus();
}

ManyDims InputDims(OpKernelContext* context) {
  ManyDims inputs;
  for (int i = 0; i < context->num_inputs(); ++i) {
    inputs.push_back(context->input(i).shape().dim_sizes());
  }
  return inputs;
}

// The launchers of kernels.h for one device, with one signature for both.
// Pointers are to that device's memory.
class Cpu {
 public:
  explicit Cpu(OpKernelContext* context)
      : pool_(context->device()->tensorflow_cpu_worker_threads()->workers) {}

  absl::Status SetZero(Tensor* tensor) const {
    std::memset(tensor->data(), 0, tensor->TotalBytes());
    return absl::OkStatus();
  }
  int64_t ForwardWorkspace(const Problem& problem,
                           bool /*has_epilogue*/) const {
    return ForwardCpuWorkspace(problem, pool_->NumThreads());
  }
  absl::Status Forward(const Problem& problem,
                       const ForwardArguments& arguments) const {
    ForwardCpu(parallel(), problem, arguments);
    return absl::OkStatus();
  }
  int64_t GradientWorkspace(const Problem& problem, int64_t channels) const {
    return GradientCpuWorkspace(problem, channels);
  }
  absl::Status Gradient(const Problem& problem,
                        const GradientArguments& arguments) const {
    GradientCpu(parallel(), problem, arguments);
    return absl::OkStatus();
  }

 private:
  using ThreadPool = tensorflow::thread::ThreadPool;

  Parallel parallel() const {
    return {pool_->NumThreads(), pool_,
            [](void* pool, int workers, void (*body)(void*), void* argument) {
              static_cast<ThreadPool*>(pool)->ParallelFor(
                  workers, ThreadPool::SchedulingParams::Fixed(1),
                  [body, argument](int64_t, int64_t) { body(argument); });
            }};
  }

  ThreadPool* pool_;
};

#ifdef LBE_CUDA
// Everything goes to TensorFlow's own stream: nothing here waits for the GPU.
class Gpu {
 public:
  explicit Gpu(OpKernelContext* context)
      : stream_(context->op_device_context()
                    ->stream()
                    ->platform_specific_handle()
                    .stream) {}

  absl::Status SetZero(Tensor* tensor) const {
    return Status(SetZeroCuda(stream_, tensor->data(), tensor->TotalBytes()));
  }
  int64_t ForwardWorkspace(const Problem& problem, bool has_epilogue) const {
    return ForwardCudaWorkspace(problem, has_epilogue);
  }
  absl::Status Forward(const Problem& problem,
                       const ForwardArguments& arguments) const {
    return Status(ForwardCuda(stream_, problem, arguments));
  }
  int64_t GradientWorkspace(const Problem& problem, int64_t channels) const {
    return GradientCudaWorkspace(problem, channels);
  }
  absl::Status Gradient(const Problem& problem,
                        const GradientArguments& arguments) const {
    return Status(GradientCuda(stream_, problem, arguments));
  }

 private:
  static absl::Status Status(int error) {
    if (error == 0) return absl::OkStatus();
    return absl::InternalError(
        absl::StrCat("lbe_ops on the GPU: ", CudaErrorMessage(error)));
  }

  void* stream_;
};
#endif  // LBE_CUDA

// What the kernels of all ops share.
template <typename Device>
class Kernel : public OpKernel {
 public:
  explicit Kernel(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(context, &dtype_, &formula_));
  }

  // Run where it becomes ready: a layer's statistics take less time than waking
  // another thread, and large ones are cut into parts anyway.
  bool IsExpensive() override { return false; }

 protected:
  // A batch of one has no entropy, but the output of an epilogue. Its variance
  // is 0 then.
  Problem ProblemOf(const Sizes& sizes) const {
    Problem problem{dtype_, sizes.rows, sizes.units, formula_};
    if (!sizes.have_entropy()) problem.formula.ddof = 0;
    return problem;
  }

  // Runs a forward pass where `run` says so, with arguments that have x and
  // what belongs to an epilogue. The outputs from `first` on are entropy, mean,
  // variance and valid: what is not defined is 0.
  absl::Status Forward(OpKernelContext* context, const Sizes& sizes, bool run,
                       int first, ForwardArguments arguments) const {
    std::array<Tensor*, 4> outputs;
    for (int i = 0; i < 4; ++i) {
      const bool of_units = i == 1 || i == 2;
      TF_RETURN_IF_ERROR(context->allocate_output(
          first + i, of_units ? sizes.unit_shape : TensorShape({}),
          &outputs[i]));
    }
    const auto [entropy, mean, variance, valid] = outputs;
    const Device device(context);
    if (run) {
      const Problem problem = ProblemOf(sizes);
      Tensor workspace;
      TF_RETURN_IF_ERROR(AllocateWorkspace(
          context,
          device.ForwardWorkspace(problem, arguments.epilogue != nullptr),
          &workspace));
      arguments.workspace = workspace.data();
      arguments.entropy = entropy->data();
      arguments.mean = mean->data();
      arguments.variance = variance->data();
      arguments.valid = valid->data();
      TF_RETURN_IF_ERROR(device.Forward(problem, arguments));
    } else {
      TF_RETURN_IF_ERROR(device.SetZero(mean));
      TF_RETURN_IF_ERROR(device.SetZero(variance));
    }
    if (run && sizes.have_entropy()) return absl::OkStatus();
    TF_RETURN_IF_ERROR(device.SetZero(entropy));
    return device.SetZero(valid);
  }

  static absl::Status AllocateWorkspace(OpKernelContext* context, int64_t bytes,
                                        Tensor* workspace) {
    return context->allocate_temp(tensorflow::DT_INT8, TensorShape({bytes}),
                                  workspace);
  }

 private:
  DType dtype_;
  Formula formula_;
};

template <typename Device>
class BatchEntropyOp : public Kernel<Device> {
 public:
  explicit BatchEntropyOp(OpKernelConstruction* context)
      : Kernel<Device>(context) {
    OP_REQUIRES_OK(context, ReadSmallBatch(context, &zero_small_batch_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(x, &sizes));
    OP_REQUIRES(context, sizes.have_entropy() || zero_small_batch_,
                SmallBatchError(x.shape().DebugString()));
    ForwardArguments arguments;
    arguments.x = x.data();
    OP_REQUIRES_OK(context, this->Forward(context, sizes, sizes.have_entropy(),
                                          /*first=*/0, arguments));
  }

 private:
  bool zero_small_batch_;
};

template <typename Device>
class BatchEntropyGradOp : public Kernel<Device> {
 public:
  using Kernel<Device>::Kernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(x, &sizes));
    OP_REQUIRES_OK(context, CheckGradInputs(InputDims(context)));
    Tensor* dx;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(
                                {0}, 0, x.shape(), &dx));
    const Device device(context);
    if (!sizes.have_entropy()) {
      OP_REQUIRES_OK(context, device.SetZero(dx));
      return;
    }
    GradientArguments arguments;
    arguments.x = x.data();
    arguments.mean = context->input(1).data();
    arguments.variance = context->input(2).data();
    arguments.entropy_grad = context->input(3).data();
    if (context->num_inputs() > 4) {
      arguments.mean_grad = context->input(4).data();
      arguments.variance_grad = context->input(5).data();
    }
    arguments.dx = dx->data();
    OP_REQUIRES_OK(context, device.Gradient(this->ProblemOf(sizes), arguments));
  }
};

// What the kernels of an epilogue and its gradient share.
template <typename Device>
class EpilogueKernel : public Kernel<Device> {
 public:
  explicit EpilogueKernel(OpKernelConstruction* context)
      : Kernel<Device>(context) {
    OP_REQUIRES_OK(context, ReadEpilogue(context, &epilogue_, &has_bias_));
  }

 protected:
  // The epilogue of z or y, without its bias.
  Epilogue EpilogueOf(const Tensor& activations) const {
    Epilogue epilogue = epilogue_;
    const int last = activations.dims() - 1;
    epilogue.channels = std::max<int64_t>(activations.dim_size(last), 1);
    return epilogue;
  }

  bool has_bias_;

 private:
  Epilogue epilogue_;
};

template <typename Device>
class EpilogueOp : public EpilogueKernel<Device> {
 public:
  using EpilogueKernel<Device>::EpilogueKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& z = context->input(0);
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(z, &sizes));
    Epilogue epilogue = this->EpilogueOf(z);
    if (this->has_bias_) {
      const Tensor& bias = context->input(1);
      OP_REQUIRES_OK(
          context, CheckBias(z.shape().dim_sizes(), bias.shape().dim_sizes()));
      epilogue.bias = bias.data();
    }
    Tensor* y;
    if (epilogue.activation == Activation::kLinear && !this->has_bias_) {
      context->set_output(0, z);  // not even a copy
      y = context->mutable_output(0);
    } else {
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(
                                  {0}, 0, z.shape(), &y));
    }
    ForwardArguments arguments;
    arguments.x = z.data();
    arguments.epilogue = &epilogue;
    arguments.y = y->data();
    OP_REQUIRES_OK(context, this->Forward(context, sizes, !sizes.empty(),
                                          /*first=*/1, arguments));
  }
};

template <typename Device>
class EpilogueGradOp : public EpilogueKernel<Device> {
 public:
  explicit EpilogueGradOp(OpKernelConstruction* context)
      : EpilogueKernel<Device>(context) {
    OP_REQUIRES_OK(context, ReadIndex(context, &index_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& dy = context->input(0);
    const Tensor& y = context->input(1);
    const Tensor& entropy_grad = context->input(4);
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(y, &sizes));
    OP_REQUIRES_OK(context,
                   CheckEpilogueGradInputs(InputDims(context), index_));
    Tensor *dz, *dbias = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(
                                {0}, 0, y.shape(), &dz));
    if (this->has_bias_) {
      OP_REQUIRES_OK(context,
                     context->allocate_output(
                         1, TensorShape({y.dim_size(y.dims() - 1)}), &dbias));
    }
    const Device device(context);
    if (sizes.empty()) {
      if (dbias != nullptr) OP_REQUIRES_OK(context, device.SetZero(dbias));
      return;
    }
    const Problem problem = this->ProblemOf(sizes);
    const Epilogue epilogue = this->EpilogueOf(y);
    GradientArguments arguments;
    arguments.x = y.data();
    arguments.mean = context->input(2).data();
    arguments.variance = context->input(3).data();
    arguments.entropy_grad =
        static_cast<const char*>(entropy_grad.data()) +
        std::max<int64_t>(index_, 0) * ResultBytes(problem.dtype);
    // The entropy of a batch of one is 0, whatever y is.
    Tensor zero;
    if (!sizes.have_entropy()) {
      OP_REQUIRES_OK(context, context->allocate_temp(entropy_grad.dtype(),
                                                     TensorShape({}), &zero));
      OP_REQUIRES_OK(context, device.SetZero(&zero));
      arguments.entropy_grad = zero.data();
    }
    arguments.epilogue = &epilogue;
    arguments.dy = dy.data();
    arguments.dx = dz->data();
    Tensor workspace;
    if (dbias != nullptr) {
      OP_REQUIRES_OK(
          context,
          this->AllocateWorkspace(
              context, device.GradientWorkspace(problem, epilogue.channels),
              &workspace));
      arguments.workspace = workspace.data();
      arguments.dbias = dbias->data();
    }
    OP_REQUIRES_OK(context, device.Gradient(problem, arguments));
  }

 private:
  int64_t index_;
};

#define LBE_REGISTER(device, launchers, type)                                \
  REGISTER_KERNEL_BUILDER(                                                   \
      Name("LBE>BatchEntropy").Device(device).TypeConstraint("T", type),     \
      BatchEntropyOp<launchers>);                                            \
  REGISTER_KERNEL_BUILDER(                                                   \
      Name("LBE>BatchEntropyGrad").Device(device).TypeConstraint("T", type), \
      BatchEntropyGradOp<launchers>);                                        \
  REGISTER_KERNEL_BUILDER(                                                   \
      Name("LBE>Epilogue").Device(device).TypeConstraint("T", type),         \
      EpilogueOp<launchers>);                                                \
  REGISTER_KERNEL_BUILDER(                                                   \
      Name("LBE>EpilogueGrad").Device(device).TypeConstraint("T", type),     \
      EpilogueGradOp<launchers>);
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  LBE_REGISTER(tensorflow::DEVICE_CPU, Cpu, tensorflow::tensorflow_name)
LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE

#ifdef LBE_CUDA
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  LBE_REGISTER(tensorflow::DEVICE_GPU, Gpu, tensorflow::tensorflow_name)
LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
#endif
#undef LBE_REGISTER

}  // namespace
}  // namespace lbe
