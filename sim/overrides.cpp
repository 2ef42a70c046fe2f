#include "sim/overrides.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <unordered_set>
#include <utility>

#include "sim/check.hpp"
#include "sim/document.hpp"
#include "sim/units.hpp"

namespace orrery {
namespace {

using Data = Node::Data;
using Step = ParsedOverride::Step;
using Action = ParsedOverride::Action;

constexpr std::size_t kMaxSteps = 100;

bool is_blank(char c) {
  return c == ' ' || c == '\t';
}

/// The byte at which the character in `column` (1-based) begins.
std::size_t byte_of(std::string_view line, int column) {
  std::size_t byte = 0;
  for (int c = 1; c < column && byte < line.size(); ++c) {
    ++byte;
    while (byte < line.size() && (static_cast<unsigned char>(line[byte]) & 0xC0) == 0x80) ++byte;
  }
  return byte;
}

/// Takes one override apart.
class Parser {
 public:
  Parser(const Override& from, const std::string& folder, std::weak_ptr<DocumentCache> cache,
         Problems& problems)
      : problems_(problems) {
    document_ = std::make_shared<Document>();
    document_->name = from.at.file;
    document_->folder = folder;
    document_->first_line = from.at.line;
    document_->is_override = true;
    document_->cache = std::move(cache);
    begin_ = byte_of(from.source_line, from.at.column);
    const bool shown =
        std::string_view(from.source_line).substr(begin_, from.text.size()) == from.text;
    if (!shown) begin_ = 0;
    document_->text = shown ? from.source_line : from.text;
    end_ = begin_ + from.text.size();
  }

  std::optional<ParsedOverride> parse() {
    const std::string_view text = std::string_view(document_->text).substr(0, end_);
    document_->find_lines();
    if (text.find('\n') != std::string_view::npos) {
      return fail(begin_, "an override is one line");
    }
    const std::size_t equals = text.find('=', begin_);
    if (equals == std::string_view::npos) {
      return fail(begin_, "an override is PATH=VALUE", "such as plan.layout.pp=8");
    }
    ParsedOverride out;
    out.document = document_;
    if (!read_path(text, equals, out.path)) return std::nullopt;
    std::size_t value = equals + 1;
    while (value < end_ && is_blank(text[value])) ++value;
    out.value_column = static_cast<int>(value);
    out.value = text.substr(value);
    if (value == end_) {
      out.action = Action::remove;
      return out;
    }
    if (text[value] == '*') return read_factor(text, value, std::move(out));
    return read_value(value, std::move(out));
  }

 private:
  std::nullopt_t fail(std::size_t column, std::string message, std::string hint = "") {
    problems_.add(place(*document_, document_->first_line, static_cast<int>(column)),
                  std::move(message), std::move(hint));
    return std::nullopt;
  }

  /// a.b[3].c; true if it is one.
  bool read_path(std::string_view text, std::size_t end, std::vector<Step>& path) {
    while (end > begin_ && is_blank(text[end - 1])) --end;
    std::size_t at = begin_;
    while (at < end && is_blank(text[at])) ++at;
    for (bool first = true; first || at < end; first = false) {
      const bool index = !first && text[at] == '[';
      if (!first && !index && text[at] != '.') {
        fail(at, "a dot or [number] goes on in a path, or = ends it");
        return false;
      }
      if (index || !first) ++at;
      const std::size_t stop =
          std::min(end, index ? text.find(']', at) : text.find_first_of(".[", at));
      const std::string key(text.substr(at, stop - at));
      if (key.empty() || (index && (stop == end || !parse_whole_number(key)))) {
        fail(at, index ? "an element of a list is [number], from 0 on" : "a key is missing here");
        return false;
      }
      if (path.size() == kMaxSteps) {
        fail(at, fmt::format("more than {} keys in a path", kMaxSteps));
        return false;
      }
      path.push_back({key, static_cast<int>(at), index});
      at = index ? stop + 1 : stop;
    }
    return true;
  }

  std::optional<ParsedOverride> read_factor(std::string_view text, std::size_t value,
                                            ParsedOverride out) {
    std::size_t begin = value + 1;
    while (begin < end_ && is_blank(text[begin])) ++begin;
    std::size_t end = end_;
    while (end > begin && is_blank(text[end - 1])) --end;
    std::string why;
    const auto factor = parse_number(text.substr(begin, end - begin), &why);
    if (!factor) {
      return fail(value, "a factor stands after *, such as *2 or *0.5",
                  why.empty() ? "text that begins with * stands in quotes" : why);
    }
    out.action = Action::multiply;
    out.factor = *factor;
    return out;
  }

