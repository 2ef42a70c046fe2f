#pragma once
// Collectives of a group of ranks over a Transport. All members call the same one with the same
// group, tag and sizes; sums are taken in the order of the group, so every member gets the same
// bytes in every run.
//
// Members exchange directly with each other. Sent and received per member, of n with the whole
// buffer S: all_reduce 2 S (n-1)/n, reduce_scatter, all_gather and all_to_all S (n-1)/n, as on a
// ring; broadcast at most 2 S (n-1)/n.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "calibrate/transport/transport.hpp"
#include "kernels/communicator.hpp"

namespace orrery {

/// bf16 is summed in FP32 and rounded once, to the nearest, ties to even.
using kernels::ElementType;

/// One operation of a group, as one of its members takes part in it. Several of a group may be
/// under way at once, on other threads and under other tags.
struct GroupOp {
  Transport& transport;
  std::span<const int> group;  ///< ranks, distinct, this one among them
  std::uint64_t tag = 0;
  OpName name;
};

/// [begin, end) of `elements` that member `member` of `members` has where they are split evenly:
/// the parts differ by one element at most.
struct Part {
  std::size_t begin = 0;
  std::size_t end = 0;
};
Part part_of(std::size_t elements, std::size_t member, std::size_t members);

/// Every member's `buffer` becomes the sum of all. Whole elements.
void all_reduce(const GroupOp& op, ElementType type, std::span<std::byte> buffer);

/// `own` becomes this member's shard, the n-th of n equal ones, of the sum of all `whole`. `own`
/// may be that part of `whole`.
void reduce_scatter(const GroupOp& op, ElementType type, std::span<const std::byte> whole,
                    std::span<std::byte> own);

/// `whole` becomes all members' `own`, equal in size, in the order of the group. `own` may be its
/// part of `whole`.
void all_gather(const GroupOp& op, std::span<const std::byte> own, std::span<std::byte> whole);

/// Every member's buffer becomes that of `group[root]`.
void broadcast(const GroupOp& op, std::size_t root, std::span<std::byte> buffer);

/// What each member is about to send to this one, in the group's order, from what this one is about
/// to send to each: the first half of an all-to-all whose sizes are known only now.
std::vector<std::uint64_t> exchange_counts(const GroupOp& op,
                                           std::span<const std::uint64_t> sent_counts);

/// Consecutive pieces of `sent` of `sent_bytes[m]` bytes go to member m; `received` gets what
/// members sent, in the group's order, `received_bytes[m]` from m. A buffer may be larger than its
/// pieces; the two do not overlap.
void all_to_all(const GroupOp& op, std::span<const std::byte> sent,
                std::span<const std::uint64_t> sent_bytes, std::span<std::byte> received,
                std::span<const std::uint64_t> received_bytes);

/// One message, as the pipeline sends them.
void send(Transport& transport, int to, std::uint64_t tag, std::span<const std::byte> bytes,
          OpName name);
void receive(Transport& transport, int from, std::uint64_t tag, std::span<std::byte> bytes,
             OpName name);

/// to[i] = the sum of terms[0][i], terms[1][i], ..., in this order; `to` may be one of the terms.
void sum_in_order(ElementType type, std::span<const std::byte* const> terms, std::byte* to,
                  std::size_t elements);

}  // namespace orrery
