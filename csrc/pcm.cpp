#include "pcm.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace clsp {
namespace {

constexpr std::array<float, 256> alaw_table() {
  std::array<float, 256> table{};
  for (int code = 0; code < 256; ++code) {
    const int bits = code ^ 0x55, exponent = (bits >> 4) & 7, mantissa = (bits & 15) * 16;
    const int size = exponent == 0 ? mantissa + 8 : (mantissa + 0x108) << (exponent - 1);
    table[static_cast<std::size_t>(code)] =
        static_cast<float>((bits & 0x80) ? size : -size) / 32768.0f;
  }
  return table;
}

constexpr std::array<float, 256> mulaw_table() {
  std::array<float, 256> table{};
  for (int code = 0; code < 256; ++code) {
    const int bits = ~code & 0xFF, exponent = (bits >> 4) & 7;
    const int size = ((((bits & 15) << 3) + 0x84) << exponent) - 0x84;
    table[static_cast<std::size_t>(code)] =
        static_cast<float>((bits & 0x80) ? -size : size) / 32768.0f;
  }
  return table;
}

constexpr std::array<float, 256> kAlawTable = alaw_table(), kMulawTable = mulaw_table();

template <class T>
CLSP_INLINE T load_as(const std::uint8_t* p) {
  T value;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  std::memcpy(&value, p, sizeof value);
#else
  std::reverse_copy(p, p + sizeof value, reinterpret_cast<std::uint8_t*>(&value));
#endif
  return value;
}

CLSP_INLINE float s24_sample(const std::uint8_t* p) {
  const std::uint32_t top =
      std::uint32_t{p[0]} << 8 | std::uint32_t{p[1]} << 16 | std::uint32_t{p[2]} << 24;
  return static_cast<float>(static_cast<std::int32_t>(top)) / 2147483648.0f;
}

// Decodes eight samples from the first 24 of 32 readable bytes.
CLSP_INLINE Lanes<8>::Float s24_samples(const std::uint8_t* p) {
  using Bytes = std::uint8_t __attribute__((vector_size(32)));
  using Int = Lanes<8>::Int;
  Int words;
  std::memcpy(&words, p, sizeof words);
  // Moves four samples to each half, then each sample to the upper three bytes of a word. The shift
  // extends the sign.
  const auto halves = bits_of<Bytes>(shuffle<0, 1, 2, 3, 3, 4, 5, 6>(words, words));
  const auto spread =
      shuffle<0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11,  //
              16, 16, 17, 18, 19, 19, 20, 21, 22, 22, 23, 24, 25, 25, 26, 27>(halves, halves);
  return __builtin_convertvector(bits_of<Int>(spread) >> 8, Lanes<8>::Float) / 8388608.0f;
}

template <bool kHasByteShuffles>
CLSP_INLINE void decode_s24(const std::uint8_t* bytes, Span<float> samples) {
  std::size_t i = 0;
  if constexpr (kHasByteShuffles) {
    for (; i + 11 <= samples.size(); i += 8) store(&samples[i], s24_samples(bytes + 3 * i));
  }
  for (; i < samples.size(); ++i) samples[i] = s24_sample(bytes + 3 * i);
}

template <class Stored>
CLSP_INLINE void decode_scaled(const std::uint8_t* bytes, Span<float> samples, float full_scale) {
  for (std::size_t i = 0; i < samples.size(); ++i) {
    samples[i] = static_cast<float>(load_as<Stored>(bytes + i * sizeof(Stored))) / full_scale;
  }
}

template <bool kHasByteShuffles>
CLSP_INLINE void decode(SampleFormat format, const std::uint8_t* bytes, Span<float> samples) {
  switch (format) {
    case SampleFormat::kU8:
      for (std::size_t i = 0; i < samples.size(); ++i) {
        samples[i] = static_cast<float>(bytes[i] - 128) / 128.0f;
      }
      return;
    case SampleFormat::kS16:
      return decode_scaled<std::int16_t>(bytes, samples, 32768.0f);
    case SampleFormat::kS24:
      return decode_s24<kHasByteShuffles>(bytes, samples);
    case SampleFormat::kS32:
      return decode_scaled<std::int32_t>(bytes, samples, 2147483648.0f);
    case SampleFormat::kF32:
      return decode_scaled<float>(bytes, samples, 1.0f);
    case SampleFormat::kF64:
      return decode_scaled<double>(bytes, samples, 1.0f);
    case SampleFormat::kAlaw:
      for (std::size_t i = 0; i < samples.size(); ++i) samples[i] = kAlawTable[bytes[i]];
      return;
    case SampleFormat::kMulaw:
      for (std::size_t i = 0; i < samples.size(); ++i) samples[i] = kMulawTable[bytes[i]];
  }
}

CLSP_INLINE void mix(const float* frames, std::size_t channels, int channel, Span<float> mono) {
  if (channel >= 0) {
    frames += channel;
    for (std::size_t i = 0; i < mono.size(); ++i) mono[i] = frames[i * channels];
  } else if (channels == 2) {  // a constant step lets the loop vectorise
    for (std::size_t i = 0; i < mono.size(); ++i) {
      mono[i] = (frames[2 * i] + frames[2 * i + 1]) / 2.0f;
    }
  } else {
    for (std::size_t i = 0; i < mono.size(); ++i, frames += channels) {
      float sum = 0.0f;
      for (std::size_t c = 0; c < channels; ++c) sum += frames[c];
      mono[i] = sum / static_cast<float>(channels);
    }
  }
}

struct DecodeWork {
  SampleFormat format;
  const std::uint8_t* bytes;
  Span<float> samples;

  template <std::size_t Bytes>
  CLSP_INLINE void run() const {
    decode<(Bytes > 16)>(format, bytes, samples);
  }
};

struct MixWork {
  const float* frames;
  std::size_t channels;
  int channel;
  Span<float> mono;

  template <std::size_t Bytes>
  CLSP_INLINE void run() const {
    mix(frames, channels, channel, mono);
  }
};

}  // namespace

std::uint32_t sample_bytes(SampleFormat format) {
  switch (format) {
    case SampleFormat::kS16:
      return 2;
    case SampleFormat::kS24:
      return 3;
    case SampleFormat::kS32:
    case SampleFormat::kF32:
      return 4;
    case SampleFormat::kF64:
      return 8;
    default:
      return 1;
  }
}

bool is_bounded(SampleFormat format) {
  return format != SampleFormat::kF32 && format != SampleFormat::kF64;
}

void decode_samples(SampleFormat format, const std::uint8_t* bytes, Span<float> samples, Isa isa) {
  dispatch_up_to_32_bytes(isa, DecodeWork{format, bytes, samples});
}

void mix_to_mono(Span<const float> frames, int channels, int channel, Span<float> mono, Isa isa) {
  const auto count = static_cast<std::size_t>(channels);
  dispatch_up_to_32_bytes(isa, MixWork{frames.data(), count, channel, mono});
}

}  // namespace clsp
