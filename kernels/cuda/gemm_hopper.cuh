#pragma once
// GEMM for compute capability 9.0a: D = A B^T on the tensor cores, for e4m3 with scales of tiles
// (grouped or not) and for bf16 in groups.
//
// A block is three warpgroups. One thread of the last has the copy engine fill a ring of stages in
// shared memory, 128 bytes of the contraction at a time; the other two multiply, each 64 rows (or
// twice 64) of the tile, and hand stages back. Blocks stay and walk over tiles (TileWalk), so that
// the loads of the next tile run while the last one is written. Two blocks of a cluster compute
// tiles beside each other: each loads half of their rows of A, for both.
//
// With e4m3 the tensor cores sum no further than 128 products (their accumulators keep about 14
// bits, DeepSeek-V3 report, arXiv 2412.19437, 3.3.2): the sums of each stage are scaled and added
// in FP32 registers.

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/choose_gemm.hpp"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/tensor_map.hpp"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/gemm_layout.hpp"

namespace orrery::kernels::cuda {

inline constexpr int kHopperThreads = 384;
inline constexpr int kConsumerThreads = kConsumerWarps * 32;
/// Of 65536 registers, 384 threads start with 168 each: two warpgroups take what the loading one
/// gives.
inline constexpr int kLoaderRegisters = 40;
inline constexpr int kConsumerRegisters = 232;

/// What a kernel is compiled for.
template <Element kElement_, Scaling kScalingB_, int kTileM_, int kTileN_,
          Major kMajorA_ = Major::contraction, Major kMajorB_ = Major::contraction>
struct HopperTraits {
  static constexpr Element kElement = kElement_;
  static constexpr Scaling kScalingB = kScalingB_;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_;
  static constexpr Major kMajorA = kMajorA_, kMajorB = kMajorB_;
  static constexpr int kElementBytes = kElement == Element::e4m3 ? 1 : 2;
  static constexpr int kStageK = kStageRowBytes / kElementBytes;
  static constexpr int kSteps = kStageRowBytes / kWgmmaRowBytes;
  /// Times that a warpgroup goes over 64 rows; the two warpgroups take turns of 64 rows.
  static constexpr int kWaves = kTileM / 128;
  static constexpr int kSums = kTileN / 2;  ///< of a thread, for 64 rows
  static constexpr TileLayout kLayout{kTileM, kTileN, kScalingB};
  using Multiply = Wgmma<kElement, kTileN, kMajorA, kMajorB>;
};

struct HopperArguments {
  CUtensorMap a, b, scale_a, scale_b;
  TileGrid grid;
  // Scales of blocks of B.
  const float* blocks = nullptr;
  std::int64_t blocks_pitch = 0;
  int blocks_rows = 0, blocks_columns = 0;
  // D.
  void* d = nullptr;
  std::int64_t d_pitch = 0;
  bool d_fp32 = false;
  bool d_vectors = false;  ///< FP32: two elements, BF16: eight can be written at a time
};

template <int kValue>
struct Constant {
  ORRERY_HOST_DEVICE constexpr operator int() const { return kValue; }
};
/// body(0), body(1), ... with constants, so that arrays that they index stay in registers.
template <class Body, int... kIndices>
__device__ __forceinline__ void unrolled(const Body& body,
                                         std::integer_sequence<int, kIndices...>) {
  (body(Constant<kIndices>{}), ...);
}
template <int kCount, class Body>
__device__ __forceinline__ void unrolled(const Body& body) {
  unrolled(body, std::make_integer_sequence<int, kCount>{});
}

/// This block's place in the grid.
__device__ __forceinline__ int cluster_number(int cluster) {
  return static_cast<int>(blockIdx.x) / cluster;
}
__device__ __forceinline__ int clusters_in_grid(int cluster) {
  return static_cast<int>(gridDim.x) / cluster;
}
__device__ __forceinline__ int rank_in_cluster(int cluster) {
  return static_cast<int>(blockIdx.x) % cluster;
}

__device__ __forceinline__ bool next_tile(TileWalk& walk, Tile& tile, int cluster) {
  return walk.next(tile, clusters_in_grid(cluster), rank_in_cluster(cluster));
}

/// A block's ring of stages.
struct Ring {
  std::uint32_t base;  ///< of the block's shared memory, a multiple of 1024
  int stage = 0;
  int parity = 0;

