// The bytes of one recording, from a file or from memory, and what they are.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#include "checked.h"

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

// The reason of a recording that is readable but not for this engine: another decoder may know it.
inline constexpr char kOtherFormat[] = "other_format";

inline bool has_tag(const std::uint8_t* p, const char* tag) { return std::memcmp(p, tag, 4) == 0; }

enum class ContentKind { kWav, kFlac, kOther };

struct Content {
  ContentKind kind;
  std::uint64_t offset;  // of the first byte behind what precedes the recording
};

// Looks behind ID3v2 tags, a byte order mark and zero bytes: a file cut from a stream or put
// together by hand may begin with them. FLAC in Ogg is of another kind.
Content find_content(const ByteSource& source);

}  // namespace clsp
