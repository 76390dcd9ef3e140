// The CLSP log-mel filterbank: 16 kHz, 25 ms Povey windows every 10 ms, 128 bins, 20 .. 7600 Hz.
// Same semantics as lhotse's Fbank(num_mel_bins=128, snip_edges=False, dither=0).
#pragma once

#include <cstddef>

#include "buffers.h"
#include "simd.h"

namespace clsp {

constexpr int kSampleRate = 16000;
constexpr int kWindow = 400;
constexpr int kHop = 160;
constexpr int kLeft = (kWindow - kHop) / 2;  // samples of frame 0 that precede the clip
constexpr int kBins = 128;
constexpr float kPaddingValue = -23.025850929940457f;  // log(1e-10), far below real silence

inline std::size_t frame_count(std::size_t samples) { return (samples + kHop / 2) / kHop; }

// Frames are cut from `samples`, followed by zeros up to `padded_size`, all mirrored at both ends.
// The reference sets padded_size to samples.size() in inference, and to the size of the batch's
// longest clip in training.
struct Clip {
  Span<const float> samples;
  std::size_t padded_size;
};

// Writes frame_count(clip.samples.size()) rows of kBins natural-log energies.
void fbank(const Clip& clip, float* rows, Isa isa);

const float* povey_window();     // (kWindow,)
void mel_matrix(float* matrix);  // (257, kBins), row-major

}  // namespace clsp
