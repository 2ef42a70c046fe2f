#include "calibrate/shape_calls.hpp"

#include "calibrate/formats.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace orrery {
namespace {

using kernels::Format;
using kernels::kTile;
using kernels::Matrix;
using kernels::Scaling;
using Content = Scratch::Content;

std::int64_t aligned(std::int64_t rows, std::int64_t alignment) {
  return (rows + alignment - 1) / alignment * alignment;
}

/// Scales of activations and gradients.
Scaling row_scaling(Format format) {
  return format == Format::e4m3 || format == Format::e5m6 ? Scaling::rows : Scaling::none;
}

Matrix columns_of(Matrix m, std::int64_t first, std::int64_t count) {
  m.data = static_cast<std::byte*>(m.data) + first * kernels::bits_of(m.format) / 8;
  m.columns = count;
  return m;
}

/// Rows of a matrix below each other: `groups` of them, one group's.
Matrix group_of(Matrix m, std::int64_t group, std::int64_t rows) {
  m.data =
      static_cast<std::byte*>(m.data) + group * rows * m.pitch * kernels::bits_of(m.format) / 8;
  m.rows = rows;
  if (m.scaling == Scaling::rows) m.scales += group * rows;
  if (m.scaling == Scaling::blocks) m.scales += group * rows / kTile * m.scale_pitch;
  return m;
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

std::string_view before(std::string_view text, std::string_view end) {
  return text.substr(0, text.size() - end.size());
}

/// Where `groups` experts' rows begin, and how many they have: all the same.
struct Groups {
  std::vector<std::int32_t> begin, rows;
  std::int64_t stored = 0;  ///< rows with their padding
};

Groups even_groups(std::int64_t groups, std::int64_t rows, std::int64_t alignment) {
  Groups g;
  for (std::int64_t i = 0; i < groups; ++i) {
    g.begin.push_back(static_cast<std::int32_t>(g.stored));
    g.rows.push_back(static_cast<std::int32_t>(rows));
    g.stored += aligned(rows, alignment);
  }
  g.begin.push_back(static_cast<std::int32_t>(g.stored));
  return g;
}

/// Tokens that arrived and which of this GPU's experts each chose: every expert as many rows,
/// spread evenly over the tokens, so that a token has rows / tokens experts on average and none
/// twice.
struct EvenRouting {
  Groups groups;
  std::vector<std::int32_t> experts;     ///< (tokens, top_k): local expert or -1
  std::vector<std::int32_t> row_source;  ///< token of each stored row, -1: padding
  std::vector<std::int32_t> slot_row;    ///< (tokens, top_k): row or -1
};

EvenRouting even_routing(std::int64_t tokens, std::int64_t top_k, std::int64_t experts,
                         std::int64_t rows_per_expert, std::int64_t alignment) {
  EvenRouting r;
  const std::int64_t rows = std::min(rows_per_expert, tokens);
  r.groups = even_groups(experts, rows, alignment);
  r.experts.assign(static_cast<std::size_t>(tokens * top_k), -1);
  r.slot_row = r.experts;
  r.row_source.assign(static_cast<std::size_t>(r.groups.stored), -1);
  std::vector<std::int64_t> used(static_cast<std::size_t>(tokens), 0);
  std::int64_t next = 0;  // the tokens of all experts, one after the other, go round
  for (std::int64_t e = 0; e < experts; ++e) {
    std::vector<std::int64_t> chosen;
    for (std::int64_t i = 0; i < rows; ++i) chosen.push_back((next + i) % tokens);
    next = (next + rows) % tokens;
    std::sort(chosen.begin(), chosen.end());
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t token = chosen[static_cast<std::size_t>(i)];
      const std::int64_t row = r.groups.begin[static_cast<std::size_t>(e)] + i;
      std::int64_t& slot = used[static_cast<std::size_t>(token)];
      if (slot == top_k) continue;
      r.row_source[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(token);
      r.experts[static_cast<std::size_t>(token * top_k + slot)] = static_cast<std::int32_t>(e);
      r.slot_row[static_cast<std::size_t>(token * top_k + slot)] = static_cast<std::int32_t>(row);
      ++slot;
    }
  }
  return r;
}

class OpWriter {
 public:
  OpWriter(const Shape& shape, const OpSetting& setting, Scratch& scratch)
      : label_(shape.label),
        model_(*setting.model),
        plan_(*setting.plan),
        scratch_(scratch),
        tp_(plan_.parallelism.tp),
        tokens_(plan_.micro_batch_tokens()),
        local_tokens_(plan_.parallelism.sequence_parallel ? tokens_ / tp_ : tokens_),
        activations_(format_of(plan_.precision.activations).value_or(Format::bf16)),
        width_(kernels::bits_of(activations_) / 8) {}

  std::optional<OpCalls> operator()(const orrery::Gemm& g) {
    const auto inputs = format_of(g.inputs);
    if (!inputs || *inputs == Format::e5m6) return std::nullopt;
    kernels::Gemm call;
    call.accumulate = g.accumulate;
    call.groups = g.groups;
    const bool weight = g.pass == Pass::backward_weight;
    std::int64_t rows = weight ? g.k : g.m;
    if (g.groups > 1) {
      const Groups groups = even_groups(g.groups, rows, *inputs == Format::e4m3 ? kTile : 1);
      call.grouping = weight ? kernels::Grouping::contraction : kernels::Grouping::rows;
      call.group_begin = scratch_.indices(groups.begin);
      call.group_rows = scratch_.indices(groups.rows);
      rows = groups.stored;
    }
    if (weight) {
      weight_gradient_operands(g, *inputs, rows, call);
    } else {
      linear_operands(g, *inputs, rows, call);
    }
    return one(call);
  }

  std::optional<OpCalls> operator()(const AttentionCore& a) {
    const auto format = format_of(a.inputs);
    if (!format || (*format != Format::fp32 && *format != Format::bf16)) return std::nullopt;
    kernels::AttentionShape s;
    s.batch = a.batch;
    s.heads = a.heads;
    s.kv_heads = a.kv_heads;
    s.q_len = a.q_len;
    s.kv_len = a.kv_len;
    s.d_qk = a.d_qk;
    s.d_v = a.d_v;
    s.causal = a.causal;
    s.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(a.d_qk)));
    Qkv in = queries_keys_values(a, *format, Content::activations);
    const Matrix out = scratch_.matrix(a.batch * a.q_len, a.heads * a.d_v, *format,
                                       a.backward ? Content::activations : Content::outputs);
    const std::int64_t rows = a.batch * a.heads * a.q_len;
    if (!a.backward) {
      return one(kernels::AttentionForward{.shape = s,
                                           .q = in.q,
                                           .k = in.k,
                                           .v = in.v,
                                           .out = out,
                                           .lse = scratch_.floats(rows, Content::outputs)});
    }
    Qkv gradients = queries_keys_values(a, *format, Content::outputs);
    return one(kernels::AttentionBackward{
        .shape = s,
        .q = in.q,
        .k = in.k,
        .v = in.v,
        .out = out,
        .d_out = scratch_.matrix(a.batch * a.q_len, a.heads * a.d_v, *format, Content::activations),
        .lse = scratch_.floats(rows, Content::activations),
        .d_q = gradients.q,
        .d_k = gradients.k,
        .d_v = gradients.v,
        .workspace = scratch_.bytes(kernels::attention_workspace_bytes(s))});
  }

