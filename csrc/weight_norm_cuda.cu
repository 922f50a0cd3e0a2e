// Forward and backward of weight normalization (weight_norm.h) on CUDA.
//
// A block works on a tile of units. Its threads walk over the tile's elements, sum v * v (forward)
// or grad_w * v (backward) per unit, turn each sum into the unit's factors, and walk over the same
// elements once more to scale them. Where the tile fits in shared memory, one launch does it all
// and reads its inputs once. Otherwise there are two launches: one writes partial sums [splits,
// units], in the other each block adds up the partial sums of its own units, in order, and scales.
// There are no atomics, and how the work is split depends on sizes, types, alignment and the device
// only, so that a result is the same from run to run.
//
// Sums: terms are added in float, four at a time, and these small sums in double, so that the error
// does not grow with the size of a unit, at little cost where double is slow (consumer GPUs run it
// at 1/64 of float's rate). Four terms that leave float's range (|v| near 1e-30, say) are added
// again in double.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "weight_norm.h"
#include "weight_norm_cuda_plan.h"

namespace tfwn {
namespace cuda {

extern __shared__ __align__(16) char shared_memory[];

namespace {

enum Phase { kSum, kScale, kBoth };

struct Work {
  Phase phase;
  Plan plan;
  Layout layout;
  Type v_type, g_type, norm_type;
  const void* grad_w;  // backward only
  const void* v;
  const void* g;
  void* norm;        // forward writes it, backward reads it
  void* result;      // w, or grad_v
  void* grad_g;      // backward only
  double* partials;  // [splits, units]
};

// kVec elements that are read or written at once.
template <class T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  T x[kVec];
};

// Arithmetic on single elements: in double when v is double, in float otherwise.
template <class V>
using Real = typename std::conditional<std::is_same<V, double>::value, double, float>::type;

// fraction * power is a factor that alone might leave the range of Real.
template <class R>
struct Factor {
  R fraction;
  R power;
};

template <class R>
struct Factors {
  Factor<R> scale;       // g / norm
  Factor<R> projection;  // grad_g / norm, backward only
};

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
__device__ inline void Assign(float x, double* y) { *y = x; }
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

__device__ inline void Split(double x, Factor<double>* factor) { *factor = {x, 1.0}; }

// Halves x's exponent between the two, so that (y * fraction) * power stays in range on the way
// whenever y and the result are in range.
__device__ inline void Split(double x, Factor<float>* factor) {
  int exponent = 0;
  if (x != 0 && isfinite(x)) exponent = max(-126, min(126, ilogb(x) / 2));
  *factor = {static_cast<float>(ldexp(x, -exponent)), ldexpf(1.0f, exponent)};
}

// Stores the unit's norm, or its grad_g, and returns its factors.
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

// The vectors that one thread visits: start + i * hop + j * step, i < repeats, j < count.
struct Walk {
  int64_t start, repeats, hop, count, step;
};

// kUnroll vectors of a walk, zeros beyond its end.
template <class V, class W, int kVec, bool kBackward>
struct Batch {
  Pack<V, kVec> v[kUnroll];
  Pack<W, kVec> grad_w[kUnroll];

  __device__ void Read(const Work& work, int64_t offset, int64_t step, int64_t count) {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      v[k] = {};
      grad_w[k] = {};
      if (k < count) {
        const int64_t at = offset + k * step;
        v[k] = *reinterpret_cast<const Pack<V, kVec>*>(static_cast<const V*>(work.v) + at);
        if (kBackward) {
          grad_w[k] =
              *reinterpret_cast<const Pack<W, kVec>*>(static_cast<const W*>(work.grad_w) + at);
        }
      }
    }
  }
};

// A thread's own vectors in shared memory: no other thread touches them, so nothing to wait for.
template <class V, class W, int kVec, bool kBackward>
struct Stage {
  Pack<V, kVec>* v;
  Pack<W, kVec>* grad_w;

