#pragma once
// Rank to coordinates, groups, and node placement.
//
// World rank = position * R + i, where position is the pipeline rank and i in [0, R) the *slot*
// inside the position, R = tp * cp * dp. Dense coordinates of a slot, fastest first: tp, cp, dp.
// Expert coordinates of the same slot, fastest first: expert_tp, ep, expert_dp (Megatron-LM's
// order). World ranks fill nodes in order. All slots of a position run the same operations: a
// position is a rank class.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "models/plan.hpp"

namespace orrery {

struct Coordinates {
  std::int64_t pp = 0, dp = 0, cp = 0, tp = 0;
  std::int64_t expert_dp = 0, ep = 0, expert_tp = 0;
};

/// Sets of slots of one position that communicate.
enum class GroupKind : std::uint8_t {
  tensor,   ///< tp ranks: same dp, cp
  context,  ///< cp ranks
  data,     ///< copies of dense parameters: dp * cp ranks with the same tp
  expert,   ///< ep ranks that exchange tokens: same expert_dp, expert_tp
  expert_tensor,
  expert_data,  ///< copies of one expert: same ep, expert_tp
  position,     ///< all R
};

class Layout {
 public:
  Layout(const Parallelism& parallelism, std::int64_t gpus_per_node);

  std::int64_t world() const { return parallelism_.world(); }
  std::int64_t positions() const { return parallelism_.pp; }
  std::int64_t slots() const { return slots_; }  ///< R

  Coordinates coordinates(std::int64_t rank) const;
  std::int64_t rank(std::int64_t position, std::int64_t slot) const {
    return position * slots_ + slot;
  }
  std::int64_t node(std::int64_t rank) const { return rank / gpus_per_node_; }

  std::int64_t group_size(GroupKind kind) const;
  std::int64_t stride(GroupKind kind) const;  ///< between neighbouring members, in slots
  std::int64_t group_count(GroupKind kind) const { return slots_ / group_size(kind); }
  /// Which group (0 .. group_count-1) a slot belongs to.
  std::int64_t group_of(GroupKind kind, std::int64_t slot) const;
  /// Slots of a group, ascending.
  std::vector<std::int64_t> members(GroupKind kind, std::int64_t group) const;
  /// Members of a group of the first position that share a node (the largest such number).
  std::int64_t members_per_node(GroupKind kind) const;
  /// Of such a group in all of these positions together.
  std::int64_t members_per_node(GroupKind kind, std::span<const int> positions) const;
  /// Whether slot i of both positions sits on one node (for all i; false if for any not).
  bool same_node(std::int64_t position_a, std::int64_t position_b) const;

 private:
  std::int64_t members_per_node_of_one(GroupKind kind, std::int64_t position) const;

  Parallelism parallelism_;
  std::int64_t gpus_per_node_;
  std::int64_t slots_;
};

}  // namespace orrery
