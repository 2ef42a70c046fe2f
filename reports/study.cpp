#include "reports/study.hpp"

#include <fmt/format.h>

#include <algorithm>
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

namespace {

PriceList mean_durations(const Program& program, const Timeline& timeline) {
  IdVector<ShapeId, Picoseconds> sum_ps(program.shapes().size(), 0);
  for (std::size_t i = 0; i < program.size(); ++i) {
    const OpId op(i);
    sum_ps[program.shape(op)] += timeline.end_ps[op] - timeline.start_ps[op];
  }
  const IdVector<ShapeId, std::int64_t> counts = program.shape_counts();
  PriceList list;
  for (std::size_t s = 0; s < counts.size(); ++s) {
    const ShapeId shape(s);
    list.prices.push_back({.time_ps = sum_ps[shape] / std::max<std::int64_t>(1, counts[shape]),
                           .source = PriceSource::measured,
                           .note = "executed"});
  }
  return list;
}

}  // namespace

Study study_executed(Scenario scenario, Program program, Timeline timeline,
                     const std::string& executed_on) {
  Study study{.scenario = std::move(scenario), .program = std::move(program)};
  study.run.timeline = std::move(timeline);
  study.run.prices = mean_durations(study.program, study.run.timeline);
  study.report = summarise(study.scenario, study.program, study.run.prices, study.run.timeline);
  study.report.executed_on = executed_on;
  return study;
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
