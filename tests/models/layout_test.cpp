// Layout against a second construction: nested loops over the coordinates in the documented order
// number the ranks, and groups are found by comparing coordinate tuples.

#include "models/layout.hpp"

#include <gtest/gtest.h>

#include <array>
#include <map>
#include <set>
#include <tuple>
#include <vector>

namespace orrery {
namespace {

constexpr std::array kKinds = {GroupKind::tensor,  GroupKind::context,       GroupKind::data,
                               GroupKind::expert,  GroupKind::expert_tensor, GroupKind::expert_data,
                               GroupKind::position};

Parallelism degrees(std::int64_t tp, std::int64_t cp, std::int64_t pp, std::int64_t dp,
                    std::int64_t ep = 1, std::int64_t expert_tp = 1) {
  Parallelism p;
  p.tp = tp;
  p.cp = cp;
  p.pp = pp;
  p.dp = dp;
  p.ep = ep;
  p.expert_tp = expert_tp;
  return p;
}

/// Coordinates of every rank, by counting: the innermost loop is the fastest coordinate.
std::vector<Coordinates> count_ranks(const Parallelism& p) {
  std::vector<Coordinates> ranks;
  for (std::int64_t pp = 0; pp < p.pp; ++pp)
    for (std::int64_t dp = 0; dp < p.dp; ++dp)
      for (std::int64_t cp = 0; cp < p.cp; ++cp)
        for (std::int64_t tp = 0; tp < p.tp; ++tp) {
          Coordinates c;
          c.pp = pp;
          c.dp = dp;
          c.cp = cp;
          c.tp = tp;
          ranks.push_back(c);
        }
  const std::int64_t expert_dp_size = p.tp * p.cp * p.dp / (p.ep * p.expert_tp);
  std::size_t next = 0;
  for (std::int64_t pp = 0; pp < p.pp; ++pp)
    for (std::int64_t expert_dp = 0; expert_dp < expert_dp_size; ++expert_dp)
      for (std::int64_t ep = 0; ep < p.ep; ++ep)
        for (std::int64_t expert_tp = 0; expert_tp < p.expert_tp; ++expert_tp) {
          Coordinates& c = ranks.at(next++);
          c.expert_dp = expert_dp;
          c.ep = ep;
          c.expert_tp = expert_tp;
        }
  return ranks;
}

/// What the members of one group have in common besides the position.
std::pair<std::int64_t, std::int64_t> shared_coordinates(GroupKind kind, const Coordinates& c) {
  switch (kind) {
    case GroupKind::tensor:
      return {c.dp, c.cp};
    case GroupKind::context:
      return {c.dp, c.tp};
    case GroupKind::data:
      return {c.tp, 0};
    case GroupKind::expert:
      return {c.expert_dp, c.expert_tp};
    case GroupKind::expert_tensor:
      return {c.expert_dp, c.ep};
    case GroupKind::expert_data:
      return {c.ep, c.expert_tp};
    case GroupKind::position:
      return {0, 0};
  }
  return {-1, -1};
}

void expect_matches_counting(const Parallelism& p, std::int64_t gpus_per_node) {
  SCOPED_TRACE(testing::Message() << "tp " << p.tp << " cp " << p.cp << " pp " << p.pp << " dp "
                                  << p.dp << " ep " << p.ep << " expert_tp " << p.expert_tp
                                  << " on nodes of " << gpus_per_node);
  const Layout layout(p, gpus_per_node);
  const std::vector<Coordinates> ranks = count_ranks(p);
  ASSERT_EQ(layout.world(), static_cast<std::int64_t>(ranks.size()));
  ASSERT_EQ(layout.positions() * layout.slots(), layout.world());
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    const Coordinates& want = ranks[r];
    const Coordinates got = layout.coordinates(static_cast<std::int64_t>(r));
    ASSERT_EQ(std::tie(got.pp, got.dp, got.cp, got.tp, got.expert_dp, got.ep, got.expert_tp),
              std::tie(want.pp, want.dp, want.cp, want.tp, want.expert_dp, want.ep, want.expert_tp))
        << "rank " << r;
  }
  for (const GroupKind kind : kKinds) {
    SCOPED_TRACE(testing::Message() << "group kind " << static_cast<int>(kind));
    std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::int64_t>> groups;
    for (std::int64_t slot = 0; slot < layout.slots(); ++slot) {
      groups[shared_coordinates(kind, ranks[static_cast<std::size_t>(slot)])].push_back(slot);
    }
    ASSERT_EQ(layout.group_count(kind), static_cast<std::int64_t>(groups.size()));
    std::int64_t most_on_a_node = 0;
    std::set<std::int64_t> seen;
    for (const auto& [key, slots] : groups) {
      ASSERT_EQ(layout.group_size(kind), static_cast<std::int64_t>(slots.size()));
      const std::int64_t group = layout.group_of(kind, slots.front());
      EXPECT_TRUE(seen.insert(group).second) << "two groups are called " << group;
      EXPECT_GE(group, 0);
      EXPECT_LT(group, layout.group_count(kind));
      for (const std::int64_t slot : slots) EXPECT_EQ(layout.group_of(kind, slot), group);
      EXPECT_EQ(layout.members(kind, group), slots);
      std::map<std::int64_t, std::int64_t> on_node;
      for (const std::int64_t slot : slots) {
        most_on_a_node = std::max(most_on_a_node, ++on_node[slot / gpus_per_node]);
      }
    }
    EXPECT_EQ(layout.members_per_node(kind), most_on_a_node);
  }
  for (std::int64_t a = 0; a < p.pp; ++a) {
    for (std::int64_t b = 0; b < p.pp; ++b) {
      bool together = true;
      for (std::int64_t slot = 0; slot < layout.slots(); ++slot) {
        together = together && (a * layout.slots() + slot) / gpus_per_node ==
                                   (b * layout.slots() + slot) / gpus_per_node;
      }
      EXPECT_EQ(layout.same_node(a, b), together) << a << " and " << b;
    }
  }
}

TEST(Layout, AllSmallLayoutsMatchCounting) {
  int layouts = 0;
  for (std::int64_t tp = 1; tp <= 4; ++tp)
    for (std::int64_t cp = 1; cp <= 3; ++cp)
      for (std::int64_t pp = 1; pp <= 3; ++pp)
        for (std::int64_t dp = 1; dp <= 4; ++dp)
          for (std::int64_t ep = 1; ep <= tp * cp * dp; ++ep)
            for (const std::int64_t expert_tp : {1, 2, 3, 4}) {
              if (tp * cp * dp % (ep * expert_tp) != 0) continue;
              for (const std::int64_t gpus_per_node : {1, 3, 8}) {
                expect_matches_counting(degrees(tp, cp, pp, dp, ep, expert_tp), gpus_per_node);
                ++layouts;
                if (HasFailure()) return;
              }
            }
  EXPECT_GT(layouts, 1000);
}

// V3 report 3.2: 16-way pipeline, 64-way expert parallelism over 8 nodes, no tensor parallelism.
TEST(Layout, DeepSeekV3SpansEightNodesPerExpertGroup) {
  const Layout layout(degrees(1, 1, 16, 128, 64), 8);
  EXPECT_EQ(layout.world(), 2048);
  EXPECT_EQ(layout.slots(), 128);
  EXPECT_EQ(layout.group_size(GroupKind::expert), 64);
  EXPECT_EQ(layout.group_count(GroupKind::expert), 2);
  EXPECT_EQ(layout.members_per_node(GroupKind::expert), 8);
  std::set<std::int64_t> nodes;
  for (const std::int64_t slot : layout.members(GroupKind::expert, 1))
    nodes.insert(layout.node(slot));
  EXPECT_EQ(nodes, (std::set<std::int64_t>{8, 9, 10, 11, 12, 13, 14, 15}));
  EXPECT_EQ(layout.group_size(GroupKind::data), 128);
  EXPECT_EQ(layout.group_size(GroupKind::expert_data), 2);
  EXPECT_EQ(layout.members(GroupKind::expert_data, 5), (std::vector<std::int64_t>{5, 69}));
  EXPECT_EQ(layout.members_per_node(GroupKind::expert_data), 1);
  EXPECT_FALSE(layout.same_node(0, 1));
}

// The example in the docstring of Megatron-LM's initialize_model_parallel: 16 GPUs, tensor 2,
// pipeline 4. Its 8 data-parallel groups are [g0, g2], [g1, g3], [g4, g6] ..., its 8
// tensor-parallel groups [g0, g1], [g2, g3] ..., its 4 pipeline groups [g0, g4, g8, g12], [g1, g5,
// g9, g13] ...
TEST(Layout, MegatronsDocumentedExample) {
  const Layout layout(degrees(2, 1, 4, 2), 8);
  using Ranks = std::vector<std::int64_t>;
  const auto ranks = [&](GroupKind kind, std::int64_t position, std::int64_t group) {
    Ranks result;
    for (const std::int64_t slot : layout.members(kind, group)) {
      result.push_back(layout.rank(position, slot));
    }
    return result;
  };
  EXPECT_EQ(ranks(GroupKind::data, 0, 0), (Ranks{0, 2}));
  EXPECT_EQ(ranks(GroupKind::data, 0, 1), (Ranks{1, 3}));
  EXPECT_EQ(ranks(GroupKind::data, 1, 0), (Ranks{4, 6}));
  EXPECT_EQ(ranks(GroupKind::data, 3, 1), (Ranks{13, 15}));
  EXPECT_EQ(ranks(GroupKind::tensor, 0, 0), (Ranks{0, 1}));
  EXPECT_EQ(ranks(GroupKind::tensor, 0, 1), (Ranks{2, 3}));
  EXPECT_EQ(ranks(GroupKind::tensor, 3, 1), (Ranks{14, 15}));
  Ranks pipeline;
  for (std::int64_t position = 0; position < 4; ++position)
    pipeline.push_back(layout.rank(position, 1));
  EXPECT_EQ(pipeline, (Ranks{1, 5, 9, 13}));
  EXPECT_TRUE(layout.same_node(0, 1));   // ranks 0-3 and 4-7
  EXPECT_FALSE(layout.same_node(1, 2));  // 4-7 and 8-11
}

// The same example: of the data-parallel ranks {0, 2} of position 0 and {4, 6} of position 1 all
// sit on the first node of 8; position 2's {8, 10} do not.
TEST(Layout, CountsMembersOfSeveralPositionsThatShareANode) {
  const Layout layout(degrees(2, 1, 4, 2), 8);
  const int neighbours[] = {0, 1}, apart[] = {0, 3}, all[] = {0, 1, 2, 3};
  EXPECT_EQ(layout.members_per_node(GroupKind::data), 2);
  EXPECT_EQ(layout.members_per_node(GroupKind::data, neighbours), 4);
  EXPECT_EQ(layout.members_per_node(GroupKind::data, apart), 2);
  EXPECT_EQ(layout.members_per_node(GroupKind::data, all), 4);
  EXPECT_EQ(layout.members_per_node(GroupKind::position, all), 8);
}

}  // namespace
}  // namespace orrery
