#include "calibrate/measured_profile.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "calibrate/write_profile.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

const MeasuredDevice kToy{.name = "Toy", .sms = 8, .memory_bytes = 1e10};

/// A made-up machine, simpler than any skeleton: the slower of arithmetic and memory, and 5 us.
double toy_s(const Shape& shape) {
  return 5e-6 + std::max(flops_of(shape) / 2e12, bytes_of(shape) / 1e11);
}

std::vector<MeasuredShape> measured(const std::vector<Shape>& shapes) {
  std::vector<MeasuredShape> result;
  for (const Shape& s : shapes) result.push_back({s, toy_s(s)});
  return result;
}

Shape gemm(std::int64_t m, std::int64_t n, std::int64_t k,
           NumberFormat inputs = NumberFormat::bf16) {
  return {.work = Gemm{.inputs = inputs, .m = m, .n = n, .k = k}, .label = "", .sms = 0};
}

Shape core(std::int64_t length, bool backward) {
  return {.work = AttentionCore{.inputs = NumberFormat::fp32,
                                .backward = backward,
                                .heads = 8,
                                .kv_heads = 8,
                                .q_len = length,
                                .kv_len = length,
                                .d_qk = 64,
                                .d_v = 64},
          .label = "attention core",
          .sms = 0};
}

Shape copy(std::int64_t bytes, const std::string& label, std::int64_t launches = 1) {
  return {.work = Streaming{.kind = StreamingKind::copy,
                            .bytes_read = bytes,
                            .bytes_written = bytes,
                            .launches = launches},
          .label = label,
          .sms = 0};
}

std::vector<Shape> all_shapes() {
  std::vector<Shape> shapes;
  for (const std::int64_t m : {256, 1040, 4096}) {
    for (const std::int64_t n : {512, 1968, 8192}) {
      for (const std::int64_t k : {512, 2048, 8192}) shapes.push_back(gemm(m, n, k));
    }
  }
  for (const std::int64_t length : {256, 512, 1024, 2048, 4096}) {
    shapes.push_back(core(length, false));
    shapes.push_back(core(length, true));
  }
  for (std::int64_t bytes = 1 << 14; bytes <= 1 << 26; bytes *= 4) {
    shapes.push_back(copy(bytes, "value copy"));
    shapes.push_back(copy(2 * bytes, "key concat"));
  }
  return shapes;
}

MeasuredProfile toy_profile() {
  return make_profile("toy", kToy, measured(all_shapes()), {{4, 0.7}, {8, 1.0}}, "a toy, measured");
}

