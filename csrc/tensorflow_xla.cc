// The same ops for XLA (jit_compile=True): eq. 2 and 3 in its operations.
//
// All arithmetic is in double: fused with the memory traffic it costs little, and sums of squares
// of floats neither underflow nor overflow.
//
// The kernels are registered under the names of XLA's devices, since REGISTER_XLA_OP comes too late
// once the process has compiled anything.

#include <cstdint>
#include <vector>

#include "csrc/tensorflow_checks.h"
#include "csrc/weight_norm.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/lib/math.h"
#include "xla/hlo/builder/xla_builder.h"

namespace tfwn {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::XlaOpKernel;
using tensorflow::XlaOpKernelContext;
using xla::XlaOp;

// The units of a v: how to sum over one, and how to give each of its elements the unit's value.
class Units {
 public:
  Units(XlaOpKernelContext* context, int rank, int first, int count) : context_(context) {
    for (int i = 0; i < rank; ++i)
      (i >= first && i < first + count ? kept_ : reduced_).push_back(i);
  }

  XlaOp Sum(XlaOp x) const {
    return xla::Reduce(x, xla::Zero(context_->builder(), xla::F64),
                       *context_->GetOrCreateAdd(tensorflow::DT_DOUBLE), reduced_);
  }

  XlaOp Scale(XlaOp x, XlaOp per_unit) const { return xla::Mul(x, per_unit, kept_); }

 private:
  XlaOpKernelContext* context_;
  std::vector<int64_t> kept_, reduced_;
};

// 1 / norm, and 0 for a unit that is all zero.
XlaOp Inverse(XlaOp norm) {
  const XlaOp zero = xla::ZerosLike(norm);
  return xla::Select(xla::Eq(norm, zero), zero, xla::Reciprocal(norm));
}

XlaOp Wide(XlaOp x) { return xla::ConvertElementType(x, xla::F64); }

absl::Status GetShape(XlaOpKernelContext* context, const char* name, Shape* shape) {
  TF_ASSIGN_OR_RETURN(const xla::Shape xla_shape, context->InputXlaShape(name));
  *shape = Dims(xla_shape.dimensions().begin(), xla_shape.dimensions().end());
  return absl::OkStatus();
}

class WeightNormXlaOp : public XlaOpKernel {
 public:
  explicit WeightNormXlaOp(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("axis", &axis_));
    OP_REQUIRES_OK(context, CheckNormType(input_type(0), output_type(1)));
  }

  void Compile(XlaOpKernelContext* context) override {
    Shape v_shape, g_shape;
    int first;
    OP_REQUIRES_OK(context, GetShape(context, "v", &v_shape));
    OP_REQUIRES_OK(context, GetShape(context, "g", &g_shape));
    OP_REQUIRES_OK(context, CheckG(axis_, v_shape, g_shape, &first));
    const Units units(context, v_shape->size(), first, axis_.size());

    const XlaOp v = Wide(context->Input("v"));
    const XlaOp g = Wide(context->Input("g"));
    const XlaOp norm = xla::Sqrt(units.Sum(xla::Square(v)));
    const XlaOp w = units.Scale(v, g * Inverse(norm));
    context->SetOutput(0, xla::ConvertElementType(w, context->output_xla_type(0)));
    context->SetOutput(1, xla::ConvertElementType(norm, context->output_xla_type(1)));
  }

 private:
  Axis axis_;
};

class WeightNormGradXlaOp : public XlaOpKernel {
 public:
  explicit WeightNormGradXlaOp(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("axis", &axis_));
    OP_REQUIRES_OK(context, CheckNormType(input_type(1), input_type(3)));
  }

  void Compile(XlaOpKernelContext* context) override {
    Shape grad_w_shape, v_shape, g_shape, norm_shape;
    int first;
    OP_REQUIRES_OK(context, GetShape(context, "grad_w", &grad_w_shape));
    OP_REQUIRES_OK(context, GetShape(context, "v", &v_shape));
    OP_REQUIRES_OK(context, GetShape(context, "g", &g_shape));
    OP_REQUIRES_OK(context, GetShape(context, "norm", &norm_shape));
    OP_REQUIRES_OK(context, CheckG(axis_, v_shape, g_shape, &first));
    OP_REQUIRES_OK(context, CheckSameShape("grad_w", grad_w_shape, "v", v_shape));
    OP_REQUIRES_OK(context, CheckSameShape("norm", norm_shape, "g", g_shape));
    const Units units(context, v_shape->size(), first, axis_.size());

    const XlaOp grad_w = Wide(context->Input("grad_w"));
    const XlaOp v = Wide(context->Input("v"));
    const XlaOp g = Wide(context->Input("g"));
    const XlaOp inverse = Inverse(Wide(context->Input("norm")));
    const XlaOp grad_g = units.Sum(grad_w * v) * inverse;
    const XlaOp difference = grad_w - units.Scale(v, grad_g * inverse);
    const XlaOp noise = xla::Abs(grad_w) * xla::ScalarLike(grad_w, kRounding<double>);
    const XlaOp across =
        xla::Select(xla::Lt(xla::Abs(difference), noise), xla::ZerosLike(difference), difference);
    const XlaOp grad_v = units.Scale(across, g * inverse);
    context->SetOutput(0, xla::ConvertElementType(grad_v, context->output_xla_type(0)));
    context->SetOutput(1, xla::ConvertElementType(grad_g, context->output_xla_type(1)));
  }

 private:
  Axis axis_;
};

REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNorm").Device("XLA_CPU_JIT"), WeightNormXlaOp);
REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNorm").Device("XLA_GPU_JIT"), WeightNormXlaOp);
REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNormGrad").Device("XLA_CPU_JIT"), WeightNormGradXlaOp);
REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNormGrad").Device("XLA_GPU_JIT"), WeightNormGradXlaOp);

}  // namespace
}  // namespace tfwn
