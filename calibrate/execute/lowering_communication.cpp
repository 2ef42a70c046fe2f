// Collectives, exchanges and transfers.

#include <algorithm>

#include <fmt/core.h>

#include "calibrate/execute/rank_lowering.hpp"
#include "sim/check.hpp"

namespace orrery {

using kernels::Format;
using kernels::Matrix;
using Kind = Communication::Kind;

namespace {

kernels::Touch touch(const Matrix& m, bool written) {
  const std::int64_t row_bytes = m.columns * kernels::bits_of(m.format) / 8;
  const std::int64_t pitch_bytes = m.pitch * kernels::bits_of(m.format) / 8;
  return {m.data, m.rows, row_bytes, pitch_bytes, written};
}

kernels::Touch touch(const void* data, std::int64_t bytes, bool written) {
  return {data, 1, bytes, bytes, written};
}

}  // namespace

std::vector<kernels::Touch> Communication::touches() const {
  std::vector<kernels::Touch> list;
  const auto add = [&](const Matrix& m, bool written) {
    if (!m) return;
    list.push_back(touch(m, written));
    if (m.scales != nullptr) {
      list.push_back(
          touch(m.scales, 4 * kernels::scale_elements(m.rows, m.columns, m.scaling), written));
    }
  };
  add(in, false);
  add(out, true);
  if (value != nullptr) list.push_back(touch(value, sizeof(double), true));
  if (route != nullptr) list.push_back(touch(route, sizeof *route, new_route));
  const std::int64_t own = kind == Kind::combine ? out.rows : in.rows;
  const std::int64_t others = kind == Kind::combine ? in.rows : out.rows;
  const auto add_array = [&](const void* data, std::int64_t elements, bool written) {
    if (data != nullptr) list.push_back(touch(data, 4 * elements, written));
  };
  add_array(experts, own * top_k, false);
  add_array(weights, own * top_k, false);
  add_array(received_experts, others * top_k, true);
  add_array(received_weights, others * top_k, true);
  add_array(received_tokens, 1, new_route);
  add_array(slot_values, others * top_k, false);
  add_array(token_values, own * top_k, true);
  return list;
}

void RankLowering::members_of(OpId op, Communication& communication) const {
  for (const StreamId stream : program_.streams_of(op)) {
    const RankId member = rank_of(stream);
    if (member == rank_) communication.self = static_cast<int>(communication.members.size());
    communication.members.push_back(static_cast<int>(member.value));
  }
}

/// `from` of this rank's tokens to `fromf` of all.
void RankLowering::gather(OpId op, const std::string& from) {
  Communication c{.kind = Kind::all_gather, .in = t(from), .out = t(from + "f")};
  members_of(op, c);
  lowered_op_.communication = c;
}

/// `tof`, a part of each rank's sum, to `to`: this rank's tokens of the sum, or the sum in place.
void RankLowering::reduce(OpId op, const std::string& to, CollectiveKind kind) {
  Communication c{
      .kind = kind == CollectiveKind::reduce_scatter ? Kind::reduce_scatter : Kind::all_reduce,
      .out = t(to)};
  if (c.kind == Kind::reduce_scatter) c.in = t(to + "f");
  members_of(op, c);
  lowered_op_.communication = c;
}

void RankLowering::lower_collective(OpId op, const std::string& label,
                                    const Collective& collective) {
  const CollectiveKind kind = collective.kind;
  const bool mla = model_.attention.mla.has_value();
  if (label == "attention gather") return gather(op, "n0");
  if (label == "latent gather") {
    ORRERY_CHECK(model_.attention.mla->q_lora_rank > 0, "two tensors gathered at once");
    return gather(op, "latent");
  }
  if (label == "attention reduce") return reduce(op, "ao", kind);
  if (label == "attention gradient gather") return gather(op, "dx1");
  if (label == "latent gradient reduce") return reduce(op, "d_latent", kind);
  if (label == "attention gradient reduce" && !mla) return reduce(op, "d_n0", kind);
  if (label == "ffn gather" || label == "shared gather") return gather(op, "n1");
  if (label == "ffn reduce") return reduce(op, "y", kind);
  if (label == "ffn gradient gather" || label == "shared gradient gather" ||
      label == "embedding gradient gather") {
    Communication c{.kind = Kind::all_gather, .in = t("dy"), .out = t("dyf")};
    members_of(op, c);
    lowered_op_.communication = c;
    return;
  }
  if (label == "ffn gradient reduce") return reduce(op, "d_n1", kind);
  if (label == "shared reduce") return reduce(op, "y_shared", kind);
  if (label == "shared gradient reduce") return reduce(op, "d_n1_shared", kind);
  if (label == "head gather") return gather(op, "nf");
  if (label == "head gradient reduce") return reduce(op, "d_nf", kind);
  if (label == "embedding reduce") return reduce(op, "emb", kind);
  if (label == "mtp embedding reduce") return reduce(op, "e", kind);
  if (label == "mtp embedding gradient gather") return gather(op, "d_e");
  if (label == "cross-entropy gather") {
    Communication c{.kind = Kind::all_gather};
    const std::int64_t part = 3 * tokens_;
    c.in = kernels::row_of(scratch_array<float>("loss part", part), part, Format::fp32);
    c.out = kernels::row_of(scratch_array<float>("loss parts", part * plan_.parallelism.tp),
                            part * plan_.parallelism.tp, Format::fp32);
    members_of(op, c);
    lowered_op_.communication = c;
    return;
  }
  if (label == "gradient norm") {
    Communication c{.kind = Kind::sum_of_squares, .value = lowered_.square_sum};
    members_of(op, c);
    lowered_op_.communication = c;
    return;
  }
  // Of a whole stage.
  const auto stage =
      std::find_if(lowered_.stages.begin(), lowered_.stages.end(),
                   [&](const StageState& s) { return s.shards.stage == place_.stage; });
  ORRERY_CHECK(stage != lowered_.stages.end(), "{}: no stage {}", program_.name(op), place_.stage);
  Communication c;
  members_of(op, c);
  if (label == "tensor-parallel gradients") {
    c.kind = Kind::all_reduce;
    const StageParameterShards& s = stage->shards;
    c.out = kernels::row_of(stage->dense_gradients + s.tensor_summed_begin,
                            s.tensor_summed_end - s.tensor_summed_begin, Format::fp32);
    lowered_op_.communication = c;
    return;
  }
  const bool expert = label == "expert gradients" || label == "expert parameters";
  const std::int64_t elements =
      expert ? stage->shards.expert_elements : stage->shards.dense_elements;
  const ArrayPart part = share_of(*stage, expert);
  if (label == "dense gradients" || label == "expert gradients") {
    float* gradients = expert ? stage->expert_gradients : stage->dense_gradients;
    if (kind == CollectiveKind::all_reduce) {
      c.kind = Kind::all_reduce;
      c.out = kernels::row_of(gradients, elements, Format::fp32);
    } else {
      c.kind = Kind::reduce_scatter;
      c.in = kernels::row_of(gradients, elements, Format::fp32);
      c.out = kernels::row_of(gradients + part.begin, part.end - part.begin, Format::fp32);
    }
  } else {
    ORRERY_CHECK(label == "dense parameters" || label == "expert parameters", "{} is not executed",
                 program_.name(op));
    c.kind = Kind::all_gather;
    void* parameters = expert ? stage->expert_parameters : stage->dense_parameters;
    c.out = kernels::row_of(parameters, elements, stage->format);
    c.in = columns_of(c.out, part.begin, part.end - part.begin);
    requantise(*stage, expert, lowered_op_.then);
  }
  lowered_op_.communication = c;
}

void RankLowering::lower_exchange(OpId op, const ExpertExchange& exchange) {
  const Moe& moe = *model_.moe;
  const std::int64_t top_k = moe.top_k, received = received_capacity();
  const std::string route_key = kept_key("route", place_.stage, place_.unit, place_.micro_batch);
  ExchangeRoute*& route = routes_[route_key];
  if (route == nullptr) {
    lowered_.routes.push_back(std::make_unique<ExchangeRoute>());
    route = lowered_.routes.back().get();
  }
  const bool gradient = program_.tag(op).phase == Phase::combine_backward ||
                        program_.tag(op).phase == Phase::dispatch_backward;
  const std::string twin = block_scaled() ? ":q" : "";
  Communication c;
  c.route = route;
  c.top_k = top_k;
  c.local_experts = moe.routed_experts / plan_.parallelism.ep;
  c.received_tokens = kept_array<std::int32_t>("received tokens", 1);
  members_of(op, c);
  if (!exchange.combine) {
    c.kind = Kind::dispatch;
    // Recomputation sends tokens once more, under a phase of the backward pass.
    c.new_route = exchange.new_layout;
    c.in = t((c.new_route ? "n1" : "dy") + twin);
    c.out = t((c.new_route ? "recv_x" : "recv_dy") + twin);
    if (c.new_route) {
      c.experts = kept_array<std::int32_t>("experts", local_tokens_ * top_k);
      c.weights = kept_array<float>("expert weights", local_tokens_ * top_k);
      c.received_experts = kept_array<std::int32_t>("received experts", received * top_k);
      c.received_weights = kept_array<float>("received weights", received * top_k);
    }
  } else {
    c.kind = Kind::combine;
    c.in = t(gradient ? "d_red" : "red");
    c.out = t(gradient ? "d_n1_routed" : "y_routed");
    if (gradient) {
      c.slot_values = scratch_array<float>("slot weight gradients", received * top_k);
      c.token_values = scratch_array<float>("expert weight gradients", local_tokens_ * top_k);
    }
  }
  lowered_op_.communication = c;
}

void RankLowering::lower_transfer(OpId op) {
  const OpTag& tag = program_.tag(op);
  const bool forward = tag.phase == Phase::pipeline_forward;
  const int stage = tag.stage, micro_batch = tag.micro_batch;
  Communication c;
  // The sender's stream comes first; of a rank alone, its own is there only.
  const auto streams = program_.streams_of(op);
  const StreamId mine = *std::find_if(streams.begin(), streams.end(),
                                      [&](StreamId s) { return rank_of(s) == rank_; });
  const auto other =
      static_cast<int>(rank_of(mine == streams.front() ? streams.back() : streams.front()).value);
  c.members = {other};
  if (kind_of(mine) == StreamKind::receive_previous || kind_of(mine) == StreamKind::receive_next) {
    c.kind = Kind::receive;
    c.out = forward ? stage_buffer("received activations", stage + 1, micro_batch)
                    : stage_buffer("received gradients", stage - 1, micro_batch);
    lowered_op_.communication = c;
    return;
  }
  c.kind = Kind::send;
  if (forward) {
    const auto last = units_[static_cast<std::size_t>(stage)].size() - 1;
    place_ = {.stage = stage, .micro_batch = micro_batch, .half = Half::forward, .unit = last};
    c.in = stage_buffer("sent activations", stage, micro_batch);
    sum_up(output_terms(last), c.in);
  } else {
    c.in = outgoing_gradient(stage, micro_batch);
    in_use_.at({stage, micro_batch}).gradient_sent = true;
    sent_.push_back({stage, micro_batch});
  }
  lowered_op_.communication = c;
}

/// From a stage to the next one on the same rank.
void RankLowering::lower_hand_over(OpId op) {
  const OpTag& tag = program_.tag(op);
  const int stage = tag.stage, micro_batch = tag.micro_batch;
  if (tag.phase == Phase::pipeline_forward) {
    const auto last = units_[static_cast<std::size_t>(stage)].size() - 1;
    place_ = {.stage = stage, .micro_batch = micro_batch, .half = Half::forward, .unit = last};
    sum_up(output_terms(last), stage_buffer("received activations", stage + 1, micro_batch));
    return;
  }
  call(kernels::Copy{.from = outgoing_gradient(stage, micro_batch),
                     .to = stage_buffer("received gradients", stage - 1, micro_batch)});
  in_use_.at({stage, micro_batch}).gradient_sent = true;
  sent_.push_back({stage, micro_batch});
}

}  // namespace orrery
