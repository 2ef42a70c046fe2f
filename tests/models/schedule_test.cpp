// Schedules against their papers: closed-form bubbles where they are exact, published makespans,
// cell counts and activation memory; every small shape valid, every kind of damage noticed.

#include "models/schedule.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace orrery {
namespace {

constexpr std::array kKinds = {
    ScheduleKind::gpipe,      ScheduleKind::one_f_one_b, ScheduleKind::interleaved_1f1b,
    ScheduleKind::zb_h1,      ScheduleKind::zb_v,        ScheduleKind::dual_pipe,
    ScheduleKind::dual_pipe_v};

ScheduleShape shape_of(ScheduleKind kind, int ranks, int chunks, int micro_batches) {
  ScheduleShape shape;
  shape.kind = kind;
  shape.ranks = ranks;
  shape.chunks = chunks;
  shape.micro_batches = micro_batches;
  return shape;
}

ActionTimes times_of(double forward, double backward_input, double backward_weight) {
  ActionTimes times;
  times.forward = forward;
  times.backward_input = backward_input;
  times.backward_weight = backward_weight;
  times.overlapped = forward + backward_input + backward_weight;
  return times;
}

/// Every possible shape of up to 8 ranks, 4 chunks and 24 micro-batches.
std::vector<ScheduleShape> small_shapes(int most_ranks = 8) {
  std::vector<ScheduleShape> shapes;
  for (const ScheduleKind kind : kKinds) {
    for (int ranks = 1; ranks <= most_ranks; ++ranks) {
      for (int chunks = 1; chunks <= 4; ++chunks) {
        for (int micro_batches = 1; micro_batches <= 24; ++micro_batches) {
          const ScheduleShape shape = shape_of(kind, ranks, chunks, micro_batches);
          if (why_impossible(shape).empty()) shapes.push_back(shape);
        }
      }
    }
  }
  return shapes;
}

std::string describe(const ScheduleShape& shape) {
  return std::string(name_of(shape.kind)) + ": " + std::to_string(shape.ranks) + " ranks, " +
         std::to_string(shape.chunks) + " chunks, " + std::to_string(shape.micro_batches) +
         " micro-batches";
}

double makespan(const ScheduleShape& shape, const ActionTimes& times = {}) {
  return run_abstract(make_schedule(shape), times).makespan;
}

/// Makespan less one rank's work, where every rank has the work of `chunk_passes` (stage,
/// micro-batch)s.
double bubble(const ScheduleShape& shape, const ActionTimes& times, int chunk_passes) {
  return makespan(shape, times) -
         chunk_passes * (times.forward + times.backward_input + times.backward_weight);
}

int count(const std::vector<Action>& actions, ActionKind kind) {
  return static_cast<int>(std::count_if(actions.begin(), actions.end(),
                                        [=](const Action& a) { return a.kind == kind; }));
}

/// Most activations of one stage and one micro-batch that a rank holds: from the forward's start to
/// the end of the weight gradient, which is the last to read them.
int peak_in_flight(const std::vector<Action>& actions) {
  int held = 0;
  int peak = 0;
  for (const Action& action : actions) {
    const bool allocates =
        action.kind == ActionKind::forward || action.kind == ActionKind::overlapped;
    const bool frees = action.kind == ActionKind::backward ||
                       action.kind == ActionKind::backward_weight ||
                       action.kind == ActionKind::overlapped;
    held += allocates ? 1 : 0;
    peak = std::max(peak, held);
    held -= frees ? 1 : 0;
  }
  EXPECT_EQ(held, 0);
  return peak;
}

// ---------------------------------------------------------------------------------------------------
// Makespans and bubbles

// Published by an independent visualiser of schedules (Victarry/PP-Schedule-Visualization) with F =
// 1, B_input = W = 1, a pair of 3 and no communication. DualPipeV's 10 micro-batches on 4 devices
// are the work of DualPipe's 20 on 8 (deepseek-ai/DualPipe, README: "4 PP ranks (8 PP stages) and
// 10 micro-batches").
TEST(ScheduleMakespan, MatchesPublishedExamples) {
  EXPECT_EQ(makespan(shape_of(ScheduleKind::dual_pipe, 8, 2, 20)), 66);
  EXPECT_EQ(makespan(shape_of(ScheduleKind::dual_pipe_v, 4, 2, 10)), 66);
  EXPECT_EQ(makespan(shape_of(ScheduleKind::zb_h1, 8, 1, 20)), 67);
  EXPECT_EQ(makespan(shape_of(ScheduleKind::one_f_one_b, 8, 1, 20)), 81);
  EXPECT_EQ(makespan(shape_of(ScheduleKind::dual_pipe, 16, 2, 120)), 374);
  EXPECT_EQ(makespan(shape_of(ScheduleKind::one_f_one_b, 16, 1, 120)), 405);
}

// Whole numbers and halves, so that sums are exact.
const std::vector<ActionTimes> kManyTimes = {times_of(1, 1, 1),   times_of(2, 3, 1),
                                             times_of(4, 1, 2.5), times_of(1, 2, 3),
                                             times_of(3, 1.5, 0), times_of(0.5, 4, 4)};

TEST(ScheduleBubble, GpipeAnd1f1bForAnyTimes) {  // (P-1)(F+B): arXiv 2104.04473, 2.2.1
  for (const ActionTimes& t : kManyTimes) {
    const double backward = t.backward_input + t.backward_weight;
    for (int ranks = 1; ranks <= 9; ++ranks) {
      for (const int micro_batches : {1, 2, 3, 8, 21}) {
        const double expected = (micro_batches + ranks - 1) * (t.forward + backward);
        for (const ScheduleKind kind : {ScheduleKind::gpipe, ScheduleKind::one_f_one_b}) {
          // With fewer micro-batches than ranks 1F1B is 1F1B of as many: the form still holds.
          const ScheduleShape shape = shape_of(kind, ranks, 1, micro_batches);
          EXPECT_EQ(makespan(shape, t), expected) << describe(shape);
        }
      }
    }
  }
}

TEST(ScheduleBubble, InterleavedIsOneVthForAnyTimes) {  // arXiv 2104.04473, 2.2.2: (P-1)(F+B)/v
  for (const ActionTimes& t : kManyTimes) {
    const double backward = t.backward_input + t.backward_weight;
    for (int ranks = 1; ranks <= 8; ++ranks) {
      for (int chunks = 2; chunks <= 5; ++chunks) {
        for (int groups = 1; groups <= 3; ++groups) {
          const ScheduleShape shape =
              shape_of(ScheduleKind::interleaved_1f1b, ranks, chunks, groups * ranks);
          // `t` is the time of one chunk, a v-th of a rank's.
          EXPECT_EQ(bubble(shape, t, chunks * shape.micro_batches),
                    (ranks - 1) * (t.forward + backward))
              << describe(shape);
        }
      }
    }
  }
}

// arXiv 2401.10241, 2.3: (p-1)(T_F + T_B - T_W), and in the DeepSeek-V3 report's terms (Table
// 2) (PP-1)(F + B - 2W) with B the full backward. Exact while W is the shortest of the three.
TEST(ScheduleBubble, ZbH1) {
  for (const ActionTimes& t : {times_of(1, 1, 1), times_of(2, 2, 1), times_of(1, 3, 1),
                               times_of(3, 2, 2), times_of(4, 3, 2.5), times_of(2, 3, 0.5)}) {
    const double backward = t.backward_input + t.backward_weight;
    for (int ranks = 1; ranks <= 9; ++ranks) {
      for (const int micro_batches : {ranks, ranks + 1, 3 * ranks}) {
        const ScheduleShape shape = shape_of(ScheduleKind::zb_h1, ranks, 1, micro_batches);
        EXPECT_EQ(bubble(shape, t, micro_batches),
                  (ranks - 1) * (t.forward + backward - 2 * t.backward_weight))
            << describe(shape);
      }
    }
  }
}

TEST(ScheduleBubble, ZbVHasNone) {  // arXiv 2401.10241, section 6: no rank idles when F = B = W
  for (int ranks = 1; ranks <= 9; ++ranks) {
    for (const int micro_batches : {2 * ranks - 1, 2 * ranks, 5 * ranks + 1}) {
      const ScheduleShape shape = shape_of(ScheduleKind::zb_v, ranks, 2, micro_batches);
      const AbstractTimes run = run_abstract(make_schedule(shape), times_of(1, 1, 1));
      for (int r = 0; r < ranks; ++r) {
        const std::vector<double>& start = run.start[static_cast<std::size_t>(r)];
        EXPECT_EQ(start.front(), r) << describe(shape);  // the first micro-batch has to get there
        EXPECT_EQ(start.back() + 1 - start.front(), 3 * 2 * micro_batches) << describe(shape);
      }
    }
  }
}

// DeepSeek-V3 report, Table 2: (PP/2-1)(F&B + B - 3W) with B the full backward; exact where F =
// B_input
// >= W and F&B = F + B. PP counts stages: DualPipeV has PP/2 devices, and half the micro-batches,
// each of which passes twice, are the same work.
TEST(ScheduleBubble, DualPipeAndItsV) {
  for (const auto& [x, w] : {std::pair{1.0, 1.0}, {2.0, 1.0}, {3.0, 2.0}, {2.0, 0.5}, {1.0, 0.0}}) {
    const ActionTimes t = times_of(x, x, w);
    const double backward = x + w;
    for (int half = 1; half <= 8; ++half) {
      for (const int per_direction : {2 * half, 2 * half + 1, 5 * half}) {
        const double expected = (half - 1) * (t.overlapped + backward - 3 * w);
        const ScheduleShape whole =
            shape_of(ScheduleKind::dual_pipe, 2 * half, 2, 2 * per_direction);
        EXPECT_EQ(bubble(whole, t, 2 * per_direction), expected) << describe(whole);
        const ScheduleShape folded = shape_of(ScheduleKind::dual_pipe_v, half, 2, per_direction);
        EXPECT_EQ(bubble(folded, t, 2 * per_direction), expected) << describe(folded);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// What the ranks do

// Counted from deepseek-ai/DualPipe's dualpipe.py for 16 ranks and 120 micro-batches, a row per
// rank 0..7; rank 15-r has rank r's. Rank 7 executes one pair apart.
TEST(ScheduleCells, DualPipeOf16RanksAnd120MicroBatches) {
  struct Row {
    int forward, overlapped, backward, backward_input, backward_weight;
  };
  constexpr std::array<Row, 8> kRows = {{{23, 97, 8, 15, 15},
                                         {22, 98, 8, 14, 14},
                                         {21, 99, 8, 13, 13},
                                         {20, 100, 8, 12, 12},
                                         {19, 101, 8, 11, 11},
                                         {18, 102, 8, 10, 10},
                                         {17, 103, 8, 9, 9},
                                         {17, 103, 9, 8, 8}}};
  const Schedule schedule = make_schedule(shape_of(ScheduleKind::dual_pipe, 16, 2, 120));
  for (std::size_t rank = 0; rank < 16; ++rank) {
    const Row& row = kRows[std::min(rank, 15 - rank)];
    const std::vector<Action>& actions = schedule.actions[rank];
    EXPECT_EQ(count(actions, ActionKind::forward), row.forward) << rank;
    EXPECT_EQ(count(actions, ActionKind::overlapped), row.overlapped) << rank;
    EXPECT_EQ(count(actions, ActionKind::backward), row.backward) << rank;
    EXPECT_EQ(count(actions, ActionKind::backward_input), row.backward_input) << rank;
    EXPECT_EQ(count(actions, ActionKind::backward_weight), row.backward_weight) << rank;
  }
}

// Rank r of DualPipeV does what rank r of a DualPipe of twice the ranks does, but for the other
// lane's stage and micro-batch numbers ("cut in half").
TEST(ScheduleCells, DualPipeVIsDualPipeCutInHalf) {
  const Schedule whole = make_schedule(shape_of(ScheduleKind::dual_pipe, 8, 2, 20));
  const Schedule folded = make_schedule(shape_of(ScheduleKind::dual_pipe_v, 4, 2, 10));
  for (std::size_t r = 0; r < 4; ++r) {
    ASSERT_EQ(whole.actions[r].size(), folded.actions[r].size());
    for (std::size_t i = 0; i < whole.actions[r].size(); ++i) {
      Action action = whole.actions[r][i];
      action.micro_batch %= 10;
      if (action.kind == ActionKind::overlapped) action.pair_micro_batch %= 10;
      EXPECT_EQ(action, folded.actions[r][i]) << "rank " << r << ", action " << i;
    }
  }
}

TEST(ScheduleCells, InterleavedWarmUp) {  // arXiv 2104.04473, Figure 4: 4 devices, 2 chunks
  const Schedule schedule = make_schedule(shape_of(ScheduleKind::interleaved_1f1b, 4, 2, 8));
  const std::vector<std::pair<int, int>> forwards = {{0, 0}, {0, 1}, {0, 2}, {0, 3}, {4, 0}, {4, 1},
                                                     {4, 2}, {4, 3}, {0, 4}, {0, 5}, {0, 6}};
  const std::vector<Action>& actions = schedule.actions[0];
  for (std::size_t i = 0; i < forwards.size(); ++i) {
    EXPECT_EQ(actions[i].kind, ActionKind::forward);
    EXPECT_EQ(actions[i].stage, forwards[i].first);
    EXPECT_EQ(actions[i].micro_batch, forwards[i].second);
  }
  EXPECT_EQ(actions[11].kind, ActionKind::backward);
  EXPECT_EQ(actions[11].stage, 4);
  EXPECT_EQ(actions[11].micro_batch, 0);
}

TEST(ScheduleCells, StagesAndRanks) {
  const Schedule interleaved = make_schedule(shape_of(ScheduleKind::interleaved_1f1b, 4, 3, 8));
  EXPECT_EQ(interleaved.shape.stages(), 12);
  EXPECT_EQ(interleaved.rank_of(9, 0), 1);
  const Schedule folded = make_schedule(shape_of(ScheduleKind::zb_v, 4, 2, 8));
  EXPECT_EQ(folded.shape.stages(), 8);
  EXPECT_EQ(folded.rank_of(3, 0), 3);
  EXPECT_EQ(folded.rank_of(4, 0), 3);
  EXPECT_EQ(folded.rank_of(7, 0), 0);
  const Schedule dual = make_schedule(shape_of(ScheduleKind::dual_pipe, 4, 2, 8));
  EXPECT_EQ(dual.shape.stages(), 4);
  EXPECT_EQ(dual.rank_of(1, 3), 1);
  EXPECT_EQ(dual.rank_of(1, 4), 2);
}

TEST(ScheduleMemory, PeakActivationsInFlight) {
  for (const int ranks : {2, 4, 8}) {
    const int many = 4 * ranks;
    const auto peak = [&](ScheduleKind kind, int chunks, int rank) {
      const Schedule schedule = make_schedule(shape_of(kind, ranks, chunks, many));
      return peak_in_flight(schedule.actions[static_cast<std::size_t>(rank)]);
    };
    for (int r = 0; r < ranks; ++r) {
      EXPECT_EQ(peak(ScheduleKind::gpipe, 1, r), many);
      EXPECT_EQ(peak(ScheduleKind::one_f_one_b, 1, r), ranks - r);
      // Every worker the same, as 1F1B's first: arXiv 2401.10241, 2.1.
      EXPECT_EQ(peak(ScheduleKind::zb_h1, 1, r), ranks);
      // 2P half-size chunks are 1F1B's P stages: arXiv 2401.10241, section 6.
      EXPECT_EQ(peak(ScheduleKind::zb_v, 2, r), 2 * ranks);
      // PP+1 with PP stages: DeepSeek-V3 report, Table 2; DualPipe README.
      EXPECT_EQ(peak(ScheduleKind::dual_pipe, 2, r), ranks + 1);
      EXPECT_EQ(peak(ScheduleKind::dual_pipe_v, 2, r), 2 * ranks + 1);
    }
    // 1 + (p-1)/(p m) times 1F1B's p stages of m chunks on the first rank: arXiv 2205.05198, 4.2.3.
    EXPECT_EQ(peak(ScheduleKind::interleaved_1f1b, 3, 0), 3 * ranks + ranks - 1);
  }
}

// ---------------------------------------------------------------------------------------------------
// Validity

TEST(ScheduleValidity, EverySmallShape) {
  int seen = 0;
  for (const ScheduleShape& shape : small_shapes()) {
    EXPECT_EQ(why_invalid(make_schedule(shape)), "") << describe(shape);
    ++seen;
  }
  EXPECT_GT(seen, 1000);
}

TEST(ScheduleValidity, EveryActionIsMissed) {
  for (const ScheduleShape& shape : small_shapes(4)) {
    if (shape.micro_batches > 9) continue;
    const Schedule whole = make_schedule(shape);
    for (std::size_t r = 0; r < whole.actions.size(); ++r) {
      for (std::size_t i = 0; i < whole.actions[r].size(); ++i) {
        Schedule damaged = whole;
        damaged.actions[r].erase(damaged.actions[r].begin() + static_cast<std::ptrdiff_t>(i));
        EXPECT_NE(why_invalid(damaged), "")
            << describe(shape) << ", rank " << r << ", action " << i;
      }
    }
  }
}

TEST(ScheduleValidity, MovedOrRepeatedActionsAreNoticed) {
  for (const ScheduleShape& shape : small_shapes(4)) {
    if (shape.ranks == 1 || shape.micro_batches > 9) continue;
    const Schedule whole = make_schedule(shape);
    for (std::size_t r = 0; r < whole.actions.size(); ++r) {
      Schedule moved = whole;  // the last action to the end of another rank
      moved.actions[(r + 1) % whole.actions.size()].push_back(moved.actions[r].back());
      moved.actions[r].pop_back();
      EXPECT_NE(why_invalid(moved).find("belongs on rank"), std::string::npos) << describe(shape);

      Schedule repeated = whole;
      repeated.actions[r].push_back(whole.actions[r].front());
      EXPECT_NE(why_invalid(repeated).find("a second time"), std::string::npos) << describe(shape);
    }
  }
}

Schedule two_ranks_two_micro_batches() {
  return make_schedule(shape_of(ScheduleKind::one_f_one_b, 2, 1, 2));
}

TEST(ScheduleValidity, DeadlocksAreToldWithWhoWaitsForWhat) {
  // Rank 0: F0 F1 B0 B1 becomes F0 B1 F1 B0, while rank 1 cannot do B1 before F1.
  Schedule crossed = two_ranks_two_micro_batches();
  std::vector<Action>& first = crossed.actions[0];
  ASSERT_EQ(first[1].kind, ActionKind::forward);
  ASSERT_EQ(first[3].micro_batch, 1);
  std::swap(first[1], first[3]);
  EXPECT_EQ(
      why_invalid(crossed),
      "deadlock: rank 0 waits at action 1 (backward of stage 0, micro-batch 1) for the forward "
      "of stage 0, micro-batch 1; rank 1 waits at action 2 (forward of stage 1, micro-batch 1) "
      "for the forward of stage 0, micro-batch 1");
  EXPECT_DEATH(run_abstract(crossed, {}), "deadlock: rank 0 waits at action 1");

  // Two ranks each waiting for what the other does next: no rank is out of order with itself.
  Schedule embraced = make_schedule(shape_of(ScheduleKind::dual_pipe, 2, 2, 4));
  for (std::vector<Action>& actions : embraced.actions) std::swap(actions[0], actions[1]);
  EXPECT_NE(why_invalid(embraced).find("deadlock: rank 0 waits at action 0"), std::string::npos);
}

TEST(ScheduleValidity, WeightGradientsFollowTheirInputGradients) {
  Schedule schedule = make_schedule(shape_of(ScheduleKind::zb_h1, 4, 1, 4));
  std::vector<Action>& actions = schedule.actions[0];
  const auto weight = std::find_if(actions.begin(), actions.end(), [](const Action& a) {
    return a.kind == ActionKind::backward_weight;
  });
  ASSERT_NE(weight, actions.end());
  ASSERT_EQ((weight - 1)->kind, ActionKind::backward_input);
  std::iter_swap(weight - 1, weight);
  EXPECT_NE(why_invalid(schedule).find("comes before its backward_input"), std::string::npos);
}

TEST(ScheduleValidity, NonsenseIsNoticed) {
  Schedule lost_rank = two_ranks_two_micro_batches();
  lost_rank.actions.pop_back();
  EXPECT_EQ(why_invalid(lost_rank), "1 ranks have lists of actions, the shape has 2");

  Schedule no_such = two_ranks_two_micro_batches();
  no_such.actions[0][0].micro_batch = 2;
  EXPECT_NE(why_invalid(no_such).find("no such stage or micro-batch"), std::string::npos);

  Schedule paired = two_ranks_two_micro_batches();
  paired.actions[0][0].pair_stage = 0;
  EXPECT_NE(why_invalid(paired).find("only an overlapped action has a pair"), std::string::npos);

  Schedule twice_back = two_ranks_two_micro_batches();  // whole, and its input half once more
  Action half = twice_back.actions[1].back();
  half.kind = ActionKind::backward_input;
  twice_back.actions[1].push_back(half);
  EXPECT_NE(why_invalid(twice_back).find("a second time"), std::string::npos);
}

TEST(ScheduleShapes, ImpossibleOnesShowTheArithmetic) {
  const auto why = [](ScheduleKind kind, int ranks, int chunks, int micro_batches) {
    return why_impossible(shape_of(kind, ranks, chunks, micro_batches));
  };
  EXPECT_EQ(
      why(ScheduleKind::dual_pipe, 8, 2, 10),
      "dual_pipe needs an even number of micro-batches of at least 2 x ranks = 16: got 10 for 8 "
      "ranks");
  EXPECT_EQ(
      why(ScheduleKind::dual_pipe, 8, 2, 17),
      "dual_pipe needs an even number of micro-batches of at least 2 x ranks = 16: got 17 for 8 "
      "ranks");
  EXPECT_EQ(why(ScheduleKind::dual_pipe, 7, 2, 20),
            "dual_pipe needs an even number of ranks: got 7");
  EXPECT_EQ(
      why(ScheduleKind::dual_pipe_v, 4, 2, 7),
      "dual_pipe_v needs a number of micro-batches of at least 2 x ranks = 8: got 7 for 4 ranks");
  EXPECT_EQ(
      why(ScheduleKind::interleaved_1f1b, 4, 2, 10),
      "interleaved_1f1b needs a number of micro-batches that 4 ranks divide: got 10 = 2 x 4 + 2");
  EXPECT_EQ(why(ScheduleKind::interleaved_1f1b, 4, 1, 8),
            "interleaved_1f1b needs at least 2 chunks per rank: got 1 (with 1 it is 1f1b)");
  EXPECT_EQ(why(ScheduleKind::zb_v, 4, 1, 8), "zb_v needs exactly 2 chunks per rank: got 1");
  EXPECT_EQ(why(ScheduleKind::gpipe, 4, 2, 8), "gpipe needs exactly 1 chunk per rank: got 2");
  EXPECT_EQ(why(ScheduleKind::interleaved_1f1b, 400, 100, 400),
            "interleaved_1f1b can have at most 32767 stages: got 400 ranks x 100 chunks = 40000");
  EXPECT_EQ(
      why(ScheduleKind::gpipe, 4, 1, 0),
      "gpipe needs at least one rank, one chunk and one micro-batch: got 4 ranks, 1 chunks and 0 "
      "micro-batches");
  const int huge = std::numeric_limits<int>::max();
  EXPECT_NE(why(ScheduleKind::dual_pipe, huge, 2, huge), "");
  EXPECT_DEATH(make_schedule(shape_of(ScheduleKind::dual_pipe, 8, 2, 10)),
               "at least 2 x ranks = 16");
}

// ---------------------------------------------------------------------------------------------------
// run_abstract

/// A second implementation: start times raised until no constraint is broken. Slow and obvious.
AbstractTimes relax(const Schedule& schedule, const ActionTimes& times) {
  const int stages = schedule.shape.stages();
  const int micro_batches = schedule.shape.micro_batches;
  const auto cell = [&](int stage, int micro_batch) {
    return static_cast<std::size_t>(stage * micro_batches + micro_batch);
  };
  std::vector<double> forward_end(cell(stages, 0), 0);
  std::vector<double> backward_end(cell(stages, 0), 0);
  AbstractTimes result;
  for (const std::vector<Action>& actions : schedule.actions) {
    result.start.emplace_back(actions.size(), 0.0);
  }
  for (bool changed = true; changed;) {
    changed = false;
    for (std::size_t r = 0; r < schedule.actions.size(); ++r) {
      double clock = 0;
      for (std::size_t i = 0; i < schedule.actions[r].size(); ++i) {
        const Action& a = schedule.actions[r][i];
        const bool pair = a.kind == ActionKind::overlapped;
        const bool forward = pair || a.kind == ActionKind::forward;
        const bool input =
            pair || a.kind == ActionKind::backward || a.kind == ActionKind::backward_input;
        const int back_stage = pair ? a.pair_stage : a.stage;
        const int back_micro_batch = pair ? a.pair_micro_batch : a.micro_batch;
        double begin = clock;
        if (forward && a.stage > 0) {
          begin = std::max(begin, forward_end[cell(a.stage - 1, a.micro_batch)]);
        }
        if (input) {
          begin = std::max(begin, forward_end[cell(back_stage, back_micro_batch)]);
          if (back_stage + 1 < stages) {
            begin = std::max(begin, backward_end[cell(back_stage + 1, back_micro_batch)]);
          }
        }
        clock = begin + (pair                                   ? times.overlapped
                         : forward                              ? times.forward
                         : a.kind == ActionKind::backward_input ? times.backward_input
                         : a.kind == ActionKind::backward_weight
                             ? times.backward_weight
                             : times.backward_input + times.backward_weight);
        changed = changed || begin != result.start[r][i];
        result.start[r][i] = begin;
        if (forward) forward_end[cell(a.stage, a.micro_batch)] = clock;
        if (input) backward_end[cell(back_stage, back_micro_batch)] = clock;
        result.makespan = std::max(result.makespan, clock);
      }
    }
  }
  return result;
}

TEST(RunAbstract, AgreesWithRelaxation) {
  for (const ActionTimes& t : {times_of(1, 1, 1), times_of(1.25, 2, 0.75), times_of(3, 1, 4)}) {
    for (const ScheduleShape& shape : small_shapes(6)) {
      ActionTimes times = t;
      times.overlapped *= 0.875;  // hiding something
      const Schedule schedule = make_schedule(shape);
      const AbstractTimes expected = relax(schedule, times);
      const AbstractTimes run = run_abstract(schedule, times);
      ASSERT_EQ(run.start, expected.start) << describe(shape);
      ASSERT_EQ(run.makespan, expected.makespan) << describe(shape);
    }
  }
}

// A million actions: anything quadratic would not come back before the test times out.
TEST(RunAbstract, IsLinear) {
  EXPECT_EQ(makespan(shape_of(ScheduleKind::zb_h1, 16, 1, 20000)), 3 * 20000 + 15);
  EXPECT_EQ(makespan(shape_of(ScheduleKind::dual_pipe, 16, 2, 20000)), 3 * 20000 + 7 * 2);
}

}  // namespace
}  // namespace orrery
