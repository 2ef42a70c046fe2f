#include "reports/generation.hpp"

#include <gtest/gtest.h>
#include <rapidjson/document.h>

#include <string>

#include "reports/validate.hpp"

namespace orrery {
namespace {

const std::string kFolder = std::string(ORRERY_SOURCE_DIR) + "/scenarios/generation/";

GenerationReport shipped(const std::string& name) {
  return study_generation(read_generation(kFolder + name + ".yaml"));
}

GenerationReport from_text(const std::string& text) {
  return study_generation(
      read_generation_text(text, "test.yaml", std::string(ORRERY_SOURCE_DIR) + "/scenarios"));
}

constexpr const char* kLlama =
    "name: test\nmodel: models/llama3_70b.yaml\ncluster: clusters/h100_node.yaml\ngeneration:\n";

TEST(GenerationReport, CountsTokens) {
  const GenerationReport r = shipped("deepseek_v3_decode");
  const DecodeReport& d = *r.decode;
  EXPECT_FALSE(r.prefill);
  EXPECT_DOUBLE_EQ(d.tpot_s * 1.85, d.cost.seconds);
  EXPECT_NEAR(d.tokens_per_gpu_s, 88 * 1.85 / d.cost.seconds, 1e-9);
  EXPECT_DOUBLE_EQ(d.tokens_per_node_s, 8 * d.tokens_per_gpu_s);
  EXPECT_LE(d.step.sequences, d.most_sequences);
  EXPECT_TRUE(r.warnings.empty());

  const GenerationReport p = shipped("deepseek_v3_prefill_production");
  // 2304 of 4096 are found: what a GPU takes in is 4096 / 1792 of what it computes.
  EXPECT_NEAR(p.prefill->input_tokens_per_gpu_s / p.prefill->tokens_per_gpu_s, 4096.0 / 1792,
              1e-12);
  EXPECT_NEAR(p.prefill->tokens_per_gpu_s, 9 * 1792 / p.ttft_s, 1e-6);
}

TEST(GenerationReport, TensorParallelGpusShareTheirTokens) {
  const GenerationReport r = from_text(
      std::string(kLlama) + "  layout: {tp: 8}\n  prompt: 1000\n  output: 100\n  batch: 16\n");
  EXPECT_NEAR(r.decode->tokens_per_gpu_s * 8, 16 / r.decode->cost.seconds, 1e-6);
  EXPECT_EQ(r.decode->step.context, 1050);
}

TEST(GenerationReport, FindsTheBatchThatFits) {
  const GenerationReport r = shipped("llama3_70b_h100");
  EXPECT_EQ(r.decode->step.sequences, r.decode->most_sequences);
  // The cache it needs is there, and that of one more is not.
  EXPECT_LE(r.decode->cache_bytes, r.memory.left_for_cache());
  EXPECT_GT(r.decode->cache_bytes * static_cast<double>(r.decode->most_sequences + 2) /
                static_cast<double>(r.decode->most_sequences),
            r.memory.left_for_cache());
}

TEST(GenerationReport, WarnsOfABatchThatDoesNotFit) {
  const GenerationReport r = from_text(
      std::string(kLlama) + "  layout: {tp: 8}\n  prompt: 7000\n  output: 1000\n  batch: 5000\n");
  ASSERT_EQ(r.warnings.size(), 1u);
  EXPECT_NE(r.warnings[0].find("at most"), std::string::npos) << r.warnings[0];
}

TEST(GenerationReport, RefusesWeightsThatDoNotFit) {
  try {
    from_text(std::string(kLlama) + "  prompt: 100\n  output: 100\n");
    FAIL() << "141 GB on one GPU of 80";
  } catch (const InputError& error) {
    EXPECT_NE(format_problems(error.problems()).find("weights 141 GB"), std::string::npos)
        << format_problems(error.problems());
  }
}

// DeepSeek-V3.2-Exp's figure 3, against no constant of this program: the slopes of the cost with
// context, which do not depend on the batch and the rest of the deployment that is not published.
TEST(GenerationReport, CostsGrowWithContextAsPublished) {
  const auto slope = [](const char* name, bool decode, std::size_t from, std::size_t to) {
    const GenerationReport r = shipped(name);
    const ContextCost& a = r.contexts.at(from);
    const ContextCost& b = r.contexts.at(to);
    const double rise = decode ? b.decode_dollars_per_million - a.decode_dollars_per_million
                               : b.prefill_dollars_per_million - a.prefill_dollars_per_million;
    return rise / static_cast<double>(b.context - a.context) * 131'072;
  };
  EXPECT_NEAR(slope("deepseek_v3_1_decode_cost", true, 0, 6) / (2.15434 - 0.0705), 1, 0.15);
  EXPECT_NEAR(slope("deepseek_v3_1_prefill_cost", false, 0, 5) / (0.66577 - 0.05287), 1, 0.3);
  // Sparse attention leaves a small slope, of the indexer alone: 0.103 of 2.08 and 0.087 of 0.61.
  EXPECT_LT(slope("deepseek_v3_2_decode_cost", true, 0, 5),
            0.1 * slope("deepseek_v3_1_decode_cost", true, 0, 6));
  EXPECT_LT(slope("deepseek_v3_2_prefill_cost", false, 0, 4),
            0.25 * slope("deepseek_v3_1_prefill_cost", false, 0, 5));
}

TEST(GenerationReport, IsJson) {
  for (const char* name : {"deepseek_v3_1_decode_cost", "r1_zero_rollout", "llama3_70b_h100"}) {
    const GenerationReport r = shipped(name);
    rapidjson::Document json;
    json.Parse(to_json(r).c_str());
    ASSERT_FALSE(json.HasParseError()) << name;
    EXPECT_EQ(json["scenario"].GetString(), r.scenario.name);
    ASSERT_TRUE(r.decode.has_value()) << name;
    EXPECT_DOUBLE_EQ(json["decode"]["tpot_s"].GetDouble(), r.decode->tpot_s);
    EXPECT_EQ(json.HasMember("rollout"), r.rollout.has_value());
    EXPECT_EQ(json.HasMember("contexts"), !r.contexts.empty());
    EXPECT_NE(to_terminal(r).find(r.scenario.name), std::string::npos);
  }
}

TEST(GenerationReport, IsTheSameEveryTime) {
  EXPECT_EQ(to_json(shipped("r1_zero_rollout")), to_json(shipped("r1_zero_rollout")));
}

TEST(GenerationReport, RolloutTakesAtLeastItsLongestSequence) {
  const GenerationReport r = shipped("r1_zero_rollout");
  const RolloutEstimate& e = *r.rollout;
  // 8192 sequences on 512 replicas all start at once: the longest of them sets the end.
  EXPECT_EQ(e.replicas, 512);
  EXPECT_EQ(e.slots, 16);
  EXPECT_NEAR(e.gpu_seconds / e.seconds, 512, 1e-9);
  const double alone =
      step_cost(r.scenario.instance, {.sequences = 1, .new_tokens = 2, .context = 256}).seconds;
  EXPECT_GT(e.seconds, static_cast<double>(r.scenario.rollout->output.longest()) / 1.85 * alone);
  EXPECT_LT(e.mean_sequences, 16 * 4994.0 / 20'000);
}

// Files of runs may name serving plans: the numbers are those of the report.
TEST(GenerationReport, IsValidatedByRuns) {
  const auto runs = validate(kFolder + "runs/published.yaml");
  ASSERT_GE(runs.size(), 8u);
  const auto& decode = runs.at(3);
  EXPECT_EQ(decode.rows.at(0).quantity, "decode.tokens_per_node_s");
  EXPECT_NEAR(decode.rows.at(0).predicted, shipped("deepseek_v3_decode").decode->tokens_per_node_s,
              1e-6);
  EXPECT_DOUBLE_EQ(decode.rows.at(0).published, 14'800);
}

}  // namespace
}  // namespace orrery
