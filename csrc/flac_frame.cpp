#include "flac_frame.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "flac_bits.h"

namespace clsp {
namespace {

// Fuzzing ignores checksums, because a mutated input almost never has correct ones.
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
constexpr bool kVerifyChecksums = false;
#else
constexpr bool kVerifyChecksums = true;
#endif

constexpr std::array<std::uint8_t, 256> crc8_table() {
  std::array<std::uint8_t, 256> table{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    unsigned crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc << 1 ^ ((crc & 0x80) != 0 ? 0x107 : 0);
    table[byte] = static_cast<std::uint8_t>(crc);
  }
  return table;
}

// Row r holds the checksum of each byte followed by r zero bytes.
constexpr std::size_t kCrcBytes = 16;
using Crc16Rows = std::array<std::array<std::uint16_t, 256>, kCrcBytes>;

constexpr Crc16Rows crc16_rows() {
  Crc16Rows rows{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    unsigned crc = byte << 8;
    for (std::size_t row = 0; row < kCrcBytes; ++row) {
      for (int bit = 0; bit < 8; ++bit) crc = crc << 1 ^ ((crc & 0x8000) != 0 ? 0x18005 : 0);
      rows[row][byte] = static_cast<std::uint16_t>(crc);
    }
  }
  return rows;
}

constexpr std::array<std::uint8_t, 256> kCrc8 = crc8_table();
constexpr Crc16Rows kCrc16 = crc16_rows();

unsigned crc16(const std::uint8_t* p, const std::uint8_t* end) {
  unsigned crc = 0;
  for (; end - p >= static_cast<std::ptrdiff_t>(kCrcBytes); p += kCrcBytes) {
    unsigned next =
        kCrc16[kCrcBytes - 1][p[0] ^ crc >> 8] ^ kCrc16[kCrcBytes - 2][p[1] ^ (crc & 0xFF)];
#pragma GCC unroll 16
    for (std::size_t i = 2; i < kCrcBytes; ++i) next ^= kCrc16[kCrcBytes - 1 - i][p[i]];
    crc = next;
  }
  for (; p != end; ++p) crc = (crc << 8 & 0xFFFF) ^ kCrc16[0][*p ^ crc >> 8];
  return crc;
}

// The number of a frame or sample, encoded like UTF-8 in up to 7 bytes.
std::uint64_t parse_number(const std::uint8_t*& p) {
  const unsigned first = *p++;
  if (first < 0x80) return first;
  const int ones = __builtin_clz(~(first << 24));
  if (ones == 1 || ones == 8) throw FlacDamage("its frame number is malformed");
  std::uint64_t number = first & (0x7Fu >> ones);
  for (int i = 1; i < ones; ++i, ++p) {
    if ((*p & 0xC0) != 0x80) throw FlacDamage("its frame number is malformed");
    number = number << 6 | (*p & 0x3Fu);
  }
  return number;
}

std::size_t parse_block(unsigned code, const std::uint8_t*& p) {
  if (code == 0) throw FlacDamage("its block size is reserved");
  if (code == 1) return 192;
  if (code < 6) return std::size_t{144} << code;
  if (code >= 8) return std::size_t{1} << code;
  std::size_t block = *p++;
  if (code == 7) block = block << 8 | *p++;
  return block + 1;
}

// Returns 0 if the frame does not state its rate, because the header of the stream does.
int parse_rate(unsigned code, const std::uint8_t*& p) {
  constexpr int kRates[12] = {0,     88200, 176400, 192000, 8000,  16000,
                              22050, 24000, 32000,  44100,  48000, 96000};
  if (code < 12) return kRates[code];
  if (code == 15) throw FlacDamage("its sample rate is invalid");
  if (code == 12) return 1000 * *p++;
  const int rate = p[0] << 8 | p[1];
  p += 2;
  return code == 13 ? rate : 10 * rate;
}

// Decodes one partition of 32-bit samples with the first N weights.
template <int N>
struct PartitionWork {
  FlacBits& bits;
  unsigned k;
  const FlacPredictor& predictor;
  std::int32_t* x;
  std::size_t count;

