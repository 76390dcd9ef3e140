#include "wav.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

namespace clsp {
namespace {

std::uint64_t little_endian(const std::uint8_t* p, int bytes) {
  std::uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= static_cast<std::uint64_t>(p[i]) << (8 * i);
  return value;
}

std::uint32_t word(const std::uint8_t* p) {
  return static_cast<std::uint32_t>(little_endian(p, 4));
}
std::uint32_t half_word(const std::uint8_t* p) {
  return static_cast<std::uint32_t>(little_endian(p, 2));
}

constexpr std::uint32_t kPcm = 1, kFloat = 3, kAlawTag = 6, kMulawTag = 7, kExtensible = 0xFFFE;
// The GUID of an extensible header has these bytes after the encoding.
constexpr std::uint8_t kGuidTail[14] = {0, 0, 0, 0, 0x10, 0, 0x80, 0, 0, 0xAA, 0, 0x38, 0x9B, 0x71};

std::optional<SampleFormat> sample_format(std::uint32_t tag, std::uint32_t bits) {
  const std::uint32_t bytes = (bits + 7) / 8;
  if (tag == kPcm && bytes == 1) return SampleFormat::kU8;
  if (tag == kPcm && bytes == 2) return SampleFormat::kS16;
  if (tag == kPcm && bytes == 3) return SampleFormat::kS24;
  if (tag == kPcm && bytes == 4) return SampleFormat::kS32;
  if (tag == kFloat && bits == 32) return SampleFormat::kF32;
  if (tag == kFloat && bits == 64) return SampleFormat::kF64;
  if (tag == kAlawTag) return SampleFormat::kAlaw;
  if (tag == kMulawTag) return SampleFormat::kMulaw;
  return std::nullopt;
}

WavInfo parse_format(const ByteSource& source, std::uint64_t offset, std::uint64_t size) {
  std::uint8_t chunk[40] = {};
  const auto wanted = static_cast<std::size_t>(std::min<std::uint64_t>(size, sizeof chunk));
  if (wanted < 16 || source.read(offset, chunk, wanted) < wanted) {
    throw AudioFailure("format", "the WAV format chunk is incomplete");
  }
  std::uint32_t tag = half_word(chunk);
  // An extensible header states the encoding in the first two bytes of its GUID.
  if (tag == kExtensible && wanted == sizeof chunk &&
      std::memcmp(chunk + 26, kGuidTail, sizeof kGuidTail) == 0) {
    tag = half_word(chunk + 24);
  }
  const std::uint32_t channels = half_word(chunk + 2), rate = word(chunk + 4);
  const std::uint32_t frame_bytes = half_word(chunk + 12), bits = half_word(chunk + 14);
  if (channels == 0) throw AudioFailure("channels", "the WAV header says 0 channels");
  const std::optional<SampleFormat> format = sample_format(tag, bits);
  if (!format) throw AudioFailure(kOtherFormat, "");
  // Frame sizes in headers are often wrong, so channels and bits decide. But 24 bits in 4 bytes are
  // ambiguous: the header does not say which three bytes are used.
  if (*format == SampleFormat::kS24 && frame_bytes == 4 * channels) {
    throw AudioFailure("format", "the WAV header contradicts itself: samples of " +
                                     std::to_string(bits) + " bits in " +
                                     std::to_string(frame_bytes / channels) +
                                     " bytes; convert it to 16-bit PCM");
  }
  WavInfo info{};
  info.format = *format;
  info.channels = static_cast<int>(channels);
  info.sample_rate_hz = static_cast<int>(std::min<std::uint32_t>(rate, 0x7FFFFFFF));
  return info;
}

bool is_metadata(const std::uint8_t* tag) {
  static const char* const kTags[] = {
      "LIST", "JUNK", "junk", "PAD ", "FLLR", "fact", "PEAK", "bext", "iXML", "axml",
      "_PMX", "id3 ", "ID3 ", "cue ", "plst", "labl", "ltxt", "note", "smpl", "inst",
      "acid", "DISP", "cart", "chna", "afsp", "umid", "minf", "elm1", "regn"};
  return std::any_of(std::begin(kTags), std::end(kTags),
                     [&](const char* known) { return has_tag(tag, known); });
}

bool is_known(const std::uint8_t* tag) {
  return is_metadata(tag) || has_tag(tag, "fmt ") || has_tag(tag, "data") || has_tag(tag, "ds64");
}

bool is_printable(const std::uint8_t* tag) {
  return std::all_of(tag, tag + 4, [](std::uint8_t c) { return c >= 0x20 && c < 0x7F; });
}

struct Chunk {
  std::uint8_t tag[4];
  std::uint32_t size;
  std::uint64_t begin;  // of its content
};

// Bounds the time for a file that is full of empty chunks.
constexpr int kMaxChunks = 65536;

// Reads the heads of a file's chunks, one after the other.
class ChunkReader {
 public:
  // `odd`: the chunk that ends at `offset` has an odd size.
  ChunkReader(const ByteSource& source, std::uint64_t offset, bool odd = false)
      : source_(source), offset_(offset), odd_(odd) {}

