#include "sim/fabric.hpp"

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>

namespace orrery {
namespace {

std::string head(const std::string& topology, int nodes, int gpus, int ports,
                 const std::string& more = "") {
  return fmt::format(
             "name: f\ntopology: {}\nnodes: {}\ngpus_per_node: {}\nswitch_ports: {}\n"
             "pcie: {{capacity: 60 GB/s, latency: 300 ns, source: here}}\n"
             "nic: {{capacity: 50 GB/s, latency: 200 ns, source: here}}\n",
             topology, nodes, gpus, ports) +
         (gpus > 1 ? "nvlink: {capacity: 200 GB/s, latency: 500 ns, source: here}\n" : "") +
         (topology != "single_switch"
              ? "leaf_spine: {capacity: 40 GB/s, latency: 100 ns, source: here}\n"
              : "") +
         (topology == "three_layer"
              ? "spine_core: {capacity: 30 GB/s, latency: 150 ns, source: here}\n"
              : "") +
         more;
}

Fabric made(const std::string& text) {
  Problems problems;
  auto fabric = read_fabric(read_document_text(text, "fabric.yaml", problems), problems);
  if (!fabric) throw InputError({problems.list().begin(), problems.list().end()});
  return std::move(*fabric);
}

std::string complaint(const std::string& text) {
  Problems problems;
  const Node node = read_document_text(text, "fabric.yaml", problems);
  const bool read = read_fabric(node, problems).has_value();
  EXPECT_EQ(read, problems.empty());
  return format_problems(problems.list());
}

GpuId gpu_named(const Fabric& fabric, const std::string& name) {
  for (GpuId gpu; gpu.value < fabric.gpus(); ++gpu) {
    if (fabric.vertices()[fabric.vertex(gpu)].name == name) return gpu;
  }
  throw std::runtime_error("no GPU " + name);
}

std::vector<std::string> names(const Fabric& fabric, const std::vector<LinkId>& path) {
  std::vector<std::string> found;
  for (const LinkId link : path) found.push_back(fabric.link_name(link));
  return found;
}

int count_kind(const Fabric& fabric, VertexKind kind) {
  return static_cast<int>(std::count_if(fabric.vertices().begin(), fabric.vertices().end(),
                                        [&](const FabricVertex& v) { return v.kind == kind; }));
}

std::int64_t cables(const Fabric& fabric, LinkTier tier) {
  std::int64_t directed = 0;
  for (const FabricLink& link : fabric.links()) directed += link.tier == tier ? link.cables : 0;
  return directed / 2;
}

bool is_switch(VertexKind kind) {
  return kind == VertexKind::leaf || kind == VertexKind::spine || kind == VertexKind::core;
}

/// The oracle: (hops, latency) from everywhere to `to` without NVLink, by relaxing every link until
/// nothing changes. It knows neither Boost nor leaves.
using Cost = std::pair<std::int64_t, std::int64_t>;
constexpr Cost kFar = {std::numeric_limits<std::int64_t>::max() / 2, 0};

std::vector<Cost> costs_to(const Fabric& fabric, VertexId to) {
  std::vector<Cost> cost(fabric.vertices().size(), kFar);
  cost[to.value] = {0, 0};
  for (bool changed = true; changed;) {
    changed = false;
    for (const FabricLink& link : fabric.links()) {
      if (link.failed || link.tier == LinkTier::nvlink) continue;
      const Cost& rest = cost[link.to.value];
      const Cost through = {rest.first + 1, rest.second + link.latency_ps};
      if (rest < kFar && through < cost[link.from.value]) {
        cost[link.from.value] = through;
        changed = true;
      }
    }
  }
  return cost;
}

void expect_connected(const Fabric& fabric, GpuId a, GpuId b, const std::vector<LinkId>& path) {
  VertexId at = fabric.vertex(a);
  std::set<VertexId> visited = {at};
  for (const LinkId id : path) {
    const FabricLink& link = fabric.links()[id];
    ASSERT_EQ(link.from, at) << fabric.link_name(id);
    ASSERT_FALSE(link.failed) << fabric.link_name(id);
    at = link.to;
    visited.insert(at);
  }
  EXPECT_EQ(at, fabric.vertex(b));
}

/// All pairs: paths connect and cost what the oracle says; over `labels` labels no link is used
/// that is on no shortest path; spraying uses exactly those that are, and loses nothing anywhere.
void expect_shortest(const Fabric& fabric, CrossRail cross_rail, std::uint32_t labels) {
  for (GpuId b; b.value < fabric.gpus(); ++b) {
    const std::vector<Cost> cost = costs_to(fabric, fabric.vertex(b));
    const FabricVertex& to = fabric.vertices()[fabric.vertex(b)];
    for (GpuId a; a.value < fabric.gpus(); ++a) {
      const FabricVertex& from = fabric.vertices()[fabric.vertex(a)];
      GpuId sender = a;
      std::int64_t nvlink_hops = 0;
      if (from.node != to.node && from.rail != to.rail && cross_rail == CrossRail::nvlink) {
        for (GpuId gpu; gpu.value < fabric.gpus(); ++gpu) {
          const FabricVertex& v = fabric.vertices()[fabric.vertex(gpu)];
          if (v.node == from.node && v.rail == to.rail) sender = gpu;
        }
        nvlink_hops = 2;
      }
      const bool stays = from.node == to.node;
      const Cost expected = cost[fabric.vertex(sender).value];
      std::set<LinkId> used;
      for (std::uint32_t label = 0; label < labels; ++label) {
        const auto path = fabric.route(a, b, label);
        expect_connected(fabric, a, b, path);
        EXPECT_EQ(path, fabric.route(a, b, label));
        used.insert(path.begin(), path.end());
        if (stays) {
          EXPECT_EQ(path.size(), a == b ? 0u : 2u);
          continue;
        }
        EXPECT_EQ(static_cast<std::int64_t>(path.size()), expected.first + nvlink_hops);
        const std::span<const LinkId> network =
            std::span(path).subspan(static_cast<std::size_t>(nvlink_hops));
        EXPECT_EQ(fabric.latency_ps(network), expected.second);
      }
      // Spraying: every vertex but the ends sends on what it gets.
      std::map<VertexId, double> balance;
      std::set<LinkId> sprayed;
      for (const auto& [link, share] : fabric.spray(a, b)) {
        EXPECT_GT(share, 0);
        EXPECT_TRUE(sprayed.insert(link).second);
        balance[fabric.links()[link].from] -= share;
        balance[fabric.links()[link].to] += share;
      }
      for (const auto& [v, rest] : balance) {
        const double wanted = v == fabric.vertex(b) ? 1 : v == fabric.vertex(a) ? -1 : 0;
        EXPECT_NEAR(rest, wanted, 1e-12);
      }
      EXPECT_TRUE(std::includes(sprayed.begin(), sprayed.end(), used.begin(), used.end()));
      if (stays) continue;
      // A link is on a shortest path if it is tight and its tail is on one.
      std::set<LinkId> tight;
      std::set<VertexId> reached = {fabric.vertex(sender)};
      for (bool changed = true; changed;) {
        changed = false;
        for (LinkId id; id.value < fabric.links().size(); ++id) {
          const FabricLink& link = fabric.links()[id];
          if (link.failed || link.tier == LinkTier::nvlink || reached.count(link.from) == 0)
            continue;
          const Cost& rest = cost[link.to.value];
          if (Cost{rest.first + 1, rest.second + link.latency_ps} != cost[link.from.value])
            continue;
          changed = tight.insert(id).second || changed;
          reached.insert(link.to);
        }
      }
      for (const LinkId link : tight) EXPECT_EQ(sprayed.count(link), 1u) << fabric.link_name(link);
      EXPECT_EQ(sprayed.size(), tight.size() + static_cast<std::size_t>(nvlink_hops));
    }
  }
}

/// Pearson's statistic of equally likely outcomes.
double chi_square(const std::vector<int>& seen) {
  double total = 0, sum = 0;
  for (const int n : seen) total += n;
  const double expected = total / static_cast<double>(seen.size());
  for (const int n : seen) sum += (n - expected) * (n - expected) / expected;
  return sum;
}

/// Four standard deviations above the mean of the chi-square distribution.
double chi_square_bound(std::size_t outcomes) {
  const double freedom = static_cast<double>(outcomes) - 1;
  return freedom + 4 * std::sqrt(2 * freedom);
}

// Endpoints, switches and links of arXiv 2505.09343's table of topologies, 64-port switches.
TEST(Fabric, CountsOfTheIscaTable) {
  EXPECT_EQ(made(head("two_layer", 256, 8, 64)).counts(), (FabricCounts{2048, 96, 2048}));
  EXPECT_EQ(made(head("two_layer", 2048, 1, 64)).counts(), (FabricCounts{2048, 96, 2048}));
  EXPECT_EQ(made(head("two_layer", 2048, 8, 64, "planes: per_rail\n")).counts(),
            (FabricCounts{16384, 768, 16384}));
  EXPECT_EQ(made(head("three_layer", 8192, 8, 64)).counts(), (FabricCounts{65536, 5120, 131072}));
}

// Nodes, leaves, spines, cores, node-leaf, leaf-spine and spine-core cables of NVIDIA's "Larger
// DGX SuperPOD component counts" (DGX SuperPOD reference architecture, DGX B200).
TEST(Fabric, CountsOfTheSuperPodTable) {
  struct Row {
    int nodes, leaves, spines, cores;
    std::int64_t node_leaf, leaf_spine, spine_core;
  };
  const Row rows[] = {{64, 16, 8, 0, 512, 512, 0},
                      {128, 32, 16, 0, 1024, 1024, 0},
                      {256, 64, 32, 0, 2048, 2048, 0},
                      {512, 128, 128, 64, 4096, 4096, 4096},
                      {1024, 256, 256, 128, 8192, 8192, 8192},
                      {2048, 512, 512, 256, 16384, 16384, 16384}};
  for (const Row& row : rows) {
    const Fabric f = made(head(row.cores > 0 ? "three_layer" : "two_layer", row.nodes, 8, 64));
    EXPECT_EQ(count_kind(f, VertexKind::leaf), row.leaves) << row.nodes;
    EXPECT_EQ(count_kind(f, VertexKind::spine), row.spines) << row.nodes;
    EXPECT_EQ(count_kind(f, VertexKind::core), row.cores) << row.nodes;
    EXPECT_EQ(cables(f, LinkTier::nic), row.node_leaf) << row.nodes;
    EXPECT_EQ(cables(f, LinkTier::leaf_spine), row.leaf_spine) << row.nodes;
    EXPECT_EQ(cables(f, LinkTier::spine_core), row.spine_core) << row.nodes;
  }
}

TEST(Fabric, NoSwitchHasMoreCablesThanPorts) {
  for (const char* more : {"", "planes: per_rail\n", "rail_optimised: false\n",
                           "over_subscription: 3\n", "nics_per_node: 2\n"}) {
    for (const char* topology : {"two_layer", "three_layer"}) {
      const Fabric f = made(head(topology, 21, 4, 16, more));
      std::map<VertexId, std::uint32_t> ports;
      for (const FabricLink& link : f.links()) ports[link.from] += link.cables;
      for (VertexId v; v.value < f.vertices().size(); ++v) {
        if (!is_switch(f.vertices()[v].kind)) continue;
        EXPECT_LE(ports[v], 16u) << f.vertices()[v].name;
      }
    }
  }
}

TEST(Fabric, OverSubscriptionIsTheRatioOfCablesAtEveryFullLeaf) {
  for (const int ratio : {1, 3, 7}) {
    const int down = 64 * ratio / (ratio + 1);
    for (const char* topology : {"two_layer", "three_layer"}) {
      const Fabric f =
          made(head(topology, 2 * down, 8, 64, fmt::format("over_subscription: {}\n", ratio)));
      std::map<VertexId, std::map<LinkTier, std::uint32_t>> out;
      for (const FabricLink& link : f.links()) out[link.from][link.tier] += link.cables;
      for (VertexId v; v.value < f.vertices().size(); ++v) {
        if (f.vertices()[v].kind != VertexKind::leaf) continue;
        EXPECT_EQ(out[v][LinkTier::nic], ratio * out[v][LinkTier::leaf_spine]);
        EXPECT_EQ(out[v][LinkTier::nic], static_cast<std::uint32_t>(down));
      }
    }
  }
}

TEST(Fabric, RoutesAreShortestOnTwoAndThreeLayers) {
  for (const char* topology : {"two_layer", "three_layer"}) {
    for (const bool spine : {false, true}) {
      for (const char* more : {"", "rail_optimised: false\n"}) {
        const std::string text = head(topology, 7, 2, 8, more) +
                                 (spine ? "cross_rail: spine\n" : "cross_rail: nvlink\n");
        SCOPED_TRACE(text);
        expect_shortest(made(text), spine ? CrossRail::spine : CrossRail::nvlink, 8);
      }
    }
    const std::string planes = head(topology, 7, 2, 8, "planes: per_rail\n");
    expect_shortest(made(planes), CrossRail::nvlink, 8);
  }
}

TEST(Fabric, RoutesAreShortestOnRandomGraphs) {
  std::mt19937 random(1);  // the standard fixes its sequence
  const auto draw = [&](unsigned below) { return static_cast<int>(random() % below); };
  for (int round = 0; round < 40; ++round) {
    const int switches = 3 + draw(7);
    std::string vertices = "vertices:\n", links = "links:\n";
    const auto link = [&](const std::string& a, const std::string& b, const char* more) {
      links += fmt::format("  - {{from: {}, to: {}, capacity: 1 GB/s, latency: {} ns{}}}\n", a, b,
                           1 + draw(2), more);
    };
    for (int g = 0; g < 5; ++g) {
      vertices += fmt::format("  - {{name: g{}, kind: gpu, node: {}}}\n", g, g);
      link(fmt::format("g{}", g), fmt::format("s{}", draw(static_cast<unsigned>(switches))), "");
    }
    for (int s = 0; s < switches; ++s) {
      vertices += fmt::format("  - {{name: s{}, kind: leaf}}\n", s);
      // A ring one way, so that everything is reachable, and chords.
      link(fmt::format("s{}", s), fmt::format("s{}", (s + 1) % switches), ", one_way: true");
      for (int t = 0; t < switches; ++t) {
        if (t == s || t == (s + 1) % switches || draw(3) != 0) continue;
        link(fmt::format("s{}", s), fmt::format("s{}", t),
             draw(2) != 0 ? ", one_way: true" : ", one_way: true, cables: 3");
      }
    }
    const std::string text = "name: r\ntopology: graph\n" + vertices + links;
    SCOPED_TRACE(text);
    expect_shortest(made(text), CrossRail::nvlink, 8);
    if (HasFailure()) return;
  }
}

TEST(Fabric, CrossRailTrafficTakesNvlinkOrTheSpine) {
  const std::string text = head("two_layer", 8, 2, 8);  // four nodes to a leaf
  const Fabric by_nvlink = made(text);
  const Fabric by_spine = made(text + "cross_rail: spine\n");
  const auto route = [](const Fabric& f, const char* a, const char* b) {
    return names(f, f.route(gpu_named(f, a), gpu_named(f, b), 0));
  };
  const std::vector<std::string> relayed = {
      "node0/gpu0 -> node0/nvswitch", "node0/nvswitch -> node0/gpu1", "node0/gpu1 -> node0/nic1",
      "node0/nic1 -> leaf1",          "leaf1 -> node1/nic1",          "node1/nic1 -> node1/gpu1"};
  EXPECT_EQ(route(by_nvlink, "node0/gpu0", "node1/gpu1"), relayed);
  const auto spine = route(by_spine, "node0/gpu0", "node1/gpu1");
  ASSERT_EQ(spine.size(), 6u);
  EXPECT_EQ(spine[1], "node0/nic0 -> leaf0");
  EXPECT_EQ(spine[4], "leaf1 -> node1/nic1");
  // Inside a node NVLink either way; on one rail the NIC of that rail.
  for (const Fabric* f : {&by_nvlink, &by_spine}) {
    EXPECT_EQ(
        route(*f, "node0/gpu0", "node0/gpu1"),
        (std::vector<std::string>{"node0/gpu0 -> node0/nvswitch", "node0/nvswitch -> node0/gpu1"}));
    EXPECT_EQ(route(*f, "node0/gpu1", "node7/gpu1")[1], "node0/nic1 -> leaf1");
  }
}

TEST(Fabric, SharedNicsRelayThroughTheTwin) {
  const Fabric f = made(head("two_layer", 8, 4, 8, "nics_per_node: 2\n"));
  const auto path = names(f, f.route(gpu_named(f, "node0/gpu0"), gpu_named(f, "node1/gpu3"), 0));
  EXPECT_EQ(path[1], "node0/nvswitch -> node0/gpu3");
  EXPECT_EQ(path[2], "node0/gpu3 -> node0/nic1");
}

TEST(Fabric, APodKeepsTheRailsOfAGroupTogether) {
  // 8 ports: a spine could reach four leaves, but only whole groups of three rails share a pod.
  const Fabric f = made(head("three_layer", 16, 3, 8, "cross_rail: spine\n"));
  for (int node = 0; node < 16; node += 4) {  // four nodes to a group
    const GpuId a = gpu_named(f, fmt::format("node{}/gpu0", node));
    const GpuId b = gpu_named(f, fmt::format("node{}/gpu2", node + 3));
    EXPECT_EQ(f.route(a, b, 0).size(), 6u);
  }
  EXPECT_EQ(complaint(head("three_layer", 4, 5, 8)),
            "fabric.yaml:5:15: error: a spine has 4 ports towards leaves, fewer than the 5 rails\n"
            "  switch_ports: 8\n"
            "                ^\n");
}

TEST(Fabric, EcmpIsBalancedOverSpines) {
  const Fabric f = made(head("two_layer", 256, 8, 64));
  const GpuId a = gpu_named(f, "node0/gpu3"), b = gpu_named(f, "node200/gpu3");
  std::map<LinkId, int> uses;
  for (std::uint32_t label = 0; label < 32000; ++label) ++uses[f.route(a, b, label)[2]];
  std::vector<int> seen;
  for (const auto& [link, n] : uses) seen.push_back(n);
  ASSERT_EQ(seen.size(), 32u);
  EXPECT_LT(chi_square(seen), chi_square_bound(32));
  // And over sources with one label.
  uses.clear();
  for (GpuId from; from.value < f.gpus(); ++from) {
    const auto path = f.route(from, b, 7);
    if (path.size() < 6) continue;
    const LinkId last_hop = path[path.size() - 3];
    if (f.links()[last_hop].tier == LinkTier::leaf_spine) ++uses[last_hop];
  }
  seen.clear();
  for (const auto& [link, n] : uses) seen.push_back(n);
  ASSERT_EQ(seen.size(), 32u);
  EXPECT_LT(chi_square(seen), chi_square_bound(32));
}

TEST(Fabric, EcmpChoosesAnewAtEveryLayer) {
  const Fabric f = made(head("three_layer", 64, 2, 8));  // 4 spines of a pod, 4 cores each
  const GpuId a = gpu_named(f, "node0/gpu0"), b = gpu_named(f, "node63/gpu0");
  std::map<VertexId, int> uses;
  for (std::uint32_t label = 0; label < 16000; ++label) {
    ++uses[f.links()[f.route(a, b, label)[3]].to];
  }
  std::vector<int> seen;
  for (const auto& [core, n] : uses) {
    EXPECT_EQ(f.vertices()[core].kind, VertexKind::core);
    seen.push_back(n);
  }
  ASSERT_EQ(seen.size(), 16u);
  EXPECT_LT(chi_square(seen), chi_square_bound(16));
}

const char* const kDiamond =
    "name: diamond\ntopology: graph\n"
    "vertices:\n"
    "  - {name: a, kind: gpu, node: 0}\n"
    "  - {name: b, kind: gpu, node: 1}\n"
    "  - {name: left, kind: leaf}\n"
    "  - {name: right, kind: leaf}\n"
    "  - {name: top, kind: spine}\n"
    "  - {name: bottom, kind: spine}\n"
    "links:\n"
    "  - {from: a, to: left, capacity: 50 GB/s, latency: 1 us}\n"
    "  - {from: b, to: right, capacity: 50 GB/s, latency: 1 us}\n"
    "  - {from: left, to: top, capacity: 10 GB/s, latency: 1 us, cables: 3}\n"
    "  - {from: left, to: bottom, capacity: 10 GB/s, latency: 1 us}\n"
    "  - {from: top, to: right, capacity: 10 GB/s, latency: 1 us, cables: 3}\n"
    "  - {from: bottom, to: right, capacity: 10 GB/s, latency: 1 us}\n";

double share_of(const Fabric& f, const std::string& name) {
  for (const auto& [link, share] : f.spray(GpuId(0), GpuId(1))) {
    if (f.link_name(link) == name) return share;
  }
  return 0;
}

const FabricLink& link_named(const Fabric& f, const std::string& name) {
  for (LinkId link; link.value < f.links().size(); ++link) {
    if (f.link_name(link) == name) return f.links()[link];
  }
  throw std::runtime_error("no link " + name);
}

TEST(Fabric, CablesWeighSharesAndAddCapacity) {
  const Fabric f = made(kDiamond);
  EXPECT_DOUBLE_EQ(share_of(f, "left -> top"), 0.75);
  EXPECT_DOUBLE_EQ(share_of(f, "bottom -> right"), 0.25);
  EXPECT_DOUBLE_EQ(link_named(f, "left -> top").capacity_bytes_per_s, 30e9);
  int top = 0;
  for (std::uint32_t label = 0; label < 10000; ++label) {
    top += f.link_name(f.route(GpuId(0), GpuId(1), label)[1]) == "left -> top";
  }
  EXPECT_NEAR(top, 7500, 4 * std::sqrt(10000 * 0.75 * 0.25));
  EXPECT_EQ(f.counts(), (FabricCounts{2, 4, 8}));
}

TEST(Fabric, FaultsChangeRoutesAndCapacity) {
  const std::string text = kDiamond;
  const Fabric one_way = made(text + "faults: [{link: left -> top, failed: true}]\n");
  EXPECT_EQ(share_of(one_way, "left -> top"), 0);
  EXPECT_EQ(share_of(one_way, "left -> bottom"), 1);
  EXPECT_FALSE(link_named(one_way, "top -> left").failed);
  EXPECT_TRUE(link_named(one_way, "left -> top").failed);
  EXPECT_EQ(one_way.spray(GpuId(1), GpuId(0)).size(), 6u);  // the way back still has both

  const Fabric dead_switch = made(text + "faults: [{link: top, failed: true}]\n");
  EXPECT_TRUE(link_named(dead_switch, "right -> top").failed);
  EXPECT_EQ(share_of(dead_switch, "bottom -> right"), 1);

  const Fabric slow = made(text + "faults: [{link: left <-> *, capacity_share: 0.5}]\n");
  EXPECT_DOUBLE_EQ(link_named(slow, "left -> top").capacity_bytes_per_s, 15e9);
  EXPECT_DOUBLE_EQ(link_named(slow, "a -> left").capacity_bytes_per_s, 25e9);
  EXPECT_DOUBLE_EQ(link_named(slow, "top -> right").capacity_bytes_per_s, 30e9);
  EXPECT_DOUBLE_EQ(share_of(slow, "left -> top"), 0.75);  // ECMP does not look at capacity

  const Fabric late = made(text + "faults: [{link: '*om -> ri*t', added_latency: 5 ns}]\n");
  EXPECT_EQ(share_of(late, "left -> top"), 1);  // hops tie, latency decides
  EXPECT_EQ(link_named(late, "bottom -> right").latency_ps, 1'005'000);

  const Fabric healthy = made(text);
  for (LinkId link; link.value < healthy.links().size(); ++link) {
    const Fabric f =
        made(text + fmt::format("faults: [{{link: {}, capacity_share: 0.25}}]\n", link.value));
    for (LinkId other; other.value < f.links().size(); ++other) {
      EXPECT_DOUBLE_EQ(f.links()[other].capacity_bytes_per_s,
                       healthy.links()[other].capacity_bytes_per_s * (other == link ? 0.25 : 1));
    }
  }
}

TEST(Fabric, RoutesStayShortestUnderFailures) {
  // One of each leaf's spines gone, another way round for one leaf.
  const std::string text = head("two_layer", 12, 2, 8, "cross_rail: spine\n") +
                           "faults:\n  - {link: spine1, failed: true}\n"
                           "  - {link: leaf0 <-> spine0, failed: true}\n";
  expect_shortest(made(text), CrossRail::spine, 16);
}

TEST(Fabric, ADeadNicOnTheRelaySendsCrossRailTrafficOverTheSpine) {
  const Fabric f = made(head("two_layer", 8, 2, 8, "faults: [{link: node0/nic1, failed: true}]\n"));
  const auto path = names(f, f.route(gpu_named(f, "node0/gpu0"), gpu_named(f, "node7/gpu1"), 0));
  EXPECT_EQ(path[1], "node0/nic0 -> leaf0");
  EXPECT_EQ(path.size(), 6u);
}

TEST(Fabric, APartitionIsNamed) {
  const auto message = [](const std::string& text, std::size_t a, std::size_t b) -> std::string {
    const Fabric f = made(text);
    try {
      f.route(GpuId(a), GpuId(b), 0);
    } catch (const InputError& error) {
      EXPECT_THROW(f.spray(GpuId(a), GpuId(b)), InputError);
      return error.what();
    }
    return "";
  };
  const std::string text = kDiamond;
  EXPECT_NE(message(text + "faults:\n  - {link: left -> *, failed: true}\n", 0, 1)
                .find("fabric.yaml:18:3: error: no path from a to b: left does not reach right"),
            std::string::npos)
      << message(text + "faults:\n  - {link: left -> *, failed: true}\n", 0, 1);
  EXPECT_NE(message(text + "faults:\n  - {link: right -> b, failed: true}\n", 0, 1)
                .find("no path from a to b: link right -> b has failed"),
            std::string::npos);
  EXPECT_EQ(message(text + "faults:\n  - {link: right -> b, failed: true}\n", 1, 0), "");
}

TEST(Fabric, MistakesAreLocated) {
  EXPECT_EQ(complaint(head("two_layer", 4, 2, 8, "over_subscripton: 3\n")),
            "fabric.yaml:10:1: error: unknown key 'over_subscripton' in fabric\n"
            "  over_subscripton: 3\n"
            "  ^\n"
            "  hint: did you mean 'over_subscription'?\n");
  EXPECT_EQ(
      complaint(head("two_layer", 2056, 1, 64)),
      "fabric.yaml:3:8: error: 2056 nodes need 65 leaves; two layers of 64-port switches have "
      "at most 64\n"
      "  nodes: 2056\n"
      "         ^\n"
      "  hint: more ports or one more layer\n");
  EXPECT_EQ(complaint(head("two_layer", 4, 2, 8, "over_subscription: 2\n")),
            "fabric.yaml:10:20: error: 8 ports cannot be split 2:1 into down and up\n"
            "  over_subscription: 2\n"
            "                     ^\n");
  EXPECT_EQ(complaint(head("two_layer", 4, 2, 8, "planes: per_rail\ncross_rail: spine\n")),
            "fabric.yaml:11:13: error: with 'planes: per_rail' no spine joins the rails; only "
            "'nvlink' is possible\n"
            "  cross_rail: spine\n"
            "              ^\n");
  const std::string text = kDiamond;
  EXPECT_EQ(complaint(text + "  - {from: tpo, to: left, capacity: 1 GB/s, latency: 1 us}\n"),
            "fabric.yaml:17:12: error: no vertex is named 'tpo'\n"
            "    - {from: tpo, to: left, capacity: 1 GB/s, latency: 1 us}\n"
            "             ^\n"
            "  hint: did you mean 'top'?\n");
  EXPECT_EQ(complaint(text + "  - {from: a, to: right, capacity: 1 GB/s, latency: 1 us, "
                             "one_way: true}\n"),
            "fabric.yaml:17:5: error: 'a' has a second way out\n"
            "    - {from: a, to: right, capacity: 1 GB/s, latency: 1 us, one_way: true}\n"
            "      ^\n");
  EXPECT_EQ(complaint(text + "faults: [{link: tip, failed: true}]\n"),
            "fabric.yaml:17:17: error: no link matches 'tip'\n"
            "  faults: [{link: tip, failed: true}]\n"
            "                  ^\n"
            "  hint: a vertex, 'A -> B' (one way), 'A <-> B' (both), with * for any text; or an "
            "index\n");
}

TEST(Fabric, EveryMistakeIsFoundInOneRun) {
  Problems problems;
  const Node node = read_document_text(
      "name: f\ntopology: graph\nvertices:\n"
      "  - {name: a, kind: gpu, node: 0}\n"
      "  - {name: a, kind: leaf}\n"
      "  - {name: n, kind: nic, node: 1}\n"
      "links:\n"
      "  - {from: a, to: a, capacity: 1 GB/s, latency: 1 us}\n"
      "  - {from: a, to: n, capacity: 1 GB/s, latency: 1 us}\n"
      "  - {from: a, to: n, capacity: 1 GB, latency: 2 s}\n"
      "nodes: 3\n",
      "fabric.yaml", problems);
  EXPECT_FALSE(read_fabric(node, problems));
  std::set<int> lines;
  for (const Problem& problem : problems.list()) lines.insert(problem.at.line);
  EXPECT_EQ(lines, (std::set<int>{5, 8, 9, 10, 11})) << format_problems(problems.list());
}

TEST(Fabric, WaysInAndOutMayDiffer) {
  // g sends through its first NIC and receives through its second; h only receives.
  const Fabric f = made(
      "name: f\ntopology: graph\nvertices:\n"
      "  - {name: g, kind: gpu, node: 0}\n"
      "  - {name: first, kind: nic, node: 0}\n"
      "  - {name: second, kind: nic, node: 0}\n"
      "  - {name: h, kind: gpu, node: 1}\n"
      "  - {name: s, kind: leaf}\n"
      "  - {name: k, kind: gpu, node: 2}\n"
      "links:\n"
      "  - {from: g, to: first, capacity: 1 GB/s, latency: 1 us, one_way: true}\n"
      "  - {from: second, to: g, capacity: 1 GB/s, latency: 1 us, one_way: true}\n"
      "  - {from: first, to: s, capacity: 1 GB/s, latency: 1 us}\n"
      "  - {from: second, to: s, capacity: 1 GB/s, latency: 1 us}\n"
      "  - {from: s, to: h, capacity: 1 GB/s, latency: 1 us, one_way: true}\n"
      "  - {from: k, to: s, capacity: 1 GB/s, latency: 1 us}\n");
  const GpuId g = gpu_named(f, "g"), h = gpu_named(f, "h"), k = gpu_named(f, "k");
  EXPECT_EQ(names(f, f.route(g, k, 0)),
            (std::vector<std::string>{"g -> first", "first -> s", "s -> k"}));
  EXPECT_EQ(names(f, f.route(k, g, 0)),
            (std::vector<std::string>{"k -> s", "s -> second", "second -> g"}));
  EXPECT_EQ(f.route(g, h, 0).size(), 3u);
  EXPECT_THROW(f.route(h, g, 0), InputError);
}

TEST(Fabric, LatenciesOfThePaper) {
  // arXiv 2505.09343, latency table: InfiniBand under one leaf and across leaves, NVLink.
  Problems problems;
  const std::string file = ORRERY_SOURCE_DIR "/scenarios/fabrics/h800_2048_mpft.yaml";
  const auto f = read_fabric(read_document(file, problems), problems);
  ASSERT_TRUE(f) << format_problems(problems.list());
  const auto latency = [&](const char* a, const char* b) {
    return f->latency_ps(f->route(gpu_named(*f, a), gpu_named(*f, b), 0));
  };
  EXPECT_EQ(latency("node0/gpu0", "node31/gpu0"), 2'800'000);
  EXPECT_EQ(latency("node0/gpu0", "node32/gpu0"), 3'700'000);
  EXPECT_EQ(latency("node0/gpu0", "node0/gpu7"), 3'330'000);
}

TEST(Fabric, ScenariosAreRead) {
  const std::map<std::string, FabricCounts> expected = {
      {"h800_2048_mpft", {2048, 8 * (8 + 4), 2048}},
      {"h100_superpod_rail", {1016, 32 + 16, 1024}},
      {"single_switch", {64, 1, 0}}};
  for (const auto& [name, counts] : expected) {
    Problems problems;
    const std::string file = fmt::format("{}/scenarios/fabrics/{}.yaml", ORRERY_SOURCE_DIR, name);
    const auto f = read_fabric(read_document(file, problems), problems);
    ASSERT_TRUE(f) << format_problems(problems.list());
    EXPECT_EQ(f->counts(), counts) << name;
  }
}

TEST(Fabric, TreesAreMadePerDestinationLeafAndShared) {
  const Fabric f = made(head("two_layer", 64, 8, 64));  // 16 leaves
  EXPECT_EQ(f.trees_made(), 0u);
  f.route(GpuId(0), GpuId(1), 0);  // NVLink
  EXPECT_EQ(f.trees_made(), 0u);
  f.route(GpuId(0), GpuId(63 * 8), 0);
  f.route(GpuId(8), GpuId(62 * 8), 0);
  EXPECT_EQ(f.trees_made(), 1u);
  for (GpuId a; a.value < f.gpus(); ++a) {
    for (GpuId b; b.value < f.gpus(); ++b) f.route(a, b, 0);
  }
  EXPECT_EQ(f.trees_made(), 16u);
}

TEST(Fabric, ThreadsAndMovesGiveTheSameRoutes) {
  const std::string text = head("three_layer", 32, 2, 8);
  const Fabric alone = made(text);
  Fabric first = made(text);
  const Fabric moved = std::move(first);
  std::vector<std::vector<LinkId>> found[4];
  std::vector<std::thread> threads;
  for (auto& mine : found) {
    threads.emplace_back([&] {
      for (GpuId b; b.value < moved.gpus(); ++b) mine.push_back(moved.route(GpuId(0), b, 3));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (GpuId b; b.value < alone.gpus(); ++b) {
    for (const auto& mine : found) EXPECT_EQ(mine[b.value], alone.route(GpuId(0), b, 3));
  }
}

}  // namespace
}  // namespace orrery
