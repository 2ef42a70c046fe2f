// Whole steps over communicators of devices, against the same over messages of the host: sums are
// in the same order in both, so that results are the same bytes. And what becomes of a run where a
// rank fails.

#include "calibrate/execute/execution.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "calibrate/transport/transport.hpp"
#include "models/step.hpp"
#include "tests/calibrate/small_training.hpp"
#include "tests/nccl/fake.hpp"
#include "tests/nccl/host_stream_device.hpp"

namespace orrery {
namespace {

using testing::AnyOf;
using testing::ContainsRegex;
using testing::HasSubstr;
using namespace std::chrono_literals;

SmallRanks over_nccl() {
  return {.open_device = [] { return std::make_unique<HostStreamDevice>(); }, .nccl = fake_nccl()};
}

void expect_same(const Trained& host, const Trained& device) {
  EXPECT_EQ(device.losses, host.losses);
  EXPECT_EQ(device.mtp_losses, host.mtp_losses);
  EXPECT_EQ(device.gradient_norms, host.gradient_norms);
  ASSERT_EQ(device.gradients.size(), host.gradients.size());
  for (const auto& [name, gradient] : host.gradients) {
    EXPECT_EQ(device.gradients.at(name), gradient) << name;
  }
}

struct Layouted {
  const char* model;
  const char* plan;
};
void PrintTo(const Layouted& layouted, std::ostream* out) {
  *out << layouted.plan;
}

class Layouts : public testing::TestWithParam<Layouted> {};

TEST_P(Layouts, GiveTheSameBytesAsMessagesOfTheHost) {
  const Scenario scenario = small_scenario(GetParam().model, "\n  " + std::string(GetParam().plan) +
                                                                 R"(
  sequence_length: 16
  micro_batch: 1
  global_batch: 8
  precision: fp32
)");
  expect_same(train_small(scenario, 0), train_small(scenario, 0, over_nccl()));
  expect_same(train_small(scenario, 2), train_small(scenario, 2, over_nccl()));
}

const Layouted kLayouts[] = {
    {kTinyLlama, "layout: {dp: 2}\n  schedule: 1f1b"},
    {kTinyLlama, "layout: {dp: 2, zero: 0}\n  schedule: 1f1b"},
    {kTinyLlama, "layout: {tp: 2, dp: 1}\n  schedule: 1f1b"},
    {kTinyLlama, "layout: {tp: 2, dp: 2, sequence_parallel: false}\n  schedule: 1f1b"},
    {kTinyLlama, "layout: {pp: 4, dp: 1}\n  schedule: 1f1b"},
    {kTinyLlama, "layout: {pp: 2, dp: 1}\n  schedule: interleaved_1f1b\n  virtual_stages: 2"},
    {kTinyLlama, "layout: {pp: 2, dp: 2}\n  schedule: dual_pipe_v"},
    {kTinyQwenMoe, "layout: {dp: 4, ep: 2}\n  schedule: 1f1b"},
    {kTinyQwenMoe, "layout: {tp: 2, dp: 2, ep: 4}\n  schedule: 1f1b"},
    {kTinyDeepSeek, "layout: {dp: 4, ep: 4}\n  schedule: 1f1b"},
    {kTinyDeepSeek, "layout: {tp: 2, dp: 2, ep: 2}\n  schedule: 1f1b"},
    {kTinyDeepSeek, "layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe"},
    {kTinyDeepSeek, "layout: {pp: 2, dp: 2, ep: 2}\n  schedule: zb_v"},
    {kTinyDeepSeek, "layout: {pp: 2, dp: 2, ep: 2}\n  schedule: dual_pipe\n  recompute: deepseek"},
};
INSTANTIATE_TEST_SUITE_P(Small, Layouts, testing::ValuesIn(kLayouts));

const char* const kBlockModel = R"(
  name: small, with blocks of 128
  source: made up
  hidden: 256
  vocabulary: 64
  layers: 2
  max_positions: 128
  attention: {heads: 4, kv_heads: 2, head_dim: 64}
  feed_forward: {activation: swiglu, intermediate: 256}
  moe: {dense_layers: 1, routed_experts: 8, top_k: 3, expert_intermediate: 128}
)";

// Rows travel with their scales. Without sums between ranks but those of gradients, in FP32, all is
// the same bytes.
TEST(Exchanges, OfFp8AndBf16GiveTheSameBytes) {
  for (const char* precision : {"bf16", "fp8_deepseek"}) {
    SCOPED_TRACE(precision);
    const Scenario scenario = small_scenario(kBlockModel, R"(
  layout: {dp: 4, ep: 4}
  schedule: 1f1b
  sequence_length: 128
  micro_batch: 1
  global_batch: 8
  precision: )" + std::string(precision) + "\n");
    expect_same(train_small(scenario, 0), train_small(scenario, 0, over_nccl()));
  }
}

// NCCL rounds each partial sum to BF16, the host only the whole: 2^-9 of it, each time.
TEST(TensorParallel, SumsOfBf16DifferByTheirRounding) {
  const Scenario scenario = small_scenario(kBlockModel, R"(
  layout: {tp: 2, dp: 2}
  schedule: 1f1b
  sequence_length: 128
  micro_batch: 1
  global_batch: 4
  precision: bf16
)");
  const Trained host = train_small(scenario, 0);
  const Trained device = train_small(scenario, 0, over_nccl());
  EXPECT_NEAR(device.losses[0], host.losses[0], 1e-3 * host.losses[0]);
  EXPECT_NEAR(device.gradient_norms[0], host.gradient_norms[0], 1e-2 * host.gradient_norms[0]);
}

// ---- ranks that fail

/// Does something of its own in front of a step's many calls.
class Disturbed final : public HostStreamDevice {
 public:
  explicit Disturbed(std::function<void(int)> before_call) : before_call_(std::move(before_call)) {}
  void enqueue(kernels::StreamHandle stream, const kernels::Call& call, int sms) override {
    if (before_call_) {
      enqueue_host(stream, [this, n = calls_++] { before_call_(n); });
    }
    CpuDevice::enqueue(stream, call, sms);
  }

