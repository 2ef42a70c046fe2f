// Goodput: the simulation against closed forms, limits that are known, and what may not change.

#include "reports/goodput.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <variant>

#include "models/step.hpp"
#include "reports/goodput_runs.hpp"

namespace orrery {
namespace {

const std::string kScenarios = ORRERY_SOURCE_DIR "/scenarios/";
constexpr double kHour = 3600;
constexpr double kDay = 86400;
const Job kJob{.gpus = 80, .hosts = 10, .switches = 2, .checkpoint_bytes = 100e9};

FailureKind gpus_fail_every(double job_mtbf_s) {
  return {.what = "GPU", .of = FailingPart::gpu, .device_time_s = job_mtbf_s * 80};
}

/// Written in 100 s, read in 50 s.
Reliability plain() {
  return {.name = "a test",
          .restart = {300, 300},
          .checkpoint = {.write_bytes_per_s = 1e9, .read_bytes_per_s = 2e9}};
}

/// Mean of the trials' calendar times, and its standard error.
void expect_expected(const Goodput& g) {
  double sum = 0;
  double squares = 0;
  for (const double each : g.goodputs) {
    const double calendar = g.useful_s / each;
    sum += calendar;
    squares += calendar * calendar;
  }
  const auto n = static_cast<double>(g.goodputs.size());
  const double mean = sum / n;
  const double error = std::sqrt((squares / n - mean * mean) / n);
  EXPECT_NEAR(mean, g.expected_calendar_s, 4 * error + 1e-5 * mean);
  EXPECT_LT(error, 0.01 * mean) << "too few trials to tell anything";
}

TEST(Goodput, WithoutFailuresOnlyCheckpointsCost) {
  Reliability r = plain();
  r.checkpoint.interval_s = kHour;
  const Goodput g = goodput(r, kJob, 10 * kHour, {.trials = 10});
  EXPECT_NEAR(g.calendar_s.p10, 10 * (kHour + 100), 0.1);
  EXPECT_EQ(g.calendar_s.p10, g.calendar_s.p90);
  EXPECT_NEAR(g.goodput.mean, 36.0 / 37, 1e-6);
  EXPECT_EQ(g.interruptions.p90, 0);
  EXPECT_FALSE(std::isfinite(g.mtbf_s));
  expect_expected(g);
  // One checkpoint, at the end, where nothing else is asked for: then there is nothing to lose.
  r.checkpoint.interval_s = std::nullopt;
  EXPECT_NEAR(goodput(r, kJob, 10 * kHour, {.trials = 10}).calendar_s.p50, 10 * kHour + 100, 0.1);
  // And nothing costs anything: 1.
  r.checkpoint.write_bytes_per_s = 1e30;
  EXPECT_NEAR(goodput(r, kJob, 10 * kHour, {.trials = 10}).goodput.p50, 1, 1e-6);
}

TEST(Goodput, SimulationIsTheClosedForm) {
  for (const double mtbf_s : {900.0, 2 * kHour, 30 * kHour}) {
    for (const std::optional<double>& blocking_s :
         {std::optional<double>{}, std::optional<double>{2}, std::optional<double>{60}}) {
      Reliability r = plain();
      r.failures = {gpus_fail_every(mtbf_s)};
      r.checkpoint.blocking_s = blocking_s;
      SCOPED_TRACE(mtbf_s);
      expect_expected(goodput(r, kJob, 5 * kDay, {.trials = 3000}));
    }
  }
}

// Two kinds of parts, hangs that are noticed late, restarts and detections that vary.
TEST(Goodput, SimulationIsTheClosedFormWithHangsAndVaryingRestarts) {
  Reliability r = plain();
  FailureKind hang{
      .what = "hang", .of = FailingPart::job, .device_time_s = 4 * kHour, .detection = {600, 1500}};
  r.failures = {gpus_fail_every(3 * kHour), hang};
  r.restart = {300, 900};
  r.checkpoint.blocking_s = 5;
  r.checkpoint.interval_s = 1200;
  const Goodput g = goodput(r, kJob, 10 * kDay, {.trials = 3000});
  expect_expected(g);
  EXPECT_NEAR(g.mtbf_s, 1 / (1 / (3 * kHour) + 1 / (4 * kHour)), 1e-6);
  // A failure of the one kind to each 3 / 4 of the other.
  EXPECT_EQ(g.kinds[0].what, "GPU");
  EXPECT_NEAR(g.kinds[1].events / g.kinds[0].events, 0.75, 0.02);
}

TEST(Goodput, IntervalThatIsBestInClosedFormIsBestInSimulation) {
  Reliability r = plain();
  r.failures = {gpus_fail_every(2 * kHour)};
  const Goodput best = goodput(r, kJob, 20 * kDay, {.trials = 400});
  EXPECT_NEAR(best.checkpoint.interval_s, best.checkpoint.optimum_s,
              0.01 * best.checkpoint.optimum_s);
  for (const double factor : {0.5, 2.0}) {
    r.checkpoint.interval_s = factor * best.checkpoint.optimum_s;
    const Goodput other = goodput(r, kJob, 20 * kDay, {.trials = 400});
    EXPECT_LT(other.goodput.mean, best.goodput.mean);
    EXPECT_LT(other.expected_goodput, best.expected_goodput);
  }
}

TEST(Goodput, PartsAddUpToCalendarTime) {
  Reliability r = plain();
  r.failures = {gpus_fail_every(2 * kHour)};
  r.failures[0].repair = RandomTime{kHour, 3 * kHour};
  r.failures.push_back({.what = "slow",
                        .of = FailingPart::host,
                        .device_time_s = 100 * kHour,
                        .detection = {kHour, kHour},
                        .repair = RandomTime{kHour, kHour},
                        .slowdown = 1.5});
  r.spare_hosts = 1;
  r.maintenance = Maintenance{kDay, {kHour, 2 * kHour}};
  r.checkpoint.blocking_s = 7;
  const Goodput g = goodput(r, kJob, 10 * kDay, {.trials = 300});
  EXPECT_NEAR(g.mean_s.sum(), g.calendar_s.mean, 1e-5 * g.calendar_s.mean);
  EXPECT_NEAR(g.mean_s.useful, 10 * kDay, 1e-3 * kHour);
  for (double TimeParts::*part : {&TimeParts::checkpoint, &TimeParts::rework, &TimeParts::restart,
                                  &TimeParts::waiting, &TimeParts::maintenance, &TimeParts::slow}) {
    EXPECT_GT(g.mean_s.*part, 0);
  }
}

// With S spare hosts, failures at rate L while the job runs, and repairs of mean R, the hosts in
// repair are the customers of an Erlang loss system with S + 1 servers: the job waits when all are
// busy, whatever the repairs' distribution. B(n) = a B(n-1) / (n + a B(n-1)), a = L R.
TEST(Goodput, WaitingForHostsIsErlangsLossFormula) {
  const double mtbf_s = 2 * kHour;
  for (const RandomTime& repair :
       {RandomTime{3 * kHour, 3 * kHour}, RandomTime{kHour, 3 * kHour}}) {
    for (const std::int64_t spares : {0, 1, 3}) {
      Reliability r = plain();
      r.failures = {gpus_fail_every(mtbf_s)};
      r.failures[0].repair = repair;
      r.spare_hosts = spares;
      // Next to nothing but running and waiting.
      r.restart = {1e-3, 1e-3};
      r.checkpoint = {.write_bytes_per_s = 1e15, .read_bytes_per_s = 1e15, .interval_s = 30};
      const Goodput g = goodput(r, kJob, 100 * kDay, {.trials = 40});
      double loss = 1;
      for (std::int64_t n = 1; n <= spares + 1; ++n) {
        const double offered = repair.mean_s / mtbf_s * loss;
        loss = offered / (static_cast<double>(n) + offered);
      }
      EXPECT_NEAR(g.mean_s.waiting / g.mean_s.sum(), loss, 0.02 * loss + 0.002)
          << spares << " spares";
    }
  }
}

// Without failures all is known: a day's run, a checkpoint, an hour's maintenance and a restart,
// over and over.
TEST(Goodput, MaintenanceTakesItsTurn) {
  Reliability r = plain();
  r.checkpoint.interval_s = kHour;
  r.maintenance = Maintenance{kDay, {kHour, kHour}};
  const Goodput g = goodput(r, kJob, 10 * kDay, {.trials = 10});
  // In 86400 s: 23 intervals of 3700 s and 1300 s of the next, then 100 + 3600 + 300 + 50 s, of
  // which the restart lies in the next day.
  EXPECT_EQ(g.calendar_s.p10, g.calendar_s.p90);
  EXPECT_NEAR(g.interruptions.p50, 10, 0.1);
  EXPECT_NEAR(g.mean_s.maintenance, 10 * kHour, 0.1);
  EXPECT_NEAR(g.mean_s.restart, 10 * 350, 0.1);
  EXPECT_EQ(g.mean_s.rework, 0);
}

// A slow host costs 1 - 1 / slowdown of the time until it is found; rare, so that two are never
// slow at once.
TEST(Goodput, SlowHostsCostUntilTheyAreFound) {
  Reliability r = plain();
  r.failures = {{.what = "slow",
                 .of = FailingPart::host,
                 .device_time_s = 10 * 40 * kDay,
                 .detection = {6 * kHour, 6 * kHour},
                 .slowdown = 1.25}};
  r.checkpoint.interval_s = kHour;
  const Goodput g = goodput(r, kJob, 200 * kDay, {.trials = 500});
  const double found = g.interruptions.mean;
  EXPECT_NEAR(found, 5, 0.5);  // one in 40 days
  // Checkpoints stand still beside: 100 of 3700 to 4600 s. The end of the run may cut one short.
  EXPECT_NEAR(g.mean_s.slow / g.kinds[0].events, 6 * kHour * 0.2 * 4500 / 4600,
              0.03 * 6 * kHour * 0.2);
  EXPECT_EQ(g.mean_s.rework, 0);  // nothing is lost: a checkpoint is taken first
}

// A count of n leaves a rate with a relative standard deviation of 1 / sqrt(n): failures of a trial
// vary by N + N^2 / n, where those of a known rate vary by N.
TEST(Goodput, FewCountsLeaveRatesOpen) {
  Reliability known = plain();
  known.failures = {gpus_fail_every(kDay)};
  known.restart = {1, 1};  // hardly any time but useful time, or more failures come with more failures
  known.checkpoint = {.write_bytes_per_s = 1e14, .read_bytes_per_s = 1e14, .interval_s = 600};
  Reliability counted = known;
  counted.failures[0].events = 4;
  counted.failures[0].device_time_s *= 4;
  const auto spread = [](const Reliability& r) {
    const Goodput g = goodput(r, kJob, 100 * kDay, {.trials = 2000});
    EXPECT_NEAR(g.kinds[0].events, 100, 4);
    return g.interruptions.p90 - g.interruptions.p10;
  };
  EXPECT_NEAR(spread(known), 2 * 1.2816 * std::sqrt(100), 3);
  // Gamma of shape 4, mean 100, quantiles 43.6 and 167.0 (chi-squared with 8 degrees of
  // freedom: 3.490 and 13.362), widened by the Poisson's own.
  EXPECT_NEAR(spread(counted), std::hypot(167.0 - 43.6, 25.6), 8);
}

TEST(Goodput, DoesNotDependOnThreadsOrOnOtherTrials) {
  Reliability r = plain();
  r.failures = {gpus_fail_every(2 * kHour)};
  r.failures[0].events = 10;
  r.failures[0].repair = RandomTime{kHour, 3 * kHour};
  r.spare_hosts = 1;
  r.rate_spread = 0.4;
  const auto with_threads = [&](int threads) {
    const tbb::global_control limit(tbb::global_control::max_allowed_parallelism,
                                    static_cast<std::size_t>(threads));
    tbb::task_arena arena(threads);
    return arena.execute([&] { return to_json(goodput(r, kJob, 10 * kDay, {.trials = 200})); });
  };
  EXPECT_EQ(with_threads(4), with_threads(1));
  const Goodput few = goodput(r, kJob, 10 * kDay, {.trials = 20});
  const Goodput many = goodput(r, kJob, 10 * kDay, {.trials = 200});
  EXPECT_TRUE(std::equal(few.goodputs.begin(), few.goodputs.end(), many.goodputs.begin()));
  EXPECT_NE(goodput(r, kJob, 10 * kDay, {.trials = 20, .seed = 1}).goodputs, few.goodputs);
}

TEST(Goodput, SaysWhereAJobGetsNowhere) {
  Reliability r = plain();
  r.failures = {gpus_fail_every(30)};  // restarts of 350 s
  EXPECT_THROW(goodput(r, kJob, kDay), std::runtime_error);
  r = plain();
  r.checkpoint.blocking_s = 1;
  r.checkpoint.interval_s = 20;  // the write goes on for 99
  EXPECT_THROW(goodput(r, kJob, kDay), std::runtime_error);
}

// The sum of what plan.checkpoint lets the GPUs write.
TEST(Goodput, CheckpointIsWhatTheStepsWritesAddUpTo) {
  for (const char* name : {"deepseek_v3_2048_h800", "llama3_70b_64_h100", "mixtral_8x7b_64_h100"}) {
    Scenario scenario = read_scenario(fmt::format("{}{}.yaml", kScenarios, name));
    scenario.plan.checkpoint = Checkpoint{1e9, true};
    const Program program = build_step(scenario);
    double written = 0;
    for (OpId op; op.value < program.size(); ++op) {
      const auto* write = std::get_if<StorageWrite>(&program.shapes()[program.shape(op)].work);
      if (write == nullptr) continue;
      const RankId rank = rank_of(program.streams_of(op).front());
      written += static_cast<double>(write->bytes * program.multiplicity()[rank.value]);
    }
    EXPECT_NEAR(checkpoint_bytes(scenario), written, 1e-3 * written) << name;
  }
}

TEST(Goodput, JobsHaveTheirScenariosParts) {
  const Scenario scenario = read_scenario(kScenarios + "deepseek_v3_2048_h800.yaml");
  Reliability r = plain();
  const Job job = job_of(scenario, r);
  EXPECT_EQ(job.gpus, 2048);
  EXPECT_EQ(job.hosts, 256);
  EXPECT_EQ(job.switches, scenario.fabric->counts().switches);
  r.gpus_per_switch = 100;
  EXPECT_EQ(job_of(scenario, r).switches, 21);
  EXPECT_EQ(parts_of(job, FailingPart::nic), 2048);
  EXPECT_EQ(parts_of(job, FailingPart::job), 1);
  // Switches that fail have to be counted.
  Scenario without = scenario;
  without.fabric = nullptr;
  r.gpus_per_switch = 0;
  r.failures = {{.what = "s", .of = FailingPart::network_switch, .device_time_s = 1e9}};
  EXPECT_THROW(job_of(without, r), InputError);
}

TEST(Goodput, WritersSayWhatIsThere) {
  Reliability r = plain();
  r.failures = {gpus_fail_every(2 * kHour)};
  const Goodput g = goodput(r, kJob, 5 * kDay, {.trials = 100});
  const auto json = nlohmann::json::parse(to_json(g));
  EXPECT_EQ(json.at("gpus"), 80);
  EXPECT_DOUBLE_EQ(json.at("goodput").at("p10").get<double>(), g.goodput.p10);
  EXPECT_DOUBLE_EQ(json.at("mean_s").at("rework").get<double>(), g.mean_s.rework);
  EXPECT_EQ(json.at("failures").at(0).at("what"), "GPU");
  const std::string text = to_terminal(g);
  EXPECT_NE(text.find("goodput"), std::string::npos);
  EXPECT_EQ(text.find("maintenance"), std::string::npos) << "there was none";
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = text.find('\n', at);
    EXPECT_LE(end - at, 100u) << text.substr(at, end - at);
    at = end + 1;
  }
}

// The published runs: what is counted in a run is met by its own count, within what chance allows.
TEST(GoodputRuns, OwnCountsGiveOwnInterruptions) {
  const auto runs = goodput_runs(kScenarios + "reliability/published.yaml");
  ASSERT_GE(runs.size(), 8u);
  const GoodputRow& llama = runs[0].rows[1];
  ASSERT_EQ(llama.quantity, "interruptions");
  ASSERT_TRUE(llama.counted_here);
  EXPECT_NEAR(llama.predicted.p50, 419, 3 * std::sqrt(2 * 419.0));
  const std::string text = goodput_table(runs);
  EXPECT_NE(text.find("counted here"), std::string::npos);
  EXPECT_NO_THROW(nlohmann::json::parse(goodput_json(runs)).at("runs"));
}

}  // namespace
}  // namespace orrery
