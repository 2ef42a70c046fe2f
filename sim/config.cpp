#include "sim/config.hpp"

#include <fmt/core.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <mutex>
#include <sstream>
#include <system_error>
#include <tuple>
#include <unordered_map>

#include "sim/check.hpp"
#include "sim/document.hpp"

namespace orrery {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{64} << 20;
constexpr std::size_t kMaxDepth = 200;
constexpr std::size_t kMaxNodes = 1'000'000;
constexpr std::size_t kMaxDuplicates = 1'000;                  // reported per document
constexpr std::size_t kMaxSourceLine = std::size_t{64} << 10;  // longer: not in problems
constexpr std::size_t kMaxPrinted = 50;
constexpr const char* kAliasMessage = "aliases (*name) are not supported";
constexpr const char* kAliasHint = "write the value out";
constexpr std::size_t kMaxPrintedColumns = 160;

bool starts_character(char c) {
  return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
}

std::size_t count_characters(std::string_view utf8) {
  return static_cast<std::size_t>(std::count_if(utf8.begin(), utf8.end(), starts_character));
}

/// The length of the UTF-8 character at `pos`, or 0 if it is malformed, overlong or a surrogate
/// (Unicode 15.0, table 3-7).
std::size_t character_length(std::string_view text, std::size_t pos) {
  const auto byte = [&](std::size_t i) -> unsigned {
    return pos + i < text.size() ? static_cast<unsigned char>(text[pos + i]) : 0U;
  };
  const auto within = [&](std::size_t i, unsigned low, unsigned high) {
    return byte(i) >= low && byte(i) <= high;
  };
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  if (lead >= 0xC2 && lead <= 0xDF) return within(1, 0x80, 0xBF) ? 2 : 0;
  if (lead >= 0xE0 && lead <= 0xEF) {
    const bool second = within(1, lead == 0xE0 ? 0xA0U : 0x80U, lead == 0xED ? 0x9FU : 0xBFU);
    return second && within(2, 0x80, 0xBF) ? 3 : 0;
  }
  if (lead >= 0xF0 && lead <= 0xF4) {
    const bool second = within(1, lead == 0xF0 ? 0x90U : 0x80U, lead == 0xF4 ? 0x8FU : 0xBFU);
    return second && within(2, 0x80, 0xBF) && within(3, 0x80, 0xBF) ? 4 : 0;
  }
  return 0;
}

/// Safe on a terminal: control characters become blanks, malformed UTF-8 becomes '?'.
std::string printable(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t length = character_length(text, i);
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool c1_control =
        byte == 0xC2 && length == 2 && static_cast<unsigned char>(text[i + 1]) < 0xA0;
    if (length == 0) {
      out += '?';
    } else if (byte < 0x20 || byte == 0x7F || c1_control) {
      out += ' ';
    } else {
      out += text.substr(i, length);
    }
    i += std::max<std::size_t>(length, 1);
  }
  return out;
}

/// 'word' for a message, shortened where somebody wrote a novel.
std::string quote(std::string_view text) {
  constexpr std::size_t kLongest = 60;
  if (text.size() <= kLongest) return fmt::format("'{}'", printable(text));
  std::size_t end = kLongest - 3;
  while (end > 0 && !starts_character(text[end])) --end;
  return fmt::format("'{}...'", printable(text.substr(0, end)));
}

}  // namespace

// ---------------------------------------------------------------------------------------------------
// The tree

void Document::find_lines() {
  line_starts.assign(1, 0);
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\n') line_starts.push_back(i + 1);
  }
}

std::string_view Document::line_text(int line) const {
  const int index = line - first_line;
  if (index < 0 || static_cast<std::size_t>(index) >= line_starts.size()) return {};
  const std::size_t begin = line_starts[static_cast<std::size_t>(index)];
  const std::size_t end = std::min(text.find('\n', begin), text.size());
  std::string_view view = std::string_view(text).substr(begin, end - begin);
  if (!view.empty() && view.back() == '\r') view.remove_suffix(1);
  return view;
}

std::string_view Document::rest(const Node::Data& node) const {
  const auto line = static_cast<std::size_t>(std::max(node.line - first_line, 0));
  if (line >= line_starts.size()) return {};
  const std::size_t begin = line_starts[line] + static_cast<std::size_t>(node.byte_column);
  return std::string_view(text).substr(std::min(begin, text.size()));
}

Node::Node() = default;

Node::Kind Node::kind() const {
  return data_ ? data_->kind : Kind::null;
}