  std::optional<OpCalls> operator()(const Streaming& s) {
    if (!format_of(plan_.precision.linear)) {
      // Kernels of these kinds read or write per-tensor FP8.
      for (const StreamingKind kind : {StreamingKind::quantize, StreamingKind::dequantize}) {
        if (s.kind == kind) return std::nullopt;
      }
    }
    switch (s.kind) {
      case StreamingKind::norm_forward:
        return norm_forward(s);
      case StreamingKind::norm_backward:
        return norm_backward(s);
      case StreamingKind::quantize:
      case StreamingKind::pack_e5m6:
        return quantize(s);
      case StreamingKind::dequantize:
        return dequantize(s);
      case StreamingKind::transpose:
        return transpose(s);
      case StreamingKind::rope:
        return rope();
      case StreamingKind::activation_forward:
        return activation_forward(s);
      case StreamingKind::activation_backward:
        return activation_backward(s);
      case StreamingKind::elementwise:
        return elementwise(s);
      case StreamingKind::copy:
        return copy();
      case StreamingKind::permute:
        return permute(s);
      case StreamingKind::unpermute:
        return unpermute(s);
      case StreamingKind::router:
        return router(s);
      case StreamingKind::embedding_forward:
        return embedding_forward();
      case StreamingKind::embedding_backward:
        return embedding_backward();
      case StreamingKind::cross_entropy:
        return cross_entropy();
      case StreamingKind::optimizer:
        return optimizer(s);
      case StreamingKind::reduction:
        return one(
            kernels::SquareSum{.values = scratch_.floats(s.bytes_read / 4, Content::activations),
                               .elements = s.bytes_read / 4,
                               .out = static_cast<double*>(scratch_.bytes(sizeof(double)))});
    }
    return std::nullopt;
  }

  template <class Other>
  std::optional<OpCalls> operator()(const Other&) {
    return std::nullopt;
  }

 private:
  template <class Call>
  static OpCalls one(Call call) {
    return {kernels::Call(std::move(call))};
  }

  Matrix activations(std::int64_t rows, std::int64_t columns,
                     Content content = Content::activations) {
    return scratch_.matrix(rows, columns, activations_, content);
  }
  Matrix result(std::int64_t rows, std::int64_t columns) {
    return activations(rows, columns, Content::outputs);
  }
  Matrix gain(std::int64_t columns) { return activations(1, columns); }

  // ---- linear layers ----

  /// `rows`: of all groups, with their padding.
  void linear_operands(const orrery::Gemm& g, Format inputs, std::int64_t rows,
                       kernels::Gemm& call) {
    const bool fp8 = inputs == Format::e4m3;
    call.a = scratch_.matrix(rows, g.k, inputs, Content::activations, row_scaling(inputs));
    // FP8 weights are transposed beforehand.
    call.b_transposed = g.pass == Pass::backward_input && !fp8;
    call.b = call.b_transposed ? scratch_.matrix(g.groups * g.k, g.n, inputs, Content::weights)
                               : scratch_.matrix(g.groups * g.n, g.k, inputs, Content::weights,
                                                 fp8 ? Scaling::blocks : Scaling::none);
    call.d = output(g, inputs, rows);
  }

