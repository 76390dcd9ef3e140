// Ranks from audio to text and from text to audio. Scores are computed and compared tile by tile.
// Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "simd.h"

namespace clsp {

// The score and the index of each query's target, which is the item that the query should find. A
// query without a target has infinity and -1.
struct Targets {
  Span<const float> score;
  Span<const std::int32_t> index;
};

// Text j describes audio owner[j]. Writes the score of each text with its audio; and for each audio
// the best score among its texts, and the first text that has it. Throws std::invalid_argument if
// an owner is not a row of audio.
void rank_targets(const Matrix<float>& audio, const Matrix<float>& text,
                  Span<const std::int32_t> owner, Span<float> text_score, Span<float> audio_score,
                  Span<std::int32_t> audio_index, int threads, Isa isa);

// Adds to each query's count the number of items ahead of its target: those with a higher score,
// and those with the same score and a smaller index. `text`, text_targets and text_ahead are a part
// of all texts, which begins at text `first_text`.
void count_ahead(const Matrix<float>& audio, const Matrix<float>& text, std::size_t first_text,
                 const Targets& audio_targets, const Targets& text_targets,
                 Span<std::int64_t> audio_ahead, Span<std::int64_t> text_ahead, int threads,
                 Isa isa);

}  // namespace clsp
