#pragma once
// A cluster file for the ranks of an executed step: one node whose GPUs are these ranks, with links
// and collectives as measured.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "calibrate/fit_gemm.hpp"
#include "calibrate/fit_nccl.hpp"
#include "calibrate/measure_devices.hpp"
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
  std::vector<PeerCopy> peers;  ///< as measured
};

/// What fit_local_cluster wants to know; the three last are the caller's.
struct LocalClusterInputs {
  std::vector<NetworkPoint> points;
  double copy_bytes_per_s = 0;       ///< of a rank in its own memory (measure_copy_rate)
  double link_copy_bytes_per_s = 0;  ///< of the best copy from rank to rank; 0: not measured
  std::vector<PeerCopy> peers;  ///< where there are GPUs
  std::int64_t ranks = 0;
  std::string machine;  ///< its processor, or its GPUs
  std::string name;
  std::string profile;     ///< path, as Cluster's
  std::string provenance;  ///< machine, program, command, date: into the citations
};

/// All ranks call it; what rank 0 gets is complete but for names and provenance. Of ranks that talk
/// by messages of the host.
LocalClusterInputs measure_ranks(Transport& transport, const NetworkMeasureOptions& options);
/// Of ranks that have a GPU each. Sizes go up to 256 MiB: gradients of a GPU's parameters.
LocalClusterInputs measure_gpus(Transport& transport, std::shared_ptr<const kernels::Nccl> nccl,
                                NetworkMeasureOptions options);

/// nvlink is the way from one rank to another: its bandwidth and what collectives cost are fit by
/// fit_nccl, its latency is the base of all-to-alls (an expert exchange without a table is priced
/// as latency + bytes / bandwidth); its peak is the best rate that any message, or copy from
/// rank to rank, reached.
LocalCluster fit_local_cluster(const LocalClusterInputs& inputs, Problems& problems);

/// Copies between GPUs, the lines by operation and group, then fit_report.
std::string local_cluster_report(const LocalCluster& local);

}  // namespace orrery
