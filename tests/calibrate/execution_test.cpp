// Training small models for real. Losses and gradients are compared with a model of doubles written
// for the purpose (reference_model.hpp), and between layouts: however ranks share the work, the
// gradients are the same.

#include "calibrate/execute/execution.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "calibrate/initial_parameters.hpp"
#include "models/step.hpp"
#include "sim/one_rank.hpp"
#include "tests/calibrate/reference_model.hpp"
#include "tests/calibrate/small_training.hpp"

namespace orrery {
namespace {

const char* const kOneRank = R"(
  layout: {pp: 1, dp: 1, ep: 1, zero: 1}
  schedule: 1f1b
  sequence_length: 16
  micro_batch: 1
  global_batch: 8
  precision: fp32
)";

double worst_difference(const Trained& a, const Trained& b) {
  double worst = 0;
  for (const auto& [name, values] : a.gradients) {
    const auto other = b.gradients.find(name);
    if (other == b.gradients.end() || other->second.size() != values.size()) {
      ADD_FAILURE() << name;
      continue;
    }
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      difference += std::pow(values[i] - other->second[i], 2);
      norm += std::pow(values[i], 2);
    }
    const double relative = norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
    if (relative > 1e-4) ADD_FAILURE() << name << " " << relative << " norm " << std::sqrt(norm);
    worst = std::max(worst, relative);
  }
  return worst;
}

TEST(Execution, Runs) {
  for (const char* model : {kTinyLlama, kTinyQwenMoe, kTinyDeepSeek}) {
    const Scenario scenario = small_scenario(model, kOneRank);
    for (const std::string& why : why_not_executable(scenario)) ADD_FAILURE() << why;
    const Trained t = train_in_threads(scenario, 3);
    std::printf("%s loss %f %f %f mtp %f norm %f waits %ld\n", scenario.model.name.c_str(),
                t.losses[0], t.losses[1], t.losses[2], t.mtp_losses[0], t.gradient_norms[0],
                t.reuse_waits);
    EXPECT_NEAR(t.losses[0], std::log(64), 0.1);
  }
}

const char* const kBlockModel = R"(
  name: small DeepSeek with blocks of 128
  source: made up
  hidden: 128
  vocabulary: 64
  layers: 2
  max_positions: 128
  attention:
    heads: 4
    mla: {q_lora_rank: 128, kv_lora_rank: 128, qk_nope_head_dim: 32, qk_rope_head_dim: 16, v_head_dim: 32}
  feed_forward: {activation: swiglu, intermediate: 256}
  moe:
    dense_layers: 1
    routed_experts: 4
    top_k: 2
    groups: 2
    group_limit: 1
    expert_intermediate: 128
    shared_experts: 1
    scores: sigmoid
    router_bias: true
  mtp_modules: 1
)";

