#include "reports/study.hpp"

#include <chrono>

#include "models/step.hpp"

namespace orrery {

Study study_step(Scenario scenario, const StudyOptions& options) {
  const auto begin = std::chrono::steady_clock::now();
  Study study{.scenario = std::move(scenario)};
  study.program = build_step(study.scenario, {.all_ranks = options.all_ranks});
  study.prices = price_all(study.program, study.scenario.profile, study.scenario.cluster);
  study.timeline = options.engine == Engine::sweep ? sweep(study.program, study.prices)
                                                   : simulate(study.program, study.prices);
  study.report = summarise(study.scenario, study.program, study.prices, study.timeline);
  if (options.isolated) {
    const int middle[] = {middle_position(study.scenario)};
    study.report.cells = isolated_cells(study.scenario, middle);
  }
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - begin;
  study.report.engine.wall_s = wall.count();
  return study;
}

}  // namespace orrery
