#include "models/layer_work.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "sim/check.hpp"
#include "sim/exchange.hpp"

namespace orrery {
namespace {

constexpr std::int64_t kFp32 = 4;

std::int64_t bytes_of_elements(std::int64_t elements, NumberFormat format) {
  return std::llround(static_cast<double>(elements) * bytes_per_element(format));
}

/// The dimensions of one micro-batch on one rank, and the verbs that append kernels to a chain.
///
/// Tensor parallelism splits heads and intermediate sizes; with sequence parallelism norms,
/// residuals and the router work on 1/tp of the tokens between an all-gather and a reduce-scatter
/// (Korthikanti et al., arXiv 2205.05198).
class Chain {
 public:
  Chain(const Model& model, const Plan& plan)
      : model_(model),
        plan_(plan),
        tp_(plan.parallelism.tp),
        tokens_(plan.micro_batch_tokens()),
        local_tokens_(plan.parallelism.sequence_parallel ? tokens_ / tp_ : tokens_),
        width_(bytes_of_elements(1, plan.precision.activations)) {}

  Work take() { return std::exchange(work_, {}); }

  const Model& model() const { return model_; }
  const Plan& plan() const { return plan_; }
  const Precision& precision() const { return plan_.precision; }
  std::int64_t tp() const { return tp_; }
  std::int64_t tokens() const { return tokens_; }              ///< in tensor-parallel regions
  std::int64_t local_tokens() const { return local_tokens_; }  ///< in sequence-parallel regions
  std::int64_t width() const { return width_; }                ///< bytes of an activation
  bool block_scaled() const { return precision().linear == NumberFormat::fp8_block; }
  bool fp8() const { return precision().linear != precision().activations; }

  void add(std::string label, decltype(Shape::work) work) {
    work_.push_back({.shape = {.work = work, .label = std::move(label)}, .sized_by = sized_by_});
  }

  /// What the kernels that follow are sized by.
  void size_by(SizedBy what) { sized_by_ = what; }

  void stream(StreamingKind kind, std::string label, std::int64_t read, std::int64_t written,
              std::int64_t launches = 1) {
    add(std::move(label),
        Streaming{
            .kind = kind, .bytes_read = read, .bytes_written = written, .launches = launches});
  }

  // ---- linear layers, y (rows, out) = x (rows, in) W (in, out); `groups` of them for experts ----

  struct Linear {
    std::string label;
    std::int64_t rows = 0;  ///< of one group
    std::int64_t in = 0;
    std::int64_t out = 0;
    std::int64_t groups = 1;
    NumberFormat format{};
  };

  Linear linear(std::string label, std::int64_t rows, std::int64_t in, std::int64_t out,
                std::int64_t groups = 1) const {
    return {std::move(label), rows, in, out, groups, precision().linear};
  }

  void forward(const Linear& l) {
    add(l.label, Gemm{.inputs = l.format,
                      .pass = Pass::forward,
                      .groups = l.groups,
                      .m = l.rows,
                      .n = l.out,
                      .k = l.in});
  }

  /// With block scales both operands must be contiguous along the contracted dimension, so the
  /// input gradient needs the weight transposed; it is not kept, but transposed anew for each
  /// micro-batch.
  void transpose_weight(const Linear& l) {
    if (l.format != NumberFormat::fp8_block) return;
    const std::int64_t elements = l.groups * l.in * l.out;
    stream(StreamingKind::transpose, l.label + " weight transpose", elements, elements);
  }

  void backward_input(const Linear& l, bool transpose = true) {
    if (transpose) transpose_weight(l);
    add(l.label, Gemm{.inputs = l.format,
                      .pass = Pass::backward_input,
                      .groups = l.groups,
                      .m = l.rows,
                      .n = l.in,
                      .k = l.out});
  }

  void backward_weight(const Linear& l) {
    add(l.label, Gemm{.inputs = l.format,
                      .pass = Pass::backward_weight,
                      .accumulate = true,
                      .groups = l.groups,
                      .m = l.out,
                      .n = l.in,
                      .k = l.rows});
  }

  // ---- number formats ----

  /// (rows, columns) -> what a GEMM reads. Block scales: a scale per 1x128, whose layout is
  /// then transposed by a small kernel. Per tensor: the transposed copy is written along.
  void quantize(const std::string& label, std::int64_t rows, std::int64_t columns) {
    const std::int64_t elements = rows * columns;
    if (precision().linear == NumberFormat::fp8_block) {
      stream(StreamingKind::quantize, label + " quantise", width_ * elements,
             bytes_of_elements(elements, NumberFormat::fp8_block), 2);
    } else if (precision().linear == NumberFormat::fp8_tensor) {
      stream(StreamingKind::quantize, label + " quantise", width_ * elements, 2 * elements);
    }
  }

  /// FP8 with scales along the rows -> FP8 transposed, with scales along the columns: an operand of
  /// a weight gradient, whose contraction runs over the tokens (V3 report 3.3.2 and 3.5.2).
  void recast(const std::string& label, std::int64_t rows, std::int64_t columns) {
    if (!block_scaled()) return;
    const std::int64_t bytes = bytes_of_elements(rows * columns, NumberFormat::fp8_block);
    stream(StreamingKind::transpose, label + " recast", bytes, bytes);
  }

  void dequantize(const std::string& label, std::int64_t rows, std::int64_t columns,
                  NumberFormat from) {
    if (from == precision().activations) return;
    const std::int64_t elements = rows * columns;
    stream(StreamingKind::dequantize, label + " dequantise", bytes_of_elements(elements, from),
           width_ * elements);
  }

  // ---- norms, residuals ----

  void norm_forward(const std::string& label, std::int64_t rows, std::int64_t columns) {
    stream(StreamingKind::norm_forward, label, width_ * rows * columns, width_ * rows * columns);
  }

  /// Reads the output gradient and the input, writes the input gradient; a second small kernel sums
  /// the gradient of the gain over blocks.
  void norm_backward(const std::string& label, std::int64_t rows, std::int64_t columns) {
    stream(StreamingKind::norm_backward, label, 2 * width_ * rows * columns,
           width_ * rows * columns, 2);
  }

  /// a + b.
  void residual(const std::string& label) {
    const std::int64_t elements = local_tokens_ * model_.hidden;
    stream(StreamingKind::elementwise, label, 2 * width_ * elements, width_ * elements);
  }

