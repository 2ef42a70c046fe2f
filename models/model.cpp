// Our own YAML form of a model: reading, checking and writing.

#include "models/model.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <iterator>

#include "models/hugging_face.hpp"
#include "models/model_limits.hpp"

namespace orrery {
namespace {

Mla read_mla(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "model.attention.mla");
  Mla mla;
  mla.q_lora_rank = reader.integer_or("q_lora_rank", 0, 0, limits::kRank);
  mla.kv_lora_rank = reader.integer("kv_lora_rank", 1, limits::kRank);
  mla.qk_nope_head_dim = reader.integer("qk_nope_head_dim", 1, limits::kHeadDim);
  mla.qk_rope_head_dim = reader.integer("qk_rope_head_dim", 1, limits::kHeadDim);
  mla.v_head_dim = reader.integer("v_head_dim", 1, limits::kHeadDim);
  if (reader.has("indexer")) {
    MapReader map(reader.at("indexer"), problems, "model.attention.mla.indexer");
    Indexer indexer;
    indexer.heads = map.integer("heads", 1, limits::kHeads);
    indexer.head_dim = map.integer("head_dim", 1, limits::kHeadDim);
    indexer.top_k = map.integer("top_k", 1, limits::kPositions);
    map.finish();
    mla.indexer = indexer;
  }
  reader.finish();
  return mla;
}

Attention read_attention(const Node& node, std::int64_t hidden, Problems& problems) {
  MapReader reader(node, problems, "model.attention");
  Attention attention;
  attention.heads = reader.integer("heads", 1, limits::kHeads);
  attention.kv_heads = attention.heads;
  if (reader.has("mla")) {
    attention.mla = read_mla(reader.at("mla"), problems);
    for (const char* key : {"kv_heads", "head_dim", "qkv_bias", "output_bias", "qk_norm"}) {
      if (!reader.has(key)) continue;
      problems.add(reader.at(key), fmt::format("'{}' does not go with 'mla'", key),
                   "MLA has one key and value per head, its own head sizes and no biases");
    }
  } else {
    attention.kv_heads = reader.integer_or("kv_heads", attention.heads, 1, limits::kHeads);
    if (reader.has("head_dim")) {
      attention.head_dim = reader.integer("head_dim", 1, limits::kHeadDim);
    } else {
      attention.head_dim = hidden / attention.heads;
      if (hidden % attention.heads != 0) {
        problems.add(
            node, fmt::format("hidden {} is not a multiple of heads {}", hidden, attention.heads),
            "say head_dim where it is not hidden / heads");
      }
    }
    attention.qkv_bias = reader.flag_or("qkv_bias", false);
    attention.output_bias = reader.flag_or("output_bias", false);
    attention.qk_norm = reader.flag_or("qk_norm", false);
  }
  reader.finish();
  return attention;
}

/// Which layers have experts: `dense_layers` is how many come first without, or a list of layers
/// (from 0) without.
std::vector<bool> read_layers(MapReader& moe, std::int64_t layers) {
  std::vector<bool> is_moe(static_cast<std::size_t>(layers), true);
  const Node node = moe.at("dense_layers");
  if (node.kind() != Node::Kind::sequence) {
    const std::int64_t first = moe.integer_or("dense_layers", 0, 0, layers - 1);
    std::fill_n(is_moe.begin(), first, false);
    return is_moe;
  }
  std::int64_t previous = -1;
  for (const std::int64_t layer : moe.integers("dense_layers", 0, layers - 1)) {
    if (layer <= previous) {
      moe.problems().add(
          node, fmt::format("'dense_layers' must be increasing, got {} after {}", layer, previous));
    }
    previous = layer;
    is_moe[static_cast<std::size_t>(layer)] = false;
  }
  if (std::none_of(is_moe.begin(), is_moe.end(), [](bool b) { return b; })) {
    moe.problems().add(node, "every layer is dense, so there is no place for experts",
                       "leave 'moe' out");
  }
  return is_moe;
}

Moe read_moe(MapReader& reader) {
  Moe moe;
  moe.routed_experts = reader.integer("routed_experts", 1, limits::kExperts);
  moe.top_k = reader.integer("top_k", 1, limits::kExperts);
  moe.expert_intermediate = reader.integer("expert_intermediate", 1, limits::kIntermediate);
  moe.shared_experts = reader.integer_or("shared_experts", 0, 0, limits::kExperts);
  moe.shared_intermediate = moe.shared_experts * moe.expert_intermediate;
  if (reader.has("shared_intermediate")) {
    if (moe.shared_experts == 0) {
      reader.problems().add(reader.at("shared_intermediate"),
                            "'shared_intermediate' needs 'shared_experts'");
    }
    moe.shared_intermediate = reader.integer("shared_intermediate", 1, limits::kIntermediate);
  }
  moe.groups = reader.integer_or("groups", 1, 1, limits::kExperts);
  moe.group_limit = reader.integer_or("group_limit", moe.groups, 1, limits::kExperts);
  moe.sigmoid_scores =
      reader.choice_or<bool>("scores", false, {{"softmax", false}, {"sigmoid", true}});
  moe.router_bias = reader.flag_or("router_bias", false);
  moe.shared_gate = reader.flag_or("shared_gate", false);
  return moe;
}

void read_feed_forward(const Node& node, Model& model, Problems& problems) {
  MapReader reader(node, problems, "model.feed_forward");
  model.activation = reader.choice<Activation>(
      "activation", {{"swiglu", Activation::swiglu}, {"gelu", Activation::gelu}});
  model.feed_forward_bias = reader.flag_or("bias", false);
  if (model.moe_layers() < model.layers) {
    model.intermediate = reader.integer("intermediate", 1, limits::kIntermediate);
  } else if (reader.has("intermediate")) {
    problems.add(reader.at("intermediate"), "no layer is dense, so 'intermediate' is not used",
                 "leave it out, or say 'dense_layers' in moe");
  }
  reader.finish();
}

Model read_yaml(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "model");
  Model model;
  model.name = reader.text("name");
  model.source = reader.text("source");
  // A wrong dimension takes a value about which nothing below complains in turn.
  const auto dimension = [&](const char* key, std::int64_t most, std::int64_t instead) {
    const std::size_t before = problems.size();
    const std::int64_t value = reader.integer(key, 1, most);
    return problems.size() == before ? value : instead;
  };
  model.hidden = dimension("hidden", limits::kHidden, 0);
  model.vocabulary = reader.integer("vocabulary", 1, limits::kVocabulary);
  model.layers = dimension("layers", limits::kLayers, limits::kLayers);
  model.max_positions = reader.integer("max_positions", 1, limits::kPositions);
  model.norm =
      reader.choice_or<Norm>("norm", Norm::rms, {{"rms", Norm::rms}, {"layer", Norm::layer}});
  model.norm_bias = reader.flag_or("norm_bias", false);
  model.tied_embeddings = reader.flag_or("tied_embeddings", false);
  model.learned_positions =
      reader.choice_or<bool>("positions", false, {{"rotary", false}, {"learned", true}});
  model.mtp_modules = reader.integer_or("mtp_modules", 0, 0, limits::kMtpModules);
  const auto section = [&](const char* key, const auto& read) {
    const Node value = reader.require(key);
    if (value.kind() != Node::Kind::null) read(value);
  };
  section("attention", [&](const Node& value) {
    model.attention = read_attention(value, model.hidden, problems);
  });
  model.layer_is_moe.assign(static_cast<std::size_t>(model.layers), false);
  if (reader.has("moe")) {
    MapReader moe(reader.at("moe"), problems, "model.moe");
    model.moe = read_moe(moe);
    model.layer_is_moe = read_layers(moe, model.layers);
    moe.finish();
  }
  section("feed_forward", [&](const Node& value) { read_feed_forward(value, model, problems); });
  reader.finish();
  return model;
}

