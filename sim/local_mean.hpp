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
  constexpr double kNegligible = 7.0;  // half a squared distance beyond the nearest: weight 1e-3
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

template <class Point>
LogBox box_of(std::span<const Point> points) {
  LogBox box;
  box.low.fill(std::numeric_limits<double>::infinity());
  box.high.fill(-std::numeric_limits<double>::infinity());
  for (const Point& p : points) {
    for (std::size_t i = 0; i < 4; ++i) {
      box.low[i] = std::min(box.low[i], p.at.x[i]);
      box.high[i] = std::max(box.high[i], p.at.x[i]);
    }
  }
  return box;
}

/// More than a factor of two outside the box in coordinate i.
inline bool far_outside(const LogBox& box, const std::array<double, 4>& x, std::size_t i) {
  const double slack = std::log(2.0);
  return x[i] < box.low[i] - slack || x[i] > box.high[i] + slack;
}

}  // namespace orrery