  void weight_gradient_operands(const orrery::Gemm& g, Format inputs, std::int64_t rows,
                                kernels::Gemm& call) {
    if (inputs == Format::e4m3) {
      call.a = scratch_.matrix(g.m, rows, inputs, Content::activations, Scaling::rows);
      call.b = scratch_.matrix(g.n, rows, inputs, Content::activations, Scaling::rows);
    } else {
      call.a = scratch_.matrix(rows, g.m, inputs, Content::activations);
      call.b = scratch_.matrix(rows, g.n, inputs, Content::activations);
      call.a_transposed = call.b_transposed = true;
    }
    call.d = output(g, inputs, g.groups * g.m);
  }

  Matrix output(const orrery::Gemm& g, Format inputs, std::int64_t rows) {
    if (g.accumulate) return scratch_.matrix(rows, g.n, Format::fp32, Content::updated);
    return scratch_.matrix(rows, g.n, inputs == Format::fp32 ? Format::fp32 : Format::bf16,
                           Content::outputs);
  }

  /// Inputs and outputs of a linear layer on one rank, by its name.
  std::optional<std::pair<std::int64_t, std::int64_t>> linear(std::string_view name) const {
    const Attention& a = model_.attention;
    const std::int64_t hidden = model_.hidden;
    const std::int64_t heads = a.heads / tp_;
    const std::int64_t ffn = model_.intermediate / tp_;
    if (a.mla) {
      const Mla& m = *a.mla;
      const std::int64_t query_in = m.q_lora_rank > 0 ? m.q_lora_rank : hidden;
      if (name == "q_a") return std::pair{hidden, m.q_lora_rank};
      if (name == "kv_a") return std::pair{hidden, m.kv_lora_rank + m.qk_rope_head_dim};
      if (name == "q_b") return std::pair{query_in, heads * a.d_qk()};
      if (name == "kv_b") {
        return std::pair{m.kv_lora_rank, heads * (m.qk_nope_head_dim + m.v_head_dim)};
      }
    }
    if (name == "qkv") return std::pair{hidden, (heads + 2 * kv_heads()) * a.head_dim};
    if (name == "o") return std::pair{heads * a.d_v(), hidden};
    if (name == "ffn_up") return std::pair{hidden, up_columns(ffn)};
    if (name == "ffn_down") return std::pair{ffn, hidden};
    if (name == "mtp projection") return std::pair{2 * hidden, hidden};
    if (name == "expert") return std::pair{hidden, hidden};
    if (model_.moe) {
      const Moe& moe = *model_.moe;
      const std::int64_t shared = moe.shared_intermediate / tp_;
      const std::int64_t routed = moe.expert_intermediate / plan_.parallelism.expert_tp;
      if (name == "gate") return std::pair{hidden, moe.routed_experts};
      if (name == "shared_up") return std::pair{hidden, up_columns(shared)};
      if (name == "shared_down") return std::pair{shared, hidden};
      if (name == "routed_up") return std::pair{hidden, up_columns(routed)};
      if (name == "routed_down") return std::pair{routed, hidden};
    }
    return std::nullopt;
  }

  std::int64_t up_columns(std::int64_t intermediate) const {
    return (model_.activation == orrery::Activation::swiglu ? 2 : 1) * intermediate;
  }
  std::int64_t kv_heads() const {
    const Attention& a = model_.attention;
    return a.mla ? a.heads / tp_ : std::max<std::int64_t>(1, a.kv_heads / tp_);
  }

  // ---- attention ----

  struct Qkv {
    Matrix q, k, v;
  };

  /// Queries, keys and values: parts of one matrix as the qkv projection writes it, or their own.
  Qkv queries_keys_values(const AttentionCore& a, Format format, Content content) {
    const std::int64_t queries = a.heads * a.d_qk;
    const std::int64_t keys = a.kv_heads * a.d_qk;
    const std::int64_t values = a.kv_heads * a.d_v;
    if (!model_.attention.mla && a.q_len == a.kv_len) {
      const Matrix qkv =
          scratch_.matrix(a.batch * a.q_len, queries + keys + values, format, content);
      return {columns_of(qkv, 0, queries), columns_of(qkv, queries, keys),
              columns_of(qkv, queries + keys, values)};
    }
    return {scratch_.matrix(a.batch * a.q_len, queries, format, content),
            scratch_.matrix(a.batch * a.kv_len, keys, format, content),
            scratch_.matrix(a.batch * a.kv_len, values, format, content)};
  }

  OpCalls rope() {
    const Attention& a = model_.attention;
    const std::int64_t heads = a.heads / tp_;
    kernels::Rope rope{.positions = positions(), .inverse = label_ == "rope gradient"};
    if (a.mla) {
      const Mla& m = *a.mla;
      rope.x = activations(tokens_, heads * a.d_qk(), Content::updated);
      rope.heads = heads;
      rope.head_dim = a.d_qk();
      rope.offset = m.qk_nope_head_dim;
      rope.dim = m.qk_rope_head_dim;
      OpCalls calls{rope};
      if (rope.inverse) return calls;  // the shared key's is rotated when it is summed over heads
      const Matrix shared = activations(tokens_, m.qk_rope_head_dim, Content::updated);
      calls.push_back(kernels::HeadCopy{
          .from = columns_of(latents(), m.q_lora_rank + m.kv_lora_rank, m.qk_rope_head_dim),
          .to = shared,
          .width = m.qk_rope_head_dim});
      rope.x = shared;
      rope.heads = 1;
      rope.head_dim = rope.dim;
      rope.offset = 0;
      calls.push_back(rope);
      return calls;
    }
    // Values stand beside the rotated heads, unless those are the norm's output.
    rope.heads = heads + kv_heads();
    rope.head_dim = rope.dim = a.head_dim;
    const std::int64_t rotated = rope.heads * a.head_dim;
    const bool apart = a.qk_norm && !rope.inverse;
    rope.x = columns_of(
        activations(tokens_, apart ? rotated : rotated + kv_heads() * a.head_dim, Content::updated),
        0, rotated);
    return one(rope);
  }

