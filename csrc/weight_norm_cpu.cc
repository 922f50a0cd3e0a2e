// Weight normalization on the CPU: eq. 2 and 3 for every layout of weight_norm.h.
//
// Forward and backward run alike, in three stages, each parallel and each a pass over memory:
//   1. sum     every task sums v^2 (or grad_w * v), in double, over its own contiguous elements;
//   2. combine the tasks' partial sums, in fixed order, give one norm (or grad_g) per unit, and from
//              it the unit's factors;
//   3. scale   every task multiplies its own elements by the factors.
// Tasks are cut by shape only, so that a result does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "weight_norm.h"

#define TFWN_INLINE inline __attribute__((always_inline))

namespace tfwn::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// Entries after the period of sums and factors, see weight_norm_cpu_kernels.h.
constexpr int kPadding = 16;

// The numbers that multiply each position: power * rest, where power is a power of two. Applying
// power first keeps the product in range whenever the result is: 1e-30 * (1 / 1e-30 norm) and the
// like would leave the range of float as a single factor.
struct Factors {
  void* power;
  void* rest;
};

template <class V, class W>
using ComputeType =
    std::conditional_t<std::is_same_v<V, double> || std::is_same_v<W, double>, double, float>;

struct Kernels {
  void (*square_sums)(const void* v, int64_t size, int64_t position, int64_t period, double* sums);
  void (*product_sums)(const void* grad_w, const void* v, int64_t size, int64_t position,
                       int64_t period, double* sums);
  void (*scale_forward)(const void* v, int64_t size, int64_t position, int64_t period,
                        const Factors& scale, void* w);
  void (*scale_backward)(const void* grad_w, const void* v, int64_t size, int64_t position,
                         int64_t period, const Factors& scale, const Factors& projection,
                         void* grad_v);
};

namespace baseline {
#define TFWN_VECTOR_BYTES 16
#include "weight_norm_cpu_kernels.h"
#undef TFWN_VECTOR_BYTES
}  // namespace baseline

#if defined(__x86_64__)
#define TFWN_F16C

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define TFWN_VECTOR_BYTES 32
#include "weight_norm_cpu_kernels.h"
#undef TFWN_VECTOR_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
#define TFWN_VECTOR_BYTES 64
#include "weight_norm_cpu_kernels.h"
#undef TFWN_VECTOR_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#undef TFWN_F16C
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

Kernels KernelsFor(Type v, Type w) {
#if defined(__x86_64__)
  if (UsedLevel() == Level::kAvx512) return avx512::KernelsFor(v, w);
  if (UsedLevel() == Level::kAvx2) return avx2::KernelsFor(v, w);
#endif
  return baseline::KernelsFor(v, w);
}

// Makes subnormals count while in scope. Frameworks flush them in some threads and not in others, and
// a result must not depend on the thread.
class KeepSubnormals {
 public:
  KeepSubnormals() : saved_(Get()) { Set(saved_ & ~kFlush); }
  ~KeepSubnormals() { Set(saved_); }

 private:
#if defined(__x86_64__)
  static constexpr unsigned kFlush = 0x8040;  // FTZ and DAZ
  static unsigned Get() { return _mm_getcsr(); }
  static void Set(unsigned state) { _mm_setcsr(state); }
  unsigned saved_;
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FZ
  static uint64_t Get() {
    uint64_t state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void Set(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state)); }
  uint64_t saved_;
#else
  static constexpr unsigned kFlush = 0;
  static unsigned Get() { return 0; }
  static void Set(unsigned) {}
  unsigned saved_;
#endif
};

double LoadNumber(Type type, const void* from, int64_t i) {
  switch (type) {
    case Type::kHalf:
      return baseline::FloatFromHalfBits<float>(uint32_t{static_cast<const uint16_t*>(from)[i]});
    case Type::kBfloat16:
      return baseline::FloatFromBfloat16Bits<float>(uint32_t{static_cast<const uint16_t*>(from)[i]});
    case Type::kFloat: return static_cast<const float*>(from)[i];
    default: return static_cast<const double*>(from)[i];
  }
}

void StoreNumber(double value, Type type, void* to, int64_t i) {
  const float single = static_cast<float>(value);
  switch (type) {
    case Type::kHalf:
      static_cast<uint16_t*>(to)[i] = uint16_t(baseline::HalfBitsFromFloat<uint32_t>(single));
      break;
    case Type::kBfloat16:
      static_cast<uint16_t*>(to)[i] = uint16_t(baseline::Bfloat16BitsFromFloat<uint32_t>(single));
      break;
    case Type::kFloat: static_cast<float*>(to)[i] = single; break;
    default: static_cast<double*>(to)[i] = value;
  }
}