/// The place of a dimension: its key in a config.json, or the end of its path in our YAML.
Node place_of(const Node& root, std::string_view hugging_face_key,
              std::initializer_list<std::string_view> path) {
  if (const auto node = root.find(hugging_face_key)) return *node;
  Node place = root;
  for (const std::string_view key : path) {
    const auto next = place.find(key);
    if (!next) break;
    place = *next;
  }
  return place;
}

void check_experts(const Moe& moe, const Node& root, Problems& problems) {
  if (moe.top_k > moe.routed_experts) {
    problems.add(place_of(root, "num_experts_per_tok", {"moe", "top_k"}),
                 fmt::format("top_k {} of only {} routed experts", moe.top_k, moe.routed_experts));
    return;
  }
  if (moe.shared_intermediate > limits::kIntermediate) {
    problems.add(place_of(root, "n_shared_experts", {"moe", "shared_experts"}),
                 fmt::format("shared experts {} wide, at most {} is supported",
                             moe.shared_intermediate, limits::kIntermediate));
  }
  const Node groups = place_of(root, "n_group", {"moe", "groups"});
  if (moe.routed_experts % moe.groups != 0) {
    problems.add(groups, fmt::format("{} groups do not divide {} routed experts", moe.groups,
                                     moe.routed_experts));
    return;
  }
  const Node limit = place_of(root, "topk_group", {"moe", "group_limit"});
  const std::int64_t reachable = moe.group_limit * (moe.routed_experts / moe.groups);
  if (moe.group_limit > moe.groups) {
    problems.add(
        limit, fmt::format("a limit of {} groups, but there are {}", moe.group_limit, moe.groups));
  } else if (moe.top_k > reachable) {
    problems.add(limit, fmt::format("{} groups hold {} experts, fewer than top_k {}",
                                    moe.group_limit, reachable, moe.top_k));
  }
}

