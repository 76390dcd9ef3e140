// Parses WAV files and decodes them to mono float32. Reads only the frames that are needed.
#pragma once

#include <cstdint>

#include "buffers.h"
#include "pcm.h"
#include "source.h"

namespace clsp {

struct WavInfo {
  SampleFormat format;
  int channels;
  int sample_rate_hz;
  std::uint64_t data_offset;
  std::uint64_t frames;          // stated by the header; in a stream, counted in the file
  std::uint64_t present_frames;  // fewer than `frames` if the file ends before its stated length
  bool stream;                   // the samples extend to the end of the file
};

// Reads the RIFF, RF64 or BW64 file that begins at `offset`, up to the head of its "data" chunk.
// - Streams and interrupted recordings do not state their length. A data size of 0 before samples,
//   or of at least 0x7FFFFF00 and beyond the end of the file, means "up to the end".
// - Bytes of an incomplete last frame are dropped.
// - An empty "data" chunk is skipped if another one holds samples.
// - A second file or a second chunk of samples after the first is refused.
// Throws AudioFailure("format" | "channels"), or kOtherFormat for an unknown encoding.
WavInfo parse_wav(const ByteSource& source, std::uint64_t offset);

// Decodes frames [first, first + mono.size()) of one channel, or of the mean over channels if
// `channel` is negative: integers to [-1, 1), floats unchanged. Throws AudioFailure("format") if a
// second file begins among the frames of a stream.
void decode_wav(const ByteSource& source, const WavInfo& info, std::uint64_t first, int channel,
                Span<float> mono, Isa isa);

}  // namespace clsp
