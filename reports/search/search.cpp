#include "reports/search/search.hpp"

#include <fmt/format.h>
#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <numeric>
#include <optional>
#include <utility>

#include "reports/study.hpp"
#include "sim/check.hpp"

namespace orrery {

std::string_view name_of(Fidelity fidelity) {
  return fidelity == Fidelity::coarse ? "coarse" : "full";
}

Search::Search(const Scenario& scenario, const SearchSpace& space, const SearchOptions& options)
    : scenario_(scenario), options_(options), candidates_(scenario, space), coarse_(scenario) {}

namespace {

constexpr std::size_t kBlock = 4096;  // candidates of one call for coarse evaluations
constexpr std::size_t kTask = 128;    // of them on one thread: neighbours share cells

Evaluation evaluation_of(const CoarseStep& step, double limit_bytes) {
  return {.fits = static_cast<double>(step.memory_peak_bytes) <= limit_bytes,
          .memory_peak_bytes = step.memory_peak_bytes,
          .step_time_s = seconds(step.time_ps),
          .phases_s = step.phases_s};
}

Evaluation evaluation_of(const Report& report, double limit_bytes) {
  Evaluation evaluation{.step_time_s = report.step_time_s, .phases_s = report.phases_s};
  for (const RankReport& rank : report.ranks) {
    evaluation.memory_peak_bytes = std::max(evaluation.memory_peak_bytes, rank.memory_peak_bytes);
  }
  evaluation.fits = static_cast<double>(evaluation.memory_peak_bytes) <= limit_bytes;
  return evaluation;
}

}  // namespace

std::vector<Evaluation> Search::evaluate(std::span<const std::size_t> indices,
                                         Fidelity fidelity) const {
  const double limit_bytes = options_.memory_share * scenario_.profile.device.memory_bytes;
  std::vector<Evaluation> evaluations(indices.size());
  if (fidelity == Fidelity::full) {
    tbb::parallel_for(std::size_t{0}, indices.size(), [&](std::size_t i) {
      const Scenario scenario = with_candidate(scenario_, candidates_.at(indices[i]));
      const std::optional<Network> network =
          scenario.fabric == nullptr ? Network::formula : options_.network;
      evaluations[i] =
          evaluation_of(study_step(scenario, {.network = network}).report, limit_bytes);
    });
    return evaluations;
  }
  const tbb::blocked_range<std::size_t> all(0, indices.size(), kTask);
  tbb::parallel_for(
      all,
      [&](const tbb::blocked_range<std::size_t>& some) {
        std::vector<Candidate> candidates;
        for (std::size_t i = some.begin(); i < some.end(); ++i) {
          candidates.push_back(candidates_.at(indices[i]));
        }
        const std::vector<CoarseStep> steps = coarse_.evaluate(candidates, limit_bytes);
        for (std::size_t i = 0; i < steps.size(); ++i) {
          evaluations[some.begin() + i] = evaluation_of(steps[i], limit_bytes);
        }
      },
      tbb::simple_partitioner());
  return evaluations;
}

namespace {

/// What is known so far, and what to simulate next.
class Ranking {
 public:
  Ranking(const Evaluate& evaluate, std::vector<Evaluation> coarse, std::size_t budget)
      : evaluate_(evaluate), coarse_(std::move(coarse)), budget_(budget) {}

  const Evaluation& coarse(std::size_t index) const { return coarse_[index]; }
  const Evaluation* full(std::size_t index) const {
    const auto known = full_.find(index);
    return known == full_.end() ? nullptr : &known->second;
  }
  std::size_t simulated() const { return full_.size(); }
  bool out_of_budget() const { return out_of_budget_; }

  /// Also beyond the budget.
  void simulate_own() { run({0}); }

  /// Simulates until the `n` fastest of `order` (ascending in coarse time) that fit are known, and
  /// returns them.
  std::vector<std::size_t> fastest(std::span<const std::size_t> order, std::size_t n) {
    for (;;) {
      std::vector<std::size_t> fit;
      std::vector<std::size_t> unknown;
      for (const std::size_t i : order) {
        const Evaluation* known = full(i);
        if (known == nullptr) {
          unknown.push_back(i);
        } else if (known->fits) {
          fit.push_back(i);
        }
      }
      std::sort(fit.begin(), fit.end(), [&](std::size_t a, std::size_t b) {
        return by_time(*full(a), a) < by_time(*full(b), b);
      });
      if (fit.size() > n) fit.resize(n);
      std::vector<std::size_t> next;
      for (const std::size_t i : unknown) {
        const bool behind =
            fit.size() == n && by_time(*full(fit.back()), fit.back()) < by_time(coarse(i), i);
        if (behind || next.size() == std::max<std::size_t>(n - fit.size(), 4)) break;
        next.push_back(i);
      }
      if (next.empty() || !afford(next)) return fit;
    }
  }

