#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <string>

#include "calibrate/derive_profiles.hpp"
#include "calibrate/fit_gemm.hpp"
#include "calibrate/minimise.hpp"
#include "calibrate/table_file.hpp"
#include "sim/config.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

TEST(Minimise, FindsTheFootOfRosenbrocksValley) {
  std::vector<double> x{-1.2, 1.0};
  minimise(x, 0.5, 400, [](const std::vector<double>& v) {
    return 100 * std::pow(v[1] - v[0] * v[0], 2) + std::pow(1 - v[0], 2);
  });
  EXPECT_NEAR(x[0], 1, 1e-4);
  EXPECT_NEAR(x[1], 1, 1e-4);
}

/// A made-up device: what it measures is the skeleton with known constants, times a smooth
/// function.
constexpr int kSms = 100;
const GemmModel kTruth{.tiles = {{128, 256}, {128, 128}, {64, 128}},
                       .flops_per_s_per_sm = 8e12,
                       .operand_bytes_per_s_per_sm = 1.5e11,
                       .tile_s = 1.5e-6,
                       .launch_s = 4e-6,
                       .bytes_per_s = 2e12};

double smooth(const GemmPoint& p) {
  return 1 + 0.1 * std::sin(std::log(static_cast<double>(p.n))) +
         0.05 * std::cos(std::log(static_cast<double>(p.k)));
}

std::vector<GemmPoint> measure(bool only_held_out) {
  std::vector<GemmPoint> points;
  for (const std::int64_t m : {128, 192, 512, 1000, 2048, 4096, 8192, 16384}) {
    for (const std::int64_t n : {128, 256, 384, 768, 1536, 2048, 4096, 7168, 16384}) {
      for (const std::int64_t k : {128, 256, 384, 768, 1536, 2048, 4096, 7168, 16384}) {
        if (held_out(n, k) != only_held_out) continue;
        GemmPoint p{.groups = 1, .m = m, .n = n, .k = k, .sms = kSms, .seconds = 0, .at = {}};
        const Gemm g{.inputs = NumberFormat::bf16, .m = m, .n = n, .k = k};
        p.seconds = gemm_skeleton_s(kTruth, g, kSms, 1) * smooth(p);
        points.push_back(p);
      }
    }
  }
  return points;
}

Profile made_up_device() {
  Profile p;
  p.name = "made-up";
  p.device = {.name = "made up",
              .sms = kSms,
              .memory_bytes = 1e10,
              .memory_bytes_per_s = 2.5e12,
              .bf16_flops_per_s = 1e15,
              .fp8_flops_per_s = 0,
              .source = "nowhere"};
  p.launch_gap_s = 1e-6;
  p.launch_gap_source = "nowhere";
  p.bandwidth_by_sms = {{kSms, 1.0}};
  p.bandwidth_by_sms_source = "nowhere";
  return p;
}

GemmTable fitted() {
  GemmTable table{.id = "made-up",
                  .source = "a \"made-up\" device: none",
                  .inputs = NumberFormat::bf16,
                  .spread = 0.05,
                  .model = kTruth};
  table.model.flops_per_s_per_sm *= 0.6;
  table.model.operand_bytes_per_s_per_sm *= 3;
  table.model.tile_s *= 0.3;
  table.model.launch_s *= 2;
  table.model.bytes_per_s *= 0.7;
  const std::vector<GemmPoint> points = measure(false);
  fit_model(table, points, {1e13, 2.5e12});
  table.points = thin(table, points);
  prepare(table, made_up_device());
  return table;
}

TEST(FitGemm, PredictsLayersItHasNotSeen) {
  const GemmTable table = fitted();
  const std::vector<GemmPoint> unseen = measure(true);
  ASSERT_GT(unseen.size(), 50u);
  const HeldOutError error = error_on(table, unseen, "made-up");
  EXPECT_LT(error.median, 0.04);
  EXPECT_LT(error.percentile_90, 0.10);
  EXPECT_LT(std::abs(error.bias), 0.02);
  // The residual is worth having: the skeleton alone is off by the smooth part.
  GemmTable bare = table;
  bare.points.clear();
  EXPECT_GT(error_on(bare, unseen, "bare").median, error.median);
}

TEST(FitGemm, KeepsToTheDataSheet) {
  GemmTable table{.id = "t", .source = "", .inputs = NumberFormat::bf16, .model = kTruth};
  fit_model(table, measure(false), {5e12, 1e12});  // less than the points need
  EXPECT_LE(table.model.flops_per_s_per_sm, 5e12 * 1.1);
  EXPECT_LE(table.model.bytes_per_s, 1e12 * 1.1);
}

TEST(FitGemm, LeavesFixedConstantsAlone) {
  GemmTable table{.id = "t", .source = "", .inputs = NumberFormat::bf16, .model = kTruth};
  table.model.tile_s = 3e-6;
  table.model.launch_s = 9e-6;
  fit_model(table, measure(false), {1e13, 2.5e12}, {2});
  EXPECT_EQ(table.model.tile_s, 3e-6);
  EXPECT_NE(table.model.launch_s, 9e-6);
}

TEST(FitGemm, HoldsOutOneLayerInFive) {
  int out = 0;
  int all = 0;
  for (std::int64_t n = 128; n <= 16384; n += 128) {
    for (std::int64_t k = 128; k <= 16384; k += 128) {
      out += held_out(n, k) ? 1 : 0;
      all += 1;
    }
  }
  EXPECT_NEAR(static_cast<double>(out) / all, 0.2, 0.01);
}

