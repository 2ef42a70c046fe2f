#include "sim/collective_flows.hpp"

#include <algorithm>
#include <map>
#include <utility>

#include "sim/check.hpp"
#include "sim/flows.hpp"

namespace orrery {
namespace {

/// A link that flows at their own limits ask for more than this share too much of is one that can
/// limit. Shares of sprayed paths are kept to 2^-24, so sums that should be 1 are not quite.
constexpr double kRounding = 1e-6;

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
  const double achieved = achieved_bytes_per_s(link, cluster);
  if (!is_own(link.tier)) return achieved;
  const double bytes = link.tier == LinkTier::nvlink ? priced.near_bytes : priced.far_bytes;
  return std::max(achieved, bytes / price_s / impairment(link, cluster));
}

}  // namespace

std::vector<Transfer> transfers_of(const Communication& moves, std::span<const GpuId> members,
                                   const Fabric& fabric) {
  const UnitTransfers unit = unit_transfers(moves.pattern, by_node(members, fabric));
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
  const auto moves = communication_of(shape, cluster);
  if (!moves || moves->near_bytes + moves->far_bytes == 0) return price_ps;
  return time_as_flows(transfers_of(*moves, members, fabric), *moves, price_ps, cluster, fabric);
}

}  // namespace orrery
