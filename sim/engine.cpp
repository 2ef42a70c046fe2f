#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <queue>
#include <vector>

#include "sim/check.hpp"
#include "sim/timeline.hpp"

namespace orrery {

namespace {

constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint32_t kEnded = std::numeric_limits<std::uint32_t>::max();

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
  Flows(const Program& program, const Traffic* traffic, const Durations& duration_ps)
      : program_(program),
        traffic_(traffic),
        network_(traffic == nullptr ? IdVector<LinkId, Link>{}
                                    : IdVector<LinkId, Link>(traffic->links.size(), Link{1, 0})) {
    if (traffic == nullptr) return;
    flows_.resize(traffic->patterns());
    std::vector<char> known(flows_.size(), 0);
    for (const auto& [op, pattern] : traffic->ops) {
      if (known[pattern.value] != 0 || traffic->by_member.count(pattern) != 0) continue;
      known[pattern.value] = 1;
      flows_[pattern] = traffic->flow_of(pattern, duration_ps[op]);
    }
  }

  /// Whether the network will say when this op ends.
  bool start(Picoseconds now, OpId op, Picoseconds price_ps) {
    if (traffic_ == nullptr || program_.kind(op) == OpKind::compute) return false;
    const PatternId pattern = traffic_->pattern_of(op);
    if (pattern == kNoPattern) return false;
    const auto member_loads = program_.member_loads(op);
    if (!member_loads.empty()) of_op_ = traffic_->flow_of(pattern, price_ps, member_loads);
    const Traffic::Flow& flow = member_loads.empty() ? flows_[pattern] : of_op_;
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
  IdVector<PatternId, Traffic::Flow> flows_;  // of ops without member loads
  Traffic::Flow of_op_;
  IdVector<FlowId, OpId> op_of_;
};

/// Computation on each rank, and what communication takes from it at the moment. Sums are kept in
/// integers, so that what is taken and given back cancels.
class Computing {
 public:
  Computing(const Program& program, const IdVector<ShapeId, GpuShare>* shares)
      : program_(program), shares_(shares) {
    if (shares != nullptr) ranks_.resize(program.ranks());
  }

  /// Communication of this shape starts or ends on the ranks of the op's streams. `reschedule(op,
  /// end)` is called for computation whose end moves.
  template <class Reschedule>
  void change(Picoseconds now, OpId op, bool starts, Reschedule reschedule) {
    if (shares_ == nullptr) return;
    const GpuShare& share = (*shares_)[program_.shape(op)];
    const std::int64_t sign = starts ? 1 : -1;
    const std::int64_t memory = sign * std::llround(share.memory_taken / kUnit);
    const std::int64_t sms = sign * std::llround(share.sms_taken / kUnit);
    if (memory == 0 && sms == 0) return;
    for (const StreamId stream : program_.streams_of(op)) {
      Rank& rank = ranks_[rank_of(stream)];
      rank.memory_taken += memory;
      rank.sms_taken += sms;
      for (Running& running : rank.running) {
        if (!running.on) continue;
        const double speed = speed_of(rank, running.op);
        if (speed == running.speed) continue;
        const double left = static_cast<double>(running.end_ps - now) * running.speed / speed;
        running.end_ps = now + static_cast<Picoseconds>(std::llround(left));
        running.speed = speed;
        reschedule(running.op, running.end_ps);
      }
    }
  }

  /// When computation that starts now will end, as things are.
  Picoseconds start(Picoseconds now, OpId op, Picoseconds price_ps) {
    if (shares_ == nullptr) return now + price_ps;
    Running* running = place_of(op);
    if (running == nullptr) return now + price_ps;
    running->on = true;
    running->op = op;
    running->speed = speed_of(ranks_[rank_of(program_.streams_of(op).front())], op);
    running->end_ps = now + static_cast<Picoseconds>(
                                std::llround(static_cast<double>(price_ps) / running->speed));
    return running->end_ps;
  }

  void end(OpId op) {
    if (shares_ == nullptr) return;
    if (Running* running = place_of(op)) running->on = false;
  }

 private:
  static constexpr double kUnit = 0x1p-40;
  static constexpr double kMostTaken = 0.75;  // communication starves nobody

  struct Running {
    bool on = false;
    OpId op;
    double speed = 1;
    Picoseconds end_ps = 0;
  };
  struct Rank {
    std::int64_t memory_taken = 0;  // in kUnit
    std::int64_t sms_taken = 0;
    std::array<Running, 2> running;  // on the compute stream and that of weight gradients
  };

  /// Null for what runs on a communication stream: it shares that stream's SMs.
  Running* place_of(OpId op) {
    const auto streams = program_.streams_of(op);
    if (streams.empty()) return nullptr;
    const StreamKind kind = kind_of(streams.front());
    if (kind != StreamKind::compute && kind != StreamKind::weight_gradient) return nullptr;
    return &ranks_[rank_of(streams.front())].running[kind == StreamKind::compute ? 0 : 1];
  }

  double speed_of(const Rank& rank, OpId op) const {
    const auto taken = [](std::int64_t units) {
      return std::min(kMostTaken, static_cast<double>(units) * kUnit);
    };
    return (*shares_)[program_.shape(op)].speed_beside(taken(rank.memory_taken),
                                                       taken(rank.sms_taken));
  }

  const Program& program_;
  const IdVector<ShapeId, GpuShare>* shares_;
  IdVector<RankId, Rank> ranks_;
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

Timeline simulate(const Program& program, const PriceList& prices, const Contention& contention) {
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

  Picoseconds now = 0;
  Flows flows(program, contention.traffic, duration_ps);
  Computing computing(program, contention.shares);
  std::priority_queue<End, std::vector<End>, Later> ends;
  const auto end_at = [&](OpId op, Picoseconds end_ps) {
    timeline.end_ps[op] = end_ps;
    ends.push({end_ps, op});
  };
  // An end that was rescheduled stays in the queue. waits_for of what has ended is kEnded.
  const auto stale = [&](const End& end) {
    return timeline.end_ps[end.op] != end.time_ps || waits_for[end.op] == kEnded;
  };
  std::vector<OpId> ended;
  while (true) {
    // All that became ready at this instant starts, in the order of ids.
    std::sort(ready.begin(), ready.end());
    for (const OpId op : ready) {
      timeline.start_ps[op] = now;
      const Picoseconds price_ps = duration_ps[op];
      if (program.kind(op) == OpKind::compute) {
        end_at(op, computing.start(now, op, price_ps));
        continue;
      }
      computing.change(now, op, true, end_at);
      if (!flows.start(now, op, price_ps)) end_at(op, now + price_ps);
    }
    ready.clear();

    while (!ends.empty() && stale(ends.top())) ends.pop();
    const std::optional<Picoseconds> next_flow = flows.next_ps();
    if (ends.empty() && !next_flow) break;
    now = ends.empty() ? *next_flow : ends.top().time_ps;
    if (next_flow) now = std::min(now, *next_flow);
    ended.clear();
    if (next_flow && *next_flow == now) flows.advance(now, ended);
    for (; !ends.empty() && ends.top().time_ps == now; ends.pop()) {
      if (stale(ends.top())) continue;
      waits_for[ends.top().op] = kEnded;
      ended.push_back(ends.top().op);
    }
    for (const OpId op : ended) {
      ++timeline.events;
      timeline.end_ps[op] = now;
      if (program.kind(op) == OpKind::compute) {
        computing.end(op);
      } else {
        computing.change(now, op, false, end_at);
      }
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
