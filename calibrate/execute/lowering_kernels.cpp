// Compute ops to Calls: which tensors an op of models/layer_work.cpp reads and writes.

#include <algorithm>
#include <cmath>

#include <fmt/core.h>

#include "calibrate/execute/rank_lowering.hpp"
#include "sim/check.hpp"

namespace orrery {

using kernels::Format;
using kernels::Matrix;

namespace {

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

std::string without(const std::string& text, std::string_view end) {
  ORRERY_CHECK(ends_with(text, end), "{} does not end in {}", text, end);
  return text.substr(0, text.size() - end.size());
}

}  // namespace

// ---- linear layers ----

RankLowering::Linear RankLowering::linear(std::string_view label) const {
  const bool latent_queries = model_.attention.mla && model_.attention.mla->q_lora_rank > 0;
  if (label == "q_a") return {"n0", "latent.q", "d_latent.q", "d_n0_q"};
  if (label == "kv_a") return {"n0", "latent.kv_a", "d_latent.kv_a", "d_n0_kv"};
  if (label == "q_b" && latent_queries) return {"qn", "q", "d_q", "d_qn"};
  if (label == "q_b") return {"n0f", "q", "d_q", "d_n0_qf"};
  if (label == "kv_b") return {"kvn", "kvu", "d_kvu", "d_kvn"};
  if (label == "qkv") return {"n0f", "qkv", "d_qkv", "d_n0f"};
  if (label == "o") return {"o", "aof", "dx1f", "d_o"};
  if (label == "ffn_up") return {"n1f", "up", "d_up", "d_n1f"};
  if (label == "ffn_down") return {"act", "yf", "dyf", "d_act"};
  if (label == "gate") return {"n1", "logits", "d_logits", "d_n1_gate"};
  if (label == "shared_up") return {"n1f", "sh_up", "d_sh_up", "d_n1_sharedf"};
  if (label == "shared_down") return {"sh_act", "y_sharedf", "dyf", "d_sh_act"};
  if (label == "routed_up") return {"rows_x", "up_r", "d_up_r", "d_rows", true};
  if (label == "routed_down") return {"act_r", "down_r", "rows_dy", "d_act_r", true};
  if (label == "head") return {"nff", "logits_v", "logits_v", "d_nff"};
  ORRERY_CHECK(label == "mtp projection", "no linear layer {}", label);
  return {"cat", "mtp_x", "dy", "d_cat"};
}

void RankLowering::lower_gemm(const std::string& label, const Gemm& gemm) {
  const Linear l = linear(label);
  const std::string parameter = label == "mtp projection" ? "projection" : label;
  const bool fp8 = gemm.inputs == NumberFormat::fp8_block;
  const auto operand = [&](const char* name, const char* twin) {
    return fp8 ? t(std::string(name) + twin) : t(name);
  };
  kernels::Gemm call_;
  switch (gemm.pass) {
    case Pass::forward:
      call_.a = operand(l.in, ":q");
      call_.b = fp8 ? quantised_weight(parameter) : weight(parameter);
      call_.d = t(l.out);
      break;
    case Pass::backward_input:
      call_.a = operand(l.d_out, ":q");
      call_.b = fp8 ? transposed_weight(parameter) : weight(parameter);
      call_.b_transposed = !fp8;
      call_.d = t(l.d_in);
      break;
    case Pass::backward_weight:
      call_.a = operand(l.d_out, ":t");
      call_.b = operand(l.in, ":t");
      call_.a_transposed = call_.b_transposed = !fp8;
      call_.d = gradient(parameter);
      call_.accumulate = true;
      break;
  }
  if (l.routed) {
    call_.grouping = gemm.pass == Pass::backward_weight ? kernels::Grouping::contraction
                                                        : kernels::Grouping::rows;
    call_.groups = model_.moe->routed_experts / plan_.parallelism.ep;
    call_.group_begin = kept_array<std::int32_t>("group begin", call_.groups + 1);
    call_.group_rows = kept_array<std::int32_t>("group rows", call_.groups);
  }
  call(call_);
}

// ---- attention ----

kernels::AttentionShape RankLowering::attention_shape() const {
  const Attention& a = model_.attention;
  const std::int64_t tp = plan_.parallelism.tp;
  kernels::AttentionShape s;
  s.batch = plan_.micro_batch_sequences;
  s.heads = a.heads / tp;
  s.kv_heads = a.mla ? s.heads : a.kv_heads / tp;
  s.q_len = s.kv_len = plan_.sequence_length;
  s.d_qk = a.d_qk();
  s.d_v = a.d_v();
  s.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.d_qk)));
  return s;
}

