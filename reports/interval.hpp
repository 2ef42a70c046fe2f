#pragma once
// What draws of a quantity come to.

#include <vector>

namespace orrery {

/// Of draws: the mean, and the values below which 10, 50 and 90 % of them lie.
struct Interval {
  double p10 = 0;
  double p50 = 0;
  double p90 = 0;
  double mean = 0;

  Interval scaled(double factor) const {
    return {p10 * factor, p50 * factor, p90 * factor, mean * factor};
  }
  bool contains(double value) const { return p10 <= value && value <= p90; }
};

/// The quantile in (0, 1) of ascending draws, linear between order statistics (Hyndman and Fan
/// 1996, definition 7). At least one draw.
double quantile(const std::vector<double>& ascending, double share);

/// At least one draw, in any order.
Interval interval_of(std::vector<double> draws);

}  // namespace orrery
