#include "sim/traffic.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <tuple>
#include <utility>
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
    case StreamKind::storage:
      return lanes.storage;
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

/// What a class of links carries of one site, in bytes where the busiest GPU sends one byte inside
/// its node (near) and one out of it (far); and the class that it was before that site.
struct LinkClass {
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;
  std::uint32_t parent = kNone;
  std::uint32_t site = 0;
  double near = 0;
  double far = 0;
};

/// What one link carries, by site, ascending.
struct SiteLoad {
  std::uint32_t site = 0;
  double near = 0;
  double far = 0;
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
        class_of_(fabric.links().size()),
        near_{IdVector<LinkId, double>(fabric.links().size(), 0.0), {}},
        far_{IdVector<LinkId, double>(fabric.links().size(), 0.0), {}} {
    // Links of different tiers are never one.
    classes_.resize(kLinkTiers);
    for (LinkId link; link.value < class_of_.size(); ++link) {
      class_of_[link] = static_cast<std::uint32_t>(fabric.links()[link].tier);
    }
  }

  Traffic build() {
    find_patterns();
    gather_classes();
    drop_covered();
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
      moves[id] = communication_of(shapes[id], cluster_);
      if (!moves[id]) continue;
      GroupShape& group = groups[id];
      group.pattern = moves[id]->pattern;
      if (const auto* e = std::get_if<ExpertExchange>(&shapes[id].work)) {
        group.ranks = e->ep;
        group.stride = e->stride;
      } else if (const auto* c = std::get_if<Collective>(&shapes[id].work)) {
        group.ranks = c->ranks;
        group.stride = c->stride;
      }
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
        if (added) refine_classes(site, at->second);
        patterns_.push_back({at->second, *moves[shape]});
        traffic_.weights.push_back(
            static_cast<std::uint32_t>(lane_of(kind_of(streams.front()), cluster_.lanes)));
        found = known.emplace(key, PatternId(patterns_.size() - 1)).first;
      }
      traffic_.ops.emplace_back(op, found->second);
    }
    sites_ = sites.size();
  }

  // ---- from a site to loads

  /// Splits every class by what its links carry of this site.
  void refine_classes(const Site& site, std::uint32_t id) {
    for (const auto& group : groups_at(site)) {
      if (site.shape.pattern == CommunicationPattern::storage) {
        for (const GpuId gpu : group) {
          for (const LinkId link : fabric_.way_out(gpu)) far_.add(link, 1);
        }
        continue;
      }
      const UnitTransfers unit = unit_transfers(site.shape.pattern, by_node(group));
      near_transfers_.insert(near_transfers_.end(), unit.near.begin(), unit.near.end());
      far_transfers_.insert(far_transfers_.end(), unit.far.begin(), unit.far.end());
    }
    load(near_transfers_, near_);
    load(far_transfers_, far_);
    using Split = std::tuple<std::uint32_t, double, double>;
    std::map<Split, std::uint32_t> children;
    const auto split = [&](LinkId link) {
      const double near = std::exchange(near_.bytes[link], 0.0);
      const double far = std::exchange(far_.bytes[link], 0.0);
      if (near + far == 0) return;
      const Split key{class_of_[link], rounded(near), rounded(far)};
      const auto [child, added] =
          children.try_emplace(key, static_cast<std::uint32_t>(classes_.size()));
      if (added) classes_.push_back({class_of_[link], id, near, far});
      class_of_[link] = child->second;
    };
    for (const LinkId link : near_.touched) split(link);
    for (const LinkId link : far_.touched) split(link);
    near_.touched.clear();
    far_.touched.clear();
    near_transfers_.clear();
    far_transfers_.clear();
  }

  /// Sums in different orders differ in their last bits.
  static double rounded(double bytes) { return static_cast<double>(static_cast<float>(bytes)); }

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
    const bool one_to_one = site.shape.pattern == CommunicationPattern::send ||
                            site.shape.pattern == CommunicationPattern::storage;
    const std::int64_t extent = one_to_one ? 1 : site.shape.ranks / positions;
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

  void load(const std::vector<Transfer>& transfers, LinkBytes& sums) const {
    if (cluster_.load_balancing == LoadBalancing::spray) {
      fabric_.spray(transfers, sums);
      return;
    }
    for (const Transfer& t : transfers) {
      for (std::int64_t flow = 0; flow < cluster_.ecmp_flows; ++flow) {
        const auto label = static_cast<std::uint32_t>(flow);
        for (const LinkId link : fabric_.route(t.from, t.to, label)) {
          sums.add(link, t.bytes / static_cast<double>(cluster_.ecmp_flows));
        }
      }
    }
  }

  // ---- which links can limit

  double achieved_bytes_per_s(LinkId id) const {
    const FabricLink& link = fabric_.links()[id];
    return link.capacity_bytes_per_s * (link.tier == LinkTier::nvlink ? cluster_.nvlink_efficiency()
                                                                      : cluster_.nic_efficiency());
  }

  /// Links that carry the same of everything. The one of least capacity stands for all.
  struct Candidate {
    LinkId link;
    double bytes_per_s = 0;
    std::int64_t stands_for = 0;
    std::vector<SiteLoad> carries;
  };

  std::vector<SiteLoad> carried_by(std::uint32_t link_class) const {
    std::vector<SiteLoad> loads;
    for (std::uint32_t c = link_class; classes_[c].parent != LinkClass::kNone;
         c = classes_[c].parent) {
      loads.push_back({classes_[c].site, classes_[c].near, classes_[c].far});
    }
    std::reverse(loads.begin(), loads.end());
    return loads;
  }

  void gather_classes() {
    std::vector<std::size_t> candidate_of(classes_.size(), candidates_.max_size());
    for (LinkId link; link.value < class_of_.size(); ++link) {
      const std::uint32_t its = class_of_[link];
      if (classes_[its].parent == LinkClass::kNone) continue;  // carries nothing
      const double bytes_per_s = achieved_bytes_per_s(link);
      std::size_t& index = candidate_of[its];
      if (index == candidates_.max_size()) {
        index = candidates_.size();
        candidates_.push_back({link, bytes_per_s, 0, carried_by(its)});
      }
      Candidate& candidate = candidates_[index];
      ++candidate.stands_for;
      if (bytes_per_s < candidate.bytes_per_s) {
        candidate.link = link;
        candidate.bytes_per_s = bytes_per_s;
      }
    }
  }

  /// Whoever carries no more of anything than another that has no more capacity goes. Only links
  /// that carry something of the same sites are compared; the busiest come first.
  void drop_covered() {
    std::map<std::vector<std::uint32_t>, std::vector<const Candidate*>> by_sites;
    for (const Candidate& c : candidates_) {
      std::vector<std::uint32_t> sites;
      for (const SiteLoad& load : c.carries) sites.push_back(load.site);
      by_sites[sites].push_back(&c);
    }
    for (auto& [sites, rivals] : by_sites) {
      const auto busy = [](const Candidate* c) {
        double bytes = 0;
        for (const SiteLoad& load : c->carries) bytes += load.near + load.far;
        return bytes / c->bytes_per_s;
      };
      std::stable_sort(rivals.begin(), rivals.end(),
                       [&](const Candidate* a, const Candidate* b) { return busy(a) > busy(b); });
      std::vector<const Candidate*> kept;
      for (const Candidate* c : rivals) {
        const auto covers = [&](const Candidate* k) {
          return k->bytes_per_s <= c->bytes_per_s && carries_no_more(c->carries, k->carries);
        };
        if (std::none_of(kept.begin(), kept.end(), covers)) kept.push_back(c);
      }
      reduced_.insert(reduced_.end(), kept.begin(), kept.end());
    }
    std::sort(reduced_.begin(), reduced_.end(),
              [](const Candidate* a, const Candidate* b) { return a->link < b->link; });
  }

  // ---- the result

  static double bytes(const SiteLoad& load, const Communication& moves) {
    return load.near * moves.near_bytes + load.far * moves.far_bytes;
  }

  void write_loads() {
    std::array<double, kLinkTiers> fastest{};
    for (const FabricLink& link : fabric_.links()) {
      double& of_tier = fastest[static_cast<std::size_t>(link.tier)];
      of_tier = std::max(of_tier, link.capacity_bytes_per_s);
    }
    std::vector<std::vector<std::pair<LinkId, SiteLoad>>> at_site(sites_);
    for (std::size_t i = 0; i < reduced_.size(); ++i) {
      const Candidate& c = *reduced_[i];
      const LinkTier tier = fabric_.links()[c.link].tier;
      traffic_.links.push_back(
          {fabric_.link_name(c.link), tier, c.stands_for,
           fastest[static_cast<std::size_t>(tier)] / fabric_.links()[c.link].capacity_bytes_per_s});
      for (const SiteLoad& load : c.carries) at_site[load.site].emplace_back(LinkId(i), load);
    }
    traffic_.fabric = fabric_.name();
    traffic_.load_begin.push_back(0);
    for (const Pattern& pattern : patterns_) {
      for (const auto& [link, load] : at_site[pattern.site]) {
        const double busy_s = bytes(load, pattern.moves) / reduced_[link.value]->bytes_per_s;
        if (busy_s > 0) traffic_.loads.push_back({link, busy_s});
      }
      traffic_.load_begin.push_back(static_cast<std::uint32_t>(traffic_.loads.size()));
    }
  }

  void sum_up_tiers() {
    std::vector<Communication> moved(sites_);  // all executions together
    for (const auto& [op, pattern] : traffic_.ops) {
      const Pattern& p = patterns_[pattern.value];
      moved[p.site].near_bytes += p.moves.near_bytes;
      moved[p.site].far_bytes += p.moves.far_bytes;
    }
    std::vector<double> carried(classes_.size(), 0.0);  // a class comes after its parent
    for (std::size_t c = 0; c < classes_.size(); ++c) {
      const LinkClass& its = classes_[c];
      if (its.parent == LinkClass::kNone) continue;
      carried[c] = carried[its.parent] + bytes({its.site, its.near, its.far}, moved[its.site]);
    }
    for (LinkId link; link.value < class_of_.size(); ++link) {
      const double sum = carried[class_of_[link]];
      if (sum == 0) continue;
      TierUse& tier = traffic_.tiers[static_cast<std::size_t>(fabric_.links()[link].tier)];
      const double busy_s = sum / achieved_bytes_per_s(link);
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
  std::vector<Pattern> patterns_;  // by PatternId
  std::size_t sites_ = 0;
  std::vector<LinkClass> classes_;            // first one per tier
  IdVector<LinkId, std::uint32_t> class_of_;  // by link of the fabric
  std::vector<Candidate> candidates_;
  std::vector<const Candidate*> reduced_;
  // Scratch of refine_classes().
  std::vector<Transfer> near_transfers_;
  std::vector<Transfer> far_transfers_;
  LinkBytes near_;
  LinkBytes far_;
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
    const double slower = links[load.link].slower;
    return own ? std::min(1.0, use / slower) * slower : use;
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
