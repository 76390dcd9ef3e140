// Order statistics and runs, with numpy's definitions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

namespace clsp {

constexpr std::size_t kMinVoiced = 8;  // frames, for values that concern the voice

// The quantile q (0 .. 1) of sorted values, interpolated linearly. There is at least one value.
inline double quantile_of_sorted(const std::vector<double>& sorted, double q) {
  const double at = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  const double weight = at - static_cast<double>(below);
  return sorted[below] + (sorted[above] - sorted[below]) * weight;
}

inline std::vector<double> sorted_copy(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values;
}

inline double median_of(std::vector<double> values) {
  return quantile_of_sorted(sorted_copy(std::move(values)), 0.5);
}

// At least -120 dB.
inline double decibels(double power) { return 10.0 * std::log10(power + 1e-12); }

// Calls visit(first, end) for every run of flags [begin, end) that equal `value`.
template <class Visit>
void for_each_run(const std::vector<char>& flags, std::size_t begin, std::size_t end, bool value,
                  const Visit& visit) {
  for (std::size_t i = begin; i < end;) {
    const std::size_t first = i;
    while (i < end && (flags[i] != 0) == value) ++i;
    if (i > first) {
      visit(first, i);
    } else {
      ++i;
    }
  }
}

}  // namespace clsp