Location Node::at() const {
  if (!data_) return {};
  Location where{data_->document->name, data_->line, 0};
  if (data_->line > 0) {
    const std::string_view line = data_->document->line_text(data_->line);
    const auto bytes = static_cast<std::size_t>(data_->byte_column);
    where.column = static_cast<int>(count_characters(line.substr(0, bytes))) + 1;
  }
  return where;
}

std::string Node::source_line() const {
  if (!data_) return "";
  const std::string_view line = data_->document->line_text(data_->line);
  return line.size() > kMaxSourceLine ? "" : std::string(line);
}

std::string Node::folder() const {
  return data_ ? data_->document->folder : "";
}

bool Node::overridden() const {
  return data_ && data_->document->is_override;
}

std::vector<Node> Node::removed_keys() const {
  std::vector<Node> keys;
  if (!data_ || !data_->changes) return keys;
  for (const Data* key : data_->changes->removed) {
    keys.push_back(Node(std::shared_ptr<const Data>(data_, key)));
  }
  return keys;
}

const std::string& Node::text() const {
  ORRERY_CHECK(kind() == Kind::scalar, "text() of a node that is no scalar");
  return data_->text;
}

bool Node::quoted() const {
  ORRERY_CHECK(kind() == Kind::scalar, "quoted() of a node that is no scalar");
  return data_->quoted;
}

std::size_t Node::size() const {
  if (kind() == Kind::sequence) return data_->children.size();
  if (kind() == Kind::map) return data_->children.size() / 2;
  return 0;
}

Node Node::operator[](std::size_t i) const {
  ORRERY_CHECK(i < size(), "element {} of {}", i, size());
  return Node(
      std::shared_ptr<const Data>(data_, data_->children[kind() == Kind::map ? 2 * i + 1 : i]));
}

Node Node::key(std::size_t i) const {
  ORRERY_CHECK(kind() == Kind::map && i < size(), "key {} of {}", i, size());
  return Node(std::shared_ptr<const Data>(data_, data_->children[2 * i]));
}

std::optional<Node> Node::find(std::string_view key) const {
  if (kind() != Kind::map) return std::nullopt;
  for (std::size_t i = 0; i < size(); ++i) {
    if (data_->children[2 * i]->text == key) return (*this)[i];
  }
  return std::nullopt;
}

// ---------------------------------------------------------------------------------------------------
// Problems

InputError::InputError(std::vector<Problem> problems)
    : std::runtime_error(format_problems(problems)), problems_(std::move(problems)) {}

void Problems::add(const Node& where, std::string message, std::string hint) {
  list_.push_back({where.at(), std::move(message), std::move(hint), where.source_line()});
}

void Problems::add(Location where, std::string message, std::string hint) {
  list_.push_back({std::move(where), std::move(message), std::move(hint), ""});
}

void Problems::add(Problem problem) {
  list_.push_back(std::move(problem));
}

void Problems::throw_if_any() const {
  if (!list_.empty()) throw InputError(list_);
}

namespace {

/// The line, cut to the printed width so that the caret stays inside, and the caret under it.
std::string excerpt(const std::string& source_line, int column) {
  const std::string line = printable(source_line);
  std::vector<std::size_t> starts;  // of each character; column c is starts[c - 1]
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (starts_character(line[i])) starts.push_back(i);
  }
  const std::size_t size = starts.size();
  std::size_t caret = std::min(static_cast<std::size_t>(std::max(column - 1, 0)), size);
  std::size_t first = 0;
  if (size > kMaxPrintedColumns && caret > kMaxPrintedColumns / 2) {
    first = std::min(caret - kMaxPrintedColumns / 2, size - kMaxPrintedColumns);
  }
  const std::size_t last = std::min(first + kMaxPrintedColumns, size);
  starts.push_back(line.size());
  std::string shown = line.substr(starts[first], starts[last] - starts[first]);
  while (!shown.empty() && shown.back() == ' ') shown.pop_back();
  caret -= first;
  return fmt::format("  {}\n  {}^\n", shown, std::string(caret, ' '));
}

}  // namespace