TEST(FitGemm, AnOutlierIsNotChosen) {
  GemmTable table{.id = "t", .source = "", .inputs = NumberFormat::bf16, .model = kTruth};
  std::vector<GemmPoint> points;
  for (const std::int64_t m : {2048, 2304, 2560, 2816, 3072}) {  // one cell of the grid
    const Gemm g{.inputs = NumberFormat::bf16, .m = m, .n = 4096, .k = 4096};
    points.push_back({.groups = 1,
                      .m = m,
                      .n = 4096,
                      .k = 4096,
                      .sms = kSms,
                      .seconds = gemm_skeleton_s(kTruth, g, kSms, 1),
                      .at = {}});
  }
  points[2].seconds *= 4;  // a hiccup of the measurement
  const std::vector<GemmPoint> kept = thin(table, points);
  ASSERT_EQ(kept.size(), 1u);
  EXPECT_NE(kept[0].m, points[2].m);
}

TEST(Summary, MedianAndPercentiles) {
  std::vector<double> ratios;
  for (int i = 1; i <= 100; ++i) ratios.push_back(1 + i / 100.0);  // 1 % ... 100 % too much
  const HeldOutError e = summarise("x", ratios);
  EXPECT_NEAR(e.median, 0.51, 1e-9);
  EXPECT_NEAR(e.percentile_68, 0.69, 1e-9);
  EXPECT_NEAR(e.percentile_90, 0.91, 1e-9);
  EXPECT_NEAR(e.bias, 0.51, 1e-9);
}

TEST(WriteProfile, ReadsBackWithTheSamePrices) {
  DerivedProfile d;
  d.profile = made_up_device();
  d.comment = "two\nlines";
  d.profile.gemms = {fitted()};
  AttentionTable attention{.id = "a",
                           .source = "a\\b",
                           .inputs = NumberFormat::bf16,
                           .backward = true,
                           .spread = 0.1,
                           .model = {4e12, 1e-6, 5e-6}};
  const AttentionCore core{.inputs = NumberFormat::bf16,
                           .backward = true,
                           .causal = false,
                           .batch = 2,
                           .heads = 16,
                           .kv_heads = 4,
                           .q_len = 1024,
                           .kv_len = 2048,
                           .d_qk = 192,
                           .d_v = 128};
  attention.points = {{.shape = core, .sms = kSms, .seconds = 1e-3, .at = {}}};
  d.profile.attention = {attention};
  d.profile.streaming[StreamingKind::permute] = {.bytes_per_s = 1.5e12,
                                                 .launch_s = 2e-6,
                                                 .derived = true,
                                                 .spread = 0.2,
                                                 .id = "s",
                                                 .source = "s"};
  const Streaming measured{
      .kind = StreamingKind::copy, .bytes_read = 4096, .bytes_written = 0, .launches = 3};
  d.profile.streaming[StreamingKind::copy] = {.bytes_per_s = 1.5e12,
                                              .launch_s = 2e-6,
                                              .spread = 0.2,
                                              .id = "s",
                                              .source = "s",
                                              .points = {{.label = "a \"b\"",
                                                          .bytes_read = 4096,
                                                          .launches = 3,
                                                          .sms = kSms,
                                                          .seconds = 12.25e-6}}};
  d.profile.device.fp32_flops_per_s = 1e12;
  prepare(d.profile);

  Problems problems;
  const Profile read =
      read_profile(read_document_text(write_profile(d), "written.yaml", problems), problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
  EXPECT_EQ(read.gemms.at(0).source, d.profile.gemms[0].source);
  EXPECT_EQ(read.gemms.at(0).points.size(), d.profile.gemms[0].points.size());
  for (const std::int64_t m : {128, 1000, 5000}) {
    const Gemm g{.inputs = NumberFormat::bf16, .m = m, .n = 3000, .k = 5000};
    EXPECT_NEAR(static_cast<double>(price_gemm(g, 80, read).time_ps),
                static_cast<double>(price_gemm(g, 80, d.profile).time_ps), 2e6);  // 2 us of ms
  }
  EXPECT_EQ(price_attention(core, 0, read).time_ps, price_attention(core, 0, d.profile).time_ps);
  const Streaming s{.kind = StreamingKind::permute, .bytes_read = 1 << 30};
  EXPECT_EQ(price_streaming(s, "", 0, read).time_ps, price_streaming(s, "", 0, d.profile).time_ps);
  EXPECT_EQ(price_streaming(measured, "a \"b\"", 0, read).time_ps,
            from_seconds(12.25e-6 + d.profile.launch_gap_s));
  EXPECT_EQ(read.device.fp32_flops_per_s, 1e12);
}

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& text) {
    path_ = testing::TempDir() + "orrery_table_" + std::to_string(::getpid()) + ".csv";
    std::ofstream(path_) << text;
  }
  ~TemporaryFile() { std::remove(path_.c_str()); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(TableFile, ReadsCellsByColumnName) {
  const TemporaryFile file("a,b\r\n1.5,x\n\n-2e3,\"y, z\"\n");
  const TableFile table(file.path());
  ASSERT_EQ(table.size(), 2u);
  EXPECT_EQ(table.number(1, table.column("a")), -2000);
  EXPECT_EQ(table.text(1, table.column("b")), "y, z");
}

TEST(TableFile, RefusesWhatIsWrong) {
  const TemporaryFile ragged("a,b\n1,2\n3\n");
  EXPECT_THROW(TableFile{ragged.path()}, InputError);
  EXPECT_THROW(TableFile{"/nonexistent/table.csv"}, InputError);
  const TemporaryFile words("a,b\nfast,2\n");
  const TableFile table(words.path());
  EXPECT_THROW(table.number(0, 0), InputError);
  EXPECT_THROW(table.column("c"), InputError);
}

}  // namespace
}  // namespace orrery
