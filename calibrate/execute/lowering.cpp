#include "calibrate/execute/lowering.hpp"

#include <algorithm>

#include <fmt/core.h>

#include "calibrate/execute/rank_lowering.hpp"
#include "calibrate/formats.hpp"
#include "calibrate/initial_parameters.hpp"
#include "sim/check.hpp"

namespace orrery {

using kernels::Format;
using kernels::Matrix;
using kernels::Scaling;

std::vector<std::string> why_not_executable(const Scenario& scenario) {
  const Model& m = scenario.model;
  const Plan& plan = scenario.plan;
  const Parallelism& p = plan.parallelism;
  const Precision& precision = plan.precision;
  std::vector<std::string> reasons = why_not_executable(m);
  const auto refuse = [&](bool when, std::string why) {
    if (when) reasons.push_back(std::move(why));
  };
  refuse(m.tied_embeddings && p.pp > 1,
         "its head is tied to an embedding on another stage: pp 1 would do");
  refuse(m.attention.mla && m.attention.mla->q_lora_rank == 0 && p.tp > 1,
         "latent attention without q_lora_rank is not executed under tensor parallelism");
  refuse(p.cp > 1, "context parallelism is not executed: cp 1 would do");
  refuse(p.expert_tp > 1, "expert tensor parallelism is not executed: expert_tp 1 would do");
  refuse(p.zero_stage > 1, "ZeRO stages 2 and 3 are not executed: zero 0 or 1 would do");
  refuse(m.moe && p.tp > 1 && !p.sequence_parallel,
         "experts under tensor parallelism need sequence_parallel: true");
  refuse(
      precision.kind == PrecisionKind::fp8_tensor || precision.linear == NumberFormat::fp8_tensor,
      "FP8 with a scale per tensor is not executed: fp8_deepseek has block scales");
  const bool block = precision.linear == NumberFormat::fp8_block;
  refuse(block && p.tp > 1, "block-scaled FP8 under tensor parallelism is not executed");
  refuse(precision.dispatch != precision.linear,
         "tokens are dispatched in another format than linear layers read");
  refuse(precision.combine != precision.activations,
         "tokens are combined in another format than activations have");
  refuse(precision.gradient_bytes != 4 || precision.gradient_sync_bytes != 4,
         "gradients are not FP32");
  refuse(precision.parameter_bytes != (precision.activations == NumberFormat::fp32 ? 4 : 2),
         "parameters do not have the activations' format");
  refuse(precision.master_bytes != 4 &&
             !(precision.master_bytes == 0 && precision.parameter_bytes == 4),
         "master weights are not FP32");
  refuse(precision.moment_bytes < 4, "moments are neither FP32 nor BF16");
  const auto stored = [&](NumberFormat f) {
    return f == precision.activations || f == NumberFormat::fp8_block || f == NumberFormat::e5m6;
  };
  refuse(!stored(precision.saved) || !stored(precision.saved_attention) ||
             (precision.saved == NumberFormat::e5m6),
         "activations are kept in a format that is not executed");
  refuse(!block && (precision.saved != precision.activations ||
                    precision.saved_attention != precision.activations),
         "activations are kept in another format than linear layers read");
  refuse(plan.checkpoint.has_value(), "checkpoints are not written");
  if (block) {
    // Scales cover 128 elements along every contraction: of forward, both gradients, all shards.
    const auto need = [&](std::int64_t dimension, const char* what) {
      refuse(
          dimension % kernels::kTile != 0,
          fmt::format("{} is {}, and FP8 scales cover 128: a multiple would do", what, dimension));
    };
    need(m.hidden, "hidden");
    need(plan.micro_batch_tokens(), "tokens of a micro-batch");
    if (!m.layer_is_moe.empty() && m.moe_layers() < m.layers) need(m.intermediate, "intermediate");
    if (m.moe) need(m.moe->expert_intermediate, "expert_intermediate");
    if (m.moe && m.moe->shared_intermediate > 0)
      need(m.moe->shared_intermediate, "shared_intermediate");
    if (m.attention.mla) {
      need(m.attention.mla->kv_lora_rank, "kv_lora_rank");
      if (m.attention.mla->q_lora_rank > 0) need(m.attention.mla->q_lora_rank, "q_lora_rank");
    }
    need(m.attention.heads * m.attention.d_v(), "heads x v_head_dim");
  }
  if (m.mtp_modules > 0) {
    // The module looks tokens up in the model's embedding.
    bool apart = false;
    for (std::size_t s = 0; s < plan.stages.size(); ++s) {
      if (plan.stages[s].mtp_modules == 0 || plan.stages[s].embedding) continue;
      apart |= positions_of(plan, static_cast<int>(s)) != positions_of(plan, 0);
    }
    refuse(apart,
           "its MTP modules share an embedding that lies on another rank: pp 1, dual_pipe, "
           "dual_pipe_v and zb_v have both on one");
  }
  return reasons;
}

RankLowering::RankLowering(const Scenario& scenario, const Program& program, RankId rank,
                           RankId world_rank, bool alone, Tensors& tensors)
    : scenario_(scenario),
      model_(scenario.model),
      plan_(scenario.plan),
      program_(program),
      rank_(rank),
      world_rank_(world_rank),
      alone_(alone),
      training_(scenario.training),
      tensors_(tensors),
      layout_(plan_.parallelism, scenario.cluster.gpus_per_node),
      schedule_(make_schedule({.kind = plan_.schedule,
                               .ranks = static_cast<int>(plan_.parallelism.pp),
                               .chunks = plan_.chunks,
                               .micro_batches = static_cast<int>(plan_.micro_batches())})),
      at_(layout_.coordinates(world_rank.value)) {
  const Parallelism& p = plan_.parallelism;
  tokens_ = plan_.micro_batch_tokens();
  sequence_split_ = p.tp > 1 && p.sequence_parallel;
  local_tokens_ = sequence_split_ ? tokens_ / p.tp : tokens_;
  activations_ = *format_of(plan_.precision.activations);
  linear_format_ = *format_of(plan_.precision.linear);
  for (const auto& actions : schedule_.actions) {
    for (const Action& a : actions) {
      if (a.kind == ActionKind::backward_weight) weights_apart_.insert({a.stage, a.micro_batch});
    }
  }
  for (const StageContents& s : plan_.stages) {
    std::vector<StageUnit> units;
    using Kind = StageUnit::Kind;
    if (s.embedding) units.push_back({.kind = Kind::embedding});
    for (std::int64_t l = s.first_layer; l < s.first_layer + s.layers; ++l) {
      units.push_back({.kind = Kind::layer, .layer = l, .moe = model_.is_moe(l)});
    }
    if (s.head) units.push_back({.kind = Kind::head});
    for (int i = 0; i < s.mtp_modules; ++i) {
      const std::int64_t layer = model_.layers + i;
      units.push_back({.kind = Kind::mtp_front, .layer = layer, .module = i});
      units.push_back({.kind = Kind::layer,
                       .layer = layer,
                       .module = i,
                       .moe = model_.is_moe(model_.layers - 1)});
      units.push_back({.kind = Kind::head, .module = i});
    }
    units_.push_back(std::move(units));
  }
  if (alone_) find_mean_received();
  make_specs();
}

Lowered RankLowering::lower() {
  lowered_.rank = world_rank_;
  make_stages();
  make_inputs();
  lowered_.scalars = tensors_.array<kernels::AdamScalars>("AdamW scalars", 1);
  lowered_.square_sum = tensors_.array<double>("square sum", 1);
  for (std::size_t i = 0; i < program_.size(); ++i) {
    const OpId op(i);
    bool mine = false;
    lowered_op_ = {};
    lowered_op_.op = op;
    for (const StreamId stream : program_.streams_of(op)) {
      if (rank_of(stream) != rank_) continue;
      mine = true;
      lowered_op_.streams.push_back(kind_of(stream));
    }
    if (!mine) continue;
    finish_cells(op);
    lower_op(op);
    if (alone_ && lowered_op_.communication) copy_instead(op);
    for (const OpId before : program_.predecessors_of(op)) {
      for (const StreamId stream : program_.streams_of(before)) {
        if (rank_of(stream) != rank_) continue;
        lowered_op_.waits.push_back(before);
        break;
      }
    }
    lowered_.ops.push_back(std::move(lowered_op_));
  }
  lowered_.reuse_waits = order_memory(lowered_.ops, program_, tensors_);
  return std::move(lowered_);
}

// ---- tensors ----

void RankLowering::make_specs() {
  const std::int64_t full = tokens_, local = local_tokens_, hidden = model_.hidden;
  const Format act = activations_;
  const auto add = [&](const char* name, std::int64_t rows, std::int64_t columns) {
    specs_[name] = {rows, columns, act};
    specs_[std::string("d_") + name] = {rows, columns, act};
  };
  /// `name` of this rank's own tokens and `namef` of all.
  const auto add_both = [&](const char* name, std::int64_t columns) {
    add(name, local, columns);
    add((std::string(name) + "f").c_str(), full, columns);
  };
  const Attention& a = model_.attention;
  const std::int64_t heads = a.heads / plan_.parallelism.tp;
  for (const char* name : {"x0", "n0", "ao",  "x1",  "x1n",      "n1",   "n1_gate", "n1_routed",
                           "y",  "dy", "dx0", "dx1", "y_routed", "xf",   "nf",      "emb",
                           "e",  "nh", "ne",  "h",   "mtp_x",    "n0_q", "n0_kv"}) {
    add_both(name, hidden);
  }
  add_both("n1_shared", hidden);
  add_both("y_shared", hidden);
  if (a.mla) {
    const Mla& m = *a.mla;
    add_both("latent", m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim);
    add("latent.q", local, m.q_lora_rank);  // for their copies in FP8; they are columns of latent
    add("latent.kv_a", local, m.kv_lora_rank + m.qk_rope_head_dim);
    add("qn", full, m.q_lora_rank);
    add("kvn", full, m.kv_lora_rank);
    add("q", full, heads * a.d_qk());
    add("kvu", full, heads * (m.qk_nope_head_dim + m.v_head_dim));
    add("kr", full, m.qk_rope_head_dim);
    add("k", full, heads * a.d_qk());
    add("v", full, heads * a.d_v());
  } else {
    const std::int64_t kv_heads = a.kv_heads / plan_.parallelism.tp;
    add("qkv", full, (heads + 2 * kv_heads) * a.head_dim);
    add("qkn", full, (heads + kv_heads) * a.head_dim);
  }
  add("o", full, heads * a.d_v());
  const std::int64_t tp = plan_.parallelism.tp;
  add("up", full, 2 * model_.intermediate / tp);
  add("act", full, model_.intermediate / tp);
  if (model_.moe) {
    const Moe& moe = *model_.moe;
    const std::int64_t rows = row_capacity(), received = received_capacity();
    add("logits", local, moe.routed_experts);
    add("recv_x", received, hidden);
    add("recv_dy", received, hidden);
    add("rows_x", rows, hidden);
    add("rows_dy", rows, hidden);
    add("up_r", rows, 2 * moe.expert_intermediate);
    add("act_r", rows, moe.expert_intermediate);
    add("down_r", rows, hidden);
    add("rows", rows, hidden);
    add("red", received, hidden);
    add("sh_up", full, 2 * moe.shared_intermediate / tp);
    add("sh_act", full, moe.shared_intermediate / tp);
  }
  add("logits_v", full, model_.vocabulary / tp);
  add("cat", local, 2 * hidden);
}

RankLowering::Spec RankLowering::spec(std::string_view name) const {
  const auto found = specs_.find(name);
  ORRERY_CHECK(found != specs_.end(), "no tensor {}", name);
  return found->second;
}

std::int64_t RankLowering::received_capacity() const {
  // Every token of the group could want this rank's experts.
  return alone_ ? mean_received_ : local_tokens_ * plan_.parallelism.ep;
}

std::int64_t RankLowering::row_capacity() const {
  const Moe& moe = *model_.moe;
  const std::int64_t local = moe.routed_experts / plan_.parallelism.ep;
  const std::int64_t rows =
      alone_ ? local_tokens_ * moe.top_k : received_capacity() * std::min(moe.top_k, local);
  const std::int64_t padded = block_scaled() ? rows + local * (kernels::kTile - 1) : rows;
  return (padded + kernels::kTile - 1) / kernels::kTile * kernels::kTile;
}

namespace {

/// Where sequence parallelism does not split tokens, full is local.
std::string plain(std::string name, bool split) {
  const std::size_t end = std::min(name.find(':'), name.size());
  if (!split && end > 1 && name[end - 1] == 'f' && name.compare(0, end, "xf") != 0 &&
      name.compare(0, end, "nf") != 0 && name.compare(0, end, "d_xf") != 0 &&
      name.compare(0, end, "d_nf") != 0) {
    name.erase(end - 1, 1);
  }
  return name;
}

}  // namespace

bool RankLowering::kept(std::string_view name, const StageUnit& at) const {
  const Recompute& r = plan_.recompute;
  const std::size_t colon = name.find(':');
  const std::string_view base = name.substr(0, colon);
  const char twin = colon == std::string_view::npos ? ' ' : name[colon + 1];
  const auto is = [&](std::initializer_list<std::string_view> names) {
    return std::find(names.begin(), names.end(), base) != names.end();
  };
  const bool edge = at.kind != StageUnit::Kind::layer;
  // What weight gradients read, in cells of their own, long after it was made.
  if (weights_apart_.count({place_.stage, place_.micro_batch}) > 0) {
    if (twin == 't') return true;
    if (twin == ' ' && !block_scaled() &&
        (base.substr(0, 2) == "d_" ||
         is({"dy", "dyf", "dx1", "dx1f", "rows_dy", "n0", "n0f", "qn", "kvn", "o", "n1", "n1f",
             "act", "sh_act", "act_r", "rows_x", "cat", "nf", "nff"}))) {
      return true;
    }
  }
  // Exits, which neighbours and sends read, and what ends a layer's backward pass.
  if (is({"y", "y_routed", "y_shared", "emb", "mtp_x", "dx0", "d_xf", "d_h", "x0"})) return true;
  if (edge) return is({"xf", "nf", "nff", "logits_v", "e", "cat"});
  if (r.full) return false;
  if (is({"x1", "latent", "latentf"})) return true;
  const bool fp8 = block_scaled();
  // Kept as a GEMM reads it.
  const auto operand = [&] { return fp8 ? twin == 'q' : twin == ' '; };
  if (is({"n0", "n0f", "qn", "kvn"})) return !r.norms && operand();
  if (is({"n1", "n1f"})) return !r.norms && (operand() || (at.moe && twin == ' '));
  if (base == "n1f" && sequence_split_) return true;
  if (is({"q", "k", "v"})) return twin == ' ' && !r.mla_up_projection;
  if (is({"qkv", "qkn"})) return twin == ' ';
  if (base == "o") {
    if (plan_.precision.saved_attention == plan_.precision.activations) {
      return twin == ' ' || (twin == 'q' && fp8);
    }
    return twin == (plan_.precision.saved_attention == NumberFormat::e5m6 ? 'p' : 'q');
  }
  if (is({"up", "sh_up", "up_r"})) {
    return plan_.precision.saved == plan_.precision.activations ? twin == ' ' : twin == 'k';
  }
  if (is({"act", "sh_act", "act_r"})) return !r.activation && operand();
  if (base == "rows_x") return operand();
  return false;
}

int RankLowering::slot(int stage, int micro_batch) {
  const auto known = in_use_.find({stage, micro_batch});
  if (known != in_use_.end()) return known->second.slot;
  std::vector<int>& free = free_slots_[stage];
  int index = 0;
  if (free.empty()) {
    index = slots_[stage]++;
  } else {
    index = free.back();
    free.pop_back();
  }
  in_use_[{stage, micro_batch}] = {.slot = index};
  return index;
}

void RankLowering::release(int stage, int micro_batch) {
  const auto used = in_use_.find({stage, micro_batch});
  if (used == in_use_.end() || !used->second.weights_done) return;
  if (stage > 0 && !used->second.gradient_sent) return;
  free_slots_[stage].push_back(used->second.slot);
  in_use_.erase(used);
}

/// Cells that end before this op: their weight gradients are done.
void RankLowering::finish_cells(OpId before) {
  for (const auto& [stage, micro_batch] : std::exchange(sent_, {})) release(stage, micro_batch);
  const auto cells = program_.cells();
  while (next_cell_ < cells.size() && cells[next_cell_].last.value <= before.value) {
    const Cell& cell = cells[next_cell_++];
    const bool weights = cell.kind == CellKind::backward || cell.kind == CellKind::weight ||
                         cell.kind == CellKind::overlapped;
    if (!weights) continue;
    const std::pair<int, int> who = {cell.pair_stage, cell.kind == CellKind::overlapped
                                                          ? cell.pair_micro_batch
                                                          : cell.micro_batch};
    const auto used = in_use_.find(who);
    if (used == in_use_.end()) continue;  // another position's
    used->second.weights_done = true;
    release(who.first, who.second);
  }
}

std::string RankLowering::kept_key(std::string_view name, int stage, std::size_t unit,
                                   int micro_batch) {
  return fmt::format("{} stage {} unit {} slot {}", name, stage, unit, slot(stage, micro_batch));
}

std::string RankLowering::scratch_key(std::string_view name, Half half) {
  return fmt::format("{} {}", name, half == Half::forward ? "forward" : "backward");
}

std::string RankLowering::key(const std::string& name, std::size_t unit) {
  return kept(name, unit_at(place_.stage, unit))
             ? kept_key(name, place_.stage, unit, place_.micro_batch)
             : scratch_key(name, place_.half);
}

Matrix RankLowering::t(const std::string& full_name, std::size_t unit) {
  const std::string name = plain(full_name, sequence_split_);
  if (name == "dy") return incoming_gradient(unit);
  const std::size_t colon = name.find(':');
  // Columns of the latents.
  const std::size_t dot = name.find('.');
  if (dot != std::string::npos && colon == std::string::npos) {
    const Mla& m = *model_.attention.mla;
    const Matrix latent = t(name.substr(0, dot), unit);
    const std::string part = name.substr(dot + 1);
    if (part == "q") return columns_of(latent, 0, m.q_lora_rank);
    if (part == "kv_a") {
      return columns_of(latent, m.q_lora_rank, m.kv_lora_rank + m.qk_rope_head_dim);
    }
    if (part == "kv") return columns_of(latent, m.q_lora_rank, m.kv_lora_rank);
    ORRERY_CHECK(part == "rope", "no part {} of {}", part, name);
    return columns_of(latent, m.q_lora_rank + m.kv_lora_rank, m.qk_rope_head_dim);
  }
  const Spec s = spec(name.substr(0, colon));
  if (colon == std::string::npos) {
    return tensors_.matrix(key(name, unit), s.rows, s.columns, s.format);
  }
  switch (name[colon + 1]) {
    case 'q':
      return tensors_.matrix(key(name, unit), s.rows, s.columns, Format::e4m3, Scaling::rows);
    case 't':
      return tensors_.matrix(key(name, unit), s.columns, s.rows, Format::e4m3, Scaling::rows);
    case 'p':
      return tensors_.matrix(key(name, unit), s.rows, s.columns, Format::e5m6, Scaling::rows);
    default:
      return tensors_.matrix(key(name, unit), s.rows, s.columns, *format_of(plan_.precision.saved),
                             Scaling::rows);
  }
}

Matrix RankLowering::stage_buffer(const char* name, int stage, int micro_batch) {
  return tensors_.matrix(kept_key(name, stage, 0, micro_batch), local_tokens_, model_.hidden,
                         activations_);
}

/// What the unit before this one hands on, which the first kernel adds up.
std::vector<Matrix> RankLowering::input_terms(std::size_t unit) {
  if (unit == 0) return {stage_buffer("received activations", place_.stage, place_.micro_batch)};
  return output_terms(unit - 1);
}

std::vector<Matrix> RankLowering::output_terms(std::size_t index) {
  const StageUnit& u = unit_at(place_.stage, index);
  switch (u.kind) {
    case StageUnit::Kind::embedding:
      return {t("emb", index)};
    case StageUnit::Kind::head:
      return {t("xf", index)};
    case StageUnit::Kind::mtp_front:
      return {t("mtp_x", index)};
    case StageUnit::Kind::layer:
      break;
  }
  if (!u.moe) return {t("x1", index), t("y", index)};
  std::vector<Matrix> terms = {t("x1", index), t("y_routed", index)};
  if (model_.moe->shared_intermediate > 0) terms.push_back(t("y_shared", index));
  return terms;
}

/// The gradient of a unit's output: what the unit behind it left.
Matrix RankLowering::incoming_gradient(std::size_t index) {
  const auto& units = units_[static_cast<std::size_t>(place_.stage)];
  if (index + 1 == units.size()) {
    return stage_buffer("received gradients", place_.stage, place_.micro_batch);
  }
  return units[index + 1].kind == StageUnit::Kind::head ? t("d_xf", index + 1)
                                                        : t("dx0", index + 1);
}

Matrix RankLowering::outgoing_gradient(int stage, int micro_batch) {
  place_ = {.stage = stage, .micro_batch = micro_batch, .half = Half::backward, .unit = 0};
  return unit_at(stage, 0).kind == StageUnit::Kind::head ? t("d_xf", 0) : t("dx0", 0);
}

// ---- ops ----

std::size_t RankLowering::unit_of(OpId op, const Shape& shape, int stage, Half half) {
  const OpTag& tag = program_.tag(op);
  const std::string& label = shape.label;
  using Kind = StageUnit::Kind;
  const bool front = label.substr(0, 4) == "mtp ";
  int& module = module_[static_cast<int>(half)];
  const auto& units = units_[static_cast<std::size_t>(stage)];
  for (std::size_t i = 0; i < units.size(); ++i) {
    const StageUnit& u = units[i];
    if (tag.layer != kNoLayer) {
      if (u.layer != tag.layer || (u.kind == Kind::mtp_front) != front) continue;
      // Forward, the next head is this module's; backward, it is that of the one before.
      if (front) module = half == Half::forward ? u.module : u.module - 1;
      return i;
    }
    if (label.substr(0, 9) == "embedding" ? u.kind == Kind::embedding
                                          : u.kind == Kind::head && u.module == module) {
      return i;
    }
  }
  ORRERY_CHECK(false, "{} is in no unit of stage {}", program_.name(op), stage);
  return 0;
}

RankLowering::Place RankLowering::place_of(OpId op, const Shape& shape) {
  const OpTag& tag = program_.tag(op);
  Place place{.stage = tag.stage, .micro_batch = tag.micro_batch};
  const Cell& cell = program_.cells()[next_cell_];
  ORRERY_CHECK(cell.first.value <= op.value && op.value < cell.last.value, "{} is in no cell",
               program_.name(op));
  const bool forward = cell.kind == CellKind::forward ||
                       (cell.kind == CellKind::overlapped && tag.stage == cell.stage &&
                        tag.micro_batch == cell.micro_batch);
  place.half = forward ? Half::forward : Half::backward;
  place.unit = unit_of(op, shape, place.stage, place.half);
  return place;
}

void RankLowering::lower_op(OpId op) {
  const Shape& shape = program_.shapes()[program_.shape(op)];
  const OpTag& tag = program_.tag(op);
  if (std::holds_alternative<Send>(shape.work)) return lower_transfer(op);
  if (std::holds_alternative<Mark>(shape.work)) {
    if (shape.label == "hand over") lower_hand_over(op);
    return;
  }
  const auto* collective = std::get_if<Collective>(&shape.work);
  const Cell& cell = program_.cells()[next_cell_];
  if (cell.kind == CellKind::optimizer) {
    place_ = {.stage = tag.stage, .micro_batch = 0, .half = Half::backward, .unit = 0};
    if (collective != nullptr) return lower_collective(op, shape.label, *collective);
    return lower_optimizer(shape);
  }
  // Heads come by in order of modules, or in the opposite order; a cell begins with the first.
  if (module_cell_ != next_cell_) {
    module_cell_ = next_cell_;
    module_[static_cast<int>(Half::forward)] = -1;
    const int backward_stage = cell.kind == CellKind::overlapped ? cell.pair_stage : cell.stage;
    module_[static_cast<int>(Half::backward)] =
        static_cast<int>(plan_.stages[static_cast<std::size_t>(backward_stage)].mtp_modules) - 1;
  }
  place_ = place_of(op, shape);
  if (collective != nullptr) return lower_collective(op, shape.label, *collective);
  if (const auto* gemm = std::get_if<Gemm>(&shape.work)) return lower_gemm(shape.label, *gemm);
  if (const auto* core = std::get_if<AttentionCore>(&shape.work)) return lower_attention(*core);
  if (const auto* s = std::get_if<Streaming>(&shape.work)) return lower_streaming(shape.label, *s);
  if (const auto* e = std::get_if<ExpertExchange>(&shape.work)) return lower_exchange(op, *e);
  ORRERY_CHECK(false, "{} is not executed", program_.name(op));
}

// ---- inputs ----

void RankLowering::make_inputs() {
  const std::int64_t length = plan_.sequence_length;
  auto* positions = tensors_.array<std::int32_t>("positions", tokens_);
  std::vector<std::int32_t> of_token(static_cast<std::size_t>(tokens_));
  for (std::int64_t i = 0; i < tokens_; ++i) {
    of_token[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i % length);
  }
  tensors_.device().upload(positions, of_token.data(), of_token.size() * sizeof(std::int32_t));
  positions_ = positions;

  bool embedding = false, head = false;
  int modules = 0;
  for (const StageState& s : lowered_.stages) {
    const StageContents& contents = plan_.stages[static_cast<std::size_t>(s.shards.stage)];
    embedding |= contents.embedding;
    head |= contents.head;
    modules = std::max(modules, static_cast<int>(contents.mtp_modules));
  }
  if (head) {
    lowered_.loss = tensors_.array<double>("loss", 1);
    lowered_.mtp_loss = tensors_.array<double>("mtp loss", 1);
  }
  if (!embedding && !head) return;
  for (std::int64_t m = 0; m < plan_.micro_batches(); ++m) {
    const auto make = [&](const char* what) {
      return tensors_.array<std::int32_t>(fmt::format("{} of micro-batch {}", what, m), tokens_);
    };
    MicroBatchInput input;
    input.tokens = make("tokens");
    input.targets = make("targets");
    for (int i = 0; i < modules; ++i) {
      input.mtp_tokens.push_back(make(fmt::format("MTP {} tokens", i).c_str()));
      input.mtp_targets.push_back(make(fmt::format("MTP {} targets", i).c_str()));
    }
    lowered_.inputs.push_back(std::move(input));
  }
}

Lowered lower(const Scenario& scenario, const Program& program, RankId rank, Tensors& tensors) {
  return RankLowering(scenario, program, rank, rank, false, tensors).lower();
}

Lowered lower_alone(const Scenario& scenario, const Program& program, RankId rank,
                    Tensors& tensors) {
  return RankLowering(scenario, program, RankId(0), rank, true, tensors).lower();
}

}  // namespace orrery
