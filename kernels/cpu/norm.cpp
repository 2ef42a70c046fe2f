#include <cmath>

#include "kernels/cpu/clones.hpp"
#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"

namespace orrery::kernels::cpu {
namespace {

struct Moments {
  float mean = 0;
  float inverse = 0;
};

ORRERY_CLONES
float sum_of_all(const float* x, std::int64_t count) {
  return sum_of(count, [=](std::int64_t i) { return x[i]; });
}
ORRERY_CLONES
float sum_of_squares(const float* x, float mean, std::int64_t count) {
  return sum_of(count, [=](std::int64_t i) { return (x[i] - mean) * (x[i] - mean); });
}
ORRERY_CLONES
float sum_of_products(const float* __restrict a, const float* __restrict b, std::int64_t count) {
  return sum_of(count, [=](std::int64_t i) { return a[i] * b[i]; });
}

Moments moments_of(const float* x, std::int64_t width, float epsilon, bool centred) {
  Moments m;
  const auto count = static_cast<float>(width);
  if (centred) m.mean = sum_of_all(x, width) / count;
  const float squares = sum_of_squares(x, m.mean, width);
  m.inverse = 1 / std::sqrt(squares / count + epsilon);
  return m;
}

/// x = (x - mean) / rms * gain.
ORRERY_CLONES
void normalise(float* __restrict x, Moments m, const float* __restrict gain, std::int64_t width) {
  for (std::int64_t c = 0; c < width; ++c) x[c] = (x[c] - m.mean) * m.inverse * gain[c];
}

/// x becomes h, and the gradient of y that of h; the gain's gradient is added to.
ORRERY_CLONES
void gain_gradient(float* __restrict x, float* __restrict d, Moments m,
                   const float* __restrict gain, float* __restrict d_gain, std::int64_t width) {
  for (std::int64_t c = 0; c < width; ++c) {
    const float h = (x[c] - m.mean) * m.inverse;
    x[c] = h;
    d_gain[c] += d[c] * h;
    d[c] *= gain[c];
  }
}

ORRERY_CLONES
void x_gradient(const float* __restrict h, float* __restrict g, float mean_g, float mean_gh,
                float inverse, std::int64_t width) {
  for (std::int64_t c = 0; c < width; ++c) g[c] = (g[c] - mean_g - h[c] * mean_gh) * inverse;
}

/// Rows whose gains' gradients are summed by themselves before all are.
constexpr std::int64_t kRowsOfPart = 64;

}  // namespace

void run(const NormForward& n) {
  const std::int64_t columns = n.y.columns, width = columns / n.segments;
  std::vector<float> gain(static_cast<std::size_t>(width)), bias(n.bias ? gain.size() : 0);
  load_row(n.gain, 0, gain.data());
  if (n.bias) load_row(n.bias, 0, bias.data());
  for_rows(n.y.rows, columns, [&](std::int64_t first, std::int64_t last) {
    float* x = row_buffer(0, columns);
    float* scratch = row_buffer(1, columns);
    for (std::int64_t r = first; r < last; ++r) {
      bool any = false;
      for (const Matrix& term : n.terms) {
        if (!term) continue;
        if (any) {
          add_row(term, r, x, scratch);
        } else {
          load_row(term, r, x);
        }
        any = true;
      }
      if (n.sum) {
        store_row(n.sum, r, x);
        if (n.sum.format != Format::fp32) load_row(n.sum, r, x);
      }
      for (std::int64_t s = 0; s < n.segments; ++s) {
        float* part = x + s * width;
        const Moments m = moments_of(part, width, n.epsilon, n.centred);
        normalise(part, m, gain.data(), width);
        if (n.bias) add_floats(bias.data(), part, width);
      }
      store_row(n.y, r, x);
    }
  });
}

// With h = (x - mean) / rms and g = d_y * gain: d_x = (g - mean(g) [centred] - h mean(g h)) / rms.
void run(const NormBackward& n) {
  const std::int64_t columns = n.x.columns, width = columns / n.segments;
  std::vector<float> gain(static_cast<std::size_t>(width));
  load_row(n.gain, 0, gain.data());
  const std::int64_t parts = (n.x.rows + kRowsOfPart - 1) / kRowsOfPart;
  // Gains' gradients, then biases', of each part.
  std::vector<float> sums(static_cast<std::size_t>(parts * 2 * width), 0.0F);
  const auto rows = [&](std::int64_t part, std::int64_t first, std::int64_t last) {
    float* x = row_buffer(0, columns);
    float* d = row_buffer(1, columns);
    float* scratch = row_buffer(2, columns);
    float* d_gain = sums.data() + part * 2 * width;
    float* d_bias = d_gain + width;
    for (std::int64_t r = first; r < last; ++r) {
      load_row(n.x, r, x);
      load_row(n.d_y, r, d);
      for (std::int64_t s = 0; s < n.segments; ++s) {
        float* h = x + s * width;
        float* g = d + s * width;
        const Moments m = moments_of(h, width, n.epsilon, n.centred);
        const auto count = static_cast<float>(width);
        if (n.centred) add_floats(g, d_bias, width);
        gain_gradient(h, g, m, gain.data(), d_gain, width);
        const float mean_gh = sum_of_products(g, h, width) / count;
        const float mean_g = n.centred ? sum_of_all(g, width) / count : 0.0F;
        x_gradient(h, g, mean_g, mean_gh, m.inverse, width);
      }
      if (n.add) add_row(n.add, r, d, scratch);
      store_row(n.d_x, r, d);
    }
  };
  if (n.x.rows * columns <= kSerialElements) {
    for (std::int64_t p = 0; p < parts; ++p) {
      rows(p, p * kRowsOfPart, std::min(n.x.rows, (p + 1) * kRowsOfPart));
    }
  } else {
    for_blocks(n.x.rows, kRowsOfPart, rows);
  }
  for (std::int64_t p = 0; p < parts; ++p) {
    const float* of_part = sums.data() + p * 2 * width;
    for (std::int64_t c = 0; c < width; ++c) {
      if (n.d_gain != nullptr) n.d_gain[c] += of_part[c];
      if (n.d_bias != nullptr) n.d_bias[c] += of_part[width + c];
    }
  }
}

}  // namespace orrery::kernels::cpu