void RankLowering::lower_attention(const AttentionCore& core) {
  const Attention& a = model_.attention;
  const kernels::AttentionShape shape = attention_shape();
  Matrix q, k, v, d_q, d_k, d_v;
  if (a.mla) {
    q = t("q"), k = t("k"), v = t("v");
    if (core.backward) d_q = t("d_q"), d_k = t("d_k"), d_v = t("d_v");
  } else {
    const std::int64_t queries = shape.heads * a.head_dim, keys = shape.kv_heads * a.head_dim;
    const Matrix normed = t(a.qk_norm ? "qkn" : "qkv");
    q = columns_of(normed, 0, queries);
    k = columns_of(normed, queries, keys);
    v = columns_of(t("qkv"), queries + keys, keys);
    if (core.backward) {
      const Matrix d = t("d_qkv");
      d_q = columns_of(d, 0, queries);
      d_k = columns_of(d, queries, keys);
      d_v = columns_of(d, queries + keys, keys);
    }
  }
  float* lse = kept_array<float>("lse", shape.batch * shape.heads * shape.q_len);
  if (!core.backward) {
    call(kernels::AttentionForward{
        .shape = shape, .q = q, .k = k, .v = v, .out = t("o"), .lse = lse});
    return;
  }
  call(kernels::AttentionBackward{
      .shape = shape,
      .q = q,
      .k = k,
      .v = v,
      .out = t("o"),
      .d_out = t("d_o"),
      .lse = lse,
      .d_q = d_q,
      .d_k = d_k,
      .d_v = d_v,
      .workspace =
          tensors_.bytes("attention workspace", kernels::attention_workspace_bytes(shape))});
}

// ---- streaming kernels ----

void RankLowering::lower_streaming(const std::string& label, const Streaming& streaming) {
  switch (streaming.kind) {
    case StreamingKind::norm_forward:
      return lower_norm(label, false);
    case StreamingKind::norm_backward:
      return lower_norm(label, true);
    case StreamingKind::quantize:
    case StreamingKind::dequantize:
    case StreamingKind::pack_e5m6:
    case StreamingKind::transpose:
      return lower_format(label, streaming.kind);
    case StreamingKind::rope:
      return lower_rope(label == "rope gradient");
    case StreamingKind::activation_forward:
      return lower_activation(without(label, " activation"), false);
    case StreamingKind::activation_backward:
      return lower_activation(without(label, " activation"), true);
    case StreamingKind::elementwise:
      return lower_elementwise(label);
    case StreamingKind::copy:
      return lower_copy(label);
    case StreamingKind::permute:
    case StreamingKind::unpermute:
    case StreamingKind::router:
      return lower_router(label);
    case StreamingKind::embedding_forward:
      return lower_embedding(false);
    case StreamingKind::embedding_backward:
      return lower_embedding(true);
    case StreamingKind::cross_entropy:
      return lower_cross_entropy(label);
    case StreamingKind::optimizer:
    case StreamingKind::reduction:
      break;
  }
  ORRERY_CHECK(false, "{} is not executed", label);
}

namespace {

/// The activation's input and output.
struct ActivationNames {
  const char* up;
  const char* act;
};
ActivationNames activation_names(std::string_view feed_forward) {
  if (feed_forward == "ffn") return {"up", "act"};
  if (feed_forward == "shared") return {"sh_up", "sh_act"};
  ORRERY_CHECK(feed_forward == "routed", "no feed-forward {}", feed_forward);
  return {"up_r", "act_r"};
}

}  // namespace

