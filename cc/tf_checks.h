// SPDX-License-Identifier: Apache-2.0
//
// The attributes of the ops, read and checked, and the shapes of their inputs,
// checked.
//
// Called by the kernels of tf_ops.cc and by the lowerings of xla_ops.cc.

#ifndef LBE_OPS_CC_TF_CHECKS_H_
#define LBE_OPS_CC_TF_CHECKS_H_

#include <cmath>
#include <string>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "kernels.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace lbe {

template <typename... Parts>
absl::Status InvalidArgument(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

// TensorFlow's dtype to the kernels' own.
inline absl::Status ToDType(tensorflow::DataType type, DType* dtype) {
  switch (type) {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  case tensorflow::tensorflow_name:                                   \
    *dtype = DType::name;                                             \
    return absl::OkStatus();
    LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
    default:
      return InvalidArgument("lbe_ops has no kernel for ",
                             tensorflow::DataTypeString(type));
  }
}

inline absl::Status NumberAttr(tensorflow::OpKernelConstruction* context,
                               const char* name, double* value) {
  std::string text;
  TF_RETURN_IF_ERROR(context->GetAttr(name, &text));
  if (!absl::SimpleAtod(text, value) || !std::isfinite(*value)) {
    return InvalidArgument(name, " must be a finite number. Received: '", text,
                           "'");
  }
  return absl::OkStatus();
}

// Reads the dtypes.
inline absl::Status ReadTypes(tensorflow::OpKernelConstruction* context,
                              DType* dtype) {
  tensorflow::DataType type, result_type;
  TF_RETURN_IF_ERROR(context->GetAttr("T", &type));
  TF_RETURN_IF_ERROR(context->GetAttr("result_type", &result_type));
  TF_RETURN_IF_ERROR(ToDType(type, dtype));
  if ((type == tensorflow::DT_DOUBLE) !=
      (result_type == tensorflow::DT_DOUBLE)) {
    return InvalidArgument(
        "result_type must be double where T is double, and float elsewhere. "
        "Received: T = ",
        tensorflow::DataTypeString(type),
        ", result_type = ", tensorflow::DataTypeString(result_type));
  }
  return absl::OkStatus();
}

inline absl::Status ReadFormula(tensorflow::OpKernelConstruction* context,
                                Formula* formula) {
  TF_RETURN_IF_ERROR(context->GetAttr("ddof", &formula->ddof));
  TF_RETURN_IF_ERROR(NumberAttr(context, "scale", &formula->scale));
  TF_RETURN_IF_ERROR(NumberAttr(context, "offset", &formula->offset));
  if (!IsServed(*formula)) {
    return InvalidArgument(
        "ddof must be 0 or 1, scale from ", kSmallest, " to ", kLargest,
        ", offset 0 or in the same range. Received: ddof = ", formula->ddof,
        ", scale = ", formula->scale, ", offset = ", formula->offset);
  }
  return absl::OkStatus();
}

// Reads the attributes of all ops that make an entropy of activations.
inline absl::Status ReadAttributes(tensorflow::OpKernelConstruction* context,
                                   DType* dtype, Formula* formula) {
  TF_RETURN_IF_ERROR(ReadTypes(context, dtype));
  return ReadFormula(context, formula);
}

// Reads whether a gradient is that of a shard of a batch: whether there is a
// count.
inline absl::Status ReadSynchronized(tensorflow::OpKernelConstruction* context,
                                     bool* synchronized) {
  int counts;
  TF_RETURN_IF_ERROR(context->GetAttr("synchronized", &counts));
  if (counts > 1) {
    return InvalidArgument("count must be none or one. Received: ", counts,
                           " tensors");
  }
  *synchronized = counts == 1;
  return absl::OkStatus();
}

// Reads which element of a vector the entropy's gradient is, or -1: it is a
// scalar.
inline absl::Status ReadIndex(tensorflow::OpKernelConstruction* context,
                              int64_t* index) {
  return context->GetAttr("index", index);
}

// Reads whether LBE>BatchEntropy returns zeros for a batch that is too small.
inline absl::Status ReadSmallBatch(tensorflow::OpKernelConstruction* context,
                                   bool* zero) {
  std::string small_batch;
  TF_RETURN_IF_ERROR(context->GetAttr("small_batch", &small_batch));
  *zero = small_batch == "zero";
  return absl::OkStatus();
}

// Reads the attributes that LBE>Epilogue and LBE>EpilogueGrad have beside: the
// activation, and whether there is a bias.
inline absl::Status ReadEpilogue(tensorflow::OpKernelConstruction* context,
                                 Epilogue* epilogue, bool* has_bias) {
  int biases;
  TF_RETURN_IF_ERROR(context->GetAttr("biases", &biases));
  if (biases > 1) {
    return InvalidArgument("bias must be none or one. Received: ", biases,
                           " tensors");
  }
  *has_bias = biases == 1;
  TF_RETURN_IF_ERROR(NumberAttr(context, "slope", &epilogue->slope));
  if (epilogue->slope < 0) {
    return InvalidArgument("slope must be at least 0. Received: ",
                           epilogue->slope);
  }
  std::string name;
  TF_RETURN_IF_ERROR(context->GetAttr("activation", &name));
#define LBE_ACTIVATION(activation_name, keras_name)     \
  if (name == keras_name) {                             \
    epilogue->activation = Activation::activation_name; \
    return absl::OkStatus();                            \
  }
  LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
  return InvalidArgument("lbe_ops has no epilogue with activation ", name);
}

// The error of LBE>BatchEntropy where it refuses a batch that is too small.
inline absl::Status SmallBatchError(const std::string& shape) {
  return InvalidArgument(
      "batch_entropy needs a batch of at least 2 samples, since the variance "
      "of a single one is undefined, and at least one unit. Received: x of "
      "shape ",
      shape);
}

// The shape of an input, and those of all inputs of an op.
using Dims = absl::InlinedVector<int64_t, 4>;
using ManyDims = absl::InlinedVector<Dims, 6>;

inline std::string ShapeText(absl::Span<const int64_t> dims) {
  return absl::StrCat("[", absl::StrJoin(dims, ","), "]");
}

// Checks the shape of x, z or y.
inline absl::Status CheckBatch(absl::Span<const int64_t> dims) {
  if (!dims.empty()) return absl::OkStatus();
  return InvalidArgument(
      "activations must have shape [batch, ...]. Received: a scalar");
}

// Checks that z or y, a batch, has channels to add a bias to.
inline absl::Status CheckChannels(absl::Span<const int64_t> z) {
  if (z.size() >= 2) return absl::OkStatus();
  return InvalidArgument(
      "what has a bias must have shape [batch, ..., channels]. Received: ",
      ShapeText(z));
}

// Checks the shape of a bias. REQUIRES: z is a batch.
inline absl::Status CheckBias(absl::Span<const int64_t> z,
                              absl::Span<const int64_t> bias) {
  TF_RETURN_IF_ERROR(CheckChannels(z));
  if (bias == z.subspan(z.size() - 1)) return absl::OkStatus();
  return InvalidArgument(
      "bias must have one entry for each channel, the last dimension of z. "
      "Received: z ",
      ShapeText(z), ", bias ", ShapeText(bias));
}

// Checks the inputs of LBE>BatchEntropyGrad: x, mean, variance, entropy_grad,
// and the gradients of mean and variance or none; `first` is the place of x. A
// synchronized gradient has a count besides, and its statistics may be parts of
// vectors of all layers' units.
inline absl::Status CheckGradInputs(absl::Span<const Dims> inputs,
                                    bool synchronized = false,
                                    size_t first = 0) {
  TF_RETURN_IF_ERROR(CheckBatch(inputs[first]));
  if (synchronized) {
    if (!inputs.back().empty()) {
      return InvalidArgument("count must be a scalar. Received: ",
                             ShapeText(inputs.back()));
    }
    inputs.remove_suffix(1);
  }
  const size_t statistic_grads = inputs.size() - first - 4;
  if (statistic_grads != 0 && statistic_grads != 2) {
    return InvalidArgument(
        "statistic_grads must be empty or the gradients of mean and variance. "
        "Received: ",
        statistic_grads, " tensors");
  }
  const absl::Span<const int64_t> sample =
      absl::MakeConstSpan(inputs[first]).subspan(1);
  int64_t units = 1;
  for (const int64_t size : sample) units *= size;
  for (size_t i = first + 1; i < inputs.size(); ++i) {
    const bool scalar = i == first + 3;
    const auto expected = scalar ? absl::Span<const int64_t>() : sample;
    if (synchronized && !scalar && inputs[i] == Dims{units}) continue;
    if (inputs[i] != expected) {
      return InvalidArgument(
          "input ", i, " must have the shape ", ShapeText(expected),
          scalar ? "" : " of one sample", ". Received: ", ShapeText(inputs[i]));
    }
  }
  return absl::OkStatus();
}

// Checks the inputs of LBE>EpilogueGrad: dy, and then y as x above, but for the
// gradient of the entropy, which is the element `index` of a vector where that
// is not -1.
inline absl::Status CheckEpilogueGradInputs(ManyDims inputs, int64_t index,
                                            bool synchronized = false) {
  if (inputs[0] != inputs[1]) {
    return InvalidArgument("dy must have the shape of y, ",
                           ShapeText(inputs[1]),
                           ". Received: ", ShapeText(inputs[0]));
  }
  if (index >= 0) {
    if (inputs[4].size() != 1 || inputs[4][0] <= index) {
      return InvalidArgument(
          "entropy_grad must be a vector of more than index = ", index,
          " elements. Received: ", ShapeText(inputs[4]));
    }
    inputs[4].clear();  // a scalar from here on
  }
  return CheckGradInputs(inputs, synchronized, 1);
}

// Checks the inputs of LBE>MergeMoments.
inline absl::Status CheckMergeInputs(absl::Span<const int64_t> gathered,
                                     absl::Span<const int64_t> ends) {
  if (ends.size() != 1) {
    return InvalidArgument("ends must be a vector. Received: ",
                           ShapeText(ends));
  }
  const int64_t layers = ends[0];
  if (gathered.size() != 2 || gathered[0] < 1 || gathered[0] > kMostReplicas ||
      gathered[1] < layers || (gathered[1] - layers) % 2 != 0 ||
      (layers == 0 && gathered[1] > 0)) {
    return InvalidArgument(
        "gathered must have the shape [replicas, layers + 2 * units], of 1 to ",
        kMostReplicas, " replicas and as many layers as ends has, ", layers,
        ". Received: ", ShapeText(gathered));
  }
  return absl::OkStatus();
}

}  // namespace lbe

#endif  // LBE_OPS_CC_TF_CHECKS_H_
