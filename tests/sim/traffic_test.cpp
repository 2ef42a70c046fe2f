// Ops that share links: against closed forms, and the reduction of links against all links.

#include "sim/traffic.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

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

// --- members that are sent different amounts ----------------------------------------------------

/// Per mille of the mean, of 16 GPUs on 4 nodes: whole tokens of the 64 that each GPU sends each.
const std::vector<std::uint32_t> kUneven = {2000, 500, 1000, 1500, 250,  750,  500,  1000,
                                            1250, 750, 1000, 0,    3000, 1000, 1000, 500};

/// One choice a token: what a GPU is sent is as many tokens as its experts have rows.
ExpertExchange one_choice(bool combine) {
  ExpertExchange e = exchange(combine);
  e.top_k = 1;
  e.busiest_gpu_per_mille = 3000;
  e.busiest_node_per_mille = 1375;
  return e;
}

OpId add_exchange(Steps& s, const ExpertExchange& e, Picoseconds price_ps,
                  const std::vector<std::uint32_t>& loads) {
  std::vector<StreamId> streams;
  for (std::size_t r = 0; r < 16; ++r) streams.push_back(experts(r));
  const OpId op = s.add(e, price_ps, streams);
  if (!loads.empty()) s.builder.member_loads(op, loads);
  return op;
}

std::map<std::string, double> bytes_by_link(const Traffic& traffic, const Traffic::Flow& flow,
                                            Picoseconds price_ps, const Cluster& cluster) {
  std::map<std::string, double> bytes;
  for (const FlowHop& hop : flow.hops) {
    const Traffic::SharedLink& link = traffic.links[hop.link];
    const double bytes_per_s = link.tier == LinkTier::nvlink ? cluster.nvlink.bandwidth_bytes_per_s
                                                             : cluster.nic.bandwidth_bytes_per_s;
    bytes[link.name] = hop.bytes_per_byte * flow.limit * seconds(price_ps) * bytes_per_s;
  }
  return bytes;
}

/// Every token of a matrix of tokens walked the way that DeepEP sends it: by NIC to the GPU of the
/// same place in the other node, from there by NVLink; back the same way.
std::map<std::string, double> walk(bool combine) {
  std::map<std::string, double> bytes;
  const double token = 1024 * 2;
  const auto hop = [&](const char* kind, int from, int to, double tokens) {
    if (combine) std::swap(from, to);
    const auto name = [&](int gpu, const char* part) {
      return fmt::format("node{}/{}{}", gpu / 4, part, gpu % 4);
    };
    const bool near = std::string(kind) == "nvlink";
    bytes[(near ? name(from, "gpu") : name(from, "nic")) + " out"] += tokens * token;
    bytes[(near ? name(to, "gpu") : name(to, "nic")) + " in"] += tokens * token;
  };
  for (int from = 0; from < 16; ++from) {
    for (int to = 0; to < 16; ++to) {
      const double tokens = 64.0 * kUneven[static_cast<std::size_t>(to)] / 1000;
      const int relay = to / 4 * 4 + from % 4;
      if (relay != from) hop("nic", from, relay, tokens);
      if (relay != to) hop("nvlink", relay, to, tokens);
    }
  }
  return bytes;
}

/// "node0/gpu1 -> node0/nvswitch0" is what gpu1 sends: "node0/gpu1 out".
std::string end_of(const std::string& link) {
  const auto arrow = link.find(" -> ");
  const std::string from = link.substr(0, arrow);
  const std::string to = link.substr(arrow + 4);
  const auto host = [](const std::string& end) {
    return end.find("/gpu") != std::string::npos || end.find("/nic") != std::string::npos;
  };
  return host(from) ? from + " out" : to + " in";
}