void RankLowering::lower_format(const std::string& label, StreamingKind kind) {
  // Rows that routing decides.
  const auto used = [&](std::string_view tensor) {
    const bool routed = tensor == "up_r" || tensor == "d_up_r" || tensor == "act_r" ||
                        tensor == "rows_x" || tensor == "rows_dy";
    return routed ? kept_array<std::int32_t>("used rows", 1) : nullptr;
  };
  const auto quantise = [&](const std::string& tensor, const char* twin) {
    call(kernels::Quantize{.from = t(tensor), .to = t(tensor + twin), .used_rows = used(tensor)});
  };
  switch (kind) {
    case StreamingKind::quantize:
      if (ends_with(label, " activation input keep")) {
        return quantise(activation_names(without(label, " activation input keep")).up, ":k");
      }
      if (label == "expert input quantise") return quantise("n1", ":q");
      if (label == "expert gradient quantise") return quantise("dy", ":q");
      if (ends_with(label, " input quantise")) {
        return quantise(linear(without(label, " input quantise")).in, ":q");
      }
      return quantise(linear(without(label, " gradient quantise")).d_out, ":q");
    case StreamingKind::dequantize: {
      std::string to = "o";
      const char* twin = plan_.precision.saved_attention == NumberFormat::e5m6 ? ":p" : ":q";
      if (label != "attention output dequantise") {
        to = activation_names(without(label, " activation input dequantise")).up;
        twin = ":k";
      }
      call(kernels::Dequantize{.from = t(to + twin), .to = t(to), .used_rows = used(to)});
      return;
    }
    case StreamingKind::pack_e5m6:
      return quantise("o", ":p");
    case StreamingKind::transpose:
      if (ends_with(label, " weight transpose")) {
        std::string name = without(label, " weight transpose");
        if (name == "mtp projection") name = "projection";
        const Matrix from = quantised_weight(name), to = transposed_weight(name);
        const std::int64_t groups = to.rows / from.columns;
        for (std::int64_t g = 0; g < groups; ++g) {
          call(kernels::Transpose{.from = rows_of(from, g * to.columns, to.columns),
                                  .to = rows_of(to, g * from.columns, from.columns)});
        }
        return;
      }
      if (ends_with(label, " input recast")) {
        return lower_recast(linear(without(label, " input recast")).in);
      }
      return lower_recast(linear(without(label, " gradient recast")).d_out);
    default:
      ORRERY_CHECK(false, "{} converts nothing", label);
  }
}

/// Whether the tensor's FP8 copy with scales along the rows still is what its BF16 values say: it
/// was kept, or made in this pass. Gradients are quantised before they are multiplied.
bool RankLowering::quantised_at_hand(std::string_view name) const {
  if (name.substr(0, 2) == "d_" || name.substr(0, 2) == "dy" || name.substr(0, 3) == "dx1" ||
      name == "rows_dy") {
    return true;
  }
  const Recompute& r = plan_.recompute;
  if (r.full && unit().kind == StageUnit::Kind::layer) return true;
  if (kept(std::string(name) + ":q", unit())) return true;
  if (name == "n1" || name == "n1f") return r.norms;
  if (name == "qn" || name == "kvn") return r.mla_up_projection;
  return false;
}

void RankLowering::lower_recast(const std::string& tensor) {
  const bool routed =
      tensor == "d_up_r" || tensor == "act_r" || tensor == "rows_x" || tensor == "rows_dy";
  const std::int32_t* used = routed ? kept_array<std::int32_t>("used rows", 1) : nullptr;
  if (!quantised_at_hand(tensor)) {
    call(kernels::Quantize{.from = t(tensor), .to = t(tensor + ":q"), .used_rows = used});
  }
  call(kernels::Transpose{.from = t(tensor + ":q"), .to = t(tensor + ":t"), .used_rows = used});
}

