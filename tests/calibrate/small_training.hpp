#pragma once
// Small models that are trained for real in tests: a scenario's text, all ranks as threads of this
// process, and the gradients of whole parameters put together from the ranks' shards.

#include <map>
#include <string>
#include <vector>

#include "calibrate/execute/execution.hpp"
#include "models/scenario.hpp"

namespace orrery {

/// A scenario of `model` (the text of a model file, indented by nothing) and `plan` on one node.
Scenario small_scenario(const std::string& model, const std::string& plan);

extern const char* const
    kTinyDeepSeek;                    ///< MLA, a dense layer, experts in groups, shared expert, MTP
extern const char* const kTinyLlama;  ///< grouped queries, dense
extern const char* const
    kTinyQwenMoe;  ///< norms of queries and keys, softmax router, no shared expert

/// What all ranks together came to.
struct Trained {
  std::vector<double> losses;  ///< by step: mean over the global batch
  std::vector<double> mtp_losses;
  std::vector<double> gradient_norms;
  std::map<std::string, std::vector<float>>
      gradients;                 ///< of the first step, by parameter; if asked
  Timeline timeline;             ///< of the last step
  std::int64_t reuse_waits = 0;  ///< of all ranks
};

/// What ranks are: a device each, messages from its memory or, with `nccl`, over that.
struct SmallRanks {
  std::function<std::unique_ptr<kernels::Device>()> open_device = [] {
    return kernels::open_cpu_device(1);
  };
  std::shared_ptr<const kernels::Nccl> nccl;
};

/// Trains for `steps`, or only computes the gradients of the first where steps is 0.
Trained train_small(const Scenario& scenario, int steps, const SmallRanks& small = {});

/// Token ids that any seed gives: sequence of the global batch of a step.
std::vector<std::int32_t> random_tokens(const Scenario& scenario, std::int64_t step,
                                        std::int64_t sequence);

}  // namespace orrery
