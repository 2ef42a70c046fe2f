#pragma once
// What a calibration measures: the compute shapes of steps, costliest first, then shapes around
// them, so that prices between can be interpolated and the error of that be told.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "calibrate/shape_calls.hpp"
#include "models/scenario.hpp"

namespace orrery {

struct CalibrationItem {
  Shape shape;  ///< sms 0: all of the device
  OpSetting setting;
  double share = 0;  ///< of the op time of the steps, by their scenarios' own profiles; 0: a grid's
};

struct CalibrationPlan {
  std::vector<CalibrationItem> items;
  /// Of the largest of the steps on one rank: what forward and backward of a micro-batch touch,
  /// parameters, gradients and activations. They come again in the next one.
  std::int64_t pass_bytes = 0;
  std::vector<std::unique_ptr<Plan>> plans;  ///< that settings point to, beside the scenarios'
};

/// Shapes on as many or more SMs than the device has are measured on all of them. The scenarios
/// outlive the plan. The same scenarios give the same plan, in the same order.
///
/// The grids. GEMMs, for each number format and pass: three values for each of m, n and k, from the
/// least to the largest that the steps have, none with more operations than twice the largest.
/// Attention: a quarter, half and twice the length, and half the heads. Streaming ops: those of
/// layers with a quarter, half and twice the tokens, and a fourth and sixteenth of the optimizer's.
CalibrationPlan plan_calibration(std::span<const Scenario> scenarios, int device_sms);

}  // namespace orrery
