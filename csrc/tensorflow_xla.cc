// The same ops for XLA (jit_compile=True): a custom call to the kernels (xla_handlers.h) or, if no
// handler can be called, eq. 2 and 3 as XLA operations.
//
// There is a handler for the host and, if the CUDA kernels are compiled in, one for CUDA. No
// handler can be called from code compiled ahead of time (tfcompile), whose process has none, or
// with dynamic shapes, whose sizes XLA does not pass to custom calls.
//
// The kernels are registered under the names of XLA's devices, because REGISTER_XLA_OP comes too
// late if the process has already compiled something.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "csrc/layout.h"
#include "csrc/tensorflow_checks.h"
#include "csrc/weight_norm.h"
#include "csrc/xla_handlers.h"
#include "tensorflow/compiler/tf2xla/xla_compiler.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "xla/ffi/api/ffi.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/lib/math.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"

namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();  // exported by TensorFlow 2.20 and 2.21, unlike XLA_FFI_GetApi
}

namespace tfwn {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::XlaOpKernel;
using tensorflow::XlaOpKernelContext;
using xla::XlaOp;

constexpr char kCpu[] = "XLA_CPU_JIT", kGpu[] = "XLA_GPU_JIT";
constexpr char kForward[] = "tfwn_weight_norm";
constexpr char kBackward[] = "tfwn_weight_norm_grad";

bool Register(const char* name, const char* platform, XLA_FFI_Handler* handler,
              XLA_FFI_Handler_Traits traits) {
  const XLA_FFI_Api* api = xla::ffi::GetXlaFfiApi();
  XLA_FFI_Error* error = xla::ffi::Ffi::RegisterStaticHandler(api, name, platform, handler, traits);
  if (error == nullptr) return true;
  xla::ffi::internal::DestroyError(api, error);
  return false;
}

// The platforms for which XLA accepted our handlers.
struct Handlers {
  bool host = false, cuda = false;

  Handlers() {
    // For tests of the fallback without handlers.
    const char* wanted = std::getenv("TFWN_XLA_HANDLERS");
    if (wanted != nullptr && std::string(wanted) == "0") return;
    host = Register(kForward, "Host", tfwn_weight_norm_host, 0) &&
           Register(kBackward, "Host", tfwn_weight_norm_grad_host, 0);
#ifdef TFWN_CUDA
    constexpr auto kTraits = XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE;
    cuda = Register(kForward, "CUDA", tfwn_weight_norm_cuda, kTraits) &&
           Register(kBackward, "CUDA", tfwn_weight_norm_grad_cuda, kTraits);
#endif
  }
};

const Handlers handlers;

struct Operand {
  XlaOp op;
  xla::Shape shape;

  Sizes sizes() const { return Sizes(shape.dimensions().begin(), shape.dimensions().end()); }
};

absl::Status GetOperand(XlaOpKernelContext* context, const char* name, Operand* operand) {
  TF_ASSIGN_OR_RETURN(operand->shape, context->InputXlaShape(name));
  operand->op = context->Input(name);
  return absl::OkStatus();
}

// Eq. 2 and 3 as XLA operations. v is scaled to magnitudes of at most 1 before it is squared or
// multiplied, so that nothing overflows and underflow does no harm. This makes float sufficient
// unless some type is double; on most GPUs double takes up to 64 times as long.
class Composition {
 public:
  Composition(XlaOpKernelContext* context, const Axis& axis, const std::vector<Operand>& operands)
      : context_(context), type_(xla::F32) {
    for (const Operand& operand : operands) Widen(operand.shape.element_type());
    for (int i = 0; i < context->num_outputs(); ++i) Widen(context->output_xla_type(i));
    Axis kept = axis;
    const int64_t rank = operands[0].shape.dimensions().size();
    CheckAxis(rank, &kept);
    for (int64_t a = 0; a < rank; ++a) {
      (std::count(kept.begin(), kept.end(), a) ? kept_ : reduced_).push_back(a);
    }
  }

  void Forward(const Operand& v_operand, const Operand& g_operand) const {
    const XlaOp v = Wide(v_operand), g = Wide(g_operand);
    const XlaOp largest = xla::Reduce(xla::Abs(v), Zero(), Max(), reduced_);
    const XlaOp u = xla::Div(v, OneForZero(largest), kept_);
    const XlaOp length = xla::Sqrt(Sum(xla::Square(u)));
    SetOutput(0, xla::Mul(u, Over(g, length), kept_));
    SetOutput(1, largest * length);
  }

