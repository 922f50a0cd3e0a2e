// Weight normalization on the CPU: eq. 2 and 3 for every layout of weight_norm.h.
//
// Three stages, forward and backward alike:
//   1. sum: each task sums v^2 (or grad_w * v) over neighboring elements;
//   2. combine: each unit's partial sums are added in a fixed order, and its norm (or grad_g) and
//      factors are computed from the total;
//   3. scale: each task multiplies its elements by the factors of their units.
// weight_norm_cpu_plan.h defines the tasks, weight_norm_cpu_kernels.h the loops over elements.

#include <algorithm>
#include <atomic>
#include <numeric>

#include "weight_norm.h"
#include "weight_norm_cpu_levels.h"
#include "weight_norm_cpu_plan.h"

namespace tfwn::cpu {
namespace {

// Disables flushing of subnormals to zero while in scope. Frameworks enable it in some threads and
// not in others, but a result must not depend on the thread.
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

constexpr int64_t kMostUnits = 256;  // how many are combined at once

// Adds up the partial sums of units [begin, end), at most kMostUnits of them.
void AddPartialSums(const Plan& plan, const double* partial, int64_t begin, int64_t end,
                    double* totals) {
  std::fill(totals, totals + (end - begin), 0.0);
  const int64_t per_unit = plan.sums_per_unit;
  for (int64_t fold = 0; fold < plan.folds; ++fold) {
    const double* from = partial + (fold * plan.units + begin) * per_unit;
    if (per_unit == 1) {
      Units().add_rows(from, plan.groups, end - begin, plan.group_size, totals);
      continue;
    }
    for (int64_t group = 0; group < plan.groups; ++group, from += plan.group_size) {
      for (int64_t n = 0; n < end - begin; ++n) {
        totals[n] = std::accumulate(from + n * per_unit, from + (n + 1) * per_unit, totals[n]);
      }
    }
  }
}

class Scratch {
 public:
  explicit Scratch(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* Take(int64_t count) {
    T* taken = reinterpret_cast<T*>(base_ + used_);
    used_ += RoundUp(count * sizeof(T), 64);
    return taken;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;  // 0 if only the size is wanted
  size_t used_ = 0;
};

// One forward or backward pass.
struct Pass {
  Layout layout;
  bool backward;
  Type v_type, g_type, w_type, result_type;
  const void* grad_w;  // backward only
  const void* v;
  const void* g;
  void* result;  // w, or grad_v
  void* norm;    // written forward, read backward
  void* grad_g;  // backward only

  explicit Pass(const Forward& a)
      : layout(a.layout),
        backward(false),
        v_type(a.v_type),
        g_type(a.g_type),
        w_type(a.w_type),
        result_type(a.w_type),
        grad_w(nullptr),
        v(a.v),
        g(a.g),
        result(a.w),
        norm(a.norm),
        grad_g(nullptr) {}
  explicit Pass(const Backward& a)
      : layout(a.layout),
        backward(true),
        v_type(a.v_type),
        g_type(a.g_type),
        w_type(a.w_type),
        result_type(a.v_type),
        grad_w(a.grad_w),
        v(a.v),
        g(a.g),
        result(a.grad_v),
        norm(const_cast<void*>(a.norm)),
        grad_g(a.grad_g) {}

  bool in_double() const { return v_type == Type::kDouble || w_type == Type::kDouble; }
  Type type() const { return in_double() ? Type::kDouble : Type::kFloat; }
  int64_t v_bytes() const { return SizeOf(v_type); }
  int64_t grad_w_bytes() const { return backward ? SizeOf(w_type) : 0; }
  int64_t result_bytes() const { return SizeOf(result_type); }
};

class Runner {
 public:
  Runner(const Pass& pass, void* scratch)
      : pass_(pass),
        plan_(pass.layout),
        kernels_(KernelsFor(pass.v_type, pass.w_type, pass.backward, plan_.columns())),
        scratch_(scratch),
        partial_(scratch_.Take<double>(plan_.sums())),
        scales_(TakeFactors()),
        projections_(pass.backward ? TakeFactors() : Factors{}) {}

  size_t scratch_bytes() const { return scratch_.used(); }

  void Run(const ParallelFor& parallel_for) {
    const int64_t sum_bytes = pass_.v_bytes() + pass_.grad_w_bytes();
    const int64_t scale_bytes = sum_bytes + pass_.result_bytes();
    const int64_t elements_per_task = plan_.size / std::max<int64_t>(plan_.tasks, 1);
    if (plan_.kind == Tasks::kRuns) {
      parallel_for(plan_.tasks, elements_per_task * (sum_bytes + scale_bytes),
                   [&](int64_t begin, int64_t end) {
                     KeepSubnormals keep_subnormals;
                     for (int64_t task = begin; task < end; ++task) {
                       const int64_t unit = task * plan_.units_per_task;
                       Sum(task);
                       CombineRange(unit, std::min(unit + plan_.units_per_task, plan_.units));
                       Scale(task);
                     }
                     EndStream();
                   });
      return;
    }
    if (plan_.tasks > 0) {
      parallel_for(plan_.tasks, elements_per_task * sum_bytes, [&](int64_t begin, int64_t end) {
        KeepSubnormals keep_subnormals;
        for (int64_t task = begin; task < end; ++task) Sum(task);
      });
    }
    if (plan_.units > 0) {
      const int64_t bytes = kMostUnits * 8 * (plan_.groups * plan_.folds * plan_.sums_per_unit + 8);
      parallel_for(CeilDiv(plan_.units, kMostUnits), bytes, [&](int64_t begin, int64_t end) {
        KeepSubnormals keep_subnormals;
        CombineRange(begin * kMostUnits, std::min(end * kMostUnits, plan_.units));
      });
    }
    if (plan_.tasks > 0) {
      parallel_for(plan_.tasks, elements_per_task * scale_bytes, [&](int64_t begin, int64_t end) {
        KeepSubnormals keep_subnormals;
        // Backwards, because what was summed last is still in cache.
        for (int64_t task = end - 1; task >= begin; --task) Scale(task);
        EndStream();
      });
    }
  }

 private:
  Factors TakeFactors() {
    const int64_t bytes = plan_.factors() * SizeOf(pass_.type());
    char* fraction = scratch_.Take<char>(bytes);
    return {fraction, scratch_.Take<char>(bytes)};
  }

  Factors At(const Factors& factors, int64_t i) const {
    return {cpu::At(factors.fraction, pass_.type(), i), cpu::At(factors.power, pass_.type(), i)};
  }

  Block BlockOf(const Part& part) const {
    Block block = {};
    block.rows = part.rows;
    block.width = part.width;
    block.v = cpu::At(pass_.v, pass_.v_type, part.first);
    if (pass_.backward) block.grad_w = cpu::At(pass_.grad_w, pass_.w_type, part.first);
    block.stride = part.stride;
    block.result = cpu::At(pass_.result, pass_.result_type, part.first);
    block.stream = plan_.size * pass_.result_bytes() >= kBeyondCaches &&
                   part.stride * pass_.result_bytes() % kCacheLine == 0 &&
                   reinterpret_cast<uintptr_t>(block.result) % kCacheLine == 0;
    return block;
  }

  void Sum(int64_t task) {
    plan_.ClearSums(task, partial_);
    plan_.ForParts(task, [&](const Part& part) {
      Block block = BlockOf(part);
      if (plan_.columns()) block.fetch = kGroup * part.stride;
      kernels_.sum(block, partial_ + part.sum);
    });
  }

  void Scale(int64_t task) {
    plan_.ForParts(task, [&](const Part& part) {
      Block block = BlockOf(part);
      // The run to be scaled is in cache already, so prefetch the next one.
      if (plan_.kind == Tasks::kRuns) block.fetch = part.rows * part.width;
      block.fetch_result = kBytesAhead / pass_.result_bytes();
      kernels_.scale(block, At(scales_, part.factor), At(projections_, part.factor), powers_);
    });
  }

  // Orders stores that bypass the caches before those that signal completion to other threads.
  static void EndStream() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }

  void CombineRange(int64_t begin, int64_t end) {
    for (; begin < end; begin += kMostUnits) {
      CombineChunk(begin, std::min(begin + kMostUnits, end));
    }
  }

  // Combines units [begin, end), at most kMostUnits of them.
  void CombineChunk(int64_t begin, int64_t end) {
    alignas(64) double totals[kMostUnits];
    alignas(64) unsigned char copied[4][kMostUnits * sizeof(double)];
    const Type norm_type = NormType(pass_.v_type);
    UnitBlock units = {};
    units.count = end - begin;
    if (plan_.groups * plan_.folds * plan_.sums_per_unit == 1) {
      units.sums = partial_ + begin;
    } else {
      AddPartialSums(plan_, partial_, begin, end, totals);
      units.sums = totals;
    }
    units.g_type = pass_.g_type;
    units.norm_type = norm_type;
    units.g = cpu::At(pass_.g, pass_.g_type, begin);
    units.norm = cpu::At(pass_.norm, norm_type, begin);
    const bool copies = plan_.factors_per_unit() != 1;
    units.scales = copies ? Factors{copied[0], copied[1]} : At(scales_, begin);
    if (pass_.backward) {
      units.grad_g = cpu::At(pass_.grad_g, pass_.g_type, begin);
      units.projections = copies ? Factors{copied[2], copied[3]} : At(projections_, begin);
    }
    const auto& kernels = pass_.backward ? Units().backward : Units().forward;
    if (kernels[pass_.in_double()](units)) powers_ = true;
    if (copies) {
      CopyFactors(units.scales, begin, units.count, scales_);
      if (pass_.backward) CopyFactors(units.projections, begin, units.count, projections_);
    }
  }

  void CopyFactors(const Factors& from, int64_t begin, int64_t count, const Factors& to) {
    if (pass_.in_double()) {
      CopyFactors<double>(from, begin, count, to);
    } else {
      CopyFactors<float>(from, begin, count, to);
    }
  }

  // Copies the factors of units [begin, begin + count) to each of their columns.
  template <class C>
  void CopyFactors(const Factors& from, int64_t begin, int64_t count, const Factors& to) {
    for (int64_t fold = 0; fold < plan_.folds; ++fold) {
      const int64_t first = (fold * plan_.units + begin) * plan_.inner;
      C* fraction = static_cast<C*>(to.fraction) + first;
      C* power = static_cast<C*>(to.power) + first;
      for (int64_t n = 0; n < count; ++n) {
        fraction = std::fill_n(fraction, plan_.inner, static_cast<const C*>(from.fraction)[n]);
        power = std::fill_n(power, plan_.inner, static_cast<const C*>(from.power)[n]);
      }
    }
  }

  // Prefetch distance of the result.
  static constexpr int64_t kBytesAhead = 2048;
  // A result of at least this many bytes bypasses the caches, which then need not read it first.
  // The op itself would gain at 1 MB too, but the matrix product that reads w would lose more,
  // because it finds much of a smaller w in a cache.
  static constexpr int64_t kBeyondCaches = 32 << 20, kCacheLine = 64;

  const Pass pass_;
  const Plan plan_;
  const Kernels kernels_;
  Scratch scratch_;
  double* const partial_;
  const Factors scales_, projections_;
  // Whether any power so far is not 1. Other threads may set this at any time, which does not
  // change the results of tasks whose powers are all 1.
  std::atomic<bool> powers_{false};
};

}  // namespace

size_t ScratchBytes(const Forward& a) { return Runner(Pass(a), nullptr).scratch_bytes(); }
size_t ScratchBytes(const Backward& a) { return Runner(Pass(a), nullptr).scratch_bytes(); }

void Run(const Forward& a, void* scratch, const ParallelFor& parallel_for) {
  Runner(Pass(a), scratch).Run(parallel_for);
}
void Run(const Backward& a, void* scratch, const ParallelFor& parallel_for) {
  Runner(Pass(a), scratch).Run(parallel_for);
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