  // ---- tensor and context parallelism ----

  void collective(CollectiveKind kind, const std::string& label, std::int64_t bytes,
                  const Layout& layout, GroupKind group) {
    const std::int64_t ranks = layout.group_size(group);
    if (ranks == 1) return;
    work_.push_back({.shape = {.work = Collective{.kind = kind,
                                                  .bytes = bytes,
                                                  .ranks = ranks,
                                                  .ranks_per_node = layout.members_per_node(group),
                                                  .stride = layout.stride(group)},
                               .label = label},
                     .stream = StreamKind::tensor,
                     .group = group});
  }

  /// Tokens come in whole to every tensor-parallel rank.
  void gather_tokens(const std::string& label, std::int64_t columns, const Layout& layout) {
    if (!plan_.parallelism.sequence_parallel) return;
    collective(CollectiveKind::all_gather, label, width_ * tokens_ * columns, layout,
               GroupKind::tensor);
  }

  /// Partial sums of all tensor-parallel ranks are added up.
  void reduce_tokens(const std::string& label, std::int64_t columns, const Layout& layout) {
    const auto kind = plan_.parallelism.sequence_parallel ? CollectiveKind::reduce_scatter
                                                          : CollectiveKind::all_reduce;
    collective(kind, label, width_ * tokens_ * columns, layout, GroupKind::tensor);
  }

 private:
  const Model& model_;
  const Plan& plan_;
  std::int64_t tp_;
  std::int64_t tokens_;
  std::int64_t local_tokens_;
  std::int64_t width_;
  SizedBy sized_by_ = SizedBy::plan;
  Work work_;
};

// ---------------------------------------------------------------------------------------------------
// Attention

/// The core on one rank. With context parallelism each rank holds 1/cp of every sequence, in two
/// pieces from both ends so that causal work is balanced: the mean number of keys a query sees is
/// (S + 1) / 2, which a causal core of q_len = S / cp queries has over (S + q_len) / 2 keys.
AttentionCore attention_core(const Chain& c, bool backward) {
  const Attention& a = c.model().attention;
  const Parallelism& p = c.plan().parallelism;
  const std::int64_t q_len = c.plan().sequence_length / p.cp;
  return {.inputs = c.precision().activations,
          .backward = backward,
          .causal = true,
          .batch = c.plan().micro_batch_sequences,
          .heads = a.heads / p.tp,
          .kv_heads = a.mla ? a.heads / p.tp : std::max<std::int64_t>(1, a.kv_heads / p.tp),
          .q_len = q_len,
          .kv_len = p.cp == 1 ? q_len : (c.plan().sequence_length + q_len) / 2,
          .d_qk = a.d_qk(),
          .d_v = a.d_v()};
}

/// Keys and values of the whole sequence gathered over the context-parallel ranks (forward), their
/// gradients reduced (backward).
void exchange_keys(Chain& c, const Layout& layout, CollectiveKind kind, const std::string& label) {
  const Attention& a = c.model().attention;
  const Parallelism& p = c.plan().parallelism;
  const std::int64_t kv_heads =
      a.mla ? a.heads / p.tp : std::max<std::int64_t>(1, a.kv_heads / p.tp);
  const std::int64_t bytes = c.width() * c.tokens() * p.cp * kv_heads * (a.d_qk() + a.d_v());
  c.collective(kind, label, bytes, layout, GroupKind::context);
}

/// Tensor sizes in elements, for one rank.
struct AttentionSizes {
  std::int64_t query = 0;  ///< tokens x heads x d_qk
  std::int64_t key = 0;
  std::int64_t value = 0;
  std::int64_t output = 0;  ///< tokens x heads x d_v
  std::int64_t heads = 0;   ///< query heads on this rank
};

AttentionSizes attention_sizes(const Chain& c) {
  const Attention& a = c.model().attention;
  AttentionSizes s;
  s.heads = a.heads / c.tp();
  const std::int64_t kv_heads = a.mla ? s.heads : std::max<std::int64_t>(1, a.kv_heads / c.tp());
  s.query = c.tokens() * s.heads * a.d_qk();
  s.key = c.tokens() * kv_heads * a.d_qk();
  s.value = c.tokens() * kv_heads * a.d_v();
  s.output = c.tokens() * s.heads * a.d_v();
  return s;
}

/// Everything between the block's normed input and the queries, keys and values of the core. The
/// two halves of multi-head latent attention: down to the latents, and up from them. The up half is
/// what `mla_up_projection` recomputes.
class Projections {
 public:
  explicit Projections(Chain& c, const Layout& layout)
      : c_(c), layout_(layout), sizes_(attention_sizes(c)) {
    const Attention& a = c.model().attention;
    const std::int64_t hidden = c.model().hidden;
    if (a.mla) {
      const Mla& m = *a.mla;
      const std::int64_t rows = c.local_tokens();  // down-projections are not split over tp
      const std::int64_t query_in = m.q_lora_rank > 0 ? m.q_lora_rank : hidden;
      q_a_ = c.linear("q_a", rows, hidden, m.q_lora_rank);
      kv_a_ = c.linear("kv_a", rows, hidden, m.kv_lora_rank + m.qk_rope_head_dim);
      q_b_ = c.linear("q_b", c.tokens(), query_in, sizes_.heads * a.d_qk());
      kv_b_ = c.linear("kv_b", c.tokens(), m.kv_lora_rank,
                       sizes_.heads * (m.qk_nope_head_dim + m.v_head_dim));
    } else {
      const std::int64_t kv_heads = std::max<std::int64_t>(1, a.kv_heads / c.tp());
      qkv_ = c.linear("qkv", c.tokens(), hidden, (sizes_.heads + 2 * kv_heads) * a.head_dim);
    }
    o_ = c.linear("o", c.tokens(), sizes_.heads * a.d_v(), hidden);
  }

  const Chain::Linear& o() const { return o_; }
  const AttentionSizes& sizes() const { return sizes_; }

