#include "voice_spectra.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "fft.h"

namespace clsp {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr int kPitchHop = kVoiceHop / 2;
constexpr int kMargin = (kVoiceWindow - kVoiceHop) / 2;       // zeros around the samples
constexpr int kPitchMargin = (kVoiceWindow - kPitchHop) / 2;  // zeros around the samples at 8 kHz
constexpr int kTaps = 63;
constexpr int kFirstPitchBin = 3, kPitchBins = 227;  // 47 Hz to 3.6 kHz
constexpr int kLagBlock = 12, kLagBlocks = kPitchLags / kLagBlock;
static_assert(kPitchLags % kLagBlock == 0);
constexpr int kPulseBlock = kVoiceHop / kPulsesPerFrame;

double hann(int i, int size) { return 0.5 - 0.5 * std::cos(2.0 * kPi * (i + 0.5) / size); }

struct Tables {
  float half_window[kVoiceWindow];  // half the window: power_spectrum() returns |2 X|^2
  float taps[kTaps];
  float pitch_cosines[kLagBlocks][kPitchBins][kLagBlock];
  float inverse_window_correlation[kPitchLags];
  double formant_cosines[kFormantBins + 1][kFormantOrder + 1];

  Tables() {
    double window_power[257], window_energy = 0.0;
    for (int i = 0; i < kVoiceWindow; ++i)
      half_window[i] = static_cast<float>(0.5 * hann(i, kVoiceWindow));
    for (int k = 0; k <= 256; ++k) {
      double re = 0.0, im = 0.0;
      for (int i = 0; i < kVoiceWindow; ++i) {
        re += hann(i, kVoiceWindow) * std::cos(2.0 * kPi * (k * i % 512) / 512.0);
        im += hann(i, kVoiceWindow) * std::sin(2.0 * kPi * (k * i % 512) / 512.0);
      }
      window_power[k] = (re * re + im * im) * (k % 256 == 0 ? 1.0 : 2.0);
      window_energy += window_power[k];
    }
    double sum = 0.0, lowpass[kTaps];
    for (int i = 0; i < kTaps; ++i) {
      const double t = 0.475 * kPi * (i - kTaps / 2);
      lowpass[i] = (t == 0.0 ? 1.0 : std::sin(t) / t) * hann(i, kTaps);
      sum += lowpass[i];
    }
    for (int i = 0; i < kTaps; ++i) taps[i] = static_cast<float>(lowpass[i] / sum);
    for (int l = 0; l < kPitchLags; ++l) {
      const double lag = kFirstPitchLag + kPitchLagStep * l;
      double correlation = 0.0;
      for (int k = 0; k <= 256; ++k)
        correlation += window_power[k] * std::cos(2.0 * kPi * k * lag / 512.0);
      inverse_window_correlation[l] = static_cast<float>(window_energy / correlation);
      for (int k = 0; k < kPitchBins; ++k) {
        pitch_cosines[l / kLagBlock][k][l % kLagBlock] =
            static_cast<float>(std::cos(2.0 * kPi * (k + kFirstPitchBin) * lag / 512.0));
      }
    }
    for (int k = 0; k <= kFormantBins; ++k) {
      // Pre-emphasis of the power, and half weight for the two edges.
      const double weight = (1.0 - 0.9995 * std::cos(kPi * k / kFormantBins)) *
                            (k == 0 || k == kFormantBins ? 0.5 : 1.0);
      for (int n = 0; n <= kFormantOrder; ++n)
        formant_cosines[k][n] = weight * std::cos(kPi * k * n / kFormantBins);
    }
  }
};

const Tables& tables() {
  static const Tables instance;
  return instance;
}

// A recording of whole frames, with zeros around it.
struct Signals {
  std::size_t frames;
  std::vector<float> samples, even, odd, pitch_samples;
};

template <int L>
struct Workspace {
  using V = typename Lanes<L>::Float;
  V even[FftPlan::kComplex];  // first samples, then powers in the order of position_of()
  V odd[FftPlan::kComplex];
  V ordered[kPitchBins];
  V correlations[kPitchLags];
};

void check_samples(Span<const float> samples) {
  bool usable = true;
  for (const float x : samples) usable &= std::abs(x) <= kLargestSample;  // false for NaN
  if (!usable) throw std::invalid_argument("samples must be finite and at most 10000");
}

double mean_of(Span<const float> samples) {
  double total = 0.0;
  for (std::size_t i = 0; i < samples.size(); i += kVoiceHop) {
    const std::size_t end = std::min(samples.size(), i + kVoiceHop);
    float sums[4] = {};
    std::size_t j = i;
    for (; j + 4 <= end; j += 4) {
      for (std::size_t l = 0; l < 4; ++l) sums[l] += samples[j + l];
    }
    for (; j < end; ++j) sums[0] += samples[j];
    total += static_cast<double>(sums[0]) + sums[1] + sums[2] + sums[3];
  }
  return samples.size() == 0 ? 0.0 : total / static_cast<double>(samples.size());
}

// Removes the mean and adds zeros.
Signals prepare(Span<const float> samples) {
  constexpr std::size_t kMostLanes = 16;
  Signals s;
  s.frames = voice_frame_count(samples.size());
  const std::size_t rounded = (s.frames + kMostLanes) * kVoiceHop;
  s.samples.assign(2 * kMargin + rounded, 0.0f);
  const double mean = mean_of(samples);
  const std::size_t used = std::min(samples.size(), s.frames * kVoiceHop);
  for (std::size_t i = 0; i < used; ++i)
    s.samples[kMargin + i] = static_cast<float>(samples[i] - mean);
  const std::size_t half = s.samples.size() / 2;
  s.even.resize(half);
  s.odd.resize(half);
  for (std::size_t i = 0; i < half; ++i) {
    s.even[i] = s.samples[2 * i];
    s.odd[i] = s.samples[2 * i + 1];
  }
  s.pitch_samples.assign(2 * kPitchMargin + rounded / 2, 0.0f);
  return s;
}

// Every second sample of the low-passed signal: sum over i of taps[i] x[2 n + i - 31].
template <int L>
CLSP_INLINE void halve_rate(Signals& s, const Tables& t) {
  using V = typename Lanes<L>::Float;
  static_assert(kPitchHop % L == 0 && (kMargin - kTaps / 2) % 2 == 1);
  constexpr std::size_t kShift = (kMargin - kTaps / 2) / 2;
  for (std::size_t n = 0; n < s.frames * kPitchHop; n += L) {
    V sum{};
    for (std::size_t i = 0; i < kTaps; ++i) {
      const float* const half = i % 2 ? s.even.data() + 1 : s.odd.data();
      sum += load<V>(half + n + kShift + i / 2) * t.taps[i];
    }
    store(s.pitch_samples.data() + kPitchMargin + n, sum);
  }
}

template <int L>
CLSP_INLINE void block_powers(const Signals& s, VoiceSpectra& out) {
  using V = typename Lanes<L>::Float;
  for (std::size_t m = 0; m < s.frames; ++m) {
    const float* const x = s.samples.data() + kMargin + m * kVoiceHop;
    V power{};
    for (std::size_t block = 0; block < kPulsesPerFrame; ++block) {
      V pulse{};
      for (std::size_t i = block * kPulseBlock; i < (block + 1) * kPulseBlock; i += L) {
        const V now = load<V>(x + i), difference = now - load<V>(x + i - 1);
        power += now * now;
        pulse += difference * difference;
      }
      out.pulse_power[m * kPulsesPerFrame + block] =
          static_cast<double>(horizontal_sum(pulse)) / kPulseBlock;
    }
    out.power[m] = static_cast<double>(horizontal_sum(power)) / kVoiceHop;
  }
}

// Power spectra of L frames, the first of which begins at `source`.
template <int L>
CLSP_INLINE void group_spectra(const float* source, int hop, const Tables& t, Workspace<L>& w) {
  using V = typename Workspace<L>::V;
  for (int i = 0; i < kVoiceWindow; i += L) {
    V columns[L];
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) columns[lane] = load<V>(source + lane * hop + i);
    transpose(columns);
#pragma GCC unroll 16
    for (int c = 0; c < L; ++c) {
      auto* const half = c % 2 ? w.odd : w.even;
      half[(i + c) / 2] = columns[c] * t.half_window[i + c];
    }
  }
  power_spectrum(w.even, w.odd, fft_plan());
}

