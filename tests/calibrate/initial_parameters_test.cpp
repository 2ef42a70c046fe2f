#include "calibrate/initial_parameters.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "tests/models/models_for_tests.hpp"

namespace orrery {
namespace {

std::map<std::string, Parameter> by_name(const Model& model) {
  std::map<std::string, Parameter> all;
  for (const Parameter& p : parameters_of(model)) all[p.name] = p;
  return all;
}

/// The counts are held to published ones (tests/models/count_test.cpp).
TEST(Parameters, AreAsManyAsTheModelIsCountedToHave) {
  int executable = 0;
  for (const auto& file :
       std::filesystem::directory_iterator(std::string(ORRERY_SOURCE_DIR) + "/scenarios/models")) {
    const Model model = shipped(file.path().stem().string());
    if (!why_not_executable(model).empty()) continue;
    ++executable;
    std::int64_t elements = 0;
    std::set<std::string> names;
    for (const Parameter& p : parameters_of(model)) {
      elements += p.elements();
      EXPECT_TRUE(names.insert(p.name).second) << p.name;
    }
    const ParameterCount count = count_parameters(model);
    EXPECT_EQ(elements, count.total() + count.mtp) << model.name;
  }
  EXPECT_GE(executable, 10);
}

TEST(Parameters, OfATinyDeepSeekHaveTheShapesOfItsLayers) {
  const auto all = by_name(shipped("tiny_deepseek"));
  const auto expect = [&](const std::string& name, std::int64_t matrices, std::int64_t rows,
                          std::int64_t columns) {
    ASSERT_TRUE(all.contains(name)) << name;
    EXPECT_EQ(all.at(name).matrices, matrices) << name;
    EXPECT_EQ(all.at(name).rows, rows) << name;
    EXPECT_EQ(all.at(name).columns, columns) << name;
  };
  expect("layers.0.q_b", 1, 4 * (128 + 64), 128);
  expect("layers.0.kv_a", 1, 128 + 64, 256);
  expect("layers.0.kv_b", 1, 4 * (128 + 128), 128);
  expect("layers.0.ffn_up", 1, 2 * 512, 256);
  EXPECT_FALSE(all.contains("layers.0.gate"));
  expect("layers.1.gate", 1, 8, 256);
  expect("layers.1.router_bias", 1, 1, 8);
  expect("layers.1.routed_up", 8, 2 * 128, 256);
  expect("layers.1.routed_down", 8, 256, 128);
  expect("layers.1.shared_down", 1, 256, 128);
  EXPECT_FALSE(all.contains("layers.1.ffn_up"));
  expect("mtp.0.projection", 1, 256, 512);
  expect("layers.4.routed_up", 8, 2 * 128, 256);  // the MTP module's block
  EXPECT_FALSE(all.contains("layers.5.o"));
}

TEST(Parameters, ModelsThatCannotBeExecutedSayWhy) {
  using Reasons = std::vector<std::string>;
  EXPECT_EQ(why_not_executable(shipped("gpt3_175b")),
            (Reasons{"its norms are not RMSNorm", "its activation is not SwiGLU",
                     "its positions are learned, and only rotary ones are executed",
                     "its linear layers have biases"}));
  EXPECT_EQ(why_not_executable(shipped("qwen2_5_7b")), Reasons{"its linear layers have biases"});
  EXPECT_EQ(why_not_executable(shipped("deepseek_v3")), Reasons());
  EXPECT_EQ(why_not_executable(shipped("llama3_405b")), Reasons());
}

TEST(InitialValues, OfAPartAreThoseOfTheWhole) {
  const Parameter p = {"layers.3.routed_up", ParameterKind::matrix, 4, 5, 7};
  const std::vector<float> whole = initial_values({.seed = 9}, p);
  ASSERT_EQ(whole.size(), 140U);
  for (std::int64_t first_row = 0; first_row < 20; first_row += 3) {
    for (std::int64_t first_column = 0; first_column < 7; ++first_column) {
      const ParameterPart part = {first_row, std::min<std::int64_t>(4, 20 - first_row),
                                  first_column, 7 - first_column};
      std::vector<float> out(40, -1);
      fill_initial_values({.seed = 9}, p, part, out.data(), 9);
      for (std::int64_t r = 0; r < part.rows; ++r) {
        for (std::int64_t c = 0; c < 9; ++c) {
          const float expected =
              c < part.columns
                  ? whole[static_cast<std::size_t>((first_row + r) * 7 + first_column + c)]
                  : -1.0F;
          EXPECT_EQ(out[static_cast<std::size_t>(r * 9 + c)], expected);
        }
      }
    }
  }
}

TEST(InitialValues, AreNormal) {
  const Parameter p = {"head", ParameterKind::matrix, 1, 400, 500};
  const std::vector<float> values = initial_values({.seed = 1, .deviation = 0.02}, p);
  double moments[4] = {};
  double neighbours = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double z = values[i] / 0.02;
    for (int m = 0; m < 4; ++m) moments[m] += std::pow(z, m + 1);
    if (i > 0) neighbours += z * values[i - 1] / 0.02;
  }
  const auto n = static_cast<double>(values.size());
  // Within five standard errors, which follow from the normal's moments 0, 1, 0, 3 (.., 15, 105).
  EXPECT_NEAR(moments[0] / n, 0, 5 * std::sqrt(1 / n));
  EXPECT_NEAR(moments[1] / n, 1, 5 * std::sqrt(2 / n));
  EXPECT_NEAR(moments[2] / n, 0, 5 * std::sqrt(15 / n));
  EXPECT_NEAR(moments[3] / n, 3, 5 * std::sqrt(96 / n));
  EXPECT_NEAR(neighbours / n, 0, 5 * std::sqrt(1 / n));
}

TEST(InitialValues, DependOnSeedAndNameAndKind) {
  const Parameter p = {"layers.0.o", ParameterKind::matrix, 1, 10, 10};
  Parameter q = p;
  q.name = "layers.1.o";
  const std::vector<float> values = initial_values({.seed = 1}, p);
  EXPECT_EQ(values, initial_values({.seed = 1}, p));
  EXPECT_NE(values, initial_values({.seed = 2}, p));
  EXPECT_NE(values, initial_values({.seed = 1}, q));
  q.kind = ParameterKind::gain;
  EXPECT_EQ(initial_values({.seed = 1}, q), std::vector<float>(100, 1));
  q.kind = ParameterKind::selection_bias;
  EXPECT_EQ(initial_values({.seed = 1}, q), std::vector<float>(100, 0));
}

}  // namespace
}  // namespace orrery
