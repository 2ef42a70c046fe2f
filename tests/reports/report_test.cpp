// Reports of real scenarios, and what the writers make of hand-made ones.

#include "reports/report.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "reports/compare.hpp"
#include "reports/explain.hpp"
#include "reports/json.hpp"
#include "reports/output.hpp"
#include "reports/study.hpp"
#include "reports/terminal.hpp"
#include "reports/validate.hpp"

namespace orrery {
namespace {

using nlohmann::json;

const std::string kScenarios = ORRERY_SOURCE_DIR "/scenarios/";
const std::string kV3 = kScenarios + "deepseek_v3_2048_h800.yaml";

const Study& v3() {
  static const Study study = study_step(read_scenario(kV3), {.isolated = true});
  return study;
}

TEST(Summarise, ThroughputsFollowFromTheStepTime) {
  const Report& r = v3().report;
  EXPECT_EQ(r.gpus, 2048);
  EXPECT_EQ(r.tokens_per_step, 15360.0 * 4096);  // V3 report 4.2
  EXPECT_NEAR(r.tokens_per_day, 86400 / r.step_time_s * 62914560, 1e-6 * r.tokens_per_day);
  // 2048 GPUs for 1e12 / tokens_per_day days
  EXPECT_NEAR(r.gpu_hours_per_trillion_tokens, 2048 * 24 * 1e12 / r.tokens_per_day, 1e-3);
  // ISCA'25 Table 2: 250 GFLOP a token, causal; Table 4: 432 non-causal where 385 are causal.
  EXPECT_NEAR(r.tflops_per_gpu_causal, 0.250 * r.tokens_per_s_per_gpu,
              2e-3 * r.tflops_per_gpu_causal);
  EXPECT_NEAR(r.tflops_per_gpu_noncausal / r.tflops_per_gpu_causal, 432.0 / 385, 2e-3);
  EXPECT_NEAR(r.mfu_causal * 989.4, r.tflops_per_gpu_causal, 0.1);  // data sheet of the H800
}

// Shapes that differ only in the load of experts are one row, and no time is lost in it.
TEST(Summarise, PricesOfUnevenExpertsAreSummedUp) {
  Scenario scenario = read_scenario(kScenarios + "mixtral_8x7b_64_h100.yaml");
  const std::size_t even_rows = study_step(scenario).report.prices.size();
  scenario.plan.routing = {ZipfPopularity{0.3}, {}};
  const Study study = study_step(scenario);
  EXPECT_GT(study.program.shapes().size(), 3 * even_rows);
  EXPECT_LT(study.report.prices.size(), 2 * even_rows);
  double of_rows = 0;
  double share = 0;
  for (const PriceRow& row : study.report.prices) {
    of_rows += row.per_gpu_s;
    share += row.share;
    EXPECT_NEAR(row.per_gpu_s, static_cast<double>(row.count) * row.time_s / 64,
                1e-9 * row.per_gpu_s);
  }
  EXPECT_NEAR(share, 1, 1e-9);
  double of_ops = 0;
  for (OpId op{}; op.value < study.program.size(); ++op) {
    const auto streams = study.program.streams_of(op);
    const bool transfer = study.program.kind(op) == OpKind::transfer;
    const double gpus = 16 * static_cast<double>(transfer ? 1 : streams.size());
    of_ops += gpus / 64 * seconds(study.run.prices.prices[study.program.shape(op)].time_ps);
  }
  EXPECT_NEAR(of_rows, of_ops, 1e-9 * of_ops);
}

TEST(Summarise, ExplainsRoutingAndStragglers) {
  Scenario scenario = read_scenario(kScenarios + "mixtral_8x7b_64_h100.yaml");
  scenario.plan.routing = {ZipfPopularity{0.3}, 100};
  scenario.stragglers = {SlowGpu{17, 1.25}};
  const std::string text = explain(study_step(scenario));
  EXPECT_NE(text.find("routing: {popularity: zipf, exponent: 0.3, independent_tokens: 100}"),
            std::string::npos);
  EXPECT_NE(text.find("independent tokens of a GPU's micro-batch"), std::string::npos);
  EXPECT_NE(text.find("stragglers: [{gpu: 17, slowdown: 1.25}]"), std::string::npos);
  EXPECT_NE(text.find("Stragglers: 1 of 64 GPUs slower than priced"), std::string::npos);
}

TEST(Summarise, PartsAddUpToTheStepOnEveryRank) {
  const Report& r = v3().report;
  ASSERT_EQ(r.ranks.size(), 16u);
  for (const RankReport& rank : r.ranks) {
    EXPECT_NEAR(rank.phases_s.sum(), r.step_time_s, 1e-9);
    EXPECT_NEAR(rank.cells_s.sum(), r.step_time_s, 1e-9);
    EXPECT_EQ(rank.multiplicity, 128);
  }
  EXPECT_NEAR(r.phases_s.sum(), r.step_time_s, 1e-9);
  double path = 0;
  for (const auto& [phase, time_s] : r.critical_path_s) path += time_s;
  EXPECT_NEAR(path, r.step_time_s, 1e-9);
}

TEST(Summarise, RanksOfDualPipeHoldTwoStagesAndMirrorEachOther) {
  const Report& r = v3().report;
  for (std::size_t p = 0; p < 16; ++p) {
    const int low = static_cast<int>(std::min(p, 15 - p));
    EXPECT_EQ(r.ranks[p].stages, (std::vector<int>{low, 15 - low}));
    EXPECT_EQ(r.ranks[p].parameters, r.ranks[15 - p].parameters);
  }
}

TEST(Summarise, DualPipeRunsTheCellsOfItsPaper) {
  // 120 micro-batches through 2 stages a rank: each is run forward and backward once, alone or in a
  // pair.
  for (const RankReport& rank : v3().report.ranks) {
    std::int64_t forward = 0;
    std::int64_t backward = 0;
    std::int64_t input = 0;
    std::int64_t weight = 0;
    for (const CellDuration& d : rank.cell_durations) {
      const bool pair = d.kind == CellKind::overlapped;
      if (d.kind == CellKind::forward || pair) forward += d.count;
      if (d.kind == CellKind::backward || d.kind == CellKind::backward_input || pair) {
        backward += d.count;
      }
      if (d.kind == CellKind::backward_input) input += d.count;
      if (d.kind == CellKind::weight) weight += d.count;
    }
    EXPECT_EQ(forward, 120);
    EXPECT_EQ(backward, 120);
    EXPECT_EQ(input, weight);
  }
}

TEST(Summarise, SharesOfPricesAddUpAndCountsAreThoseOfTheModel) {
  double share = 0;
  std::int64_t attention_backward = 0;
  for (const PriceRow& row : v3().report.prices) {
    share += row.share;
    if (row.label == "attention core" && row.shape.find("backward") != std::string::npos) {
      attention_backward += row.count;
    }
  }
  EXPECT_NEAR(share, 1, 1e-9);
  // 61 layers and one MTP block, 15360 sequences of one micro-batch each, on one GPU each.
  EXPECT_EQ(attention_backward, 62 * 15360);
}

TEST(Summarise, EnginesAgreeToTheByte) {
  const Study events = study_step(read_scenario(kV3), {.engine = Engine::events, .isolated = true});
  Report report = events.report;
  report.engine.events = v3().report.engine.events;  // each counts its own way
  EXPECT_EQ(to_json(report), to_json(v3().report));
}

TEST(Summarise, EveryRankDoesAsTheOneThatStandsForIt) {
  const std::string path = kScenarios + "mixtral_8x7b_64_h100.yaml";
  const Report one = study_step(read_scenario(path)).report;
  const Report all = study_step(read_scenario(path), {.all_ranks = true}).report;
  ASSERT_EQ(all.ranks.size(), 64u);
  EXPECT_EQ(all.step_time_s, one.step_time_s);
  for (const RankReport& rank : all.ranks) {
    const RankReport& alike = one.ranks.at(static_cast<std::size_t>(rank.position));
    EXPECT_EQ(rank.multiplicity * 16, alike.multiplicity);
    EXPECT_EQ(rank.stages, alike.stages);
    EXPECT_EQ(rank.memory_at_peak, alike.memory_at_peak);
    EXPECT_EQ(rank.phases_s.forward, alike.phases_s.forward);
    EXPECT_EQ(rank.phases_s.bubble, alike.phases_s.bubble);
    EXPECT_EQ(rank.phases_s.exposed_communication, alike.phases_s.exposed_communication);
    EXPECT_EQ(rank.cells_s.optimizer, alike.cells_s.optimizer);
  }
  ASSERT_EQ(all.prices.size(), one.prices.size());
  for (std::size_t i = 0; i < all.prices.size(); ++i) {
    EXPECT_EQ(all.prices[i].count, one.prices[i].count) << all.prices[i].label;
  }
}

TEST(IsolatedCells, MiddlePositionRunsPairsOfItsTwoStages) {
  int pairs = 0;
  for (const IsolatedCell& cell : v3().report.cells) {
    EXPECT_EQ(cell.position, 7);
    if (cell.kind != CellKind::overlapped) continue;
    ++pairs;
    EXPECT_TRUE(cell.what == "F of stage 7 with B of stage 8" ||
                cell.what == "F of stage 8 with B of stage 7")
        << cell.what;
    for (const PhaseSpan& phase : cell.phases) {
      EXPECT_EQ(phase.layers, 4) << name_of(phase.phase);
      EXPECT_GE(phase.mean_span_s, 0);
    }
  }
  EXPECT_EQ(pairs, 2);
}

TEST(Json, PublishedKeysAreThere) {
  const json report = json::parse(to_json(v3().report));
  for (const char* key :
       {"schema_version", "step_time_s", "tokens_per_step", "tokens_per_s_per_gpu",
        "tokens_per_day", "gpu_hours_per_trillion_tokens", "tflops_per_gpu_causal",
        "tflops_per_gpu_noncausal", "mfu_causal", "mfu_noncausal", "exposed_communication_s"}) {
    EXPECT_TRUE(report.at(key).is_number()) << key;
  }
  for (const char* key : {"forward", "backward", "weight", "overlapped", "bubble", "optimizer",
                          "exposed_communication"}) {
    EXPECT_TRUE(report.at("phases_s").at(key).is_number()) << key;
  }
  EXPECT_EQ(report.at("memory_peak_bytes").at("per_stage").size(), 16u);
  std::int64_t overall = 0;
  for (const json& rank : report.at("memory_peak_bytes").at("per_stage")) {
    std::int64_t parts = 0;
    for (const auto& [kind, bytes] : rank.at("at_peak").items()) parts += bytes.get<std::int64_t>();
    EXPECT_EQ(parts, rank.at("peak"));
    overall = std::max(overall, parts);
  }
  EXPECT_EQ(report.at("memory_peak_bytes").at("overall"), overall);
  EXPECT_EQ(report.at("fingerprint").get<std::string>().size(), 16u);
  EXPECT_EQ(report.at("engine").at("ranks_simulated"), 16);
  for (const json& price : report.at("prices")) EXPECT_TRUE(price.at("source").is_string());
  EXPECT_TRUE(report.at("critical_path").is_array());
}

TEST(Json, NumbersSurviveTheRoundTrip) {
  const json report = json::parse(to_json(v3().report));
  EXPECT_EQ(report.at("step_time_s").get<double>(), v3().report.step_time_s);
  EXPECT_EQ(report.at("phases_s").at("bubble").get<double>(), v3().report.phases_s.bubble);
}

TEST(Json, OnlyTimingDiffersBetweenRuns) {
  Report again = study_step(read_scenario(kV3), {.isolated = true}).report;
  again.engine.wall_s = 123.5;
  EXPECT_EQ(to_json(again), to_json(v3().report));
  EXPECT_EQ(json::parse(to_json(again, {.timing = true})).at("engine").at("wall_s"), 123.5);
}

TEST(Json, TextIsEscapedAndWhatIsNoNumberIsNull) {
  Report report;
  report.scenario = "a \"b\"\n\\c";
  report.step_time_s = std::numeric_limits<double>::quiet_NaN();
  const json parsed = json::parse(to_json(report));
  EXPECT_EQ(parsed.at("scenario"), report.scenario);
  EXPECT_TRUE(parsed.at("step_time_s").is_null());
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

TEST(Terminal, FitsAScreen) {
  for (const auto& entry : std::filesystem::directory_iterator(kScenarios)) {
    if (entry.path().extension() != ".yaml") continue;
    const Report report = study_step(read_scenario(entry.path().string())).report;
    const auto lines = lines_of(to_terminal(report));
    EXPECT_LE(lines.size(), 45u) << entry.path();
    for (const std::string& line : lines) EXPECT_LE(line.size(), 100u) << line;
  }
  // No two positions look the same where experts are uneven.
  Scenario uneven = read_scenario(kV3);
  uneven.plan.routing = {ZipfPopularity{0.3}, std::nullopt};
  const std::string text = to_terminal(study_step(uneven).report);
  EXPECT_LE(lines_of(text).size(), 45u) << text;
  EXPECT_NE(text.find("fullest of"), std::string::npos) << text;
}

Report with_memory(std::int64_t activations) {
  Report report;
  report.memory_capacity_bytes = 64e9;
  RankReport rank;
  rank.memory_at_peak[static_cast<std::size_t>(MemoryKind::parameters)] = 16'000'000'000;
  rank.memory_at_peak[static_cast<std::size_t>(MemoryKind::activations)] = activations;
  rank.memory_peak_bytes = 16'000'000'000 + activations;
  report.ranks = {rank};
  return report;
}

TEST(Terminal, BarsAreDrawnToScale) {
  // 64 characters for 64 GB
  const std::string text = to_terminal(with_memory(24'000'000'000));
  EXPECT_NE(
      text.find("|" + std::string(16, 'p') + std::string(24, 'a') + std::string(24, '.') + "|"),
      std::string::npos)
      << text;
  EXPECT_EQ(text.find("too much"), std::string::npos);
  EXPECT_NE(to_terminal(with_memory(64'000'000'000)).find("| too much"), std::string::npos);
}

TEST(Terminal, ColourOnlyWhereAskedFor) {
  const Report report = with_memory(64'000'000'000);
  EXPECT_EQ(to_terminal(report).find('\x1b'), std::string::npos);
  EXPECT_NE(to_terminal(report, {.colour = true}).find('\x1b'), std::string::npos);
}

TEST(Terminal, CountsHaveThreeDigitsAndAPrefix) {
  EXPECT_EQ(format_count(0), "0.00");
  EXPECT_EQ(format_count(385.2), "385");
  EXPECT_EQ(format_count(999.7), "1.00 K");
  EXPECT_EQ(format_count(180'000), "180 K");
  EXPECT_EQ(format_count(14.8e12), "14.8 T");
}

TEST(Compare, NamesWhatDiffers) {
  Report a;
  a.step_time_s = 10;
  a.prices = {{.label = "attention core", .time_s = 1, .lasted_s = 1, .per_gpu_s = 4},
              {.label = "o", .time_s = 1, .lasted_s = 1, .per_gpu_s = 1}};
  Report b = a;
  b.step_time_s = 11;
  b.prices[0].per_gpu_s = 5;
  const std::vector<Report> reports{a, b};
  const std::vector<std::string> names{"before", "after"};
  const std::string text = compare(reports, names);
  EXPECT_NE(text.find("+10.0 %"), std::string::npos) << text;  // 11 / 10
  EXPECT_NE(text.find("+25.0 %"), std::string::npos) << text;  // 5 / 4
  EXPECT_EQ(text.find("\no "), std::string::npos) << text;     // unchanged, not listed
  EXPECT_EQ(json::parse(compare_json(reports)).at("reports").size(), 2u);
}

TEST(Explain, ReadsBackAsTheSameScenario) {
  const std::string text = explain(v3());
  const Scenario again = read_scenario_text(text, kScenarios + "explained.yaml", kScenarios);
  EXPECT_EQ(study_step(again).report.fingerprint, v3().report.fingerprint);
  EXPECT_NE(text.find("671.02"), std::string::npos);  // B parameters, V3 report 4.2: 671B
}

class Folder : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string put(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ + "/" + name) << text;
    return folder_ + "/" + name;
  }
  std::string get(const std::string& name) const {
    std::ostringstream text;
    text << std::ifstream(folder_ + "/" + name).rdbuf();
    return text.str();
  }
  std::string folder_;
};

using Validate = Folder;

TEST_F(Validate, ComparesWithTheReport) {
  const auto runs = validate(
      put("run.yaml",
          "name: test\nscenario: " + kV3 +
              "\nrows:\n"
              "  - {quantity: step_time_s, published: 20 s, aim: 1 %, source: a}\n"
              "  - {quantity: ranks.3.multiplicity, published: 128, aim: 0.1 %, source: b}\n"
              "  - {quantity: cell.overlapped.time_s, published: 100 ms, aim: 99 %, "
              "source: c}\n"));
  ASSERT_EQ(runs.size(), 1u);
  const auto& rows = runs[0].rows;
  ASSERT_EQ(rows.size(), 3u);
  EXPECT_EQ(rows[0].predicted, v3().report.step_time_s);
  EXPECT_DOUBLE_EQ(rows[0].error(), v3().report.step_time_s / 20 - 1);
  EXPECT_EQ(rows[1].predicted, 128);
  EXPECT_TRUE(rows[1].met());
  EXPECT_EQ(rows[2].published, 0.1);
  const json parsed = json::parse(validation_json(runs));
  EXPECT_EQ(parsed.at("runs").at(0).at("rows").size(), 3u);
}

// A rate is the larger the shorter the step, and what does not follow from the step's time has no interval.
TEST_F(Validate, DrawsThePricesErrors) {
  const auto runs = validate(
      put("run.yaml",
          "name: test\nscenario: " + kV3 +
              "\nrows:\n"
              "  - {quantity: step_time_s, published: 18 s, aim: 1 %, source: a}\n"
              "  - {quantity: tflops_per_gpu_causal, published: 400, aim: 1 %, source: a}\n"
              "  - {quantity: ranks.3.multiplicity, published: 128, aim: 0.1 %, source: b}\n"
              "  - {quantity: cell.overlapped.time_s, published: 100 ms, aim: 99 %, source: c}\n"
              "  - {quantity: phase.mlp_forward, published: 4 ms, aim: 99 %, source: c}\n"),
      {}, 40);
  const auto& rows = runs[0].rows;
  ASSERT_TRUE(rows[0].interval && rows[1].interval && rows[3].interval && rows[4].interval);
  EXPECT_FALSE(rows[2].interval);
  EXPECT_NEAR(rows[0].interval->p50 * rows[1].interval->p50, rows[0].predicted * rows[1].predicted,
              1e-6 * rows[0].predicted * rows[1].predicted);
  EXPECT_NEAR(rows[0].interval->p10 * rows[1].interval->p90, rows[0].predicted * rows[1].predicted,
              2e-3 * rows[0].predicted * rows[1].predicted);
  for (const ValidationRow& row : rows) {
    if (!row.interval) continue;
    EXPECT_LT(row.interval->p10, row.predicted);
    EXPECT_GT(row.interval->p90, row.predicted);
  }
  const std::string table = validation_table(runs);
  EXPECT_NE(table.find("of 4 between P10 and P90"), std::string::npos) << table;
  EXPECT_DOUBLE_EQ(json::parse(validation_json(runs)).at("runs").at(0).at("rows").at(0).at("p10").get<double>(),
                   rows[0].interval->p10);
  EXPECT_EQ(validation_table(validate(put("run.yaml", "name: test\nscenario: " + kV3 +
                                          "\nrows:\n  - {quantity: step_time_s, published: 18 s, "
                                          "aim: 1 %, source: a}\n")))
                .find("P10"),
            std::string::npos);
}

TEST_F(Validate, TellsWhereAQuantityIsUnknown) {
  const std::string path =
      put("run.yaml", "name: test\nscenario: " + kV3 +
                          "\nrows:\n"
                          "  - {quantity: step_time, published: 20, aim: 1 %, source: a}\n");
  try {
    validate(path);
    FAIL();
  } catch (const InputError& error) {
    ASSERT_EQ(error.problems().size(), 1u);
    EXPECT_EQ(error.problems()[0].at.line, 4);
    EXPECT_EQ(error.problems()[0].message, "'step_time' is no number in the report");
  }
}

using Output = Folder;

TEST_F(Output, IsWholeOrNotThere) {
  const std::string path = put("out.txt", "old");
  {
    OutputFile file(path);
    file.write("half of the ne");
    EXPECT_EQ(get("out.txt"), "old");
  }
  EXPECT_EQ(get("out.txt"), "old");
  write_file(path, "new");
  EXPECT_EQ(get("out.txt"), "new");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 1);
}

TEST_F(Output, FollowsLinksAndLeavesDevicesAlone) {
  const std::string path = put("target.txt", "old");
  std::filesystem::create_symlink("target.txt", folder_ + "/link.txt");
  write_file(folder_ + "/link.txt", "new");
  EXPECT_EQ(get("target.txt"), "new");
  EXPECT_TRUE(std::filesystem::is_symlink(folder_ + "/link.txt"));
  std::filesystem::create_symlink("/dev/null", folder_ + "/null");
  write_file(folder_ + "/null", "gone");
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
}

}  // namespace
}  // namespace orrery
