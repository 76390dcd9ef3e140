#include "voice.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "threads.h"
#include "voice_pitch.h"
#include "voice_spectra.h"
#include "voice_statistics.h"

namespace clsp {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kHopS = 0.01;
constexpr double kSilenceDb = -80.0, kBelowLoudDb = 30.0;
constexpr std::size_t kMinRun = 4, kMinPause = 20;  // frames
constexpr double kSyllableFloorDb = 25.0, kSyllableDipDb = 2.5;
constexpr double kClearStrength = 0.7;
constexpr double kPulseDipDb = 6.0, kHighestCreakHz = 75.0;
constexpr std::size_t kShortestPulse = 7, kLongestPulse = 25;  // blocks of 2 ms
constexpr double kOctaveErrorSemitones = 9.0;
constexpr double kBandFloorDb = 55.0, kBandHz = 250.0;

// Values for each frame, from which a VoicePart is made.
struct Frames {
  VoiceSpectra spectra;
  std::vector<double> power, f0_hz, strength;
  std::vector<char> active, nuclei, creak;
};

// A triangle over three frames.
std::vector<double> smooth_power(const std::vector<double>& power) {
  std::vector<double> smooth(power.size());
  for (std::size_t m = 0; m < power.size(); ++m) {
    const double before = power[m == 0 ? 0 : m - 1];
    const double after = power[std::min(m + 1, power.size() - 1)];
    smooth[m] = (before + 2.0 * power[m] + after) / 4.0;
  }
  return smooth;
}

std::vector<char> find_active(const std::vector<double>& power) {
  std::vector<double> level(power.size());
  std::transform(power.begin(), power.end(), level.begin(), decibels);
  const std::vector<double> sorted = sorted_copy(level);
  const double quiet = quantile_of_sorted(sorted, 0.05), loud = quantile_of_sorted(sorted, 0.95);
  const double threshold =
      std::max({loud - kBelowLoudDb, std::min(quiet + 6.0, loud - 18.0), kSilenceDb});
  std::vector<char> active(power.size());
  for (std::size_t m = 0; m < power.size(); ++m) active[m] = level[m] > threshold;
  for_each_run(active, 0, active.size(), true, [&](std::size_t first, std::size_t end) {
    if (end - first < kMinRun) std::fill(&active[first], &active[first] + (end - first), char{0});
  });
  return active;
}

// Calls visit(i) for each maximum that is `dip_db` above the minima on both sides or at an end.
template <class Visit>
void for_each_peak(const std::vector<double>& level, double dip_db, const Visit& visit) {
  bool rising = false;
  std::size_t extreme = 0;
  for (std::size_t i = 0; i < level.size(); ++i) {
    if ((level[i] > level[extreme]) == rising) {
      extreme = i;
    } else if (std::abs(level[i] - level[extreme]) > dip_db) {
      if (rising) visit(extreme);
      rising = !rising;
      extreme = i;
    }
  }
  if (rising) visit(extreme);
}

std::vector<char> find_nuclei(const Frames& frames) {
  constexpr double kPi = 3.14159265358979323846;
  constexpr double kWindowEnergy = 3.0 / 8.0 * kVoiceWindow;  // of a Hann window
  const std::size_t count = frames.active.size();
  std::array<double, 7> weights;
  for (std::size_t i = 0; i < weights.size(); ++i)
    weights[i] = (0.5 - 0.5 * std::cos(2.0 * kPi * static_cast<double>(i) / 6.0)) / 3.0;
  std::vector<double> level(count);
  for (std::size_t m = 0; m < count; ++m) {
    double sum = 0.0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const std::size_t at = m + i;  // frame at - 3
      if (at >= 3 && at < count + 3)
        sum += weights[i] * static_cast<double>(frames.spectra.frames[at - 3].syllable);
    }
    level[m] = decibels(sum / kWindowEnergy);
  }
  const double floor = quantile_of_sorted(sorted_copy(level), 0.95) - kSyllableFloorDb;
  for (double& value : level) value = std::max(value, floor);
  std::vector<char> nuclei(count);
  for_each_peak(level, kSyllableDipDb, [&](std::size_t m) { nuclei[m] = frames.active[m]; });
  return nuclei;
}

