#pragma once
// Of tests that measure how ranks talk, over whatever carries their messages.

#include <gtest/gtest.h>

#include <set>
#include <span>
#include <tuple>

#include "calibrate/measure_network.hpp"

namespace orrery {

inline NetworkMeasureOptions quick_measurement() {
  return {.least_bytes = 256,
          .most_bytes = 1024,
          .limit_s = 0,
          .rule = {.min_samples = 10, .max_samples = 40, .wanted_error = 0.5},
          .progress = {}};
}

/// What quick_measurement() gives on four ranks: the first has each of five operations on groups of
/// 2 and 4 with 256, 512 and 1024 bytes once, the others nothing.
inline void expect_all_of_four_ranks(const Transport& t, std::span<const NetworkPoint> points) {
  if (t.rank() != 0) {
    EXPECT_TRUE(points.empty());
    return;
  }
  std::set<std::tuple<NcclOp, std::int64_t, std::int64_t>> seen;
  for (const NetworkPoint& point : points) {
    EXPECT_TRUE(seen.insert({point.op, point.members, point.bytes}).second);
    EXPECT_GE(point.seconds.samples, 10U);
    EXPECT_GT(point.seconds.median, 0);
  }
  EXPECT_EQ(seen.size(), 5U * 2 * 3);
  EXPECT_EQ(seen.count({NcclOp::alltoall, 2, 512}), 1U);
}

}  // namespace orrery
