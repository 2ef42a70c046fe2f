#include "calibrate/read_nccl.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace orrery {
namespace {

const std::string kFolder = ORRERY_SOURCE_DIR "/tests/calibrate/nccl/";

std::vector<NcclTable> read(const std::string& text, const std::string& name = "log.txt") {
  Problems problems;
  std::vector<NcclTable> tables = read_nccl_text(text, name, problems);
  EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
  return tables;
}

/// Messages as "line:column: text".
std::vector<std::string> complaints(const std::string& text, const std::string& name = "log.txt") {
  Problems problems;
  read_nccl_text(text, name, problems);
  std::vector<std::string> out;
  for (const Problem& p : problems.list()) {
    EXPECT_EQ(p.at.file, name);
    out.push_back(std::to_string(p.at.line) + ":" + std::to_string(p.at.column) + ": " + p.message);
  }
  return out;
}

const std::string kRow =
    "     1048576        262144     float     sum      -1    27.37   38.31   67.04      0    26.93 "
    "  38.94   68.14      0\n";

TEST(ReadNccl, PublishedText) {
  Problems problems;
  const auto tables = read_nccl(kFolder + "h100_node_all_reduce_published.txt", problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
  ASSERT_EQ(tables.size(), 1u);
  const NcclTable& t = tables[0];
  EXPECT_EQ(t.op, NcclOp::all_reduce);
  EXPECT_EQ(t.ranks, 8);
  EXPECT_EQ(t.ranks_per_node, 8);
  EXPECT_EQ(t.device, "NVIDIA H100 80GB HBM3");
  EXPECT_EQ(t.at.line, 18);
  ASSERT_EQ(t.rows.size(), 16u);
  const NcclRow& last = t.rows.back();
  EXPECT_EQ(last.size_bytes, std::int64_t{16} << 30);
  EXPECT_EQ(last.count, std::int64_t{4} << 30);
  EXPECT_EQ(last.type, "float");
  EXPECT_EQ(last.redop, "sum");
  EXPECT_EQ(last.root, -1);
  EXPECT_EQ(last.out_of_place, (NcclTiming{62648, 274.23, 479.90, 0}));
  EXPECT_EQ(last.in_place, (NcclTiming{62636, 274.28, 479.99, 0}));
}

TEST(ReadNccl, Json) {
  Problems problems;
  const auto tables = read_nccl(kFolder + "two_nodes_all_gather.json", problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
  ASSERT_EQ(tables.size(), 1u);
  const NcclTable& t = tables[0];
  EXPECT_EQ(t.op, NcclOp::all_gather);
  EXPECT_EQ(t.ranks, 16);  // one device of each of two processes with 8 GPUs
  EXPECT_EQ(t.ranks_per_node, 8);
  EXPECT_EQ(t.nccl_version, "2.29.2");
  EXPECT_EQ(t.device, "NVIDIA H100 80GB HBM3");
  EXPECT_EQ(t.date, "2026-03-04");
  ASSERT_EQ(t.rows.size(), 3u);
  EXPECT_EQ(t.rows[1].size_bytes, 2 << 20);
  EXPECT_EQ(t.rows[1].count, 32768);
  EXPECT_EQ(t.rows[1].root, -1);
  EXPECT_EQ(t.rows[1].redop, "none");
  EXPECT_DOUBLE_EQ(t.rows[1].out_of_place->time_us, 72.25);
  EXPECT_DOUBLE_EQ(t.rows[1].in_place->time_us, 71.25);
  EXPECT_EQ(t.rows[1].in_place->wrong, 0);
  EXPECT_EQ(t.rows[2].in_place->wrong, std::nullopt);
}

TEST(ReadNccl, WhatWasWrittenReadsBackToTheLastDigit) {
  for (const NcclOp op : {NcclOp::all_reduce, NcclOp::all_gather, NcclOp::alltoall,
                          NcclOp::broadcast, NcclOp::sendrecv}) {
    std::vector<std::int64_t> sizes;
    for (int i = 3; i <= 34; ++i) sizes.push_back(std::int64_t{1} << i);
    const NcclTable written = simulated_nccl_table(
        op, 16, 8, sizes, [](std::int64_t b) { return 11.1234e-6 + double(b) / 217.7e9; });
    const auto tables = read(format_nccl_table(written, {"with a remark"}));
    ASSERT_EQ(tables.size(), 1u);
    EXPECT_EQ(tables[0].op, op);
    EXPECT_EQ(tables[0].ranks, 16);
    EXPECT_EQ(tables[0].ranks_per_node, 8);
    ASSERT_EQ(tables[0].rows.size(), written.rows.size());
    for (std::size_t i = 0; i < written.rows.size(); ++i) {
      const NcclRow& in = tables[0].rows[i];
      const NcclRow& out = written.rows[i];
      EXPECT_EQ(in.size_bytes, out.size_bytes);
      EXPECT_EQ(in.count, out.count);
      EXPECT_EQ(in.root, out.root);
      EXPECT_EQ(nccl_number(in.out_of_place->time_us, 7),
                nccl_number(out.out_of_place->time_us, 7));
      EXPECT_EQ(nccl_number(in.in_place->algbw_gbps, 6), nccl_number(out.in_place->algbw_gbps, 6));
      EXPECT_EQ(nccl_number(in.in_place->busbw_gbps, 6), nccl_number(out.in_place->busbw_gbps, 6));
      EXPECT_EQ(in.in_place->wrong, std::nullopt);
    }
    EXPECT_EQ(format_nccl_table(tables[0]).size(), format_nccl_table(written).size());
  }
}

TEST(ReadNccl, PrefixesWarningsAndSeveralTables) {
  const std::string device =
      "#  Rank  0 Group  0 Pid 12 on n0 device  0 [0x1b] NVIDIA A100\n"
      "#  Rank  1 Group  0 Pid 13 on n0 device  1 [0x1c] NVIDIA A100\n";
  const std::string head = "#       size         count      type   redop    root  out-of-place\n";
  std::string text =
      "+ mpirun -np 2 ./build/all_reduce_perf -b 8 -e 16G\r\n" + device +
      "n0:1:1 [0] NCCL INFO Channel 00/02 : 0 1\n"
      "NCCL version 2.18.5+cuda12.2\n" +
      head +
      "     1048576   262144  float  sum  -1  27.37  38.31  38.31  0  26.93  38.94  "
      "38.94  N/A\r\n"
      "n0:12:40 [1] net.cc:11 NCCL WARN Call to ibv_poll failed: 2 float times\n"
      "[1,0]<stdout>:     2097152   524288  float  sum  -1  54.74  38.31  38.31  0  "
      "53.86  38.94  38.94  0\n"
      "# Avg bus bandwidth    : 38.6\n"
      "\xC3\xA9t\xC3\xA9 \xFF\n"
      "# Collective test starting: sendrecv_perf\n" +
      device + head +
      "2025-01-02T03:04:05Z 8 2 bfloat16 none -1 5.00 0.00 0.00 0 5.00 0.00 0.00 0\n";
  const auto tables = read(text);
  ASSERT_EQ(tables.size(), 2u);
  EXPECT_EQ(tables[0].op, NcclOp::all_reduce);
  EXPECT_EQ(tables[0].nccl_version, "2.18.5");
  EXPECT_EQ(tables[0].ranks, 2);
  ASSERT_EQ(tables[0].rows.size(), 2u);
  EXPECT_EQ(tables[0].rows[1].size_bytes, 2097152);
  EXPECT_EQ(tables[0].rows[0].in_place->wrong, std::nullopt);
  EXPECT_EQ(tables[1].op, NcclOp::sendrecv);
  EXPECT_EQ(tables[1].rows.size(), 1u);
  EXPECT_EQ(tables[1].rows[0].type, "bfloat16");
}

TEST(ReadNccl, OldAndNewColumns) {
  // Without root (before 2.11), in-place only (replay), per-iteration columns, time stamps.
  EXPECT_FALSE(read("8 2 float sum 5.00 0.00 0.00 0e+00 5.10 0.00 0.00 0e+00\n")[0]
                   .rows[0]
                   .out_of_place->wrong.value_or(1));
  const NcclRow replay = read("8 2 float sum -1 5.00 0.00 0.00 0\n")[0].rows[0];
  EXPECT_FALSE(replay.out_of_place);
  EXPECT_DOUBLE_EQ(replay.in_place->time_us, 5);
  const auto stamped =
      read("8 2 float sum -1 5.00 0.00 0.00 0 5.10 0.00 0.00 0  2026-01-02 03:04:05\n");
  EXPECT_EQ(stamped[0].date, "2026-01-02");
  EXPECT_DOUBLE_EQ(stamped[0].rows[0].in_place->time_us, 5.1);
  const auto iterations = read(
      "#   out-of-place (+ per-iteration)   in-place (+ per-iteration)\n"
      "8 2 float sum -1 5.00 0.00 0.00 0 1 2 3 4 5.10 0.00 0.00 0 5 6 7 8\n");
  EXPECT_DOUBLE_EQ(iterations[0].rows[0].in_place->time_us, 5.1);
}

TEST(ReadNccl, OperationAndRanksFromTheFileNameAndTheBandwidths) {
  // Bus over algorithm bandwidth 1.75 is 8 ranks of an all-reduce; of the reducing operations
  // without a root, only reduce_scatter is below 1.
  EXPECT_EQ(read(kRow)[0].op, NcclOp::all_reduce);
  EXPECT_EQ(read(kRow)[0].ranks, 8);
  EXPECT_EQ(read(kRow)[0].ranks_per_node, 0);
  const std::string scatter =
      "1048576 32768 float sum -1 14.60 71.82 62.84 0 14.60 71.82 62.84 0\n";
  EXPECT_EQ(read(scatter)[0].op, NcclOp::reduce_scatter);
  EXPECT_EQ(read(scatter)[0].ranks, 8);
  const std::string gather = "1048576 32768 float none -1 14.6 71.82 62.84 0 14.6 71.82 62.84 0\n";
  EXPECT_EQ(read(gather)[0].op, NcclOp::other);
  EXPECT_EQ(read(gather, "1_2_LOG_all_gather_env1.txt")[0].op, NcclOp::all_gather);
  EXPECT_EQ(read(gather, "1_2_LOG_all_gather_env1.txt")[0].ranks, 8);
  // Nine devices, bandwidths of eight.
  std::string text;
  for (int i = 0; i < 9; ++i) text += "# Rank 0 Pid 1 on host device 0 [0x1] X\n";
  const auto tables = read(text + kRow);
  EXPECT_EQ(tables[0].ranks, 8);
  ASSERT_EQ(tables[0].notes.size(), 1u);
  EXPECT_NE(tables[0].notes[0].find("listed are 9"), std::string::npos);
}

TEST(ReadNccl, OtherGroupsRunBesideTheFirst) {
  std::string text;
  for (int i = 0; i < 16; ++i) {
    text += "# Rank " + std::to_string(i) + " Group " + std::to_string(i % 8) + " Pid 1 on host" +
            std::to_string(i / 8) + " device 0 [0x1] X\n";
  }
  const auto tables = read(text + "8 2 float sum -1 5.00 0.00 0.00 0 5.00 0.00 0.00 0\n");
  EXPECT_EQ(tables[0].ranks, 2);
  EXPECT_EQ(tables[0].ranks_per_node, 1);
}

TEST(ReadNccl, BadRowsAreProblemsWithTheirPlace) {
  using Strings = std::vector<std::string>;
  const std::string good = "8 2 float sum -1 5.00 0.00 0.00 0 5.00 0.00 0.00 0\n";
  EXPECT_EQ(complaints(good + "16 4 float sum -1 5.00 0.00\n"),
            Strings{"2:24: a row has 9 columns from 'root' on, this one 3"});
  EXPECT_EQ(complaints(good + "    16     4    flo"),
            Strings{"2:17: the row ends after its column 3"});
  EXPECT_EQ(complaints(good + "          16"), Strings{"2:11: the row ends after its column 1"});
  EXPECT_EQ(complaints("\xC3\xA9 16 4 float sum -1 5.0x 0.00 0.00 0 5.00 0.00 0.00 0\n"),
            Strings{"1:21: '5.0x' is no time"});
  EXPECT_EQ(complaints("16 4 float sum -1 0.00 0.00 0.00 0 5.00 0.00 0.00 0\n"),
            Strings{"1:19: '0.00' is no time"});
  EXPECT_EQ(complaints("16 4 float sum -1 5.00 inf 0.00 0 5.00 0.00 0.00 0\n"),
            Strings{"1:24: 'inf' is no algorithm bandwidth"});
  EXPECT_EQ(complaints("16 4 float sum x 5.00 0.00 0.00 0 5.00 0.00 0.00 0\n"),
            Strings{"1:16: 'x' is no root: a rank, or -1"});
  EXPECT_EQ(complaints("16 4 float mean -1 5.00 0.00 0.00 0 5.00 0.00 0.00 0\n"),
            Strings{"1:12: column 4 of a row is the reduction, not 'mean'"});
  EXPECT_EQ(complaints("16 4 float sum -1 5.00 0.00 0.00 ? 5.00 0.00 0.00 0\n"),
            Strings{"1:34: '?' is no number of wrong elements"});
  EXPECT_EQ(complaints("1048576 4 float sum -1 5.00 38.31 0.00 0 5.00 0.00 0.00 0\n"),
            Strings{"1:1: 1048576 bytes in 5 us are not 38.31 GB/s: these are no columns of "
                    "nccl-tests"});
  EXPECT_EQ(complaints("all_gather_perf\n" + kRow),
            Strings{"2:6: bus bandwidth is 1.750 of algorithm bandwidth, which no all_gather has"});
  EXPECT_EQ(complaints("nothing\n"), Strings{"0:0: there is no table of nccl-tests in this file"});
  EXPECT_EQ(complaints(""), Strings{"0:0: there is no table of nccl-tests in this file"});
}

TEST(ReadNccl, BadJsonIsAProblemWithItsPlace) {
  using Strings = std::vector<std::string>;
  const std::string timing = "{\"time\":5,\"alg_bw\":0.0,\"bus_bw\":0.0,\"nwrong\":0}";
  const std::string row =
      "{\"size\":8,\"count\":2,\"type\":\"float\",\"redop\":\"sum\",\"root\":\"-1\",";
  EXPECT_EQ(read("{\"results\":[" + row + "\"out_of_place\":null,\"in_place\":" + timing + "}]}")[0]
                .rows.size(),
            1u);
  EXPECT_EQ(complaints("{\n\"results\":[" + row),
            Strings{"2:73: Missing a name for object member."});
  EXPECT_EQ(complaints("{\"results\":[\n {\"size\":8,\"in_place\":" + timing + "}]}"),
            Strings{"2:2: a result lacks its size, count, type or redop"});
  EXPECT_EQ(complaints("{\"results\":[\n " + row + "\"out_of_place\":null}]}"),
            Strings{"2:2: a result has neither out_of_place nor in_place"});
  EXPECT_EQ(complaints("{\"results\":[\n " + row + "\"in_place\":{\"time\":\"nan\"}}]}"),
            Strings{"2:2: a result's time is no time"});
  EXPECT_EQ(complaints("{\"a\":" + std::string(100'000, '[')),
            Strings{"1:69: lists and objects are nested too deep"});
  EXPECT_EQ(complaints("{}"), Strings{"0:0: there is no table of nccl-tests in this file"});
}

TEST(ReadNccl, SeveralRunsInOneJsonFile) {
  const std::string run =
      "{\"args\":[\"all_reduce_perf\"],\"results\":[{\"size\":8,\"count\":2,\"type\":\"float\","
      "\"redop\":\"sum\",\"root\":\"-1\",\"in_place\":{\"time\":5.0,\"alg_bw\":0.0016,"
      "\"bus_bw\":0.0}}]}\n";
  EXPECT_EQ(read(run + run).size(), 2u);
}

TEST(ReadNccl, HugeFilesAreBounded) {
  std::string text;
  while (text.size() < 24'000'000) text += "8 2 float sum -1 5.00 0.00 0.00 0 5.00 0.00 0.00 0\n";
  EXPECT_EQ(complaints(text), std::vector<std::string>{"0:0: more than 200000 rows"});
  EXPECT_EQ(complaints(std::string(10'000'000, '8')),
            std::vector<std::string>{"0:0: there is no table of nccl-tests in this file"});
  std::string bad;
  for (int i = 0; i < 5000; ++i) bad += "8 2 float sum -1 x\n";
  EXPECT_EQ(complaints(bad).size(), 100u);
}

}  // namespace
}  // namespace orrery
