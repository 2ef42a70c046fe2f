#pragma once
// Conversions as kernels/format.hpp defines them, the exponential and sums: of one element, without
// branches, and of many, vectorised.

#include <bit>
#include <cstdint>

#include "kernels/call.hpp"

namespace orrery::kernels::cpu {

// ---- of one element ----

inline float from_bf16(std::uint16_t code) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(code) << 16);
}
inline std::uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
  const std::uint32_t quiet = bits >> 16 | 0x40U;
  return static_cast<std::uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? quiet : rounded);
}

inline float from_e4m3(std::uint8_t code) {
  const std::uint32_t magnitude = code & 0x7FU;
  // Normal: the exponent's bias becomes 127. Subnormal: steps of 2^-9. All ones: NaN.
  const std::uint32_t normal = (magnitude << 20) + ((127U - 7U) << 23);
  const auto subnormal = std::bit_cast<std::uint32_t>(
      static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-9F);
  std::uint32_t bits = magnitude < 8U ? subnormal : normal;
  bits = magnitude == 0x7FU ? 0x7FC00000U : bits;
  return std::bit_cast<float>(bits | (code & 0x80U) << 24);
}
inline std::uint8_t to_e4m3(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 24 & 0x80U;
  const std::uint32_t all = bits & 0x7FFFFFFFU;
  constexpr auto kLargest = std::bit_cast<std::uint32_t>(kE4m3Max);
  const std::uint32_t magnitude = all < kLargest ? all : kLargest;
  // Normal: 3 bits of the fraction stay, the exponent's bias goes from 127 to 7.
  const std::uint32_t normal = ((magnitude + 0x7FFFFU + (magnitude >> 20 & 1U)) >> 20) - (120 << 3);
  // Below 2^-6: multiples of 2^-9, rounded by adding 1.5 * 2^23.
  const float scaled = std::bit_cast<float>(magnitude) * 512.0F + 0x1.8p23F;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(scaled) - 0x4B400000U;
  const std::uint32_t code = magnitude < 0x3C800000U ? subnormal : normal;
  return static_cast<std::uint8_t>(sign | (all > 0x7F800000U ? 0x7FU : code));
}

inline float from_e5m6(std::uint16_t code) {
  const std::uint32_t magnitude = code & 0x7FFU;
  const std::uint32_t normal = (magnitude << 17) + ((127U - 15U) << 23);
  const auto subnormal = std::bit_cast<std::uint32_t>(
      static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-20F);
  const std::uint32_t bits = magnitude < 64U ? subnormal : normal;
  return std::bit_cast<float>(bits | (code & 0x800U) << 20);
}
/// Not of NaN.
inline std::uint16_t to_e5m6(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 20 & 0x800U;
  const std::uint32_t all = bits & 0x7FFFFFFFU;
  constexpr auto kLargest = std::bit_cast<std::uint32_t>(kE5m6Max);
  const std::uint32_t magnitude = all < kLargest ? all : kLargest;
  const std::uint32_t normal = ((magnitude + 0xFFFFU + (magnitude >> 17 & 1U)) >> 17) - (112 << 6);
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p20F + 0x1.8p23F;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(scaled) - 0x4B400000U;
  return static_cast<std::uint16_t>(sign | (magnitude < 0x38800000U ? subnormal : normal));
}

/// e^x within 2 units in the last place, of x up to 88 (more counts as 88); 0 below -87.3, just
/// above the smallest normal number.
inline float exponential(float x) {
  // exp(x) = 2^n exp(r) with n the nearest integer to x / ln 2 and |r| <= ln 2 / 2, where the
  // Taylor polynomial of degree 7 is within 2^-27. ln 2 in two parts, so that n * the first is
  // exact (Cody and Waite).
  constexpr float kLog2E = 1.44269504088896341F;
  constexpr float kLn2High = 0.693359375F;
  constexpr float kLn2Low = -2.12194440054690583e-4F;
  constexpr float kRound = 0x1.8p23F;  // adding it leaves an integer in the low bits
  constexpr float kSmallest = -87.3F, kLargest = 88.0F;
  // Comparisons are so that NaN stays.
  const float above = x < kSmallest ? kSmallest : x;
  const float bounded = above > kLargest ? kLargest : above;
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
  return x < kSmallest ? 0.0F : p * power;
}