  void Backward(const Operand& grad_w_operand, const Operand& v_operand, const Operand& g_operand,
                const Operand& norm_operand) const {
    const XlaOp grad_w = Wide(grad_w_operand), v = Wide(v_operand), g = Wide(g_operand);
    const XlaOp norm = Wide(norm_operand);
    const XlaOp u = xla::Div(v, OneForZero(norm), kept_);
    const XlaOp grad_g = ZeroUnless(norm, Sum(grad_w * u));
    const XlaOp difference = grad_w - xla::Mul(u, grad_g, kept_);
    const double rounding = type_ == xla::F64 ? kRounding<double> : kRounding<float>;
    const XlaOp noise = xla::Abs(grad_w) * xla::ScalarLike(grad_w, rounding);
    const XlaOp across =
        xla::Select(xla::Lt(xla::Abs(difference), noise), xla::ZerosLike(difference), difference);
    // g / norm may leave the range of float where g across / norm does not, so each of the factors
    // is divided by the norm's square root.
    const XlaOp root = xla::Sqrt(norm);
    SetOutput(0, xla::Mul(xla::Div(across, OneForZero(root), kept_), Over(g, root), kept_));
    SetOutput(1, grad_g);
  }

 private:
  void Widen(xla::PrimitiveType type) {
    if (type == xla::F64) type_ = xla::F64;
  }

  XlaOp Wide(const Operand& x) const { return xla::ConvertElementType(x.op, type_); }
  XlaOp Zero() const { return xla::Zero(context_->builder(), type_); }
  tensorflow::DataType type() const {
    return type_ == xla::F64 ? tensorflow::DT_DOUBLE : tensorflow::DT_FLOAT;
  }
  const xla::XlaComputation& Max() const { return *context_->GetOrCreateMax(type()); }

  XlaOp Sum(XlaOp x) const {
    return xla::Reduce(x, Zero(), *context_->GetOrCreateAdd(type()), reduced_);
  }

  static XlaOp IsZero(XlaOp x) { return xla::Eq(x, xla::ZerosLike(x)); }
  static XlaOp OneForZero(XlaOp x) { return xla::Select(IsZero(x), xla::ScalarLike(x, 1), x); }
  // x, but 0 where y is 0
  static XlaOp ZeroUnless(XlaOp y, XlaOp x) { return xla::Select(IsZero(y), xla::ZerosLike(x), x); }
  // x / y, but 0 where y is 0
  static XlaOp Over(XlaOp x, XlaOp y) { return ZeroUnless(y, x / OneForZero(y)); }

  void SetOutput(int i, XlaOp x) const {
    context_->SetOutput(i, xla::ConvertElementType(x, context_->output_xla_type(i)));
  }

  XlaOpKernelContext* context_;
  xla::PrimitiveType type_;
  std::vector<int64_t> kept_, reduced_;
};

class WeightNormXlaKernel : public XlaOpKernel {
 public:
  explicit WeightNormXlaKernel(OpKernelConstruction* context)
      : XlaOpKernel(context), on_gpu_(context->device_type() == kGpu) {
    OP_REQUIRES_OK(context, context->GetAttr("axis", &axis_));
  }

 protected:
  const Axis& axis() const { return axis_; }

  bool HasHandler(XlaOpKernelContext* context, const std::vector<Operand>& operands) const {
    for (const Operand& operand : operands) {
      if (operand.shape.is_dynamic()) return false;
    }
    if (on_gpu_) return handlers.cuda;
    const tensorflow::XlaCompiler* compiler = context->compiler();
    return handlers.host && compiler != nullptr && compiler->options().allow_cpu_custom_calls;
  }

