#pragma once
// What a layer does, kernel by kernel: the operations of each block for the forward pass, the
// gradient of the input, the gradient of the weights, and what is recomputed. Which kernels a real
// layer of DeepSeek-V3 runs was read off DeepSeek's published trace (deepseek-ai/profile-data,
// train); how long each takes was not: that is the profile's business.

#include <cstdint>
#include <optional>
#include <vector>

#include "models/layout.hpp"
#include "models/model.hpp"
#include "models/plan.hpp"
#include "sim/program.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// What an operation's size follows.
enum class SizedBy : std::uint8_t {
  plan,             ///< the plan alone
  expert_rows,      ///< also the rows of this GPU's experts
  expert_exchange,  ///< also what the busiest GPU and node of the group get
};

/// One operation in a chain: it starts when the one before it in the chain has ended. `group` says
/// which ranks take part in a collective or an exchange; without it the op is this rank's own.
struct WorkItem {
  Shape shape;
  StreamKind stream = StreamKind::compute;
  std::optional<GroupKind> group;
  SizedBy sized_by = SizedBy::plan;
};
using Work = std::vector<WorkItem>;

/// Bytes a rank keeps from the forward pass until the weight gradient is done, and what is live
/// only while the layer runs.
struct LayerMemory {
  std::int64_t saved_bytes = 0;
  std::int64_t workspace_bytes = 0;
};

/// A transformer layer. The exchange segments are empty in layers without experts.
struct LayerWork {
  Work attn_forward;  ///< norm .. output projection, residual, norm, router
  Work dispatch_forward;
  Work mlp_forward;
  Work combine_forward;
  Work combine_backward;
  Work mlp_backward;  ///< recomputation included
  Work mlp_weight;
  Work dispatch_backward;
  Work attn_backward;  ///< recomputation included
  Work attn_weight;
  LayerMemory memory;
};
/// `expert_load`: rows of this GPU's experts over the mean of its group; its exchanges take it for
/// the busiest of the group. Which operations there are, and in which order, does not depend on it.
LayerWork transformer_layer(const Model& model, const Plan& plan, std::int64_t gpus_per_node,
                            bool moe, double expert_load = 1);

/// Embedding, head (final norm, projection, loss), and the front of an MTP module (two norms,
/// concatenation, projection 2h -> h).
struct EdgeWork {
  Work forward;
  Work backward;
  Work weight;
  LayerMemory memory;
};
EdgeWork embedding_work(const Model& model, const Plan& plan, std::int64_t gpus_per_node);
EdgeWork head_work(const Model& model, const Plan& plan, std::int64_t gpus_per_node);
EdgeWork mtp_front_work(const Model& model, const Plan& plan, std::int64_t gpus_per_node);

/// Parameters of one layer resident on one rank.
struct LayerShard {
  std::int64_t dense = 0;
  std::int64_t expert = 0;
  /// Of dense: held whole by every tensor-parallel rank, each of which has a part of the gradient's
  /// sum (Megatron-LM reduces these apart: finalize_model_grads). Norms, router and latent
  /// down-projections under sequence parallelism.
  std::int64_t tensor_summed = 0;
};
LayerShard layer_shard(const Model& model, const Plan& plan, bool moe);
LayerShard embedding_shard(const Model& model, const Plan& plan);
LayerShard head_shard(const Model& model, const Plan& plan);  ///< a tied head: the embedding's copy
LayerShard mtp_front_shard(const Model& model, const Plan& plan);

}  // namespace orrery
