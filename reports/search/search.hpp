#pragma once
// Layout search: every candidate of a space by the coarse evaluation, the best by full simulation.
//
//   Search s(scenario, space, options);
//   SearchResult r = s.run();                    // on this machine
//   SearchResult r = s.run(evaluate);            // e.g. what a store knows, the rest by MPI ranks
//
// All that is computed goes through one function, Evaluate: evaluations of the candidates with
// these indices, at this fidelity. Search::evaluate is the one that computes, on all threads of
// this process; another one may look results up by key, hand indices to other processes that built
// the same Search, and call Search::evaluate for what is left. Results do not depend on who
// evaluated what, or on the number of threads.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "reports/report.hpp"
#include "reports/search/coarse.hpp"
#include "reports/search/space.hpp"

namespace orrery {

enum class Fidelity : std::uint8_t {
  coarse,  ///< reports/search/coarse.hpp
  full,    ///< study_step
};
std::string_view name_of(Fidelity fidelity);

/// Plain numbers, so that it can be stored.
struct Evaluation {
  bool fits = false;  ///< in the device's memory
  /// Coarse: a lower bound, which full simulation exceeds where exchanges run ahead of computation.
  std::int64_t memory_peak_bytes = 0;
  /// 0 where it does not fit and the fidelity is coarse: then nothing was timed.
  double step_time_s = 0;
  PhaseTimes phases_s;  ///< mean over ranks; they add up to the step

  friend bool operator==(const Evaluation&, const Evaluation&) = default;
};

struct SearchOptions {
  std::size_t best = 10;  ///< how many to rank
  /// Full simulations at most, the scenario's own plan not counted. Where coarse times are those of
  /// the full simulation, one suffices for each candidate that is shown.
  std::size_t full = 1000;
  std::optional<Network> network;  ///< of full simulations; as in StudyOptions
  double memory_share = 1;         ///< of the device's memory that a candidate may need
  double front_time = 2;           ///< time_and_memory: no slower than this many times the best
};

/// `indices` ascending; as many evaluations in the same order.
using Evaluate =
    std::function<std::vector<Evaluation>(std::span<const std::size_t> indices, Fidelity)>;

/// A candidate in a result.
struct Ranked {
  std::size_t index = 0;  ///< in Candidates
  Candidate candidate;
  std::string key;
  std::int64_t gpus = 0;
  double gpu_hours_per_trillion_tokens = 0;
  Evaluation coarse;
  std::optional<Evaluation> full;
  const Evaluation& best_known() const { return full ? *full : coarse; }
};

/// One part of a step in two candidates.
struct PhaseDifference {
  std::string phase;
  double winner_s = 0;
  double other_s = 0;
};

struct SearchCounts {
  std::uint64_t combinations = 0;  ///< of the space's lists
  std::uint64_t impossible = 0;    ///< of them: no rule allows them, or another is the same step
  std::uint64_t candidates = 0;
  std::uint64_t too_large = 0;  ///< do not fit in memory
  std::uint64_t timed = 0;      ///< by the coarse evaluation
  std::uint64_t simulated = 0;  ///< in full
};

struct SearchResult {
  SearchCounts counts;
  Ranked own;                ///< the scenario's own plan
  std::vector<Ranked> best;  ///< by step time of the full simulation, then by index
  /// Whether no candidate that was not simulated in full belongs to what is listed here, else why
  /// not. A coarse time is never more than that of the full simulation, so that those behind the
  /// slowest of the best need none; not so where loads of experts are drawn.
  bool certain = false;
  std::string why_uncertain;
  /// Nothing else is both faster and smaller: ascending in step time, descending in memory.
  std::vector<Ranked> time_and_memory;
  /// Fewest GPUs first, where the space has several numbers of nodes: with more GPUs, faster; with
  /// more GPUs, less GPU time (the fastest layout of each number).
  std::vector<Ranked> time_and_gpus;
  std::vector<Ranked> gpu_hours_and_gpus;
  /// Why the winner wins, by part, largest saving first. Empty without a second or if the own plan
  /// wins or does not run.
  std::vector<PhaseDifference> against_second;
  std::vector<PhaseDifference> against_own;
};

class Search {
 public:
  /// Enumerates. `scenario` outlives it.
  Search(const Scenario& scenario, const SearchSpace& space, const SearchOptions& options = {});
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;

  const Candidates& candidates() const { return candidates_; }
  const Scenario& scenario() const { return scenario_; }

  /// Thread-safe.
  std::vector<Evaluation> evaluate(std::span<const std::size_t> indices, Fidelity fidelity) const;

  /// Coarse on all, in blocks that ascend, then full on what is needed.
  SearchResult run(const Evaluate& evaluate) const;
  SearchResult run() const;

 private:
  const Scenario& scenario_;
  SearchOptions options_;
  Candidates candidates_;
  CoarseModel coarse_;
};

}  // namespace orrery
