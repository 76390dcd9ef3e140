// One tile of a product of matrices, whose numbers do not depend on where the tile lies.
//
// score(i, j) = sum over k of a[i][k] b[j][k], added up from k = 0 on in one chain of
// multiply-adds. Nothing else enters it: the same two rows have the same score, bit for bit, in
// whatever tile, beside whatever rows and in whichever thread they meet.
#pragma once

#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "checked.h"
#include "simd.h"

namespace clsp {

// A matrix in rows without gaps.
struct Matrix {
  const float* data = nullptr;
  std::size_t rows = 0, depth = 0;

  const float* row(std::size_t i) const { return data + i * depth; }
};

// The sums of a tile fill 24 of 32 registers, or 12 of 16; the rest holds what they are made of.
template <int L>
struct alignas(64) Tile {
  static constexpr int kRows = L == 16 ? 8 : 6;
  static constexpr int kVectors = L == 16 ? 3 : 2;
  static constexpr int kColumns = kVectors * L;
  float scores[kRows][kColumns];
};

// Up to kColumns rows of b, column by column as `multiply` reads them. Columns without a row are
// NaN: their scores are NaN, which is neither greater than nor equal to anything.
template <int L>
CLSP_INLINE void pack(const Matrix& b, std::size_t first, float* panel) {
  constexpr std::size_t kColumns = Tile<L>::kColumns;
  for (std::size_t c = 0; c < kColumns; ++c) {
    const bool there = first + c < b.rows;
    const float* row = there ? b.row(first + c) : nullptr;
    for (std::size_t k = 0; k < b.depth; ++k) {
      panel[k * kColumns + c] = there ? row[k] : std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// Scores of the kRows rows from `a` on with the columns of a panel.
template <int L>
CLSP_INLINE void multiply(const float* a, std::size_t depth, const float* panel, Tile<L>& tile) {
  using T = Tile<L>;
  using Float = typename Lanes<L>::Float;
  Float sums[T::kRows][T::kVectors] = {};
  for (std::size_t k = 0; k < depth; ++k, panel += T::kColumns) {
    Float b[T::kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < T::kVectors; ++v) b[v] = load<Float>(panel + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < T::kRows; ++r) {
      // Minus 0: a broadcast that is a load. broadcast() adds 0, for which -0 is not neutral.
      const Float x = a[static_cast<std::size_t>(r) * depth + k] - Float{};
#pragma GCC unroll 3
      for (int v = 0; v < T::kVectors; ++v) sums[r][v] += x * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < T::kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < T::kVectors; ++v) store(tile.scores[r] + v * L, sums[r][v]);
  }
}

// The rows of a matrix, kRows at a time; behind the last one there are rows of NaN.
template <int L>
class RowBlocks {
 public:
  explicit RowBlocks(const Matrix& a) : a_(a), last_(0) {
    const std::size_t rest = a.rows % Tile<L>::kRows;
    if (rest == 0) return;
    last_.assign(checked_multiply(Tile<L>::kRows, a.depth),
                 std::numeric_limits<float>::quiet_NaN());
    std::memcpy(last_.data(), a.row(a.rows - rest), rest * a.depth * sizeof(float));
  }
  const float* operator[](std::size_t first) const {
    return first + Tile<L>::kRows <= a_.rows ? a_.row(first) : last_.data();
  }

 private:
  const Matrix& a_;
  std::vector<float> last_;
};

}  // namespace clsp
