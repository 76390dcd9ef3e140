// The spectra of a recording of speech, and what is read off them frame by frame. Many frames are
// computed at once, one in each vector lane.
#pragma once

#include <cstddef>
#include <vector>

#include "buffers.h"
#include "simd.h"
#include "voice_pitch.h"

namespace clsp {

constexpr int kVoiceHop = 160, kVoiceWindow = 400;  // samples at 16 kHz
constexpr int kPulsesPerFrame = 5;                  // blocks of 2 ms
constexpr int kVoiceBands = 31;                     // of 250 Hz
constexpr int kFormantOrder = 10, kFormantBins = 166;

// What the power spectrum of a frame holds.
struct VoiceSpectrum {
  float syllable;                  // power at 80 Hz to 3.5 kHz
  float low, high;                 // power below 1 kHz and at 1 to 5 kHz
  float bands[kVoiceBands];        // power of each band
  double lags[kFormantOrder + 1];  // autocorrelation of the pre-emphasised spectrum below 5.2 kHz
};

constexpr float kLargestSample = 1e4f;  // far above full scale; the powers stay finite

struct VoiceSpectra {
  std::vector<double> power;        // mean square of each frame's 160 samples
  std::vector<double> pulse_power;  // mean square of the differences in each block of 32 samples
  std::vector<VoiceSpectrum> frames;
  std::vector<PitchCandidates> pitch;
};

// Frame m is centred at sample 160 m + 80. There is at least one frame.
inline std::size_t voice_frame_count(std::size_t samples) {
  const std::size_t frames = (samples + kVoiceHop / 2) / kVoiceHop;
  return frames == 0 ? 1 : frames;
}

// Computes the tables. Is called at import, because a process forked during it would hang.
void make_voice_tables();

// Throws std::invalid_argument if a sample is not finite or exceeds kLargestSample.
VoiceSpectra voice_spectra(Span<const float> samples, Isa isa);

}  // namespace clsp
