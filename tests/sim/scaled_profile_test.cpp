#include "sim/scaled_profile.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

constexpr double kLaunch_s = 3e-6;
constexpr double kRate = 3e12;      // of memory, bytes/s
constexpr double kSmRate = 5e12;    // FLOP/s of an SM
constexpr double kLoadRate = 1e12;  // bytes/s into an SM

// One tile shape and round numbers. The first point is bound by memory, the second by its SMs: 10
// waves of 128 x 128 over k = 8192. Both were measured 10 % above the skeleton.
constexpr Gemm kBytes{.inputs = NumberFormat::bf16, .groups = 1, .m = 128, .n = 12800, .k = 8192};
constexpr Gemm kFlops{.inputs = NumberFormat::bf16, .groups = 1, .m = 12800, .n = 1280, .k = 8192};

double bytes(const Gemm& g) {
  return 2.0 * (static_cast<double>(g.m * g.k) + static_cast<double>(g.n * g.k) +
                static_cast<double>(g.m * g.n));
}

/// 10 waves of tiles on 100 SMs; the store of a tile takes its share of the memory.
double tiles_s(double clock, double memory) {
  const double tile = 0.5e-6 / clock + 8192.0 * 2 * 128 * 128 / (kSmRate * clock) +
                      8192.0 * 2 * 256 / (kLoadRate * clock) +
                      128.0 * 128 * 2 * 100 / (kRate * memory);
  return kLaunch_s + 10 * tile;
}

double bytes_s(double memory) {
  return kLaunch_s + bytes(kBytes) / (kRate * memory);
}

class ScaledProfile : public ::testing::Test {
 protected:
  ScaledProfile() : folder_(fs::path(::testing::TempDir()) / "orrery_scaled_profile") {
    fs::create_directories(folder_);
    std::ofstream(folder_ / "base.yaml") << fmt::format(
        "name: base\n"
        "device: {{name: Old, sms: 100, memory: 80 GB, memory_bandwidth: 4 TB/s, bf16: 800 "
        "TFLOP/s,\n"
        "         source: made up}}\n"
        "launch_gap: 1 us\n"
        "launch_gap_source: made up\n"
        "bandwidth_by_sms: {{source: made up, points: [[20, 0.4], [50, 0.8], [100, 1]]}}\n"
        "gemm:\n"
        "  - {{id: g, source: made up, inputs: bf16, pass: forward, spread: 0.03,\n"
        "     model: {{tiles: [[128, 128]], sm_rate: 5 TFLOP/s, sm_operand_rate: 1 TB/s,\n"
        "             tile_overhead: 0.5 us, launch: 3 us, memory_bandwidth: 3 TB/s}},\n"
        "     points: [[1, 128, 12800, 8192, 100, {}], [1, 12800, 1280, 8192, 100, {}]]}}\n"
        "attention:\n"
        "  - {{id: a, source: made up, inputs: bf16, direction: forward, spread: 0.03,\n"
        "     model: {{sm_rate: 5 TFLOP/s, block_overhead: 1 us, launch: 3 us}},\n"
        "     points: [[0, 1, 100, 100, 128, 4096, 128, 128, 100, 200]]}}\n"
        "streaming:\n"
        "  copy: {{bandwidth: 3 TB/s, launch: 2 us, spread: 0.05, id: c, source: made up,\n"
        "         points: [[\"\", 30000000, 30000000, 1, 100, 33]]}}\n"
        "  router: {{bandwidth: 3 TB/s, launch: 2 us, spread: 0.05, id: r, source: made up}}\n",
        1.1e6 * bytes_s(1), 1.1e6 * tiles_s(1, 1));
  }
  ~ScaledProfile() override { fs::remove_all(folder_); }

  /// A profile with these keys under `scaled`, and these beside it.
  Profile read(
      const std::string& scaled, const std::string& more = "",
      const std::string& device = "sms: 100, memory_bandwidth: 3 TB/s, bf16: 800 TFLOP/s") {
    return read_profile(
        read_document_text(
            fmt::format("name: new\n"
                        "device: {{name: New, memory: 80 GB, {}, source: made up}}\n"
                        "scaled: {{from: base.yaml, spread: 4 %, source: a test{}}}\n{}",
                        device, scaled, more),
            (folder_ / "new.yaml").string(), problems_),
        problems_);
  }
  std::string problems(const std::string& scaled, const std::string& device) {
    problems_ = {};
    read(scaled, "", device);
    return format_problems(problems_.list());
  }