void RankLowering::lower_norm(const std::string& label, bool backward) {
  const Attention& a = model_.attention;
  if (label == "qk norm") {
    // Queries and keys have gains of their own.
    const kernels::AttentionShape s = attention_shape();
    const std::int64_t queries = s.heads * a.head_dim, keys = s.kv_heads * a.head_dim;
    for (const bool key : {false, true}) {
      const std::int64_t first = key ? queries : 0, count = key ? keys : queries;
      const char* gain = key ? "key_norm" : "query_norm";
      const std::int64_t segments = key ? s.kv_heads : s.heads;
      const Matrix x = columns_of(t("qkv"), first, count);
      if (backward) {
        const Matrix d = columns_of(t("d_qkv"), first, count);
        call(kernels::NormBackward{.d_y = d,
                                   .x = x,
                                   .gain = weight(gain),
                                   .d_x = d,
                                   .d_gain = static_cast<float*>(gradient(gain).data),
                                   .epsilon = epsilon(),
                                   .segments = segments});
      } else {
        call(kernels::NormForward{.terms = {x},
                                  .gain = weight(gain),
                                  .y = columns_of(t("qkn"), first, count),
                                  .epsilon = epsilon(),
                                  .segments = segments});
      }
    }
    return;
  }
  struct Names {
    const char* gain;
    const char* x;  ///< what the norm is of, kept
    const char* y;
    const char* d_y;
    const char* add;  ///< joins the gradient of x
    const char* d_x;
  };
  const auto names = [&]() -> Names {
    if (label == "attention norm") return {"attention_norm", "x0", "n0", "d_n0", "dx1", "dx0"};
    if (label == "ffn norm") return {"ffn_norm", "x1", "n1", "d_n1", nullptr, "d_x1n"};
    if (label == "q norm") return {"q_norm", "latentf.q", "qn", "d_qn", nullptr, "d_latentf.q"};
    if (label == "kv norm")
      return {"kv_norm", "latentf.kv", "kvn", "d_kvn", nullptr, "d_latentf.kv"};
    if (label == "final norm") return {"final_norm", "xf", "nf", "d_nf", nullptr, "d_xf"};
    if (label == "mtp norm hidden") return {"norm_hidden", "h", "nh", "d_nh", nullptr, "d_h"};
    ORRERY_CHECK(label == "mtp norm embedding", "no norm {}", label);
    return {"norm_embedding", "e", "ne", "d_ne", nullptr, "d_e"};
  }();
  const std::int64_t hidden = model_.hidden;
  // An MTP module takes the residual stream of the head before it.
  const auto x = [&] { return label == "mtp norm hidden" ? t("xf", place_.unit - 1) : t(names.x); };
  if (!backward) {
    kernels::NormForward norm{.gain = weight(names.gain), .y = t(names.y), .epsilon = epsilon()};
    // The first norm of a unit adds up what the unit before left; when it runs again, that is kept.
    const bool sums =
        place_.half == Half::forward && (label == "attention norm" || label == "final norm");
    if (sums) {
      const std::vector<Matrix> terms = input_terms(place_.unit);
      std::copy(terms.begin(), terms.end(), norm.terms.begin());
      norm.sum = t(names.x);
    } else {
      norm.terms[0] = x();
    }
    call(norm);
    return;
  }
  kernels::NormBackward norm{.x = x(),
                             .gain = weight(names.gain),
                             .d_x = t(names.d_x),
                             .d_gain = static_cast<float*>(gradient(names.gain).data),
                             .epsilon = epsilon()};
  if (label == "mtp norm hidden") {
    norm.d_y = columns_of(t("d_cat"), 0, hidden);
  } else if (label == "mtp norm embedding") {
    norm.d_y = columns_of(t("d_cat"), hidden, hidden);
  } else {
    norm.d_y = t(names.d_y);
  }
  if (names.add != nullptr) norm.add = t(names.add);
  // The residual stream under a head goes on into the MTP module behind it.
  const auto& units = units_[static_cast<std::size_t>(place_.stage)];
  if (label == "final norm" && place_.unit + 1 < units.size()) {
    norm.add = t("d_h", place_.unit + 1);
  }
  call(norm);
}

void RankLowering::lower_rope(bool gradient) {
  const Attention& a = model_.attention;
  const kernels::AttentionShape s = attention_shape();
  kernels::Rope rope{.positions = positions_, .theta = training_.rope_theta, .inverse = gradient};
  if (a.mla) {
    const Mla& m = *a.mla;
    rope.x = t(gradient ? "d_q" : "q");
    rope.heads = s.heads;
    rope.head_dim = s.d_qk;
    rope.offset = m.qk_nope_head_dim;
    rope.dim = m.qk_rope_head_dim;
    call(rope);
    if (gradient) return;  // the shared key's is rotated when it is summed over heads
    call(kernels::HeadCopy{.from = t("latentf.rope"), .to = t("kr"), .width = m.qk_rope_head_dim});
    rope.x = t("kr");
    rope.heads = 1;
    rope.head_dim = rope.dim;
    rope.offset = 0;
    call(rope);
    return;
  }
  const Matrix x = t(gradient ? "d_qkv" : a.qk_norm ? "qkn" : "qkv");
  rope.x = columns_of(x, 0, (s.heads + s.kv_heads) * a.head_dim);
  rope.heads = s.heads + s.kv_heads;
  rope.head_dim = rope.dim = a.head_dim;
  call(rope);
}

