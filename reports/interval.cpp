#include "reports/interval.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "sim/check.hpp"

namespace orrery {

double quantile(const std::vector<double>& ascending, double share) {
  ORRERY_CHECK(!ascending.empty() && share > 0 && share < 1, "quantile {} of {} draws", share,
               ascending.size());
  const double at = share * static_cast<double>(ascending.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, ascending.size() - 1);
  return ascending[below] + (at - std::floor(at)) * (ascending[above] - ascending[below]);
}

Interval interval_of(std::vector<double> draws) {
  ORRERY_CHECK(!draws.empty(), "an interval of no draws");
  std::sort(draws.begin(), draws.end());
  // Summed in ascending order: the mean does not depend on the order of the draws.
  const double sum = std::accumulate(draws.begin(), draws.end(), 0.0);
  return {quantile(draws, 0.1), quantile(draws, 0.5), quantile(draws, 0.9),
          sum / static_cast<double>(draws.size())};
}

}  // namespace orrery
