// The truth against closed forms, central differences and brute force.

#include "kernels/reference/reference.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <complex>
#include <functional>
#include <numeric>
#include <optional>
#include <set>

#include "tests/kernels/host_operands.hpp"

namespace orrery::kernels {
namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

Doubles in_double(const Floats& values) {
  return {values.begin(), values.end()};
}

double dot(const Doubles& a, const Doubles& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

/// Central differences of f in each of x.
Doubles differences(const std::function<double(const Doubles&)>& f, Doubles x) {
  constexpr double kStep = 1e-5;
  Doubles result;
  for (double& at : x) {
    const double before = at;
    at = before + kStep;
    const double above = f(x);
    at = before - kStep;
    result.push_back((above - f(x)) / (2 * kStep));
    at = before;
  }
  return result;
}

void expect_near(const Floats& actual, const Doubles& expected, double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    EXPECT_NEAR(actual[i], expected[i], tolerance * std::max(1.0, std::abs(expected[i]))) << i;
  }
}

// ---- norms ----

struct NormCase {
  std::int64_t rows, columns, segments;
  bool centred;
  double epsilon = 1e-3;
};

/// Variance as the mean of squares less the square of the mean, another way than reference/norm.
Doubles norm_of(const NormCase& n, const Doubles& x, const Doubles& gain, const Doubles& bias) {
  const auto width = static_cast<std::size_t>(n.columns / n.segments);
  Doubles y(x.size());
  for (std::size_t first = 0; first < x.size(); first += width) {
    double sum = 0, squares = 0;
    for (std::size_t c = 0; c < width; ++c) {
      sum += x[first + c];
      squares += x[first + c] * x[first + c];
    }
    const double mean = n.centred ? sum / static_cast<double>(width) : 0;
    const double rms = std::sqrt(squares / static_cast<double>(width) - mean * mean + n.epsilon);
    for (std::size_t c = 0; c < width; ++c) {
      y[first + c] = (x[first + c] - mean) / rms * gain[c] + (bias.empty() ? 0 : bias[c]);
    }
  }
  return y;
}

class ReferenceNorm : public testing::TestWithParam<NormCase> {};

TEST_P(ReferenceNorm, ForwardIsTheFormulaAndBackwardItsDerivative) {
  const NormCase n = GetParam();
  HostOperands at(11);
  const std::int64_t elements = n.rows * n.columns, width = n.columns / n.segments;
  const Floats x = at.uniform(elements, -2, 3), gain = at.uniform(width, 0.5, 1.5);
  const Floats bias = at.uniform(n.centred ? width : 0, -1, 1);
  const Floats d_y = at.uniform(elements, -1, 1), add = at.uniform(elements, -1, 1);

  NormForward forward;
  forward.terms[2] = at.matrix(n.rows, n.columns, x);
  forward.gain = at.matrix(1, width, gain);
  if (n.centred) forward.bias = at.matrix(1, width, bias);
  forward.y = at.matrix(n.rows, n.columns);
  forward.epsilon = static_cast<float>(n.epsilon);
  forward.segments = n.segments;
  forward.centred = n.centred;
  ASSERT_EQ(why_impossible(forward), "");
  reference::run(forward);
  expect_near(floats_of(forward.y), norm_of(n, in_double(x), in_double(gain), in_double(bias)),
              1e-6);

  const Floats d_gain = at.uniform(width, -1, 1), d_bias = at.uniform(width, -1, 1);
  NormBackward backward;
  backward.d_y = at.matrix(n.rows, n.columns, d_y);
  backward.x = forward.terms[2];
  backward.gain = forward.gain;
  backward.add = at.matrix(n.rows, n.columns, add);
  backward.d_x = at.matrix(n.rows, n.columns);
  backward.d_gain = at.array(d_gain);
  if (n.centred) backward.d_bias = at.array(d_bias);
  backward.epsilon = forward.epsilon;
  backward.segments = n.segments;
  backward.centred = n.centred;
  ASSERT_EQ(why_impossible(backward), "");
  reference::run(backward);
  const auto loss = [&](const Doubles& x_, const Doubles& gain_, const Doubles& bias_) {
    return dot(norm_of(n, x_, gain_, bias_), in_double(d_y));
  };
  Doubles expected = differences(
      [&](const Doubles& v) { return loss(v, in_double(gain), in_double(bias)); }, in_double(x));
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += add[i];
  expect_near(floats_of(backward.d_x), expected, 1e-6);
  expected = differences([&](const Doubles& v) { return loss(in_double(x), v, in_double(bias)); },
                         in_double(gain));
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += d_gain[i];
  expect_near({backward.d_gain, backward.d_gain + width}, expected, 1e-6);
  if (!n.centred) return;
  expected = differences([&](const Doubles& v) { return loss(in_double(x), in_double(gain), v); },
                         in_double(bias));
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += d_bias[i];
  expect_near({backward.d_bias, backward.d_bias + width}, expected, 1e-6);
}

INSTANTIATE_TEST_SUITE_P(All, ReferenceNorm,
                         testing::Values(NormCase{3, 7, 1, false}, NormCase{2, 12, 3, false},
                                         NormCase{3, 8, 1, true}, NormCase{2, 15, 5, true}));

TEST(ReferenceNormSum, IsOfAllTermsAndTheNormOfItsRoundedValues) {
  HostOperands at;
  NormForward n;
  n.terms[0] = at.matrix(1, 2, {1.0F, 256.0F});
  n.terms[1] = at.matrix(1, 2, {0.0F, 1.0F});
  n.terms[3] = at.matrix(1, 2, {1.0F, 0.25F});
  n.sum = at.matrix(1, 2, Format::bf16);
  n.gain = at.matrix(1, 2, {1.0F, 2.0F});
  n.y = at.matrix(1, 2);
  n.epsilon = 0;
  reference::run(n);
  // 257.25 lies between the bf16 256 and 258, nearer to 258.
  const auto* sum = static_cast<const std::uint16_t*>(n.sum.data);
  EXPECT_EQ(float_of_bf16(sum[0]), 2.0F);
  EXPECT_EQ(float_of_bf16(sum[1]), 258.0F);
  const double rms = std::sqrt((4 + 258.0 * 258) / 2);
  expect_near(floats_of(n.y), {2 / rms, 516 / rms}, 1e-6);
}

// ---- activations ----

double silu(double x) {
  return x / 2 * (1 + std::tanh(x / 2));
}
double gelu(double x) {
  return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
}

Doubles activation(Activation kind, std::size_t rows, const Doubles& in, const Doubles& weight) {
  const std::size_t columns = in.size() / rows;
  Doubles out;
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t width = kind == Activation::gelu ? columns : columns / 2;
    for (std::size_t c = 0; c < width; ++c) {
      const double x = in[r * columns + c];
      const double y = kind == Activation::gelu ? gelu(x) : silu(x) * in[r * columns + width + c];
      out.push_back(y * weight[r]);
    }
  }
  return out;
}

