// How the CUDA kernels split a layout into blocks and threads. All functions are pure functions of
// the sizes and the device, evaluated on the host.

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
// The largest cluster that all devices with clusters support.
constexpr int kLargestCluster = 8;

// What a launch does: both stages, or one of them.
enum class Phase { kSum, kScale, kFused };

// A thread fetches its vectors in groups of 64 bytes, and a group's terms are added in float.
__host__ __device__ constexpr int GroupOf(bool backward) { return backward ? 2 : 4; }

// In a launch of a single stage, a thread has two groups in shared memory: one in use, one in
// flight.
constexpr int RingOf(bool backward) { return 2 * GroupOf(backward); }

// How a layout is split into blocks, and a block's tile among its threads.
//
// Columns: the tile_units units of a tile are adjacent in each row. A block has `lanes` threads
// along a row and `groups` threads along outer. A thread visits the same columns in all its rows.
// Segments: each unit consists of long runs of elements. A team of threads, `groups` along outer
// and `lanes` along inner, walks along the runs of a unit.
struct Plan {
  bool columns;
  int lanes_log2;
  int groups_log2;
  int tile_units;
  int64_t tiles;
  int64_t outer_splits, outer_step;  // blocks along outer, and rows of each
  int64_t inner_splits, inner_step;  // and along inner, in elements
  bool fused;                        // one launch does both stages, instead of two
  int cluster;                       // blocks that read each other's sums: splits() if fused
  int64_t slots;                     // vectors of each tensor in shared memory, per thread
  int64_t piece_rows;                // layout of the threads' sums in shared memory:
  int64_t piece_pitch;               // pieces[row * piece_pitch + unit * piece_width + i]
  int64_t piece_width;

  __host__ __device__ int64_t splits() const { return outer_splits * inner_splits; }
  int64_t blocks() const { return tiles * splits(); }
};

__host__ __device__ inline int64_t Steps(int64_t size, int step_log2) {
  return size <= 0 ? 0 : (size + (int64_t{1} << step_log2) - 1) >> step_log2;
}

constexpr int Log2Ceil(int64_t x) {
  int log2 = 0;
  while ((int64_t{1} << log2) < x) ++log2;
  return log2;
}

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a plan depends on.
struct Problem {
  Layout layout;
  int vector;         // elements in a vector
  int v_bytes;        // per element
  int read_bytes;     // per element of v, or of v and grad_w
  int factors_bytes;  // per unit
  bool backward;
  bool ragged;  // rows or runs may begin inside a vector
  int multiprocessors;
  int64_t shared_memory;  // per block, bytes
  int resident;           // blocks of a launch that does one stage, per multiprocessor
  int cluster;            // blocks that a cluster may have, 1 without clusters
};

// The same elements with as few axes as possible.
inline Layout Collapse(Layout layout) {
  if (layout.units == 1) return {1, 1, layout.size()};
  return layout;
}

// Short runs of a unit are treated as columns, so that a warp still reads whole cache lines.
inline bool AsColumns(const Layout& layout) { return layout.outer > 1 && layout.inner < kWarp; }

// Rows or runs that begin inside a vector can take one vector more than their size requires.
inline int64_t VectorsOf(const Problem& problem, int64_t elements) {
  return CeilDiv(elements + (problem.ragged ? problem.vector - 1 : 0), problem.vector);
}

// How many threads add up the sums of one unit. Each leaves one part, and takes about as many steps
// as there are parts.
inline int PartsOf(const Plan& plan, Phase phase) {
  const int64_t rows = phase == Phase::kScale ? plan.splits() : plan.piece_rows;
  int parts = 1;
  while (int64_t{parts} * parts < rows && 2 * parts * plan.tile_units <= kThreads) parts *= 2;
  return parts;
}

// Offsets into a block's shared memory, and its size, in bytes. The threads' sums come first.
struct SharedMemory {
  int64_t parts, factors, stage, bytes;
};

