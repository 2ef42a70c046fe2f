#pragma once
// The vocabulary the schedules of this folder are written in, and the list of them. Private to
// models/schedule/.

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "models/schedule.hpp"
#include "sim/check.hpp"

namespace orrery {

/// A stage on one rank whose micro-batches are taken in order, forward and backward each.
struct Lane {
  int stage = 0;
  int next_forward = 0;   ///< micro-batch
  int next_backward = 0;  ///< micro-batch

  Lane(int lane_stage, int first_micro_batch)
      : stage(lane_stage), next_forward(first_micro_batch), next_backward(first_micro_batch) {}
};

/// What one rank does, written action by action.
class Script {
 public:
  explicit Script(std::size_t expected_actions) { actions_.reserve(expected_actions); }

  void forward(int stage, int micro_batch) { add(ActionKind::forward, stage, micro_batch); }
  void backward(int stage, int micro_batch) { add(ActionKind::backward, stage, micro_batch); }

  void forward(Lane& lane) { forward(lane.stage, lane.next_forward++); }
  void backward(Lane& lane) { backward(lane.stage, lane.next_backward++); }
  /// The input half of a backward; `weight` owes the other half.
  void backward_input(Lane& lane) {
    add(ActionKind::backward_input, lane.stage, lane.next_backward++);
  }
  /// F of one lane overlapped with B of another.
  void pair(Lane& forward_lane, Lane& backward_lane) {
    add(ActionKind::overlapped, forward_lane.stage, forward_lane.next_forward++);
    actions_.back().pair_stage = static_cast<std::int16_t>(backward_lane.stage);
    actions_.back().pair_micro_batch = backward_lane.next_backward++;
  }

  /// The weight half of the oldest backward_input that still owes one. The debts are not kept
  /// apart: they are the backward_inputs of the script from `owed_` on.
  void weight() {
    while (owed_ < actions_.size() && actions_[owed_].kind != ActionKind::backward_input) ++owed_;
    ORRERY_CHECK(owed_ < actions_.size(), "no weight gradient is owed after {} actions", owed_);
    const Action input = actions_[owed_++];
    add(ActionKind::backward_weight, input.stage, input.micro_batch);
  }

  /// Forgets all there is to do for micro-batches from `micro_batch` on. Ends the script.
  void drop_from(int micro_batch) {
    const auto dropped = [=](const Action& action) { return action.micro_batch >= micro_batch; };
    actions_.erase(std::remove_if(actions_.begin(), actions_.end(), dropped), actions_.end());
  }

  std::vector<Action> take() && { return std::move(actions_); }

 private:
  void add(ActionKind kind, int stage, int micro_batch) {
    Action action;
    action.kind = kind;
    action.stage = static_cast<std::int16_t>(stage);
    action.micro_batch = micro_batch;
    actions_.push_back(action);
  }

  std::vector<Action> actions_;
  std::size_t owed_ = 0;
};

// One per file: what `rank` does in a possible shape.
void write_gpipe(const ScheduleShape& shape, int rank, Script& script);
void write_one_f_one_b(const ScheduleShape& shape, int rank, Script& script);
void write_interleaved_1f1b(const ScheduleShape& shape, int rank, Script& script);
void write_zb_h1(const ScheduleShape& shape, int rank, Script& script);
void write_zb_v(const ScheduleShape& shape, int rank, Script& script);
void write_dual_pipe(const ScheduleShape& shape, int rank, Script& script);
void write_dual_pipe_v(const ScheduleShape& shape, int rank, Script& script);

/// DualPipe's eight phases, which DualPipeV shares (dual_pipe.cpp). `depth` is the distance from
/// the nearer end of the pipeline, 0 .. half-1; `half` is half the number of stages; `near` is the
/// lane whose micro-batches enter the pipeline at that end, `far` the other one.
void write_dual_pipe_phases(int depth, int half, int micro_batches_per_lane, Lane near, Lane far,
                            Script& script);

}  // namespace orrery
