#pragma once
// Memory of each rank over time: a Program's memory effects placed on a Timeline.

#include <array>
#include <cstdint>
#include <vector>

#include "sim/ids.hpp"
#include "sim/program.hpp"
#include "sim/timeline.hpp"
#include "sim/units.hpp"

namespace orrery {

/// One change of a rank's memory.
struct MemoryStep {
  Picoseconds at_ps = 0;
  OpId op;
  MemoryKind kind{};
  std::int64_t bytes = 0;  ///< negative: release
};

/// The largest sum of one rank: the first moment it is reached, and the op whose effect reached it.
struct MemoryPeak {
  std::int64_t bytes = 0;
  Picoseconds at_ps = 0;
  OpId op;                                                 ///< meaningless if bytes is 0
  std::array<std::int64_t, kMemoryKinds> bytes_by_kind{};  ///< at that moment; sums up to `bytes`
};

struct MemoryTimeline {
  /// The changes of each rank in their order: by time, at one instant releases before allocations,
  /// then by op, then in the Program's order.
  IdVector<RankId, std::vector<MemoryStep>> steps;
  IdVector<RankId, MemoryPeak> peaks;
};

/// Effects at one instant are taken as simultaneous, releases first: what ends makes room for what
/// starts. Checks that no kind holds less than nothing once an instant is over.
MemoryTimeline trace_memory(const Program& program, const Timeline& timeline);

}  // namespace orrery
