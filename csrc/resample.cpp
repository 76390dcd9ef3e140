#include "resample.h"

#include <pthread.h>

#include <algorithm>
#include <array>
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

void check_rates(int from_hz, int to_hz) {
  for (const int rate : {from_hz, to_hz}) {
    if (rate < 1 || rate > kMaxRateHz) {
      throw std::invalid_argument("sample rates must be 1 .. " + std::to_string(kMaxRateHz) +
                                  " Hz, got " + std::to_string(rate));
    }
  }
}

// The filter at a distance of t zero crossings from its centre.
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
  plan->step_in = o;
  plan->step_out = n;
  plan->taps = static_cast<int>(2.0 * reach) + 1;
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

float output(const float* h, int taps, std::int64_t begin, Span<const float> in) {
  const auto size = static_cast<std::int64_t>(in.size());
  const std::int64_t low = std::max<std::int64_t>(0, -begin);
  const std::int64_t high = std::min<std::int64_t>(taps, size - begin);
  float sum = 0.0f;
  for (std::int64_t i = low; i < high; ++i) sum += h[i] * in.data()[begin + i];
  return sum;
}

// Each lane computes a stretch of `periods` x n successive outputs. All lanes are then at the same
// phase and use the same coefficients.
struct Layout {
  int periods;           // 0: a stretch of one period would be too long
  std::int64_t columns;  // the inputs that a stretch reads
  std::int64_t inputs;   // from the start of a stretch to the start of the next
  std::int64_t outputs;  // of a stretch
};

Layout choose_layout(const ResamplePlan& plan) {
  constexpr std::int64_t kMaxColumns = 1024;  // 64 KB with 16 lanes
  const std::int64_t n = plan.step_out, o = plan.step_in;
  for (const std::int64_t periods : {8 * ((8 + n - 1) / n), std::int64_t{8}, std::int64_t{1}}) {
    const std::int64_t columns = (periods - 1) * o + plan.first.back() - plan.first[0] + plan.taps;
    if (std::max(columns, periods * n) <= kMaxColumns) {
      return {static_cast<int>(periods), columns, periods * o, periods * n};
    }
  }
  return {};
}

template <int L>
struct ResampleBuffers {
  using V = typename Lanes<L>::Float;
  struct alignas(sizeof(V)) Column {
    V lanes;  // one element of each lane's stretch
  };
  std::vector<Column> in, out;
  std::int64_t row;             // columns, rounded up to whole tiles
  std::vector<float> gathered;  // (L, row), for stretches that reach beyond an end of the input

  explicit ResampleBuffers(const Layout& layout) : row((layout.columns + L - 1) / L * L) {
    in.resize(static_cast<std::size_t>(row));
    out.resize(static_cast<std::size_t>((layout.outputs + L - 1) / L * L));
  }
};

// Reads the stretches that begin at `begin`, `begin` + step, ... into columns. Beyond the ends of
// the input there are zeros.
template <int L>
CLSP_INLINE void read_columns(Span<const float> in, std::int64_t begin, std::int64_t step,
                              ResampleBuffers<L>& b) {
  using V = typename ResampleBuffers<L>::V;
  const auto size = static_cast<std::int64_t>(in.size());
  const float* rows;
  if (begin >= 0 && begin + (L - 1) * step + b.row <= size) {
    rows = in.data() + begin;
  } else {
    b.gathered.assign(static_cast<std::size_t>(L * b.row), 0.0f);
    for (int lane = 0; lane < L; ++lane) {
      const std::int64_t origin = begin + lane * step;
      const std::int64_t low = std::max<std::int64_t>(origin, 0);
      const std::int64_t high = std::min(origin + b.row, size);
      if (low < high) {
        std::copy(in.data() + low, in.data() + high,
                  b.gathered.data() + lane * b.row + (low - origin));
      }
    }
    rows = b.gathered.data();
    step = b.row;
  }
  for (std::int64_t i = 0; i < b.row; i += L) {
    V tile[L];
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) tile[lane] = load<V>(rows + lane * step + i);
    transpose(tile);
#pragma GCC unroll 16
    for (int c = 0; c < L; ++c) b.in[static_cast<std::size_t>(i + c)].lanes = tile[c];
  }
}

// Computes `Count` outputs of all lanes. Output u has its taps at h + u * h_step and its inputs at
// x + u * x_step.
template <int Count, class Column>
CLSP_INLINE void filter(const float* h, std::int64_t h_step, const Column* x, std::int64_t x_step,
                        int taps, Column* out, std::int64_t out_step) {
  decltype(x->lanes + x->lanes) sum[Count] = {};
  for (int i = 0; i < taps; ++i) {
#pragma GCC unroll 8
    for (int u = 0; u < Count; ++u) sum[u] += x[u * x_step + i].lanes * h[u * h_step + i];
  }
#pragma GCC unroll 8
  for (int u = 0; u < Count; ++u) out[u * out_step].lanes = sum[u];
}

