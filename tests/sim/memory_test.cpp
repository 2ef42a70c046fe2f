// trace_memory() against sums worked out by hand, and against a recount at every instant.

#include "sim/memory.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "tests/sim/random_program.hpp"

namespace orrery {
namespace {

using test::Sketch;

constexpr RankId kRank0{0};
constexpr RankId kRank1{1};
constexpr auto kActivations = static_cast<std::size_t>(MemoryKind::activations);
constexpr auto kParameters = static_cast<std::size_t>(MemoryKind::parameters);
constexpr auto kWorkspace = static_cast<std::size_t>(MemoryKind::workspace);

TEST(Memory, PeakOfTwoForwardsAndTwoBackwards) {
  Sketch s(2);
  const StreamId compute = stream_of(kRank0, StreamKind::compute);
  const OpId f0 = s.op(10, {compute}, {});
  const OpId f1 = s.op(10, {compute}, {});
  const OpId b0 = s.op(20, {compute}, {});
  const OpId b1 = s.op(20, {compute}, {});
  const OpId other = s.op(5, {stream_of(kRank1, StreamKind::compute)}, {});
  s.builder.memory({f0, kRank0, MemoryKind::parameters, false, 100});
  for (const OpId f : {f0, f1}) s.builder.memory({f, kRank0, MemoryKind::activations, false, 30});
  for (const OpId b : {b0, b1}) {
    s.builder.memory({b, kRank0, MemoryKind::workspace, false, 8});
    s.builder.memory({b, kRank0, MemoryKind::workspace, true, -8});
    s.builder.memory({b, kRank0, MemoryKind::activations, true, -30});
  }
  s.builder.memory({other, kRank1, MemoryKind::workspace, false, 7});
  const Program program = std::move(s.builder).seal();
  const MemoryTimeline memory = trace_memory(program, sweep(program, s.prices()));

  // 0: 130; 10: 160; 20: 168 (b0 runs on both activations); 40: 168 - 38 + 8 = 138; 60: 100.
  const MemoryPeak& peak = memory.peaks[kRank0];
  EXPECT_EQ(peak.bytes, 168);
  EXPECT_EQ(peak.at_ps, 20);
  EXPECT_EQ(peak.op, b0);
  EXPECT_EQ(peak.bytes_by_kind[kParameters], 100);
  EXPECT_EQ(peak.bytes_by_kind[kActivations], 60);
  EXPECT_EQ(peak.bytes_by_kind[kWorkspace], 8);
  EXPECT_EQ(memory.peaks[kRank1].bytes, 7);
  EXPECT_EQ(memory.peaks[kRank1].op, other);
  ASSERT_EQ(memory.steps[kRank0].size(), 9u);
  EXPECT_EQ(memory.steps[kRank1].size(), 1u);
}

TEST(Memory, ReleasesMakeRoomForAllocationsOfTheSameInstant) {
  Sketch s(1);
  const StreamId compute = stream_of(kRank0, StreamKind::compute);
  const OpId a = s.op(10, {compute}, {});
  const OpId b = s.op(10, {compute}, {});
  s.builder.memory({b, kRank0, MemoryKind::workspace, false, 50});  // told before the release at 10
  s.builder.memory({a, kRank0, MemoryKind::workspace, false, 50});
  s.builder.memory({a, kRank0, MemoryKind::workspace, true, -50});
  const Program program = std::move(s.builder).seal();
  const MemoryTimeline memory = trace_memory(program, sweep(program, s.prices()));
  EXPECT_EQ(memory.peaks[kRank0].bytes, 50);
  EXPECT_EQ(memory.peaks[kRank0].op, a);  // the first moment, though b reaches it again
  ASSERT_EQ(memory.steps[kRank0].size(), 3u);
  EXPECT_EQ(memory.steps[kRank0][1].bytes, -50);
}

TEST(Memory, ReleasingMoreThanWasAllocatedIsABug) {
  Sketch s(1);
  const OpId a = s.op(10, {}, {});
  s.builder.memory({a, kRank0, MemoryKind::gradients, false, 5});
  s.builder.memory({a, kRank0, MemoryKind::gradients, true, -6});
  const Program program = std::move(s.builder).seal();
  const Timeline timeline = sweep(program, s.prices());
  EXPECT_DEATH(trace_memory(program, timeline), "rank 0 holds -1 bytes of gradients at 10 ps");
}

RC_GTEST_PROP(Memory, PeakEqualsARecountAtEveryInstant, ()) {
  // Every op holds some workspace while it runs, so at time t the bytes of the ops with start <= t
  // < end are held; the sum only grows at starts.
  test::RandomProgram random = test::random_program();
  for (auto& op : random.ops) ++op.duration_ps;  // a zero-time op would hold its bytes at no time
  Sketch s = test::build(random);
  std::vector<std::int64_t> bytes;
  for (std::size_t i = 0; i < random.ops.size(); ++i) {
    bytes.push_back(*rc::gen::inRange<std::int64_t>(0, 5));
    s.builder.memory({OpId(i), kRank0, MemoryKind::workspace, false, bytes[i]});
    s.builder.memory({OpId(i), kRank0, MemoryKind::workspace, true, -bytes[i]});
  }
  const PriceList prices = s.prices();
  const Program program = std::move(s.builder).seal();
  const Timeline t = sweep(program, prices);
  MemoryPeak expected;
  for (OpId at; at.value < program.size(); ++at) {
    const Picoseconds now = t.start_ps[at];
    std::int64_t held = 0;
    for (OpId op; op.value < program.size(); ++op) {
      if (t.start_ps[op] <= now && now < t.end_ps[op]) held += bytes[program.shape(op).value];
    }
    if (held > expected.bytes || (held == expected.bytes && now < expected.at_ps)) {
      expected.bytes = held;
      expected.at_ps = now;
    }
  }
  const MemoryPeak peak = trace_memory(program, t).peaks[kRank0];
  RC_ASSERT(peak.bytes == expected.bytes);
  if (peak.bytes > 0) RC_ASSERT(peak.at_ps == expected.at_ps);
}

}  // namespace
}  // namespace orrery
