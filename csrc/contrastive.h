// Sums over the negative pairs of a contrastive batch. The M x N logits are never all in memory,
// unless the caller keeps them. docs/derivation.md derives the formulas.
//
// s_ij = scale <audio_i, text_j> + bias over pairs with owner[j] != i.
//   softmax: row_i = log sum_j exp s_ij and column_j = log sum_i exp s_ij,
//   sigmoid: row_i = sum_j log(1 + exp s_ij).
// Backward, with G the gradient of the loss by s:
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
  Matrix<T> audio, text;           // of the same depth, with at least one row each
  Span<const std::int64_t> owner;  // of each text; one outside 0 .. M-1 has no positive pair here
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

// Logits are computed in tiles, whose operands fit a core's second-level cache. A pass works on one
// panel of tiles at a time, whose tiles any thread may take. All sizes are multiples of those of
// the micro-tiles. Kept logits are those of the first rows of tiles of the whole matrix: whole
// tiles, row by row.
inline constexpr std::size_t kTileRows = 96, kTileColumns = 384;
inline constexpr std::size_t kPanelRows = 768, kPanelColumns = 1536;

// Fills `out`, and `kept` with as many rows of tiles as fit.
template <class T>
void sum_negatives(const Negatives<T>& pairs, PerRowAndColumn<T> out, Span<T> kept);

struct ScalarGradients {
  double scale, bias;
};

// Fills d_audio (M x D) and d_text (N x D). One of them may be null and is then not computed.
// Recomputes the logits that `kept` does not hold.
template <class T>
ScalarGradients sum_negatives_backward(const Negatives<T>& pairs, PerRowAndColumn<const T> out,
                                       PerRowAndColumn<const T> d_out, Span<const T> kept,
                                       T* d_audio, T* d_text);

}  // namespace clsp
