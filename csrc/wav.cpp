#include "wav.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

namespace clsp {
namespace {

class FileSource : public ByteSource {
 public:
  // O_NONBLOCK: opening a named pipe must not wait for its other end.
  explicit FileSource(const std::string& path)
      : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (descriptor_ < 0) throw AudioFailure("open", std::strerror(errno));
    struct stat status;
    const bool regular = ::fstat(descriptor_, &status) == 0 && S_ISREG(status.st_mode);
    if (!regular) {
      ::close(descriptor_);
      throw AudioFailure("open", "not a regular file; pass its bytes or a file object instead");
    }
    size_ = static_cast<std::uint64_t>(status.st_size);
  }
  ~FileSource() override { ::close(descriptor_); }
  FileSource(const FileSource&) = delete;
  FileSource& operator=(const FileSource&) = delete;

  std::uint64_t size() const override { return size_; }

  std::size_t read(std::uint64_t offset, std::uint8_t* bytes, std::size_t count) const override {
    std::size_t done = 0;
    while (done < count) {
      const auto at = static_cast<off_t>(offset + done);
      const ssize_t got = ::pread(descriptor_, bytes + done, count - done, at);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw AudioFailure("open", std::strerror(errno));
      if (got == 0) break;
      done += static_cast<std::size_t>(got);
    }
    return done;
  }

 private:
  int descriptor_;
  std::uint64_t size_ = 0;
};

class MemorySource : public ByteSource {
 public:
  explicit MemorySource(Span<const std::uint8_t> bytes) : bytes_(bytes) {}

  std::uint64_t size() const override { return bytes_.size(); }

  std::size_t read(std::uint64_t offset, std::uint8_t* bytes, std::size_t count) const override {
    if (offset >= bytes_.size()) return 0;
    const auto begin = static_cast<std::size_t>(offset);
    const std::size_t got = std::min(count, bytes_.size() - begin);
    std::memcpy(bytes, bytes_.data() + begin, got);
    return got;
  }

 private:
  Span<const std::uint8_t> bytes_;
};

std::uint32_t little_endian(const std::uint8_t* p, int bytes) {
  std::uint32_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= static_cast<std::uint32_t>(p[i]) << (8 * i);
  return value;
}

bool has_tag(const std::uint8_t* p, const char* tag) { return std::memcmp(p, tag, 4) == 0; }

constexpr std::uint32_t kPcm = 1, kFloat = 3, kAlawTag = 6, kMulawTag = 7, kExtensible = 0xFFFE;

SampleFormat sample_format(std::uint32_t tag, std::uint32_t bits) {
  const std::uint32_t bytes = (bits + 7) / 8;
  if (tag == kPcm && bytes == 1) return SampleFormat::kU8;
  if (tag == kPcm && bytes == 2) return SampleFormat::kS16;
  if (tag == kPcm && bytes == 3) return SampleFormat::kS24;
  if (tag == kPcm && bytes == 4) return SampleFormat::kS32;
  if (tag == kFloat && bits == 32) return SampleFormat::kF32;
  if (tag == kFloat && bits == 64) return SampleFormat::kF64;
  if (tag == kAlawTag && bits == 8) return SampleFormat::kAlaw;
  if (tag == kMulawTag && bits == 8) return SampleFormat::kMulaw;
  throw AudioFailure("format", "WAV encoding " + std::to_string(tag) + " with " +
                                   std::to_string(bits) +
                                   " bits is not supported; convert it to 16-bit PCM");
}

WavInfo parse_format(const ByteSource& source, std::uint64_t offset, std::uint32_t size) {
  std::uint8_t chunk[40] = {};
  const std::size_t wanted = std::min<std::size_t>(size, sizeof chunk);
  if (wanted < 16 || source.read(offset, chunk, wanted) < wanted) {
    throw AudioFailure("format", "the WAV format chunk is incomplete");
  }
  std::uint32_t tag = little_endian(chunk, 2);
  // An extensible header names the encoding in the first two bytes of its GUID.
  if (tag == kExtensible && wanted >= 26) tag = little_endian(chunk + 24, 2);
  const std::uint32_t channels = little_endian(chunk + 2, 2), rate = little_endian(chunk + 4, 4);
  const std::uint32_t frame_bytes = little_endian(chunk + 12, 2);
  if (channels == 0) throw AudioFailure("channels", "the WAV header says 0 channels");
  WavInfo info{};
  info.format = sample_format(tag, little_endian(chunk + 14, 2));
  info.channels = static_cast<int>(channels);
  info.sample_rate_hz = static_cast<int>(std::min<std::uint32_t>(rate, 0x7FFFFFFF));
  if (frame_bytes != channels * sample_bytes(info.format)) {
    throw AudioFailure("format", "the WAV header contradicts itself: " + std::to_string(channels) +
                                     " channels in frames of " + std::to_string(frame_bytes) +
                                     " bytes");
  }
  return info;
}

}  // namespace

std::unique_ptr<ByteSource> open_file(const std::string& path) {
  if (path.find('\0') != std::string::npos) {
    throw AudioFailure("open", "the path holds a NUL character");
  }
  return std::make_unique<FileSource>(path);
}

std::unique_ptr<ByteSource> open_memory(Span<const std::uint8_t> bytes) {
  return std::make_unique<MemorySource>(bytes);
}

bool is_wav(const ByteSource& source) {
  std::uint8_t head[12];
  return source.read(0, head, sizeof head) == sizeof head && has_tag(head, "RIFF") &&
         has_tag(head + 8, "WAVE");
}

WavInfo parse_wav(const ByteSource& source) {
  WavInfo info{};
  std::uint64_t offset = 12;
  std::uint8_t head[8];
  // A chunk takes at least 8 bytes; the cap bounds the walk through a file made of empty ones.
  for (int chunks = 0; chunks < 65536 && source.read(offset, head, 8) == 8; ++chunks) {
    const std::uint32_t size = little_endian(head + 4, 4);
    offset += 8;
    if (has_tag(head, "fmt ")) info = parse_format(source, offset, size);
    if (has_tag(head, "data")) {
      if (info.channels == 0) break;
      const std::uint64_t rest = source.size() - offset;
      const std::uint64_t bytes = size == 0 ? rest : std::min<std::uint64_t>(size, rest);
      const auto channels = static_cast<std::uint32_t>(info.channels);
      info.data_offset = offset;
      info.frames = bytes / (channels * sample_bytes(info.format));
      return info;
    }
    offset += std::uint64_t{size} + (size & 1);
  }
  throw AudioFailure("format", info.channels == 0
                                   ? "the WAV file has no format chunk before its data"
                                   : "the WAV file has no data chunk");
}

void decode_wav(const ByteSource& source, const WavInfo& info, std::uint64_t first, int channel,
                Span<float> mono, Isa isa) {
  constexpr std::size_t kBlockBytes = std::size_t{1} << 15;  // stays in the first-level cache
  const auto channels = static_cast<std::size_t>(info.channels);
  const std::size_t step = channels * sample_bytes(info.format);
  const std::size_t block = std::min(std::max<std::size_t>(1, kBlockBytes / step), mono.size());
  std::vector<std::uint8_t> bytes(step * block);
  Samples interleaved(channels == 1 ? 0 : channels * block);
  for (std::size_t done = 0; done < mono.size(); done += block) {
    const std::size_t frames = std::min(block, mono.size() - done);
    const std::uint64_t offset = info.data_offset + (first + done) * step;
    if (source.read(offset, bytes.data(), frames * step) != frames * step) {
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
