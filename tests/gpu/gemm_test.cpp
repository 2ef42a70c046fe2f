// Products on a GPU: exact ones, and DeepSeek-V3's shapes with random numbers, how fast beside what
// others published. Each test skips itself, with the reason, where there is no GPU.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <variant>
#include <vector>

#include "../emulated/gemm_cases.hpp"
#include "kernels/call.hpp"
#include "kernels/device.hpp"

namespace orrery::kernels {
namespace {

class GpuGemm : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto opened = open_cuda_device();
    if (auto* found = std::get_if<std::unique_ptr<Device>>(&opened)) {
      device_ = std::move(*found);
      stream_ = device_->create_stream();
    } else {
      reason_ = std::get<std::string>(opened);
    }
  }
  static void TearDownTestSuite() { device_.reset(); }
  void SetUp() override {
    if (!device_) GTEST_SKIP() << reason_;
  }
  void TearDown() override { release(); }

  Device& device() { return *device_; }
  StreamHandle stream() const { return stream_; }

  void release() {
    if (!device_) return;
    device_->synchronize();
    for (void* memory : memory_) device_->release(memory);
    memory_.clear();
  }
  void* allocate(std::size_t bytes) {
    memory_.push_back(device_->allocate(bytes));
    return memory_.back();
  }
  template <class T>
  T* on_device(const T* values, std::size_t bytes) {
    void* const there = allocate(bytes);
    device_->upload(there, values, bytes);
    return static_cast<T*>(there);
  }
  Matrix on_device(const GemmOperand& x) {
    Matrix m = x.matrix();
    m.data = on_device(static_cast<const unsigned char*>(m.data), x.data_bytes());
    if (m.scales != nullptr) m.scales = on_device(m.scales, x.scales_bytes());
    return m;
  }

  void expect_exact(const GemmCase& c, int sms) {
    const GemmProblem problem(c);
    const std::unique_ptr<GemmOperand> d = problem.make_d();
    Gemm call = problem.call(*d);
    call.a = on_device(problem.a());
    call.b = on_device(problem.b());
    call.d = on_device(*d);
    call.group_begin = on_device(c.begin.data(), c.begin.size() * sizeof(std::int32_t));
    call.group_rows = on_device(c.rows.data(), c.rows.size() * sizeof(std::int32_t));
    ASSERT_EQ(why_impossible(call), "");
    device().enqueue(stream(), call, sms);
    device().synchronize();
    device().download(d->matrix().data, call.d.data, d->data_bytes());
    problem.compare(*d);
    release();
  }

 private:
  static inline std::unique_ptr<Device> device_;
  static inline StreamHandle stream_;
  static inline std::string reason_;
  std::vector<void*> memory_;
};

TEST_F(GpuGemm, WgmmaIsExact) {
  for (const NamedGemmCase& named : wgmma_cases()) {
    for (const int sms : {0, 112, 3, 1}) {
      SCOPED_TRACE(std::string(named.name) + " on " + std::to_string(sms) + " SMs");
      ASSERT_NO_FATAL_FAILURE(expect_exact(named.c, sms));
    }
  }
}

TEST_F(GpuGemm, OddShapesAreExact) {
  for (const NamedGemmCase& named : odd_cases()) {
    SCOPED_TRACE(named.name);
    ASSERT_NO_FATAL_FAILURE(expect_exact(named.c, 0));
  }
}

TEST_F(GpuGemm, TheLibrarysAreExact) {
  // Aligned and densely packed, so that cuBLASLt takes them.
  constexpr Format kFp32 = Format::fp32;
  for (const Scaling scaling : {Scaling::blocks, Scaling::rows}) {
    ASSERT_NO_FATAL_FAILURE(expect_exact(
        {.format = Format::e4m3, .scaling_b = scaling, .m = 256, .n = 384, .k = 512}, 0));
  }
  for (const Format format : {Format::bf16, kFp32}) {
    for (const bool a : {false, true}) {
      for (const bool b : {false, true}) {
        GemmCase c{.format = format,
                   .m = 256,
                   .n = 384,
                   .k = 512,
                   .transposed_a = a,
                   .transposed_b = b,
                   .d = format};
        ASSERT_NO_FATAL_FAILURE(expect_exact(c, 0));
        c.accumulate = true;
        c.d = kFp32;
        ASSERT_NO_FATAL_FAILURE(expect_exact(c, 20));
      }
    }
  }
}

