#include "calibrate/read_nccl.hpp"

#include <fmt/format.h>
#include <rapidjson/error/en.h>
#include <rapidjson/memorystream.h>
#include <rapidjson/reader.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <map>
#include <optional>

namespace orrery {
namespace {

constexpr std::size_t kMaxRows = 200'000;
constexpr std::size_t kMaxProblems = 100;
constexpr std::size_t kMaxLine = 4096;  // a row of nccl-tests is 200 long; longer lines are none
constexpr std::size_t kMaxTokens = 64;

constexpr NcclOp kOps[] = {NcclOp::all_reduce, NcclOp::all_gather, NcclOp::reduce_scatter,
                           NcclOp::alltoall,   NcclOp::broadcast,  NcclOp::reduce,
                           NcclOp::gather,     NcclOp::scatter,    NcclOp::sendrecv};
constexpr std::string_view kTypes[] = {"int8",   "uint8",  "int32", "uint32", "int64",
                                       "uint64", "half",   "float", "double", "bfloat16",
                                       "f8e4m3", "f8e5m2", "char",  "int"};
constexpr std::string_view kRedops[] = {"sum", "prod", "max", "min", "avg", "mulsum", "none"};

template <class Words>
bool one_of(std::string_view word, const Words& words) {
  return std::find(std::begin(words), std::end(words), word) != std::end(words);
}

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

template <class Number>
std::optional<Number> whole_text(std::string_view text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<std::int64_t> as_count(std::string_view text) {
  const auto value = whole_text<std::int64_t>(text);
  return value && *value >= 0 && is_digit(text[0]) ? value : std::nullopt;
}

/// As `words` that follow one another at blanks; each keeps its place in the line.
struct Token {
  std::string_view text;
  std::size_t begin = 0;
};

std::vector<Token> split(std::string_view line) {
  std::vector<Token> tokens;
  std::size_t i = 0;
  while (tokens.size() <= kMaxTokens) {
    i = line.find_first_not_of(" \t", i);
    if (i == std::string_view::npos) break;
    const std::size_t end = std::min(line.find_first_of(" \t", i), line.size());
    tokens.push_back({line.substr(i, end - i), i});
    i = end;
  }
  return tokens;
}

bool has(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

/// The operation whose program "NAME_perf" a text names, if it names one only.
std::optional<NcclOp> program_in(std::string_view text) {
  std::optional<NcclOp> found;
  for (std::size_t at = text.find("_perf"); at != std::string_view::npos;
       at = text.find("_perf", at + 1)) {
    std::size_t begin = at;
    while (begin > 0 && (std::isalpha(static_cast<unsigned char>(text[begin - 1])) != 0 ||
                         text[begin - 1] == '_')) {
      --begin;
    }
    const std::string_view name = text.substr(begin, at - begin);
    NcclOp op = NcclOp::other;
    for (const NcclOp known : kOps) {
      if (name == name_of(known)) op = known;
    }
    if (found && *found != op) return std::nullopt;
    found = op;
  }
  return found;
}

/// From a file's name, such as 1_2_LOG_all_gather_env1.txt: the longest operation it contains.
std::optional<NcclOp> op_in_file_name(const std::string& path) {
  const std::string name = std::filesystem::path(path).filename().string();
  std::optional<NcclOp> best;
  for (const NcclOp op : kOps) {
    if (has(name, name_of(op)) && (!best || name_of(op).size() > name_of(*best).size())) best = op;
  }
  return best;
}

/// "2.27.3" of NCCL_VERSION_CODE 22703; versions before 2.9 counted 2708.
std::string version_of(std::int64_t code) {
  if (code < 1000 || code > 1'000'000) return "";
  if (code < 10'000) return fmt::format("{}.{}.{}", code / 1000, code / 100 % 10, code % 100);
  return fmt::format("{}.{}.{}", code / 10'000, code / 100 % 100, code % 100);
}

/// What stands before a table.
struct Header {
  std::optional<NcclOp> op;
  std::map<std::string, std::int64_t, std::less<>> ranks_of_host;
  std::optional<std::int64_t> group;  // the first one listed; others run beside it
  std::int64_t ranks = 0;             // said outright
  std::int64_t ranks_per_node = 0;
  std::string nccl_version;
  std::string device;
  std::string date;
};

class Tables {
 public:
  Tables(std::string name, Problems& problems)
      : name_(std::move(name)), first_problem_(problems.size()), problems_(problems) {}

  void problem(Location at, std::string message, std::string_view line, std::string hint = "") {
    if (problems_.size() - first_problem_ >= kMaxProblems) return;
    at.file = name_;
    problems_.add(Problem{std::move(at), std::move(message), std::move(hint), std::string(line)});
  }
  const std::string& name() const { return name_; }

  bool open() const { return !table_.rows.empty(); }
  bool full() const { return rows_ >= kMaxRows; }

  /// False once there are too many.
  bool add(NcclRow row, Location at, std::string_view line) {
    if (full()) return false;
    if (row.size_bytes == 0) return true;  // smaller than the group can share
    for (const auto& timing : {row.out_of_place, row.in_place}) {
      if (timing && !agrees(row, *timing)) {
        problem(at,
                fmt::format("{} bytes in {} us are not {} GB/s: these are no columns of nccl-tests",
                            row.size_bytes, timing->time_us, timing->algbw_gbps),
                line);
        return true;
      }
    }
    if (table_.rows.empty()) {
      table_.at = std::move(at);
      table_.at.file = name_;
    }
    table_.rows.push_back(std::move(row));
    if (++rows_ < kMaxRows) return true;
    problem({}, fmt::format("more than {} rows", kMaxRows), "");
    return false;
  }

  void close(const Header& header) {
    if (!open()) return;
    NcclTable table = std::move(table_);
    table_ = {};
    table.nccl_version = header.nccl_version;
    table.device = header.device;
    table.date = header.date;
    table.ranks = header.ranks;
    table.ranks_per_node = header.ranks_per_node;
    if (table.ranks == 0) {
      for (const auto& [host, ranks] : header.ranks_of_host) {
        table.ranks += ranks;
        table.ranks_per_node = std::max(table.ranks_per_node, ranks);
      }
    }
    table.op = header.op.value_or(op_in_file_name(name_).value_or(op_by_columns(table)));
    compare_ranks(table);
    tables_.push_back(std::move(table));
  }

  std::vector<NcclTable> take() {
    if (tables_.empty() && problems_.size() == first_problem_) {
      problem({}, "there is no table of nccl-tests in this file", "",
              "its rows begin with size, count and type, as in '8388608 2097152 float sum -1'");
    }
    return std::move(tables_);
  }

 private:
  /// To the printed digits: two decimals of a bandwidth, at least two digits of a time.
  static bool agrees(const NcclRow& row, const NcclTiming& t) {
    const double gbps = static_cast<double>(row.size_bytes) / t.time_us / 1e3;
    return std::abs(gbps - t.algbw_gbps) <= 0.011 + 0.06 * gbps;
  }

  /// Bus over algorithm bandwidth with its uncertainty, from the fastest row.
  struct Ratio {
    double value = 0;
    double off = 0;
  };
  static std::optional<Ratio> ratio_of(const NcclTable& table) {
    std::optional<Ratio> best;
    for (const NcclRow& row : table.rows) {
      const NcclTiming& t = row.out_of_place ? *row.out_of_place : *row.in_place;
      if (t.algbw_gbps < 1) continue;
      // Four digits or two decimals, whichever are fewer.
      const double off = std::max(0.006, 6e-4 * t.algbw_gbps) * 2 / t.algbw_gbps;
      if (!best || off < best->off) best = Ratio{t.busbw_gbps / t.algbw_gbps, off};
    }
    return best;
  }

  static NcclOp op_by_columns(const NcclTable& table) {
    const NcclRow& row = table.rows.front();
    const auto ratio = ratio_of(table);
    // Of those that reduce, only `reduce` has a root.
    if (row.redop == "none" || row.root >= 0 || !ratio) return NcclOp::other;
    if (ratio->value < 1 - ratio->off) return NcclOp::reduce_scatter;
    return ratio->value > 1 + ratio->off || table.ranks == 2 ? NcclOp::all_reduce : NcclOp::other;
  }

  void compare_ranks(NcclTable& table) {
    const auto ratio = ratio_of(table);
    const double one = bus_factor(table.op, 2);
    const double most = bus_factor(table.op, std::int64_t{1} << 40);
    if (!ratio || table.op == NcclOp::other || one == most) return;
    if (table.ranks > 0 &&
        std::abs(bus_factor(table.op, table.ranks) - ratio->value) <= ratio->off) {
      return;
    }
    // factor = most (n - 1) / n
    const auto ranks_at = [&](double r) { return r < most ? 1 / (1 - r / most) : 1e18; };
    const double low = ranks_at(ratio->value - ratio->off);
    const double high = ranks_at(ratio->value + ratio->off);
    const double ranks = std::ceil(low);
    if (high < 1.9 || low > 1e7) {
      problem(table.at,
              fmt::format("bus bandwidth is {:.3f} of algorithm bandwidth, which no {} has",
                          ratio->value, name_of(table.op)),
              "");
      return;
    }
    if (ranks > high || ranks + 1 <= high) return;  // none, or several fit
    const auto inferred = static_cast<std::int64_t>(ranks);
    if (table.ranks > 0) {
      table.notes.push_back(
          fmt::format("{}: the devices listed are {}, the bandwidths those of {} ranks", name_,
                      table.ranks, inferred));
      table.ranks_per_node = std::min(table.ranks_per_node, inferred);
    }
    table.ranks = inferred;
  }

  std::string name_;
  std::size_t first_problem_;
  Problems& problems_;
  NcclTable table_;  // the one being read
  std::size_t rows_ = 0;
  std::vector<NcclTable> tables_;
};

// ---- text

class TextReader {
 public:
  TextReader(std::string_view text, Tables& tables) : text_(text), tables_(tables) {}

  void read() {
    for (std::size_t begin = 0; begin < text_.size() && !tables_.full();) {
      const std::size_t end = std::min(text_.find('\n', begin), text_.size());
      line_ = text_.substr(begin, end - begin);
      if (!line_.empty() && line_.back() == '\r') line_.remove_suffix(1);
      ++number_;
      if (line_.size() <= kMaxLine) read_line();
      begin = end + 1;
    }
    tables_.close(header_);
  }

 private:
  void read_line() {
    // A row has no '#'; a launcher's prefix before it might.
    const std::vector<Token> tokens = split(line_);
    for (std::size_t i = 0; i + 2 < tokens.size(); ++i) {
      if (as_count(tokens[i].text) && as_count(tokens[i + 1].text) &&
          one_of(tokens[i + 2].text, kTypes)) {
        read_row(tokens, i);
        return;
      }
    }
    if (cut_off(tokens)) {
      problem(tokens.back(), fmt::format("the row ends after its column {}", tokens.size()));
    } else {
      read_other(tokens);
    }
  }

  /// The first columns of a row and nothing else.
  bool cut_off(const std::vector<Token>& tokens) const {
    if ((!in_table_ && !tables_.open()) || tokens.empty() || tokens.size() > 3) return false;
    if (tokens.size() == 1 && line_.size() < 12) return false;
    for (std::size_t i = 0; i < std::min<std::size_t>(tokens.size(), 2); ++i) {
      if (!as_count(tokens[i].text)) return false;
    }
    const auto begins = [&](std::string_view type) {
      return type.substr(0, tokens[2].text.size()) == tokens[2].text;
    };
    return tokens.size() < 3 || std::any_of(std::begin(kTypes), std::end(kTypes), begins);
  }

  void read_row(std::vector<Token> tokens, std::size_t first) {
    NcclRow row;
    row.size_bytes = *as_count(tokens[first].text);
    row.count = *as_count(tokens[first + 1].text);
    row.type = tokens[first + 2].text;
    const Token start = tokens[first];
    tokens.erase(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(first) + 3);
    // Option -S puts date and time at the end.
    if (tokens.size() >= 2 && has(tokens.back().text, ":") &&
        has(tokens[tokens.size() - 2].text, "-")) {
      if (header_.date.empty()) header_.date = tokens[tokens.size() - 2].text;
      tokens.resize(tokens.size() - 2);
    }
    if (tokens.empty() || !one_of(tokens[0].text, kRedops)) {
      problem(tokens.empty() ? start : tokens[0],
              fmt::format("column 4 of a row is the reduction, not '{}'",
                          tokens.empty() ? "" : tokens[0].text),
              "sum, prod, max, min, avg, mulsum or none");
      return;
    }
    row.redop = tokens[0].text;
    tokens.erase(tokens.begin());
    // Option -I adds four columns to each side. The root is missing in the oldest versions.
    const std::size_t side = per_iteration_ ? 8 : 4;
    const bool has_root = tokens.size() == 1 + side || tokens.size() == 1 + 2 * side;
    const bool both = tokens.size() >= 2 * side;
    if (!has_root && tokens.size() != side && tokens.size() != 2 * side) {
      problem(tokens.empty() ? start : tokens.back(),
              fmt::format("a row has {} columns from 'root' on, this one {}", 1 + 2 * side,
                          tokens.size()),
              "time, algbw, busbw and #wrong, out of place and in place");
      return;
    }
    std::size_t at = 0;
    if (has_root) {
      const auto root = whole_text<std::int64_t>(tokens[at].text);
      if (!root || *root < -1) {
        problem(tokens[at], fmt::format("'{}' is no root: a rank, or -1", tokens[at].text));
        return;
      }
      row.root = *root;
      ++at;
    }
    if (both) {
      row.out_of_place = timing(tokens, at);
      if (!row.out_of_place) return;
      at += side;
    }
    row.in_place = timing(tokens, at);
    if (!row.in_place) return;
    in_table_ = true;
    tables_.add(std::move(row), place(start), line_);
  }

  std::optional<NcclTiming> timing(const std::vector<Token>& tokens, std::size_t at) {
    std::array<double, 3> numbers{};
    for (std::size_t i = 0; i < 3; ++i) {
      const Token& token = tokens[at + i];
      const auto number = whole_text<double>(token.text);
      if (!number || !std::isfinite(*number) || *number < 0 || (i == 0 && *number == 0)) {
        constexpr std::string_view kNames[] = {"time", "algorithm bandwidth", "bus bandwidth"};
        problem(token, fmt::format("'{}' is no {}", token.text, kNames[i]));
        return std::nullopt;
      }
      numbers[i] = *number;
    }
    NcclTiming t{numbers[0], numbers[1], numbers[2], std::nullopt};
    const Token& wrong = tokens[at + 3];
    if (wrong.text != "N/A") {
      const auto count = whole_text<double>(wrong.text);
      if (!count || !(*count >= 0) || *count > 1e15) {
        problem(wrong, fmt::format("'{}' is no number of wrong elements", wrong.text),
                "a count, or N/A");
        return std::nullopt;
      }
      t.wrong = static_cast<std::int64_t>(*count);
    }
    return t;
  }

  void read_other(const std::vector<Token>& tokens) {
    const bool comment = has(line_, "#");
    const bool device = comment && has(line_, "Rank") && has(line_, " Pid ");
    const bool begins = comment && (has(line_, "Collective test starting") ||
                                    has(line_, "nThread") || has(line_, "nccl-tests version"));
    if ((device || begins) && tables_.open()) start_over();
    if (const auto op = program_in(line_); op && !tables_.open()) header_.op = op;
    if (device) {
      read_device(tokens);
    } else if (comment && has(line_, "out-of-place")) {
      // A new head within a run: nothing before it but the same devices.
      tables_.close(header_);
      in_table_ = true;
      per_iteration_ = has(line_, "per-iteration");
    } else if (comment && has(line_, "Avg bus bandwidth")) {
      start_over();
    } else {
      read_words(tokens);
    }
  }

  /// "#  Rank  0 Group  0 Pid 1006102 on pool0-01806 device  0 [0000:19:00] NVIDIA H100 80GB HBM3"
  void read_device(const std::vector<Token>& tokens) {
    std::string host;
    std::int64_t group = 0;
    std::size_t device = tokens.size();
    for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
      const std::string_view word = tokens[i].text;
      if (word == "Group") group = as_count(tokens[i + 1].text).value_or(0);
      if (word == "on" && host.empty()) host = tokens[i + 1].text;
      if (word == "device") device = i + 2;
    }
    if (host.empty()) return;
    if (!header_.group) header_.group = group;
    if (*header_.group != group) return;
    if (header_.ranks_of_host.size() < kMaxRows) ++header_.ranks_of_host[host];
    while (device < tokens.size() && tokens[device].text.front() == '[') ++device;
    if (device < tokens.size() && header_.device.empty()) {
      header_.device = line_.substr(tokens[device].begin);
    }
  }

  void read_words(const std::vector<Token>& tokens) {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const std::string_view word = tokens[i].text;
      constexpr std::string_view kLibrary = "nccl-library=";
      if (word.substr(0, kLibrary.size()) == kLibrary) {
        const auto code = as_count(word.substr(kLibrary.size()));
        if (code) header_.nccl_version = version_of(*code);
      }
      if (i + 2 < tokens.size() && word == "NCCL" && tokens[i + 1].text == "version" &&
          is_digit(tokens[i + 2].text[0])) {
        const std::string_view version = tokens[i + 2].text;
        header_.nccl_version = version.substr(0, version.find('+'));
      }
      // "simulated by orrery: 16 ranks, 8 per node"
      if (i + 5 < tokens.size() && word == "orrery:" && tokens[i + 2].text == "ranks,") {
        header_.ranks = as_count(tokens[i + 1].text).value_or(0);
        header_.ranks_per_node = as_count(tokens[i + 3].text).value_or(0);
      }
    }
  }

  void start_over() {
    tables_.close(header_);
    header_ = {};
    in_table_ = false;
    per_iteration_ = false;
  }

  Location place(const Token& token) const {
    // Columns are characters; bytes that continue one in UTF-8 do not count.
    const std::string_view before = line_.substr(0, token.begin);
    const auto characters = std::count_if(before.begin(), before.end(), [](char c) {
      return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
    });
    return {"", number_, static_cast<int>(characters) + 1};
  }
  void problem(const Token& token, std::string message, std::string hint = "") {
    tables_.problem(place(token), std::move(message), line_, std::move(hint));
  }

  std::string_view text_;
  Tables& tables_;
  std::string_view line_;
  int number_ = 0;
  Header header_;
  bool in_table_ = false;
  bool per_iteration_ = false;
};

// ---- JSON

/// Follows the parser through the document; of most values it only knows the path.
class JsonHandler : public rapidjson::BaseReaderHandler<rapidjson::UTF8<>, JsonHandler> {
 public:
  JsonHandler(std::string_view text, const rapidjson::MemoryStream& stream, Tables& tables)
      : text_(text), stream_(stream), tables_(tables) {}

  bool Null() { return value("", std::nullopt); }
  bool Bool(bool) { return value("", std::nullopt); }
  bool RawNumber(const char* s, rapidjson::SizeType n, bool) {
    return value("", whole_text<double>(std::string_view(s, n)));
  }
  bool String(const char* s, rapidjson::SizeType n, bool) {
    return value(std::string_view(s, n), std::nullopt);
  }
  bool Key(const char* s, rapidjson::SizeType n, bool) {
    path_.resize(ends_.back());
    path_ += '.';
    path_.append(s, std::min<std::size_t>(n, 64));
    return true;
  }
  bool StartObject() {
    if (path_ == ".results[]") {
      row_ = {};
      fields_ = 0;
      row_offset_ = stream_.Tell();
    }
    if (path_ == ".config.devices[]") {
      host_.clear();
      group_ = 0;
    }
    return push("");
  }
  bool EndObject(rapidjson::SizeType) {
    pop();
    if (path_ == ".results[]") return end_row();
    if (path_ == ".config.devices[]" && !host_.empty()) end_device();
    if (path_ == ".results[].out_of_place") end_timing(row_.out_of_place);
    if (path_ == ".results[].in_place") end_timing(row_.in_place);
    return true;
  }
  bool StartArray() { return push("[]"); }
  bool EndArray(rapidjson::SizeType) {
    pop();
    return true;
  }

  Header header() {
    // A list of devices names the first device of each process only.
    const std::int64_t each =
        std::max<std::int64_t>(1, threads_) * std::max<std::int64_t>(1, gpus_);
    for (auto& [host, ranks] : header_.ranks_of_host) ranks *= each;
    return header_;
  }

  Location place(std::size_t offset) const {
    const std::string_view before = text_.substr(0, offset);
    const auto line = std::count(before.begin(), before.end(), '\n');
    const std::size_t begin = before.rfind('\n') + 1;  // npos + 1 is 0
    return {"", static_cast<int>(line) + 1, static_cast<int>(offset - begin) + 1};
  }

 private:
  bool push(std::string_view suffix) {
    constexpr std::size_t kMaxDepth = 64;
    if (ends_.size() >= kMaxDepth) return false;
    starts_.push_back(path_.size());
    path_ += suffix;
    ends_.push_back(path_.size());
    return true;
  }
  void pop() {
    path_.resize(starts_.back());
    starts_.pop_back();
    ends_.pop_back();
  }

  bool value(std::string_view text, std::optional<double> number) {
    if (ends_.empty()) return true;
    const auto whole = [&](std::int64_t most) {
      return number && *number >= 0 && *number <= static_cast<double>(most) &&
                     *number == std::floor(*number)
                 ? static_cast<std::int64_t>(*number)
                 : 0;
    };
    if (path_ == ".nccl_version") {
      header_.nccl_version = version_of(whole(1'000'000));
    } else if (path_ == ".start_time") {
      header_.date = text.substr(0, 10);
    } else if (path_ == ".args[]") {
      if (const auto op = program_in(text)) header_.op = op;
    } else if (path_ == ".ranks") {
      header_.ranks = whole(1'000'000'000);
    } else if (path_ == ".ranks_per_node") {
      header_.ranks_per_node = whole(1'000'000'000);
    } else if (path_ == ".config.nthreads") {
      threads_ = whole(100'000);
    } else if (path_ == ".config.ngpus") {
      gpus_ = whole(100'000);
    } else if (path_ == ".config.devices[].hostname") {
      host_ = text;
    } else if (path_ == ".config.devices[].group") {
      group_ = whole(1'000'000'000);
    } else if (path_ == ".config.devices[].device_info") {
      if (header_.device.empty()) header_.device = text.substr(0, 256);
    } else if (path_.compare(0, 10, ".results[]") == 0) {
      row_value(std::string_view(path_).substr(10), text, number);
    }
    return true;
  }

  void row_value(std::string_view key, std::string_view text, std::optional<double> number) {
    constexpr double kMost = 9e18;
    const bool is_count = number && *number >= 0 && *number < kMost;
    if (key == ".size" && is_count) {
      row_.size_bytes = static_cast<std::int64_t>(*number);
      fields_ |= 1;
    } else if (key == ".count" && is_count) {
      row_.count = static_cast<std::int64_t>(*number);
      fields_ |= 2;
    } else if (key == ".type" && one_of(text, kTypes)) {
      row_.type = text;
      fields_ |= 4;
    } else if (key == ".redop" && one_of(text, kRedops)) {
      row_.redop = text;
      fields_ |= 8;
    } else if (key == ".root") {  // a number in text, with blanks before it
      const std::size_t first = std::min(text.find_first_not_of(' '), text.size());
      row_.root = number && std::abs(*number) < kMost
                      ? static_cast<std::int64_t>(*number)
                      : whole_text<std::int64_t>(text.substr(first)).value_or(-1);
    } else if (has(key, "place.")) {
      const std::string_view name = key.substr(key.rfind('.') + 1);
      if (name == "nwrong") {
        if (number && *number >= 0 && *number < kMost) {
          timing_.wrong = static_cast<std::int64_t>(*number);
        }
      } else if (number && std::isfinite(*number) && *number >= 0) {
        if (name == "time" || name == "cpu_time") timing_.time_us = *number;
        if (name == "alg_bw") timing_.algbw_gbps = *number;
        if (name == "bus_bw") timing_.busbw_gbps = *number;
      }
    }
  }

  void end_timing(std::optional<NcclTiming>& timing) {
    timing = timing_;
    timing_ = {};
  }

  bool end_row() {
    const Location at = place(row_offset_);
    const auto bad = [&](const std::optional<NcclTiming>& t) { return t && !(t->time_us > 0); };
    std::string message;
    if (fields_ != 15) {
      message = "a result lacks its size, count, type or redop";
    } else if (!row_.out_of_place && !row_.in_place) {
      message = "a result has neither out_of_place nor in_place";
    } else if (bad(row_.out_of_place) || bad(row_.in_place)) {
      message = "a result's time is no time";
    }
    if (message.empty()) return tables_.add(std::move(row_), at, "");
    tables_.problem(at, message, "");
    return true;
  }

  void end_device() {
    if (!header_.group) header_.group = group_;
    if (*header_.group == group_) ++header_.ranks_of_host[host_];
  }

  std::string_view text_;
  const rapidjson::MemoryStream& stream_;
  Tables& tables_;
  std::string path_;                 // ".results[].in_place.time"
  std::vector<std::size_t> starts_;  // of path_, before each open object or list
  std::vector<std::size_t> ends_;    // and within it
  Header header_;
  std::int64_t threads_ = 1;
  std::int64_t gpus_ = 1;
  std::string host_;
  std::int64_t group_ = 0;
  NcclRow row_;
  unsigned fields_ = 0;
  NcclTiming timing_;
  std::size_t row_offset_ = 0;
};

void read_json(std::string_view text, Tables& tables) {
  rapidjson::MemoryStream stream(text.data(), text.size());
  rapidjson::Reader reader;
  constexpr unsigned kFlags = rapidjson::kParseIterativeFlag | rapidjson::kParseStopWhenDoneFlag |
                              rapidjson::kParseNumbersAsStringsFlag |
                              rapidjson::kParseValidateEncodingFlag;
  // Several runs may stand in one file, one after the other.
  while (stream.Tell() < text.size() && !tables.full() &&
         text.find_first_not_of(" \t\r\n", stream.Tell()) != std::string_view::npos) {
    JsonHandler handler(text, stream, tables);
    const rapidjson::ParseResult result = reader.Parse<kFlags>(stream, handler);
    if (result.IsError()) {
      const bool ours = result.Code() == rapidjson::kParseErrorTermination;
      if (!ours || !tables.full()) {
        tables.problem(handler.place(std::min(result.Offset(), text.size())),
                       ours ? "lists and objects are nested too deep"
                            : rapidjson::GetParseError_En(result.Code()),
                       "");
      }
      return;
    }
    tables.close(handler.header());
  }
}

}  // namespace

std::vector<NcclTable> read_nccl_text(std::string_view text, const std::string& name,
                                      Problems& problems) {
  Tables tables(name, problems);
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  if (first != std::string_view::npos && text[first] == '{') {
    read_json(text, tables);
  } else {
    TextReader(text, tables).read();
  }
  return tables.take();
}

std::vector<NcclTable> read_nccl(const std::string& path, Problems& problems) {
  const std::optional<std::string> text = read_text(path, problems);
  return text ? read_nccl_text(*text, path, problems) : std::vector<NcclTable>();
}

}  // namespace orrery
