// Exponentials and logarithms of vectors, from arithmetic that every instruction set has.
#pragma once

#include <cmath>

#include "simd.h"

namespace clsp {

// Natural logarithm of positive normal numbers, within 1 ulp. NaN and infinity give NaN.
template <class V>
CLSP_INLINE V log_positive(const V& x) {
  using Int = typename Lanes<kLanesOf<V>>::Int;
  constexpr int kSqrtHalf = 0x3f3504f3;  // the bits of sqrt(1/2)
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)), so that log m and e log 2 never cancel; f = m - 1.
  const Int above = bits_of<Int>(x) - kSqrtHalf;
  const Int m = (above & 0x007fffff) + kSqrtHalf;
  const V e = __builtin_convertvector(above >> 23, V);
  const V f = bits_of<V>(m) - 1.0f;
  // (log(1 + f) - f + f^2/2) / f^3, a weighted minimax fit of degree 7: error of the result 6.5e-9.
  V q = f * -0.0785961151f + 0.128816471f;
  q = q * f - 0.131287545f;
  q = q * f + 0.141811922f;
  q = q * f - 0.166245535f;
  q = q * f + 0.200022861f;
  q = q * f - 0.250008106f;
  q = q * f + 0.333333164f;
  const V log_m = f + f * f * (f * q - 0.5f);
  return log_m + e * 0.693147181f + (x - x);
}

// exp(x) for x <= 88, within 2 ulp; 0 for x below -87.33. NaN gives NaN.
template <class V>
CLSP_INLINE V exp_bounded(const V& x) {
  using Int = typename Lanes<kLanesOf<V>>::Int;
  constexpr float kRound = 12582912.0f;  // 1.5 x 2^23: adding it rounds to a whole number
  constexpr float kLn2High = 45426.0f / 65536.0f, kLn2Low = 1.42860682e-6f;  // n kLn2High is exact
  const V lowest = V{} - 87.33f;
  const V bounded = x < lowest ? lowest : x;  // NaN stays NaN
  const V shifted = bounded * 1.44269504f + kRound;
  const V n = shifted - kRound;
  const V r = (bounded - n * kLn2High) - n * kLn2Low;
  // (exp(r) - 1 - r) / r^2, a weighted minimax fit of degree 4: relative error of the
  // result 3.1e-9.
  V q = r * 1.38145394e-3f + 8.36874545e-3f;
  q = q * r + 4.16683890e-2f;
  q = q * r + 0.166665211f;
  q = q * r + 0.49999994f;
  const Int exponent = (bits_of<Int>(shifted) << 23) + 0x3f800000;
  return x < lowest ? V{} : (q * r * r + r + 1.0f) * bits_of<V>(exponent);
}

// log(1 + x) for 0 <= x <= 1, within 3 ulp. NaN gives NaN.
template <class V>
CLSP_INLINE V log1p_unit(const V& x) {
  const V above = x + 1.0f;
  // The second term corrects the rounding of 1 + x, to first order.
  return log_positive(above) + (x - (above - 1.0f)) / above;
}

template <class V, class F>
CLSP_INLINE V each_lane(V v, const F& f) {
  for (std::size_t l = 0; l < sizeof v / sizeof v[0]; ++l) v[l] = f(v[l]);
  return v;
}

// exp and log1p for float and double. Double is for checks of gradients, where speed does not
// matter.
template <class V>
CLSP_INLINE V exp_lanes(const V& x) {
  if constexpr (sizeof x[0] == sizeof(float)) {
    return exp_bounded(x);
  } else {
    return each_lane(x, [](double lane) { return std::exp(lane); });
  }
}

template <class V>
CLSP_INLINE V log1p_lanes(const V& x) {
  if constexpr (sizeof x[0] == sizeof(float)) {
    return log1p_unit(x);
  } else {
    return each_lane(x, [](double lane) { return std::log1p(lane); });
  }
}

}  // namespace clsp
