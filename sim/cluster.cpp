#include "sim/cluster.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <string_view>

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

MeasuredLine read_line(const Node& node, Problems& problems) {
  using Kind = std::optional<CollectiveKind>;
  MapReader map(node, problems, "collectives.lines");
  MeasuredLine line;
  line.kind = map.choice<Kind>("operation", {{"all_reduce", CollectiveKind::all_reduce},
                                             {"all_gather", CollectiveKind::all_gather},
                                             {"reduce_scatter", CollectiveKind::reduce_scatter},
                                             {"all_to_all", CollectiveKind::all_to_all},
                                             {"broadcast", CollectiveKind::broadcast},
                                             {"send", std::nullopt}});
  line.ranks = map.integer("ranks", 2, 1024);
  line.base_s = map.quantity("base", Dimension::seconds);
  line.bytes_per_s = map.quantity("bandwidth", Dimension::bytes_per_s);
  line.spread = map.number("spread", 0, 1);
  map.finish();
  return line;
}

CollectiveRates read_collectives(const Node& node, bool nvls, bool several_nodes,
                                 Problems& problems) {
  MapReader map(node, problems, "collectives");
  CollectiveRates rates;
  rates.base_s = map.quantity("base", Dimension::seconds);
  rates.nvlink_hop_s = map.quantity("nvlink_hop", Dimension::seconds);
  rates.low_latency_bytes_per_s = map.quantity("low_latency_rate", Dimension::bytes_per_s);
  rates.bulk_latency_s = map.quantity("bulk_latency", Dimension::seconds);
  rates.copy_bytes_per_s = map.quantity("copy_rate", Dimension::bytes_per_s);
  rates.nvlink_pipeline_bytes = map.quantity("nvlink_pipeline", Dimension::bytes);
  rates.peer_bytes_per_s = map.quantity("peer_rate", Dimension::bytes_per_s);
  rates.peer_latency_s = map.quantity("peer_latency", Dimension::seconds);
  if (nvls || map.has("nvls_share")) rates.nvls_share = map.number("nvls_share", 0.01, 2);
  rates.spread = map.number("spread", 0, 1);
  rates.source = map.text("source");
  const Node lines = map.at("lines");
  for (std::size_t i = 0; i < lines.size(); ++i) {
    rates.lines.push_back(read_line(lines[i], problems));
  }
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

  const auto resolved = [&](std::string_view key, const std::string& path) {
    if (path.empty()) return path;
    return (std::filesystem::path(map.at(key).folder()) / path).lexically_normal().string();
  };
  cluster.profile = resolved("profile", map.text("profile"));
  cluster.fabric = resolved("fabric", map.text_or("fabric", ""));
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

namespace {

/// In the unit that people use, where that reads back as the very number, else in the SI unit.
std::string quantity(double value, double scale, std::string_view unit, std::string_view si,
                     Dimension dimension) {
  // value / scale is rounded; of its shortest spellings one is usually what a file said.
  for (const int digits : {3, 4, 6, 9, 12, 15, 17}) {
    std::string text = fmt::format("{:.{}g} {}", value / scale, digits, unit);
    if (parse_quantity(text, dimension) == value) return text;
  }
  return fmt::format("{} {}", value, si);
}

std::string rate(double v) {
  return quantity(v, 1e9, "GB/s", "B/s", Dimension::bytes_per_s);
}
std::string time(double v) {
  return quantity(v, 1e-6, "us", "s", Dimension::seconds);
}
std::string size(double v) {
  return v < 1e6 ? quantity(v, 1e3, "kB", "B", Dimension::bytes)
                 : quantity(v, 1e6, "MB", "B", Dimension::bytes);
}

/// Where both are on one file system; else, or where there is no way between them, as it is.
std::string seen_from(const std::string& folder, const std::string& path) {
  namespace fs = std::filesystem;
  if (path.empty()) return path;
  const fs::path from = folder.empty() ? "." : folder;
  const fs::path relative = fs::path(path).is_absolute() == from.is_absolute()
                                ? fs::path(path).lexically_relative(from)
                                : fs::proximate(path, from);
  return relative.empty() ? path : relative.generic_string();
}

std::string to_yaml(std::string_view name, const LinkRate& link, double peak_bytes_per_s) {
  return fmt::format("{}:\n  bandwidth: {}\n  peak: {}\n  latency: {}\n  source: {}\n", name,
                     rate(link.bandwidth_bytes_per_s), rate(peak_bytes_per_s), time(link.latency_s),
                     in_quotes(link.source));
}

std::string to_yaml(const CollectiveRates& r) {
  std::string out = fmt::format(
      "collectives:\n  base: {}\n  nvlink_hop: {}\n  low_latency_rate: {}\n  bulk_latency: {}\n"
      "  copy_rate: {}\n  nvlink_pipeline: {}\n  peer_rate: {}\n  peer_latency: {}\n",
      time(r.base_s), time(r.nvlink_hop_s), rate(r.low_latency_bytes_per_s), time(r.bulk_latency_s),
      rate(r.copy_bytes_per_s), size(r.nvlink_pipeline_bytes), rate(r.peer_bytes_per_s),
      time(r.peer_latency_s));
  if (r.nvls_share > 0) out += fmt::format("  nvls_share: {}\n", r.nvls_share);
  out += fmt::format("  spread: {}\n", r.spread);
  if (r.nic_tree_hop_s > 0) {
    out += fmt::format(
        "  nic_tree_hop: {}\n  nic_ring_hop: {}\n  nic_peer: {}\n  nic_pipeline: {}\n"
        "  nic_spread: {}\n",
        time(r.nic_tree_hop_s), time(r.nic_ring_hop_s), time(r.nic_peer_s),
        size(r.nic_pipeline_bytes), r.nic_spread);
  }
  out += fmt::format("  source: {}\n", in_quotes(r.source));
  if (!r.lines.empty()) out += "  lines:\n";
  for (const MeasuredLine& line : r.lines) {
    out += fmt::format("    - {{operation: {}, ranks: {}, base: {}, bandwidth: {}, spread: {}}}\n",
                       line.kind ? name_of(*line.kind) : "send", line.ranks, time(line.base_s),
                       rate(line.bytes_per_s), line.spread);
  }
  return out;
}

}  // namespace

double achieved_bytes_per_s(const FabricLink& link, const Cluster& cluster) {
  return link.capacity_bytes_per_s *
         (link.tier == LinkTier::nvlink ? cluster.nvlink_efficiency() : cluster.nic_efficiency());
}

bool is_own(LinkTier tier) {
  return tier == LinkTier::nvlink || tier == LinkTier::pcie || tier == LinkTier::nic;
}

double impairment(const FabricLink& link, const Cluster& cluster) {
  const double nominal = link.tier == LinkTier::nvlink ? cluster.nvlink_peak_bytes_per_s
                                                       : cluster.nic_peak_bytes_per_s;
  return std::max(1.0, nominal / link.capacity_bytes_per_s);
}

std::shared_ptr<const Fabric> read_fabric_of(const Cluster& cluster, const Node& named,
                                             const Node& document, Problems& problems) {
  std::optional<Fabric> fabric = read_fabric(document, problems);
  if (!fabric) return nullptr;
  const auto nodes = static_cast<std::int64_t>(fabric->nodes());
  if (nodes < cluster.nodes) {
    problems.add(named, fmt::format("fabric '{}' is too small for cluster '{}': {} of {} nodes",
                                    fabric->name(), cluster.name, nodes, cluster.nodes));
    return nullptr;
  }
  for (std::size_t n = 0; n < static_cast<std::size_t>(cluster.nodes); ++n) {
    const auto gpus = static_cast<std::int64_t>(fabric->gpus_of_node(n));
    if (gpus == cluster.gpus_per_node) continue;
    problems.add(named,
                 fmt::format("fabric '{}' has {} GPUs in node {}, cluster '{}' has {} a node",
                             fabric->name(), gpus, n, cluster.name, cluster.gpus_per_node));
    return nullptr;
  }
  return std::make_shared<const Fabric>(*std::move(fabric));
}

std::string to_yaml(const Cluster& cluster, const std::string& folder) {
  std::string out = fmt::format("name: {}\nnodes: {}\ngpus_per_node: {}\nprofile: {}\n",
                                in_quotes(cluster.name), cluster.nodes, cluster.gpus_per_node,
                                in_quotes(seen_from(folder, cluster.profile)));
  if (!cluster.fabric.empty()) {
    out += fmt::format("fabric: {}\n", in_quotes(seen_from(folder, cluster.fabric)));
  }
  if (cluster.load_balancing == LoadBalancing::ecmp) {
    out += fmt::format("load_balancing: ecmp\necmp_flows: {}\n", cluster.ecmp_flows);
  }
  const Lanes& lanes = cluster.lanes;
  if (lanes != Lanes{}) {
    out += fmt::format("lanes: {{expert: {}, tensor: {}, pipeline: {}, data: {}, storage: {}}}\n",
                       lanes.expert, lanes.tensor, lanes.pipeline, lanes.data, lanes.storage);
  }
  out += to_yaml("nvlink", cluster.nvlink, cluster.nvlink_peak_bytes_per_s);
  if (cluster.nic.bandwidth_bytes_per_s > 0) {
    out += to_yaml("nic", cluster.nic, cluster.nic_peak_bytes_per_s);
  }
  return out + fmt::format("nvls: {}\n", cluster.nvls) + to_yaml(cluster.collectives);
}

}  // namespace orrery