TEST(Traffic, LinksOfAnExchangeCarryWhatTheMembersBehindThemGet) {
  const Fabric fabric = fabric_of(two_layers(4, 4, 8));
  const Cluster cluster = cluster_of(4, 4);
  for (const bool combine : {false, true}) {
    Steps s(std::vector<std::int64_t>(16, 1));
    const Picoseconds price_ps = 10'000 * kPsPerUs;
    const OpId op = add_exchange(s, one_choice(combine), price_ps, kUneven);
    const Program program = std::move(s.builder).seal();
    const Traffic traffic = traffic_of(program, cluster, fabric);
    const Traffic::Flow flow =
        traffic.flow_of(traffic.pattern_of(op), price_ps, program.member_loads(op));
    const auto expected = walk(combine);
    std::size_t nvlinks = 0;
    double sent = 0;
    double received = 0;
    for (const Traffic::SharedLink& link : traffic.links) {
      if (link.tier == LinkTier::leaf_spine) continue;
      const std::string end = end_of(link.name);
      const auto carried = bytes_by_link(traffic, flow, price_ps, cluster);
      const double bytes = carried.count(link.name) == 0 ? 0 : carried.at(link.name);
      const double walked = expected.count(end) == 0 ? 0 : expected.at(end);
      EXPECT_NEAR(bytes, walked, 1e-6 * 64 * 2048) << link.name << (combine ? " combine" : "");
      nvlinks += link.tier == LinkTier::nvlink;
      if (link.tier != LinkTier::nic) continue;
      const bool out_of_it = end.find(" out") != std::string::npos;
      (out_of_it ? sent : received) += bytes * static_cast<double>(link.stands_for);
    }
    EXPECT_EQ(nvlinks, 32u);  // none stands for another
    EXPECT_GT(sent, 0);
    EXPECT_NEAR(sent, received, 1e-9 * sent);
    // Sums of tiers follow: over all links what was walked, NICs and NVLinks by themselves.
    std::map<bool, double> walked_s;
    for (const auto& [end, bytes] : expected) {
      const bool near = end.find("/gpu") != std::string::npos;
      walked_s[near] += bytes / (near ? 100e9 : 10e9);
    }
    const auto tier = [&](LinkTier t) { return traffic.tiers[static_cast<std::size_t>(t)].busy_s; };
    EXPECT_NEAR(tier(LinkTier::nvlink), walked_s[true], 1e-9);
    EXPECT_NEAR(tier(LinkTier::nic), walked_s[false], 1e-9);
  }
}

TEST(Traffic, MembersThatAreAllSentTheMeanAreAsWithoutLoads) {
  const Fabric fabric = fabric_of(two_layers(4, 4, 8));
  const Cluster cluster = cluster_of(4, 4);
  for (const bool combine : {false, true}) {
    const auto end_of_send = [&](const std::vector<std::uint32_t>& loads) {
      Steps s(std::vector<std::int64_t>(16, 1));
      add_exchange(s, exchange(combine), 400 * kPsPerUs, loads);
      for (std::size_t r = 0; r < 8; ++r) {
        s.add(Send{.bytes = 5'000'000}, 600 * kPsPerUs, {out(r), in(r + 8)});
      }
      const Program program = std::move(s.builder).seal();
      const Traffic traffic = traffic_of(program, cluster, fabric);
      const Timeline t = simulate(program, s.prices, {&traffic});
      EXPECT_GT(t.end_ps[OpId(1)], 600 * kPsPerUs);  // they do share
      std::vector<double> busy;
      for (const TierUse& use : traffic.tiers) busy.push_back(use.busy_s);
      return std::pair(t.fingerprint(), busy);
    };
    EXPECT_EQ(end_of_send({}), end_of_send(std::vector<std::uint32_t>(16, 1000)));
  }
}

TEST(Traffic, ASendIntoANodeThatGetsLittleIsNotHeldUp) {
  // A fifth node, of which one GPU sends into a node of the group beside the exchange.
  const Fabric fabric = fabric_of(two_layers(5, 4, 16));
  const Cluster cluster = cluster_of(5, 4);
  // Every NIC of a node of mean load gets 12 of 16 blocks of 64 tokens, here in half of the time.
  const double price_s = 2 * 12.0 * 64 * 2048 / 10e9;
  const auto sent_over_price = [&](std::size_t to, const std::vector<std::uint32_t>& loads) {
    Steps s(std::vector<std::int64_t>(20, 1));
    add_exchange(s, one_choice(false), from_seconds(price_s), loads);
    const Send send{.bytes = std::llround(0.6 * 10e9 * price_s)};
    const OpId op = s.add(send, from_seconds(price_s), {out(16), in(to)});
    const Program program = std::move(s.builder).seal();
    const Traffic traffic = traffic_of(program, cluster, fabric);
    return seconds(simulate(program, s.prices, {&traffic}).end_ps[op]) / price_s;
  };
  // Node 3 gets 1.375 of the mean: 0.6875 of a NIC. Both share it evenly and the send ends first,
  // after 0.6 / 0.5. Node 1 gets 0.625, and 0.3125 + 0.6 fit. With the busiest on all links both do
  // what node 3 does.
  EXPECT_NEAR(sent_over_price(12, kUneven), 1.2, 1e-6);
  EXPECT_NEAR(sent_over_price(4, kUneven), 1, 1e-6);
  EXPECT_NEAR(sent_over_price(12, {}), 1.2, 1e-6);
  EXPECT_NEAR(sent_over_price(4, {}), 1.2, 1e-6);
}

}  // namespace
}  // namespace orrery
