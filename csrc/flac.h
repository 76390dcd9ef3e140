// FLAC streams (RFC 9639): parsed and decoded to mono float32, reading only the frames that are
// asked for.
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
  std::uint64_t frames;      // samples of each channel; 0: not stated
  std::uint64_t data_offset;
};

// Reads the metadata blocks of the stream that begins at `offset`. Throws
// AudioFailure("format" | "truncated").
FlacInfo parse_flac(const ByteSource& source, std::uint64_t offset);

struct FlacPart {
  Samples samples;
  std::uint64_t end;  // the sample where decoding stopped, counted from the start of the stream
};

// Decodes samples [first, first + count) of one channel, or of the mean over channels if `channel`
// is negative, to [-1, 1). Checks the checksums and the number of every frame that it reads. Memory
// grows with what is decoded, whatever the header says. A stream of unknown length may end before
// first + count. Throws AudioFailure("truncated") if a frame is damaged, or missing from a stream
// of stated length; AudioFailure("format") if frames or another stream follow the stated end.
FlacPart decode_flac(const ByteSource& source, const FlacInfo& info, std::uint64_t first,
                     std::uint64_t count, int channel, Isa isa);

}  // namespace clsp
