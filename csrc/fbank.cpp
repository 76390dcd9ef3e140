#include "fbank.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "fft.h"
#include "simd_math.h"

namespace clsp {
namespace {

#include "fbank_tables.inc"

constexpr float kOneMinusEmphasis = 0.03f;  // the pre-emphasis coefficient is 0.97
constexpr float kEnergyFloor = 1.1920929e-07f;
constexpr int kBlock = 80;  // frames begin and end at multiples of 80 samples
constexpr int kBlocksPerFrame = kWindow / kBlock;

// Samples that L consecutive frames cover.
template <int L>
constexpr int kSpan = (L - 1) * kHop + kWindow;

template <int L>
struct Workspace {
  using V = typename Lanes<L>::Float;
  V even[FftPlan::kComplex];  // first samples, then powers in the order of position_of()
  V odd[FftPlan::kComplex];   // first samples, then energies of the mel filters
  V scaled_mean;              // 0.03 x the mean of each frame
  alignas(64) float emphasised[kSpan<L>];
  float gathered[kSpan<L> + 1];
};

// Sample `index` of the zero-padded clip, which is mirrored again and again at both ends.
float framed_sample(const Clip& clip, std::ptrdiff_t index) {
  const auto size = static_cast<std::ptrdiff_t>(clip.padded_size);
  std::ptrdiff_t i = index % (2 * size);
  if (i < 0) i += 2 * size;
  if (i >= size) i = 2 * size - 1 - i;
  const auto mirrored = static_cast<std::size_t>(i);
  return mirrored < clip.samples.size() ? clip.samples[mirrored] : 0.0f;
}

// Returns a pointer to the samples of `frames` frames from frame `first` on; element -1 is the
// sample before them. Copies samples only for frames at an edge of the clip. L frames are always
// readable, but samples after the last of `frames` have no meaning.
template <int L>
const float* group_source(const Clip& clip, std::size_t first, std::size_t frames,
                          Workspace<L>& w) {
  const auto size = static_cast<std::ptrdiff_t>(clip.samples.size());
  const auto begin = static_cast<std::ptrdiff_t>(first * kHop) - kLeft;
  if (begin >= 1 && begin + kSpan<L> <= size) return clip.samples.data() + begin;
  const auto end = begin + static_cast<std::ptrdiff_t>((frames - 1) * kHop) + kWindow;
  const std::ptrdiff_t inside_begin = std::max<std::ptrdiff_t>(begin - 1, 0);
  const std::ptrdiff_t inside_end = std::min(size, end);
  float* out = w.gathered;
  for (std::ptrdiff_t i = begin - 1; i < inside_begin; ++i) *out++ = framed_sample(clip, i);
  out = std::copy(clip.samples.data() + inside_begin, clip.samples.data() + inside_end, out);
  for (std::ptrdiff_t i = inside_end; i < end; ++i) *out++ = framed_sample(clip, i);
  std::fill(out, w.gathered + kSpan<L> + 1, 0.0f);
  return w.gathered + 1;
}

// The reference subtracts each frame's mean before pre-emphasis. Pre-emphasis may also come first:
// (x[i] - mean) - 0.97 (x[i-1] - mean) = (x[i] - 0.97 x[i-1]) - 0.03 mean.
// It is then computed once for each sample. Sums over blocks of 80 samples give the means.
template <int L>
CLSP_INLINE void emphasise(const float* source, Workspace<L>& w) {
  using V = typename Workspace<L>::V;
  constexpr int kBlocks = kSpan<L> / kBlock;
  float sums[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    V sum{};
    for (int i = b * kBlock; i < (b + 1) * kBlock; i += L) {
      const V x = load<V>(source + i), previous = load<V>(source + i - 1);
      sum += x;
      // This order of x - 0.97 previous rounds less: the difference of samples close to each other
      // is exact, and the rounding error of 0.03 previous is about 32 times smaller than that of
      // 0.97 previous.
      store(w.emphasised + i, (x - previous) + previous * kOneMinusEmphasis);
    }
    sums[b] = horizontal_sum(sum);
  }
  for (int lane = 0; lane < L; ++lane) {
    float total = 0.0f;
    for (int b = 0; b < kBlocksPerFrame; ++b) total += sums[lane * (kHop / kBlock) + b];
    w.scaled_mean[lane] = total * (kOneMinusEmphasis / kWindow);
  }
}

template <int L>
CLSP_INLINE void put_sample(Workspace<L>& w, int i, const typename Workspace<L>::V& x) {
  // Half the window: power_spectrum() returns |2 X|^2.
  const float window = 0.5f * kPoveyWindow[i];
  auto* const half = i % 2 ? w.odd : w.even;
  half[i / 2] = x * window - w.scaled_mean * window;
}

// Turns L rows, one for each frame, into windowed columns, one for each sample. Frame l + 1 starts
// 160 samples after frame l, so column i + 160 is column i moved by one lane. Only the first 160 of
// 400 columns need a transpose.
template <int L>
CLSP_INLINE void window_columns(Workspace<L>& w) {
  using V = typename Workspace<L>::V;
  for (int i = 0; i < kHop; i += L) {
    V columns[L];
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) columns[lane] = load<V>(w.emphasised + lane * kHop + i);
    transpose(columns);
#pragma GCC unroll 16
    for (int c = 0; c < L; ++c) {
      put_sample(w, i + c, columns[c]);
      const V second = next_lane(columns[c], w.emphasised[L * kHop + i + c]);
      put_sample(w, i + c + kHop, second);
      if (i + c + 2 * kHop < kWindow) {
        const V third = next_lane(second, w.emphasised[(L + 1) * kHop + i + c]);
        put_sample(w, i + c + 2 * kHop, third);
      }
    }
  }
  // The window is 0 here. But this pre-emphasised sample depends on the sample before the frame. If
  // that is NaN, so is the product with 0, although the frame itself may be valid.
  w.even[0] = V{};
}

constexpr std::array<int, kBins> first_weights() {
  std::array<int, kBins> first{};
  for (std::size_t m = 1; m < kBins; ++m) first[m] = first[m - 1] + kMelCount[m - 1];
  return first;
}

// Writes the energy of filter M: the weighted sum of FFT bins kMelFirst[M] and all
// kMelFirst[M] + 1 + I.
template <int M, int L, int... I>
CLSP_INLINE void mel_filter(Workspace<L>& w, std::integer_sequence<int, I...>) {
  constexpr int kFirst = kMelFirst[M];
  constexpr const float* kWeights = kMelWeights + first_weights()[M];
  auto energy = w.even[position_of(kFirst)] * kWeights[0];
  ((energy += w.even[position_of(kFirst + 1 + I)] * kWeights[1 + I]), ...);
  // A filter without bins gives 0, or NaN if the rest of the frame is NaN.
  w.odd[M] = kMelCount[M] == 0 ? w.scaled_mean - w.scaled_mean : energy;
}

// Unrolled over all filters: loop lengths, indices and weights become compile-time constants, and
// the powers that two neighbouring filters share are loaded once.
template <int L, int... M>
CLSP_INLINE void mel_filters(Workspace<L>& w, std::integer_sequence<int, M...>) {
  (mel_filter<M>(w, std::make_integer_sequence<int, std::max(kMelCount[M] - 1, 0)>{}), ...);
}

// Stores the logarithms of the energies: one row for each of `count` frames.
template <int L>
CLSP_INLINE void store_logarithms(const Workspace<L>& w, float* rows, std::size_t count) {
  using V = typename Workspace<L>::V;
  const V floor = broadcast<V>(kEnergyFloor);
  for (int m = 0; m < kBins; m += L) {
    V tile[L];
#pragma GCC unroll 16
    for (int c = 0; c < L; ++c) {
      const V energy = w.odd[m + c];
      tile[c] = log_positive(energy < floor ? floor : energy);  // NaN stays NaN
    }
    transpose(tile);
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) {
      if (static_cast<std::size_t>(lane) < count) store(rows + lane * kBins + m, tile[lane]);
    }
  }
}