  template <class Traits>
  __device__ std::uint32_t full() const {
    constexpr TileLayout kLayout = Traits::kLayout;
    return base + kLayout.barriers_at() + 8 * stage;
  }
  template <class Traits>
  __device__ std::uint32_t empty() const {
    constexpr TileLayout kLayout = Traits::kLayout;
    return base + kLayout.barriers_at() + 8 * (kLayout.stages() + stage);
  }
  template <class Traits>
  __device__ void advance() {
    constexpr TileLayout kLayout = Traits::kLayout;
    if (++stage == kLayout.stages()) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---------------------------------------------------------------------------------------------
// Loading.

template <class Traits>
__device__ __forceinline__ void load_a(const HopperArguments& args, const Ring& ring, int row,
                                       int k) {
  constexpr TileLayout kLayout = Traits::kLayout;
  const int cluster = args.grid.cluster;
  const int rank = rank_in_cluster(cluster);
  const std::uint32_t to = ring.base + kLayout.a_at(ring.stage);
  const std::uint32_t barrier = ring.full<Traits>();
  const auto load = [&](std::uint32_t at, int column, int first) {
    if (cluster == 1) {
      load_box(at, &args.a, column, first, barrier);
    } else {
      load_box_multicast(at, &args.a, column, first, barrier, (1 << cluster) - 1);
    }
  };
  if constexpr (Traits::kMajorA == Major::contraction) {
    const int rows = Traits::kTileM / cluster;
    load(to + rank * rows * kStageRowBytes, k, row + rank * rows);
  } else {
    const int panels = Traits::kTileM / kPanelColumns / cluster;
    for (int p = rank * panels; p < (rank + 1) * panels; ++p) {
      load(to + p * kPanelBytes, row + p * kPanelColumns, k);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void load_b(const HopperArguments& args, const Ring& ring,
                                       const Tile& tile, int k) {
  constexpr TileLayout kLayout = Traits::kLayout;
  const TileGrid& grid = args.grid;
  const int group = grid.grouping == Grouping::rows ? tile.group : 0;
  const std::uint32_t to = ring.base + kLayout.b_at(ring.stage);
  const std::uint32_t barrier = ring.full<Traits>();
  if constexpr (Traits::kMajorB == Major::contraction) {
    load_box(to, &args.b, k, group * grid.n + tile.column, barrier);
  } else {
    for (int p = 0; p < Traits::kTileN / kPanelColumns; ++p) {
      load_box(to + p * kPanelBytes, &args.b, tile.column + p * kPanelColumns, group * grid.k + k,
               barrier);
    }
  }
}

/// One thread.
template <class Traits>
__device__ __forceinline__ void load_tiles(const HopperArguments& args, Ring ring) {
  constexpr TileLayout kLayout = Traits::kLayout;
  TileWalk walk(args.grid, cluster_number(args.grid.cluster));
  Tile tile;
  while (next_tile(walk, tile, args.grid.cluster)) {
    for (int k = tile.k_begin; k < tile.k_end; k += Traits::kStageK) {
      wait_for(ring.empty<Traits>(), ring.parity ^ 1);
      const std::uint32_t full = ring.full<Traits>();
      arrive_and_expect(full, kLayout.stage_bytes());
      load_a<Traits>(args, ring, tile.row, k);
      load_b<Traits>(args, ring, tile, k);
      if constexpr (Traits::kScalingB != Scaling::none) {
        load_box(ring.base + kLayout.scale_a_at(ring.stage), &args.scale_a, tile.row,
                 k / Traits::kStageK, full);
      }
      if constexpr (Traits::kScalingB == Scaling::rows) {
        const int group = args.grid.grouping == Grouping::rows ? tile.group : 0;
        load_box(ring.base + kLayout.scale_b_at(ring.stage), &args.scale_b,
                 group * args.grid.n + tile.column, k / Traits::kStageK, full);
      }
      ring.advance<Traits>();
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Multiplying.

/// This thread's place among the multiplying ones.
struct Consumer {
  int warp;  ///< of the block, 0 .. 7
  int lane;
  /// First of the warp's 16 rows of the tile in a wave.
  __device__ int first_row(int wave) const { return wave * 128 + warp * 16; }
};

/// The warp has read a stage: tells all blocks that write to it.
template <class Traits>
__device__ __forceinline__ void hand_back(std::uint32_t empty, int cluster, int lane) {
  if (cluster == 1) {
    if (lane == 0) arrive(empty);
  } else if (lane < cluster) {
    arrive_at(empty, lane);
  }
}

template <class Traits>
__device__ __forceinline__ void multiply_stage(float (&sums)[Traits::kSums], const Ring& ring,
                                               int first_row, bool add) {
  constexpr TileLayout kLayout = Traits::kLayout;
  constexpr int kEight = 8 * kStageRowBytes;  // rows, or of the contraction
  const std::uint32_t a = ring.base + kLayout.a_at(ring.stage) + first_row * kStageRowBytes;
  const std::uint32_t b = ring.base + kLayout.b_at(ring.stage);
#pragma unroll
  for (int step = 0; step < Traits::kSteps; ++step) {
    // A panel of 64 columns is as long as 64 rows are, so both layouts begin at first_row * 128.
    const std::uint32_t along_rows = step * kWgmmaRowBytes;
    const std::uint32_t along_columns = step * 2 * kEight;
    const std::uint32_t a_step = Traits::kMajorA == Major::contraction ? along_rows : along_columns;
    const std::uint32_t b_step = Traits::kMajorB == Major::contraction ? along_rows : along_columns;
    Traits::Multiply::multiply(sums, wgmma_descriptor(a + a_step, kPanelBytes, kEight),
                               wgmma_descriptor(b + b_step, kPanelBytes, kEight), add || step > 0);
  }
}

/// The scales of B's blocks along a tile's contraction: a lane holds those of every 32nd stage and
/// hands them out. With 192 columns a tile lies in two blocks, which meet at column 64 or 128.
template <class Traits>
struct BlockScales {
  static constexpr int kBlocks = Traits::kTileN > kTile ? 2 : 1;

  int row = 0;    ///< of B
  int first = 0;  ///< of the tile, along the contraction
  float held[kBlocks] = {};
  float ahead[kBlocks] = {};

  __device__ BlockScales(const HopperArguments& args, const Tile& tile)
      : row((args.grid.grouping == Grouping::rows ? tile.group * args.grid.n : 0) + tile.column),
        first(tile.k_begin / Traits::kStageK) {}

  __device__ void fetch(const HopperArguments& args, int stage) {
    const int at = first + stage < args.blocks_columns ? first + stage : args.blocks_columns - 1;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int block = row / static_cast<int>(kTile) + i;
      const int there = block < args.blocks_rows ? block : args.blocks_rows - 1;
      ahead[i] = __ldg(args.blocks + there * args.blocks_pitch + at);
    }
  }
  /// For stage after stage, from 0 on.
  __device__ void advance(const HopperArguments& args, int stage, int lane) {
    if (stage % 32 != 0) return;
    if (stage == 0) fetch(args, lane);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) held[i] = ahead[i];
    fetch(args, stage + 32 + lane);
  }
  __device__ float at(int stage, int block) const {
    return __shfl_sync(kAllLanes, held[block], stage % 32);
  }
  /// Whether the second block begins at column 64.
  __device__ bool early() const {
    return row % static_cast<int>(kTile) != 0;
  }
};

/// Adds a stage's sums, scaled by their rows' and their columns' scales. Columns before kSplit lie
/// in one block of B, the others in the next.
template <int kSums, int kSplit>
__device__ __forceinline__ void promote(float (&total)[kSums], const float (&sums)[kSums],
                                        const float (&scale_a)[2], const float (&scale_b)[2]) {
  const float scales[2][2] = {{scale_a[0] * scale_b[0], scale_a[1] * scale_b[0]},
                              {scale_a[0] * scale_b[1], scale_a[1] * scale_b[1]}};
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    total[i] += scales[i / 4 * 8 < kSplit ? 0 : 1][i / 2 % 2] * sums[i];
  }
}

template <class Traits>
using Totals = float[Traits::kWaves][Traits::kSums];

template <class Traits>
__device__ __forceinline__ void pin_all(Totals<Traits>& total) {
  unrolled<Traits::kWaves>([&](auto wave) {
#pragma unroll
    for (int i = 0; i < Traits::kSums; ++i) pin(total[wave][i]);
  });
}

template <class Traits>
__device__ __forceinline__ void multiply_fp8(const HopperArguments& args, const Consumer& me,
                                             Ring& ring, const Tile& tile, Totals<Traits>& total) {
  constexpr TileLayout kLayout = Traits::kLayout;
  constexpr int kSums = Traits::kSums;
  constexpr bool kBlocks = Traits::kScalingB == Scaling::blocks;
  BlockScales<Traits> blocks(args, tile);
  const int stages = (tile.k_end - tile.k_begin + Traits::kStageK - 1) / Traits::kStageK;
  float sums[kSums] = {};  // of a stage; the first wgmma of each does not read them
#pragma unroll 1
  for (int s = 0; s < stages; ++s) {
    float scale_blocks[2] = {};
    if constexpr (kBlocks) {
      blocks.advance(args, s, me.lane);
      scale_blocks[0] = blocks.at(s, 0);
      if constexpr (Traits::kTileN > kTile) scale_blocks[1] = blocks.at(s, 1);
    }
    wait_for(ring.full<Traits>(), ring.parity);
    unrolled<Traits::kWaves>([&](auto wave) {
      // All that is read from the stage is read before it is handed back.
      const std::uint32_t of_rows =
          ring.base + kLayout.scale_a_at(ring.stage) + (me.first_row(wave) + me.lane / 4) * 4;
      const float scale_a[2] = {load_shared(of_rows), load_shared(of_rows + 8 * 4)};
      [[maybe_unused]] float scale_columns[kSums / 2];
      if constexpr (!kBlocks) {
        const std::uint32_t of_columns =
            ring.base + kLayout.scale_b_at(ring.stage) + me.lane % 4 * 2 * 4;
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) {
          const float2 pair = load_shared_pair(of_columns + i * 8 * 4);
          scale_columns[2 * i] = pair.x;
          scale_columns[2 * i + 1] = pair.y;
        }
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) pin(sums[i]);
      wgmma_fence();
      multiply_stage<Traits>(sums, ring, wave * 128 + me.warp / 4 * 64, false);
      wgmma_commit();
#pragma unroll
      for (int i = 0; i < kSums; ++i) pin(sums[i]);
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < kSums; ++i) pin(sums[i]);
      if (wave == Traits::kWaves - 1) {
        hand_back<Traits>(ring.empty<Traits>(), args.grid.cluster, me.lane);
      }

      if constexpr (!kBlocks) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          total[wave][i] += scale_a[i / 2 % 2] * scale_columns[i / 4 * 2 + i % 2] * sums[i];
        }
      } else if constexpr (Traits::kTileN <= kTile) {
        promote<kSums, Traits::kTileN>(total[wave], sums, scale_a, scale_blocks);
      } else if (blocks.early()) {
        promote<kSums, 64>(total[wave], sums, scale_a, scale_blocks);
      } else {
        promote<kSums, 128>(total[wave], sums, scale_a, scale_blocks);
      }
    });
    ring.advance<Traits>();
  }
}

/// Rows of the contraction from `rows` on become zero in the stage, for all multiplying threads.
template <class Traits>
__device__ __forceinline__ void clear_rows_from(int rows, const Consumer& me, const Ring& ring) {
  constexpr TileLayout kLayout = Traits::kLayout;
  constexpr int kPanelsA = Traits::kTileM / kPanelColumns;
  constexpr int kPanels = kPanelsA + Traits::kTileN / kPanelColumns;
  const int vectors = (Traits::kStageK - rows) * (kStageRowBytes / 16);  // of a panel
  for (int i = me.warp * 32 + me.lane; i < kPanels * vectors; i += kConsumerThreads) {
    const int panel = i / vectors;
    const int at = panel < kPanelsA ? kLayout.a_at(ring.stage) + panel * kPanelBytes
                                    : kLayout.b_at(ring.stage) + (panel - kPanelsA) * kPanelBytes;
    clear_shared(ring.base + at + rows * kStageRowBytes + (i - panel * vectors) * 16);
  }
  fence_async_proxy();
  barrier(1, kConsumerThreads);
}

template <class Traits>
__device__ __forceinline__ void multiply_bf16(const HopperArguments& args, const Consumer& me,
                                              Ring& ring, const Tile& tile, Totals<Traits>& total) {
  std::uint32_t last_empty = 0;
  for (int k = tile.k_begin; k < tile.k_end; k += Traits::kStageK) {
    wait_for(ring.full<Traits>(), ring.parity);
    if constexpr (Traits::kMajorA == Major::other && Traits::kMajorB == Major::other) {
      // The last stage of a group reaches into what is behind it.
      if (tile.k_end - k < Traits::kStageK) {
        clear_rows_from<Traits>(tile.k_end - k, me, ring);
      }
    }
    pin_all<Traits>(total);
    wgmma_fence();
    unrolled<Traits::kWaves>([&](auto wave) {
      multiply_stage<Traits>(total[wave], ring, wave * 128 + me.warp / 4 * 64, true);
    });
    wgmma_commit();
    pin_all<Traits>(total);
    // This stage's products run on while the next is waited for; the one before is done.
    wgmma_wait<1>();
    if (k != tile.k_begin) hand_back<Traits>(last_empty, args.grid.cluster, me.lane);
    last_empty = ring.empty<Traits>();
    ring.advance<Traits>();
  }
  wgmma_wait<0>();
  pin_all<Traits>(total);
  if (tile.k_end > tile.k_begin) hand_back<Traits>(last_empty, args.grid.cluster, me.lane);
}

// ---------------------------------------------------------------------------------------------
// Writing.

/// Two elements of a row, of which `count` are the tile's.
__device__ __forceinline__ void write_pair(float* to, float x, float y, int count, bool vectors,
                                           bool accumulate) {
  if (count >= 2 && vectors) {
    if (accumulate) {
      add_to_global(to, x, y);
    } else {
      *reinterpret_cast<float2*>(to) = make_float2(x, y);
    }
    return;
  }
  if (count >= 1) {
    if (accumulate) {
      add_to_global(to, x);
    } else {
      to[0] = x;
    }
  }
  if (count >= 2) {
    if (accumulate) {
      add_to_global(to + 1, y);
    } else {
      to[1] = y;
    }
  }
}

/// 16 x tile_n of FP32: the pairs of four lanes are a sector of 32 bytes.
template <int kSums>
__device__ __forceinline__ void write_fp32(const HopperArguments& args, const float (&total)[kSums],
                                           float* d, int rows, int columns, int lane) {
  float* to = d + lane / 4 * args.d_pitch + lane % 4 * 2;
  int left = columns - lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kSums; i += 4) {
    if (lane / 4 < rows) {
      write_pair(to, total[i], total[i + 1], left, args.d_vectors, args.grid.accumulate);
    }
    if (lane / 4 + 8 < rows) {
      write_pair(to + 8 * args.d_pitch, total[i + 2], total[i + 3], left, args.d_vectors,
                 args.grid.accumulate);
    }
    to += 8;
    left -= 8;
  }
}

/// 16 x tile_n of BF16, through the warp's own piece of shared memory, so that rows are written 128
/// bytes at a time.
template <int kSums>
__device__ __forceinline__ void write_bf16(const HopperArguments& args, const float (&total)[kSums],
                                           std::uint16_t* d, int rows, int columns, int lane,
                                           std::uint32_t staging) {
  // Lane l gives the address of row l % 8 of matrix l / 8: rows 0-7 and 8-15 of 8 columns, then of
  // the next 8.
  const std::uint32_t stores =
      staging + (lane % 8 + lane / 8 % 2 * 8) * kStagingPitchBytes + lane / 16 * 16;
#pragma unroll
  for (int first = 0; first < kSums * 2; first += kStagingColumns) {
#pragma unroll
    for (int j = 0; j < kStagingColumns / 16; ++j) {
      const int i = (first / 8 + 2 * j) * 4;
      store_matrices(stores + j * 32, pack_bf16x2(total[i], total[i + 1]),
                     pack_bf16x2(total[i + 2], total[i + 3]),
                     pack_bf16x2(total[i + 4], total[i + 5]),
                     pack_bf16x2(total[i + 6], total[i + 7]));
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = 4 * j + lane / 8;
      const int column = first + lane % 8 * 8;
      const uint4 eight = load_shared_vector(staging + row * kStagingPitchBytes + lane % 8 * 16);
      if (row >= rows || column >= columns) continue;
      std::uint16_t* const to = d + row * args.d_pitch + column;
      if (args.d_vectors && column + 8 <= columns) {
        *reinterpret_cast<uint4*>(to) = eight;
      } else {
        const std::uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if (column + c < columns)
            to[c] = static_cast<std::uint16_t>(pairs[c / 2] >> (c % 2 * 16));
        }
      }
    }
    __syncwarp();
  }
}

