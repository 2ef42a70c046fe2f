#include "reports/target.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>

#include "reports/terminal.hpp"
#include "sim/units.hpp"

namespace orrery {

namespace {

struct QuantityWord {
  std::string_view word;
  TargetQuantity quantity;
};
constexpr std::array<QuantityWord, 11> kQuantities = {
    {{"tokens/day", TargetQuantity::tokens_per_day},
     {"tokens/s/gpu", TargetQuantity::tokens_per_s_per_gpu},
     {"step time", TargetQuantity::step_time_s},
     {"step_time", TargetQuantity::step_time_s},
     {"step", TargetQuantity::step_time_s},
     {"mfu", TargetQuantity::mfu},
     {"memory", TargetQuantity::memory_bytes},
     {"gpu-hours", TargetQuantity::gpu_hours},
     {"gpu_hours", TargetQuantity::gpu_hours},
     {"days", TargetQuantity::days},
     {"cost", TargetQuantity::cost_usd}}};

bool is_space(char c) {
  return std::isspace(static_cast<unsigned char>(c)) != 0;
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
  return text;
}

bool take_suffix(std::string_view& text, std::string_view word) {
  if (text.size() < word.size()) return false;
  const std::string_view end = text.substr(text.size() - word.size());
  const bool same = std::equal(end.begin(), end.end(), word.begin(), [](char a, char b) {
    return std::tolower(static_cast<unsigned char>(a)) ==
           std::tolower(static_cast<unsigned char>(b));
  });
  if (same) text = trimmed(text.substr(0, text.size() - word.size()));
  return same;
}

/// A number with a decimal prefix after it.
std::optional<double> scaled_number(std::string_view text) {
  text = trimmed(text);
  double factor = 1;
  if (!text.empty()) {
    switch (text.back()) {
      case 'k':
      case 'K':
        factor = 1e3;
        break;
      case 'M':
        factor = 1e6;
        break;
      case 'G':
      case 'B':
        factor = 1e9;
        break;
      case 'T':
        factor = 1e12;
        break;
      case 'P':
        factor = 1e15;
        break;
      default:
        break;
    }
    if (factor > 1) text = trimmed(text.substr(0, text.size() - 1));
  }
  const auto number = parse_number(text);
  if (!number || !(*number > 0) || !std::isfinite(*number * factor)) return std::nullopt;
  return *number * factor;
}

std::optional<double> dollars(std::string_view text) {
  text = trimmed(text);
  for (const std::string_view word : {"/gpu-hour", "/gpu-h", "a gpu-hour", "usd"}) {
    take_suffix(text, word);
  }
  if (!text.empty() && text.front() == '$') text = trimmed(text.substr(1));
  return scaled_number(text);
}

struct ValueReader {
  TargetQuantity quantity;
  std::string_view text;
  std::string why;

  std::optional<double> read() {
    switch (quantity) {
      case TargetQuantity::step_time_s:
        return parse_quantity(text, Dimension::seconds, &why);
      case TargetQuantity::memory_bytes:
        return parse_quantity(text, Dimension::bytes, &why);
      case TargetQuantity::mfu:
        return parse_quantity(text, Dimension::scalar, &why);
      case TargetQuantity::cost_usd:
        return dollars(text);
      case TargetQuantity::tokens_per_day:
      case TargetQuantity::tokens_per_s_per_gpu:
      case TargetQuantity::gpu_hours:
      case TargetQuantity::days:
        break;
    }
    std::string_view number = text;
    for (const std::string_view word : {"tokens", "tokens/day", "days", "gpu-hours"}) {
      take_suffix(number, word);
    }
    return scaled_number(number);
  }
};

/// A word that stands by itself, from `from` on.
std::size_t find_word(std::string_view text, std::string_view word, std::size_t from) {
  for (std::size_t at = text.find(word, from); at != std::string_view::npos;
       at = text.find(word, at + 1)) {
    const bool begins = at == 0 || is_space(text[at - 1]);
    const std::size_t end = at + word.size();
    if (begins && end < text.size() && is_space(text[end])) return at;
  }
  return std::string_view::npos;
}

/// `at`: the character that it is about.
Problem problem_in(const std::string& target, std::size_t at, std::string message,
                   std::string hint) {
  Problem problem;
  problem.at.file = "--target";
  problem.at.line = 1;
  problem.at.column = static_cast<int>(at) + 1;
  problem.message = std::move(message);
  problem.hint = std::move(hint);
  problem.source_line = target;
  return problem;
}

constexpr std::string_view kSyntax =
    "QUANTITY >= or <= VALUE, as \"tokens/day >= 250G\", \"days <= 60 for 14.8T tokens\" or "
    "\"cost <= 6M USD for 14.8T tokens at 2 USD\"";

class TargetReader {
 public:
  TargetReader(const std::string& text, Problems& problems) : text_(text), problems_(problems) {
    target_.text = text;
  }

