// Many utterances at once, one utterance being the unit of work of a thread.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "checked.h"
#include "fbank.h"
#include "source.h"

namespace clsp {

// Calls work(0) .. work(count - 1), each once, from at most `threads` threads, and returns when all
// are done; the first exception is thrown again. The threads are a Team that lives as long as the
// call; threads that wait between the calls were measured to save 10 us a call (docs/log.md).
void for_each(std::size_t count, int threads, const std::function<void(std::size_t)>& work);

// What is accepted and what is asked for, the same for every item of a batch.
struct LoadPolicy {
  int sample_rate_hz = kSampleRate;
  double min_s, max_s, slack_s;
  int min_rate_hz, max_rate_hz, max_channels;
  float max_amplitude;
};

// The part of a recording that is asked for.
struct Part {
  double start_s = 0.0;
  double duration_s = -1.0;  // negative: up to the end
  int channel = -1;          // negative: the mean over channels
};

// A recording: `path`, or `bytes` where that is empty.
struct LoadRequest {
  std::string path;
  Span<const std::uint8_t> bytes;
  Part part;
};

// Either samples or, where `reason` is not empty, why there are none.
struct Loaded {
  Samples samples;
  std::string reason, message;
};

// Decodes WAV and FLAC recordings to mono at the policy's rate. No failure of an item touches the
// others; its reason is kOtherFormat where another decoder may know it.
std::vector<Loaded> load_batch(const std::vector<LoadRequest>& requests, const LoadPolicy& policy,
                               int threads, Isa isa);

// The part of loading behind the decoder: checks `samples` and resamples them.
Loaded finish(Span<const float> samples, int sample_rate_hz, const LoadPolicy& policy, Isa isa);

// What a file says of itself.
struct Header {
  int channels, sample_rate_hz;
  std::uint64_t frames;
};

struct Section {
  std::uint64_t first, count;
};

// Where a recording begins in its file, and what load_batch goes by, unless another decoder is to
// read it.
struct Probed {
  std::uint64_t offset;
  std::optional<Header> header;
  bool frames_known;
};

// Reads the header alone. Throws AudioFailure.
Probed probe(const LoadRequest& request);

// The frames of `part`, or AudioFailure if the policy refuses the header or the part.
Section select_section(const Header& header, const Part& part, const LoadPolicy& policy);

// Writes features into out (clips.size(), rows, kBins) and padding behind the last frame of each.
void fbank_batch(const std::vector<Clip>& clips, float* out, std::size_t rows, int threads,
                 Isa isa);

}  // namespace clsp
