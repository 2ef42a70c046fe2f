#include "models/router.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "sim/check.hpp"

namespace orrery {
namespace {

/// Standard normal numbers out of a table of quantiles: a batch needs hundreds of millions of them.
/// Cut off at 4.3 standard deviations; the distribution function is off by at most 1/65536.
class NormalTable {
 public:
  NormalTable() : quantiles_(kEntries) {
    // The distribution function summed up by steps of h; each quantile by linear interpolation.
    constexpr double kFrom = -4.5;
    constexpr double kStep = 1e-4;
    double x = kFrom;
    double below = 0;
    double total = 0;
    const auto density = [](double at) { return std::exp(-at * at / 2); };
    for (double at = kFrom; at < -kFrom; at += kStep) total += density(at + kStep / 2) * kStep;
    for (std::size_t i = 0; i < kEntries; ++i) {
      const double wanted = total * (static_cast<double>(i) + 0.5) / kEntries;
      double mass = density(x + kStep / 2) * kStep;
      while (below + mass < wanted) {
        below += mass;
        x += kStep;
        mass = density(x + kStep / 2) * kStep;
      }
      quantiles_[i] = static_cast<float>(x + kStep * (wanted - below) / mass);
    }
  }

  /// out[i] = mean[i] + spread * normal.
  void draw(Random& random, std::span<const float> mean, float spread, std::span<float> out) const {
    for (std::size_t i = 0; i < out.size(); i += 4) {
      std::uint64_t bits = random.next();
      const std::size_t end = std::min(i + 4, out.size());
      for (std::size_t k = i; k < end; ++k) {
        out[k] = mean[k] + spread * quantiles_[bits & (kEntries - 1)];
        bits >>= 16;
      }
    }
  }

 private:
  static constexpr std::size_t kEntries = 1 << 16;
  std::vector<float> quantiles_;
};

/// exp(x) for |x| < 87, to within 4e-6 of it, and at least 2^-126 and some number above 2^127
/// beyond, in a form that compilers vectorise (no branch on a float): 2^(k + r) with k whole and
/// |r| <= 1/2, and the series of exp(r ln 2). |x| < 2^20.
float exponential(float x) {
  constexpr float kRounder = 12582912;  // 1.5 x 2^23: adding it rounds to a whole number
  const float power = x * 1.44269504F;
  const float whole = (power + kRounder) - kRounder;
  const float y = (power - whole) * 0.693147181F;
  const float series =
      1 + y * (1 + y * (1.0F / 2 + y * (1.0F / 6 + y * (1.0F / 24 + y * (1.0F / 120)))));
  const std::int32_t exponent = static_cast<std::int32_t>(whole) + 127;
  const std::int32_t at_least = exponent > 1 ? exponent : 1;
  return series * std::bit_cast<float>((at_least < 254 ? at_least : 254) << 23);
}

/// Affinities to scores, in place.
void score(std::span<float> x, bool sigmoid) {
  if (sigmoid) {
    for (float& v : x) v = 1 / (1 + exponential(-v));
    return;
  }
  const float greatest = *std::max_element(x.begin(), x.end());
  float sum = 0;
  for (float& v : x) sum += v = exponential(v - greatest);
  for (float& v : x) v /= sum;
}

/// One batch after the other through one router.
class Router {
 public:
  Router(const Moe& moe, const RouterDynamics& dynamics, std::uint64_t seed)
      : moe_(moe),
        dynamics_(dynamics),
        select_(moe),
        random_(Random::of({seed, 1})),
        experts_(static_cast<std::size_t>(moe.routed_experts)),
        offset_(experts_),
        bias_(experts_),
        of_sequence_(experts_),
        scores_(experts_),
        biased_(experts_),
        in_sequence_(experts_),
        gradient_(experts_) {
    for (float& offset : offset_) {
      offset = static_cast<float>(dynamics.offset_spread * random_.normal());
    }
  }

