#pragma once
// Generating tokens with a model: prefill (many new tokens of a prompt at once) and decode (one new
// token of each sequence in a step, or a few with speculation), on the same kernels, exchanges and
// prices as a training step.
//
//   serving plan + step   ──generation_layer──►  work items of a layer
//   (models/generation_layer.hpp) work items            ──generation_program►  Program of one
//   forward pass on one GPU Program + prices      ──sweep──►             time of the step, and what
//   it waits for
//
// A *replica* of attention is tp GPUs that hold some sequences together; the dp replicas of an
// instance are alike, so that one stands for all. Its experts lie over ep of the tp * dp GPUs.

#include <cstdint>
#include <map>
#include <string_view>
#include <utility>

#include "models/model.hpp"
#include "sim/cluster.hpp"
#include "sim/price.hpp"
#include "sim/profile.hpp"
#include "sim/program.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// Which kernels exchange tokens with experts on other GPUs (DeepEP's two kinds).
enum class ExchangeMode : std::uint8_t {
  normal,       ///< high throughput, over NVLink behind one NIC per node, holds SMs
  low_latency,  ///< straight to each expert's GPU; holds no SM while it waits (V3 report 3.4.2)
};
std::string_view name_of(ExchangeMode mode);

/// Draft tokens of MTP modules, verified in one pass with the token before them. Each draft is
/// right with this probability if all before it were (V3 report 5.4.3: 85 to 90 % of the first).
struct Speculation {
  std::int64_t drafts = 0;
  double acceptance = 0;

  /// Mean tokens a sequence gains in a step: 1 + p + p^2 + ... (drafts + 1 terms).
  double tokens_per_step() const;
  friend bool operator==(const Speculation&, const Speculation&) = default;
};

/// How a model is laid out over an instance's GPUs and run.
struct ServingPlan {
  std::int64_t tp = 1;  ///< of attention, dense feed-forward and head
  std::int64_t dp = 1;  ///< replicas of attention
  std::int64_t ep = 1;  ///< GPUs one copy of the experts lies over; 1: split over tp like the rest
  std::int64_t redundant_experts = 0;          ///< copies of busy experts, on top of the model's
  NumberFormat linear = NumberFormat::bf16;    ///< operands of linear layers, and their weights
  NumberFormat cache = NumberFormat::bf16;     ///< keys and values, or latents
  NumberFormat dispatch = NumberFormat::bf16;  ///< tokens on their way to experts
  ExchangeMode decode_exchange = ExchangeMode::normal;  ///< prompts always go by the normal one
  int communication_sms = 0;       ///< that normal exchanges hold while they overlap computation
  std::int64_t micro_batches = 1;  ///< 2: one's exchanges behind the other's computation (3.4)
  double busiest = 1;              ///< rows of the busiest GPU's experts over the mean
  double usable_memory = 0.9;      ///< share of the device's memory for weights, cache and buffers
  Speculation speculation;

  std::int64_t gpus() const { return tp * dp; }
  ExchangeMode exchange(bool prefill) const {
    return prefill ? ExchangeMode::normal : decode_exchange;
  }
  friend bool operator==(const ServingPlan&, const ServingPlan&) = default;
};

/// Everything about an instance that generates.
struct Instance {
  Model model;
  Cluster cluster;
  Profile profile;
  ServingPlan plan;
};

/// One forward pass of a replica: `sequences` of them, `new_tokens` each, after `context` tokens
/// that are in the cache already. `prefill`: the new tokens are a prompt's and see each other
/// causally; only the last one's logits are computed. Otherwise a decode step of `new_tokens` = 1 +
/// drafts.
struct GenerationStep {
  bool prefill = false;
  std::int64_t sequences = 1;
  std::int64_t new_tokens = 1;
  std::int64_t context = 0;
};

/// What limits a step.
enum class GenerationLimit : std::uint8_t { memory_bandwidth, compute, exchange, launches };
std::string_view name_of(GenerationLimit limit);

/// Time of one step on one GPU. The parts are sums of op times; overlap and waiting are what is
/// between them and `seconds`.
struct StepCost {
  double seconds = 0;
  double attention_s = 0;  ///< attention blocks with their projections
  double core_s = 0;       ///< of these the attention over cache or prompt itself, and its indexer
  double feed_forward_s = 0;  ///< dense, shared and routed experts, and what packs their rows
  double edges_s = 0;         ///< embedding, head, sampling
  double draft_s = 0;         ///< all of the MTP modules' drafts, exchanges excepted
  double exchange_s = 0;      ///< dispatch and combine
  double tensor_s = 0;        ///< tensor-parallel collectives
  double exposed_s = 0;       ///< of the step: no kernel computes
  /// The kernels' time by what they need most of at the device's peak rates, bytes or FLOPs, or, where
  /// neither takes a quarter of the time, by launches and what else keeps small kernels from the peak.
  double memory_bound_s = 0;
  double compute_bound_s = 0;
  double launch_bound_s = 0;
  double flops = 0;         ///< of one GPU
  double bytes = 0;         ///< that its kernels must touch
  double spread = 0;        ///< relative error known for the prices, weighted by time
  GenerationLimit limit{};  ///< the largest of the three and of exposed_s
};
StepCost step_cost(const Instance& instance, const GenerationStep& step);

/// The Program that step_cost times: one rank, all layers, one chain a micro-batch.
Program generation_program(const Instance& instance, const GenerationStep& step);

/// What a GPU holds. The cache is of one token: its part of the keys and values of all layers (and
/// of the MTP modules that draft), which every tensor-parallel rank has whole with latent
/// attention.
struct ServingMemory {
  double weights_bytes = 0;
  double buffer_bytes = 0;  ///< of low-latency exchanges, and activations of the largest step
  double cache_bytes_per_token = 0;
  double usable_bytes = 0;

  double left_for_cache() const { return usable_bytes - weights_bytes - buffer_bytes; }
  /// Sequences of a replica that fit with so many tokens each; 0 where not even one does.
  std::int64_t sequences(double tokens_each) const;
};
/// New tokens of a replica in its largest steps.
struct LargestSteps {
  std::int64_t prefill_tokens = 0;
  std::int64_t decode_tokens = 1;
};
ServingMemory serving_memory(const Instance& instance, const LargestSteps& steps);
/// The most sequences of so many tokens each that a replica can decode at once beside prefill steps
/// of `prefill_tokens`: the buffers of a decode step grow with it too.
std::int64_t most_sequences(const Instance& instance, double tokens_each,
                            std::int64_t prefill_tokens);

/// Cached bytes of a token in one layer (an indexer's key included, which is in FP8 with a scale),
/// and in all layers without MTP modules; of the whole model, not of one tensor-parallel rank.
double cache_bytes_per_layer(const Model& model, NumberFormat format);
double cache_bytes_per_token(const Model& model, NumberFormat format);

/// The time of a decode step by sequences and context, computed where it is first asked for: on a
/// grid of both in steps of a quarter of an octave, linear between its points. For studies of many
/// steps. Outlived by the instance.
class DecodeTimes {
 public:
  explicit DecodeTimes(const Instance& instance) : instance_(instance) {}
  /// `sequences` of a replica (at least 1) and their mean context; both may lie between whole
  /// numbers.
  double seconds(double sequences, double context);

 private:
  double at(std::int64_t sequences, std::int64_t context);
  const Instance& instance_;
  std::map<std::pair<std::int64_t, std::int64_t>, double> known_;
};

}  // namespace orrery
