// The kernels' data structures, and the kernels for each instruction set.

#ifndef TFWN_CSRC_WEIGHT_NORM_CPU_LEVELS_H_
#define TFWN_CSRC_WEIGHT_NORM_CPU_LEVELS_H_

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "weight_norm.h"
#include "weight_norm_cpu_plan.h"

#define TFWN_INLINE inline __attribute__((always_inline))

namespace tfwn::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// How many terms are added in float before the sum continues in double.
constexpr int kGroup = 8;

// Part of a matrix: `rows` rows of `width` elements.
struct Block {
  int64_t rows, width;
  const void* v;
  const void* grad_w;  // backward only
  void* result;        // w, or grad_v
  int64_t stride;      // elements from row to row
  // Prefetch distances, in elements: of v and grad_w when columns are summed or segments are
  // scaled, and of the result.
  int64_t fetch, fetch_result;
  bool stream;  // Whether results bypass the caches. Their rows begin at cache lines.
};

// The factors of columns or segments, each stored as fraction * power, where power is a power of
// two. A single factor such as 1 / norm can be too large for a float. Multiplying by power first
// keeps the intermediate product in range whenever the result is. Power is 1 if fraction alone is
// enough.
struct Factors {
  void* fraction;
  void* power;
};

template <class V, class W>
using ComputeType =
    std::conditional_t<std::is_same_v<V, double> || std::is_same_v<W, double>, double, float>;

// The loops of weight_norm_cpu_kernels.h for one pair of types of v and w, one direction, and one
// way to read a block.
struct Kernels {
  void (*sum)(const Block& block, double* sums);
  void (*scale)(const Block& block, const Factors& scales, const Factors& projections, bool powers);
};

// A range of units, for the arithmetic on one number per unit. Pointers are to the first unit's
// numbers.
struct UnitBlock {
  int64_t count;
  const double* sums;
  Type g_type, norm_type;
  const void* g;
  void* norm;    // written forward, read backward
  void* grad_g;  // backward only
  Factors scales, projections;
};

struct UnitKernels {
  void (*add_rows)(const double* sums, int64_t rows, int64_t width, int64_t stride, double* total);
  // Compute norms (forward) or grad_g (backward) and factors from the sums. Factors are floats for
  // index 0 and doubles for index 1. Return whether any power is not 1.
  bool (*forward[2])(const UnitBlock& units);
  bool (*backward[2])(const UnitBlock& units);
};

#if defined(__x86_64__)
// Whether the processor has an instruction that rounds float to bfloat16. Not all processors with
// AVX-512 do. The compiler emits it only for its intrinsic, which is used only if this is true.
bool RoundsToBfloat16() {
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16"));
  return has;
}
#endif

namespace baseline {
#define TFWN_VECTOR_BYTES 16
// clang-format off: in this order
#include "weight_norm_cpu_simd.h"
#include "weight_norm_cpu_kernels.h"
#include "weight_norm_cpu_units.h"
// clang-format on
#undef TFWN_VECTOR_BYTES
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define TFWN_VECTOR_BYTES 32
// clang-format off: in this order
#include "weight_norm_cpu_simd.h"
#include "weight_norm_cpu_kernels.h"
#include "weight_norm_cpu_units.h"
// clang-format on
#undef TFWN_VECTOR_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif
namespace avx512 {
#define TFWN_VECTOR_BYTES 64
// clang-format off: in this order
#include "weight_norm_cpu_simd.h"
#include "weight_norm_cpu_kernels.h"
#include "weight_norm_cpu_units.h"
// clang-format on
#undef TFWN_VECTOR_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)

enum class Level { kBaseline, kAvx2, kAvx512 };

// For tests, TFWN_SIMD=baseline or avx2 selects a lower level than the machine supports.
Level FindLevel() {
#if defined(__x86_64__)
  const char* asked = std::getenv("TFWN_SIMD");
  if (asked == nullptr) asked = "";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (!avx2 || std::strcmp(asked, "baseline") == 0) return Level::kBaseline;
  if (!avx512 || std::strcmp(asked, "avx2") == 0) return Level::kAvx2;
  return Level::kAvx512;
#else
  return Level::kBaseline;
#endif
}

Level UsedLevel() {
  static const Level level = FindLevel();
  return level;
}

Kernels KernelsFor(Type v, Type w, bool backward, bool columns) {
#if defined(__x86_64__)
  if (UsedLevel() == Level::kAvx512) return avx512::KernelsFor(v, w, backward, columns);
  if (UsedLevel() == Level::kAvx2) return avx2::KernelsFor(v, w, backward, columns);
#endif
  return baseline::KernelsFor(v, w, backward, columns);
}

const UnitKernels& Units() {
#if defined(__x86_64__)
  if (UsedLevel() == Level::kAvx512) return avx512::kUnitKernels;
  if (UsedLevel() == Level::kAvx2) return avx2::kUnitKernels;
#endif
  return baseline::kUnitKernels;
}

}  // namespace
}  // namespace tfwn::cpu

#endif  // TFWN_CSRC_WEIGHT_NORM_CPU_LEVELS_H_