void RankLowering::lower_copy(const std::string& label) {
  if (label == "mtp concat") {
    call(kernels::Copy{.from = t("nh"), .to = columns_of(t("cat"), 0, model_.hidden)});
    call(kernels::Copy{.from = t("ne"), .to = columns_of(t("cat"), model_.hidden, model_.hidden)});
    return;
  }
  const Mla& m = *model_.attention.mla;
  const std::int64_t heads = attention_shape().heads;
  const std::int64_t nope = m.qk_nope_head_dim, rope = m.qk_rope_head_dim, value = m.v_head_dim;
  if (label == "key concat") {
    call(kernels::HeadCopy{.from = t("kvu"),
                           .to = t("k"),
                           .heads = heads,
                           .width = nope,
                           .from_stride = nope + value,
                           .to_stride = nope + rope});
    call(kernels::HeadCopy{.from = t("kr"),
                           .to = t("k"),
                           .heads = heads,
                           .width = rope,
                           .to_offset = nope,
                           .to_stride = nope + rope});
  } else if (label == "value copy") {
    call(kernels::HeadCopy{.from = t("kvu"),
                           .to = t("v"),
                           .heads = heads,
                           .width = value,
                           .from_offset = nope,
                           .from_stride = nope + value,
                           .to_stride = value});
  } else if (label == "key gradient split") {
    call(kernels::HeadCopy{.from = t("d_k"),
                           .to = t("d_kvu"),
                           .heads = heads,
                           .width = nope,
                           .from_stride = nope + rope,
                           .to_stride = nope + value});
  } else {
    ORRERY_CHECK(label == "value gradient copy", "no copy {}", label);
    call(kernels::HeadCopy{.from = t("d_v"),
                           .to = t("d_kvu"),
                           .heads = heads,
                           .width = value,
                           .from_stride = value,
                           .to_offset = nope,
                           .to_stride = nope + value});
  }
}

void RankLowering::lower_elementwise(const std::string& label) {
  if (label == "attention residual") return sum_up({t("x0"), t("ao")}, t("x1"));
  if (label == "latent gradient add") return sum_up({t("d_n0_q"), t("d_n0_kv")}, t("d_n0"));
  if (label == "ffn gradient add") return sum_up({t("dy"), t("d_x1n")}, t("dx1"));
  if (label == "expert gradient add") {
    std::vector<Matrix> terms = {t("d_n1_routed"), t("d_n1_gate")};
    if (model_.moe->shared_intermediate > 0) terms.push_back(t("d_n1_shared"));
    return sum_up(terms, t("d_n1"));
  }
  if (label == "router weight gradient") {
    call(kernels::RowDot{.a = t("act_r"),
                         .b = t("d_act_r"),
                         .row_weight = kept_array<float>("row weight", row_capacity()),
                         .out = scratch_array<float>("row weight gradient", row_capacity()),
                         .used_rows = kept_array<std::int32_t>("used rows", 1)});
    return;
  }
  ORRERY_CHECK(label == "rotary key gradient", "no elementwise kernel {}", label);
  const Mla& m = *model_.attention.mla;
  call(kernels::HeadCopy{.from = t("d_k"),
                         .to = t("d_latentf.rope"),
                         .heads = attention_shape().heads,
                         .width = m.qk_rope_head_dim,
                         .from_offset = m.qk_nope_head_dim,
                         .from_stride = m.qk_nope_head_dim + m.qk_rope_head_dim,
                         .sum_heads = true});
  call(kernels::Rope{.x = t("d_latentf.rope"),
                     .head_dim = m.qk_rope_head_dim,
                     .dim = m.qk_rope_head_dim,
                     .positions = positions_,
                     .theta = training_.rope_theta,
                     .inverse = true});
}

