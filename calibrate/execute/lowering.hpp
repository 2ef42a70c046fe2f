#pragma once
// From a Program to what one rank of it runs: for every op, Calls with their operands bound, and
// what is sent and received. Nothing is decided while it runs but how many rows the experts get.

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "calibrate/execute/parameters.hpp"
#include "calibrate/execute/tensors.hpp"
#include "kernels/call.hpp"
#include "models/scenario.hpp"
#include "sim/program.hpp"

namespace orrery {

/// How the tokens of one layer and micro-batch went to the GPUs with their experts: kept from the
/// dispatch for the combine and both exchanges of the backward pass. Host memory.
struct ExchangeRoute {
  std::vector<std::vector<std::int32_t>>
      sent;                            ///< by group member: my tokens that it got, ascending
  std::vector<std::int32_t> received;  ///< by group member: rows that I got from it
};

struct Communication {
  enum class Kind : std::uint8_t {
    send,            ///< `in` to members[0]
    receive,         ///< into `out` from members[0]
    all_reduce,      ///< in place in `out`
    reduce_scatter,  ///< `in`, equal parts by member, to `out`
    all_gather,      ///< `in` is this member's part of `out`
    sum_of_squares,  ///< all_reduce of doubles
    dispatch,        ///< rows of `in` to the members that hold their experts
    combine,         ///< rows of `in` back to where they came from, added up into `out`
  };
  Kind kind{};
  std::vector<int>
      members;   ///< ranks, in the order of the op's streams; of a transfer the other end
  int self = 0;  ///< this rank's index among them
  kernels::Matrix in, out;

  // Exchanges. `new_route`: a dispatch of the forward pass, which also sends each token's experts
  // and weights; experts are told by their index on the member that holds them, -1 for others'.
  ExchangeRoute* route = nullptr;
  bool new_route = false;
  std::int64_t top_k = 0;
  std::int64_t local_experts = 0;
  const std::int32_t* experts = nullptr;  ///< (tokens, top_k), of all experts
  const float* weights = nullptr;         ///< (tokens, top_k)
  std::int32_t* received_experts = nullptr;
  float* received_weights = nullptr;
  std::int32_t* received_tokens = nullptr;  ///< [1]
  const float* slot_values = nullptr;       ///< combine: (received, top_k), sent back ...
  float* token_values = nullptr;            ///< ... to (tokens, top_k)
  double* value = nullptr;                  ///< sum_of_squares, in place

  /// Memory that it reads and writes, beside in and out.
  std::vector<kernels::Touch> touches() const;
};

/// One op on this rank: calls, then communication, then more calls, in the order of the first of
/// its streams, the others waiting. `waits`: ops of this rank that have to be done first, on other
/// streams.
struct LoweredOp {
  OpId op;
  std::vector<StreamKind> streams;
  std::vector<kernels::Call> calls;
  std::optional<Communication> communication;
  std::vector<kernels::Call> then;
  std::vector<OpId> waits;
};

/// Token ids of one micro-batch: the same on all tensor-parallel ranks.
struct MicroBatchInput {
  std::int32_t* tokens = nullptr;  ///< (sequences * length)
  std::int32_t* targets = nullptr;
  std::vector<std::int32_t*> mtp_tokens;  ///< by module: 1, 2, ... further on
  std::vector<std::int32_t*> mtp_targets;
};

/// One of a rank's stages: its parameters in flat arrays (kernels' parameter format, FP32
/// gradients).
struct StageState {
  StageParameterShards shards;
  kernels::Format format{};
  void* dense_parameters = nullptr;
  void* expert_parameters = nullptr;
  float* dense_gradients = nullptr;
  float* expert_gradients = nullptr;
};

/// Elements [begin, end) of a stage's array.
struct ArrayPart {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// Of all copies' equal parts of a stage's dense or expert array, the rank's, in the order in which
/// gradients are reduced. Complete gradients and the optimizer's state of ZeRO lie there.
ArrayPart owned_part(const Scenario& scenario, const StageState& stage, bool expert, RankId rank);

struct Lowered {
  RankId rank;
  std::vector<LoweredOp> ops;  ///< in id order
  std::vector<StageState> stages;
  std::vector<MicroBatchInput> inputs;  ///< by micro-batch; unset where this rank has no use for it
  kernels::AdamScalars* scalars = nullptr;
  double* loss = nullptr;  ///< sum over this rank's tokens of the main loss; null without a head
  double* mtp_loss = nullptr;
  double* square_sum = nullptr;
  std::int32_t* overflow = nullptr;    ///< rows that found no room among the experts'; must stay 0
  std::vector<kernels::Call> prepare;  ///< once, before the first step
  std::vector<std::unique_ptr<ExchangeRoute>> routes;
  std::int64_t reuse_waits = 0;  ///< waits added because memory is used again, not by the Program
};

/// Why this scenario cannot be executed, in one sentence each; empty if it can.
std::vector<std::string> why_not_executable(const Scenario& scenario);

/// `program` has all ranks (StepOptions::all_ranks), `scenario` can be executed. Parameters are
/// initialised, from the scenario's seed, alike on all ranks that share them.
Lowered lower(const Scenario& scenario, const Program& program, RankId rank, Tensors& tensors);

/// The same for a rank whose peers are not there: `program` is that rank's alone (one_rank_of), of
/// a Program with a rank a class. What it would send is copied on the device, by as many SMs as the
/// op has; what it would receive is made up, with every local expert getting its mean number of
/// rows. `rank` is the world rank that it stands for.
Lowered lower_alone(const Scenario& scenario, const Program& program, RankId rank,
                    Tensors& tensors);

/// Adds to each op the waits without which it would overwrite what an earlier op still reads or
/// writes. An op that reads what an earlier one writes must already come after it by streams and
/// waits: the Program lacks a dependency otherwise, which is our own bug and named. Returns how
/// many were added.
std::int64_t order_memory(std::vector<LoweredOp>& ops, const Program& program,
                          const Tensors& tensors);

}  // namespace orrery
