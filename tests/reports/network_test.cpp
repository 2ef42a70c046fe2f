#include "reports/network.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace orrery {
namespace {

using nlohmann::json;

const std::string kScenarios = ORRERY_SOURCE_DIR "/scenarios/";

NetworkQuestion about(const std::string& file, decltype(NetworkQuestion::operation) operation = {},
                      std::int64_t ranks = 0) {
  return {.file = kScenarios + file, .operation = operation, .ranks = ranks};
}

std::string complaint(NetworkQuestion question) {
  try {
    ask_network(std::move(question));
  } catch (const InputError& error) {
    return error.problems()[0].message;
  }
  return "";
}

TEST(Network, SizesOfNcclTests) {
  EXPECT_EQ(parse_nccl_size("8"), 8);
  EXPECT_EQ(parse_nccl_size("64K"), 65536);
  EXPECT_EQ(parse_nccl_size("32m"), 32 << 20);
  EXPECT_EQ(parse_nccl_size("16G"), std::int64_t{16} << 30);
  for (const char* wrong : {"", "G", "-1", "8 KB", "1.5K", "9999999999G", "0x8"}) {
    EXPECT_FALSE(parse_nccl_size(wrong)) << wrong;
  }
}

TEST(Network, LinksWithTheirSources) {
  const std::string text = to_terminal(ask_network(about("clusters/h100_1024.yaml")));
  for (const char* part : {"1024 H100, 128 nodes\n", "nvlink    367 GB/s of 450 GB/s", "82 %",
                           "nic       48 GB/s of 50 GB/s", "nccl-tests issue 290"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
  // A scenario stands for its cluster.
  EXPECT_EQ(to_terminal(ask_network(about("llama3_70b_64_h100.yaml"))),
            to_terminal(ask_network(about("clusters/h100_64.yaml"))));
}

TEST(Network, PublishedAllReduceOfEightH200) {
  // 16 GiB with NVLS: 473.1 GB/s bus bandwidth (stas00/ml-engineering network/README.md).
  NetworkQuestion q = about("clusters/h200_node.yaml", NcclOp::all_reduce);
  const NetworkAnswer answer = ask_network(q);
  ASSERT_TRUE(answer.table);
  EXPECT_EQ(answer.table->ranks, 8);
  EXPECT_EQ(answer.table->rows.size(), 32u);  // 8 bytes to 16 GiB
  EXPECT_NEAR(answer.table->rows.back().out_of_place->busbw_gbps / 473.1, 1, 0.04);
}

TEST(Network, TheRatesThatDeepEpPublished) {
  // DeepEP's first README (@ebfe47e4), H800, 4096 tokens, 20 SMs: logical GB/s, dispatch and
  // combine.
  struct Row {
    std::int64_t ranks;
    double dispatch, combine;
  };
  for (const Row& row : {Row{8, 153, 158}, Row{16, 43, 43}, Row{32, 44, 47}, Row{64, 46, 45}}) {
    for (const bool combine : {false, true}) {
      NetworkQuestion q =
          about("clusters/h800_2048.yaml", ExchangeQuestion{.combine = combine}, row.ranks);
      q.min = q.max = 4096;
      const NetworkAnswer answer = ask_network(q);
      ASSERT_EQ(answer.rows.size(), 1u);
      EXPECT_NEAR(answer.rows[0].logical_gbps / (combine ? row.combine : row.dispatch), 1, 0.01)
          << row.ranks;
    }
  }
}

TEST(Network, ExchangesTakeTheScenariosRouting) {
  NetworkQuestion q = about("mixtral_8x7b_64_h100.yaml", ExchangeQuestion{}, 8);
  const NetworkAnswer answer = ask_network(q);
  EXPECT_EQ(answer.exchange->hidden, 4096);
  EXPECT_EQ(answer.exchange->experts, 8);
  EXPECT_EQ(answer.exchange->top_k, 2);
  EXPECT_EQ(answer.exchange->format, NumberFormat::bf16);
  EXPECT_EQ(answer.exchange->node_limit, 0);
  q.operation = ExchangeQuestion{.top_k = 3, .format = NumberFormat::fp8_block};
  EXPECT_EQ(ask_network(q).exchange->top_k, 3);
  EXPECT_EQ(ask_network(q).exchange->format, NumberFormat::fp8_block);
}

TEST(Network, TimesComeFromWhereTheyAreAskedFor) {
  std::vector<Shape> asked;
  NetworkQuestion q = about("clusters/h100_1024.yaml", NcclOp::alltoall, 16);
  q.min = 1 << 20;
  q.max = 4 << 20;
  const NetworkAnswer answer =
      ask_network(q, [&](const Shape& shape, const Profile&, const Cluster& c) {
        EXPECT_EQ(c.nodes, 128);
        asked.push_back(shape);
        return Price{.time_ps = 1'000 * kPsPerUs, .note = "made up"};
      });
  ASSERT_EQ(asked.size(), 3u);
  EXPECT_EQ(std::get<Collective>(asked[0].work),
            (Collective{CollectiveKind::all_to_all, 1 << 20, 16, 8}));
  // A MiB in a millisecond is 1.05 GB/s, of which 15/16 go over links.
  EXPECT_NEAR(answer.table->rows[0].out_of_place->busbw_gbps, 1.048576 * 15 / 16, 1e-9);
  EXPECT_NE(to_terminal(answer).find("# made up"), std::string::npos);
}

TEST(Network, JsonHasNcclTestsKeys) {
  NetworkQuestion q = about("clusters/h100_node.yaml", NcclOp::all_reduce, 4);
  q.min = q.max = 1 << 20;
  const json document = json::parse(to_json(ask_network(q)));
  EXPECT_EQ(document.at("ranks"), 4);
  EXPECT_EQ(document.at("operation"), "all_reduce");
  EXPECT_EQ(document.at("cluster").at("gpus_per_node"), 8);
  const json& row = document.at("results").at(0);
  EXPECT_EQ(row.at("size"), 1 << 20);
  EXPECT_EQ(row.at("redop"), "sum");
  EXPECT_TRUE(row.at("in_place").at("nwrong").is_null());
  EXPECT_NEAR(row.at("out_of_place").at("bus_bw").get<double>() /
                  row.at("out_of_place").at("alg_bw").get<double>(),
              1.5, 1e-12);
  const json exchange =
      json::parse(to_json(ask_network(about("clusters/h800_2048.yaml", ExchangeQuestion{}, 64))));
  EXPECT_EQ(exchange.at("results").size(), 8u);
  EXPECT_EQ(exchange.at("hidden"), 7168);
  EXPECT_FALSE(
      json::parse(to_json(ask_network(about("clusters/h100_node.yaml")))).contains("results"));
}

TEST(Network, WhatDoesNotFitIsSaid) {
  EXPECT_EQ(complaint(about("clusters/h100_node.yaml", NcclOp::all_reduce, 16)),
            "--ranks 16: 'one node of 8 H100' has 1 node of 8 GPUs");
  NetworkQuestion q = about("clusters/h100_64.yaml", NcclOp::all_reduce, 16);
  q.ranks_per_node = 1;
  EXPECT_NE(complaint(q).find("of which 1 are used"), std::string::npos);
  q.ranks_per_node = 9;
  EXPECT_NE(complaint(q).find("has 8 GPUs"), std::string::npos);
  EXPECT_EQ(complaint(about("clusters/h800_2048.yaml", ExchangeQuestion{}, 24)),
            "--ranks 24: 256 experts do not spread evenly over them");
  EXPECT_EQ(complaint(about("clusters/h800_2048.yaml", ExchangeQuestion{.top_k = 300}, 64)),
            "--top-k 300 of 256 experts");
  EXPECT_EQ(complaint(about("clusters/h800_2048.yaml", ExchangeQuestion{.sms = 500}, 64)),
            "--sms 500: NVIDIA H800 SXM has 132");
  q = about("clusters/h100_node.yaml", NcclOp::all_reduce);
  q.min = 64;
  q.max = 8;
  EXPECT_NE(complaint(q).find("the smaller first"), std::string::npos);
  q.max = std::int64_t{1} << 50;
  EXPECT_NE(complaint(q).find("the smaller first"), std::string::npos);
}

}  // namespace
}  // namespace orrery
