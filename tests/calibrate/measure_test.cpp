#include "calibrate/measure.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

namespace orrery {
namespace {

/// A machine whose work takes a known time: normal noise, outliers, and a speed that changes.
class KnownTimes final : public Timed {
 public:
  double run_s = 1e-3;
  double noise = 0;          ///< standard deviation of a sample, relative
  double outlier_share = 0;  ///< of samples that take ten times as long
  double per_sample_s = 0;   ///< of the clock, beside the runs
  int period_runs = 1;
  int periods_to_learn = 0;  ///< until when operands are farther away, and runs take twice as long
  std::function<double(double now)> slowness = [](double) { return 1.0; };

  int runs = 0;
  int samples = 0;

  double run(int repeats) override {
    runs += repeats;
    ++samples;
    double s = repeats * run_s * slowness(now_) * (1 + noise * normal_(random_));
    const double learnt =
        periods_to_learn == 0 ? 1 : std::min(1.0, runs / (1.0 * periods_to_learn * period_runs));
    s *= 2 - learnt;
    if (uniform_(random_) < outlier_share) s *= 10;
    now_ += s + per_sample_s;
    return s;
  }
  double reference() override {
    const double s = 2e-4 * slowness(now_) * (1 + 0.2 * noise * normal_(random_));
    now_ += s;
    return s;
  }
  int period() const override { return period_runs; }
  double now_s() override { return now_; }

