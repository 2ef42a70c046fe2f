#include <gtest/gtest.h>
#include <oneapi/tbb/task_arena.h>

#include <cmath>
#include <sstream>
#include <thread>

#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/reference/reference.hpp"
#include "tests/kernels/operand_memory.hpp"

namespace orrery::kernels {
namespace {

/// Which Gemm, with sizes; operands follow.
struct Case {
  Format inputs = Format::fp32;
  Format output = Format::fp32;
  std::int64_t m = 1, n = 1, k = 1;
  bool a_transposed = false, b_transposed = false;
  bool accumulate = false;
  Scaling b_scaling = Scaling::none;
  Grouping grouping = Grouping::none;
  std::vector<std::int64_t> group_rows;  ///< of m (rows) or k (contraction)
  std::int64_t alignment = 1;
  std::int64_t gap = 0;
};

std::string text_of(const Case& c) {
  std::ostringstream text;
  text << name_of(c.inputs) << " to " << name_of(c.output) << " " << c.m << "x" << c.n << "x" << c.k
       << (c.a_transposed ? " T" : " N") << (c.b_transposed ? "T" : "N")
       << (c.accumulate ? " +=" : "");
  for (const std::int64_t rows : c.group_rows) text << " " << rows;
  return text.str();
}

/// Sets the rows of a group's padding to zero: rows (or columns) of an operand from `begin` on.
void clear(const Matrix& m, bool along_rows, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = 0; r < m.rows; ++r) {
    for (std::int64_t c = 0; c < m.columns; ++c) {
      const std::int64_t at = along_rows ? r : c;
      if (at < begin || at >= end) continue;
      const auto size = static_cast<std::size_t>(bits_of(m.format) / 8);
      std::fill_n(
          static_cast<std::byte*>(m.data) + static_cast<std::size_t>(r * m.pitch + c) * size, size,
          std::byte{0});
    }
  }
}

Gemm make(const Case& c, OperandMemory& memory, std::mt19937& random) {
  const auto groups = static_cast<std::int64_t>(std::max<std::size_t>(c.group_rows.size(), 1));
  Gemm gemm{.a_transposed = c.a_transposed,
            .b_transposed = c.b_transposed,
            .accumulate = c.accumulate,
            .grouping = c.grouping,
            .groups = groups};
  std::int64_t split = 0;  // length of what groups share, with padding
  if (c.grouping != Grouping::none) {
    auto* begin = memory.array<std::int32_t>(groups);
    auto* rows = memory.array<std::int32_t>(groups);
    for (std::size_t g = 0; g < c.group_rows.size(); ++g) {
      begin[g] = static_cast<std::int32_t>(split);
      rows[g] = static_cast<std::int32_t>(c.group_rows[g]);
      split += (c.group_rows[g] + c.alignment - 1) / c.alignment * c.alignment;
    }
    gemm.group_begin = begin;
    gemm.group_rows = rows;
  }
  const std::int64_t m = c.grouping == Grouping::rows ? split : c.m;
  const std::int64_t k = c.grouping == Grouping::contraction ? split : c.k;
  const std::int64_t b_groups = c.grouping == Grouping::rows ? groups : 1;
  const bool fp8 = c.inputs == Format::e4m3;
  const Scaling a_scaling = fp8 ? Scaling::rows : Scaling::none;
  gemm.a = c.a_transposed ? memory.matrix(k, m, c.inputs, c.gap, a_scaling)
                          : memory.matrix(m, k, c.inputs, c.gap, a_scaling);
  gemm.b = c.b_transposed ? memory.matrix(b_groups * k, c.n, c.inputs, c.gap, c.b_scaling)
                          : memory.matrix(b_groups * c.n, k, c.inputs, c.gap, c.b_scaling);
  gemm.d =
      memory.matrix(c.grouping == Grouping::contraction ? groups * m : m, c.n, c.output, c.gap);
  fill_random(gemm.a, random);
  fill_random(gemm.b, random);
  if (c.accumulate) fill_random(gemm.d, random);
  for (std::int64_t g = 0; g < groups && c.grouping != Grouping::none; ++g) {
    const std::int64_t from = gemm.group_begin[g] + gemm.group_rows[g];
    const std::int64_t to = g + 1 < groups ? gemm.group_begin[g + 1] : split;
    clear(gemm.a, c.grouping == Grouping::rows || c.a_transposed, from, to);
    if (c.grouping == Grouping::contraction) clear(gemm.b, c.b_transposed, from, to);
  }
  return gemm;
}

std::int64_t longest_sum(const Case& c) {
  if (c.grouping != Grouping::contraction) return c.k;
  return c.group_rows.empty() ? 0 : *std::max_element(c.group_rows.begin(), c.group_rows.end());
}

/// Operands are at most 1. Each of k additions in FP32 errs by at most half an epsilon of a partial
/// sum, and partial sums of random signs stay far below k / 2; a product of e4m3 errs by two more.
void expect_agreement(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  OperandMemory memory;
  const Gemm gemm = make(c, memory, random);
  ASSERT_EQ(why_impossible(gemm), "") << text_of(c);
  const std::vector<std::byte> before = memory.contents();
  reference::run(gemm);
  const std::vector<double> expected = values_of(gemm.d);
  EXPECT_EQ(memory.written_outside(gemm, before), "") << text_of(c);
  memory.set_contents(before);
  cpu::run(gemm);
  const std::vector<double> actual = values_of(gemm.d);
  EXPECT_EQ(memory.written_outside(gemm, before), "") << text_of(c);
  const double sums = 0x1p-23 * static_cast<double>(longest_sum(c) + 2);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (std::isnan(expected[i]) && std::isnan(actual[i])) continue;  // padding of D: not written
    const double tolerance = epsilon_of(c.output) * std::fabs(expected[i]) + sums;
    ASSERT_NEAR(actual[i], expected[i], tolerance) << text_of(c) << ", element " << i;
  }
}

