#include "reports/trace.hpp"

#include <gtest/gtest.h>
#include <zlib.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "sketch.hpp"

namespace orrery {
namespace {

using nlohmann::json;
using test::on;
using test::Sketch;

/// Two pipeline ranks: F on 0, a send, F on 1 with an exchange whose tail runs under the B that
/// follows.
Study two_ranks() {
  Sketch s(2);
  const auto tag = [](Phase phase, std::uint16_t layer) {
    return OpTag{.micro_batch = 7, .layer = layer, .stage = 0, .phase = phase};
  };
  s.begin(CellKind::forward, 7);
  s.op(1'000'400, {on(StreamKind::compute, 0)}, {}, tag(Phase::attn_forward, 3));
  const OpId a = s.op(2'000'400, {on(StreamKind::compute, 0)}, {}, tag(Phase::attn_forward, 3));
  const OpId m = s.op(1'500'300, {on(StreamKind::compute, 0)}, {}, tag(Phase::mlp_forward, 3));
  s.end();
  s.builder.memory({a, RankId(0), MemoryKind::activations, false, 1000});
  s.builder.memory({m, RankId(0), MemoryKind::activations, true, -400});
  const OpId send =
      s.op(2'000'000, {on(StreamKind::send_next, 0), on(StreamKind::receive_previous, 1)}, {m},
           tag(Phase::pipeline_forward, kNoLayer));
  s.begin(CellKind::forward, 7);
  const OpId f = s.op(3'000'000, {on(StreamKind::compute, 1)}, {send}, tag(Phase::attn_forward, 4));
  s.op(5'000'000, {on(StreamKind::expert_exchange, 1)}, {f}, tag(Phase::dispatch_forward, 4));
  s.end();
  s.begin(CellKind::backward, 7);
  s.op(4'000'000, {on(StreamKind::compute, 1)}, {}, tag(Phase::attn_backward, 4));
  s.op(4'000'000, {on(StreamKind::compute, 1)}, {}, tag(Phase::attn_backward, 4));
  s.end();
  Study study;
  study.run.prices = s.prices;
  auto [program, timeline] = s.run();
  study.program = std::move(program);
  study.run.timeline = std::move(timeline);
  study.report.scenario = "two \"ranks\"";
  for (int r = 0; r < 2; ++r) {
    RankReport rank;
    rank.rank = static_cast<std::uint32_t>(r);
    rank.position = r;
    rank.stages = {r};
    study.report.ranks.push_back(rank);
  }
  return study;
}

std::string slurp(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::string slurp_gzip(const std::string& path) {
  std::string text;
  gzFile file = gzopen(path.c_str(), "rb");
  char chunk[4096];
  for (int n = gzread(file, chunk, sizeof chunk); n > 0; n = gzread(file, chunk, sizeof chunk)) {
    text.append(chunk, static_cast<std::size_t>(n));
  }
  EXPECT_EQ(gzclose(file), Z_OK);
  return text;
}

class Trace : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  json write(const std::vector<std::uint32_t>& ranks) const {
    write_trace(two_ranks(), ranks, path("trace.json"));
    return json::parse(slurp(path("trace.json")));
  }

  std::string folder_;
};

std::vector<json> select(const json& trace, const std::string& key, const std::string& value) {
  std::vector<json> found;
  for (const json& event : trace["traceEvents"]) {
    if (event.value(key, "") == value) found.push_back(event);
  }
  return found;
}

TEST_F(Trace, SlicesOfALaneAscendAndDoNotOverlap) {
  std::map<std::pair<int, int>, std::int64_t> end_ns;
  int slices = 0;
  for (const json& event : select(write({0, 1}), "ph", "X")) {
    const auto ns = [&](const char* key) {
      return std::llround(event.at(key).get<double>() * 1000);
    };
    std::int64_t& end = end_ns[{event.at("pid").get<int>(), event.at("tid").get<int>()}];
    EXPECT_GE(ns("ts"), end) << event;
    EXPECT_GE(ns("dur"), 0) << event;
    end = ns("ts") + ns("dur");
    ++slices;
  }
  // 3 cells; ops: 3 + 2 ends of the send + 4; phases: attn and mlp of rank 0, 2 ends of the send,
  // attn(F), dispatch(F), attn(B) of rank 1
  EXPECT_EQ(slices, 3 + 9 + 7);
}

TEST_F(Trace, TimesAreMicroseconds) {
  const json mlp = select(write({0}), "name", "mlp(F)").at(0);
  EXPECT_DOUBLE_EQ(mlp.at("ts").get<double>(), 3.001);   // 3,000,800 ps, rounded to ns
  EXPECT_DOUBLE_EQ(mlp.at("dur").get<double>(), 1.500);  // ends at 4,501,100 ps
  EXPECT_EQ(mlp.at("args").at("layer"), 3);
  EXPECT_EQ(mlp.at("args").at("micro_batch"), 7);
}

TEST_F(Trace, OpsOfOnePhaseShareASlice) {
  const json trace = write({0, 1});
  const auto attention = select(trace, "name", "attn(F)");
  ASSERT_EQ(attention.size(), 2u);  // one a rank
  EXPECT_DOUBLE_EQ(attention[0].at("dur").get<double>(), 3.001);
  EXPECT_EQ(select(trace, "name", "attn(B)").size(), 1u);
}

TEST_F(Trace, ArrowsJoinBothEndsOfASend) {
  const json trace = write({0, 1});
  const auto starts = select(trace, "ph", "s");
  const auto ends = select(trace, "ph", "f");
  ASSERT_EQ(starts.size(), 1u);
  ASSERT_EQ(ends.size(), 1u);
  EXPECT_EQ(starts[0].at("id"), ends[0].at("id"));
  EXPECT_EQ(starts[0].at("cat"), ends[0].at("cat"));
  EXPECT_EQ(starts[0].at("name"), ends[0].at("name"));
  EXPECT_EQ(starts[0].at("pid"), 0);
  EXPECT_EQ(ends[0].at("pid"), 1);
  EXPECT_EQ(ends[0].at("bp"), "e");
  const auto within_a_slice = [&](const json& flow) {
    for (const json& slice : select(trace, "ph", "X")) {
      const double ts = slice.at("ts").get<double>();
      if (slice.at("pid") == flow.at("pid") && slice.at("tid") == flow.at("tid") &&
          ts <= flow.at("ts").get<double>() &&
          flow.at("ts").get<double>() < ts + slice.at("dur").get<double>()) {
        return true;
      }
    }
    return false;
  };
  EXPECT_TRUE(within_a_slice(starts[0]));
  EXPECT_TRUE(within_a_slice(ends[0]));
}

TEST_F(Trace, ArrowsToRanksThatAreNotShownAreLeftOut) {
  const json trace = write({0});
  EXPECT_TRUE(select(trace, "ph", "s").empty());
  for (const json& event : trace["traceEvents"]) EXPECT_EQ(event.at("pid"), 0);
}

TEST_F(Trace, MemoryIsACounter) {
  const auto steps = select(write({0}), "ph", "C");
  ASSERT_EQ(steps.size(), 2u);
  EXPECT_EQ(steps[0].at("args").at("activations"), 1000);
  EXPECT_DOUBLE_EQ(steps[0].at("ts").get<double>(), 1.0);  // the op starts at 1,000,400 ps
  EXPECT_EQ(steps[1].at("args").at("activations"), 600);
}

TEST_F(Trace, MetadataCarriesNoTime) {
  const json trace = write({0, 1});
  int names = 0;
  for (const json& event : select(trace, "ph", "M")) {
    EXPECT_FALSE(event.contains("ts"));
    if (event.at("name") == "process_name") ++names;
  }
  EXPECT_EQ(names, 2);
  EXPECT_EQ(trace.at("otherData").at("scenario"), "two \"ranks\"");
}

TEST_F(Trace, GzipHoldsTheSameText) {
  write_trace(two_ranks(), {0, 1}, path("trace.json"));
  write_trace(two_ranks(), {0, 1}, path("trace.json.gz"));
  EXPECT_EQ(slurp_gzip(path("trace.json.gz")), slurp(path("trace.json")));
  EXPECT_EQ(slurp(path("trace.json.gz")).substr(0, 2), "\x1f\x8b");
}

TEST_F(Trace, NothingIsLeftWhereItCannotBeWritten) {
  EXPECT_THROW(write_trace(two_ranks(), {0}, path("no/such/folder/t.json")), std::runtime_error);
  EXPECT_THROW(write_trace(two_ranks(), {0}, folder_), std::runtime_error);
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

}  // namespace
}  // namespace orrery
