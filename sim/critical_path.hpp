#pragma once
// The critical path: the chain of ops that makes the step as long as it is.

#include <array>
#include <vector>

#include "sim/program.hpp"
#include "sim/timeline.hpp"
#include "sim/units.hpp"

namespace orrery {

struct CriticalPath {
  std::vector<OpId> ops;  ///< in the order of time; empty for an empty Program
  std::array<Picoseconds, kPhases> time_by_phase_ps{};
  std::array<Picoseconds, kOpKinds> time_by_kind_ps{};
  /// Before the first op and between an op and the next: 0 in a simulated timeline, where every op
  /// starts when the last thing it waits for ends. In a measured one, launch gaps; negative where
  /// clocks let an op start before what it waits for has ended.
  Picoseconds gaps_ps = 0;
};

/// Walks back from the op that ends last, always to the predecessor (explicit, or the op before it
/// on one of its streams) that ends last; ties go to the smallest id. The times of the ops and
/// gaps_ps add up to the makespan.
CriticalPath find_critical_path(const Program& program, const Timeline& timeline);

}  // namespace orrery
