#pragma once
// Measured shapes to a Profile: tables of points, the skeletons' constants fitted to them, and the
// error on points that neither has seen.

#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "calibrate/fit_gemm.hpp"
#include "sim/profile.hpp"
#include "sim/shape.hpp"

namespace orrery {

struct MeasuredShape {
  Shape shape;  ///< sms 0: all of the device
  double seconds = 0;
};

struct MeasuredDevice {
  std::string name;
  int sms = 0;
  double memory_bytes = 0;
  /// Its data sheet's figures. Without them peak rates are the best that was measured, which is
  /// what prices without a table then go by.
  std::optional<Device> data_sheet;
};

struct MeasuredProfile {
  Profile profile;
  std::vector<HeldOutError> errors;  ///< one for each table, of points held out
};

/// `shapes`: compute shapes; there must be one at least. `bandwidth_by_sms`: as in Profile, all SMs
/// last. `source`: who measured, when and how; the source of everything in the profile.
///
/// Held out is a fifth of a table's layers (n, k), or points, at a time: constants are fitted and
/// residuals taken without them. The 68th percentile of the error over all folds is the table's
/// spread; with fewer than three points nothing can be held out, and the spread is that of the
/// roofline, 0.5.
MeasuredProfile make_profile(const std::string& name, const MeasuredDevice& device,
                             std::span<const MeasuredShape> shapes,
                             std::vector<std::pair<int, double>> bandwidth_by_sms,
                             const std::string& source);

}  // namespace orrery
