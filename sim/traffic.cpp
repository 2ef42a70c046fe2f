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
  bool by_member = false;     ///< members have loads of their own
  std::vector<RankId> ranks;  ///< of the op's streams
  friend auto operator<=>(const Site&, const Site&) = default;
};

/// Bytes for a member, or a node of members, of one site.
struct Term {
  std::uint32_t who = 0;  ///< as in Traffic::MemberTerm
  double bytes = 0;       ///< in units of near_bytes where `who` is a member, else of far_bytes
};

/// Which sums over members a link can carry; links with the same one carry the same of every op.
using TermsId = Id<struct TermsTag>;
constexpr TermsId kNoTerms{0};  ///< all members alike

/// What a class of links carries of one site, in bytes where the busiest GPU sends one byte inside
/// its node (near) and one out of it (far); and the class that it was before that site.
struct LinkClass {
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;
  std::uint32_t parent = kNone;
  std::uint32_t site = 0;
  double near = 0;
  double far = 0;
  TermsId terms = kNoTerms;
};

/// What one link carries, by site, ascending.
struct SiteLoad {
  std::uint32_t site = 0;
  double near = 0;
  double far = 0;
  TermsId terms = kNoTerms;
};

/// Of the same sites. Sums over different members are never compared: either may be the greater.
bool carries_no_more(const std::vector<SiteLoad>& a, const std::vector<SiteLoad>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].terms != b[i].terms) return false;
    if (a[i].near > b[i].near || a[i].far > b[i].far) return false;
  }
  return true;
}

/// What the members of an op, and then the nodes of members, are sent over the mean, at most once
/// every token: by MemberTerm::who.
std::vector<double> over_mean(const Traffic::MemberLoads& members,
                              std::span<const std::uint32_t> per_mille) {
  std::size_t nodes = 0;
  for (const std::uint32_t node : members.node_of) nodes = std::max<std::size_t>(nodes, node + 1);
  const std::size_t n = members.node_of.size();
  std::vector<double> loads(n + nodes, 0.0);
  std::vector<double> of_node(nodes, 0.0);
  for (std::size_t m = 0; m < n; ++m) {
    const double load = static_cast<double>(per_mille[m]) / 1000;
    loads[m] = std::min(load, members.most_gpu);
    loads[n + members.node_of[m]] += load;
    ++of_node[members.node_of[m]];
  }
  for (std::size_t i = 0; i < nodes; ++i) {
    loads[n + i] = std::min(loads[n + i] / of_node[i], members.most_node);
  }
  return loads;
}

class TrafficBuilder {
 public:
  TrafficBuilder(const Program& program, const Cluster& cluster, const Fabric& fabric)
      : program_(program),
        cluster_(cluster),
        fabric_(fabric),
        class_of_(fabric.links().size()),
        near_{IdVector<LinkId, double>(fabric.links().size(), 0.0), {}},
        far_{IdVector<LinkId, double>(fabric.links().size(), 0.0), {}},
        of_one_{IdVector<LinkId, double>(fabric.links().size(), 0.0), {}} {
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
    Communication moves;  ///< of the mean where members have loads of their own
    MostOverMean most;
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

    // Exchanges that differ only in the busiest: what members of their own loads move is the same.
    IdVector<ShapeId, ShapeId> of_mean(shapes.size());
    std::map<ExpertExchange, ShapeId> means;
    for (ShapeId id; id.value < shapes.size(); ++id) {
      if (const auto* e = std::get_if<ExpertExchange>(&shapes[id].work)) {
        of_mean[id] = means.try_emplace(mean_of(*e), id).first->second;
      }
    }

    // Ops of one shape whose streams begin and end alike are at one site.
    using Key = std::tuple<ShapeId, bool, StreamId, StreamId>;
    std::map<Key, PatternId> known;
    std::map<Site, std::uint32_t> sites;
    for (OpId op; op.value < program_.size(); ++op) {
      const ShapeId shape = program_.shape(op);
      if (!moves[shape]) continue;
      const auto streams = program_.streams_of(op);
      const bool by_member = !program_.member_loads(op).empty();
      const Key key{by_member ? of_mean[shape] : shape, by_member, streams.front(), streams.back()};
      auto found = known.find(key);
      if (found == known.end()) {
        Site site{groups[shape], by_member, {}};
        for (const StreamId stream : streams) site.ranks.push_back(rank_of(stream));
        const auto [at, added] = sites.try_emplace(site, static_cast<std::uint32_t>(sites.size()));
        if (added) refine_classes(site, at->second);
        Pattern& pattern = patterns_.emplace_back(Pattern{at->second, *moves[shape], {}});
        if (by_member) {
          const auto& exchange = std::get<ExpertExchange>(shapes[shape].work);
          pattern.moves = communication_of(mean_of(exchange));
          pattern.most = most_over_mean(exchange);
        }
        traffic_.weights.push_back(
            static_cast<std::uint32_t>(lane_of(kind_of(streams.front()), cluster_.lanes)));
        found = known.emplace(key, PatternId(patterns_.size() - 1)).first;
      }
      traffic_.ops.emplace_back(op, found->second);
    }
    sites_ = sites.size();
  }

