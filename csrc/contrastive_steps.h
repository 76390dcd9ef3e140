// The steps of a pass over the logits of a contrastive batch: what one thread does with one unit of
// work, for any element type and number of lanes. contrastive.cpp puts them in order.
#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "contrastive.h"
#include "micro_tile.h"
#include "simd_math.h"
#include "threads.h"

namespace clsp {

inline constexpr std::size_t kTilesInBlock = kBlock / kTile, kUnitsInPanel = kPanel / kUnit;
inline constexpr std::size_t kUnitLogits = kUnit * kTile;

// Depths are rounded up to whole micro-tiles of every size.
inline constexpr std::size_t kMostColumns = 32;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Products in one chain of additions: one of 512 would round a logit of 100 to as much as 1e-5.
inline constexpr std::size_t kChain = 128;

// One exponential serves a row and a column whose normalisers are this close to each other: its
// argument is then small enough to be rounded to 5e-7.
template <class T>
constexpr T kClose = 16;

// A maximum to subtract; where there is nothing to sum, exp(-infinity - 0) is the 0 that is wanted.
template <class T, class V>
CLSP_INLINE V shift_of(const V& most) {
  return most == -kInfinity<T> ? V{} : most;
}

// Takes (most, sum) of other elements up into those of a log-sum-exp.
template <class T, class V>
CLSP_INLINE void merge(T* most, T* sum, const T* other_most, const T* other_sum) {
  const V a = load<V>(most), b = load<V>(other_most);
  const V m = larger(a, b), shift = shift_of<T>(m);
  store(sum, load<V>(sum) * exp_lanes(a - shift) + load<V>(other_sum) * exp_lanes(b - shift));
  store(most, m);
}

// Memory that a pass works in, beside its arguments.
template <class T>
struct Scratch {
  std::size_t depth;  // rounded up to micro-tiles
  Buffer<T> audio_beside, audio_above, text_beside, text_above;
  Buffer<T> logits;                             // a panel times a block, tile by tile
  Buffer<T> row_most, row_sum;                  // of every audio row so far
  Buffer<T> column_most, column_sum;            // of every text so far
  Buffer<T> tile_row_most, tile_row_sum;        // of the rows of a panel, for each tile of a block
  Buffer<T> unit_column_most, unit_column_sum;  // of the columns of a block, for each unit
  std::array<double, kTilesInBlock * kUnitsInPanel> gradient_sum;

  Scratch(const Negatives<T>& pairs, bool backward)
      : depth(round_up(pairs.audio.depth, kMostColumns)),
        audio_beside(panel(pairs) * depth),
        audio_above(backward ? round_up(panel(pairs), kTile) * depth : 0),
        text_beside(block(pairs) * depth),
        text_above(backward ? block(pairs) * depth : 0),
        logits(panel(pairs) * block(pairs)),
        row_most(round_up(pairs.audio.rows, kPanel)),
        row_sum(round_up(pairs.audio.rows, kPanel)),
        column_most(round_up(pairs.text.rows, kBlock)),
        column_sum(round_up(pairs.text.rows, kBlock)),
        tile_row_most(backward ? 0 : kTilesInBlock * kPanel),
        tile_row_sum(backward ? 0 : kTilesInBlock * kPanel),
        unit_column_most(backward ? 0 : kUnitsInPanel * kBlock),
        unit_column_sum(backward ? 0 : kUnitsInPanel * kBlock),
        gradient_sum{} {}

  static std::size_t panel(const Negatives<T>& pairs) {
    return std::min(kPanel, round_up(pairs.audio.rows, kUnit));
  }
  static std::size_t block(const Negatives<T>& pairs) {
    return std::min(kBlock, round_up(pairs.text.rows, kTile));
  }
};

// What the steps of a pass read and write.
template <class T>
struct Pass {
  const Negatives<T>& pairs;
  Scratch<T>& scratch;
  ThreadPool& pool;
  T* kept;
  std::size_t kept_units;
  PerRowAndColumn<const T> out, d_out;  // backward only
  T *d_audio, *d_text;                  // null for what is not wanted; both in a forward pass
  std::size_t first_row = 0, rows = 0, first_column = 0, columns = 0;  // of the panel and block

