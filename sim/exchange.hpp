#pragma once
// Expert-parallel dispatch and combine kernels: measured points and the formula that carries them to
// other sizes, node counts and SM counts.

#include <cstdint>
#include <string>
#include <vector>

#include "sim/shape.hpp"

namespace orrery {

/// One measured dispatch or combine: time of the transfer alone (waiting for peers apart).
struct ExchangePoint {
  ExpertExchange shape;
  int sms = 0;
  double seconds = 0;
};

struct ExchangeTable {
  std::string id;
  std::string source;
  double spread = 0;
  std::vector<ExchangePoint> points;
};

/// Mean number of distinct nodes (own node included) that hold one of a token's top_k experts, when
/// scores are uniform and at most node_limit nodes may be chosen (group-limited routing: the report's
/// 2.1.2; V3: 8 nodes, limit 4, top 8 of 256 -> 3.954).
double mean_nodes_per_token(const ExpertExchange& shape);

/// Mean number of distinct GPUs that hold one of a token's experts (V3: 7.50 of 64).
double mean_gpus_per_token(const ExpertExchange& shape);

}  // namespace orrery
