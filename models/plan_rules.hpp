#pragma once
// Which plans are possible, and why the others are not. One place for the reader of scenarios,
// which puts each reason at the key of a file, and for the search, which leaves such plans out.
//
// A rule gets the parts of a plan that it compares and returns what is wrong with them; empty:
// nothing. Rules are asked in the order in which they stand here: each relies on those before it.

#include <cstdint>
#include <string>
#include <vector>

#include "models/model.hpp"
#include "models/plan.hpp"
#include "sim/cluster.hpp"
#include "sim/profile.hpp"

namespace orrery {

/// The decision that a reason is about: a key of a plan or of its layout.
enum class PlanKey : std::uint8_t {
  layout,
  tp,
  cp,
  pp,
  ep,
  expert_tp,
  zero,
  schedule,
  layers_per_stage,
  mtp_stage,
  micro_batch,
  global_batch,
  precision,
  recompute,
  communication_sms,
};

struct Impossible {
  PlanKey key{};
  std::string why;
  std::string hint;
};
using WhyImpossible = std::vector<Impossible>;

// Bounds that keep every product of a plan's numbers inside int64 and a simulation inside a
// machine.
inline constexpr std::int64_t kMaxGpus = 1 << 20;
inline constexpr std::int64_t kMaxSequenceLength = std::int64_t{16} << 20;
inline constexpr std::int64_t kMaxMicroBatchTokens = std::int64_t{1} << 28;
inline constexpr std::int64_t kMaxGlobalBatch = std::int64_t{1} << 32;
inline constexpr std::int64_t kMaxMicroBatches = 1 << 16;  // OpTag
inline constexpr std::int64_t kMaxActions = 1 << 20;  // stages x micro-batches: some 2e8 operations
inline constexpr std::int64_t kMaxVirtualStages = 1024;

/// The formats have arithmetic on the device, and what feeds linear layers is theirs.
WhyImpossible check_precision(const Precision& precision, const Device& device);
WhyImpossible check_recompute(const Recompute& recompute, const Model& model);
WhyImpossible check_communication_sms(int communication_sms, const Device& device);

/// tp x cp x pp x dp against the cluster. `dp_given`: else dp is what the cluster leaves, and is
/// filled in.
WhyImpossible check_world(Parallelism& parallelism, bool dp_given, const Cluster& cluster);
/// ep x expert_tp lies over the ranks of a pipeline position.
WhyImpossible check_expert_block(const Parallelism& parallelism);
/// Degrees divide what they split of the model.
WhyImpossible check_split_of_model(const Parallelism& parallelism, const Model& model);
/// The tokens of a micro-batch.
WhyImpossible check_tokens(const Plan& plan);
/// The global batch is a whole number of micro-batches.
WhyImpossible check_batch(const Plan& plan);
/// cp splits a sequence into 2 cp pieces, an early and a late one for each rank, so that causal
/// attention is balanced; with sequence parallelism tp splits what cp leaves.
WhyImpossible check_sequence_split(const Plan& plan);
/// The schedule has such a shape, and its ZeRO stage.
WhyImpossible check_schedule(const Plan& plan);

/// "1f1b on 4 pipeline ranks".
std::string describe_pipeline(const Plan& plan);
/// Of the plan's schedule, ranks and chunks.
ScheduleShape schedule_shape(const Plan& plan);
std::int64_t stage_count(const Plan& plan);

/// As even as it goes: the first layers % stages stages get one layer more, so that the last, with
/// the head, has fewer. `stages` is at most `layers`.
std::vector<std::int64_t> even_split(std::int64_t layers, std::int64_t stages);
/// There is a layer for every stage of an even split.
WhyImpossible check_even_split(const Plan& plan, const Model& model);
/// Which layers each stage holds, and where embedding, head and MTP modules are. `mtp_stage` below
/// 0: the last. `stages` is filled in unless a number of layers or a stage is impossible.
WhyImpossible check_stages(const Plan& plan, const std::vector<std::int64_t>& layers_per_stage,
                           std::int64_t mtp_stage, const Model& model,
                           std::vector<StageContents>& stages);

}  // namespace orrery