/// Elements small integers, whose sums are exact in every format but bf16 outputs beyond 256.
std::int64_t integer_at(std::int64_t row, std::int64_t column) {
  return (row * 7 + column * 5) % 9 - 4;
}

void fill_integers(const Matrix& m, std::int64_t shift) {
  for (std::int64_t r = 0; r < m.rows; ++r) {
    for (std::int64_t c = 0; c < m.columns; ++c) {
      const auto x = static_cast<float>(integer_at(r + shift, c));
      const std::int64_t i = r * m.pitch + c;
      if (m.format == Format::fp32) static_cast<float*>(m.data)[i] = x;
      if (m.format == Format::bf16) static_cast<std::uint16_t*>(m.data)[i] = bf16_of(x);
      if (m.format == Format::e4m3) static_cast<std::uint8_t*>(m.data)[i] = e4m3_of(x);
    }
  }
  const std::int64_t scales = scale_elements(m.rows, m.columns, m.scaling);
  for (std::int64_t i = 0; i < scales; ++i) m.scales[i] = std::exp2(static_cast<float>(i % 3));
}

TEST(GemmReference, AllLayoutsOfSmallIntegers) {
  constexpr std::int64_t kM = 5;
  constexpr std::int64_t kN = 4;
  constexpr std::int64_t kK = 6;
  for (const bool a_t : {false, true}) {
    for (const bool b_t : {false, true}) {
      for (const bool accumulate : {false, true}) {
        OperandMemory memory(1 << 14);
        const Gemm gemm{
            .a = a_t ? memory.matrix(kK, kM, Format::bf16, 3) : memory.matrix(kM, kK, Format::bf16),
            .b = b_t ? memory.matrix(kK, kN, Format::bf16) : memory.matrix(kN, kK, Format::bf16, 1),
            .d = memory.matrix(kM, kN, Format::fp32, 2),
            .a_transposed = a_t,
            .b_transposed = b_t,
            .accumulate = accumulate};
        fill_integers(gemm.a, 0);
        fill_integers(gemm.b, 3);
        if (accumulate) fill_integers(gemm.d, 1);
        reference::run(gemm);
        for (std::int64_t i = 0; i < kM; ++i) {
          for (std::int64_t j = 0; j < kN; ++j) {
            std::int64_t sum = accumulate ? integer_at(i + 1, j) : 0;
            for (std::int64_t x = 0; x < kK; ++x) {
              sum += (a_t ? integer_at(x, i) : integer_at(i, x)) *
                     (b_t ? integer_at(x + 3, j) : integer_at(j + 3, x));
            }
            EXPECT_EQ(value_at(gemm.d, i, j), static_cast<double>(sum));
          }
        }
      }
    }
  }
}

TEST(GemmReference, ScalesOfTilesAndBlocks) {
  constexpr std::int64_t kM = 3;
  constexpr std::int64_t kN = 130;
  constexpr std::int64_t kK = 260;
  for (const Scaling b_scaling : {Scaling::rows, Scaling::blocks}) {
    OperandMemory memory(1 << 18);
    const Gemm gemm{.a = memory.matrix(kM, kK, Format::e4m3, 0, Scaling::rows),
                    .b = memory.matrix(kN, kK, Format::e4m3, 0, b_scaling),
                    .d = memory.matrix(kM, kN, Format::fp32)};
    fill_integers(gemm.a, 0);
    fill_integers(gemm.b, 3);
    reference::run(gemm);
    for (std::int64_t i = 0; i < kM; ++i) {
      for (std::int64_t j = 0; j < kN; ++j) {
        std::int64_t sum = 0;
        for (std::int64_t x = 0; x < kK; ++x) {
          // Scale number s is 2^(s mod 3): tiles of rows run over 3 or 130 rows, blocks have a
          // pitch of 4.
          const std::int64_t a_scale = x / 128 * kM + i;
          const std::int64_t b_scale =
              b_scaling == Scaling::rows ? x / 128 * kN + j : j / 128 * 4 + x / 128;
          sum += integer_at(i, x) * integer_at(j + 3, x) * (1 << (a_scale % 3 + b_scale % 3));
        }
        EXPECT_EQ(value_at(gemm.d, i, j), static_cast<double>(sum));
      }
    }
  }
}

