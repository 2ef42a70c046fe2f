#pragma once
// Products whose sums are exact: operands are small integers and scales powers of two, so that
// results have to be equal, bit for bit, on whatever computes them. What is not part of an operand
// is NaN.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ostream>
#include <random>
#include <vector>

#include "kernels/call.hpp"
#include "kernels/format.hpp"

namespace orrery::kernels {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

constexpr std::uint32_t kPoison = 0x7fc0beef;  // NaN as FP32; its halves are a NaN and a number

/// A matrix in memory, and what it means.
class GemmOperand {
 public:
  GemmOperand(std::int64_t rows, std::int64_t columns, Format format,
              Scaling scaling = Scaling::none, std::int64_t pitch = 0)
      : values_(static_cast<std::size_t>(rows * columns)) {
    m_.rows = rows;
    m_.columns = columns;
    m_.format = format;
    m_.pitch = pitch > 0 ? pitch : (columns + 15) / 16 * 16;
    data_bytes_ = static_cast<std::size_t>(rows * m_.pitch * bits_of(format) / 8);
    data_ = take(data_bytes_);
    m_.data = data_.get();
    if (scaling == Scaling::none) return;
    m_.scaling = scaling;
    m_.scale_pitch =
        scaling == Scaling::rows ? (rows + 3) / 4 * 4 : scale_pitch_of(rows, columns, scaling);
    scales_bytes_ = static_cast<std::size_t>(m_.scale_pitch *
                                             tiles(scaling == Scaling::rows ? columns : rows)) *
                    sizeof(float);
    scales_ = take(scales_bytes_);
    m_.scales = reinterpret_cast<float*>(scales_.get());
  }

  const Matrix& matrix() const { return m_; }
  std::size_t data_bytes() const { return data_bytes_; }
  std::size_t scales_bytes() const { return scales_bytes_; }
  double at(std::int64_t r, std::int64_t c) const { return values_[index(r, c)]; }

  /// Rows [first, last) get random values.
  void fill(std::mt19937& random, std::int64_t first, std::int64_t last) {
    std::uniform_int_distribution<int> integer(-3, 3), exponent(-2, 2);
    if (m_.scaling == Scaling::rows) {
      for (std::int64_t t = 0; t < tiles(m_.columns); ++t) {
        for (std::int64_t r = first; r < last; ++r) {
          m_.scales[t * m_.scale_pitch + r] = std::ldexp(1.0F, exponent(random));
        }
      }
    }
    if (m_.scaling == Scaling::blocks) {
      for (std::int64_t b = tiles(first + 1) - 1; b < tiles(last); ++b) {
        for (std::int64_t t = 0; t < tiles(m_.columns); ++t) {
          m_.scales[b * m_.scale_pitch + t] = std::ldexp(1.0F, exponent(random));
        }
      }
    }
    for (std::int64_t r = first; r < last; ++r) {
      for (std::int64_t c = 0; c < m_.columns; ++c) set(r, c, static_cast<float>(integer(random)));
    }
  }

  /// The element before scaling.
  void set(std::int64_t r, std::int64_t c, float value) {
    unsigned char* const at = data_.get() + (r * m_.pitch + c) * bits_of(m_.format) / 8;
    switch (m_.format) {
      case Format::fp32:
        std::memcpy(at, &value, 4);
        break;
      case Format::bf16: {
        const std::uint16_t code = bf16_of(value);
        std::memcpy(at, &code, 2);
        break;
      }
      default:
        *at = e4m3_of(value);
    }
    values_[index(r, c)] = static_cast<double>(value) * scale(r, c);
  }

  /// What is in memory, as FP32.
  float stored(std::int64_t r, std::int64_t c) const {
    const unsigned char* const at = data_.get() + (r * m_.pitch + c) * bits_of(m_.format) / 8;
    if (m_.format == Format::bf16) {
      std::uint16_t code = 0;
      std::memcpy(&code, at, 2);
      return float_of_bf16(code);
    }
    float value = 0;
    std::memcpy(&value, at, 4);
    return value;
  }
  bool untouched(std::int64_t r, std::int64_t c) const {
    const auto bytes = static_cast<std::size_t>(bits_of(m_.format) / 8);
    const unsigned char* const at =
        data_.get() + static_cast<std::size_t>(r * m_.pitch + c) * bytes;
    const auto* const poison = reinterpret_cast<const unsigned char*>(&kPoison);
    for (std::size_t i = 0; i < bytes; ++i) {
      if (at[i] != poison[(static_cast<std::size_t>(r * m_.pitch + c) * bytes + i) % 4])
        return false;
    }
    return true;
  }

 private:
  using Bytes = std::unique_ptr<unsigned char, Free>;

