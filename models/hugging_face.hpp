#pragma once
// Hugging Face's config.json as it is published.

#include <string>
#include <vector>

#include "models/model.hpp"

namespace orrery {

/// Has `model_type` or `architectures`: a config.json and not our YAML.
bool is_hugging_face(const Node& node);

/// Reads config.json of the families gpt2, gpt_neox, llama, mistral, mixtral, qwen2, qwen2_moe,
/// qwen3, qwen3_moe, deepseek (MoE 16B), deepseek_v2, deepseek_v3, deepseek_v32 and kimi_k2; other
/// families are a problem. Notes as in read_model. Meanings of keys and their defaults: the
/// configuration classes of huggingface/transformers and of the models' repositories.
Model read_hugging_face(const Node& node, Problems& problems, std::vector<std::string>* notes);

}  // namespace orrery
