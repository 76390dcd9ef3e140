#include "contrastive.h"

#include "contrastive_steps.h"
#include "threads.h"

namespace clsp {
namespace {

// Starting a thread costs more than this many multiply-adds.
constexpr std::size_t kSmall = std::size_t{1} << 23;

template <class T>
int threads_for(const Negatives<T>& pairs) {
  const std::size_t products = pairs.audio.rows * pairs.text.rows * pairs.audio.depth;
  return products < kSmall ? 1 : pairs.threads;
}

enum class Step { kPackAudio, kPackText, kForward, kCombine, kGradient, kToAudio, kToText };

// A step with one unit of work.
template <class T>
struct Work {
  const Pass<T>& pass;
  Step step;

  template <std::size_t Bytes>
  CLSP_INLINE void run(std::size_t i) const {
    const Steps<T, Bytes> steps{pass};
    const std::size_t units = pass.units();  // 0 before there is a panel
    switch (step) {
      case Step::kPackAudio:
        return steps.pack_audio(i);
      case Step::kPackText:
        return steps.pack_text(i * kUnit);
      case Step::kForward:
        return steps.forward(i / units, i % units);
      case Step::kCombine:
        return steps.combine();
      case Step::kGradient:
        return steps.gradient(i / units, i % units);
      case Step::kToAudio:
        return steps.add_to_audio(i);
      case Step::kToText:
        return steps.add_to_text(i * kUnit);
    }
  }
};

// Takes a step with units 0 .. count - 1 of work.
template <class T>
void take(const Pass<T>& pass, Step step, std::size_t count) {
  const Work<T> work{pass, step};
  pass.pool.for_each(count, [&](std::size_t i) { dispatch(pass.pairs.isa, work, i); });
}

// Calls `work` for every panel of every block, with its operands packed.
template <class T, class F>
void for_each_panel(Pass<T>& pass, const F& work) {
  const std::size_t all_rows = pass.pairs.audio.rows, all_columns = pass.pairs.text.rows;
  for (std::size_t column = 0; column < all_columns; column += kBlock) {
    pass.first_column = column;
    pass.columns = std::min(kBlock, all_columns - column);
    take(pass, Step::kPackText, divide_up(pass.columns, kUnit));
    for (std::size_t row = 0; row < all_rows; row += kPanel) {
      pass.first_row = row;
      pass.rows = std::min(kPanel, all_rows - row);
      take(pass, Step::kPackAudio, pass.units());
      work();
    }
  }
}

template <class T>
void log_sum(std::size_t count, const T* most, const T* sum, T* out) {
  std::transform(most, most + count, sum, out, [](T m, T s) { return m + std::log(s); });
}

template <class T>
double dot(const T* a, const T* b, std::size_t size) {
  std::array<T, 16> sums{};
  std::size_t i = 0;
  for (; i + 16 <= size; i += 16) {
    for (std::size_t l = 0; l < 16; ++l) sums[l] += a[i + l] * b[i + l];
  }
  for (; i < size; ++i) sums[i % 16] += a[i] * b[i];
  double sum = 0;
  for (const T x : sums) sum += static_cast<double>(x);
  return sum;
}

// From products with G to gradients: times the scale. Returns the sum of <matrix, product>.
template <class T>
double finish(ThreadPool& pool, T scale, const Matrix<T>& matrix, T* gradient) {
  const std::size_t depth = matrix.depth;
  Buffer<double> dots(matrix.rows);
  pool.for_each(divide_up(matrix.rows, kUnit), [&](std::size_t unit) {
    const std::size_t first = unit * kUnit, last = std::min(first + kUnit, matrix.rows);
    for (std::size_t row = first; row < last; ++row) {
      dots.data()[row] = dot(matrix.row(row), gradient + row * depth, depth);
    }
    std::for_each(gradient + first * depth, gradient + last * depth, [scale](T& x) { x *= scale; });
  });
  double sum = 0;
  for (std::size_t row = 0; row < matrix.rows; ++row) sum += dots.data()[row];
  return sum;
}

template <class T>
std::size_t kept_units(const Negatives<T>& pairs, std::size_t size) {
  return size / (divide_up(pairs.text.rows, kTile) * kUnitLogits);
}

}  // namespace

template <class T>
void sum_negatives(const Negatives<T>& pairs, PerRowAndColumn<T> out, Span<T> kept) {
  Scratch<T> scratch(pairs, false);
  ThreadPool pool(threads_for(pairs));
  Pass<T> pass{pairs, scratch, pool, kept.data(), kept_units<T>(pairs, kept.size()),
               {},    {},      {},   {}};
  const std::size_t rows = pairs.audio.rows, columns = pairs.text.rows;
  std::fill_n(scratch.row_most.data(), round_up(rows, kPanel), -kInfinity<T>);
  std::fill_n(scratch.row_sum.data(), round_up(rows, kPanel), T{0});
  std::fill_n(scratch.column_most.data(), round_up(columns, kBlock), -kInfinity<T>);
  std::fill_n(scratch.column_sum.data(), round_up(columns, kBlock), T{0});
  for_each_panel(pass, [&] {
    take(pass, Step::kForward, pass.tiles() * pass.units());
    take(pass, Step::kCombine, 1);
  });
  if (pairs.kind == NegativesKind::kSigmoid) {
    std::copy_n(scratch.row_sum.data(), rows, out.rows.data());
    return;
  }
  log_sum(rows, scratch.row_most.data(), scratch.row_sum.data(), out.rows.data());
  log_sum(columns, scratch.column_most.data(), scratch.column_sum.data(), out.columns.data());
}

template <class T>
ScalarGradients sum_negatives_backward(const Negatives<T>& pairs, PerRowAndColumn<const T> out,
                                       PerRowAndColumn<const T> d_out, Span<const T> kept,
                                       T* d_audio, T* d_text) {
  Scratch<T> scratch(pairs, true);
  // Kept logits are only read by this pass.
  ThreadPool pool(threads_for(pairs));
  Pass<T> pass{
      pairs, scratch, pool,  const_cast<T*>(kept.data()), kept_units<T>(pairs, kept.size()), out,
      d_out, d_audio, d_text};
  double bias = 0;
  for_each_panel(pass, [&] {
    take(pass, Step::kGradient, pass.tiles() * pass.units());
    for (std::size_t tile = 0; tile < pass.tiles(); ++tile) {
      for (std::size_t unit = 0; unit < pass.units(); ++unit) {
        bias += scratch.gradient_sum[tile * kUnitsInPanel + unit];
      }
    }
    if (d_audio != nullptr) take(pass, Step::kToAudio, pass.units());
    if (d_text != nullptr) take(pass, Step::kToText, divide_up(pass.columns, kUnit));
  });
  // By Euler either side tells the gradient by the scale.
  double scale = 0;
  if (d_text != nullptr) scale = finish(pool, pairs.scale, pairs.text, d_text);
  if (d_audio != nullptr) scale = finish(pool, pairs.scale, pairs.audio, d_audio);
  return {scale, bias};
}

template void sum_negatives(const Negatives<float>&, PerRowAndColumn<float>, Span<float>);
template void sum_negatives(const Negatives<double>&, PerRowAndColumn<double>, Span<double>);
template ScalarGradients sum_negatives_backward(const Negatives<float>&,
                                                PerRowAndColumn<const float>,
                                                PerRowAndColumn<const float>, Span<const float>,
                                                float*, float*);
template ScalarGradients sum_negatives_backward(const Negatives<double>&,
                                                PerRowAndColumn<const double>,
                                                PerRowAndColumn<const double>, Span<const double>,
                                                double*, double*);

}  // namespace clsp
