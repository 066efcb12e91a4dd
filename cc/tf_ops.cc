// SPDX-License-Identifier: Apache-2.0
//
// The TensorFlow ops LBE>BatchEntropy, LBE>Epilogue and their gradients, by the
// names with Grad at the end, and LBE>EpilogueMoments and LBE>MergeMoments for
// a batch that is spread over replicas: schema, shape function, kernel for CPU
// and GPU.
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
using ::tensorflow::shape_inference::DimensionHandle;
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

// The attributes of the formula, of the dtypes, of both, and those of an
// epilogue.
#define LBE_FORMULA                                                \
  Attr("ddof: int >= 0 = 0")                                       \
      .Attr(absl::StrFormat("scale: string = '%.17g'", lbe::kPiE)) \
      .Attr("offset: string = '1.0'")
#define LBE_TYPES \
  Attr(DTypesAttr()).Attr("result_type: {float, double} = DT_FLOAT")
#define LBE_ATTRIBUTES LBE_TYPES.LBE_FORMULA
#define LBE_EPILOGUE                         \
  Attr("biases: int >= 0 = 0")               \
      .Attr("activation: string = 'linear'") \
      .Attr("slope: string = '0.0'")

// The shape of one sample: that of x without its first dimension.
absl::Status UnitShape(InferenceContext* c, ShapeHandle* units) {
  ShapeHandle x;
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(0), 1, &x));
  return c->Subshape(x, 1, units);
}

// Checks the shapes of mean and variance, and what belongs to them, in a
// gradient: that of one sample; or also [units], where there is a count, which
// is a scalar. Then nothing is known of the sample's shape, and the kernel
// checks it.
absl::Status CheckStatistics(InferenceContext* c, std::vector<int> statistics,
                             ShapeHandle units) {
  int synchronized;
  TF_RETURN_IF_ERROR(c->GetAttr("synchronized", &synchronized));
  if (synchronized > 0) {
    ShapeHandle scalar;
    return c->WithRank(c->input(c->num_inputs() - 1), 0, &scalar);
  }
  for (const int i : statistics) {
    TF_RETURN_IF_ERROR(c->Merge(units, c->input(i), &units));
  }
  return absl::OkStatus();
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
    .Input("count: synchronized * result_type")
    .Output("dx: T")
    .LBE_ATTRIBUTES.Attr("statistics: int >= 0 = 0")
    .Attr("synchronized: int >= 0 = 0")
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      ShapeHandle units, scalar;
      TF_RETURN_IF_ERROR(UnitShape(c, &units));
      std::vector<int> statistics = {1, 2};
      for (int i = 4; i < c->num_inputs(); ++i) statistics.push_back(i);
      TF_RETURN_IF_ERROR(CheckStatistics(c, statistics, units));
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
count: None, or how many rows the whole batch has of which x is a shard, as
  LBE>MergeMoments returns it. mean and variance are then those of that batch, of
  the shape of one sample or [units], and N may be any number.
dx: The gradient with respect to x; 0 where N < 2, or where count < 2.
)doc");

REGISTER_OP("LBE>Epilogue")
    .Input("z: T")
    .Input("bias: biases * T")
    .Output("y: T")
    .Output("entropy: result_type")
    .Output("mean: result_type")
    .Output("variance: result_type")
    .Output("valid: result_type")
    .LBE_ATTRIBUTES.LBE_EPILOGUE
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

REGISTER_OP("LBE>EpilogueMoments")
    .Input("z: T")
    .Input("bias: biases * T")
    .Output("y: T")
    .Output("count: result_type")
    .Output("mean: result_type")
    .Output("m2: result_type")
    .LBE_TYPES.LBE_EPILOGUE
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      ShapeHandle units;
      TF_RETURN_IF_ERROR(UnitShape(c, &units));
      c->set_output(0, c->input(0));
      c->set_output(1, c->Scalar());
      c->set_output(2, units);
      c->set_output(3, units);
      return absl::OkStatus();
    })
    .Doc(R"doc(
y = activation(z + bias), and the moments of y in the same pass: what a shard of a
batch gives to LBE>MergeMoments.

z: The layer's products [N, ..., C] for any N, 0 and 1 included.
bias: None, or one of shape [C].
y: Of the shape of z, whose memory it takes where nobody else needs z; z itself where
  there is neither a bias nor an activation.
count: N. In float, numbers up to 2^24 are exact.
mean: The mean of every unit of y, of the shape of one sample; 0 where N = 0.
m2: The sum of the squared deviations from it; 0 where N < 2.
activation: As for LBE>Epilogue.
slope: As for LBE>Epilogue.
)doc");