const void* At(const void* base, Type type, int64_t i) {
  return static_cast<const char*>(base) + i * SizeOf(type);
}
void* At(void* base, Type type, int64_t i) { return static_cast<char*>(base) + i * SizeOf(type); }

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t multiple) { return CeilDiv(a, multiple) * multiple; }

constexpr int64_t kTaskElements = 16384;
constexpr int64_t kMostChunks = 64;
// Enough for a vector to be done with its sums before the next row needs them.
constexpr int64_t kShortestPeriod = 512;
constexpr int64_t kSegmentPeriod = 64;

// How the tensor is cut into tasks and its partial sums into units.
struct Plan {
  int64_t units;
  int64_t size;

  // Either the tensor is chunks of whole periods, each with a sum per position, and the unit of
  // position p is p / inner % units; or it is segments of `inner` elements of one unit, each cut into
  // pieces, each with one sum.
  bool segmented;
  int64_t inner;
  int64_t period;
  int64_t chunk;           // elements
  int64_t pieces, piece;   // per segment, elements in one
  int64_t pieces_per_task;
  int64_t tasks;

  // partial sums of unit n: groups x pieces of them, at n * pieces + group * group_stride + piece.
  int64_t groups, group_stride;
  int64_t sums() const { return groups * group_stride; }
  int64_t factors() const { return segmented ? units : period + kPadding; }

  explicit Plan(const Layout& layout) : units(layout.units), size(layout.size()) {
    int64_t outer = layout.outer;
    inner = layout.inner;
    if (units == 1 || size == 0) {  // Any split of a single unit will do.
      outer = size;
      inner = 1;
    }
    segmented = inner >= 32 || (inner > 1 && outer < 4);
    if (!segmented) {
      period = std::max<int64_t>(units * inner, 1);
      if (period < kShortestPeriod) period *= CeilDiv(kShortestPeriod, period);
      const int64_t rows = CeilDiv(size, period);
      const int64_t rows_per_chunk = std::max<int64_t>(
          {CeilDiv(rows, kMostChunks), CeilDiv(kTaskElements, period), std::min<int64_t>(rows, 16)});
      chunk = rows_per_chunk * period;
      tasks = CeilDiv(size, std::max<int64_t>(chunk, 1));
      pieces = 1;
      groups = tasks;
      group_stride = RoundUp(period + kPadding, 8);
    } else {
      pieces = std::max<int64_t>(inner / (4 * kTaskElements), 1);
      piece = RoundUp(CeilDiv(inner, pieces), 64);
      pieces = std::max<int64_t>(CeilDiv(inner, std::max<int64_t>(piece, 1)), 1);
      pieces_per_task = std::max<int64_t>(kTaskElements / std::max<int64_t>(piece, 1), 1);
      tasks = size == 0 ? 0 : CeilDiv(outer * units * pieces, pieces_per_task);
      groups = size == 0 ? 0 : outer;
      group_stride = units * pieces;
      period = kSegmentPeriod;
    }
  }

  // Calls body(begin, end, index of the piece) for the pieces of a task.
  template <class Body>
  void ForPieces(int64_t task, const Body& body) const {
    const int64_t end = std::min((task + 1) * pieces_per_task, groups * units * pieces);
    for (int64_t i = task * pieces_per_task; i < end; ++i) {
      const int64_t begin = i / pieces * inner + i % pieces * piece;
      body(begin, std::min(begin + piece, (i / pieces + 1) * inner), i);
    }
  }
};

// Stage 1. sum(begin, size, period, sums) adds the elements' terms.
template <class Sum>
void SumTask(const Plan& plan, int64_t task, double* partial, const Sum& sum) {
  if (plan.segmented) {
    plan.ForPieces(task, [&](int64_t begin, int64_t end, int64_t i) {
      double sums[kSegmentPeriod + kPadding] = {};
      sum(begin, end - begin, plan.period, sums);
      double total = 0;
      for (double s : sums) total += s;
      partial[i] = total;
    });
    return;
  }
  double* sums = partial + task * plan.group_stride;
  std::fill(sums, sums + plan.group_stride, 0.0);
  const int64_t begin = task * plan.chunk;
  sum(begin, std::min(plan.chunk, plan.size - begin), plan.period, sums);
  for (int64_t i = 0; i < kPadding; ++i) sums[i] += sums[plan.period + i];
  const int64_t row = plan.units * plan.inner;
  for (int64_t i = row; i < plan.period; ++i) sums[i % row] += sums[i];
  for (int64_t n = 0; n < plan.units && plan.inner > 1; ++n) {
    double total = 0;
    for (int64_t b = 0; b < plan.inner; ++b) total += sums[n * plan.inner + b];
    sums[n] = total;
  }
}

