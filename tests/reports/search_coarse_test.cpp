// The coarse evaluation against the full simulation: two ways to the same step.

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "models/plan_rules.hpp"
#include "reports/search/coarse.hpp"
#include "reports/study.hpp"

namespace orrery {
namespace {

const std::string kScenarios = std::string(ORRERY_SOURCE_DIR) + "/scenarios/";
constexpr double kNoLimit = 1e18;

/// A possible plan drawn for a scenario, on as many of its nodes as is quick to simulate.
class PlanDraw {
 public:
  PlanDraw(const Scenario& scenario, std::int64_t nodes, unsigned seed)
      : scenario_(scenario), nodes_(nodes), random_(seed) {}

  Candidate operator()() {
    for (;;) {
      Candidate candidate{.nodes = nodes_, .plan = scenario_.plan};
      if (draw(candidate.plan)) return candidate;
    }
  }

 private:
  template <class T>
  T any(std::initializer_list<T> values) {
    return values.begin()[random_() % values.size()];
  }

  bool draw(Plan& plan) {
    const Model& model = scenario_.model;
    Cluster cluster = scenario_.cluster;
    cluster.nodes = nodes_;
    Parallelism& p = plan.parallelism;
    p = {};
    p.tp = any<std::int64_t>({1, 1, 2, 4, 8});
    p.cp = any<std::int64_t>({1, 1, 1, 2});
    p.pp = any<std::int64_t>({1, 2, 3, 4, 8});
    if (model.moe) {
      p.ep = any<std::int64_t>({1, 2, 8, 16});
      p.expert_tp = any<std::int64_t>({1, 1, 1, 2});
    }
    p.zero_stage = any({0, 1, 2, 3});
    p.sequence_parallel = any({true, true, false});
    plan.schedule = any({ScheduleKind::gpipe, ScheduleKind::one_f_one_b,
                         ScheduleKind::interleaved_1f1b, ScheduleKind::zb_h1, ScheduleKind::zb_v,
                         ScheduleKind::dual_pipe, ScheduleKind::dual_pipe_v});
    plan.chunks = plan.schedule == ScheduleKind::interleaved_1f1b ? any({2, 3})
                  : plan.schedule == ScheduleKind::gpipe ||
                          plan.schedule == ScheduleKind::one_f_one_b ||
                          plan.schedule == ScheduleKind::zb_h1
                      ? 1
                      : 2;
    plan.micro_batch_sequences = any<std::int64_t>({1, 1, 2});
    const auto kind =
        any({PrecisionKind::bf16, PrecisionKind::fp8_tensor, PrecisionKind::fp8_deepseek});
    plan.precision = make_precision(kind);
    plan.recompute = any<Recompute>(
        {{}, {.full = true}, {.attention_core = true}, {.norms = true, .activation = true}});
    plan.communication_sms = any({0, 20});
    if (!check_precision(plan.precision, scenario_.profile.device).empty()) return false;
    if (!check_world(p, false, cluster).empty() || !check_expert_block(p).empty() ||
        !check_split_of_model(p, model).empty()) {
      return false;
    }
    plan.global_batch_sequences =
        plan.micro_batch_sequences * p.dp * any<std::int64_t>({1, 4, 8, 12, 18});
    if (!check_tokens(plan).empty() || !check_batch(plan).empty() ||
        !check_sequence_split(plan).empty() || !check_schedule(plan).empty() ||
        !check_even_split(plan, model).empty()) {
      return false;
    }
    return check_stages(plan, even_split(model.layers, stage_count(plan)), -1, model, plan.stages)
        .empty();
  }

