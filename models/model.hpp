#pragma once
// A model as the simulator needs it: dimensions, and which block each layer is made of.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sim/config.hpp"

namespace orrery {

/// Which cached tokens a query attends to (DeepSeek-V3.2-Exp's lightning indexer): `heads` small
/// queries against one key of head_dim a token, summed with a weight a head; the top_k of the scores.
struct Indexer {
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t top_k = 0;

  friend bool operator==(const Indexer&, const Indexer&) = default;
};

/// Multi-head latent attention (DeepSeek-V2 paper 2.1). q_lora_rank = 0: queries are projected
/// directly (V2-Lite). No biases; the two latent vectors pass a norm each.
struct Mla {
  std::int64_t q_lora_rank = 0;
  std::int64_t kv_lora_rank = 0;
  std::int64_t qk_nope_head_dim = 0;
  std::int64_t qk_rope_head_dim = 0;
  std::int64_t v_head_dim = 0;
  /// Generation uses it; a training step is modelled with full attention, and counts of parameters
  /// are without it (count_indexer).
  std::optional<Indexer> indexer{};

  friend bool operator==(const Mla&, const Mla&) = default;
};

/// heads query heads; without MLA, kv_heads key-value heads of head_dim (kv_heads = heads:
/// multi-head). With MLA, kv_heads = heads and head_dim = 0.
struct Attention {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;  ///< unused with MLA
  bool qkv_bias = false;
  bool output_bias = false;
  bool qk_norm = false;  ///< RMSNorm over head_dim on queries and keys (Qwen3)
  std::optional<Mla> mla;

  std::int64_t d_qk() const {
    return mla ? mla->qk_nope_head_dim + mla->qk_rope_head_dim : head_dim;
  }
  std::int64_t d_v() const { return mla ? mla->v_head_dim : head_dim; }

  friend bool operator==(const Attention&, const Attention&) = default;
};

enum class Activation : std::uint8_t { swiglu, gelu };

struct Moe {
  std::int64_t routed_experts = 0;
  std::int64_t top_k = 0;
  std::int64_t expert_intermediate = 0;
  std::int64_t shared_experts = 0;       ///< fused into one FFN of shared_intermediate
  std::int64_t shared_intermediate = 0;  ///< total, all shared experts
  std::int64_t groups = 1;               ///< group-limited routing: experts come in groups,
  std::int64_t group_limit = 1;  ///< of which at most this many are chosen (= groups: no limit)
  bool sigmoid_scores = false;
  bool router_bias = false;  ///< a bias per expert for selection (aux-loss-free balancing)
  bool shared_gate = false;  ///< a learned scalar gate on the shared experts (Qwen2-MoE)

  friend bool operator==(const Moe&, const Moe&) = default;
};

enum class Norm : std::uint8_t { rms, layer };

struct Model {
  std::string name;
  std::string source;  ///< citation of the dimensions
  std::int64_t hidden = 0;
  std::int64_t vocabulary = 0;
  std::int64_t layers = 0;
  std::int64_t max_positions = 0;
  Norm norm = Norm::rms;
  bool norm_bias = false;
  bool tied_embeddings = false;
  bool learned_positions = false;  ///< an embedding per position (GPT-3) instead of rotary ones
  Attention attention;
  Activation activation = Activation::swiglu;
  bool feed_forward_bias = false;
  std::int64_t intermediate = 0;  ///< of dense feed-forward layers; 0 if there are none
  std::optional<Moe> moe;
  std::vector<bool> layer_is_moe;  ///< size layers
  std::int64_t mtp_modules = 0;    ///< multi-token prediction depth (V3 report 2.2), one block each

  bool is_moe(std::int64_t layer) const { return layer_is_moe[static_cast<std::size_t>(layer)]; }
  std::int64_t moe_layers() const;  ///< of `layers`, without MTP modules

