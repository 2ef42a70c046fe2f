#pragma once
// Clusters and fabrics for tests: the shipped ones by name, and small ones with round rates.

#include <fmt/core.h>

#include <string>
#include <utility>

#include "sim/cluster.hpp"
#include "sim/fabric.hpp"

namespace orrery::test {

template <class Read>
auto from_file(const std::string& path, Read read) {
  Problems problems;
  auto value = read(read_document(ORRERY_SOURCE_DIR "/scenarios/" + path, problems), problems);
  problems.throw_if_any();
  return value;
}

inline Cluster cluster_named(const std::string& name) {
  return from_file("clusters/" + name + ".yaml", read_cluster);
}

inline Fabric fabric_named(const std::string& name) {
  return std::move(*from_file("fabrics/" + name + ".yaml", read_fabric));
}

inline Fabric fabric_of(const std::string& text) {
  Problems problems;
  auto fabric = read_fabric(read_document_text(text, "fabric.yaml", problems), problems);
  problems.throw_if_any();
  return std::move(*fabric);
}

/// NVLink 100 GB/s, PCIe 60, NICs and cables between switches 10; nothing takes time to arrive.
inline std::string two_layers(int nodes, int gpus, int ports, const std::string& more = "") {
  return fmt::format(
      "name: f\ntopology: two_layer\nnodes: {}\ngpus_per_node: {}\nswitch_ports: {}\n"
      "pcie: {{capacity: 60 GB/s, latency: 1 ns, source: here}}\n"
      "nic: {{capacity: 10 GB/s, latency: 1 ns, source: here}}\n"
      "leaf_spine: {{capacity: 10 GB/s, latency: 1 ns, source: here}}\n{}{}",
      nodes, gpus, ports,
      gpus > 1 ? "nvlink: {capacity: 100 GB/s, latency: 1 ns, source: here}\n" : "", more);
}

/// Its cluster: all links achieve their nominal rates, and nothing else costs time.
inline Cluster cluster_of(std::int64_t nodes, std::int64_t gpus) {
  Cluster c;
  c.nodes = nodes;
  c.gpus_per_node = gpus;
  c.nvlink.bandwidth_bytes_per_s = c.nvlink_peak_bytes_per_s = 100e9;
  c.nic.bandwidth_bytes_per_s = c.nic_peak_bytes_per_s = 10e9;
  c.collectives.low_latency_bytes_per_s = c.nvlink.bandwidth_bytes_per_s;
  c.collectives.copy_bytes_per_s = c.collectives.peer_bytes_per_s = 1e18;
  return c;
}

}  // namespace orrery::test
