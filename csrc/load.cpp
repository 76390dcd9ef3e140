#include "load.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "flac.h"
#include "resample.h"
#include "wav.h"

namespace clsp {
namespace {

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.7g", value);
  return text;
}

std::string seconds(double value) { return number(value) + " s"; }

void check_header(const Header& header, int channel, const LoadPolicy& policy) {
  const std::string channels = "has " + std::to_string(header.channels) + " channels; ";
  if (header.channels < 1 || header.channels > policy.max_channels) {
    throw AudioFailure("channels",
                       channels + "1 .. " + std::to_string(policy.max_channels) + " are accepted");
  }
  if (channel >= header.channels) {
    throw AudioFailure("channels", channels + "there is no channel " + std::to_string(channel) +
                                       " (they count from 0)");
  }
  if (header.sample_rate_hz < policy.min_rate_hz || header.sample_rate_hz > policy.max_rate_hz) {
    throw AudioFailure("rate", "has a sample rate of " + std::to_string(header.sample_rate_hz) +
                                   " Hz; " + std::to_string(policy.min_rate_hz) + " .. " +
                                   std::to_string(policy.max_rate_hz) + " Hz are accepted");
  }
}

// Sets `within` to whether all samples are within [-limit, limit]. NaN is not.
struct LimitWork {
  Span<const float> samples;
  float limit;
  bool& within;

  template <std::size_t Bytes>
  CLSP_INLINE void run() const {
    unsigned beyond = 0;
    for (const float x : samples) beyond |= std::abs(x) <= limit ? 0u : 1u;
    within = beyond == 0;
  }
};

void check_samples(Span<const float> samples, const LoadPolicy& policy, Isa isa) {
  bool within = false;
  dispatch_up_to_32_bytes(isa, LimitWork{samples, policy.max_amplitude, within});
  if (within) return;
  const auto acceptable = [limit = policy.max_amplitude](float x) { return std::abs(x) <= limit; };
  const float* first = std::find_if_not(samples.begin(), samples.end(), acceptable);
  const std::string what =
      "holds " + std::to_string(*first) + " at sample " + std::to_string(first - samples.begin());
  if (!std::isfinite(*first)) throw AudioFailure("non_finite", what);
  throw AudioFailure("amplitude", what + "; samples are in [-1, 1] and up to " +
                                      number(policy.max_amplitude) + " is accepted: rescale it");
}

// Checks samples and resamples them. `bounded`: see is_bounded().
Samples check_and_resample(Samples samples, int sample_rate_hz, bool bounded,
                           const LoadPolicy& policy, Isa isa) {
  if (!bounded || policy.max_amplitude < 1.0f) check_samples(samples.view(), policy, isa);
  if (sample_rate_hz == policy.sample_rate_hz) return samples;
  Samples out(resampled_size(samples.size(), sample_rate_hz, policy.sample_rate_hz));
  resample(*resample_plan(sample_rate_hz, policy.sample_rate_hz), samples.view(), out.span(), isa);
  check_samples(out.view(), policy, isa);  // the filter overshoots at steps of the waveform
  return out;
}

template <class Work>
Loaded catch_failure(const Work& work) {
  Loaded loaded;
  try {
    loaded.samples = work();
  } catch (const AudioFailure& failure) {
    loaded.reason = failure.reason();
    loaded.message = failure.what();
  } catch (const std::bad_alloc&) {
    loaded.reason = "memory";
    loaded.message = "there is not enough memory to decode it; load a shorter segment";
  }
  return loaded;
}

Samples load_flac(const ByteSource& source, std::uint64_t offset, const Part& part,
                  const LoadPolicy& policy, Isa isa) {
  const FlacInfo info = parse_flac(source, offset);
  Header header{info.channels, info.sample_rate_hz, info.frames};
  const bool length_known = info.frames != 0;
  Part wanted = part;
  if (!length_known) {
    // The length is known only after the end has been decoded. Until then, assume that the file is
    // long enough for the part.
    if (part.duration_s < 0) wanted.duration_s = policy.max_s;
    const double rate = info.sample_rate_hz;
    header.frames = static_cast<std::uint64_t>(std::min(part.start_s * rate, 0x1p62)) +
                    static_cast<std::uint64_t>(std::min(wanted.duration_s * rate, 0x1p62)) + 2;
  }
  Section section = select_section(header, wanted, policy);
  // One more sample shows whether a file of unknown length exceeds the limit.
  const std::uint64_t count = section.count + (length_known ? 0 : 1);
  FlacPart decoded = decode_flac(source, info, section.first, count, part.channel, isa);
  if (!length_known) {
    header.frames = decoded.end;
    section = select_section(header, part, policy);
    decoded.samples.resize(checked_size(section.count));
  }
  // Not bounded: the predictor may exceed the range of the samples if a frame is damaged.
  return check_and_resample(std::move(decoded.samples), info.sample_rate_hz, false, policy, isa);
}

// The frames of `part`. Throws AudioFailure("truncated") if the file ends before the end of the
// part.
Section select_wav_section(const WavInfo& info, const Part& part, const LoadPolicy& policy) {
  const auto refuse = [&] {
    throw AudioFailure("truncated", "the file ends after " + std::to_string(info.present_frames) +
                                        " of the " + std::to_string(info.frames) +
                                        " samples that its header states");
  };
  const Header header{info.channels, info.sample_rate_hz, info.frames};
  const bool truncated = info.present_frames < info.frames;
  if (truncated && part.duration_s < 0) {
    check_header(header, part.channel, policy);
    refuse();
  }
  const Section section = select_section(header, part, policy);
  if (truncated && section.first + section.count > info.present_frames) refuse();
  return section;
}

std::unique_ptr<ByteSource> open(const LoadRequest& request) {
  auto source = request.path.empty() ? open_memory(request.bytes) : open_file(request.path);
  if (source->size() == 0) throw AudioFailure("empty", "has 0 bytes");
  return source;
}

Samples load_samples(const LoadRequest& request, const LoadPolicy& policy, Isa isa) {
  const auto source = open(request);
  const Content content = find_content(*source);
  if (content.kind == ContentKind::kFlac) {
    return load_flac(*source, content.offset, request.part, policy, isa);
  }
  if (content.kind == ContentKind::kOther) throw AudioFailure(kOtherFormat, "");
  const WavInfo info = parse_wav(*source, content.offset);
  const Section section = select_wav_section(info, request.part, policy);
  Samples samples(checked_size(section.count));
  decode_wav(*source, info, section.first, request.part.channel, samples.span(), isa);
  return check_and_resample(std::move(samples), info.sample_rate_hz, is_bounded(info.format),
                            policy, isa);
}

}  // namespace

