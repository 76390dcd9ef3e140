// The reference's resampler: a Hann-windowed sinc of 6 zero crossings at 0.99 of the lower Nyquist
// rate (torchaudio's sinc_interp_hann with its defaults), as a polyphase filter.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "buffers.h"
#include "simd.h"

namespace clsp {

// Bounds the size of a plan, which has at most about 13 taps for each Hz of the higher rate.
constexpr int kMaxRateHz = 1000000;

struct ResamplePlan {
  std::int64_t step_in, step_out;   // o and n: the rates, divided by their greatest common divisor
  int taps;                         // of each phase; the last ones of a phase may be 0
  std::vector<std::int64_t> first;  // (n,): input of the phase's first tap, relative to m * o
  std::vector<float> coefficients;  // (n, taps)
};

// The plan for a pair of rates. The most recently used plans are cached. Thread-safe.
// Throws std::invalid_argument for rates outside 1 .. kMaxRateHz.
std::shared_ptr<const ResamplePlan> resample_plan(int from_hz, int to_hz);

// round_half_up(samples * to_hz / from_hz)
std::size_t resampled_size(std::size_t samples, int from_hz, int to_hz);

// y[m n + p] = sum_i h[p][i] x[m o + first[p] + i], x zero outside. `out` has resampled_size().
void resample(const ResamplePlan& plan, Span<const float> in, Span<float> out, Isa isa);

}  // namespace clsp
