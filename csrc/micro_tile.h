// The micro-kernel of products of matrices: one tile, with an order of addition that nothing
// outside decides.
//
// An element of a product is one chain of multiply-adds over k, from k = 0 on. Nothing else enters
// it: the same two rows have the same product, bit for bit, in whatever tile, beside whatever rows
// and in whichever thread they meet.
#pragma once

#include <cstddef>

#include "simd.h"

namespace clsp {

// The sums of a tile, kept in registers until they are complete.
template <class T, std::size_t Bytes, std::size_t Rows, std::size_t Vectors>
struct alignas(64) MicroTile {
  typedef T Vector __attribute__((vector_size(Bytes)));
  static constexpr std::size_t kLanes = Bytes / sizeof(T), kRows = Rows;
  static constexpr std::size_t kColumns = Vectors * kLanes;
  T sums[kRows][kColumns];
};

// How many k ahead of its use the packed operand is asked for: it comes from the second cache.
inline constexpr std::size_t kAhead = 12;

// tile.sums[r][c] = sum over k of a[r * row_step + k * depth_step] b[k * kColumns + c]
template <class T, std::size_t Bytes, std::size_t Rows, std::size_t Vectors>
CLSP_INLINE void multiply(const T* a, std::size_t row_step, std::size_t depth_step, const T* b,
                          std::size_t depth, MicroTile<T, Bytes, Rows, Vectors>& tile) {
  using Tile = MicroTile<T, Bytes, Rows, Vectors>;
  using V = typename Tile::Vector;
  V sums[Rows][Vectors] = {};
  for (std::size_t k = 0; k < depth; ++k, a += depth_step, b += Tile::kColumns) {
    V right[Vectors];
#pragma GCC unroll 3
    for (std::size_t v = 0; v < Vectors; ++v) {
      __builtin_prefetch(b + kAhead * Tile::kColumns + v * Tile::kLanes);
      right[v] = load<V>(b + v * Tile::kLanes);
    }
#pragma GCC unroll 12
    for (std::size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 3
      for (std::size_t v = 0; v < Vectors; ++v) sums[r][v] += right[v] * a[r * row_step];
    }
  }
#pragma GCC unroll 12
  for (std::size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 3
    for (std::size_t v = 0; v < Vectors; ++v) store(tile.sums[r] + v * Tile::kLanes, sums[r][v]);
  }
}

}  // namespace clsp
