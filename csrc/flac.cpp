#include "flac.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "flac_frame.h"

namespace clsp {
namespace {

constexpr std::uint8_t kStreamInfoBytes = 34;
constexpr std::size_t kWindowBytes = std::size_t{1} << 16;

std::uint32_t big_endian(const std::uint8_t* p, int bytes) {
  std::uint32_t value = 0;
  for (int i = 0; i < bytes; ++i) value = value << 8 | p[i];
  return value;
}

// The bytes of the file from offset() on that are in memory. Reads more bytes when they are needed.
class Window {
 public:
  explicit Window(const ByteSource& source) : source_(source) {}

  void move_to(std::uint64_t offset) {
    if (offset >= offset_ && offset - offset_ <= size_) {
      first_ += static_cast<std::size_t>(offset - offset_);
      size_ -= static_cast<std::size_t>(offset - offset_);
    } else {
      first_ = size_ = 0;
    }
    offset_ = offset;
  }

  // Returns at least `wanted` bytes, or fewer at the end of the file. kFlacGuard more bytes are
  // readable. When bytes are missing, reads until at least `at_once` bytes are in memory.
  Span<const std::uint8_t> bytes(std::size_t wanted, std::size_t at_once = kWindowBytes) {
    if (size_ < wanted && !complete()) {
      const std::uint64_t left = source_.size() - offset_;
      const auto target =
          static_cast<std::size_t>(std::min<std::uint64_t>(left, std::max(wanted, at_once)));
      if (first_ > 0) std::memmove(buffer_.data(), buffer_.data() + first_, size_);
      first_ = 0;
      if (buffer_.size() < target + kFlacGuard) buffer_.resize(target + kFlacGuard);
      size_ += source_.read(offset_ + size_, buffer_.data() + size_, target - size_);
      if (size_ < target)
        throw AudioFailure("truncated", "the file became shorter while it was read");
    }
    return {buffer_.data() + first_, size_};
  }

  // Whether the bytes in memory reach the end of the file.
  bool complete() const { return offset_ + size_ >= source_.size(); }
  std::uint64_t offset() const { return offset_; }

 private:
  const ByteSource& source_;
  std::vector<std::uint8_t> buffer_;
  std::uint64_t offset_ = 0;
  std::size_t first_ = 0, size_ = 0;
};

class FrameReader {
 public:
  FrameReader(const ByteSource& source, const FlacInfo& info, Isa isa)
      : info_(info), window_(source), decoder_(info, isa), file_bytes_(source.size()) {
    go_to({info.data_offset, 0, std::nullopt});
  }

  // Where the next frame begins: the number of samples before it, and its offset in the file.
  std::uint64_t position() const { return next_.position; }
  std::uint64_t offset() const { return next_.offset; }
  const FlacFrameDecoder& decoder() const { return decoder_; }

  // Whether the file ends here, or after an ID3v1 tag.
  bool at_end() {
    const Span<const std::uint8_t> rest = window_.bytes(kTagBytes + 1);
    return rest.size() == 0 ||
           (rest.size() == kTagBytes && std::memcmp(rest.data(), "TAG", 3) == 0);
  }

  // Whether another stream begins in the next kSearchBytes, as after `cat a.flac b.flac`.
  bool another_stream_follows() {
    const Span<const std::uint8_t> rest = window_.bytes(kSearchBytes, kSearchBytes);
    static constexpr std::uint8_t kBegin[] = {'f', 'L', 'a', 'C', 0, 0, 0, kStreamInfoBytes};
    for (std::size_t i = 0; i + sizeof kBegin <= rest.size(); ++i) {
      const void* at = std::memchr(rest.data() + i, 'f', rest.size() - i);
      if (at == nullptr) return false;
      i = static_cast<std::size_t>(static_cast<const std::uint8_t*>(at) - rest.data());
      if (i + sizeof kBegin > rest.size()) return false;
      // The first bit says whether this metadata block is the last one.
      if (std::memcmp(at, kBegin, 4) == 0 && (rest[i + 4] & 0x7F) == 0 &&
          std::memcmp(rest.data() + i + 5, kBegin + 5, 3) == 0) {
        return true;
      }
    }
    return false;
  }

