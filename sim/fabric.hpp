#pragma once
// The fabric as a graph: GPUs, NVSwitch planes, NICs and switches, the links between them, and the
// routes that traffic takes. Generated from a few lines of YAML (scenarios/fabrics) or stated link
// by link.
//
// Hosts are structured: a GPU has at most one NVSwitch plane (that of its node) and at most one way
// out (through its NIC, or wired straight to a switch), so hosts never forward for others.
// Switches may form any graph. A rail is the NICs that have the same place in their nodes.
//
// Routes follow fewest hops, then least latency. All next hops that tie are kept: route() picks one
// by a hash of (source, destination, label), spray() uses all of them. Either way a link weighs as
// many as it has cables, as ECMP over ports does; capacity is not looked at, so a slow link keeps
// its share of the paths. One shortest-path tree per destination switch, made when first asked for.

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sim/config.hpp"
#include "sim/ids.hpp"
#include "sim/units.hpp"

namespace orrery {

using VertexId = Id<struct VertexTag>;  ///< switches first, then the hosts' parts
using LinkId = Id<struct LinkTag>;      ///< a directed link; ordered by (from, to)
using GpuId = Id<struct GpuTag>;        ///< node by node

enum class VertexKind : std::uint8_t { leaf, spine, core, nvswitch, nic, gpu };
enum class LinkTier : std::uint8_t { nvlink, pcie, nic, leaf_spine, spine_core };
inline constexpr int kLinkTiers = 5;
std::string_view name_of(LinkTier tier);

/// How traffic reaches another rail of another node: over NVLink to the GPU of that rail in the
/// sender's node (NCCL's PXN), else across the switches; or always across the switches.
enum class CrossRail : std::uint8_t { nvlink, spine };

struct Transfer {
  GpuId from;
  GpuId to;
  double bytes = 0;
};

/// Bytes by link, and which links have any (in no order, perhaps several times).
struct LinkBytes {
  IdVector<LinkId, double> bytes;
  std::vector<LinkId> touched;
  void add(LinkId link, double more) {
    bytes[link] += more;
    touched.push_back(link);
  }
};

struct FabricVertex {
  std::string name;  ///< unique: "node3/gpu5", "plane0/leaf2", "core17"
  VertexKind kind = VertexKind::leaf;
  std::int32_t node = -1;  ///< of GPUs, NICs and NVSwitch planes; -1 for switches
  std::int32_t rail = -1;  ///< of GPUs: that of their NIC
};

struct FabricLink {
  VertexId from;
  VertexId to;
  LinkTier tier = LinkTier::leaf_spine;
  std::uint32_t cables = 1;         ///< parallel cables, one link in the graph
  double capacity_bytes_per_s = 0;  ///< of all cables together, one direction
  Picoseconds latency_ps = 0;
  bool failed = false;
};

/// What Fabric is built of. Vertices: switches (leaf, spine, core) first; links by (from, to).
struct FabricGraph {
  std::string name;
  CrossRail cross_rail = CrossRail::nvlink;
  IdVector<VertexId, FabricVertex> vertices;
  IdVector<LinkId, FabricLink> links;
  Location at;  ///< where a missing path is to be blamed: the faults, else the file
};

/// As arXiv 2505.09343 counts topologies (table "Network topology comparison"): links are cables
/// between switches, each counted once. NVSwitches are not counted.
struct FabricCounts {
  std::int64_t endpoints = 0;  ///< NICs, and GPUs wired to a switch without one
  std::int64_t switches = 0;
  std::int64_t switch_cables = 0;
  friend bool operator==(const FabricCounts&, const FabricCounts&) = default;
};

class Fabric {
 public:
  explicit Fabric(FabricGraph graph);
  Fabric(Fabric&&) noexcept;
  Fabric& operator=(Fabric&&) noexcept;
  ~Fabric();

  const std::string& name() const { return graph_.name; }
  const IdVector<VertexId, FabricVertex>& vertices() const { return graph_.vertices; }
  const IdVector<LinkId, FabricLink>& links() const { return graph_.links; }
  std::size_t gpus() const { return hosts_.size(); }
  VertexId vertex(GpuId gpu) const { return hosts_[gpu].gpu; }
  std::size_t nodes() const { return nodes_.size(); }
  std::size_t gpus_of_node(std::size_t node) const { return nodes_[node].size(); }
  FabricCounts counts() const;               ///< failed links count too: they are there
  std::string link_name(LinkId link) const;  ///< "node0/nic1 -> leaf3"

  /// The links from GPU to GPU in order; empty for a GPU to itself. The same arguments give the
  /// same path. Inside a node over NVLink. Safe to call from several threads.
  /// Throws InputError where failed links leave no path.
  std::vector<LinkId> route(GpuId source, GpuId destination, std::uint32_t label) const;

  /// The links that a GPU's traffic to anywhere outside of its node takes: through its NIC to its
  /// leaf. Empty where it has no way out.
  std::span<const LinkId> way_out(GpuId gpu) const { return hosts_[gpu].up; }

  /// Every link that per-packet spraying uses and its share of the traffic, hop by hop: the shares
  /// of the links that are equally far from the source sum to 1. Throws as route().
  std::vector<std::pair<LinkId, double>> spray(GpuId source, GpuId destination) const;

  /// Adds what these transfers put on each link when they are sprayed; `sums.bytes` has as many
  /// elements as there are links. Those between the same switches share the work. Throws as
  /// route().
  void spray(std::span<const Transfer> transfers, LinkBytes& sums) const;

  Picoseconds latency_ps(std::span<const LinkId> path) const;  ///< sum over the links

  /// Shortest-path trees made so far: at most one per switch that has endpoints.
  std::size_t trees_made() const;

 private:
  struct Adjacency;  // Boost.Graph stays in fabric.cpp: it is slow to compile
  struct Tree;

  struct Host {
    VertexId gpu;
    std::int32_t node = -1;
    std::int32_t rail = -1;
    std::optional<LinkId> nvlink_up;  // to its NVSwitch plane, and back
    std::optional<LinkId> nvlink_down;
    std::vector<LinkId> up;    // to its leaf, through its NIC
    std::vector<LinkId> down;  // from its leaf; empty where there is none
  };

  struct Legs {  // fixed links, then any shortest path between two switches, then fixed links
    std::vector<LinkId> before;
    std::vector<LinkId> after;
    std::optional<std::pair<VertexId, VertexId>> across;
  };

  Host host_of(VertexId gpu) const;
  bool alive(LinkId link) const { return !graph_.links[link].failed; }
  bool nvlink_joins(const Host& a, const Host& b) const;
  std::optional<GpuId> relay(GpuId source, GpuId destination) const;
  std::string obstacle(const Host& a, const Host& b) const;  // empty: the network joins them
  Legs legs_between(GpuId source, GpuId destination) const;
  const Tree& tree_to(VertexId destination) const;
  std::vector<LinkId> next_hops(const Tree& tree, VertexId at) const;
  template <class Add>
  void spread(VertexId destination, const std::map<VertexId, double>& sources, Add add) const;

  FabricGraph graph_;
  std::size_t switches_ = 0;
  std::unique_ptr<const Adjacency> adjacency_;
  IdVector<GpuId, Host> hosts_;
  std::vector<std::vector<GpuId>> nodes_;
  std::unique_ptr<Tree[]> trees_;  // by switch
};

/// Reads scenarios/fabrics/*.yaml; the keys are in the README beside them. Nullopt if and only if
/// it added problems.
std::optional<Fabric> read_fabric(const Node& node, Problems& problems);

}  // namespace orrery
