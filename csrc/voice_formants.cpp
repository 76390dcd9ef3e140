#include "voice_formants.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <complex>

namespace clsp {
namespace {

using Number = std::complex<double>;

constexpr double kPi = 3.14159265358979323846;
constexpr double kNyquistHz = kFormantBins * 16000.0 / 512.0;
constexpr double kLowestHz = 90.0, kHighestHz = kNyquistHz - 50.0;
constexpr double kNoise = 1e-5;  // of the power, for a stable prediction
constexpr int kMaxSteps = 60;
constexpr double kTolerance = 1e-10;

// Products without the checks for NaN and infinity that C++ requires of std::complex.
Number multiply(const Number& a, const Number& b) {
  return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
}

Number divide(const Number& a, const Number& b) { return multiply(a, std::conj(b)) / std::norm(b); }

// Levinson's recursion: a polynomial z^n + a[1] z^(n-1) + ... with all roots in the unit circle.
// Returns false for a frame without power.
bool predict(const double* lags, std::array<double, kFormantOrder + 1>& a) {
  double error = lags[0] * (1.0 + kNoise);
  if (!(error > 0.0)) return false;
  a = {1.0};
  for (int order = 1; order <= kFormantOrder; ++order) {
    double sum = 0.0;
    for (int j = 0; j < order; ++j) sum += a[static_cast<std::size_t>(j)] * lags[order - j];
    const double reflection = -sum / error;
    const auto previous = a;
    for (int j = 1; j <= order; ++j) {
      a[static_cast<std::size_t>(j)] += reflection * previous[static_cast<std::size_t>(order - j)];
    }
    error *= 1.0 - reflection * reflection;
    if (!(error > 0.0)) return false;
  }
  return true;
}

// A root of a polynomial of `degree`, by Laguerre's method.
Number find_root(const std::array<double, kFormantOrder + 1>& a, int degree) {
  Number z{0.3, 0.6};
  const double n = degree;
  for (int step = 0; step < kMaxSteps; ++step) {
    Number value = a[0], slope = 0.0, curve = 0.0;  // curve is half the second derivative
    for (int j = 1; j <= degree; ++j) {
      curve = multiply(curve, z) + slope;
      slope = multiply(slope, z) + value;
      value = multiply(value, z) + a[static_cast<std::size_t>(j)];
    }
    if (std::norm(value) < 1e-28) break;
    const Number g = divide(slope, value);
    const Number g2 = multiply(g, g);
    const Number h = g2 - 2.0 * divide(curve, value);
    const Number root = std::sqrt((n - 1.0) * (n * h - g2));
    const Number plus = g + root, minus = g - root;
    const Number denominator = std::norm(plus) > std::norm(minus) ? plus : minus;
    if (std::norm(denominator) == 0.0) {
      z += Number{0.1, 0.05};
      continue;
    }
    const Number change = divide(n, denominator);
    z -= change;
    if (std::norm(change) < kTolerance * kTolerance) break;
  }
  return z;
}

}  // namespace

int find_formants(const double* lags, double* hz) {
  std::array<double, kFormantOrder + 1> a;
  if (!predict(lags, a)) return 0;
  std::array<double, kFormantOrder> usable;
  std::size_t count = 0;
  for (int degree = kFormantOrder; degree > 0;) {
    const Number root = find_root(a, degree);
    const double size = std::abs(root), angle = std::abs(std::arg(root));
    const double frequency = angle * kNyquistHz / kPi;
    if (frequency > kLowestHz && frequency < kHighestHz) usable[count++] = frequency;
    // Divides by the root, and by its conjugate unless it is real.
    if (degree == 1 || std::abs(root.imag()) < 1e-7) {
      for (std::size_t j = 1; j <= static_cast<std::size_t>(degree); ++j)
        a[j] += root.real() * a[j - 1];
      degree -= 1;
    } else {
      const double sum = 2.0 * root.real(), product = size * size;
      a[1] += sum * a[0];
      for (std::size_t j = 2; j <= static_cast<std::size_t>(degree); ++j)
        a[j] += sum * a[j - 1] - product * a[j - 2];
      degree -= 2;
    }
  }
  std::sort(usable.begin(), usable.begin() + static_cast<std::ptrdiff_t>(count));
  const auto kept = static_cast<int>(std::min<std::size_t>(count, kFormants));
  std::copy_n(usable.begin(), kept, hz);
  return kept;
}

}  // namespace clsp
