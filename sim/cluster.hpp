#pragma once
// The machines: nodes of GPUs with NVLink inside and a NIC per GPU outside, as far as the formulas for
// collectives need it. The fabric as a graph is a later concern of this file's neighbours.

#include <cstdint>
#include <string>

#include "sim/config.hpp"

namespace orrery {

/// A point-to-point path: time(bytes) = latency_s + bytes / bandwidth. `bandwidth_bytes_per_s` is per
/// direction and per GPU, and achieved, not nominal; `source` says who achieved it.
struct LinkRate {
  double bandwidth_bytes_per_s = 0;
  double latency_s = 0;
  std::string source;

  friend bool operator==(const LinkRate&, const LinkRate&) = default;
};

struct Cluster {
  std::string name;
  std::int64_t nodes = 1;
  std::int64_t gpus_per_node = 8;
  LinkRate nvlink;  ///< GPU to GPU in a node
  LinkRate nic;     ///< GPU to GPU across nodes, one NIC per GPU
  double nvlink_peak_bytes_per_s = 0;  ///< nominal, per direction
  double nic_peak_bytes_per_s = 0;     ///< nominal, per direction
  bool nvls = false;                   ///< NVSwitch reduces in the network (NVLink SHARP)
  std::string profile;  ///< path of the device profile, resolved against the cluster file

  std::int64_t gpus() const { return nodes * gpus_per_node; }

  friend bool operator==(const Cluster&, const Cluster&) = default;
};

Cluster read_cluster(const Node& node, Problems& problems);

}  // namespace orrery
