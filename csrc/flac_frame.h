// One frame of a FLAC stream (RFC 9639, section 9) from bytes in memory.
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
  bool fixed_block;      // `number` counts frames, otherwise samples
  std::uint64_t number;  // of this frame, or of its first sample
  std::size_t bytes;     // of the header itself
};

// Bytes that must be readable behind those of a frame; their values do not matter.
inline constexpr std::size_t kFlacGuard = 32;

// The size of the longest frame header.
inline constexpr std::size_t kFlacHeaderBytes = 16;

// A damaged frame. Thrown and caught within the decoder.
struct FlacDamage : std::exception {
  explicit FlacDamage(const char* text, bool end = false) : what_is_wrong(text), at_end(end) {}
  const char* what() const noexcept override { return what_is_wrong; }

  const char* what_is_wrong;
  bool at_end;  // the bytes ended too early: with more bytes the frame may be whole
};

// Throws FlacDamage unless `bytes` begin with a header that has the right checksum and agrees with
// the header of the stream.
FlacFrameHeader parse_flac_header(Span<const std::uint8_t> bytes, const FlacInfo& info);

// Decodes frames, one after the other, into the same buffers.
class FlacFrameDecoder {
 public:
  FlacFrameDecoder(const FlacInfo& info, Isa isa);

  // Decodes the frame at the start of `bytes`; kFlacGuard more bytes must be readable behind them.
  // Returns its length in bytes. Throws FlacDamage.
  std::size_t decode(Span<const std::uint8_t> bytes, const FlacFrameHeader& header);

  // Writes samples [first, first + mono.size()) of the last frame: one channel, or the mean over
  // channels where `channel` is negative.
  void convert(std::size_t first, int channel, Span<float> mono) const;

 private:
  // The predictor reads this many values before a channel's first sample; they do not matter.
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
