#include "batch.h"

#include <algorithm>

#include "resample.h"
#include "threads.h"

namespace clsp {

std::vector<Loaded> load_batch(const std::vector<LoadRequest>& requests, const LoadPolicy& policy,
                               int threads, Isa isa) {
  std::vector<Loaded> loaded(requests.size());
  for_each(requests.size(), threads,
           [&](std::size_t i) { loaded[i] = load(requests[i], policy, isa); });
  return loaded;
}

std::vector<Samples> resample_batch(const std::vector<Span<const float>>& waveforms, int from_hz,
                                    int to_hz, int threads, Isa isa) {
  const auto plan = resample_plan(from_hz, to_hz);
  std::vector<Samples> resampled(waveforms.size());
  for_each(waveforms.size(), threads, [&](std::size_t i) {
    resampled[i] = Samples(resampled_size(waveforms[i].size(), from_hz, to_hz));
    resample(*plan, waveforms[i], resampled[i].span(), isa);
  });
  return resampled;
}

void fbank_batch(const std::vector<Clip>& clips, float* out, std::size_t rows, int threads,
                 Isa isa) {
  const std::size_t clip_size = checked_multiply(rows, kBins);
  checked_multiply(clips.size(), clip_size);
  // Starting a thread takes about 15 us, so each thread gets at least 100 us of work: 4 s of audio.
  constexpr std::size_t kSamplesPerThread = 4 * kSampleRate;
  std::size_t samples = 0;
  for (const Clip& clip : clips) samples += clip.samples.size();
  const auto max_threads =
      static_cast<int>(std::min<std::size_t>(samples / kSamplesPerThread, 1024));
  for_each(clips.size(), std::min(threads, max_threads), [&](std::size_t i) {
    float* const begin = out + i * clip_size;
    const std::size_t used = frame_count(clips[i].samples.size()) * kBins;
    if (used != 0) fbank(clips[i], begin, isa);
    std::fill(begin + used, begin + clip_size, kPaddingValue);
  });
}

}  // namespace clsp
