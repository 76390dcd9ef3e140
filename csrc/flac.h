// FLAC files (RFC 9639): parsed and decoded to mono float32 from a path or from memory, reading
// only the frames that are asked for.
#pragma once

#include <cstdint>

#include "checked.h"
#include "simd.h"
#include "source.h"

namespace clsp {

struct FlacInfo {
  int channels;
  int sample_rate_hz;
  int bits;                  // of a sample, 4 .. 32
  int min_block, max_block;  // in samples
  std::uint64_t frames;      // 0: not stated
  std::uint64_t data_offset;
};

// Reads the metadata blocks of the stream that begins at `offset`. Throws
// AudioFailure("format" | "truncated").
FlacInfo parse_flac(const ByteSource& source, std::uint64_t offset);

struct FlacPart {
  Samples samples;
  std::uint64_t end;  // where decoding stopped, counted from the start of the stream
};

// Decodes samples [first, first + count) of one channel, or of the mean over channels where
// `channel` is negative, to [-1, 1). Every frame that is read has its checksums and its place in
// the stream checked. Memory grows with what is really decoded, whatever the header says. Throws
// AudioFailure("truncated") where a frame is damaged, or missing from a stream of stated length; a
// stream of unknown length gives what there is. Throws AudioFailure("format") where more follows
// behind the end: frames, or another stream.
FlacPart decode_flac(const ByteSource& source, const FlacInfo& info, std::uint64_t first,
                     std::uint64_t count, int channel, Isa isa);

}  // namespace clsp
