#include "reports/scaling.hpp"

#include <gtest/gtest.h>

#include <algorithm>

namespace orrery {
namespace {

const ScalingPoint* at(const ScalingCurve& curve, std::int64_t gpus) {
  const auto found = std::find_if(curve.points.begin(), curve.points.end(),
                                  [&](const ScalingPoint& p) { return p.gpus == gpus; });
  return found == curve.points.end() ? nullptr : &*found;
}

/// 64 H100 as TP4 PP4 DP2 CP2, and what a user would write for half and for twice of them.
class LlamaScaling : public testing::Test {
 protected:
  static const Study& study() {
    static const Study own =
        study_step(read_scenario(ORRERY_SOURCE_DIR "/scenarios/llama3_70b_64_h100.yaml"));
    return own;
  }
  static const Scaling& curves() {
    static const Scaling made = scaling(study());
    return made;
  }
  static Report of(std::int64_t nodes, std::int64_t dp, std::int64_t batch, Network network) {
    Scenario s = study().scenario;
    s.cluster.nodes = nodes;
    s.plan.parallelism.dp = dp;
    s.plan.global_batch_sequences = batch;
    return study_step(s, {.network = network}).report;
  }
};

TEST_F(LlamaScaling, HasTheScenarioItself) {
  const Plan& plan = study().scenario.plan;
  for (const ScalingCurve* curve : {&curves().same_batch, &curves().growing_batch}) {
    const ScalingPoint* own = at(*curve, 64);
    ASSERT_NE(own, nullptr);
    EXPECT_EQ(own->step_time_s, study().report.step_time_s);
    EXPECT_EQ(own->efficiency, 1);
    EXPECT_EQ(own->dp, plan.parallelism.dp);
    EXPECT_EQ(own->global_batch, plan.global_batch_sequences);
    EXPECT_TRUE(own->flows);
  }
}

TEST_F(LlamaScaling, PointsAreStepsOfTheirOwn) {
  const Plan& plan = study().scenario.plan;
  const std::int64_t nodes = study().scenario.cluster.nodes;
  const Report half =
      of(nodes / 2, plan.parallelism.dp / 2, plan.global_batch_sequences, Network::flows);
  const ScalingPoint* point = at(curves().same_batch, 32);
  ASSERT_NE(point, nullptr);
  EXPECT_EQ(point->step_time_s, half.step_time_s);
  EXPECT_EQ(point->efficiency, half.tokens_per_s_per_gpu / study().report.tokens_per_s_per_gpu);
  EXPECT_EQ(point->micro_batches, 2 * plan.micro_batches());

  // Beyond the fabric: by formula, with the factor that flows make of the own step.
  const Report twice =
      of(2 * nodes, 2 * plan.parallelism.dp, 2 * plan.global_batch_sequences, Network::formula);
  const Report own = of(nodes, plan.parallelism.dp, plan.global_batch_sequences, Network::formula);
  const ScalingPoint* large = at(curves().growing_batch, 128);
  ASSERT_NE(large, nullptr);
  EXPECT_FALSE(large->flows);
  EXPECT_DOUBLE_EQ(large->step_time_s,
                   twice.step_time_s * study().report.step_time_s / own.step_time_s);
}

// GPipe's bubble is (p - 1) / m of the work, so fewer micro-batches a pipeline cost more;
// interleaving does not change that order.
TEST_F(LlamaScaling, TheSameBatchOnMoreGpusIsLessEfficient) {
  const auto& points = curves().same_batch.points;
  ASSERT_GE(points.size(), 3u);
  for (std::size_t i = 1; i < points.size(); ++i) {
    EXPECT_GT(points[i].gpus, points[i - 1].gpus);
    EXPECT_LT(points[i].efficiency, points[i - 1].efficiency);
  }
}

TEST(Scaling, SaysWhyASizeDoesNotComeOut) {
  // 64 experts-parallel ranks of V3's positions need a DP of 64 at least.
  const Study study =
      study_step(read_scenario(ORRERY_SOURCE_DIR "/scenarios/deepseek_v3_2048_h800.yaml"),
                 {.network = Network::formula});
  const Scaling s = scaling(study);
  EXPECT_EQ(at(s.growing_batch, 512), nullptr);
  EXPECT_TRUE(
      std::any_of(s.growing_batch.left_out.begin(), s.growing_batch.left_out.end(),
                  [](const ScalingGap& gap) { return gap.gpus == 512 && !gap.why.empty(); }));
}

}  // namespace
}  // namespace orrery
