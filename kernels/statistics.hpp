#pragma once
// What is done with repeated measurements of one thing, and when enough of them have been taken.

#include <cstddef>
#include <vector>

namespace orrery {

/// Median of `samples`; the mean of the middle two of an even number. There must be one at least.
double median(std::vector<double> samples);

/// Median, and the median of the distances from it.
struct Summary {
  double median = 0;
  double mad = 0;
  std::size_t samples = 0;
};

Summary summarise_samples(const std::vector<double>& samples);

/// Standard error of the median over the median. For normal errors the standard deviation is 1.4826
/// MAD and that of the median sqrt(pi / 2 / samples) of it.
double median_error(const Summary& summary);

/// When to stop: after `min_samples` at the earliest, as soon as median_error() is within
/// `wanted_error`, and after `max_samples` at the latest.
struct StoppingRule {
  std::size_t min_samples = 20;
  std::size_t max_samples = 300;
  double wanted_error = 0.001;
};
bool enough_samples(const std::vector<double>& samples, const StoppingRule& rule = {});

}  // namespace orrery
