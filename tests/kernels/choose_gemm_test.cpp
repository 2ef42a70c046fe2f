#include "kernels/choose_gemm.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <vector>

namespace orrery::kernels {
namespace {

constexpr int kShared = 227 * 1024;

/// Never read, only looked at.
template <class T>
T* address(std::uintptr_t at) {
  return reinterpret_cast<T*>(at);
}

Matrix matrix(std::int64_t rows, std::int64_t columns, Format format,
              Scaling scaling = Scaling::none) {
  Matrix m{.data = address<void>(1 << 20),
           .rows = rows,
           .columns = columns,
           .pitch = columns,
           .format = format,
           .scaling = scaling};
  if (scaling != Scaling::none) {
    m.scales = address<float>(1 << 21);
    m.scale_pitch = scale_pitch_of(rows, columns, scaling);
  }
  return m;
}

Gemm fp8(std::int64_t m, std::int64_t n, std::int64_t k, Scaling scaling_b = Scaling::blocks) {
  Gemm call;
  call.a = matrix(m, k, Format::e4m3, Scaling::rows);
  call.b = matrix(n, k, Format::e4m3, scaling_b);
  call.d = matrix(m, n, Format::bf16);
  return call;
}

Gemm bf16(std::int64_t m, std::int64_t n, std::int64_t k) {
  Gemm call;
  call.a = matrix(m, k, Format::bf16);
  call.b = matrix(n, k, Format::bf16);
  call.d = matrix(m, n, Format::bf16);
  return call;
}

/// `rows` of all groups.
Gemm grouped_fp8(std::int64_t groups, std::int64_t rows, std::int64_t n, std::int64_t k) {
  Gemm call = fp8(rows, n, k);
  call.b = matrix(groups * n, k, Format::e4m3, Scaling::blocks);
  call.grouping = Grouping::rows;
  call.groups = groups;
  call.group_begin = call.group_rows = address<std::int32_t>(64);
  return call;
}

Gemm weight_gradient_fp8(std::int64_t groups, std::int64_t rows, std::int64_t m, std::int64_t n) {
  Gemm call;
  call.a = matrix(m, rows, Format::e4m3, Scaling::rows);
  call.b = matrix(n, rows, Format::e4m3, Scaling::rows);
  call.d = matrix(groups * m, n, Format::fp32);
  call.accumulate = true;
  call.grouping = Grouping::contraction;
  call.groups = groups;
  call.group_begin = call.group_rows = address<std::int32_t>(64);
  return call;
}

GemmDevice hopper(int sms) {
  return {sms, kShared, 90};
}

/// DeepSeek-V3's products with 4096 tokens (the dense shapes of DeepGEMM's README), and its
/// experts'.
std::vector<Gemm> v3() {
  return {fp8(4096, 2112, 7168),
          fp8(4096, 24576, 1536),
          fp8(4096, 32768, 512),
          fp8(4096, 7168, 16384),
          fp8(4096, 4096, 7168),
          fp8(4096, 7168, 2048),
          fp8(4096, 576, 7168),
          fp8(24576, 1536, 4096, Scaling::rows),
          fp8(7168, 16384, 4096, Scaling::rows),
          grouped_fp8(4, 32768, 4096, 7168),
          grouped_fp8(4, 32768, 7168, 2048),
          grouped_fp8(8, 32768, 4096, 7168),
          weight_gradient_fp8(4, 32768, 4096, 7168),
          weight_gradient_fp8(4, 32768, 7168, 2048)};
}

/// Tiles that each block computes when groups are equal.
std::vector<int> tiles_per_block(const Gemm& call, const GemmPlan& plan) {
  TileGrid grid = tile_grid_of(call, plan);
  std::vector<std::int32_t> begin, rows;
  const std::int64_t all = call.grouping == Grouping::contraction ? grid.k : grid.m;
  for (int g = 0; g < grid.groups; ++g) {
    begin.push_back(static_cast<std::int32_t>(all / grid.groups * g));
    rows.push_back(static_cast<std::int32_t>(all / grid.groups));
  }
  grid.group_begin = begin.data();
  grid.group_rows = rows.data();
  std::vector<int> tiles;
  for (int block = 0; block < plan.blocks; ++block) {
    TileWalk walk(grid, block / plan.cluster);
    Tile tile;
    tiles.push_back(0);
    while (walk.next(tile, plan.blocks / plan.cluster, block % plan.cluster)) ++tiles.back();
  }
  return tiles;
}

TEST(ChooseGemm, PlansFitTheDevice) {
  for (const int sms : {1, 2, 3, 20, 112, 131, 132}) {
    for (const Gemm& call : v3()) {
      const std::vector<GemmPlan> plans = hopper_plans(call, hopper(sms));
      ASSERT_FALSE(plans.empty()) << why_not_hopper(call, hopper(sms));
      for (const GemmPlan& plan : plans) {
        SCOPED_TRACE(describe(plan));
        EXPECT_LE(plan.blocks, sms);
        EXPECT_GE(plan.blocks, 1);
        EXPECT_EQ(plan.blocks % plan.cluster, 0);
        EXPECT_LE(plan.shared_bytes, kShared);
        EXPECT_GE(plan.layout.stages(), 4);
        // A thread of two warpgroups has its part of the tile in registers and, with scales, the
        // sums of a stage of 64 rows, the columns' scales where they differ; 232 registers, 40 for
        // the rest.
        const int n = plan.layout.tile_n;
        const int registers = plan.layout.tile_m / 128 * n / 2 + n / 2 +
                              (plan.layout.scaling_b == Scaling::rows ? n / 4 : 0);
        EXPECT_LE(registers, 232 - 40);
      }
    }
  }
}

TEST(ChooseGemm, WavesAreWhatTheSlowestBlockComputes) {
  for (const int sms : {20, 112, 132}) {
    for (const Gemm& call : v3()) {
      for (const GemmPlan& plan : hopper_plans(call, hopper(sms))) {
        SCOPED_TRACE(describe(plan));
        const std::vector<int> tiles = tiles_per_block(call, plan);
        EXPECT_EQ(*std::max_element(tiles.begin(), tiles.end()), plan.waves);
        if (call.grouping != Grouping::none) continue;
        // With a cluster less it would take longer.
        std::int64_t all = 0;
        for (const int t : tiles) all += t;
        EXPECT_LT((plan.blocks - plan.cluster) * plan.waves, all);
      }
    }
  }
}

TEST(ChooseGemm, TheBestPlanWastesLeastOfTheLastWave) {
  // Waves times a tile's area: what the slowest block computes. No plan has 2 % less; within that,
  // the one that loads less is better.
  for (const int sms : {112, 132}) {
    for (const Gemm& call : v3()) {
      if (sizes_of(call).k < 7168 || call.b.scaling == Scaling::rows) continue;
      const std::vector<GemmPlan> plans = hopper_plans(call, hopper(sms));
      const auto area = [](const GemmPlan& p) {
        return p.waves * p.layout.tile_m * p.layout.tile_n;
      };
      std::int64_t least = std::numeric_limits<std::int64_t>::max();
      for (const GemmPlan& plan : plans) {
        // Smaller tiles load more than the L2 has: 64 x 128 of them 1.5 times as much for a
        // product.
        if (plan.layout.tile_n >= 128) least = std::min(least, area(plan));
      }
      EXPECT_LE(static_cast<double>(area(plans.front())), 1.02 * static_cast<double>(least))
          << describe(plans.front());
    }
  }
  // 4096 x 2112 in tiles of 128 x 128: 32 * 17 = 544, five waves of 132, 82 % used. 128 x 192: 32 *
  // 11 = 352, three waves, 89 %.
  EXPECT_EQ(hopper_plans(fp8(4096, 2112, 7168), hopper(132)).front().layout.tile_n, 192);
  EXPECT_EQ(hopper_plans(fp8(4096, 2112, 7168), hopper(132)).front().waves, 3);
}

TEST(ChooseGemm, TilesUnderWayTouchFewRowsAndColumns) {
  const Gemm call = fp8(4096, 7168, 16384);
  GemmPlan plan = hopper_plans(call, hopper(132)).front();
  const auto rows_loaded = [&] {
    const TileGrid grid = tile_grid_of(call, plan);
    std::set<int> rows, columns;
    for (int block = 0; block < plan.blocks; ++block) {
      TileWalk walk(grid, block / plan.cluster);
      Tile tile;
      if (!walk.next(tile, plan.blocks / plan.cluster, block % plan.cluster)) continue;
      rows.insert(tile.row);
      columns.insert(tile.column);
    }
    return static_cast<int>(rows.size()) * plan.layout.tile_m +
           static_cast<int>(columns.size()) * plan.layout.tile_n;
  };
  const int chosen = rows_loaded();
  for (const int panel : {1, 2, 4, 8, 16, 32}) {
    plan.panel = panel;
    EXPECT_LE(chosen, rows_loaded()) << "panels of " << panel;
  }
}

TEST(ChooseGemm, DenseProductsGoToTheLibraryAndGroupsDoNot) {
  for (const Gemm& call : v3()) {
    const GemmPlan plan = choose_gemm(call, hopper(132));
    EXPECT_EQ(plan.path, call.grouping == Grouping::none ? GemmPath::library : GemmPath::hopper);
  }
  EXPECT_EQ(choose_gemm(bf16(129280, 4096, 7168), hopper(132)).path, GemmPath::library);

  Gemm grouped = bf16(4096, 256, 512);
  grouped.b = matrix(4 * 256, 512, Format::bf16);
  grouped.grouping = Grouping::rows;
  grouped.groups = 4;
  EXPECT_EQ(choose_gemm(grouped, hopper(132)).path, GemmPath::hopper);
  EXPECT_EQ(choose_gemm(grouped, {108, kShared, 80}).path, GemmPath::plain);
}

TEST(ChooseGemm, TheLibraryIsAskedOnlyForWhatItDocuments) {
  const GemmDevice device = hopper(132);
  const Gemm good = fp8(4096, 2112, 7168);
  EXPECT_EQ(why_not_library(good, device), "");
  EXPECT_EQ(why_not_library(fp8(128, 256, 512, Scaling::rows), device), "");
  EXPECT_EQ(why_not_library(good, {108, kShared, 80}),
            "scales of tiles need compute capability 9.0");
  EXPECT_EQ(why_not_library(fp8(4096, 2112, 7160), device), "k and n have to be multiples of 16");
  EXPECT_EQ(why_not_library(fp8(4096, 2104, 7168), device), "k and n have to be multiples of 16");
  EXPECT_EQ(why_not_library(fp8(4094, 2112, 7168), device), "m has to be a multiple of 4");

  Gemm call = good;
  call.a.scale_pitch = 4100;
  EXPECT_EQ(why_not_library(call, device), "scale_pitch of A is 4100, not 4096");
  call = good;
  call.b.data = address<void>((1 << 20) + 8);
  EXPECT_EQ(why_not_library(call, device), "B does not begin at a multiple of 16 bytes");
  call = good;
  call.d.pitch = 2116;
  EXPECT_EQ(why_not_library(call, device), "rows of D are 4232 bytes apart, not a multiple of 16");

  Gemm fp32 = bf16(3, 5, 7);
  for (Matrix* x : {&fp32.a, &fp32.b, &fp32.d}) x->format = Format::fp32;
  EXPECT_EQ(why_not_library(fp32, device), "");
  fp32.d.format = Format::bf16;
  EXPECT_EQ(why_not_library(fp32, device), "FP32 operands, but D is not");
}

TEST(ChooseGemm, OurKernelSaysWhatItCannot) {
  const GemmDevice device = hopper(132);
  EXPECT_EQ(why_not_hopper(fp8(77, 31, 100 * 16), device),
            "scale_pitch of A is 77, not a multiple of 4");
  EXPECT_EQ(why_not_hopper(fp8(76, 31, 1000), device),
            "rows of A are 1000 bytes apart, not a multiple of 16");
  EXPECT_EQ(why_not_hopper(fp8(76, 31, 1008), device), "");
  EXPECT_EQ(why_not_hopper(grouped_fp8(4, 512, 200, 256), device),
            "groups of B begin inside of a block of scales");
  EXPECT_EQ(hopper_plans(grouped_fp8(4, 512, 192, 256), device).front().layout.tile_n % 128, 64);
  EXPECT_EQ(why_not_hopper(fp8(0, 128, 128), device), "nothing to compute");
  EXPECT_EQ(why_not_hopper(fp8(128, 128, 128), {132, 100 * 1024, 90}), "too little shared memory");

  Gemm wgrad = bf16(128, 128, 256);
  wgrad.a = matrix(256, 128, Format::bf16);
  wgrad.b = matrix(256, 128, Format::bf16);
  wgrad.grouping = Grouping::contraction;
  EXPECT_EQ(why_not_hopper(wgrad, device), "operands are not split by rows");
  wgrad.a_transposed = wgrad.b_transposed = true;
  EXPECT_EQ(why_not_hopper(wgrad, device), "");

  Gemm grouped = bf16(128, 128, 72);
  grouped.b = matrix(2 * 72, 128, Format::bf16);
  grouped.b_transposed = true;
  grouped.grouping = Grouping::rows;
  grouped.groups = 2;
  EXPECT_EQ(why_not_hopper(grouped, device),
            "the last stage of a group of B would reach into the next");
}

TEST(ChooseGemm, WhatNobodyTakesIsPlainAndStaysWithinTheSms) {
  Gemm call = fp8(1000, 999, 1001);
  for (const int sms : {1, 7, 132}) {
    const GemmPlan plan = choose_gemm(call, hopper(sms));
    EXPECT_EQ(plan.path, GemmPath::plain);
    EXPECT_EQ(plan.blocks, std::min(sms, 16 * 16));
    const std::vector<int> tiles = tiles_per_block(call, plan);
    EXPECT_EQ(*std::max_element(tiles.begin(), tiles.end()), plan.waves);
  }
}

}  // namespace
}  // namespace orrery::kernels
