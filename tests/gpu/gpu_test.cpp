// The CUDA device on a GPU. Each test skips itself, with the reason, where there is none; it fails
// if the environment has ORRERY_NEEDS_GPU.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "../emulated/streaming_cases.hpp"
#include "kernels/call.hpp"
#include "kernels/device.hpp"
#include "kernels/profiler.hpp"
#include "kernels/reference/reference.hpp"
#include "tests/kernels/call_cases.hpp"

namespace orrery::kernels {
namespace {

using namespace std::chrono_literals;

std::int64_t monotonic_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

class Gpu : public testing::Test {
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
    if (device_) return;
    if (std::getenv("ORRERY_NEEDS_GPU") != nullptr) FAIL() << reason_;
    GTEST_SKIP() << reason_;
  }
  void TearDown() override {
    if (!device_) return;
    device_->synchronize();
    for (void* memory : memory_) device_->release(memory);
  }

  Device& device() { return *device_; }

  template <class T>
  T* allocate(std::int64_t elements) {
    memory_.push_back(device_->allocate(static_cast<std::size_t>(elements) * sizeof(T)));
    return static_cast<T*>(memory_.back());
  }
  template <class T>
  T* on_device(const std::vector<T>& values) {
    T* const there = allocate<T>(static_cast<std::int64_t>(values.size()));
    device_->upload(there, values.data(), values.size() * sizeof(T));
    return there;
  }
  template <class T>
  std::vector<T> to_host(const T* there, std::int64_t elements) {
    std::vector<T> values(static_cast<std::size_t>(elements));
    device_->download(values.data(), there, values.size() * sizeof(T));
    return values;
  }

  /// A contiguous matrix of normal numbers, with scales of 1 where it has scales.
  Matrix matrix(std::int64_t rows, std::int64_t columns, Format format,
                Scaling scaling = Scaling::none) {
    Matrix m{.rows = rows, .columns = columns, .pitch = columns, .format = format};
    const auto bytes = static_cast<std::size_t>(element_bytes(rows, columns, format));
    // A piece of random numbers, repeated: enough for memory to move real data.
    std::vector<unsigned char> host(bytes);
    const std::vector<unsigned char> piece = random_codes(format);
    for (std::size_t at = 0; at < bytes; at += piece.size()) {
      std::memcpy(host.data() + at, piece.data(), std::min(piece.size(), bytes - at));
    }
    m.data = on_device(host);
    if (scaling != Scaling::none) {
      m.scaling = scaling;
      m.scale_pitch = scale_pitch_of(rows, columns, scaling);
      m.scales = on_device(std::vector<float>(
          static_cast<std::size_t>(scale_elements(rows, columns, scaling)), 1.0F));
    }
    return m;
  }

  static std::vector<unsigned char> random_codes(Format format) {
    constexpr std::size_t kElements = 1 << 18;
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    std::vector<unsigned char> bytes;
    const auto append = [&](const auto& code) {
      const auto* const at = reinterpret_cast<const unsigned char*>(&code);
      bytes.insert(bytes.end(), at, at + sizeof code);
    };
    for (std::size_t i = 0; i < kElements; ++i) {
      if (format == Format::fp32) append(normal(generator));
      if (format == Format::bf16) append(bf16_of(normal(generator)));
      if (format == Format::e4m3) append(e4m3_of(64 * normal(generator)));
      if (format == Format::e5m6 && i % 2 == 0) {
        for (int b = 0; b < 3; ++b) append(static_cast<unsigned char>(generator()));
      }
    }
    return bytes;
  }

