// The TensorFlow ops: they check inputs, allocate outputs and call the kernels. weight_norm.h
// specifies the arithmetic and defines every name used here.
//
//   Tfwn>WeightNorm       v, g               ->  w, norm
//   Tfwn>WeightNormGrad   grad_w, v, g, norm ->  grad_v, grad_g
//
// `axis` lists consecutive axes of v, in ascending order, that index the output units. Negative
// axes count from the end. An empty list means one norm for the whole tensor.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "csrc/layout.h"
#include "csrc/tensorflow_checks.h"
#include "csrc/weight_norm.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/threadpool.h"
#ifdef TFWN_CUDA
#include "xla/stream_executor/device_description.h"
#include "xla/stream_executor/platform.h"
#include "xla/stream_executor/stream.h"
#include "xla/stream_executor/stream_executor.h"
#endif

namespace tfwn {
namespace {

using tensorflow::DataType;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// Shape functions.

Sizes SizesOf(InferenceContext* c, ShapeHandle shape) {
  Sizes sizes;
  for (int i = 0; i < c->Rank(shape); ++i) sizes.push_back(c->Value(c->Dim(shape, i)));
  return sizes;
}

absl::Status CheckAttributes(InferenceContext* c, Axis* axis) {
  DataType v_type, norm_type;
  TF_RETURN_IF_ERROR(c->GetAttr("Tv", &v_type));
  TF_RETURN_IF_ERROR(c->GetAttr("Tnorm", &norm_type));
  TF_RETURN_IF_ERROR(CheckNormType(v_type, norm_type));
  return c->GetAttr("axis", axis);
}

// Infers unknown sizes of v and g from each other.
absl::Status MergeUnits(InferenceContext* c, const Axis& axis, ShapeHandle* v, ShapeHandle* g) {
  Axis kept = axis;
  Sizes v_sizes, units(axis.size(), -1);
  const bool v_known = c->RankKnown(*v);
  if (v_known) {
    v_sizes = SizesOf(c, *v);
    TF_RETURN_IF_ERROR(StatusOf(CheckAxis(v_sizes.size(), &kept)));
    TF_RETURN_IF_ERROR(StatusOf(CheckConsecutive(v_sizes.size(), kept)));
    for (size_t i = 0; i < kept.size(); ++i) units[i] = v_sizes[kept[i]];
  }
  if (c->RankKnown(*g)) {
    TF_RETURN_IF_ERROR(StatusOf(CheckG(axis, units, v_known ? &v_sizes : nullptr, SizesOf(c, *g))));
  } else {
    *g = c->UnknownShapeOfRank(axis.size());
  }
  if (!v_known) return absl::OkStatus();
  for (size_t i = 0; i < kept.size(); ++i) {
    DimensionHandle size;
    TF_RETURN_IF_ERROR(c->Merge(c->Dim(*v, kept[i]), c->Dim(*g, i), &size));
    TF_RETURN_IF_ERROR(c->ReplaceDim(*v, kept[i], size, v));
    TF_RETURN_IF_ERROR(c->ReplaceDim(*g, i, size, g));
  }
  return absl::OkStatus();
}

absl::Status MergeSame(InferenceContext* c, const char* name, ShapeHandle shape,
                       const char* other_name, ShapeHandle* other) {
  if (c->RankKnown(shape) && c->RankKnown(*other)) {
    TF_RETURN_IF_ERROR(
        StatusOf(CheckSameShape(name, SizesOf(c, shape), other_name, SizesOf(c, *other))));
  }
  return c->Merge(shape, *other, other);
}

absl::Status ForwardShapes(InferenceContext* c) {
  Axis axis;
  TF_RETURN_IF_ERROR(CheckAttributes(c, &axis));
  ShapeHandle v = c->input(0), g = c->input(1);
  TF_RETURN_IF_ERROR(MergeUnits(c, axis, &v, &g));
  c->set_output(0, v);
  c->set_output(1, g);
  return absl::OkStatus();
}

absl::Status BackwardShapes(InferenceContext* c) {
  Axis axis;
  TF_RETURN_IF_ERROR(CheckAttributes(c, &axis));
  ShapeHandle v = c->input(1), g = c->input(2);
  TF_RETURN_IF_ERROR(MergeSame(c, "grad_w", c->input(0), "v", &v));
  TF_RETURN_IF_ERROR(MergeSame(c, "norm", c->input(3), "g", &g));
  TF_RETURN_IF_ERROR(MergeUnits(c, axis, &v, &g));
  c->set_output(0, v);
  c->set_output(1, g);
  return absl::OkStatus();
}

REGISTER_OP("Tfwn>WeightNorm")
    .Input("v: Tv")
    .Input("g: Tg")
    .Output("w: Tw")
    .Output("norm: Tnorm")
    .Attr("Tv: {half, bfloat16, float, double}")
    .Attr("Tg: {half, bfloat16, float, double}")
    .Attr("Tw: {half, bfloat16, float, double}")
    .Attr("Tnorm: {float, double}")
    .Attr("axis: list(int) = [-1]")
    .SetShapeFn(ForwardShapes);

REGISTER_OP("Tfwn>WeightNormGrad")
    .Input("grad_w: Tw")
    .Input("v: Tv")
    .Input("g: Tg")
    .Input("norm: Tnorm")
    .Output("grad_v: Tv")
    .Output("grad_g: Tg")
    .Attr("Tv: {half, bfloat16, float, double}")
    .Attr("Tg: {half, bfloat16, float, double}")
    .Attr("Tw: {half, bfloat16, float, double}")
    .Attr("Tnorm: {float, double}")
    .Attr("axis: list(int) = [-1]")
    .SetShapeFn(BackwardShapes);

// Kernels.

Sizes SizesOf(const Tensor& tensor) {
  const auto sizes = tensor.shape().dim_sizes();
  return Sizes(sizes.begin(), sizes.end());
}

absl::Status GetLayout(const Axis& axis, const Tensor& v, const Tensor& g, Layout* layout) {
  return StatusOf(FindLayout(axis, SizesOf(v), SizesOf(g), layout));
}

absl::Status CheckSame(const char* name, const Tensor& tensor, const char* other_name,
                       const Tensor& other) {
  return StatusOf(CheckSameShape(name, SizesOf(tensor), other_name, SizesOf(other)));
}

absl::Status AllocateScratch(OpKernelContext* context, size_t bytes, Tensor* scratch) {
  return context->allocate_temp(tensorflow::DT_UINT8, {static_cast<int64_t>(bytes)}, scratch);
}

enum class Processor { kCpu, kGpu };

template <Processor>
struct Run;

// The minimum memory traffic per thread. A smaller value would speed up a lone op, but in a graph
// other ops run at the same time and need the cores too.
constexpr int64_t kBytesPerThread = 8 << 20;

template <>
struct Run<Processor::kCpu> {
  template <typename Arguments>
  static absl::Status Call(OpKernelContext* context, const Arguments& arguments) {
    Tensor scratch;
    TF_RETURN_IF_ERROR(AllocateScratch(context, cpu::ScratchBytes(arguments), &scratch));
    auto* pool = context->device()->tensorflow_cpu_worker_threads()->workers;
    cpu::Run(arguments, scratch.data(),
             [pool](int64_t n, int64_t bytes_per_task,
                    const std::function<void(int64_t, int64_t)>& body) {
               if (n == 0) return;
               const int64_t threads =
                   std::clamp<int64_t>(n * bytes_per_task / kBytesPerThread, 1,
                                       std::min<int64_t>(n, pool->NumThreads()));
               if (threads == 1) return body(0, n);
               using Scheduling = tensorflow::thread::ThreadPool::SchedulingParams;
               pool->ParallelFor(n, Scheduling::Fixed((n + threads - 1) / threads), body);
             });
    return absl::OkStatus();
  }
};

#ifdef TFWN_CUDA
template <>
struct Run<Processor::kGpu> {
  template <typename Arguments>
  static absl::Status Call(OpKernelContext* context, const Arguments& arguments) {
    auto* stream = context->op_device_context()->stream();
    const std::string& platform = stream->parent()->GetPlatform()->Name();
    if (platform != "CUDA") {
      return absl::UnimplementedError(absl::StrCat(
          "weight_norm: its kernels for GPUs need CUDA, but this device's platform is ", platform,
          ". Place the op on the CPU"));
    }
    Tensor scratch;
    TF_RETURN_IF_ERROR(AllocateScratch(context, cuda::ScratchBytes(arguments.layout), &scratch));
    const int error =
        cuda::Run(arguments, scratch.data(), stream->platform_specific_handle().stream);
    if (error == 0) return absl::OkStatus();
    return absl::InternalError(
        absl::StrCat("weight_norm: a CUDA kernel failed: ", cuda::ErrorString(error)));
  }
};
#endif

template <Processor processor>
class WeightNormOp : public tensorflow::OpKernel {
 public:
  explicit WeightNormOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("axis", &axis_));
    OP_REQUIRES_OK(context, CheckNormType(input_type(0), output_type(1)));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& v = context->input(0);
    const Tensor& g = context->input(1);
    Forward arguments;
    OP_REQUIRES_OK(context, GetLayout(axis_, v, g, &arguments.layout));