  __device__ Stage(char* memory, int64_t slots)
      : v(reinterpret_cast<Pack<V, kVec>*>(memory)),
        grad_w(reinterpret_cast<Pack<W, kVec>*>(v + slots * kThreads)) {}

  __device__ void Write(const Batch<V, W, kVec, kBackward>& batch, int64_t slot, int64_t count) {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (k < count) {
        v[(slot + k) * kThreads + threadIdx.x] = batch.v[k];
        if (kBackward) grad_w[(slot + k) * kThreads + threadIdx.x] = batch.grad_w[k];
      }
    }
  }

  __device__ void Read(Batch<V, W, kVec, kBackward>* batch, int64_t slot, int64_t count) const {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (k < count) {
        batch->v[k] = v[(slot + k) * kThreads + threadIdx.x];
        if (kBackward) batch->grad_w[k] = grad_w[(slot + k) * kThreads + threadIdx.x];
      }
    }
  }
};

// sum[i] += v * v or grad_w * v over the i-th elements of the batch.
template <class V, class W, int kVec, bool kBackward>
__device__ void Accumulate(const Batch<V, W, kVec, kBackward>& batch, double (&sum)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (std::is_same<Real<V>, float>::value) {
      float term = 0, size = 0;
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const float x = static_cast<float>(Value(batch.v[k].x[i]));
        const float y = kBackward ? static_cast<float>(Value(batch.grad_w[k].x[i])) : x;
        term = fmaf(x, y, term);
        size = kBackward ? fmaf(fabsf(x), fabsf(y), size) : term;
      }
      // Below 2^-100, terms may be lost to underflow that matter to the others.
      if (size >= 0x1p-100f && size <= FLT_MAX) {
        sum[i] += term;
        continue;
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const double x = Value(batch.v[k].x[i]);
      const double y = kBackward ? static_cast<double>(Value(batch.grad_w[k].x[i])) : x;
      sum[i] = fma(x, y, sum[i]);
    }
  }
}

// w, or grad_v.
template <class V, class W, int kVec, bool kBackward>
__device__ void Write(const Batch<V, W, kVec, kBackward>& batch, int k,
                      const Factors<Real<V>> (&factors)[kVec], int64_t at, const Work& work) {
  using R = Real<V>;
  using Result = typename std::conditional<kBackward, V, W>::type;
  Pack<Result, kVec> result;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const Factor<R> scale = factors[i].scale, projection = factors[i].projection;
    R x = static_cast<R>(Value(batch.v[k].x[i]));
    if (kBackward) {
      const R grad_w = static_cast<R>(Value(batch.grad_w[k].x[i]));
      x = grad_w - (x * projection.fraction) * projection.power;
      if (fabs(x) < fabs(grad_w) * kRounding<R>) x = 0;
    }
    x = (x * scale.fraction) * scale.power;
    Assign(x, &result.x[i]);
  }
  *reinterpret_cast<Pack<Result, kVec>*>(static_cast<Result*>(work.result) + at) = result;
}

// Leaves the sums of this block's threads in pieces (see Plan).
template <int kVec>
__device__ void ReduceThreads(const Plan& plan, double (&sum)[kVec], double* pieces) {
  const int lanes = 1 << plan.lanes_log2;
  if (plan.columns) {
    for (int offset = lanes; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
    }
    const int width = max(lanes, kWarp);
    const int lane = threadIdx.x % width;
    if (lane < lanes) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        pieces[threadIdx.x / width * plan.piece_pitch + lane * kVec + i] = sum[i];
      }
    }
  } else {
    double total = 0;
#pragma unroll
    for (int i = 0; i < kVec; ++i) total += sum[i];
    const int width = min(lanes << plan.groups_log2, kWarp);
    for (int offset = width / 2; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, offset);
    }
    if (threadIdx.x % width == 0) pieces[threadIdx.x / width] = total;
  }
}