inline SharedMemory SharedMemoryOf(const Problem& problem, const Plan& plan, Phase phase) {
  const auto aligned = [](int64_t bytes) { return CeilDiv(bytes, 16) * 16; };
  SharedMemory memory;
  memory.parts = phase == Phase::kScale ? 0 : aligned(plan.piece_rows * plan.piece_pitch * 8);
  memory.factors = memory.parts + aligned(int64_t{PartsOf(plan, phase)} * plan.tile_units * 8);
  memory.stage = memory.factors;
  if (phase != Phase::kSum)
    memory.stage += aligned(int64_t{plan.tile_units} * problem.factors_bytes);
  memory.bytes = memory.stage + plan.slots * kThreads * problem.vector * problem.read_bytes;
  return memory;
}

// The most shared memory that a launch of a single stage needs with tiles 128 bytes wide.
inline int64_t RingBytes(const Problem& problem) {
  const int64_t vectors = int64_t{kThreads} * problem.vector;
  return vectors * 8 + (4 << 10) + RingOf(problem.backward) * vectors * problem.read_bytes;
}

// Whether a tile fits in shared memory, and whether it does together with another block's, so that
// one block reads while the other writes.
inline bool Fits(const Problem& problem, const Plan& plan) {
  return SharedMemoryOf(problem, plan, Phase::kFused).bytes <= problem.shared_memory;
}

inline bool FitsTwice(const Problem& problem, const Plan& plan) {
  const int64_t reserved = 1 << 10;  // by the system, per block
  return 2 * (SharedMemoryOf(problem, plan, Phase::kFused).bytes + reserved) <=
         problem.shared_memory + reserved;
}

// Whether there are enough blocks for an incomplete last wave to cost little.
inline bool FillsDevice(const Problem& problem, const Plan& plan) {
  return 2 * plan.blocks() >= 3 * problem.multiprocessors;
}

// Whether one launch of a plan that fits beats two launches of more blocks: if it has enough
// blocks, or if each of them has little to read.
inline bool OneLaunchPays(const Problem& problem, const Plan& plan) {
  if (plan.tiles == 0) return false;
  const SharedMemory memory = SharedMemoryOf(problem, plan, Phase::kFused);
  return 2 * plan.blocks() >= problem.multiprocessors || memory.bytes - memory.stage <= 32 << 10;
}

// How many splits let all blocks of one of two launches run at once. One block more would take a
// second wave. More than kMostBlocks, which fill a device of 200 multiprocessors, are not used.
constexpr int64_t kMostBlocks = 1024;

inline int64_t SplitsToFill(const Problem& problem, const Plan& plan) {
  const int64_t places = int64_t{problem.resident} * problem.multiprocessors;
  return std::max<int64_t>(1, std::min(places, kMostBlocks) / plan.tiles);
}

// An upper bound of the partial sums of any plan, splits x units. It holds because splits are at
// most kMostBlocks / tiles, and a tile that is split has at most 128 bytes of each row.
inline int64_t MostPartials(const Layout& layout) {
  constexpr int64_t kMostTileUnits = 128 / 2;
  return std::min(layout.size(),
                  layout.units + kMostBlocks * std::min(layout.units, kMostTileUnits));
}

inline void UseTwoLaunches(const Problem& problem, Plan* plan) {
  plan->fused = false;
  plan->cluster = 1;
  plan->slots = RingOf(problem.backward);
}