double Total(const Plan& plan, const double* partial, int64_t unit) {
  double total = 0;
  for (int64_t group = 0; group < plan.groups; ++group) {
    const double* sums = partial + group * plan.group_stride + unit * plan.pieces;
    for (int64_t i = 0; i < plan.pieces; ++i) total += sums[i];
  }
  return total;
}

// Splits factor into power * rest.
template <class C>
void StoreFactor(double factor, const Factors& to, int64_t i) {
  constexpr int kMost = std::is_same_v<C, double> ? 1022 : 126;
  int exponent = int(baseline::BitCast<uint64_t>(factor) >> 52 & 0x7ff) - 1023;
  if (factor == 0 || exponent == 1024) exponent = 0;  // 1024: infinity or NaN
  exponent = std::min(std::max(exponent, -kMost), kMost);
  static_cast<C*>(to.power)[i] = C(baseline::BitCast<double>(uint64_t(1023 + exponent) << 52));
  static_cast<C*>(to.rest)[i] = C(factor * baseline::BitCast<double>(uint64_t(1023 - exponent) << 52));
}

template <class C>
void StoreFactor(const Plan& plan, double factor, const Factors& to, int64_t unit) {
  if (plan.segmented) return StoreFactor<C>(factor, to, unit);
  const int64_t row = plan.units * plan.inner;
  for (int64_t i = unit * plan.inner; i < plan.period + kPadding; i += row) {
    for (int64_t b = 0; b < plan.inner && i + b < plan.period + kPadding; ++b) {
      StoreFactor<C>(factor, to, i + b);
    }
  }
}

// A unit's factors where the kernels read them: along a short period of its own.
template <class C>
struct SegmentFactors {
  C power[2 * kPadding], rest[2 * kPadding];
  SegmentFactors(const Factors& from, int64_t unit) {
    std::fill(power, power + 2 * kPadding, static_cast<const C*>(from.power)[unit]);
    std::fill(rest, rest + 2 * kPadding, static_cast<const C*>(from.rest)[unit]);
  }
  Factors get() { return {power, rest}; }
};

