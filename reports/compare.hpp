#pragma once
// Reports side by side, and which operations explain the difference.

#include <map>
#include <span>
#include <string>

#include "reports/report.hpp"

namespace orrery {

/// The first report is what the others are compared with. `names` are column headings, one a
/// report.
std::string compare(std::span<const Report> reports, std::span<const std::string> names);

/// Op seconds of a GPU and step as they ran, overlapped or not, by label of the op.
std::map<std::string, double> op_seconds_by_label(const Report& report);

/// {"schema_version", "reports": [as `run --json`]}
std::string compare_json(std::span<const Report> reports);

}  // namespace orrery