    Tensor *w, *norm;
    OP_REQUIRES_OK(context, context->allocate_output(0, v.shape(), &w));
    OP_REQUIRES_OK(context, context->allocate_output(1, g.shape(), &norm));

    arguments.v_type = TypeOf(v.dtype());
    arguments.g_type = TypeOf(g.dtype());
    arguments.w_type = TypeOf(w->dtype());
    arguments.v = v.data();
    arguments.g = g.data();
    arguments.w = w->data();
    arguments.norm = norm->data();
    OP_REQUIRES_OK(context, Run<processor>::Call(context, arguments));
  }

 private:
  Axis axis_;
};

template <Processor processor>
class WeightNormGradOp : public tensorflow::OpKernel {
 public:
  explicit WeightNormGradOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("axis", &axis_));
    OP_REQUIRES_OK(context, CheckNormType(input_type(1), input_type(3)));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& grad_w = context->input(0);
    const Tensor& v = context->input(1);
    const Tensor& g = context->input(2);
    const Tensor& norm = context->input(3);
    Backward arguments;
    OP_REQUIRES_OK(context, GetLayout(axis_, v, g, &arguments.layout));
    OP_REQUIRES_OK(context, CheckSame("grad_w", grad_w, "v", v));
    OP_REQUIRES_OK(context, CheckSame("norm", norm, "g", g));

    Tensor *grad_v, *grad_g;
    // Safe, because the kernels read no element of grad_w, for a sum or for another unit, after
    // grad_v has overwritten it.
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, v.shape(), &grad_v));
    OP_REQUIRES_OK(context, context->allocate_output(1, g.shape(), &grad_g));

    arguments.v_type = TypeOf(v.dtype());
    arguments.g_type = TypeOf(g.dtype());
    arguments.w_type = TypeOf(grad_w.dtype());
    arguments.grad_w = grad_w.data();
    arguments.v = v.data();
    arguments.g = g.data();
    arguments.norm = norm.data();
    arguments.grad_v = grad_v->data();
    arguments.grad_g = grad_g->data();
    OP_REQUIRES_OK(context, Run<processor>::Call(context, arguments));
  }

 private:
  Axis axis_;
};

REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNorm").Device(tensorflow::DEVICE_CPU),
                        WeightNormOp<Processor::kCpu>);
REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNormGrad").Device(tensorflow::DEVICE_CPU),
                        WeightNormGradOp<Processor::kCpu>);
#ifdef TFWN_CUDA
REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNorm").Device(tensorflow::DEVICE_GPU),
                        WeightNormOp<Processor::kGpu>);
REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNormGrad").Device(tensorflow::DEVICE_GPU),
                        WeightNormGradOp<Processor::kGpu>);
#endif

}  // namespace
}  // namespace tfwn
