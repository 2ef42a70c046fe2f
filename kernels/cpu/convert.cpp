#include "kernels/cpu/convert.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

// Sanitizers instrument the functions that choose among clones, which run before they are ready.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define ORRERY_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define ORRERY_CLONES
#endif

namespace orrery::kernels::cpu {
namespace {

constexpr std::int64_t kLanes = 16;

}  // namespace

ORRERY_CLONES
void floats_of_bf16(const std::uint16_t* __restrict from, float* __restrict to,
                    std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = std::bit_cast<float>(static_cast<std::uint32_t>(from[i]) << 16);
  }
}

ORRERY_CLONES
void floats_of_e4m3(const std::uint8_t* __restrict from, float scale, float* __restrict to,
                    std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t code = from[i];
    const std::uint32_t magnitude = code & 0x7FU;
    // Normal: the exponent's bias becomes 127. Subnormal: steps of 2^-9. All ones: NaN.
    const std::uint32_t normal = (magnitude << 20) + ((127U - 7U) << 23);
    const auto subnormal = std::bit_cast<std::uint32_t>(
        static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-9F);
    std::uint32_t bits = magnitude < 8U ? subnormal : normal;
    bits = magnitude == 0x7FU ? 0x7FC00000U : bits;
    to[i] = std::bit_cast<float>(bits | (code & 0x80U) << 24) * scale;
  }
}

ORRERY_CLONES
void bf16_of_floats(const float* __restrict from, std::uint16_t* __restrict to,
                    std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(from[i]);
    const std::uint32_t rounded = (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
    const std::uint32_t quiet = bits >> 16 | 0x40U;
    to[i] = static_cast<std::uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? quiet : rounded);
  }
}

ORRERY_CLONES
float exp_minus(float* __restrict x, std::int64_t count, float shift) {
  // exp(y) = 2^n exp(r) with n the nearest integer to y / ln 2 and |r| <= ln 2 / 2, where the
  // Taylor polynomial of degree 7 is within 2^-27. ln 2 in two parts, so that n * the first is
  // exact (Cody and Waite).
  constexpr float kLog2E = 1.44269504088896341F;
  constexpr float kLn2High = 0.693359375F;
  constexpr float kLn2Low = -2.12194440054690583e-4F;
  constexpr float kRound = 0x1.8p23F;  // adding it leaves an integer in the low bits
  constexpr float kSmallest = -87.3F;  // exp of it is a normal number yet
  for (std::int64_t i = 0; i < count; ++i) {
    const float y = x[i] - shift;
    const float bounded = y > kSmallest ? y : kSmallest;
    const float shifted = bounded * kLog2E + kRound;
    const float n = shifted - kRound;
    const float r = (bounded - n * kLn2High) - n * kLn2Low;
    float p = 1.0F / 5040;
    p = p * r + 1.0F / 720;
    p = p * r + 1.0F / 120;
    p = p * r + 1.0F / 24;
    p = p * r + 1.0F / 6;
    p = p * r + 0.5F;
    p = p * (r * r) + r + 1.0F;
    const std::uint32_t exponent = std::bit_cast<std::uint32_t>(shifted) << 23;  // n, modulo 2^9
    const float power = std::bit_cast<float>(exponent + (127U << 23));
    x[i] = y > kSmallest ? p * power : 0.0F;
  }
  // A fixed number of partial sums: their order does not depend on the vectors' width.
  float sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane];
  }
  for (std::int64_t lane = 0; i < count; ++i, ++lane) sums[lane] += x[i];
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

ORRERY_CLONES
float largest_of(const float* x, std::int64_t count) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    }
  }
  float largest = lanes[0];
  for (; i < count; ++i) largest = std::max(largest, x[i]);
  for (const float lane : lanes) largest = std::max(largest, lane);
  return largest;
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
