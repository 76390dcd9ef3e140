#include "contrastive.h"

#include <cmath>

#include "contrastive_backward.h"
#include "contrastive_forward.h"
#include "contrastive_tiles.h"
#include "threads.h"

namespace clsp {
namespace {

// A product of fewer multiply-adds takes less time than starting a thread.
constexpr std::size_t kSmallProduct = std::size_t{1} << 23;

template <class T>
int threads_for(const Negatives<T>& pairs) {
  const std::size_t multiply_adds = pairs.audio.rows * pairs.text.rows * pairs.audio.depth;
  return multiply_adds < kSmallProduct ? 1 : pairs.threads;
}

enum class Step { kPackAudio, kPackText, kSum, kAddPanel, kDifferentiate, kAddAudio, kAddText };

// One task of a step, for dispatch().
template <class T>
struct Task {
  const Pass<T>& pass;
  Step step;

  template <std::size_t Bytes>
  CLSP_INLINE void run(std::size_t i) const {
    using M = LogitMicroTile<T, Bytes>;
    switch (step) {
      case Step::kPackAudio:
        return pack_audio<M>(pass, i);
      case Step::kPackText:
        return pack_text<M>(pass, i);
      case Step::kSum:
        return sum_tile<M>(pass, pass.tile(i));
      case Step::kAddPanel:
        return add_panel<M>(pass);
      case Step::kDifferentiate:
        return differentiate_tile<M>(pass, pass.tile(i));
      case Step::kAddAudio:
        return add_audio_gradient<M>(pass, i);
      case Step::kAddText:
        return add_text_gradient<M>(pass, i);
    }
  }
};

// Runs the `count` tasks of a step.
template <class T>
void run_step(const Pass<T>& pass, Step step, std::size_t count) {
  const Task<T> task{pass, step};
  pass.pool.for_each(count, [&](std::size_t i) { dispatch(pass.pairs.isa, task, i); });
}

// For each panel, packs its operands and calls work().
template <class T, class F>
void for_each_panel(Pass<T>& pass, const F& work) {
  const std::size_t all_rows = pass.pairs.audio.rows, all_columns = pass.pairs.text.rows;
  for (std::size_t column = 0; column < all_columns; column += kPanelColumns) {
    pass.first_column = column;
    pass.columns = std::min(kPanelColumns, all_columns - column);
    run_step(pass, Step::kPackText, divide_up(pass.columns, kTaskRows));
    for (std::size_t row = 0; row < all_rows; row += kPanelRows) {
      pass.first_row = row;
      pass.rows = std::min(kPanelRows, all_rows - row);
      run_step(pass, Step::kPackAudio, divide_up(pass.rows, kTaskRows));
      work();
    }
  }
}

// Writes log(sum * exp(peak)).
template <class T>
void write_log_sums(std::size_t count, const T* peak, const T* sum, T* out) {
  std::transform(peak, peak + count, sum, out, [](T m, T s) { return m + std::log(s); });
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

// Multiplies `product` (G text, or G^T audio) by the scale, which makes it the gradient of
// `embeddings`. Returns the sum of <embedding, product> over all rows, before the scale.
template <class T>
double scale_gradient(ThreadPool& pool, T scale, const Matrix<T>& embeddings, T* product) {
  const std::size_t depth = embeddings.depth;
  Buffer<double> dots(embeddings.rows);
  pool.for_each(divide_up(embeddings.rows, kTaskRows), [&](std::size_t task) {
    const std::size_t first = task * kTaskRows;
    const std::size_t last = std::min(first + kTaskRows, embeddings.rows);
    for (std::size_t row = first; row < last; ++row) {
      dots.data()[row] = dot(embeddings.row(row), product + row * depth, depth);
    }
    std::for_each(product + first * depth, product + last * depth, [scale](T& x) { x *= scale; });
  });
  double sum = 0;
  for (std::size_t row = 0; row < embeddings.rows; ++row) sum += dots.data()[row];
  return sum;
}

// The number of whole rows of tiles in `size` kept logits.
template <class T>
std::size_t kept_row_tiles(const Negatives<T>& pairs, std::size_t size) {
  return size / (divide_up(pairs.text.rows, kTileColumns) * kTileLogits);
}

}  // namespace

template <class T>
void sum_negatives(const Negatives<T>& pairs, PerRowAndColumn<T> out, Span<T> kept) {
  Workspace<T> workspace(pairs, false);
  ThreadPool pool(threads_for(pairs));
  Pass<T> pass{pairs, workspace, pool, kept.data(), kept_row_tiles<T>(pairs, kept.size()),
               {},    {},        {},   {}};
  const std::size_t rows = pairs.audio.rows, columns = pairs.text.rows;
  std::fill_n(workspace.row_peak.data(), round_up(rows, kPanelRows), -kInfinity<T>);
  std::fill_n(workspace.row_sum.data(), round_up(rows, kPanelRows), T{0});
  std::fill_n(workspace.column_peak.data(), round_up(columns, kPanelColumns), -kInfinity<T>);
  std::fill_n(workspace.column_sum.data(), round_up(columns, kPanelColumns), T{0});
  for_each_panel(pass, [&] {
    run_step(pass, Step::kSum, pass.tiles());
    run_step(pass, Step::kAddPanel, 1);
  });
  if (pairs.kind == NegativesKind::kSigmoid) {
    std::copy_n(workspace.row_sum.data(), rows, out.rows.data());
    return;
  }
  write_log_sums(rows, workspace.row_peak.data(), workspace.row_sum.data(), out.rows.data());
  write_log_sums(columns, workspace.column_peak.data(), workspace.column_sum.data(),
                 out.columns.data());
}

template <class T>
ScalarGradients sum_negatives_backward(const Negatives<T>& pairs, PerRowAndColumn<const T> out,
                                       PerRowAndColumn<const T> d_out, Span<const T> kept,
                                       T* d_audio, T* d_text) {
  Workspace<T> workspace(pairs, true);
  ThreadPool pool(threads_for(pairs));
  // Pass holds a pointer through which the forward pass writes; here the kept logits are only read.
  Pass<T> pass{pairs,
               workspace,
               pool,
               const_cast<T*>(kept.data()),
               kept_row_tiles<T>(pairs, kept.size()),
               out,
               d_out,
               d_audio,
               d_text};
  double bias = 0;
  for_each_panel(pass, [&] {
    run_step(pass, Step::kDifferentiate, pass.tiles());
    for (std::size_t column_tile = 0; column_tile < pass.column_tiles(); ++column_tile) {
      for (std::size_t row_tile = 0; row_tile < pass.row_tiles(); ++row_tile) {
        bias += workspace.gradient_sum[column_tile * kPanelRowTiles + row_tile];
      }
    }
    if (d_audio != nullptr) run_step(pass, Step::kAddAudio, divide_up(pass.rows, kTaskRows));
    if (d_text != nullptr) run_step(pass, Step::kAddText, divide_up(pass.columns, kTaskRows));
  });
  // Either sum is the gradient by the scale, sum_ij G_ij <audio_i, text_j>.
  double scale = 0;
  if (d_text != nullptr) scale = scale_gradient(pool, pairs.scale, pairs.text, d_text);
  if (d_audio != nullptr) scale = scale_gradient(pool, pairs.scale, pairs.audio, d_audio);
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
