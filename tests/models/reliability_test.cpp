// What fails: the shipped files say what their sources do.

#include "models/reliability.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "sim/config.hpp"

namespace orrery {
namespace {

constexpr double kDay = 86400;

Reliability shipped(const std::string& name) {
  Problems problems;
  const Reliability r = read_reliability(
      read_document(std::string(ORRERY_SOURCE_DIR) + "/scenarios/reliability/" + name + ".yaml",
                    problems),
      problems);
  problems.throw_if_any();
  return r;
}

/// Failures a day of a job with so many parts.
double per_day(const Reliability& r, double gpus) {
  double rate = 0;
  for (const FailureKind& kind : r.failures) {
    const double parts = kind.of == FailingPart::job    ? 1
                         : kind.of == FailingPart::host ? gpus / 8
                                                        : gpus;
    rate += parts / kind.mtbf_s() * kDay;
  }
  return rate;
}

// arXiv 2407.21783: 419 unexpected interruptions in 54 days on 16384 GPUs, 58.7 % of them of GPUs
// and their memory.
TEST(Reliability, OfLlama3IsItsTable) {
  const Reliability r = shipped("h100_llama3");
  EXPECT_EQ(r.failures.size(), 18u);
  EXPECT_NEAR(per_day(r, 16384) * 54, 419, 1e-9);
  double events = 0;
  double of_gpus = 0;
  for (const FailureKind& kind : r.failures) {
    events += kind.events;
    if (kind.of == FailingPart::gpu && kind.what != "GPU SRAM" &&
        kind.what != "GPU system processor" && kind.what != "silent data corruption" &&
        kind.what != "GPU thermal interface or sensor") {
      of_gpus += kind.events;
    }
  }
  EXPECT_EQ(events, 419);
  EXPECT_EQ(of_gpus, 148 + 72);
  // The condensed rates of the same table, and what was added to them.
  double condensed = 0;
  for (const FailureKind& kind : shipped("h800_2048").failures) condensed += kind.events;
  EXPECT_EQ(condensed, 419);
}

// arXiv 2410.21680: 6.50 and 2.34 failures per 1000 node-days.
TEST(Reliability, OfMetaRscIsItsRates) {
  EXPECT_NEAR(per_day(shipped("a100_rsc1"), 8000), 6.50, 0.005);
  EXPECT_NEAR(per_day(shipped("a100_rsc2"), 8000), 2.34, 0.005);
}

// What the files say of the spread between clusters: failures per 1000 node-days of RSC-1, RSC-2,
// Llama 3 and FT-HSDP's fleet.
TEST(Reliability, SpreadOfClustersIsThatOfFourPublishedRates) {
  const double rates[] = {
      6.50, 2.34, per_day(shipped("h100_llama3"), 8000) - 56.0 / 54 + 56.0 / 54 * 8000 / 16384,
      2.3};
  double mean = 0;
  for (const double rate : rates) mean += std::log(rate) / 4;
  double variance = 0;
  for (const double rate : rates) variance += std::pow(std::log(rate) - mean, 2) / 3;
  EXPECT_NEAR(std::sqrt(variance), 0.49, 0.005);
  for (const char* name :
       {"h100_llama3", "a100_rsc1", "a100_rsc2", "a100_fire_flyer2", "h800_2048"}) {
    EXPECT_EQ(shipped(name).rate_spread, 0.49) << name;
  }
}

// Log-normal with median 222 s and mean 2334 s (OLMo hybrid): sigma^2 = 2 ln(mean / median).
TEST(Reliability, TimesWithAMeanAreLogNormal) {
  EXPECT_NEAR(RandomTime({222, 2334}).sigma(), std::sqrt(2 * std::log(2334.0 / 222)), 1e-15);
  EXPECT_EQ(RandomTime({10, 10}).sigma(), 0);
  // Meta RSC: 5 to 20 minutes as tenth and ninetieth percentile around 10.
  const RandomTime restart = shipped("a100_rsc1").restart;
  EXPECT_NEAR(restart.median_s * std::exp(1.28155 * restart.sigma()), 20 * 60, 12);
  EXPECT_NEAR(restart.median_s * std::exp(-1.28155 * restart.sigma()), 5 * 60, 3);
}

}  // namespace
}  // namespace orrery