 private:
  std::function<void(int)> before_call_;
  int calls_ = 0;
};

constexpr const char* kExperts = "layout: {dp: 4, ep: 4}";
constexpr const char* kPipeline = "layout: {pp: 4, dp: 1}";
constexpr int kInTheMiddle = 100;  // of a rank's calls, some hundreds a step

/// What each of four ranks threw while rank 2's device did this in front of its calls.
std::vector<std::string> errors_of(const char* plan, std::chrono::nanoseconds timeout,
                                   const std::function<void(int, Transport&)>& on_rank_2,
                                   int steps_of_rank_2 = 3) {
  const bool experts = plan == std::string_view(kExperts);
  const Scenario scenario =
      small_scenario(experts ? kTinyDeepSeek : kTinyLlama, "\n  " + std::string(plan) + R"(
  schedule: 1f1b
  sequence_length: 16
  micro_batch: 1
  global_batch: 8
  precision: fp32
)");
  const Program program = build_step(scenario, {.all_ranks = true});
  const Tokens tokens = [&](std::int64_t step, std::int64_t sequence) {
    return random_tokens(scenario, step, sequence);
  };
  const auto nccl = fake_nccl();
  auto transports = make_in_process_transports(4, timeout);
  std::vector<std::string> errors(transports.size());
  std::vector<std::thread> threads;
  for (auto& transport : transports) {
    threads.emplace_back([&, t = std::move(transport)]() mutable {
      const int rank = t->rank();
      try {
        Disturbed device(rank == 2 ? std::function([&](int n) { on_rank_2(n, *t); }) : nullptr);
        Execution execution(scenario, program, RankId(static_cast<std::size_t>(rank)), device,
                            t.get(), nccl);
        for (int s = 0; s < (rank == 2 ? steps_of_rank_2 : 3); ++s) execution.step(s, tokens);
      } catch (const std::exception& error) {
        errors[static_cast<std::size_t>(rank)] = error.what();
        t->abort(error.what());
      }
      t.reset();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

// At once, not when a minute is over; and in its own words on all ranks.
TEST(Failures, ARankThatThrowsEndsAllAtOnce) {
  for (const char* plan : {kExperts, kPipeline}) {
    SCOPED_TRACE(plan);
    const auto began = std::chrono::steady_clock::now();
    const auto errors = errors_of(plan, 60s, [](int n, Transport&) {
      if (n == kInTheMiddle) throw std::runtime_error("GEMM: not a number in row 5");
    });
    EXPECT_LT(std::chrono::steady_clock::now() - began, 30s);
    EXPECT_EQ(errors[2], "GEMM: not a number in row 5");
    for (const std::size_t rank : {0, 1, 3}) {
      EXPECT_THAT(errors[rank], HasSubstr("rank 2 failed: GEMM: not a number in row 5")) << rank;
    }
  }
}

// Whoever waits says so after a second; the one whose device stands still waits for nobody.
TEST(Failures, ARankWhoseDeviceHangsIsNamed) {
  for (const char* plan : {kExperts, kPipeline}) {
    SCOPED_TRACE(plan);
    const auto errors = errors_of(plan, 1s, [](int n, Transport&) {
      if (n == kInTheMiddle) std::this_thread::sleep_for(3s);
    });
    for (const std::size_t rank : {0, 1, 3}) {
      EXPECT_THAT(errors[rank], ContainsRegex("nothing from ranks? [013, and]*2")) << rank;
    }
  }
}

// The time-out is of one wait: a step may take longer.
TEST(Failures, ARankThatIsSlowIsWaitedFor) {
  const auto began = std::chrono::steady_clock::now();
  const auto errors = errors_of(kExperts, 700ms, [](int n, Transport&) {
    if (n % 50 == 0) std::this_thread::sleep_for(100ms);
  });
  EXPECT_GT(std::chrono::steady_clock::now() - began, 1500ms);
  EXPECT_EQ(errors, std::vector<std::string>(4));
}

TEST(Failures, ARankThatLeavesIsNoticedAtOnce) {
  const auto began = std::chrono::steady_clock::now();
  const auto errors = errors_of(
      kExperts, 60s, [](int, Transport&) {}, 1);
  EXPECT_LT(std::chrono::steady_clock::now() - began, 30s);
  EXPECT_EQ(errors[2], "");
  for (const std::size_t rank : {0, 1, 3}) {
    EXPECT_THAT(errors[rank], AnyOf(HasSubstr("rank 2 left before"),
                                    HasSubstr("nothing from rank 2: left before")))
        << rank;
  }
}

}  // namespace
}  // namespace orrery
