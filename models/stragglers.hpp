#pragma once
// GPUs that compute slower than the profile says, stated or drawn.
//
// Scenario key stragglers, a list of
//   {gpu: G, slowdown: F}      GPU G computes F times as long; world rank G, which fill nodes in
//   order {node: N, slowdown: F}     all GPUs of node N {share: P, slowdown: F}    so large a share
//   of the GPUs, drawn (rounded to a whole number of them) {sigma: S}                 all GPUs,
//   each by a log-normal factor with median 1: exp(S z)
// Factors of one GPU multiply. Only computation is slowed; transfers and collectives wait for it.

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "sim/config.hpp"

namespace orrery {

struct SlowGpu {
  std::int64_t gpu = 0;
  double slowdown = 1;
  friend bool operator==(const SlowGpu&, const SlowGpu&) = default;
};
struct SlowNode {
  std::int64_t node = 0;
  double slowdown = 1;
  friend bool operator==(const SlowNode&, const SlowNode&) = default;
};
struct SlowShare {
  double share = 0;
  double slowdown = 1;
  friend bool operator==(const SlowShare&, const SlowShare&) = default;
};
struct SpeedSpread {
  double sigma = 0;
  friend bool operator==(const SpeedSpread&, const SpeedSpread&) = default;
};
using Straggler = std::variant<SlowGpu, SlowNode, SlowShare, SpeedSpread>;
using Stragglers = std::vector<Straggler>;

Stragglers read_stragglers(const Node& node, Problems& problems);

/// Says of every GPU and node that `world` GPUs do not have, at its element of the list.
void check_stragglers(const Stragglers& stragglers, const Node& node, std::int64_t world,
                      std::int64_t gpus_per_node, Problems& problems);

/// One line of YAML, "[]" without any.
std::string to_yaml(const Stragglers& stragglers);

/// Factor of every world rank; empty if none is slower.
std::vector<double> slowdowns(const Stragglers& stragglers, std::int64_t world,
                              std::int64_t gpus_per_node, std::uint64_t seed);

}  // namespace orrery
