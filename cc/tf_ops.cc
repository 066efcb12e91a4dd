// SPDX-License-Identifier: Apache-2.0
//
// The TensorFlow ops LBE>BatchEntropy and LBE>BatchEntropyGrad: schema, shape
// function and kernel for CPU and GPU, forward and gradient side by side.
//
// Glue: checks, allocates, calls the launchers of kernels.h, reports.

#include <algorithm>
#include <array>
#include <cstring>

#include "absl/status/status.h"
#include "kernels.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "tf_attributes.h"

#ifdef LBE_CUDA
#include "xla/stream_executor/stream.h"
#endif

// native.py reads this from the file before it loads it.
extern "C" const char kLbeOpsMarker[] __attribute__((used)) =
    "lbe_ops was built for TensorFlow " LBE_TENSORFLOW_VERSION ";";

// Why the ops cannot run on this machine's GPU, or "". native.py asks it where
// TensorFlow sees a GPU: without an answer TensorFlow would move every layer's
// activations to the CPU and back.
extern "C" __attribute__((visibility("default"))) const char* LbeGpuProblem() {
#ifdef LBE_CUDA
  const int error = lbe::DescribeCuda().error;
  return error == 0 ? "" : lbe::CudaErrorMessage(error);
#else
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
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("result_type: {float, double} = DT_FLOAT")
    .Attr("ddof: int >= 0 = 0")
    .Attr("scale: string = '8.539734222673566'")
    .Attr("offset: string = '1.0'")
    .Attr("small_batch: {'error', 'zero'} = 'error'")
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
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("result_type: {float, double} = DT_FLOAT")
    .Attr("statistics: int >= 0 = 0")
    .Attr("ddof: int >= 0 = 0")
    .Attr("scale: string = '8.539734222673566'")
    .Attr("offset: string = '1.0'")
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
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("result_type: {float, double} = DT_FLOAT")
    .Attr("biases: int >= 0 = 0")
    .Attr("activation: string = 'linear'")
    .Attr("alpha: string = '0.0'")
    .Attr("ddof: int >= 0 = 0")
    .Attr("scale: string = '8.539734222673566'")
    .Attr("offset: string = '1.0'")
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
alpha: The slope of leaky_relu below 0, the factor of elu; as text.
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
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("result_type: {float, double} = DT_FLOAT")
    .Attr("biases: int >= 0 = 0")
    .Attr("activation: string = 'linear'")
    .Attr("alpha: string = '0.0'")
    .Attr("ddof: int >= 0 = 0")
    .Attr("scale: string = '8.539734222673566'")
    .Attr("offset: string = '1.0'")
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      ShapeHandle y, units, scalar;
      TF_RETURN_IF_ERROR(c->Merge(c->input(0), c->input(1), &y));
      TF_RETURN_IF_ERROR(UnitShape(c, &units));
      for (int i : {2, 3}) {
        TF_RETURN_IF_ERROR(c->Merge(units, c->input(i), &units));
      }
      TF_RETURN_IF_ERROR(c->WithRank(c->input(4), 0, &scalar));
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
entropy_grad: The gradient with respect to the entropy, a scalar.
dz: The gradient with respect to z; in the memory of dy where nobody else needs it.
dbias: That with respect to the bias, the sum of dz, if there is one.
)doc");

