// Many recordings at once. A thread works on one recording at a time.
#pragma once

#include <vector>

#include "buffers.h"
#include "fbank.h"
#include "load.h"
#include "simd.h"

namespace clsp {

// Loads every recording; a failure does not affect the other recordings.
std::vector<Loaded> load_batch(const std::vector<LoadRequest>& requests, const LoadPolicy& policy,
                               int threads, Isa isa);

// Resamples every waveform. Throws std::invalid_argument for rates outside 1 .. kMaxRateHz.
std::vector<Samples> resample_batch(const std::vector<Span<const float>>& waveforms, int from_hz,
                                    int to_hz, int threads, Isa isa);

// Writes features into out (clips.size(), rows, kBins). Rows after a clip's last frame get
// kPaddingValue.
void fbank_batch(const std::vector<Clip>& clips, float* out, std::size_t rows, int threads,
                 Isa isa);

}  // namespace clsp
