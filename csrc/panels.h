// Products of matrices from packed panels, with an order of addition that nothing outside decides.
//
// The innermost loop multiplies kRows values, one a row, with two vectors of columns, for one k
// after the other: every element of a product is a chain of multiply-adds over k, in whatever
// thread it is computed. Operands are packed first, so that the loop reads memory in order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <new>

#include "checked.h"
#include "simd.h"

namespace clsp {

// A micro-tile of a product: 24 of 32 registers hold sums, or 12 of 16.
template <class T, int L>
struct Micro {
  typedef T Vector __attribute__((vector_size(L * sizeof(T))));
  static constexpr std::size_t kRows = sizeof(Vector) == 64 ? 12 : 6;
  static constexpr std::size_t kColumns = 2 * L;
};

// Columns are rounded up to whole micro-tiles of every size.
inline constexpr std::size_t kLargestColumns = 32;

inline constexpr std::size_t kAhead = 12;  // how many k the loop prefetches

inline std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }
inline std::size_t round_up(std::size_t a, std::size_t b) { return divide_up(a, b) * b; }

template <class V, class T>
CLSP_INLINE V splat(T x) {
  return x - V{};
}

template <class V>
CLSP_INLINE V larger(const V& a, const V& b) {
  return a > b ? a : b;
}

template <class T, class V>
CLSP_INLINE T sum_of_lanes(const V& v) {
  T sum = v[0];
  for (std::size_t l = 1; l < sizeof(V) / sizeof(T); ++l) sum += v[l];
  return sum;
}

template <class T, class V>
CLSP_INLINE T largest_lane(const V& v) {
  T most = v[0];
  for (std::size_t l = 1; l < sizeof(V) / sizeof(T); ++l) most = v[l] > most ? v[l] : most;
  return most;
}

// In double these serve checks of gradients, where speed does not matter.
template <class T, class V>
CLSP_INLINE V exp_lanes(const V& x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return exp_bounded(x);
  } else {
    V y = x;
    for (std::size_t l = 0; l < sizeof(V) / sizeof(T); ++l) y[l] = std::exp(x[l]);
    return y;
  }
}

template <class T, class V>
CLSP_INLINE V log1p_lanes(const V& x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return log1p_unit(x);
  } else {
    V y = x;
    for (std::size_t l = 0; l < sizeof(V) / sizeof(T); ++l) y[l] = std::log1p(x[l]);
    return y;
  }
}

// sums[r][c] = sum over k of a[r * RowStep + k * DepthStep] b[k * kColumns + c]
template <std::size_t RowStep, std::size_t DepthStep, int L, class T>
CLSP_INLINE void multiply(const T* a, const T* b, std::size_t depth,
                          typename Micro<T, L>::Vector (*sums)[2]) {
  using M = Micro<T, L>;
  using V = typename M::Vector;
  V s[M::kRows][2] = {};
  for (std::size_t k = 0; k < depth; ++k, a += DepthStep, b += M::kColumns) {
    __builtin_prefetch(b + kAhead * M::kColumns);  // worth 3 %: b comes from the second cache
    __builtin_prefetch(b + kAhead * M::kColumns + L);
    const V left = load<V>(b), right = load<V>(b + L);
#pragma GCC unroll 12
    for (std::size_t r = 0; r < M::kRows; ++r) {
      s[r][0] += left * a[r * RowStep];
      s[r][1] += right * a[r * RowStep];
    }
  }
#pragma GCC unroll 12
  for (std::size_t r = 0; r < M::kRows; ++r) {
    sums[r][0] = s[r][0];
    sums[r][1] = s[r][1];
  }
}

// Writes the sums of a micro-tile to its place in a matrix, or adds them to what is there; rows and
// columns beyond the matrix are dropped.
template <int L, class T>
CLSP_INLINE void put(const typename Micro<T, L>::Vector (*sums)[2], T* out, std::size_t stride,
                     std::size_t rows, std::size_t columns, bool add) {
  using M = Micro<T, L>;
  using V = typename M::Vector;
  rows = std::min(rows, M::kRows);
  for (std::size_t r = 0; r < rows; ++r, out += stride) {
    if (columns >= M::kColumns) {
      for (std::size_t half = 0; half < 2; ++half) {
        T* const p = out + half * L;
        store(p, add ? load<V>(p) + sums[r][half] : sums[r][half]);
      }
    } else {
      for (std::size_t c = 0; c < columns; ++c) {
        const T sum = sums[r][c / L][c % L];
        out[c] = add ? out[c] + sum : sum;
      }
    }
  }
}

// Memory in whole cache lines, not cleared.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t size)
      : data_(static_cast<T*>(::operator new(checked_multiply(size, sizeof(T)), kLine))) {}
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

// A matrix of embeddings in rows without gaps, as the caller has it.
enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };
struct Embeddings {
  const void* data;
  Dtype dtype;
  std::size_t rows, depth;
};

// Row `row` in the precision of the computation.
template <class T>
void read_row(const Embeddings& matrix, std::size_t row, T* out);

// Rows first .. first + count - 1 times `factor`, `width` rows beside each other: element k of row
// w of a panel is at [k * width + w]. Rows that are missing in the last panel are 0. `line` holds
// one row.
template <class T>
void pack_beside(const Embeddings& matrix, std::size_t first, std::size_t count, std::size_t width,
                 T factor, T* line, T* out);

// The same rows above each other, in panels of `width` columns and `height` rows: element c of row
// k of a panel is at [k * width + c]. Columns that are missing in the last panel are 0.
template <class T>
void pack_above(const Embeddings& matrix, std::size_t first, std::size_t count, std::size_t width,
                std::size_t height, T* line, T* out);

}  // namespace clsp
