#include "calibrate/initial_parameters.hpp"

#include <algorithm>
#include <utility>

#include "sim/check.hpp"
#include "sim/random.hpp"

namespace orrery {
namespace {

class ParameterList {
 public:
  explicit ParameterList(const Model& model) : model_(model) {}

  std::vector<Parameter> take() { return std::move(list_); }

  void matrix(std::string name, std::int64_t rows, std::int64_t columns,
              std::int64_t matrices = 1) {
    list_.push_back({std::move(name), ParameterKind::matrix, matrices, rows, columns});
  }

  void gain(std::string name, std::int64_t columns) {
    list_.push_back({std::move(name), ParameterKind::gain, 1, 1, columns});
  }

  void layer(std::int64_t index, bool moe) {
    const std::string prefix = "layers." + std::to_string(index) + ".";
    gain(prefix + "attention_norm", model_.hidden);
    if (model_.attention.mla) {
      latent_attention(prefix, *model_.attention.mla);
    } else {
      grouped_attention(prefix);
    }
    matrix(prefix + "o", model_.hidden, model_.attention.heads * model_.attention.d_v());
    gain(prefix + "ffn_norm", model_.hidden);
    if (moe) {
      experts(prefix, *model_.moe);
    } else {
      feed_forward(prefix + "ffn", model_.intermediate);
    }
  }

 private:
  void latent_attention(const std::string& prefix, const Mla& mla) {
    const std::int64_t heads = model_.attention.heads;
    if (mla.q_lora_rank > 0) {
      matrix(prefix + "q_a", mla.q_lora_rank, model_.hidden);
      gain(prefix + "q_norm", mla.q_lora_rank);
    }
    matrix(prefix + "q_b", heads * model_.attention.d_qk(),
           mla.q_lora_rank > 0 ? mla.q_lora_rank : model_.hidden);
    matrix(prefix + "kv_a", mla.kv_lora_rank + mla.qk_rope_head_dim, model_.hidden);
    gain(prefix + "kv_norm", mla.kv_lora_rank);
    matrix(prefix + "kv_b", heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank);
  }

  void grouped_attention(const std::string& prefix) {
    const Attention& a = model_.attention;
    matrix(prefix + "qkv", (a.heads + 2 * a.kv_heads) * a.head_dim, model_.hidden);
    if (!a.qk_norm) return;
    gain(prefix + "query_norm", a.head_dim);
    gain(prefix + "key_norm", a.head_dim);
  }

  void feed_forward(const std::string& name, std::int64_t intermediate, std::int64_t experts = 1) {
    matrix(name + "_up", 2 * intermediate, model_.hidden, experts);
    matrix(name + "_down", model_.hidden, intermediate, experts);
  }

  void experts(const std::string& prefix, const Moe& moe) {
    matrix(prefix + "gate", moe.routed_experts, model_.hidden);
    if (moe.router_bias) {
      list_.push_back(
          {prefix + "router_bias", ParameterKind::selection_bias, 1, 1, moe.routed_experts});
    }
    if (moe.shared_experts > 0) feed_forward(prefix + "shared", moe.shared_intermediate);
    feed_forward(prefix + "routed", moe.expert_intermediate, moe.routed_experts);
  }

  const Model& model_;
  std::vector<Parameter> list_;
};

/// FNV-1a (Fowler, Noll, Vo), 64 bits.
std::uint64_t hash_of(std::string_view text) {
  std::uint64_t hash = 0xCBF29CE484222325U;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3U;
  return hash;
}

/// Standard normal numbers that can be asked for by index. Each pair of them has two outputs of one
/// SplitMix64 sequence, which is a hash of a counter, so any place of it can be started from.
class NormalSequence {
 public:
  NormalSequence(std::uint64_t seed, std::string_view name)
      : start_(Random::of({seed, hash_of(name)}).next()) {}

  double at(std::int64_t index) {
    const std::uint64_t pair = static_cast<std::uint64_t>(index) / 2;
    if (pair != pair_ || !drawn_) {
      Random random(start_ + 2 * pair * kStep);
      values_[0] = random.normal();
      values_[1] = random.normal();
      pair_ = pair;
      drawn_ = true;
    }
    return values_[index % 2];
  }

