#include "models/generation_layer.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "models/layout.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

constexpr std::int64_t kBf16 = 2;
constexpr std::int64_t kFp32 = 4;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

std::int64_t bytes_of_elements(std::int64_t elements, NumberFormat format) {
  return std::llround(static_cast<double>(elements) * bytes_per_element(format));
}

/// The dimensions of a micro-batch on one GPU, and the verbs that append kernels.
///
/// With tensor parallelism heads and intermediate sizes are split. Where experts lie on other GPUs,
/// norms and routing work on 1/tp of the tokens between a gather and a reduce-scatter, so that each
/// token is dispatched once (V3 report 3.4.1, TP with SP); otherwise all tokens are everywhere and
/// partial sums are all-reduced.
class Chain {
 public:
  Chain(const Instance& instance, const GenerationBatch& batch)
      : instance_(instance),
        batch_(batch),
        layout_({.tp = instance.plan.tp, .dp = instance.plan.dp, .ep = instance.plan.ep},
                instance.cluster.gpus_per_node),
        scattered_(instance.plan.tp > 1 && instance.plan.ep > 1),
        tokens_(batch.tokens()),
        local_tokens_(scattered_ ? ceil_div(tokens_, instance.plan.tp) : tokens_) {}

  Work take() { return std::exchange(work_, {}); }
  const Model& model() const { return instance_.model; }
  const ServingPlan& plan() const { return instance_.plan; }
  const GenerationBatch& batch() const { return batch_; }
  const Layout& layout() const { return layout_; }
  const Cluster& cluster() const { return instance_.cluster; }
  std::int64_t tp() const { return plan().tp; }
  std::int64_t tokens() const { return tokens_; }
  std::int64_t local_tokens() const { return local_tokens_; }
  bool scattered() const { return scattered_; }
  bool block_scaled() const { return plan().linear == NumberFormat::fp8_block; }

  void add(std::string label, decltype(Shape::work) work) {
    work_.push_back({.shape = {.work = work, .label = std::move(label)}});
  }

  void stream(StreamingKind kind, std::string label, std::int64_t read, std::int64_t written) {
    add(std::move(label), Streaming{.kind = kind, .bytes_read = read, .bytes_written = written});
  }

  void gemm(std::string label, std::int64_t rows, std::int64_t in, std::int64_t out,
            NumberFormat format, std::int64_t groups = 1) {
    add(std::move(label), Gemm{.inputs = format,
                               .pass = Pass::forward,
                               .groups = groups,
                               .m = rows,
                               .n = out,
                               .k = in});
  }

  /// Of (rows, in) that are in BF16 yet, as FP8 recipes have it.
  void quantize(const std::string& label, std::int64_t rows, std::int64_t columns) {
    if (plan().linear == NumberFormat::bf16) return;
    stream(StreamingKind::quantize, label + " quantise", kBf16 * rows * columns,
           bytes_of_elements(rows * columns, plan().linear));
  }

  void linear(const std::string& label, std::int64_t rows, std::int64_t in, std::int64_t out) {
    quantize(label + " input", rows, in);
    gemm(label, rows, in, out, plan().linear);
  }

  void norm(const std::string& label, std::int64_t rows, std::int64_t columns) {
    const std::int64_t bytes = kBf16 * rows * columns;
    stream(StreamingKind::norm_forward, label, bytes, bytes);
  }

  /// Adds the block's output to the residual stream and norms the sum.
  void add_and_norm(const std::string& label) {
    const std::int64_t bytes = kBf16 * local_tokens_ * model().hidden;
    stream(StreamingKind::norm_forward, label, 2 * bytes, 2 * bytes);
  }

  void collective(CollectiveKind kind, const std::string& label, std::int64_t bytes) {
    if (tp() == 1) return;
    const GroupKind group = GroupKind::tensor;
    work_.push_back({.shape = {.work = Collective{.kind = kind,
                                                  .bytes = bytes,
                                                  .ranks = tp(),
                                                  .ranks_per_node = layout_.members_per_node(group),
                                                  .stride = layout_.stride(group)},
                               .label = label},
                     .stream = StreamKind::tensor,
                     .group = group});
  }

  /// Tokens that are scattered come in whole.
  void gather(const std::string& label, std::int64_t columns) {
    if (!scattered_) return;
    collective(CollectiveKind::all_gather, label, kBf16 * local_tokens_ * tp() * columns);
  }

