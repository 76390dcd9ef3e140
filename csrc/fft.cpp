#include "fft.h"

#include <cmath>

namespace clsp {
namespace {

FftPlan::Twiddle unit_root(int numerator, int denominator) {
  const double angle = -2.0 * 3.14159265358979323846 * numerator / denominator;
  return {static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))};
}

FftPlan make_plan() {
  FftPlan plan;
  for (int q = 0; q < 8; ++q) {
    for (int j = 0; j < 32; ++j) plan.first[j][q] = unit_root(j * q, 256);
    for (int j = 0; j < 4; ++j) plan.second[j][q] = unit_root(j * q, 32);
  }
  for (int k = 0; k <= 32; ++k) {
    for (int r = 0; r < 4; ++r) plan.split[k][r] = unit_root(k + 64 * r, FftPlan::kReal);
  }
  return plan;
}

}  // namespace

const FftPlan& fft_plan() {
  static const FftPlan plan = make_plan();
  return plan;
}

}  // namespace clsp