  bool backward() const { return d_audio != nullptr || d_text != nullptr; }
  std::size_t tiles() const { return divide_up(columns, kTile); }
  std::size_t units() const { return divide_up(rows, kUnit); }
  std::size_t rows_of(std::size_t unit) const { return std::min(kUnit, rows - unit * kUnit); }
  std::size_t columns_of(std::size_t tile) const { return std::min(kTile, columns - tile * kTile); }
  // Where a tile of the panel and block is worked on.
  T* work(std::size_t tile, std::size_t unit) const {
    return scratch.logits.data() + tile * Scratch<T>::panel(pairs) * kTile + unit * kUnitLogits;
  }
  bool is_kept(std::size_t unit) const { return first_row / kUnit + unit < kept_units; }
  // Where its logits are: kept, or where they are worked on.
  T* logits(std::size_t tile, std::size_t unit) const {
    if (!is_kept(unit)) return work(tile, unit);
    const std::size_t all_tiles = divide_up(pairs.text.rows, kTile);
    return kept +
           ((first_row / kUnit + unit) * all_tiles + first_column / kTile + tile) * kUnitLogits;
  }
};

// What the gradient of a tile needs of its rows and columns; columns without a text get none.
template <class T>
struct Factors {
  alignas(64) T row_shift[kUnit], d_row[kUnit], column_shift[kTile], d_column[kTile];

  void fill(const Pass<T>& pass, std::size_t row, std::size_t rows, std::size_t column,
            std::size_t columns) {
    const auto shift = [](T lse) { return lse == -kInfinity<T> ? T{0} : lse; };
    for (std::size_t r = 0; r < kUnit; ++r) {
      row_shift[r] = r < rows ? shift(pass.out.rows[row + r]) : T{0};
      d_row[r] = r < rows ? pass.d_out.rows[row + r] : T{0};
    }
    for (std::size_t c = 0; c < kTile; ++c) {
      column_shift[c] = c < columns ? shift(pass.out.columns[column + c]) : T{0};
      d_column[c] = c < columns ? pass.d_out.columns[column + c] : T{0};
    }
  }

  // The number in the middle of all shifts, or false where they are too far from each other for one
  // exponential to serve rows and columns.
  bool find_middle(std::size_t rows, std::size_t columns, T& middle) const {
    const auto row = std::minmax_element(row_shift, row_shift + rows);
    const auto column = std::minmax_element(column_shift, column_shift + columns);
    const T least = std::min(*row.first, *column.first);
    const T most = std::max(*row.second, *column.second);
    middle = least + (most - least) / 2;
    return most - least <= 2 * kClose<T>;
  }
};

template <class T, std::size_t Bytes>
struct Steps {
  // The sums fill 24 of 32 registers, or 12 of 16; the rest holds what they are made of.
  using M = MicroTile<T, Bytes, Bytes == 64 ? 12 : 6, 2>;
  using V = typename M::Vector;
  static constexpr std::size_t L = M::kLanes;
  const Pass<T>& pass;

  // Rows `from` and following of a panel or block, for add_to_*.
  CLSP_INLINE void pack_above_at(const Matrix<T>& rows, std::size_t from, Buffer<T>& out) const {
    const std::size_t depth = pass.scratch.depth;
    pack_above(rows, M::kColumns, kTile,
               out.data() + from / kTile * kTile * depth + from % kTile * M::kColumns);
  }

  CLSP_INLINE void pack_audio(std::size_t unit) const {
    Scratch<T>& s = pass.scratch;
    const std::size_t from = unit * kUnit;
    const Matrix<T> audio = pass.pairs.audio.part(pass.first_row + from, kUnit);
    if (!pass.backward() || !pass.is_kept(unit)) {
      pack_beside(audio, M::kRows, pass.pairs.scale, T{0},
                  s.audio_beside.data() + from * audio.depth);
    }
    if (pass.backward()) pack_above_at(audio, from, s.audio_above);
  }

  CLSP_INLINE void pack_text(std::size_t from) const {
    Scratch<T>& s = pass.scratch;
    const Matrix<T> text = pass.pairs.text.part(pass.first_column + from, kUnit);
    pack_beside(text, M::kColumns, T{1}, T{0}, s.text_beside.data() + from * text.depth);
    if (pass.backward()) pack_above_at(text, from, s.text_above);
  }

