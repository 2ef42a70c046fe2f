#pragma once
// Two timelines of one Program, op by op: predicted beside measured. Where a step's difference
// comes from: which kernels, which phases, or how they were put together.

#include <cstdint>
#include <string>
#include <vector>

#include "models/scenario.hpp"
#include "reports/report.hpp"
#include "sim/price.hpp"
#include "sim/program.hpp"
#include "sim/shape.hpp"
#include "sim/timeline.hpp"

namespace orrery {

/// What kind of operation a shape is: what a kernel library has one routine for. "GEMM forward",
/// "norm_forward", "send"; empty: a mark, which takes no time.
std::string kind_of_work(const Shape& shape);

/// Times of a set of ops, summed over all of them.
struct JoinedRow {
  std::string what;
  std::int64_t ops = 0;
  std::int64_t shapes = 0;  ///< distinct ones
  double predicted_s = 0;
  double measured_s = 0;
  /// Of the mean time of a shape against its mean measured time, over the shapes: median and 90th
  /// percentile of the error's magnitude.
  double median_error = 0;
  double p90_error = 0;

  double error() const { return measured_s > 0 ? predicted_s / measured_s - 1 : 0; }
};

struct Joined {
  double predicted_s = 0;  ///< the step
  double measured_s = 0;
  std::vector<JoinedRow> kinds;   ///< of operation: "GEMM forward", "norm_forward", "send"
  std::vector<JoinedRow> phases;  ///< ops' tags: attn(F), mlp(B), ...
  std::vector<JoinedRow> shapes;  ///< those whose sums differ most, largest first
  PhaseTimes predicted_phases_s;  ///< mean over ranks, as in a Report
  PhaseTimes measured_phases_s;
  JoinedRow all;  ///< all ops together
  /// How fast the machine was while it executed the step, over how fast while it was calibrated; 0:
  /// not known.
  double relative_speed = 0;

  double step_error() const { return measured_s > 0 ? predicted_s / measured_s - 1 : 0; }
  /// Of the step as it would be predicted at the speed that the machine had.
  double step_error_at_one_speed() const {
    return relative_speed > 0 ? (1 + step_error()) / relative_speed - 1 : step_error();
  }
};

/// Both timelines are of `program`.
Joined join_timelines(const Scenario& scenario, const Program& program, const PriceList& prices,
                      const Timeline& predicted, const Timeline& measured);

std::string to_terminal(const Joined& joined);
std::string to_json(const Joined& joined);

}  // namespace orrery
