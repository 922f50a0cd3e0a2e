#include "xla_handlers.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>

#include "layout.h"
#include "weight_norm.h"
#include "xla/ffi/api/ffi.h"
#ifdef TFWN_CUDA
#include <cuda_runtime_api.h>
#endif

namespace tfwn {
namespace {

namespace ffi = ::xla::ffi;

using Attribute = ffi::Span<const int64_t>;
using Argument = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

// Conversion of buffers to kernel arguments. Functions that return a string return an error
// message, or an empty string if all is well.

std::string TypeOf(const char* name, ffi::DataType type, Type* result) {
  switch (type) {
    case ffi::DataType::F16:
      *result = Type::kHalf;
      return "";
    case ffi::DataType::BF16:
      *result = Type::kBfloat16;
      return "";
    case ffi::DataType::F32:
      *result = Type::kFloat;
      return "";
    case ffi::DataType::F64:
      *result = Type::kDouble;
      return "";
    default:
      return std::string(name) + " must be float16, bfloat16, float32 or float64";
  }
}

Sizes SizesOf(const Argument& buffer) {
  return Sizes(buffer.dimensions().begin(), buffer.dimensions().end());
}

std::string FirstOf(std::initializer_list<std::string> errors) {
  for (const std::string& error : errors) {
    if (!error.empty()) return error;
  }
  return "";
}

std::string CheckNorm(Type v, const Argument& norm) {
  const bool wide = NormType(v) == Type::kDouble;
  if (norm.element_type() == (wide ? ffi::DataType::F64 : ffi::DataType::F32)) return "";
  return wide ? "norm must be float64, because v is" : "norm must be float32 unless v is float64";
}

std::string GetLayout(Attribute axis, const Argument& v, const Argument& g, Layout* layout) {
  return FindLayout(Axis(axis.begin(), axis.end()), SizesOf(v), SizesOf(g), layout);
}

std::string CheckSame(const char* name, const Argument& buffer, const char* other_name,
                      const Argument& other) {
  return CheckSameShape(name, SizesOf(buffer), other_name, SizesOf(other));
}

std::string Collect(Attribute axis, Argument v, Argument g, Result w, Result norm, Forward* a) {
  a->v = v.untyped_data();
  a->g = g.untyped_data();
  a->w = w->untyped_data();
  a->norm = norm->untyped_data();
  return FirstOf({TypeOf("v", v.element_type(), &a->v_type),
                  TypeOf("g", g.element_type(), &a->g_type),
                  TypeOf("w", w->element_type(), &a->w_type), CheckNorm(a->v_type, *norm),
                  GetLayout(axis, v, g, &a->layout), CheckSame("w", *w, "v", v),
                  CheckSame("norm", *norm, "g", g)});
}

std::string Collect(Attribute axis, Argument grad_w, Argument v, Argument g, Argument norm,
                    Result grad_v, Result grad_g, Backward* a) {
  a->grad_w = grad_w.untyped_data();
  a->v = v.untyped_data();
  a->g = g.untyped_data();
  a->norm = norm.untyped_data();
  a->grad_v = grad_v->untyped_data();
  a->grad_g = grad_g->untyped_data();
  const auto check_type = [](const char* name, Argument buffer, const char* as, Argument other) {
    if (buffer.element_type() == other.element_type()) return std::string();
    return std::string(name) + " must have the type of " + as;
  };
  return FirstOf({TypeOf("grad_w", grad_w.element_type(), &a->w_type),
                  TypeOf("v", v.element_type(), &a->v_type),
                  TypeOf("g", g.element_type(), &a->g_type), CheckNorm(a->v_type, norm),
                  check_type("grad_v", *grad_v, "v", v), check_type("grad_g", *grad_g, "g", g),
                  GetLayout(axis, v, g, &a->layout), CheckSame("grad_w", grad_w, "v", v),
                  CheckSame("norm", norm, "g", g), CheckSame("grad_v", *grad_v, "v", v),
                  CheckSame("grad_g", *grad_g, "g", g)});
}

ffi::Error InvalidArgument(const std::string& error) {
  return ffi::Error::InvalidArgument("weight_norm: " + error);
}

constexpr size_t kHostAlignment = 64, kCudaAlignment = 256;

// Sets *scratch to an aligned address followed by `bytes` bytes, because XLA aligns buffers less
// than the kernels require.
ffi::Error GetScratch(Result buffer, size_t bytes, size_t alignment, void** scratch) {
  *scratch = buffer->untyped_data();
  size_t space = buffer->size_bytes();
  if (bytes == 0 || std::align(alignment, bytes, *scratch, space) != nullptr) {
    return ffi::Error::Success();
  }
  return InvalidArgument("scratch must have " + std::to_string(bytes + alignment) +
                         " bytes, but has " + std::to_string(buffer->size_bytes()));
}

// On the host.

// The minimum memory traffic per thread. XLA runs custom calls one after another, so no other
// operation needs the cores in the meantime.
constexpr int64_t kBytesPerThread = 256 << 10;

// Work that is shared by the pool's threads and the caller: each takes the next piece when it is
// free. The caller may itself be a thread of the pool while all other threads are waiting in the
// same way, so it must wait only for pieces that another thread has already started.
class Job {
 public:
  Job(int64_t n, int64_t step, const std::function<void(int64_t, int64_t)>& body)
      : n_(n), step_(step), body_(body) {}