template <class Traits>
__device__ __forceinline__ void write_tile(const HopperArguments& args, const Consumer& me,
                                           const Ring& ring, const Tile& tile,
                                           const Totals<Traits>& total) {
  constexpr TileLayout kLayout = Traits::kLayout;
  const TileGrid& grid = args.grid;
  const std::int64_t row =
      (grid.grouping == Grouping::contraction ? static_cast<std::int64_t>(tile.group) * grid.m
                                              : 0) +
      tile.row;
  const int columns = grid.n - tile.column;
  unrolled<Traits::kWaves>([&](auto wave) {
    const int first = me.first_row(wave);
    const std::int64_t at = (row + first) * args.d_pitch + tile.column;
    if (args.d_fp32) {
      write_fp32(args, total[wave], static_cast<float*>(args.d) + at, tile.rows - first, columns,
                 me.lane);
    } else {
      write_bf16(args, total[wave], static_cast<std::uint16_t*>(args.d) + at, tile.rows - first,
                 columns, me.lane,
                 ring.base + kLayout.staging_at() + me.warp * 16 * kStagingPitchBytes);
    }
  });
}

template <class Traits>
__device__ __forceinline__ void multiply_tiles(const HopperArguments& args, Ring ring, int warp,
                                               int lane) {
  const Consumer me{warp, lane};
  TileWalk walk(args.grid, cluster_number(args.grid.cluster));
  Tile tile;
  while (next_tile(walk, tile, args.grid.cluster)) {
    Totals<Traits> total = {};
    if constexpr (Traits::kElement == Element::e4m3) {
      multiply_fp8<Traits>(args, me, ring, tile, total);
    } else {
      multiply_bf16<Traits>(args, me, ring, tile, total);
    }
    write_tile<Traits>(args, me, ring, tile, total);
  }
}

