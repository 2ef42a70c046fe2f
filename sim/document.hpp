#pragma once
// The tree behind Nodes. Only config.cpp, which parses, and overrides.cpp, which edits, look
// inside.

#include <cstddef>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "sim/config.hpp"

namespace orrery {

/// A file: its text and all nodes, which point to each other. Whoever holds a Node keeps it alive.
/// An override is a document, too: one line, of which only the value is parsed.
struct Document {
  std::string name;
  std::string folder;  ///< that paths in it are relative to
  std::string text;
  int first_line = 1;  ///< the number of the text's first line
  bool is_override = false;
  std::vector<std::size_t> line_starts;
  std::deque<Node::Data> nodes;        ///< the first is the root; all stay where they are
  std::weak_ptr<DocumentCache> cache;  ///< for the files that it names; may be none

  void find_lines();
  std::string_view line_text(int line) const;
  std::string_view rest(const Node::Data& node) const;  ///< the text from where the node begins
};

struct Changes;

struct Node::Data {
  const Document* document = nullptr;
  int line = 0;         ///< 1-based, 0: the whole file
  int byte_column = 0;  ///< 0-based
  Kind kind = Kind::null;
  bool quoted = false;
  std::string text;
  std::vector<const Data*> children;       ///< of a map: key, value, key, value ...
  std::shared_ptr<const Changes> changes;  ///< by overrides; null: none but in its children
};

/// An override that has been taken apart.
struct ParsedOverride {
  enum class Action { put, remove, multiply };
  struct Step {
    std::string key;
    int byte_column = 0;
    bool is_index = false;  ///< [3]; of a plain 3 the node says whether it is one
  };
  std::size_t number = 0;  ///< in the list that it came in
  std::shared_ptr<Document> document;
  std::vector<Step> path;
  std::size_t next = 0;  ///< of the path: what is left of it, below where it waits
  Action action = Action::put;
  std::string value;  ///< as it was written, without blanks before it
  int value_column = 0;
  double factor = 0;
};

/// Where the overrides that are applied together got to.
struct Landing {
  std::vector<std::optional<Problem>> waiting;  ///< by number: said if nothing reads on below
};

/// What overrides did to a node beside changing its children.
struct Changes {
  std::vector<ParsedOverride> below;       ///< of a scalar: for the document that it names
  std::vector<const Node::Data*> removed;  ///< of a map: its keys
  std::shared_ptr<Landing> landing;        ///< of a root, and of scalars with some below
};

/// Parses document.text into document.nodes. False, and a problem, if there is no tree.
bool parse_document(Document& document, Problems& problems);

/// A place to point at.
Node place(const Document& document, int line, int byte_column);

}  // namespace orrery