  void Work() {
    for (;;) {
      const int64_t begin = next_.fetch_add(step_, std::memory_order_relaxed);
      if (begin >= n_) return;
      const int64_t end = std::min(begin + step_, n_);
      body_(begin, end);
      done_.fetch_add(end - begin, std::memory_order_release);
    }
  }

  void Wait() {
    while (done_.load(std::memory_order_acquire) != n_) std::this_thread::yield();
  }

 private:
  const int64_t n_, step_;
  const std::function<void(int64_t, int64_t)>& body_;  // invalid once all is done
  std::atomic<int64_t> next_{0}, done_{0};
};

template <class Arguments>
ffi::Error RunOnHost(ffi::ThreadPool& pool, Result scratch_buffer, const Arguments& arguments) {
  void* scratch;
  const ffi::Error error =
      GetScratch(scratch_buffer, cpu::ScratchBytes(arguments), kHostAlignment, &scratch);
  if (error.failure()) return error;
  cpu::Run(arguments, scratch,
           [&pool](int64_t n, int64_t bytes_per_task,
                   const std::function<void(int64_t, int64_t)>& body) {
             if (n == 0) return;
             const int64_t threads = std::min(n, n * bytes_per_task / kBytesPerThread);
             // Querying the pool takes longer than the work on a small weight.
             const int64_t pieces = threads <= 1 ? 1 : std::min(threads, pool.num_threads());
             if (pieces <= 1) return body(0, n);
             const auto job = std::make_shared<Job>(n, (n + pieces - 1) / pieces, body);
             for (int64_t i = 1; i < pieces; ++i) pool.Schedule([job] { job->Work(); });
             job->Work();
             job->Wait();
           });
  return ffi::Error::Success();
}

ffi::Error ForwardOnHost(ffi::ThreadPool pool, Attribute axis, Argument v, Argument g, Result w,
                         Result norm, Result scratch) {
  Forward arguments;
  const std::string error = Collect(axis, v, g, w, norm, &arguments);
  return error.empty() ? RunOnHost(pool, scratch, arguments) : InvalidArgument(error);
}

ffi::Error BackwardOnHost(ffi::ThreadPool pool, Attribute axis, Argument grad_w, Argument v,
                          Argument g, Argument norm, Result grad_v, Result grad_g, Result scratch) {
  Backward arguments;
  const std::string error = Collect(axis, grad_w, v, g, norm, grad_v, grad_g, &arguments);
  return error.empty() ? RunOnHost(pool, scratch, arguments) : InvalidArgument(error);
}

// On CUDA. Nothing here allocates or waits, so that XLA can capture calls in a CUDA graph.

#ifdef TFWN_CUDA

template <class Arguments>
ffi::Error RunOnCuda(cudaStream_t stream, Result scratch_buffer, const Arguments& arguments) {
  void* scratch;
  const ffi::Error error =
      GetScratch(scratch_buffer, cuda::ScratchBytes(arguments.layout), kCudaAlignment, &scratch);
  if (error.failure()) return error;
  const int code = cuda::Run(arguments, scratch, stream);  // XLA has made its device current
  if (code == 0) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("weight_norm: a CUDA kernel failed: ") +
                              cuda::ErrorString(code));
}

ffi::Error ForwardOnCuda(cudaStream_t stream, Attribute axis, Argument v, Argument g, Result w,
                         Result norm, Result scratch) {
  Forward arguments;
  const std::string error = Collect(axis, v, g, w, norm, &arguments);
  return error.empty() ? RunOnCuda(stream, scratch, arguments) : InvalidArgument(error);
}

ffi::Error BackwardOnCuda(cudaStream_t stream, Attribute axis, Argument grad_w, Argument v,
                          Argument g, Argument norm, Result grad_v, Result grad_g, Result scratch) {
  Backward arguments;
  const std::string error = Collect(axis, grad_w, v, g, norm, grad_v, grad_g, &arguments);
  return error.empty() ? RunOnCuda(stream, scratch, arguments) : InvalidArgument(error);
}

#endif

// How many bytes XLA must allocate.

template <class Arguments>
int64_t ScratchBytesAnywhere(const Arguments& arguments) {
  size_t bytes = cpu::ScratchBytes(arguments) + kHostAlignment;
#ifdef TFWN_CUDA
  bytes = std::max(bytes, cuda::ScratchBytes(arguments.layout) + kCudaAlignment);
#endif
  return static_cast<int64_t>(bytes);
}

template <class Context>
auto BindForward() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Attr<Attribute>("axis")
      .template Arg<ffi::AnyBuffer>()   // v
      .template Arg<ffi::AnyBuffer>()   // g
      .template Ret<ffi::AnyBuffer>()   // w
      .template Ret<ffi::AnyBuffer>()   // norm
      .template Ret<ffi::AnyBuffer>();  // scratch
}

