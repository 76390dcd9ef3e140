// Measures a recording of speech. The definitions are those of
// clsp_fast/captioning/measure_reference.py.
#pragma once

#include <cstddef>
#include <vector>

#include "buffers.h"
#include "simd.h"
#include "voice_formants.h"

namespace clsp {

// A stretch of speech. The fields have the names and the order of the Python class.
struct VoicePart {
  double start_s, duration_s, level_db, voiced, clear_voice, f0_hz, f0_sd, f0_range, f0_slope,
      nuclei, voiced_nuclei, pauses, pause_s, hnr_db, creak, tilt_db;
};

constexpr std::size_t kVoiceParts = 6;  // the whole, two halves, three thirds

struct Voice {
  VoicePart parts[kVoiceParts];
  double formants_hz[kFormants];
  double bandwidth_hz, snr_db;
};

// All fields are doubles, so that bindings can copy them as an array.
constexpr std::size_t kVoiceValues = sizeof(Voice) / sizeof(double);

struct VoiceTrack {
  std::vector<double> f0_hz, strength, level_db;
};

Voice measure_voice(Span<const float> samples, Isa isa);
std::vector<Voice> measure_voices(const std::vector<Span<const float>>& recordings, int threads,
                                  Isa isa);
VoiceTrack track_voice(Span<const float> samples, Isa isa);

}  // namespace clsp
