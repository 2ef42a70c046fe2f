#pragma once
// The smooth part of every kernel price: a weighted mean of what measured points say nearby.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

#include "sim/profile.hpp"

namespace orrery {

/// Mean of `residual` over the points, weighted by exp(-d^2/2) with the distance d in the natural
/// logarithms of the dimensions, each in units of `width`. Far from every point this tends to the
/// nearest one, so an extrapolation keeps the last known residual.
template <class Point>
double local_mean(std::span<const Point> points, const std::array<double, 4>& x,
                  const std::array<double, 4>& width) {
  constexpr double kNegligible = 12.0;  // half a squared distance beyond the nearest: weight 6e-6
  std::array<double, 4> scale{};
  for (std::size_t i = 0; i < 4; ++i) scale[i] = 1 / width[i];
  const auto half_square = [&](const Point& p) {
    double sum = 0;
    for (std::size_t i = 0; i < 4; ++i) {
      const double d = (p.at.x[i] - x[i]) * scale[i];
      sum += d * d;
    }
    return sum / 2;
  };
  double nearest = std::numeric_limits<double>::infinity();
  for (const Point& p : points) nearest = std::min(nearest, half_square(p));
  double weights = 0;
  double sum = 0;
  for (const Point& p : points) {
    const double d = half_square(p) - nearest;
    if (d > kNegligible) continue;
    const double w = std::exp(-d);
    weights += w;
    sum += w * p.at.residual;
  }
  return weights > 0 ? sum / weights : 0;
}

}  // namespace orrery
