#include "kernels/statistics.hpp"

#include <algorithm>
#include <cmath>

namespace orrery {

double median(std::vector<double> samples) {
  const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
  std::nth_element(samples.begin(), middle, samples.end());
  if (samples.size() % 2 == 1) return *middle;
  return (*std::max_element(samples.begin(), middle) + *middle) / 2;
}

Summary summarise_samples(const std::vector<double>& samples) {
  const double centre = median(samples);
  std::vector<double> distances;
  distances.reserve(samples.size());
  for (const double sample : samples) distances.push_back(std::abs(sample - centre));
  return {.median = centre, .mad = median(std::move(distances)), .samples = samples.size()};
}

double median_error(const Summary& s) {
  const double pi = std::acos(-1.0);
  return 1.4826 * s.mad * std::sqrt(pi / 2 / static_cast<double>(s.samples)) / s.median;
}

bool enough_samples(const std::vector<double>& samples, const StoppingRule& rule) {
  if (samples.size() < rule.min_samples) return false;
  if (samples.size() >= rule.max_samples) return true;
  return median_error(summarise_samples(samples)) <= rule.wanted_error;
}

}  // namespace orrery