  /// The document holds the whole line, so that it is shown; for YAML all but the value is blank.
  std::optional<ParsedOverride> read_value(std::size_t value, ParsedOverride out) {
    const std::string line = document_->text;
    document_->text = std::string(value, ' ') + line.substr(value, end_ - value);
    Problems found;
    const bool parsed = parse_document(*document_, found);
    document_->text = line;
    document_->find_lines();
    for (Problem problem : found.list()) {
      problem.source_line = line;
      problems_.add(std::move(problem));
    }
    if (!parsed || !found.empty()) return std::nullopt;
    if (document_->nodes.empty()) return fail(value, "there is no value here");  // a comment
    return out;
  }

  Problems& problems_;
  std::shared_ptr<Document> document_;
  std::size_t begin_ = 0;  // of the override in the document's text
  std::size_t end_ = 0;
};

/// The nodes that overrides changed or made; a root's Node keeps it, and with it all that they
/// point to.
struct Overlay {
  Node base;
  std::vector<std::shared_ptr<const Document>> documents;
  std::deque<Data> nodes;
};

std::string path_text(const ParsedOverride& o, std::size_t steps) {
  std::string out;
  for (std::size_t i = 0; i < steps; ++i) {
    const Step& step = o.path[i];
    out += step.is_index ? fmt::format("[{}]", step.key) : (i > 0 ? "." : "") + step.key;
  }
  return out;
}

std::string what_it_is(const Data& node) {
  switch (node.kind) {
    case Node::Kind::null:
      return "nothing";
    case Node::Kind::sequence:
      return fmt::format("a list of {}", node.children.size());
    case Node::Kind::map:
      return "a map";
    case Node::Kind::scalar:
      break;
  }
  return fmt::format("'{}'", node.text);
}

/// "did you mean 'bandwidth'?", or which keys there are.
std::string keys_hint(const Data& map, std::string_view word) {
  std::vector<std::string> keys;
  for (std::size_t i = 0; i + 1 < map.children.size(); i += 2)
    keys.push_back(map.children[i]->text);
  if (const auto near = nearest(word, keys)) return fmt::format("did you mean '{}'?", *near);
  return keys.empty() ? "" : fmt::format("keys there: {}", fmt::join(keys, ", "));
}

/// "160 GB/s" by 2: "320 GB/s". Nothing where it begins with no number.
std::optional<std::string> multiplied(const std::string& text, double factor) {
  std::size_t length = std::min<std::size_t>(text.size(), 64);
  std::optional<double> number;
  for (; length > 0 && !number; --length) number = parse_number(text.substr(0, length));
  if (!number) return std::nullopt;
  if (factor == 1) return text;
  ++length;
  // 15 digits: what a file can say and read back, without the dust of binary fractions.
  return fmt::format("{:.15g}{}", *number * factor, text.substr(length));
}

class Editor {
 public:
  Editor(Overlay& overlay, std::shared_ptr<Landing> landing, Problems& problems)
      : overlay_(overlay), landing_(std::move(landing)), problems_(problems) {}

  Data* own(const Data* node) {
    if (owned_.count(node) != 0) {
      // One of overlay_.nodes, which are ours to change.
      return const_cast<Data*>(node);  // NOLINT(cppcoreguidelines-pro-type-const-cast)
    }
    Data& copy = overlay_.nodes.emplace_back(*node);
    owned_.insert(&copy);
    return &copy;
  }

  void apply(Data* root, const ParsedOverride& o) {
    Data* at = root;
    for (std::size_t i = o.next; i < o.path.size(); ++i) {
      const std::optional<std::size_t> child = child_of(*at, o, i);
      if (!child) return;  // and has been said
      if (i + 1 == o.path.size()) {
        act(*at, *child, o);
        return;
      }
      if (at->children[*child]->kind == Node::Kind::null) {
        Data& map = make(o, i);
        map.kind = Node::Kind::map;
        at->children[*child] = &map;
      }
      Data* next = own(at->children[*child]);
      at->children[*child] = next;
      if (next->kind == Node::Kind::scalar) {
        wait(*next, o, i + 1);
        return;
      }
      at = next;
    }
  }

 private:
  Node at_step(const ParsedOverride& o, std::size_t i) const {
    return place(*o.document, o.document->first_line, o.path[i].byte_column);
  }

  Data& make(const ParsedOverride& o, std::size_t step) {
    Data& node = overlay_.nodes.emplace_back();
    owned_.insert(&node);
    node.document = o.document.get();
    node.line = o.document->first_line;
    node.byte_column = o.path[step].byte_column;
    return node;
  }

