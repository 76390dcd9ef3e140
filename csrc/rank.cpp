#include "rank.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <numeric>

#include "micro_tile.h"
#include "threads.h"

namespace clsp {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// Panels that stay in a core's second cache while rows stream past them.
constexpr std::size_t kPanelBytes = 512 * 1024;
// Most rows that a unit of work passes over; its number of rows is a multiple of those of any tile.
constexpr std::size_t kSegmentRows = 8 * 1024, kRowStep = 24;
// Units of work a thread, so that none waits long for the last.
constexpr std::size_t kUnitsPerThread = 8;

// The sums fill 24 of 32 registers, or 12 of 16; the rest holds what they are made of.
constexpr std::size_t tile_rows(std::size_t bytes) { return bytes == 64 ? 8 : 6; }
constexpr std::size_t tile_vectors(std::size_t bytes) { return bytes == 64 ? 3 : 2; }
template <std::size_t Bytes>
using ScoreTile = MicroTile<float, Bytes, tile_rows(Bytes), tile_vectors(Bytes)>;

std::size_t panel_columns(Isa isa) {
  const std::size_t bytes = vector_bytes(isa);
  return tile_vectors(bytes) * bytes / sizeof(float);
}

// Rows in segments times columns in groups of panels; a unit is one of these pairs.
struct Grid {
  std::size_t group_columns, segment_rows, groups, segments;

  Grid(std::size_t columns, std::size_t rows, std::size_t depth, std::size_t panel, int threads) {
    const std::size_t wanted = kUnitsPerThread * static_cast<std::size_t>(std::max(threads, 1));
    const std::size_t fit = kPanelBytes / (sizeof(float) * panel * depth);
    const std::size_t panels = divide_up(columns, panel);
    group_columns = panel * std::max<std::size_t>(1, std::min(fit, panels / wanted));
    groups = divide_up(columns, group_columns);
    segments = std::max(divide_up(rows, kSegmentRows), divide_up(wanted, groups + 1));
    segment_rows = std::max(kRowStep, round_up(divide_up(rows, segments), kRowStep));
    segments = divide_up(rows, segment_rows);
  }
  std::size_t units() const { return groups * segments; }
};

// The part of a grid that a unit is about.
struct Unit {
  std::size_t group, first_column, first_row, end_row;

  Unit(const Grid& grid, std::size_t rows, std::size_t unit)
      : group(unit % grid.groups),
        first_column(group * grid.group_columns),
        first_row(unit / grid.groups * grid.segment_rows),
        end_row(std::min(rows, first_row + grid.segment_rows)) {}
};

// The panels of a group of columns. Columns without a row are NaN: their scores are NaN, which is
// neither greater than nor equal to anything.
template <std::size_t Bytes>
struct Panels {
  static constexpr std::size_t kColumns = ScoreTile<Bytes>::kColumns;
  std::size_t count, size;
  Buffer<float> values;

  explicit Panels(const Matrix<float>& columns)
      : count(divide_up(columns.rows, kColumns)),
        size(checked_multiply(kColumns, columns.depth)),
        values(checked_multiply(count, size)) {
    pack_beside(columns, kColumns, 1.0f, kNaN, values.data());
  }
  const float* operator[](std::size_t p) const { return values.data() + p * size; }
};

// The rows of a matrix, those of a tile at a time; behind the last one there are rows of NaN.
template <std::size_t Bytes>
class RowBlocks {
 public:
  explicit RowBlocks(const Matrix<float>& a) : a_(a) {
    const std::size_t rest = a.rows % kRows;
    if (rest == 0) return;
    last_.assign(checked_multiply(kRows, a.depth), kNaN);
    std::copy_n(a.row(a.rows - rest), rest * a.depth, last_.data());
  }
  const float* operator[](std::size_t first) const {
    return first + kRows <= a_.rows ? a_.row(first) : last_.data();
  }

