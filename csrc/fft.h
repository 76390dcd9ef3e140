// Power spectrum of 512 real samples, one frame per vector lane.
//
// The 512 real samples are read as 256 complex ones z[j] = x[2j] + i x[2j+1]; their transform is
// three in-place decimation-in-frequency passes of radix 8, 8 and 4, and the real spectrum is
// X[k] = E[k] + w^k O[k], w = exp(-2 pi i / 512), with E and O the transforms of the even and odd
// samples. Frequencies leave the passes in digit-reversed order: across lanes that costs nothing
// but an index.
#pragma once

#include "simd.h"

namespace clsp {

struct FftPlan {
  static constexpr int kReal = 512, kComplex = 256;
  struct Twiddle {
    float re, im;
  };
  Twiddle first[32][8];              // exp(-2 pi i j q / 256)
  Twiddle second[4][8];              // exp(-2 pi i j q / 32)
  Twiddle split[kComplex / 2 + 1];   // exp(-2 pi i k / 512)
  unsigned char position[kComplex];  // where frequency k lies after the passes
};

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

// -i (a - b), the product that a radix-4 butterfly needs.
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

// out[r] = sum_j in[j] exp(-2 pi i j r / 8)
template <class V>
CLSP_INLINE void butterfly8(const Complex<V>* in, Complex<V>* out) {
  constexpr float kHalfRoot = 0.70710678118654752f;
  const Complex<V> sums[4] = {in[0] + in[4], in[1] + in[5], in[2] + in[6], in[3] + in[7]};
  const Complex<V> d1 = in[1] - in[5], d3 = in[3] - in[7];
  const Complex<V> turned[4] = {in[0] - in[4],
                                {(d1.re + d1.im) * kHalfRoot, (d1.im - d1.re) * kHalfRoot},
                                minus_i_difference(in[2], in[6]),
                                {(d3.im - d3.re) * kHalfRoot, (d3.re + d3.im) * -kHalfRoot}};
  butterfly4(sums, out, 2);
  butterfly4(turned, out + 1, 2);
}

// One radix-8 pass over blocks of 8 * Q points.
template <int Q, class V>
CLSP_INLINE void pass8(V* re, V* im, const FftPlan::Twiddle (*twiddles)[8]) {
  for (int block = 0; block < FftPlan::kComplex; block += 8 * Q) {
    for (int j = 0; j < Q; ++j) {
      Complex<V> in[8], out[8];
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) in[q] = {re[block + j + q * Q], im[block + j + q * Q]};
      butterfly8(in, out);
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) {
        const Complex<V> y = q == 0 ? out[0] : out[q] * twiddles[j][q];
        re[block + j + q * Q] = y.re;
        im[block + j + q * Q] = y.im;
      }
    }
  }
}

template <class V>
CLSP_INLINE void pass4(V* re, V* im) {
  for (int block = 0; block < FftPlan::kComplex; block += 4) {
    Complex<V> in[4], out[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) in[q] = {re[block + q], im[block + q]};
    butterfly4(in, out, 1);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      re[block + q] = out[q].re;
      im[block + q] = out[q].im;
    }
  }
}

// power[k] = |2 X[k]|^2 for k = 1 .. 255 from the even samples in re[0..255] and the odd ones in
// im[0..255], which it overwrites. The caller halves its window instead, which is exact.
template <class V>
CLSP_INLINE void power_spectrum(V* re, V* im, V* power, const FftPlan& plan) {
  pass8<32>(re, im, plan.first);
  pass8<4>(re, im, plan.second);
  pass4(re, im);
  for (int k = 1; k <= FftPlan::kComplex / 2; ++k) {
    const int p = plan.position[k], n = plan.position[FftPlan::kComplex - k];
    const Complex<V> even = {re[p] + re[n], im[p] - im[n]};
    const Complex<V> odd = Complex<V>{im[p] + im[n], re[n] - re[p]} * plan.split[k];
    const Complex<V> low = even + odd, high = even - odd;
    power[k] = low.re * low.re + low.im * low.im;
    power[FftPlan::kComplex - k] = high.re * high.re + high.im * high.im;
  }
}

}  // namespace clsp
