#pragma once
// Rows of matrices as spans of floats, in loops that compilers vectorise, and loops over rows that
// use threads where they pay.

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/call.hpp"

namespace orrery::kernels::cpu {

/// A row's worth of floats that lives as long as the thread. `which`: as many as a kernel needs at
/// once.
inline float* row_buffer(int which, std::int64_t elements) {
  thread_local std::array<std::vector<float>, 6> buffers;
  std::vector<float>& buffer = buffers[static_cast<std::size_t>(which)];
  if (buffer.size() < static_cast<std::size_t>(elements)) {
    buffer.resize(static_cast<std::size_t>(elements));
  }
  return buffer.data();
}

inline constexpr std::int64_t kSerialElements = 32 * 1024;  ///< a task costs as much as these
inline constexpr std::int64_t kTaskElements = 16 * 1024;

/// body(first, last) over pieces of [0, rows), each of so many elements that a task pays. What a
/// piece does must not depend on where it ends.
template <class Body>
void for_rows(std::int64_t rows, std::int64_t elements_per_row, Body body) {
  if (rows <= 0) return;
  if (rows * elements_per_row <= kSerialElements || rows == 1) {
    body(std::int64_t{0}, rows);
    return;
  }
  const std::int64_t grain =
      std::max<std::int64_t>(1, kTaskElements / std::max<std::int64_t>(1, elements_per_row));
  oneapi::tbb::parallel_for(
      oneapi::tbb::blocked_range<std::int64_t>(0, rows, static_cast<std::size_t>(grain)),
      [&](const oneapi::tbb::blocked_range<std::int64_t>& r) { body(r.begin(), r.end()); });
}

/// body(block, first, last) over blocks of `size` of [0, count): blocks that do not depend on
/// threads, for sums whose parts are added up in order.
template <class Body>
void for_blocks(std::int64_t count, std::int64_t size, Body body) {
  const std::int64_t blocks = (count + size - 1) / size;
  if (blocks <= 1) {
    if (count > 0) body(std::int64_t{0}, std::int64_t{0}, count);
    return;
  }
  oneapi::tbb::parallel_for(std::int64_t{0}, blocks, [&](std::int64_t b) {
    body(b, b * size, std::min(count, (b + 1) * size));
  });
}

// ---- conversions, as kernels/format.hpp defines them ----

inline float from_bf16(std::uint16_t code) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(code) << 16);
}

inline std::uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t number = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  return static_cast<std::uint16_t>(is_nan ? bits >> 16 | 0x40 : number);
}

/// Of numbers up to 448 in magnitude, and NaN.
inline std::uint8_t to_e4m3(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 24 & 0x80;
  const std::uint32_t magnitude = bits & 0x7FFFFFFF;
  // Normal: 3 bits of the fraction stay, the exponent's bias goes from 127 to 7.
  const std::uint32_t normal = ((magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  // Below 2^-6: multiples of 2^-9, rounded by adding 1.5 * 2^23.
  const float scaled = std::bit_cast<float>(magnitude) * 512.0F + 12582912.0F;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(scaled) - 0x4B400000;
  const std::uint32_t number = magnitude < 0x3C800000 ? subnormal : normal;
  return static_cast<std::uint8_t>(sign | (magnitude > 0x7F800000 ? 0x7F : number));
}

/// Of numbers up to kE5m6Max in magnitude.
inline std::uint16_t to_e5m6(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 20 & 0x800;
  const std::uint32_t magnitude = bits & 0x7FFFFFFF;
  const std::uint32_t normal = ((magnitude + 0xFFFF + (magnitude >> 17 & 1)) >> 17) - (112 << 6);
  const float scaled = std::bit_cast<float>(magnitude) * 1048576.0F + 12582912.0F;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(scaled) - 0x4B400000;
  return static_cast<std::uint16_t>(sign | (magnitude < 0x38800000 ? subnormal : normal));
}

inline const std::array<float, 256>& e4m3_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> all{};
    for (int code = 0; code < 256; ++code) {
      all[static_cast<std::size_t>(code)] = float_of_e4m3(static_cast<std::uint8_t>(code));
    }
    return all;
  }();
  return values;
}

template <class T>
T* row_at(const Matrix& m, std::int64_t row) {
  return static_cast<T*>(m.data) + row * m.pitch;
}

inline float scale_of_tile(const Matrix& m, std::int64_t row, std::int64_t tile) {
  return m.scaling == Scaling::rows ? m.scales[tile * m.scale_pitch + row]
                                    : m.scales[row / kTile * m.scale_pitch + tile];
}

