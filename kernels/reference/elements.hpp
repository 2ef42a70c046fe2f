#pragma once
// Elements of matrices one by one, in double.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/call.hpp"

namespace orrery::kernels::reference {

inline float* scale_at(const Matrix& m, std::int64_t row, std::int64_t column) {
  switch (m.scaling) {
    case Scaling::none:
      return nullptr;
    case Scaling::rows:
      return m.scales + column / kTile * m.scale_pitch + row;
    case Scaling::blocks:
      return m.scales + row / kTile * m.scale_pitch + column / kTile;
  }
  return nullptr;
}

/// The element's code as a number, without its scale.
inline float code_at(const Matrix& m, std::int64_t row, std::int64_t column) {
  const std::int64_t i = row * m.pitch + column;
  switch (m.format) {
    case Format::fp32:
      return static_cast<const float*>(m.data)[i];
    case Format::bf16:
      return float_of_bf16(static_cast<const std::uint16_t*>(m.data)[i]);
    case Format::e4m3:
      return float_of_e4m3(static_cast<const std::uint8_t*>(m.data)[i]);
    case Format::e5m6:
      return float_of_e5m6(load_e5m6(m.data, i));
  }
  return 0;
}

inline double element(const Matrix& m, std::int64_t row, std::int64_t column) {
  const float* scale = scale_at(m, row, column);
  return scale == nullptr ? double{code_at(m, row, column)}
                          : double{code_at(m, row, column)} * double{*scale};
}

/// The float on the side of zero, with its last bit set where anything was lost: rounding that
/// again, to at most 22 bits, gives what rounding the double at once gives (Boldo and Melquiond,
/// "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
inline float odd_float_of(double value) {
  const auto nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || !std::isfinite(nearest)) return nearest;
  const float below = std::abs(static_cast<double>(nearest)) > std::abs(value)
                          ? std::nextafter(nearest, 0.0F)
                          : nearest;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(below) | 1U);
}

/// Rounds once, from double to the format; a scaled matrix is given the code's number.
inline void set_code(const Matrix& m, std::int64_t row, std::int64_t column, double value) {
  const std::int64_t i = row * m.pitch + column;
  switch (m.format) {
    case Format::fp32:
      static_cast<float*>(m.data)[i] = static_cast<float>(value);
      return;
    case Format::bf16:
      static_cast<std::uint16_t*>(m.data)[i] = bf16_of(odd_float_of(value));
      return;
    case Format::e4m3:
      static_cast<std::uint8_t*>(m.data)[i] = e4m3_of(odd_float_of(value));
      return;
    case Format::e5m6:
      store_e5m6(m.data, i, e5m6_of(odd_float_of(value)));
      return;
  }
}

/// What a result is before it is rounded: value(row, column).
using Values = std::function<double(std::int64_t, std::int64_t)>;

/// The scale of a tile whose largest magnitude this is (Scaling's rule).
inline float scale_of(float largest, Format format) {
  if (largest == 0) return 1;
  if (format == Format::e4m3) return largest / kE4m3Max;
  int exponent = 0;  // largest = f * 2^exponent with f in [0.5, 1)
  const float fraction = std::frexp(largest, &exponent);
  return std::ldexp(1.0F, fraction == 0.5F ? exponent - 1 : exponent);
}

/// Writes the first `rows` rows, quantised where the matrix has scales.
inline void store(const Matrix& m, std::int64_t rows, const Values& value) {
  if (m.scaling == Scaling::none) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < m.columns; ++c) set_code(m, r, c, value(r, c));
    }
    return;
  }
  const std::int64_t tall = m.scaling == Scaling::rows ? 1 : kTile;
  for (std::int64_t r0 = 0; r0 < rows; r0 += tall) {
    for (std::int64_t c0 = 0; c0 < m.columns; c0 += kTile) {
      const std::int64_t r1 = std::min(rows, r0 + tall), c1 = std::min(m.columns, c0 + kTile);
      float largest = 0;
      for (std::int64_t r = r0; r < r1; ++r) {
        for (std::int64_t c = c0; c < c1; ++c) {
          largest = std::max(largest, std::abs(static_cast<float>(value(r, c))));
        }
      }
      const float scale = scale_of(largest, m.format);
      *scale_at(m, r0, c0) = scale;
      for (std::int64_t r = r0; r < r1; ++r) {
        for (std::int64_t c = c0; c < c1; ++c) {
          set_code(m, r, c, static_cast<float>(value(r, c)) / scale);
        }
      }
    }
  }
}

/// The matrix's first `rows` rows.
inline std::vector<double> load(const Matrix& m, std::int64_t rows) {
  std::vector<double> values(static_cast<std::size_t>(rows * m.columns));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < m.columns; ++c) {
      values[static_cast<std::size_t>(r * m.columns + c)] = element(m, r, c);
    }
  }
  return values;
}
inline std::vector<double> load(const Matrix& m) {
  return load(m, m.rows);
}

/// As Values, of an array with `columns` a row.
inline Values in_rows(const std::vector<double>& values, std::int64_t columns) {
  return [&values, columns](std::int64_t r, std::int64_t c) {
    return values[static_cast<std::size_t>(r * columns + c)];
  };
}

inline std::int64_t rows_in_use(const std::int32_t* used, const Matrix& m) {
  return used == nullptr ? m.rows : *used;
}

}  // namespace orrery::kernels::reference
