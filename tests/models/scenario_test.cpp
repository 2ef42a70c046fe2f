// Scenarios: the shipped ones are what their sources say, a resolved scenario reads back to itself,
// and the arithmetic that fills in defaults.

#include "models/scenario.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace orrery {
namespace {

namespace fs = std::filesystem;

const std::string kScenarios = std::string(ORRERY_SOURCE_DIR) + "/scenarios";

Scenario read_shipped(const std::string& name) {
  return read_scenario(kScenarios + "/" + name + ".yaml");
}

std::vector<std::string> shipped() {
  std::vector<std::string> files;
  for (const auto& entry : fs::directory_iterator(kScenarios)) {
    if (entry.path().extension() == ".yaml") files.push_back(entry.path().string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

/// The DeepSeek-V3 scenario with one text replaced by another.
std::string edited(const std::string& from, const std::string& to) {
  std::ifstream in(kScenarios + "/deepseek_v3_2048_h800.yaml");
  std::stringstream text;
  text << in.rdbuf();
  std::string yaml = text.str();
  const std::size_t at = yaml.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return at == std::string::npos ? yaml : yaml.replace(at, from.size(), to);
}

Scenario read_edited(const std::string& from, const std::string& to) {
  return read_scenario_text(edited(from, to), kScenarios + "/edited.yaml", kScenarios);
}

std::vector<std::int64_t> layers_of(const Plan& plan) {
  std::vector<std::int64_t> layers;
  for (const StageContents& stage : plan.stages) layers.push_back(stage.layers);
  return layers;
}

bool has_note(const Scenario& scenario, const std::string& part) {
  return std::any_of(scenario.notes.begin(), scenario.notes.end(),
                     [&](const std::string& note) { return note.find(part) != std::string::npos; });
}

void expect_equal(const Scenario& a, const Scenario& b) {
  EXPECT_EQ(a.name, b.name);
  EXPECT_EQ(a.seed, b.seed);
  EXPECT_TRUE(a.model == b.model);
  EXPECT_TRUE(a.cluster == b.cluster);
  EXPECT_EQ(a.profile.file, b.profile.file);
  EXPECT_EQ(a.profile.name, b.profile.name);
  EXPECT_TRUE(a.plan == b.plan);
  EXPECT_TRUE(a.stragglers == b.stragglers);
  EXPECT_TRUE(a.training == b.training);
  EXPECT_TRUE(a.reliability == b.reliability);
}

TEST(Scenario, ShippedOnesReadBackToThemselves) {
  const std::vector<std::string> files = shipped();
  ASSERT_GE(files.size(), 7u);
  for (const std::string& file : files) {
    SCOPED_TRACE(file);
    const Scenario scenario = read_scenario(file);
    const std::string yaml = to_yaml(scenario);
    const Scenario again = read_scenario_text(yaml, scenario.file, kScenarios);
    expect_equal(scenario, again);
    EXPECT_EQ(to_yaml(again), yaml);
  }
}

// Every field away from its default, so that one that to_yaml forgets is noticed.
TEST(Scenario, EveryFieldOfAPlanReadsBack) {
  Scenario scenario = read_shipped("deepseek_v3_2048_h800");
  scenario.name = "quotes \" and \\ and: colons, {braces} # and\ttabs\nlines";
  scenario.seed = 9'223'372'036'854'775'807u;
  Plan& plan = scenario.plan;
  plan.schedule = ScheduleKind::interleaved_1f1b;
  plan.chunks = 2;
  plan.parallelism.tp = 2;
  plan.parallelism.cp = 2;
  plan.parallelism.pp = 4;
  plan.parallelism.dp = 8;
  plan.parallelism.ep = 8;
  plan.parallelism.expert_tp = 2;
  plan.parallelism.zero_stage = 2;
  plan.parallelism.sequence_parallel = false;
  plan.stages.clear();
  std::int64_t next = 0;
  for (const std::int64_t layers : {0, 9, 8, 10, 9, 8, 9, 8}) {
    StageContents stage;
    stage.first_layer = next;
    stage.layers = layers;
    stage.embedding = plan.stages.empty();
    stage.head = plan.stages.size() == 7;
    stage.mtp_modules = plan.stages.size() == 6 ? 1 : 0;
    plan.stages.push_back(stage);
    next += layers;
  }
  plan.sequence_length = 8192;
  plan.micro_batch_sequences = 3;
  plan.global_batch_sequences = 3 * 8 * 12;
  plan.precision = make_precision(PrecisionKind::fp8_tensor);
  plan.precision.linear = NumberFormat::fp8_block;
  plan.precision.saved = NumberFormat::fp32;
  plan.precision.saved_attention = NumberFormat::e5m6;
  plan.precision.dispatch = NumberFormat::fp8_tensor;
  plan.precision.combine = NumberFormat::fp8_block;
  plan.precision.parameter_bytes = 1;
  plan.precision.gradient_bytes = 2;
  plan.precision.gradient_sync_bytes = 2;
  plan.precision.master_bytes = 0;
  plan.precision.moment_bytes = 2;
  plan.recompute = {};
  plan.recompute.attention_core = true;
  plan.recompute.norms = true;
  plan.communication_sms = 7;
  scenario.stragglers = {SlowGpu{17, 1.25}, SlowNode{3, 1.5}, SlowShare{0.01, 1.05},
                         SpeedSpread{0.02}};
  scenario.training = {.text = kScenarios + "/models/deepseek_v3.yaml",
                       .norm_epsilon = 1e-5,
                       .rope_theta = 5e5,
                       .routed_scale = 2.5,
                       .mtp_weight = 0.125,
                       .initial_deviation = 0.006,
                       .learning_rate = 2.2e-4,
                       .beta1 = 0.875,
                       .beta2 = 0.9375,
                       .weight_decay = 0,
                       .clip_norm = 0.5,
                       .adam_epsilon = 1e-15};
  scenario.reliability = Reliability{
      .name = "a \"cluster\"",
      .gpus_per_node = 4,
      .gpus_per_switch = 32,
      .failures = {{.what = "GPUs: all",
                    .of = FailingPart::gpu,
                    .events = 17,
                    .device_time_s = 1e9 / 3,
                    .repair = RandomTime{100.0 / 3, 1000}},
                   {.what = "slow",
                    .of = FailingPart::host,
                    .device_time_s = 1e7 / 7,
                    .detection = {7.25, 7.25},
                    .slowdown = 1.1,
                    .source = "here"},
                   {.what = "n", .of = FailingPart::nic, .device_time_s = 3},
                   {.what = "s", .of = FailingPart::network_switch, .device_time_s = 4},
                   {.what = "j", .of = FailingPart::job, .device_time_s = 5}},
      .rate_spread = 0.3,
      .restart = {600, 700.125},
      .checkpoint = {1e9 / 3, 2e9 / 7, 1e12 / 9, 0.04, 1800.5},
      .spare_hosts = 0,
      .maintenance = Maintenance{86400.5, {3600, 4000}},
      .source = "nowhere"};
  RouterDynamics router;
  router.steps = 7;
  router.sequences = 5;
  router.tokens = 3;
  router.offset_spread = 0.25;
  router.sequence_spread = 0.125;
  router.token_spread = 2;
  router.bias_step = 0.5;
  router.sequence_loss = 0.75;
  router.loss_rate = 3;
  Routing drawn{ZipfPopularity{0.3}, 17};
  Routing all{router, kAllTokens};
  for (const Routing& routing :
       {Routing{StatedImbalance{1.375}, {}}, drawn, all, Routing{router, {}}, Routing{}}) {
    plan.routing = routing;
    expect_equal(scenario, read_scenario_text(to_yaml(scenario), scenario.file, kScenarios));
  }
}

TEST(Scenario, RecordedCountsReadBack) {
  const std::filesystem::path file =
      std::filesystem::temp_directory_path() / "orrery_scenario_test_counts.csv";
  {
    std::ofstream out(file);
    out << "layer,expert,tokens\n";
    for (int layer = 0; layer < 32; ++layer) {
      for (int e = 0; e < 8; ++e) out << layer << ',' << e << ',' << (e < 4 ? 300 : 100) << '\n';
    }
  }
  Scenario scenario = read_shipped("mixtral_8x7b_64_h100");
  RecordedCounts recorded;
  recorded.file = file.generic_string();
  for (int layer = 0; layer < 32; ++layer) {
    recorded.layers[layer] = {{300, 300, 300, 300, 100, 100, 100, 100}};
  }
  for (const std::optional<std::int64_t> tokens : {std::optional<std::int64_t>{}, {0}, {17}}) {
    scenario.plan.routing = {recorded, tokens};
    expect_equal(scenario, read_scenario_text(to_yaml(scenario), scenario.file, kScenarios));
  }
  std::filesystem::remove(file);
}

// V3 report 3.2 and 4.2: 16 x 128 GPUs, 62,914,560 tokens a step, 120 micro-batches.
TEST(Scenario, DeepSeekV3IsAsPublished) {
  const Scenario scenario = read_shipped("deepseek_v3_2048_h800");
  const Plan& plan = scenario.plan;
  EXPECT_EQ(plan.parallelism.world(), 2048);
  EXPECT_EQ(scenario.cluster.gpus(), 2048);
  EXPECT_EQ(plan.global_batch_sequences * plan.sequence_length, 62'914'560);
  EXPECT_EQ(plan.micro_batches(), 120);
  EXPECT_EQ(plan.micro_batch_tokens(), 4096);
  EXPECT_EQ(plan.stages.size(), 16u);
  EXPECT_TRUE(plan.stages.front().embedding);
  EXPECT_TRUE(plan.stages.back().head);
  EXPECT_EQ(plan.stages.back().first_layer, 60);
  EXPECT_EQ(plan.stages.back().mtp_modules, 1);
  EXPECT_EQ(plan.precision.moment_bytes, 4);
  EXPECT_EQ(plan.communication_sms, 20);
  EXPECT_EQ(scenario.profile.device.sms, 132);
}

TEST(Scenario, DpIsWhatTheClusterLeaves) {
  EXPECT_EQ(read_edited("dp: 128, ", "").plan.parallelism.dp, 128);
}

TEST(Scenario, FewerGpusThanTheClusterHasIsNoted) {
  const Scenario scenario = read_edited("dp: 128", "dp: 64");
  EXPECT_EQ(scenario.plan.parallelism.world(), 1024);
  EXPECT_TRUE(has_note(scenario, "1024 of the 2048 GPUs"));
}

// 61 = 13 x 4 + 3 x 3: the last stages, one of which has the head, are the shorter ones.
TEST(Scenario, UnevenLayersGoToTheFirstStages) {
  const Scenario scenario = read_edited(
      "layers_per_stage: [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1]", "mtp_stage: 7");
  EXPECT_EQ(layers_of(scenario.plan),
            (std::vector<std::int64_t>{4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3}));
  EXPECT_EQ(scenario.plan.stages[13].first_layer, 52);
  EXPECT_EQ(scenario.plan.stages[7].mtp_modules, 1);
  EXPECT_EQ(scenario.plan.stages[15].mtp_modules, 0);
  EXPECT_TRUE(has_note(scenario, "61 layers over 16 stages: 4 on the first 13, 3 on the other 3"));
}

// Stages of each schedule on 16 ranks, by their papers: one a rank, v a rank, or the two arms of a
// V.
TEST(Scenario, SchedulesSetTheNumberOfStages) {
  const std::string layers =
      "  layers_per_stage: [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1]\n";
  const std::string yaml = edited(layers, "");
  const std::string schedule = "schedule: dual_pipe ";
  const auto stages = [&](const std::string& with) {
    std::string text = yaml;
    text.replace(text.find(schedule), schedule.size(), with);
    return read_scenario_text(text, kScenarios + "/edited.yaml", kScenarios).plan.stages.size();
  };
  EXPECT_EQ(stages("schedule: gpipe "), 16u);
  EXPECT_EQ(stages("schedule: 1f1b "), 16u);
  EXPECT_EQ(stages("schedule: zb_h1 "), 16u);
  EXPECT_EQ(stages("schedule: dual_pipe "), 16u);
  EXPECT_EQ(stages("schedule: zb_v "), 32u);
  EXPECT_EQ(stages("schedule: dual_pipe_v "), 32u);
  EXPECT_THROW(stages("schedule: interleaved_1f1b "), InputError);  // virtual_stages is missing
}

TEST(Scenario, RecipesOverrideFieldByField) {
  const Scenario scenario = read_edited(
      "precision: fp8_deepseek", "precision: {recipe: bf16, gradient_sync: bf16, moments: bf16}");
  Precision want = make_precision(PrecisionKind::bf16);
  want.gradient_sync_bytes = 2;
  want.moment_bytes = 4;
  EXPECT_TRUE(scenario.plan.precision == want);
}

TEST(Scenario, RecomputePresetsNameTheirParts) {
  const std::string published = "recompute: [norms, mla_up_projection, activation]";
  const Recompute deepseek = read_edited(published, "recompute: deepseek").plan.recompute;
  EXPECT_TRUE(deepseek == read_shipped("deepseek_v3_2048_h800").plan.recompute);
  EXPECT_TRUE(deepseek.norms && deepseek.mla_up_projection && deepseek.activation);
  const Recompute selective = read_edited(published, "recompute: selective").plan.recompute;
  EXPECT_TRUE(selective.attention_core);
  EXPECT_FALSE(selective.norms || selective.mla_up_projection || selective.activation ||
               selective.full);
  EXPECT_TRUE(read_edited(published, "recompute: full").plan.recompute.full);
  EXPECT_TRUE(read_edited(published, "recompute: none").plan.recompute == Recompute());
}

TEST(Scenario, WhatIsUnusualIsNoted) {
  std::string sharded = edited("zero: 1", "zero: 3");
  sharded.replace(sharded.find("dual_pipe"), 9, "1f1b");
  EXPECT_TRUE(has_note(read_scenario_text(sharded, kScenarios + "/edited.yaml", kScenarios),
                       "zero 3 with pp 16"));
  EXPECT_TRUE(has_note(read_edited("ep: 64", "ep: 32"), "ep 32 spans 4 nodes"));
  EXPECT_FALSE(has_note(read_shipped("deepseek_v3_2048_h800"), "expert groups"));
  EXPECT_TRUE(
      has_note(read_edited("sequence_length: 4096", "sequence_length: 262144"), "beyond the"));
}

TEST(Scenario, FewKeyValueHeadsAreReplicated) {
  const std::string model = "model: models/deepseek_v3.yaml";
  std::string yaml = edited(model, "model: models/llama3_70b.yaml");
  const auto swap = [&](const std::string& from, const std::string& to) {
    ASSERT_NE(yaml.find(from), std::string::npos) << from;
    yaml.replace(yaml.find(from), from.size(), to);
  };
  swap("layout: {pp: 16, dp: 128, ep: 64, zero: 1}", "layout: {tp: 16, pp: 8, dp: 16}");
  swap("layers_per_stage: [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1]", "");
  swap("recompute: [norms, mla_up_projection, activation]", "recompute: none");
  const Scenario scenario = read_scenario_text(yaml, kScenarios + "/edited.yaml", kScenarios);
  EXPECT_TRUE(has_note(scenario,
                       "tp 16 is more than the 8 key-value heads of Llama-3-70B: each is kept 2"));
}

// Bytes a parameter: 18 with FP32 gradients as its guide to the distributed optimizer counts for
// Megatron-LM, and V3 report 3.3.3.
TEST(Precision, RecipesKeepWhatTheirSourcesSay) {
  const Precision bf16 = make_precision(PrecisionKind::bf16);
  EXPECT_EQ(bf16.parameter_bytes + bf16.gradient_bytes + bf16.master_bytes + bf16.moment_bytes, 18);
  const Precision v3 = make_precision(PrecisionKind::fp8_deepseek);
  EXPECT_EQ(v3.master_bytes, 4);
  EXPECT_EQ(v3.gradient_bytes, 4);
  EXPECT_EQ(v3.moment_bytes, 4);  // BF16 first and second moments
  EXPECT_EQ(v3.saved_attention, NumberFormat::e5m6);
  EXPECT_EQ(v3.dispatch, NumberFormat::fp8_block);
  EXPECT_EQ(v3.combine, NumberFormat::bf16);
}

}  // namespace
}  // namespace orrery
