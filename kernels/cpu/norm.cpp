#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"

namespace orrery::kernels::cpu {
namespace {

struct Moments {
  float mean = 0;
  float inverse = 0;
};

/// Eight partial sums, so that the loop vectorises with an order that is always the same.
template <class Term>
float sum_of(std::int64_t count, Term term) {
  std::array<float, 16> part{};
  std::int64_t c = 0;
  for (; c + 16 <= count; c += 16) {
    for (std::int64_t i = 0; i < 16; ++i) part[static_cast<std::size_t>(i)] += term(c + i);
  }
  float sum = 0;
  for (; c < count; ++c) sum += term(c);
  for (const float p : part) sum += p;
  return sum;
}

Moments moments_of(const float* x, std::int64_t width, float epsilon, bool centred) {
  Moments m;
  const auto count = static_cast<float>(width);
  if (centred) m.mean = sum_of(width, [&](std::int64_t c) { return x[c]; }) / count;
  const float mean = m.mean;
  const float squares =
      sum_of(width, [&](std::int64_t c) { return (x[c] - mean) * (x[c] - mean); });
  m.inverse = 1 / std::sqrt(squares / count + epsilon);
  return m;
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
        for (std::int64_t c = 0; c < width; ++c) {
          part[c] = (part[c] - m.mean) * m.inverse * gain[static_cast<std::size_t>(c)];
        }
        for (std::size_t c = 0; c < bias.size(); ++c) part[c] += bias[c];
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
        for (std::int64_t c = 0; c < width; ++c) {
          h[c] = (h[c] - m.mean) * m.inverse;
          d_gain[c] += g[c] * h[c];
          d_bias[c] += g[c];
          g[c] *= gain[static_cast<std::size_t>(c)];
        }
        const auto count = static_cast<float>(width);
        const float mean_gh = sum_of(width, [&](std::int64_t c) { return g[c] * h[c]; }) / count;
        const float mean_g =
            n.centred ? sum_of(width, [&](std::int64_t c) { return g[c]; }) / count : 0.0F;
        for (std::int64_t c = 0; c < width; ++c) {
          g[c] = (g[c] - mean_g - h[c] * mean_gh) * m.inverse;
        }
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
