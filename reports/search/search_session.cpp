#include "reports/search/search_session.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <utility>

#include "sim/check.hpp"
#include "sim/config.hpp"

namespace orrery {
namespace {

using Clock = std::chrono::steady_clock;

/// Coarse evaluations a task: neighbours share cells, and a message is small beside them. A full
/// simulation is a task by itself.
constexpr std::size_t kCoarseTask = 128;

// ---- tasks and results. They travel between processes of the same program only, so their bytes
// are those of memory.

struct TaskHead {
  std::int64_t nodes = 0;  ///< of which search: the whole space's, or of one number of nodes
  Fidelity fidelity{};
};
constexpr std::int64_t kWholeSpace = 0;

std::string task_of(const TaskHead& head, std::span<const std::size_t> indices) {
  std::string task(sizeof head + indices.size_bytes(), '\0');
  std::memcpy(task.data(), &head, sizeof head);
  std::memcpy(task.data() + sizeof head, indices.data(), indices.size_bytes());
  return task;
}

TaskHead head_of(const std::string& task) {
  TaskHead head;
  std::memcpy(&head, task.data(), sizeof head);
  return head;
}

std::string compute_task(const Search& search, const std::string& task) {
  std::vector<std::size_t> indices((task.size() - sizeof(TaskHead)) / sizeof(std::size_t));
  std::memcpy(indices.data(), task.data() + sizeof(TaskHead), indices.size() * sizeof(std::size_t));
  for (const std::size_t index : indices) {
    ORRERY_CHECK(index < search.candidates().size(), "candidate {} of {}", index,
                 search.candidates().size());
  }
  const auto evaluations = search.evaluate(indices, head_of(task).fidelity);
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

/// The one number of nodes of a search that has one, and is not of the whole space.
std::int64_t nodes_of(const Search& search, const SearchInput& input) {
  const Candidates& candidates = search.candidates();
  // The first is the scenario's own plan, in every search.
  if (candidates.size() == 1) return kWholeSpace;
  const std::int64_t nodes = candidates.nodes(1);
  if (input.space.nodes == std::vector{nodes}) return kWholeSpace;
  return candidates.nodes(candidates.size() - 1) == nodes ? nodes : kWholeSpace;
}

/// The searches that tasks are of, made where they are first asked for. Tasks of one search follow
/// each other, so one is kept.
class Searches {
 public:
  explicit Searches(SearchInput input) : input_(std::move(input)) {}

  const SearchInput& input() const { return input_; }

  std::shared_ptr<const Search> of(std::int64_t nodes) {
    const std::lock_guard lock(mutex_);
    if (search_ == nullptr || nodes_ != nodes) {
      SearchSpace space = input_.space;
      if (nodes != kWholeSpace) space.nodes = {nodes};
      search_.reset();
      search_ = std::make_shared<const Search>(input_.scenario, space, input_.options);
      nodes_ = nodes;
    }
    return search_;
  }

 private:
  const SearchInput input_;
  std::mutex mutex_;
  std::int64_t nodes_ = 0;
  std::shared_ptr<const Search> search_;
};

/// What ranks must agree on.
std::string agreement(const SearchInput& input, const std::string& program) {
  StoreQuestion question = store_question(input.scenario, input.options, program);
  question.parts.emplace_back("space", to_text(input.space));
  question.parts.emplace_back("build", contents_of_file("/proc/self/exe"));
  return fingerprint_of(question);
}

HandOutOptions hand_out_options(const SessionOptions& how) {
  return {.threads = how.threads, .note = how.note};
}

}  // namespace

SearchInput read_search(const std::string& scenario_file, const std::string& space_file,
                        const SearchOptions& options, const Overrides& overrides) {
  SearchInput input{.scenario = read_scenario(scenario_file, overrides), .options = options};
  input.space = space_file.empty() ? read_search_space(input.scenario)
                                   : read_search_space(space_file, input.scenario);
  return input;
}

/// One search, run.
class SearchSession::Run {
 public:
  Run(SearchSession& session, const Search& search, SearchTable* table)
      : session_(session),
        search_(search),
        table_(table),
        nodes_(nodes_of(search, session.input_)) {}

