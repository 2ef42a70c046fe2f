#pragma once
// How a step that is executed trains: what no time depends on, so that a simulated one does not ask.

#include <cstdint>
#include <string>

#include "sim/config.hpp"

namespace orrery {

struct Training {
  std::string text;  ///< file whose bytes are the tokens; empty: drawn from the scenario's seed
  double norm_epsilon = 1e-6;
  double rope_theta = 10000;  ///< without scaling for longer contexts
  double routed_scale = 1;    ///< of the routed experts' weights (routed_scaling_factor; V3: 2.5)
  double mtp_weight = 0.3;    ///< of the MTP modules' loss (V3 report 4.2: 0.3, later 0.1)
  double initial_deviation = 0.02;  ///< of weights before the first step (V3: 0.006)
  double learning_rate = 1e-3;
  double beta1 = 0.9;  ///< this and what follows as V3 report 4.2
  double beta2 = 0.95;
  double weight_decay = 0.1;
  double clip_norm = 1;  ///< gradients are scaled to at most this norm; 0: never
  double adam_epsilon = 1e-8;

  friend bool operator==(const Training&, const Training&) = default;
};

/// What a step of all ranks came to.
struct TrainedStep {
  std::int64_t number = 0;
  double loss = 0;           ///< mean over the global batch's tokens
  double mtp_loss = 0;       ///< mean over the tokens and the MTP modules; 0 without
  double gradient_norm = 0;  ///< before clipping
  double seconds = 0;
};

/// Reads the map; `text` is relative to the folder of its document.
Training read_training(const Node& node, Problems& problems);

/// A flow map; `text` relative to `directory`.
std::string to_yaml(const Training& training, const std::string& directory);

}  // namespace orrery
