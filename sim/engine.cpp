#include <algorithm>
#include <limits>
#include <queue>
#include <vector>

#include "sim/check.hpp"
#include "sim/timeline.hpp"

namespace orrery {

namespace {

constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

/// What happens at one instant happens in this order: an end frees what a start takes.
enum class EventPhase : std::uint32_t { end };

struct Event {
  Picoseconds time_ps = 0;
  EventPhase phase{};
  OpId op;
};

struct Later {
  bool operator()(const Event& a, const Event& b) const {
    if (a.time_ps != b.time_ps) return a.time_ps > b.time_ps;
    if (a.phase != b.phase) return a.phase > b.phase;
    return a.op > b.op;
  }
};

/// Who is told when an op ends: explicit successors as CSR rows, and per place of an op on a stream
/// the op behind it (kNone: it is the last one).
struct Waiters {
  std::vector<std::uint32_t> successor_begin;  // size() + 1
  std::vector<OpId> successors;
  std::vector<std::uint32_t> behind;  // as many as stream places, in the order of the ops
};

Waiters find_waiters(const Program& program) {
  const std::size_t n = program.size();
  Waiters waiters;
  std::vector<std::uint32_t>& begin = waiters.successor_begin;
  begin.assign(n + 1, 0);
  for (OpId op; op.value < n; ++op) {
    for (const OpId predecessor : program.predecessors_of(op)) ++begin[predecessor.value];
  }
  std::uint32_t total = 0;
  for (std::uint32_t& b : begin)
    b = (total += b);  // ends of rows, stepped down to their begins below
  waiters.successors.resize(total);
  for (std::size_t i = n; i-- > 0;) {
    for (const OpId predecessor : program.predecessors_of(OpId(i))) {
      waiters.successors[--begin[predecessor.value]] = OpId(i);
    }
  }

  IdVector<StreamId, std::uint32_t> last(program.streams(),
                                         kNone);  // place of the stream's last op
  for (OpId op; op.value < n; ++op) {
    for (const StreamId stream : program.streams_of(op)) {
      if (last[stream] != kNone) waiters.behind[last[stream]] = op.value;
      last[stream] = static_cast<std::uint32_t>(waiters.behind.size());
      waiters.behind.push_back(kNone);
    }
  }
  return waiters;
}

}  // namespace

Timeline simulate(const Program& program, const PriceList& prices) {
  const Durations duration_ps(program, prices);
  const Waiters waiters = find_waiters(program);
  const std::size_t n = program.size();
  Timeline timeline;
  timeline.start_ps.resize(n);
  timeline.end_ps.resize(n);
  if (n == 0) return timeline;

  // An op starts when its explicit predecessors have ended and it is at the head of all its
  // streams.
  std::vector<OpId> ready;
  IdVector<OpId, std::uint32_t> waits_for(n);
  {
    IdVector<StreamId, char> taken(program.streams(), 0);
    for (OpId op; op.value < n; ++op) {
      std::size_t waits = program.predecessors_of(op).size();
      for (const StreamId stream : program.streams_of(op)) {
        waits += taken[stream];
        taken[stream] = 1;
      }
      waits_for[op] = static_cast<std::uint32_t>(waits);
      if (waits == 0) ready.push_back(op);
    }
  }
  const StreamId* first_place = program.streams_of(OpId(0)).data();
  const auto arrive = [&](OpId op) {
    if (--waits_for[op] == 0) ready.push_back(op);
  };

  std::priority_queue<Event, std::vector<Event>, Later> events;
  Picoseconds now = 0;
  while (true) {
    // All that became ready at this instant starts, in the order of ids.
    std::sort(ready.begin(), ready.end());
    for (const OpId op : ready) {
      timeline.start_ps[op] = now;
      events.push({now + duration_ps[op], EventPhase::end, op});
    }
    ready.clear();
    if (events.empty()) break;

    now = events.top().time_ps;
    while (!events.empty() && events.top().time_ps == now) {
      const OpId op = events.top().op;
      events.pop();
      ++timeline.events;
      timeline.end_ps[op] = now;
      for (std::uint32_t e = waiters.successor_begin[op.value];
           e < waiters.successor_begin[op.value + 1]; ++e) {
        arrive(waiters.successors[e]);
      }
      const auto streams = program.streams_of(op);
      const std::uint32_t* behind = waiters.behind.data() + (streams.data() - first_place);
      for (std::size_t k = 0; k < streams.size(); ++k) {
        if (behind[k] != kNone) arrive(OpId(behind[k]));
      }
    }
  }
  ORRERY_CHECK(timeline.events == n, "{} of {} ops ran", timeline.events, n);
  return timeline;
}

}  // namespace orrery
