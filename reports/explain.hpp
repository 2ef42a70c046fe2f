#pragma once
// Everything that stands behind a report: the resolved scenario, counts, layout, Program, prices.

#include <string>

#include "reports/study.hpp"

namespace orrery {

/// Reads as a scenario file: the resolved scenario, and the explanations as comments after it.
std::string explain(const Study& study);

}  // namespace orrery