  // Logits of a tile; -infinity where a pair is positive or there is no text.
  CLSP_INLINE void score(std::size_t tile, std::size_t unit) const {
    const std::size_t depth = pass.pairs.audio.depth, rows = pass.rows_of(unit);
    const std::size_t columns = pass.columns_of(tile), padded = round_up(columns, M::kColumns);
    T* const logits = pass.logits(tile, unit);
    for (std::size_t r = 0; r < rows; r += M::kRows) {
      const T* const a = pass.scratch.audio_beside.data() + (unit * kUnit + r) * depth;
      for (std::size_t c = 0; c < padded; c += M::kColumns) {
        const T* const b = pass.scratch.text_beside.data() + (tile * kTile + c) * depth;
        M m;
        multiply(a, 1, M::kRows, b, std::min(kChain, depth), m);
        for (std::size_t k = kChain; k < depth; k += kChain) {
          M next;
          multiply(a + k * M::kRows, 1, M::kRows, b + k * M::kColumns, std::min(kChain, depth - k),
                   next);
          for (std::size_t q = 0; q < M::kRows; ++q) {
            for (std::size_t l = 0; l < M::kColumns; l += L) {
              store(m.sums[q] + l, load<V>(m.sums[q] + l) + load<V>(next.sums[q] + l));
            }
          }
        }
        for (std::size_t q = 0; q < M::kRows; ++q) {
          for (std::size_t l = 0; l < M::kColumns; l += L) {
            store(logits + (r + q) * kTile + c + l, load<V>(m.sums[q] + l) + pass.pairs.bias);
          }
        }
      }
      for (std::size_t q = r; q < r + M::kRows; ++q) {
        std::fill(logits + q * kTile + columns, logits + q * kTile + padded, -kInfinity<T>);
      }
    }
    const std::size_t first = pass.first_row + unit * kUnit;
    const std::int64_t* const owner = pass.pairs.owner.data() + pass.first_column + tile * kTile;
    for (std::size_t c = 0; c < columns; ++c) {
      const auto row = static_cast<std::uint64_t>(owner[c]) - first;  // wraps around if outside
      if (row < rows) logits[row * kTile + c] = -kInfinity<T>;
    }
  }

  // Maxima of a tile's rows and columns; returns whether all are close to the largest one.
  CLSP_INLINE bool find_most(std::size_t tile, std::size_t unit, T* row_most,
                             T* column_most) const {
    const T* const logits = pass.logits(tile, unit);
    const std::size_t rows = pass.rows_of(unit), columns = pass.columns_of(tile);
    std::fill_n(column_most, kTile, -kInfinity<T>);
    for (std::size_t r = 0; r < rows; ++r) {
      V most = splat<V>(-kInfinity<T>);
      for (std::size_t c = 0; c < columns; c += L) {
        const V s = load<V>(logits + r * kTile + c);
        most = larger(most, s);
        store(column_most + c, larger(load<V>(column_most + c), s));
      }
      row_most[r] = largest_lane(most);
    }
    const T most = *std::max_element(row_most, row_most + rows);
    const auto close = [most](T x) { return x >= most - kClose<T>; };
    return most > -kInfinity<T> && std::all_of(row_most, row_most + rows, close) &&
           std::all_of(column_most, column_most + columns, close);
  }

  // A number for every row and column of a tile, and the sum of exponentials relative to it.
  CLSP_INLINE void log_sums(std::size_t tile, std::size_t unit) const {
    const std::size_t rows = pass.rows_of(unit), at = tile * kPanel + unit * kUnit;
    T* const row_most = pass.scratch.tile_row_most.data() + at;
    T* const column_most = pass.scratch.unit_column_most.data() + unit * kBlock + tile * kTile;
    if (find_most(tile, unit, row_most, column_most)) {
      std::fill_n(row_most, rows, *std::max_element(row_most, row_most + rows));
      std::fill_n(column_most, kTile, row_most[0]);
      sum_exponentials<true>(tile, unit, row_most, column_most);
    } else {
      sum_exponentials<false>(tile, unit, row_most, column_most);
    }
  }

  template <bool Same>  // whether all of row_most and column_most are the same
  CLSP_INLINE void sum_exponentials(std::size_t tile, std::size_t unit, const T* row_most,
                                    const T* column_most) const {
    const T* const logits = pass.logits(tile, unit);
    const std::size_t columns = round_up(pass.columns_of(tile), M::kColumns);
    T* const row_sum = pass.scratch.tile_row_sum.data() + tile * kPanel + unit * kUnit;
    T* const column_sum = pass.scratch.unit_column_sum.data() + unit * kBlock + tile * kTile;
    std::fill_n(column_sum, kTile, T{0});
    for (std::size_t r = 0; r < pass.rows_of(unit); ++r) {
      const V shift = shift_of<T>(splat<V>(row_most[r]));
      V sum{};
      for (std::size_t c = 0; c < columns; c += L) {
        const V s = load<V>(logits + r * kTile + c), e = exp_lanes(s - shift);
        sum += e;
        V of_column = e;
        if constexpr (!Same) {
          of_column = exp_lanes(s - shift_of<T>(load<V>(column_most + c)));
        }
        store(column_sum + c, load<V>(column_sum + c) + of_column);
      }
      row_sum[r] = sum_of_lanes(sum);
    }
  }