 private:
  static constexpr std::size_t kRows = ScoreTile<Bytes>::kRows;
  const Matrix<float>& a_;
  std::vector<float> last_;
};

// Scores of the texts of one panel with their audio, from the same tiles as all other scores.
struct TargetsJob {
  const Matrix<float>& audio;
  const Matrix<float>& text;
  Span<const std::int32_t> owner;
  Span<float> text_score;

  template <std::size_t Bytes>
  CLSP_INLINE void run(std::size_t unit) const {
    using T = ScoreTile<Bytes>;
    const std::size_t first = unit * T::kColumns, depth = text.depth;
    const std::size_t end = std::min(text.rows, first + T::kColumns);
    const Panels<Bytes> panel(text.part(first, T::kColumns));
    std::vector<float> rows(T::kRows * depth);
    T tile;
    for (std::size_t j = first; j < end; j += T::kRows) {
      const std::size_t count = std::min(T::kRows, end - j);
      for (std::size_t r = 0; r < count; ++r) {
        const float* row = audio.row(static_cast<std::size_t>(owner[j + r]));
        std::copy(row, row + depth, rows.data() + r * depth);
      }
      multiply(rows.data(), depth, 1, panel[0], depth, tile);
      for (std::size_t r = 0; r < count; ++r) {
        const std::size_t c = j + r - first;
        text_score[j + r] = tile.sums[r][c];
      }
    }
  }
};

CLSP_INLINE bool is_ahead(float score, std::int32_t place, float target,
                          std::int32_t target_place) {
  return (score > target) | ((score == target) & (place < target_place));
}

struct ColumnView {
  const float* target;
  const std::int32_t* index;
  std::int32_t* ahead;
};

// Targets and counts of a group of columns, filled up to whole panels.
struct Columns {
  std::vector<float> target;
  std::vector<std::int32_t> index, ahead;

  Columns(const Targets& targets, std::size_t first, std::size_t padded)
      : target(padded, kInfinity), index(padded), ahead(padded) {
    const std::size_t count = std::min(padded, targets.score.size() - first);
    std::copy_n(targets.score.begin() + first, count, target.begin());
    std::copy_n(targets.index.begin() + first, count, index.begin());
  }
  ColumnView from(std::size_t c) { return {&target[c], &index[c], &ahead[c]}; }
};

// One row of a tile: lanes of `ahead` count for the row, and the columns for themselves.
template <std::size_t Bytes>
CLSP_INLINE void count_row(const float* scores, std::int32_t row, std::int32_t first_column,
                           float target, std::int32_t index, std::int32_t* ahead,
                           const ColumnView& columns) {
  constexpr int kLanes = ScoreTile<Bytes>::kLanes, kColumns = ScoreTile<Bytes>::kColumns;
  for (int v = 0; v < kColumns; v += kLanes) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) {
      const int c = v + l;
      ahead[l] += is_ahead(scores[c], first_column + c, target, index);
      columns.ahead[c] += is_ahead(scores[c], row, columns.target[c], columns.index[c]);
    }
  }
}

struct CountJob {
  const Matrix<float>& audio;
  const Matrix<float>& text;
  std::size_t first_text;
  const Targets& audio_targets;
  const Targets& text_targets;
  Span<std::int64_t> audio_ahead, text_ahead;
  const Grid& grid;

