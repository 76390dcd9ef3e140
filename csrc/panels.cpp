#include "panels.h"

#include <cmath>

namespace clsp {
namespace {

float widen_bfloat16(std::uint16_t x) {
  return bits_of<float>(static_cast<std::uint32_t>(x) << 16);
}

float widen_float16(std::uint16_t x) {
  const auto magnitude = static_cast<std::uint32_t>(x & 0x7fff) << 13;
  // The exponent's bias is 112 larger in float32; multiplying also makes subnormals normal.
  const float finite = bits_of<float>(magnitude) * 5.192296858534828e33f;
  const float value =
      magnitude < (0x7c00u << 13) ? finite : bits_of<float>(magnitude | 0x7f800000u);
  return std::copysign(value, x & 0x8000 ? -1.0f : 1.0f);
}

template <class T>
const T* row_of(const Embeddings& matrix, std::size_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.depth;
}

}  // namespace

template <class T>
void read_row(const Embeddings& matrix, std::size_t row, T* out) {
  const std::size_t depth = matrix.depth;
  switch (matrix.dtype) {
    case Dtype::kFloat32:
      std::copy_n(row_of<float>(matrix, row), depth, out);
      break;
    case Dtype::kFloat64:
      std::transform(row_of<double>(matrix, row), row_of<double>(matrix, row) + depth, out,
                     [](double x) { return static_cast<T>(x); });
      break;
    case Dtype::kBFloat16:
      std::transform(row_of<std::uint16_t>(matrix, row), row_of<std::uint16_t>(matrix, row) + depth,
                     out, widen_bfloat16);
      break;
    case Dtype::kFloat16:
      std::transform(row_of<std::uint16_t>(matrix, row), row_of<std::uint16_t>(matrix, row) + depth,
                     out, widen_float16);
      break;
  }
}

template <class T>
void pack_beside(const Embeddings& matrix, std::size_t first, std::size_t count, std::size_t width,
                 T factor, T* line, T* out) {
  for (std::size_t r = 0; r < round_up(count, width); ++r) {
    T* const column = out + r / width * width * matrix.depth + r % width;
    if (r < count) {
      read_row(matrix, first + r, line);
      for (std::size_t k = 0; k < matrix.depth; ++k) column[k * width] = line[k] * factor;
    } else {
      for (std::size_t k = 0; k < matrix.depth; ++k) column[k * width] = 0;
    }
  }
}

template <class T>
void pack_above(const Embeddings& matrix, std::size_t first, std::size_t count, std::size_t width,
                std::size_t height, T* line, T* out) {
  const std::size_t panels = divide_up(matrix.depth, width);
  for (std::size_t r = 0; r < count; ++r) {
    read_row(matrix, first + r, line);
    std::fill(line + matrix.depth, line + panels * width, T{0});
    for (std::size_t p = 0; p < panels; ++p) {
      std::copy_n(line + p * width, width, out + (p * height + r) * width);
    }
  }
}

template void read_row(const Embeddings&, std::size_t, float*);
template void read_row(const Embeddings&, std::size_t, double*);
template void pack_beside(const Embeddings&, std::size_t, std::size_t, std::size_t, float, float*,
                          float*);
template void pack_beside(const Embeddings&, std::size_t, std::size_t, std::size_t, double, double*,
                          double*);
template void pack_above(const Embeddings&, std::size_t, std::size_t, std::size_t, std::size_t,
                         float*, float*);
template void pack_above(const Embeddings&, std::size_t, std::size_t, std::size_t, std::size_t,
                         double*, double*);

}  // namespace clsp
