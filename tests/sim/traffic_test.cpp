// Ops that share links: against closed forms, and the reduction of links against all links.

#include "sim/traffic.hpp"

#include <gtest/gtest.h>

#include <array>
#include <string>

#include "sim/timeline.hpp"
#include "tests/sim/networks_for_tests.hpp"

namespace orrery {
namespace {

using test::cluster_of;
using test::fabric_of;
using test::two_layers;

/// A Program whose prices are stated.
struct Steps {
  explicit Steps(std::vector<std::int64_t> multiplicity) : builder(std::move(multiplicity)) {}

  template <class Work>
  OpId add(Work work, Picoseconds price_ps, const std::vector<StreamId>& streams,
           const std::vector<OpId>& after = {}) {
    const ShapeId shape = builder.intern(
        {.work = work, .label = fmt::format("op{}", prices.prices.size()), .sms = 0});
    prices.prices.push_back({.time_ps = price_ps});
    const bool send = std::is_same_v<Work, Send>;
    const bool compute = std::is_same_v<Work, Mark>;
    return builder.add(compute ? OpKind::compute
                       : send  ? OpKind::transfer
                               : OpKind::collective,
                       shape, {}, streams, after);
  }

  ProgramBuilder builder;
  PriceList prices;
};

StreamId out(std::size_t rank) {
  return stream_of(RankId(rank), StreamKind::send_next);
}
StreamId in(std::size_t rank) {
  return stream_of(RankId(rank), StreamKind::receive_previous);
}
StreamId experts(std::size_t rank) {
  return stream_of(RankId(rank), StreamKind::expert_exchange);
}
StreamId data(std::size_t rank) {
  return stream_of(RankId(rank), StreamKind::data);
}

TEST(Traffic, AloneAnOpTakesItsPrice) {
  const Fabric fabric = fabric_of(two_layers(4, 1, 4));
  Steps s({1, 1, 1, 1});
  // 10 MB on a NIC of 10 GB/s are 1 ms; the price knows of 0.2 ms more.
  const OpId op = s.add(Send{.bytes = 10'000'000}, 1'200 * kPsPerUs, {out(0), in(1)});
  const Program program = std::move(s.builder).seal();
  const Traffic traffic = traffic_of(program, cluster_of(4, 1), fabric);
  const Timeline t = simulate(program, s.prices, {&traffic});
  EXPECT_EQ(t.end_ps[op], 1'200 * kPsPerUs);
  EXPECT_EQ(t.fingerprint(), sweep(program, s.prices).fingerprint());
}

TEST(Traffic, TwoIntoOneNicShareIt) {
  const Fabric fabric = fabric_of(two_layers(4, 1, 4));
  Steps s({1, 1, 1, 1});
  // Each would use the NIC of rank 2 for 1 ms out of 1.25 ms.
  const OpId a = s.add(Send{.bytes = 10'000'000}, 1'250 * kPsPerUs, {out(0), in(2)});
  const OpId b = s.add(Send{.bytes = 10'000'000}, 1'250 * kPsPerUs, {out(1), data(2)});
  const Program program = std::move(s.builder).seal();
  const Traffic traffic = traffic_of(program, cluster_of(4, 1), fabric);
  const Timeline t = simulate(program, s.prices, {&traffic});
  // 20 MB at 10 GB/s; each runs at 5 of the 8 GB/s that it could.
  EXPECT_NEAR(seconds(t.end_ps[a]), 2e-3, 1e-9);
  EXPECT_NEAR(seconds(t.end_ps[b]), 2e-3, 1e-9);
  double held_back = 0;
  for (const double s_ : t.held_back_s) held_back += s_;
  EXPECT_NEAR(held_back, 2 * 2e-3 * (1 - 5.0 / 8), 1e-9);
}

TEST(Traffic, LanesShareByTheirWeights) {
  const Fabric fabric = fabric_of(two_layers(4, 1, 4));
  Cluster cluster = cluster_of(4, 1);
  cluster.lanes.pipeline = 3;
  Steps s({1, 1, 1, 1});
  const OpId a = s.add(Send{.bytes = 30'000'000}, 3'000 * kPsPerUs, {out(0), in(2)});
  const OpId b = s.add(Send{.bytes = 30'000'000}, 3'000 * kPsPerUs, {data(1), data(2)});
  const Program program = std::move(s.builder).seal();
  const Traffic traffic = traffic_of(program, cluster, fabric);
  const Timeline t = simulate(program, s.prices, {&traffic});
  // 7.5 GB/s for 4 ms; the other has sent 10 MB then and sends 20 MB in 2 ms.
  EXPECT_NEAR(seconds(t.end_ps[a]), 4e-3, 1e-9);
  EXPECT_NEAR(seconds(t.end_ps[b]), 6e-3, 1e-9);
}

TEST(Traffic, AnOverSubscribedLeafStretchesWhatCrossesIt) {
  // Leaves with 6 ports down and 2 up: six senders of one leaf share 20 GB/s.
  const std::string text = two_layers(12, 1, 8, "rail_optimised: false\nover_subscription: 3\n");
  const Fabric fabric = fabric_of(text);
  Steps s(std::vector<std::int64_t>(12, 1));
  std::vector<OpId> ops;
  for (std::size_t r = 0; r < 6; ++r) {
    ops.push_back(s.add(Send{.bytes = 10'000'000}, 1'000 * kPsPerUs, {out(r), in(r + 6)}));
  }
  const Program program = std::move(s.builder).seal();
  const Traffic traffic = traffic_of(program, cluster_of(12, 1), fabric);
  const Timeline t = simulate(program, s.prices, {&traffic});
  for (const OpId op : ops) EXPECT_NEAR(seconds(t.end_ps[op]), 3e-3, 1e-9);
  const TierUse& up = traffic.tiers[static_cast<std::size_t>(LinkTier::leaf_spine)];
  EXPECT_NEAR(up.busiest_s, 3e-3, 1e-9);
}

TEST(Traffic, OneOpAloneIsStretchedByAThinFabricToo) {
  // The class of 6 ranks sends all together: 60 MB over 20 GB/s.
  const std::string text = two_layers(12, 1, 8, "rail_optimised: false\nover_subscription: 3\n");
  const Fabric fabric = fabric_of(text);
  Steps s({6, 6});
  const OpId op = s.add(Send{.bytes = 10'000'000}, 1'000 * kPsPerUs, {out(0), in(1)});
  const Program program = std::move(s.builder).seal();
  const Traffic traffic = traffic_of(program, cluster_of(12, 1), fabric);
  EXPECT_NEAR(seconds(simulate(program, s.prices, {&traffic}).end_ps[op]), 3e-3, 1e-9);
}

ExpertExchange exchange(bool combine) {
  ExpertExchange e;
  e.combine = combine;
  e.format = NumberFormat::bf16;
  e.tokens = 1024;
  e.hidden = 1024;
  e.top_k = 2;
  e.experts = 32;
  e.ep = 16;
  e.gpus_per_node = 4;
  return e;
}

TEST(Traffic, AClassCarriesWhatAllItsRanksDo) {
  // 2 positions x 16 ranks in 4 nodes each, expert groups of 16, gradients over strided groups.
  const Fabric fabric = fabric_of(two_layers(8, 4, 16));
  const Cluster cluster = cluster_of(8, 4);
  const Collective gradients{CollectiveKind::reduce_scatter, 50'000'000, 8, 2, 2};
  const auto build = [&](bool all) {
    Steps s(all ? std::vector<std::int64_t>(32, 1) : std::vector<std::int64_t>(2, 16));
    const std::size_t replicas = all ? 16 : 1;
    for (std::size_t p = 0; p < 2; ++p) {
      std::vector<StreamId> streams;
      for (std::size_t r = 0; r < replicas; ++r) streams.push_back(experts(p * replicas + r));
      s.add(exchange(p == 1), 400 * kPsPerUs, streams);
      // Groups {0, 2, .., 14} and {1, 3, .., 15} of a position.
      for (std::size_t g = 0; g < (all ? 2u : 1u); ++g) {
        streams.clear();
        for (std::size_t r = g; r < replicas; r += 2) streams.push_back(data(p * replicas + r));
        s.add(gradients, 3'000 * kPsPerUs, streams);
      }
    }
    const ShapeId shape = s.builder.intern({.work = Send{.bytes = 5'000'000}, .label = "send"});
    s.prices.prices.push_back({.time_ps = 600 * kPsPerUs});
    for (std::size_t r = 0; r < replicas; ++r) {
      const std::array<StreamId, 2> streams = {out(r), in(replicas + r)};
      s.builder.add(OpKind::transfer, shape, {}, streams, {});
    }
    return s;
  };
  Steps one = build(false);
  Steps all = build(true);
  const Program class_program = std::move(one.builder).seal();
  const Program all_program = std::move(all.builder).seal();
  const Traffic class_traffic = traffic_of(class_program, cluster, fabric);
  const Traffic all_traffic = traffic_of(all_program, cluster, fabric);
  for (std::size_t tier = 0; tier < kLinkTiers; ++tier) {
    EXPECT_EQ(class_traffic.tiers[tier].links, all_traffic.tiers[tier].links);
    EXPECT_NEAR(class_traffic.tiers[tier].busy_s, all_traffic.tiers[tier].busy_s, 1e-12);
    EXPECT_NEAR(class_traffic.tiers[tier].busiest_s, all_traffic.tiers[tier].busiest_s, 1e-12);
  }
  EXPECT_LT(class_traffic.links.size(), 20u);
  const Timeline a = simulate(class_program, one.prices, {&class_traffic});
  const Timeline b = simulate(all_program, all.prices, {&all_traffic});
  EXPECT_GT(a.makespan_ps(), sweep(class_program, one.prices).makespan_ps());
  EXPECT_NEAR(seconds(a.makespan_ps()), seconds(b.makespan_ps()), 1e-3 * seconds(a.makespan_ps()));
}

TEST(Traffic, AFailedLinkLoadsTheOthers) {
  // Two spines; without one of them a leaf has half of its way out.
  const std::string plain = two_layers(8, 1, 4, "rail_optimised: false\n");
  const Fabric whole = fabric_of(plain);
  const Fabric broken = fabric_of(plain + "faults: [{link: leaf0 <-> spine0, failed: true}]\n");
  Steps s({4, 4});
  const OpId op = s.add(Send{.bytes = 10'000'000}, 1'000 * kPsPerUs, {out(0), in(1)});
  const Program program = std::move(s.builder).seal();
  const Traffic before = traffic_of(program, cluster_of(8, 1), whole);
  const Traffic after = traffic_of(program, cluster_of(8, 1), broken);
  EXPECT_NEAR(seconds(simulate(program, s.prices, {&before}).end_ps[op]), 1e-3, 1e-12);
  EXPECT_NEAR(seconds(simulate(program, s.prices, {&after}).end_ps[op]), 2e-3, 1e-9);
}

TEST(Traffic, EcmpCollidesWhereSprayingDoesNot) {
  // Sixteen leaves of eight, eight spines, one cable between each two.
  const Fabric fabric = fabric_of(two_layers(128, 1, 16, "rail_optimised: false\n"));
  Cluster cluster = cluster_of(128, 1);
  Steps s({64, 64});
  const OpId op = s.add(Send{.bytes = 10'000'000}, 1'000 * kPsPerUs, {out(0), in(1)});
  const Program program = std::move(s.builder).seal();
  const auto end_s = [&] {
    const Traffic traffic = traffic_of(program, cluster, fabric);
    return seconds(simulate(program, s.prices, {&traffic}).end_ps[op]);
  };
  EXPECT_NEAR(end_s(), 1e-3, 1e-12);
  cluster.load_balancing = LoadBalancing::ecmp;
  // Some cable gets two of its leaf's eight flows: 8! / 8^8 = 0.2 % of leaves have no such cable.
  EXPECT_GE(end_s(), 2e-3 - 1e-9);
  cluster.ecmp_flows = 16;
  EXPECT_LT(end_s(), 2e-3);
}

}  // namespace
}  // namespace orrery