template <class V, class W, int kVec, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) Kernel(const Work work) {
  using R = Real<V>;
  const Plan& plan = work.plan;
  const int64_t inner = work.layout.inner, units = work.layout.units;
  const int64_t pitch = units * inner;
  const int team_log2 = plan.lanes_log2 + plan.groups_log2;
  const int team = threadIdx.x >> team_log2;
  const int lane = threadIdx.x & ((1 << plan.lanes_log2) - 1);
  const int group = (threadIdx.x >> plan.lanes_log2) & ((1 << plan.groups_log2) - 1);
  const int lane_width_log2 = plan.lanes_log2 + (kVec == 8 ? 3 : kVec == 4 ? 2 : kVec == 2 ? 1 : 0);

  double* const pieces = reinterpret_cast<double*>(shared_memory);
  const int64_t parts = plan.tile_units >= kThreads ? 1 : kThreads / plan.tile_units;
  const int64_t from_threads = plan.piece_rows * plan.piece_pitch;
  const int64_t from_partials = parts * plan.tile_units;
  Factors<R>* const factors =
      reinterpret_cast<Factors<R>*>(pieces + (max(from_threads, from_partials) + 1) / 2 * 2);
  Stage<V, W, kVec, kBackward> stage(reinterpret_cast<char*>(factors + plan.tile_units),
                                     plan.slots);

  const int64_t splits = plan.outer_splits * plan.inner_splits;
  const int64_t blocks = plan.tiles * splits;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    // Neighbouring blocks read neighbouring memory. The second launch starts where the first one
    // ended: what it read last may still be in cache.
    int64_t tile = work.phase == kScale ? blocks - 1 - block : block;
    int64_t split = 0;
    if (splits > 1) {
      split = tile / plan.tiles;
      tile -= split * plan.tiles;
    }
    const int64_t outer_split = plan.inner_splits == 1 ? split : split / plan.inner_splits;
    const int64_t inner_split = split - outer_split * plan.inner_splits;
    const int64_t first_unit = tile * plan.tile_units;
    const int count = static_cast<int>(min(int64_t{plan.tile_units}, units - first_unit));

    const int64_t outer_begin = outer_split * plan.outer_step + group;
    const int64_t outer_end = min(work.layout.outer, (outer_split + 1) * plan.outer_step);
    const int64_t inner_begin = inner_split * plan.inner_step + lane * kVec;
    const int64_t inner_end =
        plan.columns ? count * inner
                     : (team < count ? min(inner, (inner_split + 1) * plan.inner_step) : 0);
    Walk walk;
    walk.start = outer_begin * pitch + (first_unit + team) * inner + inner_begin;
    walk.count = Steps(outer_end - outer_begin, plan.groups_log2);
    walk.step = pitch << plan.groups_log2;
    walk.repeats = Steps(inner_end - inner_begin, lane_width_log2);
    walk.hop = int64_t{1} << lane_width_log2;
    if (plan.along_inner) {
      const Walk other = walk;
      walk.count = other.repeats;
      walk.step = other.hop;
      walk.repeats = other.count;
      walk.hop = other.step;
    }

    int64_t rows = plan.piece_rows, row_pitch = plan.piece_pitch, width = plan.piece_width;
    if (work.phase == kScale) {
      for (int i = threadIdx.x; i < from_partials; i += kThreads) {
        const int unit = i % plan.tile_units;
        double sum = 0;
        if (unit < count) {
#pragma unroll 4
          for (int64_t s = i / plan.tile_units; s < splits; s += parts) {
            sum += work.partials[s * units + first_unit + unit];
          }
        }
        pieces[i] = sum;
      }
      rows = parts;
      row_pitch = plan.tile_units;
      width = 1;
    } else {
      double sum[kVec] = {};
      for (int64_t i = 0; i < walk.repeats; ++i) {
        for (int64_t j = 0; j < walk.count; j += kUnroll) {
          Batch<V, W, kVec, kBackward> batch;
          batch.Read(work, walk.start + i * walk.hop + j * walk.step, walk.step, walk.count - j);
          if (plan.slots > 0) stage.Write(batch, i * walk.count + j, walk.count - j);
          Accumulate(batch, sum);
        }
      }
      ReduceThreads(plan, sum, pieces);
    }
    __syncthreads();

    for (int unit = threadIdx.x; unit < count; unit += kThreads) {
      double sum = 0;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < width; ++i) sum += pieces[row * row_pitch + unit * width + i];
      }
      if (work.phase == kSum) {
        work.partials[split * units + first_unit + unit] = sum;
      } else {
        factors[unit] = Finish<R, kBackward>(work, sum, first_unit + unit, split == 0);
      }
    }
    __syncthreads();

    if (work.phase != kSum && walk.repeats > 0) {
      Factors<R> mine[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const int column = lane * kVec + i;
        mine[i] = factors[!plan.columns ? team : inner == 1 ? column : column / int(inner)];
      }
      for (int64_t i = 0; i < walk.repeats; ++i) {
        for (int64_t j = 0; j < walk.count; j += kUnroll) {
          const int64_t offset = walk.start + i * walk.hop + j * walk.step;
          Batch<V, W, kVec, kBackward> batch;
          if (plan.slots > 0) {
            stage.Read(&batch, i * walk.count + j, walk.count - j);
          } else {
            batch.Read(work, offset, walk.step, walk.count - j);
          }
#pragma unroll
          for (int k = 0; k < kUnroll; ++k) {
            if (k < walk.count - j) Write(batch, k, mine, offset + k * walk.step, work);
          }
        }
      }
    }
  }
}

