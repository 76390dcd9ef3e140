#include "rank.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "score_tiles.h"
#include "threads.h"

namespace clsp {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Computes the score of each text of a strip with its audio. The micro-kernel is that of
// count_ahead(), so that both get the same bits for the same pair.
struct TargetsTask {
  const Matrix<float>& audio;
  const Matrix<float>& text;
  Span<const std::int32_t> owner;
  Span<float> text_score;

  template <std::size_t Bytes>
  CLSP_INLINE void run(std::size_t task) const {
    using T = ScoreTile<Bytes>;
    const std::size_t first = task * T::kColumns, depth = text.depth;
    const std::size_t end = std::min(text.rows, first + T::kColumns);
    const ColumnStrips<Bytes> strip(text.part(first, T::kColumns));
    std::vector<float> rows(T::kRows * depth);
    T tile;
    for (std::size_t j = first; j < end; j += T::kRows) {
      const std::size_t count = std::min(T::kRows, end - j);
      for (std::size_t r = 0; r < count; ++r) {
        const float* row = audio.row(static_cast<std::size_t>(owner[j + r]));
        std::copy(row, row + depth, rows.data() + r * depth);
      }
      multiply(rows.data(), depth, 1, strip[0], depth, tile);
      for (std::size_t r = 0; r < count; ++r) {
        const std::size_t c = j + r - first;
        text_score[j + r] = tile.sums[r][c];
      }
    }
  }
};

CLSP_INLINE bool is_ahead(float score, std::int32_t index, float target,
                          std::int32_t target_index) {
  return (score > target) | ((score == target) & (index < target_index));
}

struct ColumnView {
  const float* target;
  const std::int32_t* index;
  std::int32_t* ahead;
};

// Targets and counts of a group of columns, padded to whole strips.
struct ColumnCounts {
  std::vector<float> target;
  std::vector<std::int32_t> index, ahead;

  ColumnCounts(const Targets& targets, std::size_t first, std::size_t padded)
      : target(padded, kInfinity), index(padded), ahead(padded) {
    const std::size_t count = std::min(padded, targets.score.size() - first);
    std::copy_n(targets.score.begin() + first, count, target.begin());
    std::copy_n(targets.index.begin() + first, count, index.begin());
  }
  ColumnView from(std::size_t c) { return {&target[c], &index[c], &ahead[c]}; }
};

// Adds the scores in one row of a tile to the counts. The sum over the lanes of `ahead` is the
// count of the row; columns.ahead has one count for each column.
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

struct CountTask {
  const Matrix<float>& audio;
  const Matrix<float>& text;
  std::size_t first_text;
  const Targets& audio_targets;
  const Targets& text_targets;
  Span<std::int64_t> audio_ahead, text_ahead;
  const TaskGrid& grid;

  template <std::size_t Bytes>
  CLSP_INLINE void run(std::size_t task) const {
    using T = ScoreTile<Bytes>;
    const TaskRange range(grid, audio.rows, task);
    const std::size_t first = range.first_column, depth = audio.depth;
    const ColumnStrips<Bytes> strips(text.part(first, grid.group_columns));
    ColumnCounts columns(text_targets, first, strips.count * T::kColumns);
    const RowBlocks<Bytes> blocks(audio);
    T tile;
    for (std::size_t i = range.first_row; i < range.end_row; i += T::kRows) {
      const std::size_t count = std::min(T::kRows, audio.rows - i);
      std::int32_t ahead[T::kRows][T::kLanes] = {};
      for (std::size_t p = 0; p < strips.count; ++p) {
        multiply(blocks[i], depth, 1, strips[p], depth, tile);
        for (std::size_t r = 0; r < count; ++r) {
          count_row<Bytes>(tile.sums[r], static_cast<std::int32_t>(i + r),
                           static_cast<std::int32_t>(first_text + first + p * T::kColumns),
                           audio_targets.score[i + r], audio_targets.index[i + r], ahead[r],
                           columns.from(p * T::kColumns));
        }
      }
      for (std::size_t r = 0; r < count; ++r) {
        const std::int64_t sum = std::accumulate(ahead[r], ahead[r] + T::kLanes, std::int64_t{0});
        // Other tasks add to the same row. The order does not matter for integers.
        __atomic_fetch_add(&audio_ahead[i + r], sum, __ATOMIC_RELAXED);
      }
    }
    const std::size_t end = std::min(columns.ahead.size(), text.rows - first);
    for (std::size_t c = 0; c < end; ++c) {
      __atomic_fetch_add(&text_ahead[first + c], columns.ahead[c], __ATOMIC_RELAXED);
    }
  }
};

}  // namespace

void rank_targets(const Matrix<float>& audio, const Matrix<float>& text,
                  Span<const std::int32_t> owner, Span<float> text_score, Span<float> audio_score,
                  Span<std::int32_t> audio_index, int threads, Isa isa) {
  const auto is_row = [&](std::int32_t i) {
    return i >= 0 && static_cast<std::size_t>(i) < audio.rows;
  };
  if (!std::all_of(owner.begin(), owner.end(), is_row)) {
    throw std::invalid_argument("owner must hold rows of audio");
  }
  const TargetsTask targets{audio, text, owner, text_score};
  for_each(divide_up(text.rows, score_tile_columns(isa)), threads,
           [&](std::size_t task) { dispatch(isa, targets, task); });
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
  const TaskGrid grid(text.rows, audio.rows, text.depth, threads, isa);
  const CountTask count{audio,        text,        first_text, audio_targets,
                        text_targets, audio_ahead, text_ahead, grid};
  for_each(grid.tasks(), threads, [&](std::size_t task) { dispatch(isa, count, task); });
}

}  // namespace clsp