 private:
  double now_ = 100;
  std::mt19937_64 random_{1};
  std::normal_distribution<double> normal_;
  std::uniform_real_distribution<double> uniform_;
};

TEST(Measure, AQuietMachineNeedsTheFewestSamples) {
  KnownTimes machine;
  machine.run_s = 3e-3;
  std::vector<double> references;
  const Measurement m = measure(machine, {}, references);
  EXPECT_DOUBLE_EQ(m.seconds, 3e-3);
  EXPECT_EQ(m.samples, MeasureOptions{}.rule.min_samples);
  EXPECT_EQ(m.repeats, 1);
  EXPECT_EQ(m.attempts, 1);
  EXPECT_EQ(m.error, 0);
  EXPECT_TRUE(m.steady);
  EXPECT_EQ(references.size(), 2u);
}

TEST(Measure, ShortWorkIsRepeatedWithinASample) {
  KnownTimes machine;
  machine.run_s = 10e-6;
  std::vector<double> references;
  const Measurement m = measure(machine, {.sample_s = 1e-3}, references);
  EXPECT_EQ(m.repeats, 100);
  EXPECT_NEAR(m.seconds, 10e-6, 1e-15);
  machine.run_s = 1e-9;
  EXPECT_EQ(measure(machine, {.max_repeats = 512}, references).repeats, 512);
}

TEST(Measure, NoiseAndOutliersLeaveTheTruthWithinTheStatedError) {
  // 200 works: the truth lies within two stated errors of the median for about 95 %. A tenth of the
  // samples are outliers, all upwards, which moves a median of normal noise s by about 0.14 s.
  int within = 0;
  double worst_error = 0;
  KnownTimes machine;
  machine.noise = 0.02;
  machine.outlier_share = 0.1;
  std::vector<double> references;
  for (int i = 0; i < 200; ++i) {
    const Measurement m =
        measure(machine, {.rule = {.min_samples = 15, .max_samples = 200}}, references);
    worst_error = std::max(worst_error, m.error);
    const double bias = 0.14 * machine.noise;
    within += std::abs(m.seconds / machine.run_s - 1) <= 2 * m.error + bias ? 1 : 0;
  }
  EXPECT_GE(within, 185);
  EXPECT_LT(worst_error, 0.01);
}

TEST(Measure, StopsEarlierTheQuieterItIs) {
  KnownTimes machine;
  std::vector<double> references;
  const MeasureOptions options{
      .rule = {.min_samples = 12, .max_samples = 2000, .wanted_error = 0.005}, .largest_drift = 1};
  const auto mean_samples = [&](double noise) {
    machine.noise = noise;
    double sum = 0;
    for (int i = 0; i < 100; ++i) {
      sum += static_cast<double>(measure(machine, options, references).samples);
    }
    return sum / 100;
  };
  // The median of n normal samples errs by sqrt(pi / 2 / n) noise, which is 0.005 at
  // n = (1.2533 noise / 0.005)^2: 0.6, 63 and 628; some stop earlier, where the few first samples
  // look quieter than they are.
  EXPECT_LT(mean_samples(0.003), 13);
  EXPECT_NEAR(mean_samples(0.0317), 63, 20);
  EXPECT_NEAR(mean_samples(0.1), 628, 100);
}

TEST(Measure, TheLimitEndsItAndOneSampleIsTakenAtLeast) {
  KnownTimes machine;
  machine.run_s = 2;
  machine.noise = 0.1;
  std::vector<double> references;
  const Measurement single = measure(machine, {.limit_s = 1, .largest_drift = 1}, references);
  EXPECT_EQ(single.samples, 1u);
  EXPECT_EQ(single.error, 1);
  EXPECT_EQ(machine.runs, 1);
  // Two runs to warm up, then samples of 2 s each.
  const Measurement m = measure(machine, {.limit_s = 15, .largest_drift = 1}, references);
  EXPECT_GE(m.samples, 4u);
  EXPECT_LE(m.samples, 7u);
  // No further attempt begins, however unsteady the machine.
  machine.slowness = [](double now) { return 1 + 0.2 * (now - 100); };
  EXPECT_EQ(measure(machine, {.limit_s = 15}, references).attempts, 1);
}

TEST(Measure, SamplesBeginWhenCachesHaveLearntWhatComesAgain) {
  KnownTimes machine;
  machine.run_s = 20e-6;
  machine.period_runs = 200;
  machine.periods_to_learn = 6;
  std::vector<double> references;
  const Measurement m = measure(machine, {}, references);
  EXPECT_NEAR(m.seconds, 20e-6, 1e-12);
  EXPECT_EQ(m.samples, MeasureOptions{}.rule.min_samples);
  // One that never settles is measured as it is in the end.
  machine.periods_to_learn = 1000;
  machine.runs = 0;
  EXPECT_LT(measure(machine, {}, references).samples, MeasureOptions{}.rule.max_samples + 1);
}

TEST(Measure, WhatWasTakenWhileTheMachineSlowedDownIsDropped) {
  KnownTimes machine;
  machine.per_sample_s = 0.1;
  std::vector<double> references(20, 2e-4);
  // Half speed between two moments in the first attempt: its samples are dropped.
  machine.slowness = [](double now) { return now > 100.3 && now < 101.5 ? 2.0 : 1.0; };
  const Measurement m = measure(machine, {}, references);
  EXPECT_GT(m.attempts, 1);
  EXPECT_TRUE(m.steady);
  EXPECT_NEAR(m.seconds, 1e-3, 1e-9);
}

TEST(Measure, ASlowStretchIsSeenEvenIfItIsEven) {
  // As slow before as after, but not what this session is used to.
  KnownTimes machine;
  machine.per_sample_s = 0.1;
  std::vector<double> references(20, 2e-4);
  machine.slowness = [](double now) { return now < 101.9 ? 1.5 : 1.0; };
  const Measurement m = measure(machine, {}, references);
  EXPECT_EQ(m.attempts, 3);
  EXPECT_TRUE(m.steady);
  EXPECT_NEAR(m.seconds, 1e-3, 1e-9);
}

TEST(Measure, AMachineThatNeverSettlesIsSaidToBeUnsteady) {
  KnownTimes machine;
  machine.per_sample_s = 0.1;
  machine.slowness = [](double now) { return 1 + 0.2 * (now - 100); };
  std::vector<double> references;
  const Measurement m = measure(machine, {.limit_s = 100, .attempts = 4}, references);
  EXPECT_EQ(m.attempts, 4);
  EXPECT_FALSE(m.steady);
  EXPECT_GT(m.drift, 0.05);
  EXPECT_EQ(references.size(), 8u);
}

TEST(Measure, SameNoiseSameResult) {
  const auto once = [] {
    KnownTimes machine;
    machine.noise = 0.05;
    std::vector<double> references;
    return measure(machine, {}, references).seconds;
  };
  EXPECT_EQ(once(), once());
}

}  // namespace
}  // namespace orrery