void RankLowering::sum_up(const std::vector<Matrix>& terms, const Matrix& out) {
  kernels::Add add{.out = out};
  ORRERY_CHECK(terms.size() <= add.terms.size(), "{} terms", terms.size());
  std::copy(terms.begin(), terms.end(), add.terms.begin());
  call(add);
}

void RankLowering::lower_activation(const std::string& name, bool backward) {
  const ActivationNames names = activation_names(name);
  const bool routed = name == "routed";
  const float* row_weight = routed ? kept_array<float>("row weight", row_capacity()) : nullptr;
  const std::int32_t* used = routed ? kept_array<std::int32_t>("used rows", 1) : nullptr;
  const std::string act = names.act;
  if (!backward) {
    call(kernels::ActivationForward{.in = t(names.up),
                                    .out = t(block_scaled() ? act + ":q" : act),
                                    .row_weight = row_weight,
                                    .used_rows = used});
    return;
  }
  kernels::ActivationBackward activation{.in = t(names.up),
                                         .d_out = t("d_" + act),
                                         .d_in = t("d_" + std::string(names.up)),
                                         .row_weight = row_weight,
                                         .used_rows = used};
  // Not kept, or kept in FP8 only, while the router's gradient wants it in full.
  const bool again = plan_.recompute.activation || (block_scaled() && routed);
  if (again) activation.out_again = t(act);
  call(activation);
}

// ---- experts ----

/// Tokens as the experts get them: through the exchange, or this rank's own.
Matrix RankLowering::expert_input(const char* received, const char* own) {
  const std::string twin = block_scaled() ? ":q" : "";
  return t((plan_.parallelism.ep > 1 ? received : own) + twin);
}

void RankLowering::lower_router(const std::string& label) {
  const Moe& moe = *model_.moe;
  const std::int64_t tokens = local_tokens_, top_k = moe.top_k;
  const std::int64_t received = received_capacity(), rows = row_capacity();
  const bool alone = plan_.parallelism.ep == 1;
  auto* scores = kept_array<float>("scores", tokens * moe.routed_experts);
  auto* experts = kept_array<std::int32_t>("experts", tokens * top_k);
  auto* weights = kept_array<float>("expert weights", tokens * top_k);
  auto* row_source = kept_array<std::int32_t>("row source", rows);
  auto* used = kept_array<std::int32_t>("used rows", 1);
  auto* slot_row = kept_array<std::int32_t>("slot row", received * top_k);
  const std::int32_t* received_tokens =
      alone ? nullptr : kept_array<std::int32_t>("received tokens", 1);
  if (label == "router") {
    const float* bias =
        moe.router_bias
            ? tensors_.array<float>(parameter_name("router_bias") + " in FP32", moe.routed_experts)
            : nullptr;
    call(kernels::Router{.logits = t("logits"),
                         .bias = bias,
                         .sigmoid = moe.sigmoid_scores,
                         .scale = static_cast<float>(training_.routed_scale),
                         .groups = moe.groups,
                         .group_limit = moe.group_limit,
                         .top_k = top_k,
                         .scores = scores,
                         .experts = experts,
                         .weights = weights});
  } else if (label == "router gradient") {
    call(kernels::RouterBackward{
        .sigmoid = moe.sigmoid_scores,
        .scale = static_cast<float>(training_.routed_scale),
        .top_k = top_k,
        .scores = scores,
        .experts = experts,
        .d_weights = scratch_array<float>("expert weight gradients", tokens * top_k),
        .d_logits = t("d_logits")});
  } else if (label == "routing map") {
    const std::int64_t local = moe.routed_experts / plan_.parallelism.ep;
    if (lowered_.overflow == nullptr) {
      lowered_.overflow = tensors_.array<std::int32_t>("rows without room", 1);
    }
    call(kernels::RoutingMap{
        .experts = alone ? experts : kept_array<std::int32_t>("received experts", received * top_k),
        .weights = alone ? weights : kept_array<float>("received weights", received * top_k),
        .tokens = received_tokens,
        .max_tokens = received,
        .top_k = top_k,
        .local_experts = local,
        .alignment = block_scaled() ? kernels::kTile : 1,
        .capacity = rows,
        .group_begin = kept_array<std::int32_t>("group begin", local + 1),
        .group_rows = kept_array<std::int32_t>("group rows", local),
        .used_rows = used,
        .row_source = row_source,
        .row_weight = kept_array<float>("row weight", rows),
        .slot_row = slot_row,
        .overflow = lowered_.overflow});
  } else if (label == "expert permute" || label == "expert gradient permute") {
    const bool gradient = label == "expert gradient permute";
    const std::string twin = block_scaled() ? ":q" : "";
    call(kernels::Permute{
        .from = gradient ? expert_input("recv_dy", "dy") : expert_input("recv_x", "n1"),
        .to = t((gradient ? "rows_dy" : "rows_x") + twin),
        .row_source = row_source,
        .used_rows = used});
  } else if (label == "expert reduce") {
    call(kernels::Unpermute{.from = t("down_r"),
                            .to = t(alone ? "y_routed" : "red"),
                            .slot_row = slot_row,
                            .tokens = received_tokens,
                            .top_k = top_k});
  } else {
    ORRERY_CHECK(label == "expert gradient reduce", "no kernel {}", label);
    call(kernels::Unpermute{
        .from = t("d_rows"),
        .to = t(alone ? "d_n1_routed" : "d_red"),
        .slot_row = slot_row,
        .tokens = received_tokens,
        .top_k = top_k,
        .row_values = scratch_array<float>("row weight gradient", rows),
        .slot_values = alone ? scratch_array<float>("expert weight gradients", tokens * top_k)
                             : scratch_array<float>("slot weight gradients", received * top_k)});
  }
}

