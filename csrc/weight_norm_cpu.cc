// Weight normalization on the CPU: eq. 2 and 3 for every layout of weight_norm.h.
//
// RunForward and RunBackward, near the end, run alike, in three stages:
//   1. sum: each task sums v^2 (or grad_w * v), in double, over elements next to each other;
//   2. combine: the sums of the tasks, added in fixed order, give a norm (or grad_g) per unit, and
//      the unit's factors;
//   3. scale: each task multiplies its elements by the factors of their units.
// Tasks are cut by shape only, so that a result does not depend on the number of threads.
// The loops over elements are in weight_norm_cpu_kernels.h.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
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

// Elements are fetched into cache this many before they are needed, so that memory has answered.
constexpr int64_t kAhead = 512;

// Part of a matrix: rows of `width` elements, `stride` apart.
struct Block {
  int64_t rows, width, stride;
  int64_t ahead = kAhead;  // How far from an element that is scaled the one to fetch then is.
};

// The numbers that multiply a column or a segment: power * rest, where power is a power of two.
// Applying power first keeps a product in range whenever the result is, where a single factor such
// as 1 / norm can be too large for a float.
struct Factors {
  void* power;
  void* rest;
};

template <class C>
Factors From(const Factors& factors, int64_t i) {
  return {static_cast<C*>(factors.power) + i, static_cast<C*>(factors.rest) + i};
}

template <class V, class W>
using ComputeType =
    std::conditional_t<std::is_same_v<V, double> || std::is_same_v<W, double>, double, float>;

// What weight_norm_cpu_kernels.h has for each pair of types of v and w, and each way to read a
// block.
struct Kernels {
  void (*sum_forward)(const void* v, const Block& block, double* sums);
  void (*sum_backward)(const void* grad_w, const void* v, const Block& block, double* sums);
  void (*scale_forward)(const void* v, const Block& block, const Factors& scale, void* w);
  void (*scale_backward)(const void* grad_w, const void* v, const Block& block,
                         const Factors& scale, const Factors& projection, void* grad_v);
};

// And for the arithmetic on one number per unit, all of it in double. Tables are by Type.
constexpr int kUnitLanes = 8;

struct UnitKernels {
  void (*add_rows)(const double* sums, const Block& block, double* total);
  void (*forward)(int64_t count, const double* squares, const double* g, double* norms,
                  double* scales);
  void (*backward)(int64_t count, const double* dots, const double* norms, const double* g,
                   double* grad_g, double* scales, double* projections);
  void (*split_to_float)(int64_t count, const double* factors, float* power, float* rest);
  void (*split_to_double)(int64_t count, const double* factors, double* power, double* rest);
  void (*to_double[4])(const void* from, int64_t count, double* to);
  void (*from_double[4])(const double* from, int64_t count, void* to);
};

namespace baseline {
#define TFWN_VECTOR_BYTES 16
#include "weight_norm_cpu_kernels.h"
#undef TFWN_VECTOR_BYTES
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prfchw")
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
#pragma clang attribute push(                                                           \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prfchw"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prfchw,prefer-vector-width=512")
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

Kernels KernelsFor(Type v, Type w, bool columns) {
#if defined(__x86_64__)
  if (UsedLevel() == Level::kAvx512) return avx512::KernelsFor(v, w, columns);
  if (UsedLevel() == Level::kAvx2) return avx2::KernelsFor(v, w, columns);
#endif
  return baseline::KernelsFor(v, w, columns);
}

const UnitKernels& Units() {
#if defined(__x86_64__)
  if (UsedLevel() == Level::kAvx512) return avx512::kUnitKernels;
  if (UsedLevel() == Level::kAvx2) return avx2::kUnitKernels;
#endif
  return baseline::kUnitKernels;
}

// Makes subnormals count while in scope. Frameworks flush them in some threads and not in others,
// and a result must not depend on the thread.
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

const void* At(const void* base, Type type, int64_t i) {
  return static_cast<const char*>(base) + i * SizeOf(type);
}
void* At(void* base, Type type, int64_t i) { return static_cast<char*>(base) + i * SizeOf(type); }

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t multiple) { return CeilDiv(a, multiple) * multiple; }

// How a tensor is cut into tasks, from its shape alone.
//
// As columns: the tensor is a matrix whose rows are [units, inner], with a sum per column; a task
// is a block of it. Narrow rows are folded, several into one, so that vectors are full and many
// sums are in flight; the last row is then partial.
//
// As segments: stretches of `inner` elements of one unit. Where a unit fits in cache, a task is a
// run of whole units, and is summed and scaled in one go. Else it is a piece of a segment.
struct Plan {
  int64_t units, size;
  int64_t inner;  // elements of a unit next to each other
  bool columns, fused;
  int64_t tasks;