  // Whether the header of the next frame follows.
  bool another_frame_follows() {
    try {
      const FlacFrameHeader header = parse_flac_header(window_.bytes(kFlacHeaderBytes), info_);
      return header.number == next_.number;
    } catch (const FlacDamage&) {
      return false;
    }
  }

  // Decodes the next frame. Throws FlacDamage.
  void decode_next() {
    for (std::size_t wanted = frame_bytes_;;) {
      const Span<const std::uint8_t> bytes = window_.bytes(wanted);
      try {
        const FlacFrameHeader header = parse_flac_header(bytes, info_);
        if (next_.number && header.number != *next_.number) {
          throw FlacDamage("frames before it are missing");
        }
        const std::size_t size = decoder_.decode(bytes, header);
        frame_bytes_ = std::max(frame_bytes_, size + size / 2);
        go_to({next_.offset + size, next_.position + header.block,
               header.number + (header.fixed_block ? 1 : header.block)});
        return;
      } catch (const FlacDamage& damage) {
        if (!damage.at_end || window_.complete()) throw;
        wanted = checked_multiply(bytes.size(), 2);
      }
    }
  }

  // Moves forward to a frame that begins at or shortly before sample `target`.
  void seek(std::uint64_t target) {
    const Place start = next_;
    if (start.offset >= file_bytes_) return;
    try {
      const FlacFrameHeader header = parse_flac_header(window_.bytes(kFlacHeaderBytes), info_);
      // Frame numbers give no position if the frames differ in size.
      if (header.fixed_block && info_.min_block != info_.max_block) return;
      const Place place = bisect(header, target);
      go_to(place);
      decode_next();  // throws if bytes in the middle of a frame only look like a header
      go_to(place);
    } catch (const FlacDamage&) {
      go_to(start);
    }
  }

 private:
  struct Place {
    std::uint64_t offset, position;
    std::optional<std::uint64_t> number;
  };

  static constexpr std::size_t kTagBytes = 128;
  static constexpr std::size_t kScanBytes = std::size_t{1} << 14;
  static constexpr std::size_t kSearchBytes = std::size_t{1} << 20;

  void go_to(const Place& place) {
    next_ = place;
    window_.move_to(place.offset);
  }

  // Finds a frame that begins at or before sample `target`, at most kWindowBytes bytes before the
  // last such frame. `first`: the header of the next frame.
  Place bisect(const FlacFrameHeader& first, std::uint64_t target) {
    Place best{next_.offset, 0, first.number};
    std::uint64_t end = file_bytes_;
    while (end - best.offset > kWindowBytes) {
      const std::uint64_t middle = best.offset + (end - best.offset) / 2;
      const std::optional<Place> place = find_frame(middle, end, first);
      if (place && place->position > best.position && place->position <= target) {
        best = *place;
      } else {
        end = middle;
      }
    }
    return best;
  }

  // The first frame that begins in [begin, end), if any.
  std::optional<Place> find_frame(std::uint64_t begin, std::uint64_t end,
                                  const FlacFrameHeader& first) {
    int attempts = 1000;  // bounds the time for a file that is full of false headers
    while (begin < end) {
      window_.move_to(begin);
      const Span<const std::uint8_t> bytes = window_.bytes(kScanBytes, kScanBytes);
      const bool last = window_.complete();
      if (!last && bytes.size() <= kFlacHeaderBytes) break;
      const std::size_t stop = last ? bytes.size() : bytes.size() - kFlacHeaderBytes;
      for (std::size_t i = 0; i < stop; ++i) {
        const void* sync = std::memchr(bytes.data() + i, 0xFF, stop - i);
        if (sync == nullptr) break;
        i = static_cast<std::size_t>(static_cast<const std::uint8_t*>(sync) - bytes.data());
        if (i + 1 >= bytes.size() || (bytes[i + 1] & 0xFE) != 0xF8) continue;
        if (attempts-- == 0) return std::nullopt;
        try {
          const auto header = parse_flac_header(bytes.subspan(i, bytes.size() - i), info_);
          if (header.fixed_block != first.fixed_block || header.number < first.number) continue;
          const std::uint64_t units = header.number - first.number;
          return Place{begin + i, header.fixed_block ? units * first.block : units, header.number};
        } catch (const FlacDamage&) {
        }
      }
      if (last) break;
      begin += stop;
    }
    return std::nullopt;
  }