// One launch of blocks `lanes` wide. The blocks of a cluster share a tile. tile_units is 0 if no
// unit fits.
inline Plan ColumnsOf(const Problem& problem, int lanes_log2, int cluster) {
  const Layout& layout = problem.layout;
  const int64_t lane_columns = int64_t{problem.vector} << lanes_log2;
  const int64_t whole_columns = lane_columns - (problem.ragged ? problem.vector - 1 : 0);
  Plan plan = {};
  plan.columns = true;
  plan.lanes_log2 = lanes_log2;
  plan.groups_log2 = kThreadsLog2 - lanes_log2;
  plan.tile_units = static_cast<int>(std::min(layout.units, whole_columns / layout.inner));
  if (plan.tile_units < layout.units && !problem.ragged) {
    // Tiles must begin at a vector boundary.
    const int64_t multiple = problem.vector / std::gcd(layout.inner, int64_t{problem.vector});
    plan.tile_units -= plan.tile_units % multiple;
  }
  plan.tiles = plan.tile_units == 0 ? 0 : CeilDiv(layout.units, plan.tile_units);
  plan.outer_splits = plan.cluster = cluster;
  plan.outer_step = CeilDiv(layout.outer, cluster);
  plan.inner_splits = 1;
  plan.inner_step = layout.inner;
  plan.fused = true;
  plan.slots = Steps(plan.outer_step, plan.groups_log2);
  plan.piece_rows = int64_t{1} << plan.groups_log2;
  plan.piece_pitch = lane_columns;
  plan.piece_width = layout.inner;
  return plan;
}

inline Plan PlanColumns(const Problem& problem) {
  const Layout& layout = problem.layout;
  const int vector_log2 = Log2Ceil(problem.vector);
  // At most 32 vectors wide, or wider if there are too few rows for all threads. All rows that a
  // thread visits must begin at the same place in a vector. For ragged rows, this holds if
  // `groups`, the distance between a thread's rows, is a multiple of a vector's elements.
  const int all = Log2Ceil(VectorsOf(problem, layout.units * layout.inner));
  const int deep = Log2Ceil(CeilDiv(layout.outer, 4));
  const int most = problem.ragged ? kThreadsLog2 - vector_log2 : kThreadsLog2 - 1;
  const int widest =
      std::min({all, most, std::max(kWarpLog2, kThreadsLog2 - std::min(deep, kThreadsLog2))});
  // One launch: the smallest cluster and the widest tile that fill the device. A tile narrower than
  // a sector (32 bytes) of v would waste the rest of the sector. With clusters, tiles can be wider.
  const int64_t least_bytes = problem.cluster > 1 ? 64 : 32;
  const int least = Log2Ceil(CeilDiv(least_bytes, problem.vector * problem.v_bytes));
  Plan best = {};
  for (int cluster = 1; cluster <= problem.cluster; cluster *= 2) {
    for (int lanes_log2 = widest; lanes_log2 >= std::min(least, widest); --lanes_log2) {
      const Plan plan = ColumnsOf(problem, lanes_log2, cluster);
      if (plan.tile_units == 0) break;
      if (FillsDevice(problem, plan) && FitsTwice(problem, plan)) return plan;
      if (plan.blocks() > best.blocks() && Fits(problem, plan)) best = plan;
    }
  }
  if (OneLaunchPays(problem, best)) return best;
  // Two launches, with tiles as wide as a cache line, or wider if a unit does not fit.
  int lanes_log2 = std::min(widest, Log2Ceil(CeilDiv(128, problem.vector * problem.v_bytes)));
  Plan plan = ColumnsOf(problem, lanes_log2, 1);
  while (plan.tile_units == 0) plan = ColumnsOf(problem, ++lanes_log2, 1);
  // The partial sums that a block reads in the second launch should cost less than its part of v
  // and w, so splits <= sqrt(outer * bytes of an element of v and of w / 16).
  int64_t splits = SplitsToFill(problem, plan);
  splits = std::min(splits, CeilDiv(layout.outer, int64_t{4} << plan.groups_log2));
  while (splits > 1 && splits * splits > layout.outer * problem.v_bytes / 8) --splits;
  plan.outer_step = CeilDiv(layout.outer, splits);
  plan.outer_splits = CeilDiv(layout.outer, plan.outer_step);
  UseTwoLaunches(problem, &plan);
  return plan;
}

