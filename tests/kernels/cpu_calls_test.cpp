// Every Call on the CPU against the reference.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>

#include "kernels/cpu/rows.hpp"
#include "tests/kernels/call_cases.hpp"

namespace orrery::kernels {
namespace {

constexpr std::uint64_t kSeed = 20'240'607;

class CpuCalls : public testing::TestWithParam<std::size_t> {
 public:
  static const std::vector<CallCase>& cases() {
    static const std::vector<CallCase> all = call_cases();
    return all;
  }
  /// Streams have threads: one for all cases.
  struct Machine {
    std::unique_ptr<Device> device;
    StreamHandle stream;
    explicit Machine(int threads)
        : device(open_cpu_device(threads)), stream(device->create_stream()) {}
  };
  static Machine& one() {
    static Machine machine(1);
    return machine;
  }
  static Machine& two() {
    static Machine machine(2);
    return machine;
  }
};

TEST_P(CpuCalls, AsTheReferenceWithAnyNumberOfThreads) {
  const CallCase& test = cases()[GetParam()];
  const CaseResult serial = run_case(test, *one().device, one().stream, kSeed);
  for (const std::string& problem : serial.problems) ADD_FAILURE() << test.name << ": " << problem;
  const CaseResult parallel = run_case(test, *two().device, two().stream, kSeed);
  EXPECT_TRUE(parallel.results == serial.results) << test.name << ": threads change bits";
}

std::string name_of_case(const testing::TestParamInfo<std::size_t>& info) {
  std::string name = CpuCalls::cases()[info.param].name;
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  }
  return name + "_" + std::to_string(info.param);
}

INSTANTIATE_TEST_SUITE_P(All, CpuCalls, testing::Range(std::size_t{0}, CpuCalls::cases().size()),
                         name_of_case);

// ---- conversions ----

/// Floats where e4m3 and e5m6 decide, and a sweep: every 251st bit pattern up to `largest`.
template <class Check>
void sweep(float largest, Check check) {
  const std::uint32_t end = std::bit_cast<std::uint32_t>(largest);
  for (std::uint32_t bits = 0; bits <= end; bits += 251) {
    check(std::bit_cast<float>(bits));
    check(-std::bit_cast<float>(bits));
  }
  check(largest);
  check(-largest);
}

/// Each value of the format, the middle to the next, and their neighbours.
template <class Check>
void around(const std::vector<float>& values, Check check) {
  for (std::size_t i = 0; i + 1 < values.size(); ++i) {
    for (const float x : {values[i], (values[i] + values[i + 1]) / 2}) {
      for (const float near : {x, std::nextafter(x, 0.0F), std::nextafter(x, 1e9F)}) {
        check(near);
        check(-near);
      }
    }
  }
}

TEST(CpuConversions, AllBf16) {
  for (std::uint32_t code = 0; code < 0x10000; ++code) {
    const auto word = static_cast<std::uint16_t>(code);
    const float value = cpu::from_bf16(word);
    ASSERT_EQ(std::bit_cast<std::uint32_t>(value),
              std::bit_cast<std::uint32_t>(float_of_bf16(word)));
    ASSERT_EQ(cpu::to_bf16(value), bf16_of(value)) << code;
    // In the middle to the next code, and beside it.
    for (const std::uint32_t low : {0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU, 1U}) {
      const auto x = std::bit_cast<float>(code << 16 | low);
      ASSERT_EQ(cpu::to_bf16(x), bf16_of(x)) << code << " " << low;
    }
  }
}

TEST(CpuConversions, E4m3AsTheFormatSays) {
  const auto check = [](float x) {
    // The largest magnitude is what quantising divides by.
    ASSERT_EQ(cpu::to_e4m3(std::clamp(x, -kE4m3Max, kE4m3Max)), e4m3_of(x)) << x;
  };
  std::vector<float> values;
  for (int code = 0; code < 0x7F; ++code) {
    values.push_back(float_of_e4m3(static_cast<std::uint8_t>(code)));
  }
  around(values, check);
  sweep(kE4m3Max * 1.5F, check);
  EXPECT_EQ(cpu::to_e4m3(NAN), 0x7F);
  EXPECT_EQ(cpu::to_e4m3(-NAN), 0xFF);
  for (int code = 0; code < 256; ++code) {
    const auto byte = static_cast<std::uint8_t>(code);
    EXPECT_EQ(std::bit_cast<std::uint32_t>(cpu::e4m3_values()[byte]),
              std::bit_cast<std::uint32_t>(float_of_e4m3(byte)));
  }
}

TEST(CpuConversions, E5m6AsTheFormatSays) {
  const auto check = [](float x) {
    ASSERT_EQ(cpu::to_e5m6(std::clamp(x, -kE5m6Max, kE5m6Max)), e5m6_of(x)) << x;
  };
  std::vector<float> values;
  for (int code = 0; code < 0x800; ++code) {
    values.push_back(float_of_e5m6(static_cast<std::uint16_t>(code)));
  }
  around(values, check);
  sweep(kE5m6Max * 1.5F, check);
}

TEST(CpuConversions, ExponentialTo2e7) {
  for (float x = -87; x < 88; x += 0.000731F) {
    const double expected = std::exp(double{x});
    ASSERT_NEAR(cpu::fast_exp(x), expected, 2e-7 * expected) << x;
  }
  EXPECT_EQ(cpu::fast_exp(0), 1);
  EXPECT_EQ(cpu::fast_exp(-1000), 0);
  EXPECT_EQ(cpu::fast_exp(-INFINITY), 0);
  EXPECT_TRUE(std::isnan(cpu::fast_exp(NAN)));
}

}  // namespace
}  // namespace orrery::kernels
