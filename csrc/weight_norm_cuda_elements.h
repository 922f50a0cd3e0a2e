// The building blocks of weight_norm_cuda_kernels.h: a launch's parameter, elements of each type,
// the arithmetic on one number per unit, and the vectors that a thread visits.

#ifndef TFWN_CSRC_WEIGHT_NORM_CUDA_ELEMENTS_H_
#define TFWN_CSRC_WEIGHT_NORM_CUDA_ELEMENTS_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "weight_norm.h"
#include "weight_norm_cuda_plan.h"

namespace tfwn {
namespace cuda {
namespace {

struct Work {
  Plan plan;
  Layout layout;
  SharedMemory memory;
  int parts;
  bool ragged;
  bool vectors;   // v, grad_w and result begin at the same place in a vector:
  int alignment;  // this many elements from its start
  Type g_type, norm_type;
  const void* grad_w;  // backward only
  const void* v;
  const void* g;
  void* norm;        // forward writes it, backward reads it
  void* result;      // w, or grad_v, which may be grad_w's memory
  void* grad_g;      // backward only
  double* partials;  // [splits, units], two launches only
};

// How many elements of each of the two types fit in 16 bytes.
template <class V, class W>
constexpr int kVector = 16 / (sizeof(V) > sizeof(W) ? sizeof(V) : sizeof(W));

// kVec elements that are read or written at once.
template <class T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  T x[kVec];
};

// Arithmetic on single elements: in double when v or w is double, in float otherwise.
template <class V, class W>
using Real =
    typename std::conditional<std::is_same<V, double>::value || std::is_same<W, double>::value,
                              double, float>::type;

// A number that multiplies elements. In float it is stored as fraction * power, because the number
// itself might not be in float's range.
template <class R>
struct Factor {
  R fraction;
  R power;
};

template <>
struct Factor<double> {
  double fraction;
};

template <class R>
struct Factors {
  Factor<R> scale;       // g / norm
  Factor<R> projection;  // grad_g / norm, backward only
};

__device__ inline float Times(float x, const Factor<float>& factor) {
  return (x * factor.fraction) * factor.power;
}
__device__ inline double Times(double x, const Factor<double>& factor) {
  return x * factor.fraction;
}

__device__ inline float Value(__half x) { return __half2float(x); }
__device__ inline float Value(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float Value(float x) { return x; }
__device__ inline double Value(double x) { return x; }

__device__ inline void Assign(float x, __half* y) { *y = __float2half_rn(x); }
__device__ inline void Assign(double x, __half* y) { *y = __double2half(x); }
__device__ inline void Assign(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }
__device__ inline void Assign(double x, __nv_bfloat16* y) { *y = __double2bfloat16(x); }
__device__ inline void Assign(float x, float* y) { *y = x; }
__device__ inline void Assign(double x, float* y) { *y = static_cast<float>(x); }
__device__ inline void Assign(double x, double* y) { *y = x; }

__device__ inline double LoadUnit(const void* values, Type type, int64_t unit) {
  switch (type) {
    case Type::kHalf:
      return Value(static_cast<const __half*>(values)[unit]);
    case Type::kBfloat16:
      return Value(static_cast<const __nv_bfloat16*>(values)[unit]);
    case Type::kFloat:
      return static_cast<const float*>(values)[unit];
    default:
      return static_cast<const double*>(values)[unit];
  }
}

__device__ inline void StoreUnit(double x, void* values, Type type, int64_t unit) {
  switch (type) {
    case Type::kHalf:
      return Assign(x, static_cast<__half*>(values) + unit);
    case Type::kBfloat16:
      return Assign(x, static_cast<__nv_bfloat16*>(values) + unit);
    case Type::kFloat:
      return Assign(x, static_cast<float*>(values) + unit);
    default:
      return Assign(x, static_cast<double*>(values) + unit);
  }
}

__device__ inline void Split(double x, Factor<double>* factor) { factor->fraction = x; }

// Splits x's exponent evenly between the two parts, so that y * fraction is in range whenever y and
// (y * fraction) * power are.
__device__ inline void Split(double x, Factor<float>* factor) {
  int exponent = 0;
  if (x != 0 && isfinite(x)) exponent = max(-126, min(126, ilogb(x) / 2));
  *factor = {static_cast<float>(ldexp(x, -exponent)), ldexpf(1.0f, exponent)};
}

// Returns the unit's factors, and stores its norm or its grad_g if `store`.
template <class R, bool kBackward>
__device__ Factors<R> Finish(const Work& work, double sum, int64_t unit, bool store) {
  const double g = LoadUnit(work.g, work.g_type, unit);
  Factors<R> factors = {};
  if (kBackward) {
    const double norm = LoadUnit(work.norm, work.norm_type, unit);
    const double grad_g = norm == 0 ? 0 : sum / norm;
    if (store) StoreUnit(grad_g, work.grad_g, work.g_type, unit);
    if (norm != 0) {
      Split(g / norm, &factors.scale);
      Split(grad_g / norm, &factors.projection);
    }
  } else {
    const double norm = sqrt(sum);
    if (store) StoreUnit(norm, work.norm, work.norm_type, unit);
    if (norm != 0) Split(g / norm, &factors.scale);
  }
  return factors;
}

// The vectors that one thread visits. They are aligned in memory, so those at the ends of a row or
// run may contain elements that do not belong to the tile.
template <int kVec, bool kColumns>
struct Walk {
  int64_t at;          // the vector's first element
  int count;           // vectors
  int hops, hop;       // segments: vectors per run, and elements from one to the next
  int64_t step;        // elements from row to row, or from run to run
  int column;          // columns: the vector's first column in the tile
  int low, high;       // columns: the vector's elements in the tile, the same in each row
  int hops_left;       // segments, like all fields below
  int64_t begin, end;  // the run's elements
  int lane, alignment;

  __device__ void EnterRun() {
    at = begin - ((begin + alignment) & (kVec - 1)) + int64_t{lane} * kVec;
    hops_left = hops;
  }

  __device__ void Next() {
    if (kColumns) {
      at += step;
      return;
    }
    at += hop;
    if (--hops_left == 0) {
      begin += step;
      end += step;
      EnterRun();
    }
  }

  __device__ bool Whole() const {
    return kColumns ? low == 0 && high == kVec : at >= begin && at + kVec <= end;
  }
  __device__ bool Has(int i) const {
    return kColumns ? i >= low && i < high : at + i >= begin && at + i < end;
  }
};

// Returns this thread's part of the elements of the tile's block number `split`.
template <int kVec, bool kColumns>
__device__ Walk<kVec, kColumns> MakeWalk(const Work& work, int64_t split, int64_t first_unit,
                                         int count) {
  const Plan& plan = work.plan;
  const int64_t inner = work.layout.inner, pitch = work.layout.units * inner;
  const int lane = threadIdx.x & ((1 << plan.lanes_log2) - 1);
  const int group = (threadIdx.x >> plan.lanes_log2) & ((1 << plan.groups_log2) - 1);
  const int64_t outer_split = plan.inner_splits == 1 ? split : split / plan.inner_splits;
  const int64_t outer_begin = outer_split * plan.outer_step + group;
  const int64_t outer_end = min(work.layout.outer, (outer_split + 1) * plan.outer_step);
  const int64_t rows = Steps(outer_end - outer_begin, plan.groups_log2);
  Walk<kVec, kColumns> walk = {};
  walk.step = pitch << plan.groups_log2;
  if (kColumns) {
    const int64_t row = outer_begin * pitch + first_unit * inner;
    const int shift = static_cast<int>((row + work.alignment) & (kVec - 1));
    const int columns = count * static_cast<int>(inner);
    walk.column = lane * kVec - shift;
    walk.at = row + walk.column;
    walk.low = max(0, -walk.column);
    walk.high = max(walk.low, min(kVec, columns - walk.column));
    walk.count = walk.high > walk.low ? static_cast<int>(rows) : 0;
    return walk;
  }
  const int team = threadIdx.x >> (plan.lanes_log2 + plan.groups_log2);
  const int64_t inner_begin = (split - outer_split * plan.inner_splits) * plan.inner_step;
  const int64_t size = team < count ? min(inner - inner_begin, plan.inner_step) : 0;
  const int64_t vectors = (size + (work.ragged ? kVec - 1 : 0) + kVec - 1) / kVec;
  walk.hops = size <= 0 ? 0 : static_cast<int>(Steps(vectors, plan.lanes_log2));
  walk.hop = kVec << plan.lanes_log2;
  walk.count = walk.hops * static_cast<int>(rows);
  walk.begin = outer_begin * pitch + (first_unit + team) * inner + inner_begin;
  walk.end = walk.begin + size;
  walk.lane = lane;
  walk.alignment = work.alignment;
  walk.EnterRun();
  return walk;
}

}  // namespace
}  // namespace cuda
}  // namespace tfwn

#endif  // TFWN_CSRC_WEIGHT_NORM_CUDA_ELEMENTS_H_