TEST_F(GpuGemm, Fp32IsNotMultipliedAsTf32) {
  // 1 + 2^-13 has more bits than TF32 keeps.
  GemmOperand a(128, 64, Format::fp32), b(128, 64, Format::fp32), d(128, 128, Format::fp32);
  for (std::int64_t r = 0; r < 128; ++r) {
    for (std::int64_t k = 0; k < 64; ++k) {
      a.set(r, k, k == 0 ? 1 + 0x1p-13F : 0);
      b.set(r, k, 1);
    }
  }
  Gemm call;
  call.a = on_device(a);
  call.b = on_device(b);
  call.d = on_device(d);
  device().enqueue(stream(), call);
  device().synchronize();
  device().download(d.matrix().data, call.d.data, d.data_bytes());
  EXPECT_EQ(d.stored(77, 5), 1 + 0x1p-13F);
}

// ---------------------------------------------------------------------------------------------
// DeepSeek-V3's shapes.

/// Numbers that repeat after a prime, so that neither rows nor tiles repeat: a matrix of any size
/// can be filled by copying, and every element is known.
class Numbers {
 public:
  static constexpr std::int64_t kPeriod = 1'000'003;

  Numbers(Format format, unsigned seed) : format_(format) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < kPeriod; ++i) {
      const float x = normal(random);
      if (format == Format::e4m3) {
        codes_.push_back(e4m3_of(100 * x));
        values_.push_back(float_of_e4m3(codes_.back()));
      } else {
        const std::uint16_t code = bf16_of(x);
        codes_.push_back(static_cast<std::uint8_t>(code & 0xffU));
        codes_.push_back(static_cast<std::uint8_t>(code >> 8U));
        values_.push_back(float_of_bf16(code));
      }
    }
  }
  double at(std::int64_t i) const { return values_[static_cast<std::size_t>(i % kPeriod)]; }
  std::vector<std::uint8_t> memory(std::int64_t elements) const {
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(elements * bits_of(format_) / 8));
    for (std::size_t i = 0; i < bytes.size(); i += codes_.size()) {
      std::memcpy(bytes.data() + i, codes_.data(), std::min(codes_.size(), bytes.size() - i));
    }
    return bytes;
  }

 private:
  Format format_;
  std::vector<std::uint8_t> codes_;
  std::vector<float> values_;
};

/// Published rates: TFLOP/s of the same product, with the sources below.
struct Published {
  double rate = 0;
  const char* source = "";
};
// deepseek-ai/DeepGEMM, README, on H800 SXM5: dense at commit a9967bc2, grouped at 55ab91f7.
constexpr const char* kDeepGemm = "DeepGEMM, H800";
// ai-dynamo/aiconfigurator@095f58a5, systems/data, torch's linear in SGLang 0.5.14 on H100 SXM.
constexpr const char* kTorch = "cuBLAS, H100";

struct Shape {
  const char* name = "";
  Format format = Format::e4m3;
  Grouping grouping = Grouping::none;
  std::int64_t groups = 1;
  std::int64_t m = 0, n = 0, k = 0;  ///< rows of all groups: m, or k where the contraction is split
  Published published;
  bool ours = false;                    ///< laid out so that cuBLASLt does not take it
  std::vector<std::int32_t> rows = {};  ///< of groups; empty: equal
};

/// A shape's operands on the device and what D has to be.
struct Operands {
  Gemm call;
  Numbers a, b;
  std::vector<float> scales_a, scales_b;
  std::vector<std::int32_t> begin, rows;
};

std::vector<float> random_scales(std::int64_t elements, unsigned seed) {
  std::vector<float> scales(static_cast<std::size_t>(elements));
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> value(0.5F, 2.0F);
  for (float& s : scales) s = value(random) / 100;
  return scales;
}