  fs::path folder_;
  Problems problems_;
};

/// Without the launch gap.
double priced(const Gemm& g, const Profile& p) {
  return seconds(price_gemm(g, 0, p).time_ps) - p.launch_gap_s;
}

TEST_F(ScaledProfile, GemmsChangeWhereTheBytesDecide) {
  const Profile p = read("");  // memory: 3 of 4
  problems_.throw_if_any();
  EXPECT_DOUBLE_EQ(p.launch_gap_s, 1e-6);
  EXPECT_NEAR(priced(kBytes, p), 1.1 * bytes_s(0.75), 2e-12);
  EXPECT_NEAR(priced(kFlops, p), 1.1 * tiles_s(1, 0.75), 2e-12);
  EXPECT_LT(priced(kFlops, p), 1.1 * 1.05 * tiles_s(1, 1));
  const Price price = price_gemm(kBytes, 0, p);
  EXPECT_EQ(price.source, PriceSource::derived);
  EXPECT_EQ(price.note, "g, of base: compute as it is, memory x0.75");
  EXPECT_DOUBLE_EQ(price.spread, 0.05);  // of 3 and 4 %
}

TEST_F(ScaledProfile, AchievedBandwidthsAndClocksGoBeforeDataSheets) {
  const Profile p =
      read(", bandwidth: {from: 2 TB/s, to: 1 TB/s}, clock: {from: 2 GHz, to: 1.6 GHz}");
  problems_.throw_if_any();
  EXPECT_NEAR(priced(kBytes, p), 1.1 * bytes_s(0.5), 2e-12);
  EXPECT_NEAR(priced(kFlops, p), 1.1 * tiles_s(0.8, 0.5), 2e-12);
  const AttentionCore core{.inputs = NumberFormat::bf16,
                           .causal = false,
                           .batch = 1,
                           .heads = 100,
                           .kv_heads = 100,
                           .q_len = 128,
                           .kv_len = 4096,
                           .d_qk = 128,
                           .d_v = 128};
  // One wave: 32 key blocks of 2 * 128^2 * 256 FLOP after the prologue.
  const double blocks_s = 1e-6 + 32 * 2.0 * 128 * 128 * 256 / kSmRate;
  EXPECT_NEAR(seconds(price_attention(core, 0, p).time_ps) - 1e-6,
              200e-6 * (kLaunch_s + blocks_s / 0.8) / (kLaunch_s + blocks_s), 2e-12);
  EXPECT_EQ(price_attention(core, 0, p).note, "a, of base: compute x0.8");
}

TEST_F(ScaledProfile, StreamingKernelsGoByTheBandwidth) {
  const Profile p = read("");
  problems_.throw_if_any();
  // 60 MB took 33 us, of the skeleton's 2 + 20; now it is 2 + 26.7.
  const Streaming copy{.kind = StreamingKind::copy,
                       .bytes_read = 30'000'000,
                       .bytes_written = 30'000'000,
                       .launches = 1};
  EXPECT_NEAR(seconds(price_streaming(copy, "", 0, p).time_ps) - 1e-6, 33e-6 * (2 + 20 / 0.75) / 22,
              2e-12);
  Streaming router = copy;
  router.kind = StreamingKind::router;
  EXPECT_NEAR(seconds(price_streaming(router, "", 0, p).time_ps) - 1e-6, 2e-6 + 20e-6 / 0.75,
              2e-12);
  EXPECT_EQ(price_streaming(router, "", 0, p).source, PriceSource::derived);
  // Half of the SMs draw 3.2 TB/s of 4: all of 3.
  EXPECT_DOUBLE_EQ(bandwidth_share(p, 50), 1);
  EXPECT_DOUBLE_EQ(bandwidth_share(p, 20), 0.4 / 0.75);
}

