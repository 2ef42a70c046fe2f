#pragma once
// A pipeline schedule is a pure function from (stages, micro-batches) to, per rank, a list of
// actions. It knows nothing of time or bytes. One file per schedule in models/schedule/, each
// reading like its paper's numbered steps.
//
// Vocabulary. A *model stage* (or stage) is a contiguous piece of the model; stage 0 holds the
// embedding, stage S-1 the head. A rank holds one stage (GPipe, 1F1B, ZB-H1), v of them
// (interleaved: stage c * P + r is chunk c of rank r), or two (ZB-V and DualPipeV: a V, stages r
// and 2P-1-r; DualPipe: stages r and P-1-r, each stage thus on two ranks, because micro-batches run
// through the pipeline in two directions). F = forward; B = full backward (input and weights);
// B_input, B_weight = its halves; a pair (F, B) is executed interleaved so that each hides the
// other's communication.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace orrery {

enum class ScheduleKind : std::uint8_t {
  gpipe,             ///< Huang et al. 2019, arXiv 1811.06965
  one_f_one_b,       ///< PipeDream-flush / Megatron-LM, arXiv 2104.04473
  interleaved_1f1b,  ///< Megatron-LM virtual stages, arXiv 2104.04473
  zb_h1,             ///< Qi et al. 2024, arXiv 2401.10241; "ZB1P" in the DeepSeek-V3 report
  zb_v,              ///< Qi et al. 2024, arXiv 2405.15362
  dual_pipe,         ///< DeepSeek-V3 report 3.2.1, arXiv 2412.19437
  dual_pipe_v,       ///< cut-in-half DualPipe: Sea AI Lab's note; deepseek-ai/DualPipe
};

enum class ActionKind : std::uint8_t {
  forward,          ///< F
  backward,         ///< B: input and weight gradients
  backward_input,   ///< B_input
  backward_weight,  ///< B_weight
  overlapped,       ///< F of (stage, micro_batch) with B of (pair_stage, pair_micro_batch)
};

/// One step of one rank. For `overlapped`, (stage, micro_batch) is the forward half and
/// (pair_stage, pair_micro_batch) the backward half; otherwise the pair_ fields are -1.
struct Action {
  ActionKind kind{};
  std::int16_t stage = 0;
  std::int32_t micro_batch = 0;
  std::int16_t pair_stage = -1;
  std::int32_t pair_micro_batch = -1;

  friend bool operator==(const Action&, const Action&) = default;
};

struct ScheduleShape {
  ScheduleKind kind{};
  int ranks = 1;   ///< P: pipeline ranks
  int chunks = 1;  ///< v: stages a rank holds (interleaved; 2 for zb_v, dual_pipe, dual_pipe_v)
  int micro_batches = 1;  ///< M: micro-batches of one step through this pipeline, all directions

  /// Distinct model stages: P for gpipe, 1f1b, zb_h1 and dual_pipe; v P for interleaved; 2 P for
  /// the V's.
  int stages() const;
};

struct Schedule {
  ScheduleShape shape;
  std::vector<std::vector<Action>> actions;  ///< [rank] in issue order

  /// The rank that runs `stage` for `micro_batch`. Only DualPipe's depends on the micro-batch: the
  /// first half of them (0 .. M/2-1) runs down (rank = stage), the second half up (rank =
  /// P-1-stage).
  int rank_of(int stage, int micro_batch) const;
};

/// Why this shape is impossible ("dual_pipe needs an even number of micro-batches of at least 2 x
/// ranks: got 10 for 8 ranks"), or empty if it is possible.
std::string why_impossible(const ScheduleShape& shape);

/// Builds the schedule. The shape must be possible.
Schedule make_schedule(const ScheduleShape& shape);

/// What is wrong with this schedule, or empty: each (stage, micro-batch) has exactly one F, one B
/// or one (B_input then B_weight), each on rank_of(...), in an order that can be executed without
/// deadlock when F(s, m) waits for F(s-1, m) and B(s, m) for B(s+1, m) and for F(s, m).
std::string why_invalid(const Schedule& schedule);

/// The pipeline ranks that hold a stage, ascending: two with DualPipe, else one.
std::vector<int> holders_of(const Schedule& schedule, int stage);
/// The stages that each rank holds, ascending.
std::vector<std::vector<int>> stages_by_rank(const Schedule& schedule);

/// An action of a schedule: actions[rank][index].
struct ActionId {
  std::int32_t rank = 0;
  std::int32_t index = 0;
};
/// All actions, each behind those that it waits for: ranks take turns, each going on while the
/// inputs of its next action have been made. The schedule must be valid.
std::vector<ActionId> issue_order(const Schedule& schedule);

/// Time of every kind of action, in any unit; communication is free.
struct ActionTimes {
  double forward = 1;
  double backward_input = 1;
  double backward_weight = 1;
  double overlapped =
      3;  ///< a whole pair F&B; a full backward takes backward_input + backward_weight
};

/// Start of each action and the makespan when ranks run their actions in order as early as
/// possible. For zb_v, interleaved and the V's the times are those of one chunk.
struct AbstractTimes {
  std::vector<std::vector<double>> start;  ///< [rank][action]
  double makespan = 0;
};
AbstractTimes run_abstract(const Schedule& schedule, const ActionTimes& times);

std::string_view name_of(ScheduleKind kind);
std::string_view name_of(ActionKind kind);

}  // namespace orrery