  const std::int32_t* positions() {
    std::vector<std::int32_t> p;
    const std::int64_t length = plan_.sequence_length / plan_.parallelism.cp;
    for (std::int64_t t = 0; t < tokens_; ++t) p.push_back(static_cast<std::int32_t>(t % length));
    return scratch_.indices(p);
  }

  Matrix latents() {
    const Mla& m = *model_.attention.mla;
    return activations(tokens_, m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim);
  }

  std::optional<OpCalls> copy() {
    const std::int64_t hidden = model_.hidden;
    if (label_ == "mtp concat") {
      const Matrix cat = result(local_tokens_, 2 * hidden);
      return OpCalls{kernels::Copy{.from = activations(local_tokens_, hidden),
                                   .to = columns_of(cat, 0, hidden)},
                     kernels::Copy{.from = activations(local_tokens_, hidden),
                                   .to = columns_of(cat, hidden, hidden)}};
    }
    if (!model_.attention.mla) return std::nullopt;
    const Mla& m = *model_.attention.mla;
    const std::int64_t heads = model_.attention.heads / tp_;
    const std::int64_t nope = m.qk_nope_head_dim;
    const std::int64_t rope = m.qk_rope_head_dim;
    const std::int64_t value = m.v_head_dim;
    if (label_ == "key concat") {
      const Matrix keys = result(tokens_, heads * (nope + rope));
      return OpCalls{kernels::HeadCopy{.from = activations(tokens_, heads * (nope + value)),
                                       .to = keys,
                                       .heads = heads,
                                       .width = nope,
                                       .from_stride = nope + value,
                                       .to_stride = nope + rope},
                     kernels::HeadCopy{.from = activations(tokens_, rope),
                                       .to = keys,
                                       .heads = heads,
                                       .width = rope,
                                       .to_offset = nope,
                                       .to_stride = nope + rope}};
    }
    if (label_ == "value copy") {
      return one(kernels::HeadCopy{.from = activations(tokens_, heads * (nope + value)),
                                   .to = result(tokens_, heads * value),
                                   .heads = heads,
                                   .width = value,
                                   .from_offset = nope,
                                   .from_stride = nope + value,
                                   .to_stride = value});
    }
    if (label_ == "key gradient split") {
      return one(kernels::HeadCopy{.from = activations(tokens_, heads * (nope + rope)),
                                   .to = result(tokens_, heads * (nope + value)),
                                   .heads = heads,
                                   .width = nope,
                                   .from_stride = nope + rope,
                                   .to_stride = nope + value});
    }
    if (label_ == "value gradient copy") {
      return one(kernels::HeadCopy{.from = activations(tokens_, heads * value),
                                   .to = result(tokens_, heads * (nope + value)),
                                   .heads = heads,
                                   .width = value,
                                   .from_stride = value,
                                   .to_offset = nope,
                                   .to_stride = nope + value});
    }
    return std::nullopt;
  }

  std::optional<OpCalls> elementwise(const Streaming& s) {
    const std::int64_t hidden = model_.hidden;
    if (label_ == "router weight gradient") {
      if (!model_.moe) return std::nullopt;
      const std::int64_t columns = linear("routed_down")->first;
      const std::int64_t rows = s.bytes_read / (2 * width_ * columns);
      return one(kernels::RowDot{.a = activations(rows, columns),
                                 .b = activations(rows, columns),
                                 .row_weight = scratch_.floats(rows, Content::positive),
                                 .out = scratch_.floats(rows, Content::outputs),
                                 .used_rows = used_rows(rows)});
    }
    if (label_ == "rotary key gradient") {
      if (!model_.attention.mla) return std::nullopt;
      const Mla& m = *model_.attention.mla;
      const std::int64_t heads = model_.attention.heads / tp_;
      const std::int64_t nope = m.qk_nope_head_dim;
      const std::int64_t rope = m.qk_rope_head_dim;
      Matrix latent = latents();
      const Matrix to = columns_of(latent, m.q_lora_rank + m.kv_lora_rank, rope);
      return OpCalls{
          kernels::HeadCopy{.from = activations(tokens_, heads * (nope + rope)),
                            .to = to,
                            .heads = heads,
                            .width = rope,
                            .from_offset = nope,
                            .from_stride = nope + rope,
                            .sum_heads = true},
          kernels::Rope{
              .x = to, .head_dim = rope, .dim = rope, .positions = positions(), .inverse = true}};
    }
    // Everything else adds tensors like the residual stream.
    const std::int64_t rows = s.bytes_written / (width_ * hidden);
    kernels::Add add{.out = result(rows, hidden)};
    const bool shared =
        label_ == "expert gradient add" && model_.moe && model_.moe->shared_intermediate > 0;
    for (std::size_t i = 0; i < (shared ? 3 : 2); ++i) add.terms[i] = activations(rows, hidden);
    return one(add);
  }

  // ---- norms ----

