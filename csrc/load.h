// Loading one recording: which part of it is read, decoding, checks, and resampling.
#pragma once

#include <optional>
#include <string>

#include "buffers.h"
#include "simd.h"
#include "source.h"

namespace clsp {

// What is accepted, and the sample rate of the result.
struct LoadPolicy {
  int sample_rate_hz;
  double min_s, max_s, slack_s;
  int min_rate_hz, max_rate_hz, max_channels;
  float max_amplitude;
};

// The part of a recording to load.
struct Part {
  double start_s = 0.0;
  double duration_s = -1.0;  // negative: up to the end
  int channel = -1;          // negative: the mean over channels
};

// A recording: `path`, or `bytes` if that is empty.
struct LoadRequest {
  std::string path;
  Span<const std::uint8_t> bytes;
  Part part;
};

// Samples, or the reason why there are none.
struct Loaded {
  Samples samples;
  std::string reason, message;  // `reason` is empty if there are samples
};

// Decodes a WAV or FLAC recording to mono at the policy's rate. Does not throw AudioFailure, but
// returns its reason, which is kOtherFormat if another decoder may know the format.
Loaded load(const LoadRequest& request, const LoadPolicy& policy, Isa isa);

// What follows decoding: checks `samples` and resamples them. For samples from other decoders.
Loaded finish(Span<const float> samples, int sample_rate_hz, const LoadPolicy& policy, Isa isa);

// What the header of a file states.
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
