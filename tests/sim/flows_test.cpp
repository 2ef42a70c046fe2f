// Flows against closed forms, against the definition of max-min fairness at every event of random
// networks, and against another simulator.

#include "sim/flows.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "tests/sim/all_to_all.hpp"

namespace orrery {
namespace {

constexpr double kGB = 1e9;  // over 1 GB/s: 1 byte per nanosecond

using Path = std::vector<LinkId>;

IdVector<LinkId, Link> links_of(std::initializer_list<double> gb_per_s) {
  IdVector<LinkId, Link> links;
  for (const double rate : gb_per_s) links.push_back({rate * kGB, 0});
  return links;
}

Picoseconds end_of(const std::vector<Completion>& done, FlowId flow) {
  for (const Completion& c : done) {
    if (c.flow == flow) return c.at_ps;
  }
  return -1;
}

TEST(Flows, TwoOnOneLinkShareItUntilTheShorterIsDone) {
  IdVector<LinkId, Link> links{{1 * kGB, 5 * kPsPerUs}};
  FlowNetwork network(links);
  const FlowId longer = network.start(0, Path{LinkId(0)}, 3000);
  const FlowId shorter = network.start(0, Path{LinkId(0)}, 1000);
  const auto done = network.run_until_idle();
  // 5 us of latency, 2 us at half the rate, then 2000 bytes are left.
  const std::vector<Completion> expected{{7 * kPsPerUs, shorter}, {9 * kPsPerUs, longer}};
  EXPECT_EQ(done, expected);
  EXPECT_EQ(network.now_ps(), 9 * kPsPerUs);
  EXPECT_FALSE(network.next_event_ps());
}

TEST(Flows, TheParkingLotGivesTheLongFlowItsWorstLink) {
  FlowNetwork network(links_of({8, 8, 8}));
  const FlowId through = network.start(0, Path{LinkId(0), LinkId(1), LinkId(2)}, 1e6);
  const FlowId alone = network.start(0, Path{LinkId(0)}, 1e6);
  const FlowId of_two = network.start(0, Path{LinkId(1)}, 1e6, 0, 2);
  const FlowId of_three = network.start(0, Path{LinkId(2)}, 1e6, 0, 3);
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(through), 2 * kGB);  // 8 / (1 + 3)
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(of_three), 2 * kGB);
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(of_two), 3 * kGB);  // (8 - 2) / 2
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(alone), 6 * kGB);   // 8 - 2
}

TEST(Flows, ALimitedFlowLeavesTheRestToTheOthers) {
  FlowNetwork network(links_of({10}));
  const FlowId limited = network.start(0, Path{LinkId(0)}, 1e6, 1 * kGB);
  const FlowId loose = network.start(0, Path{LinkId(0)}, 1e6, 7 * kGB);
  const FlowId free = network.start(0, Path{LinkId(0)}, 1e6);
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(limited), 1 * kGB);
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(loose), 4.5 * kGB);
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(free), 4.5 * kGB);
  network.run_until_idle();
  const FlowId last = network.start(network.now_ps(), Path{LinkId(0)}, 1e6, 7 * kGB);
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(last), 7 * kGB);
}

TEST(Flows, ABundleSlowsOthersByWhatItPutsOnTheirLinks) {
  // The bundle puts a quarter of its bytes on link 1; its own limit is 8 GB/s, link 0 gives it 6.
  FlowNetwork network(links_of({6, 10}));
  const std::array hops{FlowHop{LinkId(0), 1}, FlowHop{LinkId(1), 0.25}};
  const FlowId bundle = network.start(0, hops, 6000, 8 * kGB);
  const FlowId beside = network.start(0, Path{LinkId(1)}, 8500);
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(bundle), 6 * kGB);
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(beside), 8.5 * kGB);
  network.run_until_idle();
  // A quarter of the microsecond was lost to link 0; the flow without a limit lost all to link 1.
  EXPECT_DOUBLE_EQ(network.held_back_s(LinkId(0)), 0.25e-6);
  EXPECT_DOUBLE_EQ(network.held_back_s(LinkId(1)), 1e-6);
}

TEST(Flows, ShareByWeight) {
  FlowNetwork network(links_of({8}));
  const std::array hop{FlowHop{LinkId(0), 1}};
  const FlowId heavy = network.start(0, hop, 1e6, 0, 3);
  const FlowId light = network.start(0, hop, 1e6, 0, 1);
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(heavy), 6 * kGB);
  EXPECT_DOUBLE_EQ(network.rate_bytes_per_s(light), 2 * kGB);
}

