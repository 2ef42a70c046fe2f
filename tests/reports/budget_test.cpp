// Whole programmes: arithmetic against closed forms and a step-by-step replay, money and energy by
// hand, and what DeepSeek published.

#include "reports/budget/budget.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "reports/study.hpp"

namespace orrery {
namespace {

using nlohmann::json;

const std::string kScenarios = std::string(ORRERY_SOURCE_DIR) + "/scenarios/";

/// A recipe from text; its paths are relative to scenarios/recipes.
Recipe recipe_of(const std::string& text) {
  // Read through a file, as users do.
  const std::string path = testing::TempDir() + fmt::format("orrery_recipe_{}.yaml", text.size());
  std::string absolute = text;
  for (std::size_t at = 0; (at = absolute.find("../", at)) != std::string::npos;) {
    absolute.replace(at, 3, kScenarios);
  }
  std::ofstream(path) << absolute;
  return read_recipe(path);
}

/// A small model on one node: milliseconds to simulate.
std::string one_stage(const std::string& amount, const std::string& top = "") {
  const std::string scenario = testing::TempDir() + "orrery_small.yaml";
  std::ofstream(scenario)
      << "name: small\nmodel: " + kScenarios + "models/llama3_8b.yaml\ncluster: " + kScenarios +
             "clusters/h100_node.yaml\nplan: {layout: {tp: 4, dp: 2}, schedule: "
             "1f1b, sequence_length: 4096, global_batch: 32, precision: bf16}\n";
  return fmt::format(
      "name: test\n{}\nstages:\n  - {{name: s, kind: pre_training, scenario: {}, {}}}\n", top,
      scenario, amount);
}

std::int64_t sequences_of(const std::vector<BatchRun>& runs) {
  std::int64_t sum = 0;
  for (const BatchRun& run : runs) sum += run.batch * run.steps;
  return sum;
}

TEST(BudgetBatches, AConstantBatchTakesWholeSteps) {
  // V3 report 4.2: 14.8T tokens, 15360 sequences of 4096: 235,239.7 steps.
  EXPECT_EQ(batches(TokenCount{14'800'000'000'000}, {}, 15360, 4096),
            (std::vector<BatchRun>{{15360, 235'240}}));
  EXPECT_EQ(batches(TokenCount{15360 * 4096}, {}, 15360, 4096),
            (std::vector<BatchRun>{{15360, 1}}));
  EXPECT_EQ(batches(TokenCount{15360 * 4096 + 1}, {}, 15360, 4096),
            (std::vector<BatchRun>{{15360, 2}}));
  EXPECT_EQ(batches(StepCount{1000}, {}, 1920, 32768), (std::vector<BatchRun>{{1920, 1000}}));
}

TEST(BudgetBatches, SamplesArePackedIntoSequences) {
  // 800 samples twice of 512 tokens fill 8/10 of 256 sequences of 4000.
  const SampleSet samples{.samples = 800, .epochs = 2, .mean_tokens = 512, .packing = 0.8};
  EXPECT_EQ(batches(samples, {}, 64, 4000), (std::vector<BatchRun>{{64, 4}}));
}

TEST(BudgetBatches, ARampByHand) {
  // Sizes 2, 4, 6 for 8 sequences each: 4 steps, 2 steps, then 8 sequences by 6, which overshoots
  // by 4; 100 - 28 = 72 are left: 9 steps of 8.
  const Ramp ramp{.from = 2, .increment = 2, .tokens = 24 * 10};
  EXPECT_EQ(batches(TokenCount{1000}, ramp, 8, 10),
            (std::vector<BatchRun>{{2, 4}, {4, 2}, {6, 2}, {8, 9}}));
}

TEST(BudgetBatches, AStageThatEndsWithinItsRampIsCutThere) {
  const Ramp ramp{.from = 2, .increment = 2, .tokens = 24 * 10};
  EXPECT_EQ(batches(TokenCount{100}, ramp, 8, 10), (std::vector<BatchRun>{{2, 4}, {4, 1}}));
  EXPECT_EQ(batches(StepCount{5}, ramp, 8, 10), (std::vector<BatchRun>{{2, 4}, {4, 1}}));
}

TEST(BudgetBatches, ARampIsMegatronsStepByStep) {
  rc::check([] {
    const auto from = *rc::gen::inRange<std::int64_t>(1, 20);
    const auto increment = *rc::gen::inRange<std::int64_t>(1, 9);
    const auto sizes = *rc::gen::inRange<std::int64_t>(1, 9);
    const std::int64_t batch = from + sizes * increment;
    // A whole number of sequences a size, as Megatron-LM demands.
    const std::int64_t share = *rc::gen::inRange<std::int64_t>(1, 300);
    const std::int64_t wanted = *rc::gen::inRange<std::int64_t>(1, 4000);
    constexpr std::int64_t kLength = 7;
    const auto runs = batches(TokenCount{wanted * kLength},
                              Ramp{from, increment, share * sizes * kLength}, batch, kLength);
    // Megatron-LM's rule (num_microbatches_calculator): the size by the samples consumed so far.
    std::vector<BatchRun> replay;
    for (std::int64_t consumed = 0; consumed < wanted;) {
      const std::int64_t size = from + std::min(sizes, consumed / share) * increment;
      if (replay.empty() || replay.back().batch != size) replay.push_back({size, 0});
      ++replay.back().steps;
      consumed += size;
    }
    RC_ASSERT(runs == replay);
    RC_ASSERT(sequences_of(runs) >= wanted);
  });
}

TEST(BudgetBill, RentEnergyAndGpuHoursByHand) {
  Recipe recipe;
  recipe.money = Money{Rent{2}, ""};
  recipe.power = Power{.node_w = 8000, .network_w_per_gpu = 100, .pue = 1.25};
  // 2048 GPUs for 10 hours: 20,480 GPU-hours, $40,960; 1000 + 100 W each: 22,528 kWh, 28,160 at the
  // meter.
  const Bill bill = bill_of(recipe, 36'000, 2048, 8);
  EXPECT_DOUBLE_EQ(bill.gpu_hours, 20'480);
  EXPECT_DOUBLE_EQ(bill.cost_usd, 40'960);
  EXPECT_DOUBLE_EQ(bill.energy_kwh, 28'160);
}

TEST(BudgetBill, APurchaseIsWrittenOffOverItsUsedHours) {
  // $35,040 over four years of 8760 hours at half use: $2 an hour; 0.3 to operate; 1 kW at $0.1.
  Recipe recipe;
  recipe.money = Money{Purchase{.usd_per_gpu = 35'040,
                                .life_s = 4 * 8760 * 3600.0,
                                .utilisation = 0.5,
                                .usd_per_kwh = 0.1,
                                .operation_usd_per_gpu_hour = 0.3},
                       ""};
  recipe.power = Power{.node_w = 8000, .network_w_per_gpu = 0, .pue = 1};
  EXPECT_NEAR(bill_of(recipe, 3600, 100, 8).cost_usd, 100 * 2.4, 1e-9);
}

TEST(Budget, AStageIsItsStepsTimesTheSimulatedStep) {
  const Recipe recipe = recipe_of(one_stage("steps: 1000", "goodput: {factor: 0.8, source: x}"));
  const double step_s = study_step(recipe.stages[0].runs[0].scenario).report.step_time_s;
  const Budget b = make_budget(recipe);
  EXPECT_DOUBLE_EQ(b.stages[0].training_s, 1000 * step_s);
  EXPECT_DOUBLE_EQ(b.total.wall_s, 1000 * step_s / 0.8);
  EXPECT_DOUBLE_EQ(b.total.gpu_hours, 8 * b.total.wall_s / 3600);
  EXPECT_NEAR(b.stages[0].lost_s, 250 * step_s, 1e-6 * step_s);
  EXPECT_EQ(b.stages[0].tokens, 1000.0 * 32 * 4096);
}

TEST(Budget, OverridesReachTheScenario) {
  const Recipe recipe = recipe_of(one_stage(
      "steps: 1, set: [model.layers=16, cluster.name=half, plan.layout.tp=8, plan.layout.dp=1, "
      "plan.sequence_length=8192]"));
  const Scenario& s = recipe.stages[0].runs[0].scenario;
  EXPECT_EQ(s.model.layers, 16);
  EXPECT_EQ(s.model.hidden, 4096);  // as the file says
  EXPECT_EQ(s.cluster.name, "half");
  EXPECT_EQ(s.plan.parallelism.tp, 8);
  EXPECT_EQ(s.plan.sequence_length, 8192);
  EXPECT_EQ(s.plan.global_batch_sequences, 32);
}

TEST(Budget, MtpModulesCanBeLeftOut) {
  const auto v3 = [](const std::string& set) {
    return recipe_of(
        "name: t\nstages:\n  - {name: s, kind: pre_training, steps: 1, scenario: "
        "../deepseek_v3_2048_h800.yaml" +
        set + "}\n");
  };
  const Budget with = make_budget(v3(""));
  const Budget without = make_budget(v3(", set: [model.mtp_modules=0]"));
  // One of 62 layers, and a second head.
  const double ratio = without.stages[0].training_s / with.stages[0].training_s;
  EXPECT_LT(ratio, 1);
  EXPECT_GT(ratio, 0.9);
}

TEST(Budget, EvaluationIsForwardPassesOnly) {
  // As many tokens as a step has, after each step: a third of the step's work, without its bubble.
  const Budget b = make_budget(recipe_of(
      one_stage(fmt::format("steps: 10, evaluation: {{every: 1, tokens: {}}}", 32 * 4096))));
  const double ratio = b.stages[0].evaluation_s / b.stages[0].training_s;
  EXPECT_GT(ratio, 0.2);
  EXPECT_LT(ratio, 0.4);
  EXPECT_DOUBLE_EQ(b.total.wall_s, b.stages[0].training_s + b.stages[0].evaluation_s);
}

TEST(Budget, AStageThatDoesNotFitNamesAPlanThatDoes) {
  const std::string text = one_stage(
      "steps: 1, set: [plan.sequence_length=65536, plan.global_batch=4, plan.layout.tp=2, "
      "plan.layout.dp=4{}]");
  const auto with = [&](const std::string& more) {
    std::string changed = text;
    return changed.replace(changed.find("{}"), 2, more);
  };
  const Budget b = make_budget(recipe_of(with("")));
  ASSERT_FALSE(b.fits());
  const Unfit& unfit = *b.stages[0].unfit;
  EXPECT_GT(unfit.peak_bytes, unfit.capacity_bytes);
  // "set: [plan. ...] fits, with ...": set so in the recipe, it does.
  const std::size_t begin = unfit.nearest.find('[') + 1;
  ASSERT_NE(begin, 0U) << unfit.nearest;
  const std::string change = unfit.nearest.substr(begin, unfit.nearest.find(']') - begin);
  EXPECT_TRUE(make_budget(recipe_of(with(", " + change))).fits()) << change;
}

TEST(Budget, FailuresAreSimulatedFromWhatFails) {
  const Budget b = make_budget(
      recipe_of(one_stage("steps: 100000", "reliability: ../reliability/h100_llama3.yaml")));
  const StageBudget& stage = b.stages[0];
  ASSERT_TRUE(stage.goodput && stage.gpu_hours);
  EXPECT_GT(stage.goodput->p50, 0.5);
  EXPECT_LT(stage.goodput->p50, 1);
  EXPECT_DOUBLE_EQ(stage.bill.wall_s, stage.training_s / stage.goodput->p50);
  EXPECT_TRUE(stage.gpu_hours->contains(stage.bill.gpu_hours));
  EXPECT_NEAR(stage.gpu_hours->p90, 8 * stage.training_s / 3600 / stage.goodput->p10,
              1e-3 * stage.gpu_hours->p90);
}

TEST(Budget, PricesErrorsWidenTheHours) {
  const Budget b = make_budget(recipe_of(one_stage("steps: 100")), {.uncertainty = true});
  ASSERT_TRUE(b.gpu_hours);
  EXPECT_LT(b.gpu_hours->p10, b.total.gpu_hours);
  EXPECT_GT(b.gpu_hours->p90, b.total.gpu_hours);
}

TEST(Budget, ReinforcementLearningTakesTurns) {
  const std::string file = testing::TempDir() + "orrery_small_generation.yaml";
  std::ofstream(file) << "name: small\nmodel: " + kScenarios +
                             "models/llama3_8b.yaml\ncluster: " + kScenarios +
                             "clusters/h100_node.yaml\ngeneration: {layout: {tp: 1, dp: 8}, "
                             "prompt: 100, output: 900, rollout: {prompts: 64, outputs_per_prompt: "
                             "4, output: 900}}\n";
  std::string text = one_stage(fmt::format(
      "steps: 9, rollout: {{generation: {}, steps: 4, packing: 80 %, switch: 2 s, reference: 2}}",
      file));
  text.replace(text.find("pre_training"), 12, "reinforcement_learning");
  const Recipe recipe = recipe_of(text);
  const Stage& stage = recipe.stages[0];
  // 256 outputs of 1000 tokens with their prompts, a quarter a step, in sequences of 4096 that are
  // 80 % full: 19.5 of them, on two replicas.
  EXPECT_EQ(stage.runs[0].scenario.plan.global_batch_sequences, 20);
  const Budget b = make_budget(recipe);
  const RolloutBudget& r = *b.stages[0].rollouts;
  EXPECT_EQ(r.rollouts, 3);  // the last one for a single step
  EXPECT_DOUBLE_EQ(r.tokens, 256'000);
  const RolloutEstimate one =
      estimate_rollout(stage.rollouts->instance, stage.rollouts->instances, stage.rollouts->work);
  EXPECT_DOUBLE_EQ(r.generation_s, 3 * one.seconds);
  EXPECT_DOUBLE_EQ(r.switch_s, 6);
  // Two forward passes over what is trained on once: some two thirds of training's compute.
  EXPECT_NEAR(r.reference_s / b.stages[0].training_s, 2.0 / 3 * 12 / 9, 0.35);
  EXPECT_DOUBLE_EQ(b.total.wall_s, b.stages[0].training_s + r.generation_s + r.reference_s + 6);
}

TEST(Budget, WritersAgreeWithTheValues) {
  const Budget b = make_budget(recipe_of(one_stage(
      "steps: 100", "price: {gpu_hour: 2 USD, source: x}\npower: {node: 8 kW, source: y}")));
  const json j = json::parse(to_json(b));
  EXPECT_EQ(j.at("total").at("cost_usd").get<double>(), b.total.cost_usd);
  EXPECT_EQ(j.at("stages")[0].at("runs")[0].at("steps"), 100);
  const std::string csv = to_csv(b);
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 2);
  EXPECT_EQ(csv.find(fmt::format("\n{},USD,Usage,s,", b.total.cost_usd)), csv.find('\n')) << csv;
  EXPECT_NE(to_terminal(b).find("$2 a GPU-hour"), std::string::npos) << to_terminal(b);
}

// What is published, with the errors that were found (README): the bounds are those and no aims.
TEST(BudgetPublished, DeepSeekV3Table1) {
  const Budget b = make_budget(read_recipe(kScenarios + "recipes/deepseek_v3.yaml"));
  EXPECT_TRUE(b.fits());
  const auto& pre = b.stages[0];
  EXPECT_NEAR(pre.tokens, 14.8e12, 1e8);
  EXPECT_NEAR(pre.bill.gpu_hours / 2664e3, 1, 0.12);
  EXPECT_NEAR((b.stages[1].bill.gpu_hours + b.stages[2].bill.gpu_hours) / 119e3, 1, 0.15);
  EXPECT_NEAR(b.total.gpu_hours / 2788e3, 1, 0.12);
  EXPECT_NEAR(b.total.cost_usd, 2 * b.total.gpu_hours, 1e-3);
}

TEST(BudgetPublished, DeepSeekR1Zero) {
  const Budget b = make_budget(read_recipe(kScenarios + "recipes/deepseek_r1.yaml"));
  EXPECT_NEAR((b.stages[0].bill.gpu_hours + b.stages[1].bill.gpu_hours) / 101e3, 1, 0.3);
}

TEST(BudgetRecipes, AllShippedOnesFit) {
  for (const auto& entry : std::filesystem::directory_iterator(kScenarios + "recipes")) {
    const Budget b = make_budget(read_recipe(entry.path().string()));
    EXPECT_TRUE(b.fits()) << entry.path() << to_terminal(b);
    EXPECT_GT(b.total.gpu_hours, 0);
  }
}

}  // namespace
}  // namespace orrery
