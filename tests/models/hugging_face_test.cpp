// config.json as published (its keys and values, in our order), against the shipped descriptions,
// which were written from the papers, and against the parameter counts of the checkpoints.

#include "models/hugging_face.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "models_for_tests.hpp"

namespace orrery {
namespace {

const std::string kDeepSeekV3 = R"({
  "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
  "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
  "num_hidden_layers": 61, "first_k_dense_replace": 3, "moe_layer_freq": 1,
  "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
  "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
  "norm_topk_prob": true, "routed_scaling_factor": 2.5, "hidden_act": "silu",
  "num_attention_heads": 128, "num_key_value_heads": 128, "attention_bias": false,
  "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "v_head_dim": 128, "num_nextn_predict_layers": 1, "vocab_size": 129280,
  "max_position_embeddings": 163840, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "rope_scaling": {"type": "yarn", "factor": 40},
  "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
})";

Reading read_config(const std::string& json) {
  return read_text(json, "config.json");
}

/// `json` with one more key in front.
std::string with(const std::string& key_and_value, const std::string& json) {
  return "{" + key_and_value + ", " + json.substr(json.find('{') + 1);
}

void expect_reads_as(const std::string& json, const std::string& shipped_name) {
  Reading reading = read_config(json);
  ASSERT_EQ(format_problems(reading.problems), "");
  const Model expected = shipped(shipped_name);
  reading.model.name = expected.name;
  reading.model.source = expected.source;
  EXPECT_EQ(to_yaml(reading.model), to_yaml(expected));  // says where they differ
  EXPECT_EQ(reading.model, expected);
}

TEST(HuggingFace, DeepSeekV3) {
  expect_reads_as(kDeepSeekV3, "deepseek_v3");
  const Reading reading = read_config(kDeepSeekV3);
  EXPECT_EQ(reading.notes, std::vector<std::string>{"not used: quantization_config"});
  EXPECT_EQ(reading.model.name, "deepseek_v3");
  EXPECT_EQ(reading.model.source, "config.json");
}

TEST(HuggingFace, DeepSeekV2LiteHasNoQueryCompressionAndNoGroups) {
  expect_reads_as(R"({"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": null,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 102400, "max_position_embeddings": 163840, "tie_word_embeddings": false})",
                  "deepseek_v2_lite");
}

TEST(HuggingFace, DeepSeekV2) {
  expect_reads_as(R"({"model_type": "deepseek_v2", "hidden_size": 5120, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "num_hidden_layers": 60, "first_k_dense_replace": 1,
    "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 8,
    "topk_group": 3, "topk_method": "group_limited_greedy", "scoring_func": "softmax",
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 102400, "max_position_embeddings": 163840})",
                  "deepseek_v2");
}

TEST(HuggingFace, DeepSeekMoe16BHasPlainAttention) {
  expect_reads_as(R"({"architectures": ["DeepseekForCausalLM"], "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 28,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 102400, "max_position_embeddings": 4096})",
                  "deepseek_moe_16b");
}

TEST(HuggingFace, LlamaWithoutHeadDim) {
  expect_reads_as(R"({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "attention_bias": false,
    "mlp_bias": false, "tie_word_embeddings": false, "rope_theta": 500000.0})",
                  "deepseek_r1_distill_llama_8b");
}

TEST(HuggingFace, Mixtral) {
  expect_reads_as(R"({"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    "max_position_embeddings": 32768, "sliding_window": null, "head_dim": null})",
                  "mixtral_8x7b");
}

TEST(HuggingFace, Qwen25TiesEmbeddingsAndHasBiases) {
  const std::string json = R"({"model_type": "qwen2", "hidden_size": 1536,
    "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 131072,
    "sliding_window": 131072, "use_sliding_window": false, "max_window_layers": 28,
    "tie_word_embeddings": true})";
  expect_reads_as(json, "qwen2_5_1_5b");
  EXPECT_TRUE(read_config(json).notes.empty());
}

TEST(HuggingFace, Qwen3Moe) {
  expect_reads_as(R"({"model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "attention_bias": false, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "vocab_size": 151936, "max_position_embeddings": 40960, "sliding_window": null,
    "use_sliding_window": false, "tie_word_embeddings": false})",
                  "qwen3_235b_a22b");
}

TEST(HuggingFace, GreedyRoutingIsNotLimitedByGroups) {
  // modeling_deepseek.py of DeepSeek-V2: "greedy" takes the top k of all experts.
  std::string json = kDeepSeekV3;
  json.replace(json.find("noaux_tc"), 8, "greedy");
  const Reading reading = read_config(json);
  ASSERT_EQ(format_problems(reading.problems), "");
  EXPECT_EQ(reading.model.moe->groups, 1);
  EXPECT_EQ(reading.model.moe->group_limit, 1);
  EXPECT_FALSE(reading.model.moe->router_bias);
}

