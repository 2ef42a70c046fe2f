// The capacity report as data, page, Markdown and CSV.

#include "reports/capacity.hpp"

#include <gtest/gtest.h>

#include <tbb/global_control.h>
#include <algorithm>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "reports/html/assets.hpp"
#include "reports/html/page.hpp"
#include "reports/json.hpp"
#include "reports/measured_timeline.hpp"
#include "reports/output.hpp"
#include "reports/trace.hpp"
#include "sketch.hpp"

namespace orrery {
namespace {

using nlohmann::json;
using test::on;
using test::Sketch;

const std::string kTiny = ORRERY_SOURCE_DIR "/scenarios/tiny_deepseek_cpu.yaml";

std::string slurp(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

class CapacityFile : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + "orrery_capacity_" + std::to_string(getpid());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ + "/" + name) << text;
    return folder_ + "/" + name;
  }
  std::string problems_of(const CapacityQuestion& question) const {
    try {
      capacity_report(question);
    } catch (const InputError& error) {
      std::string text = format_problems(error.problems());
      for (std::size_t at = 0; (at = text.find(folder_ + "/")) != std::string::npos;) {
        text.erase(at, folder_.size() + 1);
      }
      return text;
    }
    return "";
  }
  std::string folder_;
};

/// Two positions of hand-made times, so that no price moves what is expected here.
CapacityReport made_by_hand() {
  Sketch s(2);
  const auto tag = [](Phase phase, std::uint16_t layer) {
    return OpTag{.micro_batch = 1, .layer = layer, .stage = 0, .phase = phase};
  };
  s.begin(CellKind::forward, 1);
  const OpId f = s.op(2'000'000, {on(StreamKind::compute, 0)}, {}, tag(Phase::attn_forward, 0));
  s.end();
  const OpId send =
      s.op(500'000, {on(StreamKind::send_next, 0), on(StreamKind::receive_previous, 1)}, {f},
           tag(Phase::pipeline_forward, kNoLayer));
  s.begin(CellKind::forward, 1);
  s.op(3'000'000, {on(StreamKind::compute, 1)}, {send}, tag(Phase::mlp_forward, 1));
  s.end();
  CapacityReport report;
  CapacityScenario scenario;
  Study& study = scenario.study;
  study.run.prices = s.prices;
  auto [program, timeline] = s.run();
  study.program = std::move(program);
  study.run.timeline = std::move(timeline);
  study.scenario.file = "somewhere/by_hand.yaml";
  Report& r = study.report;
  r.scenario = "by hand </script><img src=x>";
  r.plan = "PP2";
  r.device = "a device";
  r.gpus = 2;
  r.step_time_s = 5.5e-6;
  r.tokens_per_step = 11;
  r.tokens_per_s_per_gpu = 1e6;
  r.tokens_per_day = 172.8e9;
  r.gpu_hours_per_trillion_tokens = 1e12 / (1e6 * 3600);
  r.mfu_causal = 0.5;
  r.memory_capacity_bytes = 1000;
  for (int p = 0; p < 2; ++p) {
    RankReport rank;
    rank.rank = static_cast<std::uint32_t>(p);
    rank.position = p;
    rank.stages = {p};
    rank.phases_s.forward = p == 0 ? 2e-6 : 3e-6;
    rank.phases_s.bubble = p == 0 ? 3.5e-6 : 2.5e-6;
    rank.memory_peak_bytes = 600 + 100 * p;
    rank.memory_at_peak[0] = rank.memory_peak_bytes;
    r.ranks.push_back(rank);
  }
  r.phases_s.forward = 2.5e-6;
  r.phases_s.bubble = 3e-6;
  r.fingerprint = 1;
  scenario.assumptions = {{"Cluster", "NIC | \"each\" way", "50 GB/s", "=a sheet, p. 3", -1}};
  Problems problems;
  scenario.judgements.push_back(
      judge(*parse_target("tokens/day >= 100G", problems), r, {.spread = 0.1}));
  scenario.tokens = 1e12;
  scenario.gpu_hours = r.gpu_hours_per_trillion_tokens;
  scenario.days = 1e12 / r.tokens_per_day;
  scenario.cost_usd = 2 * scenario.gpu_hours;
  report.context.usd_per_gpu_hour = 2;
  report.scenarios.push_back(std::move(scenario));
  return report;
}

