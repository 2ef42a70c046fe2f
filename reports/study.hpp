#pragma once
// The chain that every study runs: scenario -> Program -> prices -> Timeline -> Report.

#include "reports/report.hpp"

namespace orrery {

enum class Engine : std::uint8_t { sweep, events };

struct StudyOptions {
  bool all_ranks = false;
  Engine engine = Engine::sweep;
  bool isolated = false;  ///< also the cells of the middle position alone
};

struct Study {
  Scenario scenario;
  Program program;
  PriceList prices;
  Timeline timeline;
  Report report;  ///< engine.wall_s: from the scenario to this report
};

Study study_step(Scenario scenario, const StudyOptions& options = {});

}  // namespace orrery
