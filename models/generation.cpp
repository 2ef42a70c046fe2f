#include "models/generation.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "models/generation_layer.hpp"
#include "sim/check.hpp"
#include "sim/gpu_share.hpp"
#include "sim/kernel_prices.hpp"
#include "sim/timeline.hpp"

namespace orrery {
namespace {

double real(std::int64_t value) {
  return static_cast<double>(value);
}

// ---- the Program of a step

/// A chain of kernels of one phase.
struct Segment {
  Work work;
  Phase phase{};
  std::uint16_t layer = kNoLayer;
};

/// What lies between two hand-overs to the other micro-batch: computation, then its exchange.
struct Turn {
  std::vector<Segment> compute;
  Segment exchange;
};

std::vector<Turn> turns_of(const Instance& instance, const GenerationBatch& batch) {
  const Model& model = instance.model;
  std::vector<Turn> turns;
  Turn open{.compute = {{generation_embedding(instance, batch), Phase::embedding_forward}},
            .exchange = {}};
  const auto add_layer = [&](const GenerationLayer& layer, std::int64_t index) {
    const auto l = static_cast<std::uint16_t>(index);
    open.compute.push_back({layer.attention, Phase::attn_forward, l});
    if (!layer.dispatch.empty()) {
      open.exchange = {layer.dispatch, Phase::dispatch_forward, l};
      turns.push_back(std::exchange(open, {}));
    }
    open.compute.push_back({layer.mlp, Phase::mlp_forward, l});
    open.exchange = {layer.combine, Phase::combine_forward, l};
    turns.push_back(std::exchange(open, {}));
  };
  std::array<std::optional<GenerationLayer>, 2> layers;  // alike but for their experts
  const auto layer_of = [&](const GenerationBatch& of, bool moe) {
    if (!layers[moe ? 1 : 0]) layers[moe ? 1 : 0] = generation_layer(instance, of, moe);
    return *layers[moe ? 1 : 0];
  };
  for (std::int64_t l = 0; l < model.layers; ++l) {
    add_layer(layer_of(batch, model.is_moe(l)), l);
  }
  open.compute.push_back({generation_head(instance, batch), Phase::head_forward});
  // Drafts, one after the other by the same module; the first pass takes all tokens of the step, so
  // that their keys are cached. A prompt is only passed through.
  const std::int64_t drafts = instance.plan.speculation.drafts;
  for (std::int64_t d = 0; d < (batch.prefill ? std::min<std::int64_t>(drafts, 1) : drafts); ++d) {
    GenerationBatch draft = batch;
    if (d > 0) draft.new_tokens = 1;
    open.compute.push_back({generation_mtp_front(instance, draft), Phase::attn_forward,
                            static_cast<std::uint16_t>(model.layers)});
    add_layer(d == 0 ? layer_of(draft, model.moe.has_value())
                     : generation_layer(instance, draft, model.moe.has_value()),
              model.layers);
    if (!batch.prefill) {
      GenerationBatch last = draft;
      last.new_tokens = 1;
      open.compute.push_back({generation_head(instance, last), Phase::head_forward,
                              static_cast<std::uint16_t>(model.layers)});
    }
  }
  if (!open.compute.empty()) turns.push_back(std::move(open));
  return turns;
}

std::vector<GenerationBatch> micro_batches(const Instance& instance, const GenerationStep& step) {
  const std::int64_t parts = std::min(instance.plan.micro_batches, step.sequences);
  std::vector<GenerationBatch> batches;
  for (std::int64_t i = 0; i < parts; ++i) {
    batches.push_back({.prefill = step.prefill,
                       .sequences = step.sequences / parts + (i < step.sequences % parts ? 1 : 0),
                       .new_tokens = step.new_tokens,
                       .context = step.context});
  }
  return batches;
}

/// Appends work to the chain that ends at `last`.
class Stamper {
 public:
  Stamper(ProgramBuilder& builder, int compute_sms, int exchange_sms)
      : builder_(builder), compute_sms_(compute_sms), exchange_sms_(exchange_sms) {}

