#include "kernels/format.hpp"

#include <bit>
#include <cmath>

namespace orrery::kernels {
namespace {

constexpr int kFloatMantissaBits = 23;
constexpr int kFloatBias = 127;

/// A small format with subnormals: its widths and bias, and the largest value.
struct SmallFormat {
  int mantissa_bits;
  int bias;
  float largest;
};
constexpr SmallFormat kE4m3{3, 7, kE4m3Max};
constexpr SmallFormat kE5m6{6, 15, kE5m6Max};

/// The code without its sign of a value that is not negative and not NaN.
std::uint32_t magnitude_code(float value, SmallFormat format) {
  // Clamping before rounding is the same as after it: nothing below the largest rounds past it.
  value = std::fmin(value, format.largest);
  const int dropped = kFloatMantissaBits - format.mantissa_bits;
  const std::uint32_t first_normal = static_cast<std::uint32_t>(kFloatBias - format.bias + 1)
                                     << kFloatMantissaBits;
  std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if (bits < first_normal) {
    // Subnormals are multiples of the step 2^(1 - bias - mantissa_bits). Floats from 2^23 steps on
    // have that distance, so the addition rounds, to the nearest and ties to even.
    const float many_steps = std::ldexp(1.0F, dropped + 1 - format.bias);
    return std::bit_cast<std::uint32_t>(value + many_steps) -
           std::bit_cast<std::uint32_t>(many_steps);
  }
  const std::uint32_t odd = bits >> dropped & 1U;
  bits += (1U << (dropped - 1)) - 1 + odd;  // a carry into the exponent is right
  return (bits >> dropped) -
         (static_cast<std::uint32_t>(kFloatBias - format.bias) << format.mantissa_bits);
}

float magnitude_value(std::uint32_t code, SmallFormat format) {
  const std::uint32_t mantissa = code & ((1U << format.mantissa_bits) - 1);
  const int exponent = static_cast<int>(code >> format.mantissa_bits);
  const float significand =
      static_cast<float>(mantissa + (exponent > 0 ? 1U << format.mantissa_bits : 0U));
  return std::ldexp(significand,
                    (exponent > 0 ? exponent : 1) - format.bias - format.mantissa_bits);
}

}  // namespace

std::string_view name_of(Format format) {
  switch (format) {
    case Format::fp32:
      return "fp32";
    case Format::bf16:
      return "bf16";
    case Format::e4m3:
      return "e4m3";
    case Format::e5m6:
      return "e5m6";
  }
  return "?";
}

std::uint16_t bf16_of(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  // A NaN whose payload is in the lower half alone would become an infinity: set the quiet bit.
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

float float_of_bf16(std::uint16_t code) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(code) << 16);
}

std::uint8_t e4m3_of(float value) {
  const std::uint32_t sign = std::bit_cast<std::uint32_t>(value) >> 31 << 7;
  const std::uint32_t magnitude =
      std::isnan(value) ? 0x7FU : magnitude_code(std::fabs(value), kE4m3);
  return static_cast<std::uint8_t>(sign | magnitude);
}

float float_of_e4m3(std::uint8_t code) {
  const std::uint32_t magnitude = code & 0x7FU;
  const std::uint32_t sign = static_cast<std::uint32_t>(code) >> 7 << 31;
  if (magnitude == 0x7FU) return std::bit_cast<float>(sign | 0x7FC00000U);
  return std::bit_cast<float>(sign |
                              std::bit_cast<std::uint32_t>(magnitude_value(magnitude, kE4m3)));
}

std::uint16_t e5m6_of(float value) {
  const std::uint32_t sign = std::bit_cast<std::uint32_t>(value) >> 31 << 11;
  return static_cast<std::uint16_t>(sign | magnitude_code(std::fabs(value), kE5m6));
}

float float_of_e5m6(std::uint16_t code) {
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x800U) << 20;
  return std::bit_cast<float>(sign |
                              std::bit_cast<std::uint32_t>(magnitude_value(code & 0x7FFU, kE5m6)));
}

}  // namespace orrery::kernels