// What the kernels of all ops share: attributes and the sizes of x.
class BatchEntropyKernel : public OpKernel {
 public:
  explicit BatchEntropyKernel(OpKernelConstruction* context)
      : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(context, &dtype_, &formula_));
  }

  // Run where it becomes ready: a layer's statistics take less time than waking
  // another thread, and large ones are cut into parts anyway.
  bool IsExpensive() override { return false; }

 protected:
  struct Sizes {
    int64_t rows;
    int64_t units;
    TensorShape unit_shape;
    bool enough() const { return rows >= 2 && units >= 1; }
  };

  static absl::Status SizesOf(const Tensor& x, Sizes* sizes) {
    const Dims dims = x.shape().dim_sizes();
    TF_RETURN_IF_ERROR(CheckBatch(dims));
    sizes->rows = dims[0];
    // Not RemoveDim, which aborts where the product of the others overflows.
    TF_RETURN_IF_ERROR(TensorShape::BuildTensorShape(
        absl::MakeConstSpan(dims).subspan(1), &sizes->unit_shape));
    sizes->units = sizes->unit_shape.num_elements();
    return absl::OkStatus();
  }

  static ManyDims InputDims(OpKernelContext* context) {
    ManyDims inputs;
    for (int i = 0; i < context->num_inputs(); ++i) {
      inputs.push_back(context->input(i).shape().dim_sizes());
    }
    return inputs;
  }

  // Allocates the outputs from `first` on: entropy, mean, variance, valid.
  static absl::Status AllocateStatistics(OpKernelContext* context, int first,
                                         const Sizes& sizes,
                                         std::array<Tensor*, 4>* statistics) {
    const TensorShape scalar({});
    for (int i = 0; i < 4; ++i) {
      const bool of_units = i == 1 || i == 2;
      TF_RETURN_IF_ERROR(context->allocate_output(
          first + i, of_units ? sizes.unit_shape : scalar, &(*statistics)[i]));
    }
    return absl::OkStatus();
  }

  static absl::Status AllocateWorkspace(OpKernelContext* context, int64_t bytes,
                                        Tensor* workspace) {
    return context->allocate_temp(tensorflow::DT_INT8, TensorShape({bytes}),
                                  workspace);
  }

  DType dtype_;
  Formula formula_;
};

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
  template <typename... Arguments>
  int64_t ForwardWorkspace(Arguments... arguments) const {
    return BatchEntropyForwardCpuWorkspace(arguments..., pool_->NumThreads());
  }
  absl::Status Forward(DType dtype, const void* x, int64_t rows, int64_t units,
                       const Formula& formula, void* workspace, void* mean,
                       void* variance, void* entropy, void* valid) const {
    SetScalar(dtype, 1, valid);
    BatchEntropyForwardCpu(parallel(), dtype, x, rows, units, formula,
                           workspace, mean, variance, entropy);
    return absl::OkStatus();
  }
  template <typename... Arguments>
  absl::Status Gradient(const Arguments&... arguments) const {
    BatchEntropyGradCpu(parallel(), arguments...);
    return absl::OkStatus();
  }
  absl::Status EpilogueForward(DType dtype, const void* z,
                               const Epilogue& epilogue, int64_t rows,
                               int64_t units, const Formula& formula,
                               void* workspace, void* y, void* mean,
                               void* variance, void* entropy,
                               void* valid) const {
    SetScalar(dtype, 1, valid);
    EpilogueForwardCpu(parallel(), dtype, z, epilogue, rows, units, formula,
                       workspace, y, mean, variance, entropy);
    return absl::OkStatus();
  }
  template <typename... Arguments>
  int64_t EpilogueGradientWorkspace(const Arguments&... arguments) const {
    return EpilogueGradCpuWorkspace(arguments...);
  }
  template <typename... Arguments>
  absl::Status EpilogueGradient(const Arguments&... arguments) const {
    EpilogueGradCpu(parallel(), arguments...);
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
  template <typename... Arguments>
  int64_t ForwardWorkspace(Arguments... arguments) const {
    return BatchEntropyForwardCudaWorkspace(arguments...);
  }
  template <typename... Arguments>
  absl::Status Forward(const Arguments&... arguments) const {
    return Status(BatchEntropyForwardCuda(stream_, arguments...));
  }
  template <typename... Arguments>
  absl::Status Gradient(const Arguments&... arguments) const {
    return Status(BatchEntropyGradCuda(stream_, arguments...));
  }
  template <typename... Arguments>
  absl::Status EpilogueForward(const Arguments&... arguments) const {
    return Status(EpilogueForwardCuda(stream_, arguments...));
  }
  template <typename... Arguments>
  int64_t EpilogueGradientWorkspace(const Arguments&... arguments) const {
    return EpilogueGradCudaWorkspace(arguments...);
  }
  template <typename... Arguments>
  absl::Status EpilogueGradient(const Arguments&... arguments) const {
    return Status(EpilogueGradCuda(stream_, arguments...));
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

template <typename Device>
class BatchEntropyOp : public BatchEntropyKernel {
 public:
  explicit BatchEntropyOp(OpKernelConstruction* context)
      : BatchEntropyKernel(context) {
    OP_REQUIRES_OK(context, ReadSmallBatch(context, &zero_small_batch_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(x, &sizes));
    OP_REQUIRES(context, sizes.enough() || zero_small_batch_,
                SmallBatchError(x.shape().DebugString()));
    std::array<Tensor*, 4> statistics;
    OP_REQUIRES_OK(context, AllocateStatistics(context, 0, sizes, &statistics));
    const auto [entropy, mean, variance, valid] = statistics;
    const Device device(context);
    if (!sizes.enough()) {
      for (Tensor* output : statistics) {
        OP_REQUIRES_OK(context, device.SetZero(output));
      }
      return;
    }
    Tensor workspace;
    OP_REQUIRES_OK(
        context,
        AllocateWorkspace(
            context, device.ForwardWorkspace(dtype_, sizes.rows, sizes.units),
            &workspace));
    OP_REQUIRES_OK(
        context,
        device.Forward(dtype_, x.data(), sizes.rows, sizes.units, formula_,
                       workspace.data(), mean->data(), variance->data(),
                       entropy->data(), valid->data()));
  }

 private:
  bool zero_small_batch_;
};

template <typename Device>
class BatchEntropyGradOp : public BatchEntropyKernel {
 public:
  using BatchEntropyKernel::BatchEntropyKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(x, &sizes));
    OP_REQUIRES_OK(context, CheckGradInputs(InputDims(context)));
    Tensor* dx;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(
                                {0}, 0, x.shape(), &dx));
    const Device device(context);
    if (!sizes.enough()) {
      OP_REQUIRES_OK(context, device.SetZero(dx));
      return;
    }
    const auto input = [context](int i) -> const void* {
      return i < context->num_inputs() ? context->input(i).data() : nullptr;
    };
    void* const dx_data = dx->data();
    OP_REQUIRES_OK(context,
                   device.Gradient(dtype_, x.data(), sizes.rows, sizes.units,
                                   formula_, input(1), input(2), input(3),
                                   input(4), input(5), dx_data));
  }
};