TEST(ReferenceActivation, ValuesOfTables) {
  EXPECT_NEAR(gelu(1), 0.8413447460685429, 1e-15);  // the normal distribution's at 1
  EXPECT_NEAR(silu(1), 1 / (1 + std::exp(-1.0)), 1e-15);
}

TEST(ReferenceActivation, BackwardIsTheDerivative) {
  constexpr std::size_t kRows = 4, kUsed = 3;
  for (const Activation kind : {Activation::swiglu, Activation::gelu}) {
    for (const bool weighted : {false, true}) {
      HostOperands at(3);
      const std::int64_t width = 5, columns = kind == Activation::swiglu ? 10 : 5;
      const Floats in = at.uniform(4 * columns, -4, 4), d_out = at.uniform(4 * width, -1, 1);
      const Floats weight = weighted ? at.uniform(4, 0.1, 1) : Floats(4, 1.0F);
      ActivationForward forward;
      forward.kind = kind;
      forward.in = at.matrix(4, columns, in);
      forward.out = at.matrix(4, width);
      forward.row_weight = weighted ? at.array(weight) : nullptr;
      forward.used_rows = at.array<std::int32_t>({static_cast<std::int32_t>(kUsed)});
      reference::run(forward);
      const auto used = [&](const Floats& values) {
        return Floats(values.begin(),
                      values.begin() + static_cast<std::ptrdiff_t>(values.size() / kRows * kUsed));
      };
      const Doubles out = activation(kind, kUsed, in_double(used(in)), in_double(weight));
      expect_near(used(floats_of(forward.out)), out, 1e-6);
      EXPECT_TRUE(std::isnan(floats_of(forward.out).back()));  // row 3 is not used

      ActivationBackward backward;
      backward.kind = kind;
      backward.in = forward.in;
      backward.d_out = at.matrix(4, width, d_out);
      backward.d_in = at.matrix(4, columns);
      backward.out_again = at.matrix(4, width);
      backward.row_weight = forward.row_weight;
      backward.used_rows = forward.used_rows;
      reference::run(backward);
      const auto loss = [&](const Doubles& x) {
        return dot(activation(kind, kUsed, x, in_double(weight)), in_double(used(d_out)));
      };
      expect_near(used(floats_of(backward.d_in)), differences(loss, in_double(used(in))), 1e-6);
      EXPECT_TRUE(std::isnan(floats_of(backward.d_in).back()));
      EXPECT_EQ(used(floats_of(backward.out_again)), used(floats_of(forward.out)));

      if (!weighted) continue;
      RowDot row_dot;
      row_dot.a = backward.out_again;
      row_dot.b = backward.d_out;
      row_dot.row_weight = forward.row_weight;
      row_dot.used_rows = forward.used_rows;
      row_dot.out = at.filled<float>(4, -9);
      reference::run(row_dot);
      const auto of_weight = [&](const Doubles& w) {
        return dot(activation(kind, kUsed, in_double(used(in)), w), in_double(used(d_out)));
      };
      expect_near({row_dot.out, row_dot.out + kUsed},
                  differences(of_weight, in_double(used(weight))), 1e-5);
      EXPECT_EQ(row_dot.out[3], -9);
    }
  }
}

TEST(ReferenceRowDot, IsZeroWhereTheWeightIs) {
  HostOperands at;
  RowDot d{.a = at.matrix(2, 2, {0, 0, 1, 2}), .b = at.matrix(2, 2, {1, 1, 3, 4})};
  d.row_weight = at.array<float>({0.0F, 0.5F});
  d.out = at.filled<float>(2, -9);
  reference::run(d);
  EXPECT_EQ(d.out[0], 0);
  EXPECT_EQ(d.out[1], 22);
}

// ---- routers ----

struct RouterCase {
  bool sigmoid, normalise, bias;
  std::int64_t groups, group_limit;
};

constexpr std::int64_t kExperts = 12, kTopK = 3, kTokens = 40;

Doubles scores_of(bool sigmoid, const Doubles& logits) {
  Doubles scores;
  double sum = 0;
  for (const double x : logits) {
    scores.push_back(sigmoid ? 0.5 * (1 + std::tanh(x / 2)) : std::exp(x));
    sum += scores.back();
  }
  if (!sigmoid) {
    for (double& s : scores) s /= sum;
  }
  return scores;
}

/// By trying every set of groups: ranks of the groups in it are largest together.
std::vector<std::int32_t> brute_force_choice(const RouterCase& k, const Doubles& scores,
                                             const Floats& bias) {
  const auto size = static_cast<std::size_t>(kExperts / k.groups);
  Doubles biased = scores;
  if (k.bias) {
    for (std::size_t e = 0; e < biased.size(); ++e) biased[e] += bias[e];
  }
  double best = -1e9;
  unsigned best_set = 0;
  for (unsigned set = 0; set < 1U << k.groups; ++set) {
    if (std::popcount(set) != k.group_limit) continue;
    double rank = 0;
    for (std::size_t g = 0; g < static_cast<std::size_t>(k.groups); ++g) {
      if ((set >> g & 1) == 0) continue;
      std::multiset<double> of_group;
      for (std::size_t e = 0; e < size; ++e) of_group.insert(biased[g * size + e]);
      rank += *of_group.rbegin();
      if (k.bias && size > 1) rank += *std::next(of_group.rbegin());
    }
    if (rank > best) best = rank, best_set = set;
  }
  std::vector<std::pair<double, std::int32_t>> allowed;
  for (std::size_t e = 0; e < biased.size(); ++e) {
    if ((best_set >> (e / size) & 1) != 0) {
      allowed.emplace_back(-biased[e], static_cast<std::int32_t>(e));
    }
  }
  std::sort(allowed.begin(), allowed.end());
  std::vector<std::int32_t> chosen;
  for (std::size_t i = 0; i < static_cast<std::size_t>(kTopK); ++i) {
    chosen.push_back(allowed[i].second);
  }
  return chosen;
}

