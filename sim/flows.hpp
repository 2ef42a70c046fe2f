#pragma once
// Flow-level network: live transfers that share links, and when each of them completes.
//
// The model. A flow of b bytes started at t over links l1..lk begins to share bandwidth at
// t + latency(l1) + ... + latency(lk), takes its rate on all its links at once, and completes when
// its b bytes have gone. Rates are constant between changes (a flow begins or completes) and are
// the max-min fair ones. No packets, no ramp-up, no congestion loss.
//
// Sharing. Given, at one instant:
//   C_l > 0         capacity of link l, bytes/s
//   u_f in (0, inf] own limit of flow f, bytes/s
//   m_f >= 1        flows that f stands for (same path, same bytes, same limit, same start)
//   w_f >= 1        weight of f where flows compete (a virtual lane's share; 1 where all are equal)
//   a_lf >= 0       bytes that link l carries for a byte of f: 1 on a plain path, more for a path
//                   with a loop, any fraction where f is a bundle of transfers that keep pace with
//                   each other (a collective) and l carries some of them
// Computed: the rate x_f of each of the m_f flows, such that
//   sum over f of a_lf m_f x_f <= C_l for every link l,    0 <= x_f <= u_f,
// and no x_f can be raised without lowering an x_g with x_g / w_g <= x_f / w_f (weighted max-min
// fairness). The set of feasible x is compact and convex, so the max-min fair x exists and is
// unique, and it is characterised by bottlenecks: x is max-min fair if and only if it is feasible
// and every flow f either has x_f = u_f or crosses a link that is saturated and on which no flow
// has an x / w above its own (Bertsekas and Gallager, Data Networks, 2nd ed., section 6.5.2; with
// own limits and convex sets: Radunovic and Le Boudec, IEEE/ACM Trans. Networking 15(5), 2007).
//
// Progressive filling computes it. Raise the level x_f / w_f of all flows together; link l would
// saturate at
//   s_l = (C_l - what its fixed flows take) / (sum of a_lf m_f w_f over its flows not fixed yet).
// At the smallest of all s_l and u_f / w_f either the flows of that link are fixed at s_l, or the
// flows of that limit at theirs; repeat with the rest. Each round fixes a flow, and s_l never
// falls.
//
// Rounding. Rates and bytes are doubles, times are integers: a completion is rounded up to the next
// picosecond (but for rounding error, so that a flow that nothing disturbs takes bytes over limit
// to the picosecond), and what it frees is free from then on. a_lf is kept as a multiple of 2^-24,
// so that what a link gives away within a round is added up in integers and subtracted as a sum x
// level, once; so the result does not depend on the order in which flows were started, and a flow
// of multiplicity m equals m flows bit for bit.
// Links that saturate at the same level are handled one after the other by id; there is no epsilon:
// after the first of two tied links the other one's level is the same but for the last bits, and a
// level that rounding would let fall is held at the one before it, so a link can be overfull by
// rounding error and by no more.
//
// Cost. A change recomputes the flows and links connected to it by shared links and no others; all
// changes at one instant share one recomputation, O(hops + links log links + limited log limited)
// of the component plus a logarithm per link whose level rose; after completions that leave the
// component whole, finding it and sorting its limits is saved. Only the first completion of a
// component enters the queue of completions: whichever comes first changes the component anyway.

#include <cstdint>
#include <functional>
#include <optional>
#include <queue>
#include <span>
#include <utility>
#include <vector>

#include "sim/ids.hpp"
#include "sim/units.hpp"

namespace orrery {

using LinkId = Id<struct LinkTag>;  ///< a one-way link of a FlowNetwork
using FlowId = Id<struct FlowTag>;  ///< a transfer, numbered from 0 in the order of start()

inline constexpr LinkId kNoLink{0xFFFFFFFF};

struct Link {
  double bytes_per_s = 0;
  Picoseconds latency_ps = 0;
};

/// A link that a flow uses, and the bytes it carries there for each byte of the flow: above 0 and
/// below 256, kept to 2^-24 (what rounds to 0 is left out).
struct FlowHop {
  LinkId link;
  double bytes_per_byte = 1;
};

struct Completion {
  Picoseconds at_ps = 0;
  FlowId flow;
  friend auto operator<=>(const Completion&, const Completion&) = default;
};

/// Links and the flows on them, at the instant now_ps(). Driven from outside: start flows, ask for
/// the next event, advance to it.
class FlowNetwork {
 public:
  /// Every link has a positive, finite capacity and a latency of at least 0.
  explicit FlowNetwork(const IdVector<LinkId, Link>& links);

  /// `multiplicity` equal flows of `bytes` >= 0 each from `at_ps` >= now_ps() on, over a path of at
  /// least one link; each keeps to `limit_bytes_per_s` (0: no limit). They complete together.
  FlowId start(Picoseconds at_ps, std::span<const LinkId> path, double bytes,
               double limit_bytes_per_s = 0, std::uint32_t multiplicity = 1);

  /// A bundle of transfers that keep pace with each other: it crosses all its links at once, each
  /// as much as its hop says, and competes with `weight` >= 1 (below 2^16) on all of them.
  /// `multiplicity` such bundles.
  FlowId start(Picoseconds at_ps, std::span<const FlowHop> hops, double bytes,
               double limit_bytes_per_s, std::uint32_t weight = 1, std::uint32_t multiplicity = 1);

