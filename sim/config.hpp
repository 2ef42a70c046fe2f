#pragma once
// Files from users: a located tree, and a reader that reports every problem at once.
//
// yaml-cpp keeps duplicate keys silently, returns fallbacks on bad text and reads `010` as 8, so
// its own accessors are used nowhere but in config.cpp, which turns a document into Nodes whose
// scalars are still text. Each Node knows its file, line and column. JSON files are read by the
// same path (JSON is YAML's flow style).

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sim/units.hpp"

namespace orrery {

struct Location {
  std::string file;
  int line = 0;    ///< 1-based; 0: the whole file
  int column = 0;  ///< 1-based, in characters (not bytes)
};

struct Problem {
  Location at;
  std::string message;      ///< "unknown key 'pipline' in plan"
  std::string hint;         ///< "did you mean 'pipeline'?", may be empty
  std::string source_line;  ///< the text of that line, may be empty
};

/// The world's fault: bad input. main() prints it and exits 2.
class InputError : public std::runtime_error {
 public:
  explicit InputError(std::vector<Problem> problems);
  const std::vector<Problem>& problems() const { return problems_; }

 private:
  std::vector<Problem> problems_;
};

/// "file:line:col: error: message", the line, a caret, the hint; one block per problem. Files in
/// order of first appearance, then by line and column; identical problems once; at most 50.
std::string format_problems(std::span<const Problem> problems);

/// Part of one parsed document; cheap to copy (shares the document).
class Node {
 public:
  enum class Kind { null, scalar, sequence, map };

  Node();  ///< a null node without a location
  Kind kind() const;
  Location at() const;
  std::string source_line() const;
  std::string folder() const;  ///< that paths in it are relative to: of its file, or the overridden
  bool overridden() const;     ///< is it what an override put there (sim/overrides.hpp)?

  const std::string& text() const;  ///< scalar only: as written, unquoted
  bool quoted() const;              ///< scalar only: was it written in quotes?

  std::size_t size() const;              ///< elements of a sequence, entries of a map, else 0
  Node operator[](std::size_t i) const;  ///< element of a sequence, value of a map entry
  Node key(std::size_t i) const;         ///< key of a map entry
  std::optional<Node> find(
      std::string_view key) const;  ///< value by key; nullopt if absent or no map
  std::vector<Node> removed_keys() const;  ///< by overrides; were they ever there or not

  struct Data;  // of document.hpp, private to config.cpp and overrides.cpp
  explicit Node(std::shared_ptr<const Data> data) : data_(std::move(data)) {}
  const Data& data() const { return *data_; }  ///< not of a null node without a location

 private:
  std::shared_ptr<const Data> data_;
};

/// Collects problems; nothing is thrown until all of a file (or scenario) has been looked at.
class Problems {
 public:
  void add(const Node& where, std::string message, std::string hint = "");
  void add(Location where, std::string message, std::string hint = "");
  /// For files that are no documents: with the text of the line, if it is to be shown.
  void add(Problem problem);
  bool empty() const { return list_.empty(); }
  std::size_t size() const { return list_.size(); }
  std::span<const Problem> list() const { return list_; }
  void throw_if_any() const;  ///< throws InputError

