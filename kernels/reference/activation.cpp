#include <numbers>

#include "kernels/reference/elements.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::reference {
namespace {

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

/// Distribution and density of the standard normal.
double normal_below(double x) {
  return 0.5 * std::erfc(-x / std::numbers::sqrt2);
}
double normal_density(double x) {
  return std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
}

}  // namespace

void run(const ActivationForward& a) {
  const std::int64_t rows = rows_in_use(a.used_rows, a.in), width = a.out.columns;
  store(a.out, rows, [&](std::int64_t r, std::int64_t c) {
    const double weight = a.row_weight == nullptr ? 1.0 : double{a.row_weight[r]};
    if (weight == 0) return 0.0;
    const double x = element(a.in, r, c);
    if (a.kind == Activation::gelu) return x * normal_below(x) * weight;
    return x * sigmoid(x) * element(a.in, r, c + width) * weight;
  });
}

void run(const ActivationBackward& a) {
  const std::int64_t rows = rows_in_use(a.used_rows, a.in), width = a.d_out.columns;
  const std::int64_t columns = a.in.columns;
  std::vector<double> d_in(static_cast<std::size_t>(rows * columns));
  std::vector<double> again(static_cast<std::size_t>(rows * width));
  for (std::int64_t r = 0; r < rows; ++r) {
    const double weight = a.row_weight == nullptr ? 1.0 : double{a.row_weight[r]};
    if (weight == 0) continue;
    for (std::int64_t c = 0; c < width; ++c) {
      const double x = element(a.in, r, c), d = element(a.d_out, r, c) * weight;
      const auto at = static_cast<std::size_t>(r * columns + c);
      const auto out = static_cast<std::size_t>(r * width + c);
      if (a.kind == Activation::gelu) {
        d_in[at] = d * (normal_below(x) + x * normal_density(x));
        again[out] = x * normal_below(x) * weight;
        continue;
      }
      const double up = element(a.in, r, c + width), s = sigmoid(x);
      d_in[at] = d * up * (s + x * s * (1 - s));
      d_in[at + static_cast<std::size_t>(width)] = d * x * s;
      again[out] = x * s * up * weight;
    }
  }
  store(a.d_in, rows, in_rows(d_in, columns));
  if (a.out_again) store(a.out_again, rows, in_rows(again, width));
}

void run(const RowDot& dot) {
  const std::int64_t rows = rows_in_use(dot.used_rows, dot.a);
  for (std::int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (std::int64_t c = 0; c < dot.a.columns; ++c)
      sum += element(dot.a, r, c) * element(dot.b, r, c);
    const double weight = dot.row_weight[r];
    dot.out[r] = weight == 0 ? 0.0F : static_cast<float>(sum / weight);
  }
}

}  // namespace orrery::kernels::reference