  static std::int64_t tiles(std::int64_t n) { return (n + kTile - 1) / kTile; }
  std::size_t index(std::int64_t r, std::int64_t c) const {
    return static_cast<std::size_t>(r * m_.columns + c);
  }
  double scale(std::int64_t r, std::int64_t c) const {
    if (m_.scaling == Scaling::none) return 1;
    return m_.scaling == Scaling::rows ? m_.scales[c / kTile * m_.scale_pitch + r]
                                       : m_.scales[r / kTile * m_.scale_pitch + c / kTile];
  }
  /// NaN in all formats: E4M3 has it in every fourth byte (0x7f is no part of the pattern's
  /// others).
  static Bytes take(std::size_t bytes) {
    const std::size_t rounded = (bytes + 255) / 256 * 256;
    Bytes memory(static_cast<unsigned char*>(std::aligned_alloc(256, rounded)));
    for (std::size_t i = 0; i + 4 <= rounded; i += 4) std::memcpy(memory.get() + i, &kPoison, 4);
    return memory;
  }

  Matrix m_;
  std::vector<double> values_;
  Bytes data_, scales_;
  std::size_t data_bytes_ = 0, scales_bytes_ = 0;
};

struct GemmCase {
  Format format = Format::e4m3;
  Scaling scaling_b = Scaling::none;
  Grouping grouping = Grouping::none;
  std::int64_t m = 0, n = 0, k = 0;
  bool transposed_a = false, transposed_b = false, accumulate = false;
  Format d = Format::bf16;
  std::int64_t d_pitch = 0;
  std::vector<std::int32_t> begin, rows;  ///< of groups
};

/// A case's operands, and what D has to be.
class GemmProblem {
 public:
  explicit GemmProblem(const GemmCase& c)
      : case_(c), groups_(c.rows.empty() ? 1 : static_cast<std::int64_t>(c.rows.size())) {
    const bool by_rows = c.grouping == Grouping::rows, by_k = c.grouping == Grouping::contraction;
    const Scaling scaling_a = c.format == Format::e4m3 ? Scaling::rows : Scaling::none;
    const std::int64_t b_groups = by_rows ? groups_ : 1;
    a_ = c.transposed_a ? std::make_unique<GemmOperand>(c.k, c.m, c.format)
                        : std::make_unique<GemmOperand>(c.m, c.k, c.format, scaling_a);
    b_ = c.transposed_b ? std::make_unique<GemmOperand>(b_groups * c.k, c.n, c.format)
                        : std::make_unique<GemmOperand>(b_groups * c.n, c.k, c.format, c.scaling_b);
    std::mt19937 random(7);
    if (by_rows || (by_k && c.transposed_a)) {
      // What lies between groups and behind them stays NaN.
      for (std::int64_t g = 0; g < groups_; ++g) {
        a_->fill(random, begin(g), begin(g) + rows(g));
        if (by_k) b_->fill(random, begin(g), begin(g) + rows(g));
      }
    } else {
      a_->fill(random, 0, a_->matrix().rows);
    }
    if (!(by_k && c.transposed_b)) b_->fill(random, 0, b_->matrix().rows);
    if (by_k && !c.transposed_a) clear_padding();
  }

  Gemm call(GemmOperand& d) const {
    Gemm gemm;
    gemm.a = a_->matrix();
    gemm.b = b_->matrix();
    gemm.d = d.matrix();
    gemm.a_transposed = case_.transposed_a;
    gemm.b_transposed = case_.transposed_b;
    gemm.accumulate = case_.accumulate;
    gemm.grouping = case_.grouping;
    gemm.groups = groups_;
    gemm.group_begin = case_.begin.data();
    gemm.group_rows = case_.rows.data();
    return gemm;
  }

  const GemmOperand& a() const { return *a_; }
  const GemmOperand& b() const { return *b_; }

  std::unique_ptr<GemmOperand> make_d() const {
    const std::int64_t d_groups = case_.grouping == Grouping::contraction ? groups_ : 1;
    auto d = std::make_unique<GemmOperand>(d_groups * case_.m, case_.n, case_.d, Scaling::none,
                                           case_.d_pitch);
    std::mt19937 random(11);
    if (case_.accumulate) d->fill(random, 0, d->matrix().rows);
    return d;
  }

