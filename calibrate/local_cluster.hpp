#pragma once
// A cluster file for the ranks of an executed step: one node whose GPUs are these ranks, with links
// and collectives as measured.

#include <cstdint>
#include <string>
#include <vector>

#include "calibrate/fit_gemm.hpp"
#include "calibrate/fit_nccl.hpp"
#include "calibrate/measure_network.hpp"

namespace orrery {

/// seconds = base_s + bytes / bytes_per_s, of one operation on one size of group. `bytes`: what a
/// rank sends (bus_factor times the size).
struct LinearFit {
  NcclOp op = NcclOp::other;
  std::int64_t members = 0;
  double base_s = 0;
  double bytes_per_s = 0;
  HeldOutError held_out;  ///< on every third size, which is not fitted to
};

/// Least squares of relative errors over two thirds of the points' sizes, base_s not below 0. All
/// points are of one operation and group; there must be three at least.
LinearFit fit_linear(const std::vector<NetworkPoint>& points);

struct LocalCluster {
  std::vector<LinearFit> lines;  ///< by operation and size of group
  double typical_noise = 0;      ///< MAD over median of a point's samples: the median of all points
  double largest_noise = 0;
  /// The cluster with these lines, which price what was measured. Its formulas
  /// (sim/network_prices.hpp), for what was not, are fitted to all of it at once; they know one
  /// rate for all operations, so their error is the larger one. It is the cluster's spread.
  NcclFit fit;
};

struct LocalClusterInputs {
  std::vector<NetworkPoint> points;
  double copy_bytes_per_s = 0;  ///< measure_copy_rate
  std::int64_t ranks = 0;
  std::string name;
  std::string profile;     ///< path, as Cluster's
  std::string provenance;  ///< machine, program, command, date: into the citations
};

/// nvlink is the way from one rank to another: its bandwidth and what collectives cost are fit by
/// fit_nccl, its latency is the base of all-to-alls (an expert exchange without a table is priced
/// as latency + bytes / bandwidth); its peak is the best rate that any message or copy reached.
LocalCluster fit_local_cluster(const LocalClusterInputs& inputs, Problems& problems);

/// The lines by operation and group, then fit_report.
std::string local_cluster_report(const LocalCluster& local);

}  // namespace orrery
