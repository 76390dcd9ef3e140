#include "voice_pitch.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "voice_statistics.h"

namespace clsp {
namespace {

constexpr double kLowestHz = 60.0, kHighestHz = 600.0;
constexpr double kUnvoicedStrength = 0.5, kOctaveCost = 0.01, kJumpCost = 0.35, kVoicingCost = 0.14;
constexpr double kSilenceStrength = 2.0;  // no voice in frames without speech
// Frames that are quieter than the loudest one by more need more strength, for each dB.
constexpr double kQuietDb = 27.0, kQuietCost = 0.1;
constexpr int kStates = kPitchCandidates + 1;

struct Peak {
  double hz, strength, octaves, value;
};

// Inserts a peak into the best ones, the best first. Of equal peaks, the earlier one stays ahead.
void insert(const Peak& peak, std::array<Peak, kPitchCandidates>& best, int& count) {
  int at = count;
  while (at > 0 && best[static_cast<std::size_t>(at - 1)].value < peak.value) --at;
  if (at == kPitchCandidates) return;
  count = std::min(count + 1, kPitchCandidates);
  for (int i = count - 1; i > at; --i)
    best[static_cast<std::size_t>(i)] = best[static_cast<std::size_t>(i - 1)];
  best[static_cast<std::size_t>(at)] = peak;
}

struct Range {
  double low_hz, high_hz;
  bool holds(double hz) const { return hz >= low_hz && hz <= high_hz; }
};

// The strength that a candidate needs in each frame.
std::vector<double> unvoiced_strengths(const std::vector<double>& power,
                                       const std::vector<char>& active) {
  const double loudest = decibels(*std::max_element(power.begin(), power.end()));
  std::vector<double> strengths(power.size(), kSilenceStrength);
  for (std::size_t m = 0; m < power.size(); ++m) {
    const double quiet = std::max(loudest - kQuietDb - decibels(power[m]), 0.0);
    if (active[m]) strengths[m] = kUnvoicedStrength + kQuietCost * quiet;
  }
  return strengths;
}

// For each frame, the candidate on the path with the highest total, or -1: no voice.
std::vector<int> best_path(const std::vector<PitchCandidates>& frames,
                           const std::vector<double>& unvoiced, const Range& range) {
  std::vector<std::array<std::int8_t, kStates>> back(frames.size());
  std::array<double, kStates> total{}, next{};
  const auto gain = [&](std::size_t m, int state) {
    if (state == 0) return unvoiced[m];
    const PitchCandidates& f = frames[m];
    return range.holds(f.hz[state - 1]) ? f.strength[state - 1] + kOctaveCost * f.octaves[state - 1]
                                        : -1e9;
  };
  const auto states = [&](std::size_t m) {
    return unvoiced[m] < kSilenceStrength ? frames[m].count + 1 : 1;
  };
  for (int s = 0; s < states(0); ++s) total[static_cast<std::size_t>(s)] = gain(0, s);
  for (std::size_t m = 1; m < frames.size(); ++m) {
    const PitchCandidates &from = frames[m - 1], &to = frames[m];
    const int from_states = states(m - 1);
    for (int s = 0; s < states(m); ++s) {
      double best = -1e300;
      int best_from = 0;
      for (int p = 0; p < from_states; ++p) {
        const double cost = p == 0 || s == 0
                                ? (p == s ? 0.0 : kVoicingCost)
                                : kJumpCost * std::abs(from.octaves[p - 1] - to.octaves[s - 1]);
        const double value = total[static_cast<std::size_t>(p)] - cost;
        if (value > best) best = value, best_from = p;
      }
      next[static_cast<std::size_t>(s)] = best + gain(m, s);
      back[m][static_cast<std::size_t>(s)] = static_cast<std::int8_t>(best_from);
    }
    std::swap(total, next);
  }
  int state = 0;
  for (int s = 1; s < states(frames.size() - 1); ++s) {
    if (total[static_cast<std::size_t>(s)] > total[static_cast<std::size_t>(state)]) state = s;
  }
  std::vector<int> path(frames.size());
  for (std::size_t m = frames.size(); m-- > 0;) {
    path[m] = state - 1;
    state = back[m][static_cast<std::size_t>(state)];
  }
  return path;
}

}  // namespace

PitchCandidates find_pitch_candidates(const float* correlation) {
  std::array<Peak, kPitchCandidates> best;
  int count = 0;
  for (int i = 1; i + 1 < kPitchLags; ++i) {
    const float left = correlation[i - 1], middle = correlation[i], right = correlation[i + 1];
    if (!(middle > left && middle >= right && middle > 0.0f)) continue;
    // The vertex of the parabola through the three points.
    const double slope = static_cast<double>(left) - right;
    const double offset =
        0.5 * slope / (static_cast<double>(left) - 2.0 * static_cast<double>(middle) + right);
    const double height = middle - 0.25 * slope * offset;
    const double hz = kPitchRateHz / (kFirstPitchLag + kPitchLagStep * (i + offset));
    if (!(hz >= kLowestHz && hz <= kHighestHz)) continue;
    const double strength = height > 1.0 ? 1.0 / height : height;
    const double octaves = std::log2(hz / kLowestHz);
    insert({hz, strength, octaves, strength + kOctaveCost * octaves}, best, count);
  }
  PitchCandidates candidates{};
  candidates.count = count;
  for (int c = 0; c < count; ++c) {
    const Peak& peak = best[static_cast<std::size_t>(c)];
    candidates.hz[c] = peak.hz;
    candidates.strength[c] = peak.strength;
    candidates.octaves[c] = peak.octaves;
  }
  return candidates;
}

void track_pitch(const std::vector<PitchCandidates>& frames, const std::vector<double>& power,
                 const std::vector<char>& active, std::vector<double>* f0_hz,
                 std::vector<double>* strength) {
  const std::vector<double> unvoiced = unvoiced_strengths(power, active);
  std::vector<int> path = best_path(frames, unvoiced, {kLowestHz, kHighestHz});
  std::vector<double> voiced;
  for (std::size_t m = 0; m < frames.size(); ++m) {
    if (path[m] >= 0) voiced.push_back(frames[m].hz[path[m]]);
  }
  if (voiced.size() >= kMinVoiced) {  // the second range is that of this voice
    std::sort(voiced.begin(), voiced.end());
    const double low = 0.75 * quantile_of_sorted(voiced, 0.25);
    const double high = std::max(1.9 * quantile_of_sorted(voiced, 0.75), 2.0 * low);
    path = best_path(frames, unvoiced, {low, high});
  }
  f0_hz->resize(frames.size());
  strength->resize(frames.size());
  for (std::size_t m = 0; m < frames.size(); ++m) {
    const PitchCandidates& f = frames[m];
    (*f0_hz)[m] = path[m] >= 0 ? f.hz[path[m]] : 0.0;
    double best = 0.0;
    for (int c = 0; c < f.count; ++c) best = std::max(best, f.strength[c]);
    (*strength)[m] = path[m] >= 0 ? f.strength[path[m]] : best;
  }
}

}  // namespace clsp
