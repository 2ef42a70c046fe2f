// What the schedules have in common: which shapes there are, where stages live, and how a schedule
// is executed without knowing anything of time but the order of things.

#include "models/schedule.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>

#include "models/schedule/script.hpp"
#include "sim/check.hpp"

namespace orrery {

namespace {

bool is_v(ScheduleKind kind) {
  return kind == ScheduleKind::zb_v || kind == ScheduleKind::dual_pipe_v;
}

std::string describe(const Action& action) {
  if (action.kind == ActionKind::overlapped) {
    return fmt::format("F of stage {}, micro-batch {} & B of stage {}, micro-batch {}",
                       action.stage, action.micro_batch, action.pair_stage,
                       action.pair_micro_batch);
  }
  return fmt::format("{} of stage {}, micro-batch {}", name_of(action.kind), action.stage,
                     action.micro_batch);
}

/// The halves of an action: a pair is a forward and a full backward, anything else is itself.
struct Halves {
  std::array<Action, 2> half{};
  int count = 0;

  const Action* begin() const { return half.data(); }
  const Action* end() const { return half.data() + count; }
};

Halves halves_of(const Action& action) {
  Halves halves;
  halves.half[0] = action;
  halves.count = 1;
  if (action.kind == ActionKind::overlapped) {
    halves.half[0].kind = ActionKind::forward;
    halves.half[1].kind = ActionKind::backward;
    halves.half[1].stage = action.pair_stage;
    halves.half[1].micro_batch = action.pair_micro_batch;
    halves.count = 2;
  }
  return halves;
}

/// Numbers the results that actions wait for: the forward and the input gradient of each
/// (stage, micro-batch).
struct Results {
  std::size_t micro_batches = 0;
  int stages = 0;

  explicit Results(const ScheduleShape& shape)
      : micro_batches(static_cast<std::size_t>(shape.micro_batches)), stages(shape.stages()) {}

