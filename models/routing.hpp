#pragma once
// Which experts tokens choose, as data: what a plan says about it, and the loads that follow.
//
// Scenario key plan.routing:
//   balanced                                 every expert gets the mean (the default)
//   {imbalance: F}                           rows of the busiest GPU over the mean, in every layer
//   and
//                                            micro-batch alike; one GPU stands for the busiest
//   {popularity: zipf, exponent: S}          the r-th most popular expert of a layer is chosen in
//                                            proportion to r^-S; which one it is, is drawn per
//                                            layer
//   {counts: FILE}                           recorded: a CSV file with the columns layer, expert
//   and
//                                            tokens, or layer, micro_batch, expert and tokens
//   {router: {...}}                          what the simulated router comes to
//   (models/router.hpp):
//                                            steps, sequences, tokens, offset_spread,
//                                            sequence_spread, token_spread, bias_step,
//                                            sequence_loss and loss_rate
// and with each of the last three independent_tokens: how many independent tokens a GPU's
// micro-batch varies like. all: the tokens choose independently, which is the least that real ones
// vary; a number: so many, since tokens of one sequence choose alike; 0: no variation, every
// micro-batch has the layer's popularity. Default: all, but of recorded micro-batches 0, and of the
// router what its sequences show.

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "models/router.hpp"
#include "sim/config.hpp"

namespace orrery {

struct BalancedRouting {
  friend bool operator==(const BalancedRouting&, const BalancedRouting&) = default;
};

struct StatedImbalance {
  double busiest = 1;  ///< rows of the busiest GPU over the mean
  friend bool operator==(const StatedImbalance&, const StatedImbalance&) = default;
};

struct ZipfPopularity {
  double exponent = 0;
  friend bool operator==(const ZipfPopularity&, const ZipfPopularity&) = default;
};

struct RecordedCounts {
  std::string file;  ///< as the scenario names it
  bool by_micro_batch = false;
  /// By layer, then by recorded micro-batch (one if they were not told apart), then by expert.
  std::map<std::int64_t, std::vector<std::vector<std::int64_t>>> layers;
  friend bool operator==(const RecordedCounts&, const RecordedCounts&) = default;
};

struct Routing {
  std::variant<BalancedRouting, StatedImbalance, ZipfPopularity, RecordedCounts, RouterDynamics>
      kind;
  std::optional<std::int64_t> independent_tokens;  ///< 0: no variation; none: all of them

  friend bool operator==(const Routing&, const Routing&) = default;
};

/// Of independent_tokens: as many as there are.
inline constexpr std::int64_t kAllTokens = std::int64_t{1} << 40;

/// What every GPU gets over the mean where the plan says so for all layers and micro-batches alike;
/// none where loads are drawn.
std::optional<double> stated_load(const Routing& routing);

/// Reads a file of recorded counts: every layer in `layers` has to be there, those in `also` may
/// be. `file` is left to the caller. Problems, each at its line and column: another header, what is
/// no count, unknown and duplicate rows, missing layers, micro-batches and experts, counts that do
/// not add up to as many tokens times top_k as those of the first layer, and an expert with more
/// tokens than there are.
RecordedCounts read_counts(const std::string& path, const Moe& moe,
                           std::span<const std::int64_t> layers, std::span<const std::int64_t> also,
                           Problems& problems);

/// Loads are rounded to steps of 1/128 of the mean, so that a step has some thousands of shapes.
/// With steps of 1/1024 DeepSeek-V3's step is 0.04 % longer (zipf, exponents 0.2 and 0.5), with ten
/// times the shapes.
inline constexpr int kLoadLevels = 128;
using LoadLevel = std::uint16_t;
constexpr double load_of(int level) {
  return static_cast<double>(level) / kLoadLevels;
}

/// What one expert-parallel group of GPUs gets in one layer and micro-batch, over the mean.
struct GroupLoad {
  std::vector<LoadLevel> gpu;  ///< rows of each GPU, in the order of the group
  LoadLevel busiest_gpu = kLoadLevels;
  LoadLevel busiest_node = kLoadLevels;
};

/// The expert-parallel groups of a plan, as far as routing needs to know them.
struct ExpertGroupShape {
  std::int64_t gpus = 1;            ///< ep
  std::int64_t gpus_per_node = 1;   ///< of one group; divides gpus or is all of them
  std::int64_t groups = 1;          ///< copies of all experts
  std::int64_t tokens = 0;          ///< of one micro-batch on all GPUs of a group
  std::int64_t tokens_per_gpu = 0;  ///< of one micro-batch
};

/// Tokens of every expert and loads of GPUs and nodes, drawn for each (layer, micro-batch, group)
/// by itself: the same whatever else is asked for, and in whatever order.
class ExpertLoads {
 public:
  /// `last_moe_layer`: whose popularity layers without a record of their own (MTP modules) have.
  ExpertLoads(const Routing& routing, const Moe& moe, const ExpertGroupShape& shape,
              std::int64_t last_moe_layer, std::uint64_t seed);

  /// Of a layer, adding up to 1, none above 1 / top_k: no token chooses an expert twice. A
  /// popularity above that is cut off, and the rest shared out in proportion.
  std::vector<double> popularity(std::int64_t layer) const;

  /// Adds up to tokens x top_k of the group; no expert has more than the tokens.
  std::vector<std::int64_t> tokens_of_experts(std::int64_t layer, std::int64_t micro_batch,
                                              std::int64_t group) const;

  GroupLoad group_load(std::int64_t layer, std::int64_t micro_batch, std::int64_t group) const;

  /// Tokens that a GPU's micro-batch varies like; 0: it does not vary.
  std::int64_t independent_tokens() const { return independent_tokens_; }
  /// Of a router that was simulated.
  const RouterOutcome* router() const { return router_.get(); }

 private:
  std::vector<std::int64_t> draw(std::span<const double> popularity, std::uint64_t layer,
                                 std::uint64_t micro_batch, std::uint64_t group) const;

  const Routing& routing_;
  const Moe& moe_;
  ExpertGroupShape shape_;
  std::int64_t last_moe_layer_;
  std::uint64_t seed_;
  std::int64_t independent_tokens_ = 0;
  std::shared_ptr<const RouterOutcome> router_;
  mutable std::map<std::int64_t, std::vector<double>> popularity_;  ///< by layer, as asked for
};

}  // namespace orrery
