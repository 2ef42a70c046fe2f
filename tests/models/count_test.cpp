// Counts against what was published. The totals to the last parameter are those of the checkpoints
// on Hugging Face (`safetensors.total` of https://huggingface.co/api/models/OWNER/NAME).

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstdint>
#include <string>

#include "models_for_tests.hpp"

namespace orrery {
namespace {

double billions(std::int64_t count) {
  return static_cast<double>(count) * 1e-9;
}

struct Published {
  const char* model;
  std::int64_t total;
};

class CheckpointTotal : public testing::TestWithParam<Published> {};

TEST_P(CheckpointTotal, IsCountedToTheLastParameter) {
  EXPECT_EQ(count_parameters(shipped(GetParam().model)).total(), GetParam().total);
}

INSTANTIATE_TEST_SUITE_P(
    HuggingFace, CheckpointTotal,
    testing::Values(
        Published{"deepseek_v2", 235'741'434'880}, Published{"deepseek_v2_lite", 15'706'484'224},
        Published{"deepseek_moe_16b", 16'375'728'128}, Published{"llama3_8b", 8'030'261'248},
        Published{"llama3_70b", 70'553'706'496}, Published{"llama3_405b", 405'853'388'800},
        Published{"deepseek_r1_distill_llama_8b", 8'030'261'248},
        Published{"deepseek_r1_distill_llama_70b", 70'553'706'496},
        Published{"mixtral_8x7b", 46'702'792'704}, Published{"mixtral_8x22b", 140'620'634'112},
        Published{"qwen3_235b_a22b", 235'093'634'560}, Published{"qwen2_5_1_5b", 1'543'714'304},
        Published{"qwen2_5_7b", 7'615'616'512}, Published{"qwen2_5_14b", 14'770'033'664},
        Published{"qwen2_5_32b", 32'763'876'352}),
    [](const auto& test) { return std::string(test.param.model); });

TEST(Count, DeepSeekV3CheckpointHoldsTheMtpModuleWithCopiesOfEmbeddingAndHead) {
  // BF16 checkpoints of deepseek-ai/DeepSeek-V3 and -R1: 684,489,845,504.
  const ParameterCount count = count_parameters(shipped("deepseek_v3"));
  EXPECT_EQ(count.total() + count.mtp + count.embedding + count.head, 684'489'845'504);
}

TEST(Count, DeepSeekV3ByPart) {
  const Model model = shipped("deepseek_v3");
  const ParameterCount count = count_parameters(model);
  EXPECT_NEAR(billions(count.total()), 671, 0.5);  // arXiv 2412.19437, 4.2
  // README_WEIGHTS.md of the repository gives 11.5 B for the module; its shapes sum to 11.61.
  EXPECT_NEAR(billions(count.mtp), 11.61, 0.005);
  const LayerParameters dense = count_layer(model, false);
  const LayerParameters moe = count_layer(model, true);
  // Sums of the shapes in the checkpoint's index, layers 0 and 3.
  EXPECT_EQ(dense.attention, 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168);
  EXPECT_EQ(dense.norms, 2 * 7168 + 1536 + 512);
  EXPECT_EQ(dense.dense_feed_forward, 3 * 7168 * 18432);
  EXPECT_EQ(dense.routed_experts + dense.shared_experts + dense.router, 0);
  EXPECT_EQ(moe.attention, dense.attention);
  EXPECT_EQ(moe.one_expert, 44'040'192);
  EXPECT_EQ(moe.shared_experts, moe.one_expert);
  EXPECT_EQ(moe.routed_experts, 256 * moe.one_expert);
  EXPECT_EQ(moe.router, 7168 * 256 + 256);  // gate.weight, gate.e_score_correction_bias
  EXPECT_EQ(moe.dense_feed_forward, 0);
}

TEST(Count, DeepSeekV3Active) {
  const Model model = shipped("deepseek_v3");
  const ActiveParameters active = count_active_parameters(model);
  // By hand: 61 x 187.107 M + 3 x 396.361 M + 58 x (9 x 44.040 M + 1.835 M), with 0.001 B of norms.
  EXPECT_NEAR(billions(active.body), 35.699, 0.0005);
  EXPECT_NEAR(billions(active.with_head), 36.626, 0.0005);  // "36.7 B", README_WEIGHTS.md
  EXPECT_NEAR(billions(active.with_head_and_embedding), 37.552, 0.0005);  // "37 B", 4.2
}

struct Active {
  const char* model;
  double billions;
  double tolerance;  // half of the last digit published
};

class PublishedActive : public testing::TestWithParam<Active> {};

TEST_P(PublishedActive, WithHeadAndEmbedding) {
  const auto active = count_active_parameters(shipped(GetParam().model));
  EXPECT_NEAR(billions(active.with_head_and_embedding), GetParam().billions, GetParam().tolerance);
}

INSTANTIATE_TEST_SUITE_P(Papers, PublishedActive,
                         testing::Values(Active{"deepseek_v2", 21, 0.5},         // arXiv 2405.04434
                                         Active{"deepseek_moe_16b", 2.8, 0.05},  // arXiv 2401.06066
                                         Active{"mixtral_8x7b", 12.9, 0.05},     // release note
                                         Active{"mixtral_8x22b", 39.1, 0.1},     // "39 B active"
                                         Active{"qwen3_235b_a22b", 22, 0.5}),    // arXiv 2505.09388
                         [](const auto& test) { return std::string(test.param.model); });

TEST(Count, DeepSeekV2LiteActive) {
  // Appendix B of arXiv 2405.04434 says 2.4 B, between the counts without and with the head.
  const ActiveParameters active = count_active_parameters(shipped("deepseek_v2_lite"));
  EXPECT_LT(billions(active.body), 2.4);
  EXPECT_GT(billions(active.with_head), 2.4);
}

TEST(Count, Qwen25WithoutEmbedding) {
  // "Number of Parameters (Non-Embedding)" on the model cards.
  EXPECT_NEAR(billions(count_active_parameters(shipped("qwen2_5_1_5b")).body), 1.31, 0.005);
  EXPECT_NEAR(billions(count_active_parameters(shipped("qwen2_5_7b")).body), 6.53, 0.005);
}

TEST(Count, DenseModelsWithoutAPublishedCheckpointCount) {
  EXPECT_NEAR(billions(count_parameters(shipped("deepseek_67b")).total()), 67.4, 0.05);
  // arXiv 2005.14165, table D.1: 174,600 M.
  EXPECT_NEAR(billions(count_parameters(shipped("gpt3_175b")).total()), 174.6, 0.05);
}

TEST(Flops, Isca25Table2) {
  // arXiv 2505.09343, table 2, S = 4096: V2 155, V3 250 GFLOP per token.
  const FlopsPerToken v3 = training_flops_per_token(shipped("deepseek_v3"), 4096);
  const FlopsPerToken v2 = training_flops_per_token(shipped("deepseek_v2"), 4096);
  EXPECT_NEAR(v3.causal * 1e-9, 250, 0.5);
  EXPECT_NEAR(v2.causal * 1e-9, 155, 0.5);
  // Table 4: 432 and 385 TFLOPS per GPU, of the same step.
  EXPECT_NEAR(v3.noncausal / v3.causal, 432.0 / 385.0, 0.002);
  // 1541.7 tokens per second and GPU (table 4: 62,914,560 tokens in 19.926 s on 2048).
  EXPECT_NEAR(v3.noncausal * 1541.7e-12, 432, 2);
}

TEST(Flops, Gpt3TableD1) {
  // arXiv 2005.14165, table D.1: 3.14e23 for 300 B tokens, 6 per parameter and token, no attention.
  const Model model = shipped("gpt3_175b");
  EXPECT_NEAR(training_flops_per_token(model, 0).causal * 300e9, 3.14e23, 0.005e23);
  // Appendix B of arXiv 2204.02311 (PaLM): 12 layers x heads x head_dim x S for attention.
  const FlopsPerToken flops = training_flops_per_token(model, 2048);
  EXPECT_DOUBLE_EQ(flops.noncausal - training_flops_per_token(model, 0).noncausal,
                   12.0 * 96 * 96 * 128 * 2048);
}

RC_GTEST_PROP(CountProperty, OneMoreLayerIsOneMoreLayer, ()) {
  Model model = any_model();
  const std::int64_t before = count_parameters(model).total();
  const bool moe = model.moe && *rc::gen::arbitrary<bool>();
  if (!moe && model.intermediate == 0) model.intermediate = 64;
  model.layers += 1;
  model.layer_is_moe.push_back(moe);
  RC_ASSERT(count_parameters(model).total() - before == count_layer(model, moe).total());
}

RC_GTEST_PROP(CountProperty, EveryParameterIsActiveWhereAllExpertsAreChosen, ()) {
  Model model = any_model();
  if (model.moe) model.moe->top_k = model.moe->routed_experts;
  RC_ASSERT(count_active_parameters(model).with_head_and_embedding ==
            count_parameters(model).total());
}

RC_GTEST_PROP(CountProperty, TyingSavesTheHeadAndNoWork, ()) {
  Model tied = any_model();
  tied.tied_embeddings = true;
  Model untied = tied;
  untied.tied_embeddings = false;
  RC_ASSERT(count_parameters(untied).total() - count_parameters(tied).total() ==
            tied.vocabulary * tied.hidden);
  RC_ASSERT(training_flops_per_token(tied, 512).causal ==
            training_flops_per_token(untied, 512).causal);
}

}  // namespace
}  // namespace orrery
