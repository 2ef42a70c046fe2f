#include "calibrate/fit_gemm.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "calibrate/minimise.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

// Filling a pipeline takes at least one round trip to memory, about 0.6 us on these devices, of
// which a kernel that keeps loading the next tile hides most.
constexpr double kLeastTileSeconds = 0.1e-6;
constexpr double kClip =
    0.5;  // a point further off than this is an outlier; it counts, but no more

std::array<double*, 5> constants(GemmModel& m) {
  return {&m.flops_per_s_per_sm, &m.operand_bytes_per_s_per_sm, &m.tile_s, &m.launch_s,
          &m.bytes_per_s};
}

/// Zero for constants that hardware can have; grows outside.
double beyond(const GemmModel& m, const Limits& limits) {
  const auto over = [](double value, double most) { return std::max(0.0, std::log(value / most)); };
  return over(m.flops_per_s_per_sm, limits.flops_per_s_per_sm) +
         over(m.bytes_per_s, limits.bytes_per_s) + over(kLeastTileSeconds, m.tile_s);
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

void fit_model(GemmTable& table, const std::vector<GemmPoint>& points, const Limits& limits,
               const std::vector<int>& fixed) {
  std::vector<double> x;
  std::vector<int> free;
  for (int i = 0; i < 5; ++i) {
    if (std::find(fixed.begin(), fixed.end(), i) != fixed.end()) continue;
    free.push_back(i);
    x.push_back(std::log(*constants(table.model)[static_cast<std::size_t>(i)]));
  }
  const auto with = [&](const std::vector<double>& logs) {
    GemmModel model = table.model;
    for (std::size_t j = 0; j < free.size(); ++j) {
      *constants(model)[static_cast<std::size_t>(free[j])] = std::exp(logs[j]);
    }
    return model;
  };
  const auto loss = [&](const std::vector<double>& logs) {
    const GemmModel model = with(logs);
    double sum = 0;
    for (const GemmPoint& p : points) {
      const double s = gemm_skeleton_s(model, gemm_of(table, p), p.sms, 1);
      sum += std::min(std::abs(std::log(p.seconds / s)), kClip);
    }
    return sum / static_cast<double>(points.size()) + beyond(model, limits);
  };
  for (int restart = 0; restart < 3; ++restart) minimise(x, 0.3, 120, loss);
  table.model = with(x);
}

bool held_out(std::int64_t n, std::int64_t k) {
  // splitmix64 of the pair.
  std::uint64_t h =
      static_cast<std::uint64_t>(n) * 0x9e3779b97f4a7c15ULL + static_cast<std::uint64_t>(k);
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ULL;
  h = (h ^ (h >> 27)) * 0x94d049bb133111ebULL;
  return (h ^ (h >> 31)) % 5 == 0;
}

std::vector<GemmPoint> thin(const GemmTable& table, const std::vector<GemmPoint>& points) {
  const auto octave = [](std::int64_t v, double width) {
    return static_cast<int>(std::floor(std::log2(static_cast<double>(v)) / width + 1e-9));
  };
  using GridCell = std::array<int, 4>;
  std::map<GridCell, std::vector<std::pair<double, GemmPoint>>> cells;
  for (const GemmPoint& p : points) {
    const double residual =
        std::log(p.seconds / gemm_skeleton_s(table.model, gemm_of(table, p), p.sms, 1));
    // m by factors of four (its effect is mostly in the waves), layers by factors of two.
    cells[{octave(p.m, 2), octave(p.n, 1), octave(p.k, 1), octave(p.groups, 1)}].push_back(
        {residual, p});
  }
  std::vector<GemmPoint> chosen;
  for (auto& [cell, members] : cells) {
    std::sort(members.begin(), members.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    chosen.push_back(members[members.size() / 2].second);
  }
  return chosen;
}

HeldOutError summarise(const std::string& family, std::vector<double> ratios) {
  HeldOutError error{.family = family, .points = ratios.size()};
  if (ratios.empty()) return error;
  error.bias = median(ratios) - 1;
  for (double& r : ratios) r = std::abs(r - 1);
  std::sort(ratios.begin(), ratios.end());
  error.median = ratios[ratios.size() / 2];
  error.percentile_68 = ratios[ratios.size() * 68 / 100];
  error.percentile_90 = ratios[ratios.size() * 9 / 10];
  return error;
}

HeldOutError error_on(const GemmTable& table, const std::vector<GemmPoint>& points,
                      const std::string& family) {
  std::vector<double> ratios;
  ratios.reserve(points.size());
  for (const GemmPoint& p : points) {
    ratios.push_back(table_seconds(table, gemm_of(table, p), p.sms, 1) / p.seconds);
  }
  return summarise(family, std::move(ratios));
}

HeldOutError leave_one_out(const GemmTable& table, const std::string& family) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < table.points.size(); ++i) {
    GemmTable others = table;
    others.points.erase(others.points.begin() + static_cast<std::ptrdiff_t>(i));
    const GemmPoint& p = table.points[i];
    ratios.push_back(table_seconds(others, gemm_of(table, p), p.sms, 1) / p.seconds);
  }
  return summarise(family, std::move(ratios));
}

}  // namespace orrery
