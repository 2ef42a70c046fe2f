#pragma once
// Questions that a search over sizes of a cluster answers. The cluster keeps its nodes, links and
// device; only how many nodes there are changes.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "reports/search/search.hpp"

namespace orrery {

/// The fastest layout on so many nodes.
struct ClusterChoice {
  std::int64_t nodes = 0;
  Ranked layout;
  double days = 0;       ///< for all tokens of the question
  double gpu_hours = 0;  ///< likewise
};

struct Answer {
  bool met = false;
  /// Where the question cannot be met: what comes nearest. None if nothing fits anywhere.
  std::optional<ClusterChoice> choice;
  std::string why;  ///< one sentence
  /// All sizes that were searched, ascending; on the others nothing fits.
  std::vector<ClusterChoice> searched;
  std::vector<std::int64_t> nothing_fits;
};

struct QuestionOptions {
  /// Ascending; empty: node_counts() up to eight times the scenario's nodes.
  std::vector<std::int64_t> nodes;
  SearchOptions search;
  /// Who evaluates the candidates of a search; none: the search itself.
  std::function<Evaluate(const Search&)> evaluator;
};

/// 2^a and 3 x 2^a, up to `most`: sizes over which a batch that is mostly a power of two can be
/// spread.
std::vector<std::int64_t> node_counts(std::int64_t most);

/// The smallest number of nodes that trains so many tokens in so many days. Bisection over sizes of
/// which each is some doublings of the one before: taken for granted is that what doubles gets no
/// slower (what grows by less may, where degrees no longer divide it). Sizes whose peak rate is too
/// little for the model's FLOPs are not searched. Not met: the fastest searched.
Answer smallest_cluster(const Scenario& scenario, const SearchSpace& space, double tokens,
                        double days, const QuestionOptions& options = {});

/// The layout that trains so many tokens soonest for at most so many GPU hours, over all sizes.
/// Bisection likewise, over those on which anything fits: taken for granted is that what doubles
/// gets no cheaper. Not met: the cheapest searched.
Answer best_for_budget(const Scenario& scenario, const SearchSpace& space, double tokens,
                       double gpu_hours, const QuestionOptions& options = {});

}  // namespace orrery
