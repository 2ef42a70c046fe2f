#pragma once
// A step that ran, out of the trace that `orrery run --execute ... --trace` wrote of it.

#include <string>

#include "sim/config.hpp"
#include "sim/program.hpp"
#include "sim/timeline.hpp"

namespace orrery {

/// The ops of `program` that the trace (Chrome JSON, gzip or not) has, with their times; the others
/// take none, at 0. What is no such trace, or one of another Program (another op of that number),
/// is a problem, and the result then to be thrown away.
Timeline read_measured_timeline(const std::string& path, const Program& program,
                                Problems& problems);

}  // namespace orrery
