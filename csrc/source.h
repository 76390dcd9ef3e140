// Reads the bytes of a recording from a file or from memory, and recognises their format.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "buffers.h"

namespace clsp {

// Thrown if a recording cannot be used. `reason` is one of the values of
// clsp_fast.audio.AudioErrorReason, or kOtherFormat.
class AudioFailure : public std::runtime_error {
 public:
  AudioFailure(const char* reason, const std::string& message)
      : std::runtime_error(message), reason_(reason) {}
  const char* reason() const { return reason_; }

 private:
  const char* reason_;
};

// The reason if this engine cannot decode the format. Another decoder may be able to.
inline constexpr char kOtherFormat[] = "other_format";

// Random access to the bytes of one recording.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual std::uint64_t size() const = 0;
  // Reads `count` bytes at `offset`, or fewer at the end. Returns the number of bytes read.
  virtual std::size_t read(std::uint64_t offset, std::uint8_t* bytes, std::size_t count) const = 0;
};

// Throws AudioFailure("open") unless `path` is a regular file that can be read.
std::unique_ptr<ByteSource> open_file(const std::string& path);
std::unique_ptr<ByteSource> open_memory(Span<const std::uint8_t> bytes);

inline bool has_tag(const std::uint8_t* p, const char* tag) { return std::memcmp(p, tag, 4) == 0; }

enum class ContentKind { kWav, kFlac, kOther };

struct Content {
  ContentKind kind;
  std::uint64_t offset;  // where the recording begins in its file
};

// Finds the recording after ID3v2 tags, a byte order mark and zero bytes. A file that was cut from
// a stream or put together by hand may begin with them. FLAC in Ogg is kOther.
Content find_content(const ByteSource& source);

}  // namespace clsp
