#include "calibrate/calibrate.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <set>
#include <string>

#include "calibrate/calibration_plan.hpp"
#include "calibrate/journal.hpp"
#include "models/step.hpp"
#include "sim/price.hpp"
#include "tests/calibrate/known_device.hpp"
#include "tests/calibrate/toy_scenarios.hpp"

namespace orrery {
namespace {

bool is_compute(const Shape& shape) {
  return std::holds_alternative<Gemm>(shape.work) ||
         std::holds_alternative<AttentionCore>(shape.work) ||
         std::holds_alternative<Streaming>(shape.work);
}

// ---- The plan

TEST(CalibrationPlan, HasEveryComputeShapeOfTheStepsCostliestFirstAndEachOnce) {
  const std::vector<Scenario> scenarios{toy_scenario(), toy_scenario("fp32", "tp: 2, pp: 2")};
  const CalibrationPlan plan = plan_calibration(scenarios, 132);
  std::set<std::string> keys;
  double share = 0;
  double last = 1;
  bool grid = false;
  for (const CalibrationItem& item : plan.items) {
    EXPECT_TRUE(keys.insert(measured_key(item.shape)).second) << measured_key(item.shape);
    share += item.share;
    if (item.share == 0) grid = true;
    EXPECT_TRUE(!grid || item.share == 0);
    EXPECT_LE(item.share, last);
    last = item.share;
  }
  EXPECT_TRUE(grid);
  EXPECT_NEAR(share, 1, 1e-9);
  for (const Scenario& s : scenarios) {
    const Program program = build_step(s);
    for (const Shape& shape : program.shapes()) {
      if (!is_compute(shape)) continue;
      EXPECT_TRUE(keys.contains(measured_key(shape))) << shape.label << " " << describe(shape);
    }
  }
  EXPECT_GT(plan.pass_bytes, 1'000'000);
}

TEST(CalibrationPlan, SmSharesBeyondTheDeviceAreTheWholeDevice) {
  Scenario s = toy_scenario();
  for (const CalibrationItem& item : plan_calibration({&s, 1}, 2).items) {
    EXPECT_EQ(item.shape.sms, 0);
  }
}

/// Each shape of the grids has calls that are possible, in each precision that has kernels.
class CalibrationGrid : public testing::TestWithParam<const char*> {};

TEST_P(CalibrationGrid, IsMadeOfPossibleCalls) {
  const Scenario s = toy_scenario(GetParam());
  const CalibrationPlan plan = plan_calibration({&s, 1}, 8);
  KnownDevice device;
  device.copies = false;
  Scratch scratch(device, 1 << 20, std::int64_t{1} << 40, 1);
  std::set<StreamingKind> kinds;
  int grid = 0;
  for (const CalibrationItem& item : plan.items) {
    scratch.begin_op();
    const auto calls = calls_of(item.shape, item.setting, scratch);
    ASSERT_TRUE(calls.has_value()) << measured_key(item.shape);
    for (const kernels::Call& call : *calls) {
      EXPECT_EQ(kernels::why_impossible(call), "") << measured_key(item.shape);
    }
    if (item.share > 0) continue;
    ++grid;
    if (const auto* st = std::get_if<Streaming>(&item.shape.work)) kinds.insert(st->kind);
  }
  EXPECT_GT(grid, 80);
  EXPECT_GE(kinds.size(), 14u);
}

INSTANTIATE_TEST_SUITE_P(All, CalibrationGrid, testing::Values("fp32", "bf16", "fp8_deepseek"),
                         [](const auto& param_info) { return std::string(param_info.param); });

// ---- The whole, on a device whose times are known

class CalibrateKnown : public testing::Test {
 protected:
  void SetUp() override {
    options_.name = "known";
    options_.journal = testing::TempDir() + "orrery_calibrate_" + std::to_string(getpid());
    options_.memory_bytes = 1e10;
    options_.scratch_bytes = 1e10;
    options_.least_rotation_bytes = options_.most_rotation_bytes = 4 << 20;
    options_.provenance = "a test";
    options_.measure.sample_s = 1e-4;  // its clock counts nanoseconds
    std::remove(options_.journal.c_str());
    device_.copies = false;
  }
  void TearDown() override { std::remove(options_.journal.c_str()); }

