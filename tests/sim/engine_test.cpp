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

/// Computation on rank 0 beside transfers that take shares of its GPU; every op has its own shape.
struct Beside {
  OpId computes(Picoseconds ps, double memory_bound) {
    const OpId op = s.op(ps, {stream_of(RankId(0), StreamKind::compute)}, {});
    shares.push_back({.memory_bound = memory_bound});
    return op;
  }
  OpId communicates(Picoseconds ps, double memory, double sms, StreamKind stream,
                    const std::vector<OpId>& after = {}) {
    const OpId op =
        s.op(ps, {stream_of(RankId(0), stream)}, after, Phase::gradient_sync, OpKind::collective);
    shares.push_back({.memory_taken = memory, .sms_taken = sms});
    return op;
  }
  Timeline run() {
    const PriceList prices = s.prices();
    return simulate(std::move(s.builder).seal(), prices, {nullptr, &shares});
  }
  Sketch s{1};
  IdVector<ShapeId, GpuShare> shares;
};

TEST(Engine, CommunicationSlowsMemoryBoundComputationWhileItLasts) {
  Beside b;
  const OpId streaming = b.computes(100'000, 1);
  const OpId wait = b.communicates(50'000, 0, 0, StreamKind::data);
  b.communicates(20'000, 0.2, 0, StreamKind::data, {wait});
  const Timeline t = b.run();
  // 50 ns at full speed, 20 ns at 0.8 of it, and the 34 ns that are left.
  EXPECT_EQ(t.end_ps[streaming], 104'000);
}

TEST(Engine, SlowingAddsUpAndEndsWithTheComputation) {
  Beside b;
  const OpId streaming = b.computes(60'000, 1);
  b.communicates(500'000, 0.2, 0, StreamKind::data);
  b.communicates(500'000, 0.2, 0, StreamKind::expert_exchange);
  EXPECT_EQ(b.run().end_ps[streaming], 100'000);  // 0.6 of its speed
}

TEST(Engine, ComputationThatNeedsNoMemoryLosesTheSmsOnly) {
  Beside b;
  const OpId gemm = b.computes(75'000, 0);
  b.communicates(500'000, 0.5, 0.25, StreamKind::data);
  EXPECT_EQ(b.run().end_ps[gemm], 100'000);
}

RC_GTEST_PROP(Engine, EqualsTheSweepWhereNothingIsTaken, ()) {
  const test::RandomProgram random = test::random_program();
  Sketch s = test::build(random);
  const PriceList prices = s.prices();
  const Program program = std::move(s.builder).seal();
  const IdVector<ShapeId, GpuShare> shares(program.shapes().size(), GpuShare{.memory_bound = 1});
  RC_ASSERT(simulate(program, prices, {nullptr, &shares}).fingerprint() ==
            sweep(program, prices).fingerprint());
}

}  // namespace
}  // namespace orrery