template <class Context>
auto BindBackward() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Attr<Attribute>("axis")
      .template Arg<ffi::AnyBuffer>()   // grad_w
      .template Arg<ffi::AnyBuffer>()   // v
      .template Arg<ffi::AnyBuffer>()   // g
      .template Arg<ffi::AnyBuffer>()   // norm
      .template Ret<ffi::AnyBuffer>()   // grad_v
      .template Ret<ffi::AnyBuffer>()   // grad_g
      .template Ret<ffi::AnyBuffer>();  // scratch
}

}  // namespace

int64_t XlaScratchBytes(const Forward& arguments) { return ScratchBytesAnywhere(arguments); }
int64_t XlaScratchBytes(const Backward& arguments) { return ScratchBytesAnywhere(arguments); }

}  // namespace tfwn

XLA_FFI_DEFINE_HANDLER_SYMBOL(tfwn_weight_norm_host, tfwn::ForwardOnHost,
                              tfwn::BindForward<xla::ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(tfwn_weight_norm_grad_host, tfwn::BackwardOnHost,
                              tfwn::BindBackward<xla::ffi::ThreadPool>());
#ifdef TFWN_CUDA
XLA_FFI_DEFINE_HANDLER_SYMBOL(tfwn_weight_norm_cuda, tfwn::ForwardOnCuda,
                              tfwn::BindForward<xla::ffi::PlatformStream<cudaStream_t>>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(tfwn_weight_norm_grad_cuda, tfwn::BackwardOnCuda,
                              tfwn::BindBackward<xla::ffi::PlatformStream<cudaStream_t>>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
#endif