// Active frames between two pulses that follow each other more slowly than those of a modal voice,
// unless the frame has a clear voice at a higher F0.
std::vector<char> find_creak(const Frames& frames) {
  const std::vector<double>& power = frames.spectra.pulse_power;
  std::vector<double> level(power.size());
  for (std::size_t i = 0; i < power.size(); ++i) {
    const double before = i == 0 ? 0.0 : power[i - 1];
    const double after = i + 1 == power.size() ? 0.0 : power[i + 1];
    level[i] = decibels(0.25 * before + 0.5 * power[i] + 0.25 * after);
  }
  std::vector<char> slow(power.size());
  bool has_previous = false;
  std::size_t previous = 0;
  for_each_peak(level, kPulseDipDb, [&](std::size_t pulse) {
    const std::size_t distance = pulse - previous;
    if (has_previous && distance >= kShortestPulse && distance <= kLongestPulse)
      std::fill(&slow[previous], &slow[previous] + distance, char{1});
    previous = pulse;
    has_previous = true;
  });
  std::vector<char> creak(frames.active.size());
  for (std::size_t m = 0; m < creak.size(); ++m) {
    const bool modal = frames.f0_hz[m] > kHighestCreakHz && frames.strength[m] > kClearStrength;
    creak[m] = frames.active[m] && !modal && slow[m * kPulsesPerFrame + kPulsesPerFrame / 2];
  }
  return creak;
}

Frames analyse(Span<const float> samples, Isa isa) {
  Frames frames;
  frames.spectra = voice_spectra(samples, isa);
  frames.power = smooth_power(frames.spectra.power);
  frames.active = find_active(frames.power);
  track_pitch(frames.spectra.pitch, frames.power, frames.active, &frames.f0_hz, &frames.strength);
  frames.nuclei = find_nuclei(frames);
  frames.creak = find_creak(frames);
  return frames;
}

// Median, spread, range and slope of F0 of the voiced frames in [first, end).
void measure_pitch(const Frames& frames, std::size_t first, const std::vector<std::size_t>& voiced,
                   VoicePart* part) {
  std::vector<double> hz;
  for (const std::size_t m : voiced) hz.push_back(frames.f0_hz[m]);
  part->f0_hz = median_of(hz);
  const auto semitones_of = [&](std::size_t m) {
    return 12.0 * std::log2(frames.f0_hz[m] / part->f0_hz);
  };
  const auto is_near = [&](std::size_t m) {
    return std::abs(semitones_of(m)) < kOctaveErrorSemitones;
  };
  // If no value is near the median, it lies between two groups of values.
  const bool keep_all = std::none_of(voiced.begin(), voiced.end(), is_near);
  std::vector<double> semitones, times;
  for (const std::size_t m : voiced) {
    if (!keep_all && !is_near(m)) continue;
    semitones.push_back(semitones_of(m));
    times.push_back(static_cast<double>(m - first) * kHopS);
  }
  const auto count = static_cast<double>(semitones.size());
  double mean = 0.0, mean_time = 0.0, squares = 0.0, time_squares = 0.0, products = 0.0;
  for (std::size_t i = 0; i < semitones.size(); ++i) mean += semitones[i], mean_time += times[i];
  mean /= count, mean_time /= count;
  for (std::size_t i = 0; i < semitones.size(); ++i) {
    const double distance = semitones[i] - mean, time = times[i] - mean_time;
    squares += distance * distance, time_squares += time * time, products += time * semitones[i];
  }
  part->f0_sd = std::sqrt(squares / count);
  part->f0_slope = products / std::max(time_squares, 1e-12);
  std::sort(semitones.begin(), semitones.end());
  part->f0_range = quantile_of_sorted(semitones, 0.95) - quantile_of_sorted(semitones, 0.05);
  double hnr = 0.0;
  for (const std::size_t m : voiced) {
    const double r = std::min(std::max(frames.strength[m], 1e-4), 0.9999);
    hnr += 10.0 * std::log10(r / (1.0 - r));
  }
  part->hnr_db = hnr / static_cast<double>(voiced.size());
}

double mean_level(const Frames& frames, std::size_t first, std::size_t end, bool only_active) {
  double power = 0.0, count = 0.0;
  for (std::size_t m = first; m < end; ++m) {
    if (only_active && !frames.active[m]) continue;
    power += frames.power[m];
    count += 1.0;
  }
  return decibels(power / count);
}

double measure_tilt(const Frames& frames, std::size_t first, std::size_t end, bool only_voiced) {
  double low = 0.0, high = 0.0;
  for (std::size_t m = first; m < end; ++m) {
    if (only_voiced ? frames.f0_hz[m] == 0.0 : !frames.active[m]) continue;
    low += static_cast<double>(frames.spectra.frames[m].low);
    high += static_cast<double>(frames.spectra.frames[m].high);
  }
  return 10.0 * std::log10((high + 1e-12) / (low + 1e-12));
}

