#include "models/hugging_face.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <utility>

#include "models/model_limits.hpp"

namespace orrery {
namespace {

enum class Form { gpt2, gpt_neox, llama, mixtral, qwen_moe, deepseek };

/// What a family's code fixes and its config.json does not say.
struct Fixed {
  bool mla = false;
  bool qkv_bias = false;
  bool qk_norm = false;      ///< RMSNorm on queries and keys
  bool shared_gate = false;  ///< a scalar gate on the shared expert
  bool aux_free = false;     ///< sigmoid scores and a selection bias where no key says otherwise
};

struct Family {
  std::string_view model_type;
  std::string_view architecture;
  Form form{};
  Fixed fixed{};
};

// clang-format off
constexpr Family kFamilies[] = {
    {"deepseek", "DeepseekForCausalLM", Form::deepseek},
    {"deepseek_v2", "DeepseekV2ForCausalLM", Form::deepseek, {.mla = true}},
    {"deepseek_v3", "DeepseekV3ForCausalLM", Form::deepseek, {.mla = true, .aux_free = true}},
    {"deepseek_v32", "DeepseekV32ForCausalLM", Form::deepseek, {.mla = true, .aux_free = true}},
    {"kimi_k2", "DeepseekV3ForCausalLM", Form::deepseek, {.mla = true, .aux_free = true}},
    {"llama", "LlamaForCausalLM", Form::llama},
    {"mistral", "MistralForCausalLM", Form::llama},
    {"mixtral", "MixtralForCausalLM", Form::mixtral},
    {"qwen2", "Qwen2ForCausalLM", Form::llama, {.qkv_bias = true}},
    {"qwen2_moe", "Qwen2MoeForCausalLM", Form::qwen_moe, {.qkv_bias = true, .shared_gate = true}},
    {"qwen3", "Qwen3ForCausalLM", Form::llama, {.qk_norm = true}},
    {"qwen3_moe", "Qwen3MoeForCausalLM", Form::qwen_moe, {.qk_norm = true}},
    {"gpt2", "GPT2LMHeadModel", Form::gpt2},
    {"gpt_neox", "GPTNeoXForCausalLM", Form::gpt_neox},
};
// clang-format on

/// Keys that change neither the sizes nor the operations counted here: numerics, initial values,
/// dropout, text generation, positions' angles, losses, and what the file was written by.
// clang-format off
constexpr std::string_view kWithoutEffect[] = {
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map",
    "aux_loss_alpha", "bad_words_ids", "bos_token_id", "classifier_dropout", "dtype", "embd_pdrop",
    "eos_token_id", "ep_size", "hidden_dropout", "initializer_range", "is_decoder",
    "layer_norm_eps", "layer_norm_epsilon", "max_window_layers", "model_type", "n_ctx",
    "norm_topk_prob", "output_router_logits", "pad_token_id", "partial_rotary_factor",
    "pretraining_tp", "reorder_and_upcast_attn", "resid_pdrop", "rms_norm_eps", "rope_interleave",
    "rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct",
    "routed_scaling_factor", "router_aux_loss_coef", "router_jitter_noise",
    "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "seq_aux", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "torch_dtype", "transformers_version", "use_cache", "use_mrope",
};
// clang-format on

/// Keys that change the computation in ways that are not modelled.
struct Ignored {
  std::string_view key;
  std::string_view why;
};
constexpr std::string_view kSparse = "sparse attention is modelled as full attention";
constexpr Ignored kIgnored[] = {
    {"index_n_heads", kSparse},
    {"index_head_dim", kSparse},
    {"index_topk", kSparse},
    {"attn_logit_softcapping", "logits are not capped"},
    {"final_logit_softcapping", "logits are not capped"},
    {"add_cross_attention", "there is no encoder"},
};

/// A MapReader to which `null` is the same as no key, as it is to Hugging Face.
class Config {
 public:
  Config(const Node& node, Problems& problems) : reader_(node, problems, "config.json") {}

