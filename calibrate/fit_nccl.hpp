#pragma once
// A cluster's link rates from tables of nccl-tests.

#include <cstdint>
#include <string>
#include <vector>

#include "calibrate/fit_gemm.hpp"
#include "sim/cluster.hpp"
#include "sim/nccl_table.hpp"

namespace orrery {

struct NcclFitOptions {
  std::int64_t ranks_per_node = 0;  ///< of tables that do not tell; 0: as many as a node has
  std::vector<std::string> keep;    ///< quantities to leave alone: "nvlink.bandwidth"
};

/// What became of one rate of the cluster.
struct FittedQuantity {
  enum class Outcome : std::uint8_t { fitted, kept, undetermined };
  std::string name;  ///< as in the cluster file: "collectives.base"
  Outcome outcome{};
  double before = 0;
  double after = 0;
  double scale = 1;  ///< SI over `unit`
  std::string unit;
  std::size_t rows = 0;  ///< of those fitted to, how many a factor 1.5 changes by 1 % or more
};

struct NcclFit {
  Cluster cluster;
  std::vector<FittedQuantity> quantities;
  HeldOutError node_fitted, node_held_out;    ///< inside a node
  HeldOutError nodes_fitted, nodes_held_out;  ///< across nodes
  std::vector<std::string> notes;
};

/// Minimises the mean relative error (at most 50 % a row) of price() over two thirds of the
/// sizes; every third size is held out, and the 68th percentile of its error becomes the cluster's
/// spread. A quantity is fitted if the rows tell it apart from the others: if rows that are 5 % off
/// leave its logarithm, apart from those of quantities already chosen, a standard error of at most
/// 0.5. Tables that the cluster cannot have run, or without operation or ranks, are
/// problems; rows without a formula, or with wrong elements, are left out and noted.
NcclFit fit_nccl(const Cluster& before, const std::vector<NcclTable>& tables,
                 const NcclFitOptions& options, Problems& problems);

/// Quantity, before, after, rows used; then median and 90th percentile error, fitted and held out.
std::string fit_report(const NcclFit& fit);

/// The cluster file, to go into `folder`: the comment lines that `input` begins with, then the
/// cluster.
std::string calibrated_yaml(const NcclFit& fit, const std::string& input,
                            const std::string& folder);

}  // namespace orrery
