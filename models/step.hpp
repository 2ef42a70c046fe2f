#pragma once
// Scenario -> Program: every operation of one training step.

#include <cstdint>
#include <optional>

#include "models/layout.hpp"
#include "models/scenario.hpp"
#include "sim/program.hpp"

namespace orrery {

struct StepOptions {
  /// false: one rank per pipeline position stands for its symmetric peers (rank classes,
  /// multiplicity R = tp cp dp). true: every rank of the world is simulated.
  bool all_ranks = false;
};

/// The whole step: static memory, the pipeline's cells in schedule order with their sends, gradient
/// reduction, optimizer, parameter gathering. Simulated rank of (position p, slot i): p * R + i
/// with all ranks, else p.
Program build_step(const Scenario& scenario, const StepOptions& options = {});

/// One action of one pipeline position alone: inputs are there at time 0, nothing is sent. This is
/// what a profile of a single chunk (such as DeepSeek's published trace) shows.
Program build_cell(const Scenario& scenario, int position, const Action& action);

/// The loads that the scenario's routing draws; of a model with experts. Outlived by the scenario.
ExpertLoads expert_loads(const Scenario& scenario);

/// Parameters of one stage on one rank, by who shares them.
struct StageParameters {
  std::int64_t dense = 0;   ///< replicated over the data group (sharded over tp)
  std::int64_t expert = 0;  ///< of this rank's experts, replicated over the expert-data group
  std::int64_t tensor_summed = 0;  ///< LayerShard's
};
StageParameters stage_parameters(const Scenario& scenario, int stage);

}  // namespace orrery