  /// What a norm is of: `columns` of a wider matrix, or a matrix of its own.
  struct NormInput {
    std::int64_t columns = 0;
    std::int64_t first = 0;
    std::int64_t pitch = 0;
    std::int64_t rows = 0;
  };

  NormInput norm_input() const {
    const std::int64_t hidden = model_.hidden;
    if (model_.attention.mla && (label_ == "q norm" || label_ == "kv norm")) {
      const Mla& m = *model_.attention.mla;
      const std::int64_t pitch = m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim;
      if (label_ == "q norm") return {m.q_lora_rank, 0, pitch, tokens_};
      return {m.kv_lora_rank, m.q_lora_rank, pitch, tokens_};
    }
    return {hidden, 0, hidden, local_tokens_};
  }

  bool centred() const { return model_.norm == Norm::layer; }

  OpCalls norm_forward(const Streaming& s) {
    if (label_ == "qk norm") return qk_norm(false);
    const NormInput in = norm_input();
    const std::int64_t one_pass = width_ * in.rows * in.columns;
    kernels::NormForward norm{.gain = gain(in.columns), .centred = centred()};
    if (model_.norm_bias) norm.bias = gain(in.columns);
    const auto terms = static_cast<std::size_t>(
        std::clamp<std::int64_t>(s.bytes_read / std::max<std::int64_t>(one_pass, 1), 1, 4));
    for (std::size_t i = 0; i < terms; ++i) {
      norm.terms[i] = columns_of(activations(in.rows, in.pitch), in.first, in.columns);
    }
    if (terms > 1) norm.sum = result(in.rows, in.columns);
    norm.y = result(in.rows, in.columns);
    return one(norm);
  }

  OpCalls norm_backward(const Streaming& s) {
    if (label_ == "qk norm") return qk_norm(true);
    const NormInput in = norm_input();
    const std::int64_t one_pass = std::max<std::int64_t>(width_ * in.rows * in.columns, 1);
    // The gradient of an MTP module's norms is half of the concatenation's.
    const bool half = label_ == "mtp norm hidden" || label_ == "mtp norm embedding";
    kernels::NormBackward norm{
        .d_y = columns_of(activations(in.rows, half ? 2 * in.columns : in.columns), 0, in.columns),
        .x = columns_of(activations(in.rows, in.pitch), in.first, in.columns),
        .gain = gain(in.columns),
        .d_x = columns_of(result(in.rows, in.pitch), in.first, in.columns),
        .d_gain = scratch_.floats(in.columns, Content::updated),
        .centred = centred()};
    if (model_.norm_bias) norm.d_bias = scratch_.floats(in.columns, Content::updated);
    if (s.bytes_read / one_pass > 2) norm.add = activations(in.rows, in.columns);
    return one(norm);
  }

  /// Queries and keys have gains of their own; a head is a segment.
  OpCalls qk_norm(bool backward) {
    const Attention& a = model_.attention;
    const std::int64_t queries = a.heads / tp_ * a.head_dim;
    const std::int64_t keys = kv_heads() * a.head_dim;
    const Matrix qkv = activations(tokens_, queries + 2 * keys);
    const Matrix other = backward ? activations(tokens_, queries + 2 * keys, Content::updated)
                                  : result(tokens_, queries + keys);
    OpCalls calls;
    for (const bool key : {false, true}) {
      const std::int64_t first = key ? queries : 0;
      const std::int64_t count = key ? keys : queries;
      const std::int64_t segments = count / a.head_dim;
      const Matrix x = columns_of(qkv, first, count);
      const Matrix y = columns_of(other, first, count);
      if (backward) {
        calls.push_back(
            kernels::NormBackward{.d_y = y,
                                  .x = x,
                                  .gain = gain(a.head_dim),
                                  .d_x = y,
                                  .d_gain = scratch_.floats(a.head_dim, Content::updated),
                                  .segments = segments});
      } else {
        kernels::NormForward norm{.gain = gain(a.head_dim), .y = y, .segments = segments};
        norm.terms[0] = x;
        calls.push_back(norm);
      }
    }
    return calls;
  }

  // ---- number formats ----

  /// Columns of what is quantised, kept or recast; none: an unknown label.
  std::optional<std::int64_t> quantised_columns() const {
    if (ends_with(label_, " activation input keep") ||
        ends_with(label_, " activation input dequantise")) {
      const std::string_view name = label_.substr(0, label_.find(' '));
      const auto l = linear(std::string(name) + "_up");
      return l ? std::optional(l->second) : std::nullopt;
    }
    if (ends_with(label_, " pack") || label_ == "attention output dequantise") {
      return linear("o")->first;
    }
    for (const auto& [end, input] :
         {std::pair{" input quantise", true}, std::pair{" gradient quantise", false},
          std::pair{" input recast", true}, std::pair{" gradient recast", false}}) {
      if (!ends_with(label_, end)) continue;
      const auto l = linear(before(label_, end));
      return l ? std::optional(input ? l->first : l->second) : std::nullopt;
    }
    return std::nullopt;
  }

  /// Rows that routing decides are counted on the device.
  const std::int32_t* used_if_routed(std::int64_t rows) {
    return label_.substr(0, 7) == "routed_" || label_.substr(0, 7) == "routed " ? used_rows(rows)
                                                                                : nullptr;
  }

  const std::int32_t* used_rows(std::int64_t rows) {
    return scratch_.indices({static_cast<std::int32_t>(rows)});
  }

