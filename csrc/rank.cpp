#include "rank.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <numeric>

#include "batch.h"
#include "panels.h"

namespace clsp {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Panels that stay in a core's second cache while rows stream past them.
constexpr std::size_t kPanelBytes = 512 * 1024;
// Most rows that a unit of work passes over; its number of rows is a multiple of those of any tile.
constexpr std::size_t kSegmentRows = 8 * 1024, kRowStep = 24;
// Units of work a thread, so that none waits long for the last.
constexpr std::size_t kUnitsPerThread = 8;

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
    segment_rows = std::max(kRowStep, divide_up(divide_up(rows, segments), kRowStep) * kRowStep);
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

// The panels of a group of columns.
template <int L>
struct Panels {
  static constexpr std::size_t kColumns = Tile<L>::kColumns;
  std::size_t count, size;
  Buffer<float> values;

  Panels(const Matrix& b, std::size_t first, std::size_t columns)
      : count(divide_up(std::min(columns, b.rows - first), kColumns)),
        size(checked_multiply(kColumns, b.depth)),
        values(checked_multiply(count, size)) {
    for (std::size_t p = 0; p < count; ++p) {
      pack<L>(b, first + p * kColumns, values.data() + p * size);
    }
  }
  const float* operator[](std::size_t p) const { return values.data() + p * size; }
};

struct TargetsJob {
  const Matrix& audio;
  const Matrix& text;
  Span<const std::int32_t> owner;
  Span<float> text_score;
};

// Scores of the texts of one panel with their audio, from the same tiles as all other scores.
template <int L>
CLSP_INLINE void score_owners(const TargetsJob& job, std::size_t unit) {
  using T = Tile<L>;
  const std::size_t first = unit * T::kColumns, depth = job.text.depth;
  const std::size_t end = std::min<std::size_t>(job.text.rows, first + T::kColumns);
  const Panels<L> panel(job.text, first, T::kColumns);
  std::vector<float> rows(T::kRows * depth);
  T tile;
  for (std::size_t j = first; j < end; j += T::kRows) {
    const std::size_t count = std::min<std::size_t>(T::kRows, end - j);
    for (std::size_t r = 0; r < count; ++r) {
      const float* row = job.audio.row(static_cast<std::size_t>(job.owner[j + r]));
      std::copy(row, row + depth, rows.data() + r * depth);
    }
    multiply<L>(rows.data(), depth, panel[0], tile);
    for (std::size_t r = 0; r < count; ++r) {
      const std::size_t c = j + r - first;
      job.text_score[j + r] = tile.scores[r][c];
    }
  }
}

struct CountJob {
  const Matrix& audio;
  const Matrix& text;
  std::size_t first_text;
  const Targets& audio_targets;
  const Targets& text_targets;
  Span<std::int64_t> audio_ahead, text_ahead;
  const Grid& grid;
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
template <int L>
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
template <int L>
CLSP_INLINE void count_row(const float* scores, std::int32_t row, std::int32_t first_column,
                           float target, std::int32_t index, std::int32_t* ahead,
                           const ColumnView& columns) {
  for (int v = 0; v < Tile<L>::kColumns; v += L) {
#pragma GCC ivdep
    for (int l = 0; l < L; ++l) {
      const int c = v + l;
      ahead[l] += is_ahead(scores[c], first_column + c, target, index);
      columns.ahead[c] += is_ahead(scores[c], row, columns.target[c], columns.index[c]);
    }
  }
}

template <int L>
CLSP_INLINE void count_unit(const CountJob& job, std::size_t unit) {
  using T = Tile<L>;
  const Unit own(job.grid, job.audio.rows, unit);
  const std::size_t first = own.first_column, depth = job.audio.depth;
  const Panels<L> panels(job.text, first, job.grid.group_columns);
  Columns<L> columns(job.text_targets, first, panels.count * T::kColumns);
  const RowBlocks<L> rows(job.audio);
  T tile;
  for (std::size_t i = own.first_row; i < own.end_row; i += T::kRows) {
    const std::size_t count = std::min<std::size_t>(T::kRows, job.audio.rows - i);
    std::int32_t ahead[T::kRows][L] = {};
    for (std::size_t p = 0; p < panels.count; ++p) {
      multiply<L>(rows[i], depth, panels[p], tile);
      for (std::size_t r = 0; r < count; ++r) {
        count_row<L>(tile.scores[r], static_cast<std::int32_t>(i + r),
                     static_cast<std::int32_t>(job.first_text + first + p * T::kColumns),
                     job.audio_targets.score[i + r], job.audio_targets.index[i + r], ahead[r],
                     columns.from(p * T::kColumns));
      }
    }
    for (std::size_t r = 0; r < count; ++r) {
      const std::int64_t sum = std::accumulate(ahead[r], ahead[r] + L, std::int64_t{0});
      // Other units count for the same row; whole numbers have the same sum in any order.
      __atomic_fetch_add(&job.audio_ahead[i + r], sum, __ATOMIC_RELAXED);
    }
  }
  const std::size_t end = std::min(columns.ahead.size(), job.text.rows - first);
  for (std::size_t c = 0; c < end; ++c) {
    __atomic_fetch_add(&job.text_ahead[first + c], columns.ahead[c], __ATOMIC_RELAXED);
  }
}

struct Neighbour {
  float score;
  std::int64_t index;
};

bool better(const Neighbour& a, const Neighbour& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

struct SelectJob {
  const Matrix& queries;
  const Matrix& rows;
  std::size_t first_row, k;
  Span<float> scores;
  Span<std::int64_t> index;
  const std::vector<float>& threshold;  // of each query, from all earlier rows
  const Grid& grid;
  std::vector<std::mutex>& group_mutex;
  std::atomic<std::size_t>& bad_row;
};

// The best of a group of queries among the rows of a unit: k or more of each, in no order.
class Candidates {
 public:
  Candidates(const SelectJob& job, std::size_t first, std::size_t padded)
      : threshold(padded, kInfinity), k_(job.k), most_(2 * job.k + 32) {
    const std::size_t count = std::min(padded, job.queries.rows - first);
    std::copy_n(job.threshold.begin() + static_cast<std::ptrdiff_t>(first), count,
                threshold.begin());
    found_.resize(count);
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
  void merge(const SelectJob& job, std::size_t first) {
    for (std::size_t q = 0; q < found_.size(); ++q) {
      std::vector<Neighbour>& own = found_[q];
      float* scores = &job.scores[(first + q) * k_];
      std::int64_t* index = &job.index[(first + q) * k_];
      for (std::size_t n = 0; n < k_ && index[n] >= 0; ++n) own.push_back({scores[n], index[n]});
      const std::size_t count = std::min(k_, own.size());
      std::partial_sort(own.begin(), own.begin() + static_cast<std::ptrdiff_t>(count), own.end(),
                        better);
      for (std::size_t n = 0; n < count; ++n) {
        scores[n] = own[n].score;
        index[n] = own[n].index;
      }
    }
  }

  std::vector<float> threshold;

 private:
  std::size_t k_, most_;
  std::vector<std::vector<Neighbour>> found_;
};

// Whether any score is above its column's threshold.
template <int L>
CLSP_INLINE bool any_above(const Tile<L>& tile, const float* threshold) {
  std::int32_t above[L] = {};
  for (int r = 0; r < Tile<L>::kRows; ++r) {
    for (int v = 0; v < Tile<L>::kColumns; v += L) {
      for (int l = 0; l < L; ++l) above[l] |= tile.scores[r][v + l] > threshold[v + l];
    }
  }
  std::int32_t any = 0;
  for (const std::int32_t lane : above) any |= lane;
  return any != 0;
}

void note_bad_row(const SelectJob& job, std::size_t row) {
  const float* values = job.rows.row(row);
  const auto finite = [](float x) { return std::isfinite(x); };
  if (std::all_of(values, values + job.rows.depth, finite)) return;  // the score is too large
  std::size_t known = job.bad_row.load();
  while (row < known && !job.bad_row.compare_exchange_weak(known, row)) {
  }
}

template <int L>
CLSP_INLINE void select_unit(const SelectJob& job, std::size_t unit) {
  using T = Tile<L>;
  const Unit own(job.grid, job.rows.rows, unit);
  const std::size_t first = own.first_column, depth = job.rows.depth;
  const Panels<L> panels(job.queries, first, job.grid.group_columns);
  Candidates candidates(job, first, panels.count * T::kColumns);
  const RowBlocks<L> rows(job.rows);
  T tile;
  for (std::size_t i = own.first_row; i < own.end_row; i += T::kRows) {
    const std::size_t count = std::min<std::size_t>(T::kRows, job.rows.rows - i);
    for (std::size_t p = 0; p < panels.count; ++p) {
      multiply<L>(rows[i], depth, panels[p], tile);
      if (p == 0) {  // one query shows whether a row is finite: all its scores are, or none
        for (std::size_t r = 0; r < count; ++r) {
          if (!std::isfinite(tile.scores[r][0])) note_bad_row(job, i + r);
        }
      }
      const float* threshold = &candidates.threshold[p * T::kColumns];
      if (!any_above<L>(tile, threshold)) continue;
      for (std::size_t r = 0; r < count; ++r) {
        for (std::size_t c = 0; c < T::kColumns; ++c) {
          if (tile.scores[r][c] > threshold[c]) {
            candidates.add(p * T::kColumns + c, tile.scores[r][c],
                           static_cast<std::int64_t>(job.first_row + i + r));
          }
        }
      }
    }
  }
  const std::lock_guard<std::mutex> lock(job.group_mutex[own.group]);
  candidates.merge(job, first);
}

void targets_baseline(const TargetsJob& job, std::size_t unit) { score_owners<4>(job, unit); }
void count_baseline(const CountJob& job, std::size_t unit) { count_unit<4>(job, unit); }
void select_baseline(const SelectJob& job, std::size_t unit) { select_unit<4>(job, unit); }
#ifdef CLSP_X86
CLSP_TARGET_AVX2 void targets_avx2(const TargetsJob& job, std::size_t unit) {
  score_owners<8>(job, unit);
}
CLSP_TARGET_AVX2 void count_avx2(const CountJob& job, std::size_t unit) {
  count_unit<8>(job, unit);
}
CLSP_TARGET_AVX2 void select_avx2(const SelectJob& job, std::size_t unit) {
  select_unit<8>(job, unit);
}
CLSP_TARGET_AVX512 void targets_avx512(const TargetsJob& job, std::size_t unit) {
  score_owners<16>(job, unit);
}
CLSP_TARGET_AVX512 void count_avx512(const CountJob& job, std::size_t unit) {
  count_unit<16>(job, unit);
}
CLSP_TARGET_AVX512 void select_avx512(const SelectJob& job, std::size_t unit) {
  select_unit<16>(job, unit);
}
#endif

struct Entry {
  std::size_t columns;
  void (*targets)(const TargetsJob&, std::size_t);
  void (*count)(const CountJob&, std::size_t);
  void (*select)(const SelectJob&, std::size_t);
};

Entry entry(Isa isa) {
#ifdef CLSP_X86
  if (isa == Isa::kAvx512) {
    return {Tile<16>::kColumns, targets_avx512, count_avx512, select_avx512};
  }
  if (isa == Isa::kAvx2) return {Tile<8>::kColumns, targets_avx2, count_avx2, select_avx2};
#endif
  (void)isa;
  return {Tile<4>::kColumns, targets_baseline, count_baseline, select_baseline};
}

}  // namespace

void rank_targets(const Matrix& audio, const Matrix& text, Span<const std::int32_t> owner,
                  Span<float> text_score, Span<float> audio_score, Span<std::int32_t> audio_index,
                  int threads, Isa isa) {
  const Entry own = entry(isa);
  const auto known = [&](std::int32_t i) {
    return i >= 0 && static_cast<std::size_t>(i) < audio.rows;
  };
  if (!std::all_of(owner.begin(), owner.end(), known)) {
    throw std::invalid_argument("owner must hold rows of audio");
  }
  const TargetsJob job{audio, text, owner, text_score};
  for_each(divide_up(text.rows, own.columns), threads,
           [&](std::size_t unit) { own.targets(job, unit); });
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

void count_ahead(const Matrix& audio, const Matrix& text, std::size_t first_text,
                 const Targets& audio_targets, const Targets& text_targets,
                 Span<std::int64_t> audio_ahead, Span<std::int64_t> text_ahead, int threads,
                 Isa isa) {
  const Entry own = entry(isa);
  const Grid grid(text.rows, audio.rows, text.depth, own.columns, threads);
  const CountJob job{audio,        text,        first_text, audio_targets,
                     text_targets, audio_ahead, text_ahead, grid};
  for_each(grid.units(), threads, [&](std::size_t unit) { own.count(job, unit); });
}

std::size_t update_best(const Matrix& queries, const Matrix& rows, std::size_t first_row,
                        std::size_t k, Span<float> scores, Span<std::int64_t> index, int threads,
                        Isa isa) {
  const Entry own = entry(isa);
  const Grid grid(queries.rows, rows.rows, rows.depth, own.columns, threads);
  std::vector<std::mutex> group_mutex(grid.groups);
  std::atomic<std::size_t> bad_row{kNoRow};
  std::vector<float> threshold(queries.rows);
  for (std::size_t q = 0; q < queries.rows; ++q) threshold[q] = scores[q * k + k - 1];
  const SelectJob job{queries, rows,      first_row, k,           scores,
                      index,   threshold, grid,      group_mutex, bad_row};
  for_each(grid.units(), threads, [&](std::size_t unit) { own.select(job, unit); });
  return bad_row.load();
}

}  // namespace clsp