struct Checkpoint {
  const char* json;
  std::int64_t total;
};

class CheckpointOf : public testing::TestWithParam<Checkpoint> {};

TEST_P(CheckpointOf, ConfigHasItsParameters) {
  const Reading reading = read_config(GetParam().json);
  ASSERT_EQ(format_problems(reading.problems), "");
  EXPECT_EQ(count_parameters(reading.model).total(), GetParam().total);
}

INSTANTIATE_TEST_SUITE_P(
    Families, CheckpointOf,
    testing::Values(
        Checkpoint{R"({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12,
                       "n_positions": 1024, "n_ctx": 1024, "vocab_size": 50257,
                       "activation_function": "gelu_new"})",
                   124'439'808},  // openai-community/gpt2
        Checkpoint{R"({"model_type": "gpt_neox", "hidden_size": 6144, "intermediate_size": 24576,
                       "num_hidden_layers": 44, "num_attention_heads": 64, "vocab_size": 50432,
                       "max_position_embeddings": 2048, "hidden_act": "gelu_fast",
                       "rotary_pct": 0.25, "tie_word_embeddings": false})",
                   20'554'567'680},  // model card of EleutherAI/gpt-neox-20b
        Checkpoint{R"({"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
                       "num_hidden_layers": 32, "num_attention_heads": 32,
                       "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": 4096,
                       "max_position_embeddings": 32768})",
                   7'241'732'096},  // mistralai/Mistral-7B-v0.1
        Checkpoint{R"({"model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632,
                       "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
                       "num_hidden_layers": 24, "num_attention_heads": 16,
                       "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
                       "decoder_sparse_step": 1, "vocab_size": 151936,
                       "max_position_embeddings": 8192, "use_sliding_window": false})",
                   14'315'784'192},  // Qwen/Qwen1.5-MoE-A2.7B
        Checkpoint{R"({"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
                       "num_hidden_layers": 36, "num_attention_heads": 32,
                       "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                       "max_position_embeddings": 40960, "tie_word_embeddings": false})",
                   8'190'735'360}));  // Qwen/Qwen3-8B

TEST(HuggingFace, LayersWithExpertsFollowTheirKeys) {
  const Reading qwen = read_config(R"({"model_type": "qwen3_moe", "hidden_size": 64,
    "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2,
    "decoder_sparse_step": 2, "mlp_only_layers": [3], "vocab_size": 100,
    "max_position_embeddings": 128})");
  ASSERT_EQ(format_problems(qwen.problems), "");
  EXPECT_EQ(qwen.model.layer_is_moe, std::vector<bool>({false, true, false, false, false, true}));
  EXPECT_EQ(qwen.model.intermediate, 96);
}

/// The one note on `config`.
std::string note_on(const std::string& config) {
  const Reading reading = read_config(config);
  EXPECT_EQ(format_problems(reading.problems), "");
  EXPECT_EQ(reading.notes.size(), 1U);
  return reading.notes.empty() ? "" : reading.notes[0];
}

const std::string kLlama = R"({"model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
  "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
  "max_position_embeddings": 8192})";

TEST(HuggingFace, WhatIsNotModelledIsNoted) {
  EXPECT_EQ(note_on(with(R"("sliding_window": 4096)", kLlama)),
            "ignored: sliding_window: attention over 4096 positions is modelled as full attention");
  EXPECT_EQ(note_on(with(R"("index_n_heads": 64)", kLlama)),
            "ignored: index_n_heads: sparse attention is modelled as full attention");
  EXPECT_EQ(note_on(with(R"("layer_types": ["sliding_attention", "full_attention"])", kLlama)),
            "ignored: layer_types: every layer is modelled with full attention");
  EXPECT_EQ(note_on(with(R"("hidden_act": "gelu_tanh")", kLlama)),
            "ignored: hidden_act: 'gelu_tanh' is modelled as swiglu, with the same matrices");
  EXPECT_EQ(note_on(with(R"("brand_new": 1)", kLlama)), "not used: brand_new");
}

