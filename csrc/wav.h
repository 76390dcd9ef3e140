// WAV files: parsed and decoded to mono float32 from a path or from memory, touching only the bytes
// that are asked for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "checked.h"
#include "pcm.h"

namespace clsp {

// Random access to the bytes of one recording.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual std::uint64_t size() const = 0;
  // Reads up to `count` bytes at `offset`; fewer only at the end.
  virtual std::size_t read(std::uint64_t offset, std::uint8_t* bytes, std::size_t count) const = 0;
};

// Throws AudioFailure("open") unless `path` is a regular file that can be read.
std::unique_ptr<ByteSource> open_file(const std::string& path);
std::unique_ptr<ByteSource> open_memory(Span<const std::uint8_t> bytes);

struct WavInfo {
  SampleFormat format;
  int channels;
  int sample_rate_hz;
  std::uint64_t data_offset;
  std::uint64_t frames;
};

bool is_wav(const ByteSource& source);

// Reads the chunks up to "data". A data size of 0, 0xFFFFFFFF or beyond the end means "up to the
// end"; bytes of an incomplete last frame are dropped. Throws AudioFailure("format" | "channels").
WavInfo parse_wav(const ByteSource& source);

// Decodes frames [first, first + mono.size()) of one channel, or of the mean over channels where
// `channel` is negative. Scale: integers to [-1, 1), floats as they are.
void decode_wav(const ByteSource& source, const WavInfo& info, std::uint64_t first, int channel,
                Span<float> mono, Isa isa);

}  // namespace clsp