TEST(MeasuredProfile, EveryMeasuredShapeIsPricedAsMeasuredAfterReadingItBack) {
  const MeasuredProfile made = toy_profile();
  Problems problems;
  const Profile read = read_profile(
      read_document_text(profile_yaml(made.profile, "a\nb", made.errors), "toy.yaml", problems),
      problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
  const Cluster cluster;
  for (const Shape& shape : all_shapes()) {
    const Price p = price(shape, read, cluster);
    EXPECT_EQ(p.source, PriceSource::measured) << describe(shape);
    EXPECT_NEAR(seconds(p.time_ps) / toy_s(shape), 1, 1e-5) << describe(shape);
    EXPECT_FALSE(p.extrapolated);
  }
  EXPECT_EQ(read.launch_gap_s, 0);
  EXPECT_EQ(read.device.name, "Toy");
  EXPECT_EQ(read.bandwidth_by_sms, (std::vector<std::pair<int, double>>{{4, 0.7}, {8, 1.0}}));
}

TEST(MeasuredProfile, ShapesBetweenComeWithinTheSpread) {
  const MeasuredProfile made = toy_profile();
  const Cluster cluster;
  int within = 0;
  int count = 0;
  for (const std::int64_t m : {400, 900, 3000}) {
    for (const std::int64_t n : {700, 1500, 6000}) {
      for (const std::int64_t k : {768, 3000}) {
        const Price p = price(gemm(m, n, k), made.profile, cluster);
        EXPECT_EQ(p.source, PriceSource::interpolated);
        EXPECT_LT(p.spread, 0.2);
        ++count;
        const double error = std::abs(seconds(p.time_ps) / toy_s(gemm(m, n, k)) - 1);
        within += error <= 2 * p.spread ? 1 : 0;
      }
    }
  }
  EXPECT_GE(within, count - 2) << "of " << count;
  for (const std::int64_t bytes : {100'000, 3'000'000}) {
    const Price p = price(copy(bytes, "value copy"), made.profile, cluster);
    EXPECT_EQ(p.source, PriceSource::interpolated);
    EXPECT_NEAR(seconds(p.time_ps) / toy_s(copy(bytes, "")), 1, 0.05);
  }
}

TEST(MeasuredProfile, StatesTheErrorOfEachTableOnPointsHeldOut) {
  const MeasuredProfile made = toy_profile();
  ASSERT_EQ(made.errors.size(), 4u);
  EXPECT_EQ(made.errors[0].family, "measured-gemm-bf16-forward");
  EXPECT_EQ(made.errors[0].points, 27u);
  EXPECT_EQ(made.errors[1].family, "measured-attention-fp32-forward");
  EXPECT_EQ(made.errors[1].points, 5u);
  EXPECT_EQ(made.errors[3].family, "measured-copy");
  EXPECT_EQ(made.errors[3].points, 14u);
  EXPECT_EQ(made.profile.gemms.at(0).spread, made.errors[0].percentile_68);
  // A machine that is the formula itself leaves next to nothing.
  EXPECT_LT(made.errors[3].median, 0.01);
}

TEST(MeasuredProfile, PeakRatesAreTheBestMeasuredUnlessADataSheetSaysThem) {
  const MeasuredProfile made = toy_profile();
  double best = 0;
  for (const Shape& s : all_shapes()) {
    if (std::holds_alternative<Gemm>(s.work)) best = std::max(best, flops_of(s) / toy_s(s));
  }
  EXPECT_DOUBLE_EQ(made.profile.device.bf16_flops_per_s, best);
  EXPECT_EQ(made.profile.device.fp8_flops_per_s, 0);
  EXPECT_GT(made.profile.device.fp32_flops_per_s, 0);  // attention's
  EXPECT_LE(made.profile.device.memory_bytes_per_s, 1e11);

  MeasuredDevice known = kToy;
  known.data_sheet = Device{.name = "Toy X",
                            .sms = 8,
                            .memory_bytes = 2e10,
                            .memory_bytes_per_s = 3e11,
                            .bf16_flops_per_s = 4e12,
                            .source = "data sheet"};
  const Device d = make_profile("toy", known, measured({gemm(64, 64, 64)}), {}, "x").profile.device;
  EXPECT_EQ(d.bf16_flops_per_s, 4e12);
  EXPECT_EQ(d.source, "data sheet");
  EXPECT_EQ(d.name, "Toy");
}

TEST(MeasuredProfile, FewPointsAreUsedAndTheSpreadSaysThatNothingWasHeldOut) {
  const std::vector<Shape> shapes{gemm(256, 256, 256), gemm(512, 256, 256), core(128, false),
                                  copy(4096, "value copy")};
  const MeasuredProfile made = make_profile("toy", kToy, measured(shapes), {}, "x");
  for (const Shape& s : shapes) {
    const Price p = price(s, made.profile, {});
    EXPECT_EQ(p.source, PriceSource::measured);
    EXPECT_NEAR(seconds(p.time_ps) / toy_s(s), 1, 1e-6);
    EXPECT_EQ(p.spread, 0.5);
  }
}

TEST(MeasuredProfile, OtherSmSharesKeepTheirTimes) {
  std::vector<MeasuredShape> shapes = measured(all_shapes());
  Shape half = gemm(1024, 2048, 2048);
  half.sms = 4;
  shapes.push_back({half, 3e-3});
  const MeasuredProfile made = make_profile("toy", kToy, shapes, {{4, 0.7}, {8, 1.0}}, "x");
  EXPECT_EQ(price(half, made.profile, {}).source, PriceSource::measured);
  EXPECT_NEAR(seconds(price(half, made.profile, {}).time_ps), 3e-3, 1e-9);
}

}  // namespace
}  // namespace orrery
