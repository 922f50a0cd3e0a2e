// The device code of weight_norm_cuda.cu: a kernel for each phase, direction, way to cut a tile
// (columns or segments) and pair of types.
//
// A block works on a tile of units: it sums v * v (forward) or grad_w * v (backward) over its
// elements, computes each unit's factors from the sum, and scales the elements. Threads fetch
// vectors of 16 bytes into their own slots in shared memory, at least one group ahead of the one in
// use. In the fused kernel all of a thread's vectors stay there, so memory is read only once. On
// devices with clusters, the blocks of a cluster share a tile and read each other's sums. If there
// are two launches instead, the first one stores partial sums [splits, units], and the second one
// adds up those of its units, in a fixed order, and scales.
//
// Sums: a group's terms are added in float, and the groups' sums in double, so that the error does
// not grow with the size of a unit. This costs little where double is slow (1/64 of float's rate on
// consumer GPUs). Groups whose sums leave float's range (|v| near 1e-30, say) are added again in
// double.

#ifndef TFWN_CSRC_WEIGHT_NORM_CUDA_KERNELS_H_
#define TFWN_CSRC_WEIGHT_NORM_CUDA_KERNELS_H_

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "weight_norm.h"
#include "weight_norm_cuda_elements.h"
#include "weight_norm_cuda_plan.h"

// Whether the code being compiled can use clusters and overlapping launches. Whether a launch does
// so depends on what its kernel was compiled for, not on the device alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define TFWN_SM_90 0
#else
#define TFWN_SM_90 1
#endif

namespace tfwn {
namespace cuda {

extern __shared__ __align__(16) char shared_memory[];

namespace {

// A thread's own vectors in shared memory. No other thread accesses them, so the thread only needs
// to wait for its own copies.
template <class V, class W, int kVec, bool kBackward>
struct Stage {
  Pack<V, kVec>* v;  // slots are kThreads apart
  Pack<W, kVec>* grad_w;

  __device__ Stage(char* memory, int64_t slots)
      : v(reinterpret_cast<Pack<V, kVec>*>(memory) + threadIdx.x),
        grad_w(reinterpret_cast<Pack<W, kVec>*>(memory + slots * kThreads * sizeof(*v)) +
               threadIdx.x) {}

  template <class T, class Visit>
  __device__ static void Fetch(const void* tensor, bool vectors, const Visit& walk,
                               Pack<T, kVec>* to) {
    const T* from = static_cast<const T*>(tensor) + walk.at;
    if (vectors && walk.Whole()) {
      __pipeline_memcpy_async(to, from, sizeof(*to));
      return;
    }
    *to = Pack<T, kVec>{};
#pragma unroll 1  // rare, and inlined many times
    for (int i = 0; i < kVec; ++i) {
      if (walk.Has(i)) to->x[i] = from[i];
    }
  }

  template <class Visit>
  __device__ void Fetch(const Work& work, const Visit& walk, int slot) {
    Fetch(work.v, work.vectors, walk, &v[slot * kThreads]);
    if (kBackward) Fetch(work.grad_w, work.vectors, walk, &grad_w[slot * kThreads]);
  }
};

// Fetches the groups of a walk in order, each of them kAhead groups before it is used.
template <class V, class W, int kVec, bool kBackward, bool kColumns, int kAhead>
struct Feed {
  static constexpr int kGroup = GroupOf(kBackward);
  using Slots = Stage<V, W, kVec, kBackward>;
  const Work& work;
  Slots stage;
  Walk<kVec, kColumns> walk;
  int left, slot, slots;

  __device__ Feed(const Work& work, const Slots& stage, const Walk<kVec, kColumns>& walk)
      : work(work),
        stage(stage),
        walk(walk),
        left(walk.count),
        slot(0),
        slots(static_cast<int>(work.plan.slots)) {
#pragma unroll 1  // unrolling is not worth the code size
    for (int i = 0; i < kAhead; ++i) FetchGroup();
  }

