#include "calibrate/execute/parameters.hpp"

#include <algorithm>

#include <string_view>

#include "sim/check.hpp"

namespace orrery {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

/// Whether a stage holds the parameter of this name.
bool holds(const StageContents& stage, const Model& model, const std::string& name) {
  if (name == "embedding") return stage.embedding;
  if (name == "head" || name == "final_norm") return stage.head;
  const std::size_t dot = name.find('.');
  const std::int64_t index = std::stoll(name.substr(dot + 1));
  if (name.compare(0, dot, "mtp") == 0) return stage.mtp_modules > 0;
  const bool of_mtp = index >= model.layers;
  return of_mtp ? stage.mtp_modules > 0
                : index >= stage.first_layer && index < stage.first_layer + stage.layers;
}

/// The part of a parameter that a rank has. Tensor parallelism splits up-projections, the embedding
/// and the head by rows, down-projections by columns (Megatron-LM, arXiv 1909.08053, section 3),
/// and expert parallelism experts; the rest is whole on every rank.
ParameterShard shard_of(const Parameter& parameter, const Model& model, const Parallelism& p,
                        const Coordinates& at) {
  const std::string base = parameter.name.substr(parameter.name.rfind('.') + 1);
  const auto is = [&](std::initializer_list<std::string_view> names) {
    return std::find(names.begin(), names.end(), base) != names.end();
  };
  ParameterShard shard;
  shard.parameter = parameter;
  shard.columns = parameter.columns;
  const std::int64_t rows = parameter.rows;
  if (is({"embedding", "head", "q_b", "kv_b"})) {
    shard.row_ranges = {{at.tp * (rows / p.tp), rows / p.tp}};
  } else if (base == "qkv") {
    // Query heads of this rank, its key heads, its value heads.
    const Attention& a = model.attention;
    const std::int64_t q = a.heads * a.head_dim, kv = a.kv_heads * a.head_dim;
    shard.row_ranges = {{at.tp * (q / p.tp), q / p.tp},
                        {q + at.tp * (kv / p.tp), kv / p.tp},
                        {q + kv + at.tp * (kv / p.tp), kv / p.tp}};
  } else if (is({"ffn_up", "shared_up"})) {  // [gate; up]
    const std::int64_t width = rows / 2, part = width / p.tp;
    shard.row_ranges = {{at.tp * part, part}, {width + at.tp * part, part}};
  } else if (is({"o", "ffn_down", "shared_down"})) {
    shard.row_ranges = {{0, rows}};
    shard.columns = parameter.columns / p.tp;
    shard.first_column = at.tp * shard.columns;
  } else if (is({"routed_up", "routed_down"})) {
    const std::int64_t local = parameter.matrices / p.ep;
    shard.row_ranges = {{at.ep * local * rows, local * rows}};
    shard.expert = true;
  } else {
    shard.row_ranges = {{0, rows}};
    shard.whole = true;
    shard.norm = parameter.kind != ParameterKind::matrix;
    // Norms of heads see other heads on every rank.
    shard.tensor_summed = p.tp > 1 && (p.sequence_parallel || is({"query_norm", "key_norm"}));
  }
  return shard;
}

/// Split matrices, whole matrices, norms that are not summed, norms that are; or, with sequence
/// parallelism, where all that is whole is summed, simply the first two and norms.
int order_of(const ParameterShard& p) {
  if (!p.whole) return 0;
  if (!p.norm) return 1;
  return p.tensor_summed ? 3 : 2;
}

/// Assigns offsets; the length of the array.
std::int64_t lay_out(std::vector<ParameterShard>& shards, std::int64_t parts) {
  std::stable_sort(shards.begin(), shards.end(),
                   [](const auto& a, const auto& b) { return order_of(a) < order_of(b); });
  std::int64_t end = 0;
  for (ParameterShard& shard : shards) {
    shard.offset = end;
    end += round_up(shard.elements(), kParameterAlignment);
  }
  return round_up(end, parts * kParameterAlignment);
}

}  // namespace

std::vector<int> positions_of(const Plan& plan, int stage) {
  const Schedule schedule =
      make_schedule({.kind = plan.schedule,
                     .ranks = static_cast<int>(plan.parallelism.pp),
                     .chunks = plan.chunks,
                     .micro_batches = static_cast<int>(plan.micro_batches())});
  const int first = schedule.rank_of(stage, 0);
  const int other = schedule.rank_of(stage, schedule.shape.micro_batches - 1);
  if (first == other) return {first};
  return {std::min(first, other), std::max(first, other)};
}

std::int64_t ParameterShard::rows() const {
  std::int64_t count = 0;
  for (const RowRange& range : row_ranges) count += range.count;
  return count;
}

std::int64_t ParameterShard::whole_index(std::int64_t row, std::int64_t column) const {
  for (const RowRange& range : row_ranges) {
    if (row < range.count) {
      return (range.first + row) * parameter.columns + first_column + column;
    }
    row -= range.count;
  }
  ORRERY_CHECK(false, "row {} behind the {} of {}", row, rows(), parameter.name);
  return 0;
}

StageParameterShards stage_parameter_shards(const Scenario& scenario, int stage,
                                            const Coordinates& at, std::int64_t copies) {
  const Model& model = scenario.model;
  const StageContents& contents = scenario.plan.stages[static_cast<std::size_t>(stage)];
  StageParameterShards shards;
  shards.stage = stage;
  for (const Parameter& parameter : parameters_of(model)) {
    if (!holds(contents, model, parameter.name)) continue;
    ParameterShard shard = shard_of(parameter, model, scenario.plan.parallelism, at);
    (shard.expert ? shards.expert : shards.dense).push_back(std::move(shard));
  }
  const Layout layout(scenario.plan.parallelism, scenario.cluster.gpus_per_node);
  shards.dense_elements = lay_out(shards.dense, layout.group_size(GroupKind::data) * copies);
  shards.expert_elements =
      lay_out(shards.expert, layout.group_size(GroupKind::expert_data) * copies);
  bool any = false;
  for (const ParameterShard& p : shards.dense) {
    if (!p.tensor_summed) continue;
    if (!any) shards.tensor_summed_begin = p.offset;
    any = true;
    shards.tensor_summed_end = p.offset + p.elements();
  }
  return shards;
}

}  // namespace orrery
