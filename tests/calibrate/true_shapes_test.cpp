// DeepSeek-V3's real dimensions, lowered for one rank without memory behind the tensors: every call has
// to be possible, and all of it has to fit a GPU.

#include <gtest/gtest.h>

#include <cstdint>

#include "calibrate/execute/lowering.hpp"
#include "kernels/call.hpp"
#include "models/step.hpp"
#include "sim/one_rank.hpp"

namespace orrery {
namespace {

/// Hands out addresses that nothing may touch.
class AddressesOnly final : public kernels::Device {
 public:
  std::string name() const override { return "addresses"; }
  int sms() const override { return 132; }
  void* allocate(std::size_t bytes) override {
    void* at = reinterpret_cast<void*>(next_);
    next_ += (bytes + 255) / 256 * 256 + 256;
    return at;
  }
  void release(void*) override {}
  void upload(void*, const void*, std::size_t) override {}
  void download(void*, const void*, std::size_t) override {}
  kernels::StreamHandle create_stream() override { return {0}; }
  kernels::EventHandle create_event() override { return {0}; }
  void enqueue(kernels::StreamHandle, const kernels::Call&, int) override {}
  void enqueue_host(kernels::StreamHandle, std::function<void()>) override {}
  void enqueue_copy_from(kernels::StreamHandle, void*, const kernels::Device&, const void*,
                         std::size_t) override {}
  bool reached(kernels::EventHandle) const override { return true; }
  void record(kernels::StreamHandle, kernels::EventHandle) override {}
  void wait(kernels::StreamHandle, kernels::EventHandle) override {}
  void synchronize() override {}
  std::int64_t reached_ns(kernels::EventHandle) const override { return 0; }
  void flush_cache(kernels::StreamHandle) override {}

 private:
  std::uintptr_t next_ = std::uintptr_t{1} << 40;
};

TEST(TrueShapes, ARankOfDeepSeekV3FitsOneGpuAndAllItsCallsArePossible) {
  Scenario scenario = read_scenario(ORRERY_SOURCE_DIR "/scenarios/deepseek_v3_slice.yaml");
  ASSERT_EQ(why_not_executable(scenario), std::vector<std::string>());
  scenario.training.initial_deviation = 0;  // nobody reads 3.3 billion normal numbers
  const Program program = one_rank_of(build_step(scenario), RankId(1));
  AddressesOnly device;
  Tensors tensors(device);
  const Lowered lowered = lower_alone(scenario, program, RankId(64), tensors);
  EXPECT_EQ(lowered.ops.size(), program.size());
  std::size_t calls = 0;
  for (const LoweredOp& op : lowered.ops) {
    EXPECT_FALSE(op.communication) << program.name(op.op);
    for (const auto* list : {&op.calls, &op.then}) {
      for (const kernels::Call& call : *list) {
        ++calls;
        EXPECT_EQ(kernels::why_impossible(call), "")
            << program.name(op.op) << ": " << kernels::describe(call);
      }
    }
  }
  EXPECT_GT(calls, program.size() / 2);
  // 83 GB: not an H100's 80, but an H200's 141.
  EXPECT_LT(tensors.total_bytes(), 100'000'000'000);
}

}  // namespace
}  // namespace orrery