  bool journal_exists() const { return access(options_.journal.c_str(), F_OK) == 0; }

  static Profile read_back(const std::string& yaml) {
    Problems problems;
    Profile profile = read_profile(read_document_text(yaml, "known.yaml", problems), problems);
    EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
    return profile;
  }

  /// Seconds that the device takes for an op, by the formula that it is made of.
  double truth(const CalibrationItem& item) {
    scratch_.begin_op();
    double sum = 0;
    const auto calls = calls_of(item.shape, item.setting, scratch_);
    for (const kernels::Call& call : calls.value()) {
      sum += device_.seconds_of(call, item.shape.sms);
    }
    return sum;
  }

  KnownDevice device_{2};
  CalibrationOptions options_;
  Scratch scratch_{device_, 1 << 20, std::int64_t{1} << 40, 1};
};

TEST_F(CalibrateKnown, TheProfileReadBackPricesEveryShapeAsTheDeviceTakes) {
  const std::vector<Scenario> scenarios{toy_scenario("fp8_deepseek")};
  std::size_t reports = 0;
  const Calibration c = calibrate(scenarios, device_, options_, [&](const CalibrationProgress& p) {
    ++reports;
    EXPECT_EQ(p.done, reports);
    EXPECT_NE(p.measurement, nullptr);
  });
  const CalibrationPlan plan = plan_calibration(scenarios, device_.sms());
  EXPECT_EQ(reports, plan.items.size());
  EXPECT_EQ(c.shapes, plan.items.size());
  EXPECT_EQ(c.out_of_time, 0u);
  EXPECT_NEAR(c.share, 1, 1e-9);
  EXPECT_FALSE(journal_exists());
  const Profile profile = read_back(c.yaml);
  EXPECT_EQ(profile.device.name, "Known device");
  EXPECT_EQ(profile.device.sms, 2);
  for (const CalibrationItem& item : plan.items) {
    const Price p = price(item.shape, profile, scenarios[0].cluster);
    EXPECT_EQ(p.source, PriceSource::measured) << measured_key(item.shape);
    EXPECT_NEAR(seconds(p.time_ps) / truth(item), 1, 1e-4) << measured_key(item.shape);
  }
  // The step's own prices, labels and all.
  const Program program = build_step(scenarios[0]);
  for (const Shape& shape : program.shapes()) {
    if (!is_compute(shape)) continue;
    EXPECT_EQ(price(shape, profile, scenarios[0].cluster).source, PriceSource::measured)
        << shape.label;
  }
  // A copy on one of two SMs has a bandwidth of sqrt(1/2): the device is made so.
  ASSERT_EQ(profile.bandwidth_by_sms.size(), 2u);
  EXPECT_NEAR(profile.bandwidth_by_sms[0].second, std::sqrt(0.5), 0.02);
  EXPECT_EQ(profile.bandwidth_by_sms[1], (std::pair{2, 1.0}));
}

TEST_F(CalibrateKnown, NoiseLeavesThePricesWithinTheirError) {
  device_.noise = 0.05;
  const std::vector<Scenario> scenarios{toy_scenario()};
  const Calibration c = calibrate(scenarios, device_, options_);
  const Profile profile = read_back(c.yaml);
  const CalibrationPlan plan = plan_calibration(scenarios, device_.sms());
  double worst = 0;
  for (const CalibrationItem& item : plan.items) {
    const double s = seconds(price(item.shape, profile, scenarios[0].cluster).time_ps);
    worst = std::max(worst, std::abs(s / truth(item) - 1));
  }
  // Samples stop at a standard error of 0.5 % or after 60: 5 % sqrt(pi / 2 / 60) = 0.8 %.
  EXPECT_LT(worst, 0.04);
}

TEST_F(CalibrateKnown, GoesOnAfterAKillAndComesToTheSame) {
  const std::vector<Scenario> scenarios{toy_scenario()};
  const Calibration whole = calibrate(scenarios, device_, options_);
  const std::size_t whole_calls = device_.calls;

  struct Killed {};
  EXPECT_THROW(calibrate(scenarios, device_, options_,
                         [&](const CalibrationProgress& p) {
                           if (p.done == 50) throw Killed();
                         }),
               Killed);
  EXPECT_TRUE(journal_exists());
  options_.resume = true;
  const std::size_t calls_before = device_.calls;
  const Calibration resumed = calibrate(scenarios, device_, options_);
  EXPECT_EQ(resumed.from_journal, 50u);
  EXPECT_LT(device_.calls - calls_before, whole_calls * 9 / 10);
  const Profile a = read_back(whole.yaml);
  const Profile b = read_back(resumed.yaml);
  const Cluster& cluster = scenarios[0].cluster;
  for (const CalibrationItem& item : plan_calibration(scenarios, device_.sms()).items) {
    const double first = seconds(price(item.shape, a, cluster).time_ps);
    EXPECT_NEAR(seconds(price(item.shape, b, cluster).time_ps) / first, 1, 1e-4);
    EXPECT_EQ(price(item.shape, b, cluster).source, PriceSource::measured);
  }
  EXPECT_FALSE(journal_exists());
}

TEST_F(CalibrateKnown, WhenTimeIsUpItWritesWhatItHasAndKeepsTheJournal) {
  const std::vector<Scenario> scenarios{toy_scenario()};
  struct Killed {};
  EXPECT_THROW(calibrate(scenarios, device_, options_,
                         [&](const CalibrationProgress& p) {
                           if (p.done == 20) throw Killed();
                         }),
               Killed);
  options_.resume = true;
  options_.time_limit_s = 1e-9;
  const Calibration c = calibrate(scenarios, device_, options_);
  EXPECT_EQ(c.shapes, 20u);
  EXPECT_GT(c.out_of_time, 50u);
  EXPECT_LT(c.share, 1);
  EXPECT_TRUE(journal_exists());
  ASSERT_FALSE(c.notes.empty());
  EXPECT_NE(c.notes.back().find("--resume goes on"), std::string::npos);
  read_back(c.yaml);
}

TEST_F(CalibrateKnown, NothingMeasuredIsAnErrorThatSaysWhy) {
  const std::vector<Scenario> scenarios{toy_scenario()};
  options_.time_limit_s = 1e-9;
  try {
    calibrate(scenarios, device_, options_);
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("shapes left out"), std::string::npos) << error.what();
  }
}

TEST_F(CalibrateKnown, WhatFindsNoRoomIsLeftOutAndSaid) {
  const std::vector<Scenario> scenarios{toy_scenario()};
  // Pools of 4 MB: only ops with operands of few kinds fit.
  options_.scratch_bytes = 9e6;
  const Calibration c = calibrate(scenarios, device_, options_);
  EXPECT_GT(c.shapes, 0u);
  EXPECT_TRUE(std::any_of(c.notes.begin(), c.notes.end(), [](const std::string& note) {
    return note.find("find no room") != std::string::npos;
  }));
}

TEST_F(CalibrateKnown, KernelsThatDoNotExistAreLeftOutAndSaid) {
  const std::vector<Scenario> scenarios{toy_scenario("fp8_tensor")};
  const Calibration c = calibrate(scenarios, device_, options_);
  EXPECT_GT(c.shapes, 0u);
  EXPECT_LT(c.share, 1);
  EXPECT_TRUE(std::any_of(c.notes.begin(), c.notes.end(), [](const std::string& note) {
    return note.find("there is no kernel for it") != std::string::npos;
  }));
}

TEST_F(CalibrateKnown, MemoryIsWhatTheDeviceGivesWhereNobodySaysIt) {
  const std::vector<Scenario> scenarios{toy_scenario()};
  options_.memory_bytes = 0;
  device_.memory_bytes = std::size_t{3} << 30;
  const Calibration c = calibrate(scenarios, device_, options_);
  const double found = c.measured.profile.device.memory_bytes;
  EXPECT_LE(found, 3.0 * (1 << 30));
  EXPECT_GT(found, 2.8 * (1 << 30));
}

TEST_F(CalibrateKnown, ResultsOfAnotherMachineAreNotResumed) {
  const std::vector<Scenario> scenarios{toy_scenario()};
  struct Killed {};
  EXPECT_THROW(
      calibrate(scenarios, device_, options_, [&](const CalibrationProgress&) { throw Killed(); }),
      Killed);
  options_.resume = true;
  KnownDevice other{4};
  EXPECT_THROW(calibrate(scenarios, other, options_), InputError);
}

// ---- The CPU's kernels

/// Every kernel of a step and its grids runs; what it takes is not looked at.
class CalibrateCpu : public testing::TestWithParam<const char*> {};

TEST_P(CalibrateCpu, MeasuresEveryShapeOfAStep) {
  const std::vector<Scenario> scenarios{toy_scenario(GetParam())};
  const auto device = kernels::open_cpu_device(1);
  CalibrationOptions options;
  options.name = "cpu";
  options.journal = testing::TempDir() + "orrery_calibrate_cpu_" + std::to_string(getpid());
  options.memory_bytes = 1e10;
  options.scratch_bytes = 1e10;
  options.least_rotation_bytes = options.most_rotation_bytes = 1 << 20;
  options.provenance = "a test";
  options.measure = {.rule = {.min_samples = 1, .max_samples = 1}, .sample_s = 0, .attempts = 1};
  const Calibration c = calibrate(scenarios, *device, options);
  const CalibrationPlan plan = plan_calibration(scenarios, 1);
  EXPECT_EQ(c.shapes, plan.items.size());
  EXPECT_EQ(c.out_of_time, 0u);
  EXPECT_NEAR(c.share, 1, 1e-9);
  Problems problems;
  const Profile profile = read_profile(read_document_text(c.yaml, "cpu.yaml", problems), problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
  for (const CalibrationItem& item : plan.items) {
    const Price p = price(item.shape, profile, scenarios[0].cluster);
    EXPECT_EQ(p.source, PriceSource::measured) << measured_key(item.shape);
    EXPECT_GT(p.time_ps, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(All, CalibrateCpu, testing::Values("fp32", "bf16", "fp8_deepseek"),
                         [](const auto& param_info) { return std::string(param_info.param); });

/// The rows that permuting gets by hand are those that the routing map makes of the same choices.
TEST(ShapeCalls, RowsOfExpertsAreWhatTheRoutingMapMakes) {
  for (const char* precision : {"bf16", "fp8_deepseek"}) {
    const Scenario s = toy_scenario(precision);
    const auto device = kernels::open_cpu_device(1);
    Scratch scratch(*device, 1 << 20, std::int64_t{1} << 32, 1);
    kernels::RoutingMap map;
    kernels::Permute permute;
    kernels::Unpermute unpermute;
    const Program program = build_step(s);
    for (const Shape& shape : program.shapes()) {
      const auto take = [&](const char* label, auto& call) {
        if (shape.label != label) return;
        const auto calls = calls_of(shape, {&s.model, &s.plan}, scratch);
        call = std::get<std::decay_t<decltype(call)>>(calls.value().at(0));
      };
      take("routing map", map);
      take("expert permute", permute);
      take("expert reduce", unpermute);
    }
    ASSERT_NE(map.experts, nullptr);
    const kernels::StreamHandle stream = device->create_stream();
    device->enqueue(stream, map);
    device->synchronize();
    EXPECT_EQ(*map.overflow, 0);
    ASSERT_EQ(*map.used_rows, *permute.used_rows);
    for (std::int64_t row = 0; row < *map.used_rows; ++row) {
      EXPECT_EQ(map.row_source[row], permute.row_source[row]) << row;
    }
    for (std::int64_t i = 0; i < map.max_tokens * map.top_k; ++i) {
      EXPECT_EQ(map.slot_row[i], unpermute.slot_row[i]) << i;
    }
  }
}

}  // namespace
}  // namespace orrery
