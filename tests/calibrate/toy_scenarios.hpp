#pragma once
// Scenarios whose steps a CPU can measure in seconds.

#include <string>

#include "models/scenario.hpp"

namespace orrery {

/// A model with latent attention, a dense layer and one with experts, on a node of eight GPUs.
/// `precision` as in a plan; `layout` within braces.
inline Scenario toy_scenario(const std::string& precision = "bf16",
                             const std::string& layout = "pp: 2, ep: 2") {
  const std::string text = R"(name: toy
model:
  name: toy
  source: made up
  hidden: 256
  vocabulary: 1024
  layers: 2
  max_positions: 512
  attention:
    heads: 4
    mla: {q_lora_rank: 128, kv_lora_rank: 128, qk_nope_head_dim: 32, qk_rope_head_dim: 32, v_head_dim: 32}
  feed_forward: {activation: swiglu, intermediate: 512}
  moe: {dense_layers: 1, routed_experts: 8, top_k: 2, expert_intermediate: 128, shared_experts: 1}
cluster: clusters/h100_node.yaml
plan:
  layout: {)" + layout + R"(}
  schedule: 1f1b
  sequence_length: 128
  global_batch: 16
  precision: )" + precision +
                           "\n";
  return read_scenario_text(text, "toy.yaml", std::string(ORRERY_SOURCE_DIR) + "/scenarios");
}

}  // namespace orrery
