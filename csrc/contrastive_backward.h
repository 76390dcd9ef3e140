// The backward pass computes G, the gradient by the logits, tile by tile, and multiplies it by the
// embeddings.
#pragma once

#include "contrastive_tiles.h"
#include "simd_math.h"

namespace clsp {

// For every row and column of a tile: the normaliser (log-sum-exp), which is subtracted from the
// logits, and the gradient of the loss by it. Both are 0 beyond the edge of the matrix.
template <class T>
struct Normalisers {
  alignas(64) T row_shift[kTileRows], d_row[kTileRows];
  alignas(64) T column_shift[kTileColumns], d_column[kTileColumns];

  Normalisers(const Pass<T>& pass, const Tile<T>& tile) {
    const auto shift = [](T lse) { return lse == -kInfinity<T> ? T{0} : lse; };
    const std::size_t row = pass.first_row + tile.first_row;
    const std::size_t column = pass.first_column + tile.first_column;
    for (std::size_t r = 0; r < kTileRows; ++r) {
      row_shift[r] = r < tile.rows ? shift(pass.out.rows[row + r]) : T{0};
      d_row[r] = r < tile.rows ? pass.d_out.rows[row + r] : T{0};
    }
    for (std::size_t c = 0; c < kTileColumns; ++c) {
      column_shift[c] = c < tile.columns ? shift(pass.out.columns[column + c]) : T{0};
      d_column[c] = c < tile.columns ? pass.d_out.columns[column + c] : T{0};
    }
  }

