#include "sim/traffic.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <tuple>
#include <variant>

#include "sim/check.hpp"
#include "sim/network_prices.hpp"
#include "sim/transfers.hpp"

namespace orrery {
namespace {

std::int64_t lane_of(StreamKind stream, const Lanes& lanes) {
  switch (stream) {
    case StreamKind::expert_exchange:
      return lanes.expert;
    case StreamKind::tensor:
      return lanes.tensor;
    case StreamKind::data:
      return lanes.data;
    case StreamKind::send_next:
    case StreamKind::send_previous:
    case StreamKind::receive_previous:
    case StreamKind::receive_next:
      return lanes.pipeline;
    case StreamKind::compute:
    case StreamKind::weight_gradient:
      break;
  }
  return 1;
}

/// How the members of an op's groups lie among the ranks.
struct GroupShape {
  CommunicationPattern pattern{};
  std::int64_t ranks = 1;   ///< of a group, all positions together
  std::int64_t stride = 1;  ///< between neighbours within a position
  friend auto operator<=>(const GroupShape&, const GroupShape&) = default;
};

/// A GroupShape at some simulated ranks: what decides which links an op uses.
struct Site {
  GroupShape shape;
  std::vector<RankId> ranks;  ///< of the op's streams
  friend auto operator<=>(const Site&, const Site&) = default;
};

/// Bytes on a link where the busiest GPU sends one byte inside its node (near) or out of it (far).
struct UnitLoad {
  LinkId link;  // of the fabric
  double near = 0;
  double far = 0;
};

/// What one link carries, by site.
struct SiteLoad {
  std::uint32_t site = 0;
  double near = 0;
  double far = 0;
  friend auto operator<=>(const SiteLoad&, const SiteLoad&) = default;
};

bool carries_no_more(const std::vector<SiteLoad>& a, const std::vector<SiteLoad>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].near > b[i].near || a[i].far > b[i].far) return false;
  }
  return true;
}

class TrafficBuilder {
 public:
  TrafficBuilder(const Program& program, const Cluster& cluster, const Fabric& fabric)
      : program_(program),
        cluster_(cluster),
        fabric_(fabric),
        near_(fabric.links().size(), 0.0),
        far_(fabric.links().size(), 0.0) {}

  Traffic build() {
    find_patterns();
    reduce_links();
    write_loads();
    sum_up_tiers();
    return std::move(traffic_);
  }

 private:
  /// Ops of one shape at one site.
  struct Pattern {
    std::uint32_t site = 0;
    Communication moves;
  };

  // ---- which ops communicate, and where

  void find_patterns() {
    const auto& shapes = program_.shapes();
    IdVector<ShapeId, std::optional<Communication>> moves(shapes.size());
    IdVector<ShapeId, GroupShape> groups(shapes.size());
    for (ShapeId id; id.value < shapes.size(); ++id) {
      if (const auto* e = std::get_if<ExpertExchange>(&shapes[id].work)) {
        moves[id] = communication_of(*e);
        groups[id] = {moves[id]->pattern, e->ep, e->stride};
      } else if (const auto* c = std::get_if<Collective>(&shapes[id].work)) {
        if (c->ranks > 1) moves[id] = communication_of(*c, cluster_);
        if (moves[id]) groups[id] = {moves[id]->pattern, c->ranks, c->stride};
      } else if (const auto* s = std::get_if<Send>(&shapes[id].work)) {
        moves[id] = communication_of(*s);
        groups[id] = {moves[id]->pattern, 2, 1};
      }
      if (moves[id] && moves[id]->near_bytes + moves[id]->far_bytes == 0) moves[id].reset();
    }

    // Ops of one shape whose streams begin and end alike are at one site.
    using Key = std::tuple<ShapeId, StreamId, StreamId>;
    std::map<Key, PatternId> known;
    std::map<Site, std::uint32_t> sites;
    for (OpId op; op.value < program_.size(); ++op) {
      const ShapeId shape = program_.shape(op);
      if (!moves[shape]) continue;
      const auto streams = program_.streams_of(op);
      const Key key{shape, streams.front(), streams.back()};
      auto found = known.find(key);
      if (found == known.end()) {
        Site site{groups[shape], {}};
        for (const StreamId stream : streams) site.ranks.push_back(rank_of(stream));
        const auto [at, added] = sites.try_emplace(site, static_cast<std::uint32_t>(sites.size()));
        if (added) unit_loads_.push_back(unit_loads(site));
        patterns_.push_back({at->second, *moves[shape]});
        traffic_.weights.push_back(
            static_cast<std::uint32_t>(lane_of(kind_of(streams.front()), cluster_.lanes)));
        found = known.emplace(key, PatternId(patterns_.size() - 1)).first;
      }
      traffic_.ops.emplace_back(op, found->second);
    }
  }

  // ---- from a site to loads

