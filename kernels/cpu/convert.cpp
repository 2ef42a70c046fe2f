#include "kernels/cpu/convert.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

#include "kernels/cpu/clones.hpp"

namespace orrery::kernels::cpu {
namespace {

/// Codes that are unpacked at once.
constexpr std::int64_t kPacked = 128;

/// An integer that is larger where the float is: loops over maxima of integers are vectorised.
inline std::int32_t in_order(float x) {
  const auto bits = std::bit_cast<std::int32_t>(x);
  return bits ^ (bits >> 31 & 0x7FFFFFFF);
}

}  // namespace

ORRERY_CLONES
void floats_of_bf16(const std::uint16_t* __restrict from, float* __restrict to,
                    std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = from_bf16(from[i]);
}

ORRERY_CLONES
void floats_of_e4m3(const std::uint8_t* __restrict from, float scale, float* __restrict to,
                    std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = from_e4m3(from[i]) * scale;
}

ORRERY_CLONES
void floats_of_e5m6(const std::uint8_t* __restrict from, float scale, float* __restrict to,
                    std::int64_t count) {
  std::uint16_t codes[kPacked];
  for (std::int64_t first = 0; first < count; first += kPacked) {
    const std::int64_t some = std::min(kPacked, count - first);
    for (std::int64_t i = 0; i < some / 2; ++i) {
      const std::uint8_t* byte = from + (first / 2 + i) * 3;
      const std::uint32_t pair = byte[0] | byte[1] << 8 | byte[2] << 16;
      codes[2 * i] = static_cast<std::uint16_t>(pair & 0xFFF);
      codes[2 * i + 1] = static_cast<std::uint16_t>(pair >> 12);
    }
    for (std::int64_t i = 0; i < some; ++i) to[first + i] = from_e5m6(codes[i]) * scale;
  }
}

ORRERY_CLONES
void bf16_of_floats(const float* __restrict from, std::uint16_t* __restrict to,
                    std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = to_bf16(from[i]);
}

ORRERY_CLONES
void e4m3_of_floats(const float* __restrict from, float scale, std::uint8_t* __restrict to,
                    std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = to_e4m3(from[i] / scale);
}

ORRERY_CLONES
void e5m6_of_floats(const float* __restrict from, float scale, std::uint8_t* __restrict to,
                    std::int64_t count) {
  std::uint16_t codes[kPacked];
  for (std::int64_t first = 0; first < count; first += kPacked) {
    const std::int64_t some = std::min(kPacked, count - first);
    for (std::int64_t i = 0; i < some; ++i) codes[i] = to_e5m6(from[first + i] / scale);
    for (std::int64_t i = 0; i < some / 2; ++i) {
      std::uint8_t* byte = to + (first / 2 + i) * 3;
      const std::uint32_t pair = codes[2 * i] | static_cast<std::uint32_t>(codes[2 * i + 1]) << 12;
      byte[0] = static_cast<std::uint8_t>(pair);
      byte[1] = static_cast<std::uint8_t>(pair >> 8);
      byte[2] = static_cast<std::uint8_t>(pair >> 16);
    }
  }
}

ORRERY_CLONES
void add_bf16(const std::uint16_t* __restrict from, float* __restrict to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] += from_bf16(from[i]);
}
ORRERY_CLONES
void add_floats(const float* __restrict from, float* __restrict to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] += from[i];
}

ORRERY_CLONES
float exp_minus(float* __restrict x, std::int64_t count, float shift) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = exponential(x[i] - shift);
  return sum_of(count, [x](std::int64_t i) { return x[i]; });
}

