#include "sim/fabric.hpp"

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "sim/cluster.hpp"

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

// Compute fabric components for DGX SuperPOD counts, B300 XDR reference architecture (144 ports).
// The spines show that the cables of every leaf are to spread evenly: 32 leaves would fit on 16.
TEST(Fabric, CountsOfTheXdrSuperPodTable) {
  struct Row {
    int nodes, leaves, spines;
    std::int64_t cables;
  };
  for (const Row& row : {Row{72, 8, 4, 576}, Row{144, 16, 8, 1152}, Row{288, 32, 18, 2304},
                         Row{576, 64, 36, 4608}, Row{1296, 144, 72, 10368}}) {
    const Fabric f = made(head("two_layer", row.nodes, 8, 144));
    EXPECT_EQ(f.counts(), (FabricCounts{row.cables, row.leaves + row.spines, row.cables}))
        << row.nodes;
  }
}

TEST(Fabric, NoSwitchHasMoreCablesThanPorts) {
  for (const char* more :
       {"", "planes: per_rail\n", "rail_optimised: false\n", "over_subscription: 3\n",
        "nics_per_node: 2\n", "rails: 2\n", "rails: 2\nplanes: per_rail\n"}) {
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

Fabric shipped(const std::string& name) {
  Problems problems;
  const std::string file = fmt::format("{}/scenarios/fabrics/{}.yaml", ORRERY_SOURCE_DIR, name);
  auto fabric = read_fabric(read_document(file, problems), problems);
  if (!fabric) throw InputError({problems.list().begin(), problems.list().end()});
  return std::move(*fabric);
}

TEST(Fabric, LatenciesOfThePaper) {
  // arXiv 2505.09343, latency table: NVLink, and under one leaf and across leaves InfiniBand or
  // RoCE.
  const auto latency = [&](const Fabric& f, const char* a, const char* b) {
    return f.latency_ps(f.route(gpu_named(f, a), gpu_named(f, b), 0));
  };
  for (const char* name : {"h800_2048_mpft", "h800_2048_mrft"}) {
    const Fabric f = shipped(name);
    EXPECT_EQ(latency(f, "node0/gpu0", "node31/gpu0"), 2'800'000);
    EXPECT_EQ(latency(f, "node0/gpu0", "node32/gpu0"), 3'700'000);
    EXPECT_EQ(latency(f, "node0/gpu0", "node0/gpu7"), 3'330'000);
  }
  const Fabric ethernet = shipped("h100_131072");
  EXPECT_EQ(latency(ethernet, "node0/gpu0", "node63/gpu0"), 3'600'000);
  EXPECT_EQ(latency(ethernet, "node0/gpu0", "node64/gpu0"), 5'600'000);
}

// By hand or from the sources named in the files; 64-port switches: 32 NICs of a rail to a leaf.
TEST(Fabric, ScenariosAreRead) {
  const std::map<std::string, FabricCounts> expected = {
      {"a100_node", {0, 0, 0}},
      {"b200_node", {0, 0, 0}},
      {"h100_node", {0, 0, 0}},
      {"h800_node", {0, 0, 0}},
      {"gb200_nvl72", {0, 0, 0}},
      {"single_switch", {64, 1, 0}},
      // 40 ports, 20 nodes to a group of 8 leaves. 64 GPUs: 160 cables on the fewest spines, 4.
      // 1024 GPUs: 7 groups, two to a pod of 20 spines, 4 pods; a spine reaches 2 cores.
      {"a100_64", {64, 8 + 4, 160}},
      {"a100_1024", {1024, 56 + 80 + 40, 56 * 20 + 80 * 20}},
      // NVIDIA's component counts: a unit of 32 nodes has 8 leaves and 4 spines, four have 32
      // and 16.
      {"h100_64", {64, 8 + 4, 256}},
      {"h100_256", {256, 8 + 4, 256}},
      {"h100_576", {576, 24 + 16, 768}},
      {"h100_1024", {1024, 32 + 16, 1024}},
      {"h100_superpod_rail", {1016, 32 + 16, 1024}},
      {"h100_1024_3to1", {1024, 24 + 8, 24 * 16}},
      // arXiv 2505.09343, table of topologies: FT2 has 2048 endpoints, 96 switches, 2048 links.
      {"h800_2048_mrft", {2048, 96, 2048}},
      {"h800_2048_mpft", {2048, 8 * (8 + 4), 2048}},
      // 144 NICs on each of 4 rails: five leaves a rail, 640 cables to 16 spines.
      {"gb200_576", {576, 20 + 16, 640}},
      // 128 ports, 64 nodes to 8 leaves: 2048 leaves in 32 pods of 64 and 64; a core takes 4 cables
      // of every pod.
      {"h100_131072", {131'072, 2048 + 2048 + 1024, 2 * 131'072}}};
  std::set<std::string> there;
  for (const auto& file :
       std::filesystem::directory_iterator(ORRERY_SOURCE_DIR "/scenarios/fabrics")) {
    if (file.path().extension() == ".yaml") there.insert(file.path().stem().string());
  }
  for (const auto& [name, counts] : expected) {
    const FabricCounts found = shipped(name).counts();
    EXPECT_EQ(found, counts) << name << ": " << found.endpoints << " endpoints, " << found.switches
                             << " switches, " << found.switch_cables << " cables";
    there.erase(name);
  }
  EXPECT_TRUE(there.empty()) << *there.begin() << " is not tested";
}

TEST(Fabric, EveryClusterHasOneThatFits) {
  const std::map<std::string, std::vector<std::string>> fabrics = {
      {"a100_node", {"a100_node"}},
      {"b200_node", {"b200_node"}},
      {"h100_node", {"h100_node"}},
      {"h200_node", {"h100_node"}},
      {"h800_node", {"h800_node"}},
      {"a100_64", {"a100_64"}},
      {"a100_1024", {"a100_1024"}},
      {"h100_64", {"h100_64", "single_switch"}},
      {"h100_256", {"h100_256"}},
      {"h100_576", {"h100_576"}},
      {"h100_1024", {"h100_1024", "h100_1024_3to1"}},
      {"h100_131072", {"h100_131072"}},
      {"h800_2048", {"h800_2048_mpft", "h800_2048_mrft"}}};
  for (const auto& file :
       std::filesystem::directory_iterator(ORRERY_SOURCE_DIR "/scenarios/clusters")) {
    const std::string name = file.path().stem().string();
    Problems problems;
    const Cluster cluster = read_cluster(read_document(file.path(), problems), problems);
    ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
    ASSERT_EQ(fabrics.count(name), 1u) << name;
    for (const std::string& fabric_name : fabrics.at(name)) {
      const Fabric f = shipped(fabric_name);
      ASSERT_EQ(static_cast<std::int64_t>(f.gpus()), cluster.gpus()) << name;
      std::map<LinkTier, double> capacity;
      for (const FabricLink& link : f.links()) {
        capacity[link.tier] = link.capacity_bytes_per_s / link.cables;
      }
      EXPECT_EQ(capacity[LinkTier::nvlink], cluster.nvlink_peak_bytes_per_s) << fabric_name;
      EXPECT_EQ(capacity[LinkTier::nic], cluster.nic_peak_bytes_per_s) << fabric_name;
      for (GpuId gpu; gpu.value < f.gpus(); ++gpu) {
        const auto node = static_cast<std::int64_t>(gpu.value) / cluster.gpus_per_node;
        EXPECT_EQ(f.vertices()[f.vertex(gpu)].node, node) << fabric_name;
      }
    }
  }
}

TEST(Fabric, ANodeAloneHasNvlinkOnly) {
  const Fabric f = shipped("gb200_nvl72");
  ASSERT_EQ(f.gpus(), 72u);
  EXPECT_EQ(
      names(f, f.route(GpuId(3), GpuId(71), 0)),
      (std::vector<std::string>{"node0/gpu3 -> node0/nvswitch", "node0/nvswitch -> node0/gpu71"}));
  EXPECT_EQ(made("name: f\ntopology: single_node\ngpus_per_node: 1\n").gpus(), 1u);
  EXPECT_EQ(complaint("name: f\ntopology: single_node\ngpus_per_node: 8\n"),
            "fabric.yaml:1:1: error: missing key 'nvlink' in fabric\n"
            "  name: f\n"
            "  ^\n");
}

TEST(Fabric, NodesMayHaveSeveralNicsOnARail) {
  // Four ports down: NICs 0, 2, 4, 6 of a node are all that fit on its leaf of rail 0.
  const std::string text = head("two_layer", 3, 8, 8, "rails: 2\n");
  const Fabric f = made(text);
  EXPECT_EQ(f.counts(), (FabricCounts{24, 6 + 4, 24}));
  const auto route = [&](const char* a, const char* b) {
    return names(f, f.route(gpu_named(f, a), gpu_named(f, b), 0));
  };
  // On one rail no detour over NVLink; else over the twin of the receiver.
  const auto straight = route("node0/gpu2", "node1/gpu6");
  ASSERT_EQ(straight.size(), 6u);
  EXPECT_EQ(straight[1], "node0/nic2 -> leaf0");
  EXPECT_EQ(straight[4], "leaf2 -> node1/nic6");
  const auto relayed = route("node0/gpu2", "node1/gpu5");
  ASSERT_EQ(relayed.size(), 8u);
  EXPECT_EQ(relayed[1], "node0/nvswitch -> node0/gpu5");
  EXPECT_EQ(relayed[3], "node0/nic5 -> leaf1");
  // A plane per rail instead of one tree: the same leaves and spines, apart.
  const Fabric planes = made(text + "planes: per_rail\n");
  EXPECT_EQ(planes.counts(), (FabricCounts{24, 2 * (3 + 2), 24}));
  EXPECT_EQ(complaint(head("two_layer", 3, 8, 8, "rails: 3\n")),
            "fabric.yaml:10:8: error: 8 NICs cannot be spread over 3 rails evenly\n"
            "  rails: 3\n"
            "         ^\n");
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