  /// Tokens of each expert in one batch. `seen(tokens of each expert)` is called for each sequence.
  template <class Seen>
  std::vector<std::int64_t> batch(bool with_gradient, Seen seen) {
    std::vector<std::int64_t> loads(experts_, 0);
    std::fill(gradient_.begin(), gradient_.end(), 0.0);
    for (std::int64_t q = 0; q < dynamics_.sequences; ++q) {
      normals_.draw(random_, offset_, static_cast<float>(dynamics_.sequence_spread), of_sequence_);
      std::fill(in_sequence_.begin(), in_sequence_.end(), 0);
      of_tokens_.clear();
      for (std::int64_t t = 0; t < dynamics_.tokens; ++t) {
        normals_.draw(random_, of_sequence_, static_cast<float>(dynamics_.token_spread), scores_);
        score(scores_, moe_.sigmoid_scores);
        for (std::size_t e = 0; e < experts_; ++e) biased_[e] = scores_[e] + bias_[e];
        for (const std::int32_t e : select_(biased_)) ++in_sequence_[static_cast<std::size_t>(e)];
        if (with_gradient) of_tokens_.insert(of_tokens_.end(), scores_.begin(), scores_.end());
      }
      if (with_gradient) add_balance_gradient(moe_, of_tokens_, in_sequence_, gradient_);
      for (std::size_t e = 0; e < experts_; ++e) loads[e] += in_sequence_[e];
      seen(std::span<const std::int64_t>(in_sequence_));
    }
    return loads;
  }

  void update(std::span<const std::int64_t> loads) {
    const auto experts = static_cast<std::int64_t>(experts_);
    const std::int64_t all = std::accumulate(loads.begin(), loads.end(), std::int64_t{0});
    const auto step = static_cast<float>(dynamics_.bias_step);
    for (std::size_t e = 0; e < experts_; ++e) {
      // mean - load has the sign of all - load * experts
      const std::int64_t lacks = all - loads[e] * experts;
      if (lacks != 0) bias_[e] += lacks > 0 ? step : -step;
      const double rate = dynamics_.sequence_loss * dynamics_.loss_rate;
      offset_[e] -=
          static_cast<float>(rate * gradient_[e] / static_cast<double>(dynamics_.sequences));
    }
  }

  const std::vector<float>& bias() const { return bias_; }

 private:
  const Moe& moe_;
  const RouterDynamics& dynamics_;
  ExpertSelection select_;
  NormalTable normals_;
  Random random_;
  std::size_t experts_;
  std::vector<float> offset_, bias_;
  std::vector<float> of_sequence_, scores_, biased_;
  std::vector<std::int64_t> in_sequence_;
  std::vector<double> gradient_;
  std::vector<float> of_tokens_;  ///< scores of a sequence's tokens
};

}  // namespace

ExpertSelection::ExpertSelection(const Moe& moe)
    : experts_(static_cast<std::int32_t>(moe.routed_experts)),
      top_k_(static_cast<std::int32_t>(moe.top_k)),
      groups_(static_cast<std::int32_t>(moe.groups)),
      group_limit_(static_cast<std::int32_t>(std::min(moe.group_limit, moe.groups))),
      per_group_(experts_ / groups_),
      group_score_(static_cast<std::size_t>(groups_)),
      group_order_(static_cast<std::size_t>(groups_)),
      chosen_(static_cast<std::size_t>(top_k_)) {
  ORRERY_CHECK(experts_ % groups_ == 0 && group_limit_ * per_group_ >= top_k_,
               "top {} of {} experts in {} of {} groups", top_k_, experts_, group_limit_, groups_);
}

std::span<const std::int32_t> ExpertSelection::operator()(std::span<const float> biased) {
  std::iota(group_order_.begin(), group_order_.end(), 0);
  if (group_limit_ < groups_) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    for (std::int32_t g = 0; g < groups_; ++g) {
      float best = kNone;
      float second = kNone;
      for (std::int32_t e = g * per_group_; e < (g + 1) * per_group_; ++e) {
        const float s = biased[static_cast<std::size_t>(e)];
        second = std::max(second, std::min(best, s));
        best = std::max(best, s);
      }
      group_score_[static_cast<std::size_t>(g)] = per_group_ > 1 ? best + second : best;
    }
    std::stable_sort(group_order_.begin(), group_order_.end(), [&](std::int32_t a, std::int32_t b) {
      return group_score_[static_cast<std::size_t>(a)] > group_score_[static_cast<std::size_t>(b)];
    });
    std::sort(group_order_.begin(), group_order_.begin() + group_limit_);
  }
  // The best so far, greatest first; experts come in ascending order, so that an equal score that
  // comes later goes behind.
  std::int32_t held = 0;
  float least = -std::numeric_limits<float>::infinity();
  for (std::int32_t i = 0; i < group_limit_; ++i) {
    const std::int32_t first = group_order_[static_cast<std::size_t>(i)] * per_group_;
    for (std::int32_t e = first; e < first + per_group_; ++e) {
      const float s = biased[static_cast<std::size_t>(e)];
      if (held == top_k_ && s <= least) continue;
      std::int32_t at = held < top_k_ ? held++ : top_k_ - 1;
      for (; at > 0; --at) {
        const std::int32_t before = chosen_[static_cast<std::size_t>(at - 1)];
        if (biased[static_cast<std::size_t>(before)] >= s) break;
        chosen_[static_cast<std::size_t>(at)] = before;
      }
      chosen_[static_cast<std::size_t>(at)] = e;
      if (held == top_k_) {
        least = biased[static_cast<std::size_t>(chosen_[static_cast<std::size_t>(top_k_ - 1)])];
      }
    }
  }
  return chosen_;
}

