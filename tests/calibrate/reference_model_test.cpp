// The reference is held to finite differences, and to results that can be worked out by hand.

#include "tests/calibrate/reference_model.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "calibrate/initial_parameters.hpp"
#include "sim/random.hpp"
#include "tests/models/models_for_tests.hpp"

namespace orrery::reference {
namespace {

Model model_of(const std::string& yaml) {
  const Reading reading =
      orrery::read_text("name: small\nsource: a test\nmax_positions: 64\n" + yaml);
  EXPECT_EQ(format_problems(reading.problems), "");
  return reading.model;
}

/// V3 in small: dense and MoE layers, groups by two best biased scores, two MTP modules.
Model deepseek() {
  return model_of(R"(
hidden: 10
vocabulary: 11
layers: 2
mtp_modules: 2
attention: {heads: 2, mla: {q_lora_rank: 6, kv_lora_rank: 5, qk_nope_head_dim: 3,
                            qk_rope_head_dim: 4, v_head_dim: 2}}
feed_forward: {activation: swiglu, intermediate: 7}
moe: {dense_layers: 1, routed_experts: 9, top_k: 2, expert_intermediate: 4, shared_experts: 1,
      groups: 3, group_limit: 2, scores: sigmoid, router_bias: true}
)");
}

/// V2-Lite in small: queries without a latent, softmax, no shared experts; groups by best score.
Model deepseek_lite() {
  return model_of(R"(
hidden: 8
vocabulary: 9
layers: 2
attention: {heads: 3, mla: {q_lora_rank: 0, kv_lora_rank: 5, qk_nope_head_dim: 2,
                            qk_rope_head_dim: 2, v_head_dim: 4}}
feed_forward: {activation: swiglu, intermediate: 6}
moe: {dense_layers: 1, routed_experts: 6, top_k: 3, expert_intermediate: 4, groups: 3,
      group_limit: 2}
)");
}

/// Llama in small, with a tied head.
Model llama() {
  return model_of(R"(
hidden: 8
vocabulary: 9
layers: 2
tied_embeddings: true
attention: {heads: 4, kv_heads: 2, head_dim: 6}
feed_forward: {activation: swiglu, intermediate: 5}
)");
}

/// Qwen3's MoE in small, with MTP on top of a tied head.
Model qwen() {
  return model_of(R"(
hidden: 8
vocabulary: 9
layers: 2
tied_embeddings: true
mtp_modules: 1
attention: {heads: 4, kv_heads: 1, head_dim: 4, qk_norm: true}
feed_forward: {activation: swiglu}
moe: {routed_experts: 5, top_k: 2, expert_intermediate: 4}
)");
}

/// Large enough that no part of the model is nearly linear; gains and biases are no constants.
Tensors random_parameters(const Model& model, std::uint64_t seed) {
  Tensors parameters;
  for (const Parameter& p : parameters_of(model)) {
    Random random = Random::of({seed, parameters.size()});
    std::vector<double>& values = parameters[p.name];
    for (std::int64_t i = 0; i < p.elements(); ++i) {
      const double z = random.normal();
      values.push_back(p.kind == ParameterKind::matrix ? 0.5 * z
                       : p.kind == ParameterKind::gain ? 1 + 0.3 * z
                                                       : 0.2 * z);
    }
  }
  return parameters;
}

std::vector<Sequence> random_batch(const Model& model, std::int64_t sequences, std::int64_t length,
                                   std::uint64_t seed) {
  Random random(seed);
  std::vector<Sequence> batch(static_cast<std::size_t>(sequences));
  for (Sequence& tokens : batch) {
    for (std::int64_t i = 0; i < length + 1 + model.mtp_modules; ++i) {
      tokens.push_back(
          static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(model.vocabulary))));
    }
  }
  return batch;
}

// ---------------------------------------------------------------------------------------------------
// Finite differences

struct Small {
  const char* name;
  Model (*make)();
};
constexpr Small kAllSmall[] = {
    {"DeepSeek", deepseek}, {"DeepSeekLite", deepseek_lite}, {"Llama", llama}, {"QwenMoe", qwen}};

class Gradients : public testing::TestWithParam<Small> {
 protected:
  const Model model_ = GetParam().make();
  const Options options_ = {.rope_theta = 100, .routed_scale = 1.5, .mtp_weight = 0.4};
  const Tensors parameters_ = random_parameters(model_, 5);
  const std::vector<Sequence> batch_ = random_batch(model_, 2, 6, 3);
  const Evaluation all_ = differentiate(model_, options_, parameters_, batch_);

