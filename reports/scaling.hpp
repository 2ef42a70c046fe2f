#pragma once
// The same plan on fewer and on more GPUs: its number of data-parallel copies changed, everything
// else kept.

#include <cstdint>
#include <string>
#include <vector>

#include "reports/study.hpp"

namespace orrery {

struct ScalingPoint {
  std::int64_t gpus = 0;
  std::int64_t dp = 0;
  std::int64_t global_batch = 0;   ///< sequences
  std::int64_t micro_batches = 0;  ///< of a pipeline
  /// false: by formula, where there are more nodes than the cluster's fabric has; then as much
  /// longer as flows make the scenario's own step.
  bool flows = false;
  double step_time_s = 0;
  double tokens_per_day = 0;
  double efficiency = 0;  ///< tokens/s/GPU over those of the scenario itself
  std::int64_t memory_peak_bytes = 0;
  bool fits = true;
};

struct ScalingGap {
  std::int64_t gpus = 0;
  std::string why;
};

/// Points by GPUs, the scenario's own among them.
struct ScalingCurve {
  std::vector<ScalingPoint> points;
  std::vector<ScalingGap> left_out;
};

struct Scaling {
  ScalingCurve same_batch;     ///< the global batch is kept: pipelines run dry
  ScalingCurve growing_batch;  ///< the batch grows with the GPUs: micro-batches a pipeline are kept
};

/// A quarter to eight times the GPUs, where that comes out whole and the reader of scenarios allows
/// it. In parallel; the same whatever the number of threads.
Scaling scaling(const Study& study);

}  // namespace orrery
