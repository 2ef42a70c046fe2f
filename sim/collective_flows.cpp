#include "sim/collective_flows.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>
#include <variant>

#include "sim/check.hpp"
#include "sim/flows.hpp"

namespace orrery {
namespace {

/// A link that flows at their own limits ask for more than this share too much of is one that can
/// limit. Shares of sprayed paths are kept to 2^-24, so sums that should be 1 are not quite.
constexpr double kRounding = 1e-6;

std::optional<Communication> moves_of(const Shape& shape, const Cluster& cluster) {
  if (const auto* e = std::get_if<ExpertExchange>(&shape.work)) return communication_of(*e);
  if (const auto* s = std::get_if<Send>(&shape.work)) return communication_of(*s);
  if (const auto* c = std::get_if<Collective>(&shape.work)) {
    if (c->ranks > 1) return communication_of(*c, cluster);
  }
  return std::nullopt;
}

/// Calls use(label, links and their shares of the bytes) for each way that a transfer takes at
/// once.
template <class Use>
void for_each_way(const Transfer& transfer, const Cluster& cluster, const Fabric& fabric, Use use) {
  if (cluster.load_balancing == LoadBalancing::spray) {
    use(fabric.spray(transfer.from, transfer.to));
    return;
  }
  std::vector<std::pair<LinkId, double>> way;
  for (std::int64_t flow = 0; flow < cluster.ecmp_flows; ++flow) {
    way.clear();
    const auto label = static_cast<std::uint32_t>(flow);
    for (const LinkId link : fabric.route(transfer.from, transfer.to, label)) {
      way.emplace_back(link, 1.0);
    }
    use(way);
  }
}

/// What a link gives all flows together.
double capacity_of(const FabricLink& link, const Communication& priced, double price_s,
                   const Cluster& cluster) {
  const bool nvlink = link.tier == LinkTier::nvlink;
  const double achieved =
      link.capacity_bytes_per_s * (nvlink ? cluster.nvlink_efficiency() : cluster.nic_efficiency());
  const bool own = nvlink || link.tier == LinkTier::pcie || link.tier == LinkTier::nic;
  if (!own) return achieved;
  const double peak = nvlink ? cluster.nvlink_peak_bytes_per_s : cluster.nic_peak_bytes_per_s;
  const double slower = peak > 0 ? std::min(1.0, link.capacity_bytes_per_s / peak) : 1;
  return std::max(achieved, (nvlink ? priced.near_bytes : priced.far_bytes) / price_s * slower);
}

}  // namespace

std::vector<Transfer> transfers_of(const Communication& moves, std::span<const GpuId> members,
                                   const Fabric& fabric) {
  std::vector<std::vector<GpuId>> nodes;
  std::int32_t node = -1;
  for (const GpuId gpu : members) {
    const std::int32_t its = fabric.vertices()[fabric.vertex(gpu)].node;
    if (nodes.empty() || its != node) nodes.emplace_back();
    node = its;
    nodes.back().push_back(gpu);
  }
  const UnitTransfers unit = unit_transfers(moves.pattern, nodes);
  std::vector<Transfer> transfers;
  const auto add = [&](const std::vector<Transfer>& units, double bytes) {
    for (const Transfer& t : units) {
      if (bytes > 0) transfers.push_back({t.from, t.to, t.bytes * bytes});
    }
  };
  add(unit.near, moves.near_bytes);
  add(unit.far, moves.far_bytes);
  return transfers;
}

Picoseconds time_as_flows(std::span<const Transfer> transfers, const Communication& priced,
                          Picoseconds price_ps, const Cluster& cluster, const Fabric& fabric) {
  if (price_ps == 0) return 0;
  const double price_s = seconds(price_ps);
  const auto& links = fabric.links();
  const double ways =
      cluster.load_balancing == LoadBalancing::spray ? 1 : static_cast<double>(cluster.ecmp_flows);

  // No flow exceeds its limit, so a link that has enough for all limits at once never limits: it is
  // left out, and on a non-blocking fabric nothing is left.
  IdVector<LinkId, double> asked(links.size(), 0.0);  // bytes/s
  for (const Transfer& t : transfers) {
    for_each_way(t, cluster, fabric, [&](const auto& way) {
      for (const auto& [link, share] : way) asked[link] += share * t.bytes / ways / price_s;
    });
  }
  constexpr LinkId kEnough{0xFFFFFFFF};
  IdVector<LinkId, LinkId> thin(links.size(), kEnough);  // by link of the fabric
  IdVector<LinkId, Link> thin_links;
  for (LinkId link; link.value < links.size(); ++link) {
    if (asked[link] == 0) continue;
    const double capacity = capacity_of(links[link], priced, price_s, cluster);
    if (asked[link] <= capacity * (1 + kRounding)) continue;
    thin[link] = LinkId(thin_links.size());
    thin_links.push_back({capacity, 0});
  }
  if (thin_links.empty()) return price_ps;

  // Flows of the same size on the same thin links are one, that many times.
  using Alike = std::pair<double, std::vector<std::pair<LinkId, double>>>;
  std::map<Alike, std::uint32_t> flows;
  for (const Transfer& t : transfers) {
    for_each_way(t, cluster, fabric, [&](const auto& way) {
      Alike alike{t.bytes / ways, {}};
      for (const auto& [link, share] : way) {
        if (thin[link] != kEnough) alike.second.emplace_back(thin[link], share);
      }
      if (!alike.second.empty()) ++flows[std::move(alike)];
    });
  }
  FlowNetwork network(thin_links);
  std::vector<FlowHop> hops;
  for (const auto& [alike, count] : flows) {
    hops.clear();
    for (const auto& [link, share] : alike.second) hops.push_back({link, share});
    network.start(0, hops, alike.first, alike.first / price_s, 1, count);
  }
  return std::max(price_ps, network.run_until_idle().back().at_ps);
}

Picoseconds time_as_flows(const Shape& shape, std::span<const GpuId> members, Picoseconds price_ps,
                          const Cluster& cluster, const Fabric& fabric) {
  const auto moves = moves_of(shape, cluster);
  if (!moves || moves->near_bytes + moves->far_bytes == 0) return price_ps;
  return time_as_flows(transfers_of(*moves, members, fabric), *moves, price_ps, cluster, fabric);
}

}  // namespace orrery