Section select_section(const Header& header, const Part& part, const LoadPolicy& policy) {
  check_header(header, part.channel, policy);
  if (header.frames == 0) throw AudioFailure("empty", "has no samples");
  const double rate = header.sample_rate_hz, total_s = static_cast<double>(header.frames) / rate;
  const double rest_s = total_s - part.start_s;
  if (rest_s * rate < 0.5) {
    throw AudioFailure("segment", "ends at " + seconds(total_s) +
                                      ", before the segment's start at " + seconds(part.start_s));
  }
  if (part.duration_s - rest_s > policy.slack_s) {
    throw AudioFailure("truncated", "ends at " + seconds(total_s) +
                                        ", before the segment's end at " +
                                        seconds(part.start_s + part.duration_s));
  }
  const double length_s = part.duration_s < 0 ? rest_s : std::min(part.duration_s, rest_s);
  if (length_s > policy.max_s) {
    throw AudioFailure("too_long", "lasts " + seconds(length_s) + ", more than the limit of " +
                                       seconds(policy.max_s) +
                                       "; load segments of it or raise the limit");
  }
  Section section{};
  section.first = static_cast<std::uint64_t>(std::floor(part.start_s * rate + 0.5));
  section.count = std::min(header.frames - section.first,
                           static_cast<std::uint64_t>(std::floor(length_s * rate + 0.5)));
  if (section.count == 0 || static_cast<double>(section.count) < policy.min_s * rate) {
    throw AudioFailure("too_short", "lasts " + seconds(static_cast<double>(section.count) / rate) +
                                        ", less than the limit of " + seconds(policy.min_s));
  }
  return section;
}

Loaded load(const LoadRequest& request, const LoadPolicy& policy, Isa isa) {
  return catch_failure([&] { return load_samples(request, policy, isa); });
}

Probed probe(const LoadRequest& request) {
  const auto source = open(request);
  const Content content = find_content(*source);
  if (content.kind == ContentKind::kFlac) {
    const FlacInfo info = parse_flac(*source, content.offset);
    const Header header{info.channels, info.sample_rate_hz, info.frames};
    return {content.offset, header, info.frames != 0};
  }
  if (content.kind == ContentKind::kOther) return {content.offset, std::nullopt, false};
  try {
    const WavInfo info = parse_wav(*source, content.offset);
    return {content.offset, Header{info.channels, info.sample_rate_hz, info.frames}, true};
  } catch (const AudioFailure& failure) {
    if (std::strcmp(failure.reason(), kOtherFormat) != 0) throw;
    return {content.offset, std::nullopt, false};
  }
}

Loaded finish(Span<const float> samples, int sample_rate_hz, const LoadPolicy& policy, Isa isa) {
  return catch_failure([&] {
    Samples copy(samples.size());
    std::copy(samples.begin(), samples.end(), copy.data());
    return check_and_resample(std::move(copy), sample_rate_hz, false, policy, isa);
  });
}

}  // namespace clsp
