#pragma once
// From tables of measured decode kernels and low-latency exchanges to what profiles hold of them.

#include <string>
#include <utility>
#include <vector>

#include "calibrate/fit_gemm.hpp"
#include "sim/low_latency.hpp"
#include "sim/profile.hpp"

namespace orrery {

/// Fits the three constants of the skeleton to `table.points` by the mean of |ln(measured /
/// skeleton)|, none beyond the data sheet, and prepares the table.
void fit_cached(CachedTable& table, const Profile& profile);

/// aiconfigurator's table of absorbed MLA at `path`, rows of one format of the cache: points on a
/// grid of batch, heads and context in factors of four go into the table, and the error is that on
/// all the others (16 heads and 128 tokens of context and more).
std::pair<CachedTable, HeldOutError> read_latent_decode(const std::string& path,
                                                        const Profile& profile, CachedTable table);

/// The near legs from the one-node table on H200 (hidden sizes other than 7168; those held out),
/// the far legs from DeepEP's own figures on H800, EP16 to EP256, each left out in turn.
struct LowLatencyFit {
  LowLatencyTable table;
  std::vector<HeldOutError> errors;
};
LowLatencyFit fit_low_latency(const std::string& folder);

/// YAML that read_low_latency_table reads back.
std::string to_yaml(const LowLatencyFit& fit);

}  // namespace orrery
