// simulate() against sweep(), and against what a discrete-event engine must do in small cases.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "sim/timeline.hpp"
#include "tests/sim/random_program.hpp"

namespace orrery {
namespace {

using test::Sketch;

TEST(Engine, RunsZeroTimeChainsWithinAnInstant) {
  Sketch s(1);
  const StreamId compute = stream_of(RankId(0), StreamKind::compute);
  const StreamId data = stream_of(RankId(0), StreamKind::data);
  const OpId a = s.op(4, {compute}, {});
  const OpId mark1 = s.op(0, {}, {a});
  const OpId mark2 = s.op(0, {data}, {mark1});
  const OpId b = s.op(3, {compute, data}, {mark2});
  const Timeline t = simulate(std::move(s.builder).seal(), s.prices());
  EXPECT_EQ(t.start_ps[mark1], 4);
  EXPECT_EQ(t.end_ps[mark2], 4);
  EXPECT_EQ(t.start_ps[b], 4);
  EXPECT_EQ(t.makespan_ps(), 7);
  EXPECT_EQ(t.events, 4u);
}

TEST(Engine, AReadyOpDoesNotOvertakeTheHeadOfItsStream) {
  Sketch s(1);
  const StreamId compute = stream_of(RankId(0), StreamKind::compute);
  const StreamId data = stream_of(RankId(0), StreamKind::data);
  const OpId slow = s.op(9, {data}, {});
  const OpId head = s.op(1, {compute}, {slow});
  const OpId behind = s.op(1, {compute}, {});  // could run at 0, but streams are in order
  const Timeline t = simulate(std::move(s.builder).seal(), s.prices());
  EXPECT_EQ(t.start_ps[head], 9);
  EXPECT_EQ(t.start_ps[behind], 10);
}

RC_GTEST_PROP(Engine, EqualsTheSweepBitForBit, ()) {
  const test::RandomProgram random = test::random_program();
  Sketch s = test::build(random);
  const PriceList prices = s.prices();
  const Program program = std::move(s.builder).seal();
  const Timeline simulated = simulate(program, prices);
  const Timeline swept = sweep(program, prices);
  RC_ASSERT(simulated.start_ps == swept.start_ps);
  RC_ASSERT(simulated.end_ps == swept.end_ps);
  RC_ASSERT(simulated.fingerprint() == swept.fingerprint());
  RC_ASSERT(simulated.events == random.ops.size());
}

}  // namespace
}  // namespace orrery