  /// Simulates until all of `order` are known that no other one beats in both time and memory.
  std::vector<std::size_t> front(std::span<const std::size_t> order) {
    for (;;) {
      std::vector<Known> beaten_by;
      for (const std::size_t i : order) {
        const Evaluation* known = full(i);
        if (known != nullptr && known->fits) beaten_by.push_back(Known{*known, i});
      }
      const std::size_t simulated = beaten_by.size();
      std::vector<std::size_t> next;
      for (const std::size_t i : order) {
        if (full(i) != nullptr) continue;
        const auto beats = [&](const Known& k) { return k.beats({coarse(i), i}); };
        if (std::any_of(beaten_by.begin(), beaten_by.end(), beats)) continue;
        // Those that will be simulated are taken for what they promise.
        next.push_back(i);
        beaten_by.push_back({coarse(i), i});
      }
      if (!next.empty() && afford(next)) continue;
      beaten_by.resize(simulated);
      std::vector<std::size_t> kept;
      for (const Known& k : beaten_by) {
        const auto beats = [&](const Known& other) { return other.beats(k); };
        if (std::none_of(beaten_by.begin(), beaten_by.end(), beats)) kept.push_back(k.index);
      }
      std::sort(kept.begin(), kept.end(), [&](std::size_t a, std::size_t b) {
        return by_time(*full(a), a) < by_time(*full(b), b);
      });
      return kept;
    }
  }

 private:
  struct Known {
    Evaluation evaluation;
    std::size_t index = 0;

    bool beats(const Known& other) const {
      const Evaluation& a = evaluation;
      const Evaluation& b = other.evaluation;
      if (index == other.index) return false;
      if (a.step_time_s > b.step_time_s || a.memory_peak_bytes > b.memory_peak_bytes) return false;
      return a.step_time_s < b.step_time_s || a.memory_peak_bytes < b.memory_peak_bytes ||
             index < other.index;
    }
  };

  static std::pair<double, std::size_t> by_time(const Evaluation& e, std::size_t index) {
    return {e.step_time_s, index};
  }

  /// Simulates these, as many as the budget allows; false if it allows none.
  bool afford(std::vector<std::size_t> indices) {
    if (indices.size() > budget_) {
      indices.resize(budget_);
      out_of_budget_ = true;
    }
    if (indices.empty()) return false;
    budget_ -= indices.size();
    run(std::move(indices));
    return true;
  }

  void run(std::vector<std::size_t> indices) {
    std::sort(indices.begin(), indices.end());
    const std::vector<Evaluation> evaluations = evaluate_(indices, Fidelity::full);
    ORRERY_CHECK(evaluations.size() == indices.size(), "{} evaluations of {} candidates",
                 evaluations.size(), indices.size());
    for (std::size_t i = 0; i < indices.size(); ++i) full_.emplace(indices[i], evaluations[i]);
  }

  const Evaluate& evaluate_;
  std::vector<Evaluation> coarse_;
  std::map<std::size_t, Evaluation> full_;
  std::size_t budget_;
  bool out_of_budget_ = false;
};

std::vector<PhaseDifference> differences(const PhaseTimes& winner, const PhaseTimes& other) {
  std::vector<PhaseDifference> all = {
      {"forward", winner.forward, other.forward},
      {"backward", winner.backward, other.backward},
      {"weight", winner.weight, other.weight},
      {"overlapped", winner.overlapped, other.overlapped},
      {"optimizer", winner.optimizer, other.optimizer},
      {"exposed communication", winner.exposed_communication, other.exposed_communication},
      {"bubble", winner.bubble, other.bubble}};
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
    return a.other_s - a.winner_s > b.other_s - b.winner_s;
  });
  return all;
}

}  // namespace

SearchResult Search::run() const {
  return run([this](std::span<const std::size_t> indices, Fidelity fidelity) {
    return evaluate(indices, fidelity);
  });
}

