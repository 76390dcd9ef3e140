// Sums over the negative pairs of a contrastive batch. Only one panel of the M x N logits is in
// memory, and those that the caller keeps. docs/derivation.md derives the formulas.
//
// s_ij = scale <audio_i, text_j> + bias over pairs with owner[j] != i.
//   softmax: row_i = log sum_j exp s_ij and column_j = log sum_i exp s_ij,
//   sigmoid: row_i = sum_j log(1 + exp s_ij).
// Backward, where G is the gradient of the loss by s:
//   softmax: G_ij = d_row_i exp(s_ij - row_i) + d_column_j exp(s_ij - column_j),
//   sigmoid: G_ij = d_row_i / (1 + exp -s_ij),
//   d_audio = scale G text, d_text = scale G^T audio, d_scale = sum_i <audio_i, (G text)_i> and
//   d_bias = sum G.
// Results do not depend on the number of threads.
#pragma once

#include "matrix.h"
#include "simd.h"

namespace clsp {

enum class NegativesKind { kSoftmax, kSigmoid };

// T is float or double.
template <class T>
struct Negatives {
  NegativesKind kind;
  Matrix<T> audio, text;  // (M, D) and (N, D), at least one row each
  // (N,): the audio of each text. If it is outside 0 .. M-1, all pairs of the text are negative.
  Span<const std::int64_t> owner;
  T scale, bias;
  int threads;
  Isa isa;
};

// A value for each row (audio) and each column (text) of the logits. The sigmoid kind leaves
// `columns` empty.
template <class T>
struct PerRowAndColumn {
  Span<T> rows, columns;
};

// Logits are computed in tiles. The operands of a tile fit a core's second-level cache. A pass
// works on one panel of tiles at a time; each tile is a task for any thread. The sizes are
// multiples of the sizes of every micro-tile. Kept logits are the first rows of tiles of the whole
// matrix, stored tile by tile.
inline constexpr std::size_t kTileRows = 96, kTileColumns = 384;
inline constexpr std::size_t kPanelRows = 768, kPanelColumns = 1536;

// Writes `out`, and keeps in `kept` the logits of as many rows of tiles as fit.
template <class T>
void sum_negatives(const Negatives<T>& pairs, PerRowAndColumn<T> out, Span<T> kept);

struct ScalarGradients {
  double scale, bias;
};

// Writes d_audio (M, D) and d_text (N, D). One of them may be null: it is then not computed.
// Recomputes the logits that `kept` does not hold.
template <class T>
ScalarGradients sum_negatives_backward(const Negatives<T>& pairs, PerRowAndColumn<const T> out,
                                       PerRowAndColumn<const T> d_out, Span<const T> kept,
                                       T* d_audio, T* d_text);

}  // namespace clsp
