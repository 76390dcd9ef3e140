// Many utterances at once, one utterance being the unit of work of a thread.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "checked.h"
#include "fbank.h"

namespace clsp {

// Calls work(0) .. work(count - 1), each once, from at most `threads` threads, and returns when all
// are done; the first exception is thrown again. Threads live as long as the call: nothing is left
// behind that a fork() could break or an exiting interpreter would have to end. Threads that wait
// between the calls were measured to save 10 us a call (docs/log.md).
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

// The reason of an item that is readable but neither WAV nor FLAC: another decoder may know it.
inline constexpr char kOtherFormat[] = "other_format";

// Decodes WAV and FLAC recordings to mono at the policy's rate. No failure of an item touches the
// others.
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

// The frames of `part`, or AudioFailure if the policy refuses the header or the part.
Section select_section(const Header& header, const Part& part, const LoadPolicy& policy);

// Writes features into out (clips.size(), rows, kBins) and padding behind the last frame of each.
void fbank_batch(const std::vector<Clip>& clips, float* out, std::size_t rows, int threads,
                 Isa isa);

}  // namespace clsp
