// Row-major matrices, and their packing for the micro-kernel of micro_tile.h.
#pragma once

#include <algorithm>
#include <cstddef>

#include "buffers.h"

namespace clsp {

inline std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }
inline std::size_t round_up(std::size_t a, std::size_t b) { return divide_up(a, b) * b; }

// A view of a row-major matrix without gaps between its rows.
template <class T>
struct Matrix {
  const T* data;
  std::size_t rows, depth;

  const T* row(std::size_t i) const { return data + i * depth; }
  // Rows from `first` on, at most `count`.
  Matrix part(std::size_t first, std::size_t count) const {
    return {row(first), std::min(count, rows - first), depth};
  }
};

// Packs `factor` times the matrix into strips of `width` rows: element k of row r of a strip is at
// [k * width + r]. Missing rows of the last strip are `filler`.
template <class T>
void pack_rows(const Matrix<T>& matrix, std::size_t width, T factor, T filler, T* out) {
  for (std::size_t r = 0; r < round_up(matrix.rows, width); ++r) {
    T* const to = out + r / width * width * matrix.depth + r % width;
    if (r < matrix.rows) {
      const T* const row = matrix.row(r);
      for (std::size_t k = 0; k < matrix.depth; ++k) to[k * width] = row[k] * factor;
    } else {
      for (std::size_t k = 0; k < matrix.depth; ++k) to[k * width] = filler;
    }
  }
}

// Packs the matrix into strips of `width` columns with room for `height` rows: element c of row k
// of a strip is at [k * width + c]. Missing columns of the last strip are 0.
template <class T>
void pack_columns(const Matrix<T>& matrix, std::size_t width, std::size_t height, T* out) {
  for (std::size_t r = 0; r < matrix.rows; ++r) {
    const T* const row = matrix.row(r);
    T* to = out + r * width;
    for (std::size_t c = 0; c < matrix.depth; c += width, to += height * width) {
      std::fill(std::copy_n(row + c, std::min(width, matrix.depth - c), to), to + width, T{0});
    }
  }
}

}  // namespace clsp