REGISTER_OP("LBE>MergeMoments")
    .Input("gathered: T")
    .Input("ends: int64")
    .Output("mean: T")
    .Output("variance: T")
    .Output("count: T")
    .Output("entropy: T")
    .Output("valid: T")
    .Attr("T: {float, double}")
    .LBE_FORMULA
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      ShapeHandle gathered, ends;
      TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &gathered));
      TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 1, &ends));
      DimensionHandle units;
      TF_RETURN_IF_ERROR(
          c->Subtract(c->Dim(gathered, 1), c->Dim(ends, 0), &units));
      TF_RETURN_IF_ERROR(
          c->Divide(units, 2, /*evenly_divisible=*/true, &units));
      for (int i = 0; i < 5; ++i) {
        c->set_output(i, i < 2 ? c->Vector(units) : ends);
      }
      return absl::OkStatus();
    })
    .Doc(R"doc(
Merges the moments of all layers and replicas into the statistics of the whole batch.

Of a batch whose replicas have the same number of rows, 8 * 2^k, or the last one
fewer, the results are those of LBE>BatchEntropy for all of it, bit for bit.

gathered: [replicas, layers + 2 * units], what LBE>EpilogueMoments returned on every
  replica: the counts of all layers, then the means of the units of all layers, then
  their m2. A replica whose count of a layer is 0 is passed over there.
ends: [layers], where the units of each layer end among all units. Ascending, and the
  last one is their number. Checked on the CPU; on a GPU, results are undefined
  where they are not.
mean: [units], of the whole batch.
variance: [units]; 0 where count < 2.
count: [layers], how many rows the whole batch has. In float, numbers up to 2^24 are
  exact.
entropy: [layers]; 0 where count < 2 or the layer has no unit.
valid: [layers], 1, or 0 where the entropy is not defined.
T: The result_type of LBE>EpilogueMoments.
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
    .Input("count: synchronized * result_type")
    .Output("dz: T")
    .Output("dbias: biases * T")
    .LBE_ATTRIBUTES.LBE_EPILOGUE.Attr("index: int >= -1 = -1")
    .Attr("synchronized: int >= 0 = 0")
    .SetShapeFn([](InferenceContext* c) -> absl::Status {
      ShapeHandle y, units, scalar;
      TF_RETURN_IF_ERROR(c->Merge(c->input(0), c->input(1), &y));
      TF_RETURN_IF_ERROR(UnitShape(c, &units));
      TF_RETURN_IF_ERROR(CheckStatistics(c, {2, 3}, units));
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
count: As for LBE>BatchEntropyGrad; the entropy adds nothing where count < 2.
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
  absl::Status Set(DType dtype, double value, Tensor* scalar) const {
    SetScalar(dtype, value, scalar->data());
    return absl::OkStatus();
  }
  // Of LBE>MergeMoments.
  static absl::Status CheckEnds(const Tensor& ends, int64_t units) {
    int64_t last = 0;
    for (int64_t layer = 0; layer < ends.NumElements(); ++layer) {
      const int64_t end = ends.vec<int64_t>()(layer);
      const bool is_last = layer + 1 == ends.NumElements();
      if (end < last || end > units || (is_last && end != units)) {
        return InvalidArgument(
            "ends must ascend to the number of units of all layers, ", units,
            ". Received: ", end, " at ", layer, ", after ", last);
      }
      last = end;
    }
    return absl::OkStatus();
  }
  absl::Status Merge(const MergeProblem& problem,
                     const MergeArguments& arguments) const {
    MergeMomentsCpu(parallel(), problem, arguments);
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
                  workers, OneBlockEach(),
                  [body, argument](int64_t, int64_t) { body(argument); });
            }};
  }

// TensorFlow 2.19 has this constructor only, and 2.21 advises against it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  static ThreadPool::SchedulingParams OneBlockEach() {
    return ThreadPool::SchedulingParams(
        ThreadPool::SchedulingStrategy::kFixedBlockSize, {}, 1);
  }