TEST(GemmReference, GroupsOfRowsHaveAMatrixEach) {
  OperandMemory memory(1 << 14);
  Gemm gemm{.a = memory.matrix(8, 3, Format::bf16),
            .b = memory.matrix(3 * 2, 3, Format::bf16),
            .d = memory.matrix(8, 2, Format::fp32),
            .grouping = Grouping::rows,
            .groups = 3};
  fill_integers(gemm.a, 0);
  fill_integers(gemm.b, 3);
  auto* begin = memory.array<std::int32_t>(3);
  auto* rows = memory.array<std::int32_t>(3);
  begin[0] = 0, begin[1] = 4, begin[2] = 4;
  rows[0] = 3, rows[1] = 0, rows[2] = 2;
  gemm.group_begin = begin;
  gemm.group_rows = rows;
  reference::run(gemm);
  for (std::int64_t i = 0; i < 8; ++i) {
    const int group = i < 3 ? 0 : i >= 4 && i < 6 ? 2 : -1;
    for (std::int64_t j = 0; j < 2; ++j) {
      if (group < 0) {
        EXPECT_TRUE(std::isnan(value_at(gemm.d, i, j))) << "padding is not written";
        continue;
      }
      std::int64_t sum = 0;
      for (std::int64_t x = 0; x < 3; ++x) {
        sum += integer_at(i, x) * integer_at(group * 2 + j + 3, x);
      }
      EXPECT_EQ(value_at(gemm.d, i, j), static_cast<double>(sum));
    }
  }
}

TEST(GemmReference, GroupsOfTheContractionHaveASumEach) {
  for (const bool accumulate : {false, true}) {
    OperandMemory memory(1 << 14);
    Gemm gemm{.a = memory.matrix(7, 2, Format::bf16),
              .b = memory.matrix(7, 3, Format::bf16),
              .d = memory.matrix(3 * 2, 3, Format::fp32),
              .a_transposed = true,
              .b_transposed = true,
              .accumulate = accumulate,
              .grouping = Grouping::contraction,
              .groups = 3};
    fill_integers(gemm.a, 0);
    fill_integers(gemm.b, 3);
    if (accumulate) fill_integers(gemm.d, 1);
    auto* begin = memory.array<std::int32_t>(3);
    auto* rows = memory.array<std::int32_t>(3);
    begin[0] = 0, begin[1] = 3, begin[2] = 5;
    rows[0] = 3, rows[1] = 0, rows[2] = 2;
    gemm.group_begin = begin;
    gemm.group_rows = rows;
    reference::run(gemm);
    for (int g = 0; g < 3; ++g) {
      for (std::int64_t i = 0; i < 2; ++i) {
        for (std::int64_t j = 0; j < 3; ++j) {
          std::int64_t sum = accumulate ? integer_at(g * 2 + i + 1, j) : 0;
          for (std::int64_t x = begin[g]; x < begin[g] + rows[g]; ++x) {
            sum += integer_at(x, i) * integer_at(x + 3, j);
          }
          EXPECT_EQ(value_at(gemm.d, g * 2 + i, j), static_cast<double>(sum));
        }
      }
    }
  }
}

TEST(GemmCpu, AgreesOnDenseProducts) {
  std::mt19937 random(1);
  const std::int64_t sizes[] = {1, 2, 3, 7, 16, 31, 64, 65, 100, 128, 129};
  const auto pick = [&] { return sizes[random() % std::size(sizes)]; };
  for (unsigned i = 0; i < 120; ++i) {
    Case c{.inputs = random() % 2 == 0 ? Format::fp32 : Format::bf16,
           .output = random() % 2 == 0 ? Format::fp32 : Format::bf16,
           .m = pick(),
           .n = pick(),
           .k = pick(),
           .a_transposed = random() % 2 == 0,
           .b_transposed = random() % 2 == 0,
           .gap = static_cast<std::int64_t>(random() % 3)};
    c.accumulate = c.output == Format::fp32 && random() % 2 == 0;
    expect_agreement(c, i);
  }
}

