#pragma once
// The chain that every study runs: scenario -> Program -> prices -> Timeline -> Report.

#include <optional>

#include "reports/report.hpp"
#include "sim/traffic.hpp"

namespace orrery {

enum class Engine : std::uint8_t { sweep, events };

/// How transfers are timed: each by a formula, alone on an idle network, or as flows that share the
/// links of the cluster's fabric.
enum class Network : std::uint8_t { formula, flows };

struct StudyOptions {
  bool all_ranks = false;
  std::optional<Network> network;  ///< flows if left out and the cluster has a fabric
  Engine engine = Engine::sweep;   ///< of the formula; flows need events
  bool isolated = false;           ///< also the cells of the middle position alone
};

struct Study {
  Scenario scenario;
  Program program;
  PriceList prices;
  std::optional<Traffic> traffic;  ///< with Network::flows
  Timeline timeline;
  Report report;  ///< engine.wall_s: from the scenario to this report
};

/// Throws InputError where flows are asked for and there is no fabric.
Study study_step(Scenario scenario, const StudyOptions& options = {});

}  // namespace orrery
