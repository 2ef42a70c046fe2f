// sweep() against times worked out by hand, and against a longest path over an explicit edge list.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "sim/timeline.hpp"
#include "tests/sim/random_program.hpp"

namespace orrery {
namespace {

using test::Sketch;

constexpr RankId kRank0{0};
constexpr RankId kRank1{1};

TEST(Sweep, StreamOrderAndPredecessorsDelayAnOp) {
  Sketch s(2);
  const StreamId compute0 = stream_of(kRank0, StreamKind::compute);
  const StreamId compute1 = stream_of(kRank1, StreamKind::compute);
  const StreamId data0 = stream_of(kRank0, StreamKind::data);
  const OpId a = s.op(10, {compute0}, {});
  const OpId b = s.op(7, {compute0}, {});      // behind a: 10..17
  const OpId c = s.op(5, {data0}, {a});        // 10..15, beside b
  const OpId d = s.op(1, {compute1}, {b, c});  // 17..18
  const Timeline t = sweep(std::move(s.builder).seal(), s.prices());
  EXPECT_EQ(t.start_ps[a], 0);
  EXPECT_EQ(t.start_ps[b], 10);
  EXPECT_EQ(t.start_ps[c], 10);
  EXPECT_EQ(t.start_ps[d], 17);
  EXPECT_EQ(t.end_ps[d], 18);
  EXPECT_EQ(t.makespan_ps(), 18);
  EXPECT_EQ(t.events, 4u);
}

TEST(Sweep, CollectiveWaitsForItsLastMemberAndHoldsAll) {
  Sketch s(2);
  const StreamId c0 = stream_of(kRank0, StreamKind::tensor);
  const StreamId c1 = stream_of(kRank1, StreamKind::tensor);
  s.op(3, {c0}, {});
  s.op(20, {c1}, {});
  const OpId gather = s.op(4, {c0, c1}, {});
  const OpId after = s.op(1, {c0}, {});
  const Timeline t = sweep(std::move(s.builder).seal(), s.prices());
  EXPECT_EQ(t.start_ps[gather], 20);
  EXPECT_EQ(t.start_ps[after], 24);
}

// Computation takes its rank's factor times the price, all else the price.
TEST(Sweep, SlowRanksComputeSlower) {
  Sketch s(2);
  const StreamId c0 = stream_of(kRank0, StreamKind::compute);
  const StreamId c1 = stream_of(kRank1, StreamKind::compute);
  const OpId a = s.op(100, {c0}, {});
  const OpId b = s.op(100, {c1}, {});
  const OpId send = s.op(10, {c0, c1}, {a, b}, Phase::pipeline_forward, OpKind::transfer);
  const OpId last = s.op(3, {c1}, {send});
  s.builder.set_slowdown({1, 1.5});
  const Program program = std::move(s.builder).seal();
  const Timeline t = sweep(program, s.prices());
  EXPECT_EQ(t.end_ps[a], 100);
  EXPECT_EQ(t.end_ps[b], 150);
  EXPECT_EQ(t.end_ps[send], 160);
  EXPECT_EQ(t.end_ps[last], 165);  // 4.5 rounds to 5
  EXPECT_EQ(simulate(program, s.prices()).fingerprint(), t.fingerprint());
}

TEST(Sweep, EmptyProgramTakesNoTime) {
  Sketch s(1);
  const Timeline t = sweep(std::move(s.builder).seal(), s.prices());
  EXPECT_EQ(t.makespan_ps(), 0);
  EXPECT_EQ(t.events, 0u);
}

TEST(Sweep, RefusesPricesOfAnotherProgram) {
  Sketch s(1);
  s.op(1, {}, {});
  const Program program = std::move(s.builder).seal();
  EXPECT_DEATH(sweep(program, PriceList{}), "0 prices for 1 shapes");
  s.durations_ps[0] = -1;
  EXPECT_DEATH(sweep(program, s.prices()), "shape 0 takes -1 ps");
}

TEST(Fingerprint, TellsTimelinesApart) {
  Timeline t;
  t.start_ps = {0, 5};
  t.end_ps = {5, 9};
  Timeline later = t;
  later.end_ps[OpId(1)] = 10;
  Timeline swapped;
  swapped.start_ps = {5, 0};
  swapped.end_ps = {9, 5};
  EXPECT_NE(t.fingerprint(), later.fingerprint());
  EXPECT_NE(t.fingerprint(), swapped.fingerprint());
  // Published numbers: a change of the hash is a change of every fingerprint ever printed. FNV-1a's
  // offset basis, which an empty timeline leaves as it is:
  EXPECT_EQ(Timeline{}.fingerprint(), 0xcbf29ce484222325U);
}

RC_GTEST_PROP(Sweep, EqualsLongestPathOverAnExplicitEdgeList, ()) {
  const test::RandomProgram random = test::random_program();
  Sketch s = test::build(random);
  const PriceList prices = s.prices();
  const Program program = std::move(s.builder).seal();
  const auto spans = test::spans(random, program, sweep(program, prices));
  const std::vector<Picoseconds> expected = test::longest_path_starts(random);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    RC_ASSERT(spans[i].first == expected[i]);
    RC_ASSERT(spans[i].second == expected[i] + random.ops[i].duration_ps);
  }
}

}  // namespace
}  // namespace orrery
