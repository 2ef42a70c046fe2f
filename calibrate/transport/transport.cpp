#include "calibrate/transport/transport.hpp"

#include <array>

namespace orrery {
namespace {

enum class OwnTag : std::uint64_t { barrier = kOwnTags, gather_size, gather_bytes, roll_call };

std::uint64_t tag(OwnTag own) {
  return static_cast<std::uint64_t>(own);
}

}  // namespace

/// Hensgen, Finkel and Manber, Two algorithms for barrier synchronization (1988): in round k every
/// rank hears from the one 2^k before it; after log2(n) rounds from all, if indirectly.
void Transport::barrier(OpName op) {
  for (int distance = 1; distance < ranks_; distance *= 2) {
    const std::array requests{
        post_receive((rank_ - distance + ranks_) % ranks_, tag(OwnTag::barrier), {}),
        post_send((rank_ + distance) % ranks_, tag(OwnTag::barrier), {})};
    wait_all(requests, op);
  }
}

std::vector<std::vector<std::byte>> Transport::gather(std::span<const std::byte> bytes, OpName op) {
  if (rank_ != 0) {
    const std::uint64_t size = bytes.size();
    const std::array requests{
        post_send(0, tag(OwnTag::gather_size), std::as_bytes(std::span(&size, 1))),
        post_send(0, tag(OwnTag::gather_bytes), bytes)};
    wait_all(requests, op);
    return {};
  }
  std::vector<std::uint64_t> sizes(static_cast<std::size_t>(ranks_), bytes.size());
  std::vector<Request> requests;
  for (int from = 1; from < ranks_; ++from) {
    requests.push_back(
        post_receive(from, tag(OwnTag::gather_size),
                     std::as_writable_bytes(std::span(&sizes[static_cast<std::size_t>(from)], 1))));
  }
  wait_all(requests, op);
  requests.clear();
  std::vector<std::vector<std::byte>> all(sizes.size());
  all[0].assign(bytes.begin(), bytes.end());
  for (std::size_t from = 1; from < all.size(); ++from) {
    all[from].resize(sizes[from]);
    requests.push_back(post_receive(static_cast<int>(from), tag(OwnTag::gather_bytes), all[from]));
  }
  wait_all(requests, op);
  return all;
}

std::vector<std::uint64_t> Transport::roll_call(std::uint64_t own, OpName op) {
  std::vector<std::uint64_t> all(static_cast<std::size_t>(ranks_), own);
  std::vector<Request> requests;
  for (int peer = 0; peer < ranks_; ++peer) {
    if (peer == rank_) continue;
    requests.push_back(
        post_receive(peer, tag(OwnTag::roll_call),
                     std::as_writable_bytes(std::span(&all[static_cast<std::size_t>(peer)], 1))));
    requests.push_back(post_send(peer, tag(OwnTag::roll_call), std::as_bytes(std::span(&own, 1))));
  }
  wait_all(requests, op);
  return all;
}

std::string list_ranks(std::span<const int> ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (i > 0) text += i + 1 == ranks.size() ? " and " : ", ";
    text += std::to_string(ranks[i]);
  }
  return text;
}

}  // namespace orrery