 private:
  static constexpr std::uint64_t kStep = 0x9E3779B97F4A7C15U;  // of SplitMix64's state
  std::uint64_t start_;
  std::uint64_t pair_ = 0;
  bool drawn_ = false;
  double values_[2] = {};
};

}  // namespace

std::vector<std::string> why_not_executable(const Model& model) {
  const Attention& a = model.attention;
  std::vector<std::string> reasons;
  const auto refuse = [&](bool when, const char* why) {
    if (when) reasons.emplace_back(why);
  };
  refuse(model.norm != Norm::rms || model.norm_bias, "its norms are not RMSNorm");
  refuse(model.activation != Activation::swiglu, "its activation is not SwiGLU");
  refuse(model.learned_positions, "its positions are learned, and only rotary ones are executed");
  refuse(a.qkv_bias || a.output_bias || model.feed_forward_bias, "its linear layers have biases");
  refuse(model.moe && model.moe->shared_gate, "its shared experts have a gate");
  refuse(a.mla && a.qk_norm, "it has both latent attention and norms of queries and keys");
  refuse((a.mla ? a.mla->qk_rope_head_dim : a.head_dim) % 2 != 0,
         "its rotary columns are odd in number");
  return reasons;
}

std::vector<Parameter> parameters_of(const Model& model) {
  const std::vector<std::string> why = why_not_executable(model);
  ORRERY_CHECK(why.empty(), "{} cannot be executed: {}", model.name, why[0]);
  ParameterList list(model);
  list.matrix("embedding", model.vocabulary, model.hidden);
  for (std::int64_t layer = 0; layer < model.layers; ++layer) {
    list.layer(layer, model.is_moe(layer));
  }
  list.gain("final_norm", model.hidden);
  if (!model.tied_embeddings) list.matrix("head", model.vocabulary, model.hidden);
  for (std::int64_t module = 0; module < model.mtp_modules; ++module) {
    const std::string prefix = "mtp." + std::to_string(module) + ".";
    list.gain(prefix + "norm_hidden", model.hidden);
    list.gain(prefix + "norm_embedding", model.hidden);
    list.matrix(prefix + "projection", model.hidden, 2 * model.hidden);
    list.layer(model.layers + module, model.moe.has_value());
    list.gain(prefix + "final_norm", model.hidden);
  }
  return list.take();
}

void fill_initial_values(const InitialValues& values, const Parameter& parameter,
                         const ParameterPart& part, float* out, std::int64_t pitch) {
  ORRERY_CHECK(part.first_row >= 0 && part.rows >= 0 && part.first_column >= 0 &&
                   part.columns >= 0 && pitch >= part.columns &&
                   part.first_row + part.rows <= parameter.matrices * parameter.rows &&
                   part.first_column + part.columns <= parameter.columns,
               "rows {} + {}, columns {} + {} of {}", part.first_row, part.rows, part.first_column,
               part.columns, parameter.name);
  NormalSequence normal(values.seed, parameter.name);
  for (std::int64_t row = 0; row < part.rows; ++row) {
    float* to = out + row * pitch;
    if (parameter.kind != ParameterKind::matrix || values.deviation == 0) {
      std::fill_n(to, part.columns, parameter.kind == ParameterKind::gain ? 1.0F : 0.0F);
      continue;
    }
    const std::int64_t first = (part.first_row + row) * parameter.columns + part.first_column;
    for (std::int64_t i = 0; i < part.columns; ++i) {
      to[i] = static_cast<float>(values.deviation * normal.at(first + i));
    }
  }
}

std::vector<float> initial_values(const InitialValues& values, const Parameter& parameter) {
  std::vector<float> all(static_cast<std::size_t>(parameter.elements()));
  const ParameterPart whole = {0, parameter.matrices * parameter.rows, 0, parameter.columns};
  fill_initial_values(values, parameter, whole, all.data(), parameter.columns);
  return all;
}

}  // namespace orrery