  std::optional<Chunk> next() {
    std::uint8_t head[9];
    const std::size_t got = source_.read(offset_, head, sizeof head);
    const std::size_t pad = odd_ && got == sizeof head && is_padded(head) ? 1 : 0;
    if (got < 8) return std::nullopt;
    Chunk chunk{};
    std::memcpy(chunk.tag, head + pad, 4);
    chunk.size = word(head + pad + 4);
    chunk.begin = offset_ + pad + 8;
    offset_ = chunk.begin + chunk.size;
    odd_ = chunk.size % 2 == 1;
    return chunk;
  }

  // The end of the latest chunk.
  std::uint64_t offset() const { return offset_; }

 private:
  // Whether `head` begins with the pad byte of a chunk of odd size. The format requires it, but
  // some writers omit it, and in some files it is not zero. If a printable tag begins both at
  // head[0] and at head[1], the chunk sizes decide.
  bool is_padded(const std::uint8_t* head) const {
    if (is_known(head + 1)) return true;
    if (is_known(head)) return false;
    if (!is_printable(head)) return true;
    if (!is_printable(head + 1)) return false;
    return has_valid_end(offset_ + 1, word(head + 5)) || !has_valid_end(offset_, word(head + 4));
  }

  // Whether another chunk begins, or the file ends, where the chunk at `offset` ends.
  bool has_valid_end(std::uint64_t offset, std::uint32_t size) const {
    const std::uint64_t end = offset + 8 + size;
    std::uint8_t next[5];
    const std::size_t got = source_.read(end, next, sizeof next);
    if (end + size % 2 == source_.size() || end == source_.size()) return true;
    return (got >= 4 && is_printable(next)) ||
           (size % 2 == 1 && got == 5 && is_printable(next + 1));
  }