SearchResult Search::run(const Evaluate& evaluate) const {
  std::vector<Evaluation> coarse;
  coarse.reserve(candidates_.size());
  while (coarse.size() < candidates_.size()) {
    std::vector<std::size_t> block(std::min(kBlock, candidates_.size() - coarse.size()));
    std::iota(block.begin(), block.end(), coarse.size());
    const std::vector<Evaluation> some = evaluate(block, Fidelity::coarse);
    ORRERY_CHECK(some.size() == block.size(), "{} evaluations of {} candidates", some.size(),
                 block.size());
    coarse.insert(coarse.end(), some.begin(), some.end());
  }

  SearchResult result;
  result.counts.combinations = candidates_.combinations();
  result.counts.candidates = candidates_.size();
  result.counts.impossible = candidates_.combinations() + 1 - candidates_.size();
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < coarse.size(); ++i) {
    if (!coarse[i].fits) {
      ++result.counts.too_large;
    } else if (i > 0 || candidates_.own_is_in_space()) {
      order.push_back(i);
    }
  }
  result.counts.timed = result.counts.candidates - result.counts.too_large;
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::pair(coarse[a].step_time_s, a) < std::pair(coarse[b].step_time_s, b);
  });

  Ranking ranking(evaluate, std::move(coarse), options_.full);
  const auto ranked = [&](std::size_t index) {
    Ranked r{.index = index, .candidate = candidates_.at(index)};
    r.key = key_of(r.candidate);
    r.gpus = r.candidate.plan.parallelism.world();
    r.coarse = ranking.coarse(index);
    if (const Evaluation* full = ranking.full(index)) r.full = *full;
    const Plan& plan = r.candidate.plan;
    const double tokens = static_cast<double>(plan.global_batch_sequences) *
                          static_cast<double>(plan.sequence_length);
    r.gpu_hours_per_trillion_tokens =
        r.best_known().step_time_s * static_cast<double>(r.gpus) / 3600 * (1e12 / tokens);
    return r;
  };

  ranking.simulate_own();
  for (const std::size_t i : ranking.fastest(order, options_.best)) {
    result.best.push_back(ranked(i));
  }
  if (!result.best.empty()) {
    const double slowest = options_.front_time * result.best.front().full->step_time_s;
    std::vector<std::size_t> near;
    std::copy_if(order.begin(), order.end(), std::back_inserter(near),
                 [&](std::size_t i) { return ranking.coarse(i).step_time_s <= slowest; });
    for (const std::size_t i : ranking.front(near)) {
      if (ranking.full(i)->step_time_s <= slowest) result.time_and_memory.push_back(ranked(i));
    }
  }
  std::map<std::int64_t, std::vector<std::size_t>> by_nodes;
  for (const std::size_t i : order) by_nodes[candidates_.nodes(i)].push_back(i);
  if (by_nodes.size() > 1) {
    for (const auto& [nodes, of_nodes] : by_nodes) {
      const std::vector<std::size_t> fastest = ranking.fastest(of_nodes, 1);
      if (fastest.empty()) continue;
      const Ranked r = ranked(fastest.front());
      const auto improves = [&](const std::vector<Ranked>& list, auto value) {
        return list.empty() || value(r) < value(list.back());
      };
      if (improves(result.time_and_gpus, [](const Ranked& x) { return x.full->step_time_s; })) {
        result.time_and_gpus.push_back(r);
      }
      if (improves(result.gpu_hours_and_gpus,
                   [](const Ranked& x) { return x.gpu_hours_per_trillion_tokens; })) {
        result.gpu_hours_and_gpus.push_back(r);
      }
    }
  }

  result.own = ranked(0);
  result.counts.simulated = ranking.simulated();
  if (!coarse_.exact()) {
    result.why_uncertain =
        "loads of experts are drawn, and candidates were chosen for simulation as with even loads";
  } else if (ranking.out_of_budget()) {
    result.why_uncertain = fmt::format(
        "{} full simulations were not enough to tell all candidates apart", options_.full);
  }
  result.certain = result.why_uncertain.empty();
  if (!result.best.empty()) {
    const Ranked& winner = result.best.front();
    if (result.best.size() > 1) {
      result.against_second = differences(winner.full->phases_s, result.best[1].full->phases_s);
    }
    if (winner.index != 0 && result.own.full) {
      result.against_own = differences(winner.full->phases_s, result.own.full->phases_s);
    }
  }
  return result;
}

}  // namespace orrery
