#pragma once
// What a search may choose from, and the candidates that come of it.
//
// A space lists values for each decision of a plan; batch, sequence length, model and routing are
// the scenario's. It is read from the scenario's `search:` section or from a file of its own:
//
//   search:                        # every key optional; what is left out has the default
//     nodes: [256, 128]            # of the cluster, as if it had so many (all it has)
//     tp: [1, 2, 4, 8]             # powers of two inside a node
//     cp: [1]                      # 1; beyond 8192 tokens a sequence also powers of two
//     pp: [1, 2, 4, 8, 16]         # divisors of the GPUs that are no more than the layers
//     ep: [1, 8, 64]               # powers of two up to the experts
//     expert_tp: [1]
//     zero: [1]                    # 1, 2, 3
//     micro_batch: [1, 2]          # powers of two up to 8
//     schedule: [1f1b, dual_pipe]  # all
//     virtual_stages: [2, 4]       # of interleaved_1f1b
//     lighter_last: [0, 1, 2, 3]   # layers that the last stage has less than the others
//     precision: [bf16]            # the scenario's; names of recipes
//     recompute: [none, full]      # none, selective, full, and deepseek with latent attention
//     communication_sms: [20]      # the scenario's; where it has 0 and there are experts, 24
//
// Candidates come in one order, the same on every rank and in every run, and are told apart by a
// text key.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "models/scenario.hpp"
#include "sim/config.hpp"

namespace orrery {

struct SearchSpace {
  std::vector<std::int64_t> nodes;
  std::vector<std::int64_t> tp, cp, pp, ep, expert_tp;
  std::vector<std::int64_t> zero;
  std::vector<std::int64_t> micro_batch;
  std::vector<ScheduleKind> schedules;
  std::vector<std::int64_t> virtual_stages;
  std::vector<std::int64_t> lighter_last;
  std::vector<Precision> precisions;
  std::vector<Recompute> recomputes;
  std::vector<std::int64_t> communication_sms;

  friend bool operator==(const SearchSpace&, const SearchSpace&) = default;
};

/// All defaults for this scenario.
SearchSpace default_space(const Scenario& scenario);

/// The `search:` section of the scenario's file, with defaults for what it leaves out; all defaults
/// where there is none. Throws InputError with all problems.
SearchSpace read_search_space(const Scenario& scenario);
/// From a file that is such a section's map.
SearchSpace read_search_space(const std::string& path, const Scenario& scenario);

/// One layout: the scenario with this plan, on so many nodes of its cluster.
struct Candidate {
  std::int64_t nodes = 0;
  Plan plan;

  friend bool operator==(const Candidate&, const Candidate&) = default;
};

/// Canonical: equal candidates, equal keys, and the other way round.
/// "n256 tp1 cp1 pp16 dp128 ep64 etp1 z1 mb1 dual_pipe v2 L15x4,1 fp8_deepseek r=norms+mla+act
/// sms20".
std::string key_of(const Candidate& candidate);

/// The scenario with the candidate's plan and nodes.
Scenario with_candidate(const Scenario& scenario, const Candidate& candidate);

/// The possible candidates of a space. The first is the scenario's own plan, whether the space has
/// it or not. What is impossible (models/plan_rules.hpp) is not in; of candidates whose programs
/// are the same (ZeRO stages of one copy) one is. Where nothing is exchanged between experts,
/// computation has all SMs.
class Candidates {
 public:
  Candidates(const Scenario& scenario, const SearchSpace& space);

  std::size_t size() const { return choices_.size() + 1; }
  Candidate at(std::size_t index) const;
  std::int64_t nodes(std::size_t index) const {
    return index == 0 ? scenario_.cluster.nodes : choices_[index - 1].nodes;
  }

  /// Whether the first is one of the space's, as far as nodes go.
  bool own_is_in_space() const;
  /// Of the space's lists, possible or not.
  std::uint64_t combinations() const { return combinations_; }

 private:
  struct Choice {
    std::int64_t nodes = 0;
    std::int32_t tp = 0, cp = 0, pp = 0, dp = 0, ep = 0, expert_tp = 0;
    std::int32_t micro_batch = 0;
    std::int32_t split = 0;  ///< of splits_
    std::int16_t chunks = 0;
    std::int16_t recompute = 0, precision = 0;  ///< of the space's lists
    std::int16_t communication_sms = 0;
    std::int8_t zero = 0;
    ScheduleKind schedule{};
  };
  class Enumeration;

  Candidate candidate(const Choice& choice) const;

  const Scenario& scenario_;
  SearchSpace space_;
  std::vector<Choice> choices_;
  std::vector<std::vector<StageContents>> splits_;
  std::uint64_t combinations_ = 0;
};

}  // namespace orrery
