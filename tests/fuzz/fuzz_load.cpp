// libFuzzer target: bytes -> decode -> resample -> features, as in extract_files. Samples must be
// finite, in range and not empty; a failure must have one of the fixed reasons.
//
// The first kRequestBytes of an input choose the part and the policy; a recording follows. In this
// build the FLAC decoder ignores checksums, because a mutated input almost never has correct ones.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "batch.h"

namespace {

constexpr std::size_t kRequestBytes = 4;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "promise broken: %s\n", what);
  std::abort();
}

bool is_known(const std::string& reason) {
  static const char* const kReasons[] = {"empty",      "format",    "channels",        "rate",
                                         "segment",    "too_short", "too_long",        "truncated",
                                         "non_finite", "amplitude", clsp::kOtherFormat};
  return std::any_of(std::begin(kReasons), std::end(kReasons),
                     [&](const char* known) { return reason == known; });
}

void check(const clsp::Loaded& loaded, const clsp::LoadPolicy& policy) {
  if (!loaded.reason.empty()) {
    require(is_known(loaded.reason), "a failure has a known reason");
    return;
  }
  const auto samples = loaded.samples.view();
  require(samples.size() > 0, "a loaded recording has samples");
  require(static_cast<double>(samples.size()) <= policy.max_s * policy.sample_rate_hz + 1,
          "a loaded recording is not longer than max_s");
  for (const float x : samples) {
    require(std::abs(x) <= policy.max_amplitude, "samples are finite and in range");
  }
  std::vector<float> features((clsp::frame_count(samples.size()) + 1) * clsp::kBins, NAN);
  clsp::fbank_batch({{samples, samples.size()}}, features.data(), features.size() / clsp::kBins, 1,
                    clsp::best_isa());
  for (const float x : features) require(std::isfinite(x), "features are finite");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < kRequestBytes) return 0;
  // Short limits keep each run fast. Most inputs have the rate of the policy and are not resampled.
  const clsp::LoadPolicy policy{
      data[3] % 4 == 0 ? 8000 : 16000, 0.005, 20.0, 0.1, 1000, 192000, 64, 16.0f};
  const std::vector<std::uint8_t> recording(data + kRequestBytes, data + size);
  clsp::LoadRequest request;
  request.bytes = {recording.data(), recording.size()};
  request.part.start_s = data[0] < 128 ? 0.0 : (data[0] - 128) / 100.0;
  request.part.duration_s = data[1] < 128 ? -1.0 : (data[1] - 127) / 100.0;
  request.part.channel = static_cast<int>(data[2] % 8) - 4;
  const clsp::Isa isa = data[3] % 2 == 0 ? clsp::best_isa() : clsp::Isa::kBaseline;
  const std::vector<clsp::Loaded> loaded = clsp::load_batch({request}, policy, 1, isa);
  check(loaded.front(), policy);
  return 0;
}
