// The kernels as targets of XLA's custom calls (typed FFI), for any program that compiles with XLA:
// TensorFlow (tensorflow_xla.cc), or JAX by jax.ffi.register_ffi_target.
//
//   tfwn_weight_norm_*        v, g               ->  w, norm, scratch
//   tfwn_weight_norm_grad_*   grad_w, v, g, norm ->  grad_v, grad_g, scratch
//
// All arrays are row-major. The attribute `axis`, an array of int64, names consecutive axes of v,
// in ascending order; none is one norm for the whole of v. scratch is uint8 of any one shape with
// at least XlaScratchBytes elements: XLA allocates it, since a handler in a GPU's command buffer
// must not. A grad_v that is grad_w's memory is allowed where both have one type.

#ifndef TFWN_CSRC_XLA_HANDLERS_H_
#define TFWN_CSRC_XLA_HANDLERS_H_

#include <cstdint>

#include "weight_norm.h"
#include "xla/ffi/api/c_api.h"

#define TFWN_EXPORT extern "C" __attribute__((visibility("default")))

TFWN_EXPORT XLA_FFI_Error* tfwn_weight_norm_host(XLA_FFI_CallFrame* frame);
TFWN_EXPORT XLA_FFI_Error* tfwn_weight_norm_grad_host(XLA_FFI_CallFrame* frame);
#ifdef TFWN_CUDA
TFWN_EXPORT XLA_FFI_Error* tfwn_weight_norm_cuda(XLA_FFI_CallFrame* frame);
TFWN_EXPORT XLA_FFI_Error* tfwn_weight_norm_grad_cuda(XLA_FFI_CallFrame* frame);
#endif

namespace tfwn {

// Enough for either platform, on any device of this machine. Pointers are not looked at.
int64_t XlaScratchBytes(const Forward& arguments);
int64_t XlaScratchBytes(const Backward& arguments);

}  // namespace tfwn

#endif  // TFWN_CSRC_XLA_HANDLERS_H_