  /// Along `direction` of one parameter, with an error of the fourth order in the step.
  double slope(const std::string& name, const std::vector<double>& direction) const {
    const double h = 1e-4;
    const auto loss_at = [&](double distance) {
      Tensors moved = parameters_;
      for (std::size_t i = 0; i < direction.size(); ++i) {
        moved[name][i] += distance * direction[i];
      }
      const Evaluation result = evaluate(model_, options_, moved, batch_);
      EXPECT_EQ(result.experts, all_.experts) << "the loss is not smooth here";
      return result.loss;
    };
    return (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h);
  }
};

TEST_P(Gradients, OfEveryParameterAreSlopesOfTheLoss) {
  std::size_t trained = 0;
  for (const Parameter& p : parameters_of(model_)) {
    if (p.kind == ParameterKind::selection_bias) continue;
    ++trained;
    ASSERT_TRUE(all_.gradients.contains(p.name)) << p.name;
    const std::vector<double>& gradient = all_.gradients.at(p.name);
    ASSERT_EQ(static_cast<std::int64_t>(gradient.size()), p.elements()) << p.name;
    Random random = Random::of({17, trained});
    // All elements at once, by random signs.
    std::vector<double> signs(gradient.size());
    double expected = 0;
    for (std::size_t i = 0; i < signs.size(); ++i) {
      signs[i] = random.below(2) == 0 ? 1 : -1;
      expected += signs[i] * gradient[i];
    }
    EXPECT_NEAR(slope(p.name, signs), expected, 1e-6 * std::abs(expected) + 1e-10) << p.name;
    // And a few of those above the middle one by themselves.
    std::vector<double> sizes;
    for (const double g : gradient) sizes.push_back(std::abs(g));
    std::sort(sizes.begin(), sizes.end());
    ASSERT_GT(sizes.back(), 1e-4) << p.name;
    const double middle = std::max(sizes[sizes.size() / 2], sizes.back() / 100);
    for (int tried = 0; tried < 3;) {
      const std::size_t i = random.below(gradient.size());
      if (std::abs(gradient[i]) < middle) continue;
      std::vector<double> alone(gradient.size());
      alone[i] = 1;
      EXPECT_NEAR(slope(p.name, alone) / gradient[i], 1, 1e-6) << p.name << " " << i;
      ++tried;
    }
  }
  EXPECT_EQ(all_.gradients.size(), trained);
}

