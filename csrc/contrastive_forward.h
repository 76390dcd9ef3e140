// The forward pass computes the peak (maximum) and the sum of exp(s - peak) of every row and column
// of a tile. It then adds the results of each panel to those of the panels before it.
#pragma once

#include "contrastive_tiles.h"
#include "simd_math.h"

namespace clsp {

// Returns what to subtract from logits with this peak: the peak, or 0 if the peak is -infinity,
// because exp(-infinity - 0) is 0 but exp(-infinity + infinity) is NaN.
template <class T, class V>
CLSP_INLINE V shift_of(const V& peak) {
  return peak == -kInfinity<T> ? V{} : peak;
}

// Adds (part_peak, part_sum) to (peak, sum). Each pair stands for the number sum * exp(peak).
template <class T, class V>
CLSP_INLINE void add_partial(T* peak, T* sum, const T* part_peak, const T* part_sum) {
  const V a = load<V>(peak), b = load<V>(part_peak);
  const V m = larger(a, b), shift = shift_of<T>(m);
  store(sum, load<V>(sum) * exp_lanes(a - shift) + load<V>(part_sum) * exp_lanes(b - shift));
  store(peak, m);
}

// Writes the peaks of a tile's rows and columns. Returns whether all are within kClose of the
// largest.
template <class M, class T>
CLSP_INLINE bool find_peaks(const Tile<T>& tile, T* row_peak, T* column_peak) {
  using V = typename M::Vector;
  std::fill_n(column_peak, kTileColumns, -kInfinity<T>);
  for (std::size_t r = 0; r < tile.rows; ++r) {
    V peak = splat<V>(-kInfinity<T>);
    for (std::size_t c = 0; c < tile.columns; c += M::kLanes) {
      const V s = load<V>(tile.logits + r * kTileColumns + c);
      peak = larger(peak, s);
      store(column_peak + c, larger(load<V>(column_peak + c), s));
    }
    row_peak[r] = largest_lane(peak);
  }
  const T peak = *std::max_element(row_peak, row_peak + tile.rows);
  const auto close = [peak](T x) { return x >= peak - kClose<T>; };
  return peak > -kInfinity<T> && std::all_of(row_peak, row_peak + tile.rows, close) &&
         std::all_of(column_peak, column_peak + tile.columns, close);
}

// Writes the sum of exp(s - peak) of every row and column. SamePeak: all peaks are equal.
template <class M, bool SamePeak, class T>
CLSP_INLINE void sum_exponentials(const Tile<T>& tile, const T* row_peak, const T* column_peak,
                                  T* row_sum, T* column_sum) {
  using V = typename M::Vector;
  const std::size_t columns = round_up(tile.columns, M::kColumns);
  std::fill_n(column_sum, kTileColumns, T{0});
  for (std::size_t r = 0; r < tile.rows; ++r) {
    const V shift = shift_of<T>(splat<V>(row_peak[r]));
    V sum{};
    for (std::size_t c = 0; c < columns; c += M::kLanes) {
      const V s = load<V>(tile.logits + r * kTileColumns + c), e = exp_lanes(s - shift);
      sum += e;
      V of_column = e;
      if constexpr (!SamePeak) {
        of_column = exp_lanes(s - shift_of<T>(load<V>(column_peak + c)));
      }
      store(column_sum + c, load<V>(column_sum + c) + of_column);
    }
    row_sum[r] = sum_of_lanes(sum);
  }
}

// Writes the partial (peak, sum) of every row and column of a tile.
template <class M, class T>
CLSP_INLINE void sum_softmax(const Pass<T>& pass, const Tile<T>& tile) {
  Workspace<T>& w = pass.workspace;
  const std::size_t row = tile.column_tile * kPanelRows + tile.first_row;
  const std::size_t column = tile.row_tile * kPanelColumns + tile.first_column;
  T* const row_peak = w.partial_row_peak.data() + row;
  T* const row_sum = w.partial_row_sum.data() + row;
  T* const column_peak = w.partial_column_peak.data() + column;
  T* const column_sum = w.partial_column_sum.data() + column;
  if (find_peaks<M>(tile, row_peak, column_peak)) {
    std::fill_n(row_peak, tile.rows, *std::max_element(row_peak, row_peak + tile.rows));
    std::fill_n(column_peak, kTileColumns, row_peak[0]);
    sum_exponentials<M, true>(tile, row_peak, column_peak, row_sum, column_sum);
  } else {
    sum_exponentials<M, false>(tile, row_peak, column_peak, row_sum, column_sum);
  }
}

// Writes the partial sum of log(1 + exp s) of every row of a tile.
template <class M, class T>
CLSP_INLINE void sum_softplus(const Pass<T>& pass, const Tile<T>& tile) {
  using V = typename M::Vector;
  const std::size_t columns = round_up(tile.columns, M::kColumns);
  T* const row_sum =
      pass.workspace.partial_row_sum.data() + tile.column_tile * kPanelRows + tile.first_row;
  for (std::size_t r = 0; r < tile.rows; ++r) {
    V sum{};
    for (std::size_t c = 0; c < columns; c += M::kLanes) {
      const V s = load<V>(tile.logits + r * kTileColumns + c);
      sum += (s < T{0} ? V{} : s) + log1p_lanes(exp_lanes(s < T{0} ? s : -s));
    }
    row_sum[r] = sum_of_lanes(sum);
  }
}

template <class M, class T>
CLSP_INLINE void sum_tile(const Pass<T>& pass, const Tile<T>& tile) {
  compute_logits<M>(pass, tile);
  if (pass.pairs.kind == NegativesKind::kSoftmax) {
    sum_softmax<M>(pass, tile);
  } else {
    sum_softplus<M>(pass, tile);
  }
}

// Adds the results of a panel's tiles to those of the panels before it.
template <class M, class T>
CLSP_INLINE void add_panel(const Pass<T>& pass) {
  using V = typename M::Vector;
  Workspace<T>& w = pass.workspace;
  const bool softmax = pass.pairs.kind == NegativesKind::kSoftmax;
  for (std::size_t column_tile = 0; column_tile < pass.column_tiles(); ++column_tile) {
    for (std::size_t r = 0; r < pass.rows; r += M::kLanes) {
      const std::size_t row = pass.first_row + r, part = column_tile * kPanelRows + r;
      if (softmax) {
        add_partial<T, V>(w.row_peak.data() + row, w.row_sum.data() + row,
                          w.partial_row_peak.data() + part, w.partial_row_sum.data() + part);
      } else {
        T* const sum = w.row_sum.data() + row;
        store(sum, load<V>(sum) + load<V>(w.partial_row_sum.data() + part));
      }
    }
  }
  if (!softmax) return;
  for (std::size_t row_tile = 0; row_tile < pass.row_tiles(); ++row_tile) {
    for (std::size_t c = 0; c < pass.columns; c += M::kLanes) {
      const std::size_t column = pass.first_column + c, part = row_tile * kPanelColumns + c;
      add_partial<T, V>(w.column_peak.data() + column, w.column_sum.data() + column,
                        w.partial_column_peak.data() + part, w.partial_column_sum.data() + part);
    }
  }
}

}  // namespace clsp
