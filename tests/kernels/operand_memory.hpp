#pragma once
// Memory for operands of Calls in tests: all in one piece that starts as NaN in every format, so
// that what is read without having been written shows, and what is written outside of operands too.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/call.hpp"

namespace orrery::kernels {

class OperandMemory {
 public:
  explicit OperandMemory(std::size_t bytes = std::size_t{8} << 20) : bytes_(bytes, kPoison) {}

  template <class Element>
  Element* array(std::int64_t elements) {
    return reinterpret_cast<Element*>(take(elements * static_cast<std::int64_t>(sizeof(Element))));
  }

  /// Rows `gap` elements longer than they are used.
  Matrix matrix(std::int64_t rows, std::int64_t columns, Format format, std::int64_t gap = 0,
                Scaling scaling = Scaling::none) {
    Matrix m{.rows = rows,
             .columns = columns,
             .pitch = columns + gap,
             .format = format,
             .scaling = scaling};
    m.data = take(element_bytes(rows, m.pitch, format));
    if (scaling != Scaling::none) {
      m.scales = array<float>(scale_elements(rows, columns, scaling));
      m.scale_pitch = scale_pitch_of(rows, columns, scaling);
    }
    return m;
  }

  /// All operands, with what lies around them.
  std::vector<std::byte> contents() const {
    return {bytes_.begin(), bytes_.begin() + static_cast<std::ptrdiff_t>(used_)};
  }
  void set_contents(const std::vector<std::byte>& contents) {
    std::copy(contents.begin(), contents.end(), bytes_.begin());
  }

  /// Where something differs from `before` that `call` does not say it writes, or empty.
  std::string written_outside(const Call& call, const std::vector<std::byte>& before) const {
    std::vector<bool> allowed(before.size());
    for (const Touch& touch : touches_of(call)) {
      if (!touch.written) continue;
      const std::ptrdiff_t begin = static_cast<const std::byte*>(touch.begin) - bytes_.data();
      for (std::int64_t r = 0; r < touch.rows; ++r) {
        const std::ptrdiff_t row = begin + r * touch.pitch_bytes;
        std::fill(allowed.begin() + row, allowed.begin() + row + touch.row_bytes, true);
      }
    }
    for (std::size_t i = 0; i < before.size(); ++i) {
      if (!allowed[i] && bytes_[i] != before[i]) return "byte " + std::to_string(i);
    }
    return {};
  }

 private:
  static constexpr std::byte kPoison{0xFF};

  std::byte* take(std::int64_t bytes) {
    constexpr std::size_t kApart = 64;
    std::byte* const begin = bytes_.data() + used_;
    used_ += (static_cast<std::size_t>(bytes) + 2 * kApart - 1) / kApart * kApart;
    if (used_ > bytes_.size()) throw std::length_error("OperandMemory is too small");
    return begin;
  }

  std::vector<std::byte> bytes_;
  std::size_t used_ = 0;
};

/// Elements uniform in [-1, 1), rounded to the format; e4m3: codes of up to 448 and scales that
/// bring them to [-1, 1], each tile's its own.
inline void fill_random(const Matrix& m, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (std::int64_t r = 0; r < m.rows; ++r) {
    for (std::int64_t c = 0; c < m.columns; ++c) {
      const float x = uniform(random);
      const std::int64_t i = r * m.pitch + c;
      switch (m.format) {
        case Format::fp32:
          static_cast<float*>(m.data)[i] = x;
          break;
        case Format::bf16:
          static_cast<std::uint16_t*>(m.data)[i] = bf16_of(x);
          break;
        case Format::e4m3:
          static_cast<std::uint8_t*>(m.data)[i] = e4m3_of(x * kE4m3Max);
          break;
        case Format::e5m6:
          store_e5m6(m.data, i, e5m6_of(x));
          break;
      }
    }
  }
  if (m.scaling == Scaling::none) return;
  const std::int64_t tiles = (m.columns + kTile - 1) / kTile;
  const std::int64_t rows = m.scaling == Scaling::rows ? m.rows : (m.rows + kTile - 1) / kTile;
  const float largest = m.format == Format::e4m3 ? kE4m3Max : 1;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t t = 0; t < tiles; ++t) {
      const std::int64_t i =
          m.scaling == Scaling::rows ? t * m.scale_pitch + r : r * m.scale_pitch + t;
      m.scales[i] = (0.25F + 0.75F * std::abs(uniform(random))) / largest;
    }
  }
}

/// An element of a matrix without scales.
inline double value_at(const Matrix& m, std::int64_t row, std::int64_t column) {
  const std::int64_t i = row * m.pitch + column;
  return m.format == Format::fp32
             ? double{static_cast<const float*>(m.data)[i]}
             : double{float_of_bf16(static_cast<const std::uint16_t*>(m.data)[i])};
}

inline std::vector<double> values_of(const Matrix& m) {
  std::vector<double> values;
  for (std::int64_t r = 0; r < m.rows; ++r) {
    for (std::int64_t c = 0; c < m.columns; ++c) values.push_back(value_at(m, r, c));
  }
  return values;
}

/// Distance between neighbours of the format around 1: two roundings of nearly the same number are
/// at most this apart, relative to it.
inline double epsilon_of(Format format) {
  return format == Format::bf16 ? 0x1p-7 : 0x1p-23;
}

}  // namespace orrery::kernels