// ---- edges ----

void RankLowering::lower_embedding(bool backward) {
  const bool mtp = unit().kind == StageUnit::Kind::mtp_front;
  const MicroBatchInput& input = lowered_.inputs[static_cast<std::size_t>(place_.micro_batch)];
  const auto module = static_cast<std::size_t>(std::max(0, unit().module));
  const std::int32_t* tokens = mtp ? input.mtp_tokens[module] : input.tokens;
  const std::int64_t first = at_.tp * (model_.vocabulary / plan_.parallelism.tp);
  if (backward) {
    call(kernels::EmbeddingBackward{.d_out = t(mtp ? "d_ef" : "dyf"),
                                    .d_table = gradient("embedding"),
                                    .tokens = tokens,
                                    .first_row = first});
  } else {
    call(kernels::Embedding{.table = weight("embedding"),
                            .out = t(mtp ? "ef" : "embf"),
                            .tokens = tokens,
                            .first_row = first});
  }
}

void RankLowering::lower_cross_entropy(const std::string& label) {
  const int module = unit().module;
  const MicroBatchInput& input = lowered_.inputs[static_cast<std::size_t>(place_.micro_batch)];
  const std::int32_t* targets =
      module < 0 ? input.targets : input.mtp_targets[static_cast<std::size_t>(module)];
  const std::int64_t tp = plan_.parallelism.tp;
  const std::int64_t first = at_.tp * (model_.vocabulary / tp);
  auto* partial = scratch_array<float>("loss part", 3 * tokens_);
  auto* lse = kept_array<float>("loss lse", tokens_);
  const auto add_up = [&](const float* partials) {
    call(kernels::CrossEntropyLoss{.partials = partials,
                                   .parts = tp,
                                   .rows = tokens_,
                                   .targets = targets,
                                   .lse = lse,
                                   .loss = module < 0 ? lowered_.loss : lowered_.mtp_loss});
  };
  if (label == "cross-entropy") {
    call(kernels::CrossEntropyPartial{
        .logits = t("logits_v"), .targets = targets, .first_column = first, .partial = partial});
    if (tp == 1) add_up(partial);
  } else if (label == "cross-entropy loss") {
    add_up(scratch_array<float>("loss parts", 3 * tokens_ * tp));
  } else {
    ORRERY_CHECK(label == "cross-entropy gradient", "no kernel {}", label);
    // The mean over all tokens of the global batch.
    const double all = static_cast<double>(plan_.global_batch_sequences) *
                       static_cast<double>(plan_.sequence_length);
    const double share =
        module < 0 ? 1 : training_.mtp_weight / static_cast<double>(model_.mtp_modules);
    call(kernels::CrossEntropyBackward{.logits = t("logits_v"),
                                       .targets = targets,
                                       .lse = lse,
                                       .first_column = first,
                                       .scale = static_cast<float>(share / all)});
  }
}

}  // namespace orrery