  /// All of D, and that nothing around it was written.
  void compare(const GemmOperand& d) const {
    const std::unique_ptr<GemmOperand> before = make_d();
    std::vector<bool> written(static_cast<std::size_t>(d.matrix().rows));
    const auto expect_row = [&](std::int64_t d_row, std::int64_t row, std::int64_t b_group,
                                std::int64_t first, std::int64_t last) {
      written[static_cast<std::size_t>(d_row)] = true;
      for (std::int64_t c = 0; c < case_.n; ++c) {
        double expected = sum(row, b_group, c, first, last);
        if (case_.accumulate) expected += before->at(d_row, c);
        if (case_.d == Format::bf16)
          expected = float_of_bf16(bf16_of(static_cast<float>(expected)));
        ASSERT_EQ(d.stored(d_row, c), expected) << "row " << d_row << ", column " << c;
      }
    };
    switch (case_.grouping) {
      case Grouping::none:
        for (std::int64_t r = 0; r < case_.m; ++r) expect_row(r, r, 0, 0, case_.k);
        break;
      case Grouping::rows:
        for (std::int64_t g = 0; g < groups_; ++g) {
          for (std::int64_t r = begin(g); r < begin(g) + rows(g); ++r)
            expect_row(r, r, g, 0, case_.k);
        }
        break;
      case Grouping::contraction:
        for (std::int64_t g = 0; g < groups_; ++g) {
          for (std::int64_t r = 0; r < case_.m; ++r) {
            expect_row(g * case_.m + r, r, 0, begin(g), begin(g) + rows(g));
          }
        }
        break;
    }
    for (std::int64_t r = 0; r < d.matrix().rows; ++r) {
      for (std::int64_t c = case_.n; c < d.matrix().pitch && r + 1 < d.matrix().rows; ++c) {
        ASSERT_TRUE(d.untouched(r, c)) << "behind the columns: row " << r << ", column " << c;
      }
      if (written[static_cast<std::size_t>(r)] || case_.accumulate) continue;
      for (std::int64_t c = 0; c < case_.n; ++c) {
        ASSERT_TRUE(d.untouched(r, c)) << "of no group: row " << r << ", column " << c;
      }
    }
  }

 private:
  std::int64_t begin(std::int64_t g) const { return case_.begin[static_cast<std::size_t>(g)]; }
  std::int64_t rows(std::int64_t g) const { return case_.rows[static_cast<std::size_t>(g)]; }

  /// A group's last tile of 128 is padded with zeros.
  void clear_padding() {
    for (std::int64_t g = 0; g < groups_; ++g) {
      const std::int64_t end = begin(g) + rows(g);
      for (std::int64_t k = end; k < (end + 127) / 128 * 128; ++k) {
        for (std::int64_t r = 0; r < case_.m; ++r) a_->set(r, k, 0);
        for (std::int64_t r = 0; r < case_.n; ++r) b_->set(r, k, 0);
      }
    }
  }

  double sum(std::int64_t row, std::int64_t b_group, std::int64_t column, std::int64_t first,
             std::int64_t last) const {
    double total = 0;
    for (std::int64_t k = first; k < last; ++k) {
      const double x = case_.transposed_a ? a_->at(k, row) : a_->at(row, k);
      const double y = case_.transposed_b ? b_->at(b_group * case_.k + k, column)
                                          : b_->at(b_group * case_.n + column, k);
      total += x * y;
    }
    return total;
  }

