// The micro-kernel of matrix products. It computes one micro-tile, whose sums stay in registers.
//
// Each element of a product is one chain of multiply-adds over k, from k = 0 on. The product of two
// rows is therefore the same, bit for bit, in every micro-tile of the same instruction set.
#pragma once

#include <cstddef>

#include "simd.h"

namespace clsp {

template <class T, std::size_t Bytes, std::size_t Rows, std::size_t Vectors>
struct alignas(64) MicroTile {
  using Element = T;
  typedef T Vector __attribute__((vector_size(Bytes)));
  static constexpr std::size_t kLanes = Bytes / sizeof(T), kRows = Rows;
  static constexpr std::size_t kColumns = Vectors * kLanes;
  T sums[kRows][kColumns];
};

// The packed operand lies in the second-level cache. It is prefetched this many steps of k before
// it is used.
inline constexpr std::size_t kPrefetchDistance = 12;

// tile.sums[r][c] = sum over k of a[r * row_step + k * depth_step] b[k * kColumns + c]
template <class T, std::size_t Bytes, std::size_t Rows, std::size_t Vectors>
CLSP_INLINE void multiply(const T* a, std::size_t row_step, std::size_t depth_step, const T* b,
                          std::size_t depth, MicroTile<T, Bytes, Rows, Vectors>& tile) {
  using M = MicroTile<T, Bytes, Rows, Vectors>;
  using V = typename M::Vector;
  V sums[Rows][Vectors] = {};
  for (std::size_t k = 0; k < depth; ++k, a += depth_step, b += M::kColumns) {
    V right[Vectors];
#pragma GCC unroll 3
    for (std::size_t v = 0; v < Vectors; ++v) {
      __builtin_prefetch(b + kPrefetchDistance * M::kColumns + v * M::kLanes);
      right[v] = load<V>(b + v * M::kLanes);
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
    for (std::size_t v = 0; v < Vectors; ++v) store(tile.sums[r] + v * M::kLanes, sums[r][v]);
  }
}

}  // namespace clsp