Doubles weights_of(const RouterCase& k, const Doubles& logits,
                   const std::vector<std::int32_t>& chosen, double scale) {
  const Doubles scores = scores_of(k.sigmoid, logits);
  Doubles weights;
  double sum = 0;
  for (const std::int32_t e : chosen) {
    weights.push_back(scores[static_cast<std::size_t>(e)]);
    sum += weights.back();
  }
  for (double& w : weights) w *= scale / (k.normalise ? sum : 1);
  return weights;
}

class ReferenceRouter : public testing::TestWithParam<RouterCase> {};

TEST_P(ReferenceRouter, ChoosesAsBruteForceAndBackwardIsTheDerivative) {
  const RouterCase k = GetParam();
  HostOperands at(5);
  const Floats logits = at.uniform(kTokens * kExperts, -3, 3);
  const Floats bias = at.uniform(kExperts, -0.3, 0.3);
  constexpr float kScale = 2.5F;
  Router router;
  router.logits = at.matrix(kTokens, kExperts, logits);
  router.bias = k.bias ? at.array(bias) : nullptr;
  router.sigmoid = k.sigmoid;
  router.normalise = k.normalise;
  router.scale = kScale;
  router.groups = k.groups;
  router.group_limit = k.group_limit;
  router.top_k = kTopK;
  router.scores = at.filled<float>(kTokens * kExperts, -9);
  router.experts = at.filled<std::int32_t>(kTokens * kTopK, -9);
  router.weights = at.filled<float>(kTokens * kTopK, -9);
  ASSERT_EQ(why_impossible(router), "");
  reference::run(router);

  const Floats d_weights = at.uniform(kTokens * kTopK, -1, 1);
  RouterBackward backward;
  backward.sigmoid = k.sigmoid;
  backward.normalise = k.normalise;
  backward.scale = kScale;
  backward.top_k = kTopK;
  backward.scores = router.scores;
  backward.experts = router.experts;
  backward.d_weights = at.array(d_weights);
  backward.d_logits = at.matrix(kTokens, kExperts);
  reference::run(backward);
  const Floats d_logits = floats_of(backward.d_logits);

  for (std::int64_t t = 0; t < kTokens; ++t) {
    const auto row = [&](const Floats& all, std::int64_t width) {
      return Floats(all.begin() + t * width, all.begin() + (t + 1) * width);
    };
    const Doubles of_token = in_double(row(logits, kExperts));
    const Doubles scores = scores_of(k.sigmoid, of_token);
    expect_near({router.scores + t * kExperts, router.scores + (t + 1) * kExperts}, scores, 1e-6);
    const std::vector<std::int32_t> chosen = brute_force_choice(k, scores, bias);
    EXPECT_EQ(
        std::vector<std::int32_t>(router.experts + t * kTopK, router.experts + (t + 1) * kTopK),
        chosen);
    expect_near({router.weights + t * kTopK, router.weights + (t + 1) * kTopK},
                weights_of(k, of_token, chosen, kScale), 1e-6);
    const auto loss = [&](const Doubles& x) {
      return dot(weights_of(k, x, chosen, kScale), in_double(row(d_weights, kTopK)));
    };
    expect_near(row(d_logits, kExperts), differences(loss, of_token), 2e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, ReferenceRouter,
    testing::Values(RouterCase{true, true, true, 1, 1}, RouterCase{true, true, true, 4, 2},
                    RouterCase{true, false, false, 4, 2}, RouterCase{false, true, false, 1, 1},
                    RouterCase{false, false, false, 6, 3}, RouterCase{false, true, true, 3, 2},
                    RouterCase{true, true, true, 12, 5}));

TEST(ReferenceRouterTies, GoToTheSmallerIndex) {
  HostOperands at;
  Router k{.logits = at.matrix(1, 8, Floats(8, 0.5F)), .groups = 4, .group_limit = 2, .top_k = 3};
  k.scores = at.filled<float>(8);
  k.experts = at.filled<std::int32_t>(3, -1);
  k.weights = at.filled<float>(3);
  reference::run(k);
  EXPECT_EQ(std::vector<std::int32_t>(k.experts, k.experts + 3),
            (std::vector<std::int32_t>{0, 1, 2}));
  EXPECT_FLOAT_EQ(k.weights[0], 1.0F / 3);
}

TEST(ReferenceRouterBalanced, GoesRound) {
  HostOperands at;
  Router k{.logits = at.matrix(3, 4, at.uniform(12, -1, 1)), .balanced = true, .top_k = 3};
  k.scores = at.filled<float>(12);
  k.experts = at.filled<std::int32_t>(9, -1);
  k.weights = at.filled<float>(9);
  reference::run(k);
  EXPECT_EQ(std::vector<std::int32_t>(k.experts, k.experts + 9),
            (std::vector<std::int32_t>{0, 1, 2, 3, 0, 1, 2, 3, 0}));
  const float* s = k.scores + 4;
  EXPECT_FLOAT_EQ(k.weights[3], s[3] / (s[3] + s[0] + s[1]));
}

// ---- routing ----

struct Routing {
  RoutingMap map;
  std::int64_t slots;
};

Routing routing(HostOperands& at, std::vector<std::int32_t> experts, std::int64_t top_k,
                std::int64_t local, std::int64_t alignment, std::int64_t capacity,
                std::optional<std::int32_t> tokens = {}) {
  Routing r{{}, static_cast<std::int64_t>(experts.size())};
  RoutingMap& m = r.map;
  m.weights = at.array(at.uniform(r.slots, 0.1, 1));
  m.experts = at.array(std::move(experts));
  if (tokens) m.tokens = at.array<std::int32_t>({*tokens});
  m.max_tokens = r.slots / top_k;
  m.top_k = top_k;
  m.local_experts = local;
  m.alignment = alignment;
  m.capacity = capacity;
  m.group_begin = at.filled<std::int32_t>(local + 1, -9);
  m.group_rows = at.filled<std::int32_t>(local, -9);
  m.used_rows = at.filled<std::int32_t>(1, -9);
  m.row_source = at.filled<std::int32_t>(capacity, -9);
  m.row_weight = at.filled<float>(capacity, -9);
  m.slot_row = at.filled<std::int32_t>(r.slots, -9);
  m.overflow = at.filled<std::int32_t>(1, -9);
  EXPECT_EQ(why_impossible(m), "");
  reference::run(m);
  return r;
}

/// Tokens choose different experts; some are somebody else's.
std::vector<std::int32_t> random_experts(HostOperands& at, std::int64_t tokens, std::int64_t top_k,
                                         std::int32_t local) {
  std::vector<std::int32_t> result, all(static_cast<std::size_t>(local + 4));
  std::iota(all.begin(), all.end(), 0);
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::shuffle(all.begin(), all.end(), at.random());
    for (std::size_t i = 0; i < static_cast<std::size_t>(top_k); ++i) {
      result.push_back(all[i] < local ? all[i] : -1);
    }
  }
  return result;
}

TEST(ReferenceRoutingMap, SortsStablyWithPadding) {
  for (const std::int64_t alignment : {1, 8, 128}) {
    for (const int received : {-1, 0, 17}) {
      HostOperands at(7);
      constexpr std::int64_t kMax = 25, kChoices = 4, kLocal = 5;
      const auto experts = random_experts(at, kMax, kChoices, kLocal);
      const auto r = routing(at, experts, kChoices, kLocal, alignment, 1000,
                             received < 0 ? std::nullopt : std::optional<std::int32_t>(received));
      const RoutingMap& m = r.map;
      const std::int64_t slots = (received < 0 ? kMax : received) * kChoices;
      std::vector<std::pair<std::int32_t, std::int32_t>> sorted;  // (expert, slot)
      for (std::int32_t s = 0; s < slots; ++s) {
        if (experts[static_cast<std::size_t>(s)] >= 0) {
          sorted.emplace_back(experts[static_cast<std::size_t>(s)], s);
        }
      }
      std::sort(sorted.begin(), sorted.end());
      std::vector<std::int32_t> source, slot_row(static_cast<std::size_t>(r.slots), -9);
      std::fill_n(slot_row.begin(), slots, -1);
      Floats weight;
      std::int64_t padding = 0;
      for (std::int32_t e = 0; e < kLocal; ++e) {
        EXPECT_EQ(m.group_begin[e], static_cast<std::int64_t>(source.size()));
        std::int32_t count = 0;
        for (const auto& [expert, slot] : sorted) {
          if (expert != e) continue;
          slot_row[static_cast<std::size_t>(slot)] = static_cast<std::int32_t>(source.size());
          source.push_back(slot / static_cast<std::int32_t>(kChoices));
          weight.push_back(m.weights[slot]);
          ++count;
        }
        EXPECT_EQ(m.group_rows[e], count);
        while (source.size() % static_cast<std::size_t>(alignment) != 0) {
          source.push_back(-1);
          weight.push_back(0);
          ++padding;
        }
      }
      EXPECT_EQ(m.group_begin[kLocal], static_cast<std::int64_t>(source.size()));
      EXPECT_EQ(*m.used_rows, static_cast<std::int64_t>(source.size()));
      EXPECT_EQ(*m.overflow, 0);
      EXPECT_EQ(std::vector<std::int32_t>(m.row_source, m.row_source + *m.used_rows), source);
      EXPECT_EQ(Floats(m.row_weight, m.row_weight + *m.used_rows), weight);
      EXPECT_EQ(std::vector<std::int32_t>(m.slot_row, m.slot_row + r.slots), slot_row);
      EXPECT_EQ(m.row_source[*m.used_rows], -9);
      EXPECT_EQ(padding > 0, alignment > 1 && received != 0);
    }
  }
}

TEST(ReferenceRoutingMap, LeavesOutWhatHasNoRoom) {
  HostOperands at;
  // Expert 0: slots 0, 3, 4; expert 1: 1, 5; expert 2: 2. Rows 0..2, padding 3, 4..5, then none.
  const auto r = routing(at, {0, 1, 2, 0, 0, 1}, 2, 3, 4, 6);
  const RoutingMap& m = r.map;
  EXPECT_EQ(std::vector<std::int32_t>(m.group_begin, m.group_begin + 4),
            (std::vector<std::int32_t>{0, 4, 6, 6}));
  EXPECT_EQ(std::vector<std::int32_t>(m.group_rows, m.group_rows + 3),
            (std::vector<std::int32_t>{3, 2, 0}));
  EXPECT_EQ(std::vector<std::int32_t>(m.row_source, m.row_source + 6),
            (std::vector<std::int32_t>{0, 1, 2, -1, 0, 2}));
  EXPECT_EQ(std::vector<std::int32_t>(m.slot_row, m.slot_row + 6),
            (std::vector<std::int32_t>{0, 4, -1, 1, 2, 5}));
  EXPECT_EQ(*m.used_rows, 6);
  EXPECT_EQ(*m.overflow, 1);
}

TEST(ReferencePermute, AndUnpermuteGiveEachTokenTimesItsChoices) {
  HostOperands at(9);
  constexpr std::int64_t kMax = 20, kChoices = 3, kLocal = 4, kColumns = 6;
  const auto experts = random_experts(at, kMax, kChoices, kLocal);
  const RoutingMap m = routing(at, experts, kChoices, kLocal, 8, 200).map;
  Floats values;
  for (std::int64_t i = 0; i < kMax * kColumns; ++i) values.push_back(static_cast<float>(i % 41));
  const Matrix tokens = at.matrix(kMax, kColumns, values);
  const Matrix from = at.matrix(kMax, kColumns, Format::bf16);
  reference::run(Copy{.from = tokens, .to = from});
  Permute p{.from = from, .to = at.matrix(200, kColumns, Format::bf16)};
  p.row_source = m.row_source;
  p.used_rows = m.used_rows;
  reference::run(p);
  const auto* codes = static_cast<const std::uint16_t*>(p.to.data);
  for (std::int64_t row = 0; row < *m.used_rows; ++row) {
    const std::int32_t source = m.row_source[row];
    for (std::int64_t c = 0; c < kColumns; ++c) {
      EXPECT_EQ(float_of_bf16(codes[row * kColumns + c]),
                source < 0 ? 0 : values[static_cast<std::size_t>(source * kColumns + c)]);
    }
  }
  EXPECT_EQ(codes[*m.used_rows * kColumns], 0xFFFF);
  Unpermute u{.from = p.to, .to = at.matrix(kMax, kColumns)};
  u.slot_row = m.slot_row;
  u.top_k = kChoices;
  u.row_values = m.row_weight;
  u.slot_values = at.filled<float>(kMax * kChoices, -9);
  reference::run(u);
  const Floats back = floats_of(u.to);
  for (std::int64_t t = 0; t < kMax; ++t) {
    float mine = 0;
    for (std::int64_t i = 0; i < kChoices; ++i) {
      const bool here = experts[static_cast<std::size_t>(t * kChoices + i)] >= 0;
      if (here) ++mine;
      EXPECT_EQ(u.slot_values[t * kChoices + i], here ? m.weights[t * kChoices + i] : 0);
    }
    for (std::int64_t c = 0; c < kColumns; ++c) {
      const auto i = static_cast<std::size_t>(t * kColumns + c);
      EXPECT_EQ(back[i], mine * values[i]);
    }
  }
}

TEST(ReferencePermute, KeepsScales) {
  HostOperands at;
  const Matrix values = at.matrix(2, 200, at.uniform(400, -5, 5));
  const Matrix from = at.matrix(2, 200, Format::e4m3, Scaling::rows);
  reference::run(Quantize{.from = values, .to = from});
  Permute p{.from = from, .to = at.matrix(4, 200, Format::e4m3, Scaling::rows)};
  p.row_source = at.array<std::int32_t>({1, -1, 0});
  p.used_rows = at.array<std::int32_t>({3});
  reference::run(p);
  const Matrix before = at.matrix(2, 200), after = at.matrix(4, 200);
  reference::run(Dequantize{.from = from, .to = before});
  reference::run(Dequantize{.from = p.to, .to = after, .used_rows = p.used_rows});
  const Floats b = floats_of(before), a = floats_of(after);
  for (std::size_t c = 0; c < 200; ++c) {
    EXPECT_EQ(a[c], b[200 + c]);
    EXPECT_EQ(a[200 + c], 0);
    EXPECT_EQ(a[400 + c], b[c]);
  }
  EXPECT_EQ(p.to.scales[1], 1);
  EXPECT_EQ(p.to.scales[4 + 1], 1);
  EXPECT_EQ(p.to.scales[3], -7);  // not a used row
}

// ---- quantisation ----

/// Code of the nearest value among all, ties to the even code.
int nearest(Format format, double x) {
  static const auto values = [](Format f) {
    std::vector<double> all;
    for (int code = 0; code < (f == Format::e4m3 ? 0x7F : 0x800); ++code) {
      all.push_back(f == Format::e4m3 ? float_of_e4m3(static_cast<std::uint8_t>(code))
                                      : float_of_e5m6(static_cast<std::uint16_t>(code)));
    }
    return all;
  };
  static const std::vector<double> e4m3 = values(Format::e4m3), e5m6 = values(Format::e5m6);
  const std::vector<double>& all = format == Format::e4m3 ? e4m3 : e5m6;
  int best = 0;
  for (int code = 1; code < static_cast<int>(all.size()); ++code) {
    const double far = std::abs(all[static_cast<std::size_t>(best)] - std::abs(x));
    const double here = std::abs(all[static_cast<std::size_t>(code)] - std::abs(x));
    if (here < far || (here == far && code % 2 == 0)) best = code;
  }
  return std::signbit(x) ? best | (format == Format::e4m3 ? 0x80 : 0x800) : best;
}

int code_of(const Matrix& m, std::int64_t row, std::int64_t column) {
  const std::int64_t i = row * m.pitch + column;
  return m.format == Format::e4m3 ? static_cast<const std::uint8_t*>(m.data)[i]
                                  : load_e5m6(m.data, i);
}

/// By definition: every tile's scale and codes of `values`.
void expect_quantised(const Matrix& m, const Doubles& values, std::int64_t rows,
                      std::int64_t columns) {
  const std::int64_t tall = m.scaling == Scaling::rows ? 1 : 128;
  for (std::int64_t r0 = 0; r0 < rows; r0 += tall) {
    for (std::int64_t c0 = 0; c0 < columns; c0 += 128) {
      std::vector<std::pair<std::int64_t, std::int64_t>> tile;
      double largest = 0;
      for (std::int64_t r = r0; r < std::min(rows, r0 + tall); ++r) {
        for (std::int64_t c = c0; c < std::min(columns, c0 + 128); ++c) {
          tile.emplace_back(r, c);
          largest = std::max(largest, std::abs(values[static_cast<std::size_t>(r * columns + c)]));
        }
      }
      const float scale = m.scaling == Scaling::rows
                              ? m.scales[c0 / 128 * m.scale_pitch + r0]
                              : m.scales[r0 / 128 * m.scale_pitch + c0 / 128];
      if (largest == 0) {
        EXPECT_EQ(scale, 1);
      } else if (m.format == Format::e4m3) {
        EXPECT_EQ(scale, static_cast<float>(largest) / 448.0F);
      } else {
        EXPECT_EQ(std::log2(scale), std::ceil(std::log2(largest)));
      }
      for (const auto& [r, c] : tile) {
        const auto x = static_cast<float>(values[static_cast<std::size_t>(r * columns + c)]);
        ASSERT_EQ(code_of(m, r, c), nearest(m.format, x / scale)) << r << " " << c;
      }
    }
  }
}

TEST(ReferenceQuantize, ByDefinition) {
  for (const Format format : {Format::e4m3, Format::e5m6}) {
    for (const Scaling scaling : {Scaling::rows, Scaling::blocks}) {
      HostOperands at(13);
      constexpr std::int64_t kRows = 150, kColumns = 270;
      Floats values = at.uniform(kRows * kColumns, -1, 1);
      for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] *= std::exp2(static_cast<float>(at.uniform(-20, 3)));  // subnormal codes too
      }
      std::fill_n(values.begin(), 128, 0.0F);  // a tile of zeros
      values[kColumns] = 8.0F;                 // and one whose largest is a power of two
      const Matrix to = at.matrix(kRows, kColumns, format, scaling);
      const Quantize q{.from = at.matrix(kRows, kColumns, values), .to = to};
      ASSERT_EQ(why_impossible(q), "");
      reference::run(q);
      expect_quantised(to, in_double(values), kRows, kColumns);

      const Matrix back = at.matrix(kRows, kColumns);
      reference::run(Dequantize{.from = to, .to = back});
      const Floats again = floats_of(back);
      // Half a step of e4m3 (3 bits) or e5m6 (6 bits) of the value, or of the subnormals.
      const double relative = format == Format::e4m3 ? 1.0 / 16 : 1.0 / 128;
      const double floor = format == Format::e4m3 ? 8.0 / 448 * std::exp2(-10) : 8 * std::exp2(-21);
      for (std::size_t i = 0; i < values.size(); ++i) {
        ASSERT_LE(std::abs(again[i] - values[i]),
                  std::abs(values[i]) * relative * 1.000001 + floor * 1.000001);
      }
    }
  }
}

