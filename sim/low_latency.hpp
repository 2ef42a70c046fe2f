#pragma once
// Expert-parallel exchange in the low-latency form: every token goes straight to the GPU of each of
// its experts, inside a node over NVLink, else over the sender's own NIC, and no SM is held while
// it travels.

#include <cstdint>
#include <string>
#include <vector>

#include "sim/config.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// What one direction costs: the slower of two legs that run at the same time,
///   near  latency_s + near bytes / min(kernel_bytes_per_s, nvlink rate)
///   far   remote_latency_s + far bytes / (nic_share x NIC rate)
/// (none where no GPU of the group is on another node).
struct LowLatencyCost {
  double latency_s = 0;
  double kernel_bytes_per_s = 0;  ///< at which the kernel itself moves copies
  double remote_latency_s = 0;
  double nic_share = 0;
};

struct LowLatencyTable {
  std::string id;  ///< empty: the profile has no table
  std::string source;
  double spread = 0;       ///< held-out relative error across nodes
  double near_spread = 0;  ///< and inside one
  LowLatencyCost dispatch;
  LowLatencyCost combine;
  std::vector<std::int64_t> tokens;  ///< lowest and highest behind the costs
};

/// Bytes that one GPU's copies of tokens are, by where they go. Each of tokens x top_k copies has
/// the row in its format and 16 bytes of header (DeepEP csrc/config.hpp); their destinations are
/// even over the group's GPUs, times what its busiest GPU gets over the mean.
struct LowLatencyBytes {
  double near = 0;  ///< other GPUs of the node
  double far = 0;
};
LowLatencyBytes low_latency_bytes(const ExpertExchange& exchange);

double low_latency_s(const LowLatencyCost& cost, const LowLatencyBytes& bytes,
                     double nvlink_bytes_per_s, double nic_bytes_per_s);

/// Reads the profile key `low_latency_exchange`: a table, or the path of a file that holds one,
/// relative to the file that names it.
LowLatencyTable read_low_latency_table(const Node& node, Problems& problems);

}  // namespace orrery
