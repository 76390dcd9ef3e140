// Encodings of samples in WAV files, and their conversion to mono float32.
#pragma once

#include <cstdint>

#include "buffers.h"
#include "simd.h"

namespace clsp {

enum class SampleFormat { kU8, kS16, kS24, kS32, kF32, kF64, kAlaw, kMulaw };

std::uint32_t sample_bytes(SampleFormat format);

// Whether the encoding holds only samples within [-1, 1].
bool is_bounded(SampleFormat format);

// Decodes samples.size() little-endian samples: integers to [-1, 1), floats unchanged.
void decode_samples(SampleFormat format, const std::uint8_t* bytes, Span<float> samples, Isa isa);

// Writes one channel of interleaved frames, or the mean over channels if `channel` is negative.
void mix_to_mono(Span<const float> frames, int channels, int channel, Span<float> mono, Isa isa);

}  // namespace clsp
