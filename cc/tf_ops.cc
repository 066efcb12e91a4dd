// SPDX-License-Identifier: Apache-2.0
//
// The TensorFlow ops LBE>BatchEntropy and LBE>BatchEntropyGrad: schema, shape
// function and kernel for CPU and GPU, forward and gradient side by side.
//
// Glue: checks, allocates, calls the launchers of kernels.h, reports.

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

// What the kernels of both ops share: attributes and the sizes of x.
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
    if (x.dims() < 1) {
      return InvalidArgument(
          "x must have shape [batch, ...]. Received: a scalar");
    }
    const auto dims = x.shape().dim_sizes();
    sizes->rows = dims[0];
    // Not RemoveDim, which aborts where the product of the others overflows.
    TF_RETURN_IF_ERROR(TensorShape::BuildTensorShape(
        absl::MakeConstSpan(dims).subspan(1), &sizes->unit_shape));
    sizes->units = sizes->unit_shape.num_elements();
    return absl::OkStatus();
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
    Tensor *entropy, *mean, *variance, *valid;
    OP_REQUIRES_OK(context,
                   context->allocate_output(0, TensorShape({}), &entropy));
    OP_REQUIRES_OK(context,
                   context->allocate_output(1, sizes.unit_shape, &mean));
    OP_REQUIRES_OK(context,
                   context->allocate_output(2, sizes.unit_shape, &variance));
    OP_REQUIRES_OK(context,
                   context->allocate_output(3, TensorShape({}), &valid));
    const Device device(context);
    if (!sizes.enough()) {
      for (Tensor* output : {entropy, mean, variance, valid}) {
        OP_REQUIRES_OK(context, device.SetZero(output));
      }
      return;
    }
    Tensor workspace;
    OP_REQUIRES_OK(
        context, context->allocate_temp(tensorflow::DT_INT8,
                                        TensorShape({device.ForwardWorkspace(
                                            dtype_, sizes.rows, sizes.units)}),
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
    OP_REQUIRES(
        context, context->input(3).dims() == 0,
        InvalidArgument("entropy_grad must be a scalar. Received: shape ",
                        context->input(3).shape().DebugString()));
    const int inputs = context->num_inputs();
    OP_REQUIRES(
        context, inputs == 4 || inputs == 6,
        InvalidArgument("statistic_grads must be empty or the gradients of "
                        "mean and variance. Received: ",
                        inputs - 4, " tensors"));
    for (int i = 1; i < inputs; ++i) {
      OP_REQUIRES(
          context, i == 3 || context->input(i).shape() == sizes.unit_shape,
          InvalidArgument("input ", i, " must have the shape of one sample, ",
                          sizes.unit_shape.DebugString(), ". Received: ",
                          context->input(i).shape().DebugString()));
    }
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

#define LBE_REGISTER(device, launchers, type)                                \
  REGISTER_KERNEL_BUILDER(                                                   \
      Name("LBE>BatchEntropy").Device(device).TypeConstraint("T", type),     \
      BatchEntropyOp<launchers>);                                            \
  REGISTER_KERNEL_BUILDER(                                                   \
      Name("LBE>BatchEntropyGrad").Device(device).TypeConstraint("T", type), \
      BatchEntropyGradOp<launchers>);
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