  template <std::size_t Bytes>
  CLSP_INLINE void run(std::size_t unit) const {
    using T = ScoreTile<Bytes>;
    const Unit own(grid, audio.rows, unit);
    const std::size_t first = own.first_column, depth = audio.depth;
    const Panels<Bytes> panels(text.part(first, grid.group_columns));
    Columns columns(text_targets, first, panels.count * T::kColumns);
    const RowBlocks<Bytes> blocks(audio);
    T tile;
    for (std::size_t i = own.first_row; i < own.end_row; i += T::kRows) {
      const std::size_t count = std::min(T::kRows, audio.rows - i);
      std::int32_t ahead[T::kRows][T::kLanes] = {};
      for (std::size_t p = 0; p < panels.count; ++p) {
        multiply(blocks[i], depth, 1, panels[p], depth, tile);
        for (std::size_t r = 0; r < count; ++r) {
          count_row<Bytes>(tile.sums[r], static_cast<std::int32_t>(i + r),
                           static_cast<std::int32_t>(first_text + first + p * T::kColumns),
                           audio_targets.score[i + r], audio_targets.index[i + r], ahead[r],
                           columns.from(p * T::kColumns));
        }
      }
      for (std::size_t r = 0; r < count; ++r) {
        const std::int64_t sum = std::accumulate(ahead[r], ahead[r] + T::kLanes, std::int64_t{0});
        // Other units count for the same row; whole numbers have the same sum in any order.
        __atomic_fetch_add(&audio_ahead[i + r], sum, __ATOMIC_RELAXED);
      }
    }
    const std::size_t end = std::min(columns.ahead.size(), text.rows - first);
    for (std::size_t c = 0; c < end; ++c) {
      __atomic_fetch_add(&text_ahead[first + c], columns.ahead[c], __ATOMIC_RELAXED);
    }
  }
};

struct Neighbour {
  float score;
  std::int64_t index;
};

bool better(const Neighbour& a, const Neighbour& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// The best of a group of queries among the rows of a unit: k or more of each, in no order.
class Candidates {
 public:
  // `known`: the thresholds of these `count` queries from all earlier rows.
  Candidates(std::size_t k, const float* known, std::size_t count, std::size_t padded)
      : threshold(padded, kInfinity), k_(k), most_(2 * k + 32), found_(count) {
    std::copy_n(known, count, threshold.begin());
  }

  // Rows come in their order, so that one with the threshold's score is worse than what has it.
  void add(std::size_t q, float score, std::int64_t index) {
    std::vector<Neighbour>& own = found_[q];
    own.push_back({score, index});
    if (own.size() < most_) return;
    const auto last = own.begin() + static_cast<std::ptrdiff_t>(k_ - 1);
    std::nth_element(own.begin(), last, own.end(), better);
    threshold[q] = last->score;
    own.resize(k_);
  }

  // Joins them with what was found before.
  void merge(float* scores, std::int64_t* index) {
    for (std::vector<Neighbour>& own : found_) {
      for (std::size_t n = 0; n < k_ && index[n] >= 0; ++n) own.push_back({scores[n], index[n]});
      const std::size_t count = std::min(k_, own.size());
      std::partial_sort(own.begin(), own.begin() + static_cast<std::ptrdiff_t>(count), own.end(),
                        better);
      for (std::size_t n = 0; n < count; ++n) {
        scores[n] = own[n].score;
        index[n] = own[n].index;
      }
      scores += k_;
      index += k_;
    }
  }

  std::vector<float> threshold;

 private:
  std::size_t k_, most_;
  std::vector<std::vector<Neighbour>> found_;
};

// Whether any score is above its column's threshold.
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

struct SelectJob {
  const Matrix<float>& queries;
  const Matrix<float>& rows;
  std::size_t first_row, k;
  Span<float> scores;
  Span<std::int64_t> index;
  const std::vector<float>& threshold;  // of each query, from all earlier rows
  const Grid& grid;
  std::vector<std::mutex>& group_mutex;
  std::atomic<std::size_t>& bad_row;

  template <std::size_t Bytes>
  CLSP_INLINE void run(std::size_t unit) const {
    using T = ScoreTile<Bytes>;
    const Unit own(grid, rows.rows, unit);
    const std::size_t first = own.first_column, depth = rows.depth;
    const Panels<Bytes> panels(queries.part(first, grid.group_columns));
    const std::size_t padded = panels.count * T::kColumns;
    Candidates candidates(k, &threshold[first], std::min(padded, queries.rows - first), padded);
    const RowBlocks<Bytes> blocks(rows);
    T tile;
    for (std::size_t i = own.first_row; i < own.end_row; i += T::kRows) {
      const std::size_t count = std::min(T::kRows, rows.rows - i);
      for (std::size_t p = 0; p < panels.count; ++p) {
        multiply(blocks[i], depth, 1, panels[p], depth, tile);
        if (p == 0) {  // one query shows whether a row is finite: all its scores are, or none
          for (std::size_t r = 0; r < count; ++r) {
            if (!std::isfinite(tile.sums[r][0])) note_bad_row(i + r);
          }
        }
        const float* least = &candidates.threshold[p * T::kColumns];
        if (!any_above<Bytes>(tile, least)) continue;
        for (std::size_t r = 0; r < count; ++r) {
          for (std::size_t c = 0; c < T::kColumns; ++c) {
            if (tile.sums[r][c] > least[c]) {
              candidates.add(p * T::kColumns + c, tile.sums[r][c],
                             static_cast<std::int64_t>(first_row + i + r));
            }
          }
        }
      }
    }
    const std::lock_guard<std::mutex> lock(group_mutex[own.group]);
    candidates.merge(&scores[first * k], &index[first * k]);
  }

  void note_bad_row(std::size_t row) const {
    const float* values = rows.row(row);
    const auto finite = [](float x) { return std::isfinite(x); };
    if (std::all_of(values, values + rows.depth, finite)) return;  // the score is too large
    std::size_t known = bad_row.load();
    while (row < known && !bad_row.compare_exchange_weak(known, row)) {
    }
  }
};

}  // namespace