/// Routed and shared experts of all layers and MTP modules; an upper bound that cannot overflow.
double expert_parameters(const Model& model) {
  if (!model.moe) return 0;
  const auto real = [](std::int64_t value) { return static_cast<double>(value); };
  const double width = real(model.moe->routed_experts) * real(model.moe->expert_intermediate) +
                       real(model.moe->shared_intermediate);
  return 3.0 * real(model.layers + model.mtp_modules) * real(model.hidden + 1) * width;
}

/// In quotes, with what YAML would not keep as it is written as escapes.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte == 0x7F) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out += c;
    }
  }
  return out + "\"";
}

std::string dense_layers_text(const Model& model) {
  const auto first_moe = std::find(model.layer_is_moe.begin(), model.layer_is_moe.end(), true);
  if (std::find(first_moe, model.layer_is_moe.end(), false) == model.layer_is_moe.end()) {
    return std::to_string(std::distance(model.layer_is_moe.begin(), first_moe));
  }
  std::string list;
  for (std::int64_t layer = 0; layer < model.layers; ++layer) {
    if (model.is_moe(layer)) continue;
    list += fmt::format("{}{}", list.empty() ? "" : ", ", layer);
  }
  return "[" + list + "]";
}

}  // namespace

void check_dimensions(const Model& model, const Node& root, Problems& problems) {
  const Attention& attention = model.attention;
  if (attention.heads % attention.kv_heads != 0) {
    problems.add(place_of(root, "num_key_value_heads", {"attention", "kv_heads"}),
                 fmt::format("{} query heads cannot share {} key-value heads evenly",
                             attention.heads, attention.kv_heads));
  }
  const std::int64_t rotated = attention.mla ? attention.mla->qk_rope_head_dim : attention.head_dim;
  if (!model.learned_positions && rotated % 2 != 0) {
    problems.add(place_of(root, attention.mla ? "qk_rope_head_dim" : "head_dim",
                          {"attention", attention.mla ? "mla" : "head_dim", "qk_rope_head_dim"}),
                 fmt::format("rotary positions turn pairs, but {} is odd", rotated));
  }
  if (attention.head_dim > limits::kHeadDim) {
    problems.add(place_of(root, "num_attention_heads", {"attention"}),
                 fmt::format("heads of {} dimensions, at most {} are supported", attention.head_dim,
                             limits::kHeadDim));
  }
  if (model.moe) check_experts(*model.moe, root, problems);
  if (expert_parameters(model) > kMaxParameters) {  // could be beyond int64, so not counted below
    problems.add(place_of(root, "moe_intermediate_size", {"moe"}),
                 fmt::format("the experts would have {:.1e} parameters", expert_parameters(model)),
                 fmt::format("at most {:.1e} are supported", kMaxParameters));
    return;
  }
  const ParameterCount count = count_parameters(model);
  const auto parameters = static_cast<double>(count.total() + count.mtp);
  if (parameters > kMaxParameters) {
    problems.add(root, fmt::format("the model would have {:.1e} parameters", parameters),
                 fmt::format("at most {:.1e} are supported", kMaxParameters));
  }
}

