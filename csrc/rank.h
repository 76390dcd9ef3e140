// Ranks and nearest neighbours, counted and chosen in the tile of scores: the matrix of all scores
// never exists. No result depends on the number of threads.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "simd.h"

namespace clsp {

// For every query the item that it should find: its score, and its place among the items. A query
// without one has infinity and -1.
struct Targets {
  Span<const float> score;
  Span<const std::int32_t> index;
};

// Text j describes audio owner[j]. Writes the score of each text with its audio, and for each audio
// the best score among its texts and the first text that has it.
void rank_targets(const Matrix<float>& audio, const Matrix<float>& text,
                  Span<const std::int32_t> owner, Span<float> text_score, Span<float> audio_score,
                  Span<std::int32_t> audio_index, int threads, Isa isa);

// Adds to each query's count the items that come before its target: those with a higher score, and
// those with the same score that come earlier. `text` is the part of all texts that starts at
// `first_text`, and text_targets and text_ahead are of this part.
void count_ahead(const Matrix<float>& audio, const Matrix<float>& text, std::size_t first_text,
                 const Targets& audio_targets, const Targets& text_targets,
                 Span<std::int64_t> audio_ahead, Span<std::int64_t> text_ahead, int threads,
                 Isa isa);

inline constexpr std::size_t kNoRow = static_cast<std::size_t>(-1);

// Takes `rows`, which are number first_row and following of a database, up into the best k of each
// query: scores and index are (queries, k), best first, equal scores by number, and have minus
// infinity and -1 where there are fewer. Returns the first row with NaN or infinity, or kNoRow.
std::size_t update_best(const Matrix<float>& queries, const Matrix<float>& rows,
                        std::size_t first_row, std::size_t k, Span<float> scores,
                        Span<std::int64_t> index, int threads, Isa isa);

}  // namespace clsp