void add_balance_gradient(const Moe& moe, std::span<const float> scores,
                          std::span<const std::int64_t> selections, std::span<double> gradient) {
  const std::size_t experts = selections.size();
  const std::size_t count = scores.size() / experts;
  const auto tokens = static_cast<double>(count);
  const double scale = static_cast<double>(experts) / (static_cast<double>(moe.top_k) * tokens);
  // With p_e = s_e / sum of s and the slope l_e = d ln s_e / d offset_e, which is 1 - s_e for a
  // sigmoid:  d(sum_i f_i p_i) / d offset_e = p_e l_e (f_e - sum_i f_i p_i). A softmax, whose
  // scores add up to 1 already, is the same with l_e = 1.
  for (std::size_t t = 0; t < count; ++t) {
    const std::span<const float> s = scores.subspan(t * experts, experts);
    double sum = 0;
    double weighted = 0;
    for (std::size_t e = 0; e < experts; ++e) {
      sum += s[e];
      weighted += scale * static_cast<double>(selections[e]) * s[e];
    }
    for (std::size_t e = 0; e < experts; ++e) {
      const double f = scale * static_cast<double>(selections[e]);
      const double slope = moe.sigmoid_scores ? 1 - double{s[e]} : 1;
      gradient[e] += s[e] / sum * slope * (f - weighted / sum) / tokens;
    }
  }
}

double max_violation(std::span<const std::int64_t> loads) {
  const std::int64_t all = std::accumulate(loads.begin(), loads.end(), std::int64_t{0});
  if (all == 0) return 0;
  const auto most = static_cast<double>(*std::max_element(loads.begin(), loads.end()));
  return most * static_cast<double>(loads.size()) / static_cast<double>(all) - 1;
}

/// Enough for shares to be known to 1 or 2 %, V3's experts' included.
constexpr std::int64_t kTokensAtTheEnd = 1 << 18;

RouterOutcome simulate_router(const Moe& moe, const RouterDynamics& dynamics, std::uint64_t seed) {
  Router router(moe, dynamics, seed);
  RouterOutcome out;
  const bool with_gradient = dynamics.sequence_loss > 0;
  const auto ignore = [](std::span<const std::int64_t>) {};
  for (std::int64_t step = 0; step < dynamics.steps; ++step) {
    std::vector<std::int64_t> loads = router.batch(with_gradient, ignore);
    router.update(loads);
    out.max_violation.push_back(max_violation(loads));
    out.loads.push_back(std::move(loads));
  }
  out.bias.assign(router.bias().begin(), router.bias().end());

  const std::int64_t of_batch = dynamics.sequences * dynamics.tokens;
  const std::int64_t batches = (kTokensAtTheEnd + of_batch - 1) / of_batch;
  const auto experts = static_cast<std::size_t>(moe.routed_experts);
  const auto tokens = static_cast<double>(dynamics.tokens);
  std::vector<double> sum(experts, 0);
  std::vector<double> squares(experts, 0);
  double sequences = 0;
  for (std::int64_t batch = 0; batch < batches; ++batch) {
    router.batch(false, [&](std::span<const std::int64_t> loads) {
      ++sequences;
      for (std::size_t e = 0; e < experts; ++e) {
        const double share = static_cast<double>(loads[e]) / tokens;
        sum[e] += share;
        squares[e] += share * share;
      }
    });
  }
  // One-way analysis of variance of the 0/1 choices: the variance between sequences, less what
  // independent tokens would show.
  double between = 0;
  double all = 0;
  for (std::size_t e = 0; e < experts; ++e) {
    const double p = sum[e] / sequences;
    const double variance = (squares[e] - sequences * p * p) / (sequences - 1);
    const double within = (p - squares[e] / sequences) * tokens / (tokens - 1);
    between += variance - within / tokens;
    all += variance - within / tokens + within;
    out.popularity.push_back(p / static_cast<double>(moe.top_k));
  }
  out.correlation = all > 0 ? std::clamp(between / all, 0.0, 1.0) : 0;
  return out;
}

}  // namespace orrery