INSTANTIATE_TEST_SUITE_P(All, Gradients, testing::ValuesIn(kAllSmall),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(Reference, ABatchIsTheMeanOfItsSequences) {
  const Model model = deepseek();
  const Tensors parameters = random_parameters(model, 6);
  const std::vector<Sequence> batch = random_batch(model, 3, 5, 4);
  const Evaluation all = differentiate(model, {}, parameters, batch);
  double loss = 0;
  double gradient = 0;
  for (const Sequence& tokens : batch) {
    const Evaluation one = differentiate(model, {}, parameters, std::span(&tokens, 1));
    loss += one.loss / 3;
    gradient += one.gradients.at("layers.0.q_a")[7] / 3;
  }
  EXPECT_NEAR(all.loss, loss, 1e-13);
  EXPECT_NEAR(all.gradients.at("layers.0.q_a")[7], gradient, 1e-13);
  EXPECT_EQ(all.token_losses.size(), 15U);
  EXPECT_EQ(all.experts.at(1).size(), 30U);
  EXPECT_EQ(evaluate(model, {}, parameters, batch).loss, all.loss);
}

// ---------------------------------------------------------------------------------------------------
// Closed forms

TEST(Reference, WithoutWeightsEveryTokenIsAsLikely) {
  for (const Small& small : kAllSmall) {
    const Model model = small.make();
    Tensors parameters = random_parameters(model, 1);
    for (const Parameter& p : parameters_of(model)) {
      if (p.kind == ParameterKind::matrix) {
        std::fill(parameters[p.name].begin(), parameters[p.name].end(), 0);
      }
    }
    const Evaluation result = evaluate(model, {}, parameters, random_batch(model, 2, 4, 2));
    const double log_v = std::log(static_cast<double>(model.vocabulary));
    EXPECT_NEAR(result.next_token_loss, log_v, 1e-14);
    for (const double loss : result.mtp_losses) EXPECT_NEAR(loss, log_v, 1e-14);
    EXPECT_NEAR(result.loss, model.mtp_modules > 0 ? 1.3 * log_v : log_v, 1e-14);
  }
}

TEST(Reference, LaterTokensDoNotChangeEarlierLosses) {
  for (const Small& small : kAllSmall) {
    const Model model = small.make();
    const Tensors parameters = random_parameters(model, 2);
    std::vector<Sequence> batch = random_batch(model, 1, 8, 9);
    const std::vector<double> before = evaluate(model, {}, parameters, batch).token_losses;
    batch[0][5] = (batch[0][5] + 1) % static_cast<std::int32_t>(model.vocabulary);
    const std::vector<double> after = evaluate(model, {}, parameters, batch).token_losses;
    for (std::size_t i = 0; i < 8; ++i) {
      // Token 5 is what position 4 predicts, and what positions from 5 on see.
      EXPECT_EQ(before[i] == after[i], i < 4) << i;
    }
  }
}

/// Tensors of `model`, all zero but the gains, which are 1.
Tensors blank(const Model& model) {
  Tensors parameters;
  for (const Parameter& p : parameters_of(model)) {
    parameters[p.name].assign(static_cast<std::size_t>(p.elements()),
                              p.kind == ParameterKind::gain ? 1 : 0);
  }
  return parameters;
}

/// value on the diagonal of a matrix that is `columns` wide, from (row, column) on.
void set_diagonal(std::vector<double>& matrix, std::int64_t columns, std::int64_t row,
                  std::int64_t column, std::int64_t count, double value) {
  for (std::int64_t i = 0; i < count; ++i) {
    matrix.at(static_cast<std::size_t>((row + i) * columns + column + i)) = value;
  }
}

double log_sum_exp(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += std::exp(v);
  return std::log(sum);
}

/// What position i of one attention head attends to, where token t is the t-th unit vector times
/// `query` and `key`, worked out with angles: units 2p and 2p + 1 turn by theta^(-2p / dim) a
/// position.
std::vector<double> shares_of(const Sequence& tokens, std::int64_t i, double dim, double theta,
                              double query_times_key) {
  std::vector<double> shares;
  double sum = 0;
  for (std::int64_t j = 0; j <= i; ++j) {
    const std::int32_t a = tokens[static_cast<std::size_t>(i)];
    const std::int32_t b = tokens[static_cast<std::size_t>(j)];
    double alike = 0;
    if (a / 2 == b / 2) {
      // Angle from key to query: positions apart, and a quarter turn between the pair's units.
      const double apart = static_cast<double>(i - j) * std::pow(theta, -2.0 * (a / 2) / dim);
      alike = std::cos(apart + (a - b) * std::acos(0.0));
    }
    shares.push_back(std::exp(query_times_key * alike / std::sqrt(dim)));
    sum += shares.back();
  }
  for (double& share : shares) share /= sum;
  return shares;
}

/// One layer of attention over unit vectors, whose loss follows from shares_of.
TEST(Reference, AttentionTurnsPairsOfColumnsByPosition) {
  const Model model = model_of(R"(
hidden: 4
vocabulary: 4
layers: 1
attention: {heads: 1, kv_heads: 1, head_dim: 4}
feed_forward: {activation: swiglu, intermediate: 1}
)");
  const Options options = {.rope_theta = 7, .epsilon = 0};
  Tensors w = blank(model);
  set_diagonal(w["embedding"], 4, 0, 0, 4, 1);
  set_diagonal(w["head"], 4, 0, 0, 4, 1);
  set_diagonal(w["layers.0.o"], 4, 0, 0, 4, 1);
  w["layers.0.attention_norm"].assign(4, 0.5);  // a unit vector's root mean square
  set_diagonal(w["layers.0.qkv"], 4, 0, 0, 4, 2);
  set_diagonal(w["layers.0.qkv"], 4, 4, 0, 4, 3);
  set_diagonal(w["layers.0.qkv"], 4, 8, 0, 4, 5);
  const Sequence tokens = {0, 1, 3, 0, 2, 2, 1, 0, 3};
  const Evaluation result = evaluate(model, options, w, std::span(&tokens, 1));
  for (std::int64_t i = 0; i < 8; ++i) {
    std::vector<double> x(4);
    x[static_cast<std::size_t>(tokens[static_cast<std::size_t>(i)])] = 1;
    const std::vector<double> shares = shares_of(tokens, i, 4, 7, 2 * 3);
    for (std::size_t j = 0; j < shares.size(); ++j) {
      x[static_cast<std::size_t>(tokens[j])] += 5 * shares[j];
    }
    const double rms = std::sqrt((x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]) / 4);
    for (double& value : x) value /= rms;
    const auto target = static_cast<std::size_t>(tokens[static_cast<std::size_t>(i + 1)]);
    EXPECT_NEAR(result.token_losses[static_cast<std::size_t>(i)], log_sum_exp(x) - x[target], 1e-13)
        << i;
  }
}

