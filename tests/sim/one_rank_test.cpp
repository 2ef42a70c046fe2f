#include "sim/one_rank.hpp"

#include <gtest/gtest.h>

#include "sim/timeline.hpp"

namespace orrery {
namespace {

Shape kernel(std::int64_t bytes) {
  return {.work = Streaming{.kind = StreamingKind::copy, .bytes_read = bytes}, .label = "k"};
}

// Two ranks: a kernel on each, a collective of both, a send from 0 to 1, a kernel on 1 behind it.
Program two_ranks() {
  ProgramBuilder b({1, 1});
  const ShapeId k = b.intern(kernel(1)), other = b.intern(kernel(2));
  const ShapeId reduce = b.intern({.work = Collective{.ranks = 2}, .label = "reduce"});
  const ShapeId send = b.intern({.work = Send{.bytes = 8}, .label = "send"});
  const auto compute = [](std::size_t r) { return stream_of(RankId(r), StreamKind::compute); };
  b.begin_cell({.kind = CellKind::forward});
  const StreamId c0 = compute(0), c1 = compute(1);
  const OpId a = b.add(OpKind::compute, k, {}, {&c0, 1}, {});
  b.end_cell();
  b.begin_cell({.kind = CellKind::backward});
  const OpId o = b.add(OpKind::compute, other, {}, {&c1, 1}, {});
  b.end_cell();
  const StreamId both[] = {stream_of(RankId(0), StreamKind::data),
                           stream_of(RankId(1), StreamKind::data)};
  const OpId before[] = {a, o};
  const OpId r = b.add(OpKind::collective, reduce, {}, both, before);
  const StreamId ends[] = {stream_of(RankId(0), StreamKind::send_next),
                           stream_of(RankId(1), StreamKind::receive_previous)};
  const OpId s = b.add(OpKind::transfer, send, {}, ends, {&a, 1});
  b.begin_cell({.kind = CellKind::optimizer});
  const OpId waits[] = {s, r};
  b.add(OpKind::compute, k, {}, {&c1, 1}, waits);
  b.end_cell();
  b.memory({.op = o, .rank = RankId(1), .bytes = 16});
  b.memory({.op = a, .rank = RankId(0), .bytes = 32});
  return std::move(b).seal();
}

TEST(OneRank, KeepsItsOpsCellsAndMemoryAndWaitsForNobodyElse) {
  const Program one = one_rank_of(two_ranks(), RankId(1));
  ASSERT_EQ(one.size(), 4u);
  EXPECT_EQ(one.ranks(), 1u);
  const OpId kernel_op(0), reduce(1), receive(2), last(3);
  EXPECT_EQ(std::get<Streaming>(one.shapes()[one.shape(kernel_op)].work).bytes_read, 2);
  EXPECT_TRUE(one.predecessors_of(kernel_op).empty());
  ASSERT_EQ(one.streams_of(reduce).size(), 1u);
  EXPECT_EQ(kind_of(one.streams_of(reduce)[0]), StreamKind::data);
  ASSERT_EQ(one.predecessors_of(reduce).size(), 1u);  // the other rank's kernel is gone
  EXPECT_EQ(one.predecessors_of(reduce)[0], kernel_op);
  EXPECT_EQ(kind_of(one.streams_of(receive)[0]), StreamKind::receive_previous);
  EXPECT_TRUE(one.predecessors_of(receive).empty());
  EXPECT_EQ(one.predecessors_of(last).size(), 2u);
  ASSERT_EQ(one.cells().size(), 2u);  // the other rank's has no ops
  EXPECT_EQ(one.cells()[0].kind, CellKind::backward);
  EXPECT_EQ(one.cells()[1].kind, CellKind::optimizer);
  ASSERT_EQ(one.memory_effects().size(), 1u);
  EXPECT_EQ(one.memory_effects()[0].bytes, 16);
  EXPECT_EQ(one.memory_effects()[0].op, kernel_op);
}

}  // namespace
}  // namespace orrery
