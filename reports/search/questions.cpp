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

  std::size_t size() const { return counts_.size(); }
  std::int64_t nodes(std::size_t i) const { return counts_[i]; }

  /// Null if nothing fits.
  const ClusterChoice* operator[](std::size_t i) {
    const std::int64_t nodes = counts_[i];
    const auto [known, inserted] = searched_.try_emplace(nodes);
    if (inserted) known->second = search(nodes);
    return known->second ? &*known->second : nullptr;
  }

  /// The first size in [begin, end) for which `holds` does, by bisection; `end` if there is none.
  template <class Predicate>
  std::size_t first(std::size_t begin, std::size_t end, Predicate holds) {
    while (begin < end) {
      const std::size_t middle = begin + (end - begin) / 2;
      if (holds((*this)[middle])) {
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
  std::size_t begin = 0;
  while (begin < sizes.size() &&
         static_cast<double>(sizes.nodes(begin) * scenario.cluster.gpus_per_node) < least) {
    ++begin;
  }
  const std::size_t found = sizes.first(begin, sizes.size(), [&](const ClusterChoice* choice) {
    return choice != nullptr && choice->days <= days;
  });
  // The largest is the nearest even where no size is above the least.
  if (found == sizes.size() && sizes.size() > 0) (void)sizes[sizes.size() - 1];
  Answer answer = sizes.answer();
  if (found < sizes.size()) {
    answer.met = true;
    answer.choice = *sizes[found];
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
  const std::size_t fits =
      sizes.first(0, sizes.size(), [](const ClusterChoice* choice) { return choice != nullptr; });
  const std::size_t beyond = sizes.first(fits, sizes.size(), [&](const ClusterChoice* choice) {
    return choice == nullptr || choice->gpu_hours > gpu_hours;
  });
  Answer answer = sizes.answer();
  for (const ClusterChoice& choice : answer.searched) {
    if (choice.gpu_hours > gpu_hours) continue;
    if (!answer.choice || choice.days < answer.choice->days) answer.choice = choice;
  }
  answer.met = answer.choice.has_value();
  if (answer.met) {
    answer.why = fmt::format("{}, at most {:.4g} GPU hours", describe(*answer.choice), gpu_hours);
    if (beyond < sizes.size()) {
      answer.why += fmt::format("; {} nodes would take more", sizes.nodes(beyond));
    }
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