bool Aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

int VectorSize(Type v, Type w) { return static_cast<int>(16 / std::max(SizeOf(v), SizeOf(w))); }

Problem ProblemOf(const Layout& layout, Type v, Type w, bool backward, int multiprocessors,
                  int64_t shared_memory) {
  Problem problem;
  problem.layout = Collapse(layout);
  problem.vector = VectorSize(v, w);
  problem.v_bytes = static_cast<int>(SizeOf(v));
  problem.read_bytes = static_cast<int>(SizeOf(v) + (backward ? SizeOf(w) : 0));
  problem.factors_bytes = v == Type::kDouble ? sizeof(Factors<double>) : sizeof(Factors<float>);
  problem.multiprocessors = std::max(1, multiprocessors);
  problem.shared_memory = shared_memory;
  return problem;
}

// Room for the partial sums whatever the alignment of the pointers and the device.
size_t ScratchFor(const Layout& layout, Type v, Type w, bool backward, int multiprocessors) {
  if (layout.size() == 0) return 0;
  Problem problem = ProblemOf(layout, v, w, backward, multiprocessors, 0);
  int64_t splits = MakePlan(problem).splits();
  problem.vector = 1;
  splits = std::max(splits, MakePlan(problem).splits());
  return static_cast<size_t>(splits * layout.units) * sizeof(double);
}

