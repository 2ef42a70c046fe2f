#include "sim/flows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sim/check.hpp"

namespace orrery {

namespace {

constexpr Picoseconds kNever = std::numeric_limits<Picoseconds>::max();
constexpr double kUnit = 0x1p-24;  // of a hop, in bytes per byte

/// Bytes first, then the rate: round sizes over round rates come out exact. What exceeds a whole
/// picosecond by no more than the rounding of these operations is that picosecond.
double picoseconds_for(double bytes, double bytes_per_s) {
  const double exact = bytes * 1e12 / bytes_per_s;
  return exact - exact * 0x1p-50;
}

/// Below 2^63. As std::ceil, which is a call where the instruction set has no rounding.
Picoseconds ceil_ps(double ps) {
  const auto whole = static_cast<Picoseconds>(ps);
  return whole + (static_cast<double>(whole) < ps ? 1 : 0);
}

/// Asks for a cache line that will be needed soon.
void prefetch(const void* address) {
  __builtin_prefetch(address);
}
constexpr std::uint64_t kNotYet = std::numeric_limits<std::uint64_t>::max();  // as a stamp
constexpr std::size_t kAhead = 8;                                             // places of a link

}  // namespace

FlowNetwork::FlowNetwork(const IdVector<LinkId, Link>& links)
    : links_(links.size()), filling_(links.size()) {
  for (LinkId link; link.value < links.size(); ++link) {
    const auto& [bytes_per_s, latency_ps] = links[link];
    ORRERY_CHECK(std::isfinite(bytes_per_s) && bytes_per_s > 0 && latency_ps >= 0,
                 "link {}: {} bytes/s, {} ps", link.value, bytes_per_s, latency_ps);
    links_[link].bytes_per_s = bytes_per_s;
    links_[link].latency_ps = latency_ps;
  }
}

FlowId FlowNetwork::start(Picoseconds at_ps, std::span<const LinkId> path, double bytes,
                          double limit_bytes_per_s, std::uint32_t multiplicity) {
  ORRERY_CHECK(at_ps >= now_ps_, "a flow starts at {}, but it is {}", at_ps, now_ps_);
  Flow flow;
  flow.bytes_left = bytes;
  flow.limit_bytes_per_s = limit_bytes_per_s;
  flow.multiplicity = multiplicity;
  flow.hop_begin = static_cast<std::uint32_t>(hops_.size());
  for (const LinkId link : path) {
    ORRERY_CHECK(link.value < links_.size(), "link {} of {}", link.value, links_.size());
    hops_.push_back({link, static_cast<std::uint32_t>(1 / kUnit)});
    at_ps += links_[link].latency_ps;
  }
  return add(at_ps, flow);
}

FlowId FlowNetwork::start(Picoseconds at_ps, std::span<const FlowHop> hops, double bytes,
                          double limit_bytes_per_s, std::uint32_t weight,
                          std::uint32_t multiplicity) {
  ORRERY_CHECK(at_ps >= now_ps_, "a flow starts at {}, but it is {}", at_ps, now_ps_);
  Flow flow;
  flow.bytes_left = bytes;
  flow.limit_bytes_per_s = limit_bytes_per_s;
  flow.weight = weight;
  flow.multiplicity = multiplicity;
  flow.hop_begin = static_cast<std::uint32_t>(hops_.size());
  Picoseconds latency_ps = 0;  // the transfers go on side by side: the longest way
  for (const FlowHop& hop : hops) {
    ORRERY_CHECK(
        hop.link.value < links_.size() && 0 <= hop.bytes_per_byte && hop.bytes_per_byte < 256,
        "link {} of {} carries {} times the bytes", hop.link.value, links_.size(),
        hop.bytes_per_byte);
    const auto units = static_cast<std::uint32_t>(std::lround(hop.bytes_per_byte / kUnit));
    if (units == 0) continue;
    hops_.push_back({hop.link, units});
    latency_ps = std::max(latency_ps, links_[hop.link].latency_ps);
  }
  return add(at_ps + latency_ps, flow);
}

/// The flow whose hops were just appended.
FlowId FlowNetwork::add(Picoseconds begins_ps, Flow flow) {
  flow.hop_end = static_cast<std::uint32_t>(hops_.size());
  ORRERY_CHECK(flow.hop_end > flow.hop_begin && flow.multiplicity > 0 && flow.weight > 0 &&
                   flow.weight < 1 << 16,
               "{} links, {} flows of weight {}", flow.hop_end - flow.hop_begin, flow.multiplicity,
               flow.weight);
  ORRERY_CHECK(
      std::isfinite(flow.bytes_left) && flow.bytes_left >= 0 && flow.limit_bytes_per_s >= 0,
      "{} bytes at most at {} bytes/s", flow.bytes_left, flow.limit_bytes_per_s);
  const FlowId id(flows_.size());
  flows_.push_back(flow);
  found_.push_back(0);
  fixed_.push_back(0);
  place_of_hop_.resize(hops_.size());
  begins_.push({begins_ps, id});
  return id;
}

// Every recomputation finds whole components: flows that once were connected to a changed link
// still are, or hang on another link that changed with it. So one flow speaks for its component.
bool FlowNetwork::stale(const FirstCompletions& first) const {
  return fixed_[first.flows.front()] != first.component;
}

void FlowNetwork::join(FlowId id) {
  Flow& flow = flows_[id];
  flow.since_ps = now_ps_;
  fixed_[id] = kNotYet;
  const std::uint32_t group = links_[hops_[flow.hop_begin].link].group;
  bool leads_elsewhere = flow.limit_bytes_per_s > 0;
  for (std::uint32_t hop = flow.hop_begin; hop < flow.hop_end; ++hop) {
    SharedLink& link = links_[hops_[hop].link];
    place_of_hop_[hop] = static_cast<std::uint32_t>(link.places.size());
    link.places.push_back({id, hop});
    link.load += load_of(flow, hops_[hop]);
    leads_elsewhere = leads_elsewhere || link.group != group;
    changed_.push_back(hops_[hop].link);
  }
  for (std::uint32_t hop = flow.hop_begin; leads_elsewhere && hop < flow.hop_end; ++hop) {
    const std::uint32_t joined = links_[hops_[hop].link].group;
    if (joined != kNoGroup) groups_[joined].changed = true;
  }
  ++sharing_;
}

void FlowNetwork::leave(FlowId id) {
  Flow& flow = flows_[id];
  settle_account(flow);
  for (std::uint32_t hop = flow.hop_begin; hop < flow.hop_end; ++hop) {
    SharedLink& link = links_[hops_[hop].link];
    const Place moved = link.places.back();
    link.places[place_of_hop_[hop]] = moved;
    place_of_hop_[moved.hop] = place_of_hop_[hop];
    link.places.pop_back();
    link.load -= load_of(flow, hops_[hop]);
    if (link.load == 0) leave_group(link);
    changed_.push_back(hops_[hop].link);
  }
  fixed_[id] = 0;
  flow.rate_bytes_per_s = 0;
  flow.bytes_left = 0;
  --sharing_;
}

void FlowNetwork::leave_group(SharedLink& link) {
  if (link.group == kNoGroup) return;
  Group& group = groups_[link.group];
  if (--group.links == 0) free_groups_.push_back(link.group);
  link.group = kNoGroup;
}

std::uint32_t FlowNetwork::new_group() {
  if (free_groups_.empty()) {
    groups_.emplace_back();
    return static_cast<std::uint32_t>(groups_.size() - 1);
  }
  const std::uint32_t group = free_groups_.back();
  free_groups_.pop_back();
  groups_[group].changed = false;
  groups_[group].limited.clear();
  return group;
}

/// Everything that changed at this instant takes effect: afterwards all rates hold.
void FlowNetwork::settle() {
  while (!begins_.empty() && begins_.top().first == now_ps_) {
    join(begins_.top().second);
    begins_.pop();
  }
  if (changed_.empty()) return;
  const std::uint64_t before = recomputations_;
  for (const LinkId link : changed_) {
    if (links_[link].component > before || links_[link].load == 0) continue;
    collect(link);
    share();
    completions_.push_back(first_);
    std::push_heap(completions_.begin(), completions_.end(), Later{});
  }
  changed_.clear();

  // There are no more components than flows; the rest is stale.
  if (completions_.size() > 2 * sharing_ + 64) {
    completions_.erase(std::remove_if(completions_.begin(), completions_.end(),
                                      [&](const FirstCompletions& c) { return stale(c); }),
                       completions_.end());
    std::make_heap(completions_.begin(), completions_.end(), Later{});
  }
}

/// The component of a link, marked with a new stamp, as nothing were fixed.
void FlowNetwork::collect(LinkId seed) {
  const std::uint64_t stamp = ++recomputations_;
  component_links_.assign(1, seed);
  links_[seed].component = stamp;
  group_ = links_[seed].group;
  const std::size_t known =
      group_ == kNoGroup || groups_[group_].changed ? links_.size() + 1 : groups_[group_].links;
  // The last link first: it leads elsewhere sooner than the first link's other neighbours.
  to_visit_.assign(1, seed);
  while (!to_visit_.empty() && component_links_.size() < known) {
    const std::vector<Place>& places = links_[to_visit_.back()].places;
    to_visit_.pop_back();
    for (std::size_t p = 0; p < places.size(); ++p) {
      const Place& place = places[p];
      if (p + kAhead < places.size()) prefetch(&hops_[places[p + kAhead].hop]);
      if (found_[place.flow] == stamp) continue;
      found_[place.flow] = stamp;
      const Flow& flow = flows_[place.flow];
      for (std::uint32_t hop = flow.hop_begin; hop < flow.hop_end; ++hop) {
        const LinkId next = hops_[hop].link;
        if (links_[next].component == stamp) continue;
        links_[next].component = stamp;
        component_links_.push_back(next);
        to_visit_.push_back(next);
      }
    }
  }
  if (component_links_.size() != known) make_group();

  levels_.clear();
  for (const LinkId id : component_links_) {
    const SharedLink& link = links_[id];
    filling_[id] = {link.bytes_per_s, link.load, 0};
    levels_.emplace_back(link.bytes_per_s / (static_cast<double>(link.load) * kUnit), id);
  }
  first_.at_ps = kNever;
  first_.component = stamp;
  first_.flows.clear();
}

/// Of the links and flows that were just found.
void FlowNetwork::make_group() {
  for (const LinkId id : component_links_) {
    SharedLink& link = links_[id];
    if (link.group == kNoGroup) continue;
    groups_[link.group].changed = true;  // what remains of it has fewer flows than it says
    leave_group(link);
  }
  group_ = new_group();
  Group& group = groups_[group_];
  group.links = static_cast<std::uint32_t>(component_links_.size());
  for (const LinkId id : component_links_) {
    links_[id].group = group_;
    for (const Place& place : links_[id].places) {
      const Flow& flow = flows_[place.flow];
      if (flow.hop_begin == place.hop && flow.limit_bytes_per_s > 0) {  // once each
        group.limited.emplace_back(flow.limit_bytes_per_s / flow.weight, place.flow);
      }
    }
  }
  std::sort(group.limited.begin(), group.limited.end());
}

/// Progressive filling of the collected component.
void FlowNetwork::share() {
  std::make_heap(levels_.begin(), levels_.end(), std::greater<>());
  const std::uint64_t stamp = first_.component;
  auto& all_limited = groups_[group_].limited;
  all_limited.erase(std::remove_if(all_limited.begin(), all_limited.end(),
                                   [&](const auto& entry) { return fixed_[entry.second] == 0; }),
                    all_limited.end());
  auto limited = all_limited.begin();
  double level = 0;
  while (!levels_.empty()) {
    const auto [key, id] = levels_.front();
    const Filling& link = filling_[id];
    double saturates = key;
    if (link.not_fixed > 0) {
      saturates = link.left_bytes_per_s / (static_cast<double>(link.not_fixed) * kUnit);
      if (saturates <= key && limited != all_limited.end() && limited->first <= saturates) {
        const double limit = limited->first;
        level = std::max(level, limit);
        for (; limited != all_limited.end() && limited->first == limit; ++limited) {
          if (fixed_[limited->second] == stamp) continue;
          fix(limited->second, flows_[limited->second].limit_bytes_per_s, kNoLink);
        }
        end_round(limit);
        continue;
      }
    }
    std::pop_heap(levels_.begin(), levels_.end(), std::greater<>());
    if (link.not_fixed == 0) {
      levels_.pop_back();
    } else if (saturates > key) {
      levels_.back().first = saturates;
      std::push_heap(levels_.begin(), levels_.end(), std::greater<>());
    } else {
      levels_.pop_back();
      level = std::max(level, saturates);
      const std::vector<Place>& places = links_[id].places;
      for (std::size_t p = 0; p < places.size(); ++p) {
        if (p + kAhead < places.size()) {
          prefetch(&fixed_[places[p + kAhead].flow]);
          prefetch(&flows_[places[p + kAhead].flow]);
          prefetch(&hops_[places[p + kAhead].hop]);
        }
        const FlowId flow = places[p].flow;
        if (fixed_[flow] != stamp) fix(flow, level * flows_[flow].weight, id);
      }
      end_round(level);
    }
  }
}

/// Charges the bottleneck for the time that the flow has lost at its present rate.
void FlowNetwork::settle_account(Flow& flow) {
  if (flow.bottleneck == kNoLink || flow.since_ps == now_ps_) return;
  const double lost =
      flow.limit_bytes_per_s > 0 ? 1 - flow.rate_bytes_per_s / flow.limit_bytes_per_s : 1;
  links_[flow.bottleneck].held_back_s +=
      lost * flow.multiplicity * seconds(now_ps_ - flow.since_ps);
}

void FlowNetwork::fix(FlowId id, double rate_bytes_per_s, LinkId bottleneck) {
  Flow& flow = flows_[id];
  fixed_[id] = first_.component;
  if (flow.rate_bytes_per_s != rate_bytes_per_s) {
    settle_account(flow);
    flow.bottleneck = bottleneck;
    const double gone = flow.rate_bytes_per_s * seconds(now_ps_ - flow.since_ps);
    flow.bytes_left = std::max(0.0, flow.bytes_left - gone);
    flow.since_ps = now_ps_;
    flow.rate_bytes_per_s = rate_bytes_per_s;
    const double duration_ps = picoseconds_for(flow.bytes_left, rate_bytes_per_s);
    ORRERY_CHECK(duration_ps < 9e18 - static_cast<double>(now_ps_), "{} bytes at {} bytes/s",
                 flow.bytes_left, rate_bytes_per_s);
    flow.end_ps = now_ps_ + ceil_ps(duration_ps);
  }
  if (flow.end_ps < first_.at_ps) {
    first_.at_ps = flow.end_ps;
    first_.flows.clear();
  }
  if (flow.end_ps == first_.at_ps) first_.flows.push_back(id);
  for (std::uint32_t hop = flow.hop_begin; hop < flow.hop_end; ++hop) {
    Filling& link = filling_[hops_[hop].link];
    if (link.fixed_this_round == 0) touched_.push_back(hops_[hop].link);
    link.fixed_this_round += load_of(flow, hops_[hop]);
  }
}

void FlowNetwork::end_round(double level) {
  for (const LinkId id : touched_) {
    Filling& link = filling_[id];
    link.left_bytes_per_s -= static_cast<double>(link.fixed_this_round) * kUnit * level;
    link.not_fixed -= link.fixed_this_round;
    link.fixed_this_round = 0;
  }
  touched_.clear();
}

std::optional<Picoseconds> FlowNetwork::next_event_ps() {
  settle();
  while (!completions_.empty() && stale(completions_.front())) {
    std::pop_heap(completions_.begin(), completions_.end(), Later{});
    completions_.pop_back();
  }
  if (begins_.empty() && completions_.empty()) return std::nullopt;
  return std::min(begins_.empty() ? kNever : begins_.top().first,
                  completions_.empty() ? kNever : completions_.front().at_ps);
}

/// What completes at this instant leaves.
void FlowNetwork::complete_due(std::vector<Completion>& done) {
  while (!completions_.empty() && completions_.front().at_ps == now_ps_) {
    std::pop_heap(completions_.begin(), completions_.end(), Later{});
    const FirstCompletions first = std::move(completions_.back());
    completions_.pop_back();
    if (stale(first)) continue;
    for (const FlowId flow : first.flows) {
      leave(flow);
      done.push_back({now_ps_, flow});
    }
  }
}

std::vector<Completion> FlowNetwork::advance_to(Picoseconds t_ps) {
  ORRERY_CHECK(t_ps >= now_ps_, "advance to {}, but it is {}", t_ps, now_ps_);
  std::vector<Completion> done;
  for (auto next = next_event_ps(); next && *next <= t_ps; next = next_event_ps()) {
    now_ps_ = *next;
    complete_due(done);
  }
  now_ps_ = t_ps;
  std::sort(done.begin(), done.end());
  return done;
}

std::vector<Completion> FlowNetwork::run_until_idle() {
  std::vector<Completion> done;
  while (const auto next = next_event_ps()) {
    now_ps_ = *next;
    complete_due(done);
  }
  std::sort(done.begin(), done.end());
  return done;
}

double FlowNetwork::rate_bytes_per_s(FlowId flow) {
  settle();
  return flows_[flow].rate_bytes_per_s;
}

}  // namespace orrery
