#include "sim/fabric.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <atomic>
#include <boost/graph/compressed_sparse_row_graph.hpp>
#include <boost/range/iterator_range.hpp>
#include <cmath>
#include <limits>
#include <map>
#include <tuple>

#include "sim/check.hpp"

namespace orrery {

std::string_view name_of(LinkTier tier) {
  switch (tier) {
    case LinkTier::nvlink:
      return "NVLink";
    case LinkTier::pcie:
      return "PCIe";
    case LinkTier::nic:
      return "NIC";
    case LinkTier::leaf_spine:
      return "leaf-spine";
    case LinkTier::spine_core:
      return "spine-core";
  }
  return "?";
}

namespace {

constexpr std::uint32_t kUnreached = std::numeric_limits<std::uint32_t>::max();

bool is_switch(VertexKind kind) {
  return kind == VertexKind::leaf || kind == VertexKind::spine || kind == VertexKind::core;
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------
// Routes

struct Fabric::Adjacency {
  using Graph = boost::compressed_sparse_row_graph<boost::bidirectionalS, boost::no_property,
                                                   boost::no_property, boost::no_property,
                                                   std::uint32_t, std::uint32_t>;
  Graph graph;

  LinkId link(const Graph::edge_descriptor& edge) const {
    return LinkId(get(boost::edge_index, graph, edge));
  }
};

struct Fabric::Tree {
  std::once_flag once;
  std::atomic<bool> made = false;
  std::vector<std::uint32_t> hops;      // by switch, to the destination
  std::vector<Picoseconds> latency_ps;  // least of the paths with so few hops
};

Fabric::Fabric(Fabric&&) noexcept = default;
Fabric& Fabric::operator=(Fabric&&) noexcept = default;
Fabric::~Fabric() = default;

Fabric::Fabric(FabricGraph graph) : graph_(std::move(graph)) {
  const auto& vertices = graph_.vertices;
  const auto by_ends = [](const FabricLink& a, const FabricLink& b) {
    return std::pair(a.from, a.to) < std::pair(b.from, b.to);
  };
  ORRERY_CHECK(std::is_sorted(graph_.links.begin(), graph_.links.end(), by_ends),
               "links are not in order");
  while (switches_ < vertices.size() && is_switch(vertices[VertexId(switches_)].kind)) ++switches_;

  std::vector<std::pair<std::uint32_t, std::uint32_t>> ends;
  ends.reserve(graph_.links.size());
  for (const FabricLink& link : graph_.links) ends.emplace_back(link.from.value, link.to.value);
  adjacency_ = std::make_unique<const Adjacency>(
      Adjacency{Adjacency::Graph(boost::edges_are_unsorted_multi_pass, ends.begin(), ends.end(),
                                 static_cast<std::uint32_t>(vertices.size()))});
  trees_ = std::make_unique<Tree[]>(switches_);

  for (VertexId v(switches_); v.value < vertices.size(); ++v) {
    ORRERY_CHECK(!is_switch(vertices[v].kind), "switches must come first");
    if (vertices[v].kind != VertexKind::gpu) continue;
    hosts_.push_back(host_of(v));
    const auto node = static_cast<std::size_t>(vertices[v].node);
    if (nodes_.size() <= node) nodes_.resize(node + 1);
    nodes_[node].emplace_back(hosts_.size() - 1);
  }
}

Fabric::Host Fabric::host_of(VertexId gpu) const {
  const auto& g = adjacency_->graph;
  const auto& vertices = graph_.vertices;
  Host host;
  host.gpu = gpu;
  host.node = vertices[gpu].node;
  host.rail = vertices[gpu].rail;
  VertexId out = gpu;  // what is wired to the leaf: the GPU itself or its NIC
  for (const auto& edge : boost::make_iterator_range(out_edges(gpu.value, g))) {
    const VertexId to(target(edge, g));
    if (vertices[to].kind == VertexKind::nvswitch) host.nvlink_up = adjacency_->link(edge);
    if (vertices[to].kind != VertexKind::nic) continue;
    host.up.push_back(adjacency_->link(edge));
    out = to;
  }
  VertexId in = gpu;
  for (const auto& edge : boost::make_iterator_range(in_edges(gpu.value, g))) {
    const VertexId from(source(edge, g));
    if (vertices[from].kind == VertexKind::nvswitch) host.nvlink_down = adjacency_->link(edge);
    if (vertices[from].kind != VertexKind::nic) continue;
    host.down.push_back(adjacency_->link(edge));
    in = from;
  }
  std::optional<LinkId> to_leaf, from_leaf;
  for (const auto& edge : boost::make_iterator_range(out_edges(out.value, g))) {
    if (target(edge, g) < switches_) to_leaf = adjacency_->link(edge);
  }
  for (const auto& edge : boost::make_iterator_range(in_edges(in.value, g))) {
    if (source(edge, g) < switches_) from_leaf = adjacency_->link(edge);
  }
  if (to_leaf) {
    host.up.push_back(*to_leaf);
  } else {
    host.up.clear();
  }
  if (from_leaf) {
    host.down.insert(host.down.begin(), *from_leaf);
  } else {
    host.down.clear();
  }
  return host;
}

const Fabric::Tree& Fabric::tree_to(VertexId destination) const {
  Tree& tree = trees_[destination.value];
  std::call_once(tree.once, [&] {
    const auto& g = adjacency_->graph;
    tree.hops.assign(switches_, kUnreached);
    tree.latency_ps.assign(switches_, std::numeric_limits<Picoseconds>::max());
    tree.hops[destination.value] = 0;
    tree.latency_ps[destination.value] = 0;
    // Breadth first: when a switch comes up, all that are a hop nearer have been expanded, so its
    // latency is final.
    std::vector<std::uint32_t> queue = {destination.value};
    for (std::size_t i = 0; i < queue.size(); ++i) {
      const std::uint32_t to = queue[i];
      for (const auto& edge : boost::make_iterator_range(in_edges(to, g))) {
        const std::uint32_t from = source(edge, g);
        // Most edges lead back; to see that takes no look at the link.
        if (from >= switches_ || tree.hops[from] <= tree.hops[to]) continue;
        const FabricLink& link = graph_.links[adjacency_->link(edge)];
        if (link.failed) continue;
        if (tree.hops[from] == kUnreached) {
          tree.hops[from] = tree.hops[to] + 1;
          queue.push_back(from);
        }
        if (tree.hops[from] == tree.hops[to] + 1) {
          tree.latency_ps[from] =
              std::min(tree.latency_ps[from], tree.latency_ps[to] + link.latency_ps);
        }
      }
    }
    tree.made = true;
  });
  return tree;
}

std::size_t Fabric::trees_made() const {
  return static_cast<std::size_t>(std::count_if(trees_.get(), trees_.get() + switches_,
                                                [](const Tree& tree) { return tree.made.load(); }));
}

std::vector<LinkId> Fabric::next_hops(const Tree& tree, VertexId at) const {
  const auto& g = adjacency_->graph;
  std::vector<LinkId> next;
  for (const auto& edge : boost::make_iterator_range(out_edges(at.value, g))) {
    const std::uint32_t to = target(edge, g);
    if (to >= switches_ || tree.hops[to] == kUnreached) continue;
    const FabricLink& link = graph_.links[adjacency_->link(edge)];
    if (!link.failed && tree.hops[to] + 1 == tree.hops[at.value] &&
        tree.latency_ps[to] + link.latency_ps == tree.latency_ps[at.value]) {
      next.push_back(adjacency_->link(edge));
    }
  }
  return next;
}

bool Fabric::nvlink_joins(const Host& a, const Host& b) const {
  if (!a.nvlink_up || !b.nvlink_down) return false;
  return graph_.links[*a.nvlink_up].to == graph_.links[*b.nvlink_down].from &&
         alive(*a.nvlink_up) && alive(*b.nvlink_down);
}

std::optional<GpuId> Fabric::relay(GpuId source, GpuId destination) const {
  const auto of_rail = [&](GpuId member) {
    std::vector<GpuId> found;
    for (const GpuId gpu : nodes_[static_cast<std::size_t>(hosts_[member].node)]) {
      if (hosts_[gpu].rail == hosts_[destination].rail) found.push_back(gpu);
    }
    return found;
  };
  const std::vector<GpuId> here = of_rail(source);
  if (here.empty()) return std::nullopt;
  // Where GPUs share a NIC, the destination's twin, so that relays share the work.
  const std::vector<GpuId> there = of_rail(destination);
  const auto place = std::find(there.begin(), there.end(), destination) - there.begin();
  return here[static_cast<std::size_t>(place) % here.size()];
}

std::string Fabric::obstacle(const Host& a, const Host& b) const {
  const auto& vertices = graph_.vertices;
  if (a.up.empty()) return vertices[a.gpu].name + " has no link to a switch";
  if (b.down.empty()) return "no switch has a link to " + vertices[b.gpu].name;
  for (const auto* path : {&a.up, &b.down}) {
    for (const LinkId link : *path) {
      if (!alive(link)) return fmt::format("link {} has failed", link_name(link));
    }
  }
  const VertexId from = graph_.links[a.up.back()].to;
  const VertexId to = graph_.links[b.down.front()].from;
  if (tree_to(to).hops[from.value] != kUnreached) return "";
  return fmt::format("{} does not reach {}", vertices[from].name, vertices[to].name);
}

Fabric::Legs Fabric::legs_between(GpuId source, GpuId destination) const {
  ORRERY_CHECK(source.value < gpus() && destination.value < gpus(), "GPU {} to {} of {}",
               source.value, destination.value, gpus());
  if (source == destination) return {};
  const Host& a = hosts_[source];
  const Host& b = hosts_[destination];
  if (nvlink_joins(a, b)) return {{*a.nvlink_up, *b.nvlink_down}, {}, {}};

  const auto across = [&](const Host& sender) {
    return std::pair(graph_.links[sender.up.back()].to, graph_.links[b.down.front()].from);
  };
  if (graph_.cross_rail == CrossRail::nvlink && a.rail != b.rail && a.node != b.node) {
    const std::optional<GpuId> gpu = relay(source, destination);
    if (gpu && nvlink_joins(a, hosts_[*gpu]) && obstacle(hosts_[*gpu], b).empty()) {
      const Host& sender = hosts_[*gpu];
      Legs legs{{*a.nvlink_up, *sender.nvlink_down}, b.down, across(sender)};
      legs.before.insert(legs.before.end(), sender.up.begin(), sender.up.end());
      return legs;
    }
  }
  const std::string why = obstacle(a, b);
  if (!why.empty()) {
    Problems problems;
    problems.add(graph_.at, fmt::format("no path from {} to {}: {}", graph_.vertices[a.gpu].name,
                                        graph_.vertices[b.gpu].name, why));
    problems.throw_if_any();
  }
  return {a.up, b.down, across(a)};
}

std::vector<LinkId> Fabric::route(GpuId source, GpuId destination, std::uint32_t label) const {
  Legs legs = legs_between(source, destination);
  std::vector<LinkId> path = std::move(legs.before);
  if (legs.across) {
    const Tree& tree = tree_to(legs.across->second);
    const std::uint64_t flow = mix(mix(mix(source.value) ^ destination.value) ^ label);
    for (VertexId at = legs.across->first; at != legs.across->second;
         at = graph_.links[path.back()].to) {
      const std::vector<LinkId> next = next_hops(tree, at);
      std::uint64_t cables = 0;
      for (const LinkId link : next) cables += graph_.links[link].cables;
      // The switch is part of the hash, else all layers would make the same choice.
      std::uint64_t chosen = mix(flow ^ mix(at.value)) % cables;
      std::size_t i = 0;
      for (; chosen >= graph_.links[next[i]].cables; ++i) chosen -= graph_.links[next[i]].cables;
      path.push_back(next[i]);
    }
  }
  path.insert(path.end(), legs.after.begin(), legs.after.end());
  return path;
}

/// From several switches to one, over all shortest paths: `add(link, bytes)` for every link, those
/// farthest from the destination first.
template <class Add>
void Fabric::spread(VertexId destination, const std::map<VertexId, double>& sources,
                    Add add) const {
  const Tree& tree = tree_to(destination);
  std::vector<std::map<VertexId, double>> arriving;  // by hops to the destination
  for (const auto& [at, bytes] : sources) {
    const std::size_t hops = tree.hops[at.value];
    if (arriving.size() <= hops) arriving.resize(hops + 1);
    arriving[hops].emplace(at, bytes);
  }
  for (std::size_t hops = arriving.size(); hops-- > 1;) {
    for (const auto& [at, bytes] : arriving[hops]) {
      const std::vector<LinkId> next = next_hops(tree, at);
      double cables = 0;
      for (const LinkId link : next) cables += graph_.links[link].cables;
      for (const LinkId link : next) {
        const double share = bytes * graph_.links[link].cables / cables;
        add(link, share);
        arriving[hops - 1][graph_.links[link].to] += share;
      }
    }
  }
}

std::vector<std::pair<LinkId, double>> Fabric::spray(GpuId source, GpuId destination) const {
  const Legs legs = legs_between(source, destination);
  std::vector<std::pair<LinkId, double>> shares;
  const auto add = [&](LinkId link, double share) { shares.emplace_back(link, share); };
  for (const LinkId link : legs.before) add(link, 1);
  if (legs.across) spread(legs.across->second, {{legs.across->first, 1.0}}, add);
  for (const LinkId link : legs.after) add(link, 1);
  return shares;
}

void Fabric::spray(std::span<const Transfer> transfers, LinkBytes& sums) const {
  std::map<VertexId, std::map<VertexId, double>> across;  // by destination, source
  for (const Transfer& t : transfers) {
    const Legs legs = legs_between(t.from, t.to);
    for (const LinkId link : legs.before) sums.add(link, t.bytes);
    if (legs.across && legs.across->first != legs.across->second) {
      across[legs.across->second][legs.across->first] += t.bytes;
    }
    for (const LinkId link : legs.after) sums.add(link, t.bytes);
  }
  for (const auto& [destination, sources] : across) {
    spread(destination, sources, [&](LinkId link, double bytes) { sums.add(link, bytes); });
  }
}

Picoseconds Fabric::latency_ps(std::span<const LinkId> path) const {
  Picoseconds sum = 0;
  for (const LinkId link : path) sum += graph_.links[link].latency_ps;
  return sum;
}

std::string Fabric::link_name(LinkId link) const {
  const FabricLink& l = graph_.links[link];
  return fmt::format("{} -> {}", graph_.vertices[l.from].name, graph_.vertices[l.to].name);
}

FabricCounts Fabric::counts() const {
  FabricCounts counts;
  counts.switches = static_cast<std::int64_t>(switches_);
  std::int64_t directed = 0;
  for (const FabricLink& link : graph_.links) {
    if (is_switch(graph_.vertices[link.from].kind) && is_switch(graph_.vertices[link.to].kind)) {
      directed += link.cables;
    }
    counts.endpoints += link.tier == LinkTier::nic && !is_switch(graph_.vertices[link.from].kind);
  }
  counts.switch_cables = directed / 2;
  return counts;
}

// ---------------------------------------------------------------------------------------------------
// Generators

namespace {

struct LinkSpec {
  double capacity_bytes_per_s = 0;  // of one cable, one direction
  Picoseconds latency_ps = 0;
};

struct Builder {
  FabricGraph graph;

  VertexId add(std::string name, VertexKind kind, std::int64_t node = -1, std::int64_t rail = -1) {
    graph.vertices.push_back(
        {std::move(name), kind, static_cast<std::int32_t>(node), static_cast<std::int32_t>(rail)});
    return VertexId(graph.vertices.size() - 1);
  }
  void connect(VertexId from, VertexId to, LinkTier tier, const LinkSpec& spec,
               std::int64_t cables) {
    graph.links.push_back({from, to, tier, static_cast<std::uint32_t>(cables),
                           spec.capacity_bytes_per_s * static_cast<double>(cables), spec.latency_ps,
                           false});
  }
  void join(VertexId a, VertexId b, LinkTier tier, const LinkSpec& spec, std::int64_t cables = 1) {
    connect(a, b, tier, spec, cables);
    connect(b, a, tier, spec, cables);
  }

  /// Into the order that FabricGraph promises.
  void sort() {
    std::vector<VertexId> order;
    for (VertexId v; v.value < graph.vertices.size(); ++v) order.push_back(v);
    std::stable_partition(order.begin(), order.end(),
                          [&](VertexId v) { return is_switch(graph.vertices[v].kind); });
    IdVector<VertexId, FabricVertex> vertices;
    IdVector<VertexId, VertexId> moved(order.size());
    for (const VertexId v : order) {
      moved[v] = VertexId(vertices.size());
      vertices.push_back(std::move(graph.vertices[v]));
    }
    graph.vertices = std::move(vertices);
    for (FabricLink& link : graph.links) {
      link.from = moved[link.from];
      link.to = moved[link.to];
    }
    std::sort(graph.links.begin(), graph.links.end(), [](const auto& a, const auto& b) {
      return std::pair(a.from, a.to) < std::pair(b.from, b.to);
    });
  }
};

/// What the few lines of a generated fabric say. One cable of every kind of link.
struct Recipe {
  int layers = 1;  // of switches; 0: one node and no way out of it
  std::int64_t nodes = 1;
  std::int64_t gpus_per_node = 8;
  std::int64_t nics_per_node = 8;
  std::int64_t rails = 8;   // NIC i of a node is on rail i % rails
  std::int64_t ports = 64;  // of every switch
  double over_subscription = 1;
  bool rail_optimised = true;
  bool plane_per_rail = false;
  LinkSpec nvlink, pcie, nic, leaf_spine, spine_core;

  std::int64_t up_ports() const {
    return static_cast<std::int64_t>(
        std::llround(static_cast<double>(ports) / (1 + over_subscription)));
  }
  std::int64_t down_ports() const { return layers == 1 ? ports : ports - up_ports(); }
  std::int64_t planes() const { return plane_per_rail ? rails : 1; }
  std::int64_t plane_of(std::int64_t index) const { return plane_per_rail ? index % rails : 0; }

  /// The leaf of its plane that NIC `index` of a node is wired to. Rail-optimised: as many NICs of
  /// every rail as a leaf has ports share a group of leaves, one per rail.
  std::int64_t leaf_of(std::int64_t node, std::int64_t index) const {
    const std::int64_t on_rail = node * (nics_per_node / rails) + index / rails;
    if (plane_per_rail) return on_rail / down_ports();
    if (layers == 1 || !rail_optimised) return (node * nics_per_node + index) / down_ports();
    return on_rail / down_ports() * rails + index % rails;
  }
  std::int64_t leaves() const { return leaf_of(nodes - 1, nics_per_node - 1) + 1; }

  /// Three layers: leaves that share their spines. A group of rails is not torn apart.
  std::int64_t leaves_per_pod() const {
    const std::int64_t most = ports / 2;
    const std::int64_t group = rail_optimised && !plane_per_rail ? rails : 1;
    return most / group * group;
  }
  std::int64_t pods() const { return (leaves() + leaves_per_pod() - 1) / leaves_per_pod(); }
};

/// The fewest upper switches among which `uplinks` cables of each of `lower` switches spread
/// evenly, within the ports of the upper ones. Needs lower <= ports.
std::int64_t fewest_uppers(std::int64_t lower, std::int64_t uplinks, std::int64_t ports) {
  std::int64_t uppers = 1;
  while (uplinks % uppers != 0 || uppers * ports < lower * uplinks) ++uppers;
  return uppers;
}

/// Spines over `leaves` (one pod, or a whole two-layer plane), each leaf wired to every spine.
std::vector<VertexId> add_spines(Builder& build, const Recipe& recipe,
                                 std::span<const VertexId> leaves, const std::string& prefix,
                                 std::int64_t spines) {
  std::vector<VertexId> added;
  for (std::int64_t s = 0; s < spines; ++s) {
    added.push_back(build.add(fmt::format("{}spine{}", prefix, s), VertexKind::spine));
    for (const VertexId leaf : leaves) {
      build.join(leaf, added.back(), LinkTier::leaf_spine, recipe.leaf_spine,
                 recipe.up_ports() / spines);
    }
  }
  return added;
}

std::vector<VertexId> add_switches(Builder& build, const Recipe& recipe,
                                   const std::string& prefix) {
  std::vector<VertexId> leaves;
  for (std::int64_t l = 0; l < recipe.leaves(); ++l) {
    leaves.push_back(build.add(fmt::format("{}leaf{}", prefix, l), VertexKind::leaf));
  }
  if (recipe.layers == 2) {
    const std::int64_t spines = fewest_uppers(recipe.leaves(), recipe.up_ports(), recipe.ports);
    add_spines(build, recipe, leaves, prefix, spines);
  }
  if (recipe.layers == 3) {
    // Spine s of every pod is wired to the s-th group of cores, so every core reaches every pod.
    const std::int64_t uplinks = recipe.ports / 2;
    const std::int64_t cores = fewest_uppers(recipe.pods(), uplinks, recipe.ports);
    std::vector<std::vector<VertexId>> pods;
    for (std::int64_t p = 0; p < recipe.pods(); ++p) {
      const auto first = static_cast<std::size_t>(p * recipe.leaves_per_pod());
      const auto count =
          std::min(static_cast<std::size_t>(recipe.leaves_per_pod()), leaves.size() - first);
      pods.push_back(add_spines(build, recipe, std::span(leaves).subspan(first, count),
                                fmt::format("{}pod{}/", prefix, p), recipe.up_ports()));
    }
    for (std::size_t s = 0; s < pods.front().size(); ++s) {
      for (std::int64_t c = 0; c < cores; ++c) {
        const std::int64_t index = static_cast<std::int64_t>(s) * cores + c;
        const VertexId core = build.add(fmt::format("{}core{}", prefix, index), VertexKind::core);
        for (const auto& spines : pods) {
          build.join(spines[s], core, LinkTier::spine_core, recipe.spine_core, uplinks / cores);
        }
      }
    }
  }
  return leaves;
}

FabricGraph generate(const Recipe& recipe) {
  Builder build;
  std::vector<std::vector<VertexId>> planes;
  for (std::int64_t p = 0; recipe.layers > 0 && p < recipe.planes(); ++p) {
    planes.push_back(
        add_switches(build, recipe, recipe.plane_per_rail ? fmt::format("plane{}/", p) : ""));
  }
  for (std::int64_t n = 0; n < recipe.nodes; ++n) {
    const std::string prefix = fmt::format("node{}/", n);
    std::vector<VertexId> nics;
    for (std::int64_t i = 0; i < recipe.nics_per_node; ++i) {
      nics.push_back(build.add(fmt::format("{}nic{}", prefix, i), VertexKind::nic, n));
      const auto plane = static_cast<std::size_t>(recipe.plane_of(i));
      const auto leaf = static_cast<std::size_t>(recipe.leaf_of(n, i));
      build.join(nics.back(), planes[plane][leaf], LinkTier::nic, recipe.nic);
    }
    std::optional<VertexId> nvswitch;
    if (recipe.gpus_per_node > 1)
      nvswitch = build.add(prefix + "nvswitch", VertexKind::nvswitch, n);
    for (std::int64_t i = 0; i < recipe.gpus_per_node; ++i) {
      const std::int64_t nic = i * recipe.nics_per_node / recipe.gpus_per_node;
      const VertexId gpu =
          build.add(fmt::format("{}gpu{}", prefix, i), VertexKind::gpu, n, nic % recipe.rails);
      if (nvswitch) build.join(gpu, *nvswitch, LinkTier::nvlink, recipe.nvlink);
      if (!nics.empty()) {
        build.join(gpu, nics[static_cast<std::size_t>(nic)], LinkTier::pcie, recipe.pcie);
      }
    }
  }
  return std::move(build.graph);
}

// ---------------------------------------------------------------------------------------------------
// Reading

constexpr std::int64_t kMaxGpus = 1'000'000;
constexpr std::int64_t kMaxPorts = 1024;

LinkSpec read_rates(MapReader& map) {
  LinkSpec spec;
  spec.capacity_bytes_per_s = map.quantity("capacity", Dimension::bytes_per_s);
  const double latency_s = map.quantity("latency", Dimension::seconds);
  if (latency_s > 1) {
    map.problems().add(map.at("latency"), "a link's latency is at most 1 s");
  } else {
    spec.latency_ps = from_seconds(latency_s);
  }
  return spec;
}

LinkSpec read_link_spec(MapReader& fabric, std::string_view key) {
  const Node node = fabric.require(key);
  if (node.kind() == Node::Kind::null) return {};
  MapReader map(node, fabric.problems(), std::string(key));
  const LinkSpec spec = read_rates(map);
  map.text("source");
  map.finish();
  return spec;
}

Recipe read_recipe(MapReader& map, int layers, CrossRail cross_rail) {
  Problems& problems = map.problems();
  const std::size_t before = problems.size();
  Recipe recipe;
  recipe.layers = layers;
  recipe.gpus_per_node = map.integer("gpus_per_node", 1, 1024);
  if (recipe.gpus_per_node > 1) recipe.nvlink = read_link_spec(map, "nvlink");
  if (layers == 0) {
    recipe.nics_per_node = 0;
    return recipe;
  }
  recipe.nodes = map.integer("nodes", 1, kMaxGpus);
  recipe.nics_per_node = map.integer_or("nics_per_node", recipe.gpus_per_node, 1, 1024);
  recipe.rails = map.integer_or("rails", recipe.nics_per_node, 1, 1024);
  recipe.ports = map.integer("switch_ports", 2, layers == 1 ? kMaxGpus : kMaxPorts);
  recipe.pcie = read_link_spec(map, "pcie");
  recipe.nic = read_link_spec(map, "nic");
  if (layers > 1) {
    recipe.rail_optimised = map.flag_or("rail_optimised", true);
    recipe.plane_per_rail = map.choice_or("planes", false, {{"shared", false}, {"per_rail", true}});
    recipe.over_subscription = map.number_or("over_subscription", 1, 1, kMaxPorts);
    recipe.leaf_spine = read_link_spec(map, "leaf_spine");
  }
  if (layers > 2) recipe.spine_core = read_link_spec(map, "spine_core");
  if (problems.size() > before) return recipe;

  if (recipe.gpus_per_node % recipe.nics_per_node != 0) {
    problems.add(map.at("nics_per_node"), fmt::format("{} GPUs cannot share {} NICs evenly",
                                                      recipe.gpus_per_node, recipe.nics_per_node));
  }
  if (recipe.nics_per_node % recipe.rails != 0) {
    problems.add(map.at("rails"), fmt::format("{} NICs cannot be spread over {} rails evenly",
                                              recipe.nics_per_node, recipe.rails));
  }
  if (recipe.nodes * recipe.gpus_per_node > kMaxGpus) {
    problems.add(map.at("nodes"), "a fabric may have at most 1,000,000 GPUs");
  }
  if (recipe.plane_per_rail && cross_rail == CrossRail::spine && recipe.rails > 1) {
    problems.add(map.at("cross_rail"),
                 "with 'planes: per_rail' no spine joins the rails; only 'nvlink' is possible");
  }
  const double up = static_cast<double>(recipe.ports) / (1 + recipe.over_subscription);
  if (layers > 1 && (std::abs(up - std::round(up)) > 1e-9 || up < 1)) {
    problems.add(map.at("over_subscription"),
                 fmt::format("{} ports cannot be split {}:1 into down and up", recipe.ports,
                             recipe.over_subscription));
    return recipe;
  }
  if (layers == 3 && recipe.ports % 2 != 0) {
    problems.add(map.at("switch_ports"), "three layers need an even number of ports");
  }
  if (layers == 3 && recipe.leaves_per_pod() == 0) {
    problems.add(map.at("switch_ports"),
                 fmt::format("a spine has {} ports towards leaves, fewer than the {} rails",
                             recipe.ports / 2, recipe.rails));
  }
  if (problems.size() > before) return recipe;

  const std::int64_t most_leaves = layers == 1   ? 1
                                   : layers == 2 ? recipe.ports
                                                 : recipe.ports * recipe.leaves_per_pod();
  if (recipe.leaves() > most_leaves) {
    problems.add(map.at("nodes"),
                 fmt::format("{} nodes need {} leaves{}; {} of {}-port switches have at most {}",
                             recipe.nodes, recipe.leaves(), recipe.plane_per_rail ? " a plane" : "",
                             layers == 1   ? "one layer"
                             : layers == 2 ? "two layers"
                                           : "three layers",
                             recipe.ports, most_leaves),
                 layers < 3 ? "more ports or one more layer" : "");
  }
  return recipe;
}

std::optional<LinkTier> tier_between(VertexKind a, VertexKind b) {
  const auto either = [&](VertexKind kind) { return a == kind || b == kind; };
  if (is_switch(a) && is_switch(b)) {
    return either(VertexKind::core) ? LinkTier::spine_core : LinkTier::leaf_spine;
  }
  if (is_switch(a) || is_switch(b)) {
    if (either(VertexKind::nvswitch)) return std::nullopt;
    return LinkTier::nic;
  }
  if (a == b || !either(VertexKind::gpu)) return std::nullopt;
  return either(VertexKind::nvswitch) ? LinkTier::nvlink : LinkTier::pcie;
}

/// An arbitrary graph, as far as hosts are structured (the head of fabric.hpp).
FabricGraph read_graph(MapReader& map) {
  Problems& problems = map.problems();
  Builder build;
  auto& vertices = build.graph.vertices;
  std::map<std::string, VertexId, std::less<>> by_name;
  std::map<std::int64_t, std::int64_t> gpus_seen;  // by node

  const auto list = [&](std::string_view key) {
    const Node node = map.require(key);
    if (node.kind() != Node::Kind::sequence && node.kind() != Node::Kind::null) {
      problems.add(node, fmt::format("'{}' must be a list", key));
    }
    return node.kind() == Node::Kind::sequence ? node : Node();
  };
  const Node vertex_list = list("vertices");
  for (std::size_t i = 0; i < vertex_list.size(); ++i) {
    MapReader entry(vertex_list[i], problems, "vertex");
    std::string name = entry.text("name");
    const auto kind = entry.choice<VertexKind>("kind", {{"gpu", VertexKind::gpu},
                                                        {"nvswitch", VertexKind::nvswitch},
                                                        {"nic", VertexKind::nic},
                                                        {"leaf", VertexKind::leaf},
                                                        {"spine", VertexKind::spine},
                                                        {"core", VertexKind::core}});
    std::int64_t node = -1;
    std::int64_t rail = -1;
    if (!is_switch(kind)) node = entry.integer("node", 0, kMaxGpus - 1);
    if (kind == VertexKind::gpu) {
      rail = entry.integer_or("rail", gpus_seen[node]++, 0, kMaxGpus - 1);
    }
    entry.finish();
    const auto [at, fresh] = by_name.emplace(name, build.add(name, kind, node, rail));
    if (!fresh && !name.empty()) {
      problems.add(entry.at("name"), fmt::format("vertex '{}' is there already", name));
    }
  }

  std::vector<std::string> names;
  names.reserve(by_name.size());
  for (const auto& [name, id] : by_name) names.push_back(name);
  std::map<std::pair<VertexId, VertexId>, int> seen;
  // One NVSwitch plane and one way out for a GPU, one switch for a NIC; in each direction.
  std::map<std::tuple<VertexId, bool, bool>, int> ways;
  const auto count_way = [&](VertexId v, LinkTier tier, bool inward, const Node& where) {
    const VertexKind kind = vertices[v].kind;
    const bool counts =
        kind == VertexKind::gpu || (kind == VertexKind::nic && tier == LinkTier::nic);
    if (!counts || ++ways[{v, tier == LinkTier::nvlink, inward}] != 2) return;
    problems.add(where, fmt::format("'{}' has a second {} {}", vertices[v].name,
                                    tier == LinkTier::nvlink ? "NVSwitch plane" : "way",
                                    inward ? "in" : "out"));
  };
  const Node link_list = list("links");
  for (std::size_t i = 0; i < link_list.size(); ++i) {
    MapReader entry(link_list[i], problems, "link");
    const auto end = [&](std::string_view key) -> std::optional<VertexId> {
      const std::string name = entry.text(key);
      const auto found = by_name.find(name);
      if (found != by_name.end()) return found->second;
      const auto near = nearest(name, names);
      if (!name.empty()) {
        problems.add(entry.at(key), fmt::format("no vertex is named '{}'", name),
                     near ? fmt::format("did you mean '{}'?", *near) : "");
      }
      return std::nullopt;
    };
    const auto from = end("from");
    const auto to = end("to");
    const LinkSpec spec = read_rates(entry);
    const std::int64_t cables = entry.integer_or("cables", 1, 1, kMaxPorts);
    const bool one_way = entry.flag_or("one_way", false);
    entry.finish();
    if (!from || !to) continue;
    const FabricVertex& a = vertices[*from];
    const FabricVertex& b = vertices[*to];
    const auto tier = tier_between(a.kind, b.kind);
    if (!tier || *from == *to) {
      problems.add(link_list[i], fmt::format("'{}' and '{}' cannot be linked", a.name, b.name),
                   "GPUs link to NVSwitches, NICs and switches; NICs to switches");
      continue;
    }
    if (a.node >= 0 && b.node >= 0 && a.node != b.node) {
      problems.add(link_list[i],
                   fmt::format("'{}' and '{}' are in different nodes", a.name, b.name));
    }
    const auto link = [&](VertexId x, VertexId y) {
      if (seen[{x, y}]++ > 0) {
        problems.add(
            link_list[i],
            fmt::format("a second link from '{}' to '{}'", vertices[x].name, vertices[y].name),
            "state parallel cables by 'cables'");
      }
      count_way(x, *tier, false, link_list[i]);
      count_way(y, *tier, true, link_list[i]);
      build.connect(x, y, *tier, spec, cables);
    };
    link(*from, *to);
    if (!one_way) link(*to, *from);
  }
  if (gpus_seen.empty() && vertex_list.size() > 0) {
    problems.add(vertex_list, "a fabric without GPUs");
  }
  return std::move(build.graph);
}

/// '*' stands for any text.
bool matches(std::string_view pattern, std::string_view text) {
  std::size_t p = 0, t = 0;
  std::size_t star = std::string_view::npos, resume = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = t;
    } else if (p < pattern.size() && pattern[p] == text[t]) {
      ++p;
      ++t;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      t = ++resume;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

std::vector<LinkId> links_matching(const FabricGraph& graph, std::string_view pattern) {
  // "A -> B" one way, "A <-> B" both, "A" every link into and out of A.
  std::string_view left = pattern, right = "*";
  bool both = true;
  for (const std::string_view arrow : {" <-> ", " -> "}) {
    const auto at = pattern.find(arrow);
    if (at == std::string_view::npos) continue;
    left = pattern.substr(0, at);
    right = pattern.substr(at + arrow.size());
    both = arrow == " <-> ";
    break;
  }
  IdVector<VertexId, std::pair<bool, bool>> fits;
  for (const FabricVertex& v : graph.vertices) {
    fits.emplace_back(matches(left, v.name), matches(right, v.name));
  }
  std::vector<LinkId> found;
  for (LinkId link; link.value < graph.links.size(); ++link) {
    const auto& from = fits[graph.links[link].from];
    const auto& to = fits[graph.links[link].to];
    if ((from.first && to.second) || (both && from.second && to.first)) found.push_back(link);
  }
  return found;
}

void apply_faults(const Node& list, FabricGraph& graph, Problems& problems) {
  if (list.kind() != Node::Kind::sequence) {
    problems.add(list, "'faults' must be a list");
    return;
  }
  for (std::size_t i = 0; i < list.size(); ++i) {
    MapReader fault(list[i], problems, "fault");
    const std::string pattern = fault.text("link");
    const bool failed = fault.flag_or("failed", false);
    const double share = fault.number_or("capacity_share", 1, 1e-6, 1);
    const double added_s = fault.quantity_or("added_latency", 0, Dimension::seconds);
    fault.finish();
    if (added_s > 1) problems.add(fault.at("added_latency"), "a link's latency is at most 1 s");
    if (!failed && !fault.has("capacity_share") && !fault.has("added_latency")) {
      problems.add(list[i], "a fault says 'failed: true', 'capacity_share' or 'added_latency'");
    }
    if (pattern.empty() || added_s > 1) continue;
    std::vector<LinkId> hit;
    if (const auto index = parse_whole_number(pattern)) {
      if (*index >= 0 && *index < static_cast<std::int64_t>(graph.links.size())) {
        hit.emplace_back(static_cast<std::size_t>(*index));
      }
    } else {
      hit = links_matching(graph, pattern);
    }
    if (hit.empty()) {
      problems.add(fault.at("link"), fmt::format("no link matches '{}'", pattern),
                   "a vertex, 'A -> B' (one way), 'A <-> B' (both), with * for any text; or an "
                   "index");
    }
    for (const LinkId link : hit) {
      FabricLink& l = graph.links[link];
      l.failed = l.failed || failed;
      l.capacity_bytes_per_s *= share;
      l.latency_ps += from_seconds(added_s);
    }
  }
}

}  // namespace

std::optional<Fabric> read_fabric(const Node& node, Problems& problems) {
  const std::size_t before = problems.size();
  MapReader map(node, problems, "fabric");
  const std::string name = map.text("name");
  map.text_or("source", "");
  constexpr int kGraph = -1;
  const int layers = map.choice<int>("topology", {{"single_node", 0},
                                                  {"single_switch", 1},
                                                  {"two_layer", 2},
                                                  {"three_layer", 3},
                                                  {"graph", kGraph}});
  const auto cross_rail =
      map.choice_or("cross_rail", CrossRail::nvlink,
                    {{"nvlink", CrossRail::nvlink}, {"spine", CrossRail::spine}});
  map.allow("faults");
  // Which keys belong here depends on it, so nothing else can be judged.
  if (problems.size() > before && !map.has("topology")) return std::nullopt;

  Builder build;
  if (layers == kGraph) {
    build.graph = read_graph(map);
  } else {
    const Recipe recipe = read_recipe(map, layers, cross_rail);
    if (problems.size() == before) build.graph = generate(recipe);
  }
  map.finish();
  if (problems.size() > before) return std::nullopt;

  build.sort();
  build.graph.name = name;
  build.graph.cross_rail = cross_rail;
  build.graph.at = {node.at().file, 0, 0};
  if (map.has("faults")) {
    build.graph.at = map.at("faults").at();
    apply_faults(map.at("faults"), build.graph, problems);
  }
  if (problems.size() > before) return std::nullopt;
  return Fabric(std::move(build.graph));
}

}  // namespace orrery