  std::vector<Evaluation> operator()(std::span<const std::size_t> indices, Fidelity fidelity) {
    if (fidelity == Fidelity::full) {
      std::vector<Evaluation> all = get(indices, fidelity);
      if (table_ != nullptr) {
        for (std::size_t i = 0; i < indices.size(); ++i) table_->full[indices[i]] = all[i];
      }
      return all;
    }
    if (coarse_.empty()) {
      std::vector<std::size_t> every(search_.candidates().size());
      std::iota(every.begin(), every.end(), std::size_t{0});
      coarse_ = get(every, fidelity);
      if (table_ != nullptr) table_->coarse = coarse_;
    }
    std::vector<Evaluation> some;
    for (const std::size_t index : indices) some.push_back(coarse_.at(index));
    return some;
  }

 private:
  struct Progress {
    std::size_t done = 0;
    std::size_t computed = 0;
    double spent_s = 0;
  };

  /// From the store, and what it has not, from the threads and ranks.
  std::vector<Evaluation> get(std::span<const std::size_t> indices, Fidelity fidelity) {
    session_.search_ = &search_;
    session_.compare_own_plan(search_);
    std::vector<Evaluation> all(indices.size());
    std::vector<std::string> keys(indices.size());
    std::vector<std::size_t> missing;  // positions in `indices`
    for (std::size_t i = 0; i < indices.size(); ++i) {
      keys[i] = key_of(search_.candidates().at(indices[i]));
      if (const auto known = session_.store_.find(keys[i], fidelity)) {
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
      tasks.push_back(task_of({.nodes = nodes_, .fidelity = fidelity}, some));
    }

    Progress& progress = progress_[static_cast<std::size_t>(fidelity)];
    progress.done += indices.size() - missing.size();
    const auto begin = Clock::now();
    const double spent_s = progress.spent_s;
    const auto tell = [&] {
      progress.spent_s = spent_s + std::chrono::duration<double>(Clock::now() - begin).count();
      say(progress, fidelity);
    };
    tell();
    session_.hand_out_->run(tasks, [&](std::span<const TaskResult> results) {
      std::vector<StoredEvaluation> rows;
      for (const TaskResult& result : results) {
        std::size_t at = result.task * step;
        for (const Evaluation& evaluation : evaluations_in(result.result)) {
          const std::size_t i = missing.at(at++);
          all[i] = evaluation;
          rows.push_back({.key = keys[i], .evaluation = evaluation});
        }
      }
      session_.store_.add(rows, fidelity);
      progress.done += rows.size();
      progress.computed += rows.size();
      tell();
      if (session_.how_.stopped && session_.how_.stopped()) session_.stop();
    });
    return all;
  }

  void say(const Progress& progress, Fidelity fidelity) const {
    if (!session_.how_.progress) return;
    const bool coarse = fidelity == Fidelity::coarse;
    const double computed = static_cast<double>(progress.computed);
    session_.how_.progress(
        {.gpus = nodes_ * session_.input_.scenario.cluster.gpus_per_node,
         .fidelity = fidelity,
         .done = progress.done,
         .of = coarse ? search_.candidates().size() : session_.input_.options.full + 1,
         .per_s = computed / std::max(progress.spent_s, 1e-3),
         .threads = session_.hand_out_->threads()});
  }

  SearchSession& session_;
  const Search& search_;
  SearchTable* table_;
  std::int64_t nodes_;
  std::vector<Evaluation> coarse_;
  Progress progress_[2];  // by fidelity
};

SearchSession::SearchSession(const SearchInput& input, SessionOptions how)
    : input_(input),
      how_(std::move(how)),
      store_(how_.store, store_question(input.scenario, input.options, how_.program),
             {.command = how_.command,
              .space = to_text(input.space),
              .ranks = how_.peers == nullptr ? 1 : how_.peers->ranks()},
             how_.fresh),
      hand_out_(std::make_unique<HandOut>(
          how_.peers, how_.peers == nullptr ? "" : agreement(input, how_.program),
          [this](const std::string& task) { return compute(task); }, hand_out_options(how_))) {}

SearchSession::~SearchSession() = default;

std::string SearchSession::compute(const std::string& task) const {
  // Tasks of an earlier search are over when search_ changes.
  return compute_task(*search_, task);
}

void SearchSession::compare_own_plan(const Search& search) {
  // A version is a name: that this build computes what the store has, one candidate tells.
  if (std::exchange(compared_, true)) return;
  const std::string key = key_of(search.candidates().at(0));
  for (const Fidelity fidelity : {Fidelity::coarse, Fidelity::full}) {
    const auto stored = store_.find(key, fidelity);
    if (!stored) continue;
    const std::size_t own[] = {0};
    const Evaluation computed = search.evaluate(own, fidelity).front();
    if (*stored == computed) continue;
    Problems problems;
    problems.add(
        Location{how_.store, 0, 0},
        fmt::format(
            "this store is of another build of {}: there the scenario's own plan takes {} s "
            "and {} bytes ({} evaluation), here {} s and {} bytes",
            how_.program, stored->step_time_s, stored->memory_peak_bytes, name_of(fidelity),
            computed.step_time_s, computed.memory_peak_bytes),
        "--fresh starts over in it, or name another --store");
    problems.throw_if_any();
  }
}

void SearchSession::stop() const {
  if (how_.store.empty()) {
    throw SearchStopped("stopped, and nothing is kept without --store");
  }
  throw SearchStopped(
      fmt::format("stopped: {} coarse and {} full evaluations are in {}, and the same command goes "
                  "on with them",
                  store_.size(Fidelity::coarse), store_.size(Fidelity::full), how_.store));
}

Evaluate SearchSession::evaluator(const Search& search, SearchTable* table) {
  return [run = std::make_shared<Run>(*this, search, table)](std::span<const std::size_t> indices,
                                                             Fidelity fidelity) {
    return (*run)(indices, fidelity);
  };
}

void serve_search(Peers& peers, const std::function<SearchInput()>& prepare,
                  const SessionOptions& how) {
  serve(
      peers,
      [&]() -> Prepared {
        const auto searches = std::make_shared<Searches>(prepare());
        return {.question = agreement(searches->input(), how.program),
                .compute = [searches](const std::string& task) {
                  return compute_task(*searches->of(head_of(task).nodes), task);
                }};
      },
      hand_out_options(how));
}

// ---- what is asked

namespace {

std::size_t own_place(const SearchResult& result, const SearchTable& table) {
  if (!result.own.best_known().fits) return 0;
  const auto is_own = [&](const Ranked& ranked) { return ranked.index == result.own.index; };
  const auto own = std::find_if(result.best.begin(), result.best.end(), is_own);
  if (own != result.best.end()) return static_cast<std::size_t>(own - result.best.begin()) + 1;
  const double own_s = table.coarse[result.own.index].step_time_s;
  const auto faster =
      std::count_if(table.coarse.begin(), table.coarse.end(),
                    [&](const Evaluation& e) { return e.fits && e.step_time_s < own_s; });
  return std::max(static_cast<std::size_t>(faster), result.best.size()) + 1;
}

/// By memory, then by index.
std::optional<Ranked> smallest(const Search& search, const SearchTable& table) {
  const auto known = [&](std::size_t index) -> const Evaluation& {
    const auto full = table.full.find(index);
    return full == table.full.end() ? table.coarse[index] : full->second;
  };
  std::size_t best = 0;
  for (std::size_t i = 1; i < table.coarse.size(); ++i) {
    if (known(i).memory_peak_bytes < known(best).memory_peak_bytes) best = i;
  }
  Ranked ranked{.index = best, .candidate = search.candidates().at(best)};
  ranked.key = key_of(ranked.candidate);
  ranked.gpus = ranked.candidate.plan.parallelism.world();
  ranked.coarse = table.coarse[best];
  if (table.full.contains(best)) ranked.full = known(best);
  return ranked;
}

}  // namespace

SearchAnswer find_best(SearchSession& session, const Search& search) {
  SearchAnswer answer;
  answer.result = search.run(session.evaluator(search, &answer.table));
  answer.own_place = own_place(answer.result, answer.table);
  if (answer.result.best.empty()) answer.nearest = smallest(search, answer.table);
  return answer;
}

QuestionOptions question_options(SearchSession& session) {
  const SearchInput& input = session.input();
  QuestionOptions options{.search = input.options};
  if (input.space.nodes != std::vector{input.scenario.cluster.nodes}) {
    options.nodes = input.space.nodes;
  }
  options.evaluator = [&session](const Search& search) { return session.evaluator(search); };
  return options;
}

}  // namespace orrery
