// How the CUDA kernels cut a layout into blocks and threads: pure functions of sizes and the
// device.

#ifndef TFWN_CSRC_WEIGHT_NORM_CUDA_PLAN_H_
#define TFWN_CSRC_WEIGHT_NORM_CUDA_PLAN_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "weight_norm.h"

namespace tfwn {
namespace cuda {

constexpr int kThreadsLog2 = 8;
constexpr int kThreads = 1 << kThreadsLog2;
constexpr int kWarpLog2 = 5;
constexpr int kWarp = 1 << kWarpLog2;
constexpr int kUnroll = 4;  // vectors that a thread has in flight

// How a layout is cut into blocks, and a block's tile into threads. All of it is chosen on the
// host.
//
// A team of threads, (outer part) x (inner part), walks over one unit; or, when `columns` is set,
// one team as large as the block walks over tile_units units that lie side by side in memory. Its
// threads are `lanes` wide along memory and `groups` deep along outer.
struct Plan {
  bool columns;
  bool along_inner;  // a thread's quick loop runs along inner instead of outer
  int lanes_log2;
  int groups_log2;
  int tile_units;
  int64_t tiles;
  int64_t outer_splits, outer_step;  // the part of outer that one block works on
  int64_t inner_splits, inner_step;
  bool fused;           // one launch does both phases
  int64_t slots;        // vectors that each thread keeps in shared memory, 0: reads them again
  int64_t piece_rows;   // the sums that a block's threads leave for one unit to add up:
  int64_t piece_pitch;  // pieces[row * piece_pitch + unit * piece_width + i]
  int64_t piece_width;