#pragma GCC diagnostic pop

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
  absl::Status Set(DType dtype, double value, Tensor* scalar) const {
    return Status(SetScalarCuda(stream_, dtype, value, scalar->data()));
  }
  // Nobody can look at them without waiting for the GPU.
  static absl::Status CheckEnds(const Tensor& /*ends*/, int64_t /*units*/) {
    return absl::OkStatus();
  }
  absl::Status Merge(const MergeProblem& problem,
                     const MergeArguments& arguments) const {
    return Status(MergeMomentsCuda(stream_, problem, arguments));
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

// What the kernels of all ops on activations share.
template <typename Device>
class Kernel : public OpKernel {
 public:
  explicit Kernel(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadTypes(context, &dtype_));
    // LBE>EpilogueMoments has none.
    if (context->HasAttr("ddof")) {
      OP_REQUIRES_OK(context, ReadFormula(context, &formula_));
    }
  }

  // Run where it becomes ready: a layer's statistics take less time than waking
  // another thread, and large ones are cut into parts anyway.
  bool IsExpensive() override { return false; }

 protected:
  // Of a batch, or of a shard of one.
  Problem ProblemOf(const Sizes& sizes) const {
    return {dtype_, sizes.rows, sizes.units, formula_};
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
      Problem problem = ProblemOf(sizes);
      // A batch of one has no entropy, but the output of an epilogue. Its
      // variance is 0 then.
      if (!sizes.have_entropy()) problem.formula.ddof = 0;
      Tensor workspace;
      TF_RETURN_IF_ERROR(AllocateForwardWorkspace(context, device, problem,
                                                  arguments, &workspace));
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

  static absl::Status AllocateForwardWorkspace(
      OpKernelContext* context, const Device& device, const Problem& problem,
      const ForwardArguments& arguments, Tensor* workspace) {
    const bool has_epilogue = arguments.epilogue != nullptr;
    return AllocateWorkspace(
        context, device.ForwardWorkspace(problem, has_epilogue), workspace);
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
  explicit BatchEntropyGradOp(OpKernelConstruction* context)
      : Kernel<Device>(context) {
    OP_REQUIRES_OK(context, ReadSynchronized(context, &synchronized_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(x, &sizes));
    OP_REQUIRES_OK(context, CheckGradInputs(InputDims(context), synchronized_));
    Tensor* dx;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(
                                {0}, 0, x.shape(), &dx));
    if (sizes.empty()) return;
    const Device device(context);
    if (!synchronized_ && !sizes.have_entropy()) {
      OP_REQUIRES_OK(context, device.SetZero(dx));
      return;
    }
    GradientArguments arguments;
    arguments.x = x.data();
    arguments.mean = context->input(1).data();
    arguments.variance = context->input(2).data();
    arguments.entropy_grad = context->input(3).data();
    const int counts = synchronized_ ? 1 : 0;
    if (context->num_inputs() - counts > 4) {
      arguments.mean_grad = context->input(4).data();
      arguments.variance_grad = context->input(5).data();
    }
    if (synchronized_) {
      arguments.count = context->input(context->num_inputs() - 1).data();
    }
    arguments.dx = dx->data();
    OP_REQUIRES_OK(context, device.Gradient(this->ProblemOf(sizes), arguments));
  }

 private:
  bool synchronized_;
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
  // The arguments of a forward pass of z that belong to the epilogue, which is
  // made here, too; allocates y, the first output.
  absl::Status ForwardArgumentsOf(OpKernelContext* context, Epilogue* epilogue,
                                  ForwardArguments* arguments) const {
    const Tensor& z = context->input(0);
    *epilogue = EpilogueOf(z);
    if (has_bias_) {
      const Tensor& bias = context->input(1);
      TF_RETURN_IF_ERROR(
          CheckBias(z.shape().dim_sizes(), bias.shape().dim_sizes()));
      epilogue->bias = bias.data();
    }
    Tensor* y;
    if (epilogue->activation == Activation::kLinear && !has_bias_) {
      context->set_output(0, z);  // not even a copy
      y = context->mutable_output(0);
    } else {
      TF_RETURN_IF_ERROR(
          context->forward_input_or_allocate_output({0}, 0, z.shape(), &y));
    }
    arguments->x = z.data();
    arguments->epilogue = epilogue;
    arguments->y = y->data();
    return absl::OkStatus();
  }

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
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(context->input(0), &sizes));
    Epilogue epilogue;
    ForwardArguments arguments;
    OP_REQUIRES_OK(context,
                   this->ForwardArgumentsOf(context, &epilogue, &arguments));
    OP_REQUIRES_OK(context, this->Forward(context, sizes, !sizes.empty(),
                                          /*first=*/1, arguments));
  }
};

template <typename Device>
class EpilogueMomentsOp : public EpilogueKernel<Device> {
 public:
  using EpilogueKernel<Device>::EpilogueKernel;

