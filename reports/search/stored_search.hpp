#pragma once
// A search that keeps what it evaluates, goes on where it was, and uses all threads and ranks.

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "reports/search/hand_out.hpp"
#include "reports/search/search.hpp"
#include "reports/search/store.hpp"

namespace orrery {

struct SearchProgress {
  Fidelity fidelity{};
  std::size_t done = 0;  ///< of this fidelity, what the store had included
  std::size_t of = 0;    ///< coarse: all candidates; full: so many at most
  double per_s = 0;      ///< evaluations computed, over the time of this fidelity so far
  int threads = 0;       ///< of all ranks that have come
};

struct StoredSearchOptions {
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
  std::map<std::size_t, Evaluation> coarse;
  std::map<std::size_t, Evaluation> full;
};

struct SearchAnswer {
  SearchResult result;
  SearchTable table;
  /// Of the scenario's own plan among all that fit, by the best that is known of each; 0: it does
  /// not fit.
  std::size_t own_place = 0;
  /// Where nothing fits: the candidate that needs the least memory.
  std::optional<Ranked> nearest;
};

/// A store and a hand-out, put together: looks each candidate up in the store, has the missing ones
/// computed, and stores them as they come.
class StoredSearch {
 public:
  /// Both outlive it. Throws as Store's constructor, and where the store has the scenario's own
  /// plan with other numbers than this build of the program computes.
  StoredSearch(const Search& search, const SearchOptions& options, StoredSearchOptions how);

  /// search.run(), whose result does not depend on what the store had, on threads or on ranks.
  SearchAnswer run();

  const Store& store() const { return store_; }

 private:
  std::vector<Evaluation> evaluate(std::span<const std::size_t> indices, Fidelity fidelity);
  void compare_own_plan();
  [[noreturn]] void stop() const;

  const Search& search_;
  SearchOptions options_;
  StoredSearchOptions how_;
  StoreQuestion question_;
  Store store_;
  HandOut hand_out_;
  SearchTable table_;
  struct Progress {
    std::size_t done = 0;
    std::size_t computed = 0;
    double spent_s = 0;
  };
  Progress progress_[2];  ///< by fidelity
};

/// A scenario, what may be chosen, and the Search of both, which refers to them.
struct SearchInput {
  SearchInput(Scenario of, const SearchSpace& space, const SearchOptions& options)
      : scenario(std::move(of)), search(scenario, space, options) {}
  Scenario scenario;
  Search search;
};
/// `space_file` may be empty: the scenario's own `search:` section. Throws InputError.
std::unique_ptr<SearchInput> read_search(const std::string& scenario_file,
                                         const std::string& space_file,
                                         const SearchOptions& options);

/// What a rank other than 0 does in the meantime. `prepare` returns the Search, built from the same
/// input; it and what it refers to live until the end.
struct ServedSearch {
  const Search* search = nullptr;
  SearchOptions options;
};
void serve_search(Peers& peers, const std::function<ServedSearch()>& prepare,
                  const StoredSearchOptions& how);

}  // namespace orrery