std::string format_problems(std::span<const Problem> problems) {
  std::map<std::string_view, std::size_t> file_order;
  for (const Problem& p : problems) file_order.emplace(p.at.file, file_order.size());
  const auto place = [&](const Problem& p) {
    return std::tuple(file_order.at(p.at.file), p.at.line, p.at.column);
  };
  std::vector<const Problem*> sorted;
  for (const Problem& p : problems) sorted.push_back(&p);
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](const Problem* a, const Problem* b) { return place(*a) < place(*b); });

  std::set<std::tuple<std::size_t, int, int, std::string_view, std::string_view>> seen;
  std::string out;
  for (const Problem* p : sorted) {
    const auto [file, line, column] = place(*p);
    if (!seen.emplace(file, line, column, p->message, p->hint).second) continue;
    if (seen.size() > kMaxPrinted) continue;
    if (!p->at.file.empty()) out += printable(p->at.file) + ":";
    if (line > 0) out += fmt::format("{}:{}:", line, column);
    if (!out.empty() && out.back() == ':') out += ' ';
    out += fmt::format("error: {}\n", printable(p->message));
    if (line > 0 && !p->source_line.empty()) out += excerpt(p->source_line, column);
    if (!p->hint.empty()) out += fmt::format("  hint: {}\n", printable(p->hint));
  }
  if (seen.size() > kMaxPrinted) {
    out += fmt::format("... and {} more\n", seen.size() - kMaxPrinted);
  }
  return out;
}

