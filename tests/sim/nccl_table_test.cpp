#include "sim/nccl_table.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "sim/network_prices.hpp"

namespace orrery {
namespace {

TEST(NcclTable, BusFactorsOfNcclTests) {
  // nccl-tests doc/PERFORMANCE.md.
  EXPECT_DOUBLE_EQ(bus_factor(NcclOp::all_reduce, 8), 1.75);
  for (const NcclOp op : {NcclOp::all_gather, NcclOp::reduce_scatter, NcclOp::alltoall,
                          NcclOp::gather, NcclOp::scatter}) {
    EXPECT_DOUBLE_EQ(bus_factor(op, 8), 0.875);
  }
  for (const NcclOp op : {NcclOp::broadcast, NcclOp::reduce, NcclOp::sendrecv}) {
    EXPECT_DOUBLE_EQ(bus_factor(op, 8), 1);
  }
}

TEST(NcclTable, NumbersKeepTheDigitsThatFit) {
  // As in the tables that nccl-tests printed (NVIDIA/dgxc-benchmarking@80634ad nccl/README.md).
  EXPECT_EQ(nccl_number(13.67, 7), "  13.67");
  EXPECT_EQ(nccl_number(1112.5, 7), "1112.50");
  EXPECT_EQ(nccl_number(15749, 7), "15749.0");
  EXPECT_EQ(nccl_number(62648.123, 6), " 62648");
  EXPECT_EQ(nccl_number(135.549, 6), "135.55");
  EXPECT_EQ(nccl_number(12345678, 7), "1.2e+07");
  EXPECT_EQ(nccl_number(12345678, 6), " 1e+07");
}

TEST(NcclTable, SizesAreRoundedAsNcclTestsDoes) {
  const auto second = [](std::int64_t) { return 1.0; };
  const NcclTable gather =
      simulated_nccl_table(NcclOp::all_gather, 8, 8, {8, 64, 128, 200, 256, 300}, second);
  ASSERT_EQ(gather.rows.size(), 2u);  // 16 bytes a rank at least, and 200 is 128, 300 is 256
  EXPECT_EQ(gather.rows[0].size_bytes, 128);
  EXPECT_EQ(gather.rows[0].count, 4);  // of one rank
  EXPECT_EQ(gather.rows[0].redop, "none");
  EXPECT_EQ(gather.rows[1].size_bytes, 256);
  const NcclTable reduce = simulated_nccl_table(NcclOp::all_reduce, 8, 8, {3, 8, 18}, second);
  ASSERT_EQ(reduce.rows.size(), 2u);
  EXPECT_EQ(reduce.rows[1].size_bytes, 16);
  EXPECT_EQ(reduce.rows[1].count, 4);
  EXPECT_EQ(reduce.rows[1].redop, "sum");
  EXPECT_EQ(reduce.rows[1].root, -1);
  EXPECT_EQ(simulated_nccl_table(NcclOp::broadcast, 8, 8, {16}, second).rows[0].root, 0);
}

TEST(NcclTable, PrintsWhatNcclTestsPrinted) {
  // A row of NVIDIA/dgxc-benchmarking@80634ad nccl/README.md, up to #wrong, in its columns.
  const std::string published =
      "   268435456      67108864     float     sum      -1   1112.5  241.29  422.25";
  const NcclTable t = simulated_nccl_table(NcclOp::all_reduce, 8, 8, {268435456},
                                           [](std::int64_t) { return 1112.52e-6; });
  const std::string text = format_nccl_table(t, {"a remark"});
  std::string row = text.substr(text.find("   268435456"));
  row = row.substr(0, row.find('\n'));
  // This version of nccl-tests prints a second decimal where the older one left a blank.
  EXPECT_EQ(row.substr(0, published.size()),
            "   268435456      67108864     float     sum      -1  1112.52  241.29  422.25");
  EXPECT_NE(text.find("\n# a remark\n"), std::string::npos);
  EXPECT_NE(text.find("# Avg bus bandwidth    : 422.25"), std::string::npos) << text;
  EXPECT_NE(row.find("N/A"), std::string::npos);
  // Every number ends where its heading does.
  const auto head = text.find("#       size");
  const std::string heading = text.substr(head, text.find('\n', head) - head);
  for (const char* word : {"size", "count", "type", "redop", "root", "time", "algbw", "busbw"}) {
    const std::size_t end = heading.find(word) + std::string(word).size() - 1;
    EXPECT_NE(row[end], ' ') << word;
    EXPECT_EQ(row[end + 1], ' ') << word;
  }
}

TEST(NcclTable, ShapesOfOperations) {
  const auto all_to_all = shape_of(NcclOp::alltoall, 1 << 20, 16, 8);
  ASSERT_TRUE(all_to_all);
  EXPECT_EQ(std::get<Collective>(all_to_all->work),
            (Collective{CollectiveKind::all_to_all, 1 << 20, 16, 8}));
  EXPECT_TRUE(std::get<Send>(shape_of(NcclOp::sendrecv, 64, 8, 8)->work).same_node);
  EXPECT_FALSE(std::get<Send>(shape_of(NcclOp::sendrecv, 64, 16, 8)->work).same_node);
  EXPECT_FALSE(shape_of(NcclOp::gather, 64, 8, 8));
}

}  // namespace
}  // namespace orrery
