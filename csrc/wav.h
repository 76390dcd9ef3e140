// WAV files: parsed and decoded to mono float32 from a path or from memory, touching only the bytes
// that are asked for.
#pragma once

#include <cstdint>

#include "checked.h"
#include "pcm.h"
#include "source.h"

namespace clsp {

struct WavInfo {
  SampleFormat format;
  int channels;
  int sample_rate_hz;
  std::uint64_t data_offset;
  std::uint64_t frames;          // as the header states; of a stream, as the file holds
  std::uint64_t present_frames;  // fewer than `frames` where the file is cut
  bool stream;                   // the sound goes up to the end of the file
};

// Reads the chunks up to "data" of the RIFF, RF64 or BW64 file that begins at `offset`. A data size
// of 0 before samples, or of 0x7FFFFF00 and more beyond the end, stands for "up to the end": that
// is how streams, and recordings that were cut off, are written. Bytes of an incomplete last frame
// are dropped; an empty chunk is passed over if another one holds samples. A second file or chunk
// of samples behind the first is refused. Throws AudioFailure("format" | "channels"), or of
// kOtherFormat for an encoding that decode_wav does not know.
WavInfo parse_wav(const ByteSource& source, std::uint64_t offset);

// Decodes frames [first, first + mono.size()) of one channel, or of the mean over channels where
// `channel` is negative. Throws AudioFailure("format") where a second file begins among the frames
// of a stream. Scale: integers to [-1, 1), floats as they are.
void decode_wav(const ByteSource& source, const WavInfo& info, std::uint64_t first, int channel,
                Span<float> mono, Isa isa);

}  // namespace clsp
