#pragma once
// What runs a Gemm on a GPU, and how it is cut into tiles. Plain C++: pointers are only looked at.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/call.hpp"
#include "kernels/gemm_layout.hpp"

namespace orrery::kernels {

/// Of the device, as far as it matters here.
struct GemmDevice {
  int sms = 0;  ///< that the call may use, at least 1
  int shared_bytes_per_block = 0;
  int compute_capability = 0;  ///< 90 for Hopper
};

/// library: cuBLASLt. hopper: our wgmma kernel. plain: a loop over tiles in FP32, for everything
/// else.
enum class GemmPath : std::uint8_t { library, hopper, plain };

struct GemmPlan {
  GemmPath path = GemmPath::plain;
  // The rest is not used by the library.
  TileLayout layout;
  int cluster = 1;
  int panel = 1;
  int blocks = 0;  ///< in the grid; a multiple of cluster, at most the SMs
  int shared_bytes = 0;
  /// Tiles in the last wave count like any other: what the slowest block computes. Where the device
  /// decides on the groups' sizes, of equal groups.
  std::int64_t waves = 0;
  /// What plans are compared by, not a prediction of time: SM cycles if nothing but the tensor
  /// cores and the L2's bandwidth counted.
  double cycles = 0;
  /// That all blocks load from the L2; decides between plans of equal cycles.
  double loaded_bytes = 0;
};
std::string describe(const GemmPlan& plan);

/// The best plan. Dense products that the library has go to the library.
GemmPlan choose_gemm(const Gemm& call, const GemmDevice& device);
/// The best plan without the library.
GemmPlan choose_own_gemm(const Gemm& call, const GemmDevice& device);
/// All plans of our wgmma kernel, best first; empty where it cannot be used.
std::vector<GemmPlan> hopper_plans(const Gemm& call, const GemmDevice& device);

/// Why cuBLASLt does not take this call, or empty.
std::string why_not_library(const Gemm& call, const GemmDevice& device);
/// Why our wgmma kernel does not, or empty.
std::string why_not_hopper(const Gemm& call, const GemmDevice& device);

/// Sizes of the product: of D (a group's rows where the contraction is split) and of the
/// contraction.
struct GemmSizes {
  std::int64_t m = 0, n = 0, k = 0;
};
GemmSizes sizes_of(const Gemm& call);

/// The grid that a plan's kernel walks.
TileGrid tile_grid_of(const Gemm& call, const GemmPlan& plan);

}  // namespace orrery::kernels
