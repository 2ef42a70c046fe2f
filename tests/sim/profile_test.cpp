#include "sim/profile.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

namespace orrery {
namespace {

const std::string kGood = R"(name: toy
device:
  name: Toy
  sms: 10
  memory: 80 GB
  memory_bandwidth: 1 TB/s
  bf16: 100 TFLOP/s
  source: "a data sheet"
launch_gap: 1 us
launch_gap_source: "a measurement"
bandwidth_by_sms:
  source: "a sweep"
  points:
    - [5, 0.8]
    - [10, 1.0]
gemm:
  - id: toy-gemm
    source: "a table"
    inputs: bf16
    pass: forward
    spread: 0.05
    model: {tiles: [[128, 128]], sm_rate: 10 TFLOP/s, sm_operand_rate: 1 TB/s,
            tile_overhead: 1 us, launch: 2 us, memory_bandwidth: 900 GB/s}
    points:
      - [1, 1024, 1024, 4096, 10, 123.5]
attention:
  - id: toy-attention
    source: "a table"
    inputs: bf16
    direction: backward
    spread: 0.1
    model: {sm_rate: 5 TFLOP/s, block_overhead: 1 us, launch: 5 us}
    points:
      - [0, 1, 32, 8, 4096, 8192, 192, 128, 10, 4000]
streaming:
  rope: {bandwidth: 800 GB/s, launch: 2 us, spread: 0.2, id: copy, source: "a table"}
  copy:
    bandwidth: 900 GB/s
    launch: 2 us
    spread: 0.1
    id: copies
    source: "a table"
    points:
      - ["key concat", 4000, 5000, 2, 10, 7.5]
      - ["", 0, 5000, 1, 5, 6]
)";

std::string with(const std::string& from, const std::string& to) {
  std::string text = kGood;
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

std::string problems_of(const std::string& text) {
  Problems problems;
  read_profile(read_document_text(text, "toy.yaml", problems), problems);
  return format_problems(problems.list());
}

TEST(Profile, ReadsEveryField) {
  Problems problems;
  const Profile p = read_profile(read_document_text(kGood, "toy.yaml", problems), problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
  EXPECT_EQ(p.name, "toy");
  EXPECT_EQ(p.file, "toy.yaml");
  EXPECT_EQ(p.device.sms, 10);
  EXPECT_EQ(p.device.memory_bytes_per_s, 1e12);
  EXPECT_EQ(p.device.bf16_flops_per_s, 100e12);
  EXPECT_EQ(p.device.fp8_flops_per_s, 0);
  EXPECT_DOUBLE_EQ(p.launch_gap_s, 1e-6);
  ASSERT_EQ(p.bandwidth_by_sms.size(), 2u);
  EXPECT_EQ(p.bandwidth_by_sms[0], (std::pair{5, 0.8}));
  ASSERT_EQ(p.gemms.size(), 1u);
  EXPECT_EQ(p.gemms[0].inputs, NumberFormat::bf16);
  EXPECT_EQ(p.gemms[0].model.flops_per_s_per_sm, 10e12);
  ASSERT_EQ(p.gemms[0].points.size(), 1u);
  EXPECT_EQ(p.gemms[0].points[0].k, 4096);
  EXPECT_DOUBLE_EQ(p.gemms[0].points[0].seconds, 123.5e-6);
  ASSERT_EQ(p.attention.size(), 1u);
  EXPECT_TRUE(p.attention[0].backward);
  const AttentionCore& a = p.attention[0].points.at(0).shape;
  EXPECT_FALSE(a.causal);
  EXPECT_EQ(a.kv_len, 8192);
  EXPECT_EQ(a.d_v, 128);
  EXPECT_EQ(p.streaming.at(StreamingKind::rope).bytes_per_s, 800e9);
  EXPECT_TRUE(p.streaming.at(StreamingKind::rope).points.empty());
  const std::vector<StreamingPoint>& copies = p.streaming.at(StreamingKind::copy).points;
  ASSERT_EQ(copies.size(), 2u);
  EXPECT_EQ(copies[0].label, "key concat");
  EXPECT_EQ(copies[0].bytes_read, 4000);
  EXPECT_EQ(copies[0].bytes_written, 5000);
  EXPECT_EQ(copies[0].launches, 2);
  EXPECT_EQ(copies[0].sms, 10);
  EXPECT_DOUBLE_EQ(copies[0].seconds, 7.5e-6);
  EXPECT_EQ(copies[1].label, "");
}

TEST(Profile, ReadsAnFp32RateAndTimesThatContainTheGap) {
  Problems problems;
  std::string text = with("bf16: 100 TFLOP/s", "bf16: 100 TFLOP/s\n  fp32: 10 TFLOP/s");
  text.erase(text.find("launch_gap: 1 us\n"), 17);
  const Profile p = read_profile(read_document_text(text, "toy.yaml", problems), problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
  EXPECT_EQ(p.device.fp32_flops_per_s, 10e12);
  EXPECT_EQ(p.launch_gap_s, 0);
}

struct Malformed {
  const char* from;
  const char* to;
  const char* location;
  const char* message;
};

class MalformedProfile : public testing::TestWithParam<Malformed> {};

TEST_P(MalformedProfile, IsRefusedWhereItIsWrong) {
  const Malformed& m = GetParam();
  const std::string problems = problems_of(with(m.from, m.to));
  EXPECT_NE(problems.find(m.location), std::string::npos) << problems;
  EXPECT_NE(problems.find(m.message), std::string::npos) << problems;
}

INSTANTIATE_TEST_SUITE_P(
    Each, MalformedProfile,
    testing::Values(
        Malformed{"launch_gap: 1 us", "launch_gapp: 1 us", "toy.yaml:9:", "launch_gap"},
        Malformed{"  sms: 10", "  sms: 0", "toy.yaml:4:", "sms"},
        Malformed{"    source: \"a table\"\n    inputs", "    inputs", "toy.yaml:17:", "source"},
        Malformed{"source: \"a sweep\"", "source: \"\"", "toy.yaml:12:", "who measured"},
        Malformed{"    - [10, 1.0]", "    - [4, 1.0]", "toy.yaml:15:", "ascend"},
        Malformed{"inputs: bf16\n    pass", "inputs: bf17\n    pass", "toy.yaml:19:", "bf16"},
        Malformed{"[1, 1024, 1024, 4096, 10, 123.5]", "[1, 1024, 1024, 4096, 10]",
                  "toy.yaml:25:", "expected [groups, m, n, k, sms, microseconds]"},
        Malformed{"[1, 1024, 1024, 4096, 10, 123.5]", "[1, 0, 1024, 4096, 10, 123.5]",
                  "toy.yaml:25:", "above zero"},
        Malformed{"[1, 1024, 1024, 4096, 10, 123.5]", "[1, 1.5, 1024, 4096, 10, 123.5]",
                  "toy.yaml:25:13", "whole"},
        Malformed{"[[128, 128]]", "[]", "toy.yaml:22:", "no tile"},
        Malformed{"launch: 2 us, memory", "launch: 2 GB, memory", "toy.yaml:23:", "launch"},
        Malformed{"  rope:", "  ropes:", "toy.yaml:36:3", "did you mean 'rope'"},
        Malformed{"[\"key concat\", 4000, 5000, 2, 10, 7.5]", "[4000, 5000, 2, 10, 7.5]",
                  "toy.yaml:44:", "expected [label, bytes read"},
        Malformed{"[\"key concat\", 4000, 5000, 2, 10, 7.5]", "[[], 4000, 5000, 2, 10, 7.5]",
                  "toy.yaml:44:10", "a label is"},
        Malformed{"4000, 5000, 2, 10, 7.5", "4000, 5000, 0, 10, 7.5", "toy.yaml:44:36", "1"},
        Malformed{"\"\", 0, 5000, 1, 5, 6", "\"\", 0, 0, 1, 5, 6", "toy.yaml:45:", "something"},
        Malformed{"[[128, 128]]", "128", "toy.yaml:22:", "must be a list"},
        Malformed{"[[128, 128]]", "[[128]]", "toy.yaml:22:", "rows, columns"},
        Malformed{"direction: backward", "direction: sideways", "toy.yaml:30:", "backward"}));

TEST(Profile, ReportsEveryProblemAtOnce) {
  std::string text = with("  sms: 10", "  sms: ten");
  text += "surprise: 1\n";
  const std::string problems = problems_of(text);
  EXPECT_NE(problems.find("toy.yaml:4:"), std::string::npos) << problems;
  EXPECT_NE(problems.find("surprise"), std::string::npos) << problems;
}

class ShippedProfile : public testing::TestWithParam<const char*> {};

TEST_P(ShippedProfile, IsReadWithoutProblemsAndCitesEverything) {
  Problems problems;
  const std::string path =
      std::string(ORRERY_SOURCE_DIR) + "/scenarios/profiles/" + GetParam() + ".yaml";
  const Profile p = read_profile(read_document(path, problems), problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
  EXPECT_EQ(p.name, GetParam());
  EXPECT_FALSE(p.bandwidth_by_sms.empty());
  EXPECT_EQ(p.bandwidth_by_sms.back(), (std::pair{p.device.sms, 1.0}));
  // A step needs every kind; a missing one would be priced at peak.
  EXPECT_EQ(p.streaming.size(), static_cast<std::size_t>(StreamingKind::reduction) + 1);
  for (const GemmTable& t : p.gemms) {
    EXPECT_GT(t.source.size(), 20u) << t.id;
    EXPECT_GT(t.spread, 0) << t.id;
    // The worst are skinny FP8 GEMMs (n = 128, m = 32768), whose kernels leave most of an SM idle.
    for (const GemmPoint& point : t.points) {
      EXPECT_LT(std::abs(point.at.residual), 2.0) << t.id << " " << point.m << "x" << point.n;
    }
  }
  for (const bool backward : {false, true}) {
    EXPECT_TRUE(std::any_of(p.attention.begin(), p.attention.end(), [&](const AttentionTable& t) {
      return t.backward == backward && t.inputs == NumberFormat::bf16;
    }));
  }
}

TEST_P(ShippedProfile, NamesTheTrainingTraceOnlyWhereItSaysSo) {
  Problems problems;
  const std::string path =
      std::string(ORRERY_SOURCE_DIR) + "/scenarios/profiles/" + GetParam() + ".yaml";
  const Profile p = read_profile(read_document(path, problems), problems);
  const auto from_trace = [](const std::string& source) {
    return source.find("profile-data") != std::string::npos ||
           source.find("train.json") != std::string::npos;
  };
  bool any = false;
  for (const GemmTable& t : p.gemms) any = any || from_trace(t.source);
  for (const AttentionTable& t : p.attention) any = any || from_trace(t.source);
  for (const auto& [kind, rate] : p.streaming) any = any || from_trace(rate.source);
  EXPECT_EQ(any, p.name == "h800_trace");
}

INSTANTIATE_TEST_SUITE_P(All, ShippedProfile,
                         testing::Values("h800", "h800_deepgemm_2025_04", "h800_trace", "h100",
                                         "h200", "b200", "a100", "h100_from_h200",
                                         "h800_from_h200"),
                         [](const auto& param_info) { return std::string(param_info.param); });

}  // namespace
}  // namespace orrery