/// `count` elements of a row from `first` on (with scales a multiple of 128).
inline void load_row(const Matrix& m, std::int64_t row, std::int64_t first, std::int64_t count,
                     float* out) {
  switch (m.format) {
    case Format::fp32:
      std::memcpy(out, row_at<float>(m, row) + first,
                  static_cast<std::size_t>(count) * sizeof(float));
      return;
    case Format::bf16: {
      const std::uint16_t* codes = row_at<std::uint16_t>(m, row) + first;
      for (std::int64_t c = 0; c < count; ++c) out[c] = from_bf16(codes[c]);
      return;
    }
    case Format::e4m3: {
      const std::uint8_t* codes = row_at<std::uint8_t>(m, row) + first;
      const float* values = e4m3_values().data();
      for (std::int64_t c0 = 0; c0 < count; c0 += kTile) {
        const float scale = scale_of_tile(m, row, (first + c0) / kTile);
        const std::int64_t end = std::min(count, c0 + kTile);
        for (std::int64_t c = c0; c < end; ++c) out[c] = values[codes[c]] * scale;
      }
      return;
    }
    case Format::e5m6:
      for (std::int64_t c0 = 0; c0 < count; c0 += kTile) {
        const float scale = scale_of_tile(m, row, (first + c0) / kTile);
        const std::int64_t end = std::min(count, c0 + kTile);
        for (std::int64_t c = c0; c < end; ++c) {
          out[c] = float_of_e5m6(load_e5m6(m.data, row * m.pitch + first + c)) * scale;
        }
      }
      return;
  }
}
inline void load_row(const Matrix& m, std::int64_t row, float* out) {
  load_row(m, row, 0, m.columns, out);
}

/// Adds instead of setting.
inline void add_row(const Matrix& m, std::int64_t row, float* out, float* scratch) {
  load_row(m, row, scratch);
  for (std::int64_t c = 0; c < m.columns; ++c) out[c] += scratch[c];
}

inline float largest_magnitude(const float* values, std::int64_t count) {
  float largest = 0;
  for (std::int64_t c = 0; c < count; ++c) largest = std::max(largest, std::abs(values[c]));
  return largest;
}

/// Scaling's rule; `largest` of a tile.
inline float scale_for(float largest, Format format) {
  if (largest == 0) return 1;
  if (format == Format::e4m3) return largest / kE4m3Max;
  const auto bits = std::bit_cast<std::uint32_t>(largest);
  const std::uint32_t up = (bits & 0x7FFFFF) != 0 ? 1 : 0;
  return std::bit_cast<float>(((bits >> 23) + up) << 23);
}

inline void encode(const Matrix& m, std::int64_t row, std::int64_t first, std::int64_t count,
                   const float* values, float scale) {
  if (m.format == Format::e4m3) {
    std::uint8_t* codes = row_at<std::uint8_t>(m, row) + first;
    for (std::int64_t c = 0; c < count; ++c) {
      codes[c] = to_e4m3(std::clamp(values[c] / scale, -kE4m3Max, kE4m3Max));
    }
    return;
  }
  for (std::int64_t c = 0; c < count; ++c) {
    store_e5m6(m.data, row * m.pitch + first + c,
               to_e5m6(std::clamp(values[c] / scale, -kE5m6Max, kE5m6Max)));
  }
}

/// A whole row; quantised by its tiles with rows scales (not with blocks, whose tiles are 128
/// rows).
inline void store_row(const Matrix& m, std::int64_t row, const float* values) {
  switch (m.format) {
    case Format::fp32:
      std::memcpy(row_at<float>(m, row), values,
                  static_cast<std::size_t>(m.columns) * sizeof(float));
      return;
    case Format::bf16: {
      std::uint16_t* codes = row_at<std::uint16_t>(m, row);
      for (std::int64_t c = 0; c < m.columns; ++c) codes[c] = to_bf16(values[c]);
      return;
    }
    case Format::e4m3:
    case Format::e5m6:
      for (std::int64_t c = 0; c < m.columns; c += kTile) {
        const std::int64_t count = std::min(kTile, m.columns - c);
        const float scale = scale_for(largest_magnitude(values + c, count), m.format);
        m.scales[c / kTile * m.scale_pitch + row] = scale;
        encode(m, row, c, count, values + c, scale);
      }
      return;
  }
}

inline std::int64_t rows_in_use(const std::int32_t* used, const Matrix& m) {
  return used == nullptr ? m.rows : *used;
}

/// e^x to 2e-7 relative, for x in [-87, 88]; 0 below, infinity is not reached. Cephes' reduction to
/// |r| <= ln 2 / 2 and a polynomial of degree 6 in r, which compilers vectorise.
inline float fast_exp(float x) {
  const float clamped = std::min(std::max(x, -87.0F), 88.0F);
  const float n = std::nearbyint(clamped * 1.44269504F);
  const float r = (clamped - n * 0.693359375F) + n * 2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  const auto power = std::bit_cast<float>((static_cast<std::int32_t>(n) + 127) << 23);
  return x < -87.0F ? 0.0F : p * power;
}

}  // namespace orrery::kernels::cpu