  // Calls a handler with row-major arrays. The outputs have the shapes of v and g.
  void CallHandler(XlaOpKernelContext* context, const char* target,
                   const std::vector<Operand>& operands, const Operand& v, const Operand& g,
                   int64_t scratch_bytes) const {
    const auto row_major = [](xla::PrimitiveType type, const Sizes& sizes) {
      return xla::ShapeUtil::MakeShapeWithDescendingLayout(type, sizes);
    };
    std::vector<XlaOp> ops;
    std::vector<xla::Shape> shapes;
    for (const Operand& operand : operands) {
      ops.push_back(operand.op);
      shapes.push_back(row_major(operand.shape.element_type(), operand.sizes()));
    }
    const xla::Shape results = xla::ShapeUtil::MakeTupleShape(
        {row_major(context->output_xla_type(0), v.sizes()),
         row_major(context->output_xla_type(1), g.sizes()), row_major(xla::U8, {scratch_bytes})});
    const std::string attributes = absl::StrCat("{axis = array<i64", axis_.empty() ? "" : ": ",
                                                absl::StrJoin(axis_, ", "), ">}");
    const XlaOp call = xla::CustomCallWithLayout(
        context->builder(), target, ops, results, shapes, attributes, /*has_side_effect=*/false,
        /*output_operand_aliasing=*/{}, /*literal=*/nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    context->SetOutput(0, xla::GetTupleElement(call, 0));
    context->SetOutput(1, xla::GetTupleElement(call, 1));
  }

 private:
  bool on_gpu_;
  Axis axis_;
};

class ForwardXlaKernel : public WeightNormXlaKernel {
 public:
  explicit ForwardXlaKernel(OpKernelConstruction* context) : WeightNormXlaKernel(context) {
    OP_REQUIRES_OK(context, CheckNormType(input_type(0), output_type(1)));
  }

  void Compile(XlaOpKernelContext* context) override {
    Operand v, g;
    OP_REQUIRES_OK(context, GetOperand(context, "v", &v));
    OP_REQUIRES_OK(context, GetOperand(context, "g", &g));
    Forward arguments = {};
    OP_REQUIRES_OK(context, StatusOf(FindLayout(axis(), v.sizes(), g.sizes(), &arguments.layout)));
    if (!HasHandler(context, {v, g})) return Composition(context, axis(), {v, g}).Forward(v, g);
    arguments.v_type = TypeOf(input_type(0));
    arguments.g_type = TypeOf(input_type(1));
    arguments.w_type = TypeOf(output_type(0));
    CallHandler(context, kForward, {v, g}, v, g, XlaScratchBytes(arguments));
  }
};

class BackwardXlaKernel : public WeightNormXlaKernel {
 public:
  explicit BackwardXlaKernel(OpKernelConstruction* context) : WeightNormXlaKernel(context) {
    OP_REQUIRES_OK(context, CheckNormType(input_type(1), input_type(3)));
  }

  void Compile(XlaOpKernelContext* context) override {
    Operand grad_w, v, g, norm;
    OP_REQUIRES_OK(context, GetOperand(context, "grad_w", &grad_w));
    OP_REQUIRES_OK(context, GetOperand(context, "v", &v));
    OP_REQUIRES_OK(context, GetOperand(context, "g", &g));
    OP_REQUIRES_OK(context, GetOperand(context, "norm", &norm));
    Backward arguments = {};
    OP_REQUIRES_OK(context, StatusOf(FindLayout(axis(), v.sizes(), g.sizes(), &arguments.layout)));
    OP_REQUIRES_OK(context, StatusOf(CheckSameShape("grad_w", grad_w.sizes(), "v", v.sizes())));
    OP_REQUIRES_OK(context, StatusOf(CheckSameShape("norm", norm.sizes(), "g", g.sizes())));
    const std::vector<Operand> operands = {grad_w, v, g, norm};
    if (!HasHandler(context, operands)) {
      return Composition(context, axis(), operands).Backward(grad_w, v, g, norm);
    }
    arguments.v_type = TypeOf(input_type(1));
    arguments.g_type = TypeOf(input_type(2));
    arguments.w_type = TypeOf(input_type(0));
    CallHandler(context, kBackward, operands, v, g, XlaScratchBytes(arguments));
  }
};

REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNorm").Device(kCpu), ForwardXlaKernel);
REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNorm").Device(kGpu), ForwardXlaKernel);
REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNormGrad").Device(kCpu), BackwardXlaKernel);
REGISTER_KERNEL_BUILDER(Name("Tfwn>WeightNormGrad").Device(kGpu), BackwardXlaKernel);

}  // namespace
}  // namespace tfwn