  friend bool operator==(const Model&, const Model&) = default;
};

/// Reads a model: our YAML (scenarios/models), or a Hugging Face config.json as it is (recognised
/// by `model_type` or `architectures`). In our YAML an unknown key is a problem; in a config.json
/// it becomes a note "not used: ...", and one that changes the computation in a way that is not
/// modelled a note "ignored: ...". Impossible and absurd dimensions are problems; without problems
/// every count below fits its type (at most kMaxParameters). With problems the Model is not to be
/// used.
Model read_model(const Node& node, Problems& problems, std::vector<std::string>* notes = nullptr);

/// The model in our YAML; read_model of it gives an equal Model.
std::string to_yaml(const Model& model);

/// 9e15: bytes of weights, gradients and optimizer state together still fit int64.
inline constexpr double kMaxParameters = 9e15;

/// Parameters by kind. MTP modules share embedding and head (V3 report 2.2).
struct ParameterCount {
  std::int64_t embedding = 0;  ///< with learned positions, if any
  std::int64_t head = 0;       ///< 0 if tied
  std::int64_t attention = 0;  ///< all layers
  std::int64_t dense_feed_forward = 0;
  std::int64_t routed_experts = 0;
  std::int64_t shared_experts = 0;
  std::int64_t router = 0;
  std::int64_t norms = 0;
  std::int64_t mtp = 0;  ///< unique to MTP modules; not in total()

  std::int64_t total() const;  ///< without MTP, as model cards count
};
ParameterCount count_parameters(const Model& model);

/// Parameters that touch a token: experts count top_k of routed_experts. The published counts
/// differ in whether embedding and head are in.
struct ActiveParameters {
  std::int64_t body = 0;       ///< layers and final norm
  std::int64_t with_head = 0;  ///< V3: 36.625 B; a tied head counts here, since it is multiplied
  std::int64_t with_head_and_embedding = 0;  ///< a tied matrix counts once
};
ActiveParameters count_active_parameters(const Model& model);

/// Parameters of one transformer layer, by its parts, as a dense or as an MoE layer. V3: attention
/// 187.1 M, dense 396.4 M, one expert 44.04 M, router 1.835 M.
struct LayerParameters {
  std::int64_t attention = 0;  ///< projections and their biases
  std::int64_t norms = 0;      ///< of block, MLA latents and queries and keys
  std::int64_t dense_feed_forward = 0;
  std::int64_t shared_experts = 0;
  std::int64_t router = 0;  ///< with its selection bias and the shared experts' gate
  std::int64_t one_expert = 0;
  std::int64_t routed_experts = 0;  ///< all of them

  std::int64_t total() const;  ///< one_expert is part of routed_experts
};
LayerParameters count_layer(const Model& model,
                            bool moe);  ///< moe only where the model has experts

/// Parameters of one MTP module that it does not share with the model: a block (MoE if the model
/// has experts), the projection of [hidden; embedding] to hidden, and three norms (its two inputs
/// and before the shared head; V3 report 2.2 and the checkpoint's layer 61). V3: 11.61 B.
std::int64_t count_mtp_module(const Model& model);

/// Parameters of one layer's indexer, 0 without: queries from their latent (or the hidden state),
/// key, its norm (LayerNorm), weights of the heads. V3.2-Exp: 13.96 M.
std::int64_t count_indexer(const Model& model);

/// Training FLOPs per token by the published convention: 6 x active parameters with head, without
/// embedding, plus attention 3 x layers x 2 x heads x (d_qk + d_v) x S/2 (causal) or S
/// (non-causal). MTP and recomputation are not counted. Reproduces ISCA'25 (arXiv 2505.09343) Table
/// 2: V3 250.4 and V2 155.3 GFLOP at S = 4096.
struct FlopsPerToken {
  double causal = 0;
  double noncausal = 0;
};
FlopsPerToken training_flops_per_token(const Model& model, std::int64_t sequence_length);

}  // namespace orrery
