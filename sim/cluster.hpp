#pragma once
// The machines: nodes of GPUs with NVLink inside and a NIC per GPU outside, as far as the formulas
// for collectives need it. The fabric as a graph is sim/fabric.hpp.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sim/config.hpp"
#include "sim/fabric.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// A point-to-point path: time(bytes) = latency_s + bytes / bandwidth. `bandwidth_bytes_per_s` is
/// per direction and per GPU, and achieved, not nominal; `source` says who achieved it.
struct LinkRate {
  double bandwidth_bytes_per_s = 0;
  double latency_s = 0;
  std::string source;

  friend bool operator==(const LinkRate&, const LinkRate&) = default;
};

/// What one operation was measured to take on so many ranks of a node, by itself:
///   base_s + bytes that a rank sends / bytes_per_s.
struct MeasuredLine {
  std::optional<CollectiveKind> kind;  ///< nothing: a send
  std::int64_t ranks = 0;
  double base_s = 0;
  double bytes_per_s = 0;
  double spread = 0;  ///< held-out relative error

  friend bool operator==(const MeasuredLine&, const MeasuredLine&) = default;
};

/// What a collective costs besides bytes over bandwidth; network_prices.cpp has the formulas.
///
/// Inside a node a group runs the faster of two protocols. Low latency (NCCL's LL and LL128) sends
/// data and flag together: no handshake, but every byte passes an SM at a low rate. Bulk (Simple)
/// hands over whole chunks: the link's rate, after a handshake and after the first chunk, which
/// nothing overlaps. The chunk is an eighth of the message (NCCL cuts its buffers in 8 steps) until
/// it is as large as the buffers, `nvlink_pipeline_bytes`.
///
/// Across nodes, w bytes over a path of rate B take (w + 2 sqrt(w w0)) / B, w0 = pipeline bytes:
/// the best chunk balances the filling of the pipeline against the cost per chunk, and both then
/// grow with the root of w.
struct CollectiveRates {
  double base_s = 0;                   ///< of every collective: launch and synchronisation
  double nvlink_hop_s = 0;             ///< per step of a ring inside a node
  double low_latency_bytes_per_s = 0;  ///< of a GPU's SMs, its own block included
  double bulk_latency_s = 0;           ///< handshake of the bulk protocol
  double copy_bytes_per_s = 0;         ///< of a GPU's own block inside its memory
  double nvlink_pipeline_bytes = 0;    ///< a chunk as large as the buffers, on all channels
  double peer_bytes_per_s = 0;         ///< of a small message to one peer in the node, low latency
  double peer_latency_s = 0;           ///< of a large one: what the handshake adds
  double nvls_share = 0;               ///< rate through NVSwitch reduction over the ring's rate
  double nic_tree_hop_s = 0;           ///< per level of the tree over nodes, each way
  double nic_ring_hop_s = 0;           ///< per step of a ring over nodes
  double nic_peer_s = 0;               ///< per peer on another node (all-to-all)
  double nic_pipeline_bytes = 0;       ///< per NIC and level of the tree
  double spread = 0;                   ///< held-out relative error inside a node
  double nic_spread = 0;               ///< and across nodes
  /// Where there are some of an operation, they price it inside a node, and not the formulas.
  std::vector<MeasuredLine> lines;
  std::string source;

  friend bool operator==(const CollectiveRates&, const CollectiveRates&) = default;
};

/// How switches choose among equally short ways: every packet anew (adaptive routing), or by a hash
/// of source, destination and queue pair (ECMP).
enum class LoadBalancing : std::uint8_t { spray, ecmp };

/// Weights of the virtual lanes where ops of different kinds share a link: with 2 and 1 the first
/// gets two thirds of what the others leave. The V3 report keeps expert traffic apart from the rest
/// in a lane of its own (arXiv 2505.09343 section 5.2); its weights are not published.
struct Lanes {
  std::int64_t expert = 1;    ///< dispatch and combine
  std::int64_t tensor = 1;    ///< tensor- and context-parallel collectives
  std::int64_t pipeline = 1;  ///< sends between stages
  std::int64_t data = 1;      ///< gradients and parameters
  std::int64_t storage = 1;   ///< checkpoints

  friend bool operator==(const Lanes&, const Lanes&) = default;
};

struct Cluster {
  std::string name;
  std::int64_t nodes = 1;
  std::int64_t gpus_per_node = 8;
  LinkRate nvlink;                     ///< GPU to GPU in a node
  LinkRate nic;                        ///< GPU to GPU across nodes, one NIC per GPU
  double nvlink_peak_bytes_per_s = 0;  ///< nominal, per direction
  double nic_peak_bytes_per_s = 0;     ///< nominal, per direction
  bool nvls = false;                   ///< NVSwitch reduces in the network (NVLink SHARP)
  CollectiveRates collectives;
  std::string profile;  ///< path of the device profile, resolved against the cluster file
  std::string fabric;   ///< path of the fabric, likewise; empty: formulas only
  LoadBalancing load_balancing = LoadBalancing::spray;
  std::int64_t ecmp_flows = 1;  ///< queue pairs that a transfer is hashed as
  Lanes lanes;

  std::int64_t gpus() const { return nodes * gpus_per_node; }
  /// What links achieve of their nominal rate, headers and protocol taken off.
  double nvlink_efficiency() const {
    return nvlink.bandwidth_bytes_per_s / nvlink_peak_bytes_per_s;
  }
  double nic_efficiency() const {
    return nic_peak_bytes_per_s > 0 ? nic.bandwidth_bytes_per_s / nic_peak_bytes_per_s : 1;
  }

  friend bool operator==(const Cluster&, const Cluster&) = default;
};

/// What a link of the cluster's fabric achieves, one direction.
double achieved_bytes_per_s(const FabricLink& link, const Cluster& cluster);

/// A GPU's own link: NVLink, or on its way to its leaf. What these achieve is in the prices.
bool is_own(LinkTier tier);

/// By how much a GPU's own link is slower than the cluster's are said to be, 1 or more: what is
/// impaired, no price knows.
double impairment(const FabricLink& link, const Cluster& cluster);

/// Reads scenarios/clusters/*.yaml. Every rate must cite its source; `nic` may be absent with one
/// node. Of the network: `fabric` (a file), `load_balancing` (spray | ecmp), `ecmp_flows`, and
/// `lanes`
/// ({expert, tensor, pipeline, data, storage}: whole numbers).
Cluster read_cluster(const Node& node, Problems& problems);

/// The fabric that `document` describes, whose nodes must be the cluster's: the first so many, with
/// as many GPUs. Null if it has problems; those that concern both are put to `named`.
std::shared_ptr<const Fabric> read_fabric_of(const Cluster& cluster, const Node& named,
                                             const Node& document, Problems& problems);

/// Reads back as an equal Cluster from a file in `folder`, as seen from which profile and fabric
/// are named.
std::string to_yaml(const Cluster& cluster, const std::string& folder);

}  // namespace orrery