  void down_forward() {
    const Attention& a = c_.model().attention;
    const std::int64_t hidden = c_.model().hidden;
    if (!a.mla) {
      c_.gather_tokens("attention gather", hidden, layout_);
      c_.quantize("qkv input", c_.tokens(), hidden);
      return;
    }
    const Mla& m = *a.mla;
    c_.quantize("q_a input", c_.local_tokens(), hidden);
    if (m.q_lora_rank > 0) {
      c_.forward(q_a_);
      c_.quantize("kv_a input", c_.local_tokens(), hidden);  // every linear layer does its own
    }
    c_.forward(kv_a_);
    c_.gather_tokens(
        "latent gather",
        (m.q_lora_rank > 0 ? m.q_lora_rank : hidden) + m.kv_lora_rank + m.qk_rope_head_dim,
        layout_);
  }

  void up_forward() {
    const Attention& a = c_.model().attention;
    if (!a.mla) {
      c_.forward(qkv_);
      if (a.qk_norm) {
        const std::int64_t rows = (sizes_.query + sizes_.key) / a.head_dim;
        c_.norm_forward("qk norm", rows, a.head_dim);
      }
      if (!c_.model().learned_positions) rope("rope");
      return;
    }
    const Mla& m = *a.mla;
    const std::int64_t t = c_.tokens();
    if (m.q_lora_rank > 0) {
      c_.norm_forward("q norm", t, m.q_lora_rank);
      c_.quantize("q_b input", t, m.q_lora_rank);
    } else {
      c_.quantize("q_b input", t, c_.model().hidden);
    }
    c_.norm_forward("kv norm", t, m.kv_lora_rank);
    c_.forward(q_b_);
    c_.quantize("kv_b input", t, m.kv_lora_rank);
    c_.forward(kv_b_);
    rope("rope");
    // Each head's key is its own no-position part beside the shared rotary part; values are made
    // contiguous.
    c_.stream(StreamingKind::copy, "key concat",
              c_.width() * t * (sizes_.heads * m.qk_nope_head_dim + m.qk_rope_head_dim),
              c_.width() * sizes_.key);
    c_.stream(StreamingKind::copy, "value copy", c_.width() * sizes_.value,
              c_.width() * sizes_.value);
  }

  /// From the gradients of queries, keys and values to that of the block's normed input.
  void backward_input() {
    const Attention& a = c_.model().attention;
    const std::int64_t hidden = c_.model().hidden;
    const std::int64_t t = c_.tokens();
    const Recompute& recompute = c_.plan().recompute;
    if (!a.mla) {
      if (!c_.model().learned_positions) rope("rope gradient");
      if (a.qk_norm) {
        const std::int64_t rows = (sizes_.query + sizes_.key) / a.head_dim;
        c_.norm_backward("qk norm", rows, a.head_dim);
      }
      c_.quantize("qkv gradient", t, qkv_.out);
      c_.backward_input(qkv_);
      if (recompute.norms) c_.norm_forward("attention norm", c_.local_tokens(), hidden);
      c_.recast("qkv gradient", t, qkv_.out);
      c_.recast("qkv input", t, hidden);
      c_.reduce_tokens("attention gradient reduce", hidden, layout_);
      return;
    }
    const Mla& m = *a.mla;
    rope("rope gradient");
    c_.quantize("q_b gradient", t, q_b_.out);
    c_.backward_input(q_b_);
    // The shared rotary key's gradient is the sum over heads; the rest goes back beside the
    // values'.
    c_.stream(StreamingKind::elementwise, "rotary key gradient",
              c_.width() * t * sizes_.heads * m.qk_rope_head_dim,
              c_.width() * t * m.qk_rope_head_dim);
    c_.stream(StreamingKind::copy, "key gradient split",
              c_.width() * t * sizes_.heads * m.qk_nope_head_dim,
              c_.width() * t * sizes_.heads * m.qk_nope_head_dim);
    c_.stream(StreamingKind::copy, "value gradient copy", c_.width() * sizes_.value,
              c_.width() * sizes_.value);
    c_.quantize("kv_b gradient", t, kv_b_.out);
    c_.backward_input(kv_b_);
    if (recompute.norms && !recompute.mla_up_projection) {  // else they ran with the up-projection
      if (m.q_lora_rank > 0) c_.norm_forward("q norm", t, m.q_lora_rank);
      c_.norm_forward("kv norm", t, m.kv_lora_rank);
    }
    c_.recast("kv_b gradient", t, kv_b_.out);
    c_.recast("kv_b input", t, m.kv_lora_rank);
    c_.recast("q_b gradient", t, q_b_.out);
    c_.recast("q_b input", t, q_b_.in);
    c_.norm_backward("kv norm", t, m.kv_lora_rank);
    if (m.q_lora_rank > 0) c_.norm_backward("q norm", t, m.q_lora_rank);
    c_.reduce_tokens(
        "latent gradient reduce",
        (m.q_lora_rank > 0 ? m.q_lora_rank : hidden) + m.kv_lora_rank + m.qk_rope_head_dim,
        layout_);
    const std::int64_t rows = c_.local_tokens();
    if (recompute.norms) c_.norm_forward("attention norm", rows, hidden);
    c_.quantize("kv_a gradient", rows, kv_a_.out);
    c_.backward_input(kv_a_);
    c_.recast("kv_a input", rows, hidden);
    c_.recast("kv_a gradient", rows, kv_a_.out);
    if (m.q_lora_rank > 0) {
      c_.quantize("q_a gradient", rows, q_a_.out);
      c_.backward_input(q_a_);
      c_.recast("q_a input", rows, hidden);
      c_.recast("q_a gradient", rows, q_a_.out);
    }
    c_.residual("latent gradient add");
  }

  void backward_weight() {
    c_.backward_weight(o_);
    const Attention& a = c_.model().attention;
    if (!a.mla) {
      c_.backward_weight(qkv_);
      return;
    }
    c_.backward_weight(kv_b_);
    c_.backward_weight(q_b_);
    c_.backward_weight(kv_a_);
    if (a.mla->q_lora_rank > 0) c_.backward_weight(q_a_);
  }

 private:
  /// Rotates queries (whole heads are rewritten) and the rotary keys.
  void rope(const std::string& label) {
    const Attention& a = c_.model().attention;
    const std::int64_t keys = a.mla ? c_.tokens() * a.mla->qk_rope_head_dim : sizes_.key;
    c_.stream(StreamingKind::rope, label, c_.width() * (sizes_.query + keys),
              c_.width() * (sizes_.query + keys), 2);
  }

