#pragma once
// From a compute shape to the Calls that it stands for, on scratch operands: what calibration
// times. calibrate/execute lowers the same ops of a whole step onto its own tensors; an op's calls,
// their dimensions, formats and strides have to be the same here and there.

#include <optional>

#include "calibrate/device_timer.hpp"
#include "calibrate/scratch.hpp"
#include "models/model.hpp"
#include "models/plan.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// The layer and the plan that a shape comes from. A Streaming shape tells its bytes and, by its
/// label, which op of a layer it is; heads, widths and experts are the model's.
struct OpSetting {
  const Model* model = nullptr;
  const Plan* plan = nullptr;
};

/// The calls of one execution on operands that are handed out by `scratch` (since its
/// begin_slot()); none where no kernel exists: transfers, marks, FP8 with one scale per tensor.
/// Throws std::bad_alloc where an operand finds no room.
std::optional<OpCalls> calls_of(const Shape& shape, const OpSetting& setting, Scratch& scratch);

}  // namespace orrery