template <int L>
CLSP_INLINE void filter_columns(const ResamplePlan& plan, int periods, ResampleBuffers<L>& b) {
  constexpr int kAtOnce = L == 16 ? 8 : 4;  // sums that fit registers together with the operands
  const int n = static_cast<int>(plan.step_out);
  const float* h = plan.coefficients.data();
  for (int p = 0; p < n; ++p, h += plan.taps) {
    const auto* x = b.in.data() + (plan.first[static_cast<std::size_t>(p)] - plan.first[0]);
    auto* out = b.out.data() + p;
    if (periods == 1) {
      filter<1>(h, 0, x, 0, plan.taps, out, 0);
      continue;
    }
    for (int m = 0; m < periods; m += kAtOnce) {  // periods is a multiple of 8
      filter<kAtOnce>(h, 0, x + m * plan.step_in, plan.step_in, plan.taps, out + m * n, n);
    }
  }
}

// Writes each lane's stretch of outputs. Drops outputs beyond the end of `out`.
template <int L>
CLSP_INLINE void write_stretches(ResampleBuffers<L>& b, std::int64_t outputs, std::int64_t begin,
                                 Span<float> out) {
  using V = typename ResampleBuffers<L>::V;
  for (std::int64_t j = 0; j < outputs; j += L) {
    V tile[L];
#pragma GCC unroll 16
    for (int c = 0; c < L; ++c) tile[c] = b.out[static_cast<std::size_t>(j + c)].lanes;
    transpose(tile);
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) {
      const std::int64_t at = begin + lane * outputs + j;
      const auto room = static_cast<std::int64_t>(out.size()) - at;
      const std::int64_t count = std::min<std::int64_t>({L, outputs - j, room});
      if (count == L) {
        store(out.data() + at, tile[lane]);
      } else if (count > 0) {
        float values[L];
        store(values, tile[lane]);
        std::copy_n(values, count, out.data() + at);
      }
    }
  }
}

template <int L>
CLSP_INLINE void resample_lanes(const ResamplePlan& plan, const Layout& layout,
                                Span<const float> in, Span<float> out) {
  ResampleBuffers<L> buffers(layout);
  const auto size = static_cast<std::int64_t>(out.size());
  std::int64_t input = plan.first[0];
  for (std::int64_t output = 0; output < size; output += L * layout.outputs) {
    read_columns(in, input, layout.inputs, buffers);
    filter_columns(plan, layout.periods, buffers);
    write_stretches(buffers, layout.outputs, output, out);
    input += L * layout.inputs;
  }
}

struct ResampleWork {
  const ResamplePlan& plan;
  const Layout& layout;
  Span<const float> in;
  Span<float> out;

  template <std::size_t Bytes>
  CLSP_INLINE void run() const {
    resample_lanes<Bytes / sizeof(float)>(plan, layout, in, out);
  }
};

// For rates with too many phases for a stretch.
void resample_one_by_one(const ResamplePlan& plan, Span<const float> in, Span<float> out) {
  const auto phases = static_cast<std::size_t>(plan.step_out);
  const auto taps = static_cast<std::size_t>(plan.taps);
  std::int64_t origin = 0;
  for (std::size_t j = 0; j < out.size(); j += phases, origin += plan.step_in) {
    for (std::size_t p = 0; p < std::min(phases, out.size() - j); ++p) {
      out[j + p] =
          output(plan.coefficients.data() + p * taps, plan.taps, origin + plan.first[p], in);
    }
  }
}

struct CachedPlan {
  int from_hz, to_hz;
  std::shared_ptr<const ResamplePlan> plan;
};
constexpr std::size_t kMaxCachedPlans = 8;
std::mutex cache_mutex;
std::list<CachedPlan> cached_plans;  // the most recently used first

// Locks the mutex during a fork(). If another thread held it, the child would wait forever.
const int fork_handlers = ::pthread_atfork([] { cache_mutex.lock(); }, [] { cache_mutex.unlock(); },
                                           [] { cache_mutex.unlock(); });

}  // namespace

std::shared_ptr<const ResamplePlan> resample_plan(int from_hz, int to_hz) {
  check_rates(from_hz, to_hz);
  const std::lock_guard<std::mutex> lock(cache_mutex);
  const auto has_rates = [=](const CachedPlan& cached) {
    return cached.from_hz == from_hz && cached.to_hz == to_hz;
  };
  const auto cached = std::find_if(cached_plans.begin(), cached_plans.end(), has_rates);
  if (cached != cached_plans.end()) {
    cached_plans.splice(cached_plans.begin(), cached_plans, cached);
  } else {
    cached_plans.push_front({from_hz, to_hz, make_plan(from_hz, to_hz)});
    if (cached_plans.size() > kMaxCachedPlans) cached_plans.pop_back();
  }
  return cached_plans.front().plan;
}

std::size_t resampled_size(std::size_t samples, int from_hz, int to_hz) {
  check_rates(from_hz, to_hz);
  const auto from = static_cast<std::uint64_t>(from_hz), to = static_cast<std::uint64_t>(to_hz);
  const std::uint64_t seconds = samples / from, rest = samples % from;
  return checked_multiply(checked_size(seconds), checked_size(to)) +
         checked_size((2 * rest * to + from) / (2 * from));
}

void resample(const ResamplePlan& plan, Span<const float> in, Span<float> out, Isa isa) {
  const Layout layout = choose_layout(plan);
  if (layout.periods == 0) return resample_one_by_one(plan, in, out);
  dispatch(isa, ResampleWork{plan, layout, in, out});
}

}  // namespace clsp
