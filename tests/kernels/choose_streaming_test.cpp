#include "kernels/choose_streaming.hpp"

#include <gtest/gtest.h>

#include <stdexcept>

namespace orrery::kernels {
namespace {

// 7168 columns are 896 octets: 3.5 for each of 256 threads.
TEST(ChooseRows, GivesTheHiddenSizeOfDeepSeekV3To256Threads) {
  const RowPlan plan = choose_rows(4096, 7168, 132, 1024, 4);
  EXPECT_EQ(plan.threads_per_row, 256);
  EXPECT_EQ(plan.octets, 4);
  EXPECT_EQ(plan.grid, 132);
  EXPECT_EQ(plan.groups(), 132 * 4);
  EXPECT_EQ(choose_rows(4096, 7168, 132, 512, 2).threads_per_row, 512);
}

TEST(ChooseRows, GivesAHeadToAWarp) {
  const RowPlan plan = choose_rows(64, 128, 132, 1024, 4);
  EXPECT_EQ(plan.threads_per_row, 32);
  EXPECT_EQ(plan.octets, 1);
  EXPECT_EQ(plan.grid, 2);  // 32 warps a block
}

TEST(ChooseRows, ReadsAgainWhatDoesNotFitIntoRegisters) {
  EXPECT_EQ(choose_rows(8, 1024 * 4 * 8, 132, 1024, 4).octets, 4);
  EXPECT_EQ(choose_rows(8, 1024 * 4 * 8 + 1, 132, 1024, 4).octets, 0);
  EXPECT_EQ(choose_rows(8, 128, 132, 1024, 0).octets, 0);
}

TEST(ChooseRows, HoldsTheWholeRowOnAsFewThreadsAsCan) {
  for (std::int64_t width = 1; width <= 40'000; width += 37) {
    for (const int block : {512, 1024}) {
      for (const int octets : {2, 4}) {
        const RowPlan plan = choose_rows(1000, width, 20, block, octets);
        EXPECT_EQ(block % plan.threads_per_row, 0);
        EXPECT_LE(plan.grid, 20);
        EXPECT_LE(plan.octets, octets);
        if (plan.octets == 0) {
          EXPECT_GT(width, std::int64_t{block} * octets * kOctet);
        } else {
          EXPECT_GE(std::int64_t{plan.threads_per_row} * plan.octets * kOctet, width);
          // named barriers of a block: 15 beside that of __syncthreads
          EXPECT_TRUE(plan.threads_per_row == 32 || block / plan.threads_per_row <= 15);
        }
      }
    }
  }
}

TEST(ChooseGrid, UsesNoMoreSmsThanAllowedAndNoMoreThanThereIsWorkFor) {
  EXPECT_EQ(choose_grid(1'000'000, 20, 1024), 20);
  EXPECT_EQ(choose_grid(1025, 132, 1024), 2);
  EXPECT_EQ(choose_grid(0, 132, 1024), 1);
  EXPECT_EQ(choose_grid(1'000'000, 132, 256, 2), 264);
}

TEST(ChooseChunks, CoversAllPairsAndFitsTheWorkspace) {
  for (const std::int64_t pairs : {0, 1, 1024, 1025, 262'144, 5'000'000}) {
    for (const std::int64_t experts : {1, 4, 256}) {
      for (const std::int64_t workspace : {4096, 1 << 20, 64 << 20}) {
        const ChunkPlan plan = choose_chunks(pairs, experts, workspace);
        EXPECT_EQ(plan.pairs_per_chunk % 32, 0);
        EXPECT_GE(plan.chunks, 1);
        EXPECT_GE(plan.chunks * plan.pairs_per_chunk, pairs);
        EXPECT_LE(plan.chunks * experts * 4, workspace);
        EXPECT_TRUE(pairs == 0 || (plan.chunks - 1) * plan.pairs_per_chunk < pairs);
      }
    }
  }
}

TEST(WarpsThatFit, SharesTheMemoryOfABlock) {
  EXPECT_EQ(warps_that_fit(256 * 4, 232'448), 32);  // Hopper's 227 KiB
  EXPECT_EQ(warps_that_fit(2048 * 4, 232'448), 28);
  EXPECT_THROW(warps_that_fit(300'000, 232'448), std::runtime_error);
}

}  // namespace
}  // namespace orrery::kernels