  void append(const Segment& segment, std::uint16_t micro_batch, std::optional<OpId>& last) {
    const OpTag tag{.micro_batch = micro_batch, .layer = segment.layer, .phase = segment.phase};
    for (const WorkItem& item : segment.work) {
      Shape shape = item.shape;
      if (item.stream == StreamKind::compute) shape.sms = compute_sms_;
      if (item.stream == StreamKind::expert_exchange) shape.sms = exchange_sms_;
      const StreamId streams[] = {stream_of(RankId(0), item.stream)};
      const OpKind kind = item.stream == StreamKind::compute ? OpKind::compute : OpKind::collective;
      const auto before = last ? std::span<const OpId>(&*last, 1) : std::span<const OpId>();
      last = builder_.add(kind, builder_.intern(shape), tag, streams, before);
    }
  }

 private:
  ProgramBuilder& builder_;
  int compute_sms_;
  int exchange_sms_;
};

bool over_network(const Instance& instance) {
  return instance.model.moe && instance.plan.ep > 1;
}

// ---- memory

/// Bytes of a weight of a linear layer: in FP8 blocks it has a scale per 128 x 128.
double weight_bytes(NumberFormat format) {
  return format == NumberFormat::fp8_block ? 1 + 4.0 / (128 * 128) : bytes_per_element(format);
}

/// Bytes of the parameters of one layer on one GPU.
double layer_bytes(const Instance& instance, bool moe) {
  const Model& model = instance.model;
  const ServingPlan& plan = instance.plan;
  const Attention& a = model.attention;
  const double linear = weight_bytes(plan.linear);
  const double hidden = real(model.hidden);
  const double heads = real(a.heads / plan.tp);
  const LayerParameters p = count_layer(model, moe);
  double bytes = 2 * real(p.norms + p.router + count_indexer(model));
  if (a.mla) {
    const Mla& m = *a.mla;
    const double d_qk = real(m.qk_nope_head_dim + m.qk_rope_head_dim);
    const double query_in = m.q_lora_rank > 0 ? real(m.q_lora_rank) : hidden;
    bytes += linear * (hidden * real(m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim) +
                       query_in * heads * d_qk + heads * real(m.v_head_dim) * hidden);
    // The key and value up-projections are batched products in BF16 once absorbed.
    bytes += 2 * real(m.kv_lora_rank) * heads * real(m.qk_nope_head_dim + m.v_head_dim);
  } else {
    const double kv_heads = real(std::max<std::int64_t>(1, a.kv_heads / plan.tp));
    bytes += linear * hidden * real(a.head_dim) * (2 * heads + 2 * kv_heads);
  }
  bytes += linear * real(p.dense_feed_forward) / real(plan.tp);
  const bool apart = plan.ep > 1;
  bytes += linear * real(p.shared_experts) / real(apart ? 1 : plan.tp);
  if (moe) {
    const double copies = real(model.moe->routed_experts + plan.redundant_experts);
    bytes += linear * copies * real(p.one_expert) / real(apart ? plan.ep : plan.tp);
  }
  return bytes;
}

/// DeepEP's low-latency buffers, csrc/config.hpp: for two calls in flight, what can be sent and
/// received of every expert if all tokens go there, in the larger of both directions' messages.
double low_latency_buffer_bytes(double tokens, double hidden, double experts) {
  const double dispatch = 16 + 2 * hidden;
  const double combine = 2 * hidden + 4 * hidden / 128;
  const double send = std::max(tokens * dispatch, experts * tokens * combine);
  const double receive = experts * tokens * std::max(dispatch, combine);
  return 2 * (send + receive);
}

/// Queries, keys, values and outputs of one layer in BF16, or its experts' rows in and between
/// their two products, whichever is more, beside the residual stream.
double activation_bytes(const Instance& instance, double tokens) {
  const Model& model = instance.model;
  const ServingPlan& plan = instance.plan;
  const double attention = tokens * real(model.attention.heads / plan.tp) *
                           real(2 * model.attention.d_qk() + 2 * model.attention.d_v());
  const double up = model.activation == Activation::swiglu ? 2 : 1;
  double feed_forward = tokens * up * real(model.intermediate) / real(plan.tp);
  if (model.moe) {
    const double rows = tokens * real(model.moe->top_k) * plan.busiest / real(plan.tp);
    feed_forward = std::max(
        feed_forward, rows * (real(model.hidden) + up * real(model.moe->expert_intermediate)));
  }
  return 2 * (2 * tokens * real(model.hidden) + std::max(attention, feed_forward));
}

}  // namespace

std::string_view name_of(ExchangeMode mode) {
  return mode == ExchangeMode::normal ? "normal" : "low_latency";
}

std::string_view name_of(GenerationLimit limit) {
  switch (limit) {
    case GenerationLimit::memory_bandwidth:
      return "memory bandwidth";
    case GenerationLimit::compute:
      return "compute";
    case GenerationLimit::exchange:
      return "exchange";
    case GenerationLimit::launches:
      return "launches";
  }
  return "?";
}

double Speculation::tokens_per_step() const {
  double tokens = 1;
  double right = 1;
  for (std::int64_t d = 0; d < drafts; ++d) {
    right *= acceptance;
    tokens += right;
  }
  return tokens;
}

Program generation_program(const Instance& instance, const GenerationStep& step) {
  ORRERY_CHECK(step.sequences >= 1 && step.new_tokens >= 1, "{} sequences of {} tokens",
               step.sequences, step.new_tokens);
  const ServingPlan& plan = instance.plan;
  const std::vector<GenerationBatch> batches = micro_batches(instance, step);
  // Normal exchanges hold SMs, which computation beside them lacks.
  const bool normal = plan.exchange(step.prefill) == ExchangeMode::normal;
  const int exchange_sms = over_network(instance) && normal ? plan.communication_sms : 0;
  const int compute_sms =
      exchange_sms > 0 && batches.size() > 1 ? instance.profile.device.sms - exchange_sms : 0;
  ProgramBuilder builder({plan.gpus()});
  Stamper stamper(builder, compute_sms, exchange_sms);
  std::vector<std::vector<Turn>> turns;
  for (const GenerationBatch& batch : batches) turns.push_back(turns_of(instance, batch));
  std::vector<std::optional<OpId>> last(batches.size());
  for (std::size_t t = 0; t < turns.front().size(); ++t) {
    for (std::size_t b = 0; b < batches.size(); ++b) {
      const auto micro_batch = static_cast<std::uint16_t>(b);
      for (const Segment& s : turns[b][t].compute) stamper.append(s, micro_batch, last[b]);
      stamper.append(turns[b][t].exchange, micro_batch, last[b]);
    }
  }
  return std::move(builder).seal();
}

StepCost step_cost(const Instance& instance, const GenerationStep& step) {
  const Program program = generation_program(instance, step);
  const PriceList list = price_all(program, instance.profile, instance.cluster);
  // Exchanges beside computation take memory bandwidth from it.
  const IdVector<ShapeId, GpuShare> shares =
      gpu_shares(program, list, instance.profile, instance.cluster);
  const Timeline timeline = simulate(program, list, {.shares = &shares});
  const Device& device = instance.profile.device;
  StepCost cost;
  cost.seconds = seconds(timeline.makespan_ps());
  double computing = 0;
  double spread_s = 0;
  double priced_s = 0;
  for (OpId op; op.value < program.size(); ++op.value) {
    const Price& price = list.prices[program.shape(op)];
    const Shape& shape = program.shapes()[program.shape(op)];
    const double s = seconds(timeline.end_ps[op] - timeline.start_ps[op]);
    spread_s += price.spread * s;
    priced_s += s;
    const StreamKind stream = kind_of(program.streams_of(op)[0]);
    if (stream == StreamKind::expert_exchange) cost.exchange_s += s;
    if (stream == StreamKind::tensor) cost.tensor_s += s;
    if (stream != StreamKind::compute) continue;
    computing += s;
    const OpTag& tag = program.tag(op);
    if (tag.layer == instance.model.layers) {
      cost.draft_s += s;
    } else if (tag.phase == Phase::attn_forward) {
      cost.attention_s += s;
      if (is_attention_core(shape)) cost.core_s += s;
    } else if (tag.phase == Phase::mlp_forward) {
      cost.feed_forward_s += s;
    } else {
      cost.edges_s += s;
    }
    const double flops = flops_of(shape);
    const double bytes = bytes_of(shape);
    cost.flops += flops;
    cost.bytes += bytes;
    NumberFormat format = NumberFormat::bf16;
    if (const auto* g = std::get_if<Gemm>(&shape.work)) format = g->inputs;
    if (const auto* a = std::get_if<AttentionCore>(&shape.work)) format = a->inputs;
    if (const auto* a = std::get_if<CachedAttention>(&shape.work)) format = a->inputs;
    const double memory_s = bytes / device.memory_bytes_per_s;
    const double compute_s = flops / peak_flops_per_s(format, device);
    if (std::max(memory_s, compute_s) < s / 4) {
      cost.launch_bound_s += s;
    } else {
      (memory_s >= compute_s ? cost.memory_bound_s : cost.compute_bound_s) += s;
    }
  }
  cost.exposed_s = std::max(0.0, cost.seconds - computing);
  cost.spread = priced_s > 0 ? spread_s / priced_s : 0;
  const std::pair<double, GenerationLimit> parts[] = {
      {cost.memory_bound_s, GenerationLimit::memory_bandwidth},
      {cost.compute_bound_s, GenerationLimit::compute},
      {cost.exposed_s, GenerationLimit::exchange},
      {cost.launch_bound_s, GenerationLimit::launches}};
  cost.limit =
      std::max_element(std::begin(parts), std::end(parts), [](const auto& a, const auto& b) {
        return a.first < b.first;
      })->second;
  return cost;
}

double cache_bytes_per_layer(const Model& model, NumberFormat format) {
  const Attention& a = model.attention;
  CachedAttention row{
      .cache = format, .kv_heads = a.kv_heads, .d_qk = a.head_dim, .d_v = a.head_dim};
  if (!a.mla) return cached_row_bytes(row);
  row.latent = true;
  row.d_qk = a.mla->kv_lora_rank + a.mla->qk_rope_head_dim;
  row.d_v = a.mla->kv_lora_rank;
  const double index =
      a.mla->indexer ? real(a.mla->indexer->head_dim) * bytes_per_element(NumberFormat::fp8_block)
                     : 0;
  return cached_row_bytes(row) + index;
}

double cache_bytes_per_token(const Model& model, NumberFormat format) {
  return real(model.layers) * cache_bytes_per_layer(model, format);
}

std::int64_t ServingMemory::sequences(double tokens_each) const {
  const double each = cache_bytes_per_token * tokens_each;
  if (left_for_cache() <= 0) return 0;
  ORRERY_CHECK(each > 0, "a sequence of {} tokens", tokens_each);
  return static_cast<std::int64_t>(std::min(1e9, std::floor(left_for_cache() / each)));
}

ServingMemory serving_memory(const Instance& instance, const LargestSteps& steps) {
  const Model& model = instance.model;
  const ServingPlan& plan = instance.plan;
  ServingMemory memory;
  memory.usable_bytes = plan.usable_memory * instance.profile.device.memory_bytes;
  const std::int64_t modules = plan.speculation.drafts > 0 ? model.mtp_modules : 0;
  const double hidden = real(model.hidden);
  for (const bool moe : {false, true}) {
    const std::int64_t layers = moe ? model.moe_layers() : model.layers - model.moe_layers();
    const std::int64_t of_mtp = moe == model.moe.has_value() ? modules : 0;
    if (layers + of_mtp > 0)
      memory.weights_bytes += real(layers + of_mtp) * layer_bytes(instance, moe);
  }
  memory.weights_bytes += real(modules) * weight_bytes(plan.linear) * 2 * hidden * hidden;
  const ParameterCount count = count_parameters(model);
  memory.weights_bytes += 2 * real(count.embedding + count.head) / real(plan.tp);

  const double parts = real(plan.micro_batches);
  memory.buffer_bytes =
      activation_bytes(instance, real(std::max(steps.prefill_tokens, steps.decode_tokens)) / parts);
  if (over_network(instance) && plan.decode_exchange == ExchangeMode::low_latency) {
    const double each = std::ceil(real(steps.decode_tokens) / parts / real(plan.tp));
    memory.buffer_bytes += low_latency_buffer_bytes(
        each, hidden, real(model.moe->routed_experts + plan.redundant_experts));
  }
  double layer = cache_bytes_per_layer(model, plan.cache);
  if (!model.attention.mla) {
    const std::int64_t kv_heads = std::max<std::int64_t>(1, model.attention.kv_heads / plan.tp);
    layer *= real(kv_heads) / real(model.attention.kv_heads);
  }
  memory.cache_bytes_per_token = real(model.layers + modules) * layer;
  return memory;
}

std::int64_t most_sequences(const Instance& instance, double tokens_each,
                            std::int64_t prefill_tokens) {
  std::int64_t low = 0;  // fits
  std::int64_t high = std::int64_t{1} << 20;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    const ServingMemory memory = serving_memory(
        instance, {.prefill_tokens = prefill_tokens,
                   .decode_tokens = middle * (1 + instance.plan.speculation.drafts)});
    (memory.sequences(tokens_each) >= middle ? low : high) = middle;
  }
  return low;
}

