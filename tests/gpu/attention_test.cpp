// Attention on a GPU against its definition in double, by each of its kernels, and how fast it is
// beside what NVIDIA publishes. Skips itself, with the reason, where there is no GPU; fails if the
// environment has ORRERY_NEEDS_GPU.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <variant>
#include <vector>

#include "kernels/call.hpp"
#include "kernels/choose_attention.hpp"
#include "kernels/device.hpp"
#include "tests/kernels/attention_for_tests.hpp"

namespace orrery::kernels {
namespace {

class GpuCallsAttention : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto opened = open_cuda_device();
    if (auto* found = std::get_if<std::unique_ptr<Device>>(&opened)) {
      device_ = std::move(*found);
    } else {
      reason_ = std::get<std::string>(opened);
    }
  }
  static void TearDownTestSuite() { device_.reset(); }
  void SetUp() override {
    if (device_) {
      stream_ = device_->create_stream();
      return;
    }
    if (std::getenv("ORRERY_NEEDS_GPU") != nullptr) FAIL() << reason_;
    GTEST_SKIP() << reason_;
  }
  void TearDown() override {
    if (!device_) return;
    device_->synchronize();
    for (void* memory : memory_) device_->release(memory);
  }

  Device& device() { return *device_; }
  StreamHandle stream() const { return stream_; }
  /// Of SMs: cuDNN's engines take all or none, so with one less the own kernel runs.
  int all_but_one() { return device_->sms() - 1; }

  void* allocate(std::size_t bytes) {
    memory_.push_back(device_->allocate(bytes));
    return memory_.back();
  }

  /// Rows of exactly heads * d columns, BF16 or FP32.
  Matrix matrix(std::int64_t rows, std::int64_t columns, Format format) {
    return {.data = allocate(static_cast<std::size_t>(element_bytes(rows, columns, format))),
            .rows = rows,
            .columns = columns,
            .pitch = columns,
            .format = format};
  }
  void upload(const Matrix& m, const std::vector<float>& values) {
    if (m.format == Format::fp32) {
      device_->upload(m.data, values.data(), values.size() * 4);
      return;
    }
    std::vector<std::uint16_t> codes;
    for (const float x : values) codes.push_back(bf16_of(x));
    device_->upload(m.data, codes.data(), codes.size() * 2);
  }
  std::vector<double> download(const Matrix& m) {
    std::vector<double> values;
    const auto count = static_cast<std::size_t>(m.rows * m.columns);
    if (m.format == Format::fp32) {
      std::vector<float> numbers(count);
      device_->download(numbers.data(), m.data, count * 4);
      values.assign(numbers.begin(), numbers.end());
    } else {
      std::vector<std::uint16_t> codes(count);
      device_->download(codes.data(), m.data, count * 2);
      for (const std::uint16_t code : codes) {
        values.push_back(static_cast<double>(float_of_bf16(code)));
      }
    }
    return values;
  }
  /// Not a number anywhere.
  void poison(const Matrix& m) {
    upload(m, std::vector<float>(static_cast<std::size_t>(m.rows * m.columns), std::nanf("")));
  }
  std::vector<double> draw(const Matrix& m, double deviation, std::mt19937_64& random) {
    std::normal_distribution<double> normal(0, deviation);
    std::vector<float> values;
    for (std::int64_t i = 0; i < m.rows * m.columns; ++i) {
      values.push_back(static_cast<float>(normal(random)));
    }
    upload(m, values);
    return download(m);
  }

  struct Calls {
    AttentionForward forward;
    AttentionBackward backward;
  };
  Calls calls_for(const AttentionShape& s, Format format) {
    Calls c;
    c.forward.shape = c.backward.shape = s;
    c.forward.q = c.backward.q = matrix(s.batch * s.q_len, s.heads * s.d_qk, format);
    c.forward.k = c.backward.k = matrix(s.batch * s.kv_len, s.kv_heads * s.d_qk, format);
    c.forward.v = c.backward.v = matrix(s.batch * s.kv_len, s.kv_heads * s.d_v, format);
    c.forward.out = c.backward.out = matrix(s.batch * s.q_len, s.heads * s.d_v, format);
    c.forward.lse = static_cast<float*>(
        allocate(static_cast<std::size_t>(s.batch * s.heads * s.q_len) * sizeof(float)));
    c.backward.lse = c.forward.lse;
    c.backward.d_out = matrix(s.batch * s.q_len, s.heads * s.d_v, format);
    c.backward.d_q = matrix(s.batch * s.q_len, s.heads * s.d_qk, format);
    c.backward.d_k = matrix(s.batch * s.kv_len, s.kv_heads * s.d_qk, format);
    c.backward.d_v = matrix(s.batch * s.kv_len, s.kv_heads * s.d_v, format);
    c.backward.workspace = allocate(static_cast<std::size_t>(attention_workspace_bytes(s)));
    return c;
  }