  __device__ void FetchGroup() {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k < left) {
        stage.Fetch(work, walk, slot + k);
        walk.Next();
      }
    }
    left -= kGroup;
    slot = slot + kGroup >= slots ? 0 : slot + kGroup;
    __pipeline_commit();
  }

  // Calls use(first slot, number of vectors left) for each group.
  template <class Use>
  __device__ void ForEachGroup(int count, const Use& use) {
    int used = 0;
    for (int n = 0; n < count; n += kGroup) {
      FetchGroup();
      __pipeline_wait_prior(kAhead);
      use(used, count - n);
      used = used + kGroup >= slots ? 0 : used + kGroup;
    }
  }
};

// sum[i % kSums] += v * v or grad_w * v over the i-th elements of a group's vectors.
template <class V, class W, int kVec, bool kBackward, int kSums>
__device__ void Accumulate(const Stage<V, W, kVec, kBackward>& stage, int slot, int count,
                           double (&sum)[kSums]) {
  constexpr int kGroup = GroupOf(kBackward);
  const int kept = min(kGroup, count);
  if (std::is_same<Real<V, W>, float>::value) {
    float term[kSums] = {}, size[kSums] = {};
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k >= kept) break;
      const Pack<V, kVec> v = stage.v[(slot + k) * kThreads];
      Pack<W, kVec> grad_w = {};
      if (kBackward) grad_w = stage.grad_w[(slot + k) * kThreads];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float x = static_cast<float>(Value(v.x[i]));
        const float y = kBackward ? static_cast<float>(Value(grad_w.x[i])) : x;
        term[i % kSums] = fmaf(x, y, term[i % kSums]);
        if (kBackward) size[i % kSums] = fmaf(fabsf(x), fabsf(y), size[i % kSums]);
      }
    }
    // Below 2^-100, underflow may have lost terms that matter.
    bool in_range = true;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float all = kBackward ? size[i] : term[i];
      in_range &= all >= 0x1p-100f && all <= FLT_MAX;
    }
    if (in_range) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] += term[i];
      return;
    }
  }
#pragma unroll 1
  for (int k = 0; k < kept; ++k) {
    const Pack<V, kVec> v = stage.v[(slot + k) * kThreads];
    Pack<W, kVec> grad_w = {};
    if (kBackward) grad_w = stage.grad_w[(slot + k) * kThreads];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const double x = Value(v.x[i]);
      const double y = kBackward ? static_cast<double>(Value(grad_w.x[i])) : x;
      sum[i % kSums] = fma(x, y, sum[i % kSums]);
    }
  }
}

// Computes a vector of w or grad_v.
template <class V, class W, int kVec, bool kBackward, class Visit, int kFactors>
__device__ void Scale(const Stage<V, W, kVec, kBackward>& stage, int slot, const Work& work,
                      const Visit& walk, const Factors<Real<V, W>> (&factors)[kFactors]) {
  using R = Real<V, W>;
  using Result = typename std::conditional<kBackward, V, W>::type;
  const Pack<V, kVec> v = stage.v[slot * kThreads];
  Pack<W, kVec> grad_w = {};
  if (kBackward) grad_w = stage.grad_w[slot * kThreads];
  Pack<Result, kVec> result;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const Factors<R>& factor = factors[kFactors == 1 ? 0 : i];
    R x = static_cast<R>(Value(v.x[i]));
    if (kBackward) {
      const R y = static_cast<R>(Value(grad_w.x[i]));
      x = y - Times(x, factor.projection);
      if (fabs(x) < fabs(y) * kRounding<R>) x = 0;
    }
    Assign(Times(x, factor.scale), &result.x[i]);
  }
  Result* const to = static_cast<Result*>(work.result) + walk.at;
  if (work.vectors && walk.Whole()) {
    *reinterpret_cast<Pack<Result, kVec>*>(to) = result;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (walk.Has(i)) to[i] = result.x[i];
  }
}

