// find_critical_path() on chains worked out by hand, and against removing time from the path.

#include "sim/critical_path.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <numeric>

#include "tests/sim/random_program.hpp"

namespace orrery {
namespace {

using test::Sketch;

constexpr RankId kRank0{0};
constexpr RankId kRank1{1};

Picoseconds time_of(const CriticalPath& path, Phase phase) {
  return path.time_by_phase_ps[static_cast<std::size_t>(phase)];
}

Picoseconds time_of(const CriticalPath& path, OpKind kind) {
  return path.time_by_kind_ps[static_cast<std::size_t>(kind)];
}

TEST(CriticalPath, CrossesRanksThroughATransfer) {
  Sketch s(2);
  const StreamId compute0 = stream_of(kRank0, StreamKind::compute);
  const StreamId compute1 = stream_of(kRank1, StreamKind::compute);
  const OpId a = s.op(10, {compute0}, {}, Phase::attn_forward);
  const OpId b = s.op(10, {compute0}, {}, Phase::mlp_forward);
  s.op(10, {compute0}, {}, Phase::head_forward);  // ends at 30, before the other rank
  const OpId send = s.op(
      3,
      {stream_of(kRank0, StreamKind::send_next), stream_of(kRank1, StreamKind::receive_previous)},
      {b}, Phase::pipeline_forward, OpKind::transfer);
  s.op(15, {compute1}, {}, Phase::attn_forward);  // over before the transfer is
  const OpId c = s.op(12, {compute1}, {send}, Phase::attn_forward);
  const Program program = std::move(s.builder).seal();
  const CriticalPath path = find_critical_path(program, sweep(program, s.prices()));
  EXPECT_EQ(path.ops, (std::vector<OpId>{a, b, send, c}));
  EXPECT_EQ(time_of(path, Phase::attn_forward), 22);
  EXPECT_EQ(time_of(path, Phase::mlp_forward), 10);
  EXPECT_EQ(time_of(path, Phase::pipeline_forward), 3);
  EXPECT_EQ(time_of(path, Phase::head_forward), 0);
  EXPECT_EQ(time_of(path, OpKind::compute), 32);
  EXPECT_EQ(time_of(path, OpKind::transfer), 3);
  EXPECT_EQ(path.gaps_ps, 0);
}

TEST(CriticalPath, TiesGoToTheSmallestId) {
  Sketch s(1);
  const OpId a = s.op(5, {}, {});
  const OpId b = s.op(5, {}, {});
  const OpId c = s.op(1, {}, {b, a});
  s.op(1, {}, {b, a});  // ends with c
  const Program program = std::move(s.builder).seal();
  const CriticalPath path = find_critical_path(program, sweep(program, s.prices()));
  EXPECT_EQ(path.ops, (std::vector<OpId>{a, c}));
}

TEST(CriticalPath, AMeasuredTimelineHasGaps) {
  Sketch s(1);
  const StreamId compute = stream_of(kRank0, StreamKind::compute);
  const OpId a = s.op(5, {compute}, {});
  const OpId b = s.op(5, {compute}, {});
  const Program program = std::move(s.builder).seal();
  Timeline measured;
  measured.start_ps = {2, 10};
  measured.end_ps = {8, 15};
  const CriticalPath path = find_critical_path(program, measured);
  EXPECT_EQ(path.ops, (std::vector<OpId>{a, b}));
  EXPECT_EQ(path.gaps_ps, 4);
  EXPECT_EQ(time_of(path, OpKind::compute), 11);
}

TEST(CriticalPath, OfNothingIsEmpty) {
  Sketch s(1);
  const Program program = std::move(s.builder).seal();
  EXPECT_TRUE(find_critical_path(program, Timeline{}).ops.empty());
}

RC_GTEST_PROP(CriticalPath, IsAGaplessChainOfEdgesAsLongAsTheStep, ()) {
  const test::RandomProgram random = test::random_program();
  Sketch s = test::build(random);
  const PriceList prices = s.prices();
  const Program program = std::move(s.builder).seal();
  const Timeline t = sweep(program, prices);
  const CriticalPath path = find_critical_path(program, t);
  RC_ASSERT(path.ops.empty() == random.ops.empty());
  if (path.ops.empty()) return;

  const auto edges = test::edges_of(random);
  const auto order = test::order_of_adding(random);
  Picoseconds clock = 0;
  for (std::size_t i = 0; i < path.ops.size(); ++i) {
    RC_ASSERT(t.start_ps[path.ops[i]] == clock);
    clock = t.end_ps[path.ops[i]];
    if (i == 0) continue;
    const std::pair<std::size_t, std::size_t> edge{order[program.shape(path.ops[i - 1]).value],
                                                   order[program.shape(path.ops[i]).value]};
    RC_ASSERT(std::find(edges.begin(), edges.end(), edge) != edges.end());
  }
  const std::vector<Picoseconds> starts = test::longest_path_starts(random);
  Picoseconds makespan = 0;
  for (std::size_t i = 0; i < starts.size(); ++i) {
    makespan = std::max(makespan, starts[i] + random.ops[i].duration_ps);
  }
  RC_ASSERT(clock == makespan);
  const auto& by_kind = path.time_by_kind_ps;
  RC_ASSERT(std::accumulate(by_kind.begin(), by_kind.end(), Picoseconds{0}) == makespan);
}

}  // namespace
}  // namespace orrery