// Autocorrelations of L frames, divided by that of the window.
template <int L>
CLSP_INLINE void group_correlations(const Tables& t, Workspace<L>& w) {
  using V = typename Workspace<L>::V;
  V energy = V{} + 1e-20f;
  for (int k = 0; k < kPitchBins; ++k) {
    w.ordered[k] = w.even[position_of(k + kFirstPitchBin)];
    energy += w.ordered[k];
  }
  const V scale = 1.0f / energy;
  for (int block = 0; block < kLagBlocks; ++block) {
    V sums[kLagBlock] = {};
    for (int k = 0; k < kPitchBins; ++k) {
      const float* const cosines = t.pitch_cosines[block][k];
      const V power = w.ordered[k];
#pragma GCC unroll 12
      for (int l = 0; l < kLagBlock; ++l) sums[l] += power * cosines[l];
    }
#pragma GCC unroll 12
    for (int l = 0; l < kLagBlock; ++l) {
      const int lag = block * kLagBlock + l;
      w.correlations[lag] = sums[l] * scale * t.inverse_window_correlation[lag];
    }
  }
}

template <int L>
CLSP_INLINE auto sum_of_bins(const Workspace<L>& w, int first, int end) {
  typename Workspace<L>::V sum{};
  for (int k = first; k < end; ++k) sum += w.even[position_of(k)];
  return sum;
}