  CLSP_INLINE void run() const { rice_partition<N>(bits, k, predictor, x, count); }
};

template <int N>
void decode_partition(FlacBits& bits, unsigned k, const FlacPredictor& predictor, Isa isa,
                      std::int32_t* x, std::size_t count) {
  dispatch_bit_instructions(isa, PartitionWork<N>{bits, k, predictor, x, count});
}

// Rounds an order up to an N for which PartitionWork is compiled.
constexpr int compiled_order(int order) {
  return order <= 12 ? order : order <= 16 ? 16 : order <= 24 ? 24 : 32;
}

template <int... Order>
void decode_order(std::integer_sequence<int, Order...>, int order, FlacBits& bits, unsigned k,
                  const FlacPredictor& predictor, Isa isa, std::int32_t* x, std::size_t count) {
  static constexpr decltype(&decode_partition<0>) kDecoders[] = {
      decode_partition<compiled_order(Order)>...};
  kDecoders[order](bits, k, predictor, isa, x, count);
}

void decode_rice(FlacBits& bits, unsigned k, const FlacPredictor& predictor, int order, Isa isa,
                 std::int32_t* x, std::size_t count) {
  decode_order(std::make_integer_sequence<int, 33>{}, order, bits, k, predictor, isa, x, count);
}

void decode_rice(FlacBits& bits, unsigned k, const FlacPredictor& predictor, int, Isa,
                 std::int64_t* x, std::size_t count) {
  rice_partition<32>(bits, k, predictor, x, count);
}

template <class Sample>
void decode_residuals(FlacBits& bits, const FlacPredictor& predictor, int order, Isa isa, Sample* x,
                      std::size_t block) {
  const auto method = static_cast<int>(bits.unsigned_bits(2));
  if (method > 1) bits.damaged("its residual coding is reserved");
  const auto partition_order = static_cast<int>(bits.unsigned_bits(4));
  const std::size_t partition = block >> partition_order;
  const auto warm_up = static_cast<std::size_t>(order);
  if (partition << partition_order != block || partition < warm_up) {
    bits.damaged("its partitions do not fit the block");
  }
  const int parameter_bits = 4 + method;
  const unsigned escape = (1u << parameter_bits) - 1;
  for (std::size_t begin = warm_up, end = partition; end <= block; begin = end, end += partition) {
    const auto k = static_cast<unsigned>(bits.unsigned_bits(parameter_bits));
    if (k != escape) {
      decode_rice(bits, k, predictor, order, isa, x + begin, end - begin);
      continue;
    }
    const auto width = static_cast<int>(bits.unsigned_bits(5));
    for (std::size_t i = begin; i < end; ++i) {
      x[i] = predict<32>(predictor, x + i, width == 0 ? 0 : bits.signed_bits(width));
    }
  }
}

FlacPredictor fixed_predictor(int order) {
  constexpr int kWeights[5][4] = {{}, {1}, {2, -1}, {3, -3, 1}, {4, -6, 4, -1}};
  FlacPredictor predictor;
  std::copy_n(kWeights[order], order, predictor.weights);
  return predictor;
}

FlacPredictor parse_predictor(FlacBits& bits, int order) {
  FlacPredictor predictor;
  const int precision = static_cast<int>(bits.unsigned_bits(4)) + 1;
  predictor.shift = static_cast<int>(bits.signed_bits(5));
  if (precision == 16 || predictor.shift < 0) bits.damaged("its predictor is invalid");
  for (int j = 0; j < order; ++j) predictor.weights[j] = bits.signed_bits(precision);
  return predictor;
}

template <class Sample>
void decode_subframe(FlacBits& bits, int width, Isa isa, Sample* x, std::size_t block) {
  if (bits.unsigned_bits(1) != 0) bits.damaged("a subframe does not begin with 0");
  const auto type = static_cast<int>(bits.unsigned_bits(6));
  const std::uint64_t wasted = bits.unsigned_bits(1) != 0 ? bits.unary() + 1 : 0;
  if (wasted >= static_cast<std::uint64_t>(width)) bits.damaged("all of its bits are wasted");
  width -= static_cast<int>(wasted);
  if (type == 0) {
    std::fill_n(x, block, static_cast<Sample>(bits.signed_bits(width)));
  } else if (type == 1) {
    for (std::size_t i = 0; i < block; ++i) x[i] = static_cast<Sample>(bits.signed_bits(width));
  } else {
    const bool lpc = type >= 32;
    const int order = lpc ? type - 31 : type - 8;
    if (order < 0 || (!lpc && order > 4)) bits.damaged("its subframe type is reserved");
    if (static_cast<std::size_t>(order) > block) bits.damaged("its predictor exceeds the block");
    for (int i = 0; i < order; ++i) x[i] = static_cast<Sample>(bits.signed_bits(width));
    const FlacPredictor predictor = lpc ? parse_predictor(bits, order) : fixed_predictor(order);
    decode_residuals(bits, predictor, order, isa, x, block);
  }
  if (wasted != 0) {
    using Unsigned = std::make_unsigned_t<Sample>;
    for (std::size_t i = 0; i < block; ++i) {
      x[i] = static_cast<Sample>(static_cast<Unsigned>(x[i]) << wasted);
    }
  }
}

// Replaces the two channels of a frame with left and right. A damaged frame may overflow, so the
// arithmetic is unsigned, which wraps.
template <class Sample>
void restore(FlacFrameHeader::Stereo stereo, std::int32_t* first, std::int32_t* second,
             const Sample* side, std::size_t block) {
  using Unsigned = std::make_unsigned_t<Sample>;
  const auto narrow = [](Unsigned x) { return static_cast<std::int32_t>(static_cast<Sample>(x)); };
  const auto half = [](Unsigned x) {
    return static_cast<std::int32_t>(static_cast<Sample>(x) >> 1);
  };
  const auto widen = [](std::int32_t x) { return static_cast<Unsigned>(Sample{x}); };
  for (std::size_t i = 0; i < block; ++i) {
    const auto difference = static_cast<Unsigned>(side[i]);
    if (stereo == FlacFrameHeader::kLeftSide) {
      second[i] = narrow(widen(first[i]) - difference);
    } else if (stereo == FlacFrameHeader::kSideRight) {
      first[i] = narrow(widen(second[i]) + difference);
    } else {
      const Unsigned sum = widen(first[i]) << 1 | (difference & 1);
      first[i] = half(sum + difference);
      second[i] = half(sum - difference);
    }
  }
}

}  // namespace

FlacFrameHeader parse_flac_header(Span<const std::uint8_t> bytes, const FlacInfo& info) {
  std::uint8_t head[kFlacHeaderBytes + 1] = {};
  std::copy_n(bytes.begin(), std::min(bytes.size(), kFlacHeaderBytes), head);
  constexpr unsigned kSync = 0xFFF8, kBits[8] = {0, 8, 12, 0, 16, 20, 24, 32};
  const unsigned assignment = head[3] >> 4, size_code = head[3] >> 1 & 7;
  if (((head[0] << 8 | head[1]) & 0xFFFEu) != kSync || (head[3] & 1) != 0 || assignment > 10) {
    throw FlacDamage("no frame begins there", bytes.size() < 4);
  }
  FlacFrameHeader header{};
  header.fixed_block = (head[1] & 1) == 0;
  header.stereo = static_cast<FlacFrameHeader::Stereo>(assignment < 8 ? 0 : assignment - 7);
  const std::uint8_t* p = head + 4;
  header.number = parse_number(p);
  header.block = parse_block(head[2] >> 4, p);
  const int rate = parse_rate(head[2] & 15, p);
  unsigned crc = 0;
  for (const std::uint8_t* q = head; q != p; ++q) crc = kCrc8[crc ^ *q];
  header.bytes = static_cast<std::size_t>(p + 1 - head);
  if (header.bytes > bytes.size()) throw FlacDamage("its header is cut", true);
  if (kVerifyChecksums && crc != *p) throw FlacDamage("the checksum of its header is wrong");
  const int channels = assignment < 8 ? static_cast<int>(assignment) + 1 : 2;
  const int width = size_code == 0 ? info.bits : static_cast<int>(kBits[size_code]);
  if (channels != info.channels || width != info.bits ||
      (rate != 0 && rate != info.sample_rate_hz)) {
    throw FlacDamage("it contradicts the header of the file");
  }
  return header;
}

FlacFrameDecoder::FlacFrameDecoder(const FlacInfo& info, Isa isa) : info_(info), isa_(isa) {}

std::size_t FlacFrameDecoder::decode(Span<const std::uint8_t> bytes,
                                     const FlacFrameHeader& header) {
  stride_ = kHistory + header.block;
  const std::size_t needed = stride_ * static_cast<std::size_t>(info_.channels);
  if (samples_.size() < needed) samples_.resize(needed);
  FlacBits bits(bytes.data() + header.bytes, bytes.end());
  for (int c = 0; c < info_.channels; ++c) {
    const bool side = header.stereo == FlacFrameHeader::kSideRight
                          ? c == 0
                          : header.stereo != FlacFrameHeader::kIndependent && c == 1;
    if (side && info_.bits == 32) {
      wide_.resize(std::max(wide_.size(), stride_));
      decode_subframe(bits, 33, isa_, wide_.data() + kHistory, header.block);
    } else {
      decode_subframe(bits, info_.bits + side, isa_, channel(c), header.block);
    }
  }
  bits.align_to_byte();
  const std::uint8_t* const end = bits.position();
  if (bytes.end() - end < 2) throw FlacDamage("its frame is cut", true);
  if (kVerifyChecksums && crc16(bytes.data(), end) != static_cast<unsigned>(end[0] << 8 | end[1])) {
    throw FlacDamage("its checksum is wrong");
  }
  if (header.stereo != FlacFrameHeader::kIndependent) restore_stereo(header);
  return static_cast<std::size_t>(end + 2 - bytes.begin());
}

void FlacFrameDecoder::restore_stereo(const FlacFrameHeader& header) {
  if (info_.bits == 32) {
    restore(header.stereo, channel(0), channel(1), wide_.data() + kHistory, header.block);
  } else {
    const int side = header.stereo == FlacFrameHeader::kSideRight ? 0 : 1;
    restore(header.stereo, channel(0), channel(1), channel(side), header.block);
  }
}

void FlacFrameDecoder::convert(std::size_t first, int channel, Span<float> mono) const {
  const float scale = 1.0f / static_cast<float>(std::uint64_t{1} << (info_.bits - 1));
  const std::int32_t* x = samples_.data() + kHistory + first;
  if (channel > 0) x += stride_ * static_cast<std::size_t>(channel);
  const int summed = channel < 0 ? info_.channels : 1;
  for (std::size_t i = 0; i < mono.size(); ++i) mono[i] = static_cast<float>(x[i]) * scale;
  if (summed == 1) return;
  for (int c = 1; c < summed; ++c) {
    x += stride_;
    for (std::size_t i = 0; i < mono.size(); ++i) mono[i] += static_cast<float>(x[i]) * scale;
  }
  for (float& sample : mono) sample /= static_cast<float>(summed);
}

}  // namespace clsp