  /// When something happens next if nothing else is started: a flow begins to share, or completes.
  /// Not the next completion: a flow still in its latency may delay that one.
  std::optional<Picoseconds> next_event_ps();

  /// Lets time pass until `t_ps` >= now_ps(), inclusive. What completed, by (time, flow).
  std::vector<Completion> advance_to(Picoseconds t_ps);

  /// Lets time pass until no flow is left.
  std::vector<Completion> run_until_idle();

  Picoseconds now_ps() const { return now_ps_; }
  /// Rate of each of the flows that `flow` stands for, from now on; 0 before its latency has passed
  /// and after its completion.
  double rate_bytes_per_s(FlowId flow);
  /// By how much a link has held flows back so far: over the flows that it was the bottleneck of,
  /// the time lost against their own limits (all of the time for flows without one).
  double held_back_s(LinkId link) const { return links_[link].held_back_s; }
  /// Recomputations of a component so far.
  std::uint64_t recomputations() const { return recomputations_; }

 private:
  struct Flow {                   // one cache line: share() goes through them in no order
    double bytes_left = 0;        // of each, at since_ps
    double rate_bytes_per_s = 0;  // from since_ps on
    Picoseconds since_ps = 0;
    Picoseconds end_ps = 0;  // at this rate
    double limit_bytes_per_s = 0;
    std::uint32_t hop_begin = 0;  // into hops_
    std::uint32_t hop_end = 0;
    std::uint32_t multiplicity = 1;
    std::uint32_t weight = 1;
    LinkId bottleneck = kNoLink;  // that fixed the rate; none: its own limit did
  };
  struct Hop {
    LinkId link;
    std::uint32_t units = 0;  // of 2^-24 bytes per byte
  };
  struct Place {
    FlowId flow;
    std::uint32_t hop = 0;
  };
  struct SharedLink {
    double bytes_per_s = 0;
    Picoseconds latency_ps = 0;
    std::vector<Place> places;  // of the flows that share it, in no particular order
    std::uint64_t load = 0;     // sum of their units x multiplicity x weight
    double held_back_s = 0;
    std::uint64_t component = 0;  // stamp of the recomputation that found it
    std::uint32_t group = kNoGroup;
  };
  struct Filling {  // of a link, while its component is recomputed
    double left_bytes_per_s = 0;
    std::uint64_t not_fixed = 0;
    std::uint64_t fixed_this_round = 0;
  };
  // The links that a recomputation found connected. Completions only ever take connections away:
  // whoever finds that many links again has found them all, and need not look at the other flows.
  struct Group {
    std::uint32_t links = 0;  // that are loaded still
    bool changed = false;     // since then a flow has begun that may lead elsewhere, or it split
    std::vector<std::pair<double, FlowId>> limited;  // by limit over weight
  };
  struct FirstCompletions {  // of a component; stale once a later recomputation has found its flows
    Picoseconds at_ps = 0;
    std::uint64_t component = 0;
    std::vector<FlowId> flows;
  };
  struct Later {
    bool operator()(const FirstCompletions& a, const FirstCompletions& b) const {
      return a.at_ps > b.at_ps;
    }
  };
  using Level = std::pair<double, LinkId>;  // rate over weight at which a link saturates

  static constexpr std::uint32_t kNoGroup = 0xFFFFFFFF;

  static std::uint64_t load_of(const Flow& flow, const Hop& hop) {
    return std::uint64_t{hop.units} * flow.multiplicity * flow.weight;
  }
  FlowId add(Picoseconds begins_ps, Flow flow);
  bool stale(const FirstCompletions& first) const;
  void join(FlowId flow);
  void leave(FlowId flow);
  void leave_group(SharedLink& link);
  std::uint32_t new_group();
  void make_group();
  void settle();
  void collect(LinkId seed);
  void share();
  void fix(FlowId flow, double rate_bytes_per_s, LinkId bottleneck);
  void end_round(double level);
  void settle_account(Flow& flow);
  void complete_due(std::vector<Completion>& done);

  IdVector<LinkId, SharedLink> links_;
  IdVector<LinkId, Filling> filling_;
  IdVector<FlowId, Flow> flows_;
  IdVector<FlowId, std::uint64_t> found_;  // stamp of the recomputation that looked at its links
  IdVector<FlowId, std::uint64_t> fixed_;  // and of the one that fixed its rate; 0: not sharing
  std::vector<Hop> hops_;
  std::vector<std::uint32_t> place_of_hop_;  // in the link's places, while the flow shares
  std::vector<Group> groups_;
  std::vector<std::uint32_t> free_groups_;
  Picoseconds now_ps_ = 0;
  std::size_t sharing_ = 0;  // flows that have a rate
  std::uint64_t recomputations_ = 0;

  using Begin = std::pair<Picoseconds, FlowId>;
  std::priority_queue<Begin, std::vector<Begin>, std::greater<>> begins_;
  std::vector<FirstCompletions> completions_;  // a heap, earliest first
  std::vector<LinkId> changed_;                // links that a flow joined or left since settle()

  // Of the component that is recomputed; kept to reuse their memory.
  std::uint32_t group_ = kNoGroup;
  std::vector<LinkId> component_links_;
  std::vector<LinkId> to_visit_;
  std::vector<Level> levels_;  // a heap, lowest first; a level may have risen since
  std::vector<LinkId> touched_;
  FirstCompletions first_;
};

}  // namespace orrery