TEST(ReferenceTranspose, OfBlocksIsExact) {
  HostOperands at(17);
  const Matrix values = at.matrix(200, 300, at.uniform(60'000, -3, 3));
  const Matrix from = at.matrix(200, 300, Format::e4m3, Scaling::blocks);
  const Matrix to = at.matrix(300, 200, Format::e4m3, Scaling::blocks);
  reference::run(Quantize{.from = values, .to = from});
  const Transpose t{.from = from, .to = to};
  ASSERT_EQ(why_impossible(t), "");
  reference::run(t);
  const Matrix a = at.matrix(200, 300), b = at.matrix(300, 200);
  reference::run(Dequantize{.from = from, .to = a});
  reference::run(Dequantize{.from = to, .to = b});
  const Floats before = floats_of(a), after = floats_of(b);
  for (std::size_t r = 0; r < 200; ++r) {
    for (std::size_t c = 0; c < 300; ++c) ASSERT_EQ(before[r * 300 + c], after[c * 200 + r]);
  }
}

TEST(ReferenceTranspose, OfRowsQuantisesAlongTheOther) {
  constexpr std::int64_t kRows = 384, kColumns = 160;
  for (const std::int32_t used : {384, 200, 128, 1, 0}) {
    HostOperands at(19);
    const Matrix values = at.matrix(kRows, kColumns, at.uniform(kRows * kColumns, -3, 3));
    Transpose t{.from = at.matrix(kRows, kColumns, Format::e4m3, Scaling::rows),
                .to = at.matrix(kColumns, kRows, Format::e4m3, Scaling::rows)};
    t.used_rows = at.array<std::int32_t>({used});
    reference::run(Quantize{.from = values, .to = t.from, .used_rows = t.used_rows});
    reference::run(t);
    const std::int64_t touched = (used + 127) / 128 * 128;
    Doubles expected(static_cast<std::size_t>(kColumns * touched), 0.0);
    for (std::int64_t r = 0; r < used; ++r) {
      for (std::int64_t c = 0; c < kColumns; ++c) {
        expected[static_cast<std::size_t>(c * touched + r)] =
            double{float_of_e4m3(static_cast<std::uint8_t>(code_of(t.from, r, c)))} *
            double{t.from.scales[c / 128 * t.from.scale_pitch + r]};
      }
    }
    expect_quantised(t.to, expected, kColumns, touched);
    for (std::int64_t c = 0; c < kColumns; ++c) {
      for (std::int64_t r = touched; r < kRows; ++r) ASSERT_EQ(code_of(t.to, c, r), 0xFF);
    }
    for (std::int64_t tile = touched / 128; tile < 3; ++tile) {
      EXPECT_EQ(t.to.scales[tile * t.to.scale_pitch], -7);
    }
  }
}

// ---- positions and copies ----

TEST(ReferenceRope, TurnsPairsAsComplexNumbersAndBack) {
  HostOperands at(23);
  constexpr std::int64_t kRows = 3, kHeads = 2, kHeadDim = 10, kOffset = 3, kDim = 6;
  const Floats values = at.uniform(kRows * kHeads * kHeadDim, -1, 1);
  const std::vector<std::int32_t> positions = {0, 7, 1000};
  Rope rope;
  rope.x = at.matrix(kRows, kHeads * kHeadDim, values);
  rope.heads = kHeads;
  rope.head_dim = kHeadDim;
  rope.offset = kOffset;
  rope.dim = kDim;
  rope.positions = at.array(positions);
  rope.theta = 500;
  ASSERT_EQ(why_impossible(rope), "");
  reference::run(rope);
  Doubles expected = in_double(values);
  for (std::size_t r = 0; r < kRows; ++r) {
    for (std::size_t h = 0; h < kHeads; ++h) {
      for (std::size_t i = 0; i < kDim / 2; ++i) {
        double* pair = expected.data() + (r * kHeads + h) * kHeadDim + kOffset + 2 * i;
        const double turn =
            positions[r] / std::pow(500.0, static_cast<double>(i) / (double{kDim} / 2));
        const auto turned = std::complex<double>(pair[0], pair[1]) * std::polar(1.0, turn);
        pair[0] = turned.real();
        pair[1] = turned.imag();
      }
    }
  }
  expect_near(floats_of(rope.x), expected, 1e-6);
  rope.inverse = true;
  reference::run(rope);
  expect_near(floats_of(rope.x), in_double(values), 1e-6);
}

TEST(ReferenceRope, InverseIsTheGradient) {
  HostOperands at(29);
  const Floats x = at.uniform(8, -1, 1), d_y = at.uniform(8, -1, 1);
  Rope rope{.x = at.matrix(1, 8, x), .head_dim = 8, .dim = 8};
  rope.positions = at.array<std::int32_t>({5});
  reference::run(rope);
  const double of_output = dot(in_double(floats_of(rope.x)), in_double(d_y));
  rope.x = at.matrix(1, 8, d_y);
  rope.inverse = true;
  reference::run(rope);
  EXPECT_NEAR(of_output, dot(in_double(floats_of(rope.x)), in_double(x)), 1e-6);
}

TEST(ReferenceHeadCopy, PicksColumnsOfHeads) {
  HostOperands at;
  Floats values(2 * 12);
  std::iota(values.begin(), values.end(), 0.0F);  // column c of row r is 12 r + c
  HeadCopy copy{.from = at.matrix(2, 12, values), .to = at.matrix(2, 9), .heads = 3, .width = 2};
  copy.from_offset = 1;
  copy.from_stride = 4;
  copy.to_offset = 1;
  copy.to_stride = 3;
  ASSERT_EQ(why_impossible(copy), "");
  reference::run(copy);
  const Floats to = floats_of(copy.to);
  for (std::size_t r = 0; r < 2; ++r) {
    for (std::size_t c = 0; c < 9; ++c) {
      if (c % 3 == 0) {
        EXPECT_TRUE(std::isnan(to[r * 9 + c]));
      } else {
        EXPECT_EQ(to[r * 9 + c], static_cast<float>(12 * r + 4 * (c / 3) + c % 3));
      }
    }
  }
  copy.from_stride = 0;  // the same for every head
  reference::run(copy);
  EXPECT_EQ(floats_of(copy.to)[7], 1);
  EXPECT_EQ(floats_of(copy.to)[17], 14);
  copy.from_stride = 4;
  copy.sum_heads = true;
  copy.to = at.matrix(2, 3);
  reference::run(copy);
  EXPECT_EQ(floats_of(copy.to)[1], 1 + 5 + 9);
  EXPECT_EQ(floats_of(copy.to)[5], 14 + 18 + 22);
}

TEST(ReferenceAdd, InPlaceInFp32) {
  HostOperands at;
  Add add;
  add.terms[1] = at.matrix(1, 2, {1.0F, 2.0F});
  add.terms[2] = at.matrix(1, 2, {256.0F, 0.0F});
  add.terms[3] = at.matrix(1, 2, {1.0F, 4.0F});
  add.out = add.terms[1];
  reference::run(add);
  // Rounded after each addition, 1 + 256 + 1 would be 256 in bf16.
  EXPECT_EQ(floats_of(add.out), (Floats{258, 6}));
  add.terms[1] = at.matrix(1, 2, {1.0F, 2.0F});
  add.out = at.matrix(1, 2, Format::bf16);
  reference::run(add);
  EXPECT_EQ(float_of_bf16(*static_cast<const std::uint16_t*>(add.out.data)), 258);
}

TEST(ReferenceBytes, FillAndLoopback) {
  HostOperands at;
  auto* from = at.array<std::uint8_t>({1, 2, 3, 4, 5});
  auto* to = at.array<std::uint8_t>({9, 9, 9, 9, 9});
  reference::run(Loopback{.from = from, .to = to, .bytes = 4});
  EXPECT_EQ(std::vector<std::uint8_t>(to, to + 5), (std::vector<std::uint8_t>{1, 2, 3, 4, 9}));
  reference::run(Fill{.data = to, .bytes = 2});
  EXPECT_EQ(std::vector<std::uint8_t>(to, to + 5), (std::vector<std::uint8_t>{0, 0, 3, 4, 9}));
}

// ---- edges ----

TEST(ReferenceEmbedding, LooksUpItsRowsAndAddsTheirGradients) {
  HostOperands at;
  Embedding e{.table = at.matrix(3, 2, {10, 11, 20, 21, 30, 31}), .out = at.matrix(5, 2)};
  e.tokens = at.array<std::int32_t>({6, 4, 5, 4, 7});
  e.first_row = 4;
  reference::run(e);
  EXPECT_EQ(floats_of(e.out), (Floats{30, 31, 10, 11, 20, 21, 10, 11, 0, 0}));
  EmbeddingBackward b{.d_out = at.matrix(5, 2, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10})};
  b.d_table = at.matrix(3, 2, {100, 100, 200, 200, 300, 300});
  b.tokens = e.tokens;
  b.first_row = 4;
  reference::run(b);
  EXPECT_EQ(floats_of(b.d_table), (Floats{110, 112, 205, 206, 301, 302}));
}

TEST(ReferenceCrossEntropy, PartsOfTheVocabularyGiveTheLossAndItsDerivative) {
  HostOperands at(31);
  constexpr std::int64_t kRows = 4, kVocabulary = 11, kParts = 3;
  const std::array<std::int64_t, kParts + 1> begin = {0, 4, 5, kVocabulary};
  const Floats logits = at.uniform(kRows * kVocabulary, -5, 5);
  const std::vector<std::int32_t> targets = {10, -1, 4, 0};
  const auto loss = [&](const Doubles& x) {
    double sum = 0;
    for (std::size_t r = 0; r < kRows; ++r) {
      if (targets[r] < 0) continue;
      double of_row = 0;
      for (std::size_t c = 0; c < kVocabulary; ++c) of_row += std::exp(x[r * kVocabulary + c]);
      sum += std::log(of_row) - x[r * kVocabulary + static_cast<std::size_t>(targets[r])];
    }
    return sum;
  };
  auto* partials = at.filled<float>(kParts * kRows * 3);
  auto* of_targets = at.array(targets);
  std::vector<Matrix> parts;
  for (std::size_t p = 0; p < kParts; ++p) {
    const std::int64_t width = begin[p + 1] - begin[p];
    Floats values;
    for (std::int64_t r = 0; r < kRows; ++r) {
      const auto row = logits.begin() + r * kVocabulary;
      values.insert(values.end(), row + begin[p], row + begin[p + 1]);
    }
    parts.push_back(at.matrix(kRows, width, values));
    CrossEntropyPartial partial{.logits = parts.back(), .targets = of_targets};
    partial.first_column = begin[p];
    partial.partial = partials + static_cast<std::int64_t>(p) * kRows * 3;
    ASSERT_EQ(why_impossible(partial), "");
    reference::run(partial);
  }
  CrossEntropyLoss l{.partials = partials, .parts = kParts, .rows = kRows, .targets = of_targets};
  l.lse = at.filled<float>(kRows);
  l.loss = at.array<double>({100.0});
  reference::run(l);
  EXPECT_NEAR(*l.loss, 100 + loss(in_double(logits)), 1e-5);

  constexpr float kScale = 0.25F;
  const Doubles gradient = differences(loss, in_double(logits));
  for (std::size_t p = 0; p < kParts; ++p) {
    CrossEntropyBackward b{.logits = parts[p], .targets = of_targets, .lse = l.lse};
    b.first_column = begin[p];
    b.scale = kScale;
    reference::run(b);
    Doubles expected;
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (std::int64_t c = begin[p]; c < begin[p + 1]; ++c) {
        expected.push_back(kScale * gradient[static_cast<std::size_t>(r * kVocabulary + c)]);
      }
    }
    expect_near(floats_of(parts[p]), expected, 1e-6);
  }
}

