#include <algorithm>
#include <vector>

#include "sim/timeline.hpp"

namespace orrery {

Timeline sweep(const Program& program, const PriceList& prices) {
  const Durations duration_ps(program, prices);
  const std::size_t n = program.size();
  Timeline timeline;
  timeline.start_ps.resize(n);
  timeline.end_ps.resize(n);
  timeline.events = n;
  IdVector<StreamId, Picoseconds> free_ps(program.streams(), 0);
  for (OpId op; op.value < n; ++op) {
    Picoseconds start = 0;
    for (const OpId predecessor : program.predecessors_of(op)) {
      start = std::max(start, timeline.end_ps[predecessor]);
    }
    const auto streams = program.streams_of(op);
    for (const StreamId stream : streams) start = std::max(start, free_ps[stream]);
    const Picoseconds end = start + duration_ps[op];
    for (const StreamId stream : streams) free_ps[stream] = end;
    timeline.start_ps[op] = start;
    timeline.end_ps[op] = end;
  }
  return timeline;
}

}  // namespace orrery
