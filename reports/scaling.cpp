#include "reports/scaling.hpp"

#include <fmt/format.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <optional>

namespace orrery {

namespace {

struct Factor {
  std::int64_t over = 1;
  std::int64_t under = 1;
};
constexpr Factor kFactors[] = {{1, 4}, {1, 2}, {3, 4}, {1, 1}, {3, 2},
                               {2, 1}, {3, 1}, {4, 1}, {8, 1}};
/// Longer pipelines than this many times the scenario's take too long to simulate for a curve.
constexpr std::int64_t kMostMicroBatches = 4;

struct Result {
  std::optional<ScalingPoint> point;
  ScalingGap gap;
};

/// As it reads after the change: all rules of scenarios hold for it.
Scenario reread(const Scenario& changed) {
  return read_scenario_text(to_yaml(changed), changed.file,
                            std::filesystem::path(changed.file).parent_path().string());
}

/// By how much longer the scenario's own step is than by formula: what sharing costs.
double stretch_of(const Study& study) {
  if (!study.report.network.flows) return 1;
  return study.report.step_time_s /
         study_step(study.scenario, {.network = Network::formula}).report.step_time_s;
}

/// `slower`: by what factor its step is longer than it was simulated.
ScalingPoint point_of(const Study& study, const Study& own, double slower) {
  const Report& r = study.report;
  const Plan& plan = study.scenario.plan;
  ScalingPoint point{
      .gpus = r.gpus,
      .dp = plan.parallelism.dp,
      .global_batch = plan.global_batch_sequences,
      .micro_batches = plan.micro_batches(),
      .flows = r.network.flows,
      .step_time_s = r.step_time_s * slower,
      .tokens_per_day = r.tokens_per_day / slower,
      .efficiency = r.tokens_per_s_per_gpu / slower / own.report.tokens_per_s_per_gpu};
  for (const RankReport& rank : r.ranks) {
    point.memory_peak_bytes = std::max(point.memory_peak_bytes, rank.memory_peak_bytes);
  }
  point.fits = static_cast<double>(point.memory_peak_bytes) <= r.memory_capacity_bytes;
  return point;
}

/// `stretch`: of steps by formula, where the study's own is with flows.
Result at(const Study& study, const Factor& factor, bool grow, double stretch) {
  const Scenario& own = study.scenario;
  Result result;
  if (factor.over == factor.under) {
    result.point = point_of(study, study, 1);
    return result;
  }
  const auto scaled = [&](std::int64_t value) -> std::optional<std::int64_t> {
    if (value * factor.over % factor.under != 0) return std::nullopt;
    return value * factor.over / factor.under;
  };
  const auto nodes = scaled(own.cluster.nodes);
  const auto dp = scaled(own.plan.parallelism.dp);
  const auto batch = grow ? scaled(own.plan.global_batch_sequences)
                          : std::optional(own.plan.global_batch_sequences);
  if (!nodes || !dp || !batch) return result;
  result.gap.gpus = *nodes * own.cluster.gpus_per_node;
  if (*batch >
      kMostMicroBatches * own.plan.micro_batches() * *dp * own.plan.micro_batch_sequences) {
    result.gap.why = "more micro-batches a pipeline than are simulated for this curve";
    return result;
  }
  Scenario changed = own;
  changed.cluster.nodes = *nodes;
  changed.plan.parallelism.dp = *dp;
  changed.plan.global_batch_sequences = *batch;
  const bool flows = study.report.network.flows && factor.over <= factor.under;
  // A fabric has the nodes it has.
  if (factor.over > factor.under) changed.cluster.fabric.clear();
  try {
    const Study other =
        study_step(reread(changed), {.network = flows ? Network::flows : Network::formula});
    result.point = point_of(other, study, flows ? 1 : stretch);
  } catch (const InputError& error) {
    result.gap.why = error.problems().front().message;
  }
  return result;
}

void add(ScalingCurve& curve, Result& result) {
  if (result.point) {
    curve.points.push_back(*result.point);
  } else if (!result.gap.why.empty()) {
    curve.left_out.push_back(std::move(result.gap));
  }
}

}  // namespace

Scaling scaling(const Study& study) {
  constexpr std::size_t kCount = std::size(kFactors);
  std::vector<Result> results(2 * kCount);
  const double stretch = stretch_of(study);
  tbb::parallel_for(std::size_t{0}, results.size(), [&](std::size_t i) {
    results[i] = at(study, kFactors[i / 2], i % 2 == 1, stretch);
  });
  Scaling scaling;
  for (std::size_t i = 0; i < results.size(); ++i) {
    add(i % 2 == 0 ? scaling.same_batch : scaling.growing_batch, results[i]);
  }
  return scaling;
}

}  // namespace orrery
