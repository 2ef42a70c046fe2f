// Building and sealing Programs: numbering, cells, deadlocks, names.

#include "sim/program.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "tests/sim/random_program.hpp"

namespace orrery {
namespace {

using test::Sketch;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr RankId kRank0{0};
constexpr RankId kRank1{1};

std::vector<std::uint32_t> shapes_in_order(const Program& program) {
  std::vector<std::uint32_t> shapes;
  for (OpId op; op.value < program.size(); ++op) shapes.push_back(program.shape(op).value);
  return shapes;
}

std::string message_of(ProgramBuilder builder) {
  try {
    (void)std::move(builder).seal();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "sealed";
}

TEST(Streams, KnowTheirRankAndKind) {
  const StreamId stream = stream_of(RankId(2047), StreamKind::data);
  EXPECT_EQ(rank_of(stream), RankId(2047));
  EXPECT_EQ(kind_of(stream), StreamKind::data);
  for (int kind = 0; kind < kStreamsPerRank; ++kind) {
    EXPECT_NE(name_of(static_cast<StreamKind>(kind)), "?") << kind;
  }
  EXPECT_EQ(name_of(static_cast<StreamKind>(kStreamsPerRank)), "?");
}

TEST(Names, CoverEveryEnumerator) {
  for (int p = 0; p < kPhases; ++p) EXPECT_NE(name_of(static_cast<Phase>(p)), "?") << p;
  for (int c = 0; c < kCellKinds; ++c) EXPECT_NE(name_of(static_cast<CellKind>(c)), "?") << c;
  for (int m = 0; m < kMemoryKinds; ++m) EXPECT_NE(name_of(static_cast<MemoryKind>(m)), "?") << m;
  for (int k = 0; k < kOpKinds; ++k) EXPECT_NE(name_of(static_cast<OpKind>(k)), "?") << k;
  EXPECT_EQ(name_of(static_cast<Phase>(kPhases)), "?");
  EXPECT_EQ(name_of(static_cast<CellKind>(kCellKinds)), "?");
  EXPECT_EQ(name_of(static_cast<MemoryKind>(kMemoryKinds)), "?");
  EXPECT_EQ(name_of(static_cast<OpKind>(kOpKinds)), "?");
  EXPECT_EQ(name_of(Phase::combine_backward), "combine(B)");
}

TEST(Names, OfOpsSayRankMicroBatchLayerPhaseAndLabel) {
  ProgramBuilder b({1, 1, 1, 1, 1});
  const ShapeId up = b.intern({Mark{}, "routed_up", 0});
  const ShapeId plain = b.intern({Mark{}, "", 0});
  const auto on = [](std::size_t rank) { return stream_of(RankId(rank), StreamKind::data); };
  const auto add = [&](ShapeId shape, OpTag tag, std::vector<StreamId> streams) {
    return b.add(OpKind::compute, shape, tag, streams, {});
  };
  const OpId one = add(up, {12, 17, 0, Phase::mlp_forward}, {on(3)});
  const OpId weight = add(up, {2, 0, 0, Phase::mlp_weight}, {on(0)});
  const OpId all = add(plain, {0, kNoLayer, 0, Phase::gradient_sync}, {on(1), on(0), on(2)});
  const OpId two = add(plain, {5, 1, 0, Phase::tensor_exchange}, {on(4), on(0)});
  const OpId some = add(plain, {5, 1, 0, Phase::attn_backward}, {on(4), on(0), on(2)});
  const Program program = std::move(b).seal();
  EXPECT_EQ(program.name(one), "rank 3 F12 layer 17 mlp(F) routed_up");
  EXPECT_EQ(program.name(weight), "rank 0 W2 layer 0 mlp(W) routed_up");
  EXPECT_EQ(program.name(all), "ranks 0-2 gradient_sync");
  EXPECT_EQ(program.name(two), "ranks 0 and 4 micro-batch 5 layer 1 tensor");
  EXPECT_EQ(program.name(some), "rank 0 and 2 others B5 layer 1 attn(B)");
}

TEST(Builder, InternsEqualShapesOnce) {
  ProgramBuilder b({4});
  const ShapeId a =
      b.intern({Gemm{NumberFormat::bf16, Pass::forward, false, 1, 2, 3, 4}, "o", 112});
  const ShapeId same =
      b.intern({Gemm{NumberFormat::bf16, Pass::forward, false, 1, 2, 3, 4}, "o", 112});
  const ShapeId fewer_sms =
      b.intern({Gemm{NumberFormat::bf16, Pass::forward, false, 1, 2, 3, 4}, "o", 20});
  EXPECT_EQ(a, same);
  EXPECT_NE(a, fewer_sms);
  for (const ShapeId shape : {a, fewer_sms, a}) {
    b.add(OpKind::compute, shape, {}, std::vector{stream_of(kRank0, StreamKind::compute)}, {});
  }
  const Program program = std::move(b).seal();
  EXPECT_THAT(program.shape_counts(), ElementsAre(2, 1));
  EXPECT_THAT(program.multiplicity(), ElementsAre(4));
  EXPECT_EQ(program.ranks(), 1u);
}

TEST(Seal, KeepsIdsThatAscendAlongAllEdges) {
  Sketch s(2);
  const StreamId c0 = stream_of(kRank0, StreamKind::compute);
  const StreamId c1 = stream_of(kRank1, StreamKind::compute);
  const OpId a = s.op(1, {c0}, {});
  const OpId b = s.op(1, {c1}, {a});
  const OpId c = s.op(1, {c0}, {});
  s.builder.join(b, stream_of(kRank0, StreamKind::data));  // late, but nothing precedes it there
  s.builder.depend(b, a);
  s.builder.depend(c, b);  // c is the newest op
  const Program program = std::move(s.builder).seal();
  EXPECT_THAT(shapes_in_order(program), ElementsAre(0, 1, 2));
  EXPECT_THAT(program.streams_of(b), ElementsAre(c1, stream_of(kRank0, StreamKind::data)));
  EXPECT_THAT(program.predecessors_of(b), ElementsAre(a, a));
  EXPECT_THAT(program.predecessors_of(c), ElementsAre(b));
}

TEST(Seal, RenumbersForwardReferencesBySmallestOldId) {
  Sketch s(2);
  const StreamId c0 = stream_of(kRank0, StreamKind::compute);
  const StreamId c1 = stream_of(kRank1, StreamKind::compute);
  s.op(1, {c0}, {OpId(3)});             // 0 waits for 3
  s.op(1, {c0}, {});                    // 1 is behind 0
  s.op(1, {c1}, {});                    // 2
  const OpId late = s.op(1, {c1}, {});  // 3 is behind 2
  s.op(1, {}, {});                      // 4
  s.builder.memory({late, kRank1, MemoryKind::workspace, false, 64});
  const Program program = std::move(s.builder).seal();
  EXPECT_THAT(shapes_in_order(program), ElementsAre(2, 3, 0, 1, 4));
  EXPECT_THAT(program.predecessors_of(OpId(2)), ElementsAre(OpId(1)));
  EXPECT_THAT(program.streams_of(OpId(1)), ElementsAre(c1));
  EXPECT_EQ(program.memory_effects()[0].op, OpId(1));
}

TEST(Seal, CarriesMemberLoadsAlong) {
  Sketch s(2);
  const StreamId c0 = stream_of(kRank0, StreamKind::compute);
  const StreamId c1 = stream_of(kRank1, StreamKind::compute);
  const StreamId e0 = stream_of(kRank0, StreamKind::expert_exchange);
  const StreamId e1 = stream_of(kRank1, StreamKind::expert_exchange);
  const OpId first = s.op(1, {c0, c1}, {OpId(2)});  // 0 waits for 2
  s.op(1, {c0}, {});
  const OpId second = s.op(1, {e0, e1}, {});
  Sketch without = s;
  s.builder.member_loads(second, std::vector<std::uint32_t>{1500, 500});
  s.builder.member_loads(first, std::vector<std::uint32_t>{70'000, 0});
  const Program program = std::move(s.builder).seal();
  EXPECT_THAT(shapes_in_order(program), ElementsAre(2, 0, 1));
  EXPECT_THAT(program.member_loads(OpId(0)), ElementsAre(1500, 500));
  EXPECT_THAT(program.member_loads(OpId(1)), ElementsAre(70'000, 0));
  EXPECT_TRUE(program.member_loads(OpId(2)).empty());
  EXPECT_GE(program.memory_bytes(), std::move(without.builder).seal().memory_bytes() + 16);
}

TEST(Seal, MovesCellsAsWholes) {
  // Cell A = {0, 1}; its second op waits for cell B = {2, 3} of the other rank. Op by op, the
  // smallest id first, 0 would run ahead and split A; as wholes B goes first.
  Sketch s(2);
  const StreamId c0 = stream_of(kRank0, StreamKind::compute);
  const StreamId c1 = stream_of(kRank1, StreamKind::compute);
  s.builder.begin_cell({CellKind::forward, 7, 7, 0, 0, {}, {}});
  s.op(1, {c0}, {});
  s.op(1, {c0}, {OpId(3)});
  s.builder.end_cell();
  s.builder.begin_cell({CellKind::backward, 8, 8, 0, 0, {}, {}});
  s.op(1, {c1}, {});
  s.op(1, {c1}, {});
  s.builder.end_cell();
  s.builder.begin_cell({CellKind::weight, 9, 9, 0, 0, {}, {}});
  s.builder.end_cell();  // empty: dropped
  const Program program = std::move(s.builder).seal();
  EXPECT_THAT(shapes_in_order(program), ElementsAre(2, 3, 0, 1));
  ASSERT_EQ(program.cells().size(), 2u);
  EXPECT_EQ(program.cells()[0].stage, 8);
  EXPECT_EQ(program.cells()[0].first, OpId(0));
  EXPECT_EQ(program.cells()[0].last, OpId(2));
  EXPECT_EQ(program.cells()[1].kind, CellKind::forward);
  EXPECT_EQ(program.cells()[1].first, OpId(2));
  EXPECT_EQ(program.cells()[1].last, OpId(4));
}

TEST(Seal, NamesTheCellsThatCannotBothBeWhole) {
  // 0 -> 2 and 3 -> 1: the ops can run, but neither cell can precede the other.
  Sketch s(2);
  const StreamId c0 = stream_of(kRank0, StreamKind::compute);
  const StreamId c1 = stream_of(kRank1, StreamKind::compute);
  s.builder.begin_cell({});
  s.op(1, {c0}, {});
  s.op(1, {c0}, {OpId(3)});
  s.builder.end_cell();
  s.builder.begin_cell({});
  s.op(1, {c1}, {OpId(0)});
  s.op(1, {c1}, {});
  s.builder.end_cell();
  const std::string message = message_of(std::move(s.builder));
  EXPECT_THAT(message, HasSubstr("keeps these cells contiguous"));
  EXPECT_THAT(message, HasSubstr("#0..#1 (from rank 0 F0 layer 0 attn(F) op0) waits for #2..#3"));
}

TEST(Seal, NamesADeadlockOfTwoCollectivesInOppositeOrder) {
  ProgramBuilder b({1, 1});
  const ShapeId gather =
      b.intern({Collective{CollectiveKind::all_gather, 8, 2, 2}, "all_gather", 0});
  const ShapeId reduce =
      b.intern({Collective{CollectiveKind::all_reduce, 8, 2, 2}, "all_reduce", 0});
  const StreamId t0 = stream_of(kRank0, StreamKind::tensor);
  const StreamId t1 = stream_of(kRank1, StreamKind::tensor);
  const OpTag tag{4, 2, 0, Phase::tensor_exchange};
  const OpId first = b.add(OpKind::collective, gather, tag, std::vector{t0}, {});
  const OpId second = b.add(OpKind::collective, reduce, tag, std::vector{t0}, {});
  b.join(second, t1);  // rank 1 enters the all_reduce first
  b.join(first, t1);
  EXPECT_EQ(
      message_of(std::move(b)),
      "deadlock: these operations wait for each other\n"
      "  #0 ranks 0-1 micro-batch 4 layer 2 tensor all_gather waits for #1 ranks 0-1 micro-batch 4 "
      "layer 2 tensor all_reduce, which is before it on rank 1 tensor\n"
      "  #1 ranks 0-1 micro-batch 4 layer 2 tensor all_reduce waits for #0 ranks 0-1 micro-batch 4 "
      "layer 2 tensor all_gather, which is before it on rank 0 tensor");
}

TEST(Seal, NamesADeadlockThroughResultsButNotItsBystanders) {
  Sketch s(1);
  const OpId before = s.op(1, {}, {});
  s.op(1, {stream_of(kRank0, StreamKind::compute)}, {before, OpId(2)});
  s.op(1, {stream_of(kRank0, StreamKind::compute)}, {});
  s.op(1, {}, {OpId(2)});  // waits for the circle, is not on it
  const std::string message = message_of(std::move(s.builder));
  EXPECT_THAT(message, HasSubstr("#1 rank 0 F0 layer 0 attn(F) op1 waits for #2 rank 0 F0 layer 0 "
                                 "attn(F) op2, which it needs the result of"));
  EXPECT_THAT(message, HasSubstr("#2 rank 0 F0 layer 0 attn(F) op2 waits for #1 rank 0 F0 layer 0 "
                                 "attn(F) op1, which is before it on rank 0 compute"));
  EXPECT_THAT(message, Not(HasSubstr("#0")));
  EXPECT_THAT(message, Not(HasSubstr("#3")));
}

TEST(Seal, AnOpThatWaitsForItselfIsADeadlock) {
  Sketch s(1);
  s.op(1, {}, {OpId(0)});
  EXPECT_THAT(message_of(std::move(s.builder)),
              HasSubstr("#0 no rank F0 layer 0 attn(F) op0 waits for #0"));
}

TEST(Seal, AbortsOnMisuse) {
  const StreamId c0 = stream_of(kRank0, StreamKind::compute);
  const StreamId c1 = stream_of(kRank1, StreamKind::compute);
  {
    Sketch s(1);
    s.op(1, {c0}, {OpId(9)});
    EXPECT_DEATH((void)std::move(s.builder).seal(), "op 0 waits for op 9 of 1");
  }
  {
    Sketch s(1);
    s.op(1, {c1}, {});
    EXPECT_DEATH((void)std::move(s.builder).seal(), "op 0 on stream 10 of 10");
  }
  {
    Sketch s(1);
    s.op(1, {c0, c0}, {});
    EXPECT_DEATH((void)std::move(s.builder).seal(), "op 0 is twice on rank 0 compute");
  }
  {
    Sketch s(1);
    s.builder.member_loads(s.op(1, {c0}, {}), std::vector<std::uint32_t>{1000, 1000});
    EXPECT_DEATH((void)std::move(s.builder).seal(), "2 loads of op 0 on 1 streams");
  }
  {
    Sketch s(1);
    const OpId op = s.op(1, {c0}, {});
    s.builder.member_loads(op, std::vector<std::uint32_t>{1000});
    s.builder.member_loads(op, std::vector<std::uint32_t>{1000});
    EXPECT_DEATH((void)std::move(s.builder).seal(), "op 0 has loads twice");
  }
  {
    Sketch s(1);
    s.builder.begin_cell({});
    EXPECT_DEATH(s.builder.begin_cell({}), "begin_cell within a cell");
    EXPECT_DEATH((void)std::move(s.builder).seal(), "seal within a cell");
  }
}

/// Ops that were told to come before each other, but in terms of sealed ids.
std::vector<std::pair<OpId, OpId>> sealed_edges(const test::RandomProgram& random,
                                                const Program& program) {
  const std::vector<std::size_t> order = test::order_of_adding(random);
  std::vector<OpId> sealed(random.ops.size());
  for (OpId op; op.value < program.size(); ++op) sealed[order[program.shape(op).value]] = op;
  std::vector<std::pair<OpId, OpId>> edges;
  for (const auto& [from, to] : test::edges_of(random))
    edges.emplace_back(sealed[from], sealed[to]);
  return edges;
}

RC_GTEST_PROP(Seal, NumbersTopologicallyAndLosesNothing, ()) {
  const test::RandomProgram random = test::random_program();
  const Program program = std::move(test::build(random).builder).seal();
  RC_ASSERT(program.size() == random.ops.size());
  const std::vector<std::size_t> order = test::order_of_adding(random);
  for (const auto& [from, to] : sealed_edges(random, program)) RC_ASSERT(from < to);
  for (OpId op; op.value < program.size(); ++op) {
    const test::RandomProgram::Op& expected = random.ops[order[program.shape(op).value]];
    const auto streams = program.streams_of(op);
    RC_ASSERT(std::vector<StreamId>(streams.begin(), streams.end()) == expected.streams);
    std::vector<std::size_t> predecessors;
    for (const OpId p : program.predecessors_of(op)) {
      predecessors.push_back(order[program.shape(p).value]);
    }
    RC_ASSERT(predecessors == expected.predecessors);
  }
}

// One rank's ops cut into random cells, with forward references: seal() keeps the cells whole
// exactly if no two cells reach each other (by transitive closure), and says so otherwise.
RC_GTEST_PROP(Seal, KeepsCellsWholeExactlyWherePossible, ()) {
  const auto n = *rc::gen::inRange<std::size_t>(1, 14);
  std::vector<std::size_t> position(n);  // when the op happens; ids say when it was added
  for (std::size_t i = 0; i < n; ++i) position[i] = i;
  for (std::size_t i = n; i-- > 1;) {
    if (*rc::gen::inRange(0, 2) == 0)
      std::swap(position[i], position[*rc::gen::inRange<std::size_t>(0, i)]);
  }
  std::vector<std::vector<bool>> reaches(n, std::vector<bool>(n, false));  // between cells
  std::vector<std::size_t> cell(n);
  for (std::size_t i = 1; i < n; ++i)
    cell[i] = cell[i - 1] + (*rc::gen::inRange(0, 3) == 0 ? 1u : 0u);

  Sketch s(1);
  for (std::size_t i = 0; i < n; ++i) {
    std::vector<OpId> predecessors;
    for (std::size_t p = 0; p < n; ++p) {
      if (position[p] < position[i] && *rc::gen::inRange(0, 4) == 0) {
        predecessors.emplace_back(p);
        reaches[cell[p]][cell[i]] = true;
      }
    }
    if (i == 0 || cell[i] != cell[i - 1]) {
      if (i > 0) s.builder.end_cell();
      s.builder.begin_cell(
          {CellKind::forward, static_cast<std::uint16_t>(cell[i]), 0, 0, 0, {}, {}});
    }
    s.op(1, {}, predecessors);
  }
  s.builder.end_cell();
  for (std::size_t k = 0; k < n; ++k) {
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < n; ++j) {
        if (reaches[i][k] && reaches[k][j]) reaches[i][j] = true;
      }
    }
  }
  bool possible = true;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < i; ++j) possible &= !(reaches[i][j] && reaches[j][i]);
  }
  RC_TAG(possible ? "possible" : "impossible");

  std::optional<Program> program;
  try {
    program = std::move(s.builder).seal();
  } catch (const std::runtime_error& error) {
    RC_ASSERT(std::string(error.what()).find("cells contiguous") != std::string::npos);
  }
  RC_ASSERT(program.has_value() == possible);
  if (!program) return;
  std::size_t covered = 0;
  for (const Cell& c : program->cells()) {
    RC_ASSERT(c.first.value == covered);
    covered = c.last.value;
    for (OpId op = c.first; op < c.last; ++op) {
      RC_ASSERT(cell[program->shape(op).value] == c.stage);
      for (const OpId p : program->predecessors_of(op)) RC_ASSERT(p < op);
    }
  }
  RC_ASSERT(covered == n);
}

}  // namespace
}  // namespace orrery
