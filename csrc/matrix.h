// Matrices as the caller has them, and packed for the micro-kernel of micro_tile.h.
#pragma once

#include <algorithm>
#include <cstddef>

#include "buffers.h"

namespace clsp {

inline std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }
inline std::size_t round_up(std::size_t a, std::size_t b) { return divide_up(a, b) * b; }

// A matrix in rows without gaps.
template <class T>
struct Matrix {
  const T* data;
  std::size_t rows, depth;

  const T* row(std::size_t i) const { return data + i * depth; }
  // At most `count` rows from `first` on.
  Matrix part(std::size_t first, std::size_t count) const {
    return {row(first), std::min(count, rows - first), depth};
  }
};

// The rows of a matrix times `factor`, `width` of them beside each other: element k of row w of a
// panel is at [k * width + w]. Rows that are missing in the last panel are `filler`.
template <class T>
void pack_beside(const Matrix<T>& matrix, std::size_t width, T factor, T filler, T* out) {
  for (std::size_t r = 0; r < round_up(matrix.rows, width); ++r) {
    T* const column = out + r / width * width * matrix.depth + r % width;
    if (r < matrix.rows) {
      const T* const row = matrix.row(r);
      for (std::size_t k = 0; k < matrix.depth; ++k) column[k * width] = row[k] * factor;
    } else {
      for (std::size_t k = 0; k < matrix.depth; ++k) column[k * width] = filler;
    }
  }
}

// The rows above each other, in panels of `width` columns and `height` rows: element c of row k of
// a panel is at [k * width + c]. Columns that are missing in the last panel are 0.
template <class T>
void pack_above(const Matrix<T>& matrix, std::size_t width, std::size_t height, T* out) {
  for (std::size_t r = 0; r < matrix.rows; ++r) {
    const T* const row = matrix.row(r);
    T* to = out + r * width;
    for (std::size_t c = 0; c < matrix.depth; c += width, to += height * width) {
      std::fill(std::copy_n(row + c, std::min(width, matrix.depth - c), to), to + width, T{0});
    }
  }
}

}  // namespace clsp
