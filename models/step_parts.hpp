#pragma once
// Parts of a training step as values: what a rank holds, and the shapes of what moves between ranks
// and of the optimizer. Whoever puts steps together asks here: models/step.cpp for a Program of
// every operation, reports/search/coarse.cpp for a step of whole cells.

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "models/layout.hpp"
#include "models/model.hpp"
#include "models/plan.hpp"
#include "models/step.hpp"
#include "sim/program.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// A stage that a position holds.
struct HeldStage {
  StageParameters parameters;
  std::int64_t copies = 1;  ///< positions that hold it
};

/// Elements of parameters on one rank, over all stages that it holds.
struct RankElements {
  std::int64_t resident = 0;   ///< of the working copy
  std::int64_t gradients = 0;  ///< accumulated over micro-batches
  std::int64_t optimizer = 0;  ///< whose state this rank keeps
  std::int64_t saved = 0;      ///< its share of them, divided among all their copies
};
RankElements rank_elements(const Plan& plan, const Layout& layout, std::span<const HeldStage> held);

/// What is live while a stage runs: `workspace` of its layers, and what ZeRO gathers or has not yet
/// scattered, the unit that runs and the next (or the last) one. `largest_unit`: elements of a
/// layer, embedding or head.
std::int64_t transient_bytes(const Plan& plan, std::int64_t workspace, std::int64_t largest_unit);

/// Memory that is there all the time, by kind; activations are not.
std::array<std::int64_t, kMemoryKinds> static_memory(const Model& model, const Plan& plan,
                                                     const RankElements& elements,
                                                     std::int64_t transient);

/// The result of a stage's forward or backward to the next rank.
Shape send_shape(const Model& model, const Plan& plan, Phase phase, bool same_node);

/// A collective of a stage's gradients or parameters over its copies: all slots of the group in
/// these positions.
struct StageCollective {
  GroupKind group{};
  std::vector<int> positions;
  Shape shape;
};
/// In the order in which they are issued; only those that move something. `holders`: the positions
/// that hold the stage.
std::vector<StageCollective> gradient_reductions(const Plan& plan, const Layout& layout,
                                                 const StageParameters& parameters,
                                                 const std::vector<int>& holders);
std::vector<StageCollective> parameter_gathers(const Plan& plan, const Layout& layout,
                                               const StageParameters& parameters,
                                               const std::vector<int>& holders);

/// The sum of squares of this rank's gradients.
Shape gradient_norm_shape(const RankElements& elements);
/// The sum over all ranks.
Shape norm_reduction_shape(const Plan& plan, std::int64_t gpus_per_node);
/// AdamW on this rank's elements; then all its gradients are cleared for the next step.
Shape adamw_shape(const Plan& plan, const RankElements& elements);
/// Of the plan's checkpoint, which there is.
Shape checkpoint_shape(const Plan& plan, const RankElements& elements);

}  // namespace orrery
