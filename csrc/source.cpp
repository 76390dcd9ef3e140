#include "source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

namespace clsp {
namespace {

constexpr std::size_t kHeadBytes = 12, kId3HeadBytes = 10;
constexpr std::uint64_t kMaxZeros = std::uint64_t{1} << 16;

class FileSource : public ByteSource {
 public:
  // Without O_NONBLOCK, opening a named pipe would wait for its other end.
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

// Returns the size of the ID3v2 tag that begins with `head`, or 0 if `head` begins no such tag.
std::uint64_t id3_bytes(const std::uint8_t* head) {
  if (std::memcmp(head, "ID3", 3) != 0) return 0;
  const bool footer = (head[5] & 0x10) != 0;
  std::uint32_t size = 0;
  for (int i = 6; i < 10; ++i) size = size << 7 | (head[i] & 0x7Fu);
  return std::uint64_t{kId3HeadBytes} + size + (footer ? kId3HeadBytes : 0);
}

// Returns the offset of the first byte at or after `offset` that is not zero, or of the end of the
// file. Stops after kMaxZeros zeros.
std::uint64_t skip_zeros(const ByteSource& source, std::uint64_t offset) {
  std::array<std::uint8_t, 4096> block;
  for (const std::uint64_t last = offset + kMaxZeros; offset < last;) {
    const std::size_t got = source.read(offset, block.data(), block.size());
    const std::uint8_t* const begin = block.data();
    const std::uint8_t* const end = begin + got;
    const std::uint8_t* const nonzero =
        std::find_if(begin, end, [](std::uint8_t byte) { return byte != 0; });
    offset += static_cast<std::uint64_t>(nonzero - begin);
    if (nonzero != end || got < block.size()) break;
  }
  return offset;
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

Content find_content(const ByteSource& source) {
  std::uint8_t head[kHeadBytes];
  std::uint64_t offset = 0;
  for (int skipped = 0; skipped < 16; ++skipped) {
    const std::size_t got = source.read(offset, head, sizeof head);
    if (got >= 4 && has_tag(head, "fLaC")) return {ContentKind::kFlac, offset};
    if (got >= 1 && head[0] == 0) {
      const std::uint64_t next = skip_zeros(source, offset);
      if (next >= source.size()) break;
      offset = next;
      continue;
    }
    if (got >= 3 && std::memcmp(head, "\xEF\xBB\xBF", 3) == 0) {
      offset += 3;
      continue;
    }
    if (got < kId3HeadBytes) break;
    const bool riff = got == sizeof head &&
                      (has_tag(head, "RIFF") || has_tag(head, "RF64") || has_tag(head, "BW64"));
    if (riff && has_tag(head + 8, "WAVE")) return {ContentKind::kWav, offset};
    const std::uint64_t tag = id3_bytes(head);
    if (tag == 0) break;
    offset += tag;
  }
  return {ContentKind::kOther, offset};
}

}  // namespace clsp