std::optional<std::string> nearest(std::string_view word, std::span<const std::string> candidates) {
  const auto lower = [](std::string_view text) {
    std::string out(text);
    for (char& c : out) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    return out;
  };
  const std::string a = lower(word);
  std::optional<std::string> best;
  std::size_t best_distance = std::numeric_limits<std::size_t>::max();
  for (const std::string& candidate : candidates) {
    const std::string b = lower(candidate);
    const std::size_t longer = std::max(a.size(), b.size());
    const std::size_t allowed = longer / 3;  // one slip in three letters
    if (longer - std::min(a.size(), b.size()) > allowed) continue;
    // Optimal string alignment: insert, delete, replace, or swap two neighbours.
    std::vector<std::size_t> before(b.size() + 1);
    std::vector<std::size_t> above(b.size() + 1);
    std::vector<std::size_t> row(b.size() + 1);
    for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (std::size_t i = 1; i <= a.size(); ++i) {
      std::swap(before, above);
      std::swap(above, row);
      row[0] = i;
      for (std::size_t j = 1; j <= b.size(); ++j) {
        row[j] = std::min({above[j] + 1, row[j - 1] + 1,
                           above[j - 1] + (a[i - 1] == b[j - 1] ? std::size_t{0} : 1)});
        if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
          row[j] = std::min(row[j], before[j - 2] + 1);
        }
      }
    }
    const std::size_t distance = row[b.size()];
    if (distance <= allowed && distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

// ---------------------------------------------------------------------------------------------------
// Reading

namespace {

std::string did_you_mean(std::string_view word, std::span<const std::string> candidates) {
  const std::optional<std::string> near = nearest(word, candidates);
  return near ? fmt::format("did you mean '{}'?", *near) : "";
}

/// Stops the parser at a place in the text.
struct Rejected {
  int line;
  int byte_column;
  std::string message;
  std::string hint;
};

/// yaml-cpp takes the end of the file for the closing quote.
bool is_closed(std::string_view text) {
  if (text.empty() || (text[0] != '"' && text[0] != '\'')) return true;
  const bool single = text[0] == '\'';
  for (std::size_t i = 1; i < text.size(); ++i) {
    const bool escape = single ? text.substr(i, 2) == "''" : text[i] == '\\';
    if (escape) {
      ++i;
    } else if (text[i] == text[0]) {
      return true;
    }
  }
  return false;
}

}  // namespace

Node place(const Document& document, int line, int byte_column) {
  auto data = std::make_shared<Node::Data>();
  data->document = &document;
  data->line = line;
  data->byte_column = byte_column;
  return Node(std::move(data));
}

namespace {

/// Builds the tree from yaml-cpp's events; none of yaml-cpp's own nodes or conversions are
/// involved.
class Builder : public YAML::EventHandler {
 public:
  Builder(Document& document, Problems& problems) : document_(document), problems_(problems) {}

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (!started_) {
      started_ = true;
      return;
    }
    const std::string_view line = document_.line_text(mark.line + document_.first_line);
    if (mark.column == 0 && line.substr(0, 3) == "---") {
      reject(mark, "a second document starts here",
             "a file holds one document; remove the '---' line");
    }
    const auto column = static_cast<std::size_t>(mark.column);
    const bool colon = column < line.size() && line[column] == ':';
    reject(mark, "text after the end of the document", colon ? "put a blank after the colon" : "");
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override {
    Node::Data& node = add(mark, Node::Kind::null);
    if (!open_.empty() && open_.back()->kind == Node::Kind::map &&
        open_.back()->children.size() % 2 == 0) {
      // yaml-cpp marks an absent value by the token after it; its key is where to look.
      const Node::Data& key = *open_.back()->children[open_.back()->children.size() - 2];
      node.line = key.line;
      node.byte_column = key.byte_column;
      return;
    }
    const std::string_view rest = document_.rest(node);
    if (open_.empty() || (!rest.empty() && (rest[0] == '~' || rest[0] == 'n' || rest[0] == 'N'))) {
      return;
    }
    // yaml-cpp marks an absent element by the token after it; the list is where to look.
    node.line = open_.back()->line;
    node.byte_column = open_.back()->byte_column;
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    reject(mark, kAliasMessage, kAliasHint);
  }
  void OnAnchor(const YAML::Mark& mark, const std::string& name) override {
    reject(mark, fmt::format("anchors (&{}) are not supported", name), kAliasHint);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                const std::string& value) override {
    refuse_tag(mark, tag);
    Node::Data& node = add(mark, Node::Kind::scalar);
    node.text = value;
    node.quoted = tag == "!";
    if (!is_closed(document_.rest(node))) {
      reject(mark, "the quotes that open here are never closed", "");
    }
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {
    open(mark, tag, Node::Kind::sequence);
  }
  void OnSequenceEnd() override { open_.pop_back(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                  YAML::EmitterStyle::value) override {
    open(mark, tag, Node::Kind::map);
  }
  void OnMapEnd() override {
    check_keys(*open_.back());
    open_.pop_back();
  }

  /// The line on which the innermost unfinished list or map began; 0 if there is none.
  int open_line() const { return open_.empty() ? 0 : open_.back()->line; }

 private:
  [[noreturn]] void reject(const YAML::Mark& mark, std::string message, std::string hint) const {
    throw Rejected{mark.line + document_.first_line, mark.column, std::move(message),
                   std::move(hint)};
  }

  void refuse_tag(const YAML::Mark& mark, const std::string& tag) const {
    if (tag.empty() || tag == "?" || tag == "!") return;  // "!" is what yaml-cpp calls quoted text
    reject(mark, "tags (!name) are not supported", "remove the tag");
  }

  Node::Data& add(const YAML::Mark& mark, Node::Kind kind) {
    if (document_.nodes.size() >= kMaxNodes) {
      reject(mark, fmt::format("more than {} values in one file", kMaxNodes), "");
    }
    Node::Data& node = document_.nodes.emplace_back();
    if (!open_.empty()) open_.back()->children.push_back(&node);
    node.document = &document_;
    node.line = mark.line + document_.first_line;
    node.byte_column = mark.column;
    node.kind = kind;
    return node;
  }

  void open(const YAML::Mark& mark, const std::string& tag, Node::Kind kind) {
    refuse_tag(mark, tag);
    if (open_.size() >= kMaxDepth) {
      reject(mark, fmt::format("lists and maps are nested more than {} deep", kMaxDepth), "");
    }
    open_.push_back(&add(mark, kind));
  }

  void check_keys(Node::Data& map) {
    std::unordered_map<std::string_view, int> first_line;
    std::vector<const Node::Data*> kept;
    for (std::size_t i = 0; i + 1 < map.children.size(); i += 2) {
      const Node::Data& key = *map.children[i];
      if (key.kind != Node::Kind::scalar) {
        const Node::Data& shown = key.kind == Node::Kind::null ? map : key;
        throw Rejected{shown.line, shown.byte_column, "a key must be text", ""};
      }
      if (key.text == "<<" && !key.quoted) {
        throw Rejected{key.line, key.byte_column, "merge keys (<<) are not supported",
                       "write the keys out"};
      }
      const auto [entry, inserted] = first_line.emplace(key.text, key.line);
      if (inserted) {
        kept.push_back(map.children[i]);
        kept.push_back(map.children[i + 1]);
      } else if (++duplicates_ <= kMaxDuplicates) {
        problems_.add(place(document_, key.line, key.byte_column),
                      fmt::format("duplicate key {}", quote(key.text)),
                      fmt::format("it was first given on line {}", entry->second));
      }
    }
    map.children = std::move(kept);
  }

  Document& document_;
  Problems& problems_;
  std::vector<Node::Data*> open_;
  std::size_t duplicates_ = 0;
  bool started_ = false;
};

bool looks_like_json(std::string_view name, std::string_view text) {
  constexpr std::string_view kSuffix = ".json";
  if (name.size() >= kSuffix.size() && name.substr(name.size() - kSuffix.size()) == kSuffix) {
    return true;
  }
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  return first != std::string_view::npos && text[first] == '{';
}

/// What yaml-cpp would misread or read differently from what an editor shows.
void check_characters(Document& document, bool json) {
  std::string& text = document.text;
  bool in_indent = true;
  std::size_t marks = 0;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t length = character_length(text, i);
    const auto byte = static_cast<unsigned char>(text[i]);
    const auto reject = [&](std::size_t offset, std::string message, std::string hint) {
      const auto next =
          std::upper_bound(document.line_starts.begin(), document.line_starts.end(), offset);
      throw Rejected{
          document.first_line - 1 + static_cast<int>(next - document.line_starts.begin()),
                     static_cast<int>(offset - *(next - 1)), std::move(message), std::move(hint)};
    };
    if (length == 0) {
      reject(i, fmt::format("the text is not valid UTF-8 (byte 0x{:02x})", byte),
             "save the file as UTF-8");
    }
    const bool line_end = byte == '\r' && i + 1 < text.size() && text[i + 1] == '\n';
    if ((byte < 0x20 && byte != '\t' && byte != '\n' && !line_end) || byte == 0x7F) {
      reject(i, fmt::format("control character 0x{:02x} in the text", byte), "remove it");
    }
    if (in_indent && byte == '\t' && !json) {
      // yaml-cpp refuses a tab even where nobody sees it: on an empty line or before a comment.
      const std::size_t next = std::min(text.find_first_not_of(" \t", i), text.size());
      if (next < text.size() && std::strchr("\r\n#", text[next]) == nullptr) {
        reject(i, "a tab in the indentation", "indent with blanks");
      }
      std::fill(text.begin() + static_cast<std::ptrdiff_t>(i),
                text.begin() + static_cast<std::ptrdiff_t>(next), ' ');
    }
    // yaml-cpp holds a whole flow list as tokens before its first event: refuse a huge one here.
    if (byte != 0 && std::strchr("[]{},", byte) != nullptr && ++marks > 4 * kMaxNodes) {
      reject(i, fmt::format("more than {} brackets and commas in one file", 4 * kMaxNodes), "");
    }
    in_indent = byte == '\n' || (in_indent && (byte == ' ' || byte == '\t'));
    i += length;
  }
}

std::string syntax_hint(const std::string& message, const Builder& builder) {
  if (message.rfind("end of ", 0) == 0 && builder.open_line() > 0) {
    return fmt::format("what was opened on line {} is not closed", builder.open_line());
  }
  return "";
}

void parse(Document& document, bool json, Problems& problems) {
  check_characters(document, json);
  // Raw tabs cannot stand inside JSON strings, so all of them are blanks between tokens.
  if (json) std::replace(document.text.begin(), document.text.end(), '\t', ' ');
  std::istringstream stream(document.text);
  Builder builder(document, problems);
  try {
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::Exception& e) {
    const bool located = !e.mark.is_null();
    const int line = located ? e.mark.line + document.first_line : 0;
    const int column = located ? e.mark.column : 0;
    if (e.msg.rfind(YAML::ErrorMsg::UNKNOWN_ANCHOR, 0) == 0) {
      throw Rejected{line, column, kAliasMessage, kAliasHint};
    }
    throw Rejected{line, column, fmt::format("syntax error: {}", e.msg),
                   syntax_hint(e.msg, builder)};
  }
}

}  // namespace

bool parse_document(Document& document, Problems& problems) {
  document.find_lines();
  try {
    parse(document, looks_like_json(document.name, document.text), problems);
  } catch (const Rejected& r) {
    problems.add(place(document, r.line, r.byte_column), r.message, r.hint);
    return false;
  }
  return true;
}

/// Documents by path. One lock for all: whoever waits for it would have to read the same files.
class DocumentCache {
 public:
  template <class Read>
  Node get(const std::string& path, Problems& problems, const Read& read) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = documents_.find(path);
    if (known != documents_.end()) return known->second;
    const std::size_t before = problems.size();
    Node document = read();
    // With problems it is read again, so that every reader hears of them.
    if (problems.size() == before) documents_.emplace(path, document);
    return document;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, Node> documents_;
};

std::shared_ptr<DocumentCache> make_document_cache() {
  return std::make_shared<DocumentCache>();
}

namespace {

Node make_document(std::string text, const std::string& name, Problems& problems,
                   std::optional<std::string> folder, const std::shared_ptr<DocumentCache>& cache) {
  if (text.size() > kMaxFileBytes) {
    problems.add(Location{name, 0, 0}, "the file is larger than 64 MiB");
    return {};
  }
  constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
  if (text.compare(0, kByteOrderMark.size(), kByteOrderMark) == 0) {
    text.erase(0, kByteOrderMark.size());
  }
  const auto document = std::make_shared<Document>();
  document->name = name;
  document->folder =
      folder ? *std::move(folder) : std::filesystem::path(name).parent_path().string();
  document->text = std::move(text);
  document->cache = cache;
  if (!parse_document(*document, problems)) return {};
  if (document->nodes.empty()) {  // an empty file: nothing, but from this file
    document->nodes.emplace_back().document = document.get();
  }
  return Node(std::shared_ptr<const Node::Data>(document, &document->nodes.front()));
}

}  // namespace

Node read_document_text(std::string text, const std::string& name, Problems& problems,
                        std::optional<std::string> folder) {
  return make_document(std::move(text), name, problems, std::move(folder), nullptr);
}

namespace {

/// Names are compared without their extension: "v3.yml" finds "v3.yaml", "a.yaml" does not find
/// "b.yaml".
std::string sibling_hint(const std::string& path) {
  namespace fs = std::filesystem;
  const fs::path parent = fs::path(path).parent_path();
  std::error_code failed;
  std::set<std::string> files;  // sorted: a directory's own order is the file system's whim
  for (fs::directory_iterator it(parent.empty() ? fs::path(".") : parent, failed), end;
       !failed && it != end; it.increment(failed)) {
    files.insert(it->path().filename().string());
  }
  std::vector<std::string> stems;
  stems.reserve(files.size());
  for (const std::string& f : files) stems.push_back(fs::path(f).stem().string());
  const std::optional<std::string> near = nearest(fs::path(path).stem().string(), stems);
  if (!near) return "";
  const auto index = std::find(stems.begin(), stems.end(), *near) - stems.begin();
  return fmt::format("did you mean '{}'?", (parent / *std::next(files.begin(), index)).string());
}

}  // namespace

std::optional<std::string> read_text(const std::string& path, Problems& problems) {
  namespace fs = std::filesystem;
  const Location whole_file{path, 0, 0};
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) {
    problems.add(whole_file, "is a directory, not a file");
    return std::nullopt;
  }
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             &std::fclose);
  if (!file) {
    const int error = errno;
    const std::string hint = error == ENOENT ? sibling_hint(path) : "";
    problems.add(whole_file,
                 fmt::format("cannot open the file: {}", std::generic_category().message(error)),
                 hint);
    return std::nullopt;
  }
  std::string text;
  std::vector<char> buffer(std::size_t{1} << 16);
  while (text.size() <= kMaxFileBytes) {
    const std::size_t count = std::fread(buffer.data(), 1, buffer.size(), file.get());
    if (count == 0) break;
    text.append(buffer.data(), count);
  }
  if (std::ferror(file.get()) != 0) {
    problems.add(whole_file,
                 fmt::format("cannot read the file: {}", std::generic_category().message(errno)));
    return std::nullopt;
  }
  if (text.size() > kMaxFileBytes) {
    problems.add(whole_file, "the file is larger than 64 MiB");
    return std::nullopt;
  }
  return text;
}

Node read_document(const std::string& path, Problems& problems,
                   const std::shared_ptr<DocumentCache>& cache) {
  const auto read = [&] {
    std::optional<std::string> text = read_text(path, problems);
    return text ? make_document(std::move(*text), path, problems, std::nullopt, cache) : Node();
  };
  return cache ? cache->get(path, problems, read) : read();
}

// ---------------------------------------------------------------------------------------------------
// Values

namespace {

/// What stands there, as a message says it: got 0, got 'abc', got a list.
std::string got(const Node& node) {
  switch (node.kind()) {
    case Node::Kind::null:
      return "nothing";
    case Node::Kind::sequence:
      return "a list";
    case Node::Kind::map:
      return "a map";
    case Node::Kind::scalar:
      break;
  }
  return !node.quoted() && parse_number(node.text()) ? node.text() : quote(node.text());
}

/// "a whole number from 1 to 8"; an end of the range that nobody can reach is not mentioned.
template <class T>
std::string range_words(const char* noun, T min, T max) {
  const bool low = min > std::numeric_limits<T>::lowest();
  const bool high = max < std::numeric_limits<T>::max();
  if (low && high) return fmt::format("{} from {} to {}", noun, min, max);
  if (low) return fmt::format("{} of at least {}", noun, min);
  if (high) return fmt::format("{} of at most {}", noun, max);
  return noun;
}

template <class T>
std::optional<T> read_within(const Node& node, Problems& problems, const std::string& subject,
                             const std::string& expected, T min, T max,
                             std::optional<T> (*parse_text)(std::string_view, std::string*)) {
  std::string hint;
  if (node.kind() == Node::Kind::scalar) {
    const std::optional<T> value = parse_text(node.text(), &hint);
    if (value && node.quoted()) {
      problems.add(node, subject + " is text in quotes; remove the quotes");
      return std::nullopt;
    }
    if (value && *value >= min && *value <= max) return value;
  }
  problems.add(node, fmt::format("{} must be {}, got {}", subject, expected, got(node)), hint);
  return std::nullopt;
}

std::optional<std::int64_t> integer_of(const Node& node, Problems& problems,
                                       const std::string& subject, std::int64_t min,
                                       std::int64_t max) {
  return read_within<std::int64_t>(node, problems, subject, range_words("a whole number", min, max),
                                   min, max, &parse_whole_number);
}

std::optional<double> number_of(const Node& node, Problems& problems, const std::string& subject,
                                double min, double max) {
  return read_within<double>(node, problems, subject, range_words("a number", min, max), min, max,
                             &parse_number);
}

const char* quantity_words(Dimension dimension) {
  switch (dimension) {
    case Dimension::scalar:
      return "a number above 0 such as 0.5 or 50 %";
    case Dimension::bytes:
      return "an amount of bytes such as 80 GiB";
    case Dimension::bytes_per_s:
      return "a rate in bytes per second such as 400 GB/s";
    case Dimension::flops_per_s:
      return "a rate in FLOP per second such as 989 TFLOP/s";
    case Dimension::seconds:
      return "a time such as 2 us";
    case Dimension::hertz:
      return "a frequency such as 1830 MHz";
    case Dimension::watts:
      return "a power such as 700 W";
    case Dimension::dollars:
      return "an amount of money such as 2 USD";
  }
  return "a quantity";
}

std::optional<double> quantity_of(const Node& node, Problems& problems, const std::string& subject,
                                  Dimension dimension) {
  std::string hint;
  if (node.kind() == Node::Kind::scalar) {
    const std::optional<double> value = parse_quantity(node.text(), dimension, &hint);
    if (value && *value > 0) return value;
    if (value) hint = "it must be above 0";
  }
  problems.add(node,
               fmt::format("{} must be {}, got {}", subject, quantity_words(dimension), got(node)),
               hint);
  return std::nullopt;
}

std::string join(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& w : words) out += (out.empty() ? "" : ", ") + w;
  return out;
}

}  // namespace