/// On unit vectors the norm of a latent is a constant factor, so latent attention is grouped-query
/// attention over the same columns: of each head, those without position behind those with.
TEST(Reference, LatentAttentionIsGroupedQueryAttentionOfTheSameMatrices) {
  const Model latent = model_of(R"(
hidden: 6
vocabulary: 6
layers: 1
attention: {heads: 2, mla: {q_lora_rank: 6, kv_lora_rank: 6, qk_nope_head_dim: 2,
                            qk_rope_head_dim: 2, v_head_dim: 4}}
feed_forward: {activation: swiglu, intermediate: 5}
)");
  const Model grouped = model_of(R"(
hidden: 6
vocabulary: 6
layers: 1
attention: {heads: 2, kv_heads: 2, head_dim: 4}
feed_forward: {activation: swiglu, intermediate: 5}
)");
  // Turns the first pair by a radian a position, and the second not at all.
  const Options options = {.rope_theta = 1e60, .epsilon = 0};
  Tensors a = random_parameters(latent, 8);
  for (const char* name : {"embedding", "layers.0.q_a", "layers.0.kv_a"}) {
    std::fill(a[name].begin(), a[name].end(), 0);
    set_diagonal(a[name], 6, 0, 0, 6, 1);
  }
  a["layers.0.attention_norm"].assign(6, 1);
  a["layers.0.q_norm"].assign(6, 1);
  a["layers.0.kv_norm"].assign(6, 1);
  Random random(4);
  for (std::size_t i = 36; i < 48; ++i) a["layers.0.kv_a"][i] = random.normal();  // rotary key

  Tensors b;
  for (const Parameter& p : parameters_of(grouped)) {
    if (p.name != "layers.0.qkv") b[p.name] = a.at(p.name);
  }
  std::vector<double>& qkv = b["layers.0.qkv"];
  const auto append = [&](const std::string& name, std::int64_t row, std::int64_t rows) {
    const std::vector<double>& from = a.at(name);
    qkv.insert(qkv.end(), from.begin() + row * 6, from.begin() + (row + rows) * 6);
  };
  for (const std::int64_t head : {0, 1}) {
    append("layers.0.q_b", head * 4 + 2, 2);  // rope
    append("layers.0.q_b", head * 4, 2);      // nope
  }
  for (const std::int64_t head : {0, 1}) {
    append("layers.0.kv_a", 6, 2);
    append("layers.0.kv_b", head * 6, 2);
  }
  for (const std::int64_t head : {0, 1}) append("layers.0.kv_b", head * 6 + 2, 4);

  const std::vector<Sequence> batch = random_batch(latent, 2, 9, 5);
  const Evaluation one = evaluate(latent, options, a, batch);
  const Evaluation two = evaluate(grouped, options, b, batch);
  for (std::size_t i = 0; i < 18; ++i) {
    EXPECT_NEAR(one.token_losses[i], two.token_losses[i], 1e-12) << i;
  }
}