  /// `positions`: query_positions, or empty.
  void check(AttentionShape s, Format format, int sms,
             const std::vector<std::int32_t>& positions = {}) {
    static std::uint64_t seed = std::random_device{}();
    SCOPED_TRACE("seed " + std::to_string(++seed) + ", SMs " + std::to_string(sms) + ", " +
                 std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " heads, " +
                 std::to_string(s.q_len) + "x" + std::to_string(s.kv_len) + ", " +
                 std::to_string(s.d_qk) + "/" + std::to_string(s.d_v));
    std::mt19937_64 random(seed);
    Calls c = calls_for(s, format);
    if (!positions.empty()) {
      s.query_positions = positions.data();
      const std::size_t bytes = positions.size() * sizeof(std::int32_t);
      auto* const there = static_cast<std::int32_t*>(allocate(bytes));
      device_->upload(there, positions.data(), bytes);
      c.forward.shape.query_positions = c.backward.shape.query_positions = there;
    }
    AttentionNumbers numbers{.shape = s,
                             .q = draw(c.forward.q, 2, random),
                             .k = draw(c.forward.k, 1, random),
                             .v = draw(c.forward.v, 1, random),
                             .d_out = draw(c.backward.d_out, 1, random)};
    const AttentionResults expected = attention_by_definition(numbers);
    std::vector<std::vector<double>> first;
    for (int run = 0; run < 2; ++run) {
      for (const Matrix& m : {c.forward.out, c.backward.d_q, c.backward.d_k, c.backward.d_v}) {
        poison(m);
      }
      const Matrix lse{.data = c.forward.lse,
                       .rows = 1,
                       .columns = s.batch * s.heads * s.q_len,
                       .pitch = s.batch * s.heads * s.q_len,
                       .format = Format::fp32};
      poison(lse);
      device_->enqueue(stream_, c.forward, sms);
      device_->enqueue(stream_, c.backward, sms);
      device_->synchronize();
      std::vector<std::vector<double>> results;
      for (const Matrix& m : {c.forward.out, lse, c.backward.d_q, c.backward.d_k, c.backward.d_v}) {
        results.push_back(download(m));
      }
      if (run == 0) {
        const bool wide = format == Format::fp32;
        // BF16: 2^-9 of rounding in P and dS, and again in what is stored.
        EXPECT_LT(distance(results[0], expected.out), wide ? 1e-5 : 5e-3);
        EXPECT_LT(distance(results[1], expected.lse), 1e-5);
        EXPECT_LT(distance(results[2], expected.d_q), wide ? 1e-5 : 1e-2);
        EXPECT_LT(distance(results[3], expected.d_k), wide ? 1e-5 : 1e-2);
        EXPECT_LT(distance(results[4], expected.d_v), wide ? 1e-5 : 1e-2);
        first = results;
      } else {
        // The same sums in the same order: the same bits.
        EXPECT_EQ(results, first);
      }
    }
  }

  /// Median of single runs, out of a cold cache.
  double seconds(const Call& call, int sms) {
    constexpr int kRuns = 11;
    std::vector<double> times;
    const EventHandle begin = device_->create_event();
    const EventHandle end = device_->create_event();
    for (int run = 0; run < kRuns + 2; ++run) {
      device_->flush_cache(stream_);
      device_->record(stream_, begin);
      device_->enqueue(stream_, call, sms);
      device_->record(stream_, end);
      device_->synchronize();
      if (run < 2) continue;  // compiles and loads
      times.push_back(static_cast<double>(device_->reached_ns(end) - device_->reached_ns(begin)) *
                      1e-9);
    }
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    return times[kRuns / 2];
  }

 private:
  static inline std::unique_ptr<Device> device_;
  static inline std::string reason_;
  StreamHandle stream_;
  std::vector<void*> memory_;
};
class GpuSpeedAttention : public GpuCallsAttention {};

