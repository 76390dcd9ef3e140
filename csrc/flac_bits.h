// The bits of a FLAC frame: a reader that holds up to 63 of them in a register, and the loop that
// takes nearly all of a decoder's time, residuals and prediction together.
#pragma once

#include <cstddef>
#include <cstdint>

#include "flac_frame.h"
#include "simd.h"

namespace clsp {

CLSP_INLINE std::uint64_t load_big_endian(const std::uint8_t* p) {
  std::uint64_t value;
  __builtin_memcpy(&value, p, sizeof value);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

// Reads behind the end give bits of the guard; whoever asks for more than those gets FlacDamage.
class FlacBits {
 public:
  FlacBits(const std::uint8_t* begin, const std::uint8_t* end)
      : next_(begin), last_(end + sizeof bits_), end_(end) {}

  // At least 56 bits, of which those behind the guard are never used: see last_.
  CLSP_INLINE void fill() {
    if (__builtin_expect(next_ > last_, 0)) throw FlacDamage("its frame is cut", true);
    bits_ |= load_big_endian(next_) >> count_;
    next_ += (63 - count_) >> 3;
    count_ |= 56;
  }

  // `count` bits as an unsigned number, 0 .. 33.
  std::uint64_t unsigned_bits(int count) {
    fill();
    const std::uint64_t value = bits_ >> 1 >> (63 - count);
    drop(count);
    return value;
  }

  // `count` bits as a two's complement number, 1 .. 33.
  std::int64_t signed_bits(int count) {
    fill();
    const auto value = static_cast<std::int64_t>(bits_) >> (64 - count);
    drop(count);
    return value;
  }

  // Zeros before the next one, which is read too.
  std::uint64_t unary() {
    std::uint64_t zeros = 0;
    for (fill(); bits_ >> 8 == 0; fill()) {
      drop(56);
      zeros += 56;
    }
    const int rest = __builtin_clzll(bits_);
    drop(rest + 1);
    return zeros + static_cast<std::uint64_t>(rest);
  }

  void align_to_byte() { drop(static_cast<int>(count_ & 7)); }
  const std::uint8_t* position() const { return next_ - (count_ >> 3); }
  [[noreturn]] void damaged(const char* what) const { throw FlacDamage(what, position() > end_); }

  // The residual of Rice parameter k that comes next, if the whole code is at hand, as it nearly
  // always is behind fill(); false, and nothing is read, if it is not. To stay in registers a copy
  // of the reader may take short codes only.
  CLSP_INLINE bool short_code(unsigned k, std::int64_t& residual) {
    const unsigned zeros = bits_ == 0 ? 64 : static_cast<unsigned>(__builtin_clzll(bits_));
    if (__builtin_expect(zeros + k >= count_, 0)) return false;
    // The one that ends the zeros stays on top of the k bits behind it, as 2^k.
    const std::uint64_t shifted = bits_ << zeros, ahead = std::uint64_t{1} << k;
    residual = unfold((std::uint64_t{zeros} << k) + (shifted >> (63 - k)) - ahead);
    bits_ = shifted << (k + 1);
    count_ -= zeros + k + 1;
    return true;
  }

  std::int64_t long_code(unsigned k) {
    const std::uint64_t high = unary();
    if (high >> (32 - k) != 0) damaged("a residual has more than 32 bits");
    return unfold(high << k | unsigned_bits(static_cast<int>(k)));
  }

 private:
  CLSP_INLINE void drop(int count) {
    bits_ <<= count;
    count_ -= static_cast<unsigned>(count);
  }
  // 0, 1, 2, 3, 4 ... stand for 0, -1, 1, -2, 2 ...
  static CLSP_INLINE std::int64_t unfold(std::uint64_t folded) {
    return static_cast<std::int64_t>(folded >> 1 ^ (0 - (folded & 1)));
  }

  std::uint64_t bits_ = 0;   // the next ones, from the top; below them more that fill() finds again
  std::uint64_t count_ = 0;  // how many of them are counted, 0 .. 63
  const std::uint8_t* next_;
  const std::uint8_t* last_;  // to have read so far means that the frame went on behind its end
  const std::uint8_t* end_;
};

// x[i] = residual + (sum_j weights[j] x[i - 1 - j] >> shift). Weights behind the order are 0.
struct FlacPredictor {
  std::int64_t weights[32] = {};
  int shift = 0;
};

// 64 bits hold every sum that a sound stream asks for: 32 products of 15 and 33 bits, and a
// residual of 32 bits shifted by up to 15. A damaged one may ask for more, so the arithmetic is
// unsigned: it wraps.
template <int N, class Sample>
CLSP_INLINE Sample predict(const FlacPredictor& predictor, const Sample* x, std::int64_t residual) {
  auto sum = static_cast<std::uint64_t>(residual) << predictor.shift;
  // The latest sample comes last: the next one waits for it alone.
#pragma GCC unroll 32
  for (int j = N - 1; j >= 0; --j) {
    sum += static_cast<std::uint64_t>(predictor.weights[j]) *
           static_cast<std::uint64_t>(std::int64_t{x[-1 - j]});
  }
  return static_cast<Sample>(static_cast<std::int64_t>(sum) >> predictor.shift);
}

// Decodes `count` samples of one partition into x, which the samples before it precede.
template <int N, class Sample>
CLSP_INLINE void rice_partition(FlacBits& bits, unsigned k, const FlacPredictor& predictor,
                                Sample* x, std::size_t count) {
  FlacBits local = bits;
  const FlacPredictor own = predictor;
  const auto decode = [&](Sample* to) {
    std::int64_t residual;
    if (__builtin_expect(!local.short_code(k, residual), 0)) {
      bits = local;
      residual = bits.long_code(k);
      local = bits;
    }
    *to = predict<N>(own, to, residual);
  };
  std::size_t i = 0;
  for (; i + 1 < count; i += 2) {  // two codes seldom have more bits than are at hand
    local.fill();
    decode(x + i);
    decode(x + i + 1);
  }
  if (i < count) {
    local.fill();
    decode(x + i);
  }
  bits = local;
}

}  // namespace clsp