// ---- optimizer ----

/// Worked out by hand (a calculator's digits) from the formulas of arXiv 1711.05101, algorithm 2.
struct AdamCase {
  bool decay;
  float max_norm;
  Doubles first, second, master;  ///< after steps 1, 2, 3
};

TEST(ReferenceAdamW, ThreeStepsByHand) {
  const Doubles m = {0.05, 0.02, 0.118}, v = {0.0125, 0.015, 0.06425};
  const Doubles clipped_m = {0.04, 0.011, 0.0499}, clipped_v = {0.008, 0.010725, 0.01818875};
  const std::vector<AdamCase> cases = {
      {true, 0, m, v, {0.2897000002, 0.28672660578738274, 0.2799524299435391}},
      {false, 0, m, v, {0.2900000002, 0.2873163057875827, 0.28082885654952644}},
      {true, 0.4F, clipped_m, clipped_v, {0.28970000025, 0.28766470830745766, 0.2822208686513628}},
      {false, 0.4F, clipped_m, clipped_v, {0.29000000025, 0.28825440830770765, 0.2830982333599203}},
  };
  for (const AdamCase& k : cases) {
    HostOperands at;
    const Floats gradients = {0.5F, -0.25F, 1.0F};
    auto* scalars = at.filled<AdamScalars>(1);
    auto* gradient = at.filled<float>(1);
    auto* square_sum = at.filled<double>(1);
    AdamW adam{.elements = 1, .gradient = gradient};
    adam.master = at.array<float>({0.3F});
    auto* first = at.filled<float>(1);
    auto* second = at.filled<float>(1);
    auto* parameter = at.filled<std::uint16_t>(1);
    adam.first_moment = first;
    adam.second_moment = second;
    adam.parameter = parameter;
    adam.parameters = Format::bf16;
    adam.scalars = scalars;
    adam.square_sum = square_sum;
    adam.decay = k.decay;
    for (std::size_t step = 0; step < 3; ++step) {
      const auto t = static_cast<double>(step + 1);
      *scalars = {.learning_rate = 0.01F,
                  .beta1_power = static_cast<float>(std::pow(0.9, t)),
                  .beta2_power = static_cast<float>(std::pow(0.95, t)),
                  .max_norm = k.max_norm};
      *gradient = gradients[step];
      // In the clipped cases |-0.25| is under the norm of 0.4 and stays.
      *square_sum = double{*gradient} * *gradient;
      ASSERT_EQ(why_impossible(adam), "");
      reference::run(adam);
      EXPECT_NEAR(*first, k.first[step], 1e-7);
      EXPECT_NEAR(*second, k.second[step], 1e-7);
      EXPECT_NEAR(*adam.master, k.master[step], 1e-7);
      EXPECT_EQ(*parameter, bf16_of(*adam.master));
    }
  }
}