  /// Where in at.children the step's value is. A key that is missing is added, with null as its
  /// value, unless there must be one.
  std::optional<std::size_t> child_of(Data& at, const ParsedOverride& o, std::size_t i) {
    const Step& step = o.path[i];
    const std::string where = i > 0 ? fmt::format("'{}'", path_text(o, i)) : "the document";
    if (at.kind == Node::Kind::sequence) {
      const auto index = parse_whole_number(step.key);
      if (index && *index >= 0 && static_cast<std::size_t>(*index) < at.children.size()) {
        return static_cast<std::size_t>(*index);
      }
      problems_.add(
          at_step(o, i),
          fmt::format("there is no element '{}' in {}, a list of {}", step.key, where,
                      at.children.size()),
          at.children.empty() ? "" : fmt::format("elements are 0 to {}", at.children.size() - 1));
      return std::nullopt;
    }
    if (step.is_index) {
      problems_.add(at_step(o, i), fmt::format("[{}] is an element of a list, and {} is {}",
                                               step.key, where, what_it_is(at)));
      return std::nullopt;
    }
    for (std::size_t c = 0; c + 1 < at.children.size(); c += 2) {
      if (at.children[c]->text == step.key) return c + 1;
    }
    if (o.action == Action::multiply) {
      problems_.add(at_step(o, i),
                    fmt::format("there is no '{}' in {} to multiply", step.key, where),
                    keys_hint(at, step.key));
      return std::nullopt;
    }
    if (o.action == Action::remove) {
      note_removed(at, o, i);
      return std::nullopt;
    }
    Data& key = make(o, i);
    key.kind = Node::Kind::scalar;
    key.text = step.key;
    at.children.push_back(&key);
    at.children.push_back(&make(o, i));
    return at.children.size() - 1;
  }

  void act(Data& parent, std::size_t child, const ParsedOverride& o) {
    const Data& old = *parent.children[child];
    const std::size_t last = o.path.size() - 1;
    switch (o.action) {
      case Action::put:
        supersede(old);
        parent.children[child] = &o.document->nodes.front();
        return;
      case Action::remove: {
        supersede(old);
        const auto at = parent.children.begin() + static_cast<std::ptrdiff_t>(child);
        if (parent.kind == Node::Kind::map) {
          parent.children.erase(at - 1, at + 1);
          note_removed(parent, o, last);
        } else {
          parent.children.erase(at);
        }
        return;
      }
      case Action::multiply: {
        const auto text = old.kind == Node::Kind::scalar ? multiplied(old.text, o.factor)
                                                         : std::optional<std::string>();
        if (!text) {
          problems_.add(place(*o.document, o.document->first_line, o.value_column),
                        fmt::format("there is no number to multiply: '{}' is {}",
                                    path_text(o, o.path.size()), what_it_is(old)));
          return;
        }
        Data& product = make(o, last);
        product.byte_column = o.value_column;
        product.kind = Node::Kind::scalar;
        product.quoted = old.quoted;
        product.text = *text;
        parent.children[child] = &product;
        return;
      }
    }
  }

  void note_removed(Data& map, const ParsedOverride& o, std::size_t step) {
    Data& key = make(o, step);
    key.kind = Node::Kind::scalar;
    key.text = o.path[step].key;
    auto changes =
        map.changes ? std::make_shared<Changes>(*map.changes) : std::make_shared<Changes>();
    changes->removed.push_back(&key);
    map.changes = std::move(changes);
  }

  /// The rest of the path is for the document that the scalar names, if it names one.
  void wait(Data& scalar, ParsedOverride o, std::size_t next) {
    const Node there = at_step(o, next);
    landing_->waiting[o.number] = Problem{there.at(),
                                          fmt::format("nothing is read below '{}', which is {}",
                                                      path_text(o, next), what_it_is(scalar)),
                                          "", there.source_line()};
    o.next = next;
    auto changes =
        scalar.changes ? std::make_shared<Changes>(*scalar.changes) : std::make_shared<Changes>();
    changes->below.push_back(std::move(o));
    changes->landing = landing_;
    scalar.changes = std::move(changes);
  }

  /// What waited somewhere in `old` waits for nothing any more: a later override has replaced it.
  void supersede(const Data& old) {
    if (old.changes) {
      for (const ParsedOverride& o : old.changes->below) landing_->waiting[o.number].reset();
    }
    for (const Data* child : old.children) supersede(*child);
  }