 private:
  static inline std::unique_ptr<Device> device_;
  static inline std::string reason_;
  std::vector<void*> memory_;
};

TEST_F(Gpu, HasANameAndSms) {
  EXPECT_NE(device().name().find("NVIDIA"), std::string::npos);
  EXPECT_GT(device().sms(), 60);
}

TEST_F(Gpu, KeepsWhatIsUploaded) {
  std::vector<std::int32_t> numbers(100'003);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<std::int32_t>(i * i);
  EXPECT_EQ(to_host(on_device(numbers), 100'003), numbers);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(allocate<char>(1)) % 256, 0U);
  EXPECT_NE(allocate<char>(0), nullptr);
  EXPECT_THROW(device().allocate(std::size_t{1} << 50U), std::bad_alloc);
}

TEST_F(Gpu, SaysWhenAStreamReachedAnEvent) {
  const StreamHandle stream = device().create_stream();
  const EventHandle first = device().create_event();
  const EventHandle second = device().create_event();
  const std::int64_t before_ns = monotonic_ns();
  device().record(stream, first);
  device().enqueue_host(stream, [] { std::this_thread::sleep_for(50ms); });
  device().record(stream, second);
  device().synchronize();
  const std::int64_t after_ns = monotonic_ns();
  constexpr std::int64_t kSlack_ns = 1'000'000;
  EXPECT_GE(device().reached_ns(second) - device().reached_ns(first), 49'900'000);
  EXPECT_GE(device().reached_ns(first), before_ns - kSlack_ns);
  EXPECT_LE(device().reached_ns(second), after_ns + kSlack_ns);
}

TEST_F(Gpu, MakesAStreamWaitForAnother) {
  const StreamHandle first = device().create_stream();
  const StreamHandle second = device().create_stream();
  const EventHandle cleared = device().create_event();
  float* const from = on_device(std::vector<float>(1024, 3.0F));
  float* const to = on_device(std::vector<float>(1024, 5.0F));
  device().enqueue_host(first, [] { std::this_thread::sleep_for(20ms); });
  device().enqueue(first, Fill{from, 4096});
  device().record(first, cleared);
  device().wait(second, cleared);
  device().enqueue(second, Loopback{from, to, 4096});
  device().synchronize();
  EXPECT_EQ(to_host(to, 1024), std::vector<float>(1024, 0.0F));
}

TEST_F(Gpu, ThrowsWhatHostWorkThrewAndGoesOn) {
  const StreamHandle stream = device().create_stream();
  bool ran = false;
  device().enqueue_host(stream, [] { throw std::runtime_error("the peer is gone"); });
  device().enqueue_host(stream, [&] { ran = true; });
  try {
    device().synchronize();
    FAIL() << "no error";
  } catch (const std::runtime_error& e) {
    EXPECT_STREQ(e.what(), "the peer is gone");
  }
  EXPECT_FALSE(ran);
  device().enqueue_host(stream, [&] { ran = true; });
  device().synchronize();
  EXPECT_TRUE(ran);
}

TEST_F(Gpu, RunsARecordingAgainAndAgain) {
  const StreamHandle first = device().create_stream();
  const StreamHandle second = device().create_stream();
  const EventHandle half = device().create_event();
  const EventHandle end = device().create_event();
  constexpr std::int64_t kElements = 5000;
  const auto line = [&](float value) {
    return Matrix{.data = on_device(std::vector<float>(kElements, value)),
                  .rows = 1,
                  .columns = kElements,
                  .pitch = kElements};
  };
  const Matrix sum = line(0);
  const Matrix one = line(1);
  const Matrix copy = line(7);
  int host_runs = 0;
  Recorder& recorder = *device().recorder();
  recorder.begin();
  device().enqueue(first, Add{.terms = {sum, one}, .out = sum});
  device().enqueue_host(first, [&] { ++host_runs; });
  device().record(first, half);
  device().wait(second, half);
  device().enqueue(second, Copy{.from = sum, .to = copy});
  device().record(second, end);
  const RecordingHandle recording = recorder.end();
  device().synchronize();
  EXPECT_EQ(host_runs, 0) << "recorded, not run";
  for (int run = 1; run <= 5; ++run) {
    const std::int64_t before_ns = monotonic_ns();
    recorder.enqueue(recording);
    device().synchronize();
    EXPECT_EQ(host_runs, run);
    EXPECT_EQ(to_host(static_cast<const float*>(copy.data), kElements),
              std::vector<float>(kElements, static_cast<float>(run)));
    EXPECT_LE(device().reached_ns(half), device().reached_ns(end));
    EXPECT_GE(device().reached_ns(half), before_ns - 1'000'000);
  }
}

TEST_F(Gpu, RecordsKernelsWithTheIdOfTheirCall) {
  const StreamHandle stream = device().create_stream();
  const std::int64_t bytes = std::int64_t{64} << 20U;
  char* const from = allocate<char>(bytes);
  char* const to = allocate<char>(bytes);
  device().enqueue(stream, Fill{from, bytes});  // once, to load the code
  device().enqueue(stream, Loopback{from, to, bytes});
  device().synchronize();
  Profiler& profiler = *device().profiler();
  const std::int64_t before_ns = monotonic_ns();
  profiler.begin();
  profiler.push_external(7);
  device().enqueue(stream, Fill{from, bytes});
  profiler.pop_external();
  profiler.push_external(8);
  device().enqueue(stream, Loopback{from, to, bytes}, 20);
  profiler.pop_external();
  const std::vector<KernelRecord> kernels = profiler.collect();
  const std::int64_t after_ns = monotonic_ns();
  ASSERT_EQ(kernels.size(), 2U);
  EXPECT_EQ(kernels[0].external_id, 7U);
  EXPECT_NE(kernels[0].name.find("fill_zero"), std::string::npos) << kernels[0].name;
  EXPECT_EQ(kernels[1].external_id, 8U);
  EXPECT_NE(kernels[1].name.find("copy_bytes"), std::string::npos) << kernels[1].name;
  EXPECT_EQ(kernels[1].grid[0], 20) << "one block an SM";
  EXPECT_GE(kernels[0].start_ns, before_ns - 1'000'000);
  EXPECT_LT(kernels[0].start_ns, kernels[0].end_ns);
  EXPECT_LE(kernels[0].end_ns, kernels[1].start_ns);
  EXPECT_LE(kernels[1].end_ns, after_ns + 1'000'000);
}

TEST_F(Gpu, CountsTheBytesOfACopy) {
  const StreamHandle stream = device().create_stream();
  const std::int64_t bytes = std::int64_t{1} << 30U;
  char* const from = allocate<char>(bytes);
  char* const to = allocate<char>(bytes);
  device().enqueue(stream, Fill{from, bytes});
  device().synchronize();
  std::vector<double> counted;
  try {
    counted = device().profiler()->count({"dram__bytes_read.sum", "dram__bytes_write.sum"}, [&] {
      device().enqueue(stream, Loopback{from, to, bytes});
    });
  } catch (const std::runtime_error& e) {
    GTEST_SKIP() << e.what();
  }
  const auto all = static_cast<double>(bytes);
  // The last-level cache keeps some tens of MB of what is written.
  EXPECT_NEAR(counted[0] / all, 1, 0.1);
  EXPECT_NEAR(counted[1] / all, 1, 0.1);
}

// ---------------------------------------------------------------------------------------------
// Calls against the reference, with all SMs and with some.

class GpuCalls : public Gpu {};
class GpuStreaming : public Gpu, public testing::WithParamInterface<streaming::Family> {};

TEST_P(GpuStreaming, IsAsTheReference) {
  const StreamHandle stream = device().create_stream();
  char* const there = allocate<char>(streaming::Arena::kBytes);
  std::uint32_t seed = 0;
  for (const auto& make : GetParam().cases()) {
    for (const int sms : {0, 20}) {
      streaming::Arena wanted(++seed);
      const Call call = make(wanted);
      streaming::Arena got = wanted.copy(there);
      const Call call_there = make(got);
      reference::run(call);
      device().upload(there, got.data(), streaming::Arena::kBytes);
      device().enqueue(stream, call_there, sms);
      device().synchronize();
      device().download(got.data(), there, streaming::Arena::kBytes);
      EXPECT_EQ(wanted.differences(got), "") << describe(call) << " on " << sms << " SMs";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Calls, GpuStreaming, testing::ValuesIn(streaming::families()),
                         [](const auto& family) { return family.param.name; });

TEST_F(GpuCalls, OfAllKindsAreAsTheReference) {
  // Sums of tensor cores, and probabilities that are rounded: see DeviceTolerance.
  const DeviceTolerance tolerance{.e4m3_product = 0x1p-13, .bf16_attention = 0x1p-8};
  const StreamHandle stream = device().create_stream();
  for (const CallCase& test : call_cases()) {
    CaseResult last;
    for (const int sms : {0, 0, 20}) {
      const CaseResult result = run_case(test, device(), stream, 11, tolerance, sms);
      for (const std::string& problem : result.problems) {
        ADD_FAILURE() << test.name << " on " << sms << " SMs: " << problem;
      }
      if (sms == 0 && !last.results.empty()) {
        EXPECT_TRUE(result.results == last.results) << test.name << ": two runs differ";
      }
      last = result;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Speed, for the eye: sizes of a layer of DeepSeek-V3 with 4096 tokens. Nothing is asserted but
// that it ran.

class GpuSpeed : public Gpu {
 protected:
  /// Median time, each run out of a cold cache.
  double seconds(const Call& call, int sms) {
    constexpr int kRuns = 11;
    std::vector<double> times;
    const EventHandle begin = device().create_event();
    const EventHandle end = device().create_event();
    for (int run = 0; run < kRuns + 2; ++run) {
      device().flush_cache(stream_);
      device().record(stream_, begin);
      device().enqueue(stream_, call, sms);
      device().record(stream_, end);
      device().synchronize();
      if (run < 2) continue;  // loads code
      times.push_back(static_cast<double>(device().reached_ns(end) - device().reached_ns(begin)) *
                      1e-9);
    }
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    return times[kRuns / 2];
  }

  void row(const Call& call, int sms = 0) {
    const double time = seconds(call, sms);
    const Cost cost = cost_of(call);
    std::printf("%-56s %4d %9.1f %8.0f %8.1f\n", describe(call).c_str(),
                sms == 0 ? device().sms() : sms, time * 1e6, cost.bytes / time * 1e-9,
                cost.flops / time * 1e-12);
  }

  void head() {
    stream_ = device().create_stream();
    std::printf("\n%s, out of a cold cache\n%-56s %4s %9s %8s %8s\n", device().name().c_str(),
                "call", "SMs", "us", "GB/s", "TFLOP/s");
  }

  StreamHandle stream_;
};

TEST_F(GpuSpeed, OfStreamingKernels) {
  head();
  constexpr std::int64_t kTokens = 4096;
  constexpr std::int64_t kHidden = 7168;
  constexpr std::int64_t kRows = 32768;  // 4096 tokens, 8 experts each
  constexpr std::int64_t kWidth = 2048;  // of an expert
  const auto bf16 = [&](std::int64_t rows, std::int64_t columns) {
    return matrix(rows, columns, Format::bf16);
  };
  const auto fp32 = [&](std::int64_t rows, std::int64_t columns) {
    return matrix(rows, columns, Format::fp32);
  };
  const auto e4m3 = [&](std::int64_t rows, std::int64_t columns, Scaling scaling = Scaling::rows) {
    return matrix(rows, columns, Format::e4m3, scaling);
  };
  const Matrix x = bf16(kTokens, kHidden);
  const Matrix y = bf16(kTokens, kHidden);
  const Matrix gain = fp32(1, kHidden);

  for (const int sms : {0, 112}) {
    row(NormForward{.terms = {x}, .gain = gain, .y = y}, sms);
    row(NormForward{.terms = {x, y},
                    .sum = bf16(kTokens, kHidden),
                    .gain = gain,
                    .y = bf16(kTokens, kHidden)},
        sms);
    row(NormBackward{.d_y = x,
                     .x = y,
                     .gain = gain,
                     .d_x = bf16(kTokens, kHidden),
                     .d_gain = static_cast<float*>(fp32(1, kHidden).data)},
        sms);
  }
  std::vector<std::int32_t> positions(kTokens);
  for (std::int64_t i = 0; i < kTokens; ++i)
    positions[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i);
  row(Rope{.x = bf16(kTokens, std::int64_t{128} * 192),
           .heads = 128,
           .head_dim = 192,
           .offset = 128,
           .dim = 64,
           .positions = on_device(positions)});
  row(HeadCopy{.from = bf16(kTokens, 64),
               .to = bf16(kTokens, std::int64_t{128} * 192),
               .heads = 128,
               .width = 64,
               .to_offset = 128,
               .to_stride = 192});

  const Matrix gate_up = bf16(kRows, 2 * kWidth);
  const Matrix d_out = bf16(kRows, kWidth);
  row(ActivationForward{.in = gate_up, .out = bf16(kRows, kWidth)});
  row(ActivationForward{.in = gate_up, .out = e4m3(kRows, kWidth)});
  row(ActivationBackward{.in = gate_up,
                         .d_out = d_out,
                         .d_in = bf16(kRows, 2 * kWidth),
                         .out_again = e4m3(kRows, kWidth)});
  row(Quantize{.from = x, .to = e4m3(kTokens, kHidden)});
  row(Quantize{.from = bf16(kHidden, kWidth), .to = e4m3(kHidden, kWidth, Scaling::blocks)});
  row(Quantize{.from = x, .to = matrix(kTokens, kHidden, Format::e5m6, Scaling::rows)});
  row(Dequantize{.from = e4m3(kTokens, kHidden), .to = y});
  row(Transpose{.from = e4m3(kRows, kHidden), .to = e4m3(kHidden, kRows)});
  row(Transpose{.from = e4m3(kHidden, 2 * kWidth, Scaling::blocks),
                .to = e4m3(2 * kWidth, kHidden, Scaling::blocks)});

  std::vector<std::int32_t> experts(kRows);
  std::mt19937 generator(2);
  for (auto& expert : experts) expert = static_cast<std::int32_t>(generator() % 32) - 28;
  RoutingMap map{.experts = on_device(experts),
                 .weights = static_cast<const float*>(fp32(1, kRows).data),
                 .max_tokens = kTokens,
                 .top_k = 8,
                 .local_experts = 4,
                 .alignment = 128,
                 .capacity = kRows};
  map.group_begin = allocate<std::int32_t>(5);
  map.group_rows = allocate<std::int32_t>(4);
  map.used_rows = allocate<std::int32_t>(1);
  map.row_source = allocate<std::int32_t>(kRows);
  map.row_weight = allocate<float>(kRows);
  map.slot_row = allocate<std::int32_t>(kRows);
  map.overflow = allocate<std::int32_t>(1);
  row(Router{.logits = fp32(kTokens, 256),
             .bias = static_cast<const float*>(fp32(1, 256).data),
             .scale = 2.5F,
             .groups = 8,
             .group_limit = 4,
             .top_k = 8,
             .scores = allocate<float>(kTokens * 256),
             .experts = allocate<std::int32_t>(kTokens * 8),
             .weights = allocate<float>(kTokens * 8)});
  row(map);
  row(Unpermute{.from = bf16(kRows, kHidden), .to = y, .slot_row = map.slot_row, .top_k = 8});

  std::vector<std::int32_t> tokens(kTokens);
  for (auto& token : tokens) token = static_cast<std::int32_t>(generator() % 16160);
  const std::int32_t* const token_ids = on_device(tokens);
  row(Embedding{.table = bf16(16160, kHidden), .out = y, .tokens = token_ids});
  row(EmbeddingBackward{.d_out = x, .d_table = fp32(16160, kHidden), .tokens = token_ids});
  const Matrix logits = bf16(kTokens, 129'280 / 8);
  row(CrossEntropyPartial{
      .logits = logits, .targets = token_ids, .partial = allocate<float>(3 * kTokens)});
  row(CrossEntropyBackward{.logits = logits,
                           .targets = token_ids,
                           .lse = static_cast<const float*>(fp32(1, kTokens).data)});

  constexpr std::int64_t kElements = 100'000'000;
  const AdamScalars scalars{.learning_rate = 1e-4F, .beta1_power = 0.9F, .beta2_power = 0.95F};
  row(AdamW{.elements = kElements,
            .gradient = static_cast<const float*>(fp32(1, kElements).data),
            .master = static_cast<float*>(fp32(1, kElements).data),
            .first_moment = bf16(1, kElements).data,
            .second_moment = on_device(std::vector<std::uint16_t>(kElements, bf16_of(0.5F))),
            .moments = Format::bf16,
            .parameter = bf16(1, kElements).data,
            .parameters = Format::bf16,
            .scalars = on_device(std::vector<AdamScalars>{scalars})});
  row(SquareSum{.values = static_cast<const float*>(fp32(1, kElements).data),
                .elements = kElements,
                .out = allocate<double>(1)});
  const std::int64_t bytes = std::int64_t{1} << 30U;
  char* const from = allocate<char>(bytes);
  char* const to = allocate<char>(bytes);
  for (const int sms : {1, 8, 20, 24, 64, 0}) row(Loopback{from, to, bytes}, sms);
  row(Fill{to, bytes});
}

}  // namespace
}  // namespace orrery::kernels