  // Writes the middle between the lowest and the highest shift. Returns whether all shifts are
  // within kClose of it.
  bool find_middle(const Tile<T>& tile, T& middle) const {
    const auto row = std::minmax_element(row_shift, row_shift + tile.rows);
    const auto column = std::minmax_element(column_shift, column_shift + tile.columns);
    const T lowest = std::min(*row.first, *column.first);
    const T highest = std::max(*row.second, *column.second);
    middle = lowest + (highest - lowest) / 2;
    return highest - lowest <= 2 * kClose<T>;
  }
};

// Writes G of a tile, and the sum of G. SameShift: all rows and columns have the same shift.
template <class M, bool SameShift, class T>
CLSP_INLINE void write_softmax_gradient(const Pass<T>& pass, const Tile<T>& tile,
                                        const Normalisers<T>& n) {
  using V = typename M::Vector;
  V total{};
  for (std::size_t r = 0; r < tile.rows; ++r) {
    const V d_row = splat<V>(n.d_row[r]), shift = splat<V>(n.row_shift[r]);
    for (std::size_t c = 0; c < tile.columns; c += M::kLanes) {
      const V s = load<V>(tile.logits + r * kTileColumns + c), d_column = load<V>(n.d_column + c);
      const V e = exp_lanes(s - shift);
      V g;
      if constexpr (SameShift) {
        g = e * (d_row + d_column);
      } else {
        g = d_row * e + d_column * exp_lanes(s - load<V>(n.column_shift + c));
      }
      total += g;
      store(tile.gradient + r * kTileColumns + c, g);
    }
  }
  pass.workspace.gradient_sum[tile.column_tile * kPanelRowTiles + tile.row_tile] =
      sum_of_lanes(total);
}

template <class M, class T>
CLSP_INLINE void softmax_gradient(const Pass<T>& pass, const Tile<T>& tile) {
  using V = typename M::Vector;
  Normalisers<T> n(pass, tile);
  T middle;
  if (!n.find_middle(tile, middle)) {
    write_softmax_gradient<M, false>(pass, tile, n);
    return;
  }
  // exp(s - shift) = exp(s - middle) exp(middle - shift). The second factor goes into d_row and
  // d_column. These are 0 beyond the tile's rows and columns, where shift = middle keeps the factor
  // finite, because infinity times 0 is NaN.
  std::fill(n.row_shift + tile.rows, n.row_shift + kTileRows, middle);
  std::fill(n.column_shift + tile.columns, n.column_shift + kTileColumns, middle);
  for (std::size_t r = 0; r < tile.rows; r += M::kLanes) {
    const V factor = exp_lanes(middle - load<V>(n.row_shift + r));
    store(n.d_row + r, load<V>(n.d_row + r) * factor);
  }
  for (std::size_t c = 0; c < tile.columns; c += M::kLanes) {
    const V factor = exp_lanes(middle - load<V>(n.column_shift + c));
    store(n.d_column + c, load<V>(n.d_column + c) * factor);
  }
  std::fill_n(n.row_shift, tile.rows, middle);
  write_softmax_gradient<M, true>(pass, tile, n);
}

template <class M, class T>
CLSP_INLINE void sigmoid_gradient(const Pass<T>& pass, const Tile<T>& tile) {
  using V = typename M::Vector;
  V total{};
  for (std::size_t r = 0; r < tile.rows; ++r) {
    const V d_row = splat<V>(pass.d_out.rows[pass.first_row + tile.first_row + r]);
    for (std::size_t c = 0; c < tile.columns; c += M::kLanes) {
      const V s = load<V>(tile.logits + r * kTileColumns + c), e = exp_lanes(s < T{0} ? s : -s);
      const V g = d_row * ((s < T{0} ? e : splat<V>(T{1})) / (e + T{1}));
      total += g;
      store(tile.gradient + r * kTileColumns + c, g);
    }
  }
  pass.workspace.gradient_sum[tile.column_tile * kPanelRowTiles + tile.row_tile] =
      sum_of_lanes(total);
}

template <class M, class T>
CLSP_INLINE void differentiate_tile(const Pass<T>& pass, const Tile<T>& tile) {
  if (!pass.is_kept(tile.row_tile)) compute_logits<M>(pass, tile);
  if (pass.pairs.kind == NegativesKind::kSoftmax) {
    softmax_gradient<M>(pass, tile);
  } else {
    sigmoid_gradient<M>(pass, tile);
  }
}

// Writes a micro-tile to `out`, or adds it. Ignores what exceeds the `rows` and `columns` that are
// left in the matrix.
template <class M, class T>
CLSP_INLINE void write_product(const M& m, T* out, std::size_t stride, std::size_t rows,
                               std::size_t columns, bool add) {
  columns = std::min(columns, M::kColumns);
  for (std::size_t r = 0; r < std::min(rows, M::kRows); ++r, out += stride) {
    for (std::size_t c = 0; c < columns; ++c) out[c] = add ? out[c] + m.sums[r][c] : m.sums[r][c];
  }
}

// Adds G text to the gradient of kTaskRows rows of the panel's audio.
template <class M, class T>
CLSP_INLINE void add_audio_gradient(const Pass<T>& pass, std::size_t row_tile) {
  const std::size_t depth = pass.pairs.audio.depth, first = row_tile * kTaskRows;
  const std::size_t rows = std::min(kTaskRows, pass.rows - first);
  for (std::size_t column_tile = 0; column_tile < pass.column_tiles(); ++column_tile) {
    const bool add = pass.first_column + column_tile > 0;
    const std::size_t first_column = column_tile * kTileColumns;
    const std::size_t columns = std::min(kTileColumns, pass.columns - first_column);
    const T* const g = pass.tile_workspace(row_tile, column_tile);
    const T* const text =
        pass.workspace.text_by_columns.data() + first_column * pass.workspace.depth;
    for (std::size_t r = 0; r < rows; r += M::kRows) {
      T* const out = pass.d_audio + (pass.first_row + first + r) * depth;
      for (std::size_t d = 0; d < depth; d += M::kColumns) {
        M m;
        multiply(g + r * kTileColumns, kTileColumns, 1, text + d * kTileColumns, columns, m);
        write_product(m, out + d, depth, rows - r, depth - d, add);
      }
    }
  }
}

// Adds G^T audio to the gradient of kTaskRows rows of the panel's text.
template <class M, class T>
CLSP_INLINE void add_text_gradient(const Pass<T>& pass, std::size_t task) {
  const std::size_t depth = pass.pairs.audio.depth, first = task * kTaskRows;
  const std::size_t end = std::min(first + kTaskRows, pass.columns);
  for (std::size_t k = 0; k < pass.rows; k += kTileColumns) {
    const bool add = pass.first_row + k > 0;
    const std::size_t count = std::min(kTileColumns, pass.rows - k);
    const T* const audio = pass.workspace.audio_by_columns.data() + k * pass.workspace.depth;
    const T* const g =
        pass.tile_workspace(0, first / kTileColumns) + k * kTileColumns + first % kTileColumns;
    for (std::size_t c = first; c < end; c += M::kRows) {
      alignas(64) T transposed[kTileColumns * M::kRows];
      for (std::size_t i = 0; i < count; ++i) {
        for (std::size_t q = 0; q < M::kRows; ++q) {
          transposed[i * M::kRows + q] = g[i * kTileColumns + c - first + q];
        }
      }
      for (std::size_t d = 0; d < depth; d += M::kColumns) {
        M m;
        multiply(transposed, 1, M::kRows, audio + d * kTileColumns, count, m);
        write_product(m, pass.d_text + (pass.first_column + c) * depth + d, depth, end - c,
                      depth - d, add);
      }
    }
  }
}

}  // namespace clsp