  const FlacInfo info_;
  Window window_;
  FlacFrameDecoder decoder_;
  std::uint64_t file_bytes_;
  Place next_{};
  std::size_t frame_bytes_ = std::size_t{1} << 13;  // read first: 1.5 x the largest frame so far
};

}  // namespace

FlacInfo parse_flac(const ByteSource& source, std::uint64_t offset) {
  offset += 4;
  FlacInfo info{};
  std::uint8_t head[4];
  // The limit bounds the time for a file that is full of empty blocks.
  for (int blocks = 0; blocks < 65536; ++blocks) {
    const bool cut = source.read(offset, head, sizeof head) < sizeof head;
    if (cut && blocks > 0) throw AudioFailure("truncated", "the file ends within its metadata");
    const unsigned type = cut ? 127 : head[0] & 0x7F;
    const std::uint32_t size = big_endian(head + 1, 3);
    offset += sizeof head;
    if (blocks == 0) {
      std::uint8_t body[kStreamInfoBytes];
      if (type != 0 || size < sizeof body || source.read(offset, body, sizeof body) < sizeof body) {
        throw AudioFailure("format", "the FLAC file does not begin with its STREAMINFO block");
      }
      info.min_block = static_cast<int>(big_endian(body, 2));
      info.max_block = static_cast<int>(big_endian(body + 2, 2));
      info.sample_rate_hz = static_cast<int>(big_endian(body + 10, 3) >> 4);
      info.channels = static_cast<int>(body[12] >> 1 & 7) + 1;
      info.bits = static_cast<int>(big_endian(body + 12, 2) >> 4 & 31) + 1;
      info.frames = std::uint64_t{body[13] & 15u} << 32 | big_endian(body + 14, 4);
    }
    offset += size;
    if ((head[0] & 0x80) == 0) continue;
    if (info.bits < 4)
      throw AudioFailure("format", "the FLAC header says less than 4 bits a sample");
    info.data_offset = offset;
    return info;
  }
  throw AudioFailure("format", "the FLAC file has too many metadata blocks");
}

FlacPart decode_flac(const ByteSource& source, const FlacInfo& info, std::uint64_t first,
                     std::uint64_t count, int channel, Isa isa) {
  FrameReader frames(source, info, isa);
  if (first > 0) frames.seek(first);
  const std::uint64_t last = first + count;
  // Allocates two samples for each byte of the file, and more only when more are decoded, because
  // the header may state a wrong length.
  FlacPart part{Samples(checked_size(std::min(count, 2 * source.size()))), 0};
  std::uint64_t done = 0;
  const auto fail = [&](const std::string& why) {
    const std::string of = info.frames != 0 ? " of " + std::to_string(count) : "";
    throw AudioFailure("truncated",
                       "decoding stopped after " + std::to_string(done) + of + " samples: " + why);
  };
  const auto refuse_joined = [&] {
    if (!frames.another_stream_follows()) return;
    throw AudioFailure("format",
                       "a second FLAC file follows the first; split them, or join their samples, "
                       "for instance with `sox a.flac b.flac out.flac`");
  };
  try {
    while (frames.position() < last && !frames.at_end()) {
      const std::uint64_t begin = frames.position();
      frames.decode_next();
      const std::uint64_t from = std::max(begin, first), to = std::min(frames.position(), last);
      if (from >= to) continue;
      done = to - first;
      if (done > part.samples.size()) part.samples.resize(checked_size(std::min(count, 2 * done)));
      frames.decoder().convert(static_cast<std::size_t>(from - begin), channel,
                               part.samples.span().subspan(static_cast<std::size_t>(from - first),
                                                           static_cast<std::size_t>(to - from)));
    }
  } catch (const FlacDamage& damage) {
    if (info.frames == 0) refuse_joined();
    fail("the frame at byte " + std::to_string(frames.offset()) + " is damaged (" + damage.what() +
         ")");
  }
  if (info.frames != 0 && done < count) fail("the file ends");
  if (last == info.frames && (frames.position() != last || frames.another_frame_follows())) {
    throw AudioFailure("format", "the FLAC header states " + std::to_string(info.frames) +
                                     " samples, but more follow; decode and encode it again");
  }
  if (last == info.frames) refuse_joined();
  part.samples.resize(static_cast<std::size_t>(done));
  part.end = frames.position();
  return part;
}

}  // namespace clsp