  Chain& c_;
  const Layout& layout_;
  AttentionSizes sizes_;
  Chain::Linear q_a_, kv_a_, q_b_, kv_b_, qkv_, o_;
};

void attention_forward(Chain& c, const Layout& layout) {
  Projections p(c, layout);
  const std::int64_t hidden = c.model().hidden;
  const std::int64_t heads_out = p.o().in;
  // The sum of the previous block's output and the residual stream is part of this kernel: it reads
  // both and writes both the sum and its norm.
  const std::int64_t local = c.width() * c.local_tokens() * hidden;
  c.stream(StreamingKind::norm_forward, "attention norm", 2 * local, 2 * local);
  p.down_forward();
  p.up_forward();
  exchange_keys(c, layout, CollectiveKind::all_gather, "key-value gather");
  c.add("attention core", attention_core(c, false));
  if (c.precision().saved_attention == NumberFormat::e5m6) {
    c.stream(StreamingKind::pack_e5m6, "attention output pack", c.width() * p.sizes().output,
             bytes_of_elements(p.sizes().output, NumberFormat::e5m6));
  }
  c.quantize("o input", c.tokens(), heads_out);
  c.forward(p.o());
  c.reduce_tokens("attention reduce", hidden, layout);
  c.residual("attention residual");
}

void attention_backward(Chain& c, const Layout& layout) {
  Projections p(c, layout);
  const Recompute& r = c.plan().recompute;
  const std::int64_t hidden = c.model().hidden;
  c.gather_tokens("attention gradient gather", hidden, layout);
  if (c.precision().saved_attention == NumberFormat::e5m6) {
    c.dequantize("attention output", c.tokens(), p.o().in, NumberFormat::e5m6);
  }
  c.quantize("o gradient", c.tokens(), hidden);
  c.backward_input(p.o());
  c.recast("o input", c.tokens(), p.o().in);
  c.recast("o gradient", c.tokens(), hidden);
  if (r.mla_up_projection && c.model().attention.mla) p.up_forward();
  if (r.attention_core) c.add("attention core", attention_core(c, false));
  c.add("attention core", attention_core(c, true));
  exchange_keys(c, layout, CollectiveKind::reduce_scatter, "key-value gradient reduce");
  p.backward_input();
  // The residual stream's gradient is added by the same kernel.
  const std::int64_t local = c.width() * c.local_tokens() * hidden;
  c.stream(StreamingKind::norm_backward, "attention norm", 3 * local, local, 2);
}

// ---------------------------------------------------------------------------------------------------
// Feed-forward

/// SwiGLU has a gate beside the up-projection; both are one GEMM.
std::int64_t up_columns(const Model& model, std::int64_t intermediate) {
  return (model.activation == Activation::swiglu ? 2 : 1) * intermediate;
}

/// One feed-forward network (dense or shared experts) on `rows` tokens, or `groups` routed experts
/// on `rows` tokens each.
class FeedForward {
 public:
  FeedForward(Chain& c, const std::string& name, std::int64_t rows, std::int64_t intermediate,
              std::int64_t groups = 1)
      : c_(c),
        name_(name),
        total_rows_(rows * groups),
        up_columns_(up_columns(c.model(), intermediate)),
        intermediate_(intermediate),
        up_(c.linear(name + "_up", rows, c.model().hidden, up_columns_, groups)),
        down_(c.linear(name + "_down", rows, intermediate, c.model().hidden, groups)) {}

  const Chain::Linear& up() const { return up_; }
  const Chain::Linear& down() const { return down_; }

  /// Activation, written in the format that the down-projection reads.
  void activation_forward() {
    const std::int64_t written = c_.block_scaled()
                                     ? bytes_of_elements(act_elements(), NumberFormat::fp8_block)
                                     : c_.width() * act_elements();
    c_.stream(StreamingKind::activation_forward, name_ + " activation", c_.width() * up_elements(),
              written, c_.block_scaled() ? 2 : 1);
    if (c_.precision().linear == NumberFormat::fp8_tensor) {
      c_.quantize(name_ + "_down input", total_rows_, intermediate_);
    }
  }

  /// The activation's input, kept for the backward pass in the recipe's format.
  void keep_activation_input() {
    if (c_.precision().saved == c_.precision().activations) return;
    c_.stream(StreamingKind::quantize, name_ + " activation input keep", c_.width() * up_elements(),
              bytes_of_elements(up_elements(), c_.precision().saved));
  }

  void activation_backward() {
    // Reads its input and the output's gradient, writes the input's gradient, and, when the output
    // was not kept, the output again for the down-projection's weight gradient.
    const std::int64_t again = c_.plan().recompute.activation ? act_elements() : 0;
    c_.stream(StreamingKind::activation_backward, name_ + " activation",
              c_.width() * (up_elements() + act_elements()), c_.width() * (up_elements() + again));
  }

  std::int64_t up_elements() const { return total_rows_ * up_columns_; }
  std::int64_t act_elements() const { return total_rows_ * intermediate_; }
  std::int64_t total_rows() const { return total_rows_; }
  std::int64_t up_width() const { return up_columns_; }
  std::int64_t intermediate() const { return intermediate_; }

  std::int64_t saved_bytes() const {
    const Precision& p = c_.precision();
    const bool keep_output = !c_.plan().recompute.activation;
    return bytes_of_elements(up_elements(), p.saved) +
           (keep_output ? bytes_of_elements(act_elements(), p.saved) : 0);
  }