  std::vector<UnitLoad> unit_loads(const Site& site) {
    for (const auto& group : groups_at(site)) {
      const UnitTransfers unit = unit_transfers(site.shape.pattern, by_node(group));
      for (const Transfer& t : unit.near) add(t, near_);
      for (const Transfer& t : unit.far) add(t, far_);
    }
    std::sort(touched_.begin(), touched_.end());
    touched_.erase(std::unique(touched_.begin(), touched_.end()), touched_.end());
    std::vector<UnitLoad> loads;
    for (const LinkId link : touched_) {
      loads.push_back({link, near_[link], far_[link]});
      near_[link] = far_[link] = 0;
    }
    touched_.clear();
    return loads;
  }

  /// The groups of real GPUs that an op at this site stands for.
  std::vector<std::vector<GpuId>> groups_at(const Site& site) const {
    const std::int64_t slots = program_.multiplicity()[0];
    std::vector<std::vector<GpuId>> groups;
    if (slots == 1) {  // all ranks are simulated
      auto& group = groups.emplace_back();
      for (const RankId rank : site.ranks) group.emplace_back(rank.value);
      return groups;
    }
    const auto positions = static_cast<std::int64_t>(site.ranks.size());
    const bool send = site.shape.pattern == CommunicationPattern::send;
    const std::int64_t extent = send ? 1 : site.shape.ranks / positions;
    const std::int64_t block = extent * site.shape.stride;
    ORRERY_CHECK(block > 0 && slots % block == 0, "groups of {} x {} among {} ranks", extent,
                 site.shape.stride, slots);
    for (std::int64_t first = 0; first < slots; first += block) {
      for (std::int64_t offset = 0; offset < site.shape.stride; ++offset) {
        auto& group = groups.emplace_back();
        for (const RankId position : site.ranks) {
          for (std::int64_t i = 0; i < extent; ++i) {
            group.emplace_back(static_cast<std::size_t>(position.value * slots + first + offset +
                                                        i * site.shape.stride));
          }
        }
      }
    }
    return groups;
  }

  std::vector<std::vector<GpuId>> by_node(const std::vector<GpuId>& group) const {
    std::vector<std::vector<GpuId>> nodes;
    std::int32_t node = -1;
    for (const GpuId gpu : group) {
      const std::int32_t its = fabric_.vertices()[fabric_.vertex(gpu)].node;
      if (nodes.empty() || its != node) nodes.emplace_back();
      node = its;
      nodes.back().push_back(gpu);
    }
    return nodes;
  }

  void add(const Transfer& transfer, IdVector<LinkId, double>& sums) {
    const auto put = [&](LinkId link, double bytes) {
      sums[link] += bytes;
      touched_.push_back(link);
    };
    if (cluster_.load_balancing == LoadBalancing::spray) {
      for (const auto& [link, share] : fabric_.spray(transfer.from, transfer.to)) {
        put(link, transfer.bytes * share);
      }
      return;
    }
    for (std::int64_t flow = 0; flow < cluster_.ecmp_flows; ++flow) {
      const auto label = static_cast<std::uint32_t>(flow);
      for (const LinkId link : fabric_.route(transfer.from, transfer.to, label)) {
        put(link, transfer.bytes / static_cast<double>(cluster_.ecmp_flows));
      }
    }
  }

  // ---- which links can limit

  double achieved_bytes_per_s(LinkId id) const {
    const FabricLink& link = fabric_.links()[id];
    return link.capacity_bytes_per_s * (link.tier == LinkTier::nvlink ? cluster_.nvlink_efficiency()
                                                                      : cluster_.nic_efficiency());
  }

  struct Candidate {
    LinkId link;
    double bytes_per_s = 0;
    std::int64_t stands_for = 1;
    std::vector<SiteLoad> carries;
  };

  void reduce_links() {
    std::map<LinkId, std::vector<SiteLoad>> carries;
    for (std::uint32_t site = 0; site < unit_loads_.size(); ++site) {
      for (const UnitLoad& load : unit_loads_[site]) {
        carries[load.link].push_back({site, load.near, load.far});
      }
    }
    // Same sites, same loads, same tier: the one of least capacity stands for all.
    std::map<std::pair<LinkTier, std::vector<SiteLoad>>, std::size_t> alike;
    std::vector<Candidate> candidates;
    for (auto& [link, loads] : carries) {
      const LinkTier tier = fabric_.links()[link].tier;
      const double bytes_per_s = achieved_bytes_per_s(link);
      const auto [found, added] = alike.try_emplace({tier, loads}, candidates.size());
      if (added) {
        candidates.push_back({link, bytes_per_s, 1, std::move(loads)});
        continue;
      }
      Candidate& same = candidates[found->second];
      ++same.stands_for;
      if (bytes_per_s < same.bytes_per_s) {
        same.link = link;
        same.bytes_per_s = bytes_per_s;
      }
    }

    // Whoever carries no more of anything than another that has no more capacity goes. Only links
    // with the same sites are compared; the busiest come first.
    std::map<std::vector<std::uint32_t>, std::vector<Candidate>> by_sites;
    for (Candidate& c : candidates) {
      std::vector<std::uint32_t> sites;
      for (const SiteLoad& load : c.carries) sites.push_back(load.site);
      by_sites[sites].push_back(std::move(c));
    }
    for (auto& [sites, rivals] : by_sites) {
      const auto sum = [](const Candidate& c) {
        double bytes = 0;
        for (const SiteLoad& load : c.carries) bytes += load.near + load.far;
        return bytes / c.bytes_per_s;
      };
      std::stable_sort(rivals.begin(), rivals.end(),
                       [&](const Candidate& a, const Candidate& b) { return sum(a) > sum(b); });
      std::vector<const Candidate*> kept;
      for (const Candidate& c : rivals) {
        const auto covers = [&](const Candidate* k) {
          return k->bytes_per_s <= c.bytes_per_s && carries_no_more(c.carries, k->carries);
        };
        if (std::any_of(kept.begin(), kept.end(), covers)) continue;
        kept.push_back(&c);
        reduced_.push_back(c);
      }
    }
    std::sort(reduced_.begin(), reduced_.end(),
              [](const Candidate& a, const Candidate& b) { return a.link < b.link; });
  }