/// Experts that are all the same are one feed-forward network, whoever is chosen, as weights add up
/// to the routed scale; shared and routed ones of half the width are two halves of a dense one.
TEST(Reference, EqualExpertsAreADenseLayer) {
  const std::string both = R"(
hidden: 6
vocabulary: 7
layers: 1
attention: {heads: 2, kv_heads: 2, head_dim: 2}
)";
  const Model dense = model_of(both + "feed_forward: {activation: swiglu, intermediate: 8}\n");
  for (const std::string scores : {"sigmoid", "softmax"}) {
    const Model experts = model_of(both + "feed_forward: {activation: swiglu}\n" +
                                   "moe: {routed_experts: 5, top_k: 3, expert_intermediate: 4, " +
                                   "shared_experts: 1, scores: " + scores + "}\n");
    Tensors a = random_parameters(experts, 3);
    Tensors b = random_parameters(dense, 3);
    for (auto& [name, values] : b) {
      if (a.contains(name)) values = a.at(name);
    }
    const std::vector<double>& up = b.at("layers.0.ffn_up");      // (16, 6): 8 gates, 8 ups
    const std::vector<double>& down = b.at("layers.0.ffn_down");  // (6, 8)
    const auto half = [&](std::size_t first, double scale) {
      std::pair<std::vector<double>, std::vector<double>> ffn;
      for (const std::size_t from : {first, first + 8}) {
        ffn.first.insert(ffn.first.end(), up.begin() + static_cast<std::ptrdiff_t>(from * 6),
                         up.begin() + static_cast<std::ptrdiff_t>((from + 4) * 6));
      }
      for (std::size_t row = 0; row < 6; ++row) {
        for (std::size_t c = 0; c < 4; ++c) ffn.second.push_back(scale * down[row * 8 + first + c]);
      }
      return ffn;
    };
    std::tie(a["layers.0.shared_up"], a["layers.0.shared_down"]) = half(0, 1);
    const auto [routed_up, routed_down] = half(4, 1 / 2.5);
    a["layers.0.routed_up"].clear();
    a["layers.0.routed_down"].clear();
    for (int e = 0; e < 5; ++e) {
      std::copy(routed_up.begin(), routed_up.end(), std::back_inserter(a["layers.0.routed_up"]));
      std::copy(routed_down.begin(), routed_down.end(),
                std::back_inserter(a["layers.0.routed_down"]));
    }
    const std::vector<Sequence> batch = random_batch(dense, 2, 6, 5);
    const Evaluation one = evaluate(experts, {.routed_scale = 2.5}, a, batch);
    const Evaluation two = evaluate(dense, {}, b, batch);
    for (std::size_t i = 0; i < 12; ++i) {
      EXPECT_NEAR(one.token_losses[i], two.token_losses[i], 1e-12) << scores << " " << i;
    }
  }
}

/// The experts that a token with these logits chooses. Only the first token of the batch counts.
std::vector<std::int32_t> chosen(const std::string& router, const std::vector<double>& logits,
                                 const std::vector<double>& bias = {}) {
  const Model model = model_of(
      "hidden: 1\nvocabulary: 2\nlayers: 1\nattention: {heads: 1, kv_heads: 1, head_dim: 2}\n"
      "feed_forward: {activation: swiglu}\nmoe: {expert_intermediate: 1, " +
      router + "}\n");
  Tensors w = blank(model);
  w["embedding"].assign(2, 1);
  w["layers.0.gate"] = logits;  // the normed input is 1
  if (!bias.empty()) w["layers.0.router_bias"] = bias;
  const Sequence tokens = {0, 1};
  return evaluate(model, {.epsilon = 0}, w, std::span(&tokens, 1)).experts.at(0);
}

TEST(Reference, RouterChoosesWithinTheBestGroups) {
  using Chosen = std::vector<std::int32_t>;
  EXPECT_EQ(chosen("routed_experts: 4, top_k: 2", {1, 3, 2, 0}), Chosen({1, 2}));
  EXPECT_EQ(chosen("routed_experts: 4, top_k: 3", {1, 2, 1, 1}), Chosen({1, 0, 2}));  // ties
  // Group 0 has the best expert, group 1 the best pair.
  const std::vector<double> logits = {3, -5, 2, 1.5, 0, 0};
  EXPECT_EQ(chosen("routed_experts: 6, top_k: 2, groups: 3, group_limit: 1", logits),
            Chosen({0, 1}));
  EXPECT_EQ(chosen("routed_experts: 6, top_k: 2, groups: 3, group_limit: 1, scores: sigmoid, "
                   "router_bias: true",
                   logits, {0, 0, 0, 0, 0, 0}),
            Chosen({2, 3}));
  // sigmoid(0) + 1 is above sigmoid(2); in a group of its own 5 then comes before 4.
  EXPECT_EQ(chosen("routed_experts: 6, top_k: 2, groups: 3, group_limit: 1, scores: sigmoid, "
                   "router_bias: true",
                   logits, {0, 0, 0, 0, 0.5, 1}),
            Chosen({5, 4}));
  EXPECT_EQ(chosen("routed_experts: 6, top_k: 2, groups: 3, group_limit: 2, scores: sigmoid, "
                   "router_bias: true",
                   logits, {0, 0, 0, 0, 0, 1}),
            Chosen({5, 2}));
}

