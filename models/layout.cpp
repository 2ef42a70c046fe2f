#include "models/layout.hpp"

#include <algorithm>

#include "sim/check.hpp"

namespace orrery {
namespace {

/// Every kind of group is a comb over the slots: `extent` members, `stride` apart. `stride` combs
/// interleave in a block of stride * extent consecutive slots, and blocks follow one another.
struct Comb {
  std::int64_t stride;
  std::int64_t extent;
};

Comb comb_of(GroupKind kind, const Parallelism& p) {
  const std::int64_t slots = p.ranks_per_position();
  const std::int64_t expert_block = p.expert_tp * p.ep;
  switch (kind) {
    case GroupKind::tensor:
      return {1, p.tp};
    case GroupKind::context:
      return {p.tp, p.cp};
    case GroupKind::data:
      return {p.tp, p.cp * p.dp};
    case GroupKind::expert:
      return {p.expert_tp, p.ep};
    case GroupKind::expert_tensor:
      return {1, p.expert_tp};
    case GroupKind::expert_data:
      return {expert_block, slots / expert_block};
    case GroupKind::position:
      return {1, slots};
  }
  ORRERY_CHECK(false, "unknown group kind {}", static_cast<int>(kind));
  return {};
}

}  // namespace

Layout::Layout(const Parallelism& parallelism, std::int64_t gpus_per_node)
    : parallelism_(parallelism),
      gpus_per_node_(gpus_per_node),
      slots_(parallelism.ranks_per_position()) {
  ORRERY_CHECK(gpus_per_node >= 1, "{} GPUs per node", gpus_per_node);
  const Parallelism& p = parallelism_;
  ORRERY_CHECK(p.tp >= 1 && p.cp >= 1 && p.pp >= 1 && p.dp >= 1 && p.ep >= 1 && p.expert_tp >= 1,
               "degrees tp {} cp {} pp {} dp {} ep {} expert_tp {}", p.tp, p.cp, p.pp, p.dp, p.ep,
               p.expert_tp);
  ORRERY_CHECK(slots_ % (p.ep * p.expert_tp) == 0, "ep {} x expert_tp {} does not divide {} slots",
               p.ep, p.expert_tp, slots_);
}

Coordinates Layout::coordinates(std::int64_t rank) const {
  ORRERY_CHECK(0 <= rank && rank < world(), "rank {} of {}", rank, world());
  const Parallelism& p = parallelism_;
  const std::int64_t slot = rank % slots_;
  Coordinates c;
  c.pp = rank / slots_;
  c.tp = slot % p.tp;
  c.cp = slot / p.tp % p.cp;
  c.dp = slot / (p.tp * p.cp);
  c.expert_tp = slot % p.expert_tp;
  c.ep = slot / p.expert_tp % p.ep;
  c.expert_dp = slot / (p.expert_tp * p.ep);
  return c;
}

std::int64_t Layout::group_size(GroupKind kind) const {
  return comb_of(kind, parallelism_).extent;
}

std::int64_t Layout::stride(GroupKind kind) const {
  return comb_of(kind, parallelism_).stride;
}

std::int64_t Layout::group_of(GroupKind kind, std::int64_t slot) const {
  ORRERY_CHECK(0 <= slot && slot < slots_, "slot {} of {}", slot, slots_);
  const Comb comb = comb_of(kind, parallelism_);
  return slot / (comb.stride * comb.extent) * comb.stride + slot % comb.stride;
}

std::vector<std::int64_t> Layout::members(GroupKind kind, std::int64_t group) const {
  ORRERY_CHECK(0 <= group && group < group_count(kind), "group {} of {}", group, group_count(kind));
  const Comb comb = comb_of(kind, parallelism_);
  const std::int64_t first = group / comb.stride * comb.stride * comb.extent + group % comb.stride;
  std::vector<std::int64_t> slots(static_cast<std::size_t>(comb.extent));
  for (std::size_t i = 0; i < slots.size(); ++i) {
    slots[i] = first + static_cast<std::int64_t>(i) * comb.stride;
  }
  return slots;
}

std::int64_t Layout::members_per_node(GroupKind kind, std::span<const int> positions) const {
  // Positions of whole nodes share none, and a group lies in each as it does in the first.
  if (slots_ % gpus_per_node_ == 0) return members_per_node_of_one(kind, 0);
  if (positions.size() == 1) return members_per_node_of_one(kind, positions.front());
  std::int64_t most = 0;
  std::vector<std::int64_t> nodes;
  for (std::int64_t group = 0; group < group_count(kind); ++group) {
    nodes.clear();
    for (const int position : positions) {
      for (const std::int64_t slot : members(kind, group)) {
        nodes.push_back(node(rank(position, slot)));
      }
    }
    std::sort(nodes.begin(), nodes.end());
    for (auto first = nodes.begin(); first != nodes.end();) {
      const auto last = std::upper_bound(first, nodes.end(), *first);
      most = std::max<std::int64_t>(most, last - first);
      first = last;
    }
  }
  return most;
}

std::int64_t Layout::members_per_node_of_one(GroupKind kind, std::int64_t position) const {
  const Comb comb = comb_of(kind, parallelism_);
  const std::int64_t block_slots = comb.stride * comb.extent;
  if (rank(position, 0) % gpus_per_node_ == 0) {
    // Whole blocks in a node, whole nodes in a block, or a node or more between members.
    if (gpus_per_node_ % block_slots == 0) return comb.extent;
    if (comb.stride % gpus_per_node_ == 0) return 1;
    if (gpus_per_node_ % comb.stride == 0 && block_slots % gpus_per_node_ == 0) {
      return gpus_per_node_ / comb.stride;
    }
  }
  std::int64_t most = 0;
  for (std::int64_t block = 0; block < slots_; block += block_slots) {
    for (std::int64_t offset = 0; offset < comb.stride; ++offset) {
      // Members ascend, so those of a node follow one another.
      std::int64_t here = 0;
      std::int64_t next_node_at = 0;  // the first rank beyond the node of the last member
      for (std::int64_t i = 0; i < comb.extent; ++i) {
        const std::int64_t member = rank(position, block + offset + i * comb.stride);
        if (member >= next_node_at) {
          here = 0;
          next_node_at = (node(member) + 1) * gpus_per_node_;
        }
        most = std::max(most, ++here);
      }
    }
  }
  return most;
}

std::int64_t Layout::members_per_node(GroupKind kind) const {
  const int first[] = {0};
  return members_per_node(kind, first);
}

bool Layout::same_node(std::int64_t position_a, std::int64_t position_b) const {
  if (slots_ % gpus_per_node_ == 0) return position_a == position_b;
  for (std::int64_t slot = 0; slot < slots_; ++slot) {
    if (node(rank(position_a, slot)) != node(rank(position_b, slot))) return false;
  }
  return true;
}

}  // namespace orrery