template <int L>
CLSP_INLINE void fbank_lanes(const Clip& clip, float* rows) {
  Workspace<L> w;
  const FftPlan& plan = fft_plan();
  const std::size_t frames = frame_count(clip.samples.size());
  for (std::size_t group = 0; group < frames; group += L) {
    const std::size_t count = std::min<std::size_t>(L, frames - group);
    emphasise<L>(group_source<L>(clip, group, count, w), w);
    window_columns(w);
    power_spectrum(w.even, w.odd, plan);
    mel_filters(w, std::make_integer_sequence<int, kBins>{});
    store_logarithms(w, rows + group * kBins, count);
  }
}

struct FbankWork {
  const Clip& clip;
  float* rows;

  template <std::size_t Bytes>
  CLSP_INLINE void run() const {
    fbank_lanes<Bytes / sizeof(float)>(clip, rows);
  }
};

}  // namespace

void fbank(const Clip& clip, float* rows, Isa isa) { dispatch(isa, FbankWork{clip, rows}); }

const float* povey_window() { return kPoveyWindow; }

void mel_matrix(float* matrix) {
  std::fill_n(matrix, (FftPlan::kComplex + 1) * kBins, 0.0f);
  const float* weight = kMelWeights;
  for (int m = 0; m < kBins; ++m) {
    for (int k = kMelFirst[m]; k < kMelFirst[m] + kMelCount[m]; ++k) {
      matrix[k * kBins + m] = *weight++;
    }
  }
}

}  // namespace clsp
