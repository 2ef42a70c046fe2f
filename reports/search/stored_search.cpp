#include "reports/search/stored_search.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "sim/check.hpp"
#include "sim/config.hpp"

namespace orrery {
namespace {

using Clock = std::chrono::steady_clock;

/// Coarse evaluations a task: some tens of milliseconds of them, which a message is small beside. A
/// full simulation is a task by itself.
constexpr std::size_t kCoarseTask = 64;

// Tasks and results travel between processes of the same program only, so their bytes are those of
// memory: the fidelity and indices of candidates, and their evaluations.

std::string task_of(Fidelity fidelity, std::span<const std::size_t> indices) {
  std::string task(1 + indices.size_bytes(), static_cast<char>(fidelity));
  std::memcpy(task.data() + 1, indices.data(), indices.size_bytes());
  return task;
}

std::string compute_task(const Search& search, const std::string& task) {
  std::vector<std::size_t> indices((task.size() - 1) / sizeof(std::size_t));
  std::memcpy(indices.data(), task.data() + 1, indices.size() * sizeof(std::size_t));
  for (const std::size_t index : indices) {
    ORRERY_CHECK(index < search.candidates().size(), "candidate {}", index);
  }
  const auto evaluations = search.evaluate(indices, static_cast<Fidelity>(task[0]));
  static_assert(std::is_trivially_copyable_v<Evaluation>);
  return {reinterpret_cast<const char*>(evaluations.data()),
          evaluations.size() * sizeof(Evaluation)};
}

std::vector<Evaluation> evaluations_in(const std::string& result) {
  std::vector<Evaluation> evaluations(result.size() / sizeof(Evaluation));
  ORRERY_CHECK(evaluations.size() * sizeof(Evaluation) == result.size(), "{} bytes", result.size());
  std::memcpy(evaluations.data(), result.data(), result.size());
  return evaluations;
}

Compute compute_of(const Search& search) {
  return [&search](const std::string& task) { return compute_task(search, task); };
}

StoreSession session_of(const StoredSearchOptions& how) {
  return {.command = how.command, .ranks = how.peers == nullptr ? 1 : how.peers->ranks()};
}

HandOutOptions hand_out_options(const StoredSearchOptions& how) {
  return {.threads = how.threads, .note = how.note};
}

const Evaluation& best_known(const SearchTable& table, std::size_t index) {
  const auto full = table.full.find(index);
  return full == table.full.end() ? table.coarse.at(index) : full->second;
}

std::size_t own_place(const SearchTable& table) {
  if (table.coarse.empty()) return 0;
  const Evaluation& own = best_known(table, 0);
  if (!own.fits) return 0;
  std::size_t place = 1;
  for (const auto& [index, coarse] : table.coarse) {
    const Evaluation& other = best_known(table, index);
    if (other.fits && other.step_time_s < own.step_time_s) ++place;
  }
  return place;
}

/// By memory, then by index.
std::optional<Ranked> smallest(const Search& search, const SearchTable& table) {
  if (table.coarse.empty()) return std::nullopt;
  std::size_t best = table.coarse.begin()->first;
  for (const auto& [index, coarse] : table.coarse) {
    if (best_known(table, index).memory_peak_bytes < best_known(table, best).memory_peak_bytes) {
      best = index;
    }
  }
  Ranked ranked{.index = best, .candidate = search.candidates().at(best)};
  ranked.key = key_of(ranked.candidate);
  ranked.gpus = ranked.candidate.nodes * search.scenario().cluster.gpus_per_node;
  ranked.coarse = table.coarse.at(best);
  if (const auto full = table.full.find(best); full != table.full.end()) ranked.full = full->second;
  return ranked;
}

}  // namespace

StoredSearch::StoredSearch(const Search& search, const SearchOptions& options,
                           StoredSearchOptions how)
    : search_(search),
      options_(options),
      how_(std::move(how)),
      question_(store_question(search, options, how_.program)),
      store_(how_.store, question_, session_of(how_), how_.fresh),
      hand_out_(how_.peers, fingerprint_of(question_), compute_of(search), hand_out_options(how_)) {
  compare_own_plan();
}

void StoredSearch::compare_own_plan() {
  // A version is a name: that this build computes what the store has, one candidate tells.
  const std::string key = key_of(search_.candidates().at(0));
  for (const Fidelity fidelity : {Fidelity::coarse, Fidelity::full}) {
    const auto stored = store_.find(key, fidelity);
    if (!stored) continue;
    const std::size_t own[] = {0};
    const Evaluation computed = search_.evaluate(own, fidelity).front();
    if (*stored == computed) continue;
    Problems problems;
    problems.add(
        Location{how_.store, 0, 0},
        fmt::format(
            "this store is of another build of {}: there the scenario's own plan takes {} s "
            "({} evaluation), here {} s",
            how_.program, stored->step_time_s, name_of(fidelity), computed.step_time_s),
        "--fresh starts over in it, or name another --store");
    problems.throw_if_any();
  }
}

SearchAnswer StoredSearch::run() {
  SearchAnswer answer;
  answer.result = search_.run([this](std::span<const std::size_t> indices, Fidelity fidelity) {
    std::vector<Evaluation> evaluations = evaluate(indices, fidelity);
    auto& table = fidelity == Fidelity::coarse ? table_.coarse : table_.full;
    for (std::size_t i = 0; i < indices.size(); ++i) table[indices[i]] = evaluations[i];
    return evaluations;
  });
  answer.table = std::exchange(table_, {});
  answer.own_place = own_place(answer.table);
  if (answer.result.best.empty()) answer.nearest = smallest(search_, answer.table);
  return answer;
}

std::vector<Evaluation> StoredSearch::evaluate(std::span<const std::size_t> indices,
                                               Fidelity fidelity) {
  std::vector<Evaluation> all(indices.size());
  std::vector<std::string> keys(indices.size());
  std::vector<std::size_t> missing;  // positions in `indices`
  for (std::size_t i = 0; i < indices.size(); ++i) {
    keys[i] = key_of(search_.candidates().at(indices[i]));
    if (const auto known = store_.find(keys[i], fidelity)) {
      all[i] = *known;
    } else {
      missing.push_back(i);
    }
  }

  const std::size_t step = fidelity == Fidelity::coarse ? kCoarseTask : 1;
  std::vector<std::string> tasks;
  for (std::size_t begin = 0; begin < missing.size(); begin += step) {
    std::vector<std::size_t> some;
    for (std::size_t m = begin; m < std::min(begin + step, missing.size()); ++m) {
      some.push_back(indices[missing[m]]);
    }
    tasks.push_back(task_of(fidelity, some));
  }

  Progress& progress = progress_[static_cast<std::size_t>(fidelity)];
  progress.done += indices.size() - missing.size();
  const auto begin = Clock::now();
  const double spent_s = progress.spent_s;
  const auto tell = [&] {
    progress.spent_s = spent_s + std::chrono::duration<double>(Clock::now() - begin).count();
    if (how_.progress) {
      how_.progress(
          {.fidelity = fidelity,
           .done = progress.done,
           .of = fidelity == Fidelity::coarse ? search_.candidates().size() : options_.full + 1,
           .per_s = static_cast<double>(progress.computed) / std::max(progress.spent_s, 1e-3),
           .threads = hand_out_.threads()});
    }
  };
  tell();
  hand_out_.run(tasks, [&](std::span<const TaskResult> results) {
    std::vector<StoredEvaluation> rows;
    for (const TaskResult& result : results) {
      std::size_t at = result.task * step;
      for (const Evaluation& evaluation : evaluations_in(result.result)) {
        const std::size_t i = missing.at(at++);
        all[i] = evaluation;
        rows.push_back({.index = indices[i], .key = keys[i], .evaluation = evaluation});
      }
    }
    store_.add(rows, fidelity);
    progress.done += rows.size();
    progress.computed += rows.size();
    tell();
    if (how_.stopped && how_.stopped()) stop();
  });
  return all;
}

void StoredSearch::stop() const {
  if (how_.store.empty()) {
    throw SearchStopped("stopped, and nothing is kept without --store");
  }
  throw SearchStopped(
      fmt::format("stopped: {} coarse and {} full evaluations are in {}, and the same command goes "
                  "on with them",
                  store_.size(Fidelity::coarse), store_.size(Fidelity::full), how_.store));
}

std::unique_ptr<SearchInput> read_search(const std::string& scenario_file,
                                         const std::string& space_file,
                                         const SearchOptions& options) {
  Scenario scenario = read_scenario(scenario_file);
  const SearchSpace space =
      space_file.empty() ? read_search_space(scenario) : read_search_space(space_file, scenario);
  return std::make_unique<SearchInput>(std::move(scenario), space, options);
}

void serve_search(Peers& peers, const std::function<ServedSearch()>& prepare,
                  const StoredSearchOptions& how) {
  serve(
      peers,
      [&]() -> Prepared {
        const ServedSearch served = prepare();
        return {
            .question = fingerprint_of(store_question(*served.search, served.options, how.program)),
            .compute = compute_of(*served.search)};
      },
      hand_out_options(how));
}

}  // namespace orrery
