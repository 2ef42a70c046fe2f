#pragma once
// What the Hopper GEMM kernel and the code that plans its launch have to agree on, for host and
// device: where operands lie in shared memory, how wgmma is told so, which thread holds which
// element of the result, and who computes which tile. Pure functions; tests read operands back
// through them.
//
// Sources: PTX ISA 9.0, "Asynchronous warpgroup level matrix instructions" (matrix descriptor,
// canonical layouts, fragments of wgmma.mma_async) and "Tensor copies: swizzling modes".

#include <cstdint>

#include "kernels/call.hpp"

#if defined(__CUDACC__)
#define ORRERY_HOST_DEVICE __host__ __device__
#else
#define ORRERY_HOST_DEVICE
#endif

namespace orrery::kernels {

/// Bytes of the contraction in a stage, and of a row of a swizzled tile: 128 e4m3 or 64 bf16.
inline constexpr int kStageRowBytes = 128;
/// Eight rows: the unit that the 128-byte swizzle permutes. Tiles are aligned to it.
inline constexpr int kSwizzleBytes = 1024;
/// Bytes of the contraction that one wgmma takes: 32 e4m3 or 16 bf16.
inline constexpr int kWgmmaRowBytes = 32;
/// Rows of a panel of an operand whose contraction runs along its columns: 64 bf16 to the row.
inline constexpr int kPanelColumns = 64;
inline constexpr int kPanelBytes = 64 * kStageRowBytes;

/// Where TMA's 128-byte swizzle puts the byte that would be at `offset` of a tile with rows of 128
/// bytes: the 16-byte chunk's number is xored with the row's, modulo 8.
ORRERY_HOST_DEVICE constexpr std::uint32_t swizzled(std::uint32_t offset) {
  return offset ^ ((offset >> 7U & 7U) << 4U);
}

/// wgmma's matrix descriptor for tiles with the 128-byte swizzle. With the contraction along the
/// rows, `stride_bytes` leads from eight rows to the next eight, and `leading_bytes` is not used;
/// along the columns, `stride_bytes` leads to the next eight of the contraction and `leading_bytes`
/// from 64 columns to the next 64.
ORRERY_HOST_DEVICE constexpr std::uint64_t wgmma_descriptor(std::uint32_t shared_address,
                                                            std::uint32_t leading_bytes,
                                                            std::uint32_t stride_bytes) {
  constexpr std::uint64_t kSwizzle128 = 1;
  return static_cast<std::uint64_t>((shared_address & 0x3FFFFU) >> 4U) |
         static_cast<std::uint64_t>((leading_bytes & 0x3FFFFU) >> 4U) << 16U |
         static_cast<std::uint64_t>((stride_bytes & 0x3FFFFU) >> 4U) << 32U | kSwizzle128 << 62U;
}

/// Element i of a thread's part of a wgmma's 64 x n result: row and column, in the warpgroup's 64
/// rows.
ORRERY_HOST_DEVICE constexpr int fragment_row(int thread, int i) {
  return thread % 128 / 32 * 16 + thread % 32 / 4 + (i / 2 % 2) * 8;
}
ORRERY_HOST_DEVICE constexpr int fragment_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// ---------------------------------------------------------------------------------------------
// Shared memory.

inline constexpr int kConsumerWarps = 8;
/// A warp rounds its results to BF16 and writes them out 16 rows and 64 columns at a time; 16 bytes
/// between rows, so that eight rows start in different banks.
inline constexpr int kStagingColumns = 64;
inline constexpr int kStagingPitchBytes = kStagingColumns * 2 + 16;
inline constexpr int kStagingBytes = kConsumerWarps * 16 * kStagingPitchBytes;
inline constexpr int kMostStages = 8;
inline constexpr int kHopperSharedBytes = 232448;  ///< a block of compute capability 9.0 can have

/// How a tile's operands are scaled: scales of A per row; of B none, one for each block of 128
/// columns, or one a column.
struct TileLayout {
  int tile_m = 128;
  int tile_n = 128;
  Scaling scaling_b = Scaling::none;  ///< none: A has no scales either