namespace {

/// Whole numbers about a quarter of an octave apart: every one up to 6.
std::int64_t grid_below(double v) {
  if (v < 6) return static_cast<std::int64_t>(std::floor(v));
  const double step = std::floor(4 * std::log2(v) + 1e-9);
  return std::llround(std::exp2(step / 4));
}

std::int64_t grid_above(double v) {
  if (v < 6) return static_cast<std::int64_t>(std::floor(v)) + 1;
  const double step = std::floor(4 * std::log2(v) + 1e-9);
  return std::llround(std::exp2((step + 1) / 4));
}

}  // namespace

double DecodeTimes::at(std::int64_t sequences, std::int64_t context) {
  const auto [found, fresh] = known_.try_emplace({sequences, context}, 0.0);
  if (fresh) {
    found->second = step_cost(instance_, {.sequences = sequences,
                                          .new_tokens = 1 + instance_.plan.speculation.drafts,
                                          .context = context})
                        .seconds;
  }
  return found->second;
}

double DecodeTimes::seconds(double sequences, double context) {
  ORRERY_CHECK(sequences >= 1 && context >= 0, "{} sequences, context {}", sequences, context);
  const std::int64_t s0 = grid_below(sequences);
  const std::int64_t s1 = grid_above(sequences);
  const std::int64_t c0 = grid_below(context);
  const std::int64_t c1 = grid_above(context);
  const auto between = [](std::int64_t low, std::int64_t high, double v) {
    return std::clamp((v - real(low)) / real(high - low), 0.0, 1.0);
  };
  const double fs = between(s0, s1, sequences);
  const double fc = between(c0, c1, context);
  const auto along = [&](std::int64_t s) {
    return fc == 0 ? at(s, c0) : (1 - fc) * at(s, c0) + fc * at(s, c1);
  };
  return fs == 0 ? along(s0) : (1 - fs) * along(s0) + fs * along(s1);
}

}  // namespace orrery