TEST_F(ScaledProfile, TheSameDieGivesTheSamePrices) {
  Problems problems;
  const Profile base =
      read_profile(read_document((folder_ / "base.yaml").string(), problems), problems);
  const Profile p = read("", "", "sms: 100, memory_bandwidth: 4 TB/s, bf16: 800 TFLOP/s");
  problems_.throw_if_any();
  for (const Gemm& g :
       {kBytes, kFlops,
        Gemm{.inputs = NumberFormat::bf16, .groups = 1, .m = 1000, .n = 3000, .k = 4000}}) {
    for (const int sms : {0, 60})
      EXPECT_EQ(price_gemm(g, sms, p).time_ps, price_gemm(g, sms, base).time_ps);
  }
}

TEST_F(ScaledProfile, WhatTheBaseOnlyCarriesOverIsCarriedOn) {
  const std::string table =
      "inputs: fp8_block, pass: forward, spread: 0.03, derived: true, source: elsewhere,\n"
      "     model: {tiles: [[128, 128]], sm_rate: 5 TFLOP/s, sm_operand_rate: 1 TB/s,\n"
      "             tile_overhead: 0.5 us, launch: 3 us, memory_bandwidth: 3 TB/s},\n"
      "     points: [[1, 128, 12800, 8192, 100, 77]]}\n";
  std::ifstream in(folder_ / "base.yaml");
  std::string text{std::istreambuf_iterator<char>(in), {}};
  text.replace(text.find("attention:"), 0, "  - {id: carried, " + table);
  std::ofstream(folder_ / "base.yaml") << text;
  const Profile p = read("");
  problems_.throw_if_any();
  Gemm g = kBytes;
  g.inputs = NumberFormat::fp8_block;
  EXPECT_NEAR(priced(g, p), 77e-6, 2e-12);
  EXPECT_EQ(price_gemm(g, 0, p).note, "carried");
  EXPECT_EQ(price_gemm(g, 0, p).source, PriceSource::derived);
}

TEST_F(ScaledProfile, ItsOwnTablesComeFirst) {
  const Profile p =
      read("",
           "launch_gap: 2 us\nlaunch_gap_source: made up\n"
           "gemm:\n"
           "  - {id: own, source: made up, inputs: bf16, pass: forward, spread: 0.03,\n"
           "     model: {tiles: [[128, 128]], sm_rate: 5 TFLOP/s, sm_operand_rate: 1 TB/s,\n"
           "             tile_overhead: 0.5 us, launch: 3 us, memory_bandwidth: 3 TB/s},\n"
           "     points: [[1, 128, 12800, 8192, 100, 99]]}\n");
  problems_.throw_if_any();
  EXPECT_EQ(price_gemm(kBytes, 0, p).note, "own");
  EXPECT_EQ(price_gemm(kBytes, 0, p).source, PriceSource::measured);
  EXPECT_NEAR(priced(kBytes, p), 99e-6, 2e-12);
  EXPECT_DOUBLE_EQ(p.launch_gap_s, 2e-6);
}

TEST_F(ScaledProfile, WhatTheRulesDoNotCoverIsAProblem) {
  const std::string sms = problems("", "sms: 90, memory_bandwidth: 3 TB/s, bf16: 800 TFLOP/s");
  EXPECT_NE(
      sms.find("new.yaml:3:16: error: Old has 100 SMs and New has 90: scaling is for the same SMs"),
      std::string::npos)
      << sms;
  const std::string peak = problems("", "sms: 100, memory_bandwidth: 3 TB/s, bf16: 600 TFLOP/s");
  EXPECT_NE(peak.find("New has 0.75 times the peak of Old"), std::string::npos) << peak;
  EXPECT_NE(peak.find("hint: clock: {from:"), std::string::npos) << peak;
  const std::string keys =
      problems(", clok: 3", "sms: 100, memory_bandwidth: 3 TB/s, bf16: 800 TFLOP/s");
  EXPECT_NE(keys.find("did you mean 'clock'?"), std::string::npos) << keys;
  std::ofstream(folder_ / "base.yaml", std::ios::app) << "scaled: {from: x.yaml}\n";
  const std::string twice = problems("", "sms: 100, memory_bandwidth: 3 TB/s, bf16: 800 TFLOP/s");
  EXPECT_NE(twice.find("base.yaml is itself scaled"), std::string::npos) << twice;
  fs::remove(folder_ / "base.yaml");
  const std::string none = problems("", "sms: 100, memory_bandwidth: 3 TB/s, bf16: 800 TFLOP/s");
  EXPECT_NE(none.find("there is no profile file"), std::string::npos) << none;
}

}  // namespace
}  // namespace orrery
