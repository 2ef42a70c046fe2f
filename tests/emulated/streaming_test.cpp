// The streaming kernels of kernels/cuda, run in the emulator, against kernels/reference: values,
// stray writes, and the same bits whatever order threads run in.

#include <gtest/gtest.h>

#include <cstdint>

#include "arena.hpp"
#include "emulated_device.hpp"
#include "kernels/reference/reference.hpp"
#include "streaming_cases.hpp"

namespace orrery::kernels {
namespace {

class EmulatedStreaming : public testing::TestWithParam<streaming::Family> {};

TEST_P(EmulatedStreaming, IsAsTheReference) {
  std::uint32_t seed = 0;
  for (const auto& make : GetParam().cases()) {
    Arena wanted(++seed);
    const Call call = make(wanted);
    ASSERT_EQ(why_impossible(call), "") << describe(call);
    Arena forwards = wanted.copy();
    Arena backwards = wanted.copy();
    reference::run(call);
    open_emulated_device(3, false)->enqueue({}, make(forwards), 0);
    open_emulated_device(3, true)->enqueue({}, make(backwards), 0);
    EXPECT_EQ(wanted.differences(forwards), "") << describe(call);
    EXPECT_TRUE(forwards.same_bytes(backwards)) << describe(call) << ": the order of threads shows";
  }
}

INSTANTIATE_TEST_SUITE_P(Calls, EmulatedStreaming, testing::ValuesIn(streaming::families()),
                         [](const auto& family) { return family.param.name; });

}  // namespace
}  // namespace orrery::kernels