template <class V, class W, int kVec, bool kBackward>
cudaError_t Launch(Work* work, Phase phase, int64_t shared_bytes, int64_t device_shared_memory,
                   cudaStream_t stream) {
  const auto kernel = Kernel<V, W, kVec, kBackward>;
  if (shared_bytes > 48 << 10) {
    // The limit is the kernel's, not the launch's. All ask for the device's own: with what this
    // launch needs, another thread's launch could find a limit below its need.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(device_shared_memory));
    if (error != cudaSuccess) return error;
  }
  work->phase = phase;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(
      static_cast<unsigned>(std::min<int64_t>(work->plan.tiles * work->plan.splits(), INT_MAX)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<const Work&>(*work));
}

template <class V, class W, bool kBackward>
cudaError_t RunTyped(Work* work, Problem problem, cudaStream_t stream) {
  constexpr int kVec = static_cast<int>(16 / std::max(sizeof(V), sizeof(W)));
  const Layout& layout = problem.layout;
  const bool columns = layout.outer > 1 && layout.inner < kWarp;
  const bool vectors = (columns ? layout.units * layout.inner : layout.inner) % kVec == 0 &&
                       Aligned(work->v, sizeof(V) * kVec) &&
                       Aligned(work->result, (kBackward ? sizeof(V) : sizeof(W)) * kVec) &&
                       Aligned(work->grad_w, sizeof(W) * kVec);
  if (!vectors) problem.vector = 1;
  work->layout = layout;
  work->plan = MakePlan(problem);
  const int64_t bytes = SharedBytes(problem, work->plan);
  const auto launch = [&](Phase phase) {
    const int64_t most = problem.shared_memory;
    return vectors ? Launch<V, W, kVec, kBackward>(work, phase, bytes, most, stream)
                   : Launch<V, W, 1, kBackward>(work, phase, bytes, most, stream);
  };
  if (work->plan.fused) return launch(kBoth);
  const cudaError_t error = launch(kSum);
  return error == cudaSuccess ? launch(kScale) : error;
}

template <class V, bool kBackward>
cudaError_t RunV(Work* work, Type w_type, const Problem& problem, cudaStream_t stream) {
  switch (w_type) {
    case Type::kHalf:
      return RunTyped<V, __half, kBackward>(work, problem, stream);
    case Type::kBfloat16:
      return RunTyped<V, __nv_bfloat16, kBackward>(work, problem, stream);
    case Type::kFloat:
      return RunTyped<V, float, kBackward>(work, problem, stream);
    default:
      return RunTyped<V, double, kBackward>(work, problem, stream);
  }
}

template <bool kBackward>
cudaError_t RunAny(Work* work, Type w_type, int multiprocessors, void* scratch,
                   cudaStream_t stream) {
  const Layout& layout = work->layout;
  if (layout.units == 0) return cudaSuccess;
  if (layout.size() == 0) {  // empty sums
    return kBackward ? cudaMemsetAsync(work->grad_g, 0, layout.units * SizeOf(work->g_type), stream)
                     : cudaMemsetAsync(work->norm, 0, layout.units * SizeOf(NormType(work->v_type)),
                                       stream);
  }
  int device = 0, shared_memory = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  work->norm_type = NormType(work->v_type);
  work->partials = static_cast<double*>(scratch);
  const Problem problem =
      ProblemOf(layout, work->v_type, w_type, kBackward, multiprocessors, shared_memory);
  switch (work->v_type) {
    case Type::kHalf:
      return RunV<__half, kBackward>(work, w_type, problem, stream);
    case Type::kBfloat16:
      return RunV<__nv_bfloat16, kBackward>(work, w_type, problem, stream);
    case Type::kFloat:
      return RunV<float, kBackward>(work, w_type, problem, stream);
    default:
      return RunV<double, kBackward>(work, w_type, problem, stream);
  }
}

}  // namespace

size_t ScratchBytes(const Forward& a, int multiprocessors) {
  return ScratchFor(a.layout, a.v_type, a.w_type, false, multiprocessors);
}

size_t ScratchBytes(const Backward& a, int multiprocessors) {
  return ScratchFor(a.layout, a.v_type, a.w_type, true, multiprocessors);
}

int Run(const Forward& a, int multiprocessors, void* scratch, void* stream) {
  Work work = {};
  work.layout = a.layout;
  work.v_type = a.v_type;
  work.g_type = a.g_type;
  work.v = a.v;
  work.g = a.g;
  work.result = a.w;
  work.norm = a.norm;
  return RunAny<false>(&work, a.w_type, multiprocessors, scratch,
                       static_cast<cudaStream_t>(stream));
}

int Run(const Backward& a, int multiprocessors, void* scratch, void* stream) {
  Work work = {};
  work.layout = a.layout;
  work.v_type = a.v_type;
  work.g_type = a.g_type;
  work.grad_w = a.grad_w;
  work.v = a.v;
  work.g = a.g;
  work.norm = const_cast<void*>(a.norm);
  work.result = a.grad_v;
  work.grad_g = a.grad_g;
  return RunAny<true>(&work, a.w_type, multiprocessors, scratch, static_cast<cudaStream_t>(stream));
}

const char* ErrorString(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace tfwn