ORRERY_CLONES
void cosines_and_sines(std::int32_t position, const double* __restrict frequency,
                       float* __restrict cosine, float* __restrict sine, std::int64_t count) {
  // pi / 2 in three parts, so that quotients of 31 bits times the first two are exact (Cody and
  // Waite); then Taylor's polynomials on [-pi / 4, pi / 4], within 2e-11 and 4e-10.
  constexpr double kHalfPi1 = 0x1.921fb4p+0;
  constexpr double kHalfPi2 = 0x1.4442d0p-24;
  constexpr double kHalfPi3 = 0x1.8469898cc5170p-48;
  constexpr double kRound = 0x1.8p52;  // adding it leaves an integer in the low bits
  for (std::int64_t i = 0; i < count; ++i) {
    const double angle = position * frequency[i];
    const double shifted = angle * (2 / std::numbers::pi) + kRound;
    const double n = shifted - kRound;
    const auto quarter = std::bit_cast<std::uint64_t>(shifted);
    const double x = ((angle - n * kHalfPi1) - n * kHalfPi2) - n * kHalfPi3;
    const double y = x * x;
    double s = -1.0 / 39916800;
    s = s * y + 1.0 / 362880;
    s = s * y - 1.0 / 5040;
    s = s * y + 1.0 / 120;
    s = s * y - 1.0 / 6;
    s = s * y * x + x;
    double c = -1.0 / 3628800;
    c = c * y + 1.0 / 40320;
    c = c * y - 1.0 / 720;
    c = c * y + 1.0 / 24;
    c = c * y - 0.5;
    c = c * y + 1;
    const bool odd = (quarter & 1) != 0;
    const double to_cosine = odd ? s : c, to_sine = odd ? c : s;
    cosine[i] = static_cast<float>(((quarter + 1) & 2) != 0 ? -to_cosine : to_cosine);
    sine[i] = static_cast<float>((quarter & 2) != 0 ? -to_sine : to_sine);
  }
}

ORRERY_CLONES
float largest_of(const float* x, std::int64_t count) {
  std::int32_t largest = in_order(-std::numeric_limits<float>::infinity());
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, in_order(x[i]));
  return std::bit_cast<float>(largest ^ (largest >> 31 & 0x7FFFFFFF));
}

ORRERY_CLONES
float largest_magnitude(const float* x, std::int64_t count) {
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t magnitude = std::bit_cast<std::int32_t>(x[i]) & 0x7FFFFFFF;
    largest = std::max(largest, magnitude > 0x7F800000 ? 0 : magnitude);
  }
  return std::bit_cast<float>(largest);
}

Panel panel_of(const Matrix& m, std::int64_t row, std::int64_t column, std::int64_t rows,
               std::int64_t columns, float* buffer) {
  const std::int64_t begin = row * m.pitch + column;
  if (m.format == Format::fp32) return {static_cast<const float*>(m.data) + begin, m.pitch};
  for (std::int64_t r = 0; r < rows; ++r) {
    float* to = buffer + r * columns;
    if (m.format == Format::bf16) {
      floats_of_bf16(static_cast<const std::uint16_t*>(m.data) + begin + r * m.pitch, to, columns);
      continue;
    }
    const auto* codes = static_cast<const std::uint8_t*>(m.data) + begin + r * m.pitch;
    for (std::int64_t c = 0; c < columns; c += kTile) {
      const std::int64_t tile = (column + c) / kTile;
      const float scale = m.scaling == Scaling::rows
                              ? m.scales[tile * m.scale_pitch + row + r]
                              : m.scales[(row + r) / kTile * m.scale_pitch + tile];
      floats_of_e4m3(codes + c, scale, to + c, std::min(kTile, columns - c));
    }
  }
  return {buffer, columns};
}

void store_panel(const Matrix& m, std::int64_t row, std::int64_t column, std::int64_t rows,
                 std::int64_t columns, const Panel& from) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t begin = (row + r) * m.pitch + column;
    const float* values = from.data + r * from.pitch;
    if (m.format == Format::fp32) {
      std::memcpy(static_cast<float*>(m.data) + begin, values,
                  static_cast<std::size_t>(columns) * sizeof(float));
    } else {
      bf16_of_floats(values, static_cast<std::uint16_t*>(m.data) + begin, columns);
    }
  }
}

}  // namespace orrery::kernels::cpu
