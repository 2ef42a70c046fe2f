#include "reports/search/questions.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "models/plan_rules.hpp"

namespace orrery {
namespace {

/// Searches sizes when asked for them, each once.
class Sizes {
 public:
  Sizes(const Scenario& scenario, const SearchSpace& space, double tokens,
        const QuestionOptions& options)
      : scenario_(scenario), space_(space), tokens_(tokens), options_(options) {
    counts_ = options.nodes;
    if (counts_.empty()) {
      const std::int64_t most = kMaxGpus / scenario.cluster.gpus_per_node;
      counts_ = node_counts(std::min(most, 8 * scenario.cluster.nodes));
    }
  }

  /// Sizes of which each is some doublings of the one before; together they are all.
  std::vector<std::vector<std::int64_t>> chains() const {
    std::map<std::int64_t, std::vector<std::int64_t>> by_odd_part;
    for (const std::int64_t n : counts_) {
      std::int64_t odd = n;
      while (odd % 2 == 0) odd /= 2;
      by_odd_part[odd].push_back(n);
    }
    std::vector<std::vector<std::int64_t>> chains;
    for (auto& [odd, chain] : by_odd_part) chains.push_back(std::move(chain));
    return chains;
  }

  /// Null if nothing fits.
  const ClusterChoice* on(std::int64_t nodes) {
    const auto [known, inserted] = searched_.try_emplace(nodes);
    if (inserted) known->second = search(nodes);
    return known->second ? &*known->second : nullptr;
  }

  /// The first size of a chain, from `begin` on, for which `holds` does, by bisection; its length
  /// if there is none.
  template <class Predicate>
  std::size_t first(const std::vector<std::int64_t>& chain, std::size_t begin, Predicate holds) {
    std::size_t end = chain.size();
    while (begin < end) {
      const std::size_t middle = begin + (end - begin) / 2;
      if (holds(on(chain[middle]))) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    return begin;
  }

  Answer answer() const {
    Answer answer;
    for (const auto& [nodes, choice] : searched_) {
      if (choice) {
        answer.searched.push_back(*choice);
      } else {
        answer.nothing_fits.push_back(nodes);
      }
    }
    return answer;
  }

 private:
  std::optional<ClusterChoice> search(std::int64_t nodes) const {
    SearchSpace space = space_;
    space.nodes = {nodes};
    SearchOptions options = options_.search;
    options.best = 1;
    options.front_time = 0;
    const Search search(scenario_, space, options);
    const SearchResult result =
        options_.evaluator ? search.run(options_.evaluator(search)) : search.run();
    if (result.best.empty()) return std::nullopt;
    ClusterChoice choice{.nodes = nodes, .layout = result.best.front()};
    choice.gpu_hours = choice.layout.gpu_hours_per_trillion_tokens * tokens_ / 1e12;
    choice.days = choice.gpu_hours / static_cast<double>(choice.layout.gpus) / 24;
    return choice;
  }

  const Scenario& scenario_;
  const SearchSpace& space_;
  double tokens_;
  const QuestionOptions& options_;
  std::vector<std::int64_t> counts_;
  std::map<std::int64_t, std::optional<ClusterChoice>> searched_;
};

/// GPUs that would be enough if all ran at their peak.
double least_gpus(const Scenario& scenario, double tokens, double days) {
  const Device& device = scenario.profile.device;
  const double flops_per_s = std::max(device.bf16_flops_per_s, device.fp8_flops_per_s);
  const FlopsPerToken flops =
      training_flops_per_token(scenario.model, scenario.plan.sequence_length);
  return tokens * flops.causal / (flops_per_s * days * 86400);
}

std::string describe(const ClusterChoice& choice) {
  return fmt::format("{} nodes ({} GPUs) take {:.2f} days and {:.4g} GPU hours", choice.nodes,
                     choice.layout.gpus, choice.days, choice.gpu_hours);
}

const char* const kNothingFits = "nothing fits in memory on any of the sizes";

}  // namespace

std::vector<std::int64_t> node_counts(std::int64_t most) {
  std::vector<std::int64_t> counts;
  for (std::int64_t n = 1; n <= most; n *= 2) {
    counts.push_back(n);
    if (n >= 2 && n / 2 * 3 <= most) counts.push_back(n / 2 * 3);
  }
  return counts;
}

Answer smallest_cluster(const Scenario& scenario, const SearchSpace& space, double tokens,
                        double days, const QuestionOptions& options) {
  Sizes sizes(scenario, space, tokens, options);
  const double least = least_gpus(scenario, tokens, days);
  std::optional<ClusterChoice> smallest;
  for (const std::vector<std::int64_t>& chain : sizes.chains()) {
    std::size_t begin = 0;
    while (begin < chain.size() &&
           static_cast<double>(chain[begin] * scenario.cluster.gpus_per_node) < least) {
      ++begin;
    }
    const std::size_t found = sizes.first(chain, begin, [&](const ClusterChoice* choice) {
      return choice != nullptr && choice->days <= days;
    });
    if (found == chain.size()) {
      sizes.on(chain.back());  // the nearest, even where the FLOPs alone say no
    } else if (!smallest || chain[found] < smallest->nodes) {
      smallest = *sizes.on(chain[found]);
    }
  }
  Answer answer = sizes.answer();
  if (smallest) {
    answer.met = true;
    answer.choice = std::move(smallest);
    answer.why = fmt::format("{}, at most {:.2f} days", describe(*answer.choice), days);
    return answer;
  }
  for (const ClusterChoice& choice : answer.searched) {
    if (!answer.choice || choice.days < answer.choice->days) answer.choice = choice;
  }
  answer.why = answer.choice ? fmt::format("no size is fast enough for {:.2f} days: nearest, {}",
                                           days, describe(*answer.choice))
                             : kNothingFits;
  return answer;
}

Answer best_for_budget(const Scenario& scenario, const SearchSpace& space, double tokens,
                       double gpu_hours, const QuestionOptions& options) {
  Sizes sizes(scenario, space, tokens, options);
  for (const std::vector<std::int64_t>& chain : sizes.chains()) {
    const std::size_t fits =
        sizes.first(chain, 0, [](const ClusterChoice* choice) { return choice != nullptr; });
    sizes.first(chain, fits, [&](const ClusterChoice* choice) {
      return choice == nullptr || choice->gpu_hours > gpu_hours;
    });
  }
  Answer answer = sizes.answer();
  for (const ClusterChoice& choice : answer.searched) {
    if (choice.gpu_hours > gpu_hours) continue;
    if (!answer.choice || choice.days < answer.choice->days) answer.choice = choice;
  }
  answer.met = answer.choice.has_value();
  if (answer.met) {
    answer.why = fmt::format("{}, at most {:.4g} GPU hours", describe(*answer.choice), gpu_hours);
    return answer;
  }
  for (const ClusterChoice& choice : answer.searched) {
    if (!answer.choice || choice.gpu_hours < answer.choice->gpu_hours) answer.choice = choice;
  }
  answer.why = answer.choice ? fmt::format(
                                   "no size is cheap enough for {:.4g} GPU hours: nearest, "
                                   "{}",
                                   gpu_hours, describe(*answer.choice))
                             : kNothingFits;
  return answer;
}

}  // namespace orrery
