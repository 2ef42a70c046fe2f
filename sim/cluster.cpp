#include "sim/cluster.hpp"

#include <filesystem>

namespace orrery {
namespace {

struct Path {
  LinkRate rate;
  double peak_bytes_per_s = 0;
};

Path read_path(const Node& node, const std::string& what, Problems& problems) {
  MapReader map(node, problems, what);
  Path path;
  path.rate.bandwidth_bytes_per_s = map.quantity("bandwidth", Dimension::bytes_per_s);
  path.rate.latency_s = map.quantity("latency", Dimension::seconds);
  path.peak_bytes_per_s = map.quantity("peak", Dimension::bytes_per_s);
  path.rate.source = map.text("source");
  if (map.has("bandwidth") && map.has("peak") &&
      path.rate.bandwidth_bytes_per_s > path.peak_bytes_per_s) {
    problems.add(map.at("bandwidth"),
                 what + ".bandwidth is the achieved rate and exceeds the peak");
  }
  map.finish();
  return path;
}

CollectiveRates read_collectives(const Node& node, bool nvls, bool several_nodes,
                                 Problems& problems) {
  MapReader map(node, problems, "collectives");
  CollectiveRates rates;
  rates.base_s = map.quantity("base", Dimension::seconds);
  rates.nvlink_hop_s = map.quantity("nvlink_hop", Dimension::seconds);
  rates.nvlink_pipeline_bytes = map.quantity("nvlink_pipeline", Dimension::bytes);
  if (nvls || map.has("nvls_share")) rates.nvls_share = map.number("nvls_share", 0.01, 2);
  rates.spread = map.number("spread", 0, 1);
  rates.source = map.text("source");
  if (several_nodes || map.has("nic_tree_hop")) {
    rates.nic_tree_hop_s = map.quantity("nic_tree_hop", Dimension::seconds);
    rates.nic_ring_hop_s = map.quantity("nic_ring_hop", Dimension::seconds);
    rates.nic_peer_s = map.quantity("nic_peer", Dimension::seconds);
    rates.nic_pipeline_bytes = map.quantity("nic_pipeline", Dimension::bytes);
    rates.nic_spread = map.number("nic_spread", 0, 1);
  }
  map.finish();
  return rates;
}

Lanes read_lanes(const Node& node, Problems& problems) {
  MapReader map(node, problems, "lanes");
  Lanes lanes;
  constexpr std::int64_t kMost = 1000;
  lanes.expert = map.integer_or("expert", 1, 1, kMost);
  lanes.tensor = map.integer_or("tensor", 1, 1, kMost);
  lanes.pipeline = map.integer_or("pipeline", 1, 1, kMost);
  lanes.data = map.integer_or("data", 1, 1, kMost);
  lanes.storage = map.integer_or("storage", 1, 1, kMost);
  map.finish();
  return lanes;
}

}  // namespace

Cluster read_cluster(const Node& node, Problems& problems) {
  constexpr std::int64_t kMaxGpus = 1'000'000;
  MapReader map(node, problems, "cluster");
  Cluster cluster;
  cluster.name = map.text("name");
  cluster.nodes = map.integer("nodes", 1, kMaxGpus);
  cluster.gpus_per_node = map.integer("gpus_per_node", 1, 1024);
  if (cluster.gpus() > kMaxGpus) {
    problems.add(map.at("nodes"), "a cluster may have at most 1,000,000 GPUs");
    cluster.nodes = cluster.gpus_per_node = 1;
  }
  const bool several_nodes = cluster.nodes > 1;

  const Path nvlink = read_path(map.require("nvlink"), "nvlink", problems);
  cluster.nvlink = nvlink.rate;
  cluster.nvlink_peak_bytes_per_s = nvlink.peak_bytes_per_s;
  if (several_nodes || map.has("nic")) {
    const Path nic = read_path(map.require("nic"), "nic", problems);
    cluster.nic = nic.rate;
    cluster.nic_peak_bytes_per_s = nic.peak_bytes_per_s;
  }
  cluster.nvls = map.flag_or("nvls", false);
  cluster.collectives =
      read_collectives(map.require("collectives"), cluster.nvls, several_nodes, problems);

  const auto folder = std::filesystem::path(node.at().file).parent_path();
  const auto resolved = [&](const std::string& path) {
    return path.empty() ? path : (folder / path).lexically_normal().string();
  };
  cluster.profile = resolved(map.text("profile"));
  cluster.fabric = resolved(map.text_or("fabric", ""));
  cluster.load_balancing =
      map.choice_or("load_balancing", LoadBalancing::spray,
                    {{"spray", LoadBalancing::spray}, {"ecmp", LoadBalancing::ecmp}});
  if (cluster.load_balancing == LoadBalancing::ecmp) {
    cluster.ecmp_flows = map.integer_or("ecmp_flows", 1, 1, 64);
  }
  if (map.has("lanes")) cluster.lanes = read_lanes(map.at("lanes"), problems);
  map.finish();
  return cluster;
}

}  // namespace orrery
