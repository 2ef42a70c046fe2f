#include "calibrate/fit_nccl.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "calibrate/read_nccl.hpp"
#include "sim/price.hpp"
#include "tests/sim/networks_for_tests.hpp"

namespace orrery {
namespace {

using test::cluster_named;

using Outcome = FittedQuantity::Outcome;

/// What a cluster with these very rates would print, times `noise` (log-normal).
NcclTable table_of(const Cluster& c, NcclOp op, std::int64_t ranks, std::int64_t per_node,
                   double noise = 0, unsigned seed = 1) {
  std::mt19937 random(seed + 10 * static_cast<unsigned>(op) + 100 * static_cast<unsigned>(ranks));
  std::vector<std::int64_t> sizes;
  for (int i = 9; i <= 33; ++i) sizes.push_back(std::int64_t{1} << i);
  NcclTable table = simulated_nccl_table(op, ranks, per_node, sizes, [&](std::int64_t bytes) {
    // Two draws make one that is nearly normal; the library's own differ between compilers.
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += static_cast<double>(random()) / 4294967296.0;
    return seconds(price(*shape_of(op, bytes, ranks, per_node), Profile{}, c).time_ps) *
           std::exp(noise * (sum - 6));
  });
  table.at.file = "made_up.txt";
  return table;
}

const FittedQuantity& quantity(const NcclFit& fit, const std::string& name) {
  for (const FittedQuantity& q : fit.quantities) {
    if (q.name == name) return q;
  }
  throw std::runtime_error("no quantity " + name);
}

NcclFit fit_without_problems(const Cluster& start, const std::vector<NcclTable>& tables,
                             const NcclFitOptions& options = {}) {
  Problems problems;
  NcclFit fit = fit_nccl(start, tables, options, problems);
  EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
  return fit;
}

/// The H100's rates, each off by a third up or down.
Cluster off(Cluster c) {
  CollectiveRates& r = c.collectives;
  c.nvlink.bandwidth_bytes_per_s *= 0.75;
  r.base_s *= 1.3;
  r.nvlink_hop_s *= 0.75;
  r.low_latency_bytes_per_s *= 0.75;
  r.bulk_latency_s *= 1.3;
  r.copy_bytes_per_s *= 0.75;
  r.nvlink_pipeline_bytes *= 1.3;
  r.peer_bytes_per_s *= 0.75;
  r.peer_latency_s *= 1.3;
  r.nvls_share *= 0.8;
  return c;
}

TEST(FitNccl, GivesTheRatesBackThatTheTablesWereMadeOf) {
  const Cluster truth = cluster_named("h100_node");
  std::vector<NcclTable> tables;
  for (const NcclOp op :
       {NcclOp::all_reduce, NcclOp::all_gather, NcclOp::reduce_scatter, NcclOp::alltoall}) {
    for (const std::int64_t ranks : {2, 4, 8})
      tables.push_back(table_of(truth, op, ranks, ranks, 0.03));
  }
  const NcclFit fit = fit_without_problems(off(truth), tables);
  const auto wanted = [&](const std::string& name, double value, double within) {
    const FittedQuantity& q = quantity(fit, name);
    EXPECT_EQ(q.outcome, Outcome::fitted) << name;
    EXPECT_NEAR(q.after / value, 1, within) << name;
    EXPECT_GT(std::abs(q.before / value - 1), 0.15) << name;
    EXPECT_GT(q.rows, 0u) << name;
  };
  wanted("nvlink.bandwidth", 367e9, 0.02);
  wanted("collectives.base", 5.3e-6, 0.03);
  wanted("collectives.nvlink_hop", 0.763e-6, 0.04);
  wanted("collectives.low_latency_rate", 199e9, 0.06);
  wanted("collectives.bulk_latency", 13.4e-6, 0.08);
  wanted("collectives.copy_rate", 1027e9, 0.12);
  wanted("collectives.nvlink_pipeline", 15.8e6, 0.3);  // 1 % of a long transfer
  wanted("collectives.peer_rate", 5.26e9, 0.10);
  wanted("collectives.peer_latency", 7.41e-6, 0.06);
  wanted("collectives.nvls_share", 0.84, 0.03);
  // Nothing is left but the noise: half of a normal distribution's values are within 0.67 sigma.
  EXPECT_NEAR(fit.node_held_out.median, 0.67 * 0.03, 0.008);
  EXPECT_NEAR(fit.cluster.collectives.spread, 0.03, 0.01);
}

TEST(FitNccl, AcrossNodes) {
  const Cluster truth = cluster_named("h100_1024");
  Cluster start = truth;
  start.nic.bandwidth_bytes_per_s *= 0.8;
  start.collectives.nic_tree_hop_s *= 1.4;
  start.collectives.nic_ring_hop_s *= 0.7;
  start.collectives.nic_peer_s *= 1.4;
  start.collectives.nic_pipeline_bytes *= 1.5;
  std::vector<NcclTable> tables;
  for (const NcclOp op : {NcclOp::all_reduce, NcclOp::all_gather, NcclOp::alltoall}) {
    for (const std::int64_t ranks : {16, 64, 256})
      tables.push_back(table_of(truth, op, ranks, 8, 0.03));
  }
  const NcclFit fit = fit_without_problems(start, tables);
  const std::map<std::string, std::pair<double, double>> wanted = {
      {"nic.bandwidth", {48e9, 0.03}},
      {"collectives.nic_tree_hop", {28.9e-6, 0.06}},
      {"collectives.nic_ring_hop", {19e-6, 0.05}},
      {"collectives.nic_peer", {2.44e-6, 0.06}},
      {"collectives.nic_pipeline", {148e3, 0.2}}};
  for (const auto& [name, value] : wanted) {
    EXPECT_EQ(quantity(fit, name).outcome, Outcome::fitted) << name;
    EXPECT_NEAR(quantity(fit, name).after / value.first, 1, value.second) << name;
  }
  EXPECT_NEAR(fit.nodes_held_out.median, 0.02, 0.008);
  EXPECT_EQ(fit.node_held_out.points, 0u);
  EXPECT_EQ(fit.cluster.collectives.spread, truth.collectives.spread);
}

TEST(FitNccl, WhatTheTablesCannotTellStays) {
  const Cluster truth = cluster_named("h100_1024");
  const Cluster start = off(truth);
  const NcclFit fit = fit_without_problems(start, {table_of(truth, NcclOp::all_gather, 8, 8)});
  // One group size: launch and steps are one sum, and so are bandwidth and the copy of the own
  // block.
  const auto fitted = [&](const char* name) {
    return quantity(fit, name).outcome == Outcome::fitted ? 1 : 0;
  };
  EXPECT_EQ(fitted("collectives.base") + fitted("collectives.nvlink_hop"), 1);
  EXPECT_EQ(fitted("nvlink.bandwidth") + fitted("collectives.copy_rate"), 1);
  for (const char* name : {"nic.bandwidth", "collectives.nic_tree_hop", "collectives.nic_peer",
                           "collectives.peer_rate", "collectives.nvls_share"}) {
    EXPECT_EQ(quantity(fit, name).outcome, Outcome::undetermined) << name;
    EXPECT_EQ(quantity(fit, name).before, quantity(fit, name).after) << name;
  }
  EXPECT_LT(fit.node_held_out.median, 0.01);
  EXPECT_EQ(fit.cluster.nic, start.nic);
  EXPECT_NE(fit_report(fit).find("not told"), std::string::npos);
}

TEST(FitNccl, KeepsWhatItIsToldTo) {
  const Cluster truth = cluster_named("h100_node");
  const Cluster start = off(truth);
  const std::vector<NcclTable> tables = {table_of(truth, NcclOp::all_reduce, 8, 8),
                                         table_of(truth, NcclOp::all_reduce, 4, 4)};
  const NcclFit fit = fit_without_problems(start, tables, {.keep = {"nvlink.bandwidth"}});
  EXPECT_EQ(fit.cluster.nvlink, start.nvlink);
  EXPECT_EQ(quantity(fit, "nvlink.bandwidth").outcome, Outcome::kept);
  Problems problems;
  fit_nccl(start, tables, {.keep = {"nvlink.bandwith"}}, problems);
  ASSERT_EQ(problems.size(), 1u);
  EXPECT_EQ(problems.list()[0].hint, "did you mean 'nvlink.bandwidth'?");
}

TEST(FitNccl, APublishedTableFromAnotherMachinesRates) {
  // DGX H100, NVLS (NVIDIA/dgxc-benchmarking@80634ad); the start is fitted to another source's
  // nodes.
  Problems problems;
  const auto tables = read_nccl(
      ORRERY_SOURCE_DIR "/tests/calibrate/nccl/h100_node_all_reduce_published.txt", problems);
  problems.throw_if_any();
  const NcclFit fit = fit_without_problems(cluster_named("h100_node"), tables);
  EXPECT_EQ(fit.node_fitted.points + fit.node_held_out.points, 16u);
  EXPECT_EQ(fit.node_held_out.points, 5u);
  RecordProperty("held_out_median", std::to_string(fit.node_held_out.median));
  RecordProperty("held_out_p90", std::to_string(fit.node_held_out.percentile_90));
  EXPECT_LT(fit.node_held_out.median, 0.12);
  EXPECT_LT(fit.node_held_out.percentile_90, 0.20);
  // What was written reads back.
  const std::string text =
      calibrated_yaml(fit, "# One node.\n# Of mine.\nname: x\n# not this\n", "some/folder");
  EXPECT_EQ(text.find("# One node.\n# Of mine.\nname: "), 0u);
  const Cluster& written = fit.cluster;
  EXPECT_EQ(read_cluster(read_document_text(text, "some/folder/c.yaml", problems), problems),
            written);
  EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
  EXPECT_NE(written.collectives.source.find("h100_node_all_reduce_published.txt"),
            std::string::npos);
  EXPECT_NE(written.collectives.source.find("NVIDIA H100 80GB HBM3"), std::string::npos);
}

TEST(FitNccl, TablesThatDoNotFitAreProblems) {
  const Cluster node = cluster_named("h100_node");
  const auto complaint = [&](const NcclTable& table) {
    Problems problems;
    fit_nccl(node, {table}, {}, problems);
    return problems.empty() ? "" : problems.list()[0].message;
  };
  EXPECT_EQ(complaint(table_of(node, NcclOp::all_reduce, 8, 8)), "");
  EXPECT_EQ(complaint(table_of(cluster_named("h100_1024"), NcclOp::all_reduce, 16, 8)),
            "16 ranks, 8 per node, do not fit on 1 node of 8 GPUs");
  NcclTable unknown = table_of(node, NcclOp::all_reduce, 8, 8);
  unknown.ranks = 0;
  EXPECT_NE(complaint(unknown).find("on how many ranks"), std::string::npos);
  unknown.ranks = 1;
  EXPECT_NE(complaint(unknown).find("nobody"), std::string::npos);
  unknown.op = NcclOp::other;
  EXPECT_NE(complaint(unknown).find("which operation"), std::string::npos);
  NcclTable gather = table_of(node, NcclOp::all_reduce, 8, 8);
  gather.op = NcclOp::gather;
  EXPECT_EQ(complaint(gather), "no table has a row to fit to");
}

TEST(FitNccl, RowsWithWrongElementsAreLeftOut) {
  const Cluster node = cluster_named("h100_node");
  NcclTable table = table_of(node, NcclOp::all_reduce, 8, 8);
  table.rows[3].out_of_place->wrong = 5;
  const NcclFit fit = fit_without_problems(node, {table});
  EXPECT_EQ(fit.node_fitted.points + fit.node_held_out.points, table.rows.size() - 1);
  ASSERT_EQ(fit.notes.size(), 1u);
  EXPECT_EQ(fit.notes[0], "made_up.txt: left out 1 rows with wrong elements");
}

}  // namespace
}  // namespace orrery