VoicePart measure_part(const Frames& frames, std::size_t first, std::size_t end) {
  VoicePart part{};
  part.f0_hz = part.f0_sd = part.f0_range = part.f0_slope = part.hnr_db = part.tilt_db = kNaN;
  part.start_s = static_cast<double>(first) * kHopS;
  part.duration_s = static_cast<double>(end - first) * kHopS;
  std::vector<std::size_t> voiced;
  double speech = 0.0, creak = 0.0;
  for (std::size_t m = first; m < end; ++m) {
    const bool has_voice = frames.f0_hz[m] > 0.0;
    if (has_voice) voiced.push_back(m);
    speech += frames.active[m];
    part.clear_voice += has_voice && frames.strength[m] > kClearStrength;
    creak += frames.creak[m];
    part.nuclei += frames.nuclei[m];
    part.voiced_nuclei += frames.nuclei[m] && has_voice;
  }
  part.voiced = static_cast<double>(voiced.size()) / std::max(speech, 1.0);
  part.clear_voice /= std::max(speech, 1.0);
  part.creak = creak / std::max(speech, 1.0);
  for_each_run(frames.active, first, end, false, [&](std::size_t begin, std::size_t stop) {
    if (stop - begin < kMinPause) return;
    part.pauses += 1.0;
    part.pause_s += static_cast<double>(stop - begin);
  });
  part.pause_s *= kHopS;
  if (speech == 0.0) {
    part.level_db = mean_level(frames, 0, frames.active.size(), false);
    return part;
  }
  part.level_db = mean_level(frames, first, end, true);
  part.tilt_db = measure_tilt(frames, first, end, voiced.size() >= kMinVoiced);
  if (voiced.size() >= kMinVoiced) measure_pitch(frames, first, voiced, &part);
  return part;
}

void measure_formants(const Frames& frames, double* formants_hz) {
  std::array<std::vector<double>, kFormants> values;
  for (std::size_t m = 0; m < frames.active.size(); ++m) {
    if (frames.f0_hz[m] == 0.0) continue;
    double hz[kFormants];
    const int count = find_formants(frames.spectra.frames[m].lags, hz);
    for (int k = 0; k < count; ++k) values[static_cast<std::size_t>(k)].push_back(hz[k]);
  }
  for (std::size_t k = 0; k < kFormants; ++k)
    formants_hz[k] = values[k].size() >= kMinVoiced ? median_of(values[k]) : kNaN;
}

// Upper edge of the highest band whose power is at most 55 dB below that of the strongest.
double measure_bandwidth(const Frames& frames) {
  std::array<double, kVoiceBands> bands{};
  double count = 0.0;
  for (std::size_t m = 0; m < frames.active.size(); ++m) {
    if (!frames.active[m]) continue;
    count += 1.0;
    for (std::size_t b = 0; b < kVoiceBands; ++b)
      bands[b] += static_cast<double>(frames.spectra.frames[m].bands[b]);
  }
  if (count == 0.0) return kNaN;
  for (double& band : bands) band = decibels(band / count);
  const double floor = *std::max_element(bands.begin(), bands.end()) - kBandFloorDb;
  std::size_t highest = kVoiceBands - 1;
  while (bands[highest] <= floor) --highest;
  return kBandHz * static_cast<double>(highest + 1);
}

}  // namespace

Voice measure_voice(Span<const float> samples, Isa isa) {
  const Frames frames = analyse(samples, isa);
  const auto begin = frames.active.begin();
  const auto first =
      static_cast<std::size_t>(std::find(begin, frames.active.end(), char{1}) - begin);
  std::size_t end = frames.active.size();
  while (end > 0 && !frames.active[end - 1]) --end;
  const std::size_t start = end == 0 ? 0 : first, length = end - start;
  Voice voice;
  std::size_t next = 0;
  for (std::size_t n = 1; n <= 3; ++n) {
    for (std::size_t i = 0; i < n; ++i) {
      voice.parts[next++] =
          measure_part(frames, start + length * i / n, start + length * (i + 1) / n);
    }
  }
  measure_formants(frames, voice.formants_hz);
  voice.bandwidth_hz = measure_bandwidth(frames);
  std::vector<double> level(frames.power.size());
  std::transform(frames.power.begin(), frames.power.end(), level.begin(), decibels);
  voice.snr_db = voice.parts[0].level_db - quantile_of_sorted(sorted_copy(std::move(level)), 0.05);
  return voice;
}

std::vector<Voice> measure_voices(const std::vector<Span<const float>>& recordings, int threads,
                                  Isa isa) {
  std::vector<Voice> voices(recordings.size());
  for_each(recordings.size(), threads,
           [&](std::size_t i) { voices[i] = measure_voice(recordings[i], isa); });
  return voices;
}

VoiceTrack track_voice(Span<const float> samples, Isa isa) {
  Frames frames = analyse(samples, isa);
  VoiceTrack track{std::move(frames.f0_hz), std::move(frames.strength), {}};
  for (const double power : frames.power) track.level_db.push_back(decibels(power));
  return track;
}

}  // namespace clsp