/// A bias chooses, but does not weigh: by hand for one token and two experts.
TEST(Reference, BiasesAreNotInTheWeights) {
  const Model model = model_of(R"(
hidden: 1
vocabulary: 2
layers: 1
attention: {heads: 1, kv_heads: 1, head_dim: 2}
feed_forward: {activation: swiglu}
moe: {routed_experts: 3, top_k: 2, expert_intermediate: 1, scores: sigmoid, router_bias: true}
)");
  Tensors w = blank(model);
  w["embedding"] = {1, 1};
  w["head"] = {0, 1};
  w["layers.0.gate"] = {0.5, 2, -1};
  w["layers.0.router_bias"] = {0, -1, 3};  // experts 2 and 0
  w["layers.0.routed_up"] = {1, 1, 1, 1, 1, 1};
  w["layers.0.routed_down"] = {-2, 100, -4};
  const Sequence tokens = {0, 1};
  const double epsilon = 0.25;
  const Evaluation result = evaluate(model, {.epsilon = epsilon}, w, std::span(&tokens, 1));
  EXPECT_EQ(result.experts.at(0), std::vector<std::int32_t>({2, 0}));
  const double n = 1 / std::sqrt(1 + epsilon);
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const double s0 = sigmoid(0.5 * n);
  const double s2 = sigmoid(-n);
  const double x = 1 + (-2 * s0 - 4 * s2) / (s0 + s2) * (n * sigmoid(n) * n);
  const double logit = x / std::sqrt(x * x + epsilon);
  EXPECT_NEAR(result.loss, std::log(1 + std::exp(logit)) - logit, 1e-14);
}

/// MTP modules whose blocks do nothing and that see only the embedding of a later token: module k
/// predicts token i + k + 1 from token i + k.
TEST(Reference, MtpModulesSeeAndPredictTokensFurtherOn) {
  const Model model = model_of(R"(
hidden: 5
vocabulary: 5
layers: 1
mtp_modules: 2
attention: {heads: 1, kv_heads: 1, head_dim: 2}
feed_forward: {activation: swiglu, intermediate: 1}
)");
  Tensors w = blank(model);
  set_diagonal(w["embedding"], 5, 0, 0, 5, 1);
  Random random(2);
  for (double& value : w["head"]) value = random.normal();
  for (const char* module : {"mtp.0.projection", "mtp.1.projection"}) {
    set_diagonal(w[module], 10, 0, 5, 5, 3);  // columns 5 to 9 are the embedding
  }
  const Sequence tokens = {4, 2, 0, 3, 3, 1, 2};
  const Evaluation result =
      evaluate(model, {.epsilon = 0, .mtp_weight = 0.5}, w, std::span(&tokens, 1));
  // All norms leave a unit vector times sqrt(5).
  const auto loss = [&](std::size_t seen) {
    std::vector<double> logits;
    for (std::size_t v = 0; v < 5; ++v) {
      logits.push_back(std::sqrt(5.0) * w["head"][v * 5 + static_cast<std::size_t>(tokens[seen])]);
    }
    return log_sum_exp(logits) - logits[static_cast<std::size_t>(tokens[seen + 1])];
  };
  EXPECT_NEAR(result.next_token_loss, (loss(0) + loss(1) + loss(2) + loss(3)) / 4, 1e-14);
  EXPECT_NEAR(result.mtp_losses[0], (loss(1) + loss(2) + loss(3) + loss(4)) / 4, 1e-14);
  EXPECT_NEAR(result.mtp_losses[1], (loss(2) + loss(3) + loss(4) + loss(5)) / 4, 1e-14);
  EXPECT_NEAR(result.loss,
              result.next_token_loss + 0.25 * (result.mtp_losses[0] + result.mtp_losses[1]), 1e-14);

  // And of the hidden state alone, which is that before the model's final norm, so all predict from
  // token i.
  for (double& gain : w["final_norm"]) gain = random.normal();
  for (const char* module : {"mtp.0.projection", "mtp.1.projection"}) {
    std::fill(w[module].begin(), w[module].end(), 0);
    set_diagonal(w[module], 10, 0, 0, 5, 3);
  }
  const Evaluation hidden = evaluate(model, {.epsilon = 0}, w, std::span(&tokens, 1));
  double expected = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    std::vector<double> logits;
    for (std::size_t v = 0; v < 5; ++v) {
      logits.push_back(std::sqrt(5.0) * w["head"][v * 5 + static_cast<std::size_t>(tokens[i])]);
    }
    expected += (log_sum_exp(logits) - logits[static_cast<std::size_t>(tokens[i + 3])]) / 4;
  }
  EXPECT_NEAR(hidden.mtp_losses[1], expected, 1e-14);
}

