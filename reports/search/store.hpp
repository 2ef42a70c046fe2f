#pragma once
// What a search has evaluated so far, in an SQLite file: a search that was stopped or killed goes
// on where it was. Anyone may look at the file afterwards:
//
//   sqlite3 search.sqlite 'SELECT candidate, step_time_s FROM simulated ORDER BY 2 LIMIT 10'

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "reports/search/search.hpp"

namespace orrery {

/// All that evaluations of a candidate depend on beside itself, in named parts: {"scenario", its
/// text}, ... A store has the results of one question. The space is no part of it: a search over
/// another one goes on with those of its candidates that are there.
struct StoreQuestion {
  std::vector<std::pair<std::string, std::string>> parts;
};
/// `program` is its name and version.
StoreQuestion store_question(const Scenario& scenario, const SearchOptions& options,
                             const std::string& program);
/// 64 bits of it as text, for ranks to compare.
std::string fingerprint_of(const StoreQuestion& question);
/// "h800.yaml, contents 0123456789abcdef"; "none" without a name.
std::string contents_of_file(const std::string& file);
/// The lists of a space as YAML, a line each.
std::string to_text(const SearchSpace& space);

/// Who computes in this session and for which space; for people, and in no result.
struct StoreSession {
  std::string command;
  std::string space;
  int ranks = 1;
};

struct StoredEvaluation {
  std::string key;
  Evaluation evaluation;
};

class Store {
 public:
  /// Opens or creates the file, or with an empty path keeps all in memory. With `fresh` what a
  /// store has is given up; a file that is none is never touched. InputError where the file is no
  /// store, or one of another question, format or program; SqliteError (std::runtime_error) where
  /// it is damaged, in use by another search, or cannot be written.
  Store(const std::string& path, const StoreQuestion& question, const StoreSession& session,
        bool fresh);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  std::optional<Evaluation> find(const std::string& key, Fidelity fidelity) const;
  std::size_t size(Fidelity fidelity) const;

  /// All or nothing, and on the disk when it returns. Keys must be new.
  void add(std::span<const StoredEvaluation> evaluations, Fidelity fidelity);

 private:
  struct Open;
  std::unique_ptr<Open> open_;
};

}  // namespace orrery
