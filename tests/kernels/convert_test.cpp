#include "kernels/cpu/convert.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace orrery::kernels::cpu {
namespace {

/// Bits, with all NaN the same.
std::uint32_t bits_of(float x) {
  return std::isnan(x) ? 0x7FC00000U : std::bit_cast<std::uint32_t>(x);
}

TEST(Convert, AllCodesOfBf16) {
  std::vector<std::uint16_t> codes;
  for (std::uint32_t code = 0; code < 0x10000; ++code) {
    codes.push_back(static_cast<std::uint16_t>(code));
  }
  std::vector<float> values(codes.size());
  floats_of_bf16(codes.data(), values.data(), static_cast<std::int64_t>(codes.size()));
  for (std::size_t i = 0; i < codes.size(); ++i) {
    ASSERT_EQ(bits_of(values[i]), bits_of(float_of_bf16(codes[i]))) << i;
  }
}

TEST(Convert, AllCodesOfE4m3) {
  std::vector<std::uint8_t> codes;
  for (int code = 0; code < 256; ++code) codes.push_back(static_cast<std::uint8_t>(code));
  std::vector<float> values(256);
  for (const float scale : {1.0F, 0.3F, 1.7e-5F}) {
    for (const std::int64_t count : {256, 255, 17, 1}) {
      std::fill(values.begin(), values.end(), -1.0F);
      floats_of_e4m3(codes.data(), scale, values.data(), count);
      for (std::int64_t i = 0; i < 256; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const float expected = i < count ? float_of_e4m3(codes[at]) * scale : -1.0F;
        ASSERT_EQ(bits_of(values[at]), bits_of(expected)) << i;
      }
    }
  }
}

TEST(Convert, FloatsToBf16) {
  std::mt19937 random(1);
  std::vector<float> values = {0.0F,
                               -0.0F,
                               std::numeric_limits<float>::infinity(),
                               std::numeric_limits<float>::quiet_NaN(),
                               std::bit_cast<float>(0x7F800001U),
                               std::numeric_limits<float>::max(),
                               std::numeric_limits<float>::denorm_min()};
  for (std::uint32_t code = 0; code < 0x10000; ++code) {  // ties
    values.push_back(std::bit_cast<float>(code << 16 | 0x8000U));
  }
  for (int i = 0; i < 100'000; ++i) {
    values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
  }
  std::vector<std::uint16_t> codes(values.size());
  bf16_of_floats(values.data(), codes.data(), static_cast<std::int64_t>(values.size()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(codes[i], bf16_of(values[i])) << values[i];
  }
}

TEST(Convert, ExponentialAndItsSum) {
  for (const std::int64_t count : {1, 15, 16, 17, 1000, 10'000}) {
    std::vector<float> x;
    std::vector<double> exact;
    double sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      x.push_back(3.0F - 90.0F * static_cast<float>(i) / static_cast<float>(count));
      exact.push_back(std::exp(double{x.back()} - 2.5));
      sum += exact.back();
    }
    const float returned = exp_minus(x.data(), count, 2.5F);
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (exact[i] < 1.22e-38) {  // e^-87.3
        ASSERT_TRUE(x[i] == 0 || exact[i] > 1.21e-38);
      } else {
        // x - 2.5 is rounded too, to half of 2^-17 at 87.
        ASSERT_NEAR(x[i], exact[i], exact[i] * (2 * 0x1p-23 + 0x1p-18)) << i;
      }
    }
    EXPECT_NEAR(returned, sum, sum * 1e-5);
  }
  // Without the rounding of a difference.
  for (int i = 0; i <= 87 * 64; ++i) {
    float y = -static_cast<float>(i) / 64;
    const double exact = std::exp(double{y});
    exp_minus(&y, 1, 0);
    ASSERT_NEAR(y, exact, exact * 2 * 0x1p-23) << i;
  }
}

TEST(Convert, NormalDistributionAsErfc) {
  for (float x = -12.9F; x < 8; x += 0.00117F) {
    const double exact = 0.5 * std::erfc(-double{x} / std::sqrt(2.0));
    ASSERT_NEAR(normal_below(x), exact, 5e-7 * exact) << x;
  }
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(normal_below(infinity), 1);
  EXPECT_EQ(normal_below(-infinity), 0);
  EXPECT_TRUE(std::isnan(normal_below(std::numeric_limits<float>::quiet_NaN())));
}

TEST(Convert, CosinesAndSinesOfAnyPosition) {
  std::vector<double> frequency;
  for (int i = 0; i < 37; ++i) frequency.push_back(std::pow(10000.0, -i / 36.0));
  std::vector<float> cosine(frequency.size()), sine(frequency.size());
  std::mt19937 random(3);
  std::vector<std::int32_t> positions{0,
                                      1,
                                      2,
                                      3,
                                      1 << 20,
                                      std::numeric_limits<std::int32_t>::max(),
                                      std::numeric_limits<std::int32_t>::min()};
  for (int i = 0; i < 5000; ++i) {
    positions.push_back(static_cast<std::int32_t>(random() >> random() % 31));
  }
  for (const std::int32_t position : positions) {
    cosines_and_sines(position, frequency.data(), cosine.data(), sine.data(),
                      static_cast<std::int64_t>(frequency.size()));
    for (std::size_t i = 0; i < frequency.size(); ++i) {
      const double angle = position * frequency[i];
      ASSERT_NEAR(cosine[i], std::cos(angle), 0x1p-24) << position << " " << i;
      ASSERT_NEAR(sine[i], std::sin(angle), 0x1p-24) << position << " " << i;
    }
  }
}

TEST(Convert, Largest) {
  std::mt19937 random(2);
  for (const std::size_t count : {1U, 5U, 16U, 33U, 200U}) {
    std::vector<float> x;
    for (std::size_t i = 0; i < count; ++i) x.push_back(-1 - static_cast<float>(random() % 1000));
    for (std::size_t at = 0; at < count; ++at) {
      std::vector<float> y = x;
      y[at] = -0.5F;
      ASSERT_EQ(largest_of(y.data(), static_cast<std::int64_t>(count)), -0.5F);
    }
  }
}

}  // namespace
}  // namespace orrery::kernels::cpu