/// The standard normal distribution up to x, to 5e-7 of its value: half of erfc(z) = t exp(-z^2 + a
/// polynomial in t) with z = |x| / sqrt(2), t = 1 / (1 + z / 2) (Press et al., Numerical Recipes in
/// C, 1992, 6.2, erfcc).
inline float normal_below(float x) {
  const float all = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & 0x7FFFFFFFU);
  const float magnitude = all > 20.0F ? 20.0F : all;  // where nothing is left above
  const float t = 1 / (1 + 0.353553391F * magnitude);
  float p = 0.17087277F;
  p = p * t - 0.82215223F;
  p = p * t + 1.48851587F;
  p = p * t - 1.13520398F;
  p = p * t + 0.27886807F;
  p = p * t - 0.18628806F;
  p = p * t + 0.09678418F;
  p = p * t + 0.37409196F;
  p = p * t + 1.00002368F;
  p = p * t - 1.26551223F;
  // x^2 in two parts, the first of which is exact: exp(-x^2 / 2) is off by x^2 / 2 times as much as
  // what it is taken of.
  const float high = std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) & 0xFFFFF000U);
  const float low = (magnitude - high) * (magnitude + high);
  const float above = 0.5F * t * exponential(-0.5F * high * high) * exponential(p - 0.5F * low);
  return x < 0 ? above : 1 - above;
}

inline constexpr std::int64_t kLanes = 16;

/// The sum of term(i) for i < count: as many partial sums as the widest vectors have lanes, so that
/// its order does not depend on the vectors. Inlined into clones.
template <class Term>
[[gnu::always_inline]] inline float sum_of(std::int64_t count, Term term) {
  float sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += term(i + lane);
  }
  for (std::int64_t lane = 0; i < count; ++i, ++lane) sums[lane] += term(i);
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// ---- of many ----

void floats_of_bf16(const std::uint16_t* from, float* to, std::int64_t count);
/// code * scale.
void floats_of_e4m3(const std::uint8_t* from, float scale, float* to, std::int64_t count);
/// Packed; an even count.
void floats_of_e5m6(const std::uint8_t* from, float scale, float* to, std::int64_t count);
void bf16_of_floats(const float* from, std::uint16_t* to, std::int64_t count);
/// value / scale.
void e4m3_of_floats(const float* from, float scale, std::uint8_t* to, std::int64_t count);
void e5m6_of_floats(const float* from, float scale, std::uint8_t* to, std::int64_t count);

/// to += from.
void add_bf16(const std::uint16_t* from, float* to, std::int64_t count);
void add_floats(const float* from, float* to, std::int64_t count);

/// x[i] = exp(x[i] - shift); returns their sum. x[i] - shift must be at most 88.
float exp_minus(float* x, std::int64_t count, float shift);
/// Of position * frequency[i], within 2^-24 and a rounding of the product to double.
void cosines_and_sines(std::int32_t position, const double* frequency, float* cosine, float* sine,
                       std::int64_t count);
float largest_of(const float* x, std::int64_t count);
/// 0 of none; NaN does not count.
float largest_magnitude(const float* x, std::int64_t count);

/// A part of a matrix as FP32.
struct Panel {
  const float* data = nullptr;
  std::int64_t pitch = 0;
};

/// Rows and columns from (row, column) on: in place where the matrix is FP32, else converted to
/// `buffer` (rows * columns). With scales, `column` is a multiple of 128. Not for e5m6.
Panel panel_of(const Matrix& m, std::int64_t row, std::int64_t column, std::int64_t rows,
               std::int64_t columns, float* buffer);

/// Rounds `from` (pitch of its own) to the rows and columns of an FP32 or BF16 matrix.
void store_panel(const Matrix& m, std::int64_t row, std::int64_t column, std::int64_t rows,
                 std::int64_t columns, const Panel& from);

}  // namespace orrery::kernels::cpu