 private:
  std::vector<Problem> list_;
};

/// Documents by path, each parsed once: for reading the same files again and again (a scenario with
/// other and other overrides). Threads may share one. A document remembers the cache it was read
/// with, and the files that it names come from there (read_named_document, sim/overrides.hpp).
class DocumentCache;
std::shared_ptr<DocumentCache> make_document_cache();

/// The bytes of a file, at most 64 MiB; a missing, unreadable or larger file is a problem.
std::optional<std::string> read_text(const std::string& path, Problems& problems);

/// Reads a .yaml/.yml/.json file. A missing or unreadable file, text that is not UTF-8, syntax
/// errors, tabs as indentation, anchors, aliases, tags, merge keys (`<<`), keys that are no text, a
/// second document, more than 200 levels, 1,000,000 values or 64 MiB are problems; the Node is then
/// null and a MapReader over it stays silent. Duplicate keys are problems too, but the tree is
/// returned (with the first of them), so that all else is looked at in the same run.
Node read_document(const std::string& path, Problems& problems,
                   const std::shared_ptr<DocumentCache>& cache = nullptr);
/// `folder`: that paths in the text are relative to, if not that of `name`.
Node read_document_text(std::string text, const std::string& name, Problems& problems,
                        std::optional<std::string> folder = std::nullopt);

/// The candidate nearest to `word` by edit distance, if near enough to be a typo.
std::optional<std::string> nearest(std::string_view word, std::span<const std::string> candidates);

/// Reads one map: asks for keys by name and type; finish() reports every key nobody asked for, with
/// the nearest known key as a suggestion. Every getter reports a missing or malformed value as a
/// problem and returns a harmless value, so that reading goes on and all problems are found in one
/// run. A key without a value ("key:", or JSON's null) is a problem for every getter but has() and
/// at(). Over anything but a map, the constructor reports that once and the getters are silent.
class MapReader {
 public:
  /// `what` names the map in messages ("plan", "model.attention").
  MapReader(Node node, Problems& problems, std::string what);

  bool has(std::string_view key);      ///< also marks the key as known
  Node at(std::string_view key);       ///< the value, or a null Node (no problem reported)
  Node require(std::string_view key);  ///< the value; a problem (and a null Node) if absent or null

  /// Whole numbers: 12, 4_096, 15e3; not 010, 1.5. Range inclusive.
  std::int64_t integer(std::string_view key, std::int64_t min, std::int64_t max);
  std::int64_t integer_or(std::string_view key, std::int64_t fallback, std::int64_t min,
                          std::int64_t max);
  double number(std::string_view key, double min, double max);
  double number_or(std::string_view key, double fallback, double min, double max);
  double quantity(std::string_view key, Dimension dimension);  ///< > 0
  double quantity_or(std::string_view key, double fallback, Dimension dimension);
  std::string text(std::string_view key);
  std::string text_or(std::string_view key, std::string fallback);
  bool flag_or(std::string_view key, bool fallback);  ///< true | false only
  std::vector<std::int64_t> integers(std::string_view key, std::int64_t min, std::int64_t max);

  /// One of the words; the value belonging to it. Unknown words get the list and the nearest one.
  template <class E>
  E choice(std::string_view key, std::initializer_list<std::pair<std::string_view, E>> words) {
    return words.begin()[choose(key, names_of(words), std::nullopt)].second;
  }
  template <class E>
  E choice_or(std::string_view key, E fallback,
              std::initializer_list<std::pair<std::string_view, E>> words) {
    if (!has(key)) return fallback;
    return choice(key, words);
  }

  /// Declares a key as known without reading it now.
  void allow(std::string_view key);
  /// Reports unknown keys. Call once, last.
  void finish();
  /// As finish(), but returns the unknown keys instead of reporting them (foreign formats).
  std::vector<std::string> unread() const;

  const Node& node() const { return node_; }
  Problems& problems() { return problems_; }
  const std::string& what() const { return what_; }

 private:
  template <class E>
  static std::vector<std::string> names_of(
      std::initializer_list<std::pair<std::string_view, E>> words) {
    std::vector<std::string> names;
    for (const auto& w : words) names.emplace_back(w.first);
    return names;
  }
  std::size_t choose(std::string_view key, const std::vector<std::string>& names,
                     std::optional<std::size_t> fallback);

  Node node_;
  Problems& problems_;
  std::string what_;
  std::set<std::string, std::less<>> known_;
};

/// `text` as a double-quoted YAML scalar, which reads back as it is.
std::string in_quotes(std::string_view text);

/// One scalar as a whole number / number / quantity, with a located problem when it is not.
std::optional<std::int64_t> read_integer(const Node& node, Problems& problems, std::int64_t min,
                                         std::int64_t max);
std::optional<double> read_number(const Node& node, Problems& problems, double min, double max);
std::optional<double> read_quantity(const Node& node, Problems& problems, Dimension dimension);

}  // namespace orrery
