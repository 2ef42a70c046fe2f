#include <algorithm>
#include <limits>
#include <optional>
#include <queue>
#include <vector>

#include "sim/check.hpp"
#include "sim/timeline.hpp"

namespace orrery {

namespace {

constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

struct End {
  Picoseconds time_ps = 0;
  OpId op;
};

struct Later {
  bool operator()(const End& a, const End& b) const {
    if (a.time_ps != b.time_ps) return a.time_ps > b.time_ps;
    return a.op > b.op;
  }
};

/// The ops that end when their flow does.
class Flows {
 public:
  Flows(const Program& program, const Traffic* traffic,
        const IdVector<ShapeId, Picoseconds>& duration_ps)
      : program_(program),
        traffic_(traffic),
        network_(traffic == nullptr ? IdVector<LinkId, Link>{}
                                    : IdVector<LinkId, Link>(traffic->links.size(), Link{1, 0})) {
    if (traffic == nullptr) return;
    flows_.resize(traffic->patterns());
    std::vector<char> known(flows_.size(), 0);
    for (const auto& [op, pattern] : traffic->ops) {
      if (known[pattern.value] != 0) continue;
      known[pattern.value] = 1;
      flows_[pattern] = traffic->flow_of(pattern, duration_ps[program.shape(op)]);
    }
  }

  /// Whether the network will say when this op ends.
  bool start(Picoseconds now, OpId op, Picoseconds price_ps) {
    if (traffic_ == nullptr || program_.kind(op) == OpKind::compute) return false;
    const PatternId pattern = traffic_->pattern_of(op);
    if (pattern == kNoPattern) return false;
    const Traffic::Flow& flow = flows_[pattern];
    if (flow.limit == 0) return false;
    network_.start(now, flow.hops, flow.limit * seconds(price_ps), flow.limit,
                   traffic_->weights[pattern]);
    op_of_.push_back(op);
    return true;
  }

  std::optional<Picoseconds> next_ps() { return network_.next_event_ps(); }
  /// Appends the ops whose flows end up to `now`.
  void advance(Picoseconds now, std::vector<OpId>& ended) {
    for (const Completion& c : network_.advance_to(now)) ended.push_back(op_of_[c.flow]);
  }

  IdVector<LinkId, double> held_back_s() const {
    IdVector<LinkId, double> held;
    if (traffic_ == nullptr) return held;
    for (LinkId link; link.value < traffic_->links.size(); ++link) {
      held.push_back(network_.held_back_s(link));
    }
    return held;
  }

 private:
  const Program& program_;
  const Traffic* traffic_;
  FlowNetwork network_;
  IdVector<PatternId, Traffic::Flow> flows_;
  IdVector<FlowId, OpId> op_of_;
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

Timeline simulate(const Program& program, const PriceList& prices, const Traffic* traffic) {
  const IdVector<ShapeId, Picoseconds> duration_ps = durations(program, prices);
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

  Picoseconds now = 0;
  Flows flows(program, traffic, duration_ps);
  std::priority_queue<End, std::vector<End>, Later> ends;
  std::vector<OpId> ended;
  while (true) {
    // All that became ready at this instant starts, in the order of ids.
    std::sort(ready.begin(), ready.end());
    for (const OpId op : ready) {
      timeline.start_ps[op] = now;
      const Picoseconds price_ps = duration_ps[program.shape(op)];
      if (!flows.start(now, op, price_ps)) ends.push({now + price_ps, op});
    }
    ready.clear();

    const std::optional<Picoseconds> next_flow = flows.next_ps();
    if (ends.empty() && !next_flow) break;
    now = ends.empty() ? *next_flow : ends.top().time_ps;
    if (next_flow) now = std::min(now, *next_flow);
    ended.clear();
    if (next_flow && *next_flow == now) flows.advance(now, ended);
    for (; !ends.empty() && ends.top().time_ps == now; ends.pop()) ended.push_back(ends.top().op);
    for (const OpId op : ended) {
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
  timeline.held_back_s = flows.held_back_s();
  ORRERY_CHECK(timeline.events == n, "{} of {} ops ran", timeline.events, n);
  return timeline;
}

}  // namespace orrery