  void Compute(OpKernelContext* context) override {
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(context->input(0), &sizes));
    Epilogue epilogue;
    ForwardArguments arguments;
    OP_REQUIRES_OK(context,
                   this->ForwardArgumentsOf(context, &epilogue, &arguments));
    Tensor *count, *mean, *m2;
    OP_REQUIRES_OK(context,
                   context->allocate_output(1, TensorShape({}), &count));
    OP_REQUIRES_OK(context,
                   context->allocate_output(2, sizes.unit_shape, &mean));
    OP_REQUIRES_OK(context, context->allocate_output(3, sizes.unit_shape, &m2));
    const Device device(context);
    const Problem problem = this->ProblemOf(sizes);
    if (sizes.empty()) {
      OP_REQUIRES_OK(context, device.SetZero(mean));
      OP_REQUIRES_OK(context, device.SetZero(m2));
      OP_REQUIRES_OK(
          context,
          device.Set(problem.dtype, static_cast<double>(sizes.rows), count));
      return;
    }
    Tensor workspace;
    OP_REQUIRES_OK(context,
                   this->AllocateForwardWorkspace(context, device, problem,
                                                  arguments, &workspace));
    arguments.workspace = workspace.data();
    arguments.mean = mean->data();
    arguments.m2 = m2->data();
    arguments.count = count->data();
    OP_REQUIRES_OK(context, device.Forward(problem, arguments));
  }
};

template <typename Device>
class EpilogueGradOp : public EpilogueKernel<Device> {
 public:
  explicit EpilogueGradOp(OpKernelConstruction* context)
      : EpilogueKernel<Device>(context) {
    OP_REQUIRES_OK(context, ReadIndex(context, &index_));
    OP_REQUIRES_OK(context, ReadSynchronized(context, &synchronized_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& dy = context->input(0);
    const Tensor& y = context->input(1);
    const Tensor& entropy_grad = context->input(4);
    Sizes sizes;
    OP_REQUIRES_OK(context, SizesOf(y, &sizes));
    OP_REQUIRES_OK(context, CheckEpilogueGradInputs(InputDims(context), index_,
                                                    synchronized_));
    if (this->has_bias_) {
      OP_REQUIRES_OK(context, CheckChannels(y.shape().dim_sizes()));
    }
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
    // A batch of one has no entropy: as if it were spread, with a count of 0.
    Tensor zero;
    if (synchronized_) {
      arguments.count = context->input(5).data();
    } else if (!sizes.have_entropy()) {
      OP_REQUIRES_OK(context, context->allocate_temp(entropy_grad.dtype(),
                                                     TensorShape({}), &zero));
      OP_REQUIRES_OK(context, device.SetZero(&zero));
      arguments.count = zero.data();
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
  bool synchronized_;
};

template <typename Device>
class MergeMomentsOp : public OpKernel {
 public:
  explicit MergeMomentsOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ToDType(context->input_type(0), &dtype_));
    OP_REQUIRES_OK(context, ReadFormula(context, &formula_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& gathered = context->input(0);
    const Tensor& ends = context->input(1);
    OP_REQUIRES_OK(context, CheckMergeInputs(gathered.shape().dim_sizes(),
                                             ends.shape().dim_sizes()));
    const int64_t layers = ends.dim_size(0);
    const int64_t units = (gathered.dim_size(1) - layers) / 2;
    OP_REQUIRES_OK(context, Device::CheckEnds(ends, units));
    std::array<void*, 5> outputs;
    for (int i = 0; i < 5; ++i) {
      Tensor* output;
      OP_REQUIRES_OK(context,
                     context->allocate_output(
                         i, TensorShape({i < 2 ? units : layers}), &output));
      outputs[i] = output->data();
    }
    if (layers == 0) return;
    MergeArguments arguments;
    arguments.gathered = gathered.data();
    arguments.ends = static_cast<const int64_t*>(ends.data());
    arguments.mean = outputs[0];
    arguments.variance = outputs[1];
    arguments.count = outputs[2];
    arguments.entropy = outputs[3];
    arguments.valid = outputs[4];
    OP_REQUIRES_OK(context, Device(context).Merge({dtype_, gathered.dim_size(0),
                                                   layers, units, formula_},
                                                  arguments));
  }

 private:
  DType dtype_;
  Formula formula_;
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
      EpilogueGradOp<launchers>);                                            \
  REGISTER_KERNEL_BUILDER(                                                   \
      Name("LBE>EpilogueMoments").Device(device).TypeConstraint("T", type),  \
      EpilogueMomentsOp<launchers>);
#define LBE_REGISTER_MERGE(device, launchers)                      \
  REGISTER_KERNEL_BUILDER(Name("LBE>MergeMoments").Device(device), \
                          MergeMomentsOp<launchers>);
LBE_REGISTER_MERGE(tensorflow::DEVICE_CPU, Cpu)
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  LBE_REGISTER(tensorflow::DEVICE_CPU, Cpu, tensorflow::tensorflow_name)
LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE

#ifdef LBE_CUDA
LBE_REGISTER_MERGE(tensorflow::DEVICE_GPU, Gpu)
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  LBE_REGISTER(tensorflow::DEVICE_GPU, Gpu, tensorflow::tensorflow_name)
LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
#endif
#undef LBE_REGISTER
#undef LBE_REGISTER_MERGE

}  // namespace
}  // namespace lbe
