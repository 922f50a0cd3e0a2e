// The contract of the weight normalization kernels (Salimans & Kingma 2016, eq. 2 and 3).
//
//   forward    norm   = ||v||                                             [units]
//              w      = g * v / norm                                      [outer, units, inner]
//   backward   grad_g = sum(grad_w * v) / norm                            [units]
//              grad_v = (g / norm) * (grad_w - (grad_g / norm) * v)       [outer, units, inner]
//
// Norms and sums run over outer and inner, so there is one per unit. Every weight layout collapses
// to [outer, units, inner]: Dense [in, out] becomes [in, out, 1], HWIO becomes [H*W*I, O, 1], a row
// layout [out, in] becomes [1, out, in], and one norm for a whole tensor is [1, 1, size].
//
// Guarantees, for every layout and type, CPU and CUDA alike:
//   - a unit with v = 0 gets w = 0, grad_g = 0 and, where grad_w is finite, grad_v = 0; no epsilon
//     enters w or grad_g;
//   - an element of v that is alone in its unit, or its unit's only nonzero one, has exactly
//     grad_v = 0, because Adam and similar optimizers would turn rounding noise into full-size
//     steps (not guaranteed for subnormal grad_w, or for v whose squares underflow in double);
//   - norms from 1e-30 to 1e+30 (1e-150 to 1e+150 if v is float64) neither underflow nor overflow;
//   - results depend only on the arguments and the processor, not on timing or the thread count;
//   - sizes are 64-bit, and any size may be zero.
//
// grad_v may be the same memory as grad_w if both have the same type. Otherwise outputs must not
// overlap inputs or each other. Kernels see only pointers, sizes and a way to run in parallel;
// nothing here depends on a framework.

#ifndef TFWN_CSRC_WEIGHT_NORM_H_
#define TFWN_CSRC_WEIGHT_NORM_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>

namespace tfwn {

enum class Type { kHalf, kBfloat16, kFloat, kDouble };

struct Layout {
  int64_t outer;
  int64_t units;
  int64_t inner;

  int64_t size() const { return outer * units * inner; }
};

// The type of norm: double when v is double, float otherwise. Sums are accumulated in a type at
// least as wide.
constexpr Type NormType(Type v) { return v == Type::kDouble ? Type::kDouble : Type::kFloat; }

// If |grad_w - (grad_g / norm) * v| is less than this fraction of |grad_w|, it is rounding error
// and becomes 0.
template <class Real>
constexpr Real kRounding = 4 * std::numeric_limits<Real>::epsilon();

constexpr size_t SizeOf(Type type) {
  return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2;
}

struct Forward {
  Layout layout;
  Type v_type, g_type, w_type;
  const void* v;  // v_type [outer, units, inner]
  const void* g;  // g_type [units]
  void* w;        // w_type [outer, units, inner]
  void* norm;     // NormType(v_type) [units]
};

struct Backward {
  Layout layout;
  Type v_type, g_type, w_type;
  const void* grad_w;  // w_type [outer, units, inner]
  const void* v;       // v_type [outer, units, inner]
  const void* g;       // g_type [units]
  const void* norm;    // NormType(v_type) [units], as forward wrote it
  void* grad_v;        // v_type [outer, units, inner]
  void* grad_g;        // g_type [units]
};

namespace cpu {

// Runs body(begin, end) over a partition of [0, n) and returns when all of it is done. The caller
// chooses the partition and the number of threads; results do not depend on either. bytes_per_task
// is the memory traffic of one task, from which the caller can judge how many threads are
// worthwhile.
using ParallelFor = std::function<void(int64_t n, int64_t bytes_per_task,
                                       const std::function<void(int64_t, int64_t)>& body)>;

// scratch: at least ScratchBytes(...) bytes, aligned to 64. Needs no initialization.
size_t ScratchBytes(const Forward& arguments);
size_t ScratchBytes(const Backward& arguments);
void Run(const Forward& arguments, void* scratch, const ParallelFor& parallel_for);
void Run(const Backward& arguments, void* scratch, const ParallelFor& parallel_for);

// The instruction set in use on this machine: "avx512", "avx2" or "baseline".
const char* SimdLevel();

}  // namespace cpu

namespace cuda {

// Run launches kernels on the current device. The split of the work, and therefore the last bit of
// results, depends on the device. scratch: at least ScratchBytes(...) bytes on the device, aligned
// to 256; this many are enough for any device, and at most 512 KiB besides 8 bytes per unit. stream
// is a cudaStream_t. Returns a cudaError_t, 0 for success. Never waits for the device and never
// allocates on it, so calls can be captured in a CUDA graph.
size_t ScratchBytes(const Layout& layout);
int Run(const Forward& arguments, void* scratch, void* stream);
int Run(const Backward& arguments, void* scratch, void* stream);
const char* ErrorString(int error);

}  // namespace cuda

}  // namespace tfwn

#endif  // TFWN_CSRC_WEIGHT_NORM_H_