// What the kernels of an epilogue and its gradient share.
class EpilogueKernel : public BatchEntropyKernel {
 public:
  explicit EpilogueKernel(OpKernelConstruction* context)
      : BatchEntropyKernel(context) {
    OP_REQUIRES_OK(context, ReadEpilogue(context, &epilogue_));
    int biases;
    OP_REQUIRES_OK(context, context->GetAttr("biases", &biases));
    OP_REQUIRES(context, biases <= 1,
                InvalidArgument("bias must be none or one. Received: ", biases,
                                " tensors"));
    has_bias_ = biases == 1;
  }

 protected:
  // With the bias, or any address in its place where only its gradient is
  // wanted.
  Epilogue EpilogueOf(const Tensor& y, const void* bias) const {
    Epilogue epilogue = epilogue_;
    epilogue.bias = bias;
    epilogue.channels = std::max<int64_t>(y.dim_size(y.dims() - 1), 1);
    return epilogue;
  }
  // A batch of one has no entropy, but an output. Its variance is 0 then.
  Formula FormulaOf(const Sizes& sizes) const {
    Formula formula = formula_;
    if (!sizes.enough()) formula.ddof = 0;
    return formula;
  }

  Epilogue epilogue_;
  bool has_bias_;
};

template <typename Device>
class EpilogueOp : public EpilogueKernel {
 public:
  using EpilogueKernel::EpilogueKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& z = context->input(0);
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(z, &sizes));
    const void* bias = nullptr;
    if (has_bias_) {
      const Tensor& tensor = context->input(1);
      OP_REQUIRES_OK(context, CheckBias(z.shape().dim_sizes(),
                                        tensor.shape().dim_sizes()));
      bias = tensor.data();
    }
    Tensor* y;
    if (epilogue_.activation == Activation::kLinear && !has_bias_) {
      context->set_output(0, z);  // not even a copy
      y = context->mutable_output(0);
    } else {
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(
                                  {0}, 0, z.shape(), &y));
    }
    std::array<Tensor*, 4> statistics;
    OP_REQUIRES_OK(context, AllocateStatistics(context, 1, sizes, &statistics));
    const auto [entropy, mean, variance, valid] = statistics;
    const Device device(context);
    if (sizes.rows == 0 || sizes.units == 0) {
      for (Tensor* output : statistics) {
        OP_REQUIRES_OK(context, device.SetZero(output));
      }
      return;
    }
    Tensor workspace;
    OP_REQUIRES_OK(
        context,
        AllocateWorkspace(
            context, device.ForwardWorkspace(dtype_, sizes.rows, sizes.units),
            &workspace));
    void* const y_data = y->data();
    OP_REQUIRES_OK(
        context, device.EpilogueForward(dtype_, z.data(), EpilogueOf(z, bias),
                                        sizes.rows, sizes.units,
                                        FormulaOf(sizes), workspace.data(),
                                        y_data, mean->data(), variance->data(),
                                        entropy->data(), valid->data()));
    if (sizes.enough()) return;
    OP_REQUIRES_OK(context, device.SetZero(entropy));
    OP_REQUIRES_OK(context, device.SetZero(valid));
  }
};

