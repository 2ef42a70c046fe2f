#pragma once
// Which prices a step's time hangs on: each kind of operation made faster and slower by a tenth,
// and the whole Program swept again, so that what is hidden behind something else counts as hidden.
//
// Sweeps know no shared links: they tell by which factor the step changes, which is applied to the
// time that the study found.

#include <string>
#include <string_view>
#include <vector>

#include "reports/study.hpp"

namespace orrery {

struct SensitivityRow {
  std::string kind;     ///< kind_of_work(): "attention backward", "dispatch"
  double share = 0;     ///< of all op time on GPUs
  double spread = 0;    ///< of its prices, relative: mean of their spreads, weighted by op time
  double faster_s = 0;  ///< the step with the kind's ops a tenth faster
  double slower_s = 0;  ///< and a tenth slower
  /// What one spread of the kind moves the step by, its prices all erring together.
  double by_spread_s() const;
};

inline constexpr double kSensitivityChange = 0.1;

struct Sensitivity {
  double step_s = 0;
  std::vector<SensitivityRow> rows;  ///< largest effect first
  /// Relative standard deviation of the step where the kinds err independently of each other.
  double spread() const;
};

/// In parallel; the same whatever the number of threads.
Sensitivity sensitivity(const Study& study);

}  // namespace orrery
