// FlowNetwork against SimGrid 3.32, flow by flow. Where flows share a link, CM02 gives them rates
// in inverse proportion to their latencies, as TCP does with round-trip times; so latencies are
// zero or go with weights. Skipped where SimGrid is not installed.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "sim/fabric.hpp"
#include "sim/flows.hpp"
#include "tests/sim/all_to_all.hpp"
#include "tests/simgrid/all_to_all_platform.hpp"
#include "tests/simgrid/platform.hpp"

namespace orrery {
namespace {

using test::SimGridPlatform;

class SimGrid : public testing::Test {
 protected:
  void SetUp() override {
    if (std::string(ORRERY_SIMGRID_FLOWS).empty()) {
      GTEST_SKIP() << "SimGrid was not found when this was configured (Debian: libsimgrid-dev)";
    }
  }

  std::vector<double> ends_by_simgrid(const SimGridPlatform& platform, bool cross_traffic) {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    const auto path = std::filesystem::temp_directory_path() /
                      (std::string("orrery_simgrid_") + info->name() + ".txt");
    test::write(platform, path);
    const auto run =
        test::run_simgrid(ORRERY_SIMGRID_FLOWS, path, test::simgrid_options(cross_traffic));
    std::filesystem::remove(path);
    return run.end_s;
  }
};

/// The same flows here; `weights` by flow, empty: all alike. Latencies delay the starts.
std::vector<double> ends_here(const SimGridPlatform& platform, bool cross_traffic,
                              const std::vector<std::uint32_t>& weights = {}) {
  const auto route_of = [&](std::size_t from, std::size_t to) -> const std::vector<LinkId>& {
    const auto found =
        std::find_if(platform.routes.begin(), platform.routes.end(),
                     [&](const auto& route) { return route.from == from && route.to == to; });
    return found->links;
  };
  IdVector<LinkId, Link> links = platform.links;
  for (Link& link : links) link.latency_ps = 0;
  FlowNetwork network(links);
  for (std::size_t i = 0; i < platform.flows.size(); ++i) {
    const test::SimGridFlow& flow = platform.flows[i];
    std::vector<FlowHop> hops;
    Picoseconds start_ps = flow.start_ps;
    for (const LinkId link : route_of(flow.from, flow.to)) {
      hops.push_back({link, 1});
      start_ps += platform.links[link].latency_ps;
    }
    if (cross_traffic) {
      for (const LinkId link : route_of(flow.to, flow.from)) {
        hops.push_back({link, test::kFivePercentBack});
      }
    }
    network.start(start_ps, hops, static_cast<double>(flow.bytes), 0,
                  weights.empty() ? 1 : weights[i]);
  }
  std::vector<double> ends(platform.flows.size());
  for (const Completion& done : network.run_until_idle())
    ends[done.flow.value] = seconds(done.at_ps);
  return ends;
}

void expect_same(const std::vector<double>& here, const std::vector<double>& simgrid) {
  ASSERT_EQ(here.size(), simgrid.size());
  for (std::size_t i = 0; i < here.size(); ++i) {
    ASSERT_GT(simgrid[i], 0);
    EXPECT_NEAR(here[i] / simgrid[i], 1, 1e-5) << "flow " << i;
  }
}

TEST_F(SimGrid, AllToAll) {
  for (const std::size_t nodes : {1u, 2u, 4u}) {
    const SimGridPlatform platform = test::all_to_all_platform(nodes);
    for (const bool cross_traffic : {false, true}) {
      FlowNetwork network =
          test::all_to_all(nodes, cross_traffic ? test::kFivePercentBack : test::kNoCrossTraffic);
      std::vector<double> here(platform.flows.size());
      for (const Completion& done : network.run_until_idle()) {
        here[done.flow.value] = seconds(done.at_ps);
      }
      expect_same(here, ends_by_simgrid(platform, cross_traffic));
    }
  }
}

/// Many small networks side by side. A flow has a source and a destination of its own, a path of
/// one to four links and another back; flows start within the first third or so of all the time.
/// With latencies, which are small, a flow that takes n us to arrive has the weight 60 / n.
SimGridPlatform random_networks(std::uint32_t seed, bool latencies,
                                std::vector<std::uint32_t>* weights) {
  std::mt19937 random(seed);
  const auto below = [&](std::uint32_t n) { return static_cast<std::uint32_t>(random() % n); };
  SimGridPlatform platform;
  for (int network = 0; network < 25; ++network) {
    const std::size_t first = platform.links.size();
    const std::size_t links = 4 + below(5);
    for (std::size_t i = 0; i < links; ++i) {
      platform.links.push_back({1e9 * (1 + below(9)), latencies ? kPsPerUs : 0});
    }
    for (std::uint32_t flows = 2 + below(14); flows > 0; --flows) {
      const auto path = [&] {  // no link twice: SimGrid would count it once
        std::vector<LinkId> way;
        for (std::size_t i = 0; i < links; ++i) way.emplace_back(first + i);
        std::shuffle(way.begin(), way.end(), random);
        way.resize(1 + below(4));
        return way;
      };
      const std::size_t from = platform.hosts;
      platform.hosts += 2;
      platform.routes.push_back({from, from + 1, path()});
      platform.routes.push_back({from + 1, from, path()});
      platform.flows.push_back({from, from + 1, Picoseconds{below(8)} * 10'000 * kPsPerUs,
                                1'000'000ull * (1 + below(200))});
      std::sort(platform.flows.begin(), platform.flows.end(), [](const auto& a, const auto& b) {
        return std::pair(a.start_ps, a.from) < std::pair(b.start_ps, b.from);
      });
    }
  }
  if (latencies) {
    for (const test::SimGridFlow& flow : platform.flows) {
      weights->push_back(static_cast<std::uint32_t>(60 / platform.routes[flow.from].links.size()));
    }
  }
  return platform;
}

TEST_F(SimGrid, RandomNetworks) {
  for (std::uint32_t seed = 1; seed <= 8; ++seed) {
    SCOPED_TRACE(seed);
    const SimGridPlatform platform = random_networks(seed, false, nullptr);
    for (const bool cross_traffic : {false, true}) {
      expect_same(ends_here(platform, cross_traffic), ends_by_simgrid(platform, cross_traffic));
    }
  }
}

TEST_F(SimGrid, RandomNetworksWithLatenciesThatWeigh) {
  for (std::uint32_t seed = 11; seed <= 14; ++seed) {
    SCOPED_TRACE(seed);
    std::vector<std::uint32_t> weights;
    const SimGridPlatform platform = random_networks(seed, true, &weights);
    for (const bool cross_traffic : {false, true}) {
      expect_same(ends_here(platform, cross_traffic, weights),
                  ends_by_simgrid(platform, cross_traffic));
    }
  }
}

TEST_F(SimGrid, FatTreeWithOurRoutes) {
  // Eight nodes of four GPUs under leaves that rails share, two ports up for six down.
  Problems problems;
  const auto fabric = read_fabric(
      read_document_text("name: f\ntopology: two_layer\nnodes: 8\ngpus_per_node: 4\n"
                         "switch_ports: 8\nrail_optimised: false\nover_subscription: 3\n"
                         "nvlink: {capacity: 100 GB/s, latency: 1 ns, source: here}\n"
                         "pcie: {capacity: 60 GB/s, latency: 1 ns, source: here}\n"
                         "nic: {capacity: 50 GB/s, latency: 1 ns, source: here}\n"
                         "leaf_spine: {capacity: 40 GB/s, latency: 1 ns, source: here}\n",
                         "fabric.yaml", problems),
      problems);
  problems.throw_if_any();
  SimGridPlatform platform;
  platform.hosts = fabric->gpus();
  for (const FabricLink& link : fabric->links()) {
    platform.links.push_back({link.capacity_bytes_per_s, 0});
  }
  for (std::size_t a = 0; a < fabric->gpus(); ++a) {
    for (std::size_t b = 0; b < fabric->gpus(); ++b) {
      if (a != b) platform.routes.push_back({a, b, fabric->route(GpuId(a), GpuId(b), 0)});
    }
  }
  std::mt19937 random(5);
  for (std::uint32_t i = 0; i < 600; ++i) {
    const std::size_t from = random() % fabric->gpus();
    const std::size_t to = (from + 1 + random() % (fabric->gpus() - 1)) % fabric->gpus();
    platform.flows.push_back(
        {from, to, Picoseconds{i / 100} * 40'000 * kPsPerUs, 10'000'000ull * (1 + random() % 30)});
  }
  for (const bool cross_traffic : {false, true}) {
    expect_same(ends_here(platform, cross_traffic), ends_by_simgrid(platform, cross_traffic));
  }
}

}  // namespace
}  // namespace orrery