  static ExpertExchange mean_of(ExpertExchange exchange) {
    exchange.busiest_gpu_per_mille = exchange.busiest_node_per_mille = 1000;
    return exchange;
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
      const UnitTransfers unit = unit_transfers(site.shape.pattern, by_node(group, fabric_));
      near_transfers_.insert(near_transfers_.end(), unit.near.begin(), unit.near.end());
      far_transfers_.insert(far_transfers_.end(), unit.far.begin(), unit.far.end());
    }
    load(near_transfers_, near_);
    load(far_transfers_, far_);
    std::map<LinkId, TermsId> terms;
    if (site.by_member) terms = terms_of_links(site, id);
    using Split = std::tuple<std::uint32_t, double, double, TermsId>;
    std::map<Split, std::uint32_t> children;
    const auto split = [&](LinkId link) {
      const double near = std::exchange(near_.bytes[link], 0.0);
      const double far = std::exchange(far_.bytes[link], 0.0);
      if (near + far == 0) return;
      const TermsId its = site.by_member ? terms.at(link) : kNoTerms;
      const Split key{class_of_[link], rounded(near), rounded(far), its};
      const auto [child, added] =
          children.try_emplace(key, static_cast<std::uint32_t>(classes_.size()));
      if (added) classes_.push_back({class_of_[link], id, near, far, its});
      class_of_[link] = child->second;
    };
    for (const LinkId link : near_.touched) split(link);
    for (const LinkId link : far_.touched) split(link);
    near_.touched.clear();
    far_.touched.clear();
    near_transfers_.clear();
    far_transfers_.clear();
  }

  /// What each link carries for whom. A transfer is sized by the GPU that dispatch sends to or that
  /// combine collects from, and between nodes by that GPU's node.
  std::map<LinkId, TermsId> terms_of_links(const Site& site, std::uint32_t id) {
    const bool combine = site.shape.pattern == CommunicationPattern::combine;
    ORRERY_CHECK(combine || site.shape.pattern == CommunicationPattern::dispatch,
                 "member loads of a {}", name_of(site.shape.pattern));
    ORRERY_CHECK(program_.multiplicity()[0] == 1, "member loads of a class of {} ranks",
                 program_.multiplicity()[0]);
    const std::size_t members = site.ranks.size();
    std::map<GpuId, std::uint32_t> member_of;
    std::map<std::int32_t, std::uint32_t> nodes;
    std::vector<std::uint32_t>& node_of = node_of_[id];
    for (const RankId rank : site.ranks) {
      const GpuId gpu(rank.value);
      member_of.emplace(gpu, static_cast<std::uint32_t>(member_of.size()));
      const std::int32_t node = fabric_.vertices()[fabric_.vertex(gpu)].node;
      node_of.push_back(
          nodes.try_emplace(node, static_cast<std::uint32_t>(nodes.size())).first->second);
    }
    std::vector<std::vector<Transfer>> for_whom(members + nodes.size());
    const auto member = [&](const Transfer& t) { return member_of.at(combine ? t.from : t.to); };
    for (const Transfer& t : near_transfers_) for_whom[member(t)].push_back(t);
    for (const Transfer& t : far_transfers_) for_whom[members + node_of[member(t)]].push_back(t);

    std::map<LinkId, std::vector<Term>> by_link;
    for (std::size_t who = 0; who < for_whom.size(); ++who) {
      load(for_whom[who], of_one_);
      for (const LinkId link : of_one_.touched) {
        const double bytes = std::exchange(of_one_.bytes[link], 0.0);
        if (bytes > 0) by_link[link].push_back({static_cast<std::uint32_t>(who), bytes});
      }
      of_one_.touched.clear();
    }
    std::map<LinkId, TermsId> result;
    for (auto& [link, sum] : by_link) {
      std::vector<std::pair<std::uint32_t, double>> key;
      for (const Term& term : sum) key.emplace_back(term.who, rounded(term.bytes));
      const auto [known, added] = known_terms_.try_emplace({id, key}, TermsId(terms_.size()));
      if (added) terms_.push_back(std::move(sum));
      result.emplace(link, known->second);
    }
    return result;
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

  double achieved_bytes_per_s(LinkId link) const {
    return orrery::achieved_bytes_per_s(fabric_.links()[link], cluster_);
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
      loads.push_back({classes_[c].site, classes_[c].near, classes_[c].far, classes_[c].terms});
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

  double bytes(const Term& term, const Pattern& pattern) const {
    const bool near = term.who < node_of_.at(pattern.site).size();
    return term.bytes * (near ? pattern.moves.near_bytes : pattern.moves.far_bytes);
  }

  void write_loads() {
    std::vector<std::vector<std::pair<LinkId, SiteLoad>>> at_site(sites_);
    for (std::size_t i = 0; i < reduced_.size(); ++i) {
      const Candidate& c = *reduced_[i];
      const FabricLink& link = fabric_.links()[c.link];
      traffic_.links.push_back(
          {fabric_.link_name(c.link), link.tier, c.stands_for, impairment(link, cluster_)});
      for (const SiteLoad& load : c.carries) at_site[load.site].emplace_back(LinkId(i), load);
    }
    traffic_.fabric = fabric_.name();
    traffic_.load_begin.push_back(0);
    for (std::size_t p = 0; p < patterns_.size(); ++p) {
      const Pattern& pattern = patterns_[p];
      std::vector<Traffic::MemberTerm> terms;
      for (const auto& [link, load] : at_site[pattern.site]) {
        const double bytes_per_s = reduced_[link.value]->bytes_per_s;
        const double busy_s = bytes(load, pattern.moves) / bytes_per_s;
        if (busy_s == 0) continue;
        traffic_.loads.push_back({link, busy_s});
        if (load.terms == kNoTerms) continue;
        for (const Term& term : terms_[load.terms]) {
          terms.push_back({link, term.who, bytes(term, pattern) / bytes_per_s});
        }
      }
      if (const auto nodes = node_of_.find(pattern.site); nodes != node_of_.end()) {
        traffic_.by_member.emplace(
            PatternId(p), Traffic::MemberLoads{nodes->second, pattern.most.gpu, pattern.most.node,
                                               std::move(terms)});
      }
      traffic_.load_begin.push_back(static_cast<std::uint32_t>(traffic_.loads.size()));
    }
  }

  void sum_up_tiers() {
    std::vector<Communication> moved(sites_);  // all executions together
    // And by how much that is more or less for whom, by site and MemberTerm::who.
    std::map<std::uint32_t, std::vector<double>> more;
    for (const auto& [op, pattern] : traffic_.ops) {
      const Pattern& p = patterns_[pattern.value];
      moved[p.site].near_bytes += p.moves.near_bytes;
      moved[p.site].far_bytes += p.moves.far_bytes;
      const auto members = traffic_.by_member.find(pattern);
      if (members == traffic_.by_member.end()) continue;
      const std::vector<double> loads = over_mean(members->second, program_.member_loads(op));
      std::vector<double>& sums = more[p.site];
      sums.resize(loads.size(), 0.0);
      for (std::size_t who = 0; who < loads.size(); ++who) {
        sums[who] += bytes({static_cast<std::uint32_t>(who), loads[who] - 1}, p);
      }
    }
    std::vector<double> carried(classes_.size(), 0.0);  // a class comes after its parent
    for (std::size_t c = 0; c < classes_.size(); ++c) {
      const LinkClass& its = classes_[c];
      if (its.parent == LinkClass::kNone) continue;
      carried[c] = carried[its.parent] + bytes({its.site, its.near, its.far}, moved[its.site]);
      if (its.terms == kNoTerms) continue;
      for (const Term& term : terms_[its.terms]) {
        carried[c] += term.bytes * more.at(its.site)[term.who];
      }
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
  std::vector<LinkClass> classes_;                  // first one per tier
  IdVector<LinkId, std::uint32_t> class_of_;        // by link of the fabric
  IdVector<TermsId, std::vector<Term>> terms_{{}};  // first none
  using TermsKey = std::pair<std::uint32_t, std::vector<std::pair<std::uint32_t, double>>>;
  std::map<TermsKey, TermsId> known_terms_;                      // by site and rounded terms
  std::map<std::uint32_t, std::vector<std::uint32_t>> node_of_;  // by site with member loads
  std::vector<Candidate> candidates_;
  std::vector<const Candidate*> reduced_;
  // Scratch of refine_classes().
  std::vector<Transfer> near_transfers_;
  std::vector<Transfer> far_transfers_;
  LinkBytes near_;
  LinkBytes far_;
  LinkBytes of_one_;
};

}  // namespace

PatternId Traffic::pattern_of(OpId op) const {
  const auto found =
      std::lower_bound(ops.begin(), ops.end(), op,
                       [](const auto& entry, OpId wanted) { return entry.first < wanted; });
  return found != ops.end() && found->first == op ? found->second : kNoPattern;
}

Traffic::Flow Traffic::flow_of(PatternId pattern, Picoseconds price_ps) const {
  return flow_of(loads_of(pattern), price_ps);
}

Traffic::Flow Traffic::flow_of(PatternId pattern, Picoseconds price_ps,
                               std::span<const std::uint32_t> member_loads) const {
  const MemberLoads& members = by_member.at(pattern);
  const std::vector<double> sent = over_mean(members, member_loads);
  std::vector<LinkLoad> actual;
  auto term = members.terms.begin();
  for (LinkLoad load : loads_of(pattern)) {
    for (; term != members.terms.end() && term->link == load.link; ++term) {
      load.busy_s += term->busy_s * (sent[term->who] - 1);
    }
    constexpr double kRounding = 1e-12;  // what is left of a link whose members get nothing
    if (load.busy_s > kRounding * seconds(price_ps)) actual.push_back(load);
  }
  return flow_of(actual, price_ps);
}

Traffic::Flow Traffic::flow_of(std::span<const LinkLoad> of_op, Picoseconds price_ps) const {
  Flow flow;
  if (price_ps == 0) return flow;
  const auto use_of = [&](const LinkLoad& load) {
    const SharedLink& link = links[load.link];
    const double use = load.busy_s / seconds(price_ps);
    return is_own(link.tier) ? std::min(1.0, use / link.slower) * link.slower : use;
  };
  for (const LinkLoad& load : of_op) flow.limit = std::max(flow.limit, use_of(load));
  for (const LinkLoad& load : of_op) {
    flow.hops.push_back({load.link, use_of(load) / flow.limit});
  }
  return flow;
}

Traffic traffic_of(const Program& program, const Cluster& cluster, const Fabric& fabric) {
  return TrafficBuilder(program, cluster, fabric).build();
}

}  // namespace orrery
