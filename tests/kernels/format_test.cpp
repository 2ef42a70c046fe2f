#include "kernels/format.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace orrery::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

float float_of_bits(std::uint32_t bits) {
  return std::bit_cast<float>(bits);
}

/// Value of a code without its sign by the formula of the OCP specification (revision 1.0, 5.1):
/// 2^(E - bias) * (1 + M / 2^m), 2^(1 - bias) * M / 2^m for E = 0, in double.
double value_by_formula(int code, int mantissa_bits, int bias) {
  const int mantissa = code % (1 << mantissa_bits);
  const int exponent = code >> mantissa_bits;
  const double fraction = mantissa / std::exp2(mantissa_bits);
  return exponent == 0 ? std::exp2(1 - bias) * fraction
                       : std::exp2(exponent - bias) * (1 + fraction);
}

/// Nearest of `values` (ascending, index = code), ties to the even code, by search.
int nearest_code(const std::vector<double>& values, double x) {
  const auto above = std::lower_bound(values.begin(), values.end(), x);
  if (above == values.end()) return static_cast<int>(values.size()) - 1;
  const int high = static_cast<int>(above - values.begin());
  if (high == 0 || *above == x) return high;
  const double to_high = values[static_cast<std::size_t>(high)] - x;
  const double to_low = x - values[static_cast<std::size_t>(high) - 1];
  if (to_low != to_high) return to_low < to_high ? high - 1 : high;
  return high % 2 == 0 ? high : high - 1;
}

std::vector<double> all_values(int codes, int mantissa_bits, int bias) {
  std::vector<double> values;
  for (int code = 0; code < codes; ++code) {
    values.push_back(value_by_formula(code, mantissa_bits, bias));
  }
  return values;
}

/// Floats where rounding is decided: each value, the middle to the next, and what is beside both;
/// then random ones of all exponents around the format's.
std::vector<float> probes(const std::vector<double>& values) {
  std::vector<float> result;
  const auto add = [&](double value) {
    const auto x = static_cast<float>(value);
    EXPECT_EQ(static_cast<double>(x), value);
    for (const float near : {x, std::nextafter(x, 0.0F), std::nextafter(x, kInfinity)}) {
      result.push_back(near);
      result.push_back(-near);
    }
  };
  for (std::size_t i = 0; i + 1 < values.size(); ++i) {
    add(values[i]);
    add((values[i] + values[i + 1]) / 2);
  }
  add(values.back());
  std::mt19937 random(7);
  for (int i = 0; i < 200'000; ++i) {
    const auto bits = static_cast<std::uint32_t>(random());
    const std::uint32_t exponent = 127 - 40 + static_cast<std::uint32_t>(random()) % 80;
    result.push_back(float_of_bits((bits & 0x807FFFFFU) | exponent << 23));
  }
  return result;
}

TEST(Format, NamesAndWidths) {
  EXPECT_EQ(name_of(Format::fp32), "fp32");
  EXPECT_EQ(name_of(Format::bf16), "bf16");
  EXPECT_EQ(name_of(Format::e4m3), "e4m3");
  EXPECT_EQ(name_of(Format::e5m6), "e5m6");
  EXPECT_EQ(bits_of(Format::e5m6), 12);
}

TEST(Format, E4m3ValuesOfTheSpecification) {
  // OCP 8-bit Floating Point Specification, revision 1.0, table 2.
  EXPECT_EQ(float_of_e4m3(0x7E), 448.0F);
  EXPECT_EQ(float_of_e4m3(0x08), std::exp2(-6.0F));
  EXPECT_EQ(float_of_e4m3(0x07), 0.875F * std::exp2(-6.0F));
  EXPECT_EQ(float_of_e4m3(0x01), std::exp2(-9.0F));
  EXPECT_EQ(float_of_e4m3(0x38), 1.0F);
  EXPECT_TRUE(std::isnan(float_of_e4m3(0x7F)));
  EXPECT_TRUE(std::isnan(float_of_e4m3(0xFF)));
  EXPECT_TRUE(std::signbit(float_of_e4m3(0x80)));
  EXPECT_TRUE(std::signbit(float_of_e4m3(0xFF)));
}

TEST(Format, AllE4m3CodesByFormulaAndBack) {
  for (int code = 0; code < 256; ++code) {
    const auto byte = static_cast<std::uint8_t>(code);
    if ((code & 0x7F) != 0x7F) {
      const double value = value_by_formula(code & 0x7F, 3, 7);
      EXPECT_EQ(static_cast<double>(float_of_e4m3(byte)), code < 128 ? value : -value) << code;
    }
    EXPECT_EQ(e4m3_of(float_of_e4m3(byte)), byte) << code;
  }
}

TEST(Format, E4m3RoundsToTheNearest) {
  const std::vector<double> values = all_values(0x7F, 3, 7);
  for (const float x : probes(values)) {
    const int expected = nearest_code(values, std::fabs(x)) | (std::signbit(x) ? 0x80 : 0);
    ASSERT_EQ(e4m3_of(x), expected) << x;
  }
}

