// The inner loops of the FLAC decoder, which take nearly all of its time: a bit reader that holds
// up to 63 bits in a register, and the loop that reads residuals and predicts samples.
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

// Up to 16 bytes after `end` are read (see kFlacGuard). After that, fill() throws FlacDamage.
class FlacBits {
 public:
  FlacBits(const std::uint8_t* begin, const std::uint8_t* end)
      : next_(begin), last_(end + sizeof bits_), end_(end) {}

  // Makes at least 56 bits available.
  CLSP_INLINE void fill() {
    if (__builtin_expect(next_ > last_, 0)) throw FlacDamage("its frame is cut", true);
    bits_ |= load_big_endian(next_) >> count_;
    next_ += (63 - count_) >> 3;
    count_ |= 56;
  }

  // The next `count` bits, 0 .. 33, as an unsigned number.
  std::uint64_t unsigned_bits(int count) {
    fill();
    const std::uint64_t value = bits_ >> 1 >> (63 - count);
    drop(count);
    return value;
  }

  // The next `count` bits, 1 .. 33, as a two's complement number.
  std::int64_t signed_bits(int count) {
    fill();
    const auto value = static_cast<std::int64_t>(bits_) >> (64 - count);
    drop(count);
    return value;
  }

  // The number of zeros before the next one bit; skips that bit too.
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

  // Reads a residual with Rice parameter k if its whole code is in bits_, which is nearly always so
  // after fill(). Otherwise reads nothing and returns false. The compiler keeps a copy of the
  // reader in registers if only fill() and short_code() are called on it.
  CLSP_INLINE bool short_code(unsigned k, std::int64_t& residual) {
    const unsigned zeros = bits_ == 0 ? 64 : static_cast<unsigned>(__builtin_clzll(bits_));
    if (__builtin_expect(zeros + k >= count_, 0)) return false;
    // The top bit of `shifted` is the 1 that ends the zeros. It stands above the k bits, where its
    // value is 2^k, which must be subtracted.
    const std::uint64_t shifted = bits_ << zeros, top_bit = std::uint64_t{1} << k;
    residual = unfold((std::uint64_t{zeros} << k) + (shifted >> (63 - k)) - top_bit);
    bits_ = shifted << (k + 1);
    count_ -= zeros + k + 1;
    return true;
  }

  // Reads a residual with Rice parameter k and a code of any length.
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
  // Maps 0, 1, 2, 3, 4 ... to 0, -1, 1, -2, 2 ...
  static CLSP_INLINE std::int64_t unfold(std::uint64_t folded) {
    return static_cast<std::int64_t>(folded >> 1 ^ (0 - (folded & 1)));
  }

  // The next bits, from the top. Only count_ bits are in use; fill() reads those below them again.
  std::uint64_t bits_ = 0;
  std::uint64_t count_ = 0;  // 0 .. 63
  const std::uint8_t* next_;
  const std::uint8_t* last_;  // next_ exceeds it only if the frame does not end before end_
  const std::uint8_t* end_;
};

// x[i] = residual + (sum_j weights[j] x[i - 1 - j] >> shift), where weights[j] = 0 for j >= order.
struct FlacPredictor {
  std::int64_t weights[32] = {};
  int shift = 0;
};

// Every sum of a valid stream fits 64 bits: 32 products of 15 and 33 bits, and a residual of 32
// bits shifted by up to 15. A damaged stream may overflow, so the arithmetic is unsigned, which
// wraps.
template <int N, class Sample>
CLSP_INLINE Sample predict(const FlacPredictor& predictor, const Sample* x, std::int64_t residual) {
  auto sum = static_cast<std::uint64_t>(residual) << predictor.shift;
  // The latest sample is added last, so that the other products do not wait for it.
#pragma GCC unroll 32
  for (int j = N - 1; j >= 0; --j) {
    sum += static_cast<std::uint64_t>(predictor.weights[j]) *
           static_cast<std::uint64_t>(std::int64_t{x[-1 - j]});
  }
  return static_cast<Sample>(static_cast<std::int64_t>(sum) >> predictor.shift);
}

// Decodes `count` samples of one partition into x; x[-1], x[-2] ... are the samples before it.
template <int N, class Sample>
CLSP_INLINE void rice_partition(FlacBits& bits, unsigned k, const FlacPredictor& predictor,
                                Sample* x, std::size_t count) {
  FlacBits local = bits;
  const FlacPredictor local_predictor = predictor;
  const auto decode = [&](Sample* to) {
    std::int64_t residual;
    if (__builtin_expect(!local.short_code(k, residual), 0)) {
      bits = local;
      residual = bits.long_code(k);
      local = bits;
    }
    *to = predict<N>(local_predictor, to, residual);
  };
  std::size_t i = 0;
  for (; i + 1 < count; i += 2) {  // two codes seldom exceed the bits of one fill()
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
