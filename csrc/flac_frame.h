// Decodes one frame of a FLAC stream (RFC 9639, section 9) from bytes in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <vector>

#include "buffers.h"
#include "flac.h"
#include "simd.h"

namespace clsp {

struct FlacFrameHeader {
  enum Stereo { kIndependent, kLeftSide, kSideRight, kMidSide };

  std::size_t block;     // samples of each channel
  Stereo stereo;         // how the two channels were decorrelated
  bool fixed_block;      // if true, `number` counts frames; otherwise it counts samples
  std::uint64_t number;  // of this frame, or of its first sample
  std::size_t bytes;     // the size of the header itself
};

// This many bytes must be readable after those of a frame. Their values do not matter.
inline constexpr std::size_t kFlacGuard = 32;

inline constexpr std::size_t kFlacHeaderBytes = 16;  // of the longest frame header

// A damaged frame. Thrown and caught within the decoder.
struct FlacDamage : std::exception {
  explicit FlacDamage(const char* text, bool end = false) : what_is_wrong(text), at_end(end) {}
  const char* what() const noexcept override { return what_is_wrong; }

  const char* what_is_wrong;
  bool at_end;  // the bytes ended within the frame: with more bytes, decoding may succeed
};

// Throws FlacDamage if `bytes` do not begin with a frame header, or if its checksum is wrong, or if
// it contradicts the header of the stream.
FlacFrameHeader parse_flac_header(Span<const std::uint8_t> bytes, const FlacInfo& info);

// Decodes frames one after the other. Every frame overwrites the previous one.
class FlacFrameDecoder {
 public:
  FlacFrameDecoder(const FlacInfo& info, Isa isa);

  // Decodes the frame at the start of `bytes`, after which kFlacGuard more bytes must be readable.
  // Returns its length in bytes. Throws FlacDamage.
  std::size_t decode(Span<const std::uint8_t> bytes, const FlacFrameHeader& header);

  // Writes samples [first, first + mono.size()) of the last frame: one channel, or the mean over
  // channels if `channel` is negative.
  void convert(std::size_t first, int channel, Span<float> mono) const;

 private:
  // The predictor reads this many values before a channel's first sample, with weights of 0.
  static constexpr std::size_t kHistory = 32;

  std::int32_t* channel(int c) { return samples_.data() + c * stride_ + kHistory; }
  void restore_stereo(const FlacFrameHeader& header);

  FlacInfo info_;
  Isa isa_;
  std::size_t stride_ = 0;
  std::vector<std::int32_t> samples_;
  std::vector<std::int64_t> wide_;  // the side channel of 32-bit samples has 33 bits
};

}  // namespace clsp
