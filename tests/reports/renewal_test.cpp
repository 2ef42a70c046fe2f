// Checkpoint and restart in closed form, against published figures and against other ways to the
// same answer.

#include "reports/renewal.hpp"

#include <gtest/gtest.h>

#include <boost/math/special_functions/lambert_w.hpp>
#include <cmath>

#include "sim/random.hpp"

namespace orrery {
namespace {

constexpr double kMinute = 60;
constexpr double kHour = 3600;

// Daly (2006), figures 3 to 5: checkpoints of 5 minutes, restarts of 10, and a mean time between
// failures of 24 hours, 6 hours and 15 minutes.
TEST(Renewal, DalysIntervalIsAsPublished) {
  EXPECT_NEAR(daly_interval_s(5 * kMinute, 24 * kHour) / kMinute, 117, 0.5);
  EXPECT_NEAR(daly_interval_s(5 * kMinute, 6 * kHour) / kMinute, 57, 0.5);
  EXPECT_NEAR(daly_interval_s(5 * kMinute, 15 * kMinute) / kMinute, 9.1, 0.05);
  EXPECT_EQ(daly_interval_s(30 * kMinute, 15 * kMinute), 15 * kMinute);
  EXPECT_EQ(young_interval_s(5 * kMinute, 24 * kHour), 2 * kHour);  // sqrt(2 * 5 * 1440) = 120
}

// The minimum of (exp((tau + C) / M) - 1) / tau, by setting its derivative to 0: tau = M (1 +
// W(-exp(-1 - C / M))).
TEST(Renewal, OptimumIsLambertsOfDalysModel) {
  for (const double checkpoint_s : {3.0, 60.0, 300.0, 1800.0}) {
    for (const double mtbf_s : {15 * kMinute, 6 * kHour, 24 * kHour, 1000 * kHour}) {
      const Renewal renewal{.failures_per_s = 1 / mtbf_s,
                            .restart = {600, 600},
                            .blocking_s = checkpoint_s,
                            .write_s = checkpoint_s};
      const double exact =
          mtbf_s * (1 + boost::math::lambert_w0(-std::exp(-1 - checkpoint_s / mtbf_s)));
      EXPECT_NEAR(optimum_interval_s(renewal, 1e9), exact, 1e-4 * exact)
          << checkpoint_s << " s, " << mtbf_s << " s";
      // And the higher-order form is what it approximates.
      if (checkpoint_s < mtbf_s / 2) {
        EXPECT_NEAR(daly_interval_s(checkpoint_s, mtbf_s), exact, 0.01 * exact);
      }
    }
  }
}

// Daly's complete model: M exp(R / M) (exp((tau + C) / M) - 1) for each interval.
TEST(Renewal, IsDalysModelWhereCheckpointsBlock) {
  const double mtbf_s = 6 * kHour;
  const Renewal renewal{.failures_per_s = 1 / mtbf_s,
                        .restart = {550, 550},
                        .read_s = 50,
                        .blocking_s = 300,
                        .write_s = 300};
  for (const double interval_s : {600.0, 3400.0, 20000.0}) {
    const double each = mtbf_s * std::exp(600 / mtbf_s) * std::expm1((interval_s + 300) / mtbf_s);
    EXPECT_NEAR(renewal.first_s(interval_s), each, 1e-9 * each);
    EXPECT_NEAR(renewal.further_s(interval_s), each, 1e-9 * each);
    EXPECT_NEAR(renewal.total_s(interval_s, 7), 7 * each, 1e-8 * each);
  }
}

TEST(Renewal, WithoutFailuresOnlyCheckpointsCost) {
  const Renewal renewal{.restart = {600, 600}, .blocking_s = 2, .write_s = 50};
  EXPECT_EQ(renewal.total_s(1000, 10), 10 * 1002 + 48);
  EXPECT_EQ(optimum_interval_s(renewal, 12345), 12345);
  const Renewal rare{
      .failures_per_s = 1e-15, .restart = {600, 600}, .blocking_s = 2, .write_s = 50};
  EXPECT_NEAR(rare.total_s(1000, 10), 10 * 1002 + 48, 1e-6);
}

// An outage of a restart that varies, by playing it.
TEST(Renewal, OutageOfVaryingRestartsIsWhatPlayingThemGives) {
  const Renewal renewal{
      .failures_per_s = 1 / 2000.0, .detection_s = 100, .restart = {222, 2334}, .read_s = 20};
  Random random(3);
  constexpr int kTrials = 200000;
  double sum = 0;
  double squares = 0;
  for (int i = 0; i < kTrials; ++i) {
    double outage = 0;
    while (true) {
      outage += 100;
      const double restart = 20 + 222 * std::exp(renewal.restart.sigma() * random.normal());
      const double failure = 2000 * random.exponential();
      outage += std::min(restart, failure);
      if (restart < failure) break;
    }
    sum += outage;
    squares += outage * outage;
  }
  const double mean = sum / kTrials;
  const double error = std::sqrt((squares / kTrials - mean * mean) / kTrials);
  EXPECT_NEAR(renewal.outage_s(), mean, 4 * error);
  EXPECT_LT(error, 0.01 * mean);
}

// Written in the background: the state is how long ago work began after a restart, moment by moment
// on a grid. A checkpoint is written a time `behind` after the interval's end, and the next
// interval goes on meanwhile.
TEST(Renewal, BackgroundWritesAreWhatAGridGives) {
  const double interval = 400, blocking = 10, write = 130, mtbf = 900, outage = 250;
  const Renewal renewal{.failures_per_s = 1 / mtbf,
                        .detection_s = 0,
                        .restart = {outage, outage},
                        .blocking_s = blocking,
                        .write_s = write};
  // Value iteration over seconds of failure-free progress towards the n-th written checkpoint after
  // the first: expected time left from `progress`, with n checkpoints to go.
  constexpr int kCheckpoints = 3;
  const int period = static_cast<int>(interval + blocking);
  const int first = static_cast<int>(interval + write);
  constexpr int kPerSecond = 20;
  const double step = 1.0 / kPerSecond;
  const double fails = -std::expm1(-step / mtbf);
  double after_failure[kCheckpoints + 1] = {0, 0, 0, 0};  // work begins again, n to go
  double rolling[kCheckpoints + 1] = {0, 0, 0, 0};        // one was just written, n to go
  const auto sweep_back = [&](int seconds, double at_end, double restarted) {
    double left = at_end;
    for (int i = 0; i < seconds * kPerSecond; ++i) {
      left = step + (1 - fails) * left + fails * (renewal.outage_s() + restarted);
    }
    return left;
  };
  for (int n = 1; n <= kCheckpoints; ++n) {
    // after_failure[n] appears on both sides, linearly: two points of the line give it.
    const double at_0 = sweep_back(first, rolling[n - 1], 0);
    const double at_1 = sweep_back(first, rolling[n - 1], 1e4);
    const double slope = (at_1 - at_0) / 1e4;
    after_failure[n] = at_0 / (1 - slope);
    rolling[n] = sweep_back(period, rolling[n - 1], after_failure[n]);
  }
  EXPECT_NEAR(renewal.total_s(interval, 1), after_failure[1], 2e-4 * after_failure[1]);
  EXPECT_NEAR(renewal.total_s(interval, 3), after_failure[3], 2e-4 * after_failure[3]);
}

}  // namespace
}  // namespace orrery
