// The page's levels of detail against the Timeline itself.

#include "reports/html/timeline_levels.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "reports/study.hpp"
#include "reports/trace.hpp"
#include "unpacked.hpp"

namespace orrery {
namespace {

using Column = std::vector<std::int64_t>;

Column column(const std::map<std::string, PackedColumn>& level, const char* name) {
  return test::unpacked(level.at(name).text());
}

/// Every op of these ranks is there, in its lane, with its shape and, to half a unit, its times.
void expect_all_ops(const Study& study, const TimelineLevels& levels) {
  const Program& program = study.program;
  const Timeline& timeline = study.run.timeline;
  const Column gap = column(levels.ops, "gap");
  const Column duration = column(levels.ops, "duration");
  const Column shape = column(levels.ops, "shape");
  const double half = 0.5 * static_cast<double>(levels.unit_ps);
  std::set<std::uint32_t> ranks;
  std::size_t next = 0;
  for (const TimelineRow& row : levels.rows) {
    ranks.insert(row.rank);
    for (const TimelineLane& lane : row.lanes) {
      const StreamId stream = stream_of(RankId(row.rank), lane.stream);
      std::int64_t at = 0;
      const std::size_t end = next + lane.ops;
      for (OpId op{}; op.value < program.size(); ++op) {
        const auto streams = program.streams_of(op);
        if (std::find(streams.begin(), streams.end(), stream) == streams.end()) continue;
        if (timeline.start_ps[op] == timeline.end_ps[op]) continue;
        ASSERT_LT(next, end);
        const std::int64_t start = at + gap[next];
        at = start + duration[next];
        ASSERT_NEAR(static_cast<double>(start * levels.unit_ps),
                    static_cast<double>(timeline.start_ps[op]), half);
        ASSERT_NEAR(static_cast<double>(at * levels.unit_ps),
                    static_cast<double>(timeline.end_ps[op]), half);
        ASSERT_EQ(shape[next], static_cast<std::int64_t>(program.shape(op).value));
        ++next;
      }
      ASSERT_EQ(next, end);
    }
  }
  EXPECT_EQ(next, gap.size());
  EXPECT_EQ(ranks.size(), levels.rows.size());
}

/// Each phase begins with its first op and ends with its last, and all ops are in one.
void expect_phases_of_ops(const TimelineLevels& levels) {
  const Column phase_gap = column(levels.phases, "gap");
  const Column phase_duration = column(levels.phases, "duration");
  const Column ops = column(levels.phases, "ops");
  const Column op_gap = column(levels.ops, "gap");
  const Column op_duration = column(levels.ops, "duration");
  std::size_t phase = 0;
  std::size_t op = 0;
  for (const TimelineRow& row : levels.rows) {
    for (const TimelineLane& lane : row.lanes) {
      std::int64_t at = 0;
      std::int64_t op_at = 0;
      for (std::size_t i = 0; i < lane.phases; ++i, ++phase) {
        const std::int64_t start = at + phase_gap[phase];
        at = start + phase_duration[phase];
        ASSERT_EQ(op_at + op_gap[op], start);
        for (std::int64_t k = 0; k < ops[phase]; ++k, ++op) op_at += op_gap[op] + op_duration[op];
        ASSERT_EQ(op_at, at);
      }
    }
  }
  EXPECT_EQ(phase, phase_gap.size());
  EXPECT_EQ(op, op_gap.size());
}

TEST(TimelineLevels, HoldEveryOp) {
  const std::string scenarios = ORRERY_SOURCE_DIR "/scenarios/";
  for (const char* name : {"tiny_deepseek_cpu.yaml", "mixtral_8x7b_64_h100.yaml"}) {
    const Study study = study_step(read_scenario(scenarios + name));
    const auto ranks = representative_ranks(study.report);
    const TimelineLevels levels = timeline_levels(study.program, study.run.timeline, ranks);
    // 2^31 ns are 2.1 s.
    EXPECT_EQ(levels.unit_ps, study.report.step_time_s < 2.1 ? kPsPerNs : 10 * kPsPerNs) << name;
    expect_all_ops(study, levels);
    expect_phases_of_ops(levels);
  }
}

TEST(TimelineLevels, CountUnitsInThirtyOneBits) {
  const Study study =
      study_step(read_scenario(ORRERY_SOURCE_DIR "/scenarios/deepseek_v3_2048_h800.yaml"));
  const std::uint32_t ranks[] = {3};
  const TimelineLevels levels = timeline_levels(study.program, study.run.timeline, ranks);
  // 17.5 s are more than 2^31 ns.
  EXPECT_EQ(levels.unit_ps, 10 * kPsPerNs);
  expect_all_ops(study, levels);
  expect_phases_of_ops(levels);

  // DualPipe's 120 micro-batches of a rank are as many forwards and backwards, alone or in pairs.
  const Column kind = column(levels.cells, "kind");
  const auto count = [&](CellKind k) {
    return std::count(kind.begin(), kind.end(), static_cast<std::int64_t>(k));
  };
  EXPECT_EQ(count(CellKind::forward) + count(CellKind::overlapped), 120);
  EXPECT_EQ(
      count(CellKind::backward) + count(CellKind::backward_input) + count(CellKind::overlapped),
      120);
  const Column micro_batch = column(levels.cells, "micro_batch");
  EXPECT_EQ(kind.size(), micro_batch.size());
}

TEST(TimelineLevels, LeaveOpsOutWhereThereAreTooMany) {
  const Study study =
      study_step(read_scenario(ORRERY_SOURCE_DIR "/scenarios/tiny_deepseek_cpu.yaml"));
  const auto ranks = representative_ranks(study.report);
  const TimelineLevels few = timeline_levels(study.program, study.run.timeline, ranks, 100);
  const TimelineLevels all = timeline_levels(study.program, study.run.timeline, ranks);
  EXPECT_TRUE(few.ops.empty());
  EXPECT_EQ(few.phases.at("gap").text(), all.phases.at("gap").text());
  EXPECT_EQ(few.phases.at("ops").text(), all.phases.at("ops").text());
}

}  // namespace
}  // namespace orrery