  int64_t splits() const { return outer_splits * inner_splits; }
};

__host__ __device__ inline int64_t Steps(int64_t size, int step_log2) {
  return size <= 0 ? 0 : (size + (int64_t{1} << step_log2) - 1) >> step_log2;
}

inline int Log2Ceil(int64_t x) {
  int log2 = 0;
  while ((int64_t{1} << log2) < x) ++log2;
  return log2;
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a plan depends on. Read: what the first walk reads, v or v and grad_w.
struct Problem {
  Layout layout;
  int vector;         // elements in a vector
  int v_bytes;        // per element
  int read_bytes;     // per element
  int factors_bytes;  // per unit
  int multiprocessors;
  int64_t shared_memory;  // per block, bytes
};

// The same elements, in as few axes as possible.
inline Layout Collapse(Layout layout) {
  if (layout.units == 1) return {1, 1, layout.size()};
  return layout;
}

inline int64_t SharedBytes(const Problem& problem, const Plan& plan) {
  const int64_t parts = std::max(1, kThreads / plan.tile_units);
  const int64_t pieces = std::max(plan.piece_rows * plan.piece_pitch, parts * plan.tile_units);
  return CeilDiv(pieces, 2) * 16 + plan.tile_units * int64_t{problem.factors_bytes} +
         plan.slots * kThreads * problem.vector * problem.read_bytes;
}

// Units side by side in memory: a block is lanes wide and as deep as that leaves threads.
inline Plan ColumnsOf(const Problem& problem, int lanes_log2) {
  const Layout& layout = problem.layout;
  const int64_t lane_columns = int64_t{problem.vector} << lanes_log2;
  Plan plan = {};
  plan.columns = true;
  plan.lanes_log2 = lanes_log2;
  plan.groups_log2 = kThreadsLog2 - lanes_log2;
  plan.tile_units = static_cast<int>(std::min(layout.units, lane_columns / layout.inner));
  if (plan.tile_units < layout.units) {
    // Tiles begin where a vector begins.
    const int64_t multiple = problem.vector / std::gcd(layout.inner, int64_t{problem.vector});
    plan.tile_units -= plan.tile_units % multiple;
  }
  plan.tiles = plan.tile_units == 0 ? 0 : CeilDiv(layout.units, plan.tile_units);
  plan.outer_splits = plan.inner_splits = 1;
  plan.outer_step = layout.outer;
  plan.inner_step = layout.inner;
  plan.fused = true;
  plan.slots = Steps(layout.outer, plan.groups_log2);
  plan.piece_rows = kThreads >> std::max(lanes_log2, kWarpLog2);
  plan.piece_pitch = lane_columns;
  plan.piece_width = layout.inner;
  return plan;
}

inline Plan PlanColumns(const Problem& problem) {
  const Layout& layout = problem.layout;
  // As wide as 128 bytes per warp's row or more; deeper only if there are rows for the threads.
  const int all = Log2Ceil(CeilDiv(layout.units * layout.inner, problem.vector));
  const int deep = Log2Ceil(CeilDiv(layout.outer, kUnroll));
  const int widest =
      std::min({all, kThreadsLog2 - 1, std::max(kWarpLog2, kThreadsLog2 - std::min(deep, 8))});
  // One launch, on the widest tile that fits well. The narrowest has one sector (32 bytes) of v in
  // a row: less would read the rest of the sector in vain.
  const int64_t sector = Log2Ceil(CeilDiv(32, problem.vector * problem.v_bytes));
  const int64_t roomy = std::min<int64_t>(problem.shared_memory, 64 << 10);
  Plan narrowest = {};
  for (int lanes_log2 = widest; lanes_log2 >= 0; --lanes_log2) {
    const Plan plan = ColumnsOf(problem, lanes_log2);
    if (plan.tile_units == 0 || (lanes_log2 < sector && lanes_log2 < widest)) break;
    narrowest = plan;
    if (plan.tiles >= 2 * problem.multiprocessors && SharedBytes(problem, plan) <= roomy) {
      return plan;
    }
  }
  const int64_t bytes = SharedBytes(problem, narrowest);
  if (bytes <= roomy ||
      (bytes <= problem.shared_memory && 2 * narrowest.tiles >= problem.multiprocessors)) {
    return narrowest;
  }
  // Two launches. The partial sums that a block reads in the second should cost less than its part
  // of v and w: splits <= sqrt(outer * bytes of the two / 16).
  // Rows of one cache line, or as many as one unit of each vector needs.
  int lanes_log2 = std::min(widest, Log2Ceil(CeilDiv(128, problem.vector * problem.v_bytes)));
  Plan plan = ColumnsOf(problem, lanes_log2);
  while (plan.tile_units == 0) plan = ColumnsOf(problem, ++lanes_log2);
  // All blocks at once: one too many would be a second wave.
  int64_t splits = std::max<int64_t>(2 * problem.multiprocessors / plan.tiles, 1);
  splits = std::min(splits, CeilDiv(layout.outer, int64_t{kUnroll} << plan.groups_log2));
  while (splits > 1 && splits * splits > layout.outer * problem.v_bytes / 8) --splits;
  plan.outer_step = CeilDiv(layout.outer, splits);
  plan.outer_splits = CeilDiv(layout.outer, plan.outer_step);
  plan.fused = false;
  plan.slots = 0;
  return plan;
}

// Segments: a unit's elements lie side by side in memory, in one run or several: a team of threads
// per unit.
inline Plan PlanSegments(const Problem& problem) {
  const Layout& layout = problem.layout;
  const int64_t inner_vectors = CeilDiv(layout.inner, problem.vector);
  const int64_t vectors = layout.outer * inner_vectors;
  Plan plan = {};
  const int team_log2 = std::min(kThreadsLog2, Log2Ceil(CeilDiv(vectors, kUnroll)));
  plan.lanes_log2 = std::min(team_log2, Log2Ceil(inner_vectors));
  plan.groups_log2 = team_log2 - plan.lanes_log2;
  plan.tile_units = kThreads >> team_log2;
  plan.tiles = CeilDiv(layout.units, plan.tile_units);
  plan.piece_rows = 1;
  plan.piece_pitch = kThreads >> std::min(team_log2, kWarpLog2);
  plan.piece_width = plan.piece_pitch / plan.tile_units;
  // Few long units: several blocks for each, with two rounds of vectors per thread or more.
  int64_t splits = 1;
  if (plan.tile_units == 1) {
    splits = std::min(CeilDiv(2 * problem.multiprocessors, plan.tiles),
                      vectors / (2 * kUnroll * kThreads));
    splits = std::max<int64_t>(splits, 1);
  }
  const int64_t round = int64_t{kUnroll} << plan.lanes_log2;
  const int64_t inner_splits = std::min(splits, CeilDiv(inner_vectors, round));
  const int64_t inner_step = CeilDiv(inner_vectors, inner_splits);
  const int64_t outer_splits = std::min(layout.outer, splits / inner_splits);
  plan.inner_step = inner_step * problem.vector;
  plan.inner_splits = CeilDiv(inner_vectors, inner_step);
  plan.outer_step = CeilDiv(layout.outer, outer_splits);
  plan.outer_splits = CeilDiv(layout.outer, plan.outer_step);
  plan.fused = plan.splits() == 1;
  const int64_t inner_count = Steps(inner_step, plan.lanes_log2);
  const int64_t outer_count = Steps(plan.outer_step, plan.groups_log2);
  plan.along_inner = inner_count > outer_count;
  if (plan.fused) {
    plan.slots = inner_count * outer_count;
    // Two blocks to a multiprocessor, so that one reads while the other writes.
    if (2 * SharedBytes(problem, plan) > problem.shared_memory) plan.slots = 0;
  }
  return plan;
}

inline Plan MakePlan(const Problem& problem) {
  // Short inner runs of a unit are walked over as columns, so that a warp still reads whole lines.
  const Layout& layout = problem.layout;
  return layout.outer > 1 && layout.inner < kWarp ? PlanColumns(problem) : PlanSegments(problem);
}

}  // namespace cuda
}  // namespace tfwn

#endif  // TFWN_CSRC_WEIGHT_NORM_CUDA_PLAN_H_