  std::optional<Target> read() {
    const std::size_t relation = text_.find_first_of("<>=");
    if (relation == std::string::npos) {
      fail(0, "a target compares: there is no >= or <= here", std::string(kSyntax));
      return std::nullopt;
    }
    read_quantity(std::string_view(text_).substr(0, relation));
    std::size_t begin = relation + 1;
    if (text_[relation] == '=') {
      fail(relation, "'=' says neither at least nor at most", ">= or <=");
    }
    target_.at_least = text_[relation] == '>';
    if (begin < text_.size() && text_[begin] == '=') ++begin;
    const std::size_t for_at = find_word(text_, "for", begin);
    const std::size_t at_at = find_word(text_, "at", begin);
    const std::size_t end = std::min({for_at, at_at, text_.size()});
    if (known_) read_value(begin, end);
    if (for_at != std::string::npos) {
      read_amount(for_at + 3, for_at < at_at ? at_at : std::string::npos, "a number of tokens",
                  parse_tokens, target_.tokens);
    }
    if (at_at != std::string::npos) {
      read_amount(at_at + 2, at_at < for_at ? for_at : std::string::npos, "USD for a GPU-hour",
                  dollars, target_.usd_per_gpu_hour);
    }
    if (failed_) return std::nullopt;
    return target_;
  }

 private:
  void fail(std::size_t at, std::string message, std::string hint) {
    failed_ = true;
    problems_.add(problem_in(text_, at, std::move(message), std::move(hint)));
  }

  void read_quantity(std::string_view word) {
    std::string name(trimmed(word));
    std::transform(name.begin(), name.end(), name.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    std::vector<std::string> words;
    for (const QuantityWord& q : kQuantities) {
      if (name == q.word) {
        target_.quantity = q.quantity;
        known_ = true;
        return;
      }
      words.emplace_back(q.word);
    }
    const auto near = nearest(name, words);
    fail(0,
         name.empty() ? "no quantity before the comparison"
                      : fmt::format("unknown quantity '{}'", name),
         near ? fmt::format("did you mean '{}'?", *near)
              : "one of tokens/day, tokens/s/gpu, step time, mfu, memory, gpu-hours, days, cost");
  }

  void read_value(std::size_t begin, std::size_t end) {
    const std::string_view word = trimmed(std::string_view(text_).substr(begin, end - begin));
    ValueReader reader{target_.quantity, word, {}};
    const auto value = reader.read();
    const std::size_t at =
        word.empty() ? begin : static_cast<std::size_t>(word.data() - text_.data());
    if (!value || !(*value > 0)) {
      fail(at,
           fmt::format("'{}' is no value of {}{}{}", word, name_of(target_.quantity),
                       reader.why.empty() ? "" : ": ", reader.why),
           std::string(kSyntax));
      return;
    }
    target_.value = *value;
  }

  template <class Read>
  void read_amount(std::size_t begin, std::size_t end, const char* what, Read read_word,
                   double& to) {
    const std::string_view word = trimmed(std::string_view(text_).substr(
        begin, end == std::string::npos ? std::string::npos : end - begin));
    const auto value = read_word(word);
    if (!value) {
      fail(static_cast<std::size_t>(word.data() - text_.data()),
           fmt::format("'{}' is no {}", word, what), std::string(kSyntax));
      return;
    }
    to = *value;
  }

  const std::string& text_;
  Problems& problems_;
  Target target_;
  bool known_ = false;
  bool failed_ = false;
};

/// The quantity where a step takes `step_s` and `goodput` of the time counts.
double value_of(const Target& target, const Report& report, const TargetContext& c, double step_s,
                double goodput) {
  const double slower = step_s / report.step_time_s;
  const double tokens = target.tokens > 0 ? target.tokens : c.tokens;
  const double price = target.usd_per_gpu_hour > 0 ? target.usd_per_gpu_hour : c.usd_per_gpu_hour;
  // Of the run, or of all that the budget has.
  const bool whole = tokens <= 0;
  const double longer = slower / (whole && c.budget_has_goodput ? 1 : goodput);
  const double gpu_hours =
      longer * (whole ? c.budget_gpu_hours : tokens * 1e-12 * report.gpu_hours_per_trillion_tokens);
  switch (target.quantity) {
    case TargetQuantity::tokens_per_day:
      return report.tokens_per_day / slower * goodput;
    case TargetQuantity::tokens_per_s_per_gpu:
      return report.tokens_per_s_per_gpu / slower;
    case TargetQuantity::step_time_s:
      return step_s;
    case TargetQuantity::mfu:
      return report.mfu_causal / slower;
    case TargetQuantity::memory_bytes: {
      std::int64_t peak = 0;
      for (const RankReport& rank : report.ranks) peak = std::max(peak, rank.memory_peak_bytes);
      return static_cast<double>(peak);
    }
    case TargetQuantity::gpu_hours:
      return gpu_hours;
    case TargetQuantity::days:
      return longer * (whole ? c.budget_days : tokens / report.tokens_per_day);
    case TargetQuantity::cost_usd:
      return whole && target.usd_per_gpu_hour <= 0 && c.budget_cost_usd > 0
                 ? longer * c.budget_cost_usd
                 : gpu_hours * price;
  }
  return 0;
}

void check_known(const Target& target, const TargetContext& c) {
  const bool needs_tokens = target.quantity == TargetQuantity::gpu_hours ||
                            target.quantity == TargetQuantity::days ||
                            target.quantity == TargetQuantity::cost_usd;
  if (!needs_tokens) return;
  Problems problems;
  const auto fail = [&](const char* message, const char* hint) {
    problems.add(problem_in(target.text, target.text.size() - 1, message, hint));
  };
  const bool has_tokens = target.tokens > 0 || c.tokens > 0;
  if (!has_tokens && c.budget_gpu_hours <= 0) {
    fail("of how many tokens?", "add \"for 14.8T tokens\", --tokens, or a --budget");
  }
  const bool has_price = target.usd_per_gpu_hour > 0 || c.usd_per_gpu_hour > 0;
  if (target.quantity == TargetQuantity::cost_usd && !has_price &&
      (has_tokens || c.budget_cost_usd <= 0)) {
    fail("at which price?", "add \"at 2 USD\", --usd-per-gpu-hour, or a --budget with a price");
  }
  problems.throw_if_any();
}

}  // namespace

std::string_view name_of(TargetQuantity quantity) {
  switch (quantity) {
    case TargetQuantity::tokens_per_day:
      return "tokens/day";
    case TargetQuantity::tokens_per_s_per_gpu:
      return "tokens/s/GPU";
    case TargetQuantity::step_time_s:
      return "step time";
    case TargetQuantity::mfu:
      return "MFU";
    case TargetQuantity::memory_bytes:
      return "memory";
    case TargetQuantity::gpu_hours:
      return "GPU-hours";
    case TargetQuantity::days:
      return "days";
    case TargetQuantity::cost_usd:
      return "cost";
  }
  return "?";
}

std::string_view name_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::met:
      return "met";
    case Verdict::met_closely:
      return "met_closely";
    case Verdict::missed_closely:
      return "missed_closely";
    case Verdict::missed:
      return "missed";
  }
  return "?";
}

