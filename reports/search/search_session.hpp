#pragma once
// Searches that keep what they evaluate, go on where they were, and use all threads and ranks.
//
//   const SearchInput input = read_search(file, "", {});
//   SearchSession session(input, {.program = "orrery 1.0", .store = "s.sqlite"});
//   SearchAnswer answer = find_best(session);
//
// Ranks other than 0 call serve_search() with the same input.

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "reports/search/hand_out.hpp"
#include "reports/search/questions.hpp"
#include "reports/search/search.hpp"
#include "reports/search/store.hpp"
#include "sim/overrides.hpp"

namespace orrery {

struct SearchInput {
  Scenario scenario;
  SearchSpace space;
  SearchOptions options;
};
/// `space_file` may be empty: then it is the scenario's own `search:` section. Throws InputError.
SearchInput read_search(const std::string& scenario_file, const std::string& space_file,
                        const SearchOptions& options, const Overrides& overrides = {});

struct SearchProgress {
  std::int64_t gpus = 0;  ///< of the size that is searched; 0: of all
  Fidelity fidelity{};
  std::size_t done = 0;  ///< of this fidelity, what the store had included
  std::size_t of = 0;    ///< coarse: all candidates; full: no more than that
  double per_s = 0;      ///< evaluations computed, over the time of this fidelity so far
  int threads = 0;       ///< of all ranks that have come
};

struct SessionOptions {
  std::string program;  ///< name and version: whose results these are
  std::string command;  ///< provenance
  std::string store;    ///< file; empty: only in memory
  bool fresh = false;   ///< give up what the store has
  int threads = 0;      ///< of each rank; 0: its share of the machine's
  Peers* peers = nullptr;
  std::function<void(const SearchProgress&)> progress;  ///< several times a second
  std::function<void(const std::string&)> note;
  std::function<bool()> stopped;  ///< asked several times a second; true ends with SearchStopped
};

/// Somebody wanted it to end. The text says what is kept.
class SearchStopped : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Evaluations that a search asked for, by index: the same whatever a store has beside them.
struct SearchTable {
  std::vector<Evaluation> coarse;
  std::map<std::size_t, Evaluation> full;
};

/// A store and a hand-out, put together: what searches ask for is looked up in the store, and what
/// it has not is computed and stored as it comes.
class SearchSession {
 public:
  /// `input` outlives it. Throws as Store's constructor.
  SearchSession(const SearchInput& input, SessionOptions how);
  ~SearchSession();
  SearchSession(const SearchSession&) = delete;
  SearchSession& operator=(const SearchSession&) = delete;

  const SearchInput& input() const { return input_; }

  /// For Search::run() of a search of the input's scenario and space, or of the space with one
  /// number of nodes instead of its own (questions.hpp); one search at a time. All coarse
  /// evaluations are computed at the first that are asked for, so that there are enough for all
  /// ranks. Throws InputError where the store has the scenario's own plan with other numbers than
  /// this build of the program computes. `table`, if not null, is filled with what is asked for.
  Evaluate evaluator(const Search& search, SearchTable* table = nullptr);

 private:
  class Run;
  std::string compute(const std::string& task) const;
  void compare_own_plan(const Search& search);
  [[noreturn]] void stop() const;

  const SearchInput& input_;
  SessionOptions how_;
  Store store_;
  const Search* search_ = nullptr;  ///< that tasks are of
  bool compared_ = false;
  std::unique_ptr<HandOut> hand_out_;  ///< last: its threads use the rest
};

/// What a rank other than 0 does in the meantime. `prepare` reads the same input.
void serve_search(Peers& peers, const std::function<SearchInput()>& prepare,
                  const SessionOptions& how);

struct SearchAnswer {
  SearchResult result;
  SearchTable table;
  /// Place of the scenario's own plan among all that fit: its rank if it is among the best, else by
  /// coarse times; 0: it does not fit.
  std::size_t own_place = 0;
  /// Where nothing fits: the candidate that needs the least memory.
  std::optional<Ranked> nearest;
};

/// Runs `search`, which is of the session's input. The answer does not depend on what the store
/// had, on threads or on ranks.
SearchAnswer find_best(SearchSession& session, const Search& search);

/// Options for the questions: their searches go through the session. Sizes are the space's, or,
/// where it has just the scenario's, all up to eight times that.
QuestionOptions question_options(SearchSession& session);

}  // namespace orrery