  int64_t row;                        // columns: elements of a row
  int64_t chunks, rows_per_chunk;     // columns: tasks down
  int64_t blocks, columns_per_block;  // columns: and across
  int64_t outer, units_per_task;      // fused segments
  int64_t pieces, piece;              // other segments: how many, and elements in one

  // Unit n has `groups` x `folds` x `sums_per_unit` partial sums:
  // [group * group_size + (fold * units + n) * sums_per_unit + i].
  int64_t groups, group_size, folds, sums_per_unit;

  explicit Plan(const Layout& layout)
      : units(layout.units), size(layout.size()), inner(layout.inner), outer(layout.outer) {
    if (units == 1 || size == 0) {  // Any split of a single unit will do.
      outer = size;
      inner = 1;
    }
    columns = inner == 1 || (outer >= 32 && inner <= 512) || (outer >= 8 && inner < 16);
    fused = false;
    if (size == 0) {
      tasks = groups = group_size = folds = sums_per_unit = 0;
    } else if (columns) {
      PlanColumns();
    } else {
      PlanSegments();
    }
  }

  void PlanColumns() {
    row = units * inner;
    folds = CeilDiv(256, row);
    row *= folds;
    const int64_t rows = CeilDiv(size, row);
    blocks = CeilDiv(row, 4096);
    columns_per_block = RoundUp(CeilDiv(row, blocks), 16);
    blocks = CeilDiv(row, columns_per_block);
    // At least 64 rows, so that partial sums are few next to elements; at least 64 KiB of floats.
    const int64_t least = std::max<int64_t>(64, 16384 / columns_per_block);
    chunks = std::min<int64_t>(std::max<int64_t>(rows / least, 1), 64);
    if (chunks > 4) chunks -= chunks % 4;  // evenly shared by 2 or 4 threads
    rows_per_chunk = CeilDiv(rows, chunks);
    chunks = CeilDiv(rows, rows_per_chunk);
    tasks = chunks * blocks;
    groups = chunks;
    group_size = row;
    sums_per_unit = inner;
  }

  void PlanSegments() {
    groups = outer;
    folds = 1;
    const int64_t unit_size = outer * inner;
    fused = unit_size <= 65536;
    if (fused) {
      units_per_task = std::max<int64_t>(4096 / unit_size, 1);
      tasks = CeilDiv(units, units_per_task);
      sums_per_unit = 1;
    } else {
      pieces = CeilDiv(inner, 32768);
      piece = RoundUp(CeilDiv(inner, pieces), 16);
      pieces = CeilDiv(inner, piece);
      tasks = outer * units * pieces;
      sums_per_unit = pieces;
    }
    group_size = units * sums_per_unit;
  }

  int64_t sums() const { return groups * group_size; }
  int64_t factors() const { return columns ? units * inner * folds : units; }

  // Calls body(first element, block, its first sum, its first factor) for the blocks of a task.
  template <class Body>
  void ForBlocks(int64_t task, const Body& body) const {
    if (columns) {
      const int64_t chunk = task / blocks;
      const int64_t column = task % blocks * columns_per_block;
      const int64_t width = std::min(columns_per_block, row - column);
      const int64_t begin = chunk * rows_per_chunk;
      const int64_t end = std::min(begin + rows_per_chunk, size / row);
      const int64_t sum = chunk * group_size + column;
      if (begin < end) body(begin * row + column, Block{end - begin, width, row}, sum, column);
      const int64_t partial = size % row;
      if (chunk == chunks - 1 && column < partial) {
        body(size - partial + column, Block{1, std::min(width, partial - column), row}, sum,
             column);
      }
    } else if (fused) {
      const int64_t unit = task * units_per_task;
      const int64_t count = std::min(units_per_task, units - unit);
      // When this block is scaled it is in cache, having been summed; the next one is fetched.
      const int64_t next = count * inner;
      for (int64_t i = unit; i < outer * units; i += units) {
        body(i * inner, Block{count, inner, inner, next}, i, unit);
      }
    } else {
      const int64_t segment = task / pieces;
      const int64_t begin = task % pieces * piece;
      const int64_t width = std::min(piece, inner - begin);
      body(segment * inner + begin, Block{1, width, width}, task, segment % units);
    }
  }

  // Columns are summed block after block: their sums start from zero.
  void ClearSums(int64_t task, double* partial) const {
    if (!columns) return;
    const int64_t column = task % blocks * columns_per_block;
    double* sums = partial + task / blocks * group_size + column;
    std::fill(sums, sums + std::min(columns_per_block, row - column), 0.0);
  }
};

constexpr int64_t kMostUnits = 256;  // combined in one go