class GpuGemmShapes : public GpuGemm {
 protected:
  Operands make(const Shape& s) {
    Operands o{{}, Numbers(s.format, 1), Numbers(s.format, 2), {}, {}, {}, {}};
    Gemm& call = o.call;
    const bool fp8 = s.format == Format::e4m3;
    const bool by_k = s.grouping == Grouping::contraction;
    call.grouping = s.grouping;
    call.groups = s.groups;
    call.accumulate = by_k;
    const auto matrix = [&](std::int64_t rows, std::int64_t columns, const Numbers& numbers,
                            Scaling scaling, std::vector<float>& scales, unsigned seed,
                            std::int64_t scales_between = 0) {
      Matrix m{.rows = rows, .columns = columns, .pitch = columns, .format = s.format};
      const std::vector<std::uint8_t> bytes = numbers.memory(rows * columns);
      m.data = on_device(bytes.data(), bytes.size());
      if (!fp8) return m;
      m.scaling = scaling;
      m.scale_pitch = scale_pitch_of(rows, columns, scaling) + scales_between;
      const std::int64_t lines = ((scaling == Scaling::rows ? columns : rows) + kTile - 1) / kTile;
      scales = random_scales(lines * m.scale_pitch, seed);
      m.scales = on_device(scales.data(), scales.size() * sizeof(float));
      return m;
    };
    if (by_k && !fp8) {
      call.a_transposed = call.b_transposed = true;
      call.a = matrix(s.k, s.m, o.a, Scaling::none, o.scales_a, 3);
      call.b = matrix(s.k, s.n, o.b, Scaling::none, o.scales_b, 4);
    } else {
      const std::int64_t b_rows = s.grouping == Grouping::rows ? s.groups * s.n : s.n;
      call.a = matrix(s.m, s.k, o.a, Scaling::rows, o.scales_a, 3, s.ours ? 4 : 0);
      call.b = matrix(b_rows, s.k, o.b, by_k ? Scaling::rows : Scaling::blocks, o.scales_b, 4);
    }
    call.d = {.rows = (by_k ? s.groups : 1) * s.m,
              .columns = s.n,
              .pitch = s.n,
              .format = by_k ? Format::fp32 : Format::bf16};
    const auto d_bytes =
        static_cast<std::size_t>(element_bytes(call.d.rows, call.d.columns, call.d.format));
    // NaN, or zeros where it is added to.
    const std::vector<std::uint8_t> before(d_bytes, by_k ? 0 : 0xff);
    call.d.data = on_device(before.data(), d_bytes);
    o.rows = s.rows;
    if (o.rows.empty()) {
      o.rows.assign(static_cast<std::size_t>(s.groups),
                    static_cast<std::int32_t>((by_k ? s.k : s.m) / s.groups));
    }
    std::int32_t begin = 0;
    for (const std::int32_t rows : o.rows) {
      o.begin.push_back(begin);
      begin += (rows + 127) / 128 * 128;
    }
    call.group_begin = on_device(o.begin.data(), o.begin.size() * sizeof(std::int32_t));
    call.group_rows = on_device(o.rows.data(), o.rows.size() * sizeof(std::int32_t));
    return o;
  }

  /// Whether a row of D is computed, and for which group.
  static bool belongs(const Shape& s, const Operands& o, std::int64_t row, std::size_t& group) {
    if (s.grouping == Grouping::contraction) {
      group = static_cast<std::size_t>(row / s.m);
      return true;
    }
    for (group = 0; group < o.rows.size(); ++group) {
      if (row >= o.begin[group] && row < o.begin[group] + o.rows[group]) return true;
    }
    return false;
  }