 private:
  Chain& c_;
  std::string name_;
  std::int64_t total_rows_;
  std::int64_t up_columns_;
  std::int64_t intermediate_;
  Chain::Linear up_;
  Chain::Linear down_;
};

FeedForward dense_feed_forward(Chain& c) {
  return {c, "ffn", c.tokens(), c.model().intermediate / c.tp()};
}

/// (forward, input gradient, weight gradient) of a dense layer's feed-forward block.
void dense_forward(Chain& c, const Layout& layout) {
  FeedForward f = dense_feed_forward(c);
  const std::int64_t hidden = c.model().hidden;
  c.norm_forward("ffn norm", c.local_tokens(), hidden);
  c.gather_tokens("ffn gather", hidden, layout);
  c.quantize("ffn_up input", c.tokens(), hidden);
  c.forward(f.up());
  f.activation_forward();
  f.keep_activation_input();
  c.forward(f.down());
  c.reduce_tokens("ffn reduce", hidden, layout);
}

void dense_backward(Chain& c, const Layout& layout) {
  FeedForward f = dense_feed_forward(c);
  const std::int64_t hidden = c.model().hidden;
  c.gather_tokens("ffn gradient gather", hidden, layout);
  c.quantize("ffn_down gradient", c.tokens(), hidden);
  c.backward_input(f.down());
  c.dequantize("ffn activation input", c.tokens(), f.up_width(), c.precision().saved);
  f.activation_backward();
  c.recast("ffn_down gradient", c.tokens(), hidden);
  c.recast("ffn_down input", c.tokens(), f.intermediate());
  if (c.plan().recompute.norms) {
    c.norm_forward("ffn norm", c.local_tokens(), hidden);
    c.quantize("ffn_up input", c.local_tokens(), hidden);
  }
  c.quantize("ffn_up gradient", c.tokens(), f.up_width());
  c.backward_input(f.up());
  c.recast("ffn_up gradient", c.tokens(), f.up_width());
  c.recast("ffn_up input", c.tokens(), hidden);
  c.reduce_tokens("ffn gradient reduce", hidden, layout);
  c.norm_backward("ffn norm", c.local_tokens(), hidden);
  c.residual("ffn gradient add");
}

// ---------------------------------------------------------------------------------------------------
// Experts

/// Routed and shared experts of one GPU. The mean expert receives tokens * top_k * ep / experts
/// rows from its group, each of this GPU's `load` times that. How a GPU's rows are spread over its
/// own experts is not told apart: a grouped GEMM pads each expert to whole tiles, which costs half
/// a tile an expert on average however they are spread (0.8 % of V3's 8192 rows). Measured on an
/// H100 with 128 and more experts and 16k tokens and more, a power law of exponent 1 takes 3 %
/// longer than even loads (median; ai-dynamo/aiconfigurator, SGLang 0.5.14, fused FP8 and BF16
/// kernels), within the prices' spread.
class Experts {
 public:
  Experts(Chain& c, const Layout& layout, std::int64_t gpus_per_node, double load)
      : c_(c),
        layout_(layout),
        moe_(*c.model().moe),
        ep_(c.plan().parallelism.ep),
        etp_(c.plan().parallelism.expert_tp),
        rank_tokens_(c.local_tokens()),
        local_experts_(moe_.routed_experts / ep_),
        rows_per_expert_(rows_per_expert(c, load)),
        rows_(rows_per_expert_ * local_experts_),
        routed_(c, "routed", rows_per_expert_, moe_.expert_intermediate / etp_, local_experts_),
        gpus_per_node_(std::min(gpus_per_node, layout.members_per_node(GroupKind::expert))) {
    exchange_.tokens = rank_tokens_;
    exchange_.hidden = c.model().hidden;
    exchange_.top_k = moe_.top_k;
    exchange_.experts = moe_.routed_experts;
    exchange_.ep = ep_;
    exchange_.gpus_per_node = gpus_per_node_;
    exchange_.stride = layout.stride(GroupKind::expert);
    exchange_.node_limit = moe_.group_limit < moe_.groups ? moe_.group_limit : 0;
    exchange_.busiest_gpu_per_mille = std::llround(1000 * load);
    // A token arrives once at each GPU that holds one of its experts, and is expanded there.
    received_ = rank_tokens_;
    if (ep_ > 1) {
      const double gpus = mean_gpus_per_token(exchange_);
      received_ = std::llround(static_cast<double>(rank_tokens_) *
                               std::min(gpus * load, static_cast<double>(ep_)));
    }
  }

  /// At least one, since an empty kernel still runs.
  static std::int64_t rows_per_expert(const Chain& c, double load) {
    const Moe& moe = *c.model().moe;
    const Parallelism& p = c.plan().parallelism;
    const double rows = static_cast<double>(c.local_tokens() * p.expert_tp * moe.top_k * p.ep) /
                        static_cast<double>(moe.routed_experts) * load;
    return std::max<std::int64_t>(1, std::llround(rows));
  }

  /// Norm, gate (kept in higher precision, V3 report 3.3.1), scores and group-limited top-k. The
  /// selection runs as some three dozen small kernels over (tokens, experts) in FP32, a dozen of
  /// which touch all scores; that is how the published trace does it.
  void route_forward() {
    const std::int64_t hidden = c_.model().hidden;
    const std::int64_t scores = rank_tokens_ * moe_.routed_experts;
    c_.norm_forward("ffn norm", rank_tokens_, hidden);
    Chain::Linear gate = c_.linear("gate", rank_tokens_, hidden, moe_.routed_experts);
    gate.format = c_.precision().activations;
    c_.forward(gate);
    c_.stream(StreamingKind::router, "router", 12 * kFp32 * scores, 12 * kFp32 * scores, 36);
    c_.quantize("expert input", rank_tokens_, hidden);
  }

  void route_backward() {
    const std::int64_t hidden = c_.model().hidden;
    const std::int64_t scores = rank_tokens_ * moe_.routed_experts;
    c_.stream(StreamingKind::router, "router gradient", 12 * kFp32 * scores, 12 * kFp32 * scores,
              25);
    Chain::Linear gate = c_.linear("gate", rank_tokens_, hidden, moe_.routed_experts);
    gate.format = c_.precision().activations;
    c_.backward_input(gate);
    c_.backward_weight(gate);
    c_.residual("expert gradient add");
    c_.norm_backward("ffn norm", rank_tokens_, hidden);
    c_.residual("ffn gradient add");
  }

  Work dispatch(bool backward) {
    Work work;
    if (ep_ > 1) {
      ExpertExchange e = exchange_;
      e.combine = false;
      e.format = c_.precision().dispatch;
      e.new_layout = !backward;
      if (backward && c_.block_scaled()) {
        // The gradient is quantised on the exchange's own SMs: the compute stream is busy
        // elsewhere.
        c_.quantize("expert gradient", rank_tokens_, c_.model().hidden);
        work = c_.take();
        for (WorkItem& item : work) item.stream = StreamKind::expert_exchange;
      }
      work.push_back({.shape = {.work = e, .label = backward ? "combine(B)" : "dispatch(F)"},
                      .stream = StreamKind::expert_exchange,
                      .group = GroupKind::expert,
                      .sized_by = SizedBy::expert_exchange});
    }
    append_expert_tensor(work, CollectiveKind::all_gather);
    return work;
  }