// Stores the sums of this block's threads in `pieces` (see Plan).
template <bool kColumns, int kSums>
__device__ void LeaveSums(const Plan& plan, const double (&sum)[kSums], int column,
                          double* pieces) {
  if (kColumns) {
    const int group = threadIdx.x >> plan.lanes_log2;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (column + i >= 0) pieces[group * plan.piece_pitch + column + i] = sum[i];
    }
    return;
  }
  double total = 0;
#pragma unroll
  for (int i = 0; i < kSums; ++i) total += sum[i];
  const int width = min(1 << (plan.lanes_log2 + plan.groups_log2), kWarp);
  for (int offset = width / 2; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, offset);
  }
  if (threadIdx.x % width == 0) pieces[threadIdx.x / width] = total;
}

// parts[part, unit] = the sum of rows part, part + parts, ... of sums[row * pitch + unit * width]
__device__ inline void AddRows(const double* sums, int64_t rows, int64_t pitch, int64_t width,
                               int count, const Work& work, double* parts) {
  const int tile_units = work.plan.tile_units;
  for (int i = threadIdx.x; i < work.parts * tile_units; i += kThreads) {
    const int unit = i % tile_units;
    double sum = 0;
    if (unit < count) {
#pragma unroll 4
      for (int64_t row = i / tile_units; row < rows; row += work.parts) {
        for (int64_t j = 0; j < width; ++j) sum += sums[row * pitch + unit * width + j];
      }
    }
    parts[i] = sum;
  }
}

__device__ inline double AddParts(const Work& work, const double* parts, int unit) {
  double sum = 0;
  for (int part = 0; part < work.parts; ++part) sum += parts[part * work.plan.tile_units + unit];
  return sum;
}

__device__ inline void ArriveAtCluster() {
#if TFWN_SM_90
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}

__device__ inline void WaitForCluster() {
#if TFWN_SM_90
  cooperative_groups::this_cluster().barrier_wait();
#endif
}