  const ByteSource& source_;
  std::uint64_t offset_;
  bool odd_;
};

// Whether chunks, not samples, begin at `offset`.
bool chunks_follow(const ByteSource& source, std::uint64_t offset) {
  ChunkReader chunks(source, offset);
  for (int read = 0; read < kMaxChunks; ++read) {
    const std::optional<Chunk> chunk = chunks.next();
    if (!chunk || !is_printable(chunk->tag)) return false;
    if (is_known(chunk->tag)) return true;
    const std::uint64_t end = chunks.offset();
    if (end >= source.size() || end + chunk->size % 2 == source.size()) {
      return end <= source.size();
    }
  }
  return false;
}

// Whether a second chunk of samples follows the one that ends at `offset`.
bool more_data_follows(const ByteSource& source, std::uint64_t offset, bool odd) {
  ChunkReader chunks(source, offset, odd);
  for (int read = 0; read < kMaxChunks; ++read) {
    const std::optional<Chunk> chunk = chunks.next();
    if (!chunk || !is_printable(chunk->tag)) return false;
    if (has_tag(chunk->tag, "data") && chunk->size > 0) return true;
  }
  return false;
}

// Whether a second file begins in [offset, end), as after `cat a.wav b.wav`. If `among_samples`, a
// header counts only if a known chunk follows it, because samples may look like a header.
bool another_file_follows(const ByteSource& source, std::uint64_t offset, std::uint64_t end,
                          bool among_samples) {
  constexpr std::size_t kBlockBytes = std::size_t{1} << 18, kHeadBytes = 16;
  std::vector<std::uint8_t> block(
      static_cast<std::size_t>(std::min<std::uint64_t>(end - offset, kBlockBytes)));
  while (offset < end) {
    const std::size_t got = source.read(offset, block.data(), block.size());
    std::size_t from = 8;  // "RIFF" and the size precede "WAVE"
    while (from < got) {
      const void* const match = memmem(block.data() + from, got - from, "WAVE", 4);
      if (match == nullptr) break;
      const auto* const wave = static_cast<const std::uint8_t*>(match);
      const auto* const head = wave - 8;
      const auto rest = static_cast<std::size_t>(block.data() + got - wave);
      if ((has_tag(head, "RIFF") || has_tag(head, "RF64") || has_tag(head, "BW64")) &&
          (!among_samples || (rest >= 8 && is_known(wave + 4)))) {
        return true;
      }
      from = static_cast<std::size_t>(wave - block.data()) + 1;
    }
    if (got < block.size() || got < kHeadBytes) break;
    offset += got - kHeadBytes + 1;
  }
  return false;
}

void refuse_second_file(const ByteSource& source, std::uint64_t begin, std::uint64_t end,
                        bool among_samples) {
  if (!another_file_follows(source, begin, end, among_samples)) return;
  throw AudioFailure("format",
                     "a second WAV file follows the first; split them, or join their samples, "
                     "for instance with `sox a.wav b.wav out.wav`");
}

// Sizes that mean "up to the end" if the file holds less. SoX writes 0x7FFFF000, rounded down to
// whole frames, to a pipe.
bool is_stream_size(std::uint64_t size, std::uint64_t frame_bytes) {
  return size >= 0x7FFFFF00 || (size <= 0x7FFFF000 && size + frame_bytes > 0x7FFFF000);
}

// Writes to `info` where the samples of a "data" chunk are and how many there are. Returns false if
// the chunk is empty. `long_size`: the chunk's size in the header of an RF64 or BW64 file, or 0.
bool locate_samples(const ByteSource& source, const Chunk& chunk, std::uint64_t long_size,
                    WavInfo* info) {
  constexpr std::uint64_t kSearchBytes = std::uint64_t{1} << 20;
  const std::uint64_t frame_bytes =
      std::uint64_t{static_cast<unsigned>(info->channels)} * sample_bytes(info->format);
  const std::uint64_t rest = source.size() - chunk.begin;
  const bool is_long = chunk.size == 0xFFFFFFFF && long_size != 0;
  const std::uint64_t size = is_long ? long_size : chunk.size;
  const bool unknown = is_long ? size >> 63 != 0 : is_stream_size(size, frame_bytes);
  bool stream = unknown && size > rest;
  if (size == 0) stream = rest != 0 && !chunks_follow(source, chunk.begin);
  const std::uint64_t begin = chunk.begin + std::min(size, rest);
  if (!stream)
    refuse_second_file(source, begin, std::min(source.size(), begin + kSearchBytes), false);
  info->data_offset = chunk.begin;
  info->stream = stream;
  info->frames = (stream ? rest : size) / frame_bytes;
  info->present_frames = std::min(rest / frame_bytes, info->frames);
  if (size != 0 && size < rest && more_data_follows(source, begin, size % 2 == 1)) {
    throw AudioFailure(
        "format",
        "a second data chunk follows the first; write their samples as one, or split "
        "them into files");
  }
  return stream || size != 0;
}

}  // namespace

WavInfo parse_wav(const ByteSource& source, std::uint64_t offset) {
  std::optional<WavInfo> info;
  std::uint64_t long_size = 0;
  bool empty = false;
  ChunkReader chunks(source, offset + 12);
  for (int read = 0; read < kMaxChunks; ++read) {
    const std::optional<Chunk> chunk = chunks.next();
    if (!chunk) break;
    if (has_tag(chunk->tag, "fmt ") && !empty) {
      info = parse_format(source, chunk->begin, chunk->size);
    }
    if (has_tag(chunk->tag, "ds64")) {
      std::uint8_t sizes[16] = {};
      source.read(chunk->begin, sizes, sizeof sizes);
      long_size = little_endian(sizes + 8, 8);
    }
    if (!has_tag(chunk->tag, "data")) continue;
    if (!info) break;
    if (locate_samples(source, *chunk, long_size, &*info)) return *info;
    empty = true;
  }
  if (empty) return *info;
  throw AudioFailure("format", info ? "the WAV file has no data chunk"
                                    : "the WAV file has no format chunk before its data");
}

void decode_wav(const ByteSource& source, const WavInfo& info, std::uint64_t first, int channel,
                Span<float> mono, Isa isa) {
  constexpr std::size_t kBlockBytes = std::size_t{1} << 15;  // stays in the first-level cache
  const auto channels = static_cast<std::size_t>(info.channels);
  const std::size_t frame_bytes = channels * sample_bytes(info.format);
  const std::size_t block =
      std::min(std::max<std::size_t>(1, kBlockBytes / frame_bytes), mono.size());
  if (info.stream) {
    // The header does not say where the samples end, so a second file may begin anywhere among
    // them.
    constexpr std::uint64_t kLongestHead = 64;
    const std::uint64_t begin = info.data_offset + first * frame_bytes;
    const std::uint64_t end = begin + mono.size() * frame_bytes + kLongestHead;
    refuse_second_file(source, begin - std::min(kLongestHead, first * frame_bytes),
                       std::min(end, source.size()), true);
  }
  std::vector<std::uint8_t> bytes(frame_bytes * block);
  Samples interleaved(channels == 1 ? 0 : channels * block);
  for (std::size_t done = 0; done < mono.size(); done += block) {
    const std::size_t frames = std::min(block, mono.size() - done);
    const std::uint64_t offset = info.data_offset + (first + done) * frame_bytes;
    if (source.read(offset, bytes.data(), frames * frame_bytes) != frames * frame_bytes) {
      throw AudioFailure("truncated", "the file became shorter while it was read");
    }
    const Span<float> out = mono.subspan(done, frames);
    const Span<float> decoded =
        channels == 1 ? out : interleaved.span().subspan(0, channels * frames);
    decode_samples(info.format, bytes.data(), decoded, isa);
    if (channels > 1) mix_to_mono(decoded, info.channels, channel, out, isa);
  }
}

}  // namespace clsp
