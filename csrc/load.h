// Loads one recording: selects the part to read, decodes it, checks it and resamples it.
#pragma once

#include <optional>
#include <string>

#include "buffers.h"
#include "simd.h"
#include "source.h"

namespace clsp {

// What is accepted. A requested part may end up to slack_s after the end of its recording.
struct LoadPolicy {
  int sample_rate_hz;  // of the result
  double min_s, max_s, slack_s;
  int min_rate_hz, max_rate_hz, max_channels;
  float max_amplitude;
};

struct Part {
  double start_s = 0.0;
  double duration_s = -1.0;  // negative: up to the end
  int channel = -1;          // negative: the mean over channels
};

// The recording is the file at `path`, or `bytes` if `path` is empty.
struct LoadRequest {
  std::string path;
  Span<const std::uint8_t> bytes;
  Part part;
};

struct Loaded {
  Samples samples;
  std::string reason, message;  // why there are no samples; `reason` is empty if there are
};

// Decodes a WAV or FLAC recording to mono at the policy's rate. Returns the reason of a failure
// instead of throwing AudioFailure.
Loaded load(const LoadRequest& request, const LoadPolicy& policy, Isa isa);

// Checks and resamples samples from another decoder.
Loaded finish(Span<const float> samples, int sample_rate_hz, const LoadPolicy& policy, Isa isa);

struct Header {
  int channels, sample_rate_hz;
  std::uint64_t frames;
};

// Frames first .. first + count - 1.
struct Section {
  std::uint64_t first, count;
};

struct Probed {
  std::uint64_t offset;          // where the recording begins in its file
  std::optional<Header> header;  // none if another decoder has to read the recording
  bool frames_known;             // false: a FLAC header without a length
};

// Reads only the header. Throws AudioFailure.
Probed probe(const LoadRequest& request);

// The frames of `part`. Throws AudioFailure if the policy refuses the header or the part.
Section select_section(const Header& header, const Part& part, const LoadPolicy& policy);

}  // namespace clsp