template <class Traits>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_gemm(const __grid_constant__ HopperArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(ORRERY_EMULATED)
  constexpr TileLayout kLayout = Traits::kLayout;
  static_assert(kLayout.stages() >= 4 && kLayout.shared_bytes() <= kHopperSharedBytes);
  const int cluster = args.grid.cluster;
  // The same for all lanes, and the compiler may know.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;

  Ring ring{(shared_address(dynamic_shared()) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes};

  if (threadIdx.x == 0) {
    prefetch_map(&args.a);
    prefetch_map(&args.b);
    for (Ring r = ring; r.parity == 0; r.advance<Traits>()) {
      init_barrier(r.full<Traits>(), 1);
      init_barrier(r.empty<Traits>(), cluster * kConsumerWarps);
    }
    publish_barriers();
  }
  if (cluster > 1) {
    cluster_barrier();
  } else {
    __syncthreads();
  }

  if (warp >= kConsumerWarps) {
    give_registers_back<kLoaderRegisters>();
    if (warp == kConsumerWarps && lane == 0) load_tiles<Traits>(args, ring);
  } else {
    take_registers<kConsumerRegisters>();
    multiply_tiles<Traits>(args, ring, warp, lane);
  }
  // Nobody leaves while others of the cluster write to its shared memory.
  if (cluster > 1) cluster_barrier();
#endif
}

// ---------------------------------------------------------------------------------------------
// Launching.

inline bool vectors_of(const Matrix& d) {
  const std::uintptr_t bytes = d.format == Format::fp32 ? 8 : 16;
  const std::int64_t elements = d.format == Format::fp32 ? 2 : 8;
  return reinterpret_cast<std::uintptr_t>(d.data) % bytes == 0 && d.pitch % elements == 0;
}

template <class Traits>
HopperArguments arguments_for(const Gemm& call, const GemmPlan& plan) {
  const auto operand = [](const Matrix& x, Major major, int rows) {
    MapRequest r{.data = x.data,
                 .element = Traits::kElement == Element::e4m3 ? MapElement::byte : MapElement::bf16,
                 .rows = x.rows,
                 .columns = x.columns,
                 .pitch_bytes = x.pitch * Traits::kElementBytes};
    r.box_rows = major == Major::contraction ? rows : Traits::kStageK;
    r.box_columns = major == Major::contraction ? Traits::kStageK : kPanelColumns;
    return make_map(r);
  };
  const auto scales = [](const Matrix& x, int rows) {
    return make_map({.data = x.scales,
                     .element = MapElement::fp32,
                     .rows = (x.columns + kTile - 1) / kTile,
                     .columns = x.rows,
                     .pitch_bytes = x.scale_pitch * 4,
                     .box_rows = 1,
                     .box_columns = rows,
                     .swizzled = false});
  };
  HopperArguments args{};
  args.grid = tile_grid_of(call, plan);
  args.a = operand(call.a, Traits::kMajorA, Traits::kTileM / plan.cluster);
  args.b = operand(call.b, Traits::kMajorB, Traits::kTileN);
  if constexpr (Traits::kScalingB != Scaling::none) args.scale_a = scales(call.a, Traits::kTileM);
  if constexpr (Traits::kScalingB == Scaling::rows) args.scale_b = scales(call.b, Traits::kTileN);
  if constexpr (Traits::kScalingB == Scaling::blocks) {
    args.blocks = call.b.scales;
    args.blocks_pitch = call.b.scale_pitch;
    args.blocks_rows = static_cast<int>((call.b.rows + kTile - 1) / kTile);
    args.blocks_columns = static_cast<int>((call.b.columns + kTile - 1) / kTile);
  }
  args.d = call.d.data;
  args.d_pitch = call.d.pitch;
  args.d_fp32 = call.d.format == Format::fp32;
  args.d_vectors = vectors_of(call.d);
  return args;
}

template <class Traits>
void launch_hopper(const Gemm& call, const GemmPlan& plan, const LaunchContext& context) {
  check(cudaFuncSetAttribute(hopper_gemm<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             plan.shared_bytes),
        "cudaFuncSetAttribute(hopper_gemm)");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(kHopperThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
  config.stream = context.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, hopper_gemm<Traits>, arguments_for<Traits>(call, plan)),
        "hopper_gemm");
}

}  // namespace orrery::kernels::cuda
