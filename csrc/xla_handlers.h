// The kernels as targets of XLA custom calls (typed FFI), for any program that compiles with XLA:
// TensorFlow (tensorflow_xla.cc), or JAX with jax.ffi.register_ffi_target.
//
//   tfwn_weight_norm_*        v, g               ->  w, norm, scratch
//   tfwn_weight_norm_grad_*   grad_w, v, g, norm ->  grad_v, grad_g, scratch
//
// All arrays are row-major. The attribute `axis`, an int64 array, lists consecutive axes of v in
// ascending order; an empty array means one norm for the whole of v. scratch is a uint8 array of
// any shape with at least XlaScratchBytes elements. XLA allocates it, because a handler in a GPU
// command buffer must not allocate. grad_v may be the same memory as grad_w if both have the same
// type.

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

// Enough for both platforms and any device. Ignores the pointers.
int64_t XlaScratchBytes(const Forward& arguments);
int64_t XlaScratchBytes(const Backward& arguments);

}  // namespace tfwn

#endif  // TFWN_CSRC_XLA_HANDLERS_H_
