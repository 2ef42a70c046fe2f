#include "calibrate/journal.hpp"

#include <fmt/core.h>

#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <vector>

#include "sim/config.hpp"

namespace orrery {
namespace {

constexpr std::string_view kTitle = "orrery calibration journal 1: ";

/// FNV-1a, 64 bits.
std::uint64_t hash_of(std::string_view text) {
  std::uint64_t h = 0xcbf29ce484222325ULL;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  return h;
}

std::string result_line(const std::string& key, const Measurement& m) {
  const std::string body =
      fmt::format("{:.9e} {:.4e} {} {} {} {:.4e} {} {}", m.seconds, m.error, m.samples, m.repeats,
                  m.attempts, m.drift, m.steady ? 1 : 0, key);
  return fmt::format("{:016x} {}\n", hash_of(body), body);
}

/// The next word of a line, taken off its front.
std::string_view next_word(std::string_view& line) {
  const std::size_t end = std::min(line.find(' '), line.size());
  const std::string_view word = line.substr(0, end);
  line.remove_prefix(std::min(end + 1, line.size()));
  return word;
}

template <class Number>
bool read_number(std::string_view& line, Number& number) {
  const std::string_view word = next_word(line);
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), number);
  return error == std::errc() && end == word.data() + word.size();
}

bool read_result(std::string_view line, std::string& key, Measurement& m) {
  const std::string_view hash = next_word(line);
  if (hash != fmt::format("{:016x}", hash_of(line))) return false;
  int steady = 0;
  const bool ok = read_number(line, m.seconds) && read_number(line, m.error) &&
                  read_number(line, m.samples) && read_number(line, m.repeats) &&
                  read_number(line, m.attempts) && read_number(line, m.drift) &&
                  read_number(line, steady);
  m.steady = steady != 0;
  key = line;
  return ok && !key.empty() && m.seconds > 0;
}

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw std::runtime_error(fmt::format("cannot {} {}: {}", what, path, std::strerror(errno)));
}

}  // namespace

std::string measured_key(const Shape& shape) {
  struct Visitor {
    const Shape& shape;
    std::string operator()(const Gemm& g) const {
      return fmt::format("gemm {} {} {} {} {} {} {} {}", name_of(g.inputs), name_of(g.pass),
                         g.accumulate ? 1 : 0, g.groups, g.m, g.n, g.k, shape.sms);
    }
    std::string operator()(const AttentionCore& a) const {
      return fmt::format("attention {} {} {} {} {} {} {} {} {} {} {}", name_of(a.inputs),
                         a.backward ? "backward" : "forward", a.causal ? 1 : 0, a.batch, a.heads,
                         a.kv_heads, a.q_len, a.kv_len, a.d_qk, a.d_v, shape.sms);
    }
    std::string operator()(const Streaming& s) const {
      return fmt::format("streaming {} {} {} {} {} {}", name_of(s.kind), s.bytes_read,
                         s.bytes_written, s.launches, shape.sms, shape.label);
    }
    std::string operator()(const Mark&) const { return "other"; }
    std::string operator()(const CachedAttention&) const { return "other"; }
    std::string operator()(const ExpertExchange&) const { return "other"; }
    std::string operator()(const Collective&) const { return "other"; }
    std::string operator()(const Send&) const { return "other"; }
    std::string operator()(const StorageWrite&) const { return "other"; }
  };
  return std::visit(Visitor{shape}, shape.work);
}

Journal::Journal(std::string path, std::string subject, bool resume) : path_(std::move(path)) {
  const std::string title = std::string(kTitle) + subject;
  bool whole = false;  // the file ends with a line's end
  if (resume && std::filesystem::exists(path_)) {
    Problems problems;
    const std::string text = read_text(path_, problems).value_or("");
    problems.throw_if_any();
    std::size_t begin = 0;
    for (int number = 1; begin < text.size(); ++number) {
      const std::size_t end = text.find('\n', begin);
      whole = end != std::string::npos;
      const std::string_view line =
          std::string_view(text).substr(begin, whole ? end - begin : std::string::npos);
      begin += line.size() + 1;
      if (number == 1) {
        if (line == title) continue;
        const bool other = line.substr(0, kTitle.size()) == kTitle;
        Problem problem;
        problem.at = {path_, 1, 1};
        problem.message = other ? fmt::format("these results are not of {}", subject)
                                : "this is no journal of a calibration";
        problem.hint = "without --resume it is begun anew";
        problem.source_line = line;
        problems.add(std::move(problem));
        problems.throw_if_any();
      }
      std::string key;
      Measurement m;
      if (whole && read_result(line, key, m)) {
        results_[key] = m;
      } else {
        ++damaged_;
      }
    }
  }
  const bool append = !results_.empty() || damaged_ > 0 || whole;
  file_ = std::fopen(path_.c_str(), append ? "ab" : "wb");
  if (file_ == nullptr) fail(path_, "write");
  if (!append) write(title + "\n");
  if (append && !whole) write("\n");
}

Journal::~Journal() {
  if (file_ != nullptr) std::fclose(file_);
}

std::optional<Measurement> Journal::find(const std::string& key) const {
  const auto found = results_.find(key);
  return found == results_.end() ? std::nullopt : std::optional(found->second);
}

void Journal::add(const std::string& key, const Measurement& measurement) {
  results_[key] = measurement;
  write(result_line(key, measurement));
}

void Journal::remove() {
  if (file_ != nullptr) std::fclose(file_);
  file_ = nullptr;
  std::error_code ignored;
  std::filesystem::remove(path_, ignored);
}

void Journal::write(std::string_view line) {
  if (std::fwrite(line.data(), 1, line.size(), file_) != line.size() || std::fflush(file_) != 0) {
    fail(path_, "write");
  }
}

}  // namespace orrery