Model read_model(const Node& node, Problems& problems, std::vector<std::string>* notes) {
  const std::size_t before = problems.size();
  Model model =
      is_hugging_face(node) ? read_hugging_face(node, problems, notes) : read_yaml(node, problems);
  // On top of a missing or malformed value the rest would only be confusing. A document that could
  // not be parsed is no map, and its problem is older.
  const bool read = problems.size() == before && node.kind() == Node::Kind::map;
  if (read) check_dimensions(model, node, problems);
  return model;
}

std::string to_yaml(const Model& model) {
  std::string out;
  const auto line = [&](int depth, std::string_view key, const auto& value) {
    out += fmt::format("{:{}}{}: {}\n", "", 2 * depth, key, value);
  };
  line(0, "name", quoted(model.name));
  line(0, "source", quoted(model.source));
  line(0, "hidden", model.hidden);
  line(0, "vocabulary", model.vocabulary);
  line(0, "layers", model.layers);
  line(0, "max_positions", model.max_positions);
  line(0, "positions", model.learned_positions ? "learned" : "rotary");
  line(0, "norm", model.norm == Norm::rms ? "rms" : "layer");
  line(0, "norm_bias", model.norm_bias);
  line(0, "tied_embeddings", model.tied_embeddings);
  line(0, "mtp_modules", model.mtp_modules);
  const Attention& attention = model.attention;
  out += "attention:\n";
  line(1, "heads", attention.heads);
  if (attention.mla) {
    out += "  mla:\n";
    line(2, "q_lora_rank", attention.mla->q_lora_rank);
    line(2, "kv_lora_rank", attention.mla->kv_lora_rank);
    line(2, "qk_nope_head_dim", attention.mla->qk_nope_head_dim);
    line(2, "qk_rope_head_dim", attention.mla->qk_rope_head_dim);
    line(2, "v_head_dim", attention.mla->v_head_dim);
    if (const auto& indexer = attention.mla->indexer) {
      out += fmt::format("    indexer: {{heads: {}, head_dim: {}, top_k: {}}}\n", indexer->heads,
                         indexer->head_dim, indexer->top_k);
    }
  } else {
    line(1, "kv_heads", attention.kv_heads);
    line(1, "head_dim", attention.head_dim);
    line(1, "qkv_bias", attention.qkv_bias);
    line(1, "output_bias", attention.output_bias);
    line(1, "qk_norm", attention.qk_norm);
  }
  out += "feed_forward:\n";
  line(1, "activation", model.activation == Activation::swiglu ? "swiglu" : "gelu");
  if (model.intermediate > 0) line(1, "intermediate", model.intermediate);
  line(1, "bias", model.feed_forward_bias);
  if (!model.moe) return out;
  const Moe& moe = *model.moe;
  out += "moe:\n";
  line(1, "dense_layers", dense_layers_text(model));
  line(1, "routed_experts", moe.routed_experts);
  line(1, "top_k", moe.top_k);
  line(1, "expert_intermediate", moe.expert_intermediate);
  line(1, "shared_experts", moe.shared_experts);
  if (moe.shared_experts > 0) line(1, "shared_intermediate", moe.shared_intermediate);
  line(1, "groups", moe.groups);
  line(1, "group_limit", moe.group_limit);
  line(1, "scores", moe.sigmoid_scores ? "sigmoid" : "softmax");
  line(1, "router_bias", moe.router_bias);
  line(1, "shared_gate", moe.shared_gate);
  return out;
}

}  // namespace orrery
