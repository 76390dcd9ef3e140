// The one place that names instruction sets.
//
// Kernels are templates over the number of lanes L, written with the compiler's vector extensions
// and always inlined into one entry point per instruction set; the entry point carries the target
// attribute and best_isa() chooses among them when the program runs.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

#define CLSP_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#include <cpuid.h>
#define CLSP_X86 1
#define CLSP_TARGET_BMI2 __attribute__((target("bmi,bmi2,lzcnt")))
#define CLSP_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define CLSP_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif

namespace clsp {

enum class Isa { kBaseline, kAvx2, kAvx512 };

#ifdef CLSP_X86
// Every processor with AVX2 has them, but a virtual one may hide them.
inline bool has_bit_instructions() {
  unsigned a, b, c, d;
  constexpr unsigned kLzcnt = 1u << 5;
  return __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __get_cpuid(0x80000001, &a, &b, &c, &d) != 0 && (c & kLzcnt) != 0;
}
#endif

// What this processor has. AVX2 stands for FMA and the bit instructions too.
inline Isa detect_isa() {
#ifdef CLSP_X86
  if (!has_bit_instructions()) return Isa::kBaseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// The widest instruction set in use: the one that the environment variable CLSP_SIMD names, as if
// the processor had no wider one, or all that the processor has. Throws std::invalid_argument for a
// name that is unknown or a set that the processor lacks.
inline Isa best_isa() {
  static const Isa best = [] {
    const Isa detected = detect_isa();
    const char* set = std::getenv("CLSP_SIMD");
    const std::string name = set == nullptr ? "" : set;
    if (name.empty()) return detected;
    if (name == "baseline") return Isa::kBaseline;
    if (name == "avx2" && detected != Isa::kBaseline) return Isa::kAvx2;
    if (name == "avx512" && detected == Isa::kAvx512) return Isa::kAvx512;
    const bool known = name == "avx2" || name == "avx512";
    throw std::invalid_argument("CLSP_SIMD must be baseline, avx2 or avx512, got '" + name + "'" +
                                (known ? ", which this processor lacks" : "") +
                                "; unset it to use all that there is");
  }();
  return best;
}

template <int L>
struct Lanes {
  typedef float Float __attribute__((vector_size(L * sizeof(float))));
  typedef int Int __attribute__((vector_size(L * sizeof(int))));
};

template <class V>
constexpr int kLanesOf = static_cast<int>(sizeof(V) / sizeof(float));

template <class V, class T>
CLSP_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
CLSP_INLINE void store(T* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class V>
CLSP_INLINE V broadcast(float x) {
  return V{} + x;
}

// The same of any type, and of -0. It cannot replace broadcast(): with it GCC 12 makes code of the
// filterbank that takes a quarter more time.
template <class V, class T>
CLSP_INLINE V splat(T x) {
  return x - V{};
}

template <class V>
CLSP_INLINE V larger(const V& a, const V& b) {
  return a > b ? a : b;
}

template <class V>
CLSP_INLINE auto sum_of_lanes(const V& v) {
  auto sum = v[0];
  for (std::size_t l = 1; l < sizeof v / sizeof sum; ++l) sum += v[l];
  return sum;
}

template <class V>
CLSP_INLINE auto largest_lane(const V& v) {
  auto most = v[0];
  for (std::size_t l = 1; l < sizeof v / sizeof most; ++l) most = v[l] > most ? v[l] : most;
  return most;
}

template <class To, class From>
CLSP_INLINE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Elements I... of a followed by b.
template <int... I, class V>
CLSP_INLINE V shuffle(const V& a, const V& b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  using Mask = decltype(a == b);
  return __builtin_shuffle(a, b, Mask{I...});
#endif
}

template <class V>
CLSP_INLINE auto sum_of_halves(const V& v) {
  typename Lanes<kLanesOf<V> / 2>::Float halves[2];
  static_assert(sizeof halves == sizeof v);
  __builtin_memcpy(halves, &v, sizeof v);
  return halves[0] + halves[1];
}

template <class V>
CLSP_INLINE float horizontal_sum(const V& v) {
  if constexpr (kLanesOf<V> == 2) {
    return v[0] + v[1];
  } else {
    return horizontal_sum(sum_of_halves(v));
  }
}

// {a[1], ..., a[L-1], b[0]}: lane l takes what lane l + 1 holds.
template <class V, int... Q>
CLSP_INLINE V next_lane(const V& a, const V& b, std::integer_sequence<int, Q...>) {
  return shuffle<(Q + 1)...>(a, b);
}

template <class V>
CLSP_INLINE V next_lane(const V& a, float last) {
  return next_lane(a, broadcast<V>(last), std::make_integer_sequence<int, kLanesOf<V>>{});
}

// Exchanges the off-diagonal S x S blocks of the row pair (a, b).
template <int S, class V, int... Q>
CLSP_INLINE void exchange_blocks(V& a, V& b, std::integer_sequence<int, Q...>) {
  constexpr int L = kLanesOf<V>;
  const V low = shuffle<((Q & S) ? L + Q - S : Q)...>(a, b);
  const V high = shuffle<((Q & S) ? L + Q : Q + S)...>(a, b);
  a = low;
  b = high;
}

template <int S, class V>
CLSP_INLINE void exchange_blocks(V* rows) {
  constexpr int L = kLanesOf<V>;
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) {
    if ((r & S) == 0)
      exchange_blocks<S>(rows[r], rows[r | S], std::make_integer_sequence<int, L>{});
  }
}

// Transposes each 4 x 4 block of four rows, in shuffles that every instruction set has.
template <class V, int... Q>
CLSP_INLINE void transpose_quads(V* rows, std::integer_sequence<int, Q...>) {
  constexpr int L = kLanesOf<V>;
  const auto low_pairs = [](const V& a, const V& b) {
    return shuffle<((Q & 1) * L + (Q & ~3) + (Q & 2) / 2)...>(a, b);
  };
  const auto high_pairs = [](const V& a, const V& b) {
    return shuffle<((Q & 1) * L + (Q & ~3) + (Q & 2) / 2 + 2)...>(a, b);
  };
  const V low01 = low_pairs(rows[0], rows[1]), low23 = low_pairs(rows[2], rows[3]);
  const V high01 = high_pairs(rows[0], rows[1]), high23 = high_pairs(rows[2], rows[3]);
  rows[0] = shuffle<((Q & 2) ? L + Q - 2 : Q)...>(low01, low23);
  rows[1] = shuffle<((Q & 2) ? L + Q : Q + 2)...>(low01, low23);
  rows[2] = shuffle<((Q & 2) ? L + Q - 2 : Q)...>(high01, high23);
  rows[3] = shuffle<((Q & 2) ? L + Q : Q + 2)...>(high01, high23);
}

// Transposes an L x L tile in registers.
template <class V>
CLSP_INLINE void transpose(V* rows) {
  constexpr int L = kLanesOf<V>;
#pragma GCC unroll 4
  for (int r = 0; r < L; r += 4) transpose_quads(rows + r, std::make_integer_sequence<int, L>{});
  if constexpr (L >= 8) exchange_blocks<4>(rows);
  if constexpr (L >= 16) exchange_blocks<8>(rows);
}

// Natural logarithm of positive normal numbers within 1 ulp; NaN and infinity give NaN.
template <class V>
CLSP_INLINE V log_positive(const V& x) {
  using Int = typename Lanes<kLanesOf<V>>::Int;
  constexpr int kSqrtHalf = 0x3f3504f3;  // the bits of sqrt(1/2)
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)), so that no result cancels; f = m - 1.
  const Int above = bits_of<Int>(x) - kSqrtHalf;
  const Int m = (above & 0x007fffff) + kSqrtHalf;
  const V e = __builtin_convertvector(above >> 23, V);
  const V f = bits_of<V>(m) - 1.0f;
  // (log(1 + f) - f + f^2/2) / f^3, a weighted minimax fit of degree 7: error 6.5e-9 in the result.
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

// exp(x) of x <= 88 within 2 ulp, 0 below -87.33; NaN gives NaN.
template <class V>
CLSP_INLINE V exp_bounded(const V& x) {
  using Int = typename Lanes<kLanesOf<V>>::Int;
  constexpr float kRound =
      12582912.0f;  // 1.5 x 2^23: what is added to it is rounded to whole numbers
  constexpr float kLn2High = 45426.0f / 65536.0f, kLn2Low = 1.42860682e-6f;  // n kLn2High is exact
  const V lowest = V{} - 87.33f;
  const V bounded = x < lowest ? lowest : x;  // keeps NaN
  const V shifted = bounded * 1.44269504f + kRound;
  const V n = shifted - kRound;
  const V r = (bounded - n * kLn2High) - n * kLn2Low;
  // (exp(r) - 1 - r) / r^2, a weighted minimax fit of degree 4: relative error 3.1e-9 in the
  // result.
  V q = r * 1.38145394e-3f + 8.36874545e-3f;
  q = q * r + 4.16683890e-2f;
  q = q * r + 0.166665211f;
  q = q * r + 0.49999994f;
  const Int exponent = (bits_of<Int>(shifted) << 23) + 0x3f800000;
  return x < lowest ? V{} : (q * r * r + r + 1.0f) * bits_of<V>(exponent);
}

// log(1 + x) of 0 <= x <= 1 within 3 ulp; NaN gives NaN.
template <class V>
CLSP_INLINE V log1p_unit(const V& x) {
  const V above = x + 1.0f;
  // What rounding took from 1 + x, to first order.
  return log_positive(above) + (x - (above - 1.0f)) / above;
}

template <class V, class F>
CLSP_INLINE V each_lane(V v, const F& f) {
  for (std::size_t l = 0; l < sizeof v / sizeof v[0]; ++l) v[l] = f(v[l]);
  return v;
}

// In double these serve checks of gradients, where speed does not matter.
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

// Entry points for anything with a function run<Bytes>(i), where vectors have that many bytes.
template <class Work>
void run_baseline(const Work& work, std::size_t i) {
  work.template run<16>(i);
}
#ifdef CLSP_X86
template <class Work>
CLSP_TARGET_AVX2 void run_avx2(const Work& work, std::size_t i) {
  work.template run<32>(i);
}
template <class Work>
CLSP_TARGET_AVX512 void run_avx512(const Work& work, std::size_t i) {
  work.template run<64>(i);
}
#endif

template <class Work>
void run(Isa isa, const Work& work, std::size_t i) {
#ifdef CLSP_X86
  if (isa == Isa::kAvx512) return run_avx512(work, i);
  if (isa == Isa::kAvx2) return run_avx2(work, i);
#endif
  (void)isa;
  run_baseline(work, i);
}

}  // namespace clsp
