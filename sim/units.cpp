#include "sim/units.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <system_error>

namespace orrery {
namespace {

/// digits x 10^exponent, exactly as written.
struct Decimal {
  bool negative = false;
  std::string digits;  // no leading zeros; empty is zero
  int exponent = 0;
  std::size_t length = 0;  // characters read
};

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

void explain(std::string* why, std::string text) {
  if (why != nullptr) *why = std::move(text);
}

/// Appends the run of digits at `pos`; an underscore is skipped where it stands between two digits.
std::size_t read_digits(std::string_view text, std::size_t pos, std::string& out) {
  const std::size_t begin = pos;
  while (pos < text.size()) {
    if (is_digit(text[pos])) {
      out += text[pos];
    } else if (text[pos] != '_' || pos == begin || pos + 1 >= text.size() ||
               !is_digit(text[pos - 1]) || !is_digit(text[pos + 1])) {
      break;
    }
    ++pos;
  }
  return pos;
}

/// Reads the decimal number that `text` starts with.
std::optional<Decimal> scan_decimal(std::string_view text, std::string* why) {
  Decimal d;
  std::size_t pos = 0;
  if (pos < text.size() && (text[pos] == '-' || text[pos] == '+')) d.negative = text[pos++] == '-';

  std::string lower(text.substr(pos));
  for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  for (const char* word : {"inf", ".inf", "infinity", "nan", ".nan"}) {
    if (lower == word) {
      explain(why, "infinity and nan are not accepted; write a finite number");
      return std::nullopt;
    }
  }
  if (lower.size() > 2 && lower[0] == '0') {
    const bool hex = lower[1] == 'x' &&
                     std::string_view("0123456789abcdef").find(lower[2]) != std::string_view::npos;
    if (hex || ((lower[1] == 'o' || lower[1] == 'b') && is_digit(lower[2]))) {
      explain(why, "write the number in decimal; hexadecimal, octal and binary are not read");
      return std::nullopt;
    }
  }

  pos = read_digits(text, pos, d.digits);
  const std::size_t whole_digits = d.digits.size();
  if (whole_digits > 1 && d.digits[0] == '0') {
    const std::size_t first = std::min(d.digits.find_first_not_of('0'), whole_digits - 1);
    explain(why, fmt::format("a leading zero is not accepted (is it octal?); write {}",
                             d.digits.substr(first)));
    return std::nullopt;
  }
  if (pos < text.size() && text[pos] == '.') pos = read_digits(text, pos + 1, d.digits);
  if (d.digits.empty()) return std::nullopt;
  d.exponent = -static_cast<int>(d.digits.size() - whole_digits);
  if (pos < text.size() && text[pos] == '_') {
    explain(why, "an underscore may stand only between two digits");
    return std::nullopt;
  }
  if (pos < text.size() && (text[pos] == 'e' || text[pos] == 'E')) {
    std::size_t at = pos + 1;
    const bool minus = at < text.size() && text[at] == '-';
    if (at < text.size() && (text[at] == '-' || text[at] == '+')) ++at;
    int exponent = 0;
    const std::size_t first = at;
    for (; at < text.size() && is_digit(text[at]); ++at) {
      // Beyond any double either way; saturates so that it cannot overflow.
      exponent = std::min(exponent * 10 + (text[at] - '0'), 1'000'000);
    }
    if (at > first) {  // else the letter begins a unit ("2 EB" without the blank)
      d.exponent += minus ? -exponent : exponent;
      pos = at;
    }
  }
  d.digits.erase(0, std::min(d.digits.find_first_not_of('0'), d.digits.size()));
  d.length = pos;
  return d;
}

/// digits x 10^(exponent + shift), rounded once; nullopt where no finite double is near.
std::optional<double> to_double(const Decimal& d, int shift, std::string* why) {
  if (d.digits.empty()) return 0.0;
  const std::string text =
      fmt::format("{}{}e{}", d.negative ? "-" : "", d.digits, d.exponent + shift);
  double value = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
  if (result.ec == std::errc()) return value;
  const bool large = static_cast<long>(d.digits.size()) + d.exponent + shift > 0;
  explain(why, large ? "the number is too large" : "the number is too small");
  return std::nullopt;
}

/// What one unit is worth: multiplier x 10^power.
struct Unit {
  double multiplier = 1;
  int power = 0;
};

std::optional<Unit> decimal_prefix(std::string_view prefix) {
  if (prefix.empty()) return Unit{};
  if (prefix.size() != 1) return std::nullopt;
  switch (prefix[0]) {
    case 'k':
    case 'K':
      return Unit{1, 3};
    case 'M':
      return Unit{1, 6};
    case 'G':
      return Unit{1, 9};
    case 'T':
      return Unit{1, 12};
    case 'P':
      return Unit{1, 15};
    case 'E':
      return Unit{1, 18};
    default:
      return std::nullopt;
  }
}

std::optional<Unit> decimal_or_binary_prefix(std::string_view prefix) {
  if (prefix.size() == 2 && prefix[1] == 'i') {
    const std::size_t i = std::string_view("KMGTPE").find(prefix[0]);
    if (i == std::string_view::npos) return std::nullopt;
    return Unit{std::ldexp(1.0, 10 * (static_cast<int>(i) + 1)), 0};
  }
  return decimal_prefix(prefix);
}

bool remove_suffix(std::string_view& text, std::string_view suffix) {
  if (text.size() < suffix.size() || text.substr(text.size() - suffix.size()) != suffix) {
    return false;
  }
  text.remove_suffix(suffix.size());
  return true;
}

std::optional<Unit> data_unit(std::string_view unit) {
  const bool bits = remove_suffix(unit, "b");
  if (!bits && !remove_suffix(unit, "B")) return std::nullopt;
  std::optional<Unit> result = decimal_or_binary_prefix(unit);
  if (result && bits) result->multiplier /= 8;
  return result;
}

std::optional<Unit> time_unit(std::string_view unit) {
  struct Word {
    std::string_view name;
    Unit unit;
  };
  // Two code points look like a micro sign: U+00B5 and the Greek letter U+03BC.
  static constexpr std::array<Word, 14> kWords = {{{"ps", {1, -12}},
                                                   {"ns", {1, -9}},
                                                   {"us", {1, -6}},
                                                   {"\xC2\xB5s", {1, -6}},
                                                   {"\xCE\xBCs", {1, -6}},
                                                   {"ms", {1, -3}},
                                                   {"s", {1, 0}},
                                                   {"min", {60, 0}},
                                                   {"h", {3600, 0}},
                                                   {"hour", {3600, 0}},
                                                   {"hours", {3600, 0}},
                                                   {"d", {86400, 0}},
                                                   {"day", {86400, 0}},
                                                   {"days", {86400, 0}}}};
  for (const Word& w : kWords) {
    if (w.name == unit) return w.unit;
  }
  return std::nullopt;
}

std::optional<Unit> find_unit(std::string_view unit, Dimension dimension) {
  switch (dimension) {
    case Dimension::scalar:
      return unit == "%" ? std::optional<Unit>(Unit{1, -2}) : std::nullopt;
    case Dimension::bytes:
      return data_unit(unit);
    case Dimension::bytes_per_s:
      if (remove_suffix(unit, "/s") || remove_suffix(unit, "ps")) return data_unit(unit);
      return std::nullopt;
    case Dimension::flops_per_s:
      if (remove_suffix(unit, "FLOP/s") || remove_suffix(unit, "FLOPS")) {
        return decimal_prefix(unit);
      }
      return std::nullopt;
    case Dimension::seconds:
      return time_unit(unit);
    case Dimension::hertz:
      return remove_suffix(unit, "Hz") ? decimal_prefix(unit) : std::nullopt;
    case Dimension::watts:
      return remove_suffix(unit, "W") ? decimal_prefix(unit) : std::nullopt;
    case Dimension::dollars:
      return unit == "USD" || unit == "$" ? std::optional<Unit>(Unit{}) : std::nullopt;
  }
  return std::nullopt;
}

struct DimensionWords {
  Dimension dimension;
  const char* measures;
  const char* units;
};
constexpr std::array<DimensionWords, 8> kDimensions = {{
    {Dimension::scalar, "a share", "%"},
    {Dimension::bytes, "bytes", "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB; Gb is bits"},
    {Dimension::bytes_per_s, "bytes per second",
     "B/s, MB/s, GB/s, TB/s, GiB/s; Gb/s and Gbps are bits"},
    {Dimension::flops_per_s, "FLOP per second", "FLOP/s, GFLOP/s, TFLOP/s, PFLOP/s"},
    {Dimension::seconds, "time", "ps, ns, us, ms, s, min, h, days"},
    {Dimension::hertz, "frequency", "Hz, kHz, MHz, GHz"},
    {Dimension::watts, "power", "W, kW, MW"},
    {Dimension::dollars, "money", "USD, $"},
}};

std::string_view trim(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

void explain_unit(std::string* why, std::string_view unit, Dimension dimension) {
  if (why == nullptr) return;
  for (const DimensionWords& d : kDimensions) {
    if (d.dimension != dimension && find_unit(unit, d.dimension)) {
      *why = fmt::format("'{}' measures {}", unit, d.measures);
      return;
    }
  }
  for (const DimensionWords& d : kDimensions) {
    if (d.dimension == dimension) *why = fmt::format("unknown unit '{}'; units: {}", unit, d.units);
  }
}

/// Three significant digits.
std::string three_digits(double value) {
  const double size = std::abs(value);
  return fmt::format("{:.{}f}", value, size < 9.995 ? 2 : size < 99.95 ? 1 : 0);
}

}  // namespace

std::optional<double> parse_quantity(std::string_view text, Dimension dimension, std::string* why) {
  text = trim(text);
  std::string_view unit;
  if (dimension == Dimension::dollars && !text.empty() && text.front() == '$') {
    text = trim(text.substr(1));
    unit = "$";
  }
  std::string reason = "no number at the start";
  const std::optional<Decimal> number = scan_decimal(text, &reason);
  if (!number) {
    explain(why, std::move(reason));
    return std::nullopt;
  }
  const std::string_view rest = trim(text.substr(number->length));
  if (unit.empty()) {
    unit = rest;
  } else if (!rest.empty()) {
    explain_unit(why, fmt::format("$ {}", rest), dimension);
    return std::nullopt;
  }
  const std::optional<Unit> factor = unit.empty() ? Unit{} : find_unit(unit, dimension);
  if (!factor) {
    explain_unit(why, unit, dimension);
    return std::nullopt;
  }
  // The power of ten joins the number's own exponent: "3.35 TB/s" is then exactly 3.35e12.
  std::optional<double> value = to_double(*number, factor->power, why);
  if (!value) return std::nullopt;
  *value *= factor->multiplier;
  if (!std::isfinite(*value)) {
    explain(why, "the number is too large");
    return std::nullopt;
  }
  return value;
}

std::optional<double> parse_number(std::string_view text, std::string* why) {
  const std::optional<Decimal> number = scan_decimal(text, why);
  if (!number || number->length != text.size()) return std::nullopt;
  return to_double(*number, 0, why);
}

std::optional<std::int64_t> parse_whole_number(std::string_view text, std::string* why) {
  std::optional<Decimal> number = scan_decimal(text, why);
  if (!number || number->length != text.size()) return std::nullopt;
  std::string& digits = number->digits;
  while (!digits.empty() && digits.back() == '0') {
    digits.pop_back();
    ++number->exponent;
  }
  if (digits.empty()) return 0;
  if (number->exponent < 0) return std::nullopt;
  if (static_cast<long>(digits.size()) + number->exponent <= 19) {
    digits.append(static_cast<std::size_t>(number->exponent), '0');
    if (number->negative) digits.insert(0, 1, '-');
    std::int64_t value = 0;
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (result.ec == std::errc()) return value;
  }
  explain(why, "the number is too large");
  return std::nullopt;
}

std::string format_bytes(double bytes) {
  const double size = std::abs(bytes);
  if (!(size >= 999.5)) return fmt::format("{:.0f} B", bytes);
  double scaled = bytes;
  std::size_t step = 0;
  static constexpr std::array<const char*, 7> kNames = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
  while (std::abs(scaled) >= 999.5 && step + 1 < kNames.size()) {
    scaled /= 1000;
    ++step;
  }
  return fmt::format("{} {}", three_digits(scaled), kNames[step]);
}

std::string format_seconds(double s) {
  const double size = std::abs(s);
  if (size == 0) return "0 s";
  if (size < 0.9995) {
    static constexpr std::array<const char*, 4> kNames = {"ms", "us", "ns", "ps"};
    double scaled = s * 1e3;
    std::size_t step = 0;
    while (std::abs(scaled) < 0.9995 && step + 1 < kNames.size()) {
      scaled *= 1e3;
      ++step;
    }
    return fmt::format("{} {}", three_digits(scaled), kNames[step]);
  }
  if (size < 120) return three_digits(s) + " s";
  if (size < 120 * 60) return three_digits(s / 60) + " min";
  if (size < 48 * 3600) return three_digits(s / 3600) + " h";
  return three_digits(s / 86400) + " days";
}

}  // namespace orrery