// ---------------------------------------------------------------------------------------------------
// AdamW

TEST(ReferenceAdam, FirstStepIsTheLearningRateWhateverTheGradient) {
  Tensors parameters = {{"o", {1.0, 2.0}}, {"ffn_norm", {1.0}}};
  AdamState state;
  const double norm = adam_step({.learning_rate = 0.01, .epsilon = 0, .weight_decay = 0.5},
                                {{"o", {1e-3, -50.0}}, {"ffn_norm", {4.0}}}, parameters, state);
  EXPECT_DOUBLE_EQ(norm, std::sqrt(1e-6 + 2500 + 16));
  EXPECT_DOUBLE_EQ(parameters["o"][0], 1 - 0.01 * (1 + 0.5 * 1));
  EXPECT_DOUBLE_EQ(parameters["o"][1], 2 - 0.01 * (-1 + 0.5 * 2));
  EXPECT_DOUBLE_EQ(parameters["ffn_norm"][0], 1 - 0.01);  // no decay
}

/// Constant gradients: corrected moments stay g and g^2, so every step is the same.
TEST(ReferenceAdam, ClipsAllGradientsTogether) {
  Tensors parameters = {{"o", {0.0}}, {"qkv", {0.0}}};
  const Tensors gradients = {{"o", {3.0}}, {"qkv", {-4.0}}};  // norm 5
  AdamState state;
  const AdamOptions options = {
      .learning_rate = 1, .epsilon = 0.5, .weight_decay = 0, .max_norm = 1};
  for (int step = 1; step <= 5; ++step) {
    EXPECT_DOUBLE_EQ(adam_step(options, gradients, parameters, state), 5);
    EXPECT_NEAR(parameters["o"][0], -step * 0.6 / (0.6 + 0.5), 1e-13);
    EXPECT_NEAR(parameters["qkv"][0], step * 0.8 / (0.8 + 0.5), 1e-13);
  }
  EXPECT_EQ(state.steps, 5);
}

TEST(ReferenceAdam, MomentsForgetAtTheirRates) {
  Tensors parameters = {{"o", {0.0}}};
  AdamState state;
  const AdamOptions options = {.learning_rate = 1, .epsilon = 0, .weight_decay = 0};
  adam_step(options, {{"o", {1.0}}}, parameters, state);
  const double after_one = parameters["o"][0];
  adam_step(options, {{"o", {-2.0}}}, parameters, state);
  // m = 0.9 * 0.1 * 1 + 0.1 * -2, over 1 - 0.81; v = 0.95 * 0.05 * 1 + 0.05 * 4, over 1 - 0.9025.
  const double m = (0.09 - 0.2) / 0.19;
  const double v = (0.0475 + 0.2) / 0.0975;
  EXPECT_NEAR(parameters["o"][0], after_one - m / std::sqrt(v), 1e-14);
}

/// A repeated pattern is learned, by all parts together.
TEST(ReferenceAdam, TrainsASmallModel) {
  const Model model = deepseek();
  Tensors parameters;
  for (const Parameter& p : parameters_of(model)) {
    const std::vector<float> values = initial_values({.seed = 1, .deviation = 0.1}, p);
    parameters[p.name].assign(values.begin(), values.end());
  }
  Sequence tokens;
  for (int i = 0; i < 15; ++i) tokens.push_back((i * i) % 11);
  AdamState state;
  const AdamOptions options = {.learning_rate = 0.02, .max_norm = 1};
  const double before = evaluate(model, {}, parameters, std::span(&tokens, 1)).loss;
  EXPECT_NEAR(before, 1.3 * std::log(11.0), 0.3);
  for (int step = 0; step < 60; ++step) {
    const Evaluation result = differentiate(model, {}, parameters, std::span(&tokens, 1));
    adam_step(options, result.gradients, parameters, state);
  }
  EXPECT_LT(evaluate(model, {}, parameters, std::span(&tokens, 1)).loss, 0.1 * before);
}

}  // namespace
}  // namespace orrery::reference