template <typename Device>
class EpilogueGradOp : public EpilogueKernel {
 public:
  using EpilogueKernel::EpilogueKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& dy = context->input(0);
    const Tensor& y = context->input(1);
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(y, &sizes));
    OP_REQUIRES_OK(context, CheckEpilogueGradInputs(InputDims(context)));
    Tensor *dz, *dbias = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(
                                {0}, 0, y.shape(), &dz));
    if (has_bias_) {
      OP_REQUIRES_OK(context,
                     context->allocate_output(
                         1, TensorShape({y.dim_size(y.dims() - 1)}), &dbias));
    }
    const Device device(context);
    if (sizes.rows == 0 || sizes.units == 0) {
      if (has_bias_) OP_REQUIRES_OK(context, device.SetZero(dbias));
      return;
    }
    // The entropy of a batch of one is 0, whatever y is.
    Tensor zero;
    const void* entropy_grad = context->input(4).data();
    if (!sizes.enough()) {
      OP_REQUIRES_OK(context, context->allocate_temp(context->input(4).dtype(),
                                                     TensorShape({}), &zero));
      OP_REQUIRES_OK(context, device.SetZero(&zero));
      entropy_grad = zero.data();
    }
    const Epilogue epilogue = EpilogueOf(y, has_bias_ ? y.data() : nullptr);
    Tensor workspace;
    OP_REQUIRES_OK(context, AllocateWorkspace(
                                context,
                                device.EpilogueGradientWorkspace(
                                    dtype_, epilogue, sizes.rows, sizes.units),
                                &workspace));
    void* const dz_data = dz->data();
    void* const dbias_data = has_bias_ ? dbias->data() : nullptr;
    OP_REQUIRES_OK(context,
                   device.EpilogueGradient(
                       dtype_, dy.data(), y.data(), epilogue, sizes.rows,
                       sizes.units, FormulaOf(sizes), context->input(2).data(),
                       context->input(3).data(), entropy_grad, workspace.data(),
                       dz_data, dbias_data));
  }
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
