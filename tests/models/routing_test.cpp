// Loads of experts, GPUs and nodes: what adds up, what is drawn, and what is read.

#include "models/routing.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "models/stragglers.hpp"
#include "tests/models/models_for_tests.hpp"

namespace orrery {
namespace {

/// V3's: 64 GPUs of 8 a node with 4096 tokens each, two groups.
ExpertGroupShape v3_groups() {
  return {.gpus = 64, .gpus_per_node = 8, .groups = 2, .tokens = 64 * 4096, .tokens_per_gpu = 4096};
}

std::int64_t sum(const std::vector<std::int64_t>& v) {
  return std::accumulate(v.begin(), v.end(), std::int64_t{0});
}

std::vector<Routing> drawn_kinds() {
  RouterDynamics quick;
  quick.steps = 20;
  quick.sequences = 32;
  return {Routing{ZipfPopularity{0.3}, {}}, Routing{ZipfPopularity{3}, {}},
          Routing{ZipfPopularity{0.5}, 0}, Routing{ZipfPopularity{0.5}, 100}, Routing{quick, {}}};
}

TEST(ExpertLoads, TokensAddUpAndNoExpertGetsATokenTwice) {
  const Moe moe = v3_moe();
  const ExpertGroupShape shape = v3_groups();
  for (const Routing& routing : drawn_kinds()) {
    const ExpertLoads loads(routing, moe, shape, 60, 1);
    for (const std::int64_t layer : {3, 60, 61}) {
      for (const std::int64_t micro_batch : {0, 119}) {
        const auto tokens = loads.tokens_of_experts(layer, micro_batch, 1);
        EXPECT_EQ(sum(tokens), 64 * 4096 * 8);
        EXPECT_LE(*std::max_element(tokens.begin(), tokens.end()), 64 * 4096);
        EXPECT_GE(*std::min_element(tokens.begin(), tokens.end()), 0);
      }
    }
  }
}

// Loads of GPUs and nodes are those of their experts, to the rounding of half a level.
TEST(ExpertLoads, GpusAndNodesHaveTheRowsOfTheirExperts) {
  const Moe moe = v3_moe();
  const ExpertGroupShape shape = v3_groups();
  for (const Routing& routing : drawn_kinds()) {
    const ExpertLoads loads(routing, moe, shape, 60, 1);
    const auto tokens = loads.tokens_of_experts(9, 4, 0);
    const GroupLoad group = loads.group_load(9, 4, 0);
    ASSERT_EQ(group.gpu.size(), 64u);
    const double half = 0.5 / kLoadLevels + 1e-12;
    double all = 0;
    double most = 0;
    double most_of_node = 0;
    for (std::size_t n = 0; n < 8; ++n) {
      double of_node = 0;
      for (std::size_t g = 8 * n; g < 8 * (n + 1); ++g) {
        double rows = 0;
        for (std::size_t e = 4 * g; e < 4 * (g + 1); ++e) rows += static_cast<double>(tokens[e]);
        EXPECT_NEAR(load_of(group.gpu[g]), rows / (4096 * 8), half);
        most = std::max(most, rows / (4096 * 8));
        of_node += rows;
        all += load_of(group.gpu[g]);
      }
      most_of_node = std::max(most_of_node, of_node / (8 * 4096 * 8));
    }
    EXPECT_NEAR(all / 64, 1, half);
    EXPECT_NEAR(load_of(group.busiest_gpu), most, half);
    EXPECT_NEAR(load_of(group.busiest_node), most_of_node, half);
  }
}

// The shares of Zipf's law, in whatever order: sorted they are r^-s / sum, and layers differ in
// which expert has which.
TEST(ExpertLoads, ZipfPopularityIsThePowerLaw) {
  const Moe moe = v3_moe();
  const Routing routing{ZipfPopularity{0.5}, 0};
  const ExpertLoads loads(routing, moe, v3_groups(), 60, 1);
  std::vector<double> shares = loads.popularity(5);
  EXPECT_NE(shares, loads.popularity(6));
  EXPECT_EQ(shares, loads.popularity(5));
  std::sort(shares.rbegin(), shares.rend());
  double harmonic = 0;
  for (int r = 1; r <= 256; ++r) harmonic += 1 / std::sqrt(r);
  for (std::size_t r = 0; r < 256; ++r) {
    EXPECT_NEAR(shares[r], 1 / std::sqrt(static_cast<double>(r + 1)) / harmonic, 1e-12);
  }
}

TEST(ExpertLoads, NoExpertIsMorePopularThanEveryToken) {
  const Moe moe = v3_moe();
  const Routing routing{ZipfPopularity{3}, 0};  // the first would get 83 %
  const ExpertLoads loads(routing, moe, v3_groups(), 60, 1);
  const std::vector<double> shares = loads.popularity(5);
  EXPECT_NEAR(std::accumulate(shares.begin(), shares.end(), 0.0), 1, 1e-9);
  EXPECT_DOUBLE_EQ(*std::max_element(shares.begin(), shares.end()), 1.0 / 8);
}

// N independent tokens a GPU and even popularity: the load of a GPU is a share of 64 N 8 choices,
// with standard deviation sqrt((1 - 1/64) 64 / (64 N 8)) of the mean.
TEST(ExpertLoads, VaryLikeTheIndependentTokensTheyAreSaidToBe) {
  const Moe moe = v3_moe();
  for (const std::int64_t independent : {std::int64_t{16}, std::int64_t{256}, kAllTokens}) {
    const Routing routing{ZipfPopularity{0}, independent};
    const ExpertLoads loads(routing, moe, v3_groups(), 60, 3);
    const auto n = static_cast<double>(std::min<std::int64_t>(independent, 4096));
    const double variance = (1 - 1.0 / 64) / (n * 8);
    double squares = 0;
    for (std::int64_t m = 0; m < 100; ++m) {
      const auto tokens = loads.tokens_of_experts(7, m, 0);
      for (std::size_t g = 0; g < 64; ++g) {
        double rows = 0;
        for (std::size_t e = 4 * g; e < 4 * (g + 1); ++e) rows += static_cast<double>(tokens[e]);
        squares += std::pow(rows / (4096 * 8) - 1, 2);
      }
    }
    // 6400 squares: 1.8 % of standard error.
    EXPECT_NEAR(squares / 6400, variance, 0.09 * variance) << independent;
  }
}

TEST(ExpertLoads, AreDrawnForEachByItself) {
  const Moe moe = v3_moe();
  const Routing routing{ZipfPopularity{0.3}, {}};
  const ExpertLoads a(routing, moe, v3_groups(), 60, 1);
  const ExpertLoads b(routing, moe, v3_groups(), 60, 1);
  const ExpertLoads other_seed(routing, moe, v3_groups(), 60, 2);
  const auto first = a.tokens_of_experts(9, 3, 1);
  b.tokens_of_experts(8, 2, 0);
  EXPECT_EQ(b.tokens_of_experts(9, 3, 1), first);
  EXPECT_NE(a.tokens_of_experts(9, 4, 1), first);
  EXPECT_NE(a.tokens_of_experts(9, 3, 0), first);
  EXPECT_NE(a.tokens_of_experts(10, 3, 1), first);
  EXPECT_NE(other_seed.tokens_of_experts(9, 3, 1), first);
}

// What a router's sequences show becomes the variation of micro-batches (Kish's design effect).
TEST(ExpertLoads, OfARouterVaryAsItsSequencesDo) {
  const Moe moe = v3_moe();
  RouterDynamics d;
  d.steps = 0;
  const Routing routing{d, {}};
  const ExpertLoads loads(routing, moe, v3_groups(), 60, 1);
  ASSERT_TRUE(loads.router());
  const double rho = loads.router()->correlation;
  EXPECT_NEAR(static_cast<double>(loads.independent_tokens()), 4096 / (1 + 4095 * rho), 1);
  // Layers have the router's shares, in another order; groups stay together.
  std::vector<double> shares = loads.popularity(5);
  std::vector<double> routers = loads.router()->popularity;
  const auto group_sums = [](const std::vector<double>& v) {
    std::vector<double> sums;
    for (std::size_t g = 0; g < 8; ++g) {
      sums.push_back(std::accumulate(v.begin() + static_cast<std::ptrdiff_t>(32 * g),
                                     v.begin() + static_cast<std::ptrdiff_t>(32 * (g + 1)), 0.0));
    }
    std::sort(sums.begin(), sums.end());
    return sums;
  };
  const auto a = group_sums(shares);
  const auto b = group_sums(routers);
  for (std::size_t g = 0; g < 8; ++g) EXPECT_NEAR(a[g], b[g], 1e-9);
  std::sort(shares.begin(), shares.end());
  std::sort(routers.begin(), routers.end());
  for (std::size_t e = 0; e < 256; ++e) EXPECT_NEAR(shares[e], routers[e], 1e-9);
}

// --- recorded counts -----------------------------------------------------------------------------

class Counts : public testing::Test {
 protected:
  // A name of its own for each test, since tests run side by side.
  std::filesystem::path path_ =
      std::filesystem::temp_directory_path() /
      (std::string("orrery_counts_") +
       testing::UnitTest::GetInstance()->current_test_info()->name() + ".csv");
  Moe moe_{.routed_experts = 4, .top_k = 2};
  Problems problems_;