  GemmCase case_;
  std::int64_t groups_;
  std::unique_ptr<GemmOperand> a_, b_;
};

/// `plans`: tile sizes that our wgmma kernel has for it.
struct NamedGemmCase {
  const char* name = "";
  GemmCase c;
  std::size_t plans = 0;
};
inline std::ostream& operator<<(std::ostream& out, const NamedGemmCase& x) {
  return out << x.name;
}

inline std::vector<NamedGemmCase> wgmma_cases() {
  constexpr Format kFp8 = Format::e4m3, kBf16 = Format::bf16, kFp32 = Format::fp32;
  constexpr Scaling kRows = Scaling::rows, kBlocks = Scaling::blocks;
  // 130 rows, none, one, 256; gaps before the first and between the last two.
  const std::vector<std::int32_t> begin{5, 140, 140, 150}, rows{130, 0, 1, 256};
  // In FP8 groups of the contraction begin at multiples of 128, in BF16 anywhere.
  const std::vector<std::int32_t> begin_k{0, 256, 256, 512}, rows_k{256, 0, 100, 128};
  const std::vector<std::int32_t> begin_any{0, 70, 70, 137, 201}, rows_any{70, 0, 67, 64, 3};
  const GemmCase fp8_rows{.format = kFp8,
                          .scaling_b = kBlocks,
                          .grouping = Grouping::rows,
                          .m = 420,
                          .n = 128,
                          .k = 144,
                          .begin = begin,
                          .rows = rows};
  const GemmCase fp8_k{.format = kFp8,
                       .scaling_b = kRows,
                       .grouping = Grouping::contraction,
                       .m = 140,
                       .n = 72,
                       .k = 640,
                       .accumulate = true,
                       .d = kFp32,
                       .begin = begin_k,
                       .rows = rows_k};
  const GemmCase bf16_rows{.format = kBf16,
                           .grouping = Grouping::rows,
                           .m = 420,
                           .n = 152,
                           .k = 128,
                           .begin = begin,
                           .rows = rows};
  const GemmCase bf16_k{.format = kBf16,
                        .grouping = Grouping::contraction,
                        .m = 136,
                        .n = 200,
                        .k = 300,
                        .transposed_a = true,
                        .transposed_b = true,
                        .accumulate = true,
                        .d = kFp32,
                        .begin = begin_any,
                        .rows = rows_any};
  const auto with = [](GemmCase c, const auto& change) {
    change(c);
    return c;
  };
  return {
      // Rows, columns and contraction that do not fill tiles; 192 columns lie in two blocks.
      {"fp8_blocks", {.format = kFp8, .scaling_b = kBlocks, .m = 270, .n = 200, .k = 272}, 4},
      // More stages than the ring has, and than a warp holds scales.
      {"fp8_long", {.format = kFp8, .scaling_b = kBlocks, .m = 40, .n = 24, .k = 128 * 34}, 4},
      // Nothing is aligned in D.
      {"fp8_adds",
       {.format = kFp8,
        .scaling_b = kRows,
        .m = 130,
        .n = 199,
        .k = 256,
        .accumulate = true,
        .d = kFp32,
        .d_pitch = 201},
       2},
      {"fp8_fp32",
       {.format = kFp8, .scaling_b = kBlocks, .m = 130, .n = 200, .k = 128, .d = kFp32},
       4},
      {"fp8_groups", fp8_rows, 4},
      {"fp8_groups_fp32", with(fp8_rows, [](GemmCase& c) { c.d = Format::fp32; }), 4},
      // A group's B begins in the middle of a block: tiles of 128 columns are out.
      {"fp8_groups_of_half_blocks", with(fp8_rows, [](GemmCase& c) { c.n = 192; }), 2},
      {"fp8_groups_of_rows",
       with(fp8_rows,
            [](GemmCase& c) {
              c.n = 100;
              c.scaling_b = Scaling::rows;
            }),
       2},
      {"fp8_contraction_adds", fp8_k, 2},
      // The group without rows becomes zero.
      {"fp8_contraction", with(fp8_k, [](GemmCase& c) { c.accumulate = false; }), 2},
      {"bf16_groups", bf16_rows, 2},
      {"bf16_groups_transposed", with(bf16_rows, [](GemmCase& c) { c.transposed_b = true; }), 2},
      {"bf16_groups_short", with(bf16_rows, [](GemmCase& c) { c.k = 72; }), 2},
      {"bf16_contraction_adds", bf16_k, 2},
      {"bf16_contraction",
       with(bf16_k,
            [](GemmCase& c) {
              c.accumulate = false;
              c.d = Format::bf16;
            }),
       2},
  };
}

/// What only the plain kernel takes, and cuBLASLt some of.
inline std::vector<NamedGemmCase> odd_cases() {
  const std::vector<std::int32_t> begin{1, 7, 7}, rows{5, 0, 70};
  std::vector<NamedGemmCase> cases;
  for (const Format format : {Format::fp32, Format::bf16}) {
    for (const bool a : {false, true}) {
      for (const bool b : {false, true}) {
        cases.push_back({"dense",
                         {.format = format,
                          .m = 67,
                          .n = 33,
                          .k = 19,
                          .transposed_a = a,
                          .transposed_b = b,
                          .accumulate = true,
                          .d = Format::fp32}});
      }
    }
    for (const bool b : {false, true}) {
      cases.push_back({"groups",
                       {.format = format,
                        .grouping = Grouping::rows,
                        .m = 80,
                        .n = 33,
                        .k = 19,
                        .transposed_b = b,
                        .begin = begin,
                        .rows = rows}});
    }
    cases.push_back({"contraction",
                     {.format = format,
                      .grouping = Grouping::contraction,
                      .m = 67,
                      .n = 33,
                      .k = 80,
                      .transposed_a = true,
                      .transposed_b = true,
                      .accumulate = true,
                      .d = Format::fp32,
                      .begin = begin,
                      .rows = rows}});
  }
  cases.push_back(
      {"fp8", {.format = Format::e4m3, .scaling_b = Scaling::blocks, .m = 67, .n = 133, .k = 200}});
  cases.push_back({"fp8_groups",
                   {.format = Format::e4m3,
                    .scaling_b = Scaling::rows,
                    .grouping = Grouping::rows,
                    .m = 80,
                    .n = 33,
                    .k = 130,
                    .begin = begin,
                    .rows = rows}});
  return cases;
}

}  // namespace orrery::kernels
