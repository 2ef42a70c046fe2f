#pragma once
// Prices of communication by formulas: one collective alone on an idle network.

#include <optional>

#include "sim/price.hpp"
#include "sim/transfers.hpp"

namespace orrery {

/// Dispatch or combine of `sms` SMs (0: all of the device): the formula of ExchangeCost with the
/// cluster's link rates, times measured over formula where the profile has points of a machine with
/// these links.
Price price_exchange(const ExpertExchange& exchange, int sms, const Profile& profile,
                     const Cluster& cluster);

/// The low-latency form of the same; it holds no SMs (sim/low_latency.hpp).
Price price_low_latency(const ExpertExchange& exchange, const Profile& profile,
                        const Cluster& cluster);

/// NCCL: ring or NVLS inside a node, across nodes a tree or rings on the NICs of all members.
/// CollectiveRates has the form of the terms; bytes moved per rank are nccl-tests' bus-bandwidth
/// factors.
Price price_collective(const Collective& collective, const Cluster& cluster);

/// One message on NVLink or on one NIC.
Price price_send(const Send& send, const Cluster& cluster);

/// At the rate that the plan states.
Price price_storage_write(const StorageWrite& write);

/// What the formulas above move: by which pattern, and how many bytes the GPU that sends most sends
/// over NVLink inside its node and through its NIC to other nodes.
///
/// Bytes read and written in a GPU's memory: NCCL's kernels 2 to 3 for each that is sent
/// (NVIDIA/nccl issue 1428). Of a token's b bytes, dispatched to n nodes, r of them remote, and g
/// GPUs, DeepEP (@ebfe47e4) reads the token, writes and sends r copies from a buffer, receives them
/// in another, forwards from there to g more buffers and copies to the output: between
/// b (1 + n + r + 2 g), where the L2 cache holds what is read again, and b (1 + 2 n + 2 r + 3 g),
/// where it does not. The means are taken.
struct Communication {
  CommunicationPattern pattern{};
  double near_bytes = 0;
  double far_bytes = 0;
  double memory_bytes = 0;
};
Communication communication_of(const ExpertExchange& exchange);
Communication communication_of(const Collective& collective, const Cluster& cluster);
Communication communication_of(const Send& send);
Communication communication_of(const StorageWrite& write);
/// What a GPU and a node of the group can be sent at most, over the mean: every token once.
struct MostOverMean {
  double gpu = 1;
  double node = 1;
};
MostOverMean most_over_mean(const ExpertExchange& exchange);
/// Nullopt for shapes that move nothing between GPUs.
std::optional<Communication> communication_of(const Shape& shape, const Cluster& cluster);

}  // namespace orrery
