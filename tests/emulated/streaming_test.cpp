// The streaming kernels of kernels/cuda, run in the emulator, against kernels/reference: values,
// stray writes, and the same bits whatever order threads run in.

#include <gtest/gtest.h>

#include <cctype>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "arena.hpp"
#include "emulated_device.hpp"
#include "kernels/reference/reference.hpp"
#include "streaming_cases.hpp"
#include "tests/kernels/call_cases.hpp"

namespace orrery::kernels {
namespace {

class EmulatedStreaming : public testing::TestWithParam<streaming::Family> {};

TEST_P(EmulatedStreaming, IsAsTheReference) {
  std::uint32_t seed = 0;
  for (const auto& make : GetParam().cases()) {
    streaming::Arena wanted(++seed);
    const Call call = make(wanted);
    ASSERT_EQ(why_impossible(call), "") << describe(call);
    streaming::Arena forwards = wanted.copy();
    streaming::Arena backwards = wanted.copy();
    reference::run(call);
    open_emulated_device(3, false)->enqueue({}, make(forwards), 0);
    open_emulated_device(3, true)->enqueue({}, make(backwards), 0);
    EXPECT_EQ(wanted.differences(forwards), "") << describe(call);
    EXPECT_TRUE(forwards.same_bytes(backwards)) << describe(call) << ": the order of threads shows";
  }
}

INSTANTIATE_TEST_SUITE_P(Calls, EmulatedStreaming, testing::ValuesIn(streaming::families()),
                         [](const auto& family) { return family.param.name; });

// The cases that all devices have in common, but for products and attention.
TEST(EmulatedCalls, AreAsTheReference) {
  constexpr std::uint64_t kSeed = 7;
  int ran = 0;
  for (const CallCase& test : call_cases()) {
    if (test.name.starts_with("gemm") || test.name.starts_with("attention")) continue;
    const auto forwards = run_case(test, *open_emulated_device(3, false), {}, kSeed);
    for (const std::string& problem : forwards.problems) {
      ADD_FAILURE() << test.name << ": " << problem;
    }
    const auto backwards = run_case(test, *open_emulated_device(3, true), {}, kSeed);
    EXPECT_TRUE(forwards.results == backwards.results)
        << test.name << ": the order of threads shows";
    ++ran;
  }
  EXPECT_GT(ran, 100);
}

}  // namespace
}  // namespace orrery::kernels
