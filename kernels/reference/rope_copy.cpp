#include <cstring>

#include "kernels/reference/elements.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::reference {

void run(const Rope& rope) {
  for (std::int64_t r = 0; r < rope.x.rows; ++r) {
    for (std::int64_t i = 0; i < rope.dim / 2; ++i) {
      const double frequency =
          std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(rope.dim));
      const double angle = rope.positions[r] * frequency * (rope.inverse ? -1 : 1);
      const double cosine = std::cos(angle), sine = std::sin(angle);
      for (std::int64_t h = 0; h < rope.heads; ++h) {
        const std::int64_t column = h * rope.head_dim + rope.offset + 2 * i;
        const double a = element(rope.x, r, column), b = element(rope.x, r, column + 1);
        set_code(rope.x, r, column, a * cosine - b * sine);
        set_code(rope.x, r, column + 1, a * sine + b * cosine);
      }
    }
  }
}

void run(const HeadCopy& copy) {
  for (std::int64_t r = 0; r < copy.to.rows; ++r) {
    for (std::int64_t c = 0; c < copy.width; ++c) {
      double sum = 0;
      for (std::int64_t h = 0; h < copy.heads; ++h) {
        const double value = element(copy.from, r, copy.from_offset + h * copy.from_stride + c);
        sum += value;
        if (!copy.sum_heads) {
          set_code(copy.to, r, copy.to_offset + h * copy.to_stride + c, value);
        }
      }
      if (copy.sum_heads) set_code(copy.to, r, copy.to_offset + c, sum);
    }
  }
}

void run(const Add& add) {
  std::vector<double> sum(static_cast<std::size_t>(add.out.rows * add.out.columns), 0.0);
  for (const Matrix& term : add.terms) {
    if (!term) continue;
    const std::vector<double> values = load(term);
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += values[i];
  }
  store(add.out, add.out.rows, in_rows(sum, add.out.columns));
}

void run(const Copy& copy) {
  for (std::int64_t r = 0; r < copy.to.rows; ++r) {
    for (std::int64_t c = 0; c < copy.to.columns; ++c) {
      set_code(copy.to, r, c, code_at(copy.from, r, c));
      if (copy.to.scaling != Scaling::none) {
        *scale_at(copy.to, r, c) = *scale_at(copy.from, r, c);
      }
    }
  }
}

void run(const Fill& fill) {
  std::memset(fill.data, 0, static_cast<std::size_t>(fill.bytes));
}

void run(const Loopback& copy) {
  std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes));
}

}  // namespace orrery::kernels::reference