  /// Partial sums of all tensor-parallel GPUs.
  void reduce(const std::string& label, std::int64_t columns) {
    collective(scattered_ ? CollectiveKind::reduce_scatter : CollectiveKind::all_reduce, label,
               kBf16 * (scattered_ ? local_tokens_ * tp() : tokens_) * columns);
  }

 private:
  const Instance& instance_;
  const GenerationBatch& batch_;
  Layout layout_;
  bool scattered_;
  std::int64_t tokens_;
  std::int64_t local_tokens_;
  Work work_;
};

std::int64_t up_columns(const Model& model, std::int64_t intermediate) {
  return (model.activation == Activation::swiglu ? 2 : 1) * intermediate;
}

// ---- attention

std::int64_t local_kv_heads(const Chain& p) {
  return std::max<std::int64_t>(1, p.model().attention.kv_heads / p.tp());
}

/// Rotates, and writes what the cache keeps.
void rotate_and_cache(Chain& p, std::int64_t rotated_per_token, double cached_per_token) {
  const std::int64_t rotated = kBf16 * p.tokens() * rotated_per_token;
  const std::int64_t cached = std::llround(static_cast<double>(p.tokens()) * cached_per_token);
  p.stream(StreamingKind::rope, "rope and cache", rotated + cached, rotated + cached);
}

CachedAttention over_cache(const Chain& p) {
  const Attention& a = p.model().attention;
  const GenerationBatch& b = p.batch();
  CachedAttention core{.inputs = NumberFormat::bf16,
                       .cache = p.plan().cache,
                       .batch = b.sequences,
                       .heads = a.heads / p.tp(),
                       .q_len = b.new_tokens,
                       .kv_len = b.attended()};
  if (a.mla) {
    core.latent = true;
    core.kv_heads = 1;
    core.d_qk = a.mla->kv_lora_rank + a.mla->qk_rope_head_dim;
    core.d_v = a.mla->kv_lora_rank;
  } else {
    core.kv_heads = local_kv_heads(p);
    core.d_qk = core.d_v = a.head_dim;
  }
  return core;
}

/// Causal attention of the new tokens over themselves and what is before them.
AttentionCore over_prompt(const Chain& p) {
  const Attention& a = p.model().attention;
  const GenerationBatch& b = p.batch();
  return {.inputs = NumberFormat::bf16,
          .causal = true,
          .batch = b.sequences,
          .heads = a.heads / p.tp(),
          .kv_heads = a.mla ? a.heads / p.tp() : local_kv_heads(p),
          .q_len = b.new_tokens,
          .kv_len = b.attended(),
          .d_qk = a.d_qk(),
          .d_v = a.d_v()};
}

double cached_bytes(const Chain& p) {
  const double layer = cache_bytes_per_layer(p.model(), p.plan().cache);
  if (p.model().attention.mla) return layer;
  return layer * static_cast<double>(local_kv_heads(p)) /
         static_cast<double>(p.model().attention.kv_heads);
}

/// Scores of all cached tokens for every new one, and the best top_k of each. The score kernel is
/// priced as an FP8 attention kernel's first product, which it is but for what happens to a score
/// (a ReLU, a weight and a sum over heads, instead of an exponential).
void index(Chain& p, const Indexer& indexer, const Mla& mla) {
  const GenerationBatch& b = p.batch();
  const std::int64_t width = indexer.heads * indexer.head_dim;
  p.linear("index_q", p.tokens(), mla.q_lora_rank > 0 ? mla.q_lora_rank : p.model().hidden, width);
  p.linear("index_k", p.tokens(), p.model().hidden, indexer.head_dim);
  p.norm("index norm", p.tokens(), indexer.head_dim);
  p.gemm("index weights", p.tokens(), p.model().hidden, indexer.heads, NumberFormat::bf16);
  p.stream(StreamingKind::quantize, "index quantise",
           kBf16 * p.tokens() * (width + indexer.head_dim),
           bytes_of_elements(p.tokens() * (width + indexer.head_dim), NumberFormat::fp8_block));
  if (b.attended() <= indexer.top_k) return;  // all of them are taken
  if (b.prefill) {
    p.add("index scores", AttentionCore{.inputs = NumberFormat::fp8_tensor,
                                        .causal = true,
                                        .batch = b.sequences,
                                        .heads = indexer.heads,
                                        .kv_heads = 1,
                                        .q_len = b.new_tokens,
                                        .kv_len = b.attended(),
                                        .d_qk = indexer.head_dim,
                                        .d_v = 0});
  } else {
    p.add("index scores", CachedAttention{.inputs = NumberFormat::fp8_tensor,
                                          .cache = NumberFormat::fp8_block,
                                          .batch = b.sequences,
                                          .heads = indexer.heads,
                                          .kv_heads = 1,
                                          .q_len = b.new_tokens,
                                          .kv_len = b.attended(),
                                          .d_qk = indexer.head_dim,
                                          .d_v = 0});
  }
  // FP32 scores are written by the one and read twice by the other (histogram, then choice).
  const std::int64_t scores =
      kFp32 * p.tokens() * (b.prefill ? b.context + (b.new_tokens + 1) / 2 : b.attended());
  p.stream(StreamingKind::router, "index top-k", 2 * scores,
           scores + kFp32 * p.tokens() * indexer.top_k);
}