/// With ORRERY_UPDATE_GOLDEN set, the file is written instead.
void expect_golden(const std::string& name, const std::string& text) {
  const std::string path = ORRERY_SOURCE_DIR "/tests/reports/golden/" + name;
  if (std::getenv("ORRERY_UPDATE_GOLDEN") != nullptr) {
    write_file(path, text);
    GTEST_SKIP() << "written: " << path;
  }
  EXPECT_EQ(text, slurp(path)) << "if that is meant: ORRERY_UPDATE_GOLDEN=1 " << name;
}

TEST(CapacityGolden, Json) {
  expect_golden("capacity.json", to_json(made_by_hand()));
}
TEST(CapacityGolden, Markdown) {
  expect_golden("capacity.md", to_markdown(made_by_hand()));
}
TEST(CapacityGolden, Csv) {
  expect_golden("capacity.csv", to_csv(made_by_hand()));
}

TEST(CapacityPage, IsTheTemplateWithItsData) {
  const CapacityReport report = made_by_hand();
  const std::string page = html_page(report);
  const std::string data = json_for_page(to_json(report));
  EXPECT_NE(page.find("<script type=\"application/json\" id=\"page-data\">" + data + "</script>"),
            std::string::npos);
  EXPECT_EQ(json::parse(data), json::parse(to_json(report)));
  // The name is in the title and in the text for readers without scripts, as text.
  EXPECT_EQ(page.find("<img"), std::string::npos);
  EXPECT_NE(page.find("<title>by hand &lt;/script&gt;&lt;img src=x&gt;: capacity report</title>"),
            std::string::npos);
  // Three scripts and no more, and no placeholder left.
  std::size_t scripts = 0;
  for (std::size_t at = 0; (at = page.find("</script>", at)) != std::string::npos; ++at) ++scripts;
  EXPECT_EQ(scripts, 3u);
  EXPECT_EQ(page.find("{{"), page.find("{{", page.find(page_assets().library.text)));
  EXPECT_NE(page.find("default-src 'none'; script-src 'sha256-"), std::string::npos);
  EXPECT_NE(page.find("Redistributions in binary form"), std::string::npos) << "D3's licence";
}

TEST(CapacityPage, TextOfUsersEndsNoElement) {
  EXPECT_EQ(json_for_page(R"({"a": "</script><!--", "b": 1.50})"),
            R"({"a":"\u003c/script>\u003c!--","b":1.50})");
  EXPECT_EQ(in_html("<a href='x' title=\"y\">&"),
            "&lt;a href=&#39;x&#39; title=&quot;y&quot;&gt;&amp;");
}

TEST(CapacityPage, HasTheSameBytesOnAnyNumberOfThreads) {
  CapacityQuestion question;
  question.scenarios = {kTiny, ORRERY_SOURCE_DIR "/scenarios/mixtral_8x7b_64_h100.yaml"};
  question.targets = {"mfu >= 30 %"};
  const std::string page = html_page(capacity_report(question));
  for (const std::size_t threads : {1, 3}) {
    const tbb::global_control limit(tbb::global_control::max_allowed_parallelism, threads);
    EXPECT_TRUE(html_page(capacity_report(question)) == page) << threads << " threads";
  }
}

TEST(CapacityPage, HasTheReportOfRun) {
  CapacityQuestion question;
  question.scenarios = {kTiny};
  const CapacityReport report = capacity_report(question);
  const json data = json::parse(to_json(report));
  const Study study = study_step(read_scenario(kTiny), {.isolated = true});
  EXPECT_EQ(data["scenarios"][0]["report"], json::parse(to_json(study.report)));
  EXPECT_EQ(data["scenarios"][0]["file"], "tiny_deepseek_cpu.yaml");
  EXPECT_FALSE(data.contains("search"));
  EXPECT_FALSE(data["scenarios"][0].contains("measured"));
  // Prices by where they are from are all of them.
  double share = 0;
  for (const json& a : data["scenarios"][0]["assumptions"]) {
    if (a["group"] == "Prices") share += a["share"].get<double>();
  }
  EXPECT_NEAR(share, 1, 1e-9);
}