  CLSP_INLINE void softplus_sums(std::size_t tile, std::size_t unit) const {
    const T* const logits = pass.logits(tile, unit);
    const std::size_t columns = round_up(pass.columns_of(tile), M::kColumns);
    T* const row_sum = pass.scratch.tile_row_sum.data() + tile * kPanel + unit * kUnit;
    for (std::size_t r = 0; r < pass.rows_of(unit); ++r) {
      V sum{};
      for (std::size_t c = 0; c < columns; c += L) {
        const V s = load<V>(logits + r * kTile + c);
        sum += (s < T{0} ? V{} : s) + log1p_lanes(exp_lanes(s < T{0} ? s : -s));
      }
      row_sum[r] = sum_of_lanes(sum);
    }
  }

  CLSP_INLINE void forward(std::size_t tile, std::size_t unit) const {
    score(tile, unit);
    if (pass.pairs.kind == NegativesKind::kSoftmax) {
      log_sums(tile, unit);
    } else {
      softplus_sums(tile, unit);
    }
  }

  // Takes the sums of a panel and block up into those of all rows and columns.
  CLSP_INLINE void combine() const {
    Scratch<T>& s = pass.scratch;
    const std::size_t first_row = pass.first_row, first_column = pass.first_column;
    for (std::size_t tile = 0; tile < pass.tiles(); ++tile) {
      for (std::size_t r = 0; r < pass.rows; r += L) {
        const std::size_t at = tile * kPanel + r;
        if (pass.pairs.kind == NegativesKind::kSigmoid) {
          T* const sum = s.row_sum.data() + first_row + r;
          store(sum, load<V>(sum) + load<V>(s.tile_row_sum.data() + at));
        } else {
          merge<T, V>(s.row_most.data() + first_row + r, s.row_sum.data() + first_row + r,
                      s.tile_row_most.data() + at, s.tile_row_sum.data() + at);
        }
      }
    }
    if (pass.pairs.kind == NegativesKind::kSigmoid) return;
    for (std::size_t unit = 0; unit < pass.units(); ++unit) {
      for (std::size_t c = 0; c < pass.columns; c += L) {
        const std::size_t at = unit * kBlock + c;
        merge<T, V>(s.column_most.data() + first_column + c, s.column_sum.data() + first_column + c,
                    s.unit_column_most.data() + at, s.unit_column_sum.data() + at);
      }
    }
  }

  // Turns a tile's logits into the gradient by them.
  CLSP_INLINE void softmax_gradient(std::size_t tile, std::size_t unit) const {
    const std::size_t rows = pass.rows_of(unit), columns = pass.columns_of(tile);
    Factors<T> f;
    f.fill(pass, pass.first_row + unit * kUnit, rows, pass.first_column + tile * kTile, columns);
    T middle;
    if (!f.find_middle(rows, columns, middle)) {
      multiply_exponentials<false>(tile, unit, f);
      return;
    }
    // Lanes beyond the tile's rows and columns: a factor that overflowed would make NaN of their 0.
    std::fill(f.row_shift + rows, f.row_shift + kUnit, middle);
    std::fill(f.column_shift + columns, f.column_shift + kTile, middle);
    for (std::size_t r = 0; r < rows; r += L) {
      const V factor = exp_lanes(middle - load<V>(f.row_shift + r));
      store(f.d_row + r, load<V>(f.d_row + r) * factor);
    }
    for (std::size_t c = 0; c < columns; c += L) {
      const V factor = exp_lanes(middle - load<V>(f.column_shift + c));
      store(f.d_column + c, load<V>(f.d_column + c) * factor);
    }
    std::fill_n(f.row_shift, rows, middle);
    multiply_exponentials<true>(tile, unit, f);
  }

  template <bool Same>  // whether the shifts of rows and columns are the same
  CLSP_INLINE void multiply_exponentials(std::size_t tile, std::size_t unit,
                                         const Factors<T>& f) const {
    const T* const logits = pass.logits(tile, unit);
    T* const out = pass.work(tile, unit);
    V total{};
    for (std::size_t r = 0; r < pass.rows_of(unit); ++r) {
      const V d_row = splat<V>(f.d_row[r]), shift = splat<V>(f.row_shift[r]);
      for (std::size_t c = 0; c < pass.columns_of(tile); c += L) {
        const V s = load<V>(logits + r * kTile + c), d_column = load<V>(f.d_column + c);
        const V e = exp_lanes(s - shift);
        V g;
        if constexpr (Same) {
          g = e * (d_row + d_column);
        } else {
          g = d_row * e + d_column * exp_lanes(s - load<V>(f.column_shift + c));
        }
        total += g;
        store(out + r * kTile + c, g);
      }
    }
    pass.scratch.gradient_sum[tile * kUnitsInPanel + unit] = sum_of_lanes(total);
  }