// Adds up the partial sums of units [begin, end), at most kMostUnits of them.
void Combine(const Plan& plan, const double* partial, int64_t begin, int64_t end, double* totals) {
  std::fill(totals, totals + (end - begin), 0.0);
  const int64_t per_unit = plan.sums_per_unit;
  for (int64_t fold = 0; fold < plan.folds; ++fold) {
    const double* from = partial + (fold * plan.units + begin) * per_unit;
    if (per_unit == 1) {
      Units().add_rows(from, Block{plan.groups, end - begin, plan.group_size}, totals);
      continue;
    }
    for (int64_t group = 0; group < plan.groups; ++group, from += plan.group_size) {
      for (int64_t n = 0; n < end - begin; ++n) {
        totals[n] = std::accumulate(from + n * per_unit, from + (n + 1) * per_unit, totals[n]);
      }
    }
  }
}

// One number per unit, for the units that are combined in one go.
struct UnitArray {
  alignas(64) double values[kMostUnits];
  // The functions of UnitKernels take whole vectors.
  explicit UnitArray(int64_t count) {
    for (int64_t i = count; i % kUnitLanes != 0; ++i) values[i] = 0;
  }
};

void ToDouble(Type type, const void* from, int64_t begin, int64_t count, UnitArray* to) {
  Units().to_double[static_cast<int>(type)](At(from, type, begin), count, to->values);
}

void FromDouble(Type type, const UnitArray& from, int64_t begin, int64_t count, void* to) {
  Units().from_double[static_cast<int>(type)](from.values, count, At(to, type, begin));
}

// Sets the factors of units [begin, begin + count), of each column that is theirs.
template <class C>
void StoreFactors(const Plan& plan, const UnitArray& factors, int64_t begin, int64_t count,
                  const Factors& to) {
  alignas(64) C powers[kMostUnits], rests[kMostUnits];
  if constexpr (std::is_same_v<C, double>) {
    Units().split_to_double(count, factors.values, powers, rests);
  } else {
    Units().split_to_float(count, factors.values, powers, rests);
  }
  const int64_t inner = plan.columns ? plan.inner : 1;
  for (int64_t fold = 0; fold < plan.folds; ++fold) {
    const int64_t first = (fold * plan.units + begin) * inner;
    C* power = static_cast<C*>(to.power) + first;
    C* rest = static_cast<C*>(to.rest) + first;
    if (inner == 1) {
      std::copy(powers, powers + count, power);
      std::copy(rests, rests + count, rest);
      continue;
    }
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t i = 0; i < inner; ++i) {
        *power++ = powers[n];
        *rest++ = rests[n];
      }
    }
  }
}

class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* Take(int64_t count) {
    T* taken = reinterpret_cast<T*>(base_ + used_);
    used_ += RoundUp(count * sizeof(T), 64);
    return taken;
  }
  Factors TakeFactors(const Plan& plan) {
    double* power = Take<double>(plan.factors());
    return {power, Take<double>(plan.factors())};
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Runs the three stages: sum(task), combine(first unit, end), scale(task).
template <class Sum, class CombineUnits, class Scale>
void RunStages(const Plan& plan, const ParallelFor& parallel_for, int64_t sum_bytes,
               int64_t scale_bytes, const Sum& sum, const CombineUnits& combine,
               const Scale& scale) {
  const auto combine_range = [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += kMostUnits) combine(begin, std::min(begin + kMostUnits, end));
  };
  const int64_t elements_per_task = plan.size / std::max<int64_t>(plan.tasks, 1);
  if (plan.fused) {
    parallel_for(plan.tasks, elements_per_task * (sum_bytes + scale_bytes),
                 [&](int64_t begin, int64_t end) {
                   KeepSubnormals keep_subnormals;
                   for (int64_t task = begin; task < end; ++task) {
                     sum(task);
                     combine_range(task * plan.units_per_task,
                                   std::min((task + 1) * plan.units_per_task, plan.units));
                     scale(task);
                   }
                 });
    return;
  }
  if (plan.tasks > 0) {
    parallel_for(plan.tasks, elements_per_task * sum_bytes, [&](int64_t begin, int64_t end) {
      KeepSubnormals keep_subnormals;
      for (int64_t task = begin; task < end; ++task) sum(task);
    });
  }
  if (plan.units > 0) {
    const int64_t bytes = kMostUnits * 8 * (plan.groups * plan.folds * plan.sums_per_unit + 8);
    parallel_for(CeilDiv(plan.units, kMostUnits), bytes, [&](int64_t begin, int64_t end) {
      KeepSubnormals keep_subnormals;
      combine_range(begin * kMostUnits, std::min(end * kMostUnits, plan.units));
    });
  }
  if (plan.tasks > 0) {
    parallel_for(plan.tasks, elements_per_task * scale_bytes, [&](int64_t begin, int64_t end) {
      KeepSubnormals keep_subnormals;
      // Backwards, because what was summed last is still in cache.
      for (int64_t task = end - 1; task >= begin; --task) scale(task);
    });
  }
}

