#pragma once
// A Report as JSON. Once published the keys keep their names; others may be added.

#include <string>
#include <string_view>

#include "reports/report.hpp"

namespace orrery {

inline constexpr int kReportSchemaVersion = 1;

struct JsonOptions {
  bool timing = false;  ///< engine.wall_s, the only value that differs between runs
};

/// One document, two spaces of indentation, a final newline; equal reports give equal bytes.
std::string to_json(const Report& report, const JsonOptions& options = {});

/// The enumerator's name, as JSON keys and validate's quantities spell it: "attn_forward".
std::string_view key_of(Phase phase);

}  // namespace orrery
