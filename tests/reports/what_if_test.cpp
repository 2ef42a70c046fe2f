#include "reports/what_if.hpp"

#include <gtest/gtest.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "reports/json.hpp"
#include "reports/study.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

const std::string kScenarios = std::string(ORRERY_SOURCE_DIR) + "/scenarios";
const std::string kV3 = kScenarios + "/deepseek_v3_2048_h800.yaml";

Report step(const std::string& file, const std::vector<std::string>& set,
            Network network = Network::formula) {
  return study_step(read_scenario(file, overrides_of(set, "--set")), {.network = network}).report;
}

double op_seconds(const Report& report, const std::string& label) {
  double sum = 0;
  for (const PriceRow& row : report.prices) {
    if (row.label == label) sum += row.per_gpu_s;
  }
  return sum;
}

double peak_bytes(const Report& report) {
  std::int64_t peak = 0;
  for (const RankReport& rank : report.ranks) peak = std::max(peak, rank.memory_peak_bytes);
  return static_cast<double>(peak);
}

TEST(WhatIf, TheSameValuesGiveTheSameBytes) {
  const std::string base = to_json(step(kV3, {}, Network::flows));
  EXPECT_EQ(base, to_json(step(kV3,
                               {"plan.layout={pp: 16, dp: 128, ep: 64, zero: 1}",
                                "cluster.nvlink.bandwidth=*1", "cluster.nic.latency=3.7 us",
                                "profile=profiles/h800.yaml", "profile.device.memory_bandwidth=*1",
                                "cluster.fabric.nic.capacity=400 Gb/s", "model.layers=61"},
                               Network::flows)));
}

/// A machine that is all rates and latencies: its profile has no tables, so compute is priced at
/// peak.
class AllRates : public ::testing::Test {
 protected:
  AllRates() : folder_(fs::path(::testing::TempDir()) / "orrery_all_rates") {
    fs::create_directories(folder_);
    std::ofstream(folder_ / "profile.yaml")
        << "name: rates\nlaunch_gap: 2 us\nlaunch_gap_source: made up\n"
           "device: {name: D, sms: 100, memory: 1 TB, memory_bandwidth: 3 TB/s, bf16: 900 "
           "TFLOP/s,\n"
           "         source: made up}\n";
    std::ofstream(folder_ / "s.yaml")
        << "name: rates\nmodel: " << kScenarios
        << "/models/llama3_70b.yaml\ncluster: " << kScenarios
        << "/clusters/h100_64.yaml\nprofile: profile.yaml\n"
           "plan: {layout: {tp: 4, pp: 4, zero: 1}, schedule: 1f1b, sequence_length: 4096,\n"
           "       global_batch: 64, precision: bf16}\n";
  }
  ~AllRates() override { fs::remove_all(folder_); }
  std::string file() const { return (folder_ / "s.yaml").string(); }
  fs::path folder_;
};

TEST_F(AllRates, TwiceAsFastInEverythingTakesHalfTheTime) {
  std::vector<std::string> twice;
  for (const char* rate :
       {"profile.device.memory_bandwidth", "profile.device.bf16", "cluster.nvlink.bandwidth",
        "cluster.nvlink.peak", "cluster.nic.bandwidth", "cluster.nic.peak",
        "cluster.collectives.low_latency_rate", "cluster.collectives.copy_rate",
        "cluster.collectives.peer_rate"}) {
    twice.push_back(std::string(rate) + "=*2");
  }
  for (const char* time : {"profile.launch_gap", "cluster.nvlink.latency", "cluster.nic.latency",
                           "cluster.collectives.base", "cluster.collectives.nvlink_hop",
                           "cluster.collectives.bulk_latency", "cluster.collectives.peer_latency",
                           "cluster.collectives.nic_tree_hop", "cluster.collectives.nic_ring_hop",
                           "cluster.collectives.nic_peer"}) {
    twice.push_back(std::string(time) + "=*0.5");
  }
  const Report base = step(file(), {});
  const Report half = step(file(), twice);
  ASSERT_GT(base.step_time_s, 1);
  // Every price is rounded to a picosecond; a step is some ten thousand of them in a row.
  EXPECT_NEAR(half.step_time_s, base.step_time_s / 2, 1e-7);
  EXPECT_NEAR(half.phases_s.bubble, base.phases_s.bubble / 2, 1e-7);
  EXPECT_EQ(peak_bytes(half), peak_bytes(base));
  // Half of the machine twice as fast is not it.
  twice.resize(2);
  EXPECT_GT(step(file(), twice).step_time_s, 1.01 * half.step_time_s);
}

