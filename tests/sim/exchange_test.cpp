#include "sim/exchange.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <vector>

namespace orrery {
namespace {

ExpertExchange routing(std::int64_t ep, std::int64_t experts, std::int64_t top_k,
                       std::int64_t limit, std::int64_t gpus_per_node = 8) {
  ExpertExchange e;
  e.format = NumberFormat::fp8_block;
  e.tokens = 4096;
  e.hidden = 7168;
  e.ep = ep;
  e.experts = experts;
  e.top_k = top_k;
  e.node_limit = limit;
  e.gpus_per_node = gpus_per_node;
  return e;
}

struct Drawn {
  double nodes = 0;
  double gpus = 0;
};

/// The routing rule as the V3 report words it: a score per expert, whole groups sorted.
Drawn draw(const ExpertExchange& e, int tokens) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> uniform;
  const std::int64_t nodes = std::max<std::int64_t>(1, e.ep / e.gpus_per_node);
  const std::int64_t per_node = e.experts / nodes;
  const std::int64_t per_gpu = e.experts / e.ep;
  Drawn sum;
  for (int t = 0; t < tokens; ++t) {
    std::vector<double> scores(static_cast<std::size_t>(e.experts));
    for (double& s : scores) s = uniform(random);
    if (e.node_limit > 0 && e.node_limit < nodes) {
      std::vector<std::pair<double, std::int64_t>> groups;
      for (std::int64_t g = 0; g < nodes; ++g) {
        std::vector<double> of_group(scores.begin() + g * per_node,
                                     scores.begin() + (g + 1) * per_node);
        std::sort(of_group.rbegin(), of_group.rend());
        groups.emplace_back(of_group[0] + of_group[1], g);
      }
      std::sort(groups.rbegin(), groups.rend());
      for (auto g = static_cast<std::size_t>(e.node_limit); g < groups.size(); ++g) {
        const std::int64_t out = groups[g].second;
        std::fill(scores.begin() + out * per_node, scores.begin() + (out + 1) * per_node, -1.0);
      }
    }
    std::vector<std::int64_t> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(
        order.begin(), order.begin() + e.top_k, order.end(), [&](std::int64_t a, std::int64_t b) {
          return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)];
        });
    std::set<std::int64_t> hit_nodes, hit_gpus;
    for (std::int64_t k = 0; k < e.top_k; ++k) {
      hit_nodes.insert(order[static_cast<std::size_t>(k)] / per_node);
      hit_gpus.insert(order[static_cast<std::size_t>(k)] / per_gpu);
    }
    sum.nodes += static_cast<double>(hit_nodes.size());
    sum.gpus += static_cast<double>(hit_gpus.size());
  }
  return {sum.nodes / tokens, sum.gpus / tokens};
}

TEST(Exchange, V3RoutingReachesThePublishedNodesAndGpus) {
  const ExpertExchange v3 = routing(64, 256, 8, 4);
  EXPECT_NEAR(mean_nodes_per_token(v3), 3.954, 0.01);
  EXPECT_NEAR(mean_gpus_per_token(v3), 7.50, 0.015);
}

TEST(Exchange, MeansAgreeWithDrawingEveryScore) {
  for (const ExpertExchange& e :
       {routing(64, 256, 8, 4), routing(64, 256, 8, 0), routing(16, 256, 8, 4),
        routing(8, 256, 8, 0), routing(128, 256, 8, 4), routing(32, 160, 6, 3, 4),
        routing(32, 64, 6, 2, 4), routing(4, 16, 2, 0, 2)}) {
    SCOPED_TRACE(std::to_string(e.ep) + " " + std::to_string(e.experts));
    const Drawn drawn = draw(e, 6000);
    EXPECT_NEAR(mean_nodes_per_token(e), drawn.nodes, 0.006 * drawn.nodes);
    EXPECT_NEAR(mean_gpus_per_token(e), drawn.gpus, 0.006 * drawn.gpus);
  }
}

TEST(Exchange, HandCountedCases) {
  // Two of four experts, two on either node: both on one node in 2 of 6 pairs.
  EXPECT_NEAR(mean_nodes_per_token(routing(4, 4, 2, 0, 2)), 1 + 4.0 / 6, 1e-12);
  // One expert: one node, one GPU. All experts: all of them.
  EXPECT_NEAR(mean_nodes_per_token(routing(64, 256, 1, 0)), 1, 1e-12);
  EXPECT_NEAR(mean_gpus_per_token(routing(64, 64, 64, 0)), 64, 1e-12);
  // A limit of one node leaves one node.
  EXPECT_NEAR(mean_nodes_per_token(routing(64, 256, 8, 1)), 1, 1e-12);
}

TEST(Exchange, SameAnswerEveryTime) {
  const double first = mean_gpus_per_token(routing(64, 256, 8, 3));
  mean_gpus_per_token(routing(64, 256, 6, 3));
  EXPECT_EQ(mean_gpus_per_token(routing(64, 256, 8, 3)), first);
}

TEST(Exchange, ReadsTheHopperTable) {
  Problems problems;
  const Node node =
      read_document(ORRERY_SOURCE_DIR "/scenarios/profiles/expert_exchange_hopper.yaml", problems);
  const ExchangeTable table = read_exchange_table(node, problems);
  EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
  ASSERT_EQ(table.machines.size(), 2u);
  EXPECT_EQ(table.machines[0].points.size(), 8u);
  // DeepEP's README: EP64 dispatch 51 GB/s, counted as tokens x nodes x hidden x 2 B x 0.5156.
  for (const ExchangePoint& p : table.machines[0].points) {
    if (p.shape.ep != 64 || p.shape.combine) continue;
    EXPECT_NEAR(4096 * mean_nodes_per_token(p.shape) * 7168 * 2 * 0.5156 / p.seconds, 51e9, 0.2e9);
  }
}

TEST(Exchange, ProblemsOfATableAreLocated) {
  Problems problems;
  const Node node = read_document_text(
      "id: x\nsource: y\nspread: 0.1\ninterpolated_spread: 0.1\nrange: {tokens: [9, 1], hidden: "
      "[1, 2], sms: [1, 2], ep: [1, 2]}\ndispatch: {latency: 1 us}\ncombine: 3\nmachines:\n  - "
      "name: "
      "m\n    source: s\n    nvlink: 1 GB/s\n    nic: 1 GB/s\n    points:\n      - {direction: "
      "dispach, format: bf16, tokens: 1, hidden: 1, top_k: 1, experts: 8, ep: 8, gpus_per_node: 8, "
      "sms: 1, time: 1 us}\n",
      "t.yaml", problems);
  const ExchangeTable table = read_exchange_table(node, problems);
  std::set<int> lines;
  for (const Problem& p : problems.list()) lines.insert(p.at.line);
  EXPECT_EQ(lines, (std::set<int>{5, 6, 7, 14})) << format_problems(problems.list());
  EXPECT_TRUE(table.machines.at(0).points.empty());
}

}  // namespace
}  // namespace orrery
