// Errors of prices in the step's time: against closed forms on small Programs, and how often the
// interval of the method holds the truth in worlds that are drawn here, by another implementation.

#include "reports/uncertainty.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "reports/json.hpp"
#include "reports/study.hpp"
#include "reports/terminal.hpp"
#include "sim/random.hpp"
#include "tests/reports/sketch.hpp"

namespace orrery {
namespace {

const std::string kScenarios = ORRERY_SOURCE_DIR "/scenarios/";
constexpr double kDecile = 1.2815515655446004;

/// A step of ops on streams of one rank, each a chain: (label, seconds, price).
struct Chain {
  StreamKind stream;
  Shape shape;
  double time_s;
  double spread;
  PriceSource source;
};

Study study_of(const std::vector<Chain>& chains) {
  ProgramBuilder builder({1});
  Study study;
  for (const Chain& c : chains) {
    const ShapeId shape = builder.intern(c.shape);
    if (shape.value == study.run.prices.prices.size()) {
      study.run.prices.prices.push_back(
          {.time_ps = from_seconds(c.time_s), .source = c.source, .spread = c.spread});
    }
    const StreamId stream = test::on(c.stream);
    builder.add(OpKind::compute, shape, {}, {&stream, 1}, {});
  }
  study.program = std::move(builder).seal();
  study.run.timeline = sweep(study.program, study.run.prices);
  study.report.step_time_s = seconds(study.run.timeline.makespan_ps());
  study.report.gpus = 1;
  return study;
}

Shape gemm(const std::string& label, std::int64_t m) {
  return {Gemm{.inputs = NumberFormat::bf16, .m = m, .n = 64, .k = 64}, label, 0};
}
Shape copies(const std::string& label) {
  return {Streaming{StreamingKind::copy, 1, 1, 1}, label, 0};
}

// One shape: log-normal around its price, with the spread of its own and its family's together.
TEST(Uncertainty, OfOneShapeIsItsSpread) {
  const Study study =
      study_of({{StreamKind::compute, gemm("a", 1), 2.0, 0.2, PriceSource::measured}});
  const StepUncertainty u = uncertainty(study, {.draws = 20000});
  const double sigma = std::hypot(0.2, kFamilySpread);
  EXPECT_NEAR(u.step_time_s.p50, 2, 0.02);
  EXPECT_NEAR(std::log(u.step_time_s.p90 / 2), kDecile * sigma, 0.01);
  EXPECT_NEAR(std::log(u.step_time_s.p10 / 2), -kDecile * sigma, 0.01);
  EXPECT_NEAR(u.step_time_s.mean, 2 * std::exp(sigma * sigma / 2), 0.02);
  ASSERT_EQ(u.tornado.size(), 1u);
  EXPECT_NEAR(u.tornado[0].spread, sigma, 1e-12);
  EXPECT_NEAR(u.tornado[0].step_p90_s, 2 * std::exp(kDecile * sigma), 1e-9);
  EXPECT_EQ(u.tornado[0].share, 1);
}

// Shapes of a family: their own errors cancel, the family's and a formula's do not.
TEST(Uncertainty, OwnErrorsCancelAndSharedOnesDoNot) {
  const auto spread_of = [](PriceSource source) {
    std::vector<Chain> chains;
    for (int i = 0; i < 16; ++i) {
      chains.push_back(
          {StreamKind::compute, gemm(fmt::format("g{}", i), i + 1), 1.0, 0.1, source});
    }
    const StepUncertainty u = uncertainty(study_of(chains), {.draws = 20000});
    const double drawn = std::log(u.step_time_s.p90 / u.step_time_s.p10) / (2 * kDecile);
    EXPECT_NEAR(u.tornado[0].spread, drawn, 0.003);
    return drawn;
  };
  EXPECT_NEAR(spread_of(PriceSource::interpolated), std::hypot(kFamilySpread, 0.1 / 4), 0.003);
  EXPECT_NEAR(spread_of(PriceSource::roofline), std::hypot(kFamilySpread, 0.1), 0.003);
  EXPECT_NEAR(spread_of(PriceSource::derived),
              std::sqrt(kFamilySpread * kFamilySpread + 0.005 + 0.005 / 16), 0.003);
}

// What lies beside a longer stream does not matter, until it is longer: E of the maximum of two.
TEST(Uncertainty, OnlyWhatTheStepWaitsForCounts) {
  const Study hidden =
      study_of({{StreamKind::compute, gemm("a", 1), 2.0, 0.01, PriceSource::measured},
                {StreamKind::expert_exchange, copies("b"), 0.5, 0.1, PriceSource::measured}});
  const StepUncertainty of_hidden = uncertainty(hidden, {.draws = 100});
  ASSERT_EQ(of_hidden.tornado.size(), 2u);
  EXPECT_EQ(of_hidden.tornado[0].family, "GEMM bf16");
  EXPECT_EQ(of_hidden.tornado[1].swing_s(), 0);
  EXPECT_NEAR(of_hidden.tornado[1].share, 0.2, 1e-12);

  // Two equal streams of independent N(ln 2, s): the mean of the maximum is 2 (1 + s / sqrt(pi)) to
  // first order.
  const Study even =
      study_of({{StreamKind::compute, gemm("a", 1), 2.0, 0.02, PriceSource::measured},
                {StreamKind::expert_exchange, copies("b"), 2.0, 0.02, PriceSource::measured}});
  const StepUncertainty of_even = uncertainty(even, {.draws = 20000});
  const double sigma = std::hypot(0.02, kFamilySpread);
  EXPECT_NEAR(of_even.step_time_s.mean, 2 * (1 + sigma / std::sqrt(M_PI) + sigma * sigma / 2),
              0.003);
  EXPECT_GT(of_even.step_time_s.p50, 2.03);
}

TEST(Uncertainty, DoesNotDependOnThreadsOrOnOtherDraws) {
  const Study study = study_step(read_scenario(kScenarios + "mixtral_8x7b_64_h100.yaml"));
  const auto with_threads = [&](int threads) {
    const tbb::global_control limit(tbb::global_control::max_allowed_parallelism,
                                    static_cast<std::size_t>(threads));
    tbb::task_arena arena(threads);
    return arena.execute([&] { return to_json(uncertainty(study, {.draws = 20})); });
  };
  EXPECT_EQ(with_threads(4), with_threads(1));
  const auto few = uncertainty(study, {.draws = 10, .checked = 0}).factors;
  const auto many = uncertainty(study, {.draws = 20, .checked = 0}).factors;
  EXPECT_TRUE(std::equal(few.begin(), few.end(), many.begin()));
}

// A draw by sweep is near the same draw by flows.
TEST(Uncertainty, SweptDrawsAreNearSimulatedOnes) {
  const Study study = study_step(read_scenario(kScenarios + "deepseek_v3_2048_h800.yaml"));
  ASSERT_TRUE(study.run.traffic.has_value());
  const StepUncertainty u = uncertainty(study, {.draws = 40, .checked = 6});
  EXPECT_EQ(u.checked, 6);
  EXPECT_LT(std::abs(u.largest_difference), 0.01);
  EXPECT_NE(u.largest_difference, 0);
}

// Loads of experts that are drawn are drawn again.
TEST(Uncertainty, DrawsOtherLoadsOfExperts) {
  Scenario scenario = read_scenario(kScenarios + "mixtral_8x7b_64_h100.yaml");
  scenario.plan.routing = {ZipfPopularity{0.5}, {}};
  const StepUncertainty u = uncertainty(study_step(scenario), {.draws = 16});
  const auto loads = std::find_if(u.tornado.begin(), u.tornado.end(), [](const Contribution& c) {
    return c.family == "which experts are popular";
  });
  ASSERT_NE(loads, u.tornado.end());
  EXPECT_GT(loads->swing_s(), 0);
}

TEST(Uncertainty, IsPartOfTheReport) {
  Study study = study_step(read_scenario(kScenarios + "llama3_70b_64_h100.yaml"));
  EXPECT_EQ(to_json(study.report).find("uncertainty"), std::string::npos);
  study.report.uncertainty = uncertainty(study, {.draws = 20});
  const auto json = nlohmann::json::parse(to_json(study.report)).at("uncertainty");
  EXPECT_DOUBLE_EQ(json.at("step_time_s").at("p90").get<double>(),
                   study.report.uncertainty->step_time_s.p90);
  double swing = 1e9;
  for (const auto& row : json.at("tornado")) {
    const double next = row.at("step_p90_s").get<double>() - row.at("step_p10_s").get<double>();
    EXPECT_LE(next, swing);
    swing = next;
  }
  const std::string text = to_terminal(study.report);
  EXPECT_NE(text.find("How sure that is"), std::string::npos);
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = text.find('\n', at);
    EXPECT_LE(end - at, 100u) << text.substr(at, end - at);
    at = end + 1;
  }
}

/// A true step: the study's prices times errors that are drawn here. `together`: of each price's
/// spread, the share of its variance that all shapes of a kind of kernel have in common.
double true_step(const Study& study, Random& random, double family_spread,
                 double together(PriceSource)) {
  std::map<std::size_t, double> of_kind;  // by alternative of Shape::work and a little more
  PriceList truth = study.run.prices;
  for (ShapeId id; id.value < study.program.shapes().size(); ++id) {
    const Shape& shape = study.program.shapes()[id];
    std::size_t kind = 100 * shape.work.index();
    if (const auto* g = std::get_if<Gemm>(&shape.work)) {
      kind += 8 * static_cast<std::size_t>(g->inputs) + (g->groups > 1 ? 4 : 0) +
              (g->pass == Pass::backward_weight ? 1 : 0);
    } else if (const auto* a = std::get_if<AttentionCore>(&shape.work)) {
      kind += a->backward ? 1 : 0;
    } else if (const auto* s = std::get_if<Streaming>(&shape.work)) {
      kind += static_cast<std::size_t>(s->kind);
    } else if (const auto* e = std::get_if<ExpertExchange>(&shape.work)) {
      kind += e->combine ? 1 : 0;
    } else if (const auto* c = std::get_if<Collective>(&shape.work)) {
      kind += 2 * static_cast<std::size_t>(c->kind) + (c->ranks > c->ranks_per_node ? 1 : 0);
    } else if (const auto* send = std::get_if<Send>(&shape.work)) {
      kind += send->same_node ? 1 : 0;
    }
    if (!of_kind.contains(kind)) of_kind[kind] = random.normal();
    Price& price = truth.prices[id];
    const double shared = std::sqrt(together(price.source)) * price.spread;
    const double apart = std::sqrt(1 - together(price.source)) * price.spread;
    price.time_ps = std::llround(
        static_cast<double>(price.time_ps) *
        std::exp(std::hypot(shared, family_spread) * of_kind[kind] + apart * random.normal()));
  }
  return seconds(sweep(study.program, truth).makespan_ps());
}

double as_assumed(PriceSource source) {
  return source == PriceSource::roofline ? 1 : source == PriceSource::derived ? 0.5 : 0;
}
double all_together(PriceSource) {
  return 1;
}

/// How many of `worlds` true steps the interval holds.
int covered(const Study& study, const Interval& interval, int worlds, double family_spread,
            double together(PriceSource)) {
  Random random(20261125);
  int count = 0;
  for (int w = 0; w < worlds; ++w) {
    count += interval.contains(true_step(study, random, family_spread, together)) ? 1 : 0;
  }
  return count;
}

// An interval from P10 to P90 holds the truth in 80 % of worlds where prices err as assumed: 320 of
// 400, within three standard errors (of the count, 8, and of quantiles of 400 draws, about as
// much).
TEST(Uncertainty, IntervalsHoldFourTruthsOfFive) {
  for (const char* name : {"llama3_70b_64_h100", "mixtral_8x7b_64_h100"}) {
    const Study study =
        study_step(read_scenario(fmt::format("{}{}.yaml", kScenarios, name)), {.network = Network::formula});
    const StepUncertainty u = uncertainty(study, {.draws = 400});
    const int held = covered(study, u.step_time_s, 400, kFamilySpread, as_assumed);
    EXPECT_GT(held, 320 - 36) << name;
    EXPECT_LT(held, 320 + 36) << name;
    // And it is not a property of intervals as such: where all that is said of own errors is shared
    // instead, they are too narrow; where tables of two machines do not differ, too wide.
    const int together = covered(study, u.step_time_s, 400, kFamilySpread, all_together);
    const int alike = covered(study, u.step_time_s, 400, 0, as_assumed);
    EXPECT_LT(together, held) << name;
    EXPECT_GT(alike, held) << name;
    ::testing::Test::RecordProperty(fmt::format("held_{}", name), held);
    std::printf("%s: %d of 400 held; %d where errors are shared; %d without a family's\n", name,
                held, together, alike);
  }
}

}  // namespace
}  // namespace orrery