/// Multiply-adds of one query head over `keys` full keys, and over top_k latent rows with both
/// absorptions.
bool gathers(const Chain& p) {
  const Mla& mla = *p.model().attention.mla;
  if (!mla.indexer || p.batch().attended() <= mla.indexer->top_k) return false;
  if (!p.batch().prefill) return true;
  // Short prompts go through full attention with a mask instead (V3.2-Exp report 3): the cheaper.
  const GenerationBatch& b = p.batch();
  const double keys = static_cast<double>(b.context) + 0.5 * static_cast<double>(b.new_tokens + 1);
  const double full =
      keys * static_cast<double>(mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim);
  const double sparse = static_cast<double>(mla.indexer->top_k) *
                        static_cast<double>(2 * mla.kv_lora_rank + mla.qk_rope_head_dim);
  return sparse < full;
}

void latent_attention(Chain& p) {
  const Mla& m = *p.model().attention.mla;
  const GenerationBatch& b = p.batch();
  const std::int64_t hidden = p.model().hidden;
  const std::int64_t heads = p.model().attention.heads / p.tp();
  const std::int64_t d_qk = m.qk_nope_head_dim + m.qk_rope_head_dim;
  const std::int64_t latent = m.kv_lora_rank + m.qk_rope_head_dim;
  p.linear("qkv_a", p.local_tokens(), hidden, m.q_lora_rank + latent);
  p.gather("latent gather", (m.q_lora_rank > 0 ? m.q_lora_rank : hidden) + latent);
  if (m.q_lora_rank > 0) p.norm("q norm", p.tokens(), m.q_lora_rank);
  p.norm("kv norm", p.tokens(), m.kv_lora_rank);
  p.linear("q_b", p.tokens(), m.q_lora_rank > 0 ? m.q_lora_rank : hidden, heads * d_qk);
  if (m.indexer) index(p, *m.indexer, m);
  const bool gathered = gathers(p);
  if (b.prefill && !gathered) {
    // The context's latents are read from the cache and projected up again.
    const std::int64_t rows = b.sequences * b.attended();
    p.linear("kv_b", rows, m.kv_lora_rank, heads * (m.qk_nope_head_dim + m.v_head_dim));
    rotate_and_cache(p, heads * m.qk_rope_head_dim + m.qk_rope_head_dim, cached_bytes(p));
    p.stream(StreamingKind::copy, "key concat",
             kBf16 * rows * (heads * m.qk_nope_head_dim + m.qk_rope_head_dim),
             kBf16 * rows * heads * d_qk);
    p.add("attention core", over_prompt(p));
  } else {
    p.gemm("q absorb", p.tokens(), m.qk_nope_head_dim, m.kv_lora_rank, NumberFormat::bf16, heads);
    rotate_and_cache(p, heads * m.qk_rope_head_dim + m.qk_rope_head_dim, cached_bytes(p));
    CachedAttention core = over_cache(p);
    if (gathered) {
      core.gathered = true;
      core.kv_len = m.indexer->top_k;
    }
    p.add("attention core", core);
    p.gemm("v absorb", p.tokens(), m.kv_lora_rank, m.v_head_dim, NumberFormat::bf16, heads);
  }
  p.linear("o", p.tokens(), heads * m.v_head_dim, hidden);
}

void head_attention(Chain& p) {
  const Attention& a = p.model().attention;
  const std::int64_t hidden = p.model().hidden;
  const std::int64_t heads = a.heads / p.tp();
  const std::int64_t kv_heads = local_kv_heads(p);
  p.gather("attention gather", hidden);
  p.linear("qkv", p.tokens(), hidden, (heads + 2 * kv_heads) * a.head_dim);
  if (a.qk_norm) p.norm("qk norm", p.tokens() * (heads + kv_heads), a.head_dim);
  rotate_and_cache(p, p.model().learned_positions ? 0 : (heads + kv_heads) * a.head_dim,
                   cached_bytes(p));
  if (p.batch().prefill) {
    p.add("attention core", over_prompt(p));
  } else {
    p.add("attention core", over_cache(p));
  }
  p.linear("o", p.tokens(), heads * a.head_dim, hidden);
}

