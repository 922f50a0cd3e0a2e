// What the kernels work on, and the kernels for each instruction set.

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

// Terms that are added in float before the sum goes on in double.
constexpr int kGroup = 8;

// Part of a matrix: `rows` of `width` elements.
struct Block {
  int64_t rows, width;
  const void* v;
  const void* grad_w;  // backward only
  void* result;        // w, or grad_v
  int64_t stride;      // elements from row to row
  // How far ahead of an element memory is asked for those that follow: of v and grad_w where
  // columns are summed and segments scaled, and of the result.
  int64_t fetch, fetch_result;
  bool stream;  // Whether results go past the caches. They begin at cache lines.
};

// The numbers that multiply a column or a segment: fraction * power, where power is a power of two.
// Applying power first keeps a product in range whenever the result is, where a single factor such
// as 1 / norm can be too large for a float. Power is 1 where fraction alone is enough.
struct Factors {
  void* fraction;
  void* power;
};

template <class V, class W>
using ComputeType =
    std::conditional_t<std::is_same_v<V, double> || std::is_same_v<W, double>, double, float>;

// What weight_norm_cpu_kernels.h has for each pair of types of v and w, each direction, and each
// way to read a block.
struct Kernels {
  void (*sum)(const Block& block, double* sums);
  void (*scale)(const Block& block, const Factors& scales, const Factors& projections, bool powers);
};

// Some units, for the arithmetic on one number per unit. Each pointer is to the first one's.
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
  // From sums to norms (forward) or grad_g (backward), and to factors: [floats, doubles]. Return
  // whether a factor needs its power.
  bool (*forward[2])(const UnitBlock& units);
  bool (*backward[2])(const UnitBlock& units);
};

#if defined(__x86_64__)
// Whether the processor rounds float to bfloat16. Not all that have AVX-512 do, and the compiler
// emits the instruction only where it is asked for, which is where this is true.
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

// TFWN_SIMD=baseline or avx2 asks for less than the machine has, for tests.
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
