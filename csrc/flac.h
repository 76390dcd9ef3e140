// Parses FLAC streams (RFC 9639) and decodes them to mono float32. Reads only the frames that are
// needed.
#pragma once

#include <cstdint>

#include "buffers.h"
#include "simd.h"
#include "source.h"

namespace clsp {

struct FlacInfo {
  int channels;
  int sample_rate_hz;
  int bits;                  // per sample, 4 .. 32
  int min_block, max_block;  // in samples
  std::uint64_t frames;      // samples of each channel; 0 if the header does not state it
  std::uint64_t data_offset;
};

// Reads the metadata blocks of the stream that begins at `offset`. Throws
// AudioFailure("format" | "truncated").
FlacInfo parse_flac(const ByteSource& source, std::uint64_t offset);

struct FlacPart {
  Samples samples;
  std::uint64_t end;  // the sample where decoding stopped, counted from the start of the stream
};

// Decodes samples [first, first + count) to [-1, 1): those of one channel, or their mean over
// channels if `channel` is negative. Checks the checksums and the number of every frame that it
// reads. The length in the header does not determine how much memory is allocated. A stream of
// unknown length may end before first + count. Throws AudioFailure("truncated") if a frame is
// damaged or missing, or if a stream ends before its stated length. Throws AudioFailure("format")
// if frames or another stream follow the stated end.
FlacPart decode_flac(const ByteSource& source, const FlacInfo& info, std::uint64_t first,
                     std::uint64_t count, int channel, Isa isa);

}  // namespace clsp