  Work combine(bool backward) {
    Work work;
    append_expert_tensor(work, CollectiveKind::reduce_scatter);
    if (ep_ > 1) {
      ExpertExchange e = exchange_;
      e.combine = true;
      e.format = c_.precision().combine;
      work.push_back({.shape = {.work = e, .label = backward ? "dispatch(B)" : "combine(F)"},
                      .stream = StreamKind::expert_exchange,
                      .group = GroupKind::expert,
                      .sized_by = SizedBy::expert_exchange});
    }
    return work;
  }

  void forward() {
    const std::int64_t hidden = c_.model().hidden;
    std::optional<FeedForward> shared = shared_experts();
    if (shared) {
      c_.gather_tokens("shared gather", hidden, layout_);
      if (!c_.block_scaled()) c_.quantize("shared_up input", c_.tokens(), hidden);
      c_.forward(shared->up());
    }
    c_.size_by(SizedBy::expert_rows);
    c_.stream(StreamingKind::router, "routing map", kFp32 * received_ * moe_.top_k,
              kFp32 * received_ * moe_.top_k, 2);
    permute("expert permute", c_.precision().dispatch);
    c_.transpose_weight(routed_.up());
    c_.forward(routed_.up());
    routed_.activation_forward();
    c_.transpose_weight(routed_.down());
    c_.forward(routed_.down());
    unpermute("expert reduce");
    c_.size_by(SizedBy::plan);
    if (shared) {
      shared->activation_forward();
      c_.forward(shared->down());
      c_.reduce_tokens("shared reduce", hidden, layout_);
    }
    c_.size_by(SizedBy::expert_rows);
    routed_.keep_activation_input();
    c_.size_by(SizedBy::plan);
    if (shared) shared->keep_activation_input();
  }

  void backward_input() {
    const std::int64_t hidden = c_.model().hidden;
    const NumberFormat saved = c_.precision().saved;
    std::optional<FeedForward> shared = shared_experts();
    const std::int64_t t = c_.tokens();
    if (ep_ == 1 && c_.block_scaled()) c_.quantize("expert gradient", rank_tokens_, hidden);
    if (shared) {
      c_.gather_tokens("shared gradient gather", hidden, layout_);
      c_.dequantize("shared activation input", t, shared->up_width(), saved);
      if (!c_.block_scaled()) c_.quantize("shared_down gradient", t, hidden);
      c_.backward_input(shared->down());
      shared->activation_backward();
      c_.recast("shared_down gradient", t, hidden);
      c_.recast("shared_down input", t, shared->intermediate());
    }
    c_.size_by(SizedBy::expert_rows);
    c_.dequantize("routed activation input", rows_, routed_.up_width(), saved);
    permute("expert gradient permute", c_.precision().dispatch);
    // The routed weights were transposed in the forward pass.
    c_.backward_input(routed_.down(), false);
    routed_.activation_backward();
    // Gradient of the router's weight of each row: the dot product of its activation with its
    // gradient.
    c_.stream(StreamingKind::elementwise, "router weight gradient",
              2 * c_.width() * routed_.act_elements(), kFp32 * rows_);
    c_.recast("routed_down input", rows_, routed_.intermediate());
    c_.size_by(SizedBy::plan);
    if (c_.plan().recompute.norms) {
      c_.norm_forward("ffn norm", rank_tokens_, hidden);
      c_.quantize("expert input", rank_tokens_, hidden);
    }
    c_.size_by(SizedBy::expert_rows);
    c_.quantize("routed_up gradient", rows_, routed_.up_width());
    c_.backward_input(routed_.up(), false);
    unpermute("expert gradient reduce");
    c_.recast("routed_up gradient", rows_, routed_.up_width());
    c_.size_by(SizedBy::plan);
    if (shared) {
      c_.quantize("shared_up gradient", t, shared->up_width());
      c_.backward_input(shared->up());
      c_.recast("shared_up gradient", t, shared->up_width());
      c_.recast("shared_up input", t, hidden);
      c_.reduce_tokens("shared gradient reduce", hidden, layout_);
    }
  }

  void backward_weight() {
    const std::int64_t hidden = c_.model().hidden;
    std::optional<FeedForward> shared = shared_experts();
    if (shared) c_.backward_weight(shared->down());
    c_.size_by(SizedBy::expert_rows);
    c_.recast("routed_down gradient", rows_, hidden);
    c_.backward_weight(routed_.down());
    c_.recast("routed_up input", rows_, hidden);
    c_.backward_weight(routed_.up());
    c_.size_by(SizedBy::plan);
    if (shared) c_.backward_weight(shared->up());
  }

  std::int64_t saved_bytes() const {
    const Precision& p = c_.precision();
    const std::int64_t hidden = c_.model().hidden;
    const NumberFormat rows_format = ep_ > 1 ? p.dispatch : p.saved;
    std::int64_t bytes = kFp32 * rank_tokens_ * moe_.routed_experts;  // scores
    bytes += bytes_of_elements(rows_ * hidden, rows_format);          // rows as dispatched
    bytes += routed_.saved_bytes();
    if (std::optional<FeedForward> shared = shared_experts()) {
      bytes += shared->saved_bytes();
      if (!c_.plan().recompute.norms) bytes += bytes_of_elements(c_.tokens() * hidden, p.saved);
    }
    return bytes;
  }

  /// Rows in BF16 before they are reduced, and the activation's input with its gradient.
  std::int64_t workspace_bytes() const {
    return c_.width() * (2 * routed_.up_elements() + rows_ * c_.model().hidden);
  }

 private:
  std::optional<FeedForward> shared_experts() const {
    if (moe_.shared_intermediate == 0) return std::nullopt;
    return FeedForward(c_, "shared", c_.tokens(), moe_.shared_intermediate / c_.tp());
  }

  void permute(const std::string& label, NumberFormat format) {
    const std::int64_t hidden = c_.model().hidden;
    c_.stream(StreamingKind::permute, label, bytes_of_elements(received_ * etp_ * hidden, format),
              bytes_of_elements(rows_ * hidden, format));
  }

  void unpermute(const std::string& label) {
    const std::int64_t hidden = c_.model().hidden;
    c_.stream(StreamingKind::unpermute, label, c_.width() * rows_ * hidden,
              c_.width() * received_ * etp_ * hidden);
  }

