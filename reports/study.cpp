#include "reports/study.hpp"

#include <fmt/format.h>

#include <chrono>

#include "models/step.hpp"

namespace orrery {

namespace {

Network network_of(const Scenario& scenario, const StudyOptions& options) {
  if (scenario.fabric == nullptr && options.network == Network::flows) {
    Problems problems;
    problems.add(
        {scenario.file, 0, 0},
        fmt::format("no flows without a fabric: cluster '{}' names none", scenario.cluster.name),
        "add fabric: fabrics/NAME.yaml, or use --network formula");
    problems.throw_if_any();
  }
  return options.network.value_or(scenario.fabric == nullptr ? Network::formula : Network::flows);
}

}  // namespace

Study study_step(Scenario scenario, const StudyOptions& options) {
  const auto begin = std::chrono::steady_clock::now();
  Study study{.scenario = std::move(scenario)};
  study.program = build_step(study.scenario, {.all_ranks = options.all_ranks});
  study.prices = price_all(study.program, study.scenario.profile, study.scenario.cluster);
  if (network_of(study.scenario, options) == Network::flows) {
    study.traffic = traffic_of(study.program, study.scenario.cluster, *study.scenario.fabric);
    study.timeline = simulate(study.program, study.prices, &*study.traffic);
  } else {
    study.timeline = options.engine == Engine::sweep ? sweep(study.program, study.prices)
                                                     : simulate(study.program, study.prices);
  }
  study.report = summarise(study.scenario, study.program, study.prices, study.timeline,
                           study.traffic ? &*study.traffic : nullptr);
  if (options.isolated) {
    const int middle[] = {middle_position(study.scenario)};
    study.report.cells = isolated_cells(study.scenario, middle);
  }
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - begin;
  study.report.engine.wall_s = wall.count();
  return study;
}

}  // namespace orrery
