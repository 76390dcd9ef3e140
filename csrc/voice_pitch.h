// F0: the peaks of a frame's autocorrelation, and the cheapest path through them (Boersma 1993).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace clsp {

constexpr double kPitchRateHz = 8000.0;
constexpr double kFirstPitchLag = 12.0, kPitchLagStep = 0.5;  // samples at 8 kHz
constexpr int kPitchLags = 252;
constexpr int kPitchCandidates = 8;

struct PitchCandidates {
  int count;
  double hz[kPitchCandidates], strength[kPitchCandidates];
  double octaves[kPitchCandidates];  // above 60 Hz
};

// Finds the highest peaks of a frame's normalised autocorrelation at kPitchLags lags. Of peaks that
// are nearly as high, it prefers those at short lags.
PitchCandidates find_pitch_candidates(const float* correlation);

// Writes F0 in Hz, or 0 for a frame without voice, and the autocorrelation at the period. `power`
// is that of the frames; those that are not active have no voice.
void track_pitch(const std::vector<PitchCandidates>& frames, const std::vector<double>& power,
                 const std::vector<char>& active, std::vector<double>* f0_hz,
                 std::vector<double>* strength);

}  // namespace clsp