  /// Expert-tensor-parallel ranks work on the same rows.
  void append_expert_tensor(Work& work, CollectiveKind kind) const {
    if (etp_ == 1) return;
    const std::int64_t bytes = c_.width() * received_ * etp_ * c_.model().hidden;
    work.push_back({.shape = {.work = Collective{.kind = kind,
                                                 .bytes = bytes,
                                                 .ranks = etp_,
                                                 .ranks_per_node = layout_.members_per_node(
                                                     GroupKind::expert_tensor)},
                              .label = "expert tensor"},
                    .stream = StreamKind::expert_exchange,
                    .group = GroupKind::expert_tensor,
                    .sized_by = SizedBy::expert_rows});
  }

  Chain& c_;
  const Layout& layout_;
  const Moe& moe_;
  std::int64_t ep_;
  std::int64_t etp_;
  std::int64_t rank_tokens_;
  std::int64_t local_experts_;
  std::int64_t rows_per_expert_;
  std::int64_t rows_;
  FeedForward routed_;
  std::int64_t gpus_per_node_;
  ExpertExchange exchange_;
  std::int64_t received_ = 0;
};

// ---------------------------------------------------------------------------------------------------
// Memory

/// What attention keeps: its input (for the norm and the residual), the latents or nothing,
/// queries, keys and values unless they are recomputed, the core's output (in E5M6 if the recipe
/// says so) and its log-sum-exp, and the residual stream after it.
std::int64_t attention_saved_bytes(const Chain& c) {
  const Attention& a = c.model().attention;
  const Recompute& r = c.plan().recompute;
  const Precision& p = c.precision();
  const AttentionSizes s = attention_sizes(c);
  const std::int64_t local = c.local_tokens() * c.model().hidden;
  std::int64_t bytes = 2 * c.width() * local;  // residual stream, before and after
  if (!r.norms) bytes += 2 * bytes_of_elements(local, p.saved);  // both norms' outputs
  if (a.mla) {
    const std::int64_t latents =
        c.tokens() * (a.mla->q_lora_rank + a.mla->kv_lora_rank + a.mla->qk_rope_head_dim);
    bytes += c.width() * latents;
    if (!r.norms) bytes += bytes_of_elements(latents, p.saved);
  }
  const bool recompute_qkv = a.mla && r.mla_up_projection;
  if (!recompute_qkv && !r.attention_core) bytes += c.width() * (s.query + s.key + s.value);
  if (!r.attention_core) bytes += kFp32 * c.tokens() * s.heads;
  bytes += bytes_of_elements(s.output, p.saved_attention);
  if (p.saved_attention == p.activations && c.fp8()) {
    bytes += bytes_of_elements(s.output, p.saved);
  }
  return bytes;
}

/// Queries, keys, values and their gradients in BF16.
std::int64_t attention_workspace_bytes(const Chain& c) {
  const AttentionSizes s = attention_sizes(c);
  return 2 * c.width() * (s.query + s.key + s.value) + kFp32 * s.query;
}

}  // namespace

LayerWork transformer_layer(const Model& model, const Plan& plan, std::int64_t gpus_per_node,
                            bool moe, double expert_load) {
  Chain c(model, plan);
  const Layout layout(plan.parallelism, gpus_per_node);
  LayerWork w;
  w.memory.saved_bytes = attention_saved_bytes(c);
  w.memory.workspace_bytes = attention_workspace_bytes(c);

  attention_forward(c, layout);
  if (moe) {
    Experts experts(c, layout, gpus_per_node, expert_load);
    experts.route_forward();
    w.attn_forward = c.take();
    w.dispatch_forward = experts.dispatch(false);
    experts.forward();
    w.mlp_forward = c.take();
    w.combine_forward = experts.combine(false);
    w.combine_backward = experts.dispatch(true);
    experts.backward_input();
    w.mlp_backward = c.take();
    experts.backward_weight();
    w.mlp_weight = c.take();
    w.dispatch_backward = experts.combine(true);
    experts.route_backward();
    w.memory.saved_bytes += experts.saved_bytes();
    w.memory.workspace_bytes = std::max(w.memory.workspace_bytes, experts.workspace_bytes());
  } else {
    w.attn_forward = c.take();
    dense_forward(c, layout);
    w.mlp_forward = c.take();
    dense_backward(c, layout);
    w.mlp_backward = c.take();
    FeedForward f = dense_feed_forward(c);
    c.backward_weight(f.down());
    c.backward_weight(f.up());
    w.mlp_weight = c.take();
    w.memory.saved_bytes += f.saved_bytes();
    w.memory.workspace_bytes =
        std::max(w.memory.workspace_bytes, 2 * c.width() * (f.up_elements() + f.act_elements()));
  }
  attention_backward(c, layout);
  w.attn_backward = c.take();
  Projections(c, layout).backward_weight();
  w.attn_weight = c.take();

  if (plan.recompute.full) {
    // The whole layer runs again from its input, exchanges included, before its backward pass.
    Work again = w.attn_forward;
    for (const Work* part : {&w.dispatch_forward, &w.mlp_forward}) {
      again.insert(again.end(), part->begin(), part->end());
    }
    Work& first = w.combine_backward.empty() ? w.mlp_backward : w.combine_backward;
    first.insert(first.begin(), again.begin(), again.end());
    w.memory.workspace_bytes += w.memory.saved_bytes;
    w.memory.saved_bytes = c.width() * c.local_tokens() * model.hidden;
  }
  return w;
}

namespace {

/// Each tensor-parallel rank looks up the tokens of its part of the vocabulary; the sum of all
/// parts has every token's row (Megatron-LM's VocabParallelEmbedding).
void embedding_forward(Chain& c, const Layout& layout, const std::string& label) {
  const std::int64_t bytes = c.width() * c.tokens() * c.model().hidden;
  c.stream(StreamingKind::embedding_forward, label, bytes / c.tp(), bytes);
  c.reduce_tokens(label + " reduce", c.model().hidden, layout);
}

/// The gradient is added to FP32 rows: read gradient, read and write rows.
void embedding_backward(Chain& c, const Layout& layout, const std::string& label) {
  const std::int64_t hidden = c.model().hidden;
  c.gather_tokens(label + " gather", hidden, layout);
  const std::int64_t rows = 2 * c.width() * c.tokens() / c.tp() * hidden;
  c.stream(StreamingKind::embedding_backward, label, c.width() * c.tokens() * hidden + rows, rows);
}

}  // namespace

EdgeWork embedding_work(const Model& model, const Plan& plan, std::int64_t gpus_per_node) {
  Chain c(model, plan);
  const Layout layout(plan.parallelism, gpus_per_node);
  EdgeWork w;
  embedding_forward(c, layout, "embedding");
  w.forward = c.take();
  embedding_backward(c, layout, "embedding gradient");
  w.backward = c.take();
  return w;
}

EdgeWork head_work(const Model& model, const Plan& plan, std::int64_t gpus_per_node) {
  Chain c(model, plan);
  const Layout layout(plan.parallelism, gpus_per_node);
  const std::int64_t hidden = model.hidden;
  const std::int64_t columns = model.vocabulary / c.tp();
  const std::int64_t logits = c.tokens() * columns;
  Chain::Linear head = c.linear("head", c.tokens(), hidden, columns);
  head.format = c.precision().activations;  // kept in higher precision (V3 report 3.3.1)
  EdgeWork w;
  c.norm_forward("final norm", c.local_tokens(), hidden);
  c.gather_tokens("head gather", hidden, layout);
  c.forward(head);
  // Log-sum-exp over the logits, then the loss; the gradient overwrites the logits in the backward
  // pass. Where the vocabulary is split, each rank's largest logit, sum and target go to all in
  // between.
  const std::int64_t partial = 3 * kFp32 * c.tokens();
  if (c.tp() == 1) {
    c.stream(StreamingKind::cross_entropy, "cross-entropy", c.width() * logits, kFp32 * c.tokens(),
             2);
  } else {
    c.stream(StreamingKind::cross_entropy, "cross-entropy", c.width() * logits, partial);
    c.collective(CollectiveKind::all_gather, "cross-entropy gather", partial * c.tp(), layout,
                 GroupKind::tensor);
    c.stream(StreamingKind::cross_entropy, "cross-entropy loss", partial * c.tp(),
             kFp32 * c.tokens());
  }
  w.forward = c.take();
  c.stream(StreamingKind::cross_entropy, "cross-entropy gradient", c.width() * logits,
           c.width() * logits);
  c.backward_input(head);
  c.reduce_tokens("head gradient reduce", hidden, layout);
  c.norm_backward("final norm", c.local_tokens(), hidden);
  w.backward = c.take();
  c.backward_weight(head);
  w.weight = c.take();
  w.memory.saved_bytes = c.width() * logits + 2 * c.width() * c.local_tokens() * hidden;
  w.memory.workspace_bytes = c.width() * logits;
  return w;
}

EdgeWork mtp_front_work(const Model& model, const Plan& plan, std::int64_t gpus_per_node) {
  Chain c(model, plan);
  const Layout layout(plan.parallelism, gpus_per_node);
  const std::int64_t hidden = model.hidden;
  const std::int64_t t = c.local_tokens();
  const Chain::Linear projection = c.linear("mtp projection", t, 2 * hidden, hidden);
  EdgeWork w;
  embedding_forward(c, layout, "mtp embedding");
  c.norm_forward("mtp norm hidden", t, hidden);
  c.norm_forward("mtp norm embedding", t, hidden);
  c.stream(StreamingKind::copy, "mtp concat", 2 * c.width() * t * hidden,
           2 * c.width() * t * hidden);
  c.quantize("mtp projection input", t, 2 * hidden);
  c.forward(projection);
  w.forward = c.take();
  c.quantize("mtp projection gradient", t, hidden);
  c.backward_input(projection);
  c.recast("mtp projection gradient", t, hidden);
  c.recast("mtp projection input", t, 2 * hidden);
  c.norm_backward("mtp norm hidden", t, hidden);
  c.norm_backward("mtp norm embedding", t, hidden);
  embedding_backward(c, layout, "mtp embedding gradient");
  w.backward = c.take();
  c.backward_weight(projection);
  w.weight = c.take();
  w.memory.saved_bytes =
      bytes_of_elements(2 * t * hidden, plan.precision.saved) + 2 * c.width() * t * hidden;
  return w;
}

LayerShard embedding_shard(const Model& model, const Plan& plan) {
  return {.dense = count_parameters(model).embedding / plan.parallelism.tp};
}

namespace {

/// `elements` that every tensor-parallel rank holds. With sequence parallelism each has the
/// gradient from its own tokens only.
std::int64_t summed_over_tokens(const Plan& plan, std::int64_t elements) {
  return plan.parallelism.tp > 1 && plan.parallelism.sequence_parallel ? elements : 0;
}

}  // namespace

LayerShard head_shard(const Model& model, const Plan& plan) {
  const std::int64_t final_norm = (model.norm_bias ? 2 : 1) * model.hidden;
  return {.dense = model.vocabulary * model.hidden / plan.parallelism.tp + final_norm,
          .tensor_summed = summed_over_tokens(plan, final_norm)};
}

LayerShard mtp_front_shard(const Model& model, const Plan& plan) {
  const std::int64_t elements = 2 * model.hidden * model.hidden + 3 * model.hidden;
  return {.dense = elements, .tensor_summed = summed_over_tokens(plan, elements)};
}

LayerShard layer_shard(const Model& model, const Plan& plan, bool moe) {
  const LayerParameters p = count_layer(model, moe);
  const Parallelism& par = plan.parallelism;
  std::int64_t latent_down = 0;
  if (model.attention.mla) {
    const Mla& m = *model.attention.mla;
    latent_down = model.hidden * (m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim);
  }
  const std::int64_t whole = latent_down + p.norms + p.router;
  LayerShard s;
  s.dense = (p.attention - latent_down + p.dense_feed_forward + p.shared_experts) / par.tp + whole;
  if (moe) s.expert = p.routed_experts / (par.ep * par.expert_tp);
  s.tensor_summed = summed_over_tokens(plan, whole);
  // Every rank has other heads, so the gains of their norms are summed in any case.
  if (par.tp > 1 && s.tensor_summed == 0 && model.attention.qk_norm) {
    s.tensor_summed = 2 * model.attention.head_dim;
  }
  return s;
}

}  // namespace orrery