  bool has(std::string_view key) { return reader_.at(key).kind() != Node::Kind::null; }
  Node at(std::string_view key) { return reader_.at(key); }
  std::int64_t integer(std::string_view key, std::int64_t min, std::int64_t max) {
    return reader_.integer(key, min, max);
  }
  std::int64_t integer_or(std::string_view key, std::int64_t fallback, std::int64_t min,
                          std::int64_t max) {
    return has(key) ? reader_.integer(key, min, max) : fallback;
  }
  bool flag_or(std::string_view key, bool fallback) {
    return has(key) ? reader_.flag_or(key, fallback) : fallback;
  }
  std::string text_or(std::string_view key, std::string fallback) {
    return has(key) ? reader_.text(key) : std::move(fallback);
  }
  std::vector<std::int64_t> integers(std::string_view key, std::int64_t min, std::int64_t max) {
    return has(key) ? reader_.integers(key, min, max) : std::vector<std::int64_t>{};
  }
  void allow(std::string_view key) { reader_.allow(key); }
  std::vector<std::string> unread() const { return reader_.unread(); }
  const Node& node() const { return reader_.node(); }
  Problems& problems() { return reader_.problems(); }

 private:
  MapReader reader_;
};

std::optional<Family> family_of(const Node& node, Problems& problems) {
  std::string word;
  Node place = node;
  if (const auto type = node.find("model_type"); type && type->kind() == Node::Kind::scalar) {
    place = *type;
    word = type->text();
    for (const Family& family : kFamilies) {
      if (family.model_type == word) return family;
    }
  } else if (const auto names = node.find("architectures"); names && names->size() > 0) {
    place = (*names)[0];
    if (place.kind() == Node::Kind::scalar) word = place.text();
    for (const Family& family : kFamilies) {
      if (family.architecture == word) return family;
    }
  }
  std::string known;
  for (const Family& family : kFamilies) {
    known += fmt::format("{}{}", known.empty() ? "" : ", ", family.model_type);
  }
  problems.add(place, fmt::format("config.json of a family that is not modelled: '{}'", word),
               "modelled: " + known);
  return std::nullopt;
}

Mla read_mla(Config& config) {
  Mla mla;
  mla.q_lora_rank = config.integer_or("q_lora_rank", 0, 1, limits::kRank);
  mla.kv_lora_rank = config.integer("kv_lora_rank", 1, limits::kRank);
  mla.qk_nope_head_dim = config.integer("qk_nope_head_dim", 1, limits::kHeadDim);
  mla.qk_rope_head_dim = config.integer("qk_rope_head_dim", 1, limits::kHeadDim);
  mla.v_head_dim = config.integer("v_head_dim", 1, limits::kHeadDim);
  if (config.has("index_topk")) {
    mla.indexer = {.heads = config.integer("index_n_heads", 1, limits::kHeads),
                   .head_dim = config.integer("index_head_dim", 1, limits::kHeadDim),
                   .top_k = config.integer("index_topk", 1, limits::kPositions)};
  }
  // transformers writes it for caches of its own; MLA has its head sizes above.
  config.allow("head_dim");
  config.allow("qk_head_dim");
  if (config.flag_or("attention_bias", false)) {
    config.problems().add(config.at("attention_bias"), "biases in MLA are not modelled");
  }
  return mla;
}

Attention read_attention(Config& config, const Family& family, std::int64_t hidden) {
  const bool neox = family.form == Form::gpt_neox;
  Attention attention;
  attention.heads = config.integer("num_attention_heads", 1, limits::kHeads);
  attention.kv_heads = config.integer_or("num_key_value_heads", attention.heads, 1, limits::kHeads);
  if (family.fixed.mla) {
    attention.kv_heads = attention.heads;
    attention.mla = read_mla(config);
    return attention;
  }
  if (config.has("head_dim")) {
    attention.head_dim = config.integer("head_dim", 1, limits::kHeadDim);
  } else {
    attention.head_dim = hidden / attention.heads;
    if (hidden % attention.heads != 0 || attention.head_dim > limits::kHeadDim) {
      config.problems().add(config.at("num_attention_heads"),
                            fmt::format("no 'head_dim', and hidden_size {} over {} heads is none",
                                        hidden, attention.heads));
    }
  }
  const bool bias = config.flag_or("attention_bias", neox);
  attention.qkv_bias = bias || family.fixed.qkv_bias;
  attention.output_bias = bias;
  attention.qk_norm = family.fixed.qk_norm;
  return attention;
}

/// Experts of DeepSeek's kind: after the first layers, every moe_layer_freq-th.
void read_deepseek_experts(Config& config, const Family& family, Model& model) {
  Moe moe;
  moe.routed_experts = config.integer("n_routed_experts", 1, limits::kExperts);
  moe.top_k = config.integer("num_experts_per_tok", 1, limits::kExperts);
  moe.expert_intermediate = config.integer("moe_intermediate_size", 1, limits::kIntermediate);
  moe.shared_experts = config.integer_or("n_shared_experts", 0, 0, limits::kExperts);
  moe.shared_intermediate = moe.shared_experts * moe.expert_intermediate;
  moe.groups = config.integer_or("n_group", 1, 1, limits::kExperts);
  moe.group_limit = config.integer_or("topk_group", moe.groups, 1, limits::kExperts);
  const std::string method =
      config.text_or("topk_method", family.fixed.aux_free ? "noaux_tc" : "greedy");
  if (method == "greedy") moe.groups = moe.group_limit = 1;  // chooses among all experts
  moe.router_bias = method == "noaux_tc";
  moe.sigmoid_scores =
      config.text_or("scoring_func", family.fixed.aux_free ? "sigmoid" : "softmax") == "sigmoid";
  const std::int64_t first = config.integer_or("first_k_dense_replace", 0, 0, limits::kLayers);
  const std::int64_t every = config.integer_or("moe_layer_freq", 1, 1, limits::kLayers);
  for (std::int64_t layer = 0; layer < model.layers; ++layer) {
    model.layer_is_moe[static_cast<std::size_t>(layer)] = layer >= first && layer % every == 0;
  }
  model.moe = moe;
}

void read_mixtral_experts(Config& config, Model& model) {
  Moe moe;
  moe.routed_experts = config.integer("num_local_experts", 1, limits::kExperts);
  moe.top_k = config.integer("num_experts_per_tok", 1, limits::kExperts);
  moe.expert_intermediate = config.integer("intermediate_size", 1, limits::kIntermediate);
  model.layer_is_moe.assign(model.layer_is_moe.size(), true);
  model.moe = moe;
}

void read_qwen_experts(Config& config, const Family& family, Model& model) {
  Moe moe;
  moe.routed_experts = config.integer("num_experts", 1, limits::kExperts);
  moe.top_k = config.integer("num_experts_per_tok", 1, limits::kExperts);
  moe.expert_intermediate = config.integer("moe_intermediate_size", 1, limits::kIntermediate);
  if (config.has("shared_expert_intermediate_size")) {
    moe.shared_intermediate =
        config.integer("shared_expert_intermediate_size", 0, limits::kIntermediate);
    moe.shared_experts = moe.shared_intermediate > 0 ? 1 : 0;
    moe.shared_gate = family.fixed.shared_gate && moe.shared_experts > 0;
  }
  const std::int64_t every = config.integer_or("decoder_sparse_step", 1, 1, limits::kLayers);
  for (std::int64_t layer = 0; layer < model.layers; ++layer) {
    model.layer_is_moe[static_cast<std::size_t>(layer)] = (layer + 1) % every == 0;
  }
  for (const std::int64_t layer : config.integers("mlp_only_layers", 0, limits::kLayers)) {
    if (layer < model.layers) model.layer_is_moe[static_cast<std::size_t>(layer)] = false;
  }
  model.moe = moe;
}

void read_experts(Config& config, const Family& family, Model& model) {
  const bool optional = family.form == Form::deepseek && !config.has("n_routed_experts");
  if (family.form == Form::deepseek && !optional) read_deepseek_experts(config, family, model);
  if (family.form == Form::mixtral) read_mixtral_experts(config, model);
  if (family.form == Form::qwen_moe) read_qwen_experts(config, family, model);
  if (model.moe_layers() == 0) model.moe.reset();
  if (model.moe_layers() < model.layers) {
    model.intermediate = config.integer("intermediate_size", 1, limits::kIntermediate);
  }
  config.allow("intermediate_size");  // of no layer, in Qwen's MoE
}

Model read_gpt2(Config& config) {
  Model model;
  model.hidden = config.integer("n_embd", 1, limits::kHidden);
  model.layers = config.integer("n_layer", 1, limits::kLayers);
  model.max_positions = config.integer("n_positions", 1, limits::kPositions);
  model.intermediate = config.integer_or("n_inner", 4 * model.hidden, 1, limits::kIntermediate);
  model.learned_positions = true;
  Attention& attention = model.attention;
  attention.heads = config.integer("n_head", 1, limits::kHeads);
  attention.kv_heads = attention.heads;
  attention.head_dim = model.hidden / attention.heads;
  if (model.hidden % attention.heads != 0) {
    config.problems().add(
        config.at("n_head"),
        fmt::format("n_embd {} is not a multiple of n_head {}", model.hidden, attention.heads));
  }
  attention.qkv_bias = attention.output_bias = true;
  model.layer_is_moe.assign(static_cast<std::size_t>(model.layers), false);
  return model;
}

Model read_rotary(Config& config, const Family& family) {
  Model model;
  model.hidden = config.integer("hidden_size", 1, limits::kHidden);
  model.layers = config.integer("num_hidden_layers", 1, limits::kLayers);
  model.max_positions = config.integer("max_position_embeddings", 1, limits::kPositions);
  model.attention = read_attention(config, family, model.hidden);
  model.feed_forward_bias = family.form == Form::gpt_neox || config.flag_or("mlp_bias", false);
  model.layer_is_moe.assign(static_cast<std::size_t>(model.layers), false);
  read_experts(config, family, model);
  if (family.form == Form::deepseek) {
    model.mtp_modules = config.integer_or("num_nextn_predict_layers", 0, 0, limits::kMtpModules);
  }
  return model;
}

/// What the file says and the model does not have.
std::vector<std::string> notes_on(Config& config, const Family& family, const Model& model) {
  std::vector<std::string> notes;
  const auto ignored = [&](std::string_view key, std::string_view why) {
    notes.push_back(fmt::format("ignored: {}: {}", key, why));
  };
  const bool gated = model.activation == Activation::swiglu;
  const std::string_view activation_key =
      family.form == Form::gpt2 ? "activation_function" : "hidden_act";
  const std::string activation = config.text_or(activation_key, gated ? "silu" : "gelu");
  const bool known =
      gated ? activation == "silu" || activation == "swish" : activation.compare(0, 4, "gelu") == 0;
  if (!known) {
    ignored(activation_key, fmt::format("'{}' is modelled as {}, with the same matrices",
                                        activation, gated ? "swiglu" : "gelu"));
  }
  if (family.form == Form::gpt_neox && config.flag_or("use_parallel_residual", true)) {
    ignored("use_parallel_residual", "feed-forward is modelled after attention, not beside it");
  }
  const bool windows = config.flag_or("use_sliding_window", true);
  if (config.has("sliding_window") && windows) {
    const std::int64_t window = config.integer("sliding_window", 1, limits::kPositions);
    if (window < model.max_positions) {
      ignored("sliding_window", fmt::format("attention over {} positions is modelled as full "
                                            "attention",
                                            window));
    }
  }
  const Node kinds = config.at("layer_types");
  for (std::size_t i = 0; kinds.kind() == Node::Kind::sequence && i < kinds.size(); ++i) {
    const Node kind = kinds[i];
    if (kind.kind() == Node::Kind::scalar && kind.text() == "full_attention") continue;
    ignored("layer_types", "every layer is modelled with full attention");
    break;
  }
  const bool indexed = model.attention.mla && model.attention.mla->indexer;
  for (const Ignored& entry : kIgnored) {
    if (indexed && entry.why == kSparse) continue;
    const Node value = config.at(entry.key);
    const bool off = value.kind() == Node::Kind::scalar && value.text() == "false";
    if (config.has(entry.key) && !off) ignored(entry.key, entry.why);
  }
  for (const std::string_view key : kWithoutEffect) config.allow(key);
  for (const std::string& key : config.unread()) {
    const auto value = config.node().find(key);
    if (value && value->overridden()) {
      config.problems().add(*value, fmt::format("'{}' of a config.json is not used: overriding it "
                                                "has no effect",
                                                key));
    } else if (value && value->kind() != Node::Kind::null) {
      notes.push_back("not used: " + key);
    }
  }
  return notes;
}

}  // namespace

bool is_hugging_face(const Node& node) {
  return node.find("model_type").has_value() || node.find("architectures").has_value();
}

Model read_hugging_face(const Node& node, Problems& problems, std::vector<std::string>* notes) {
  const std::optional<Family> family = family_of(node, problems);
  if (!family) return {};
  Config config(node, problems);
  const bool gpt = family->form == Form::gpt2 || family->form == Form::gpt_neox;
  Model model = family->form == Form::gpt2 ? read_gpt2(config) : read_rotary(config, *family);
  model.vocabulary = config.integer("vocab_size", 1, limits::kVocabulary);
  model.tied_embeddings = config.flag_or("tie_word_embeddings", family->form == Form::gpt2);
  model.activation = gpt ? Activation::gelu : Activation::swiglu;
  model.norm = gpt ? Norm::layer : Norm::rms;
  model.norm_bias = gpt;
  if (family->form == Form::gpt2) model.feed_forward_bias = true;
  model.name = config.text_or("_name_or_path", "");
  if (model.name.empty()) model.name = family->model_type;
  model.source = node.at().file;
  const std::vector<std::string> found = notes_on(config, *family, model);
  if (notes != nullptr) notes->insert(notes->end(), found.begin(), found.end());
  return model;
}

}  // namespace orrery