std::optional<std::int64_t> read_integer(const Node& node, Problems& problems, std::int64_t min,
                                         std::int64_t max) {
  return integer_of(node, problems, "the value", min, max);
}

std::optional<double> read_number(const Node& node, Problems& problems, double min, double max) {
  return number_of(node, problems, "the value", min, max);
}

std::optional<double> read_quantity(const Node& node, Problems& problems, Dimension dimension) {
  return quantity_of(node, problems, "the value", dimension);
}

// ---------------------------------------------------------------------------------------------------
// MapReader

MapReader::MapReader(Node node, Problems& problems, std::string what)
    : node_(std::move(node)), problems_(problems), what_(std::move(what)) {
  if (node_.kind() == Node::Kind::map) return;
  const bool located = !node_.at().file.empty();
  if (!located && !problems_.empty()) return;  // whoever made this null Node has said why
  const bool colon = node_.kind() == Node::Kind::scalar && !node_.quoted() &&
                     node_.text().find(':') != std::string::npos;
  problems_.add(node_, fmt::format("{} must be a map of keys to values, got {}", what_, got(node_)),
                colon ? "put a blank after the colon" : "");
}

bool MapReader::has(std::string_view key) {
  allow(key);
  return node_.find(key).has_value();
}

Node MapReader::at(std::string_view key) {
  allow(key);
  return node_.find(key).value_or(Node());
}

