#include "reports/attribution.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <set>

#include "sketch.hpp"

namespace orrery {
namespace {

using test::on;
using test::Sketch;

Picoseconds covered(const Attribution& a, CellKind kind) {
  return a.covered_ps[static_cast<std::size_t>(kind)];
}
Picoseconds exposed(const Attribution& a, CellKind kind) {
  return a.exposed_ps[static_cast<std::size_t>(kind)];
}

Attribution attribute_only_rank(Sketch& sketch) {
  const auto [program, timeline] = sketch.run();
  return attribute(program, timeline, cell_spans(program, timeline)).at(0);
}

TEST(Attribution, CommunicationBehindComputeIsExposed) {
  // compute     [0, 10)          [15, 20)
  // exchange           [10, 15)
  Sketch s(1);
  s.begin(CellKind::forward);
  const OpId a = s.op(10, {on(StreamKind::compute)});
  const OpId b = s.op(5, {on(StreamKind::expert_exchange)}, {a});
  s.op(5, {on(StreamKind::compute)}, {b});
  s.end();
  const Attribution a0 = attribute_only_rank(s);
  EXPECT_EQ(covered(a0, CellKind::forward), 15);
  EXPECT_EQ(exposed(a0, CellKind::forward), 5);
  EXPECT_EQ(a0.bubble_ps, 0);
}

TEST(Attribution, WeightGradientStreamHidesCommunication) {
  // weight_gradient [0, 4)
  // exchange        [0, 7)   exposed from 4
  Sketch s(1);
  s.begin(CellKind::weight);
  s.op(4, {on(StreamKind::weight_gradient)});
  s.op(7, {on(StreamKind::expert_exchange)});
  s.end();
  const Attribution a = attribute_only_rank(s);
  EXPECT_EQ(covered(a, CellKind::weight), 4);
  EXPECT_EQ(exposed(a, CellKind::weight), 3);
}

TEST(Attribution, TailUnderTheNextCellBelongsToTheFirstAndIsHidden) {
  // cell F: compute [0, 10), exchange [10, 16); cell B: compute [10, 30)
  Sketch s(1);
  s.begin(CellKind::forward);
  const OpId a = s.op(10, {on(StreamKind::compute)});
  s.op(6, {on(StreamKind::expert_exchange)}, {a});
  s.end();
  s.begin(CellKind::backward);
  s.op(20, {on(StreamKind::compute)});
  s.end();
  const Attribution a0 = attribute_only_rank(s);
  EXPECT_EQ(covered(a0, CellKind::forward), 16);
  EXPECT_EQ(covered(a0, CellKind::backward), 14);
  EXPECT_EQ(a0.exposed_sum_ps(), 0);
  EXPECT_EQ(a0.span_ps[static_cast<std::size_t>(CellKind::backward)], 20);
}

TEST(Attribution, WaitingForAnotherRankIsBubble) {
  // rank 0: F [0, 10), sends [10, 12); rank 1: F [12, 22). Rank 0 then waits until 22.
  Sketch s(2);
  s.begin(CellKind::forward);
  const OpId a = s.op(10, {on(StreamKind::compute, 0)});
  s.end();
  const OpId send =
      s.op(2, {on(StreamKind::send_next, 0), on(StreamKind::receive_previous, 1)}, {a});
  s.begin(CellKind::forward);
  s.op(10, {on(StreamKind::compute, 1)}, {send});
  s.end();
  const auto [program, timeline] = s.run();
  const auto ranks = attribute(program, timeline, cell_spans(program, timeline));
  EXPECT_EQ(ranks[0].bubble_ps, 12);
  EXPECT_EQ(ranks[1].bubble_ps, 12);
  EXPECT_EQ(covered(ranks[0], CellKind::forward), 10);
  EXPECT_EQ(covered(ranks[1], CellKind::forward), 10);
}

TEST(Attribution, OptimizerOwnsNothingUnderThePipelineAndItsWaitsAreBubble) {
  // cell B: compute [0, 10). cell optimizer: gradients [2, 14) under it and behind it; waits for
  // rank 1 until 20; compute [20, 23).
  Sketch s(2);
  s.begin(CellKind::backward);
  const OpId first = s.op(2, {on(StreamKind::compute, 0)});
  s.op(8, {on(StreamKind::compute, 0)});
  s.end();
  s.begin(CellKind::backward);
  const OpId slow = s.op(20, {on(StreamKind::compute, 1)});
  s.end();
  s.begin(CellKind::optimizer);
  const OpId gradients = s.op(12, {on(StreamKind::data, 0)}, {first});
  s.op(3, {on(StreamKind::compute, 0)}, {gradients, slow});
  s.end();
  const auto [program, timeline] = s.run();
  const Attribution a = attribute(program, timeline, cell_spans(program, timeline)).at(0);
  EXPECT_EQ(covered(a, CellKind::backward), 10);
  EXPECT_EQ(exposed(a, CellKind::optimizer), 4);
  EXPECT_EQ(covered(a, CellKind::optimizer), 3);
  EXPECT_EQ(a.bubble_ps, 6);
  EXPECT_EQ(a.sum_ps(), 23);
}

/// The rules of attribution.hpp applied to one instant [t, t+1) at a time, by looking at
/// everything.
Attribution attribute_by_instants(const Program& program, const Timeline& timeline, RankId rank) {
  Attribution result;
  const auto cells = program.cells();
  const auto on_rank = [&](OpId op, int first, int last) {
    for (const StreamId s : program.streams_of(op)) {
      const int kind = static_cast<int>(kind_of(s));
      if (rank_of(s) == rank && kind >= first && kind < last) return true;
    }
    return false;
  };
  const auto running = [&](Picoseconds t, int first, int last) {
    for (OpId op{}; op.value < program.size(); ++op) {
      if (timeline.start_ps[op] <= t && t < timeline.end_ps[op] && on_rank(op, first, last)) {
        return true;
      }
    }
    return false;
  };
  const auto span = [&](const Cell& cell) {
    std::pair<Picoseconds, Picoseconds> s{1 << 30, -1};
    for (OpId op = cell.first; op < cell.last; ++op) {
      if (timeline.start_ps[op] == timeline.end_ps[op]) continue;
      if (!on_rank(op, 0, kStreamsPerRank)) continue;
      s.first = std::min(s.first, timeline.start_ps[op]);
      s.second = std::max(s.second, timeline.end_ps[op]);
    }
    return s;
  };
  Picoseconds pipeline_end = 0;
  for (const Cell& cell : cells) {
    if (cell.kind != CellKind::optimizer) pipeline_end = std::max(pipeline_end, span(cell).second);
  }
  for (Picoseconds t = 0; t < timeline.makespan_ps(); ++t) {
    const Cell* owner = nullptr;
    for (const Cell& cell : cells) {
      const auto [start, end] = span(cell);
      if (t < start || t >= end) continue;
      if (cell.kind == CellKind::optimizer && t < pipeline_end) continue;
      if (owner == nullptr || start < span(*owner).first) owner = &cell;
    }
    if (owner == nullptr ||
        (owner->kind == CellKind::optimizer && !running(t, 0, kStreamsPerRank))) {
      ++result.bubble_ps;
    } else if (!running(t, 0, 2) && running(t, 2, kStreamsPerRank)) {
      ++result.exposed_ps[static_cast<std::size_t>(owner->kind)];
    } else {
      ++result.covered_ps[static_cast<std::size_t>(owner->kind)];
    }
  }
  return result;
}

RC_GTEST_PROP(AttributionProperty, EqualsTheRulesInstantByInstant, ()) {
  using rc::gen::inRange;
  const auto ranks = *inRange<std::size_t>(1, 4);
  Sketch s(ranks);
  std::vector<OpId> ops;
  const auto add_op = [&] {
    std::set<StreamId> streams;
    const int places = *inRange(1, 3);
    for (int i = 0; i < places; ++i) {
      streams.insert(on(static_cast<StreamKind>(*inRange(0, kStreamsPerRank)),
                        *inRange<std::size_t>(0, ranks)));
    }
    std::vector<OpId> predecessors;
    if (!ops.empty() && *inRange(0, 2) == 0) {
      predecessors.push_back(ops[*inRange<std::size_t>(0, ops.size())]);
    }
    ops.push_back(
        s.op(*inRange<Picoseconds>(0, 7), {streams.begin(), streams.end()}, predecessors));
  };
  const int cells = *inRange(0, 6);
  for (int c = 0; c < cells; ++c) {
    s.begin(static_cast<CellKind>(*inRange(0, kCellKinds)));
    for (int n = *inRange(0, 6); n > 0; --n) add_op();
    s.end();
    for (int n = *inRange(0, 3); n > 0; --n) add_op();
  }
  const auto [program, timeline] = s.run();
  const auto attributions = attribute(program, timeline, cell_spans(program, timeline));
  RC_ASSERT(attributions.size() == ranks);
  for (std::size_t r = 0; r < ranks; ++r) {
    const Attribution expected = attribute_by_instants(program, timeline, RankId(r));
    RC_ASSERT(attributions[r].covered_ps == expected.covered_ps);
    RC_ASSERT(attributions[r].exposed_ps == expected.exposed_ps);
    RC_ASSERT(attributions[r].bubble_ps == expected.bubble_ps);
    RC_ASSERT(attributions[r].sum_ps() == timeline.makespan_ps());
  }
}

}  // namespace
}  // namespace orrery
