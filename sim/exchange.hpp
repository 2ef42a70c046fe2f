#pragma once
// Expert-parallel dispatch and combine kernels: measured points and the formula that carries them
// to other sizes, node counts and SM counts.

#include <cstdint>
#include <string>
#include <vector>

#include "sim/config.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// One measured dispatch or combine: time of the transfer alone (waiting for peers apart).
struct ExchangePoint {
  ExpertExchange shape;
  int sms = 0;
  double seconds = 0;
};

/// The points of one machine, with the rates it achieves (as in Cluster), so that they are used for
/// clusters like it and for no others.
struct ExchangeMachine {
  std::string name;
  std::string source;
  double nvlink_bytes_per_s = 0;
  double nic_bytes_per_s = 0;
  std::vector<ExchangePoint> points;
};

/// What one direction costs. A kernel on `sms` SMs that moves T tokens of b bytes, each to c GPUs,
/// takes
///   x + latency + 2 sqrt(pipeline x),  x = the slowest of three legs that run at the same time:
///   SMs     T (token_s + b / token_bytes_per_s + c (copy_s + b / copy_bytes_per_s)) / sms in one
///   node,
///           T (remote_token_s + nodes remote_node_s) f(b) / sms across nodes, f(b) the ratio of
///           the one-node cost per copy at b bytes to that at hidden size 7168;
///   NVLink  T c (G-1)/G b over nvlink_share of the link's rate, G the group's GPUs per node;
///   NIC     T nodes (N-1)/N b over nic_share of the NIC's rate, N the group's nodes.
struct ExchangeCost {
  double latency_s = 0;
  double pipeline_s = 0;
  double token_s = 0;
  double token_bytes_per_s = 0;  ///< per SM; 0: no such term
  double copy_s = 0;
  double copy_bytes_per_s = 0;  ///< per SM
  double remote_latency_s = 0;
  double remote_pipeline_s = 0;
  double remote_token_s = 0;
  double remote_node_s = 0;
  double layout_s =
      0;  ///< counting and exchanging the layout before a dispatch without cached handle
  double nvlink_share = 0;
  double nic_share = 0;
};

/// Closed ranges in which the points behind the formula lie.
struct ExchangeRange {
  std::vector<std::int64_t> tokens, hidden, sms, ep;  ///< lowest and highest
};

struct ExchangeTable {
  std::string id;  ///< empty: the profile has no table
  std::string source;
  double spread = 0;               ///< held-out relative error of the formula
  double interpolated_spread = 0;  ///< and between points of one machine
  ExchangeCost dispatch;
  ExchangeCost combine;
  ExchangeRange range;
  std::vector<ExchangeMachine> machines;
  /// The first so many are of a table `like` another: what they took tells its kernels from the other's,
  /// on whatever links.
  std::size_t own_machines = 0;
};

/// Reads the profile key `expert_exchange`: a table, or the path of a file that holds one, relative
/// to the file that names it. A table `like: FILE` has that file's costs and range, and its own
/// machines are looked at before that file's; on links that no machine has, their ratio of measured
/// time to formula holds.
ExchangeTable read_exchange_table(const Node& node, Problems& problems);

/// Mean number of distinct nodes (own node included) that hold one of a token's top_k experts, for
/// independent uniform scores. Without an effective node_limit by inclusion-exclusion
/// (hypergeometric). With one, by the rule of the V3 report 2.1.2 and its published code: the
/// node_limit nodes with the greatest sum of their two best scores, then the top_k experts in them;
/// over 8,192 draws from a fixed seed, standard error below 0.1 % (V3: 8 nodes, limit 4, top 8 of
/// 256 -> 3.954). Results of the latter are kept, so that only the first call per routing takes
/// milliseconds.
double mean_nodes_per_token(const ExpertExchange& shape);

/// Mean number of distinct GPUs that hold one of a token's experts (V3: 7.50 of 64).
double mean_gpus_per_token(const ExpertExchange& shape);

}  // namespace orrery
