// Parameters and FLOPs of a model, from its dimensions.

#include <algorithm>

#include "models/model.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

/// Weights and biases of one feed-forward block: gate, up and down, or up and down.
std::int64_t count_feed_forward(const Model& model, std::int64_t intermediate) {
  const std::int64_t inward = model.activation == Activation::swiglu ? 2 : 1;
  const std::int64_t weights = (inward + 1) * model.hidden * intermediate;
  const std::int64_t biases = model.feed_forward_bias ? inward * intermediate + model.hidden : 0;
  return weights + biases;
}

std::int64_t count_mla(const Mla& mla, std::int64_t hidden, std::int64_t heads) {
  const std::int64_t d_qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim;
  const std::int64_t queries =
      mla.q_lora_rank > 0 ? mla.q_lora_rank * (hidden + heads * d_qk) : hidden * heads * d_qk;
  const std::int64_t down = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim);
  const std::int64_t up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim);
  return queries + down + up + heads * mla.v_head_dim * hidden;
}

std::int64_t count_attention(const Attention& attention, std::int64_t hidden) {
  if (attention.mla) return count_mla(*attention.mla, hidden, attention.heads);
  const std::int64_t queries = attention.heads * attention.head_dim;
  const std::int64_t keys_and_values = 2 * attention.kv_heads * attention.head_dim;
  std::int64_t biases = attention.qkv_bias ? queries + keys_and_values : 0;
  if (attention.output_bias) biases += hidden;
  return hidden * (queries + keys_and_values) + queries * hidden + biases;
}

std::int64_t count_norm(const Model& model) {
  return model.norm_bias ? 2 * model.hidden : model.hidden;
}

}  // namespace

std::int64_t Model::moe_layers() const {
  return std::count(layer_is_moe.begin(), layer_is_moe.end(), true);
}

std::int64_t LayerParameters::total() const {
  return attention + norms + dense_feed_forward + shared_experts + router + routed_experts;
}

std::int64_t ParameterCount::total() const {
  return embedding + head + attention + dense_feed_forward + routed_experts + shared_experts +
         router + norms;
}

LayerParameters count_layer(const Model& model, bool moe) {
  LayerParameters layer;
  layer.attention = count_attention(model.attention, model.hidden);
  layer.norms = 2 * count_norm(model);
  if (model.attention.mla) {
    layer.norms += model.attention.mla->q_lora_rank + model.attention.mla->kv_lora_rank;
  }
  if (model.attention.qk_norm) layer.norms += 2 * model.attention.head_dim;
  if (!moe) {
    layer.dense_feed_forward = count_feed_forward(model, model.intermediate);
    return layer;
  }
  ORRERY_CHECK(model.moe.has_value(), "an MoE layer of {}, which has no experts", model.name);
  const Moe& experts = *model.moe;
  layer.one_expert = count_feed_forward(model, experts.expert_intermediate);
  layer.routed_experts = experts.routed_experts * layer.one_expert;
  if (experts.shared_experts > 0) {
    layer.shared_experts = count_feed_forward(model, experts.shared_intermediate);
  }
  layer.router = model.hidden * experts.routed_experts;
  if (experts.router_bias) layer.router += experts.routed_experts;
  if (experts.shared_gate) layer.router += model.hidden;
  return layer;
}

std::int64_t count_mtp_module(const Model& model) {
  const std::int64_t projection = 2 * model.hidden * model.hidden;
  return count_layer(model, model.moe.has_value()).total() + projection + 3 * count_norm(model);
}

std::int64_t count_indexer(const Model& model) {
  if (!model.attention.mla || !model.attention.mla->indexer) return 0;
  const Mla& mla = *model.attention.mla;
  const Indexer& indexer = *mla.indexer;
  const std::int64_t query_in = mla.q_lora_rank > 0 ? mla.q_lora_rank : model.hidden;
  return query_in * indexer.heads * indexer.head_dim + model.hidden * indexer.head_dim +
         2 * indexer.head_dim + model.hidden * indexer.heads;
}

ParameterCount count_parameters(const Model& model) {
  ParameterCount count;
  count.embedding = model.vocabulary * model.hidden;
  if (!model.tied_embeddings) count.head = count.embedding;
  if (model.learned_positions) count.embedding += model.max_positions * model.hidden;
  count.norms = count_norm(model);
  const auto add = [&](const LayerParameters& layer, std::int64_t times) {
    count.attention += times * layer.attention;
    count.dense_feed_forward += times * layer.dense_feed_forward;
    count.routed_experts += times * layer.routed_experts;
    count.shared_experts += times * layer.shared_experts;
    count.router += times * layer.router;
    count.norms += times * layer.norms;
  };
  const std::int64_t moe_layers = model.moe_layers();
  if (moe_layers > 0) add(count_layer(model, true), moe_layers);
  if (moe_layers < model.layers) add(count_layer(model, false), model.layers - moe_layers);
  if (model.mtp_modules > 0) count.mtp = model.mtp_modules * count_mtp_module(model);
  return count;
}

ActiveParameters count_active_parameters(const Model& model) {
  const ParameterCount all = count_parameters(model);
  const std::int64_t head = model.vocabulary * model.hidden;
  std::int64_t idle = 0;
  if (model.moe) {
    const std::int64_t unused = model.moe->routed_experts - model.moe->top_k;
    idle = model.moe_layers() * unused * count_layer(model, true).one_expert;
  }
  ActiveParameters active;
  active.body = all.total() - all.embedding - all.head - idle;
  active.with_head = active.body + head;
  active.with_head_and_embedding = active.body + all.head + all.embedding;
  return active;
}

FlopsPerToken training_flops_per_token(const Model& model, std::int64_t sequence_length) {
  const auto real = [](std::int64_t value) { return static_cast<double>(value); };
  const double matrices = 6.0 * real(count_active_parameters(model).with_head);
  const double widths =
      real(model.attention.heads * (model.attention.d_qk() + model.attention.d_v()));
  const double attention = 3.0 * real(model.layers) * 2.0 * widths * real(sequence_length);
  return {matrices + attention / 2.0, matrices + attention};
}

}  // namespace orrery
