#include "calibrate/local_cluster.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "sim/price.hpp"

namespace orrery {
namespace {

using testing::HasSubstr;

constexpr NcclOp kOps[] = {NcclOp::all_reduce, NcclOp::all_gather, NcclOp::reduce_scatter,
                           NcclOp::alltoall, NcclOp::sendrecv};

/// Points of an operation whose times `seconds` gives by size.
template <class Seconds>
std::vector<NetworkPoint> points_of(NcclOp op, std::int64_t members, const Seconds& seconds) {
  std::vector<NetworkPoint> points;
  for (std::int64_t bytes = 256; bytes <= 16 << 20; bytes *= 2) {
    const double s = seconds(bytes);
    points.push_back({.op = op,
                      .members = members,
                      .bytes = bytes,
                      .seconds = {.median = s, .mad = 0.02 * s, .samples = 20}});
  }
  return points;
}

TEST(FitLinear, FindsBaseAndBandwidth) {
  // All-reduce on 4: 1.5 times the size is sent.
  const LinearFit fit = fit_linear(points_of(NcclOp::all_reduce, 4, [](std::int64_t bytes) {
    return 7e-6 + 1.5 * static_cast<double>(bytes) / 3e9;
  }));
  EXPECT_NEAR(fit.base_s, 7e-6, 1e-11);
  EXPECT_NEAR(fit.bytes_per_s, 3e9, 1);
  EXPECT_EQ(fit.held_out.points, 6U);
  EXPECT_LT(fit.held_out.percentile_90, 1e-9);
}

TEST(FitLinear, HoldsOutWhatItDoesNotFitTo) {
  // Every third size takes double: the line does not know, and says so.
  auto points = points_of(NcclOp::sendrecv, 2, [](std::int64_t bytes) {
    return 1e-6 + static_cast<double>(bytes) / 1e9;
  });
  for (std::size_t i = 1; i < points.size(); i += 3) points[i].seconds.median *= 2;
  const LinearFit fit = fit_linear(points);
  EXPECT_NEAR(fit.base_s, 1e-6, 1e-11);
  EXPECT_NEAR(fit.held_out.median, 0.5, 1e-9);
  EXPECT_NEAR(fit.held_out.bias, -0.5, 1e-9);
}

TEST(FitLinear, NeverHasANegativeBase) {
  const LinearFit fit = fit_linear(points_of(NcclOp::sendrecv, 2, [](std::int64_t bytes) {
    return std::pow(static_cast<double>(bytes), 1.2) / 1e9;
  }));
  EXPECT_EQ(fit.base_s, 0);
  EXPECT_GT(fit.bytes_per_s, 0);
}

LocalClusterInputs made_up() {
  LocalClusterInputs inputs{.points = {},
                            .copy_bytes_per_s = 20e9,
                            .link_copy_bytes_per_s = 20e9,
                            .ranks = 4,
                            .name = "4 ranks",
                            .profile = "profiles/cpu.yaml",
                            .provenance = "a test"};
  for (const std::int64_t members : {2, 4}) {
    for (const NcclOp op : kOps) {
      const double hops = static_cast<double>(op == NcclOp::sendrecv || op == NcclOp::alltoall ? 1
                                              : op == NcclOp::all_reduce ? 2 * (members - 1)
                                                                         : members - 1);
      const auto points = points_of(op, members, [&](std::int64_t bytes) {
        return 5e-6 + hops * 2e-6 + bus_factor(op, members) * static_cast<double>(bytes) / 4e9;
      });
      inputs.points.insert(inputs.points.end(), points.begin(), points.end());
    }
  }
  return inputs;
}

TEST(LocalCluster, IsReadBackAndPricesWhatWasMeasured) {
  const LocalClusterInputs inputs = made_up();
  Problems problems;
  const LocalCluster local = fit_local_cluster(inputs, problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
  EXPECT_EQ(local.lines.size(), 10U);
  EXPECT_NEAR(local.typical_noise, 0.02, 1e-9);

  const std::string yaml = to_yaml(local.fit.cluster, "");
  const Cluster cluster = read_cluster(read_document_text(yaml, "c.yaml", problems), problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list()) << yaml;
  EXPECT_EQ(cluster, local.fit.cluster);
  EXPECT_EQ(cluster.nodes, 1);
  EXPECT_EQ(cluster.gpus_per_node, 4);
  EXPECT_GE(cluster.nvlink_peak_bytes_per_s, cluster.nvlink.bandwidth_bytes_per_s);
  EXPECT_THAT(cluster.nvlink.source, HasSubstr("measured on this machine (a test)"));
  EXPECT_THAT(cluster.collectives.source, HasSubstr("measured on this machine (a test)"));
  EXPECT_THAT(cluster.collectives.source, HasSubstr("held out"));

  // What was measured is priced by its line, which is how it was made up; without lines by the
  // formulas, which come near. (They count the copy of a member's own block, left out above: at 20
  // GB/s against 4.)
  Cluster without = cluster;
  without.collectives.lines.clear();
  const Profile none;
  for (const NetworkPoint& point : inputs.points) {
    const auto shape = shape_of(point.op, point.bytes, point.members, point.members);
    const Price by_line = price(*shape, none, cluster);
    EXPECT_NEAR(seconds(by_line.time_ps) / point.seconds.median, 1, 2e-3) << name_of(point.op);
    EXPECT_FALSE(by_line.extrapolated);
    const double by_formula = seconds(price(*shape, none, without).time_ps);
    EXPECT_NEAR(by_formula / point.seconds.median, 1, 0.25) << name_of(point.op);
  }
  EXPECT_LT(local.fit.node_held_out.median, 0.05);
  EXPECT_GE(cluster.collectives.spread, local.fit.node_held_out.percentile_68);
}

TEST(LocalCluster, ReportShowsLinesAndErrors) {
  Problems problems;
  const std::string report = local_cluster_report(fit_local_cluster(made_up(), problems));
  EXPECT_THAT(report,
              HasSubstr("alltoall             4     7.00 us     4.000 GB/s          6    0.0 %"));
  EXPECT_THAT(report, HasSubstr("samples lie within 2.0 % of their median"));
  EXPECT_THAT(report, HasSubstr("inside a node, held out"));
}

}  // namespace
}  // namespace orrery
