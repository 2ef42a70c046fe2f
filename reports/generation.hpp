#pragma once
// `orrery generate`: what a serving plan comes to.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "models/generation_scenario.hpp"

namespace orrery {

/// A prefill step: `step.sequences` prompts of a replica at once.
struct PrefillReport {
  GenerationStep step;
  StepCost cost;
  double tokens_per_gpu_s = 0;        ///< computed
  double input_tokens_per_gpu_s = 0;  ///< with those found in the cache
  double input_tokens_per_node_s = 0;
  double dollars_per_million = 0;  ///< of computed tokens
};

struct DecodeReport {
  GenerationStep step;
  StepCost cost;
  std::int64_t most_sequences = 0;  ///< of a replica, that its memory holds at this context
  double cache_bytes = 0;           ///< of a GPU, all sequences
  double tpot_s = 0;                ///< step over the tokens a sequence gains in it
  double tokens_per_gpu_s = 0;
  double tokens_per_node_s = 0;
  double dollars_per_million = 0;
};

/// Costs of a token at one position, as DeepSeek-V3.2-Exp's cost curves show them. In prefill: of a
/// step whose tokens are there on average. In decode: with attention over so much context, all else
/// as in the operating point of the report, a mix of sequences whose mean context is the
/// workload's.
struct ContextCost {
  std::int64_t context = 0;
  double prefill_s_per_token = 0;  ///< GPU-seconds
  double decode_s_per_token = 0;
  double prefill_dollars_per_million = 0;
  double decode_dollars_per_million = 0;
  /// Over that of the first context of the list: a slope does not depend on the rest of a
  /// deployment.
  double prefill_dollars_above_first = 0;
  double decode_dollars_above_first = 0;
};

struct GenerationReport {
  GenerationScenario scenario;
  ServingMemory memory;
  double cache_bytes_per_token = 0;  ///< of the whole model, without MTP modules
  std::optional<PrefillReport> prefill;
  std::optional<DecodeReport> decode;
  double ttft_s = 0;  ///< the prefill step, whose last logits give the first token; no queueing
  std::vector<ContextCost> contexts;
  std::optional<RolloutEstimate> rollout;
  std::vector<std::string> warnings;
};

/// Throws InputError where the plan does not fit its GPUs.
GenerationReport study_generation(GenerationScenario scenario);

std::string to_terminal(const GenerationReport& report);
std::string to_json(const GenerationReport& report);

}  // namespace orrery