  /// Some elements of D, and that those of groups are numbers and no others.
  void check_some(const Shape& s, const Operands& o) {
    const Matrix& d = o.call.d;
    std::vector<std::uint8_t> bytes(
        static_cast<std::size_t>(element_bytes(d.rows, d.columns, d.format)));
    device().download(bytes.data(), d.data, bytes.size());
    const auto got = [&](std::int64_t i) {
      if (d.format == Format::bf16) {
        std::uint16_t code = 0;
        std::memcpy(&code, bytes.data() + 2 * i, 2);
        return static_cast<double>(float_of_bf16(code));
      }
      float value = 0;
      std::memcpy(&value, bytes.data() + 4 * i, 4);
      return static_cast<double>(value);
    };
    std::int64_t wrong = 0;
    std::size_t group = 0;
    for (std::int64_t r = 0; r < d.rows; ++r) {
      const bool written = belongs(s, o, r, group);
      for (std::int64_t c = 0; c < d.columns; ++c) {
        wrong += std::isnan(got(r * d.columns + c)) == written ? 1 : 0;
      }
    }
    ASSERT_EQ(wrong, 0) << "elements that were not written, or should not have been";

    std::mt19937_64 random(5);
    for (int sample = 0; sample < 500; ++sample) {
      const auto row = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(d.rows));
      const auto column =
          static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(d.columns));
      if (!belongs(s, o, row, group)) continue;
      double sum = 0, magnitudes = 0;
      terms(s, o, group, row, column, [&](double x, double y) {
        sum += x * y;
        magnitudes += std::abs(x * y);
      });
      // E4M3 is summed with 14 bits over 32 products at a time (DeepSeek-V3 report 3.3.2), BF16 in
      // FP32 without rounding; then D's own rounding.
      const double accumulated = magnitudes * (s.format == Format::e4m3 ? 0x1p-10 : 0x1p-16);
      const double rounded = std::abs(sum) * (d.format == Format::bf16 ? 0x1p-8 : 0x1p-22);
      ASSERT_NEAR(got(row * d.columns + column), sum, accumulated + rounded)
          << "row " << row << ", column " << column;
    }
  }

  double milliseconds(const Gemm& call) {
    constexpr int kWarmUp = 3, kRuns = 21;
    std::vector<EventHandle> starts, ends;
    for (int i = 0; i < kWarmUp; ++i) device().enqueue(stream(), call);
    device().synchronize();
    for (int i = 0; i < kRuns; ++i) {
      starts.push_back(device().create_event());
      ends.push_back(device().create_event());
      device().flush_cache(stream());
      device().record(stream(), starts.back());
      device().enqueue(stream(), call);
      device().record(stream(), ends.back());
    }
    device().synchronize();
    std::vector<std::int64_t> times_ns;
    for (int i = 0; i < kRuns; ++i) {
      const auto at = static_cast<std::size_t>(i);
      times_ns.push_back(device().reached_ns(ends[at]) - device().reached_ns(starts[at]));
    }
    std::nth_element(times_ns.begin(), times_ns.begin() + kRuns / 2, times_ns.end());
    return static_cast<double>(times_ns[kRuns / 2]) / 1e6;
  }

  static double flops_of(const Shape& s, const Operands& o) {
    double rows = 0;
    for (const std::int32_t r : o.rows) rows += r;
    const bool by_k = s.grouping == Grouping::contraction;
    return 2.0 * rows * static_cast<double>(s.n) * static_cast<double>(by_k ? s.m : s.k);
  }

  void run(const std::vector<Shape>& shapes) {
    std::printf("%-22s %-30s %9s %9s %10s  %s\n", "", "", "ms", "TFLOP/s", "published", "by");
    for (const Shape& s : shapes) {
      SCOPED_TRACE(s.name);
      const Operands o = make(s);
      ASSERT_EQ(why_impossible(o.call), "");
      device().enqueue(stream(), o.call);
      device().synchronize();
      ASSERT_NO_FATAL_FAILURE(check_some(s, o));
      const double ms = milliseconds(o.call);
      const double rate = flops_of(s, o) / ms / 1e9;
      std::printf("%-22s %-30s %9.3f %9.0f", s.name, describe(o.call).c_str(), ms, rate);
      if (s.ours) std::printf(" (our kernel)");
      if (s.published.rate > 0) std::printf(" %10.0f  %s", s.published.rate, s.published.source);
      std::printf("\n");
      EXPECT_GT(rate, 1) << "not on the tensor cores";
      release();
    }
  }

 private:
  template <class Term>
  static void terms(const Shape& s, const Operands& o, std::size_t group, std::int64_t row,
                    std::int64_t column, const Term& term) {
    const Gemm& call = o.call;
    const bool by_k = s.grouping == Grouping::contraction;
    const std::int64_t a_row = by_k ? row % s.m : row;
    const std::int64_t b_row =
        column + (s.grouping == Grouping::rows ? static_cast<std::int64_t>(group) * s.n : 0);
    const std::int64_t first = by_k ? o.begin[group] : 0;
    const std::int64_t last = by_k ? first + o.rows[group] : s.k;
    const auto element = [](const Matrix& m, const Numbers& numbers,
                            const std::vector<float>& scales, bool transposed, std::int64_t r,
                            std::int64_t k) {
      if (transposed) return numbers.at(k * m.pitch + r);
      const double value = numbers.at(r * m.pitch + k);
      if (m.scaling == Scaling::none) return value;
      const std::int64_t i = m.scaling == Scaling::rows ? k / kTile * m.scale_pitch + r
                                                        : r / kTile * m.scale_pitch + k / kTile;
      return value * static_cast<double>(scales[static_cast<std::size_t>(i)]);
    };
    for (std::int64_t k = first; k < last; ++k) {
      term(element(call.a, o.a, o.scales_a, call.a_transposed, a_row, k),
           element(call.b, o.b, o.scales_b, call.b_transposed, b_row, k));
    }
  }
};