  // ---- the result

  void write_loads() {
    std::vector<std::vector<std::pair<LinkId, SiteLoad>>> at_site(unit_loads_.size());
    for (std::size_t i = 0; i < reduced_.size(); ++i) {
      const Candidate& c = reduced_[i];
      const LinkTier tier = fabric_.links()[c.link].tier;
      traffic_.links.push_back({fabric_.link_name(c.link), tier, c.stands_for});
      for (const SiteLoad& load : c.carries) at_site[load.site].emplace_back(LinkId(i), load);
    }
    traffic_.fabric = fabric_.name();
    traffic_.load_begin.push_back(0);
    for (const Pattern& pattern : patterns_) {
      const auto bytes = [&](const auto& load) {
        return load.near * pattern.moves.near_bytes + load.far * pattern.moves.far_bytes;
      };
      for (const auto& [link, load] : at_site[pattern.site]) {
        const double busy_s = bytes(load) / reduced_[link.value].bytes_per_s;
        if (busy_s > 0) traffic_.loads.push_back({link, busy_s});
      }
      traffic_.load_begin.push_back(static_cast<std::uint32_t>(traffic_.loads.size()));
    }
  }

  void sum_up_tiers() {
    std::vector<Communication> moved(unit_loads_.size());  // by site, all executions together
    for (const auto& [op, pattern] : traffic_.ops) {
      const Pattern& p = patterns_[pattern.value];
      moved[p.site].near_bytes += p.moves.near_bytes;
      moved[p.site].far_bytes += p.moves.far_bytes;
    }
    IdVector<LinkId, double> bytes(fabric_.links().size(), 0.0);
    for (std::size_t site = 0; site < unit_loads_.size(); ++site) {
      for (const UnitLoad& load : unit_loads_[site]) {
        bytes[load.link] += load.near * moved[site].near_bytes + load.far * moved[site].far_bytes;
      }
    }
    for (LinkId link; link.value < bytes.size(); ++link) {
      if (bytes[link] == 0) continue;
      TierUse& tier = traffic_.tiers[static_cast<std::size_t>(fabric_.links()[link].tier)];
      const double busy_s = bytes[link] / achieved_bytes_per_s(link);
      ++tier.links;
      tier.busy_s += busy_s;
      if (busy_s <= tier.busiest_s) continue;
      tier.busiest_s = busy_s;
      tier.busiest = fabric_.link_name(link);
    }
  }

  const Program& program_;
  const Cluster& cluster_;
  const Fabric& fabric_;
  Traffic traffic_;
  std::vector<Pattern> patterns_;                  // by PatternId
  std::vector<std::vector<UnitLoad>> unit_loads_;  // by site
  std::vector<Candidate> reduced_;
  // Scratch of unit_loads(): bytes by link of the fabric, and which are not 0.
  IdVector<LinkId, double> near_;
  IdVector<LinkId, double> far_;
  std::vector<LinkId> touched_;
};

}  // namespace

PatternId Traffic::pattern_of(OpId op) const {
  const auto found =
      std::lower_bound(ops.begin(), ops.end(), op,
                       [](const auto& entry, OpId wanted) { return entry.first < wanted; });
  return found != ops.end() && found->first == op ? found->second : kNoPattern;
}

Traffic::Flow Traffic::flow_of(PatternId pattern, Picoseconds price_ps) const {
  Flow flow;
  if (price_ps == 0) return flow;
  const auto use_of = [&](const LinkLoad& load) {
    const LinkTier tier = links[load.link].tier;
    const bool own = tier == LinkTier::nvlink || tier == LinkTier::pcie || tier == LinkTier::nic;
    const double use = load.busy_s / seconds(price_ps);
    return own ? std::min(1.0, use) : use;
  };
  for (const LinkLoad& load : loads_of(pattern)) flow.limit = std::max(flow.limit, use_of(load));
  for (const LinkLoad& load : loads_of(pattern)) {
    flow.hops.push_back({load.link, use_of(load) / flow.limit});
  }
  return flow;
}

Traffic traffic_of(const Program& program, const Cluster& cluster, const Fabric& fabric) {
  return TrafficBuilder(program, cluster, fabric).build();
}

}  // namespace orrery
