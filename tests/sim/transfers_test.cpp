// Who sends how much to whom, against closed forms.

#include "sim/transfers.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>

namespace orrery {
namespace {

/// `nodes` nodes with `members` members each, every node with 8 GPUs.
std::vector<std::vector<GpuId>> group(std::size_t nodes, std::size_t members) {
  std::vector<std::vector<GpuId>> made(nodes);
  for (std::size_t n = 0; n < nodes; ++n) {
    for (std::size_t i = 0; i < members; ++i) made[n].emplace_back(8 * n + i);
  }
  return made;
}

struct Sums {
  std::map<GpuId, double> sent;
  std::map<GpuId, double> received;
};

Sums sums(const std::vector<Transfer>& transfers) {
  Sums s;
  for (const Transfer& t : transfers) {
    EXPECT_NE(t.from, t.to);
    s.sent[t.from] += t.bytes;
    s.received[t.to] += t.bytes;
  }
  return s;
}

void expect_everyone_sends_and_receives_one(const std::vector<Transfer>& transfers,
                                            std::size_t gpus) {
  const Sums s = sums(transfers);
  EXPECT_EQ(s.sent.size(), gpus);
  for (const auto& [gpu, bytes] : s.sent) EXPECT_NEAR(bytes, 1, 1e-12) << gpu.value;
  for (const auto& [gpu, bytes] : s.received) EXPECT_NEAR(bytes, 1, 1e-12) << gpu.value;
}

TEST(Transfers, SymmetricPatternsLoadEveryoneAlike) {
  for (const auto pattern : {CommunicationPattern::ring, CommunicationPattern::all_to_all,
                             CommunicationPattern::dispatch, CommunicationPattern::combine}) {
    for (const auto& [nodes, members] : {std::pair{1, 8}, {2, 8}, {8, 8}, {3, 4}, {5, 2}}) {
      SCOPED_TRACE(std::string(name_of(pattern)));
      const auto n = static_cast<std::size_t>(nodes);
      const auto m = static_cast<std::size_t>(members);
      const UnitTransfers unit = unit_transfers(pattern, group(n, m));
      expect_everyone_sends_and_receives_one(unit.near, n * m);
      if (nodes > 1) expect_everyone_sends_and_receives_one(unit.far, n * m);
      EXPECT_EQ(unit.far.empty(), nodes == 1);
      for (const Transfer& t : unit.near) EXPECT_EQ(t.from.value / 8, t.to.value / 8);
      for (const Transfer& t : unit.far) EXPECT_NE(t.from.value / 8, t.to.value / 8);
    }
  }
}

TEST(Transfers, DispatchCrossesNodesOnItsOwnRail) {
  // DeepEP: a token goes to the GPU of the same index in the other node, which passes it on.
  for (const auto pattern : {CommunicationPattern::dispatch, CommunicationPattern::combine}) {
    const UnitTransfers unit = unit_transfers(pattern, group(8, 8));
    EXPECT_EQ(unit.far.size(), 8u * 8 * 7);
    for (const Transfer& t : unit.far) {
      EXPECT_EQ(t.from.value % 8, t.to.value % 8);
      EXPECT_DOUBLE_EQ(t.bytes, 1.0 / 7);
    }
  }
}

TEST(Transfers, RingsCrossNodesOnAllRails) {
  const UnitTransfers unit = unit_transfers(CommunicationPattern::ring, group(4, 8));
  std::set<std::pair<std::uint32_t, std::uint32_t>> hops;
  for (const Transfer& t : unit.far) {
    EXPECT_EQ(t.from.value % 8, t.to.value % 8);
    hops.insert({t.from.value / 8, t.to.value / 8});
  }
  const std::set<std::pair<std::uint32_t, std::uint32_t>> ring = {{0, 1}, {1, 2}, {2, 3}, {3, 0}};
  EXPECT_EQ(hops, ring);
}

TEST(Transfers, TheDoubleTreeSharesTheWork) {
  // Sanders, Speck and Traff (Parallel Computing 35, 2009): with two trees in which whoever is
  // inside in one is a leaf in the other, no node passes more than 2 S up and down together, S up
  // and S down at most with two nodes. Here the busiest sends 1.
  for (const std::size_t nodes : {2u, 4u, 8u, 16u, 64u}) {
    const UnitTransfers unit = unit_transfers(CommunicationPattern::tree, group(nodes, 8));
    const Sums s = sums(unit.far);
    double least = 1;
    double total = 0;
    for (const auto& [gpu, bytes] : s.sent) {
      EXPECT_LE(bytes, 1 + 1e-12);
      EXPECT_DOUBLE_EQ(bytes, s.received.at(gpu));  // up and down are the same edges
      least = std::min(least, bytes);
      total += bytes;
    }
    // Two trees of N - 1 edges, each carrying S/2 up and S/2 down: 2 (N - 1) S per rail in all. The
    // busiest node is inside in one tree (S/2 up, S down; the root of four has no way up) and a
    // leaf of the other (S/2 up).
    const double s_units = nodes == 2 ? 1 : nodes == 4 ? 1 / 1.5 : 0.5;
    EXPECT_NEAR(total, 8 * 2 * static_cast<double>(nodes - 1) * s_units, 1e-9);
    EXPECT_GE(least, 0.25);
  }
}

TEST(Transfers, ASmallerNodesLastMemberStandsIn) {
  auto nodes = group(2, 2);
  nodes[1].pop_back();
  const UnitTransfers unit = unit_transfers(CommunicationPattern::ring, nodes);
  const Sums s = sums(unit.far);
  EXPECT_DOUBLE_EQ(s.sent.at(GpuId(8)), 1);  // for both rails
  EXPECT_DOUBLE_EQ(s.sent.at(GpuId(0)), 0.5);
  EXPECT_DOUBLE_EQ(s.sent.at(GpuId(1)), 0.5);
}

}  // namespace
}  // namespace orrery