TEST_F(GpuGemmShapes, DenseFp8) {
  std::vector<Shape> shapes = {
      {.name = "q_a and kv_a", .m = 4096, .n = 2112, .k = 7168, .published = {1127, kDeepGemm}},
      {.name = "q_b", .m = 4096, .n = 24576, .k = 1536, .published = {1212, kDeepGemm}},
      {.name = "kv_b", .m = 4096, .n = 32768, .k = 512, .published = {775, kDeepGemm}},
      {.name = "attention out", .m = 4096, .n = 7168, .k = 16384, .published = {1520, kDeepGemm}},
      {.name = "shared expert up", .m = 4096, .n = 4096, .k = 7168, .published = {1410, kDeepGemm}},
      {.name = "shared expert down",
       .m = 4096,
       .n = 7168,
       .k = 2048,
       .published = {1168, kDeepGemm}}};
  const std::size_t library = shapes.size();
  for (std::size_t i = 0; i < library; ++i) {
    shapes.push_back(shapes[i]);
    shapes.back().ours = true;
  }
  run(shapes);
}

TEST_F(GpuGemmShapes, GroupedFp8) {
  constexpr Grouping kRows = Grouping::rows, kContraction = Grouping::contraction;
  run({{.name = "experts up",
        .grouping = kRows,
        .groups = 4,
        .m = 4 * 8192,
        .n = 4096,
        .k = 7168,
        .published = {1346, kDeepGemm}},
       {.name = "experts down",
        .grouping = kRows,
        .groups = 4,
        .m = 4 * 8192,
        .n = 7168,
        .k = 2048,
        .published = {1214, kDeepGemm}},
       {.name = "8 experts up",
        .grouping = kRows,
        .groups = 8,
        .m = 8 * 4096,
        .n = 4096,
        .k = 7168,
        .published = {1346, kDeepGemm}},
       {.name = "8 experts down",
        .grouping = kRows,
        .groups = 8,
        .m = 8 * 4096,
        .n = 7168,
        .k = 2048,
        .published = {1214, kDeepGemm}},
       {.name = "experts up, uneven",
        .grouping = kRows,
        .groups = 4,
        .m = 4 * 8192,
        .n = 4096,
        .k = 7168,
        .rows = {17000, 0, 100, 13000}},
       {.name = "experts up, weights",
        .grouping = kContraction,
        .groups = 4,
        .m = 4096,
        .n = 7168,
        .k = 4 * 8192},
       {.name = "experts down, weights",
        .grouping = kContraction,
        .groups = 4,
        .m = 7168,
        .n = 2048,
        .k = 4 * 8192}});
}

TEST_F(GpuGemmShapes, Bf16) {
  constexpr Format kBf16 = Format::bf16;
  run({{.name = "8192 rows",
        .format = kBf16,
        .m = 8192,
        .n = 4096,
        .k = 7168,
        .published = {807, kTorch}},
       {.name = "attention out",
        .format = kBf16,
        .m = 4096,
        .n = 7168,
        .k = 16384,
        .published = {712, kTorch}},
       {.name = "shared expert up",
        .format = kBf16,
        .m = 4096,
        .n = 4096,
        .k = 7168,
        .published = {795, kTorch}},
       {.name = "experts up",
        .format = kBf16,
        .grouping = Grouping::rows,
        .groups = 4,
        .m = 4 * 8192,
        .n = 4096,
        .k = 7168},
       {.name = "experts up, weights",
        .format = kBf16,
        .grouping = Grouping::contraction,
        .groups = 4,
        .m = 4096,
        .n = 7168,
        .k = 4 * 8192}});
}

}  // namespace
}  // namespace orrery::kernels