void attention(Chain& p) {
  p.add_and_norm("attention norm");
  if (p.model().attention.mla) {
    latent_attention(p);
  } else {
    head_attention(p);
  }
  p.reduce("attention reduce", p.model().hidden);
}

// ---- feed-forward

/// up, activation (quantised on the way, as one kernel) and down of `groups` networks.
void feed_forward(Chain& p, const std::string& name, std::int64_t rows, std::int64_t intermediate,
                  std::int64_t groups = 1) {
  const std::int64_t up = up_columns(p.model(), intermediate);
  p.gemm(name + "_up", rows, p.model().hidden, up, p.plan().linear, groups);
  p.stream(StreamingKind::activation_forward, name + " activation", kBf16 * groups * rows * up,
           bytes_of_elements(groups * rows * intermediate, p.plan().linear));
  p.gemm(name + "_down", rows, intermediate, p.model().hidden, p.plan().linear, groups);
}

void dense(Chain& p) {
  const std::int64_t hidden = p.model().hidden;
  p.gather("ffn gather", hidden);
  p.quantize("ffn_up input", p.tokens(), hidden);
  feed_forward(p, "ffn", p.tokens(), p.model().intermediate / p.tp());
  p.reduce("ffn reduce", hidden);
}

/// Experts of one GPU: how many get any row at all, and how many rows each of these gets.
struct ExpertRows {
  std::int64_t active = 0;
  std::int64_t rows = 0;
};

/// Each GPU of the group gets as many rows as it sends on average, the busiest `busiest` times
/// that. Few rows do not reach every expert: of n rows that fall on e experts evenly, e (1 -
/// (1-1/e)^n) are hit on average.
ExpertRows expert_rows(const Chain& p) {
  const Moe& moe = *p.model().moe;
  const ServingPlan& plan = p.plan();
  const std::int64_t experts = (moe.routed_experts + plan.redundant_experts) / plan.ep;
  const double rows =
      static_cast<double>(p.local_tokens() * moe.top_k) * (plan.ep > 1 ? plan.busiest : 1.0);
  const auto e = static_cast<double>(experts);
  const double hit = e * (1 - std::pow(1 - 1 / e, rows));
  const std::int64_t active = std::clamp<std::int64_t>(std::llround(hit), 1, experts);
  return {active, std::max<std::int64_t>(1, std::llround(rows / static_cast<double>(active)))};
}

ExpertExchange exchange(const Chain& p, bool combine) {
  const Moe& moe = *p.model().moe;
  const ServingPlan& plan = p.plan();
  return {.combine = combine,
          .low_latency = plan.exchange(p.batch().prefill) == ExchangeMode::low_latency,
          .format = combine ? NumberFormat::bf16 : plan.dispatch,
          .new_layout = !combine,
          .tokens = p.local_tokens(),
          .hidden = p.model().hidden,
          .top_k = moe.top_k,
          .experts = moe.routed_experts + plan.redundant_experts,
          .ep = plan.ep,
          .gpus_per_node =
              std::min(p.cluster().gpus_per_node, p.layout().members_per_node(GroupKind::expert)),
          .node_limit = moe.group_limit < moe.groups ? moe.group_limit : 0,
          .busiest_gpu_per_mille = std::llround(1000 * plan.busiest),
          .stride = p.layout().stride(GroupKind::expert)};
}

Work exchange_work(const Chain& p, bool combine) {
  return {{.shape = {.work = exchange(p, combine), .label = combine ? "combine" : "dispatch"},
           .stream = StreamKind::expert_exchange,
           .group = GroupKind::expert}};
}

/// Gate in BF16, then scores and choice in one kernel over (tokens, experts) in FP32.
void route(Chain& p) {
  const Moe& moe = *p.model().moe;
  const std::int64_t scores = kFp32 * p.local_tokens() * moe.routed_experts;
  p.gemm("gate", p.local_tokens(), p.model().hidden, moe.routed_experts, NumberFormat::bf16);
  p.stream(StreamingKind::router, "router", scores, 2 * kFp32 * p.local_tokens() * moe.top_k);
}

