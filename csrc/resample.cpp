#include "resample.h"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <list>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

namespace clsp {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kZeroCrossings = 6.0, kRolloff = 0.99;
constexpr int kTapMultiple = 8;

void check_rates(int from_hz, int to_hz) {
  for (const int rate : {from_hz, to_hz}) {
    if (rate < 1 || rate > kMaxRateHz) {
      throw std::invalid_argument("sample rates must be 1 .. " + std::to_string(kMaxRateHz) +
                                  " Hz, got " + std::to_string(rate));
    }
  }
}

// The filter at t, in zero crossings from its centre.
double windowed_sinc(double t) {
  if (std::abs(t) >= kZeroCrossings) return 0.0;
  const double window = std::cos(kPi * t / (2.0 * kZeroCrossings));
  return (t == 0.0 ? 1.0 : std::sin(kPi * t) / (kPi * t)) * window * window;
}

std::shared_ptr<const ResamplePlan> make_plan(int from_hz, int to_hz) {
  auto plan = std::make_shared<ResamplePlan>();
  const int divisor = std::gcd(from_hz, to_hz);
  const int o = from_hz / divisor, n = to_hz / divisor;
  const double base = std::min(o, n) * kRolloff;
  const double reach = kZeroCrossings * o / base;  // half of the support, in input samples
  const int support = 2 * static_cast<int>(std::ceil(reach)) + 1;
  plan->step_in = o;
  plan->step_out = n;
  plan->taps = (support + kTapMultiple - 1) / kTapMultiple * kTapMultiple;
  plan->first.resize(static_cast<std::size_t>(n));
  plan->coefficients.reserve(
      checked_multiply(static_cast<std::size_t>(n), static_cast<std::size_t>(plan->taps)));
  for (int p = 0; p < n; ++p) {
    const double centre = static_cast<double>(p) * o / n;
    const auto first = static_cast<std::int64_t>(std::floor(centre - reach)) + 1;
    plan->first[static_cast<std::size_t>(p)] = first;
    for (int i = 0; i < plan->taps; ++i) {
      const double t = (-static_cast<double>(p) / n + static_cast<double>(first + i) / o) * base;
      plan->coefficients.push_back(static_cast<float>(base / o * windowed_sinc(t)));
    }
  }
  return plan;
}

float output_at_edge(const float* h, int taps, std::int64_t begin, Span<const float> in) {
  const auto size = static_cast<std::int64_t>(in.size());
  const std::int64_t low = std::max<std::int64_t>(0, -begin);
  const std::int64_t high = std::min<std::int64_t>(taps, size - begin);
  float sum = 0.0f;
  for (std::int64_t i = low; i < high; ++i) sum += h[i] * in.data()[begin + i];
  return sum;
}

template <int L>
CLSP_INLINE void resample_lanes(const ResamplePlan& plan, Span<const float> in, Span<float> out) {
  using V = typename Lanes<L>::Float;
  const int taps = plan.taps;
  const std::int64_t last_begin = static_cast<std::int64_t>(in.size()) - taps;
  const auto phases = static_cast<std::size_t>(plan.step_out);
  std::int64_t origin = 0;
  for (std::size_t j = 0; j < out.size(); j += phases, origin += plan.step_in) {
    const std::size_t count = std::min(phases, out.size() - j);
    for (std::size_t p = 0; p < count; ++p) {
      const float* h = plan.coefficients.data() + p * static_cast<std::size_t>(taps);
      const std::int64_t begin = origin + plan.first[p];
      if (begin < 0 || begin > last_begin) {
        out[j + p] = output_at_edge(h, taps, begin, in);
        continue;
      }
      const float* x = in.data() + begin;
      V sum{};
      for (int i = 0; i < taps; i += L) sum += load<V>(h + i) * load<V>(x + i);
      out[j + p] = horizontal_sum(sum);
    }
  }
}

void resample_baseline(const ResamplePlan& plan, Span<const float> in, Span<float> out) {
  resample_lanes<4>(plan, in, out);
}
#ifdef CLSP_X86
CLSP_TARGET_AVX2 void resample_avx2(const ResamplePlan& plan, Span<const float> in,
                                    Span<float> out) {
  resample_lanes<8>(plan, in, out);
}
#endif

struct Entry {
  int from_hz, to_hz;
  std::shared_ptr<const ResamplePlan> plan;
};
constexpr std::size_t kPlansKept = 8;
std::mutex recent_mutex;
std::list<Entry> recent_plans;  // newest first

// A child that is forked while another thread holds the mutex would wait for it for ever.
const int fork_handlers = ::pthread_atfork(
    [] { recent_mutex.lock(); }, [] { recent_mutex.unlock(); }, [] { recent_mutex.unlock(); });

}  // namespace

std::shared_ptr<const ResamplePlan> resample_plan(int from_hz, int to_hz) {
  check_rates(from_hz, to_hz);
  const std::lock_guard<std::mutex> lock(recent_mutex);
  const auto found = std::find_if(recent_plans.begin(), recent_plans.end(), [=](const Entry& e) {
    return e.from_hz == from_hz && e.to_hz == to_hz;
  });
  if (found != recent_plans.end()) {
    recent_plans.splice(recent_plans.begin(), recent_plans, found);
  } else {
    recent_plans.push_front({from_hz, to_hz, make_plan(from_hz, to_hz)});
    if (recent_plans.size() > kPlansKept) recent_plans.pop_back();
  }
  return recent_plans.front().plan;
}

std::size_t resampled_size(std::size_t samples, int from_hz, int to_hz) {
  check_rates(from_hz, to_hz);
  const auto from = static_cast<std::uint64_t>(from_hz), to = static_cast<std::uint64_t>(to_hz);
  const std::uint64_t seconds = samples / from, rest = samples % from;
  return checked_multiply(checked_size(seconds), checked_size(to)) +
         checked_size((2 * rest * to + from) / (2 * from));
}

void resample(const ResamplePlan& plan, Span<const float> in, Span<float> out, Isa isa) {
#ifdef CLSP_X86
  // Some 40 taps fill eight lanes better than sixteen.
  if (isa != Isa::kBaseline) return resample_avx2(plan, in, out);
#endif
  (void)isa;
  resample_baseline(plan, in, out);
}

}  // namespace clsp
