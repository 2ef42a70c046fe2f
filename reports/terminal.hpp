#pragma once
// The summary of a step on a screen of 100 columns and 45 lines.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "reports/report.hpp"

namespace orrery {

struct TerminalOptions {
  bool colour = false;
  bool timing = false;  ///< how fast the simulator was
};

std::string to_terminal(const Report& report, const TerminalOptions& options = {});

/// "1.50 K", "14.8 T": three significant digits with a decimal prefix.
std::string format_count(double value);

/// What format_count writes, or a plain number: "14.8T", "2.8 M", "1e12".
std::optional<double> parse_count(std::string_view text);

/// A table for people: columns as wide as their widest cell, two spaces apart; `align` has a letter
/// per column, l or r. The first row is the heading.
std::string format_table(const std::vector<std::vector<std::string>>& rows, std::string_view align,
                         std::string_view indent = "");

/// At most `width` characters of ASCII text, the last two ".." if any were cut.
std::string shorten(std::string_view text, std::size_t width);

}  // namespace orrery
