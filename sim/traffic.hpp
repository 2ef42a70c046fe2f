#pragma once
// What the ops of a Program put on the links of a fabric, and which of these links can matter.
//
// An op that communicates moves its bytes by a pattern (sim/transfers.hpp) along the fabric's
// routes, and all of its transfers keep pace: it is one flow, and keeps each link busy for the
// bytes that it puts there over what the link achieves. What an op takes alone is its price; links
// make it longer only where ops share them, or where the fabric has less than the price assumes.
//
// Where one simulated rank stands for a class, an op stands for the same op of all groups of its
// pipeline position, at the same time, so its loads are those of all of them together.
//
// Where the Program says what each member of an exchange is sent (Program::member_loads), a link
// carries what the members behind it are: to another GPU of the node in proportion to what that GPU
// is sent, to another node to what its members are on average; on the way back of a combine, what
// they send. What an op puts on a link is then a sum over members, kept as such (MemberTerm), and
// worked out when the op starts. Its price is that of the busiest, whatever the others carry.
//
// Links that cannot matter are left out. Two links that carry the same from every op are one; and a
// link that carries no more than another of no more capacity, from every op, never limits first.
// What remains of 12,000 links of 2048 GPUs is a hundred or so, with the same times.

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sim/cluster.hpp"
#include "sim/fabric.hpp"
#include "sim/flows.hpp"
#include "sim/program.hpp"

namespace orrery {

using PatternId =
    Id<struct PatternTag>;  ///< a distinct set of loads; ops that share it share a shape

inline constexpr PatternId kNoPattern{0xFFFFFFFF};

/// How long one execution of an op keeps a link busy.
struct LinkLoad {
  LinkId link;  ///< of Traffic::links
  double busy_s = 0;
};

/// The links of one tier over the whole Program, those that cannot limit included.
struct TierUse {
  std::int64_t links = 0;  ///< that any op uses, each direction by itself
  double busy_s = 0;       ///< sum over them
  double busiest_s = 0;    ///< of the one that is busy longest
  std::string busiest;     ///< its name
};

struct Traffic {
  std::string fabric;  ///< its name
  /// The links that can limit; `loads` refer to them.
  struct SharedLink {
    std::string name;  ///< of the fabric's link: "node0/nic1 -> leaf3"
    LinkTier tier{};
    std::int64_t stands_for = 1;  ///< links of the fabric that carry just the same
    /// Of a GPU's own link: impairment() of sim/cluster.hpp.
    double slower = 1;
  };
  IdVector<LinkId, SharedLink> links;
  std::array<TierUse, kLinkTiers> tiers;

  /// What a link carries more of an op for each member, or each node of members, that is sent more
  /// than the mean: busy_s times the excess over the mean.
  struct MemberTerm {
    LinkId link;
    std::uint32_t who = 0;  ///< a member, in the order of the op's streams; members + n: node n
    double busy_s = 0;
  };
  /// How the loads of a pattern follow from what each member is sent.
  struct MemberLoads {
    std::vector<std::uint32_t> node_of;  ///< by member
    double most_gpu = 1;                 ///< over the mean
    double most_node = 1;
    std::vector<MemberTerm> terms;  ///< ascending by link
  };

  /// Where members have loads of their own: with those of the mean.
  std::span<const LinkLoad> loads_of(PatternId pattern) const {
    return {loads.data() + load_begin[pattern.value], loads.data() + load_begin[pattern.value + 1]};
  }
  std::size_t patterns() const { return load_begin.empty() ? 0 : load_begin.size() - 1; }
  /// kNoPattern for ops that put nothing on a link.
  PatternId pattern_of(OpId op) const;
  /// The pattern's flow on a network of links with capacity 1, for an op that alone takes
  /// `price_ps`: it never is faster. Links of the GPUs themselves do not make it slower either,
  /// unless they are impaired: what they achieve is in the price.
  struct Flow {
    std::vector<FlowHop> hops;
    double limit = 0;  ///< of the link that it uses most; 0: it uses none
  };
  Flow flow_of(PatternId pattern, Picoseconds price_ps) const;
  /// The flow of one op of a pattern in by_member, by its Program::member_loads().
  Flow flow_of(PatternId pattern, Picoseconds price_ps,
               std::span<const std::uint32_t> member_loads) const;

  IdVector<PatternId, std::uint32_t> weights;  ///< of the virtual lanes
  std::vector<std::uint32_t> load_begin;       // by pattern, and the end
  std::vector<LinkLoad> loads;
  std::vector<std::pair<OpId, PatternId>> ops;  // ascending; those with a pattern
  std::map<PatternId, MemberLoads> by_member;   ///< of ops with member loads, and of no others

 private:
  Flow flow_of(std::span<const LinkLoad> of_op, Picoseconds price_ps) const;
};

/// The fabric must hold the cluster's GPUs; world ranks fill it node by node. Throws InputError
/// where failed links leave two GPUs without a path.
Traffic traffic_of(const Program& program, const Cluster& cluster, const Fabric& fabric);

}  // namespace orrery
