// Two timelines joined: a run against a distorted copy of itself, whose errors are known by
// construction.

#include "reports/joined.hpp"

#include <gtest/gtest.h>

#include "reports/study.hpp"

namespace orrery {
namespace {

const JoinedRow* find(const std::vector<JoinedRow>& rows, const std::string& what) {
  for (const JoinedRow& row : rows) {
    if (row.what == what) return &row;
  }
  return nullptr;
}

TEST(Joined, SaysByHowMuchEachKindOfOperationIsOff) {
  const Study study =
      study_step(read_scenario(ORRERY_SOURCE_DIR "/scenarios/llama3_70b_64_h100.yaml"),
                 {.network = Network::formula});
  const Timeline& predicted = study.run.timeline;
  // As measured: every grouped or dense GEMM of a forward pass took twice as long, all else as
  // long.
  Timeline measured = predicted;
  const Program& program = study.program;
  std::int64_t forward_gemms = 0, ops = 0;
  for (std::size_t i = 0; i < program.size(); ++i) {
    const OpId op(i);
    const Shape& shape = program.shapes()[program.shape(op)];
    if (!std::holds_alternative<Mark>(shape.work)) ++ops;
    const auto* gemm = std::get_if<Gemm>(&shape.work);
    if (gemm == nullptr || gemm->pass != Pass::forward) continue;
    ++forward_gemms;
    measured.end_ps[op] += predicted.end_ps[op] - predicted.start_ps[op];
  }
  const Joined joined =
      join_timelines(study.scenario, program, study.run.prices, predicted, measured);
  const JoinedRow* forward = find(joined.kinds, "GEMM forward");
  ASSERT_NE(forward, nullptr);
  EXPECT_EQ(forward->ops, forward_gemms);
  EXPECT_DOUBLE_EQ(forward->error(), -0.5);
  EXPECT_DOUBLE_EQ(forward->median_error, 0.5);
  EXPECT_DOUBLE_EQ(forward->p90_error, 0.5);
  const JoinedRow* backward = find(joined.kinds, "GEMM backward_weight");
  ASSERT_NE(backward, nullptr);
  EXPECT_EQ(backward->error(), 0);
  EXPECT_EQ(joined.all.ops, ops);
  // The lost time is the forward GEMMs', and all of it is in the phases too.
  const double lost_s = forward->measured_s - forward->predicted_s;
  EXPECT_NEAR(joined.all.measured_s - joined.all.predicted_s, lost_s, 1e-9 * lost_s);
  double phases_s = 0;
  for (const JoinedRow& row : joined.phases) phases_s += row.measured_s - row.predicted_s;
  EXPECT_NEAR(phases_s, lost_s, 1e-9 * lost_s);
  // The shape that is off by most comes first.
  ASSERT_FALSE(joined.shapes.empty());
  EXPECT_DOUBLE_EQ(joined.shapes.front().error(), -0.5);
  EXPECT_DOUBLE_EQ(joined.predicted_s, study.report.step_time_s);
  EXPECT_NE(to_terminal(joined).find("GEMM forward"), std::string::npos);
}

TEST(Joined, FindsNothingInARunAgainstItself) {
  const Study study =
      study_step(read_scenario(ORRERY_SOURCE_DIR "/scenarios/llama3_70b_64_h100.yaml"),
                 {.network = Network::formula});
  const Joined joined = join_timelines(study.scenario, study.program, study.run.prices,
                                       study.run.timeline, study.run.timeline);
  for (const auto* rows : {&joined.kinds, &joined.phases, &joined.shapes}) {
    for (const JoinedRow& row : *rows) EXPECT_EQ(row.error(), 0) << row.what;
  }
  EXPECT_EQ(joined.predicted_s, joined.measured_s);
}

}  // namespace
}  // namespace orrery
