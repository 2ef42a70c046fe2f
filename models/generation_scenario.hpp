#pragma once
// A serving plan as a file states it: a scenario's model, cluster and profile, and
//
//   generation:
//     phase: prefill | decode | both (both)
//     layout: {tp (1), dp (ep / tp), ep (1), redundant_experts (0)}
//     precision: bf16 | fp8, or {linear, cache, dispatch: bf16 | fp8_tensor | fp8_block} (bf16; fp8
//     is
//                linear and dispatch in fp8_block with a BF16 cache)
//     exchange: of decode, with ep above 1: normal | low_latency (low_latency); prefill has the
//     normal communication_sms: that normal exchanges hold (20) micro_batches: 1 | 2 (1) busiest:
//     rows of the busiest GPU's experts over the mean (1) usable_memory: share of the device's (90
//     %) mtp: {drafts (1), acceptance} (none) prompt, output: mean tokens of a request; cached: of
//     its prompt, found in the cache (0) context: mean tokens in the cache during decode (prompt +
//     output / 2) prompts: prefilled at once by a replica (1) batch: sequences of a replica in
//     decode, or max: what its memory holds (max) contexts: list of contexts to show costs at
//     (none) dollars_per_gpu_hour: to show costs in (none) rollout: {prompts, outputs_per_prompt
//     (1), instances (what the cluster holds),
//               output: tokens | {mean, p95, most} | [[tokens, share], ...]} (none)

#include <optional>
#include <string>
#include <vector>

#include "models/generation.hpp"
#include "models/rollout.hpp"
#include "sim/overrides.hpp"

namespace orrery {

/// What is asked of an instance.
struct Workload {
  bool prefill = true;
  bool decode = true;
  std::int64_t prompt = 0;
  std::int64_t cached = 0;
  std::int64_t output = 0;
  std::optional<std::int64_t> context;
  std::int64_t prompts = 1;
  std::optional<std::int64_t> batch;  ///< none: what fits
  std::vector<std::int64_t> contexts;
  double dollars_per_gpu_hour = 0;  ///< 0: not asked for

  double mean_context() const {
    return context ? static_cast<double>(*context)
                   : static_cast<double>(prompt) + 0.5 * static_cast<double>(output);
  }
};

struct GenerationScenario {
  std::string name;
  std::string file;
  Instance instance;
  Workload workload;
  std::optional<RolloutWork> rollout;
  std::int64_t rollout_instances = 0;
  std::vector<std::string> notes;
};

/// Reads and checks a file and everything it names; all problems are reported together
/// (InputError). A training scenario with a `generation` section will do: what concerns training is
/// left alone.
/// `overrides` come after those under the file's own key `set`.
GenerationScenario read_generation(const std::string& path, const Overrides& overrides = {});
/// As read_generation, of a map in some other file, to whose folder its paths are relative.
GenerationScenario read_generation(const Node& root, const Overrides& overrides,
                                   Problems& problems);
GenerationScenario read_generation_text(std::string text, const std::string& name,
                                        const std::string& directory);

}  // namespace orrery
