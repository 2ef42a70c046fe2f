#pragma once
// Models for tests: the shipped ones by name, and arbitrary ones for properties.

#include <rapidcheck.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "models/model.hpp"
#include "sim/config.hpp"

namespace orrery {

inline Model shipped(const std::string& name) {
  Problems problems;
  const std::string path = std::string(ORRERY_SOURCE_DIR) + "/scenarios/models/" + name + ".yaml";
  const Model model = read_model(read_document(path, problems), problems);
  problems.throw_if_any();
  return model;
}

/// DeepSeek-V3's experts (arXiv 2412.19437, 2.1.2 and 4.2).
inline Moe v3_moe() {
  return {.routed_experts = 256,
          .top_k = 8,
          .groups = 8,
          .group_limit = 4,
          .sigmoid_scores = true,
          .router_bias = true};
}

struct Reading {
  Model model;
  std::vector<Problem> problems;
  std::vector<std::string> notes;
};

inline Reading read_text(const std::string& text, const std::string& name = "model.yaml") {
  Problems problems;
  Reading reading;
  const Node node = read_document_text(text, name, problems);
  reading.model = read_model(node, problems, &reading.notes);
  reading.problems.assign(problems.list().begin(), problems.list().end());
  return reading;
}

/// Any model that read_model accepts, in unlikely proportions.
inline Model any_model() {
  const auto from = [](std::int64_t low, std::int64_t high) {
    return *rc::gen::inRange<std::int64_t>(low, high + 1);
  };
  const auto maybe = [] { return *rc::gen::arbitrary<bool>(); };
  Model model;
  model.name = *rc::gen::string<std::string>();
  for (char& c : model.name) c = static_cast<char>(c & 0x7F);  // UTF-8, as every document is
  model.source = "nowhere: \"a test\" # 1";
  model.hidden = from(1, 20'000);
  model.vocabulary = from(1, 300'000);
  model.layers = from(1, 40);
  model.max_positions = from(1, 1'000'000);
  model.norm = maybe() ? Norm::rms : Norm::layer;
  model.norm_bias = maybe();
  model.tied_embeddings = maybe();
  model.learned_positions = maybe();
  model.mtp_modules = from(0, 3);
  Attention& attention = model.attention;
  attention.kv_heads = from(1, 16);
  if (maybe()) {
    attention.heads = attention.kv_heads;
    attention.mla =
        Mla{from(0, 2) * 100, from(1, 600), from(1, 200), 2 * from(1, 64), from(1, 200)};
    if (maybe()) attention.mla->indexer = Indexer{from(1, 64), from(1, 200), from(1, 5000)};
  } else {
    attention.heads = attention.kv_heads * from(1, 8);
    attention.head_dim = 2 * from(1, 128);
    attention.qkv_bias = maybe();
    attention.output_bias = maybe();
    attention.qk_norm = maybe();
  }
  model.activation = maybe() ? Activation::swiglu : Activation::gelu;
  model.feed_forward_bias = maybe();
  model.layer_is_moe.assign(static_cast<std::size_t>(model.layers), false);
  if (maybe()) {
    Moe moe;
    moe.groups = from(1, 8);
    const std::int64_t group_size = from(1, 20);
    moe.routed_experts = moe.groups * group_size;
    moe.group_limit = from(1, moe.groups);
    moe.top_k = from(1, moe.group_limit * group_size);
    moe.expert_intermediate = from(1, 5'000);
    moe.shared_experts = from(0, 2);
    if (moe.shared_experts > 0) moe.shared_intermediate = from(1, 9'000);
    moe.sigmoid_scores = maybe();
    moe.router_bias = maybe();
    moe.shared_gate = maybe();
    for (std::size_t layer = 0; layer < model.layer_is_moe.size(); ++layer) {
      model.layer_is_moe[layer] = maybe();
    }
    model.layer_is_moe.back() = true;
    model.moe = moe;
  }
  if (model.moe_layers() < model.layers) model.intermediate = from(1, 50'000);
  return model;
}

}  // namespace orrery
