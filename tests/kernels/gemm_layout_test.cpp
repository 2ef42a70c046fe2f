#include "kernels/gemm_layout.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace orrery::kernels {
namespace {

TEST(GemmLayout, DescriptorHasItsFieldsWherePtxSays) {
  // PTX ISA, matrix descriptor: address, leading and stride offset in units of 16 bytes from bits
  // 0, 16 and 32 on; base offset (0) in bits 49 to 51; swizzling mode in bits 62 and 63, 1 for 128
  // bytes.
  EXPECT_EQ(wgmma_descriptor(0x400, 0x2000, 0x400), 0x4000'0040'0200'0040U);
  EXPECT_EQ(wgmma_descriptor(0x38C20, 0, 0x400), 0x4000'0040'0000'38C2U);
}

TEST(GemmLayout, SwizzleIsAPermutationOfChunksWithoutBankConflicts) {
  std::set<std::uint32_t> seen;
  for (std::uint32_t offset = 0; offset < 4096; ++offset) {
    const std::uint32_t there = swizzled(offset);
    EXPECT_EQ(swizzled(there), offset);
    EXPECT_EQ(there / 128, offset / 128);  // rows stay
    EXPECT_EQ(there % 16, offset % 16);    // chunks stay whole
    EXPECT_TRUE(seen.insert(there).second);
  }
  // wgmma reads the same 16 bytes of eight rows: from all 32 banks, each once.
  for (std::uint32_t chunk = 0; chunk < 8; ++chunk) {
    std::set<std::uint32_t> places;
    for (std::uint32_t row = 0; row < 8; ++row) {
      places.insert(swizzled(row * 128 + chunk * 16) % 128 / 16);
    }
    EXPECT_EQ(places.size(), 8U);
  }
  // PTX ISA, figure of the 128-byte swizzle: row 1 begins with chunk 1, row 5 with chunk 5.
  EXPECT_EQ(swizzled(1 * 128), 1U * 128 + 16);
  EXPECT_EQ(swizzled(5 * 128 + 7 * 16), 5U * 128 + 2 * 16);
}

TEST(GemmLayout, AWarpgroupsFragmentsCoverTheResultOnce) {
  constexpr int kColumns = 192;
  std::map<std::pair<int, int>, int> times;
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kColumns / 2; ++i) {
      ++times[{fragment_row(thread, i), fragment_column(thread, i)}];
    }
  }
  EXPECT_EQ(times.size(), 64U * kColumns);
  for (const auto& [place, count] : times) EXPECT_EQ(count, 1);
  // PTX ISA, figure of wgmma's D: thread 35 is in rows 16 and 24, columns 6, 7 and 14, 15.
  EXPECT_EQ(fragment_row(35, 0), 16);
  EXPECT_EQ(fragment_row(35, 2), 24);
  EXPECT_EQ(fragment_column(35, 1), 7);
  EXPECT_EQ(fragment_column(35, 6), 14);
}

TEST(GemmLayout, PiecesOfSharedMemoryDoNotOverlapAndAreAligned) {
  for (const TileLayout& t :
       {TileLayout{128, 64, Scaling::blocks}, TileLayout{128, 192, Scaling::blocks},
        TileLayout{256, 128, Scaling::blocks}, TileLayout{128, 128, Scaling::rows},
        TileLayout{256, 128, Scaling::none}}) {
    std::map<int, int> pieces;  // first byte, bytes
    for (int stage = 0; stage < t.stages(); ++stage) {
      EXPECT_EQ(t.a_at(stage) % 1024, 0);
      EXPECT_EQ(t.b_at(stage) % 1024, 0);
      EXPECT_EQ(t.scale_a_at(stage) % 128, 0);
      EXPECT_EQ(t.scale_b_at(stage) % 128, 0);
      pieces.emplace(t.a_at(stage), t.tile_m * 128);
      pieces.emplace(t.b_at(stage), t.tile_n * 128);
      if (t.scaling_b != Scaling::none) pieces.emplace(t.scale_a_at(stage), t.tile_m * 4);
      if (t.scaling_b == Scaling::rows) pieces.emplace(t.scale_b_at(stage), t.tile_n * 4);
    }
    EXPECT_EQ(t.staging_at() % 16, 0);
    pieces.emplace(t.staging_at(), 8 * 16 * 144);  // 8 warps, 16 rows of 64 BF16 and 16 bytes
    EXPECT_EQ(t.barriers_at() % 8, 0);
    pieces.emplace(t.barriers_at(), 2 * 8 * t.stages());
    int end = 0;
    for (const auto& [first, bytes] : pieces) {
      EXPECT_GE(first, end);
      end = first + bytes;
    }
    EXPECT_LE(end + 1008, t.shared_bytes());  // what aligning to 1024 can cost
    EXPECT_LE(t.shared_bytes(), 227 * 1024);
    EXPECT_GE(t.stages(), 4);
  }
}

/// How often the blocks of a grid compute each element of D, by group.
using Counts = std::map<int, std::vector<std::vector<int>>>;

Counts walked(const TileGrid& grid, int blocks, int d_rows, std::vector<int>* per_block = nullptr) {
  Counts counts;
  for (int block = 0; block < blocks; ++block) {
    TileWalk walk(grid, block / grid.cluster);
    Tile tile;
    int tiles = 0;
    while (walk.next(tile, blocks / grid.cluster, block % grid.cluster)) {
      ++tiles;
      auto& group = counts[tile.group];
      group.resize(static_cast<std::size_t>(d_rows),
                   std::vector<int>(static_cast<std::size_t>(grid.n)));
      for (int r = tile.row; r < tile.row + std::min(tile.rows, grid.tile_m); ++r) {
        for (int c = tile.column; c < std::min(tile.column + grid.tile_n, grid.n); ++c) {
          ++group.at(static_cast<std::size_t>(r)).at(static_cast<std::size_t>(c));
        }
      }
    }
    if (per_block != nullptr) per_block->push_back(tiles);
  }
  return counts;
}

TEST(TileWalk, CoversADenseResultOnceWhateverTheGrid) {
  for (const int cluster : {1, 2}) {
    for (const int panel : {1, 2, 4, 16}) {
      for (const int clusters : {1, 2, 5, 40}) {
        TileGrid grid{.m = 500, .n = 333, .k = 64, .tile_m = 64, .tile_n = 32};
        grid.cluster = cluster;
        grid.panel = panel;
        const Counts counts = walked(grid, clusters * cluster, grid.m);
        ASSERT_EQ(counts.size(), 1U);
        for (const auto& row : counts.at(0)) {
          for (const int times : row) ASSERT_EQ(times, 1);
        }
      }
    }
  }
}

TEST(TileWalk, CoversTheRowsOfGroupsAndNoOthers) {
  const std::vector<std::int32_t> begin{3, 80, 80, 90, 300}, rows{70, 0, 1, 200, 0};
  for (const int blocks : {2, 6, 64}) {
    TileGrid grid{.grouping = Grouping::rows,
                  .groups = 5,
                  .m = 310,
                  .n = 100,
                  .k = 64,
                  .tile_m = 64,
                  .tile_n = 32,
                  .cluster = 2,
                  .panel = 2};
    grid.group_begin = begin.data();
    grid.group_rows = rows.data();
    const Counts counts = walked(grid, blocks, grid.m);
    ASSERT_EQ(counts.size(), 3U);
    for (const auto& [group, matrix] : counts) {
      const auto g = static_cast<std::size_t>(group);
      for (int r = 0; r < grid.m; ++r) {
        const int expected = r >= begin[g] && r < begin[g] + rows[g] ? 1 : 0;
        for (const int times : matrix[static_cast<std::size_t>(r)]) ASSERT_EQ(times, expected);
      }
    }
  }
}

TEST(TileWalk, SplitsOfTheContractionSkipEmptyGroupsOnlyWhereTheyAddNothing) {
  const std::vector<std::int32_t> begin{0, 128, 128}, rows{100, 0, 7};
  TileGrid grid{.grouping = Grouping::contraction,
                .groups = 3,
                .m = 130,
                .n = 70,
                .k = 256,
                .tile_m = 64,
                .tile_n = 32};
  grid.group_begin = begin.data();
  grid.group_rows = rows.data();
  for (const bool accumulate : {false, true}) {
    grid.accumulate = accumulate;
    const Counts counts = walked(grid, 7, grid.m);
    EXPECT_EQ(counts.size(), accumulate ? 2U : 3U);
    for (const auto& [group, matrix] : counts) {
      EXPECT_TRUE(group != 1 || !accumulate);
      for (const auto& row : matrix) {
        for (const int times : row) ASSERT_EQ(times, 1);
      }
    }
  }
  TileWalk walk(grid, 0);
  Tile tile;
  ASSERT_TRUE(walk.next(tile, 9, 0));
  EXPECT_EQ(tile.k_end - tile.k_begin, 100);
  ASSERT_TRUE(walk.next(tile, 9, 0));  // 9 tiles a group: the next is the third's first
  EXPECT_EQ(tile.group, 2);
  EXPECT_EQ(tile.k_begin, 128);
  EXPECT_EQ(tile.k_end, 135);
}

}  // namespace
}  // namespace orrery::kernels
