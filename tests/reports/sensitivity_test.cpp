#include "reports/sensitivity.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "sketch.hpp"

namespace orrery {
namespace {

using test::on;

/// Two ops in a row on one stream, and one on another beside them, each of a kind of its own.
struct Three {
  Study study;

  Three(Picoseconds first_ps, Picoseconds second_ps, Picoseconds beside_ps) {
    ProgramBuilder builder(std::vector<std::int64_t>(1, 1));
    const auto add = [&](StreamingKind kind, Picoseconds time_ps, double spread,
                         StreamKind stream) {
      const ShapeId shape = builder.intern({Streaming{kind, 1, 1, 1}, "op", 0});
      study.run.prices.prices.push_back({.time_ps = time_ps, .spread = spread});
      const StreamId streams[] = {on(stream)};
      builder.add(OpKind::compute, shape, {}, streams, {});
    };
    add(StreamingKind::copy, first_ps, 0.1, StreamKind::compute);
    add(StreamingKind::transpose, second_ps, 0.2, StreamKind::compute);
    add(StreamingKind::quantize, beside_ps, 0.3, StreamKind::weight_gradient);
    study.program = std::move(builder).seal();
    study.run.timeline = sweep(study.program, study.run.prices);
    study.report.step_time_s = seconds(study.run.timeline.makespan_ps());
  }
};

const SensitivityRow& row(const Sensitivity& s, StreamingKind kind) {
  for (const SensitivityRow& r : s.rows) {
    if (r.kind == name_of(kind)) return r;
  }
  throw std::runtime_error("no such row");
}

TEST(Sensitivity, OfAChainIsEachOpsShareOfIt) {
  const Three t(3'000'000, 1'000'000, 2'000'000);
  const Sensitivity s = sensitivity(t.study);
  ASSERT_EQ(s.rows.size(), 3u);
  const SensitivityRow& copy = row(s, StreamingKind::copy);
  EXPECT_DOUBLE_EQ(copy.faster_s, 3.7e-6);
  EXPECT_DOUBLE_EQ(copy.slower_s, 4.3e-6);
  EXPECT_DOUBLE_EQ(copy.share, 0.5);
  EXPECT_DOUBLE_EQ(row(s, StreamingKind::transpose).slower_s, 4.1e-6);
  // What runs beside it does not count at all.
  EXPECT_DOUBLE_EQ(row(s, StreamingKind::quantize).slower_s, 4e-6);
  EXPECT_EQ(s.rows[0].kind, name_of(StreamingKind::copy));
  // 10 % of 3 us and 20 % of 1 us, independent of each other, of 4 us.
  EXPECT_NEAR(s.spread(), std::hypot(0.3, 0.2) / 4, 1e-12);
}

TEST(Sensitivity, OfWhatComesOutOnlyWhenSlower) {
  const Three t(2'000'000, 2'000'000, 4'000'000);
  const Sensitivity s = sensitivity(t.study);
  EXPECT_DOUBLE_EQ(row(s, StreamingKind::quantize).faster_s, 4e-6);
  EXPECT_DOUBLE_EQ(row(s, StreamingKind::quantize).slower_s, 4.4e-6);
  EXPECT_DOUBLE_EQ(row(s, StreamingKind::copy).faster_s, 4e-6);
}

// A step with flows is longer than a sweep; its changes are the sweep's, in proportion.
TEST(Sensitivity, IsOfTheStepThatWasStudied) {
  Three t(3'000'000, 1'000'000, 2'000'000);
  t.study.report.step_time_s *= 1.5;
  EXPECT_DOUBLE_EQ(row(sensitivity(t.study), StreamingKind::copy).slower_s, 1.5 * 4.3e-6);
}

}  // namespace
}  // namespace orrery
