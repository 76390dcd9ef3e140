// Power spectrum of 512 real samples, one frame in each vector lane.
//
// The 512 real samples are read as 256 complex samples z[j] = x[2j] + i x[2j+1]. Their transform Z
// takes three decimation-in-frequency passes of radix 8, 8 and 4. The real spectrum is
// X[k] = E[k] + w^k O[k], where w = exp(-2 pi i / 512), and E and O are the transforms of the even
// and odd samples. The passes leave the frequencies in digit-reversed order, which is the same in
// every lane: position_of() gives the index. All passes work in place, because the samples of 16
// lanes take 32 KB, the whole first-level cache of most processors.
#pragma once

#include "simd.h"

namespace clsp {

struct FftPlan {
  static constexpr int kReal = 512, kComplex = 256;
  struct Twiddle {
    float re, im;
  };
  Twiddle first[32][8];  // exp(-2 pi i j q / 256)
  Twiddle second[4][8];  // exp(-2 pi i j q / 32)
  Twiddle split[33][4];  // exp(-2 pi i (k + 64 r) / 512)
};

// The index of frequency k after the passes. Frequencies k, k + 64, k + 128 and k + 192 are
// neighbours.
constexpr int position_of(int k) { return k % 8 * 32 + k / 8 % 8 * 4 + k / 64; }

const FftPlan& fft_plan();

template <class V>
struct Complex {
  V re, im;
};

template <class V>
CLSP_INLINE Complex<V> operator+(const Complex<V>& a, const Complex<V>& b) {
  return {a.re + b.re, a.im + b.im};
}

template <class V>
CLSP_INLINE Complex<V> operator-(const Complex<V>& a, const Complex<V>& b) {
  return {a.re - b.re, a.im - b.im};
}

template <class V>
CLSP_INLINE Complex<V> operator*(const Complex<V>& a, const FftPlan::Twiddle& t) {
  return {a.re * t.re - a.im * t.im, a.re * t.im + a.im * t.re};
}

// -i (a - b)
template <class V>
CLSP_INLINE Complex<V> minus_i_difference(const Complex<V>& a, const Complex<V>& b) {
  return {a.im - b.im, b.re - a.re};
}

// out[r] = sum_j in[j] exp(-2 pi i j r / 4)
template <class V>
CLSP_INLINE void butterfly4(const Complex<V>* in, Complex<V>* out, int out_step) {
  const Complex<V> even = in[0] + in[2], odd = in[1] + in[3];
  const Complex<V> left = in[0] - in[2], turned = minus_i_difference(in[1], in[3]);
  out[0] = even + odd;
  out[out_step] = left + turned;
  out[2 * out_step] = even - odd;
  out[3 * out_step] = left - turned;
}

// out[r] = sum_j in[j] exp(-2 pi i j r / 8). in[NonZero] .. in[7] are 0 and are not read.
template <int NonZero, class V>
CLSP_INLINE void butterfly8(const Complex<V>* in, Complex<V>* out) {
  static_assert(NonZero >= 6 && NonZero <= 8);
  constexpr float kHalfRoot = 0.70710678118654752f;
  Complex<V> sum2 = in[2], turned2 = {in[2].im, -in[2].re}, sum3 = in[3], d3 = in[3];
  if constexpr (NonZero > 6) {
    sum2 = in[2] + in[6];
    turned2 = minus_i_difference(in[2], in[6]);
  }
  if constexpr (NonZero > 7) {
    sum3 = in[3] + in[7];
    d3 = in[3] - in[7];
  }
  const Complex<V> sums[4] = {in[0] + in[4], in[1] + in[5], sum2, sum3};
  butterfly4(sums, out, 2);
  const Complex<V> d1 = in[1] - in[5];
  const Complex<V> turned[4] = {in[0] - in[4],
                                {(d1.re + d1.im) * kHalfRoot, (d1.im - d1.re) * kHalfRoot},
                                turned2,
                                {(d3.im - d3.re) * kHalfRoot, (d3.re + d3.im) * -kHalfRoot}};
  butterfly4(turned, out + 1, 2);
}

// The radix-8 butterfly of points 0, Q, ..., 7 Q, with the twiddles of the pass.
template <int Q, int NonZero, class V>
CLSP_INLINE void step8(V* re, V* im, const FftPlan::Twiddle* twiddles) {
  Complex<V> in[8], out[8];
#pragma GCC unroll 8
  for (int q = 0; q < NonZero; ++q) in[q] = {re[q * Q], im[q * Q]};
  butterfly8<NonZero>(in, out);
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const Complex<V> y = q == 0 ? out[0] : out[q] * twiddles[q];
    re[q * Q] = y.re;
    im[q * Q] = y.im;
  }
}

// Computes |2 X[k]|^2 and |2 X[256 - k]|^2 from Z[k], Z[256 - k] and w^k.
template <class V>
CLSP_INLINE void split_powers(const Complex<V>& z, const Complex<V>& mirrored,
                              const FftPlan::Twiddle& twiddle, V& power, V& mirrored_power) {
  const Complex<V> even = {z.re + mirrored.re, z.im - mirrored.im};
  const Complex<V> odd = Complex<V>{z.im + mirrored.im, mirrored.re - z.re} * twiddle;
  const Complex<V> low = even + odd, high = even - odd;
  power = low.re * low.re + low.im * low.im;
  mirrored_power = high.re * high.re + high.im * high.im;
}

template <class V>
CLSP_INLINE void last_butterfly(const V* re, const V* im, int block, Complex<V>* out) {
  Complex<V> in[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) in[q] = {re[block + q], im[block + q]};
  butterfly4(in, out, 1);
}

// Does the radix-4 pass and split_powers() together. Block k holds frequencies k + 64 r. Their
// mirror images, frequencies (64 - k) + 64 (3 - r), are in block 64 - k. Writes the powers to `re`.
template <class V>
CLSP_INLINE void last_pass(V* re, V* im, const FftPlan& plan) {
  Complex<V> z[4], mirrored[4];
  last_butterfly(re, im, 0, z);  // block 0 is its own mirror image; frequency 0 is not needed
  split_powers(z[1], z[3], plan.split[0][1], re[1], re[3]);
  split_powers(z[2], z[2], plan.split[0][2], re[2], re[2]);
  for (int k = 1; k <= 32; ++k) {
    const int block = position_of(k), mirrored_block = position_of(64 - k);
    last_butterfly(re, im, block, z);
    last_butterfly(re, im, mirrored_block, mirrored);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      split_powers(z[r], mirrored[3 - r], plan.split[k][r], re[block + r],
                   re[mirrored_block + 3 - r]);
    }
  }
}

// Reads 200 even samples from re[0 .. 199] and 200 odd samples from im[0 .. 199]; the zeros after
// them need not be stored. Writes |2 X[k]|^2 to re[position_of(k)] for k = 1 .. 255, and overwrites
// im. The caller removes the factor 2: it halves the window, which is exact.
template <class V>
CLSP_INLINE void power_spectrum(V* re, V* im, const FftPlan& plan) {
  for (int j = 0; j < 8; ++j) step8<32, 7>(re + j, im + j, plan.first[j]);
  for (int j = 8; j < 32; ++j) step8<32, 6>(re + j, im + j, plan.first[j]);
  for (int block = 0; block < FftPlan::kComplex; block += 32) {
    for (int j = 0; j < 4; ++j) step8<4, 8>(re + block + j, im + block + j, plan.second[j]);
  }
  last_pass(re, im, plan);
}

}  // namespace clsp
