// Parameters, their gradients and the optimizer.

#include <algorithm>

#include <fmt/core.h>

#include "calibrate/execute/rank_lowering.hpp"
#include "calibrate/initial_parameters.hpp"
#include "sim/check.hpp"

namespace orrery {

using kernels::Format;
using kernels::Matrix;
using kernels::Scaling;

namespace {

std::byte* at_element(void* array, std::int64_t element, Format format) {
  return static_cast<std::byte*>(array) + element * kernels::bits_of(format) / 8;
}

}  // namespace

void RankLowering::make_stages() {
  const Precision& precision = plan_.precision;
  for (int s = 0; s < schedule_.shape.stages(); ++s) {
    const std::vector<int> holders = positions_of(plan_, s);
    if (std::find(holders.begin(), holders.end(), static_cast<int>(at_.pp)) == holders.end())
      continue;
    StageState state;
    state.shards =
        stage_parameter_shards(scenario_, s, at_, static_cast<std::int64_t>(holders.size()));
    state.format = precision.parameter_bytes == 4 ? Format::fp32 : Format::bf16;
    const std::int64_t width = precision.parameter_bytes;
    const auto name = [&](const char* what) { return fmt::format("{} of stage {}", what, s); };
    state.dense_parameters =
        tensors_.bytes(name("dense parameters"), width * state.shards.dense_elements);
    state.dense_gradients =
        tensors_.array<float>(name("dense gradients"), state.shards.dense_elements);
    if (state.shards.expert_elements > 0) {
      state.expert_parameters =
          tensors_.bytes(name("expert parameters"), width * state.shards.expert_elements);
      state.expert_gradients =
          tensors_.array<float>(name("expert gradients"), state.shards.expert_elements);
    }
    lowered_.stages.push_back(std::move(state));
  }
  for (const StageState& stage : lowered_.stages) initialise(stage);
}

/// Parameters and, where they are kept, FP32 master weights of this rank's part.
void RankLowering::initialise(const StageState& stage) {
  const bool masters = plan_.precision.master_bytes > 0;
  for (const bool expert : {false, true}) {
    const std::int64_t elements =
        expert ? stage.shards.expert_elements : stage.shards.dense_elements;
    if (elements == 0) continue;
    std::vector<float> values(static_cast<std::size_t>(elements), 0.0F);
    const InitialValues initial{scenario_.seed, training_.initial_deviation};
    for (const ParameterShard& shard : expert ? stage.shards.expert : stage.shards.dense) {
      float* to = values.data() + shard.offset;
      for (const RowRange& range : shard.row_ranges) {
        fill_initial_values(initial, shard.parameter,
                            {range.first, range.count, shard.first_column, shard.columns}, to,
                            shard.columns);
        to += range.count * shard.columns;
      }
    }
    void* parameters = expert ? stage.expert_parameters : stage.dense_parameters;
    if (stage.format == Format::fp32) {
      tensors_.device().upload(parameters, values.data(), values.size() * sizeof(float));
    } else {
      std::vector<std::uint16_t> rounded(values.size());
      std::transform(values.begin(), values.end(), rounded.begin(), kernels::bf16_of);
      tensors_.device().upload(parameters, rounded.data(), rounded.size() * sizeof(std::uint16_t));
    }
    if (masters) {
      const ArrayPart part = part_of(stage, expert);
      auto* master = tensors_.array<float>(
          fmt::format("{} masters of stage {}", expert ? "expert" : "dense", stage.shards.stage),
          part.end - part.begin);
      tensors_.device().upload(master, values.data() + part.begin,
                               static_cast<std::size_t>(part.end - part.begin) * sizeof(float));
    }
    requantise(stage, expert, lowered_.prepare);
  }
}

RankLowering::Found RankLowering::find(const std::string& name) const {
  for (const StageState& stage : lowered_.stages) {
    for (const auto* shards : {&stage.shards.dense, &stage.shards.expert}) {
      for (const ParameterShard& shard : *shards) {
        if (shard.parameter.name == name) return {&stage, &shard};
      }
    }
  }
  ORRERY_CHECK(false, "rank {} has no parameter {}", rank_.value, name);
  return {};
}

/// Of the unit at hand: "q_a" is "layers.3.q_a".
std::string RankLowering::parameter_name(std::string_view name) const {
  const StageUnit& u = unit();
  using Kind = StageUnit::Kind;
  if (name == "embedding") return "embedding";
  if (name == "head") return model_.tied_embeddings ? "embedding" : "head";
  if (u.kind == Kind::layer) return fmt::format("layers.{}.{}", u.layer, name);
  if (u.module >= 0) return fmt::format("mtp.{}.{}", u.module, name);
  return std::string(name);
}

Matrix RankLowering::weight(std::string_view name) const {
  const Found found = find(parameter_name(name));
  const ParameterShard& shard = *found.shard;
  Matrix m;
  m.rows = shard.rows();
  m.columns = m.pitch = shard.columns;
  m.format = found.stage->format;
  m.data = at_element(shard.expert ? found.stage->expert_parameters : found.stage->dense_parameters,
                      shard.offset, m.format);
  return m;
}

Matrix RankLowering::gradient(std::string_view name) const {
  const Found found = find(parameter_name(name));
  const ParameterShard& shard = *found.shard;
  Matrix m;
  m.rows = shard.rows();
  m.columns = m.pitch = shard.columns;
  m.format = Format::fp32;
  m.data =
      (shard.expert ? found.stage->expert_gradients : found.stage->dense_gradients) + shard.offset;
  return m;
}

Matrix RankLowering::quantised_weight(std::string_view name) {
  const std::string full = parameter_name(name);
  const Matrix w = weight(name);
  return tensors_.matrix(full + " in FP8", w.rows, w.columns, Format::e4m3, Scaling::blocks);
}

/// Experts stand below each other, each transposed by itself.
Matrix RankLowering::transposed_weight(std::string_view name) {
  const std::string full = parameter_name(name);
  const Matrix w = weight(name);
  const std::int64_t groups =
      find(full).shard->expert ? model_.moe->routed_experts / plan_.parallelism.ep : 1;
  return tensors_.matrix(full + " in FP8, transposed", groups * w.columns, w.rows / groups,
                         Format::e4m3, Scaling::blocks);
}

/// Which matrices GEMMs read in FP8: all but the gate and the head, which stay in higher precision
/// with the embedding and the norms (V3 report 3.3.1).
void RankLowering::requantise(const StageState& stage, bool expert,
                              std::vector<kernels::Call>& calls) {
  if (!block_scaled()) return;
  const auto ends_with = [](const std::string& name, std::string_view end) {
    return name.size() >= end.size() &&
           name.compare(name.size() - end.size(), end.size(), end) == 0;
  };
  for (const ParameterShard& shard : expert ? stage.shards.expert : stage.shards.dense) {
    if (shard.norm || shard.parameter.name == "embedding" || shard.parameter.name == "head" ||
        ends_with(shard.parameter.name, ".gate")) {
      continue;
    }
    Matrix from;
    from.rows = shard.rows();
    from.columns = from.pitch = shard.columns;
    from.format = stage.format;
    from.data = at_element(expert ? stage.expert_parameters : stage.dense_parameters, shard.offset,
                           stage.format);
    calls.push_back(
        kernels::Quantize{.from = from,
                          .to = tensors_.matrix(shard.parameter.name + " in FP8", from.rows,
                                                from.columns, Format::e4m3, Scaling::blocks)});
  }
}

// ---- optimizer ----

ArrayPart owned_part(const Scenario& scenario, const StageState& stage, bool expert, RankId rank) {
  const Plan& plan = scenario.plan;
  const Layout layout(plan.parallelism, scenario.cluster.gpus_per_node);
  const std::vector<int> holders = positions_of(plan, stage.shards.stage);
  const Coordinates at = layout.coordinates(rank.value);
  const auto holder = static_cast<std::int64_t>(std::distance(
      holders.begin(), std::find(holders.begin(), holders.end(), static_cast<int>(at.pp))));
  const GroupKind kind = expert ? GroupKind::expert_data : GroupKind::data;
  const std::int64_t slot = rank.value % layout.slots();
  const std::vector<std::int64_t> members = layout.members(kind, layout.group_of(kind, slot));
  const auto index = static_cast<std::int64_t>(
      std::distance(members.begin(), std::find(members.begin(), members.end(), slot)));
  const auto size = static_cast<std::int64_t>(members.size());
  const std::int64_t elements = expert ? stage.shards.expert_elements : stage.shards.dense_elements;
  const std::int64_t part = elements / (size * static_cast<std::int64_t>(holders.size()));
  return {(holder * size + index) * part, (holder * size + index + 1) * part};
}

/// What of a stage's array this rank updates: its share, or all of it where every copy does.
ArrayPart RankLowering::part_of(const StageState& stage, bool expert) const {
  if (plan_.parallelism.zero_stage > 0) return share_of(stage, expert);
  return {0, expert ? stage.shards.expert_elements : stage.shards.dense_elements};
}

bool RankLowering::gathers_parameters(const StageState& stage, bool expert) const {
  const ArrayPart part = part_of(stage, expert);
  return part.end - part.begin <
         (expert ? stage.shards.expert_elements : stage.shards.dense_elements);
}

void RankLowering::lower_optimizer(const Shape& shape) {
  const auto& streaming = std::get<Streaming>(shape.work);
  if (streaming.kind == StreamingKind::reduction) return lower_gradient_norm();
  ORRERY_CHECK(streaming.kind == StreamingKind::optimizer, "{} is not executed", shape.label);
  lower_adamw();
}

/// Of this rank's share of the gradients; what all tensor-parallel ranks hold counts on the first.
void RankLowering::lower_gradient_norm() {
  bool first = true;
  for (const StageState& stage : lowered_.stages) {
    for (const bool expert : {false, true}) {
      const auto& shards = expert ? stage.shards.expert : stage.shards.dense;
      if (shards.empty()) continue;
      std::int64_t counted = expert ? stage.shards.expert_elements : stage.shards.dense_elements;
      if (at_.tp > 0) {
        for (const ParameterShard& shard : shards) {
          if (shard.whole) counted = std::min(counted, shard.offset);
        }
      }
      ArrayPart part = share_of(stage, expert);
      part.end = std::min(part.end, counted);
      if (part.begin >= part.end) continue;
      const float* gradients = expert ? stage.expert_gradients : stage.dense_gradients;
      call(kernels::SquareSum{.values = gradients + part.begin,
                              .elements = part.end - part.begin,
                              .out = lowered_.square_sum,
                              .accumulate = !first});
      first = false;
    }
  }
  if (first) call(kernels::Fill{.data = lowered_.square_sum, .bytes = sizeof(double)});
}

void RankLowering::lower_adamw() {
  const Precision& precision = plan_.precision;
  const Format moments = precision.moment_bytes == 8 ? Format::fp32 : Format::bf16;
  for (const StageState& stage : lowered_.stages) {
    for (const bool expert : {false, true}) {
      const auto& shards = expert ? stage.shards.expert : stage.shards.dense;
      if (shards.empty()) continue;
      const ArrayPart part = part_of(stage, expert);
      const auto state = [&](const char* what, std::int64_t width) {
        return tensors_.bytes(
            fmt::format("{} {} of stage {}", expert ? "expert" : "dense", what, stage.shards.stage),
            width * (part.end - part.begin));
      };
      void* first_moment = state("first moments", precision.moment_bytes / 2);
      void* second_moment = state("second moments", precision.moment_bytes / 2);
      void* parameters = expert ? stage.expert_parameters : stage.dense_parameters;
      float* gradients = expert ? stage.expert_gradients : stage.dense_gradients;
      // One call for what decays, one for norms behind it.
      std::int64_t norms = expert ? stage.shards.expert_elements : stage.shards.dense_elements;
      for (const ParameterShard& shard : shards) {
        if (shard.norm) norms = std::min(norms, shard.offset);
      }
      const auto update = [&](std::int64_t begin, std::int64_t end, bool decay) {
        if (begin >= end) return;
        const std::int64_t at = begin - part.begin;
        kernels::AdamW adam{.elements = end - begin,
                            .gradient = gradients + begin,
                            .first_moment = at_element(first_moment, at, moments),
                            .second_moment = at_element(second_moment, at, moments),
                            .moments = moments,
                            .scalars = lowered_.scalars,
                            .square_sum = lowered_.square_sum,
                            .decay = decay};
        if (precision.master_bytes > 0) {
          adam.master = static_cast<float*>(state("masters", 4)) + at;
          adam.parameter = at_element(parameters, begin, stage.format);
          adam.parameters = stage.format;
        } else {
          adam.master = static_cast<float*>(parameters) + begin;
        }
        call(adam);
      };
      update(part.begin, std::min(part.end, norms), true);
      update(std::max(part.begin, norms), part.end, false);
      call(kernels::Fill{
          .data = gradients,
          .bytes = 4 * (expert ? stage.shards.expert_elements : stage.shards.dense_elements)});
      if (!gathers_parameters(stage, expert)) requantise(stage, expert, lowered_op_.calls);
    }
  }
}

}  // namespace orrery