TEST_F(CapacityFile, OtherDocumentsCountForTargets) {
  CapacityQuestion question;
  question.scenarios = {kTiny};
  question.tokens = 1e9;
  question.targets = {"days <= 1000"};
  const double plain = capacity_report(question).scenarios[0].judgements[0].value;
  question.reliability = write(
      "goodput.json", R"({"goodput": {"p10": 0.4, "p50": 0.5, "p90": 0.8}, "calendar_s": {}})");
  question.validation =
      write("validation.json", R"({"runs": [{"name": "a", "scenario": "b", "rows": [
      {"quantity": "step_time_s", "error": -0.5}, {"quantity": "mfu_causal", "error": -0.9}]}]})");
  const Judgement j = capacity_report(question).scenarios[0].judgements[0];
  EXPECT_DOUBLE_EQ(j.value, 2 * plain);
  EXPECT_DOUBLE_EQ(j.high, plain * 2 / 0.4);  // a step twice as long, and the least goodput
}

// Two standard deviations of a normal distribution with these tenths.
TEST_F(CapacityFile, DrawsOfErrorsReplaceTheirSum) {
  CapacityQuestion question;
  question.scenarios = {kTiny};
  question.targets = {"step <= 1 s"};
  question.draws = 50;
  const CapacityScenario s = std::move(capacity_report(question).scenarios[0]);
  ASSERT_TRUE(s.study.report.uncertainty.has_value());
  const Interval& step = s.study.report.uncertainty->step_time_s;
  const Judgement& j = s.judgements[0];
  EXPECT_EQ(j.value, s.study.report.step_time_s);
  const double spread = (step.p90 - step.p10) / (2.5631 * step.p50);
  EXPECT_NEAR(j.high / j.value, 1 + 2 * spread, 4e-4);
  EXPECT_NEAR(j.low / j.value, std::max(0.0, 1 - 2 * spread),
              4e-4);  // no step takes less than nothing
}

TEST_F(CapacityFile, ProblemsOfAllFilesAreReportedAtOnce) {
  CapacityQuestion question;
  question.scenarios = {folder_ + "/none.yaml"};
  question.targets = {"speed >= 3"};
  question.search = write("search.json", "{\n  \"best\": [1, 2,\n}\n");
  question.budget = write("budget.json", "{\"stages\": []}");
  question.reliability = write("store.db", std::string("SQLite format 3\0", 16));
  const std::string text = problems_of(question);
  EXPECT_NE(text.find("none.yaml"), std::string::npos) << text;
  EXPECT_NE(text.find("--target:1:1: error: unknown quantity 'speed'"), std::string::npos) << text;
  EXPECT_NE(text.find("search.json:3:1: error: no JSON: "), std::string::npos) << text;
  EXPECT_NE(text.find("budget.json: error: no JSON of budget: it has no 'total'"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("store.db: error: a store, not JSON"), std::string::npos) << text;
}

TEST_F(CapacityFile, AMeasuredTimelineIsReadBackFromItsTrace) {
  const Study study = study_step(read_scenario(kTiny));
  for (const char* name : {"t.json", "t.json.gz"}) {
    const std::string path = folder_ + "/" + name;
    write_trace(study, representative_ranks(study.report), path);
    Problems problems;
    const Timeline timeline = read_measured_timeline(path, study.program, problems);
    ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
    for (OpId op{}; op.value < study.program.size(); ++op) {
      if (study.run.timeline.start_ps[op] == study.run.timeline.end_ps[op]) continue;  // a mark
      ASSERT_NEAR(static_cast<double>(timeline.start_ps[op]),
                  static_cast<double>(study.run.timeline.start_ps[op]), 501);  // rounded to ns
      ASSERT_NEAR(static_cast<double>(timeline.end_ps[op]),
                  static_cast<double>(study.run.timeline.end_ps[op]), 1001);
    }
  }
}

TEST_F(CapacityFile, ATraceOfAnotherStepIsRefused) {
  const Study study = study_step(read_scenario(kTiny));
  const std::string other = folder_ + "/other.json";
  const Study llama =
      study_step(read_scenario(ORRERY_SOURCE_DIR "/scenarios/mixtral_8x7b_64_h100.yaml"));
  write_trace(llama, {0}, other);
  const auto say = [&](const std::string& path) {
    Problems problems;
    read_measured_timeline(path, study.program, problems);
    return problems.empty() ? std::string() : format_problems(problems.list());
  };
  EXPECT_NE(say(other).find("the trace is of another step: op "), std::string::npos) << say(other);
  EXPECT_NE(say(write("empty.json", "{\"traceEvents\": []}")).find("no ops in this trace"),
            std::string::npos);
  EXPECT_NE(say(write("broken.json", "{\"traceEvents\": [")).find("no JSON: "), std::string::npos);
  EXPECT_NE(say(folder_ + "/none").find("cannot open the file"), std::string::npos);
}

}  // namespace
}  // namespace orrery
