#pragma once
// How long one piece of work takes, and how well that is known: repeated samples, their median, a
// rule for when there are enough, and a check that the machine was as fast after them as before.

#include <cstddef>
#include <vector>

#include "kernels/statistics.hpp"

namespace orrery {

/// What is timed. Implementations: DeviceTimer for work on a device; tests have known times.
class Timed {
 public:
  virtual ~Timed() = default;
  /// Seconds that `repeats` runs in a row take, of all together.
  virtual double run(int repeats) = 0;
  /// Runs after which operands come again.
  virtual int period() const = 0;
  /// Seconds of a fixed piece of work, whose time tells how fast the machine is at this moment
  /// (clocks that throttle, neighbours that take the processor).
  virtual double reference() = 0;
  /// Seconds of a clock that goes on while nothing is measured.
  virtual double now_s() = 0;
};

struct MeasureOptions {
  /// Of fewer samples the MAD is itself so uncertain that the rule would often stop by luck.
  StoppingRule rule{.min_samples = 12, .max_samples = 60, .wanted_error = 0.005};
  double sample_s = 1e-3;  ///< a sample repeats the work until it takes this long
  int max_repeats = 512;   ///< in one sample
  double limit_s = 5;      ///< of the clock, for all attempts: no sample begins later
  double largest_drift = 0.05;
  int attempts = 3;
  /// Warming up ends when a period is not shorter than the one before by more than this ...
  double settled = 0.03;
  int max_periods = 12;  ///< ... or after so many
};

struct Measurement {
  double seconds = 0;  ///< of one run: the median over samples
  double error = 0;    ///< relative standard error of that; 1 of a single run
  std::size_t samples = 0;
  int repeats = 1;  ///< runs in a sample
  int attempts = 1;
  /// How far the reference's time moved, over its usual time in this session: the larger of before
  /// to after, and of that to the usual.
  double drift = 0;
  bool steady = true;  ///< drift within largest_drift
};

/// Warms up: a last-level cache that learns what is used again takes several periods until it keeps
/// it, as it does in the steps of a training, so periods are run until they do not get shorter, for
/// half of the limit at most. The last tells how many runs a sample needs; a first run
/// that takes all of the limit is the measurement. Samples until the rule
/// or the limit says so, at least one. Where the reference's time moved by more than
/// `largest_drift`, all samples are dropped and taken again, at most `attempts` times; the
/// steadiest attempt counts. `references`: reference times of this session, which are added to;
/// their median is the usual one.
Measurement measure(Timed& timed, const MeasureOptions& options, std::vector<double>& references);

}  // namespace orrery
