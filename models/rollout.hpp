#pragma once
// Rollouts of reinforcement learning: N prompts, G outputs each, lengths from a distribution. All
// start together, the batch decays as sequences finish, and the last ones run almost alone.

#include <cstdint>
#include <vector>

#include "models/generation.hpp"

namespace orrery {

/// Output lengths as a histogram: `share` of the sequences (they sum up to 1) have `tokens` tokens.
/// Ascending by tokens.
struct LengthDistribution {
  struct Bin {
    std::int64_t tokens = 0;
    double share = 0;
    friend bool operator==(const Bin&, const Bin&) = default;
  };
  std::vector<Bin> bins;

  double mean() const;
  double mean_square() const;
  std::int64_t longest() const { return bins.back().tokens; }
  friend bool operator==(const LengthDistribution&, const LengthDistribution&) = default;
};
LengthDistribution fixed_length(std::int64_t tokens);
/// The largest 95th percentile over the mean that a log-normal distribution has: exp(1.645^2 / 2).
inline constexpr double kMostSkewed = 3.868;

/// Log-normal with this mean and 95th percentile (mean <= p95 <= kMostSkewed mean; of the two
/// distributions that have them the less skewed one), cut off at `most` tokens, where what is
/// longer stops. In `bins` bins of equal probability, each at its mean.
LengthDistribution log_normal_length(double mean, double p95, std::int64_t most, int bins = 200);

struct RolloutWork {
  std::int64_t prompts = 0;
  std::int64_t outputs_per_prompt = 1;
  std::int64_t prompt_tokens = 0;
  LengthDistribution output;
  bool share_prompts = true;            ///< a prompt is prefilled once for all its outputs
  std::int64_t prefill_tokens = 16384;  ///< new tokens of a replica in one prefill step
  std::int64_t most_sequences = 0;      ///< of a replica at once; 0: what fits its memory

  std::int64_t sequences() const { return prompts * outputs_per_prompt; }
};

struct RolloutEstimate {
  std::int64_t replicas = 0;  ///< of attention, on all GPUs together
  std::int64_t slots = 0;     ///< sequences that one runs at once: what fits at the fullest moment
  double seconds = 0;         ///< from the first prefill to the end of the last sequence
  double gpu_seconds = 0;     ///< all GPUs, until the last sequence ends
  double prefill_s = 0;       ///< of `seconds`
  double tail_s = 0;          ///< of `seconds`: after the last sequence has started
  double output_tokens = 0;
  double mean_sequences = 0;  ///< of a replica, over decode time

  double tokens_per_gpu_s() const { return output_tokens / gpu_seconds; }
};

/// Expected course of a rollout on `instances` copies of an instance (each plan.gpus() GPUs), which
/// take prompts as slots become free and prefill them in between. A renewal equation over the age
/// of sequences, without drawing any: those that start in an interval are those that end in it, as
/// long as there are some left; a sequence's end follows from when it started. An
/// instance's replicas step together, as slowly as the one with the most sequences left. Throws
/// std::runtime_error where the memory holds no sequence.
RolloutEstimate estimate_rollout(const Instance& instance, std::int64_t instances,
                                 const RolloutWork& work);

}  // namespace orrery
