#include "kernels/probe_plan.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "sim/config.hpp"
#include "sim/profile.hpp"

namespace orrery {
namespace {

TEST(ProbePlan, MeasuresUpToTheDevicesSms) {
  EXPECT_EQ(sms_to_measure(132), (std::vector<int>{8, 16, 20, 32, 48, 64, 80, 96, 104, 108, 112,
                                                   116, 120, 124, 128, 132}));
  EXPECT_EQ(sms_to_measure(108), (std::vector<int>{8, 16, 20, 32, 48, 64, 80, 96, 104, 108}));
  EXPECT_EQ(sms_to_measure(148).back(), 148);
  EXPECT_EQ(sms_to_measure(148).size(), 17u);
  EXPECT_EQ(sms_to_measure(6), (std::vector<int>{6}));
}

TEST(ProbePlan, BuffersAreWholeChunksWithinAQuarterOfFreeMemory) {
  // Plenty of memory: 1 MiB = 65536 words of 16 bytes = 128 chunks of 512.
  EXPECT_EQ(buffer_words(std::uint64_t{64} << 30, 1 << 20, 16, 512), 65536u);
  // A quarter of 100,000 bytes is 25,000 = 1562 words = 3 chunks and 26 words.
  EXPECT_EQ(buffer_words(100'000, 1 << 20, 16, 512), 1536u);
  EXPECT_EQ(buffer_words(1000, 1 << 20, 16, 512), 0u);
}

TEST(ProbePlan, AKernelSpansFromItsFirstBlockToItsLast) {
  // Three kernels of two blocks, late in 2026 on the timer, where doubles step by 256 ns.
  const std::uint64_t t = 1'795'000'000'000'000'000;
  const std::vector<Stamp> stamps{{t + 10, t + 100},    {t, t + 90},         // [0, 100]
                                  {t + 800, t + 901},   {t + 803, t + 880},  // [800, 901]
                                  {t + 1511, t + 1600}, {t + 1500, t + 1590}};
  const ChainTimes times = chain_times(stamps, 2);
  EXPECT_EQ(times.duration_ns, (std::vector<double>{100, 101, 100}));
  EXPECT_EQ(times.gap_ns, (std::vector<double>{700, 599}));
  EXPECT_EQ(times.period_ns, (std::vector<double>{800, 700}));
}

TEST(ProbePlan, TheFirstBlockNeedNotBeginFirst) {
  const std::vector<Stamp> stamps{{1000, 1100}, {900, 1050}, {1500, 1600}, {1400, 1650}};
  EXPECT_EQ(chain_times(stamps, 2).duration_ns, (std::vector<double>{200, 250}));
  EXPECT_EQ(chain_times(stamps, 2).period_ns, (std::vector<double>{500}));
}

TEST(ProbePlan, ACoarseTimerIsAveraged) {
  const std::vector<double> fine{700, 710, 900};
  EXPECT_DOUBLE_EQ(centre_ns(fine, 32), 710);
  // Gaps of 750 ns read off a timer that steps by 1000 ns: three quarters of them read 1000.
  const std::vector<double> coarse{1000, 1000, 0, 1000};
  EXPECT_DOUBLE_EQ(centre_ns(coarse, 1000), 750);
}

TEST(ProbePlan, ReadsTheDriversRelease) {
  EXPECT_EQ(driver_release("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 "
                           "01:15:15 UTC 2023\nGCC version:  gcc version 12.2.0\n"),
            "535.104.05");
  EXPECT_EQ(driver_release("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  "
                           "Release Build  (root@host)\n"),
            "580.65.06");
  EXPECT_EQ(driver_release(""), "unknown");
}

/// Round numbers: full copy 2 TB/s, gap 1 us, period 3 us, so launch 2 us.
ProbeResult sketch() {
  ProbeResult r;
  r.device = "NVIDIA \"Test\" GPU";
  r.sms = 132;
  r.driver = "580.65.06";
  r.driver_cuda = 13000;
  r.runtime_cuda = 12090;
  r.sm_mhz_before = 1980;
  r.sm_mhz_after = 1755;
  r.stream = {.gap_ns = {1010, 16, 2044},
              .gap_centre_ns = 1000,
              .period_centre_ns = 3000,
              .duration_centre_ns = 1990,
              .event_period_ns = 3001};
  r.graph = r.stream;
  r.graph.gap_centre_ns = 625;
  const auto point = [](int sms, int seen, double bytes_per_s) {
    const Summary s{.median = bytes_per_s, .mad = 1e9, .samples = 20};
    return BandwidthPoint{.sms = sms, .sms_seen = seen, .copy = s, .read = s, .write = s};
  };
  r.bandwidth = {point(32, 32, 1e12), point(64, 63, 1.5e12), point(120, 120, 2.02e12),
                 point(132, 132, 2e12)};
  // 1e9 bytes read and written at 2e12 bytes/s take 1 ms, 1.003 ms with launch and gap.
  r.copies = {{.bytes = 1'000'000'000, .seconds = 1.003e-3}, {.bytes = 1'000'000, .seconds = 5e-6}};
  return r;
}

TEST(ProbePlan, ForetellsCopies) {
  EXPECT_DOUBLE_EQ(predicted_copy_s(sketch(), 1'000'000'000), 1.003e-3);
  EXPECT_DOUBLE_EQ(predicted_copy_s(sketch(), 1'000'000), 4e-6);
}

/// What the probe writes, put where it belongs in a profile, is read as that.
TEST(ProbePlan, AProfileReadsWhatIsWritten) {
  const std::string text = R"(name: probed
device:
  name: "NVIDIA Test GPU"
  sms: 132
  memory: 80 GB
  memory_bandwidth: 3350 GB/s
  bf16: 989.4 TFLOP/s
  source: "a data sheet"
)" + to_yaml(sketch());
  Problems problems;
  const Profile p = read_profile(read_document_text(text, "probed.yaml", problems), problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());

  EXPECT_DOUBLE_EQ(p.launch_gap_s, 1e-6);
  EXPECT_NE(p.launch_gap_source.find("in a graph 0.625 us"), std::string::npos);
  EXPECT_NE(p.launch_gap_source.find("NVIDIA \"Test\" GPU, 132 SMs, driver 580.65.06 (CUDA 13.0), "
                                     "runtime 12.9, SM clock 1980 MHz before and 1755 MHz after"),
            std::string::npos);
  // 64 is left out, since only 63 SMs were seen; 120 beat all 132, which is a share of 1.
  EXPECT_EQ(p.bandwidth_by_sms,
            (std::vector<std::pair<int, double>>{{32, 0.5}, {120, 1}, {132, 1}}));
  EXPECT_NE(text.find("LEFT OUT: ran on 63 SMs"), std::string::npos);
  const StreamingRate& copy = p.streaming.at(StreamingKind::copy);
  EXPECT_DOUBLE_EQ(copy.bytes_per_s, 2e12);
  EXPECT_DOUBLE_EQ(copy.launch_s, 2e-6);
  EXPECT_DOUBLE_EQ(copy.spread, 0.2);  // 4 us foretold, 5 us measured
  EXPECT_FALSE(copy.derived);
}

}  // namespace
}  // namespace orrery
