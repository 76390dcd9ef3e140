// Shared by rank.cpp and nearest.cpp: scores <row, column> in micro-tiles. The matrix of all scores
// is never stored. A score does not depend on the tile in which it is computed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include "matrix.h"
#include "micro_tile.h"

namespace clsp {

// The sums fill 24 of 32 vector registers, or 12 of 16; the other registers hold the operands.
constexpr std::size_t score_tile_rows(std::size_t bytes) { return bytes == 64 ? 8 : 6; }
constexpr std::size_t score_tile_vectors(std::size_t bytes) { return bytes == 64 ? 3 : 2; }
constexpr std::size_t score_tile_columns(Isa isa) {
  return score_tile_vectors(vector_bytes(isa)) * vector_bytes(isa) / sizeof(float);
}
template <std::size_t Bytes>
using ScoreTile = MicroTile<float, Bytes, score_tile_rows(Bytes), score_tile_vectors(Bytes)>;

// Divides the scores into tasks. A task is one segment of rows times one group of columns.
struct TaskGrid {
  std::size_t group_columns, segment_rows, groups, segments;

  TaskGrid(std::size_t columns, std::size_t rows, std::size_t depth, int threads, Isa isa) {
    // The columns of a group stay in a core's second-level cache while rows stream past them.
    constexpr std::size_t kGroupBytes = 512 * 1024;
    // kRowStep is a multiple of the rows of every micro-tile.
    constexpr std::size_t kMaxSegmentRows = 8 * 1024, kRowStep = 24;
    // Several tasks for each thread, so that no thread waits long for the last one.
    constexpr std::size_t kTasksPerThread = 8;
    const std::size_t wanted = kTasksPerThread * static_cast<std::size_t>(std::max(threads, 1));
    const std::size_t width = score_tile_columns(isa);
    const std::size_t fitting = kGroupBytes / (sizeof(float) * width * depth);
    const std::size_t strips = divide_up(columns, width);
    group_columns = width * std::max<std::size_t>(1, std::min(fitting, strips / wanted));
    groups = divide_up(columns, group_columns);
    segments = std::max(divide_up(rows, kMaxSegmentRows), divide_up(wanted, groups + 1));
    segment_rows = std::max(kRowStep, round_up(divide_up(rows, segments), kRowStep));
    segments = divide_up(rows, segment_rows);
  }
  std::size_t tasks() const { return groups * segments; }
};

struct TaskRange {
  std::size_t group, first_column, first_row, end_row;

  TaskRange(const TaskGrid& grid, std::size_t rows, std::size_t task)
      : group(task % grid.groups),
        first_column(group * grid.group_columns),
        first_row(task / grid.groups * grid.segment_rows),
        end_row(std::min(rows, first_row + grid.segment_rows)) {}
};

// A group of columns, packed into strips as wide as a micro-tile. Missing columns are NaN, so their
// scores are NaN, for which > and == are false.
template <std::size_t Bytes>
struct ColumnStrips {
  static constexpr std::size_t kColumns = ScoreTile<Bytes>::kColumns;
  std::size_t count, size;
  Buffer<float> values;

  explicit ColumnStrips(const Matrix<float>& columns)
      : count(divide_up(columns.rows, kColumns)),
        size(checked_multiply(kColumns, columns.depth)),
        values(checked_multiply(count, size)) {
    pack_rows(columns, kColumns, 1.0f, std::numeric_limits<float>::quiet_NaN(), values.data());
  }
  const float* operator[](std::size_t strip) const { return values.data() + strip * size; }
};

// The rows of a matrix in blocks as high as a micro-tile; missing rows of the last block are NaN.
template <std::size_t Bytes>
class RowBlocks {
 public:
  explicit RowBlocks(const Matrix<float>& matrix) : matrix_(matrix) {
    const std::size_t rest = matrix.rows % kRows;
    if (rest == 0) return;
    last_.assign(checked_multiply(kRows, matrix.depth), std::numeric_limits<float>::quiet_NaN());
    std::copy_n(matrix.row(matrix.rows - rest), rest * matrix.depth, last_.data());
  }
  // The block that begins at row `first`.
  const float* operator[](std::size_t first) const {
    return first + kRows <= matrix_.rows ? matrix_.row(first) : last_.data();
  }

 private:
  static constexpr std::size_t kRows = ScoreTile<Bytes>::kRows;
  const Matrix<float>& matrix_;
  std::vector<float> last_;
};

}  // namespace clsp