Node MapReader::require(std::string_view key) {
  allow(key);
  if (node_.kind() != Node::Kind::map) return {};
  const std::optional<Node> value = node_.find(key);
  if (!value) {
    problems_.add(node_, fmt::format("missing key '{}' in {}", key, what_));
    return {};
  }
  if (value->kind() == Node::Kind::null) {
    problems_.add(*value, fmt::format("missing value of '{}' in {}", key, what_));
    return {};
  }
  return *value;
}

std::int64_t MapReader::integer(std::string_view key, std::int64_t min, std::int64_t max) {
  const std::int64_t harmless = std::clamp<std::int64_t>(1, min, max);
  const Node value = require(key);
  if (value.kind() == Node::Kind::null) return harmless;
  return integer_of(value, problems_, quote(key), min, max).value_or(harmless);
}

std::int64_t MapReader::integer_or(std::string_view key, std::int64_t fallback, std::int64_t min,
                                   std::int64_t max) {
  return has(key) ? integer(key, min, max) : fallback;
}

double MapReader::number(std::string_view key, double min, double max) {
  const double harmless = std::clamp(1.0, min, max);
  const Node value = require(key);
  if (value.kind() == Node::Kind::null) return harmless;
  return number_of(value, problems_, quote(key), min, max).value_or(harmless);
}

