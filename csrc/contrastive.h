// Sums over the negative pairs of a contrastive batch, never M x N in memory unless asked for.
//
// s_ij = scale <audio_i, text_j> + bias over pairs with owner[j] != i. The softmax kind wants
// row_i = log sum_j exp s_ij and column_j = log sum_i exp s_ij, the sigmoid kind
// row_i = sum_j log(1 + exp s_ij). Backward, with G the gradient by s,
//   softmax G_ij = d_row_i exp(s_ij - row_i) + d_column_j exp(s_ij - column_j),
//   sigmoid G_ij = d_row_i / (1 + exp -s_ij),
// d_audio = scale G text, d_text = scale G^T audio, d_scale = sum_i <audio_i, (G text)_i> and
// d_bias = sum G. Results do not depend on the number of threads.
#pragma once

#include "matrix.h"
#include "simd.h"

namespace clsp {

enum class NegativesKind { kSoftmax, kSigmoid };

// T is float or double.
template <class T>
struct Negatives {
  NegativesKind kind;
  Matrix<T> audio, text;           // of the same depth, with a row or more
  Span<const std::int64_t> owner;  // one a text; values outside 0 .. M-1 own nothing here
  T scale, bias;
  int threads;
  Isa isa;
};

// One a row of audio and one a text; the sigmoid kind leaves `columns` empty.
template <class T>
struct PerRowAndColumn {
  Span<T> rows, columns;
};

// Logits come in tiles of kUnit rows x kTile columns, whose operands stay in a core's second cache;
// a pass holds a panel of kPanel rows x a block of kBlock columns at a time, in units that any
// thread may take. All are whole numbers of micro-tiles. Kept logits are those of the first units
// of rows, a tile of each behind the other, in a buffer of a whole number of rows of tiles.
inline constexpr std::size_t kUnit = 96, kTile = 384, kPanel = 768, kBlock = 1536;

// Fills `out`, and `kept` with as many rows of logits as it holds.
template <class T>
void sum_negatives(const Negatives<T>& pairs, PerRowAndColumn<T> out, Span<T> kept);

struct ScalarGradients {
  double scale, bias;
};

// Fills d_audio (M x D) and d_text (N x D), one of which may be null: its product is left out.
// Logits that `kept` does not hold are computed again.
template <class T>
ScalarGradients sum_negatives_backward(const Negatives<T>& pairs, PerRowAndColumn<const T> out,
                                       PerRowAndColumn<const T> d_out, Span<const T> kept,
                                       T* d_audio, T* d_text);

}  // namespace clsp
