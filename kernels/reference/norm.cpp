#include "kernels/reference/elements.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::reference {
namespace {

/// Of one segment of a row: mean (0 unless it is taken off) and 1 / root mean square about it.
struct Moments {
  double mean = 0;
  double inverse = 0;
};

Moments moments_of(const double* x, std::int64_t width, double epsilon, bool centred) {
  Moments m;
  const auto count = static_cast<double>(width);
  if (centred) {
    for (std::int64_t c = 0; c < width; ++c) m.mean += x[c];
    m.mean /= count;
  }
  double squares = 0;
  for (std::int64_t c = 0; c < width; ++c) squares += (x[c] - m.mean) * (x[c] - m.mean);
  m.inverse = 1 / std::sqrt(squares / count + epsilon);
  return m;
}

}  // namespace

void run(const NormForward& n) {
  const std::int64_t rows = n.y.rows, columns = n.y.columns, width = columns / n.segments;
  std::vector<double> x(static_cast<std::size_t>(rows * columns), 0.0);
  for (const Matrix& term : n.terms) {
    if (!term) continue;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) {
        x[static_cast<std::size_t>(r * columns + c)] += element(term, r, c);
      }
    }
  }
  if (n.sum) {
    store(n.sum, rows, in_rows(x, columns));
    x = load(n.sum);
  }
  std::vector<double> y(x.size());
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t s = 0; s < n.segments; ++s) {
      const auto first = static_cast<std::size_t>(r * columns + s * width);
      const Moments m = moments_of(x.data() + first, width, n.epsilon, n.centred);
      for (std::int64_t c = 0; c < width; ++c) {
        const auto i = first + static_cast<std::size_t>(c);
        y[i] = (x[i] - m.mean) * m.inverse * element(n.gain, 0, c);
        if (n.bias) y[i] += element(n.bias, 0, c);
      }
    }
  }
  store(n.y, rows, in_rows(y, columns));
}

// With h = (x - mean) / rms and g = d_y * gain: d_x = (g - mean(g) [centred] - h mean(g h)) / rms.
void run(const NormBackward& n) {
  const std::int64_t rows = n.x.rows, columns = n.x.columns, width = columns / n.segments;
  const std::vector<double> x = load(n.x), d_y = load(n.d_y);
  std::vector<double> d_x(x.size());
  std::vector<double> d_gain(static_cast<std::size_t>(width), 0.0), d_bias(d_gain);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t s = 0; s < n.segments; ++s) {
      const auto first = static_cast<std::size_t>(r * columns + s * width);
      const Moments m = moments_of(x.data() + first, width, n.epsilon, n.centred);
      double mean_g = 0, mean_gh = 0;
      for (std::int64_t c = 0; c < width; ++c) {
        const auto i = first + static_cast<std::size_t>(c);
        const double h = (x[i] - m.mean) * m.inverse, g = d_y[i] * element(n.gain, 0, c);
        mean_g += g / static_cast<double>(width);
        mean_gh += g * h / static_cast<double>(width);
        d_gain[static_cast<std::size_t>(c)] += d_y[i] * h;
        d_bias[static_cast<std::size_t>(c)] += d_y[i];
      }
      if (!n.centred) mean_g = 0;
      for (std::int64_t c = 0; c < width; ++c) {
        const auto i = first + static_cast<std::size_t>(c);
        const double h = (x[i] - m.mean) * m.inverse, g = d_y[i] * element(n.gain, 0, c);
        d_x[i] = (g - mean_g - h * mean_gh) * m.inverse;
        if (n.add) d_x[i] += element(n.add, r, s * width + c);
      }
    }
  }
  store(n.d_x, rows, in_rows(d_x, columns));
  for (std::int64_t c = 0; c < width; ++c) {
    const auto i = static_cast<std::size_t>(c);
    if (n.d_gain != nullptr) n.d_gain[c] = static_cast<float>(n.d_gain[c] + d_gain[i]);
    if (n.d_bias != nullptr) n.d_bias[c] = static_cast<float>(n.d_bias[c] + d_bias[i]);
  }
}

}  // namespace orrery::kernels::reference
