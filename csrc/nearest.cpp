#include "nearest.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "score_tiles.h"
#include "threads.h"

namespace clsp {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Neighbour {
  float score;
  std::int64_t index;
};

bool is_better(const Neighbour& a, const Neighbour& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// The rows of one task that may be among the best k of a query, for each query of a group.
class Candidates {
 public:
  // `thresholds`: the k-th best score among all earlier rows, for each of the group's `count`
  // queries. The group is padded to `padded` queries, for which no row becomes a candidate.
  Candidates(std::size_t k, const float* thresholds, std::size_t count, std::size_t padded)
      : threshold(padded, kInfinity), k_(k), capacity_(2 * k + 32), neighbours_(count) {
    std::copy_n(thresholds, count, threshold.begin());
  }

  // Adds a row whose score exceeds the threshold. Rows come in order, so a later row whose score
  // equals the threshold is worse than the k rows that set it.
  void add(std::size_t query, float score, std::int64_t index) {
    std::vector<Neighbour>& neighbours = neighbours_[query];
    neighbours.push_back({score, index});
    if (neighbours.size() < capacity_) return;
    const auto last = neighbours.begin() + static_cast<std::ptrdiff_t>(k_ - 1);
    std::nth_element(neighbours.begin(), last, neighbours.end(), is_better);
    threshold[query] = last->score;
    neighbours.resize(k_);
  }

  // Updates the best k of each query. Both arrays are (count, k), for the queries of the group.
  void merge_into(float* scores, std::int64_t* index) {
    for (std::vector<Neighbour>& neighbours : neighbours_) {
      for (std::size_t n = 0; n < k_ && index[n] >= 0; ++n) {
        neighbours.push_back({scores[n], index[n]});
      }
      const std::size_t count = std::min(k_, neighbours.size());
      std::partial_sort(neighbours.begin(), neighbours.begin() + static_cast<std::ptrdiff_t>(count),
                        neighbours.end(), is_better);
      for (std::size_t n = 0; n < count; ++n) {
        scores[n] = neighbours[n].score;
        index[n] = neighbours[n].index;
      }
      scores += k_;
      index += k_;
    }
  }

  std::vector<float> threshold;

 private:
  std::size_t k_, capacity_;
  std::vector<std::vector<Neighbour>> neighbours_;
};

// Whether any score exceeds its column's threshold.
template <std::size_t Bytes>
CLSP_INLINE bool any_above(const ScoreTile<Bytes>& tile, const float* threshold) {
  using T = ScoreTile<Bytes>;
  std::int32_t above[T::kLanes] = {};
  for (const auto& row : tile.sums) {
    for (std::size_t v = 0; v < T::kColumns; v += T::kLanes) {
      for (std::size_t l = 0; l < T::kLanes; ++l) above[l] |= row[v + l] > threshold[v + l];
    }
  }
  std::int32_t any = 0;
  for (const std::int32_t lane : above) any |= lane;
  return any != 0;
}

struct SelectTask {
  const Matrix<float>& queries;
  const Matrix<float>& rows;
  std::size_t first_row, k;
  Span<float> scores;
  Span<std::int64_t> index;
  const std::vector<float>& thresholds;  // for each query, the k-th best score of all earlier rows
  const TaskGrid& grid;
  std::vector<std::mutex>& group_mutex;
  std::atomic<std::size_t>& bad_row;

  template <std::size_t Bytes>
  CLSP_INLINE void run(std::size_t task) const {
    using T = ScoreTile<Bytes>;
    const TaskRange range(grid, rows.rows, task);
    const std::size_t first = range.first_column, depth = rows.depth;
    const ColumnStrips<Bytes> strips(queries.part(first, grid.group_columns));
    const std::size_t padded = strips.count * T::kColumns;
    Candidates candidates(k, &thresholds[first], std::min(padded, queries.rows - first), padded);
    const RowBlocks<Bytes> blocks(rows);
    T tile;
    for (std::size_t i = range.first_row; i < range.end_row; i += T::kRows) {
      const std::size_t count = std::min(T::kRows, rows.rows - i);
      for (std::size_t p = 0; p < strips.count; ++p) {
        multiply(blocks[i], depth, 1, strips[p], depth, tile);
        if (p == 0) {  // a row that is not finite has no finite score: one query is enough
          for (std::size_t r = 0; r < count; ++r) {
            if (!std::isfinite(tile.sums[r][0])) check_row(i + r);
          }
        }
        const float* threshold = &candidates.threshold[p * T::kColumns];
        if (!any_above<Bytes>(tile, threshold)) continue;
        for (std::size_t r = 0; r < count; ++r) {
          for (std::size_t c = 0; c < T::kColumns; ++c) {
            if (tile.sums[r][c] > threshold[c]) {
              candidates.add(p * T::kColumns + c, tile.sums[r][c],
                             static_cast<std::int64_t>(first_row + i + r));
            }
          }
        }
      }
    }
    const std::lock_guard<std::mutex> lock(group_mutex[range.group]);
    candidates.merge_into(&scores[first * k], &index[first * k]);
  }

  // Writes `row` to bad_row if it is not finite and comes before the bad row found so far.
  void check_row(std::size_t row) const {
    const float* values = rows.row(row);
    const auto finite = [](float x) { return std::isfinite(x); };
    if (std::all_of(values, values + rows.depth, finite)) return;  // only the score overflowed
    std::size_t first_bad = bad_row.load();
    while (row < first_bad && !bad_row.compare_exchange_weak(first_bad, row)) {
    }
  }
};

}  // namespace

std::size_t update_best(const Matrix<float>& queries, const Matrix<float>& rows,
                        std::size_t first_row, std::size_t k, Span<float> scores,
                        Span<std::int64_t> index, int threads, Isa isa) {
  const TaskGrid grid(queries.rows, rows.rows, rows.depth, threads, isa);
  std::vector<std::mutex> group_mutex(grid.groups);
  std::atomic<std::size_t> bad_row{kNoRow};
  std::vector<float> thresholds(queries.rows);
  for (std::size_t q = 0; q < queries.rows; ++q) thresholds[q] = scores[q * k + k - 1];
  const SelectTask select{queries, rows,       first_row, k,           scores,
                          index,   thresholds, grid,      group_mutex, bad_row};
  for_each(grid.tasks(), threads, [&](std::size_t task) { dispatch(isa, select, task); });
  return bad_row.load();
}

}  // namespace clsp