// DeepSeek-V3.2-Exp, inference/config_671B_v3.2.json: 64 heads of 128, 2048 tokens.
TEST(HuggingFace, ReadsTheIndexerOfSparseAttention) {
  std::string json =
      with(R"("index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048)", kDeepSeekV3);
  const Reading reading = read_config(json);
  EXPECT_EQ(format_problems(reading.problems), "");
  ASSERT_TRUE(reading.model.attention.mla && reading.model.attention.mla->indexer);
  EXPECT_EQ(*reading.model.attention.mla->indexer, (Indexer{64, 128, 2048}));
  for (const std::string& note : reading.notes)
    EXPECT_EQ(note.find("index_"), std::string::npos) << note;
  EXPECT_EQ(reading.model.attention, shipped("deepseek_v3_2_exp").attention);
}

TEST(HuggingFace, WhatIsOffOrWithoutEffectIsNotNoted) {
  for (const char* key :
       {R"("sliding_window": 8192)", R"("sliding_window": null)", R"("index_topk": null)",
        R"("torch_dtype": "bfloat16")", R"("layer_types": ["full_attention", "full_attention"])",
        R"("sliding_window": 4096, "use_sliding_window": false)"}) {
    const Reading reading = read_config(with(key, kLlama));
    EXPECT_EQ(format_problems(reading.problems), "") << key;
    EXPECT_TRUE(reading.notes.empty()) << key << ": " << reading.notes[0];
  }
}

std::string problems_of(const std::string& json) {
  return format_problems(read_config(json).problems);
}

TEST(HuggingFace, OtherFamiliesAreAProblem) {
  const std::string text = problems_of(R"({"model_type": "mamba", "hidden_size": 64})");
  EXPECT_NE(text.find("config.json:1:16: error: config.json of a family that is not modelled: "
                      "'mamba'"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("deepseek_v3"), std::string::npos) << text;
  EXPECT_FALSE(problems_of(R"({"architectures": []})").empty());
  EXPECT_FALSE(problems_of(R"({"model_type": ["llama"]})").empty());
}

TEST(HuggingFace, ImpossibleDimensionsAreProblems) {
  const auto broken = [](const std::string& from, const std::string& to) {
    std::string json = kDeepSeekV3;
    return problems_of(json.replace(json.find(from), from.size(), to));
  };
  EXPECT_NE(broken("\"topk_group\": 4", "\"topk_group\": 9").find("there are 8"),
            std::string::npos);
  EXPECT_NE(broken("\"n_group\": 8", "\"n_group\": 7").find("do not divide"), std::string::npos);
  EXPECT_NE(broken("\"vocab_size\": 129280,", "").find("missing key 'vocab_size'"),
            std::string::npos);
  EXPECT_NE(broken("\"kv_lora_rank\": 512,", "").find("missing key 'kv_lora_rank'"),
            std::string::npos);
  EXPECT_NE(broken("\"attention_bias\": false", "\"attention_bias\": true").find("biases in MLA"),
            std::string::npos);
  EXPECT_NE(problems_of(with(R"("num_key_value_heads": 3)", kLlama)).find("cannot share"),
            std::string::npos);
}

/// A llama as its config.json would say it.
RC_GTEST_PROP(HuggingFaceProperty, ReadsWhatALlamaWouldPublish, ()) {
  Model model = any_model();
  RC_PRE(!model.attention.mla);
  model.moe.reset();
  model.layer_is_moe.assign(model.layer_is_moe.size(), false);
  model.intermediate = std::max<std::int64_t>(model.intermediate, 1);
  model.norm = Norm::rms;
  model.activation = Activation::swiglu;
  model.norm_bias = model.learned_positions = false;
  model.mtp_modules = 0;
  model.attention.output_bias = model.attention.qkv_bias;
  model.attention.qk_norm = false;
  model.name = "llama";
  model.source = "config.json";
  const auto number = [](const char* key, std::int64_t value) {
    return "\"" + std::string(key) + "\": " + std::to_string(value) + ", ";
  };
  const auto flag = [](const char* key, bool value) {
    return "\"" + std::string(key) + "\": " + (value ? "true" : "false") + ", ";
  };
  const std::string json =
      "{" + number("hidden_size", model.hidden) + number("intermediate_size", model.intermediate) +
      number("num_hidden_layers", model.layers) +
      number("num_attention_heads", model.attention.heads) +
      number("num_key_value_heads", model.attention.kv_heads) +
      number("head_dim", model.attention.head_dim) + number("vocab_size", model.vocabulary) +
      number("max_position_embeddings", model.max_positions) +
      flag("attention_bias", model.attention.qkv_bias) + flag("mlp_bias", model.feed_forward_bias) +
      flag("tie_word_embeddings", model.tied_embeddings) + "\"model_type\": \"llama\"}";
  const Reading reading = read_config(json);
  RC_ASSERT(format_problems(reading.problems) == "");
  RC_ASSERT(reading.model == model);
}

}  // namespace
}  // namespace orrery
