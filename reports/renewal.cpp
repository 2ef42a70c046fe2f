#include "reports/renewal.hpp"

#include <algorithm>
#include <boost/math/tools/minima.hpp>
#include <cmath>
#include <cstdint>

namespace orrery {
namespace {

/// E[exp(-rate X)], by the trapezoidal rule over the normal deviate, which converges faster than
/// any power of the step for such integrands (1e-12 here).
double laplace(const RandomTime& time, double shift_s, double rate) {
  const double sigma = time.sigma();
  if (sigma == 0) return std::exp(-rate * (time.median_s + shift_s));
  constexpr double kStep = 0.05;
  constexpr int kSteps = 180;  // 9 standard deviations
  double sum = 0;
  double weights = 0;
  for (int i = -kSteps; i <= kSteps; ++i) {
    const double z = kStep * i;
    const double weight = std::exp(-0.5 * z * z);
    weights += weight;
    sum += weight * std::exp(-rate * (time.median_s * std::exp(sigma * z) + shift_s));
  }
  return sum / weights;
}

}  // namespace

double Renewal::outage_s() const {
  if (failures_per_s <= 0) return detection_s + restart.mean_s + read_s;
  const double survives = laplace(restart, read_s, failures_per_s);
  // 1 - survives would lose digits where failures are rare.
  const double fails = restart.sigma() == 0
                           ? -std::expm1(-failures_per_s * (restart.median_s + read_s))
                           : 1 - survives;
  return (detection_s + fails / failures_per_s) / survives;
}

double Renewal::first_s(double interval_s) const {
  const double until_written = interval_s + write_s;
  if (failures_per_s <= 0) return until_written;
  return std::expm1(failures_per_s * until_written) * (1 / failures_per_s + outage_s());
}

double Renewal::further_s(double interval_s) const {
  const double period = interval_s + blocking_s;
  if (failures_per_s <= 0) return period;
  return -std::expm1(-failures_per_s * period) *
         (1 / failures_per_s + outage_s() + first_s(interval_s));
}

double Renewal::total_s(double interval_s, double intervals) const {
  return first_s(interval_s) + (intervals - 1) * further_s(interval_s);
}

double optimum_interval_s(const Renewal& renewal, double most_s) {
  const double least_s = std::max(renewal.write_s - renewal.blocking_s, 1e-3);
  if (renewal.failures_per_s <= 0 || least_s >= most_s) return most_s;
  // Beyond a few mean times between failures it only gets worse, and exp() overflows.
  const double high_s = std::clamp(30 / renewal.failures_per_s, least_s, most_s);
  const auto cost = [&](double log_interval) {
    const double interval_s = std::exp(log_interval);
    return std::log(renewal.further_s(interval_s) / interval_s);
  };
  std::uintmax_t iterations = 200;
  const double found = std::exp(boost::math::tools::brent_find_minima(
                                    cost, std::log(least_s), std::log(high_s), 40, iterations)
                                    .first);
  return std::clamp(found, least_s, most_s);
}

double young_interval_s(double checkpoint_s, double mtbf_s) {
  return std::sqrt(2 * checkpoint_s * mtbf_s);
}

double daly_interval_s(double checkpoint_s, double mtbf_s) {
  if (checkpoint_s >= 2 * mtbf_s) return mtbf_s;
  const double ratio = checkpoint_s / (2 * mtbf_s);
  return young_interval_s(checkpoint_s, mtbf_s) * (1 + std::sqrt(ratio) / 3 + ratio / 9) -
         checkpoint_s;
}

}  // namespace orrery