AttentionShape shape_of(std::int64_t batch, std::int64_t heads, std::int64_t kv_heads,
                        std::int64_t q_len, std::int64_t kv_len, std::int64_t d_qk,
                        std::int64_t d_v, bool causal = true) {
  return {.batch = batch,
          .heads = heads,
          .kv_heads = kv_heads,
          .q_len = q_len,
          .kv_len = kv_len,
          .d_qk = d_qk,
          .d_v = d_v,
          .causal = causal,
          .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(d_qk)))};
}

const std::vector<AttentionShape> kShapes = {
    shape_of(1, 4, 4, 512, 512, 192, 128),        shape_of(1, 2, 2, 333, 333, 192, 128),
    shape_of(2, 8, 2, 200, 200, 128, 128),        shape_of(2, 4, 4, 128, 128, 64, 64),
    shape_of(1, 3, 3, 77, 405, 192, 128),         shape_of(1, 4, 1, 640, 640, 64, 64),
    shape_of(1, 2, 2, 130, 257, 128, 128, false),
};

TEST_F(GpuCallsAttention, WithAllSmsIsRight) {
  for (const AttentionShape& shape : kShapes) check(shape, Format::bf16, 0);
}
TEST_F(GpuCallsAttention, OnTheTensorCoresByOurOwnKernelIsRight) {
  for (const AttentionShape& shape : kShapes) {
    check(shape, Format::bf16, all_but_one());
    check(shape, Format::bf16, 3);
  }
}
TEST_F(GpuCallsAttention, OnTheCudaCoresIsRight) {
  for (const AttentionShape& shape : kShapes) check(shape, Format::fp32, 0);
  check(shape_of(1, 2, 2, 50, 61, 24, 17), Format::bf16, 0);
}

// Two pieces of a sequence that is split over GPUs.
TEST_F(GpuCallsAttention, WithATableIsRight) {
  std::vector<std::int32_t> positions;
  for (std::int32_t i = 0; i < 150; ++i) positions.push_back(150 + i);
  for (std::int32_t i = 0; i < 150; ++i) positions.push_back(600 + i);
  check(shape_of(1, 4, 4, 300, 900, 192, 128), Format::bf16, 0, positions);
  check(shape_of(2, 4, 2, 300, 900, 128, 128), Format::bf16, 0, positions);
  check(shape_of(1, 2, 1, 300, 900, 64, 64), Format::fp32, 0, positions);
}

/// TFLOP/s that NVIDIA measured on an H200 with cuDNN 9.19, deterministic backward: benchmark/
/// sdpa_benchmark_training/results/h200_919_only_cudnn/dsv3_20260227_034744.csv of
/// NVIDIA/cudnn-frontend@3929da2. It counts half of the products for causal masks, as this does.
struct Published {
  std::int64_t length;
  double forward, backward;
};
constexpr Published kPublished[] = {{2048, 522, 352}, {4096, 599, 404}, {8192, 643, 442}};

TEST_F(GpuSpeedAttention, OfDeepSeekV3sHeads) {
  std::printf("\n%s, out of a cold cache: TFLOP/s of causal attention, 128 heads of 192/128\n",
              device().name().c_str());
  std::printf("%-26s%10s %10s %10s %10s\n", "tokens", "forward", "H200 cuDNN", "backward",
              "H200 cuDNN");
  std::mt19937_64 random(1);
  for (const Published& published : kPublished) {
    const AttentionShape s = shape_of(1, 128, 128, published.length, published.length, 192, 128);
    const Calls c = calls_for(s, Format::bf16);
    draw(c.forward.q, 1, random);
    draw(c.forward.k, 1, random);
    draw(c.forward.v, 1, random);
    draw(c.backward.d_out, 1, random);
    const double pairs = 128.0 * static_cast<double>(published.length * published.length) / 2;
    const double forward = 2 * pairs * (192 + 128);
    const double backward = 2 * pairs * (3 * 192 + 2 * 128);
    for (const int sms : {0, all_but_one()}) {
      const double rates[] = {forward / seconds(c.forward, sms) * 1e-12,
                              backward / seconds(c.backward, sms) * 1e-12};
      std::printf("%-8lld%-18s%10.0f %10.0f %10.0f %10.0f\n",
                  static_cast<long long>(published.length), sms == 0 ? "all SMs" : "own kernel",
                  rates[0], published.forward, rates[1], published.backward);
      // Less than a tenth of what the chip can do is a mistake, not a slow kernel.
      EXPECT_GT(rates[0], 60);
      EXPECT_GT(rates[1], 40);
    }
  }
}

}  // namespace
}  // namespace orrery::kernels