  NumberFormat kept_format() const {
    if (ends_with(label_, " pack") || label_ == "attention output dequantise") {
      return NumberFormat::e5m6;
    }
    const bool activation_input = ends_with(label_, " activation input keep") ||
                                  ends_with(label_, " activation input dequantise");
    return activation_input ? plan_.precision.saved : plan_.precision.linear;
  }

  std::optional<OpCalls> quantize(const Streaming& s) {
    const auto columns = quantised_columns();
    const auto to = format_of(kept_format());
    if (!columns || !to || row_scaling(*to) == Scaling::none) return std::nullopt;
    const std::int64_t rows = s.bytes_read / (width_ * *columns);
    return one(kernels::Quantize{
        .from = activations(rows, *columns),
        .to = scratch_.matrix(rows, *columns, *to, Content::outputs, Scaling::rows),
        .used_rows = used_if_routed(rows)});
  }

  std::optional<OpCalls> dequantize(const Streaming& s) {
    const auto columns = quantised_columns();
    const auto from = format_of(kept_format());
    if (!columns || !from || row_scaling(*from) == Scaling::none) return std::nullopt;
    const std::int64_t rows = s.bytes_written / (width_ * *columns);
    return one(kernels::Dequantize{
        .from = scratch_.matrix(rows, *columns, *from, Content::activations, Scaling::rows),
        .to = result(rows, *columns),
        .used_rows = used_if_routed(rows)});
  }

  std::optional<OpCalls> transpose(const Streaming& s) {
    if (ends_with(label_, " weight transpose")) {
      const auto l = linear(before(label_, " weight transpose"));
      if (!l) return std::nullopt;
      const auto [in, out] = *l;
      const std::int64_t groups = s.bytes_read / (in * out);
      const Matrix from =
          scratch_.matrix(groups * out, in, Format::e4m3, Content::weights, Scaling::blocks);
      const Matrix to =
          scratch_.matrix(groups * in, out, Format::e4m3, Content::outputs, Scaling::blocks);
      OpCalls calls;
      for (std::int64_t g = 0; g < groups; ++g) {
        calls.push_back(
            kernels::Transpose{.from = group_of(from, g, out), .to = group_of(to, g, in)});
      }
      return calls;
    }
    const auto columns = quantised_columns();
    if (!columns) return std::nullopt;
    const double row_bytes =
        static_cast<double>(*columns) * bytes_per_element(NumberFormat::fp8_block);
    const std::int64_t rows = std::llround(static_cast<double>(s.bytes_read) / row_bytes);
    OpCalls calls;
    const std::int32_t* used = used_if_routed(rows);
    if (!quantised_at_hand()) {
      calls.push_back(kernels::Quantize{
          .from = activations(rows, *columns),
          .to = scratch_.matrix(rows, *columns, Format::e4m3, Content::outputs, Scaling::rows),
          .used_rows = used});
    }
    calls.push_back(kernels::Transpose{
        .from = scratch_.matrix(rows, *columns, Format::e4m3, Content::activations, Scaling::rows),
        .to = scratch_.matrix(*columns, rows, Format::e4m3, Content::outputs, Scaling::rows),
        .used_rows = used});
    return calls;
  }

  /// Whether what is recast is there in FP8 with scales along the rows: gradients always are,
  /// inputs where they were kept so, or quantised anew in this pass for a GEMM.
  bool quantised_at_hand() const {
    const Recompute& r = plan_.recompute;
    if (!ends_with(label_, " input recast") || r.full) return true;
    const std::string_view name = before(label_, " input recast");
    const bool latent_queries = model_.attention.mla && model_.attention.mla->q_lora_rank > 0;
    if ((name == "q_b" && latent_queries) || name == "kv_b") {
      return !r.norms || r.mla_up_projection;
    }
    if (name == "q_a" || name == "q_b" || name == "kv_a" || name == "qkv") return !r.norms;
    if (name == "o") return plan_.precision.saved_attention != NumberFormat::e5m6;
    if (ends_with(name, "_down")) return !r.activation;
    return true;
  }

  // ---- feed-forward ----

  std::optional<std::pair<std::int64_t, std::int64_t>> activation_columns() const {
    const auto l = linear(std::string(before(label_, " activation")) + "_down");
    if (!l) return std::nullopt;
    return std::pair{up_columns(l->first), l->first};
  }

  kernels::Activation activation() const {
    return model_.activation == orrery::Activation::swiglu ? kernels::Activation::swiglu
                                                           : kernels::Activation::gelu;
  }

  bool block_scaled() const { return plan_.precision.linear == NumberFormat::fp8_block; }
  bool routed() const { return label_.substr(0, 6) == "routed"; }

  std::optional<OpCalls> activation_forward(const Streaming& s) {
    const auto columns = activation_columns();
    if (!columns) return std::nullopt;
    const std::int64_t rows = s.bytes_read / (width_ * columns->first);
    return one(kernels::ActivationForward{
        .kind = activation(),
        .in = activations(rows, columns->first),
        .out = block_scaled() ? scratch_.matrix(rows, columns->second, Format::e4m3,
                                                Content::outputs, Scaling::rows)
                              : result(rows, columns->second),
        .row_weight = routed() ? scratch_.floats(rows, Content::positive) : nullptr,
        .used_rows = used_if_routed(rows)});
  }

