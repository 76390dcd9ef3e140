// Shared by the forward and the backward pass of contrastive.cpp: memory, packing, and the logits
// of a tile.
//
// The functions here, in contrastive_forward.h and in contrastive_backward.h run within one task. M
// is the type of the micro-tile, which determines the element type and the size of vectors.
#pragma once

#include <array>
#include <limits>

#include "contrastive.h"
#include "micro_tile.h"
#include "threads.h"

namespace clsp {

inline constexpr std::size_t kTileLogits = kTileRows * kTileColumns;
// The largest number of rows and columns of tiles in a panel.
inline constexpr std::size_t kPanelRowTiles = kPanelRows / kTileRows;
inline constexpr std::size_t kPanelColumnTiles = kPanelColumns / kTileColumns;
// The rows of audio or text in one task that packs them or adds to their gradient.
inline constexpr std::size_t kTaskRows = kTileRows;

// The sums fill 24 of 32 vector registers, or 12 of 16; the other registers hold the operands.
template <class T, std::size_t Bytes>
using LogitMicroTile = MicroTile<T, Bytes, Bytes == 64 ? 12 : 6, 2>;

// Depths are rounded up to a multiple of this, and so of the columns of every micro-tile.
inline constexpr std::size_t kDepthMultiple = 32;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// A logit is the sum of chains of this many products. In one chain of 512 products, a logit of 100
// would have a rounding error of up to 1e-5.
inline constexpr std::size_t kChain = 128;

// One exponential serves both a row and a column if all peaks of the tile are this close to the
// largest peak, or all normalisers to the middle between the lowest and the highest. The arguments
// of its largest terms are then about 16 at most, so their rounding error is 5e-7 at most.
template <class T>
constexpr T kClose = 16;

template <class T>
struct Workspace {
  std::size_t depth;  // of the operands packed by columns: a multiple of kDepthMultiple
  Buffer<T> audio_by_rows, audio_by_columns, text_by_rows, text_by_columns;
  Buffer<T> logits;                   // of a panel, tile by tile; the backward pass writes G here
  Buffer<T> row_peak, row_sum;        // of every row, over the panels so far
  Buffer<T> column_peak, column_sum;  // of every column, over the panels so far
  // Of one panel: results of its rows in each column of tiles, and of its columns in each row of
  // tiles.
  Buffer<T> partial_row_peak, partial_row_sum;
  Buffer<T> partial_column_peak, partial_column_sum;
  std::array<double, kPanelColumnTiles * kPanelRowTiles> gradient_sum;  // of each tile of a panel

  Workspace(const Negatives<T>& pairs, bool backward)
      : depth(round_up(pairs.audio.depth, kDepthMultiple)),
        audio_by_rows(panel_rows(pairs) * depth),
        audio_by_columns(backward ? round_up(panel_rows(pairs), kTileColumns) * depth : 0),
        text_by_rows(panel_columns(pairs) * depth),
        text_by_columns(backward ? panel_columns(pairs) * depth : 0),
        logits(panel_rows(pairs) * panel_columns(pairs)),
        row_peak(round_up(pairs.audio.rows, kPanelRows)),
        row_sum(round_up(pairs.audio.rows, kPanelRows)),
        column_peak(round_up(pairs.text.rows, kPanelColumns)),
        column_sum(round_up(pairs.text.rows, kPanelColumns)),
        partial_row_peak(backward ? 0 : kPanelColumnTiles * kPanelRows),
        partial_row_sum(backward ? 0 : kPanelColumnTiles * kPanelRows),
        partial_column_peak(backward ? 0 : kPanelRowTiles * kPanelColumns),
        partial_column_sum(backward ? 0 : kPanelRowTiles * kPanelColumns),
        gradient_sum{} {}

  static std::size_t panel_rows(const Negatives<T>& pairs) {
    return std::min(kPanelRows, round_up(pairs.audio.rows, kTileRows));
  }
  static std::size_t panel_columns(const Negatives<T>& pairs) {
    return std::min(kPanelColumns, round_up(pairs.text.rows, kTileColumns));
  }
};

template <class T>
struct Tile {
  std::size_t row_tile, column_tile;    // position in the panel, in tiles
  std::size_t first_row, first_column;  // position in the panel, in logits
  std::size_t rows, columns;            // within the matrix: fewer at its edges
  T* logits;
  T* gradient;  // G; in the memory of the logits, unless they are kept
};

// The data that all tasks of a pass share.
template <class T>
struct Pass {
  const Negatives<T>& pairs;
  Workspace<T>& workspace;
  ThreadPool& pool;
  T* kept;
  std::size_t kept_row_tiles;
  PerRowAndColumn<const T> out, d_out;  // backward only
  T *d_audio, *d_text;                  // null if not wanted; both null in a forward pass
  // The current panel.
  std::size_t first_row = 0, rows = 0, first_column = 0, columns = 0;

  bool backward() const { return d_audio != nullptr || d_text != nullptr; }
  std::size_t row_tiles() const { return divide_up(rows, kTileRows); }
  std::size_t column_tiles() const { return divide_up(columns, kTileColumns); }
  std::size_t tiles() const { return row_tiles() * column_tiles(); }
  bool is_kept(std::size_t row_tile) const {
    return first_row / kTileRows + row_tile < kept_row_tiles;
  }

