#include "contrastive.h"

#include "batch.h"
#include "contrastive_steps.h"

namespace clsp {
namespace {

// Starting a thread costs more than this many multiply-adds.
constexpr std::size_t kSmall = std::size_t{1} << 23;

template <class T, std::size_t Bytes>
using StepsOf = Steps<T, static_cast<int>(Bytes / sizeof(T))>;

template <class T>
void run_baseline(const Pass<T>& pass, Step step, std::size_t i) {
  StepsOf<T, 16>::run(pass, step, i);
}
#ifdef CLSP_X86
template <class T>
CLSP_TARGET_AVX2 void run_avx2(const Pass<T>& pass, Step step, std::size_t i) {
  StepsOf<T, 32>::run(pass, step, i);
}
template <class T>
CLSP_TARGET_AVX512 void run_avx512(const Pass<T>& pass, Step step, std::size_t i) {
  StepsOf<T, 64>::run(pass, step, i);
}
#endif

template <class T>
void run(const Pass<T>& pass, Step step, std::size_t i) {
#ifdef CLSP_X86
  if (pass.pairs.isa == Isa::kAvx512) return run_avx512(pass, step, i);
  if (pass.pairs.isa == Isa::kAvx2) return run_avx2(pass, step, i);
#endif
  run_baseline(pass, step, i);
}

struct Widths {
  std::size_t rows, columns;
};

template <class T>
Widths micro_widths(Isa isa) {
  if (isa == Isa::kAvx512) return {12, 128 / sizeof(T)};
  return {6, (isa == Isa::kAvx2 ? 64 : 32) / sizeof(T)};
}

int threads_for(const Negatives& pairs) {
  const std::size_t products = pairs.audio.rows * pairs.text.rows * pairs.audio.depth;
  return products < kSmall ? 1 : pairs.threads;
}

template <class T>
void pack_block(const Pass<T>& pass, bool backward) {
  Scratch<T>& scratch = pass.scratch;
  const Widths widths = micro_widths<T>(pass.pairs.isa);
  for_each(divide_up(pass.columns, kUnit), threads_for(pass.pairs), [&](std::size_t i) {
    Buffer<T> line(scratch.depth);
    const std::size_t from = i * kUnit, count = std::min(kUnit, pass.columns - from);
    pack_beside(pass.pairs.text, pass.first_column + from, count, widths.columns, T{1}, line.data(),
                scratch.text_beside.data() + from * pass.pairs.text.depth);
    if (!backward) return;
    pack_above(pass.pairs.text, pass.first_column + from, count, widths.columns, kTile, line.data(),
               scratch.text_above.data() + from / kTile * kTile * scratch.depth +
                   from % kTile * widths.columns);
  });
}

template <class T>
void pack_panel(const Pass<T>& pass, bool backward) {
  Scratch<T>& scratch = pass.scratch;
  const Widths widths = micro_widths<T>(pass.pairs.isa);
  for_each(pass.units(), threads_for(pass.pairs), [&](std::size_t i) {
    Buffer<T> line(scratch.depth);
    const std::size_t from = i * kUnit, count = pass.rows_of(i);
    if (!backward || !pass.is_kept(i)) {
      pack_beside(pass.pairs.audio, pass.first_row + from, count, widths.rows,
                  static_cast<T>(pass.pairs.scale), line.data(),
                  scratch.audio_beside.data() + from * pass.pairs.audio.depth);
    }
    if (!backward) return;
    pack_above(pass.pairs.audio, pass.first_row + from, count, widths.columns, kTile, line.data(),
               scratch.audio_above.data() + from / kTile * kTile * scratch.depth +
                   from % kTile * widths.columns);
  });
}

// Calls `work` for every panel of every block, with its operands packed.
template <class T, class Work>
void for_each_panel(Pass<T>& pass, bool backward, const Work& work) {
  const std::size_t all_rows = pass.pairs.audio.rows, all_columns = pass.pairs.text.rows;
  for (std::size_t column = 0; column < all_columns; column += kBlock) {
    pass.first_column = column;
    pass.columns = std::min(kBlock, all_columns - column);
    pack_block(pass, backward);
    for (std::size_t row = 0; row < all_rows; row += kPanel) {
      pass.first_row = row;
      pass.rows = std::min(kPanel, all_rows - row);
      pack_panel(pass, backward);
      work();
    }
  }
}

template <class T>
void for_each_tile(const Pass<T>& pass, Step step) {
  for_each(pass.tiles() * kUnitsInPanel, threads_for(pass.pairs), [&](std::size_t i) {
    if (i % kUnitsInPanel < pass.units()) run(pass, step, i);
  });
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

// From products with G to gradients: times the scale, whose own gradient is returned.
template <class T>
double finish(const Pass<T>& pass) {
  const Embeddings &audio = pass.pairs.audio, &text = pass.pairs.text;
  const std::size_t depth = audio.depth, audio_units = divide_up(audio.rows, kUnit);
  const T scale = static_cast<T>(pass.pairs.scale);
  Buffer<double> dots(audio.rows);
  for_each(audio_units + divide_up(text.rows, kUnit), threads_for(pass.pairs), [&](std::size_t i) {
    const bool is_audio = i < audio_units;
    const std::size_t first = (is_audio ? i : i - audio_units) * kUnit;
    const std::size_t last = std::min(first + kUnit, is_audio ? audio.rows : text.rows);
    T* const gradient = is_audio ? pass.d_audio : pass.d_text;
    Buffer<T> line(depth);
    for (std::size_t row = first; is_audio && row < last; ++row) {
      read_row(audio, row, line.data());
      dots.data()[row] = dot(line.data(), gradient + row * depth, depth);
    }
    std::for_each(gradient + first * depth, gradient + last * depth, [scale](T& x) { x *= scale; });
  });
  double sum = 0;
  for (std::size_t row = 0; row < audio.rows; ++row) sum += dots.data()[row];
  return sum;
}

template <class T>
std::size_t kept_units(const Negatives& pairs, std::size_t size) {
  return size / (divide_up(pairs.text.rows, kTile) * kUnitLogits);
}

}  // namespace

template <class T>
void sum_negatives(const Negatives& pairs, PerRowAndColumn<T> out, Span<T> kept) {
  Scratch<T> scratch(pairs, false);
  Pass<T> pass{pairs, scratch, kept.data(), kept_units<T>(pairs, kept.size()), {}, {}, {}, {}};
  const std::size_t rows = pairs.audio.rows, columns = pairs.text.rows;
  std::fill_n(scratch.row_most.data(), round_up(rows, kPanel), -kInfinity<T>);
  std::fill_n(scratch.row_sum.data(), round_up(rows, kPanel), T{0});
  std::fill_n(scratch.column_most.data(), round_up(columns, kBlock), -kInfinity<T>);
  std::fill_n(scratch.column_sum.data(), round_up(columns, kBlock), T{0});
  for_each_panel(pass, false, [&] {
    for_each_tile(pass, Step::kForward);
    run(pass, Step::kCombine, 0);
  });
  if (pairs.kind == NegativesKind::kSigmoid) {
    std::copy_n(scratch.row_sum.data(), rows, out.rows.data());
    return;
  }
  log_sum(rows, scratch.row_most.data(), scratch.row_sum.data(), out.rows.data());
  log_sum(columns, scratch.column_most.data(), scratch.column_sum.data(), out.columns.data());
}

template <class T>
ScalarGradients sum_negatives_backward(const Negatives& pairs, PerRowAndColumn<const T> out,
                                       PerRowAndColumn<const T> d_out, Span<const T> kept,
                                       T* d_audio, T* d_text) {
  Scratch<T> scratch(pairs, true);
  // Kept logits are only read by this pass.
  Pass<T> pass{
      pairs,   scratch, const_cast<T*>(kept.data()), kept_units<T>(pairs, kept.size()), out, d_out,
      d_audio, d_text};
  double bias = 0;
  for_each_panel(pass, true, [&] {
    for_each_tile(pass, Step::kGradient);
    for (std::size_t tile = 0; tile < pass.tiles(); ++tile) {
      for (std::size_t unit = 0; unit < pass.units(); ++unit) {
        bias += scratch.gradient_sum[tile * kUnitsInPanel + unit];
      }
    }
    const std::size_t audio_units = pass.units(), text_units = divide_up(pass.columns, kUnit);
    for_each(audio_units + text_units, threads_for(pairs), [&](std::size_t i) {
      if (i < audio_units) {
        run(pass, Step::kAudio, i);
      } else {
        run(pass, Step::kText, i - audio_units);
      }
    });
  });
  return {finish(pass), bias};
}

template void sum_negatives(const Negatives&, PerRowAndColumn<float>, Span<float>);
template void sum_negatives(const Negatives&, PerRowAndColumn<double>, Span<double>);
template ScalarGradients sum_negatives_backward(const Negatives&, PerRowAndColumn<const float>,
                                                PerRowAndColumn<const float>, Span<const float>,
                                                float*, float*);
template ScalarGradients sum_negatives_backward(const Negatives&, PerRowAndColumn<const double>,
                                                PerRowAndColumn<const double>, Span<const double>,
                                                double*, double*);

}  // namespace clsp
