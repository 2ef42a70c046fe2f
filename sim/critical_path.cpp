#include "sim/critical_path.hpp"

#include <algorithm>
#include <limits>

namespace orrery {

namespace {

constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

/// For every op the predecessor that ends last (smallest id if several do), or kNone.
IdVector<OpId, std::uint32_t> last_awaited(const Program& program, const Timeline& timeline) {
  IdVector<OpId, std::uint32_t> awaited(program.size(), kNone);
  IdVector<StreamId, std::uint32_t> before(program.streams(), kNone);
  for (OpId op; op.value < program.size(); ++op) {
    std::uint32_t& best = awaited[op];
    const auto consider = [&](std::uint32_t candidate) {
      if (candidate == kNone) return;
      if (best == kNone) {
        best = candidate;
        return;
      }
      const Picoseconds end = timeline.end_ps[OpId(candidate)];
      const Picoseconds best_end = timeline.end_ps[OpId(best)];
      if (end > best_end || (end == best_end && candidate < best)) best = candidate;
    };
    for (const OpId predecessor : program.predecessors_of(op)) consider(predecessor.value);
    for (const StreamId stream : program.streams_of(op)) {
      consider(before[stream]);
      before[stream] = op.value;
    }
  }
  return awaited;
}

}  // namespace

CriticalPath find_critical_path(const Program& program, const Timeline& timeline) {
  CriticalPath path;
  if (program.size() == 0) return path;
  const IdVector<OpId, std::uint32_t> awaited = last_awaited(program, timeline);
  const auto last = std::max_element(timeline.end_ps.begin(), timeline.end_ps.end());
  auto at = static_cast<std::uint32_t>(last - timeline.end_ps.begin());
  while (at != kNone) {
    const OpId op(at);
    path.ops.push_back(op);
    const Picoseconds start = timeline.start_ps[op];
    const Picoseconds time = timeline.end_ps[op] - start;
    path.time_by_phase_ps[static_cast<std::size_t>(program.tag(op).phase)] += time;
    path.time_by_kind_ps[static_cast<std::size_t>(program.kind(op))] += time;
    at = awaited[op];
    path.gaps_ps += start - (at == kNone ? 0 : timeline.end_ps[OpId(at)]);
  }
  std::reverse(path.ops.begin(), path.ops.end());
  return path;
}

}  // namespace orrery