  const Scenario& scenario_;
  std::int64_t nodes_;
  std::mt19937 random_;
};

struct Worst {
  double memory_gap = 0;  ///< of the coarse bound below the full peak, relative
  /// Largest difference of a phase, over the step. Without ZeRO 2 and 3: their gathers start long
  /// before what they are for, so that one cell's time covers the next one's computation.
  double phase_gap = 0;
  int candidates = 0;
};

void expect_equal(const Scenario& scenario, const std::vector<Candidate>& candidates,
                  Worst& worst) {
  const std::vector<CoarseStep> steps = CoarseModel(scenario).evaluate(candidates, kNoLimit);
  ASSERT_EQ(steps.size(), candidates.size());
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const std::string key = key_of(candidates[i]);
    const Study study =
        study_step(with_candidate(scenario, candidates[i]), {.network = Network::formula});
    EXPECT_EQ(steps[i].time_ps, study.run.timeline.makespan_ps()) << key;
    ++worst.candidates;
    std::int64_t peak = 0;
    for (const RankReport& rank : study.report.ranks) {
      peak = std::max(peak, rank.memory_peak_bytes);
    }
    EXPECT_LE(steps[i].memory_peak_bytes, peak) << key;
    const auto gap = static_cast<double>(peak - steps[i].memory_peak_bytes);
    worst.memory_gap = std::max(worst.memory_gap, gap / static_cast<double>(peak));
    const PhaseTimes& a = steps[i].phases_s;
    const PhaseTimes& b = study.report.phases_s;
    EXPECT_NEAR(a.sum(), study.report.step_time_s, 1e-9 * study.report.step_time_s) << key;
    if (candidates[i].plan.parallelism.zero_stage >= 2) continue;
    for (const double difference :
         {a.forward - b.forward, a.backward - b.backward, a.weight - b.weight,
          a.overlapped - b.overlapped, a.bubble - b.bubble, a.optimizer - b.optimizer,
          a.exposed_communication - b.exposed_communication}) {
      worst.phase_gap = std::max(worst.phase_gap, std::abs(difference) / study.report.step_time_s);
    }
  }
}

TEST(CoarseStep, TakesWhatTheFullSimulationTakes) {
  Worst all;
  for (const auto& [file, nodes] :
       {std::pair<const char*, std::int64_t>{"deepseek_v3_2048_h800.yaml", 16},
        {"llama3_70b_64_h100.yaml", 8},
        {"mixtral_8x7b_64_h100.yaml", 6},
        {"qwen3_235b_256_h100.yaml", 8},
        {"gpt3_175b_64_a100.yaml", 3},
        {"deepseek_v2_2048_h800.yaml", 4}}) {
    const Scenario scenario = read_scenario(kScenarios + file);
    PlanDraw draw(scenario, nodes, 2026);
    std::vector<Candidate> candidates;
    for (int i = 0; i < 100; ++i) candidates.push_back(draw());
    Worst worst;
    expect_equal(scenario, candidates, worst);
    fmt::print("{:32} {} candidates: memory bound at most {:.2f} % below, a phase {:.2f} % off\n",
               file, worst.candidates, 100 * worst.memory_gap, 100 * worst.phase_gap);
    all.memory_gap = std::max(all.memory_gap, worst.memory_gap);
    all.phase_gap = std::max(all.phase_gap, worst.phase_gap);
  }
  // The bound of memory is not far below the truth, else it would prune nothing.
  EXPECT_LT(all.memory_gap, 0.10);
  EXPECT_LT(all.phase_gap, 0.10);
}

TEST(CoarseStep, OfThePublishedLayoutIsThePublishedStep) {
  const Scenario scenario = read_scenario(kScenarios + "deepseek_v3_2048_h800.yaml");
  Worst worst;
  expect_equal(scenario, {{scenario.cluster.nodes, scenario.plan}}, worst);
}

TEST(CoarseStep, KnowsStragglersAndCheckpoints) {
  Scenario scenario = read_scenario(kScenarios + "mixtral_8x7b_64_h100.yaml");
  scenario.seed = 7;
  scenario.stragglers = {SpeedSpread{0.05}};
  scenario.plan.checkpoint = Checkpoint{.bytes_per_s = 2e9, .own_network = false};
  Worst worst;
  expect_equal(scenario, {{scenario.cluster.nodes, scenario.plan}}, worst);
}

TEST(CoarseStep, DoesNotDependOnWhatWasAskedBefore) {
  const Scenario scenario = read_scenario(kScenarios + "mixtral_8x7b_64_h100.yaml");
  PlanDraw draw(scenario, 8, 5);
  std::vector<Candidate> candidates;
  for (int i = 0; i < 30; ++i) candidates.push_back(draw());
  const std::vector<CoarseStep> together = CoarseModel(scenario).evaluate(candidates, kNoLimit);
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const CoarseStep alone = CoarseModel(scenario).evaluate({&candidates[i], 1}, kNoLimit).front();
    EXPECT_EQ(alone.time_ps, together[i].time_ps) << key_of(candidates[i]);
    EXPECT_EQ(alone.memory_peak_bytes, together[i].memory_peak_bytes) << key_of(candidates[i]);
  }
}

}  // namespace
}  // namespace orrery
