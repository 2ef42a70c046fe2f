// Training small models for real. Losses and gradients are compared with a model of doubles written
// for the purpose (reference_model.hpp), and between layouts: however ranks share the work, the
// gradients are those of one rank.

#include "calibrate/execute/execution.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "calibrate/initial_parameters.hpp"
#include "models/step.hpp"
#include "sim/one_rank.hpp"
#include "tests/calibrate/reference_model.hpp"
#include "tests/calibrate/small_training.hpp"

namespace orrery {
namespace {

const std::string kBatch = R"(
  sequence_length: 16
  micro_batch: 1
  global_batch: 8
  precision: fp32
)";
const std::string kOneRank = "\n  layout: {dp: 1}\n  schedule: 1f1b" + kBatch;

/// ||a - b|| / ||a||.
template <class A, class B>
double relative_difference(const A& a, const B& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(double{a[i]} - double{b[i]}, 2);
    norm += std::pow(double{a[i]}, 2);
  }
  return std::sqrt(norm == 0 ? difference : difference / norm);
}

/// The batch of a step and the parameters before the first one, for the reference.
std::vector<reference::Sequence> batch_of(const Scenario& scenario, std::int64_t step) {
  std::vector<reference::Sequence> batch;
  for (std::int64_t s = 0; s < scenario.plan.global_batch_sequences; ++s) {
    batch.push_back(random_tokens(scenario, step, s));
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
// steps after, which AdamW's updates go into.
TEST_P(AgainstReference, LossesAndGradientsAgree) {
  const Scenario scenario = small_scenario(GetParam(), kOneRank);
  const reference::Options options{.mtp_weight = scenario.training.mtp_weight};
  reference::Tensors parameters = parameters_before(scenario);
  const Trained first = train_small(scenario, 0);
  const Trained trained = train_small(scenario, 4);
  reference::AdamState state;
  for (std::size_t s = 0; s < 4; ++s) {
    SCOPED_TRACE(s);
    const reference::Evaluation want = reference::differentiate(
        scenario.model, options, parameters, batch_of(scenario, static_cast<std::int64_t>(s)));
    if (s == 0) {
      EXPECT_NEAR(first.losses[0], want.next_token_loss, 1e-6 * want.next_token_loss);
      for (const auto& [name, gradient] : want.gradients) {
        const auto got = first.gradients.find(name);
        ASSERT_NE(got, first.gradients.end()) << name;
        ASSERT_EQ(got->second.size(), gradient.size()) << name;
        EXPECT_LT(relative_difference(gradient, got->second), 1e-4) << name;
      }
    }
    EXPECT_NEAR(trained.losses[s], want.next_token_loss, 2e-5 * want.next_token_loss);
    if (!want.mtp_losses.empty()) {
      EXPECT_NEAR(trained.mtp_losses[s], want.mtp_losses[0], 2e-5 * want.mtp_losses[0]);
    }
    const double norm = reference::adam_step({.max_norm = 1}, want.gradients, parameters, state);
    EXPECT_NEAR(trained.gradient_norms[s], norm, 2e-4 * norm);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, AgainstReference,
                         testing::Values(kTinyLlama, kTinyQwenMoe, kTinyDeepSeek));

struct Layouted {
  const char* model;
  const char* plan;
};
void PrintTo(const Layouted& layouted, std::ostream* out) {
  *out << layouted.plan;
}

class Layouts : public testing::TestWithParam<Layouted> {};

/// Of one rank; each model's is computed once.
const Trained& one_rank(const char* model, int steps) {
  static std::map<std::pair<const char*, int>, Trained> known;
  const auto [entry, inserted] = known.try_emplace({model, steps});
  if (inserted) entry->second = train_small(small_scenario(model, kOneRank), steps);
  return entry->second;
}

TEST_P(Layouts, HaveTheGradientsOfOneRank) {
  const Scenario scenario =
      small_scenario(GetParam().model, "\n  " + std::string(GetParam().plan) + kBatch);
  ASSERT_EQ(why_not_executable(scenario), std::vector<std::string>());
  const Trained& one = one_rank(GetParam().model, 0);
  const Trained many = train_small(scenario, 0);
  EXPECT_NEAR(many.losses[0], one.losses[0], 1e-6 * one.losses[0]);
  EXPECT_NEAR(many.mtp_losses[0], one.mtp_losses[0], 1e-6 * one.losses[0]);
  EXPECT_NEAR(many.gradient_norms[0], one.gradient_norms[0], 1e-5 * one.gradient_norms[0]);
  ASSERT_EQ(many.gradients.size(), one.gradients.size());
  for (const auto& [name, gradient] : one.gradients) {
    const auto other = many.gradients.find(name);
    ASSERT_NE(other, many.gradients.end()) << name;
    ASSERT_EQ(other->second.size(), gradient.size()) << name;
    EXPECT_LT(relative_difference(gradient, other->second), 1e-4) << name;
  }
  // And what the optimizer makes of them on every copy.
  const Trained& one_trained = one_rank(GetParam().model, 3);
  const Trained trained = train_small(scenario, 3);
  for (std::size_t s = 0; s < 3; ++s) {
    EXPECT_NEAR(trained.losses[s], one_trained.losses[s], 1e-5 * one_trained.losses[s]) << s;
  }
}

const Layouted kLayouts[] = {
    {kTinyLlama, "layout: {dp: 2}\n  schedule: 1f1b"},
    {kTinyLlama, "layout: {dp: 2, zero: 0}\n  schedule: 1f1b"},
    {kTinyLlama, "layout: {tp: 2, dp: 1}\n  schedule: 1f1b"},
    {kTinyLlama, "layout: {tp: 2, dp: 2, sequence_parallel: false}\n  schedule: 1f1b"},
    {kTinyLlama, "layout: {pp: 2, dp: 2}\n  schedule: gpipe"},
    {kTinyLlama, "layout: {pp: 4, dp: 1}\n  schedule: 1f1b"},
    {kTinyLlama, "layout: {pp: 2, dp: 1}\n  schedule: interleaved_1f1b\n  virtual_stages: 2"},
    {kTinyLlama, "layout: {pp: 2, dp: 2}\n  schedule: zb_h1"},
    {kTinyLlama, "layout: {pp: 2, dp: 1}\n  schedule: zb_v"},
    {kTinyLlama, "layout: {pp: 2, dp: 1}\n  schedule: dual_pipe"},
    {kTinyLlama, "layout: {pp: 2, dp: 2}\n  schedule: dual_pipe_v"},
    {kTinyLlama, "layout: {pp: 2, dp: 1}\n  schedule: 1f1b\n  recompute: [norms]"},
    {kTinyQwenMoe, "layout: {dp: 4, ep: 2}\n  schedule: 1f1b"},
    {kTinyQwenMoe, "layout: {dp: 4, ep: 4}\n  schedule: 1f1b"},
    {kTinyQwenMoe, "layout: {tp: 2, dp: 2, ep: 4}\n  schedule: 1f1b"},
    {kTinyQwenMoe, "layout: {tp: 2, pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe"},
    {kTinyDeepSeek, "layout: {dp: 4, ep: 4}\n  schedule: 1f1b"},
    {kTinyDeepSeek, "layout: {tp: 2, dp: 2, ep: 2}\n  schedule: 1f1b"},
    {kTinyDeepSeek, "layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe"},
    {kTinyDeepSeek, "layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe_v"},
    {kTinyDeepSeek, "layout: {pp: 2, dp: 2, ep: 2}\n  schedule: zb_v"},
    {kTinyDeepSeek, "layout: {pp: 4, dp: 1}\n  schedule: dual_pipe"},
    {kTinyDeepSeek, "layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe\n  recompute: deepseek"},
    {kTinyDeepSeek, "layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe_v\n  recompute: full"},
    {kTinyDeepSeek, "layout: {dp: 1}\n  schedule: 1f1b\n  recompute: [norms]"},
    {kTinyDeepSeek, "layout: {dp: 1}\n  schedule: 1f1b\n  recompute: selective"},
    {kTinyDeepSeek, "layout: {dp: 1}\n  schedule: 1f1b\n  recompute: full"},
};
INSTANTIATE_TEST_SUITE_P(Small, Layouts, testing::ValuesIn(kLayouts));

const char* const kBlockModel = R"(
  name: small DeepSeek with blocks of 128
  source: made up
  hidden: 128
  vocabulary: 64
  layers: 2
  max_positions: 128
  attention:
    heads: 4
    mla: {q_lora_rank: 128, kv_lora_rank: 128, qk_nope_head_dim: 32, qk_rope_head_dim: 16,
          v_head_dim: 32}
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

Scenario block_scenario(const std::string& layout, const std::string& precision) {
  return small_scenario(kBlockModel, "\n  " + layout + R"(
  sequence_length: 128
  micro_batch: 1
  global_batch: 4
  precision: )" + precision + "\n");
}

// Rounding activations to BF16 (2^-9) or linear layers' operands to E4M3 (2^-4, of tiles) moves the
// loss of a step by about as much as the logits, which are of the order of 0.3 here, are rounded.
TEST(Precision, MovesTheLossByLittle) {
  const std::string one = "layout: {dp: 1}\n  schedule: 1f1b";
  const Trained fp32 = train_small(block_scenario(one, "fp32"), 3);
  const Trained bf16 = train_small(block_scenario(one, "bf16"), 3);
  const Trained fp8 = train_small(block_scenario(one, "fp8_deepseek"), 3);
  for (std::size_t s = 0; s < 3; ++s) {
    EXPECT_NEAR(bf16.losses[s], fp32.losses[s], 1e-3 * fp32.losses[s]) << s;
    EXPECT_NE(bf16.losses[s], fp32.losses[s]) << s;
    EXPECT_NEAR(fp8.losses[s], bf16.losses[s], 5e-3 * bf16.losses[s]) << s;
    EXPECT_NE(fp8.losses[s], bf16.losses[s]) << s;
  }
}

// What is recomputed comes out as it was, but for E5M6 and FP8 copies that stand for what was
// dropped.
TEST(Precision, RecomputationKeepsFp8WithinItsRounding) {
  const std::string one = "layout: {dp: 1}\n  schedule: 1f1b";
  const Trained kept = train_small(block_scenario(one, "fp8_deepseek"), 0);
  for (const char* what : {"deepseek", "full"}) {
    SCOPED_TRACE(what);
    const Trained again =
        train_small(block_scenario(one + "\n  recompute: " + what, "fp8_deepseek"), 0);
    EXPECT_EQ(again.losses[0], kept.losses[0]);
    for (const auto& [name, gradient] : kept.gradients) {
      EXPECT_LT(relative_difference(gradient, again.gradients.at(name)), 0.1) << name;
    }
  }
}

TEST(Precision, ExpertsElsewhereGiveFp8TheSameLoss) {
  const Trained one =
      train_small(block_scenario("layout: {dp: 1}\n  schedule: 1f1b", "fp8_deepseek"), 0);
  const Trained two =
      train_small(block_scenario("layout: {dp: 2, ep: 2}\n  schedule: 1f1b", "fp8_deepseek"), 0);
  EXPECT_NEAR(two.losses[0], one.losses[0], 1e-5 * one.losses[0]);
  EXPECT_NEAR(two.gradient_norms[0], one.gradient_norms[0], 2e-3 * one.gradient_norms[0]);
}

// One rank of eight, the others made up: it runs all ops of its Program, and its numbers are
// numbers.
TEST(Alone, ARankRunsWithoutItsPeers) {
  for (const char* precision : {"fp32", "bf16", "fp8_deepseek"}) {
    SCOPED_TRACE(precision);
    const Scenario scenario = small_scenario(kBlockModel, std::string(R"(
  layout: {pp: 2, dp: 4, ep: 4}
  schedule: dual_pipe
  sequence_length: 128
  micro_batch: 1
  global_batch: 16
  precision: )") + precision + "\n");
    const Program program = one_rank_of(build_step(scenario), RankId(1));
    const auto device = kernels::open_cpu_device(1);
    Execution execution(scenario, program, RankId(4), *device);
    const RankStep step = execution.step(0, [&](std::int64_t number, std::int64_t sequence) {
      return random_tokens(scenario, number, sequence);
    });
    EXPECT_EQ(step.times.size(), program.size());
    EXPECT_GT(step.loss_sum, 0);
    EXPECT_TRUE(std::isfinite(step.loss_sum));
    EXPECT_GT(step.gradient_norm, 0);
    EXPECT_TRUE(std::isfinite(step.gradient_norm));
  }
}

TEST(Timelines, OfExecutedStepsKeepTheProgramsOrder) {
  const Scenario scenario = small_scenario(
      kTinyDeepSeek, "\n  layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe" + kBatch);
  const Trained trained = train_small(scenario, 1);
  const Program program = build_step(scenario, {.all_ranks = true});
  const Timeline& t = trained.timeline;
  ASSERT_EQ(t.start_ps.size(), program.size());
  // Of an op that several ranks share, the last of them counts; those of one stream follow each other.
  const auto own = [&](OpId op) { return program.streams_of(op).size() == 1; };
  std::map<std::uint32_t, Picoseconds> stream_end;
  for (std::size_t i = 0; i < program.size(); ++i) {
    const OpId op(i);
    EXPECT_LE(t.start_ps[op], t.end_ps[op]) << program.name(op);
    if (!own(op)) continue;
    for (const OpId before : program.predecessors_of(op)) {
      if (!own(before)) continue;
      EXPECT_LE(t.end_ps[before], t.start_ps[op])
          << program.name(before) << ", " << program.name(op);
    }
    Picoseconds& end = stream_end[program.streams_of(op)[0].value];
    EXPECT_LE(end, t.start_ps[op]) << program.name(op);
    end = t.end_ps[op];
  }
}

TEST(Executable, ReasonsAreGivenForWhatIsNot) {
  const auto reasons = [](const std::string& model, const std::string& plan) {
    std::string all;
    for (const std::string& why : why_not_executable(small_scenario(model, plan))) all += why + ";";
    return all;
  };
  EXPECT_EQ(reasons(kTinyDeepSeek, kOneRank), "");
  EXPECT_NE(reasons(kTinyLlama, "\n  layout: {cp: 2, dp: 1}\n  schedule: 1f1b" + kBatch)
                .find("context parallelism"),
            std::string::npos);
  EXPECT_NE(
      reasons(kTinyLlama, "\n  layout: {dp: 2, zero: 3}\n  schedule: 1f1b" + kBatch).find("ZeRO"),
      std::string::npos);
  EXPECT_NE(
      reasons(kTinyDeepSeek, "\n  layout: {pp: 2, dp: 1}\n  schedule: 1f1b" + kBatch).find("MTP"),
      std::string::npos);
  std::string fp8 = kOneRank;
  fp8.replace(fp8.find("fp32"), 4, "fp8_deepseek");
  EXPECT_NE(reasons(kTinyDeepSeek, fp8).find("hidden is 32, and FP8 scales cover 128"),
            std::string::npos);
}

}  // namespace
}  // namespace orrery
