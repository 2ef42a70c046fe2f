#pragma once
// How well one profile prices what another one measured: the points of the second by the first's
// prices.

#include <span>
#include <string>
#include <vector>

#include "sim/profile.hpp"

namespace orrery {

/// |predicted / measured - 1| over the points of one kind of kernel, and how far off they are
/// together.
struct ProfileError {
  std::string kernel;  ///< "GEMM fp8_block", "GEMM fp8_block, memory bound"
  std::size_t points = 0;
  double median = 0;
  double percentile_90 = 0;
  double bias = 0;  ///< of the geometric means: predicted over measured, minus 1
};

/// Every point that `measured` holds of its own device (tables that are not derived), priced by
/// `predicted` on as many SMs; launch gaps left out. Rows without points are left out.
/// "Memory bound" are GEMMs whose skeleton's time depends on the memory's rate for more than half.
/// Streaming kernels have rates: a kernel that reads and writes 64 MiB each stands for the kind.
std::vector<ProfileError> profile_errors(const Profile& measured, const Profile& predicted);

/// One row a kind of kernel, three columns for each of the profiles after the first, which
/// measured. Throws InputError where a file is no profile.
std::string compare_profiles(std::span<const std::string> files);

/// Is this a profile's file, and not a scenario's? False where it cannot be read.
bool is_profile(const std::string& file);

}  // namespace orrery
