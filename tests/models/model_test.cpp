#include "models/model.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <filesystem>
#include <ostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "models_for_tests.hpp"

namespace orrery {
namespace {

constexpr const char* kSmall = R"(name: Small
source: none
hidden: 64
vocabulary: 100
layers: 4
max_positions: 128
attention:
  heads: 4
  kv_heads: 2
feed_forward:
  activation: swiglu
  intermediate: 96
moe:
  dense_layers: 1
  routed_experts: 8
  top_k: 2
  expert_intermediate: 32
  groups: 4
  group_limit: 2
)";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  if (at == std::string::npos) throw std::logic_error("nothing to replace: " + from);
  return text.replace(at, from.size(), to);
}

std::vector<std::string> shipped_names() {
  std::vector<std::string> names;
  const std::string folder = std::string(ORRERY_SOURCE_DIR) + "/scenarios/models";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class ShippedModel : public testing::TestWithParam<std::string> {};

TEST_P(ShippedModel, ReadsWithoutProblemsAndCitesItsSource) {
  const Model model = shipped(GetParam());
  EXPECT_FALSE(model.name.empty());
  const bool cited = model.source.find("arXiv") != std::string::npos ||
                     model.source.find("config.json") != std::string::npos;
  EXPECT_TRUE(cited) << model.source;
}

TEST_P(ShippedModel, IsWrittenAsItIsRead) {
  const Model model = shipped(GetParam());
  const Reading again = read_text(to_yaml(model));
  EXPECT_EQ(format_problems(again.problems), "");
  EXPECT_EQ(again.model, model);
}

INSTANTIATE_TEST_SUITE_P(All, ShippedModel, testing::ValuesIn(shipped_names()),
                         [](const auto& test) { return test.param; });

RC_GTEST_PROP(ModelProperty, WhatIsWrittenReadsBackEqual, ()) {
  const Model model = any_model();
  const Reading again = read_text(to_yaml(model));
  RC_ASSERT(format_problems(again.problems) == "");
  RC_ASSERT(again.model == model);
}

TEST(ReadModel, DefaultsOfOurYaml) {
  const Reading reading = read_text(kSmall);
  ASSERT_EQ(format_problems(reading.problems), "");
  const Model& model = reading.model;
  EXPECT_EQ(model.attention.head_dim, 16);
  EXPECT_EQ(model.layer_is_moe, std::vector<bool>({false, true, true, true}));
  EXPECT_EQ(model.moe->shared_experts, 0);
  EXPECT_EQ(model.norm, Norm::rms);
  EXPECT_FALSE(model.tied_embeddings || model.learned_positions || model.norm_bias);
  EXPECT_EQ(model.mtp_modules, 0);
  EXPECT_TRUE(reading.notes.empty());
}

TEST(ReadModel, DenseLayersMayBeListed) {
  const Reading reading = read_text(replaced(kSmall, "dense_layers: 1", "dense_layers: [0, 2]"));
  ASSERT_EQ(format_problems(reading.problems), "");
  EXPECT_EQ(reading.model.layer_is_moe, std::vector<bool>({false, true, false, true}));
}

struct Mistake {
  const char* from;
  const char* to;
  int line;
  const char* words;

  friend void PrintTo(const Mistake& mistake, std::ostream* out) { *out << mistake.to; }
};

class Mistakes : public testing::TestWithParam<Mistake> {};

TEST_P(Mistakes, AreReportedWhereTheyAre) {
  const Mistake& mistake = GetParam();
  const Reading reading = read_text(replaced(kSmall, mistake.from, mistake.to));
  ASSERT_EQ(reading.problems.size(), 1U) << format_problems(reading.problems);
  const std::string text = format_problems(reading.problems);
  EXPECT_NE(text.find(mistake.words), std::string::npos) << text;
  EXPECT_EQ(reading.problems[0].at.line, mistake.line) << text;
}

INSTANTIATE_TEST_SUITE_P(
    One, Mistakes,
    testing::Values(
        Mistake{"name: Small\n", "nome: Small\nname: x\n", 1, "did you mean 'name'?"},
        Mistake{"kv_heads: 2", "kv_haeds: 2", 9, "did you mean 'kv_heads'?"},
        Mistake{"top_k: 2", "topk: 2\n  top_k: 2", 16, "did you mean 'top_k'?"},
        Mistake{"source: none\n", "", 1, "missing key 'source'"},
        Mistake{"layers: 4", "layers: 0", 5, "from 1 to 10000"},
        Mistake{"layers: 4", "layers: 10001", 5, "from 1 to 10000"},
        Mistake{"hidden: 64", "hidden: 99999999999", 3, "'hidden' must be"},
        Mistake{"hidden: 64", "hidden: 66", 8, "not a multiple of heads"},
        Mistake{"hidden: 64", "hidden: 131072", 8, "heads of 32768"},
        Mistake{"expert_intermediate: 32", "expert_intermediate: 100\n  shared_experts: 65536", 18,
                "shared experts 6553600 wide"},
        Mistake{"hidden: 64", "hidden: 60", 8, "is odd"},
        Mistake{"kv_heads: 2", "kv_heads: 3", 9, "cannot share"},
        Mistake{"top_k: 2", "top_k: 9", 16, "only 8 routed experts"},
        Mistake{"top_k: 2", "top_k: 5", 19, "fewer than top_k 5"},
        Mistake{"groups: 4", "groups: 3", 18, "do not divide"},
        Mistake{"group_limit: 2", "group_limit: 5", 19, "there are 4"},
        Mistake{"dense_layers: 1", "dense_layers: 4", 14, "from 0 to 3"},
        Mistake{"dense_layers: 1", "dense_layers: [2, 1]", 14, "increasing"},
        Mistake{"dense_layers: 1", "dense_layers: 0", 12, "not used"},
        Mistake{"intermediate: 96", "bias: true", 11, "missing key 'intermediate'"},
        Mistake{"activation: swiglu", "activation: swigul", 11, "did you mean 'swiglu'?"},
        Mistake{"kv_heads: 2",
                "kv_heads: 2\n  mla: {kv_lora_rank: 8, qk_nope_head_dim: 8, "
                "qk_rope_head_dim: 4, v_head_dim: 8}",
                9, "does not go with 'mla'"},
        Mistake{"groups: 4", "shared_intermediate: 4\n  groups: 4", 18, "needs 'shared_experts'"}));

TEST(ReadModel, AllDenseLayersLeaveNoPlaceForExperts) {
  const Reading reading =
      read_text(replaced(kSmall, "dense_layers: 1", "dense_layers: [0, 1, 2, 3]"));
  EXPECT_NE(format_problems(reading.problems).find("every layer is dense"), std::string::npos);
}

TEST(ReadModel, AbsurdSizesAreProblemsAndNotOverflow) {
  std::string text = kSmall;
  for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
           {"hidden: 64", "hidden: 131072"},
           {"layers: 4", "layers: 10000"},
           {"routed_experts: 8", "routed_experts: 65536"},
           {"expert_intermediate: 32", "expert_intermediate: 4194304"}}) {
    text = replaced(text, from, to);
  }
  text = replaced(text, "heads: 4\n", "heads: 4\n  head_dim: 128\n");
  const Reading reading = read_text(text);
  ASSERT_EQ(reading.problems.size(), 1U);
  // 3 x 10000 x 131072 x 65536 x 4194304 = 1.08e21
  EXPECT_NE(reading.problems[0].message.find("1.1e+21"), std::string::npos)
      << format_problems(reading.problems);
}

TEST(ReadModel, AbsurdDenseModelIsAProblem) {
  std::string text = std::string(kSmall).substr(0, std::string(kSmall).find("moe:"));
  text = replaced(text, "hidden: 64", "hidden: 131072");
  text = replaced(text, "layers: 4", "layers: 10000");
  text = replaced(text, "intermediate: 96", "intermediate: 4194304");
  text = replaced(text, "heads: 4\n", "heads: 4\n  head_dim: 128\n");
  const Reading reading = read_text(text);
  ASSERT_EQ(reading.problems.size(), 1U);
  EXPECT_NE(reading.problems[0].message.find("parameters"), std::string::npos);
}

TEST(ReadModel, SomethingElseThanAMapIsAProblem) {
  for (const char* text : {"", "3", "[1, 2]", "attention: 3", "moe:", "layers: {}",
                           "\"name\": \"unclosed", "{\"a\": 1"}) {
    EXPECT_FALSE(read_text(text).problems.empty()) << text;
  }
}

}  // namespace
}  // namespace orrery
