#include "reports/study.hpp"

#include <fmt/format.h>

#include <chrono>

#include "models/step.hpp"

namespace orrery {

Network network_of(const Scenario& scenario, std::optional<Network> wanted) {
  if (scenario.fabric == nullptr && wanted == Network::flows) {
    Problems problems;
    problems.add(
        {scenario.file, 0, 0},
        fmt::format("no flows without a fabric: cluster '{}' names none", scenario.cluster.name),
        "add fabric: fabrics/NAME.yaml, or use --network formula");
    problems.throw_if_any();
  }
  return wanted.value_or(scenario.fabric == nullptr ? Network::formula : Network::flows);
}

ProgramRun run_program(const Scenario& scenario, const Program& program, Network network,
                       Engine engine) {
  ProgramRun run;
  run.prices = price_all(program, scenario.profile, scenario.cluster);
  if (network == Network::flows) {
    run.traffic = traffic_of(program, scenario.cluster, *scenario.fabric);
    const auto shares = gpu_shares(program, run.prices, scenario.profile, scenario.cluster);
    run.timeline = simulate(program, run.prices, {&*run.traffic, &shares});
  } else {
    run.timeline =
        engine == Engine::sweep ? sweep(program, run.prices) : simulate(program, run.prices);
  }
  return run;
}

Study study_step(Scenario scenario, const StudyOptions& options) {
  const auto begin = std::chrono::steady_clock::now();
  Study study{.scenario = std::move(scenario)};
  const Network network = network_of(study.scenario, options.network);
  study.program = build_step(study.scenario, {.all_ranks = options.all_ranks});
  study.run = run_program(study.scenario, study.program, network, options.engine);
  study.report = summarise(study.scenario, study.program, study.run.prices, study.run.timeline,
                           study.run.traffic ? &*study.run.traffic : nullptr);
  if (options.isolated) {
    const int middle[] = {middle_position(study.scenario)};
    study.report.cells = isolated_cells(study.scenario, middle, network);
  }
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - begin;
  study.report.engine.wall_s = wall.count();
  return study;
}

}  // namespace orrery