void rank_targets(const Matrix<float>& audio, const Matrix<float>& text,
                  Span<const std::int32_t> owner, Span<float> text_score, Span<float> audio_score,
                  Span<std::int32_t> audio_index, int threads, Isa isa) {
  const auto known = [&](std::int32_t i) {
    return i >= 0 && static_cast<std::size_t>(i) < audio.rows;
  };
  if (!std::all_of(owner.begin(), owner.end(), known)) {
    throw std::invalid_argument("owner must hold rows of audio");
  }
  const TargetsJob job{audio, text, owner, text_score};
  for_each(divide_up(text.rows, panel_columns(isa)), threads,
           [&](std::size_t unit) { dispatch(isa, job, unit); });
  std::fill(audio_score.begin(), audio_score.end(), kInfinity);
  std::fill(audio_index.begin(), audio_index.end(), -1);
  for (std::size_t j = 0; j < text.rows; ++j) {
    const auto i = static_cast<std::size_t>(owner[j]);
    if (audio_index[i] < 0 || text_score[j] > audio_score[i]) {
      audio_score[i] = text_score[j];
      audio_index[i] = static_cast<std::int32_t>(j);
    }
  }
}

void count_ahead(const Matrix<float>& audio, const Matrix<float>& text, std::size_t first_text,
                 const Targets& audio_targets, const Targets& text_targets,
                 Span<std::int64_t> audio_ahead, Span<std::int64_t> text_ahead, int threads,
                 Isa isa) {
  const Grid grid(text.rows, audio.rows, text.depth, panel_columns(isa), threads);
  const CountJob job{audio,        text,        first_text, audio_targets,
                     text_targets, audio_ahead, text_ahead, grid};
  for_each(grid.units(), threads, [&](std::size_t unit) { dispatch(isa, job, unit); });
}

std::size_t update_best(const Matrix<float>& queries, const Matrix<float>& rows,
                        std::size_t first_row, std::size_t k, Span<float> scores,
                        Span<std::int64_t> index, int threads, Isa isa) {
  const Grid grid(queries.rows, rows.rows, rows.depth, panel_columns(isa), threads);
  std::vector<std::mutex> group_mutex(grid.groups);
  std::atomic<std::size_t> bad_row{kNoRow};
  std::vector<float> threshold(queries.rows);
  for (std::size_t q = 0; q < queries.rows; ++q) threshold[q] = scores[q * k + k - 1];
  const SelectJob job{queries, rows,      first_row, k,           scores,
                      index,   threshold, grid,      group_mutex, bad_row};
  for_each(grid.units(), threads, [&](std::size_t unit) { dispatch(isa, job, unit); });
  return bad_row.load();
}

}  // namespace clsp
