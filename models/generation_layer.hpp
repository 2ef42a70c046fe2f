#pragma once
// What a layer does in a forward pass that generates, kernel by kernel. The kernels are those of
// inference engines, not of training: the latent down-projections of queries and keys are one GEMM,
// quantisation writes scales in the layout that GEMMs read, routing is one kernel (SGLang's and
// vLLM's fused grouped top-k), nothing is kept, and in decode multi-head latent attention works on
// the latents themselves (absorbed: the key up-projection goes to the queries, the value
// up-projection to the output; DeepSeek-V2 paper 2.1.3).

#include <cstdint>

#include "models/generation.hpp"
#include "models/layer_work.hpp"

namespace orrery {

/// What one micro-batch of a step is, for one replica.
struct GenerationBatch {
  bool prefill = false;
  std::int64_t sequences = 1;
  std::int64_t new_tokens = 1;  ///< of each
  std::int64_t context = 0;     ///< of each, in the cache before

  std::int64_t tokens() const { return sequences * new_tokens; }
  std::int64_t attended() const { return context + new_tokens; }
};

/// A transformer layer. The exchange segments are empty in layers without experts on other GPUs.
struct GenerationLayer {
  Work attention;  ///< norm .. output projection, norm, router
  Work dispatch;
  Work mlp;
  Work combine;
};
GenerationLayer generation_layer(const Instance& instance, const GenerationBatch& batch, bool moe);

/// Embedding, and head with sampling; of a prefill only the last token of each sequence has logits.
Work generation_embedding(const Instance& instance, const GenerationBatch& batch);
Work generation_head(const Instance& instance, const GenerationBatch& batch);
/// The front of an MTP module: norms, concatenation and projection 2h -> h.
Work generation_mtp_front(const Instance& instance, const GenerationBatch& batch);

/// Of a layer's kernels those whose time follows the context: attention itself, and the indexer's
/// scores and choice.
bool is_attention_core(const Shape& shape);

}  // namespace orrery