  std::optional<OpCalls> activation_backward(const Streaming& s) {
    const auto columns = activation_columns();
    if (!columns) return std::nullopt;
    const std::int64_t rows = s.bytes_read / (width_ * (columns->first + columns->second));
    kernels::ActivationBackward call{
        .kind = activation(),
        .in = activations(rows, columns->first),
        .d_out = activations(rows, columns->second),
        .d_in = result(rows, columns->first),
        .row_weight = routed() ? scratch_.floats(rows, Content::positive) : nullptr,
        .used_rows = used_if_routed(rows)};
    // Not kept, or kept in FP8 only, while the router's gradient wants it in full.
    if (plan_.recompute.activation || (block_scaled() && routed())) {
      call.out_again = result(rows, columns->second);
    }
    return one(call);
  }

  // ---- experts ----

  std::int64_t local_experts() const { return model_.moe->routed_experts / plan_.parallelism.ep; }
  std::int64_t alignment() const { return block_scaled() ? kTile : 1; }

  /// Tokens as the experts get them.
  Matrix tokens(std::int64_t rows, Content content) {
    return block_scaled()
               ? scratch_.matrix(rows, model_.hidden, Format::e4m3, content, Scaling::rows)
               : activations(rows, model_.hidden, content);
  }

  std::optional<OpCalls> permute(const Streaming& s) {
    if (!model_.moe || !format_of(plan_.precision.dispatch)) return std::nullopt;
    const double row =
        static_cast<double>(model_.hidden) * bytes_per_element(plan_.precision.dispatch);
    const std::int64_t received = std::llround(static_cast<double>(s.bytes_read) / row);
    const std::int64_t rows = std::llround(static_cast<double>(s.bytes_written) / row);
    const EvenRouting r = even_routing(received, model_.moe->top_k, local_experts(),
                                       rows / local_experts(), alignment());
    return one(kernels::Permute{.from = tokens(received, Content::activations),
                                .to = tokens(r.groups.stored, Content::outputs),
                                .row_source = scratch_.indices(r.row_source),
                                .used_rows = used_rows(r.groups.stored)});
  }

  std::optional<OpCalls> unpermute(const Streaming& s) {
    if (!model_.moe) return std::nullopt;
    const std::int64_t hidden = model_.hidden;
    const std::int64_t top_k = model_.moe->top_k;
    const std::int64_t received = s.bytes_written / (width_ * hidden);
    const std::int64_t rows = s.bytes_read / (width_ * hidden);
    const EvenRouting r =
        even_routing(received, top_k, local_experts(), rows / local_experts(), alignment());
    kernels::Unpermute call{.from = activations(r.groups.stored, hidden),
                            .to = result(received, hidden),
                            .slot_row = scratch_.indices(r.slot_row),
                            .top_k = top_k};
    if (label_ == "expert gradient reduce") {
      call.row_values = scratch_.floats(r.groups.stored, Content::positive);
      call.slot_values = scratch_.floats(received * top_k, Content::outputs);
    }
    return one(call);
  }

  std::optional<OpCalls> router(const Streaming& s) {
    if (!model_.moe) return std::nullopt;
    const Moe& moe = *model_.moe;
    const std::int64_t t = local_tokens_;
    if (label_ == "routing map") {
      const std::int64_t received = s.bytes_read / (4 * moe.top_k);
      const Parallelism& p = plan_.parallelism;
      const double rows = static_cast<double>(t * p.expert_tp * moe.top_k * p.ep) /
                          static_cast<double>(moe.routed_experts);
      const EvenRouting r =
          even_routing(received, moe.top_k, local_experts(), std::llround(rows), alignment());
      const auto ints = [&](std::int64_t count) {
        return static_cast<std::int32_t*>(scratch_.bytes(4 * count));
      };
      const std::int64_t capacity = r.groups.stored;
      return one(
          kernels::RoutingMap{.experts = scratch_.indices(r.experts),
                              .weights = scratch_.floats(received * moe.top_k, Content::positive),
                              .max_tokens = received,
                              .top_k = moe.top_k,
                              .local_experts = local_experts(),
                              .alignment = alignment(),
                              .capacity = capacity,
                              .group_begin = ints(local_experts() + 1),
                              .group_rows = ints(local_experts()),
                              .used_rows = ints(1),
                              .row_source = ints(capacity),
                              .row_weight = scratch_.floats(capacity, Content::outputs),
                              .slot_row = ints(received * moe.top_k),
                              .overflow = ints(1)});
    }
    if (label_ == "router") {
      return one(kernels::Router{
          .logits = activations(t, moe.routed_experts),
          .bias =
              moe.router_bias ? scratch_.floats(moe.routed_experts, Content::positive) : nullptr,
          .sigmoid = moe.sigmoid_scores,
          .groups = moe.groups,
          .group_limit = moe.group_limit,
          .top_k = moe.top_k,
          .scores = scratch_.floats(t * moe.routed_experts, Content::outputs),
          .experts = static_cast<std::int32_t*>(scratch_.bytes(4 * t * moe.top_k)),
          .weights = scratch_.floats(t * moe.top_k, Content::outputs)});
    }
    if (label_ != "router gradient") return std::nullopt;
    std::vector<std::int32_t> experts;
    for (std::int64_t i = 0; i < t * moe.top_k; ++i) {
      experts.push_back(static_cast<std::int32_t>(i % moe.routed_experts));
    }
    return one(kernels::RouterBackward{
        .sigmoid = moe.sigmoid_scores,
        .top_k = moe.top_k,
        .scores = scratch_.floats(t * moe.routed_experts, Content::positive),
        .experts = scratch_.indices(experts),
        .d_weights = scratch_.floats(t * moe.top_k, Content::activations),
        .d_logits = result(t, moe.routed_experts)});
  }