template <class C>
void RunForward(const Forward& a, void* scratch_base, const ParallelFor& parallel_for) {
  const Plan plan(a.layout);
  const Kernels kernels = KernelsFor(a.v_type, a.w_type, plan.columns);
  Scratch scratch(scratch_base);
  double* partial = scratch.Take<double>(plan.sums());
  const Factors scales = scratch.TakeFactors(plan);

  const auto sum = [&](int64_t task) {
    plan.ClearSums(task, partial);
    plan.ForBlocks(task, [&](int64_t first, const Block& block, int64_t sum, int64_t) {
      kernels.sum_forward(At(a.v, a.v_type, first), block, partial + sum);
    });
  };

  const auto combine = [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    UnitArray squares(count), g(count), norms(count), scale(count);
    Combine(plan, partial, begin, end, squares.values);
    ToDouble(a.g_type, a.g, begin, count, &g);
    Units().forward(count, squares.values, g.values, norms.values, scale.values);
    FromDouble(NormType(a.v_type), norms, begin, count, a.norm);
    StoreFactors<C>(plan, scale, begin, count, scales);
  };

  const auto scale = [&](int64_t task) {
    plan.ForBlocks(task, [&](int64_t first, const Block& block, int64_t, int64_t factor) {
      kernels.scale_forward(At(a.v, a.v_type, first), block, From<C>(scales, factor),
                            At(a.w, a.w_type, first));
    });
  };

  RunStages(plan, parallel_for, SizeOf(a.v_type), SizeOf(a.v_type) + SizeOf(a.w_type), sum, combine,
            scale);
}

template <class C>
void RunBackward(const Backward& a, void* scratch_base, const ParallelFor& parallel_for) {
  const Plan plan(a.layout);
  const Kernels kernels = KernelsFor(a.v_type, a.w_type, plan.columns);
  Scratch scratch(scratch_base);
  double* partial = scratch.Take<double>(plan.sums());
  const Factors scales = scratch.TakeFactors(plan);
  const Factors projections = scratch.TakeFactors(plan);

  const auto sum = [&](int64_t task) {
    plan.ClearSums(task, partial);
    plan.ForBlocks(task, [&](int64_t first, const Block& block, int64_t sum, int64_t) {
      kernels.sum_backward(At(a.grad_w, a.w_type, first), At(a.v, a.v_type, first), block,
                           partial + sum);
    });
  };

  const auto combine = [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    UnitArray dots(count), norms(count), g(count), grad_g(count), scale(count), projection(count);
    Combine(plan, partial, begin, end, dots.values);
    ToDouble(NormType(a.v_type), a.norm, begin, count, &norms);
    ToDouble(a.g_type, a.g, begin, count, &g);
    Units().backward(count, dots.values, norms.values, g.values, grad_g.values, scale.values,
                     projection.values);
    FromDouble(a.g_type, grad_g, begin, count, a.grad_g);
    StoreFactors<C>(plan, scale, begin, count, scales);
    StoreFactors<C>(plan, projection, begin, count, projections);
  };

  const auto scale = [&](int64_t task) {
    plan.ForBlocks(task, [&](int64_t first, const Block& block, int64_t, int64_t factor) {
      kernels.scale_backward(At(a.grad_w, a.w_type, first), At(a.v, a.v_type, first), block,
                             From<C>(scales, factor), From<C>(projections, factor),
                             At(a.grad_v, a.v_type, first));
    });
  };

  RunStages(plan, parallel_for, SizeOf(a.v_type) + SizeOf(a.w_type),
            2 * SizeOf(a.v_type) + SizeOf(a.w_type), sum, combine, scale);
}

bool ComputesInDouble(Type v, Type w) { return v == Type::kDouble || w == Type::kDouble; }

}  // namespace

size_t ScratchBytes(const Forward& a) {
  const Plan plan(a.layout);
  Scratch scratch(nullptr);
  scratch.Take<double>(plan.sums());
  scratch.TakeFactors(plan);
  return scratch.used();
}

size_t ScratchBytes(const Backward& a) {
  const Plan plan(a.layout);
  Scratch scratch(nullptr);
  scratch.Take<double>(plan.sums());
  scratch.TakeFactors(plan);
  scratch.TakeFactors(plan);
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
    case Level::kAvx512:
      return "avx512";
    case Level::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace tfwn::cpu