// Fills the spectra of `count` frames.
template <int L>
CLSP_INLINE void summarise(const Tables& t, const Workspace<L>& w, VoiceSpectrum* out,
                           std::size_t count) {
  using V = typename Workspace<L>::V;
  const V syllable = sum_of_bins(w, 3, 112), low = sum_of_bins(w, 2, 32),
          high = sum_of_bins(w, 32, 160);
  V bands[kVoiceBands];
  for (int b = 0; b < kVoiceBands; ++b) bands[b] = sum_of_bins(w, 8 * b + 1, 8 * b + 9);
  // In double precision, because the poles of a steep spectrum depend on small differences.
  using Double = typename Lanes<L>::Double;
  Double lags[kFormantOrder + 1] = {};
  for (int k = 1; k <= kFormantBins; ++k) {  // a frame's mean is not part of the spectrum
    const Double power = __builtin_convertvector(w.even[position_of(k)], Double);
#pragma GCC unroll 11
    for (int n = 0; n <= kFormantOrder; ++n) lags[n] += power * t.formant_cosines[k][n];
  }
  for (std::size_t lane = 0; lane < count; ++lane) {
    VoiceSpectrum& frame = out[lane];
    frame.syllable = syllable[lane];
    frame.low = low[lane];
    frame.high = high[lane];
    for (int b = 0; b < kVoiceBands; ++b) frame.bands[b] = bands[b][lane];
    for (int n = 0; n <= kFormantOrder; ++n) frame.lags[n] = lags[n][lane];
  }
}

struct SpectraWork {
  Signals& signals;
  VoiceSpectra& out;

  template <std::size_t Bytes>
  CLSP_INLINE void run() const {
    constexpr std::size_t L = Bytes / sizeof(float);
    const Tables& t = tables();
    Workspace<L> w;
    block_powers<L>(signals, out);
    halve_rate<L>(signals, t);
    for (std::size_t first = 0; first < signals.frames; first += L) {
      const std::size_t count = std::min(L, signals.frames - first);
      group_spectra<L>(signals.samples.data() + first * kVoiceHop, kVoiceHop, t, w);
      summarise<L>(t, w, out.frames.data() + first, count);
      group_spectra<L>(signals.pitch_samples.data() + first * kPitchHop, kPitchHop, t, w);
      group_correlations<L>(t, w);
      for (std::size_t lane = 0; lane < count; ++lane) {
        float row[kPitchLags];
        for (int l = 0; l < kPitchLags; ++l) row[l] = w.correlations[l][lane];
        out.pitch[first + lane] = find_pitch_candidates(row);
      }
    }
  }
};

}  // namespace

void make_voice_tables() { tables(); }

VoiceSpectra voice_spectra(Span<const float> samples, Isa isa) {
  check_samples(samples);
  Signals signals = prepare(samples);
  VoiceSpectra out;
  out.power.resize(signals.frames);
  out.pulse_power.resize(signals.frames * kPulsesPerFrame);
  out.frames.resize(signals.frames);
  out.pitch.resize(signals.frames);
  dispatch(isa, SpectraWork{signals, out});
  return out;
}

}  // namespace clsp