  Overlay& overlay_;
  std::shared_ptr<Landing> landing_;
  Problems& problems_;
  std::unordered_set<const Data*> owned_;
};

Node edited(const Node& base, const Data* root, const std::vector<ParsedOverride>& list,
            const std::shared_ptr<Landing>& landing, Problems& problems) {
  const auto overlay = std::make_shared<Overlay>();
  overlay->base = base;
  Editor editor(*overlay, landing, problems);
  Data* copy = editor.own(root);
  for (const ParsedOverride& o : list) {
    overlay->documents.push_back(o.document);
    editor.apply(copy, o);
  }
  auto changes =
      copy->changes ? std::make_shared<Changes>(*copy->changes) : std::make_shared<Changes>();
  changes->landing = landing;
  copy->changes = std::move(changes);
  return Node(std::shared_ptr<const Data>(overlay, copy));
}

}  // namespace

Overrides overrides_of(std::span<const std::string> texts, const std::string& name) {
  Overrides list;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    list.push_back({.text = texts[i], .at = {name, static_cast<int>(i) + 1, 1}});
  }
  return list;
}

Overrides read_overrides(const Node& list, Problems& problems) {
  constexpr const char* kHint = "such as [plan.layout.pp=8, plan.precision=bf16]";
  Overrides out;
  if (list.kind() != Node::Kind::sequence) {
    problems.add(list, "overrides are a list of PATH=VALUE", kHint);
    return out;
  }
  for (std::size_t i = 0; i < list.size(); ++i) {
    const Node node = list[i];
    if (node.kind() != Node::Kind::scalar) {
      problems.add(node, "an override is a text PATH=VALUE",
                   "in quotes where it holds ': ' or ', '");
      continue;
    }
    Location at = node.at();
    if (node.quoted()) ++at.column;
    out.push_back({.text = node.text(), .at = std::move(at), .source_line = node.source_line()});
  }
  return out;
}

Node with_overrides(const Node& root, const Overrides& overrides, Problems& problems,
                    std::span<const PathAlias> aliases) {
  if (overrides.empty() || root.kind() != Node::Kind::map) return root;
  const Data& data = root.data();
  const auto landing = std::make_shared<Landing>();
  landing->waiting.resize(overrides.size());
  std::vector<ParsedOverride> list;
  for (std::size_t i = 0; i < overrides.size(); ++i) {
    auto parsed =
        Parser(overrides[i], data.document->folder, data.document->cache, problems).parse();
    if (!parsed) continue;
    parsed->number = i;
    list.push_back(*std::move(parsed));
    ParsedOverride& o = list.back();
    for (const PathAlias& alias : aliases) {
      if (o.path.size() < 2 || o.path[0].key != alias.key) continue;
      bool there = root.find(alias.key).has_value();
      for (const ParsedOverride& earlier : list) {
        if (earlier.path.size() == 1 && earlier.path[0].key == alias.key) {
          there = earlier.action != Action::remove;
        }
      }
      if (there) continue;
      o.path.insert(o.path.begin(), {std::string(alias.under), o.path[0].byte_column, false});
    }
  }
  return edited(root, &data, list, landing, problems);
}

Node read_named_document(const Node& name, const std::string& path, Problems& problems) {
  const Data& data = name.data();
  const Node root = read_document(path, problems, data.document->cache.lock());
  if (!data.changes || data.changes->below.empty()) return root;
  for (const ParsedOverride& o : data.changes->below)
    data.changes->landing->waiting[o.number].reset();
  if (root.kind() != Node::Kind::map && root.kind() != Node::Kind::sequence) return root;
  return edited(root, &root.data(), data.changes->below, data.changes->landing, problems);
}

std::vector<std::string> overrides_below(const Node& name) {
  std::vector<std::string> texts;
  if (name.kind() == Node::Kind::null || !name.data().changes) return texts;
  for (const ParsedOverride& o : name.data().changes->below) {
    std::string path;
    for (std::size_t i = o.next; i < o.path.size(); ++i) {
      const Step& step = o.path[i];
      path += step.is_index ? fmt::format("[{}]", step.key) : (path.empty() ? "" : ".") + step.key;
    }
    texts.push_back(path + "=" + o.value);
  }
  return texts;
}

void report_without_effect(const Node& root, Problems& problems) {
  if (root.kind() == Node::Kind::null || !root.data().changes || !root.data().changes->landing)
    return;
  for (const auto& problem : root.data().changes->landing->waiting) {
    if (problem) problems.add(*problem);
  }
}

}  // namespace orrery
