// Every Call on the CPU against the reference.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <functional>

#include "kernels/cpu/rows.hpp"
#include "kernels/reference/reference.hpp"
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

// ---- the cases themselves ----

TEST(CallCases, AreOfEveryCall) {
  std::vector<int> seen(std::variant_size_v<Call>);
  for (const CallCase& test : CpuCalls::cases()) {
    CaseMemory memory(kSeed, test.layout, {}, nullptr);
    const Call call = test.make(memory);
    EXPECT_EQ(why_impossible(call), "") << test.name;
    ++seen[call.index()];
  }
  for (std::size_t i = 0; i < seen.size(); ++i) EXPECT_GT(seen[i], 0) << i;
}

TEST(CallCases, ShowWhatWentWrong) {
  // 5 of 8 rows of 130 columns are used, with a gap behind each row.
  constexpr CaseMemory::Layout kGaps{6, 1};
  struct Operands {
    CaseMemory memory;
    ActivationForward call;
    explicit Operands(std::uint64_t seed = kSeed) : memory(seed, kGaps, {}, nullptr) {
      call.kind = Activation::gelu;
      call.in = memory.in(8, 130, Format::bf16);
      call.out = memory.out(8, 130, Format::bf16, {.relative = 1e-6});
      call.used_rows = memory.in(std::vector<std::int32_t>{5});
      reference::run(call);
    }
    std::uint16_t* out() { return static_cast<std::uint16_t*>(call.out.data); }
  };
  Operands right;
  const auto problems_after = [&](const std::function<void(Operands&)>& spoil) {
    Operands wrong;
    spoil(wrong);
    return wrong.memory.compare(right.memory).size();
  };
  EXPECT_EQ(problems_after([](Operands&) {}), 0u);
  EXPECT_EQ(problems_after([](Operands& o) { o.out()[3] ^= 1; }), 0u);  // one step
  EXPECT_EQ(problems_after([](Operands& o) { o.out()[3] += 4; }), 1u);
  EXPECT_EQ(problems_after([](Operands& o) { o.out()[3] ^= 0x8000; }), 1u);
  EXPECT_EQ(problems_after([](Operands& o) { o.out()[3] = 0xFFFF; }), 1u);   // not written
  EXPECT_EQ(problems_after([](Operands& o) { o.out()[131] = 0; }), 1u);      // between rows
  EXPECT_EQ(problems_after([](Operands& o) { o.out()[-1] = 0; }), 1u);       // before all
  EXPECT_EQ(problems_after([](Operands& o) { o.out()[8 * 136] = 0; }), 1u);  // behind all
  EXPECT_EQ(problems_after([](Operands& o) { o.out()[5 * 136] = 0; }), 1u);  // not a used row
  EXPECT_EQ(problems_after([](Operands& o) {
              static_cast<std::uint16_t*>(o.call.in.data)[7] ^= 1;  // an input
            }),
            1u);
  EXPECT_EQ(problems_after([](Operands& o) {
              // Rounding towards 0 is within a step everywhere, but shows in many elements.
              for (std::int64_t i = 0; i < 5 * 136; ++i) {
                if (i % 136 < 130 && i % 2 == 0) --o.out()[i];
              }
            }),
            1u);
  Operands other(kSeed + 1);
  EXPECT_FALSE(other.memory.compare(right.memory).empty());
}

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
  const auto check = [](float x) { ASSERT_EQ(cpu::to_e4m3(x), e4m3_of(x)) << x; };
  std::vector<float> values;
  for (int code = 0; code < 0x7F; ++code) {
    values.push_back(float_of_e4m3(static_cast<std::uint8_t>(code)));
  }
  around(values, check);
  sweep(kE4m3Max * 1.5F, check);
  check(INFINITY);
  EXPECT_EQ(cpu::to_e4m3(NAN), 0x7F);
  EXPECT_EQ(cpu::to_e4m3(-NAN), 0xFF);
  for (int code = 0; code < 256; ++code) {
    const auto byte = static_cast<std::uint8_t>(code);
    EXPECT_EQ(std::bit_cast<std::uint32_t>(cpu::from_e4m3(byte)),
              std::bit_cast<std::uint32_t>(float_of_e4m3(byte)));
  }
}

TEST(CpuConversions, E5m6AsTheFormatSays) {
  const auto check = [](float x) { ASSERT_EQ(cpu::to_e5m6(x), e5m6_of(x)) << x; };
  std::vector<float> values;
  for (int code = 0; code < 0x800; ++code) {
    values.push_back(float_of_e5m6(static_cast<std::uint16_t>(code)));
  }
  around(values, check);
  sweep(kE5m6Max * 1.5F, check);
  check(INFINITY);
  for (int code = 0; code < 4096; ++code) {
    const auto word = static_cast<std::uint16_t>(code);
    EXPECT_EQ(std::bit_cast<std::uint32_t>(cpu::from_e5m6(word)),
              std::bit_cast<std::uint32_t>(float_of_e5m6(word)));
  }
}

TEST(CpuConversions, ExponentialWithin2Steps) {
  for (float x = -87; x < 88; x += 0.000731F) {
    const double expected = std::exp(double{x});
    ASSERT_NEAR(cpu::exponential(x), expected, 2 * 0x1p-23 * expected) << x;
  }
  EXPECT_EQ(cpu::exponential(0), 1);
  EXPECT_EQ(cpu::exponential(-1000), 0);
  EXPECT_EQ(cpu::exponential(-INFINITY), 0);
  EXPECT_TRUE(std::isnan(cpu::exponential(NAN)));
}

}  // namespace
}  // namespace orrery::kernels