void experts(Chain& p) {
  const Moe& moe = *p.model().moe;
  const ServingPlan& plan = p.plan();
  const std::int64_t hidden = p.model().hidden;
  const bool apart = plan.ep > 1;
  const bool packed = apart && plan.exchange(p.batch().prefill) == ExchangeMode::low_latency;
  if (moe.shared_intermediate > 0) {
    // Beside experts on other GPUs each GPU has all of the shared ones for its own tokens.
    const std::int64_t width = moe.shared_intermediate / (apart ? 1 : p.tp());
    p.quantize("shared_up input", p.local_tokens(), hidden);
    feed_forward(p, "shared", p.local_tokens(), width);
  }
  const ExpertRows r = expert_rows(p);
  const std::int64_t rows = r.active * r.rows;
  const std::int64_t in =
      bytes_of_elements(rows * hidden, apart ? plan.dispatch : NumberFormat::bf16);
  // The low-latency kernels deliver rows expert by expert and add them up themselves.
  if (!packed) {
    p.stream(StreamingKind::permute, "expert permute", in,
             bytes_of_elements(rows * hidden, plan.linear));
  }
  feed_forward(p, "routed", r.rows, moe.expert_intermediate / (apart ? 1 : p.tp()), r.active);
  if (!packed) {
    p.stream(StreamingKind::unpermute, "expert reduce", kBf16 * rows * hidden,
             kBf16 * p.local_tokens() * hidden);
  }
  if (!apart) p.reduce("expert reduce", hidden);
}

}  // namespace

bool is_attention_core(const Shape& shape) {
  return shape.label == "attention core" || shape.label == "index scores" ||
         shape.label == "index top-k";
}

GenerationLayer generation_layer(const Instance& instance, const GenerationBatch& batch, bool moe) {
  ORRERY_CHECK(batch.sequences >= 1 && batch.new_tokens >= 1 && batch.context >= 0,
               "{} sequences, {} new tokens, context {}", batch.sequences, batch.new_tokens,
               batch.context);
  Chain p(instance, batch);
  GenerationLayer layer;
  attention(p);
  p.add_and_norm("ffn norm");
  if (moe) route(p);
  const bool apart = moe && instance.plan.ep > 1;
  // The low-latency dispatch writes FP8 itself.
  if (apart && instance.plan.exchange(batch.prefill) == ExchangeMode::normal) {
    p.quantize("expert input", p.local_tokens(), instance.model.hidden);
  }
  layer.attention = p.take();
  if (!moe) {
    dense(p);
    layer.mlp = p.take();
    return layer;
  }
  if (apart) layer.dispatch = exchange_work(p, false);
  experts(p);
  layer.mlp = p.take();
  if (apart) layer.combine = exchange_work(p, true);
  return layer;
}

Work generation_embedding(const Instance& instance, const GenerationBatch& batch) {
  Chain p(instance, batch);
  const std::int64_t bytes = kBf16 * p.tokens() * instance.model.hidden;
  p.stream(StreamingKind::embedding_forward, "embedding", bytes / p.tp(), bytes);
  p.reduce("embedding reduce", instance.model.hidden);
  return p.take();
}

Work generation_head(const Instance& instance, const GenerationBatch& batch) {
  GenerationBatch rows = batch;
  if (batch.prefill) rows.new_tokens = 1;
  Chain p(instance, rows);
  const std::int64_t hidden = instance.model.hidden;
  const std::int64_t columns = ceil_div(instance.model.vocabulary, p.tp());
  p.norm("final norm", p.local_tokens(), hidden);
  p.gather("head gather", hidden);
  p.gemm("head", p.tokens(), hidden, columns, NumberFormat::bf16);
  p.collective(CollectiveKind::all_gather, "logits gather", kBf16 * p.tokens() * columns * p.tp());
  // Softmax with temperature and a draw: FP32 logits read twice, written once.
  const std::int64_t logits = p.tokens() * instance.model.vocabulary;
  p.stream(StreamingKind::cross_entropy, "sampling", (kBf16 + kFp32) * logits, kFp32 * logits);
  return p.take();
}

Work generation_mtp_front(const Instance& instance, const GenerationBatch& batch) {
  Chain p(instance, batch);
  const std::int64_t hidden = instance.model.hidden;
  const std::int64_t t = p.local_tokens();
  const std::int64_t bytes = kBf16 * t * hidden;
  p.stream(StreamingKind::embedding_forward, "mtp embedding", bytes, bytes);
  p.norm("mtp norm hidden", t, hidden);
  p.norm("mtp norm embedding", t, hidden);
  p.stream(StreamingKind::copy, "mtp concat", 2 * bytes, 2 * bytes);
  p.linear("mtp projection", t, 2 * hidden, hidden);
  return p.take();
}

}  // namespace orrery