// One launch. The blocks of a cluster share a unit. tiles is 0 if units are too small to be shared.
inline Plan SegmentsOf(const Problem& problem, int cluster) {
  const Layout& layout = problem.layout;
  const int64_t inner_vectors = VectorsOf(problem, layout.inner);
  const int64_t vectors = layout.outer * inner_vectors;
  Plan plan = {};
  // Four vectors per thread, or fewer if some multiprocessors would have no block.
  int team_log2 = std::min(kThreadsLog2, Log2Ceil(CeilDiv(vectors, 4)));
  while (team_log2 < kThreadsLog2 && (int64_t{1} << team_log2) < vectors &&
         CeilDiv(layout.units, kThreads >> team_log2) < problem.multiprocessors) {
    ++team_log2;
  }
  plan.lanes_log2 = std::min(team_log2, Log2Ceil(inner_vectors));
  plan.groups_log2 = team_log2 - plan.lanes_log2;
  plan.tile_units = kThreads >> team_log2;
  plan.piece_rows = 1;
  plan.piece_pitch = kThreads >> std::min(team_log2, kWarpLog2);
  plan.piece_width = plan.piece_pitch / plan.tile_units;
  plan.fused = true;
  plan.cluster = cluster;
  // Splits along inner as long as each block gets a round of vectors, and then along outer.
  plan.inner_splits = 1;
  while (plan.inner_splits < cluster && 2 * plan.inner_splits <= inner_vectors >> plan.lanes_log2) {
    plan.inner_splits *= 2;
  }
  plan.outer_splits = cluster / plan.inner_splits;
  plan.inner_step = CeilDiv(inner_vectors, plan.inner_splits) * problem.vector;
  plan.outer_step = CeilDiv(layout.outer, plan.outer_splits);
  const int64_t run = plan.inner_splits == 1 ? inner_vectors : VectorsOf(problem, plan.inner_step);
  plan.slots = Steps(run, plan.lanes_log2) * Steps(plan.outer_step, plan.groups_log2);
  const bool shared = cluster == 1 || (plan.tile_units == 1 && plan.outer_splits <= layout.outer);
  plan.tiles = shared ? CeilDiv(layout.units, plan.tile_units) : 0;
  return plan;
}

inline Plan PlanSegments(const Problem& problem) {
  const Layout& layout = problem.layout;
  const int64_t inner_vectors = VectorsOf(problem, layout.inner);
  const int64_t vectors = layout.outer * inner_vectors;
  Plan best = {};
  for (int cluster = 1; cluster <= problem.cluster; cluster *= 2) {
    const Plan plan = SegmentsOf(problem, cluster);
    if (plan.tiles == 0) break;
    if (FillsDevice(problem, plan) && FitsTwice(problem, plan)) return plan;
    if (Fits(problem, plan)) best = plan;
    if (vectors < int64_t{2 * 4 * kThreads} * cluster) break;  // halves would be too small
  }
  if (OneLaunchPays(problem, best)) return best;
  // Two launches: a few long units are split among several blocks, each with at least two rounds of
  // vectors.
  Plan plan = SegmentsOf(problem, 1);
  int64_t splits = 1;
  if (plan.tile_units == 1) {
    splits = std::min(SplitsToFill(problem, plan), vectors / (2 * 4 * kThreads));
    splits = std::max<int64_t>(splits, 1);
  }
  const int64_t round = int64_t{4} << plan.lanes_log2;
  const int64_t inner_splits = std::min(splits, CeilDiv(inner_vectors, round));
  const int64_t inner_step = CeilDiv(inner_vectors, inner_splits);
  const int64_t outer_splits = std::min(layout.outer, splits / inner_splits);
  plan.inner_step = inner_step * problem.vector;
  plan.inner_splits = CeilDiv(inner_vectors, inner_step);
  plan.outer_step = CeilDiv(layout.outer, outer_splits);
  plan.outer_splits = CeilDiv(layout.outer, plan.outer_step);
  UseTwoLaunches(problem, &plan);
  return plan;
}

inline Plan MakePlan(const Problem& problem) {
  return AsColumns(problem.layout) ? PlanColumns(problem) : PlanSegments(problem);
}

}  // namespace cuda
}  // namespace tfwn

#endif  // TFWN_CSRC_WEIGHT_NORM_CUDA_PLAN_H_
