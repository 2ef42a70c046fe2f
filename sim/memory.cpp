#include "sim/memory.hpp"

#include <algorithm>
#include <tuple>

#include "sim/check.hpp"

namespace orrery {

namespace {

MemoryPeak find_peak(RankId rank, const std::vector<MemoryStep>& steps) {
  MemoryPeak peak;
  std::array<std::int64_t, kMemoryKinds> held{};
  std::int64_t total = 0;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const MemoryStep& step = steps[i];
    held[static_cast<std::size_t>(step.kind)] += step.bytes;
    total += step.bytes;
    if (total > peak.bytes) peak = {total, step.at_ps, step.op, held};
    if (i + 1 < steps.size() && steps[i + 1].at_ps == step.at_ps) continue;
    for (std::size_t kind = 0; kind < held.size(); ++kind) {
      ORRERY_CHECK(held[kind] >= 0, "rank {} holds {} bytes of {} at {} ps", rank.value, held[kind],
                   name_of(static_cast<MemoryKind>(kind)), step.at_ps);
    }
  }
  return peak;
}

}  // namespace

MemoryTimeline trace_memory(const Program& program, const Timeline& timeline) {
  MemoryTimeline memory;
  memory.steps.resize(program.ranks());
  memory.peaks.resize(program.ranks());
  for (const MemoryEffect& e : program.memory_effects()) {
    const Picoseconds at = e.at_end ? timeline.end_ps[e.op] : timeline.start_ps[e.op];
    memory.steps[e.rank].push_back({at, e.op, e.kind, e.bytes});
  }
  const auto order = [](const MemoryStep& step) {
    return std::make_tuple(step.at_ps, step.bytes >= 0, step.op);
  };
  for (RankId rank; rank.value < program.ranks(); ++rank) {
    std::vector<MemoryStep>& steps = memory.steps[rank];
    std::stable_sort(steps.begin(), steps.end(),
                     [&](const MemoryStep& a, const MemoryStep& b) { return order(a) < order(b); });
    memory.peaks[rank] = find_peak(rank, steps);
  }
  return memory;
}

}  // namespace orrery
