// The reference's resampler: a Hann-windowed sinc of 6 zero crossings at 0.99 of the lower Nyquist
// rate (torchaudio's sinc_interp_hann with its defaults), as a polyphase filter.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "checked.h"
#include "simd.h"

namespace clsp {

constexpr int kMaxRateHz =
    1000000;  // bounds a plan: at most about 13 taps per Hz of the higher rate

struct ResamplePlan {
  std::int64_t step_in, step_out;   // the rates over their greatest common divisor: o and n
  int taps;                         // per phase; the last ones of a phase may be 0
  std::vector<std::int64_t> first;  // (n,): input of the phase's first tap, relative to m * o
  std::vector<float> coefficients;  // (n, taps)
};

// The plan of a pair of rates; the most recently used ones are kept. Thread-safe.
// Throws std::invalid_argument for rates outside 1 .. kMaxRateHz.
std::shared_ptr<const ResamplePlan> resample_plan(int from_hz, int to_hz);

// round_half_up(samples * to_hz / from_hz)
std::size_t resampled_size(std::size_t samples, int from_hz, int to_hz);

// y[m n + p] = sum_i h[p][i] x[m o + first[p] + i], x zero outside. `out` has resampled_size().
void resample(const ResamplePlan& plan, Span<const float> in, Span<float> out, Isa isa);

}  // namespace clsp
