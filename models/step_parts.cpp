#include "models/step_parts.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

namespace orrery {
namespace {

/// Of a micro-batch's tokens, between two layers.
std::int64_t activation_bytes(const Model& model, const Plan& plan) {
  return std::llround(bytes_per_element(plan.precision.activations)) * plan.micro_batch_tokens() *
         model.hidden;
}

/// Appends a collective over the copies of `bytes`, if there is something to move.
void add_collective(std::vector<StageCollective>& list, const Layout& layout, GroupKind group,
                    std::vector<int> positions, CollectiveKind kind, std::int64_t bytes,
                    std::string label) {
  const std::int64_t ranks = layout.group_size(group) * static_cast<std::int64_t>(positions.size());
  if (ranks == 1 || bytes == 0) return;
  Shape shape{.work = Collective{.kind = kind,
                                 .bytes = bytes,
                                 .ranks = ranks,
                                 .ranks_per_node = layout.members_per_node(group, positions),
                                 .stride = layout.stride(group)},
              .label = std::move(label),
              .sms = 0};
  list.push_back({group, std::move(positions), std::move(shape)});
}

}  // namespace

RankElements rank_elements(const Plan& plan, const Layout& layout,
                           std::span<const HeldStage> held) {
  const int zero = plan.parallelism.zero_stage;
  const std::int64_t dense_group = layout.group_size(GroupKind::data);
  const std::int64_t expert_group = layout.group_size(GroupKind::expert_data);
  RankElements elements;
  for (const HeldStage& stage : held) {
    const StageParameters& n = stage.parameters;
    const std::int64_t all = n.dense + n.expert;
    const std::int64_t shard = n.dense / dense_group + n.expert / expert_group;
    const std::int64_t saved =
        n.dense / (dense_group * stage.copies) + n.expert / (expert_group * stage.copies);
    elements.resident += zero >= 3 ? shard : all;
    elements.gradients += zero >= 2 ? shard : all;
    elements.optimizer += zero >= 1 ? saved : all;
    elements.saved += saved;
  }
  return elements;
}

std::int64_t transient_bytes(const Plan& plan, std::int64_t workspace, std::int64_t largest_unit) {
  const std::int64_t in_flight = 2 * largest_unit;
  const int zero = plan.parallelism.zero_stage;
  if (zero >= 3) workspace += in_flight * plan.precision.parameter_bytes;
  if (zero >= 2) workspace += in_flight * plan.precision.gradient_bytes;
  return workspace;
}

std::array<std::int64_t, kMemoryKinds> static_memory(const Model& model, const Plan& plan,
                                                     const RankElements& elements,
                                                     std::int64_t transient) {
  const Precision& precision = plan.precision;
  std::array<std::int64_t, kMemoryKinds> bytes{};
  const auto hold = [&](MemoryKind kind, std::int64_t n) {
    bytes[static_cast<std::size_t>(kind)] = n;
  };
  hold(MemoryKind::parameters, elements.resident * precision.parameter_bytes);
  hold(MemoryKind::gradients, elements.gradients * precision.gradient_bytes);
  hold(MemoryKind::optimizer_state,
       elements.optimizer * (precision.master_bytes + precision.moment_bytes));
  hold(MemoryKind::workspace, transient);
  // Activations and gradients in flight from and to both neighbours, double-buffered.
  const std::int64_t message = activation_bytes(model, plan);
  hold(MemoryKind::communication_buffers, plan.parallelism.pp > 1 ? 2 * (4 * message) : 0);
  return bytes;
}

Shape send_shape(const Model& model, const Plan& plan, Phase phase, bool same_node) {
  const Parallelism& p = plan.parallelism;
  const std::int64_t bytes = activation_bytes(model, plan) / (p.sequence_parallel ? p.tp : 1);
  return {.work = Send{.bytes = bytes, .same_node = same_node},
          .label = phase == Phase::pipeline_forward ? "PP(F)" : "PP(B)",
          .sms = 0};
}

std::vector<StageCollective> gradient_reductions(const Plan& plan, const Layout& layout,
                                                 const StageParameters& p,
                                                 const std::vector<int>& holders) {
  std::vector<StageCollective> list;
  if (plan.parallelism.zero_stage >= 2) return list;  // its cells reduce them
  const auto kind = plan.parallelism.zero_stage == 0 ? CollectiveKind::all_reduce
                                                     : CollectiveKind::reduce_scatter;
  const std::int64_t width = plan.precision.gradient_sync_bytes;
  for (const int position : holders) {
    add_collective(list, layout, GroupKind::tensor, {position}, CollectiveKind::all_reduce,
                   p.tensor_summed * width, "tensor-parallel gradients");
  }
  add_collective(list, layout, GroupKind::data, holders, kind, p.dense * width, "dense gradients");
  add_collective(list, layout, GroupKind::expert_data, holders, kind, p.expert * width,
                 "expert gradients");
  return list;
}

std::vector<StageCollective> parameter_gathers(const Plan& plan, const Layout& layout,
                                               const StageParameters& p,
                                               const std::vector<int>& holders) {
  std::vector<StageCollective> list;
  const int zero = plan.parallelism.zero_stage;
  if (zero != 1 && zero != 2) return list;
  const std::int64_t width = plan.precision.parameter_bytes;
  add_collective(list, layout, GroupKind::data, holders, CollectiveKind::all_gather,
                 p.dense * width, "dense parameters");
  add_collective(list, layout, GroupKind::expert_data, holders, CollectiveKind::all_gather,
                 p.expert * width, "expert parameters");
  return list;
}

Shape gradient_norm_shape(const RankElements& elements) {
  return {.work = Streaming{.kind = StreamingKind::reduction,
                            .bytes_read = 4 * elements.optimizer,
                            .bytes_written = 0},
          .label = "gradient norm",
          .sms = 0};
}

Shape norm_reduction_shape(const Plan& plan, std::int64_t gpus_per_node) {
  const std::int64_t world = plan.parallelism.world();
  return {.work = Collective{.kind = CollectiveKind::all_reduce,
                             .bytes = 4,
                             .ranks = world,
                             .ranks_per_node = std::min(gpus_per_node, world)},
          .label = "gradient norm",
          .sms = 0};
}

Shape adamw_shape(const Plan& plan, const RankElements& elements) {
  const Precision& precision = plan.precision;
  const std::int64_t n = elements.optimizer;
  const std::int64_t state = precision.master_bytes + precision.moment_bytes;
  return {.work = Streaming{.kind = StreamingKind::optimizer,
                            .bytes_read = n * (precision.gradient_bytes + state),
                            .bytes_written = n * (state + precision.parameter_bytes) +
                                             elements.gradients * precision.gradient_bytes,
                            .launches = 2},
          .label = "AdamW",
          .sms = 0};
}

Shape checkpoint_shape(const Plan& plan, const RankElements& elements) {
  const Precision& precision = plan.precision;
  const std::int64_t weight_bytes =
      precision.master_bytes > 0 ? precision.master_bytes : precision.parameter_bytes;
  return {.work = StorageWrite{.bytes = elements.saved * (weight_bytes + precision.moment_bytes),
                               .bytes_per_s = std::llround(plan.checkpoint->bytes_per_s),
                               .own_network = plan.checkpoint->own_network},
          .label = "checkpoint",
          .sms = 0};
}

}  // namespace orrery