  CLSP_INLINE void sigmoid_gradient(std::size_t tile, std::size_t unit) const {
    const T* const logits = pass.logits(tile, unit);
    T* const out = pass.work(tile, unit);
    V total{};
    for (std::size_t r = 0; r < pass.rows_of(unit); ++r) {
      const V d_row = splat<V>(pass.d_out.rows[pass.first_row + unit * kUnit + r]);
      for (std::size_t c = 0; c < pass.columns_of(tile); c += L) {
        const V s = load<V>(logits + r * kTile + c), e = exp_lanes(s < T{0} ? s : -s);
        const V g = d_row * ((s < T{0} ? e : splat<V>(T{1})) / (e + T{1}));
        total += g;
        store(out + r * kTile + c, g);
      }
    }
    pass.scratch.gradient_sum[tile * kUnitsInPanel + unit] = sum_of_lanes(total);
  }

  CLSP_INLINE void gradient(std::size_t tile, std::size_t unit) const {
    if (!pass.is_kept(unit)) score(tile, unit);
    if (pass.pairs.kind == NegativesKind::kSoftmax) {
      softmax_gradient(tile, unit);
    } else {
      sigmoid_gradient(tile, unit);
    }
  }

  // Writes a tile to its place in a matrix, or adds it to what is there, as far as there are rows
  // and columns.
  static CLSP_INLINE void put(const M& m, T* out, std::size_t stride, std::size_t rows,
                              std::size_t columns, bool add) {
    columns = std::min(columns, M::kColumns);
    for (std::size_t r = 0; r < std::min(rows, M::kRows); ++r, out += stride) {
      for (std::size_t c = 0; c < columns; ++c) out[c] = add ? out[c] + m.sums[r][c] : m.sums[r][c];
    }
  }

  // Adds G text to the gradient of a unit's audio rows.
  CLSP_INLINE void add_to_audio(std::size_t unit) const {
    const std::size_t depth = pass.pairs.audio.depth;
    for (std::size_t tile = 0; tile < pass.tiles(); ++tile) {
      const bool add = pass.first_column + tile > 0;
      const T* const text = pass.scratch.text_above.data() + tile * kTile * pass.scratch.depth;
      for (std::size_t r = 0; r < pass.rows_of(unit); r += M::kRows) {
        T* const out = pass.d_audio + (pass.first_row + unit * kUnit + r) * depth;
        for (std::size_t d = 0; d < depth; d += M::kColumns) {
          M m;
          multiply(pass.work(tile, unit) + r * kTile, kTile, 1, text + d * kTile,
                   pass.columns_of(tile), m);
          put(m, out + d, depth, pass.rows_of(unit) - r, depth - d, add);
        }
      }
    }
  }

  // Adds G^T audio to the gradient of kUnit texts.
  CLSP_INLINE void add_to_text(std::size_t first) const {
    const std::size_t depth = pass.pairs.audio.depth, end = std::min(first + kUnit, pass.columns);
    for (std::size_t k = 0; k < pass.rows; k += kTile) {
      const bool add = pass.first_row + k > 0;
      const std::size_t count = std::min(kTile, pass.rows - k);
      const T* const audio = pass.scratch.audio_above.data() + k * pass.scratch.depth;
      const T* const g = pass.work(first / kTile, 0) + k * kTile + first % kTile;
      for (std::size_t c = first; c < end; c += M::kRows) {
        alignas(64) T beside[kTile * M::kRows];
        for (std::size_t i = 0; i < count; ++i) {
          for (std::size_t q = 0; q < M::kRows; ++q) {
            beside[i * M::kRows + q] = g[i * kTile + c - first + q];
          }
        }
        for (std::size_t d = 0; d < depth; d += M::kColumns) {
          M m;
          multiply(beside, 1, M::kRows, audio + d * kTile, count, m);
          put(m, pass.d_text + (pass.first_column + c) * depth + d, depth, end - c, depth - d, add);
        }
      }
    }
  }
};

}  // namespace clsp
