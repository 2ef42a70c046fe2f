#pragma once
// The chain that every study runs: scenario -> Program -> prices -> Timeline -> Report.

#include <optional>
#include <string>

#include "reports/report.hpp"
#include "sim/traffic.hpp"

namespace orrery {

enum class Engine : std::uint8_t { sweep, events };

struct StudyOptions {
  bool all_ranks = false;
  std::optional<Network> network;  ///< flows if left out and the cluster has a fabric
  Engine engine = Engine::sweep;   ///< of the formula; flows need events
  bool isolated = false;           ///< also the cells of the middle position alone
};

/// The network that a study of this scenario runs on. Throws InputError where flows are asked for
/// and there is no fabric.
Network network_of(const Scenario& scenario, std::optional<Network> wanted);

/// A Program priced and run.
struct ProgramRun {
  PriceList prices;
  std::optional<Traffic> traffic;  ///< with Network::flows
  Timeline timeline;
};
ProgramRun run_program(const Scenario& scenario, const Program& program, Network network,
                       Engine engine = Engine::sweep);

struct Study {
  Scenario scenario;
  Program program;
  ProgramRun run;
  Report report;  ///< engine.wall_s: from the scenario to this report
};

/// Of a step that was executed: its timeline in place of a simulated one, and as the price of a shape
/// the mean of what its ops took.
Study study_executed(Scenario scenario, Program program, Timeline timeline,
                     const std::string& executed_on);

/// Throws as network_of().
Study study_step(Scenario scenario, const StudyOptions& options = {});

}  // namespace orrery