  // ---- edges ----

  /// Rows of the embedding that fit into what is used in turns: which ones a token asks for is
  /// chance, so more of them cost no more.
  std::int64_t table_rows(std::int64_t element_bytes) const {
    const std::int64_t rows = model_.vocabulary / tp_;
    const std::int64_t room = scratch_.rotation_bytes() / (element_bytes * model_.hidden);
    return std::clamp<std::int64_t>(room, 1, rows);
  }

  /// Token ids over the tables of all ranks, each as often as the other, in an order that is no
  /// order (a multiplicative step through them).
  const std::int32_t* token_ids(std::int64_t rows_of_one_part) {
    const std::int64_t ids = rows_of_one_part * tp_;
    std::vector<std::int32_t> tokens;
    std::uint64_t state = 1;
    for (std::int64_t t = 0; t < tokens_; ++t) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      tokens.push_back(static_cast<std::int32_t>((state >> 33) % static_cast<std::uint64_t>(ids)));
    }
    return scratch_.indices(tokens);
  }

  OpCalls embedding_forward() {
    const std::int64_t rows = table_rows(width_);
    return one(kernels::Embedding{
        .table = scratch_.matrix(rows, model_.hidden, activations_, Content::weights),
        .out = result(tokens_, model_.hidden),
        .tokens = token_ids(rows)});
  }

  OpCalls embedding_backward() {
    const std::int64_t rows = table_rows(4);
    return one(kernels::EmbeddingBackward{
        .d_out = activations(tokens_, model_.hidden),
        .d_table = scratch_.matrix(rows, model_.hidden, Format::fp32, Content::updated),
        .tokens = token_ids(rows)});
  }

  std::optional<OpCalls> cross_entropy() {
    const std::int64_t columns = model_.vocabulary / tp_;
    const std::int32_t* targets = token_ids(columns);
    const auto loss = [&](const float* partials) {
      return kernels::CrossEntropyLoss{
          .partials = partials,
          .parts = tp_,
          .rows = tokens_,
          .targets = targets,
          .lse = scratch_.floats(tokens_, Content::outputs),
          .loss = static_cast<double*>(scratch_.bytes(sizeof(double)))};
    };
    if (label_ == "cross-entropy") {
      float* partial = scratch_.floats(3 * tokens_, Content::outputs);
      OpCalls calls = one(kernels::CrossEntropyPartial{
          .logits = activations(tokens_, columns), .targets = targets, .partial = partial});
      if (tp_ == 1) calls.push_back(loss(partial));
      return calls;
    }
    if (label_ == "cross-entropy loss") {
      return one(loss(scratch_.floats(3 * tokens_ * tp_, Content::positive)));
    }
    if (label_ != "cross-entropy gradient") return std::nullopt;
    return one(
        kernels::CrossEntropyBackward{.logits = activations(tokens_, columns, Content::updated),
                                      .targets = targets,
                                      .lse = scratch_.floats(tokens_, Content::activations)});
  }

  // ---- optimizer ----

  OpCalls optimizer(const Streaming& s) {
    const Precision& p = plan_.precision;
    const std::int64_t state = p.master_bytes + p.moment_bytes;
    const std::int64_t elements = s.bytes_read / (p.gradient_bytes + state);
    const std::int64_t cleared = s.bytes_written - elements * (state + p.parameter_bytes);
    const Format moments = p.moment_bytes == 8 ? Format::fp32 : Format::bf16;
    const kernels::AdamScalars scalars{
        .learning_rate = 1e-3F, .beta1_power = 0.9F, .beta2_power = 0.95F, .max_norm = 1};
    const double square_sum = 1;
    const auto vector = [&](Format format, Content content) {
      return scratch_.matrix(1, elements, format, content).data;
    };
    kernels::AdamW adam{
        .elements = elements,
        .gradient = scratch_.floats(elements, Content::activations),
        .master = scratch_.floats(elements, Content::updated),
        .first_moment = vector(moments, Content::updated),
        .second_moment = vector(moments, Content::positive),
        .moments = moments,
        .scalars =
            static_cast<const kernels::AdamScalars*>(scratch_.constant(&scalars, sizeof scalars)),
        .square_sum =
            static_cast<const double*>(scratch_.constant(&square_sum, sizeof square_sum))};
    if (p.master_bytes > 0) {
      adam.parameters = p.parameter_bytes == 4 ? Format::fp32 : Format::bf16;
      adam.parameter = vector(adam.parameters, Content::outputs);
    }
    OpCalls calls = one(adam);
    if (cleared > 0) {
      calls.push_back(kernels::Fill{.data = scratch_.bytes(cleared), .bytes = cleared});
    }
    return calls;
  }

  std::string_view label_;
  const Model& model_;
  const Plan& plan_;
  Scratch& scratch_;
  std::int64_t tp_;
  std::int64_t tokens_;
  std::int64_t local_tokens_;
  Format activations_;
  std::int64_t width_;
};

}  // namespace

std::optional<OpCalls> calls_of(const Shape& shape, const OpSetting& setting, Scratch& scratch) {
  return std::visit(OpWriter(shape, setting, scratch), shape.work);
}

}  // namespace orrery