  ORRERY_HOST_DEVICE constexpr int a_bytes() const { return tile_m * kStageRowBytes; }
  ORRERY_HOST_DEVICE constexpr int b_bytes() const { return tile_n * kStageRowBytes; }
  ORRERY_HOST_DEVICE constexpr int scale_a_bytes() const {
    return scaling_b == Scaling::none ? 0 : tile_m * 4;
  }
  ORRERY_HOST_DEVICE constexpr int scale_b_bytes() const {
    return scaling_b == Scaling::rows ? tile_n * 4 : 0;
  }
  ORRERY_HOST_DEVICE constexpr int stage_bytes() const {
    return a_bytes() + b_bytes() + scale_a_bytes() + scale_b_bytes();
  }
  /// As many as there is room for.
  ORRERY_HOST_DEVICE constexpr int stages() const {
    const int room = kHopperSharedBytes - kSwizzleBytes - kStagingBytes - 2 * 8 * kMostStages;
    const int stages = room / stage_bytes();
    return stages < kMostStages ? stages : kMostStages;
  }
  // Offsets from the first multiple of 1024 on: all A, all B, all scales of A, of B, staging,
  // barriers.
  ORRERY_HOST_DEVICE constexpr int a_at(int stage) const { return stage * a_bytes(); }
  ORRERY_HOST_DEVICE constexpr int b_at(int stage) const {
    return stages() * a_bytes() + stage * b_bytes();
  }
  ORRERY_HOST_DEVICE constexpr int scale_a_at(int stage) const {
    return stages() * (a_bytes() + b_bytes()) + stage * scale_a_bytes();
  }
  ORRERY_HOST_DEVICE constexpr int scale_b_at(int stage) const {
    return stages() * (a_bytes() + b_bytes() + scale_a_bytes()) + stage * scale_b_bytes();
  }
  ORRERY_HOST_DEVICE constexpr int staging_at() const { return stages() * stage_bytes(); }
  ORRERY_HOST_DEVICE constexpr int barriers_at() const { return staging_at() + kStagingBytes; }
  /// What a block asks for.
  ORRERY_HOST_DEVICE constexpr int shared_bytes() const {
    return kSwizzleBytes + barriers_at() + 2 * 8 * stages();
  }
};

// ---------------------------------------------------------------------------------------------
// Who computes what.

/// The product as a kernel sees it. A cluster of `cluster` blocks computes as many tiles beside
/// each other at a time, with the same rows of A.
struct TileGrid {
  Grouping grouping = Grouping::none;
  bool accumulate = false;
  int groups = 1;
  int m = 0;  ///< rows of D: of a group's where the contraction is split, of all groups' where A is
  int n = 0;
  int k = 0;  ///< of all groups where the contraction is split
  int tile_m = 128, tile_n = 128;
  int cluster = 1;
  int panel = 8;  ///< tiles below each other that are computed before the next column of tiles
  const std::int32_t* group_begin = nullptr;
  const std::int32_t* group_rows = nullptr;

  ORRERY_HOST_DEVICE constexpr int column_units() const {
    return (n + tile_n * cluster - 1) / (tile_n * cluster);
  }
};

/// Columns from n on, and rows from `rows` on, are not the tile's.
struct Tile {
  int group = 0;
  int row = 0;     ///< of A, where it is not split by the contraction, and of the group's D
  int rows = 0;    ///< may be more than a tile has
  int column = 0;  ///< of the group's B and D
  int k_begin = 0;
  int k_end = 0;
};

/// The tiles of one block, in the order in which it computes them; refers to the grid. All blocks
/// of a cluster, and all threads of a block, walk alike. What it remembers is two numbers, since
/// registers are short where it is used; the rest is read again for each tile.
class TileWalk {
 public:
  /// `worker` counts clusters.
  ORRERY_HOST_DEVICE TileWalk(const TileGrid& grid, int worker) : grid_(grid), unit_(worker) {}

  /// `workers`: clusters; `rank`: of the block in its cluster. False: there are no more.
  ORRERY_HOST_DEVICE bool next(Tile& tile, int workers, int rank) {
    const int columns = grid_.column_units();
    while (group_ < grid_.groups) {
      const bool split = grid_.grouping == Grouping::rows;
      const int rows = split ? grid_.group_rows[group_] : grid_.m;
      const int row_tiles = (rows + grid_.tile_m - 1) / grid_.tile_m;
      if (unit_ >= row_tiles * columns) {
        unit_ -= row_tiles * columns;
        ++group_;
        continue;
      }
      place(tile, row_tiles, columns, rank);
      tile.group = group_;
      tile.rows = rows - tile.row;
      if (split) tile.row += grid_.group_begin[group_];
      unit_ += workers;
      if (grid_.grouping != Grouping::contraction) {
        tile.k_begin = 0;
        tile.k_end = grid_.k;
        return true;
      }
      tile.k_begin = grid_.group_begin[group_];
      tile.k_end = tile.k_begin + grid_.group_rows[group_];
      // A group without rows adds nothing.
      if (tile.k_end > tile.k_begin || !grid_.accumulate) return true;
    }
    return false;
  }

 private:
  /// Panels of `panel` tiles below each other, column after column.
  ORRERY_HOST_DEVICE void place(Tile& tile, int row_tiles, int columns, int rank) const {
    const int panel = unit_ / (grid_.panel * columns);
    const int inside = unit_ - panel * grid_.panel * columns;
    const int left = row_tiles - panel * grid_.panel;
    const int height = left < grid_.panel ? left : grid_.panel;
    const int column = inside / height;
    tile.row = (panel * grid_.panel + inside - column * height) * grid_.tile_m;
    tile.column = (column * grid_.cluster + rank) * grid_.tile_n;
  }

  const TileGrid& grid_;
  int unit_;  ///< of the group
  int group_ = 0;
};

}  // namespace orrery::kernels