double MapReader::number_or(std::string_view key, double fallback, double min, double max) {
  return has(key) ? number(key, min, max) : fallback;
}

double MapReader::quantity(std::string_view key, Dimension dimension) {
  const Node value = require(key);
  if (value.kind() == Node::Kind::null) return 1.0;
  return quantity_of(value, problems_, quote(key), dimension).value_or(1.0);
}

double MapReader::quantity_or(std::string_view key, double fallback, Dimension dimension) {
  return has(key) ? quantity(key, dimension) : fallback;
}

std::string MapReader::text(std::string_view key) {
  const Node value = require(key);
  if (value.kind() == Node::Kind::null) return "";
  if (value.kind() == Node::Kind::scalar) return value.text();
  problems_.add(value, fmt::format("'{}' must be text, got {}", key, got(value)));
  return "";
}

std::string MapReader::text_or(std::string_view key, std::string fallback) {
  return has(key) ? text(key) : std::move(fallback);
}

bool MapReader::flag_or(std::string_view key, bool fallback) {
  if (!has(key)) return fallback;
  const Node value = require(key);
  if (value.kind() == Node::Kind::null) return fallback;
  if (value.kind() == Node::Kind::scalar && (value.text() == "true" || value.text() == "false")) {
    if (!value.quoted()) return value.text() == "true";
    problems_.add(value, fmt::format("'{}' is text in quotes; remove the quotes", key));
    return fallback;
  }
  problems_.add(value, fmt::format("'{}' must be true or false, got {}", key, got(value)));
  return fallback;
}