TEST(ReferenceAdamW, ClipsByTheNormOfAll) {
  HostOperands at;
  AdamW adam{.elements = 2, .gradient = at.array<float>({3.0F, 4.0F})};
  adam.master = at.array<float>({1.0F, 1.0F});
  auto* first = at.filled<float>(2);
  adam.first_moment = first;
  adam.second_moment = at.filled<float>(2);
  adam.scalars = at.array<AdamScalars>(
      {{.learning_rate = 0.5F, .beta1_power = 0.9F, .beta2_power = 0.95F, .max_norm = 1}});
  adam.square_sum = at.array<double>({25.0});
  adam.decay = false;
  // Without a parameter of another format, the master is the parameter.
  ASSERT_EQ(why_impossible(adam), "");
  reference::run(adam);
  EXPECT_FLOAT_EQ(first[0], 0.06F);
  EXPECT_FLOAT_EQ(first[1], 0.08F);
  // The first step is the learning rate, whatever the gradient's size.
  EXPECT_FLOAT_EQ(adam.master[0], 0.5F);
  EXPECT_FLOAT_EQ(adam.master[1], 0.5F);
}

TEST(ReferenceSquareSum, IsTheFormulaOfTheFirstIntegers) {
  HostOperands at;
  Floats values(1000);
  std::iota(values.begin(), values.end(), 1.0F);
  SquareSum s{.values = at.array(values), .elements = 1000, .out = at.array<double>({5.0})};
  reference::run(s);
  EXPECT_EQ(*s.out, 1000.0 * 1001 * 2001 / 6);
  s.accumulate = true;
  reference::run(s);
  EXPECT_EQ(*s.out, 2 * (1000.0 * 1001 * 2001 / 6));
}

}  // namespace
}  // namespace orrery::kernels
