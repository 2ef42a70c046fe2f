#pragma once
// How sure a step's time is: the errors of prices, carried through the Program.
//
// Prices err together and apart. The logarithm of truth over price of a shape is the sum of
//
// - own: independent from shape to shape; the held-out error of a measured or interpolated price.
// - family: one for all shapes of a kernel family, or of a kind of transfer; the error of a formula
//   that prices them (derived and roofline prices), and by how much tables of the same kernels from
//   two machines differ (kFamilySpread).
//
// Each is normal with the spread that the price states. A draw scales all prices by its factors and
// sweeps the Program again, so that what lies beside the critical path matters as much as it does.
// Sweeps know no shared links: a draw's step over the sweep of the plain prices multiplies the
// study's step, and some draws are simulated with flows to say how far off that is.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "reports/interval.hpp"
#include "sim/price.hpp"
#include "sim/program.hpp"

namespace orrery {

struct Study;

/// What one family's errors, its own and its shapes', do alone.
struct Contribution {
  std::string family;  ///< "GEMM fp8_block", "attention backward", "dispatch", "all_gather, NICs"
  double share = 0;    ///< of all priced op time
  double spread = 0;   ///< of the family's op time: standard deviation of its logarithm
  double step_p10_s = 0;  ///< the step where this family is as fast as in the fastest tenth
  double step_p90_s = 0;
  double swing_s() const { return step_p90_s - step_p10_s; }
};

struct UncertaintyOptions {
  std::int64_t draws = 200;
  std::int64_t checked = 4;  ///< draws that are also simulated with flows, where the study was
};

struct StepUncertainty {
  std::int64_t draws = 0;
  Interval step_time_s;
  Interval gpu_hours_per_trillion_tokens;
  std::vector<Contribution> tornado;  ///< largest swing first
  double largest_difference = 0;      ///< of checked draws: flows over swept, relative
  std::int64_t checked = 0;
  std::vector<double> factors;  ///< by draw: the step over the study's, to be joined with others
};

/// By how much a family's times differ between two machines, or two releases of its library:
/// standard deviation of the logarithm. The root mean square of twelve published differences,
/// 0.061; which they are is in uncertainty.cpp. That training runs at lower clocks than benchmarks
/// is a bias and not in it.
inline constexpr double kFamilySpread = 0.06;

/// Draw i has generators of its own, from the scenario's seed: the same whatever the threads. Where
/// the plan draws experts' loads, each draw has other ones.
StepUncertainty uncertainty(const Study& study, const UncertaintyOptions& options = {});

/// The prices of one draw.
PriceList drawn_prices(const Program& program, const PriceList& prices, std::uint64_t seed,
                       std::uint64_t number);

/// The interval and the tornado, for a terminal of 100 columns.
std::string to_terminal(const StepUncertainty& uncertainty);
std::string to_json(const StepUncertainty& uncertainty);

}  // namespace orrery