TEST(Execution, Fp8) {
  for (const char* layout : {"layout: {dp: 1}", "layout: {dp: 2, ep: 2}", "layout: {pp: 2, dp: 1}"})
    for (const char* precision :
         {"fp32", "bf16", "fp8_deepseek",
          "fp8_deepseek\n  recompute: [norms, mla_up_projection, activation]",
          "fp8_deepseek\n  recompute: full", "bf16\n  recompute: [norms]"}) {
      const Scenario scenario = small_scenario(kBlockModel, std::string(R"(
  schedule: )") + (layout[9] == 'p' ? "dual_pipe" : "1f1b") + R"(
  sequence_length: 128
  micro_batch: 1
  global_batch: 4
  )" + layout + "\n  precision: " + precision + "\n");
      for (const std::string& why : why_not_executable(scenario)) ADD_FAILURE() << why;
      const Trained t = train_in_threads(scenario, 3);
      std::printf("%s %s loss %f %f %f mtp %f norm %f waits %ld\n", layout, precision, t.losses[0],
                  t.losses[1], t.losses[2], t.mtp_losses[0], t.gradient_norms[0], t.reuse_waits);
    }
}

TEST(Execution, OfARankAlone) {
  for (const char* precision : {"fp32", "bf16", "fp8_deepseek"}) {
    const Scenario scenario = small_scenario(kBlockModel, std::string(R"(
  layout: {pp: 2, dp: 4, ep: 4}
  schedule: dual_pipe
  sequence_length: 128
  micro_batch: 1
  global_batch: 16
  precision: )") + precision + "\n");
    const Program all = build_step(scenario, {});
    const Program program = one_rank_of(all, RankId(1));
    const auto device = kernels::open_cpu_device(1);
    Execution execution(scenario, program, RankId(4), *device);
    const Tokens tokens = [&](std::int64_t step, std::int64_t sequence) {
      return random_tokens(step, sequence, 130, 64);
    };
    const RankStep step = execution.step(0, tokens);
    EXPECT_EQ(step.times.size(), program.size());
    EXPECT_TRUE(std::isfinite(step.loss_sum) && std::isfinite(step.gradient_norm));
    std::printf("alone loss %f norm %f waits %ld\n", step.loss_sum / (16 * 128), step.gradient_norm,
                execution.lowered().reuse_waits);
  }
}

/// The batch of a step and the parameters before the first one, for the reference.
std::vector<reference::Sequence> batch_of(const Scenario& scenario, std::int64_t step) {
  std::vector<reference::Sequence> batch;
  for (std::int64_t s = 0; s < scenario.plan.global_batch_sequences; ++s) {
    batch.push_back(random_tokens(step, s,
                                  scenario.plan.sequence_length + 1 + scenario.model.mtp_modules,
                                  scenario.model.vocabulary));
  }
  return batch;
}

reference::Tensors parameters_before(const Scenario& scenario) {
  reference::Tensors tensors;
  for (const Parameter& p : parameters_of(scenario.model)) {
    const std::vector<float> values =
        initial_values({scenario.seed, scenario.training.initial_deviation}, p);
    tensors[p.name] = {values.begin(), values.end()};
  }
  return tensors;
}

class AgainstReference : public testing::TestWithParam<const char*> {};

// FP32 against doubles: the loss to 1e-6, gradients to 1e-4 of their norm, and the losses of the
// steps after, which AdamW's update goes into.
TEST_P(AgainstReference, HasItsLossesAndGradients) {
  const Scenario scenario = small_scenario(GetParam(), kOneRank);
  const reference::Options options{.mtp_weight = scenario.training.mtp_weight};
  reference::Tensors parameters = parameters_before(scenario);
  const Trained t = train_in_threads(scenario, 0);
  const Trained steps = train_in_threads(scenario, 4);
  reference::AdamState state;
  for (int s = 0; s < 4; ++s) {
    const reference::Evaluation want =
        reference::differentiate(scenario.model, options, parameters, batch_of(scenario, s));
    if (s == 0) {
      EXPECT_NEAR(t.losses[0], want.next_token_loss, 1e-6 * want.next_token_loss);
      std::size_t compared = 0;
      for (const auto& [name, gradient] : want.gradients) {
        const auto got = t.gradients.find(name);
        ASSERT_NE(got, t.gradients.end()) << name;
        ASSERT_EQ(got->second.size(), gradient.size()) << name;
        double difference = 0, norm = 0;
        for (std::size_t i = 0; i < gradient.size(); ++i) {
          difference += std::pow(gradient[i] - got->second[i], 2);
          norm += std::pow(gradient[i], 2);
        }
        EXPECT_GT(norm, 0) << name;
        EXPECT_LT(std::sqrt(difference / norm), 1e-4) << name << " " << std::sqrt(norm);
        ++compared;
      }
      EXPECT_GT(compared, 10u);
    }
    EXPECT_NEAR(steps.losses[s], want.next_token_loss, 2e-5 * want.next_token_loss) << s;
    if (!want.mtp_losses.empty()) {
      EXPECT_NEAR(steps.mtp_losses[s], want.mtp_losses[0], 2e-5 * want.mtp_losses[0]) << s;
    }
    const double norm = reference::adam_step({.max_norm = 1}, want.gradients, parameters, state);
    EXPECT_NEAR(steps.gradient_norms[s], norm, 2e-4 * norm) << s;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, AgainstReference,
                         testing::Values(kTinyLlama, kTinyQwenMoe, kTinyDeepSeek));

struct Layout_ {
  const char* model;
  const char* plan;
};

void PrintTo(const Layout_& l, std::ostream* out) {
  *out << l.plan;
}

class Layouts : public testing::TestWithParam<Layout_> {};

// However the work is shared out, the gradients are those of one rank.
TEST_P(Layouts, HaveTheGradientsOfOneRank) {
  const char* const common = R"(
  sequence_length: 16
  micro_batch: 1
  global_batch: 8
  precision: fp32
)";
  const Scenario one = small_scenario(GetParam().model, kOneRank);
  const Scenario many =
      small_scenario(GetParam().model, std::string("\n") + GetParam().plan + common);
  for (const std::string& why : why_not_executable(many)) ADD_FAILURE() << why;
  const Trained a = train_in_threads(one, 0);
  const Trained b = train_in_threads(many, 0);
  EXPECT_NEAR(a.losses[0], b.losses[0], 1e-6 * a.losses[0]);
  EXPECT_NEAR(a.mtp_losses[0], b.mtp_losses[0], 1e-6 * a.losses[0]);
  EXPECT_NEAR(a.gradient_norms[0], b.gradient_norms[0], 1e-5 * a.gradient_norms[0]);
  EXPECT_EQ(a.gradients.size(), b.gradients.size());
  EXPECT_LT(worst_difference(a, b), 1e-4);
  const Trained c = train_in_threads(many, 3), d = train_in_threads(one, 3);
  for (int s = 0; s < 3; ++s) EXPECT_NEAR(c.losses[s], d.losses[s], 1e-5 * d.losses[s]) << s;
  std::printf("waits %ld\n", b.reuse_waits);
}

const Layout_ kLayouts[] = {
    {kTinyLlama, "  layout: {dp: 2}\n  schedule: 1f1b"},
    {kTinyLlama, "  layout: {dp: 2, zero: 0}\n  schedule: 1f1b"},
    {kTinyLlama, "  layout: {tp: 2}\n  schedule: 1f1b"},
    {kTinyLlama, "  layout: {tp: 2, sequence_parallel: false}\n  schedule: 1f1b"},
    {kTinyLlama, "  layout: {pp: 2}\n  schedule: gpipe"},
    {kTinyLlama, "  layout: {pp: 4}\n  schedule: 1f1b"},
    {kTinyLlama, "  layout: {pp: 2}\n  schedule: interleaved_1f1b\n  virtual_stages: 2"},
    {kTinyLlama, "  layout: {pp: 2}\n  schedule: zb_h1"},
    {kTinyLlama, "  layout: {pp: 2}\n  schedule: zb_v"},
    {kTinyLlama, "  layout: {pp: 2, dp: 1}\n  schedule: dual_pipe"},
    {kTinyLlama, "  layout: {pp: 2, dp: 2}\n  schedule: dual_pipe_v"},
    {kTinyQwenMoe, "  layout: {dp: 4, ep: 2}\n  schedule: 1f1b"},
    {kTinyQwenMoe, "  layout: {dp: 4, ep: 4}\n  schedule: 1f1b"},
    {kTinyQwenMoe, "  layout: {tp: 2, dp: 2, ep: 4}\n  schedule: 1f1b"},
    {kTinyQwenMoe, "  layout: {tp: 2, pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe"},
    {kTinyDeepSeek, "  layout: {dp: 4, ep: 4}\n  schedule: 1f1b"},
    {kTinyDeepSeek, "  layout: {tp: 2, dp: 2, ep: 2}\n  schedule: 1f1b"},
    {kTinyDeepSeek, "  layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe"},
    {kTinyDeepSeek, "  layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe_v"},
    {kTinyDeepSeek, "  layout: {pp: 2, dp: 2, ep: 2}\n  schedule: zb_v"},
    {kTinyDeepSeek, "  layout: {pp: 4, dp: 1}\n  schedule: dual_pipe"},
    {kTinyDeepSeek,
     "  layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe\n  recompute: [norms, "
     "mla_up_projection, activation]"},
    {kTinyDeepSeek, "  layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe_v\n  recompute: full"},
    {kTinyDeepSeek, "  layout: {dp: 1}\n  schedule: 1f1b\n  recompute: [norms]"},
    {kTinyDeepSeek, "  layout: {dp: 1}\n  schedule: 1f1b\n  recompute: selective"},
    {kTinyDeepSeek, "  layout: {dp: 1}\n  schedule: 1f1b\n  recompute: full"},
    {kTinyLlama, "  layout: {pp: 2}\n  schedule: 1f1b\n  recompute: [norms]"},
};

INSTANTIATE_TEST_SUITE_P(Small, Layouts, testing::ValuesIn(kLayouts));

}  // namespace
}  // namespace orrery
