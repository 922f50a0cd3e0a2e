// How the CPU kernels split a tensor into tasks. The split depends only on the shape, so results do
// not depend on the number of threads.

#ifndef TFWN_CSRC_WEIGHT_NORM_CPU_PLAN_H_
#define TFWN_CSRC_WEIGHT_NORM_CPU_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "weight_norm.h"

namespace tfwn::cpu {
namespace {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t multiple) { return CeilDiv(a, multiple) * multiple; }

// The sums and factors of columns are padded to a multiple of this, so that vectors are full.
constexpr int64_t kPadding = 32;

// The maximum width of a block of columns. Its factors fit on the stack and in a small part of the
// L2 cache.
constexpr int64_t kMostColumns = 4096;

// The kinds of tasks:
//   kBlocks    Columns: the tensor is a matrix with rows of [units, inner] and one sum per column.
//              A task is a block of this matrix. Several narrow rows are folded into one, so that
//              vectors are full and many sums are in flight; the last row may then be partial. All
//              tasks are summed before any is scaled.
//   kRuns      Segments, each of `inner` consecutive elements of one unit, when a unit fits in
//              cache. A task is a run of whole units, which it sums and then scales.
//   kPieces    Segments of larger units. A task is a piece of a segment. All tasks are summed
//              before any is scaled.
enum class Tasks { kBlocks, kRuns, kPieces };

// Evenly spaced rows of a task.
struct Part {
  int64_t first;  // index of its first element
  int64_t rows, width, stride;
  int64_t sum, factor;  // indices of those of its first column or segment
};

struct Plan {
  int64_t units, size;
  int64_t inner;  // consecutive elements of a unit
  int64_t outer;
  Tasks kind;
  int64_t tasks = 0;
  int64_t units_per_task = 0;  // runs

  int64_t row = 0;                            // columns: elements of a row
  int64_t chunks = 0, rows_per_chunk = 0;     // blocks: along a column, and rows in each
  int64_t blocks = 0, columns_per_block = 0;  // blocks: along a row, and columns in each
  int64_t pieces = 0, piece = 0;              // pieces: of a segment, and elements in each

  // Unit n has `groups` x `folds` x `sums_per_unit` partial sums:
  // [group * group_size + (fold * units + n) * sums_per_unit + i].
  int64_t groups = 0, group_size = 0, folds = 1, sums_per_unit = 1;

  explicit Plan(const Layout& layout)
      : units(layout.units), size(layout.size()), inner(layout.inner), outer(layout.outer) {
    if (units == 1 || size == 0) {  // A single unit may be split anywhere.
      outer = size;
      inner = 1;
    }
    kind = Tasks::kBlocks;
    if (size == 0) {
      folds = 0;
      return;
    }
    if (inner == 1 || (outer >= 32 && inner <= 512) || (outer >= 8 && inner < 16)) {
      PlanColumns();
    } else {
      PlanSegments();
    }
  }

  bool columns() const { return kind == Tasks::kBlocks; }

  void PlanColumns() {
    row = units * inner;
    folds = CeilDiv(256, row);
    row *= folds;
    const int64_t rows = CeilDiv(size, row);
    sums_per_unit = inner;
    group_size = RoundUp(row, kPadding);
    blocks = CeilDiv(row, kMostColumns);
    columns_per_block = RoundUp(CeilDiv(row, blocks), kPadding);
    blocks = CeilDiv(row, columns_per_block);
    // At least 64 rows, so that there are far fewer partial sums than elements, and at least 64 KiB
    // of floats.
    const int64_t least = std::max<int64_t>(64, 16384 / columns_per_block);
    chunks = std::min<int64_t>(std::max<int64_t>(rows / least, 1), 64);
    if (chunks > 4) chunks -= chunks % 4;  // evenly shared by 2 or 4 threads
    rows_per_chunk = CeilDiv(rows, chunks);
    chunks = CeilDiv(rows, rows_per_chunk);
    tasks = chunks * blocks;
    groups = chunks;
  }

  void PlanSegments() {
    groups = outer;
    const int64_t unit_size = outer * inner;
    if (unit_size <= 65536) {
      kind = Tasks::kRuns;
      units_per_task = std::max<int64_t>(4096 / unit_size, 1);
      tasks = CeilDiv(units, units_per_task);
    } else {
      kind = Tasks::kPieces;
      pieces = CeilDiv(inner, 32768);
      piece = RoundUp(CeilDiv(inner, pieces), 16);
      pieces = CeilDiv(inner, piece);
      tasks = outer * units * pieces;
      sums_per_unit = pieces;
    }
    group_size = units * sums_per_unit;
  }

  int64_t sums() const { return groups * group_size; }
  int64_t factors() const { return columns() ? group_size : units; }
  // How many copies of a unit's factors are stored.
  int64_t factors_per_unit() const { return columns() ? folds * inner : 1; }

  // Calls body(part) for the parts of a task.
  template <class Body>
  void ForParts(int64_t task, const Body& body) const {
    switch (kind) {
      case Tasks::kBlocks: {
        const int64_t chunk = task / blocks;
        const int64_t column = task % blocks * columns_per_block;
        const int64_t width = std::min(columns_per_block, row - column);
        const int64_t begin = chunk * rows_per_chunk;
        const int64_t end = std::min(begin + rows_per_chunk, size / row);
        const int64_t sum = chunk * group_size + column;
        if (begin < end) {
          body(Part{begin * row + column, end - begin, width, row, sum, column});
        }
        const int64_t partial = size % row;
        if (chunk == chunks - 1 && column < partial) {
          body(Part{size - partial + column, 1, std::min(width, partial - column), row, sum,
                    column});
        }
        return;
      }
      case Tasks::kRuns: {
        const int64_t unit = task * units_per_task;
        const int64_t count = std::min(units_per_task, units - unit);
        for (int64_t i = unit; i < outer * units; i += units) {
          body(Part{i * inner, count, inner, inner, i, unit});
        }
        return;
      }
      case Tasks::kPieces: {
        const int64_t segment = task / pieces;
        const int64_t begin = task % pieces * piece;
        const int64_t width = std::min(piece, inner - begin);
        body(Part{segment * inner + begin, 1, width, width, task, segment % units});
        return;
      }
    }
  }

  // Columns are summed part by part, so their sums must start at zero.
  void ClearSums(int64_t task, double* partial) const {
    if (!columns()) return;
    const int64_t column = task % blocks * columns_per_block;
    double* sums = partial + task / blocks * group_size;
    std::fill(sums + column, sums + std::min(column + columns_per_block, group_size), 0.0);
  }
};

}  // namespace
}  // namespace tfwn::cpu

#endif  // TFWN_CSRC_WEIGHT_NORM_CPU_PLAN_H_