class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* Take(int64_t count) {
    T* taken = reinterpret_cast<T*>(base_ + used_);
    used_ += RoundUp(count * sizeof(T), 64);
    return taken;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

Factors TakeFactors(Scratch* scratch, const Plan& plan) {
  return {scratch->Take<double>(plan.factors()), scratch->Take<double>(plan.factors())};
}

void For(const ParallelFor& parallel_for, int64_t n, int64_t bytes_per_task,
         const std::function<void(int64_t)>& body) {
  if (n == 0) return;
  parallel_for(n, bytes_per_task, [&](int64_t begin, int64_t end) {
    KeepSubnormals keep_subnormals;
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

constexpr int64_t kUnitsPerTask = 256;

// 1 / norm, with the one exception that makes a unit with v = 0 come out as zero.
double Reciprocal(double norm) { return norm == 0 ? 0 : 1 / norm; }

template <class C>
void RunForward(const Forward& a, void* scratch_base, const ParallelFor& parallel_for) {
  const Plan plan(a.layout);
  const Kernels kernels = KernelsFor(a.v_type, a.w_type);
  Scratch scratch(scratch_base);
  double* partial = scratch.Take<double>(plan.sums());
  const Factors scale = TakeFactors(&scratch, plan);
  const int64_t elements_per_task = plan.size / std::max<int64_t>(plan.tasks, 1);
  const int64_t v_bytes = SizeOf(a.v_type), w_bytes = SizeOf(a.w_type);

  For(parallel_for, plan.tasks, elements_per_task * v_bytes, [&](int64_t task) {
    SumTask(plan, task, partial, [&](int64_t begin, int64_t size, int64_t period, double* sums) {
      kernels.square_sums(At(a.v, a.v_type, begin), size, 0, period, sums);
    });
  });

  For(parallel_for, CeilDiv(plan.units, kUnitsPerTask), kUnitsPerTask * 8 * plan.groups,
      [&](int64_t task) {
        const int64_t end = std::min((task + 1) * kUnitsPerTask, plan.units);
        for (int64_t n = task * kUnitsPerTask; n < end; ++n) {
          const double norm = std::sqrt(Total(plan, partial, n));
          StoreNumber(norm, NormType(a.v_type), a.norm, n);
          StoreFactor<C>(plan, LoadNumber(a.g_type, a.g, n) * Reciprocal(norm), scale, n);
        }
      });

  For(parallel_for, plan.tasks, elements_per_task * (v_bytes + w_bytes), [&](int64_t reversed) {
    const int64_t task = plan.tasks - 1 - reversed;
    if (!plan.segmented) {
      const int64_t begin = task * plan.chunk;
      kernels.scale_forward(At(a.v, a.v_type, begin), std::min(plan.chunk, plan.size - begin), 0,
                            plan.period, scale, At(a.w, a.w_type, begin));
      return;
    }
    plan.ForPieces(task, [&](int64_t begin, int64_t end, int64_t i) {
      SegmentFactors<C> unit_scale(scale, i / plan.pieces % plan.units);
      kernels.scale_forward(At(a.v, a.v_type, begin), end - begin, 0, kPadding, unit_scale.get(),
                            At(a.w, a.w_type, begin));
    });
  });
}

template <class C>
void RunBackward(const Backward& a, void* scratch_base, const ParallelFor& parallel_for) {
  const Plan plan(a.layout);
  const Kernels kernels = KernelsFor(a.v_type, a.w_type);
  Scratch scratch(scratch_base);
  double* partial = scratch.Take<double>(plan.sums());
  const Factors scale = TakeFactors(&scratch, plan);
  const Factors projection = TakeFactors(&scratch, plan);
  const int64_t elements_per_task = plan.size / std::max<int64_t>(plan.tasks, 1);
  const int64_t v_bytes = SizeOf(a.v_type), w_bytes = SizeOf(a.w_type);

  For(parallel_for, plan.tasks, elements_per_task * (v_bytes + w_bytes), [&](int64_t task) {
    SumTask(plan, task, partial, [&](int64_t begin, int64_t size, int64_t period, double* sums) {
      kernels.product_sums(At(a.grad_w, a.w_type, begin), At(a.v, a.v_type, begin), size, 0, period,
                           sums);
    });
  });

  For(parallel_for, CeilDiv(plan.units, kUnitsPerTask), kUnitsPerTask * 8 * plan.groups,
      [&](int64_t task) {
        const int64_t end = std::min((task + 1) * kUnitsPerTask, plan.units);
        for (int64_t n = task * kUnitsPerTask; n < end; ++n) {
          const double reciprocal = Reciprocal(LoadNumber(NormType(a.v_type), a.norm, n));
          const double grad_g = Total(plan, partial, n) * reciprocal;
          StoreNumber(grad_g, a.g_type, a.grad_g, n);
          StoreFactor<C>(plan, LoadNumber(a.g_type, a.g, n) * reciprocal, scale, n);
          StoreFactor<C>(plan, grad_g * reciprocal, projection, n);
        }
      });

  For(parallel_for, plan.tasks, elements_per_task * (2 * v_bytes + w_bytes), [&](int64_t reversed) {
    const int64_t task = plan.tasks - 1 - reversed;
    if (!plan.segmented) {
      const int64_t begin = task * plan.chunk;
      kernels.scale_backward(At(a.grad_w, a.w_type, begin), At(a.v, a.v_type, begin),
                             std::min(plan.chunk, plan.size - begin), 0, plan.period, scale,
                             projection, At(a.grad_v, a.v_type, begin));
      return;
    }
    plan.ForPieces(task, [&](int64_t begin, int64_t end, int64_t i) {
      const int64_t unit = i / plan.pieces % plan.units;
      SegmentFactors<C> unit_scale(scale, unit), unit_projection(projection, unit);
      kernels.scale_backward(At(a.grad_w, a.w_type, begin), At(a.v, a.v_type, begin), end - begin,
                             0, kPadding, unit_scale.get(), unit_projection.get(),
                             At(a.grad_v, a.v_type, begin));
    });
  });
}

bool ComputesInDouble(Type v, Type w) { return v == Type::kDouble || w == Type::kDouble; }

}  // namespace

size_t ScratchBytes(const Forward& a) {
  const Plan plan(a.layout);
  Scratch scratch(nullptr);
  scratch.Take<double>(plan.sums());
  TakeFactors(&scratch, plan);
  return scratch.used();
}

size_t ScratchBytes(const Backward& a) {
  const Plan plan(a.layout);
  Scratch scratch(nullptr);
  scratch.Take<double>(plan.sums());
  TakeFactors(&scratch, plan);
  TakeFactors(&scratch, plan);
  return scratch.used();
}

void Run(const Forward& a, void* scratch, const ParallelFor& parallel_for) {
  (ComputesInDouble(a.v_type, a.w_type) ? RunForward<double> : RunForward<float>)(a, scratch,
                                                                                  parallel_for);
}

void Run(const Backward& a, void* scratch, const ParallelFor& parallel_for) {
  (ComputesInDouble(a.v_type, a.w_type) ? RunBackward<double> : RunBackward<float>)(a, scratch,
                                                                                    parallel_for);
}

const char* SimdLevel() {
  switch (UsedLevel()) {
    case Level::kAvx512: return "avx512";
    case Level::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace tfwn::cpu