TEST(Format, E4m3SaturatesAndKeepsNaN) {
  EXPECT_EQ(e4m3_of(449), 0x7E);
  EXPECT_EQ(e4m3_of(464), 0x7E);
  EXPECT_EQ(e4m3_of(std::nextafter(464.0F, kInfinity)), 0x7E);
  EXPECT_EQ(e4m3_of(std::numeric_limits<float>::max()), 0x7E);
  EXPECT_EQ(e4m3_of(kInfinity), 0x7E);
  EXPECT_EQ(e4m3_of(-kInfinity), 0xFE);
  EXPECT_EQ(e4m3_of(kNaN), 0x7F);
  EXPECT_EQ(e4m3_of(-kNaN), 0xFF);
  EXPECT_EQ(e4m3_of(float_of_bits(0x7F800001)), 0x7F);
  EXPECT_EQ(e4m3_of(-0.0F), 0x80);
  EXPECT_EQ(e4m3_of(std::numeric_limits<float>::denorm_min()), 0);
}

TEST(Format, AllE5m6CodesByFormulaAndBack) {
  for (int code = 0; code < 4096; ++code) {
    const auto word = static_cast<std::uint16_t>(code);
    const double value = value_by_formula(code & 0x7FF, 6, 15);
    EXPECT_EQ(static_cast<double>(float_of_e5m6(word)), code < 2048 ? value : -value) << code;
    EXPECT_EQ(e5m6_of(float_of_e5m6(word)), word) << code;
    EXPECT_EQ(float_of_e5m6(static_cast<std::uint16_t>(code | 0xA000)), float_of_e5m6(word));
  }
  EXPECT_EQ(float_of_e5m6(0x7FF), kE5m6Max);
  EXPECT_TRUE(std::signbit(float_of_e5m6(0x800)));
}

TEST(Format, E5m6RoundsToTheNearestAndSaturates) {
  const std::vector<double> values = all_values(0x800, 6, 15);
  for (const float x : probes(values)) {
    const int expected = nearest_code(values, std::fabs(x)) | (std::signbit(x) ? 0x800 : 0);
    ASSERT_EQ(e5m6_of(x), expected) << x;
  }
  EXPECT_EQ(e5m6_of(kInfinity), 0x7FF);
  EXPECT_EQ(e5m6_of(-kInfinity), 0xFFF);
}

TEST(Format, E5m6Packing) {
  std::array<std::uint8_t, 6> packed{};
  store_e5m6(packed.data(), 0, 0x123);
  store_e5m6(packed.data(), 1, 0x456);
  store_e5m6(packed.data(), 3, 0xFED);
  // 0x456123 and 0xFED000, the lowest byte first.
  EXPECT_EQ(packed, (std::array<std::uint8_t, 6>{0x23, 0x61, 0x45, 0x00, 0xD0, 0xFE}));
  store_e5m6(packed.data(), 0, 0xFFFF & kE5m6Mask);
  EXPECT_EQ(load_e5m6(packed.data(), 0), 0xFFF);
  EXPECT_EQ(load_e5m6(packed.data(), 1), 0x456);
  EXPECT_EQ(load_e5m6(packed.data(), 2), 0);
  EXPECT_EQ(load_e5m6(packed.data(), 3), 0xFED);
}

TEST(Format, AllBf16CodesAndBack) {
  for (std::uint32_t code = 0; code < 0x10000; ++code) {
    const auto half = static_cast<std::uint16_t>(code);
    const float value = float_of_bf16(half);
    ASSERT_EQ(std::bit_cast<std::uint32_t>(value), code << 16);
    const bool nan = (code & 0x7FFF) > 0x7F80;
    ASSERT_EQ(std::isnan(value), nan);
    ASSERT_EQ(bf16_of(value), nan ? code | 0x40 : code);
  }
}

/// Nearest by comparing distances in double, ties to the even code.
std::uint16_t bf16_by_distance(float x) {
  const std::uint32_t low_code = std::bit_cast<std::uint32_t>(x) >> 16;
  const double low = float_of_bits(low_code << 16);
  // Beyond the largest finite number the next one is 2^128 (IEEE 754, 4.3.1), whose code is
  // infinity.
  const std::uint32_t high_code = low_code + 1;
  const double high = (high_code & 0x7FFF) == 0x7F80 ? std::copysign(std::exp2(128.0), x)
                                                     : double{float_of_bits(high_code << 16)};
  const double to_low = std::fabs(x - low);
  const double to_high = std::fabs(high - x);
  if (to_low == to_high) return static_cast<std::uint16_t>(low_code + low_code % 2);
  return static_cast<std::uint16_t>(to_low < to_high ? low_code : high_code);
}

TEST(Format, Bf16RoundsToTheNearest) {
  // Ties and their neighbours above every finite code.
  for (std::uint32_t code = 0; code < 0x10000; ++code) {
    if ((code & 0x7FFF) >= 0x7F80) continue;
    for (const std::uint32_t low : {0x0001U, 0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU}) {
      const float x = float_of_bits(code << 16 | low);
      ASSERT_EQ(bf16_of(x), bf16_by_distance(x)) << code << " " << low;
    }
  }
  std::mt19937 random(11);
  for (int i = 0; i < 1'000'000; ++i) {
    const float x = float_of_bits(static_cast<std::uint32_t>(random()));
    if (std::isfinite(x)) {
      ASSERT_EQ(bf16_of(x), bf16_by_distance(x)) << x;
    }
  }
  EXPECT_EQ(bf16_of(std::numeric_limits<float>::max()), 0x7F80);
  EXPECT_EQ(bf16_of(kInfinity), 0x7F80);
  EXPECT_EQ(bf16_of(-kInfinity), 0xFF80);
  EXPECT_TRUE(std::isnan(float_of_bf16(bf16_of(float_of_bits(0x7F800001)))));
}

}  // namespace
}  // namespace orrery::kernels