// What the V3 report says in words (arXiv 2412.19437, sections 3.2.2 and 3.3): FP8 makes GEMMs
// faster and saves memory and bytes to dispatch; SMs given to communication are taken from
// computation.
TEST(WhatIf, TheAnswersThatThePapersGiveInWords) {
  const Report base = step(kV3, {}, Network::flows);
  const Report bf16 = step(kV3, {"plan.precision=bf16"}, Network::flows);
  EXPECT_GT(bf16.step_time_s, 1.05 * base.step_time_s);
  for (const char* gemm : {"routed_up", "routed_down", "o"}) {
    EXPECT_GT(op_seconds(bf16, gemm), 1.2 * op_seconds(base, gemm)) << gemm;
    EXPECT_LT(op_seconds(bf16, gemm), 2.2 * op_seconds(base, gemm)) << gemm;
  }
  EXPECT_GT(op_seconds(bf16, "dispatch(F)"), 1.5 * op_seconds(base, "dispatch(F)"));
  EXPECT_GT(peak_bytes(bf16), 1.1 * peak_bytes(base));

  const Report fewer = step(kV3, {"plan.communication_sms=8"}, Network::flows);
  EXPECT_GT(op_seconds(fewer, "combine(F)"), 1.1 * op_seconds(base, "combine(F)"));
  EXPECT_LT(op_seconds(fewer, "attention core"), op_seconds(base, "attention core"));

  const Report nics =
      step(kV3,
           {"cluster.nic.bandwidth=*2", "cluster.nic.peak=*2", "cluster.fabric.nic.capacity=*2",
            "cluster.fabric.pcie.capacity=*2", "cluster.fabric.leaf_spine.capacity=*2"},
           Network::flows);
  EXPECT_LT(nics.step_time_s, base.step_time_s);
  EXPECT_LT(nics.phases_s.exposed_communication, base.phases_s.exposed_communication);
}

std::vector<WhatIf> questions() {
  return {parse_what_if("EP32: plan.layout.ep=32", 1),
          parse_what_if("three: plan.layout.ep=3, plan.layout.tp=3", 2),
          parse_what_if("small: profile.device.memory=40 GB", 3), parse_what_if("none: seed=0", 4)};
}

TEST(WhatIf, AVariantThatCannotRunIsARow) {
  const WhatIfAnswer answer = ask_what_ifs(ScenarioFile(kV3), {}, questions(), Network::formula);
  ASSERT_EQ(answer.rows.size(), 4u);
  EXPECT_EQ(answer.rows[0].why_not, "");
  EXPECT_FALSE(answer.rows[1].report);
  EXPECT_NE(answer.rows[1].why_not.find("3 x 1 x 16 x 128 = 6144 GPUs"), std::string::npos)
      << answer.rows[1].why_not;
  EXPECT_TRUE(answer.rows[2].report);
  EXPECT_EQ(answer.rows[2].why_not, "out of memory: 68.1 GB of 40.0 GB");
  EXPECT_EQ(to_json(*answer.rows[3].report), to_json(*answer.base.report));
  EXPECT_EQ(to_json(*answer.base.report), to_json(step(kV3, {})));
}

TEST(WhatIf, TheSameWhateverTheThreads) {
  const auto with_threads = [](int threads) {
    const tbb::global_control limit(tbb::global_control::max_allowed_parallelism,
                                    static_cast<std::size_t>(threads));
    tbb::task_arena arena(threads);
    return arena.execute([] {
      const WhatIfAnswer answer =
          ask_what_ifs(ScenarioFile(kV3), {}, questions(), Network::formula);
      return to_json(answer) + to_terminal(answer);
    });
  };
  const std::string one = with_threads(1);
  EXPECT_EQ(with_threads(4), one);
}

TEST(WhatIf, TextsAreTakenApart) {
  const WhatIf a = parse_what_if("NVLink: twice: a.b=*2, c={d: 1, e: [2, 3]}, f=\"x, y\"", 1);
  EXPECT_EQ(a.name, "NVLink: twice");
  ASSERT_EQ(a.overrides.size(), 3u);
  EXPECT_EQ(a.overrides[0].text, "a.b=*2");
  EXPECT_EQ(a.overrides[1].text, "c={d: 1, e: [2, 3]}");
  EXPECT_EQ(a.overrides[2].text, "f=\"x, y\"");
  EXPECT_EQ(a.overrides[2].at.column, 45);
  const WhatIf b = parse_what_if("a={b: 1}", 1);
  EXPECT_EQ(b.name, "a={b: 1}");
  for (const char* wrong : {"", "name", "name: a", "a=1, b", "a=1,,b=2"}) {
    EXPECT_THROW(parse_what_if(wrong, 1), InputError) << wrong;
  }
}

TEST(WhatIf, TheShippedQuestionsCanBeRead) {
  for (const auto& entry : fs::directory_iterator(kScenarios + "/what_if")) {
    const WhatIfs asked = read_what_ifs(entry.path().string());
    EXPECT_GE(asked.list.size(), 1u);
    const ScenarioFile file(asked.scenario);
    const std::string base = to_yaml(file.read());
    for (const WhatIf& what_if : asked.list) {
      EXPECT_NE(to_yaml(file.read(what_if.overrides)), base) << what_if.name;
    }
  }
}

TEST(WhatIf, BrokenFilesAreExplainedWordForWord) {
  const fs::path before = fs::current_path();
  fs::current_path(ORRERY_SOURCE_DIR);
  const char* update = std::getenv("ORRERY_UPDATE_GOLDENS");
  int files = 0;
  for (const auto& entry : fs::directory_iterator("tests/cli/broken/what_if")) {
    if (entry.path().extension() != ".yaml") continue;
    ++files;
    std::string text;
    try {
      read_what_ifs(entry.path().generic_string());
    } catch (const InputError& error) {
      text = error.what();
    }
    fs::path expected = entry.path();
    expected.replace_extension(".expected");
    if (update != nullptr) std::ofstream(expected, std::ios::binary) << text;
    std::ifstream in(expected, std::ios::binary);
    EXPECT_EQ(text, std::string(std::istreambuf_iterator<char>(in), {})) << entry.path();
  }
  EXPECT_GE(files, 2);
  fs::current_path(before);
}

}  // namespace
}  // namespace orrery