std::optional<double> parse_tokens(std::string_view text) {
  text = trimmed(text);
  take_suffix(text, "tokens");
  return scaled_number(text);
}

std::optional<Target> parse_target(const std::string& text, Problems& problems) {
  return TargetReader(text, problems).read();
}

Judgement judge(const Target& target, const Report& report, const TargetContext& context) {
  check_known(target, context);
  const double step = report.step_time_s;
  Judgement j{.target = target};
  j.value = value_of(target, report, context, step, context.goodput);
  const double shorter = std::min(std::max(0.0, 1 - 2 * context.spread), context.published_least);
  const double longer = std::max(1 + 2 * context.spread, context.published_most);
  const double fast = value_of(target, report, context, step * shorter, context.goodput_high);
  const double slow = value_of(target, report, context, step * longer, context.goodput_low);
  j.low = std::min(fast, slow);
  j.high = std::max(fast, slow);
  const auto holds = [&](double value) {
    return target.at_least ? value >= target.value : value <= target.value;
  };
  const bool all = holds(j.low) && holds(j.high);
  const bool none = !holds(j.low) && !holds(j.high);
  if (holds(j.value)) {
    j.verdict = all ? Verdict::met : Verdict::met_closely;
  } else {
    j.verdict = none ? Verdict::missed : Verdict::missed_closely;
  }
  j.margin = (target.at_least ? 1 : -1) * (j.value / target.value - 1);
  return j;
}

std::string format_target_value(TargetQuantity quantity, double value) {
  switch (quantity) {
    case TargetQuantity::tokens_per_day:
      return format_count(value) + " tokens/day";
    case TargetQuantity::tokens_per_s_per_gpu:
      return fmt::format("{:.0f} tokens/s/GPU", value);
    case TargetQuantity::step_time_s:
      return format_seconds(value);
    case TargetQuantity::mfu:
      return fmt::format("{:.1f} %", 100 * value);
    case TargetQuantity::memory_bytes:
      return format_bytes(value);
    case TargetQuantity::gpu_hours:
      return format_count(value) + " GPU-hours";
    case TargetQuantity::days:
      return fmt::format("{:.1f} days", value);
    case TargetQuantity::cost_usd:
      return format_count(value) + " USD";
  }
  return "?";
}

}  // namespace orrery
