#include <gtest/gtest.h>

#include "calibrate/execute/lowering.hpp"

namespace orrery {
namespace {

/// Three ops of one rank: two on the compute stream, one on the exchange's, which waits for none of
/// them unless `waits` says so.
class OrderMemory : public testing::Test {
 protected:
  OrderMemory() : device_(kernels::open_cpu_device(1)), tensors_(*device_) {
    ProgramBuilder builder({1});
    const ShapeId shape = builder.intern(
        {.work = Streaming{.kind = StreamingKind::copy, .bytes_read = 1}, .label = "copy"});
    const StreamId compute = stream_of(RankId(0), StreamKind::compute);
    const StreamId exchange = stream_of(RankId(0), StreamKind::expert_exchange);
    builder.add(OpKind::compute, shape, {}, {&compute, 1}, {});
    builder.add(OpKind::compute, shape, {}, {&exchange, 1}, {});
    builder.add(OpKind::compute, shape, {}, {&compute, 1}, {});
    program_ = std::move(builder).seal();
  }

  kernels::Matrix matrix(const char* name) {
    return tensors_.matrix(name, 4, 8, kernels::Format::fp32);
  }

  /// Each op copies from one tensor to another.
  std::vector<LoweredOp> ops(
      const std::vector<std::pair<kernels::Matrix, kernels::Matrix>>& copies) {
    const StreamKind streams[] = {StreamKind::compute, StreamKind::expert_exchange,
                                  StreamKind::compute};
    std::vector<LoweredOp> list;
    for (std::size_t i = 0; i < copies.size(); ++i) {
      LoweredOp op;
      op.op = OpId(i);
      op.streams = {streams[i]};
      op.calls = {kernels::Copy{.from = copies[i].first, .to = copies[i].second}};
      list.push_back(std::move(op));
    }
    return list;
  }

  std::unique_ptr<kernels::Device> device_;
  Tensors tensors_;
  Program program_;
};

TEST_F(OrderMemory, LeavesOpsAloneThatShareNothing) {
  auto list =
      ops({{matrix("a"), matrix("b")}, {matrix("c"), matrix("d")}, {matrix("e"), matrix("f")}});
  EXPECT_EQ(order_memory(list, program_, tensors_), 0);
  for (const LoweredOp& op : list) EXPECT_TRUE(op.waits.empty());
}

TEST_F(OrderMemory, MakesAWriteWaitForAReadOnAnotherStream) {
  // The exchange reads a; the compute stream's second op writes it.
  auto list =
      ops({{matrix("x"), matrix("y")}, {matrix("a"), matrix("b")}, {matrix("x"), matrix("a")}});
  EXPECT_EQ(order_memory(list, program_, tensors_), 1);
  EXPECT_EQ(list[2].waits, std::vector<OpId>{OpId(1)});
}

TEST_F(OrderMemory, AddsNothingWhereTheProgramOrdersThem) {
  auto list =
      ops({{matrix("x"), matrix("y")}, {matrix("a"), matrix("b")}, {matrix("x"), matrix("a")}});
  list[2].waits = {OpId(1)};
  EXPECT_EQ(order_memory(list, program_, tensors_), 0);
  EXPECT_EQ(list[2].waits.size(), 1u);
}

TEST_F(OrderMemory, OrdersThroughOtherOps) {
  // Op 1 reads what op 0 wrote and waits for it; op 2 follows op 0 on its stream and may write x
  // again.
  auto list =
      ops({{matrix("x"), matrix("a")}, {matrix("a"), matrix("b")}, {matrix("y"), matrix("x")}});
  list[1].waits = {OpId(0)};
  EXPECT_EQ(order_memory(list, program_, tensors_), 0);
}

TEST_F(OrderMemory, TellsColumnsOfOneMatrixApart) {
  const kernels::Matrix m = matrix("m");
  auto list = ops({{matrix("x"), matrix("y")},
                   {columns_of(m, 0, 4), columns_of(matrix("b"), 0, 4)},
                   {columns_of(matrix("x"), 0, 4), columns_of(m, 4, 4)}});
  EXPECT_EQ(order_memory(list, program_, tensors_), 0);
  auto same = ops({{matrix("x"), matrix("y")},
                   {columns_of(m, 0, 4), columns_of(matrix("b"), 0, 4)},
                   {columns_of(matrix("x"), 0, 4), columns_of(m, 3, 4)}});
  EXPECT_EQ(order_memory(same, program_, tensors_), 1);
}

using OrderMemoryDeathTest = OrderMemory;

TEST_F(OrderMemoryDeathTest, StopsAtAReadThatNothingOrdersBehindItsWrite) {
  auto list = ops({{matrix("x"), matrix("a")}, {matrix("a"), matrix("b")}});
  EXPECT_DEATH(order_memory(list, program_, tensors_),
               "reads what rank 0 .* writes \\(a\\), and nothing orders them");
}

}  // namespace
}  // namespace orrery
