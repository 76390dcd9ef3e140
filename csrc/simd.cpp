#include "simd.h"

#include <cstdlib>
#include <stdexcept>

#ifdef CLSP_X86
#include <cpuid.h>
#endif

namespace clsp {
namespace {

#ifdef CLSP_X86
// Every processor with AVX2 has these instructions, but a virtual machine may hide them.
bool has_bit_instructions() {
  unsigned a, b, c, d;
  constexpr unsigned kLzcnt = 1u << 5;
  return __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __get_cpuid(0x80000001, &a, &b, &c, &d) != 0 && (c & kLzcnt) != 0;
}
#endif

Isa detect_isa() {
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

constexpr struct {
  Isa isa;
  const char* name;
} kNames[] = {{Isa::kBaseline, "baseline"}, {Isa::kAvx2, "avx2"}, {Isa::kAvx512, "avx512"}};

}  // namespace

Isa best_isa() {
  static const Isa best = [] {
    const Isa detected = detect_isa();
    const char* variable = std::getenv("CLSP_SIMD");
    const std::string wanted = variable == nullptr ? "" : variable;
    if (wanted.empty()) return detected;
    bool known = false;
    for (const auto& [isa, name] : kNames) {
      if (wanted == name && isa <= detected) return isa;
      known |= wanted == name;
    }
    throw std::invalid_argument("CLSP_SIMD must be baseline, avx2 or avx512, got '" + wanted + "'" +
                                (known ? ", which this processor lacks" : "") +
                                "; unset it to use all that the processor has");
  }();
  return best;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& [isa, name] : kNames) {
    if (isa <= best_isa()) names.emplace_back(name);
  }
  return names;
}

Isa parse_isa(const std::string& wanted) {
  if (wanted == "auto") return best_isa();
  for (const auto& [isa, name] : kNames) {
    if (wanted == name && isa <= best_isa()) return isa;
  }
  throw std::invalid_argument("isa must be 'auto' or one of instruction_sets(), got '" + wanted +
                              "'");
}

}  // namespace clsp