std::vector<std::int64_t> MapReader::integers(std::string_view key, std::int64_t min,
                                              std::int64_t max) {
  const Node list = require(key);
  if (list.kind() == Node::Kind::null) return {};
  if (list.kind() != Node::Kind::sequence) {
    problems_.add(list,
                  fmt::format("'{}' must be a list of whole numbers, got {}", key, got(list)));
    return {};
  }
  std::vector<std::int64_t> values;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::string subject = fmt::format("element {} of '{}'", i + 1, key);
    const auto value = integer_of(list[i], problems_, subject, min, max);
    if (value) values.push_back(*value);
  }
  return values;
}

std::size_t MapReader::choose(std::string_view key, const std::vector<std::string>& names,
                              std::optional<std::size_t> fallback) {
  ORRERY_CHECK(!names.empty(), "no words to choose from for '{}'", key);
  const std::size_t harmless = fallback.value_or(0);
  const Node value = require(key);
  if (value.kind() == Node::Kind::null) return harmless;
  std::string hint;
  if (value.kind() == Node::Kind::scalar) {
    const auto it = std::find(names.begin(), names.end(), value.text());
    if (it != names.end()) return static_cast<std::size_t>(it - names.begin());
    hint = did_you_mean(value.text(), names);
  }
  problems_.add(value, fmt::format("'{}' must be one of {}, got {}", key, join(names), got(value)),
                hint);
  return harmless;
}

void MapReader::allow(std::string_view key) {
  known_.emplace(key);
}

void MapReader::finish() {
  const std::vector<std::string> known(known_.begin(), known_.end());
  const auto check = [&](const Node& key) {
    if (known_.count(key.text()) != 0) return;
    std::string hint = did_you_mean(key.text(), known);
    if (hint.empty() && !known.empty()) hint = "known keys: " + join(known);
    problems_.add(key, fmt::format("unknown key {} in {}", quote(key.text()), what_), hint);
  };
  for (std::size_t i = 0; node_.kind() == Node::Kind::map && i < node_.size(); ++i) {
    check(node_.key(i));
  }
  for (const Node& key : node_.removed_keys()) check(key);
}

std::vector<std::string> MapReader::unread() const {
  std::vector<std::string> keys;
  for (std::size_t i = 0; node_.kind() == Node::Kind::map && i < node_.size(); ++i) {
    if (known_.count(node_.key(i).text()) == 0) keys.push_back(node_.key(i).text());
  }
  return keys;
}

std::string in_quotes(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      out += fmt::format("\\x{:02x}", static_cast<unsigned>(c));
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace orrery