  RecordedCounts read(const std::string& text) {
    std::ofstream(path_, std::ios::binary) << text;
    const std::int64_t layers[] = {1, 2};
    const std::int64_t also[] = {3};
    return read_counts(path_.string(), moe_, layers, also, problems_);
  }
  void TearDown() override { std::filesystem::remove(path_); }
  std::string said() const {
    std::string text;
    for (const Problem& p : problems_.list()) {
      text +=
          std::to_string(p.at.line) + ":" + std::to_string(p.at.column) + " " + p.message + "\n";
    }
    return text;
  }
};

const char* const kGood =
    "layer,expert,tokens\n1,0,10\n1,1,6\n1,2,4\n1,3,0\n2,3,5\n2,2,5\n2,1,5\n2,0,5\n";

TEST_F(Counts, AreReadAndUsedAsTheyAre) {
  Routing routing{read(kGood), 0};
  ASSERT_EQ(said(), "");
  const ExpertGroupShape shape{
      .gpus = 2, .gpus_per_node = 2, .groups = 1, .tokens = 100, .tokens_per_gpu = 50};
  const ExpertLoads loads(routing, moe_, shape, 2, 1);
  EXPECT_EQ(loads.tokens_of_experts(1, 0, 0), (std::vector<std::int64_t>{100, 60, 40, 0}));
  EXPECT_EQ(loads.tokens_of_experts(1, 7, 0), (std::vector<std::int64_t>{100, 60, 40, 0}));
  EXPECT_EQ(loads.tokens_of_experts(2, 0, 0), (std::vector<std::int64_t>{50, 50, 50, 50}));
  EXPECT_EQ(loads.tokens_of_experts(3, 0, 0),
            loads.tokens_of_experts(2, 0, 0));                           // MTP: as the last
  EXPECT_EQ(load_of(loads.group_load(1, 0, 0).busiest_gpu), 1.6015625);  // 160 of 200, / 128
}

TEST_F(Counts, OfMicroBatchesTakeTurns) {
  Routing routing{read("layer,micro_batch,expert,tokens\n"
                       "1,0,0,2\n1,0,1,2\n1,0,2,0\n1,0,3,0\n1,1,0,0\n1,1,1,0\n1,1,2,2\n1,1,3,2\n"
                       "2,0,0,1\n2,0,1,1\n2,0,2,1\n2,0,3,1\n2,1,0,1\n2,1,1,1\n2,1,2,1\n2,1,3,1\n"),
                  {}};
  ASSERT_EQ(said(), "");
  const ExpertGroupShape shape{
      .gpus = 2, .gpus_per_node = 2, .groups = 1, .tokens = 10, .tokens_per_gpu = 5};
  const ExpertLoads loads(routing, moe_, shape, 2, 1);
  EXPECT_EQ(loads.independent_tokens(), 0);
  EXPECT_EQ(loads.tokens_of_experts(1, 0, 0), (std::vector<std::int64_t>{10, 10, 0, 0}));
  EXPECT_EQ(loads.tokens_of_experts(1, 1, 0), (std::vector<std::int64_t>{0, 0, 10, 10}));
  EXPECT_EQ(loads.tokens_of_experts(1, 2, 0), (std::vector<std::int64_t>{10, 10, 0, 0}));
}

TEST_F(Counts, SayWhereTheyDoNotAddUp) {
  read("layer,expert,tokens\n1,0,10\n1,1,6\n1,2,4\n1,3,0\n2,3,5\n2,2,5\n2,1,5\n2,0,4\n");
  EXPECT_EQ(
      said(),
      "6:1 the counts of layer 2 add up to 19, those of layer 1 to 20: every layer routes the "
      "same 10 tokens to top_k = 2 experts each\n");
}

TEST_F(Counts, SayWhatIsMissingTwiceUnknownOrNoNumber) {
  read("layer,expert,tokens\n1,0,10\n1,0,6\n7,2,4\n1,4,0\n1,x,3\n1,1\n1,1,-3\n");
  EXPECT_EQ(said(),
            "3:3 layer 1 has expert 0 twice, first in line 2\n"
            "4:1 layer 7 has no experts in this model\n"
            "5:3 expert must be a whole number from 0 to 3, not '4'\n"
            "6:3 expert must be a whole number from 0 to 3, not 'x'\n"
            "7:1 2 fields, the first line has 3\n"
            "8:5 tokens must be a whole number from 0 to 1099511627776, not '-3'\n");
}

TEST_F(Counts, SayWhichExpertsAndLayersAreMissing) {
  read("layer,expert,tokens\n1,0,10\n1,1,6\n1,2,4\n");
  EXPECT_EQ(said(), "1:1 there is no row for layer 2\n2:1 layer 1 has no row for expert 3\n");
}

TEST_F(Counts, NeedAHeaderAndWholeTokens) {
  read("1,0,10\n");
  EXPECT_EQ(said(),
            "1:1 the first line must be 'layer,expert,tokens' or "
            "'layer,micro_batch,expert,tokens'\n");
  problems_ = {};
  read("");
  EXPECT_EQ(said(), "0:0 is empty\n");
  problems_ = {};
  read("layer,expert,tokens\n1,0,9\n1,1,6\n1,2,4\n1,3,0\n2,0,9\n2,1,6\n2,2,4\n2,3,0\n");
  EXPECT_EQ(said(),
            "2:1 the counts of layer 1 add up to 19, which is not a number of tokens times top_k = "
            "2\n");
  problems_ = {};
  read("layer,expert,tokens\n1,0,12\n1,1,4\n1,2,4\n1,3,0\n2,0,5\n2,1,5\n2,2,5\n2,3,5\n");
  EXPECT_EQ(said(), "2:1 12 tokens for one expert, but there are only 20 / top_k = 10 tokens\n");
}

// --- stragglers ----------------------------------------------------------------------------------

TEST(Stragglers, AreWhoTheyAreSaidToBe) {
  EXPECT_TRUE(slowdowns({}, 32, 8, 1).empty());
  EXPECT_TRUE(slowdowns({SlowGpu{3, 1}}, 32, 8, 1).empty());
  const std::vector<double> f = slowdowns({SlowGpu{17, 1.5}, SlowNode{2, 1.25}}, 32, 8, 1);
  for (std::size_t g = 0; g < 32; ++g) {
    EXPECT_DOUBLE_EQ(f[g], g == 17 ? 1.875 : g / 8 == 2 ? 1.25 : 1) << g;
  }
}

TEST(Stragglers, AShareIsThatManyGpus) {
  const std::vector<double> f = slowdowns({SlowShare{0.01, 1.05}}, 2048, 8, 7);
  EXPECT_EQ(std::count(f.begin(), f.end(), 1.05), 20);
  EXPECT_EQ(std::count(f.begin(), f.end(), 1.0), 2028);
  EXPECT_EQ(f, slowdowns({SlowShare{0.01, 1.05}}, 2048, 8, 7));
  EXPECT_NE(f, slowdowns({SlowShare{0.01, 1.05}}, 2048, 8, 8));
}

TEST(Stragglers, SpreadIsLogNormal) {
  const std::vector<double> f = slowdowns({SpeedSpread{0.05}}, 20000, 8, 7);
  double sum = 0;
  double squares = 0;
  for (const double x : f) {
    sum += std::log(x);
    squares += std::log(x) * std::log(x);
  }
  EXPECT_NEAR(sum / 20000, 0, 5 * 0.05 / std::sqrt(20000.0));
  EXPECT_NEAR(std::sqrt(squares / 20000), 0.05, 5 * 0.05 / std::sqrt(40000.0));
}

}  // namespace
}  // namespace orrery