// The same address in the shared memory of another block of the cluster.
__device__ inline const double* InBlock([[maybe_unused]] int rank, const double* shared) {
#if TFWN_SM_90
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

// The second launch may start as soon as there is room, and then waits for the sums.
__device__ inline void LetNextLaunchStart() {
#if TFWN_SM_90
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

__device__ inline void WaitForLaunchBefore() {
#if TFWN_SM_90
  cudaGridDependencySynchronize();
#endif
}

// How many blocks a multiprocessor should have registers for: with 64 per thread or, if a thread
// keeps the factors of eight columns, 80.
template <class V, class W, bool kBackward, Phase kPhase, bool kColumns>
constexpr int kBlocks =
    kBackward && kColumns && kPhase != Phase::kSum && kVector<V, W> == 8 ? 3 : 4;

template <class V, class W, bool kBackward, Phase kPhase, bool kColumns>
__global__ void __launch_bounds__(kThreads, (kBlocks<V, W, kBackward, kPhase, kColumns>))
    Kernel(const Work work) {
  constexpr int kVec = kVector<V, W>;
  // Each column needs its own sum, but a segment's elements can share sums.
  constexpr int kSums = kColumns || kVec < 4 ? kVec : 4;
  // The fused kernel keeps all of a tile, so more of it can be in flight.
  constexpr int kAhead = kPhase == Phase::kFused ? 3 : 1;
  using R = Real<V, W>;
  const Plan& plan = work.plan;
  const int64_t units = work.layout.units, splits = plan.splits();
  double* const pieces = reinterpret_cast<double*>(shared_memory);
  double* const parts = reinterpret_cast<double*>(shared_memory + work.memory.parts);
  Factors<R>* const factors = reinterpret_cast<Factors<R>*>(shared_memory + work.memory.factors);
  const Stage<V, W, kVec, kBackward> stage(shared_memory + work.memory.stage, plan.slots);
  if (kPhase == Phase::kSum) LetNextLaunchStart();

  const int64_t blocks = plan.tiles * splits;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    // Adjacent blocks read adjacent memory, but the blocks of a cluster share a tile. The second
    // launch goes in reverse, because what the first one read last may still be in cache.
    const int64_t number = kPhase == Phase::kScale ? blocks - 1 - block : block;
    int64_t split = 0, tile = number;
    if (splits > 1 && kPhase == Phase::kFused) {
      tile = number / splits;
      split = number - tile * splits;
    } else if (splits > 1) {
      split = number / plan.tiles;
      tile = number - split * plan.tiles;
    }
    const int64_t first_unit = tile * plan.tile_units;
    const int count = static_cast<int>(min(int64_t{plan.tile_units}, units - first_unit));
    const Walk<kVec, kColumns> walk = MakeWalk<kVec, kColumns>(work, split, first_unit, count);
    Feed<V, W, kVec, kBackward, kColumns, kAhead> feed(work, stage, walk);
    if (kPhase == Phase::kScale) {
      WaitForLaunchBefore();
      AddRows(work.partials + first_unit, splits, units, 1, count, work, parts);
    } else {
      double sum[kSums] = {};
      feed.ForEachGroup(walk.count,
                        [&](int slot, int left) { Accumulate(stage, slot, left, sum); });
      LeaveSums<kColumns>(plan, sum, walk.column, pieces);
      __syncthreads();
      AddRows(pieces, plan.piece_rows, plan.piece_pitch, plan.piece_width, count, work, parts);
    }
    __syncthreads();

    for (int unit = threadIdx.x; unit < count; unit += kThreads) {
      const double sum = AddParts(work, parts, unit);
      if (kPhase == Phase::kSum) {
        work.partials[split * units + first_unit + unit] = sum;
      } else if (kPhase == Phase::kFused && plan.cluster > 1) {
        pieces[unit] = sum;
      } else {
        factors[unit] = Finish<R, kBackward>(work, sum, first_unit + unit,
                                             kPhase == Phase::kFused || split == 0);
      }
    }
    if (kPhase == Phase::kFused && plan.cluster > 1) {
      ArriveAtCluster();
      WaitForCluster();
      for (int unit = threadIdx.x; unit < count; unit += kThreads) {
        double sum = 0;
        for (int rank = 0; rank < plan.cluster; ++rank) sum += InBlock(rank, pieces)[unit];
        factors[unit] = Finish<R, kBackward>(work, sum, first_unit + unit, split == 0);
      }
      ArriveAtCluster();
    }
    __syncthreads();

    if (kPhase != Phase::kSum) {
      constexpr int kFactors = kColumns ? kVec : 1;
      Factors<R> mine[kFactors];
#pragma unroll
      for (int i = 0; i < kFactors; ++i) {
        const int inner = static_cast<int>(work.layout.inner);
        const int unit = !kColumns    ? threadIdx.x >> (plan.lanes_log2 + plan.groups_log2)
                         : inner == 1 ? walk.column + i
                                      : (walk.column + i) / inner;
        mine[i] = factors[max(0, min(unit, plan.tile_units - 1))];
      }
      Walk<kVec, kColumns> to = walk;
      const auto scale = [&](int slot, int left) {
#pragma unroll
        for (int k = 0; k < GroupOf(kBackward); ++k) {
          if (k >= left) break;
          Scale<V, W, kVec, kBackward>(stage, slot + k, work, to, mine);
          to.Next();
        }
      };
      if (kPhase == Phase::kScale) {
        feed.ForEachGroup(walk.count, scale);
      } else {
#pragma unroll 1
        for (int n = 0; n < walk.count; n += GroupOf(kBackward)) scale(n, walk.count - n);
      }
    }
    // The cluster's other blocks must have read this block's sums before it overwrites them or
    // exits.
    if (kPhase == Phase::kFused && plan.cluster > 1) WaitForCluster();
  }
}

}  // namespace
}  // namespace cuda
}  // namespace tfwn

#endif  // TFWN_CSRC_WEIGHT_NORM_CUDA_KERNELS_H_
