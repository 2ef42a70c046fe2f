#include "calibrate/fit_attention.hpp"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "calibrate/minimise.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {

void fit_attention(AttentionTable& table, double peak_flops_per_s_per_sm) {
  std::vector<double> x{std::log(0.7 * peak_flops_per_s_per_sm), std::log(1e-6), std::log(5e-6)};
  const auto model = [](const std::vector<double>& logs) {
    return AttentionModel{std::exp(logs[0]), std::exp(logs[1]), std::exp(logs[2])};
  };
  const auto loss = [&](const std::vector<double>& logs) {
    const AttentionModel m = model(logs);
    double sum = 0;
    for (const AttentionPoint& p : table.points) {
      sum += std::min(std::abs(std::log(p.seconds / attention_skeleton_s(m, p.shape, p.sms))), 2.0);
    }
    // No faster than the data sheet, no more than a fifth of a millisecond to start.
    return sum / static_cast<double>(table.points.size()) +
           std::max(0.0, std::log(m.flops_per_s_per_sm / peak_flops_per_s_per_sm)) +
           std::max(0.0, std::log(m.launch_s / 2e-4));
  };
  for (int restart = 0; restart < 3; ++restart) minimise(x, 0.3, 150, loss);
  table.model = model(x);
  prepare(table);
}

HeldOutError leave_one_out(const AttentionTable& table, const std::string& family) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < table.points.size(); ++i) {
    AttentionTable others = table;
    others.points.erase(others.points.begin() + static_cast<std::ptrdiff_t>(i));
    const AttentionPoint& p = table.points[i];
    ratios.push_back(table_seconds(others, p.shape, p.sms) / p.seconds);
  }
  return summarise(family, std::move(ratios));
}

}  // namespace orrery