  std::size_t size() const { return 2 * micro_batches * static_cast<std::size_t>(stages); }
  std::size_t forward(int stage, int micro_batch) const {
    return 2 * (static_cast<std::size_t>(stage) * micro_batches +
                static_cast<std::size_t>(micro_batch));
  }
  std::size_t backward(int stage, int micro_batch) const { return forward(stage, micro_batch) + 1; }
  bool contains(const Action& half) const {
    return half.stage >= 0 && half.stage < stages && half.micro_batch >= 0 &&
           static_cast<std::size_t>(half.micro_batch) < micro_batches;
  }
  std::string describe(std::size_t result) const {
    return fmt::format("the {} of stage {}, micro-batch {}",
                       result % 2 == 0 ? "forward" : "input gradient", result / 2 / micro_batches,
                       result / 2 % micro_batches);
  }
};

/// Calls wait_for(result) for what half an action needs, until one answers false; says if none did.
template <class WaitFor>
bool all_needs(const Results& results, const Action& half, WaitFor&& wait_for) {
  const int stage = half.stage;
  const int micro_batch = half.micro_batch;
  switch (half.kind) {
    case ActionKind::forward:
      return stage == 0 || wait_for(results.forward(stage - 1, micro_batch));
    case ActionKind::backward:
    case ActionKind::backward_input:
      return wait_for(results.forward(stage, micro_batch)) &&
             (stage + 1 == results.stages || wait_for(results.backward(stage + 1, micro_batch)));
    case ActionKind::backward_weight:
      return wait_for(results.backward(stage, micro_batch));
    case ActionKind::overlapped:
      break;  // has been halved
  }
  ORRERY_CHECK(false, "half an action of kind {}", static_cast<int>(half.kind));
}

double time_of(ActionKind kind, const ActionTimes& times) {
  switch (kind) {
    case ActionKind::forward:
      return times.forward;
    case ActionKind::backward:
      return times.backward_input + times.backward_weight;
    case ActionKind::backward_input:
      return times.backward_input;
    case ActionKind::backward_weight:
      return times.backward_weight;
    case ActionKind::overlapped:
      return times.overlapped;
  }
  ORRERY_CHECK(false, "action kind {}", static_cast<int>(kind));
}

struct Sweep {
  AbstractTimes times;
  std::string deadlock;  ///< who waits for what; empty if every action ran
};

/// Runs every rank until it waits, and again once what it waits for is there: every action is
/// looked at once, plus once for each time its rank waits. A result has at most one waiting rank
/// that can ever go on, so one slot is enough: a forward is waited for by the next stage's (and by
/// its own backward, after it on the same rank), an input gradient by the stage before (and by its
/// own weight half, likewise).
Sweep sweep(const Schedule& schedule, const ActionTimes& action_times) {
  constexpr double kMissing = -1;
  constexpr std::int32_t kNobody = -1;
  const Results results(schedule.shape);
  const std::size_t ranks = schedule.actions.size();

  Sweep done;
  done.times.start.resize(ranks);
  std::vector<double> clock(ranks, 0);
  std::vector<double> ready_at(results.size(), kMissing);
  std::vector<std::int32_t> waiting(results.size(), kNobody);
  std::vector<std::size_t> awaited(ranks, results.size());
  std::vector<std::int32_t> runnable;
  for (std::size_t r = ranks; r-- > 0;) {
    done.times.start[r].reserve(schedule.actions[r].size());
    runnable.push_back(static_cast<std::int32_t>(r));
  }

  while (!runnable.empty()) {
    const std::int32_t rank = runnable.back();
    runnable.pop_back();
    const auto r = static_cast<std::size_t>(rank);
    const std::vector<Action>& actions = schedule.actions[r];
    std::vector<double>& start = done.times.start[r];
    while (start.size() < actions.size()) {
      const Action& action = actions[start.size()];
      const Halves halves = halves_of(action);
      double begin = clock[r];
      const auto wait_for = [&](std::size_t result) {
        if (ready_at[result] == kMissing) {
          waiting[result] = rank;
          awaited[r] = result;
          return false;
        }
        begin = std::max(begin, ready_at[result]);
        return true;
      };
      bool can_run = true;
      for (const Action& half : halves) {
        ORRERY_CHECK(results.contains(half), "rank {}: no such {}", rank, describe(action));
        can_run = can_run && all_needs(results, half, wait_for);
      }
      if (!can_run) break;

      start.push_back(begin);
      clock[r] = begin + time_of(action.kind, action_times);
      for (const Action& half : halves) {
        if (half.kind == ActionKind::backward_weight) continue;  // nobody waits for it
        const std::size_t result = half.kind == ActionKind::forward
                                       ? results.forward(half.stage, half.micro_batch)
                                       : results.backward(half.stage, half.micro_batch);
        ready_at[result] = clock[r];
        if (waiting[result] != kNobody) runnable.push_back(waiting[result]);
        waiting[result] = kNobody;
      }
    }
    done.times.makespan = std::max(done.times.makespan, clock[r]);
  }

  for (std::size_t r = 0; r < ranks; ++r) {
    const std::size_t stuck = done.times.start[r].size();
    if (stuck == schedule.actions[r].size()) continue;
    done.deadlock += fmt::format(
        "{}rank {} waits at action {} ({}) for {}", done.deadlock.empty() ? "deadlock: " : "; ", r,
        stuck, describe(schedule.actions[r][stuck]), results.describe(awaited[r]));
  }
  return done;
}

}  // namespace

int ScheduleShape::stages() const {
  if (is_v(kind)) return 2 * ranks;
  return kind == ScheduleKind::interleaved_1f1b ? chunks * ranks : ranks;
}

int Schedule::rank_of(int stage, int micro_batch) const {
  const int ranks = shape.ranks;
  if (is_v(shape.kind)) return stage < ranks ? stage : 2 * ranks - 1 - stage;
  if (shape.kind == ScheduleKind::dual_pipe) {
    return micro_batch < shape.micro_batches / 2 ? stage : ranks - 1 - stage;
  }
  return stage % ranks;
}

std::string why_impossible(const ScheduleShape& shape) {
  const std::string_view name = name_of(shape.kind);
  const int ranks = shape.ranks;
  const int chunks = shape.chunks;
  const int micro_batches = shape.micro_batches;
  if (ranks < 1 || chunks < 1 || micro_batches < 1) {
    return fmt::format(
        "{} needs at least one rank, one chunk and one micro-batch: got {} ranks, {} chunks and {} "
        "micro-batches",
        name, ranks, chunks, micro_batches);
  }

  const bool interleaved = shape.kind == ScheduleKind::interleaved_1f1b;
  const bool dual_pipe = shape.kind == ScheduleKind::dual_pipe;
  const bool bidirectional = dual_pipe || shape.kind == ScheduleKind::dual_pipe_v;
  if (interleaved && chunks < 2) {
    return fmt::format("{} needs at least 2 chunks per rank: got {} (with 1 it is {})", name,
                       chunks, name_of(ScheduleKind::one_f_one_b));
  }
  const int held = is_v(shape.kind) || dual_pipe ? 2 : 1;
  if (!interleaved && chunks != held) {
    return fmt::format("{} needs exactly {} chunk{} per rank: got {}", name, held,
                       held == 1 ? "" : "s", chunks);
  }
  const auto most = std::numeric_limits<decltype(Action::stage)>::max();
  const std::int64_t stages = std::int64_t{ranks} * chunks;
  if (stages > most) {
    return fmt::format("{} can have at most {} stages: got {} ranks x {} chunks = {}", name, most,
                       ranks, chunks, stages);
  }

  if (interleaved && micro_batches % ranks != 0) {
    return fmt::format(
        "{} needs a number of micro-batches that {} ranks divide: got {} = {} x {} + {}", name,
        ranks, micro_batches, micro_batches / ranks, ranks, micro_batches % ranks);
  }
  if (dual_pipe && ranks % 2 != 0) {
    return fmt::format("{} needs an even number of ranks: got {}", name, ranks);
  }
  if (bidirectional && (micro_batches < 2 * ranks || (dual_pipe && micro_batches % 2 != 0))) {
    return fmt::format("{} needs {} of at least 2 x ranks = {}: got {} for {} ranks", name,
                       dual_pipe ? "an even number of micro-batches" : "a number of micro-batches",
                       2 * ranks, micro_batches, ranks);
  }
  return {};
}

Schedule make_schedule(const ScheduleShape& shape) {
  const std::string impossible = why_impossible(shape);
  ORRERY_CHECK(impossible.empty(), "{}", impossible);

  const auto write = [&] {
    switch (shape.kind) {
      case ScheduleKind::gpipe:
        return write_gpipe;
      case ScheduleKind::one_f_one_b:
        return write_one_f_one_b;
      case ScheduleKind::interleaved_1f1b:
        return write_interleaved_1f1b;
      case ScheduleKind::zb_h1:
        return write_zb_h1;
      case ScheduleKind::zb_v:
        return write_zb_v;
      case ScheduleKind::dual_pipe:
        return write_dual_pipe;
      case ScheduleKind::dual_pipe_v:
        return write_dual_pipe_v;
    }
    ORRERY_CHECK(false, "schedule kind {}", static_cast<int>(shape.kind));
  }();

  Schedule schedule;
  schedule.shape = shape;
  schedule.actions.reserve(static_cast<std::size_t>(shape.ranks));
  for (int rank = 0; rank < shape.ranks; ++rank) {
    // F, B_input and W of every chunk is the most there can be (DualPipe's two share the
    // micro-batches).
    Script script(static_cast<std::size_t>(shape.micro_batches) *
                  static_cast<std::size_t>(shape.stages() / shape.ranks) * 3);
    write(shape, rank, script);
    schedule.actions.push_back(std::move(script).take());
  }
  return schedule;
}

std::string why_invalid(const Schedule& schedule) {
  const ScheduleShape& shape = schedule.shape;
  if (std::string impossible = why_impossible(shape); !impossible.empty()) return impossible;
  if (schedule.actions.size() != static_cast<std::size_t>(shape.ranks)) {
    return fmt::format("{} ranks have lists of actions, the shape has {}", schedule.actions.size(),
                       shape.ranks);
  }

  // 1. Every action is on its rank, for the first time, and not before what it is the other half
  // of.
  const Results results(shape);
  const auto bit = [](ActionKind kind) { return 1U << static_cast<unsigned>(kind); };
  std::vector<unsigned> seen(results.size() / 2, 0);
  for (std::size_t r = 0; r < schedule.actions.size(); ++r) {
    for (std::size_t i = 0; i < schedule.actions[r].size(); ++i) {
      const Action& action = schedule.actions[r][i];
      const auto complain = [&](std::string_view what) {
        return fmt::format("rank {}, action {} ({}): {}", r, i, describe(action), what);
      };
      const bool paired = action.pair_stage != -1 || action.pair_micro_batch != -1;
      if (paired && action.kind != ActionKind::overlapped) {
        return complain("only an overlapped action has a pair");
      }
      for (const Action& half : halves_of(action)) {
        if (!results.contains(half)) return complain("no such stage or micro-batch");
        const int home = schedule.rank_of(half.stage, half.micro_batch);
        if (home != static_cast<int>(r)) {
          return complain(fmt::format("stage {} of micro-batch {} belongs on rank {}", half.stage,
                                      half.micro_batch, home));
        }
        unsigned& before = seen[results.forward(half.stage, half.micro_batch) / 2];
        const unsigned whole = bit(ActionKind::backward);
        const unsigned split = bit(ActionKind::backward_input) | bit(ActionKind::backward_weight);
        const bool again = (before & bit(half.kind)) != 0 ||
                           (half.kind == ActionKind::backward && (before & split) != 0) ||
                           ((bit(half.kind) & split) != 0 && (before & whole) != 0);
        if (again) return complain("done a second time");
        if (half.kind == ActionKind::backward_weight &&
            (before & bit(ActionKind::backward_input)) == 0) {
          return complain("comes before its backward_input");
        }
        before |= bit(half.kind);
      }
    }
  }

  // 2. Nothing is missing.
  for (std::size_t cell = 0; cell < seen.size(); ++cell) {
    const auto has = [&](ActionKind kind) { return (seen[cell] & bit(kind)) != 0; };
    const bool back = has(ActionKind::backward);
    const char* missing = !has(ActionKind::forward)                    ? "forward"
                          : !back && !has(ActionKind::backward_input)  ? "backward"
                          : !back && !has(ActionKind::backward_weight) ? "backward_weight"
                                                                       : nullptr;
    if (missing != nullptr) {
      return fmt::format("stage {}, micro-batch {} has no {}", cell / results.micro_batches,
                         cell % results.micro_batches, missing);
    }
  }

  // 3. It can be executed.
  return sweep(schedule, ActionTimes{}).deadlock;
}

std::vector<int> holders_of(const Schedule& schedule, int stage) {
  std::vector<int> holders = {schedule.rank_of(stage, 0)};
  const int other = schedule.rank_of(stage, schedule.shape.micro_batches - 1);
  if (other != holders[0]) holders.push_back(other);
  std::sort(holders.begin(), holders.end());
  return holders;
}

std::vector<std::vector<int>> stages_by_rank(const Schedule& schedule) {
  std::vector<std::vector<int>> held(static_cast<std::size_t>(schedule.shape.ranks));
  for (int s = 0; s < schedule.shape.stages(); ++s) {
    for (const int rank : holders_of(schedule, s)) {
      held[static_cast<std::size_t>(rank)].push_back(s);
    }
  }
  return held;
}

std::vector<ActionId> issue_order(const Schedule& schedule) {
  const Results results(schedule.shape);
  std::vector<bool> made(results.size(), false);
  const auto has_inputs = [&](const Action& action) {
    for (const Action& half : halves_of(action)) {
      if (!all_needs(results, half, [&](std::size_t result) -> bool { return made[result]; })) {
        return false;
      }
    }
    return true;
  };
  std::size_t left = 0;
  for (const auto& actions : schedule.actions) left += actions.size();
  std::vector<ActionId> order;
  order.reserve(left);
  std::vector<std::size_t> next(schedule.actions.size(), 0);
  while (left > 0) {
    const std::size_t before = left;
    for (std::size_t rank = 0; rank < schedule.actions.size(); ++rank) {
      const std::vector<Action>& actions = schedule.actions[rank];
      for (; next[rank] < actions.size() && has_inputs(actions[next[rank]]); ++next[rank], --left) {
        order.push_back({static_cast<std::int32_t>(rank), static_cast<std::int32_t>(next[rank])});
        for (const Action& half : halves_of(actions[next[rank]])) {
          if (half.kind == ActionKind::backward_weight) continue;  // nobody waits for it
          made[half.kind == ActionKind::forward ? results.forward(half.stage, half.micro_batch)
                                                : results.backward(half.stage, half.micro_batch)] =
              true;
        }
      }
    }
    ORRERY_CHECK(left < before, "schedule {} deadlocks with {} actions left",
                 name_of(schedule.shape.kind), left);
  }
  return order;
}

AbstractTimes run_abstract(const Schedule& schedule, const ActionTimes& times) {
  Sweep done = sweep(schedule, times);
  ORRERY_CHECK(done.deadlock.empty(), "{}", done.deadlock);
  return std::move(done.times);
}

std::string_view name_of(ScheduleKind kind) {
  switch (kind) {
    case ScheduleKind::gpipe:
      return "gpipe";
    case ScheduleKind::one_f_one_b:
      return "1f1b";
    case ScheduleKind::interleaved_1f1b:
      return "interleaved_1f1b";
    case ScheduleKind::zb_h1:
      return "zb_h1";
    case ScheduleKind::zb_v:
      return "zb_v";
    case ScheduleKind::dual_pipe:
      return "dual_pipe";
    case ScheduleKind::dual_pipe_v:
      return "dual_pipe_v";
  }
  return "unknown schedule";
}

std::string_view name_of(ActionKind kind) {
  switch (kind) {
    case ActionKind::forward:
      return "forward";
    case ActionKind::backward:
      return "backward";
    case ActionKind::backward_input:
      return "backward_input";
    case ActionKind::backward_weight:
      return "backward_weight";
    case ActionKind::overlapped:
      return "overlapped";
  }
  return "unknown action";
}

}  // namespace orrery