TEST(Flows, UndisturbedOnesTakeTheirTimeToThePicosecond) {
  // Of any duration and any use of the link that a double can say.
  for (Picoseconds ps = 3; ps < 4'000'000'000'000; ps = ps * 17 / 7 + 1) {
    for (const double use : {1.0, 0.3, 0.70710678, 1 / 3.0, 1e-3}) {
      FlowNetwork network(IdVector<LinkId, Link>{{1e12, 0}});
      const std::array hop{FlowHop{LinkId(0), 1}};
      network.start(0, hop, static_cast<double>(ps) * use, use * 1e12);
      EXPECT_EQ(network.run_until_idle()[0].at_ps, ps) << use;
    }
  }
}

TEST(Flows, ALateStartSlowsWhatIsUnderWay) {
  FlowNetwork network(links_of({1}));
  const FlowId first = network.start(0, Path{LinkId(0)}, 10'000);
  EXPECT_TRUE(network.advance_to(4 * kPsPerUs).empty());
  EXPECT_EQ(network.next_event_ps(), 10 * kPsPerUs);
  const FlowId second = network.start(6 * kPsPerUs, Path{LinkId(0)}, 1000);
  EXPECT_EQ(network.next_event_ps(), 6 * kPsPerUs);
  const auto done = network.run_until_idle();
  EXPECT_EQ(end_of(done, second), 8 * kPsPerUs);
  EXPECT_EQ(end_of(done, first), 11 * kPsPerUs);
}

TEST(Flows, AFlowTakesNothingDuringItsLatency) {
  IdVector<LinkId, Link> links{{1 * kGB, 0}, {1 * kGB, 3 * kPsPerUs}};
  FlowNetwork network(links);
  const FlowId near = network.start(0, Path{LinkId(0)}, 3000);
  const FlowId far = network.start(0, Path{LinkId(0), LinkId(1), LinkId(1)}, 0);
  network.advance_to(1 * kPsPerUs);
  EXPECT_EQ(network.rate_bytes_per_s(far), 0);
  EXPECT_EQ(network.rate_bytes_per_s(near), 1 * kGB);
  const auto done = network.run_until_idle();
  EXPECT_EQ(end_of(done, near), 3 * kPsPerUs);
  EXPECT_EQ(end_of(done, far), 6 * kPsPerUs);  // no bytes: the latency and no more
}

TEST(Flows, OnlyWhatIsConnectedIsRecomputed) {
  // Pairs of links 2 i and 2 i + 1, each with a short and a long flow over it, one of them through
  // both: per pair once to begin with, once when the short flow leaves the long one behind.
  constexpr std::size_t kPairs = 100;
  FlowNetwork network(IdVector<LinkId, Link>(2 * kPairs, Link{1 * kGB, 0}));
  for (std::size_t i = 0; i < kPairs; ++i) {
    const double bytes = 1000 + 10 * static_cast<double>(i);
    network.start(0, Path{LinkId(2 * i), LinkId(2 * i + 1)}, bytes);
    network.start(0, Path{LinkId(2 * i + 1)}, 2 * bytes);
  }
  EXPECT_EQ(network.run_until_idle().size(), 2 * kPairs);
  EXPECT_EQ(network.recomputations(), 2 * kPairs);
}

TEST(Flows, ManyShortOnesPassALongOne) {
  // Every 2 us a short flow shares the link for 1 us and leaves it to the long one for 1 us. What
  // was once thought to be the long one's end piles up behind the end of a flow elsewhere.
  FlowNetwork network(links_of({2, 1}));
  const FlowId longer = network.start(0, Path{LinkId(0)}, 1e6);
  std::vector<Completion> expected;
  for (int i = 0; i < 300; ++i) {
    const FlowId shorter = network.start(2 * i * kPsPerUs, Path{LinkId(0)}, 1000);
    expected.push_back({(2 * i + 1) * kPsPerUs, shorter});
  }
  const FlowId elsewhere = network.start(0, Path{LinkId(1)}, 498e3);
  expected.insert(expected.begin() + 249, {498 * kPsPerUs, elsewhere});
  expected.push_back({650 * kPsPerUs, longer});  // 300 x 3000 bytes in 600 us, 100,000 in 50 us
  EXPECT_EQ(network.run_until_idle(), expected);
}

double all_to_all_us(std::size_t nodes, double back) {
  FlowNetwork network = test::all_to_all(nodes, back);
  return test::last_completion_us(network);
}

TEST(Flows, AllToAllCompletesWhenSimGridSaysWithoutCrossTraffic) {
  EXPECT_NEAR(all_to_all_us(1, test::kNoCrossTraffic), 46, 1e-5);
  EXPECT_NEAR(all_to_all_us(2, test::kNoCrossTraffic), 200, 1e-5);
  EXPECT_NEAR(all_to_all_us(4, test::kNoCrossTraffic), 586, 1e-5);
  EXPECT_NEAR(all_to_all_us(8, test::kNoCrossTraffic), 1356, 1e-5);
}

TEST(Flows, AllToAllCompletesWhenSimGridSaysWithCrossTraffic) {
  EXPECT_NEAR(all_to_all_us(1, test::kFivePercentBack), 48.175, 1e-3);
  EXPECT_NEAR(all_to_all_us(2, test::kFivePercentBack), 209.7, 1e-3);
  EXPECT_NEAR(all_to_all_us(4, test::kFivePercentBack), 614.931157896, 1e-3);
  EXPECT_NEAR(all_to_all_us(8, test::kFivePercentBack), 1423.4, 1e-3);
}

/// A path, whose latencies add up, or a bundle of transfers side by side.
struct RandomFlow {
  Picoseconds at_ps = 0;
  std::vector<FlowHop> hops;
  bool bundle = false;
  std::uint32_t weight = 1;
  double bytes = 0;
  double limit_bytes_per_s = 0;
  std::uint32_t multiplicity = 1;
};

struct RandomNetwork {
  IdVector<LinkId, Link> links;
  std::vector<RandomFlow> flows;

  Picoseconds begin_ps(std::size_t flow) const {
    Picoseconds sum_ps = 0;
    Picoseconds longest_ps = 0;
    for (const FlowHop& hop : flows[flow].hops) {
      sum_ps += links[hop.link].latency_ps;
      longest_ps = std::max(longest_ps, links[hop.link].latency_ps);
    }
    return flows[flow].at_ps + (flows[flow].bundle ? longest_ps : sum_ps);
  }
  double limit(std::size_t flow) const {
    const double limit = flows[flow].limit_bytes_per_s;
    return limit > 0 ? limit : std::numeric_limits<double>::infinity();
  }
};

/// Few distinct values, so that starts, sizes, bottlenecks and limits often tie.
RandomNetwork random_network() {
  using rc::gen::inRange;
  RandomNetwork random;
  random.links.resize(*inRange<std::size_t>(1, 7));
  for (Link& link : random.links) {
    link = {*inRange(1, 9) * kGB, *inRange<Picoseconds>(0, 3) * kPsPerUs};
  }
  random.flows.resize(*inRange<std::size_t>(1, 12));
  for (RandomFlow& flow : random.flows) {
    flow.at_ps = *inRange<Picoseconds>(0, 4) * kPsPerUs;
    flow.hops.resize(*inRange<std::size_t>(1, 4));  // a link may occur twice
    for (FlowHop& hop : flow.hops) {
      hop.link = LinkId(*inRange<std::size_t>(0, random.links.size()));
    }
    flow.bytes = *inRange(0, 5) * 1000.0 + *inRange(0, 2) * 77;
    flow.limit_bytes_per_s =
        *rc::gen::weightedElement<double>({{3, 0}, {1, 0.5}, {1, 1}, {1, 1.7}}) * kGB;
    flow.multiplicity = *inRange<std::uint32_t>(1, 4);
    flow.bundle = *rc::gen::arbitrary<bool>();
    if (!flow.bundle) continue;
    flow.weight = *inRange<std::uint32_t>(1, 4);
    for (FlowHop& hop : flow.hops) hop.bytes_per_byte = *inRange(1, 12) / 8.0;
  }
  return random;
}

FlowId start(FlowNetwork& network, const RandomFlow& flow) {
  if (flow.bundle) {
    return network.start(flow.at_ps, flow.hops, flow.bytes, flow.limit_bytes_per_s, flow.weight,
                         flow.multiplicity);
  }
  Path path;
  for (const FlowHop& hop : flow.hops) path.push_back(hop.link);
  return network.start(flow.at_ps, path, flow.bytes, flow.limit_bytes_per_s, flow.multiplicity);
}

std::vector<Picoseconds> ends(const RandomNetwork& random, const std::vector<std::size_t>& order) {
  FlowNetwork network(random.links);
  std::vector<FlowId> ids(order.size());
  for (const std::size_t i : order) ids[i] = start(network, random.flows[i]);
  const auto done = network.run_until_idle();
  std::vector<Picoseconds> result;
  for (const FlowId id : ids) result.push_back(end_of(done, id));
  return result;
}

std::vector<Picoseconds> ends(const RandomNetwork& random) {
  std::vector<std::size_t> order(random.flows.size());
  std::iota(order.begin(), order.end(), 0);
  return ends(random, order);
}

/// The definition, not the algorithm: nobody is over a capacity or a limit, and whoever is not at
/// its limit has a saturated link on which nobody is faster for his weight.
void check_max_min(const RandomNetwork& random, const std::vector<char>& sharing,
                   const std::vector<double>& rates) {
  constexpr double kRounding = 1e-12;
  IdVector<LinkId, double> used(random.links.size(), 0.0);
  IdVector<LinkId, double> fastest(random.links.size(), 0.0);
  for (std::size_t f = 0; f < rates.size(); ++f) {
    const RandomFlow& flow = random.flows[f];
    for (const FlowHop& hop : flow.hops) {
      used[hop.link] += flow.multiplicity * rates[f] * hop.bytes_per_byte;
      fastest[hop.link] = std::max(fastest[hop.link], rates[f] / flow.weight);
    }
  }
  for (LinkId link; link.value < used.size(); ++link) {
    RC_ASSERT(used[link] <= random.links[link].bytes_per_s * (1 + kRounding));
  }
  for (std::size_t f = 0; f < rates.size(); ++f) {
    if (!sharing[f]) {
      RC_ASSERT(rates[f] == 0);
      continue;
    }
    RC_ASSERT(rates[f] > 0);
    RC_ASSERT(rates[f] <= random.limit(f));
    const RandomFlow& flow = random.flows[f];
    const auto limits = [&](const FlowHop& hop) {
      return used[hop.link] >= random.links[hop.link].bytes_per_s * (1 - kRounding) &&
             rates[f] / flow.weight >= fastest[hop.link] * (1 - kRounding);
    };
    const bool bottleneck = std::any_of(flow.hops.begin(), flow.hops.end(), limits);
    RC_ASSERT(rates[f] == random.limit(f) || bottleneck);
  }
}

// With fair rates between events and every byte accounted for at its completion there is no other
// answer; so this is the whole model, checked from outside.
RC_GTEST_PROP(Flows, AreMaxMinFairAtEveryEventAndEndWithTheirLastByte, ()) {
  const RandomNetwork random = random_network();
  const std::size_t n = random.flows.size();
  FlowNetwork network(random.links);
  for (const RandomFlow& flow : random.flows) start(network, flow);

  std::vector<double> sent(n, 0.0);
  std::vector<double> rates(n, 0.0);
  std::vector<Picoseconds> end_ps(n, -1);
  while (const auto next = network.next_event_ps()) {
    const Picoseconds from_ps = network.now_ps();
    std::vector<char> sharing(n);
    for (std::size_t f = 0; f < n; ++f) {
      rates[f] = network.rate_bytes_per_s(FlowId(f));
      sharing[f] = random.begin_ps(f) <= from_ps && end_ps[f] == -1;
    }
    check_max_min(random, sharing, rates);

    // Some stops are nobody's event.
    const Picoseconds to_ps = *next - (*rc::gen::inRange(0, 3) == 0 ? (*next - from_ps) / 3 : 0);
    const std::vector<Completion> done = network.advance_to(to_ps);
    for (std::size_t f = 0; f < n; ++f) sent[f] += rates[f] * seconds(to_ps - from_ps);
    for (const Completion& c : done) {
      const std::size_t f = c.flow.value;
      RC_ASSERT(c.at_ps == to_ps);
      RC_ASSERT(end_ps[f] == -1);
      end_ps[f] = c.at_ps;
      // Not before the last byte, and not a whole picosecond after it.
      RC_ASSERT(sent[f] >= random.flows[f].bytes * (1 - 1e-12));
      RC_ASSERT(sent[f] - rates[f] * 1e-12 <= random.flows[f].bytes * (1 + 1e-12));
    }
  }
  RC_ASSERT(std::count(end_ps.begin(), end_ps.end(), -1) == 0);
  RC_ASSERT(end_ps == ends(random));  // looking on changes nothing
}

RC_GTEST_PROP(Flows, OfOneInstantStartInAnyOrder, ()) {
  const RandomNetwork random = random_network();
  std::vector<std::size_t> order(random.flows.size());
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = order.size(); i-- > 1;) {
    std::swap(order[i], order[*rc::gen::inRange<std::size_t>(0, i + 1)]);
  }
  RC_ASSERT(ends(random, order) == ends(random));
}

RC_GTEST_PROP(Flows, OfMultiplicityEqualThatManyFlows, ()) {
  const RandomNetwork random = random_network();
  RandomNetwork expanded{random.links, {}};
  std::vector<Picoseconds> expected;
  const std::vector<Picoseconds> collapsed = ends(random);
  for (std::size_t f = 0; f < random.flows.size(); ++f) {
    RandomFlow one = random.flows[f];
    one.multiplicity = 1;
    expanded.flows.insert(expanded.flows.end(), random.flows[f].multiplicity, one);
    expected.insert(expected.end(), random.flows[f].multiplicity, collapsed[f]);
  }
  RC_ASSERT(ends(expanded) == expected);
}

RC_GTEST_PROP(Flows, CompleteInTheOrderOfTimeAndId, ()) {
  const RandomNetwork random = random_network();
  FlowNetwork network(random.links);
  for (const RandomFlow& flow : random.flows) start(network, flow);
  const auto done = network.run_until_idle();
  RC_ASSERT(done.size() == random.flows.size());
  RC_ASSERT(std::is_sorted(done.begin(), done.end()));
}

}  // namespace
}  // namespace orrery