TEST(GemmCpu, AgreesOnE4m3) {
  std::mt19937 random(2);
  const std::int64_t sizes[] = {1, 5, 40, 129};
  const std::int64_t depths[] = {1, 64, 127, 128, 129, 256, 300, 520};
  for (unsigned i = 0; i < 60; ++i) {
    Case c{.inputs = Format::e4m3,
           .output = random() % 2 == 0 ? Format::fp32 : Format::bf16,
           .m = sizes[random() % std::size(sizes)],
           .n = sizes[random() % std::size(sizes)],
           .k = depths[random() % std::size(depths)],
           .b_scaling = random() % 2 == 0 ? Scaling::rows : Scaling::blocks,
           .gap = static_cast<std::int64_t>(random() % 3)};
    c.accumulate = c.output == Format::fp32 && random() % 2 == 0;
    expect_agreement(c, i);
  }
}

TEST(GemmCpu, AgreesWhereThereAreManyTilesAndSteps) {
  for (const bool transposed : {false, true}) {
    expect_agreement({.inputs = Format::bf16,
                      .output = Format::bf16,
                      .m = 301,
                      .n = 150,
                      .k = 500,
                      .a_transposed = transposed,
                      .b_transposed = transposed,
                      .gap = 1},
                     3);
  }
  expect_agreement({.inputs = Format::e4m3,
                    .output = Format::fp32,
                    .m = 301,
                    .n = 150,
                    .k = 500,
                    .accumulate = true,
                    .b_scaling = Scaling::blocks},
                   4);
}

TEST(GemmCpu, AgreesOnGroups) {
  std::mt19937 random(5);
  for (unsigned i = 0; i < 80; ++i) {
    Case c{.inputs = random() % 3 == 0   ? Format::fp32
                     : random() % 2 == 0 ? Format::bf16
                                         : Format::e4m3,
           .output = random() % 2 == 0 ? Format::fp32 : Format::bf16,
           .m = static_cast<std::int64_t>(1 + random() % 70),
           .n = static_cast<std::int64_t>(1 + random() % 70),
           .k = static_cast<std::int64_t>(1 + random() % 200),
           .grouping = random() % 2 == 0 ? Grouping::rows : Grouping::contraction,
           .gap = static_cast<std::int64_t>(random() % 2)};
    const bool fp8 = c.inputs == Format::e4m3;
    if (fp8) c.b_scaling = random() % 2 == 0 ? Scaling::rows : Scaling::blocks;
    if (c.grouping == Grouping::contraction) {
      c.a_transposed = c.b_transposed = !fp8;
      if (fp8) c.b_scaling = Scaling::rows;
    } else {
      c.b_transposed = !fp8 && random() % 2 == 0;
    }
    const std::int64_t alignments[] = {1, 8, 128};
    c.alignment = fp8 && c.grouping == Grouping::contraction ? 128 : alignments[random() % 3];
    c.accumulate = c.output == Format::fp32 && random() % 2 == 0;
    for (unsigned g = 0; g < 1 + random() % 5; ++g) {
      c.group_rows.push_back(random() % 3 == 0 ? 0 : static_cast<std::int64_t>(random() % 150));
    }
    expect_agreement(c, i);
  }
}

std::vector<std::byte> bytes_after(const Gemm& gemm, OperandMemory& memory, int threads) {
  const std::vector<std::byte> before = memory.contents();
  tbb::task_arena(threads).execute([&] { cpu::run(gemm); });
  std::vector<std::byte> after = memory.contents();
  memory.set_contents(before);
  return after;
}

const Case kLarge{.inputs = Format::bf16, .output = Format::bf16, .m = 700, .n = 300, .k = 500};

TEST(GemmCpu, BytesDoNotDependOnThreads) {
  std::mt19937 random(6);
  OperandMemory memory;
  const Gemm gemm = make(kLarge, memory, random);
  const std::vector<std::byte> one = bytes_after(gemm, memory, 1);
  EXPECT_EQ(bytes_after(gemm, memory, 2), one);
}

TEST(GemmCpu, ManyThreadsCanBeInIt) {
  struct Worker {
    OperandMemory memory{std::size_t{4} << 20};
    Gemm gemm;
    std::vector<std::byte> after;
  };
  std::vector<Worker> workers(6);
  for (Worker& w : workers) {
    std::mt19937 random(7);
    w.gemm = make(kLarge, w.memory, random);
  }
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < workers.size(); ++i) {
    threads.emplace_back([&w = workers[i], arena = static_cast<int>(1 + i % 2)] {
      for (int round = 0; round < 3; ++round) w.after = bytes_after(w.gemm, w.memory, arena);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Worker& w : workers) EXPECT_EQ(w.after, workers.front().after);
  EXPECT_NE(workers.front().after, workers.front().memory.contents());
}

}  // namespace
}  // namespace orrery::kernels
