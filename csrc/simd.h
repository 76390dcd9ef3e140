// Vectors and dispatch. Only this file and simd.cpp, which detects them, name instruction sets.
//
// Numerical code is a template over the size of a vector in bytes. It is written with the
// compiler's vector extensions and always inlined. The dispatch functions at the end of this file
// compile it once for each instruction set and choose one copy at run time.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#define CLSP_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define CLSP_X86 1
#endif

namespace clsp {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The widest instruction set that may be used: the one that the environment variable CLSP_SIMD
// names, or the widest that the processor has. AVX2 includes FMA and the bit instructions (BMI,
// BMI2, LZCNT). Throws std::invalid_argument if CLSP_SIMD names an unknown set or one that the
// processor lacks.
Isa best_isa();

// Names of the sets up to best_isa(), the narrowest first.
std::vector<std::string> instruction_sets();

// "auto" is best_isa(). Throws std::invalid_argument for a name that is neither "auto" nor among
// instruction_sets().
Isa parse_isa(const std::string& name);

constexpr std::size_t vector_bytes(Isa isa) {
  return isa == Isa::kAvx512 ? 64 : isa == Isa::kAvx2 ? 32 : 16;
}

template <int L>
struct Lanes {
  typedef float Float __attribute__((vector_size(L * sizeof(float))));
  typedef int Int __attribute__((vector_size(L * sizeof(int))));
  typedef double Double __attribute__((vector_size(L * sizeof(double))));
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

// broadcast() for any element type. It keeps -0, too. It does not replace broadcast(), because GCC
// 12 then compiles a filterbank that is a quarter slower.
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
  auto largest = v[0];
  for (std::size_t l = 1; l < sizeof v / sizeof largest; ++l) {
    largest = v[l] > largest ? v[l] : largest;
  }
  return largest;
}

template <class To, class From>
CLSP_INLINE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Elements I... of the concatenation of a and b.
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

// {a[1], ..., a[L-1], b[0]}: moves every element down by one lane.
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

// Transposes each 4 x 4 block of four rows, with shuffles that every instruction set has.
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

// dispatch() calls work.run<Bytes>(arguments...), compiled for `isa`. Bytes is vector_bytes(isa).

template <class Work, class... Arguments>
void run_baseline(const Work& work, Arguments... arguments) {
  work.template run<16>(arguments...);
}

#ifdef CLSP_X86
template <class Work, class... Arguments>
__attribute__((target("avx2,fma"))) void run_avx2(const Work& work, Arguments... arguments) {
  work.template run<32>(arguments...);
}

template <class Work, class... Arguments>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(
    const Work& work, Arguments... arguments) {
  work.template run<64>(arguments...);
}

template <class Work>
__attribute__((target("bmi,bmi2,lzcnt"))) void run_bit_instructions(const Work& work) {
  work.run();
}
#endif

template <class Work, class... Arguments>
void dispatch(Isa isa, const Work& work, Arguments... arguments) {
#ifdef CLSP_X86
  if (isa == Isa::kAvx512) return run_avx512(work, arguments...);
  if (isa == Isa::kAvx2) return run_avx2(work, arguments...);
#endif
  static_cast<void>(isa);
  run_baseline(work, arguments...);
}

// dispatch() with vectors of at most 32 bytes.
template <class Work>
void dispatch_up_to_32_bytes(Isa isa, const Work& work) {
#ifdef CLSP_X86
  if (isa != Isa::kBaseline) return run_avx2(work);
#endif
  static_cast<void>(isa);
  run_baseline(work);
}

// For code without vectors: calls work.run(), compiled with the bit instructions if `isa` has them.
template <class Work>
void dispatch_bit_instructions(Isa isa, const Work& work) {
#ifdef CLSP_X86
  if (isa != Isa::kBaseline) return run_bit_instructions(work);
#endif
  static_cast<void>(isa);
  work.run();
}

}  // namespace clsp