  // The memory of a tile in the workspace. The tiles of one column of tiles follow each other:
  // together they are one matrix with rows of kTileColumns elements.
  T* tile_workspace(std::size_t row_tile, std::size_t column_tile) const {
    return workspace.logits.data() + column_tile * Workspace<T>::panel_rows(pairs) * kTileColumns +
           row_tile * kTileLogits;
  }

  // Tile number `i` of the panel. Tiles are numbered column by column.
  Tile<T> tile(std::size_t i) const {
    const std::size_t row_tile = i % row_tiles(), column_tile = i / row_tiles();
    const std::size_t row = row_tile * kTileRows, column = column_tile * kTileColumns;
    T* const work = tile_workspace(row_tile, column_tile);
    T* logits = work;
    if (is_kept(row_tile)) {
      const std::size_t all_column_tiles = divide_up(pairs.text.rows, kTileColumns);
      logits = kept + ((first_row / kTileRows + row_tile) * all_column_tiles +
                       first_column / kTileColumns + column_tile) *
                          kTileLogits;
    }
    return {row_tile,
            column_tile,
            row,
            column,
            std::min(kTileRows, rows - row),
            std::min(kTileColumns, columns - column),
            logits,
            work};
  }
};

// Packs `matrix`, the panel's rows from `first` on, for the products of the backward pass.
template <class M, class T>
CLSP_INLINE void pack_panel_columns(const Pass<T>& pass, const Matrix<T>& matrix, std::size_t first,
                                    Buffer<T>& out) {
  pack_columns(matrix, M::kColumns, kTileColumns,
               out.data() + first / kTileColumns * kTileColumns * pass.workspace.depth +
                   first % kTileColumns * M::kColumns);
}

// Packs kTaskRows rows of the panel's audio. Logits that are not kept need them by rows, multiplied
// by the scale; the backward pass needs them by columns.
template <class M, class T>
CLSP_INLINE void pack_audio(const Pass<T>& pass, std::size_t task) {
  const std::size_t first = task * kTaskRows;
  const Matrix<T> audio = pass.pairs.audio.part(pass.first_row + first, kTaskRows);
  if (!pass.backward() || !pass.is_kept(task)) {
    pack_rows(audio, M::kRows, pass.pairs.scale, T{0},
              pass.workspace.audio_by_rows.data() + first * audio.depth);
  }
  if (pass.backward()) {
    pack_panel_columns<M>(pass, audio, first, pass.workspace.audio_by_columns);
  }
}

template <class M, class T>
CLSP_INLINE void pack_text(const Pass<T>& pass, std::size_t task) {
  const std::size_t first = task * kTaskRows;
  const Matrix<T> text = pass.pairs.text.part(pass.first_column + first, kTaskRows);
  pack_rows(text, M::kColumns, T{1}, T{0}, pass.workspace.text_by_rows.data() + first * text.depth);
  if (pass.backward()) pack_panel_columns<M>(pass, text, first, pass.workspace.text_by_columns);
}

// Sets the logits of positive pairs to -infinity.
template <class T>
CLSP_INLINE void mask_positives(const Pass<T>& pass, const Tile<T>& tile) {
  const std::size_t first_row = pass.first_row + tile.first_row;
  const std::int64_t* const owner = pass.pairs.owner.data() + pass.first_column + tile.first_column;
  for (std::size_t c = 0; c < tile.columns; ++c) {
    // An owner before the tile's first row wraps around to a large number.
    const auto row = static_cast<std::uint64_t>(owner[c]) - first_row;
    if (row < tile.rows) tile.logits[row * kTileColumns + c] = -kInfinity<T>;
  }
}

// Computes the logits of a tile. They are -infinity for positive pairs, and for columns after the
// last text up to the end of the micro-tile.
template <class M, class T>
CLSP_INLINE void compute_logits(const Pass<T>& pass, const Tile<T>& tile) {
  using V = typename M::Vector;
  constexpr std::size_t L = M::kLanes;
  const std::size_t depth = pass.pairs.audio.depth;
  const std::size_t padded = round_up(tile.columns, M::kColumns);
  T* const logits = tile.logits;
  for (std::size_t r = 0; r < tile.rows; r += M::kRows) {
    const T* const a = pass.workspace.audio_by_rows.data() + (tile.first_row + r) * depth;
    for (std::size_t c = 0; c < padded; c += M::kColumns) {
      const T* const b = pass.workspace.text_by_rows.data() + (tile.first_column + c) * depth;
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
          store(logits + (r + q) * kTileColumns + c + l, load<V>(m.sums[q] + l) + pass.pairs.bias);
        }
      }
    }
    for (std::size_t q = r; q < r + M::kRows; ++q) {
      std::fill(logits + q * kTileColumns + tile.columns, logits + q * kTileColumns + padded,
                -kInfinity<T>);
    }
  }
  mask_positives(pass, tile);
}

}  // namespace clsp
