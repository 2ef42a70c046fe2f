#pragma once
// Attention in BF16 on the tensor cores of compute capability 9.0a: head dimensions 192/128,
// 128/128 and 64/64. What FlashAttention-3 (arXiv 2407.08608) does for the forward pass: one
// warpgroup has the copy engine bring tiles, two others multiply, each 64 queries; a warpgroup's
// exponentials run while its own and its neighbour's products do, and the two take turns.
//
// The backward pass differs: it has two kernels instead of one. One walks the queries for 128 keys
// and sums dK and dV in registers, the other walks the keys for 128 queries and sums dQ. Scores and
// their gradients are computed twice, 7 products instead of 5, but nothing is added in memory: sums
// have one order, and there is no FP32 dQ to write, read and convert. Scores are transposed in the
// first kernel (rows are keys), so that P and dS are operands from registers in both.
//
// Tiles lie in shared memory in panels of 64 columns (128 bytes), rows below each other, as the
// copy engine writes them with a swizzle of 128 bytes and as wgmma reads them either way round.

#include <cstdint>

#include "kernels/choose_attention.hpp"
#include "kernels/cuda/attention_device.cuh"

namespace orrery::kernels::cuda::attention {

inline constexpr int kWarpgroup = 128;
inline constexpr int kConsumers = 2;  ///< warpgroups that multiply
inline constexpr int kThreads = kWarpgroup * (kConsumers + 1);
inline constexpr int kRowsOfWarpgroup = 64;
inline constexpr int kPanelColumns = 64;
inline constexpr int kPanelRowBytes = 128;
inline constexpr float kMinusInfinity = -__builtin_inff();
inline constexpr float kLog2OfE = 1.4426950408889634F;
inline constexpr float kLogOf2 = 0.6931471805599453F;
static_assert(kAttentionTile == kConsumers * kRowsOfWarpgroup);

// Registers of a thread: (24 + 2 * 240) * 128 of 65536.
inline constexpr int kProducerRegisters = 24;
inline constexpr int kConsumerRegisters = 240;

template <int kRows, int kColumns>
inline constexpr int kTileBytes = kRows* kColumns * 2;

/// Where the panels of a tile begin.
template <int kRows>
__device__ __forceinline__ std::uint32_t panel(std::uint32_t tile, int index) {
  return tile + static_cast<std::uint32_t>(index * kRows * kPanelRowBytes);
}

/// For wgmma: a matrix in shared memory with a swizzle of 128 bytes. `leading`: bytes from one
/// panel to the next, where the contraction runs down the rows; rows come in groups of 8, 1024
/// bytes apart (PTX ISA, "Matrix Descriptor Format").
__device__ __forceinline__ std::uint64_t descriptor(std::uint32_t address, std::uint32_t leading) {
  return static_cast<std::uint64_t>((address & 0x3ffffU) >> 4U) |
         static_cast<std::uint64_t>(leading >> 4U) << 16U | std::uint64_t{1024 >> 4} << 32U |
         std::uint64_t{1} << 62U;
}
/// 16 columns, from 16 * step on, of the rows from `row` on: the contraction runs along them.
template <int kRows>
__device__ __forceinline__ std::uint64_t along_rows(std::uint32_t tile, int row, int step) {
  constexpr int kSteps = kPanelColumns / 16;
  return descriptor(panel<kRows>(tile, step / kSteps) +
                        static_cast<std::uint32_t>(row * kPanelRowBytes + step % kSteps * 32),
                    16);
}
/// 16 rows, from 16 * step on, of all columns: the contraction runs down them.
template <int kRows>
__device__ __forceinline__ std::uint64_t down_rows(std::uint32_t tile, int step) {
  return descriptor(tile + static_cast<std::uint32_t>(step * 16 * kPanelRowBytes),
                    kRows * kPanelRowBytes);
}

/// d = rows [row, row + 64) of A times B transposed: both (rows, kDepth), B kRowsB of them.
template <int kRowsA, int kRowsB, int kDepth>
__device__ __forceinline__ void start_scores(float (&d)[kRowsB / 2], std::uint32_t a, int row,
                                             std::uint32_t b) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    multiply_shared<kRowsB>(d, along_rows<kRowsA>(a, row, step), along_rows<kRowsB>(b, 0, step),
                            step > 0);
  }
  wgmma_commit();
}
/// d += P B: P (64, kRowsB) in registers, B (kRowsB, kColumns).
template <int kRowsB, int kColumns>
__device__ __forceinline__ void start_product(float (&d)[kColumns / 2],
                                              const std::uint32_t (&p)[kRowsB / 4],
                                              std::uint32_t b) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kRowsB / 16; ++step) {
    multiply_registers<kColumns>(d, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                                 down_rows<kRowsB>(b, step));
  }
  wgmma_commit();
}

/// A tile of rows for the copy engine, panel by panel.
template <int kRows, int kColumns>
__device__ __forceinline__ void load_tile(std::uint32_t to, const CUtensorMap* map, int head,
                                          int row, int sequence, std::uint32_t barrier) {
#pragma unroll
  for (int i = 0; i < kColumns / kPanelColumns; ++i) {
    load_box(panel<kRows>(to, i), map, i * kPanelColumns, head, row, sequence, barrier);
  }
}

/// Stages of a ring, and the parity of the phase that its barriers are in.
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// A pair of barriers: filled by the copy engine, emptied by every warp of the consumers.
struct Gate {
  std::uint32_t full, empty;
};
/// Gate `index` of those that lie from `gates` on.
__device__ __forceinline__ Gate gate(std::uint32_t gates, int index) {
  const std::uint32_t full = gates + static_cast<std::uint32_t>(16 * index);
  return {full, full + 8};
}
inline constexpr int kGateBytes = 16;

__device__ __forceinline__ void init_gates(std::uint32_t gates, int count) {
  for (int i = 0; i < count; ++i) {
    init_barrier(gate(gates, i).full, 1);
    init_barrier(gate(gates, i).empty, kConsumers * 4);
  }
  publish_barriers();
}
/// By every warp, when nothing of what it issued reads the tile any more.
__device__ __forceinline__ void release(const Gate& g, int lane) {
  if (lane == 0) arrive(g.empty);
}
/// The producer's: the first pass finds everything empty.
__device__ __forceinline__ void reserve(const Gate& g, int parity, int bytes) {
  wait_for(g.empty, parity ^ 1);
  arrive_and_expect(g.full, bytes);
}

/// Dynamic shared memory from a multiple of 1024 on, as the swizzle wants it.
__device__ __forceinline__ std::uint32_t aligned_shared() {
  return (shared_address(dynamic_shared()) + 1023U) & ~1023U;
}
inline constexpr int kAlignment = 1024;

/// Which query or key the thread's first row is, of 64 from `first` on; the other is the 8th after
/// it.
__device__ __forceinline__ int row_of(int first, int warp, int lane) {
  return first + warp * 16 + lane / 4;
}

/// Rows r and r + 8, columns 8 j + lane % 4 * 2 and the next, times `factor`, to BF16 rows of a
/// matrix.
template <int kColumns>
__device__ __forceinline__ void store_rows(const float (&d)[kColumns / 2], float factor0,
                                           float factor1, std::uint16_t* to, std::int64_t pitch,
                                           int row, int rows, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half;
    const float factor = half == 0 ? factor0 : factor1;
    if (r >= rows) continue;
    std::uint16_t* const at = to + r * pitch + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      *reinterpret_cast<std::uint32_t*>(at + 8 * j) =
          pack_bf16x2(d[4 * j + 2 * half] * factor, d[4 * j + 2 * half + 1] * factor);
    }
  }
}

/// P as wgmma's operand from registers.
template <int kCount>
__device__ __forceinline__ void pack(const float (&x)[kCount], std::uint32_t (&p)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) p[i] = pack_bf16x2(x[2 * i], x[2 * i + 1]);
}

/// Fewest and most keys that a query of some sees: 0 .. these.
struct SeenRange {
  std::int32_t least, most;
};
inline constexpr int kRangeQueries = 64;

/// What the kernels know of the call. `kTable`: queries see what a table says.
template <bool kTable>
struct Shape {
  std::int32_t q_len, kv_len;
  std::int32_t heads, kv_heads;
  float scale;
  bool causal;
  // With a table, what seen_kernel wrote: for every query up to the end of the last tile, and of
  // every 64.
  const std::int32_t* seen_by;
  const SeenRange* ranges;

  /// Keys that a query sees: 0 .. this. What is behind the last query sees all: it does not count.
  __device__ __forceinline__ int seen(int query) const {
    if constexpr (kTable) return seen_by[query];
    return query < q_len ? keys_seen(query, 1, q_len, kv_len, causal) : kv_len;
  }
  /// The most that one of queries [64 block, 64 block + 64) sees; 0 if there are none.
  __device__ __forceinline__ int most_seen(int block) const {
    const int first = block * kRangeQueries;
    if (first >= q_len) return 0;
    if constexpr (kTable) return ranges[block].most;
    return keys_seen(first, kRangeQueries, q_len, kv_len, causal);
  }
  /// The fewest.
  __device__ __forceinline__ int least_seen(int block) const {
    const int first = block * kRangeQueries;
    if (first >= q_len) return kv_len;
    if constexpr (kTable) return ranges[block].least;
    return seen(first);
  }
  /// The most that one of a tile's queries sees, and at least 1: one block is always walked.
  __device__ __forceinline__ int most_seen_of_tile(int tile) const {
    constexpr int kBlocks = kAttentionTile / kRangeQueries;
    int most = 1;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) most = max(most, most_seen(tile * kBlocks + i));
    return most;
  }
};
static_assert(kRowsOfWarpgroup == kRangeQueries);

struct SeenArguments {
  const std::int32_t* positions;
  std::int32_t q_len, kv_len, padded;
  std::int32_t* seen_by;  ///< (padded)
  SeenRange* ranges;      ///< (padded / 64)
};

/// What Shape has of a table, from the last key that each query sees. A warp for 64 queries.
static __global__ void seen_kernel(const SeenArguments arguments) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int block = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int first = block * kRangeQueries;
  if (first >= arguments.padded) return;
  int least = arguments.kv_len;
  int most = 0;
  for (int query = first + lane; query < first + kRangeQueries; query += 32) {
    int seen = arguments.kv_len;
    if (query < arguments.q_len) {
      seen = max(0, min(arguments.positions[query] + 1, arguments.kv_len));
      least = min(least, seen);
      most = max(most, seen);
    }
    arguments.seen_by[query] = seen;
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    least = min(least, from_lane_xor(least, bits));
    most = max(most, from_lane_xor(most, bits));
  }
  if (lane == 0) arguments.ranges[block] = {least, most};
}

// ---------------------------------------------------------------------------------------------
// Forward: 128 queries a tile, 128 keys at a time, from the last that is seen to the first.

inline constexpr int kKeys = 128;
inline constexpr int kForwardStages = 2;

template <int kDqk, int kDv>
struct ForwardMemory {
  static constexpr int q = 0;
  static constexpr int k = q + kTileBytes<kAttentionTile, kDqk>;
  static constexpr int v = k + kForwardStages * kTileBytes<kKeys, kDqk>;
  static constexpr int gates = v + kForwardStages * kTileBytes<kKeys, kDv>;
  static constexpr int bytes = kAlignment + gates + kGateBytes * (1 + 2 * kForwardStages);
};

template <bool kTable>
struct ForwardArguments {
  Shape<kTable> shape;
  AttentionWork work;  ///< tiles of queries of (batch, heads)
  std::uint16_t* out;
  std::int64_t out_pitch;
  float* lse;
};

/// Rows of S in log-sum-exp form: the largest so far and the sum of exponentials relative to it.
struct Softmax {
  float largest[2] = {kMinusInfinity, kMinusInfinity};
  float sum[2] = {0, 0};

  /// S becomes exp(scale (S - largest)); `shrink`: what sums and results so far are to be
  /// multiplied by.
  template <int kCount>
  __device__ __forceinline__ void update(float (&s)[kCount], float scale_log2, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        most = fmaxf(most, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
      }
      most = fmaxf(most, from_lane_xor(most, 1));
      most = fmaxf(most, from_lane_xor(most, 2));
      // A row of which nothing is seen yet has no largest; with 0 for it, all its exponentials are
      // 0.
      const float base = most == kMinusInfinity ? 0.0F : most * scale_log2;
      shrink[half] = exp2_of(largest[half] * scale_log2 - base);
      largest[half] = most;
      float total = 0;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[4 * j + 2 * half + i];
          x = exp2_of(x * scale_log2 - base);
          total += x;
        }
      }
      sum[half] = sum[half] * shrink[half] + total;
    }
  }
  /// The four threads of a row have a part of its sum each.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += from_lane_xor(sum[half], 1);
      sum[half] += from_lane_xor(sum[half], 2);
    }
  }
  /// What makes a row's results of its sums: 0 where nothing is seen.
  __device__ __forceinline__ float factor(int half) const {
    return sum[half] > 0 ? 1.0F / sum[half] : 0.0F;
  }
};

/// Minus infinity where the row, of which this many keys are seen (and the 8th row after it), does
/// not see key first + column.
template <int kCount>
__device__ __forceinline__ void hide(float (&s)[kCount], const int (&seen)[2], int first,
                                     int lane) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i / 4 * 8 + lane % 4 * 2 + i % 2 >= seen[i / 2 % 2]) s[i] = kMinusInfinity;
  }
}

template <int kDqk, int kDv, bool kTable>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap map_q,
                   const __grid_constant__ CUtensorMap map_k,
                   const __grid_constant__ CUtensorMap map_v,
                   const ForwardArguments<kTable> arguments) {
  using Memory = ForwardMemory<kDqk, kDv>;
  const std::uint32_t memory = aligned_shared();
  const std::uint32_t gates = memory + Memory::gates;
  const Gate gate_q = gate(gates, 0);
  const auto gate_k = [&](int stage) { return gate(gates, 1 + stage); };
  const auto gate_v = [&](int stage) { return gate(gates, 1 + kForwardStages + stage); };
  const auto tile_k = [&](int stage) {
    return memory + static_cast<std::uint32_t>(Memory::k + stage * kTileBytes<kKeys, kDqk>);
  };
  const auto tile_v = [&](int stage) {
    return memory + static_cast<std::uint32_t>(Memory::v + stage * kTileBytes<kKeys, kDv>);
  };
  const Shape<kTable>& shape = arguments.shape;
  const AttentionWork& work = arguments.work;
  const int items = work.tiles * work.heads;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;

  if (threadIdx.x == 0) init_gates(gates, 1 + 2 * kForwardStages);
  __syncthreads();

  if (warpgroup == kConsumers) {
    give_registers_back<kProducerRegisters>();
    if (thread == 0) {
      prefetch_map(&map_q);
      prefetch_map(&map_k);
      prefetch_map(&map_v);
      Ring<1> ring_q;
      Ring<kForwardStages> ring_k;
      Ring<kForwardStages> ring_v;
      for (int index = static_cast<int>(blockIdx.x); index < items;
           index += static_cast<int>(gridDim.x)) {
        const AttentionItem item = item_of(work, index);
        const int sequence = item.head / shape.heads;
        const int head = item.head % shape.heads;
        const int kv_head = head / (shape.heads / shape.kv_heads);
        const int first_row = item.tile * kAttentionTile;
        const int keys = shape.most_seen_of_tile(item.tile);
        reserve(gate_q, ring_q.parity, kTileBytes<kAttentionTile, kDqk>);
        load_tile<kAttentionTile, kDqk>(memory + Memory::q, &map_q, head, first_row, sequence,
                                        gate_q.full);
        ring_q.next();
        // Keys one block ahead of values: a block's scores come before the product with the last
        // one's.
        const int last = (keys + kKeys - 1) / kKeys - 1;
        for (int block = last; block >= -1; --block) {
          if (block >= 0) {
            const Gate g = gate_k(ring_k.stage);
            reserve(g, ring_k.parity, kTileBytes<kKeys, kDqk>);
            load_tile<kKeys, kDqk>(tile_k(ring_k.stage), &map_k, kv_head, block * kKeys, sequence,
                                   g.full);
            ring_k.next();
          }
          if (block < last) {
            const Gate g = gate_v(ring_v.stage);
            reserve(g, ring_v.parity, kTileBytes<kKeys, kDv>);
            load_tile<kKeys, kDv>(tile_v(ring_v.stage), &map_v, kv_head, (block + 1) * kKeys,
                                  sequence, g.full);
            ring_v.next();
          }
        }
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    const int warp = thread / 32;
    const int lane = thread % 32;
    const float scale_log2 = shape.scale * kLog2OfE;
    constexpr int kTurn = 1;  // barriers 1 and 2: whose turn it is to issue products
    if (warpgroup == 1) arrive_at_turn(kTurn, kConsumers * kWarpgroup);

    Ring<1> ring_q;
    Ring<kForwardStages> ring_k;
    Ring<kForwardStages> ring_v;
    for (int index = static_cast<int>(blockIdx.x); index < items;
         index += static_cast<int>(gridDim.x)) {
      const AttentionItem item = item_of(work, index);
      const int sequence = item.head / shape.heads;
      const int head = item.head % shape.heads;
      const int first_row = item.tile * kAttentionTile;
      const int keys = shape.most_seen_of_tile(item.tile);
      const int own_rows = warpgroup * kRowsOfWarpgroup;
      const int row = row_of(first_row + own_rows, warp, lane);
      const int seen[2] = {shape.seen(row), shape.seen(row + 8)};
      const int least = shape.least_seen((first_row + own_rows) / kRangeQueries);

      float out[kDv / 2];
#pragma unroll
      for (float& x : out) x = 0;
      float s[kKeys / 2];
      std::uint32_t p[kKeys / 4];
      float shrink[2];
      Softmax softmax;

      int block = (keys + kKeys - 1) / kKeys - 1;
      wait_for(gate_q.full, ring_q.parity);
      wait_for(gate_k(ring_k.stage).full, ring_k.parity);
      wait_for_turn(kTurn + warpgroup, kConsumers * kWarpgroup);
      start_scores<kAttentionTile, kKeys, kDqk>(s, memory + Memory::q, own_rows,
                                                tile_k(ring_k.stage));
      arrive_at_turn(kTurn + (1 - warpgroup), kConsumers * kWarpgroup);
      wgmma_wait<0>();
      pin_all(s);
      release(gate_k(ring_k.stage), lane);
      ring_k.next();
      if ((block + 1) * kKeys > least) hide(s, seen, block * kKeys, lane);
      softmax.update(s, scale_log2, shrink);
      pack(s, p);

      for (--block; block >= 0; --block) {
        wait_for(gate_k(ring_k.stage).full, ring_k.parity);
        wait_for_turn(kTurn + warpgroup, kConsumers * kWarpgroup);
        start_scores<kAttentionTile, kKeys, kDqk>(s, memory + Memory::q, own_rows,
                                                  tile_k(ring_k.stage));
        wait_for(gate_v(ring_v.stage).full, ring_v.parity);
        start_product<kKeys, kDv>(out, p, tile_v(ring_v.stage));
        arrive_at_turn(kTurn + (1 - warpgroup), kConsumers * kWarpgroup);
        wgmma_wait<1>();
        pin_all(s);
        release(gate_k(ring_k.stage), lane);
        ring_k.next();
        if ((block + 1) * kKeys > least) hide(s, seen, block * kKeys, lane);
        softmax.update(s, scale_log2, shrink);
        wgmma_wait<0>();
        pin_all(out);
        release(gate_v(ring_v.stage), lane);
        ring_v.next();
        pack(s, p);
#pragma unroll
        for (int j = 0; j < kDv / 8; ++j) {
          out[4 * j] *= shrink[0];
          out[4 * j + 1] *= shrink[0];
          out[4 * j + 2] *= shrink[1];
          out[4 * j + 3] *= shrink[1];
        }
      }
      release(gate_q, lane);
      ring_q.next();
      wait_for(gate_v(ring_v.stage).full, ring_v.parity);
      start_product<kKeys, kDv>(out, p, tile_v(ring_v.stage));
      softmax.finish();
      wgmma_wait<0>();
      pin_all(out);
      release(gate_v(ring_v.stage), lane);
      ring_v.next();

      const std::int64_t base = static_cast<std::int64_t>(sequence) * shape.q_len;
      store_rows<kDv>(out, softmax.factor(0), softmax.factor(1),
                      arguments.out + base * arguments.out_pitch + head * kDv, arguments.out_pitch,
                      row, shape.q_len, lane);
      if (lane % 4 == 0) {
        float* const lse = arguments.lse + static_cast<std::int64_t>(item.head) * shape.q_len;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (row + 8 * half < shape.q_len) {
            lse[row + 8 * half] =
                (softmax.largest[half] * scale_log2 + log2_of(softmax.sum[half])) * kLogOf2;
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Backward.

struct RowSumArguments {
  const std::uint16_t* out;
  const std::uint16_t* d_out;
  std::int64_t out_pitch, d_out_pitch;
  const float* lse;
  float* lse_log2;  ///< (batch, heads, padded)
  float* row_sums;  ///< (batch, heads, padded)
  std::int32_t batch, heads, q_len, padded;
};

/// Row sums of dO * O, and log-sum-exp in units of log 2. Rows that only fill up the last tile get
/// 0 and infinity: their probabilities are 0. A warp a row.
template <int kDv>
__global__ void row_sum_kernel(const RowSumArguments arguments) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(gridDim.x * blockDim.x) / 32;
  const std::int64_t rows =
      static_cast<std::int64_t>(arguments.batch) * arguments.heads * arguments.padded;
  for (std::int64_t index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
       index < rows; index += warps) {
    const std::int64_t all_heads = index / arguments.padded;
    const int row = static_cast<int>(index - all_heads * arguments.padded);
    if (row >= arguments.q_len) {
      if (lane == 0) {
        arguments.lse_log2[index] = -kMinusInfinity;
        arguments.row_sums[index] = 0;
      }
      continue;
    }
    const std::int64_t sequence = all_heads / arguments.heads;
    const std::int64_t head = all_heads - sequence * arguments.heads;
    const std::int64_t line = sequence * arguments.q_len + row;
    const std::uint16_t* const out = arguments.out + line * arguments.out_pitch + head * kDv;
    const std::uint16_t* const d_out = arguments.d_out + line * arguments.d_out_pitch + head * kDv;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kDv / 64; ++i) {
      const std::uint32_t o = reinterpret_cast<const std::uint32_t*>(out)[32 * i + lane];
      const std::uint32_t d = reinterpret_cast<const std::uint32_t*>(d_out)[32 * i + lane];
      sum += low_half(o) * low_half(d) + high_half(o) * high_half(d);
    }
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) sum += from_lane_xor(sum, bits);
    if (lane == 0) {
      const float lse = arguments.lse[all_heads * arguments.q_len + row];
      arguments.lse_log2[index] = lse == kMinusInfinity ? -kMinusInfinity : lse * kLog2OfE;
      arguments.row_sums[index] = sum;
    }
  }
}

inline constexpr int kStep = 64;  ///< queries, or keys, at a time
inline constexpr int kBackwardStages = 3;

template <bool kTable>
struct BackwardArguments {
  Shape<kTable> shape;
  AttentionWork work;  ///< tiles of keys of (batch, kv_heads), or of queries of (batch, heads)
  const float* lse_log2;
  const float* row_sums;
  std::int32_t padded;
  std::uint16_t* d_q;
  std::uint16_t* d_k;
  std::uint16_t* d_v;
  std::int64_t d_q_pitch, d_k_pitch, d_v_pitch;
};

/// Queries before 64 times this see none of the keys from this one on. (With a table, some after it
/// may not either.)
template <bool kTable>
__device__ __forceinline__ int first_step(const Shape<kTable>& shape, int key) {
  return kTable ? 0 : first_query(key, shape.q_len, shape.kv_len, shape.causal) / kStep;
}
static_assert(kStep == kRangeQueries);

template <int kDqk, int kDv>
struct KeysMemory {
  static constexpr int k = 0;
  static constexpr int v = k + kTileBytes<kAttentionTile, kDqk>;
  static constexpr int q = v + kTileBytes<kAttentionTile, kDv>;
  static constexpr int d_out = q + kBackwardStages * kTileBytes<kStep, kDqk>;
  static constexpr int lse = d_out + kBackwardStages * kTileBytes<kStep, kDv>;
  static constexpr int row_sums = lse + kBackwardStages * kStep * 4;
  static constexpr int seen_by = row_sums + kBackwardStages * kStep * 4;
  static constexpr int gates = seen_by + kBackwardStages * kStep * 4;
  static constexpr int bytes = kAlignment + gates + kGateBytes * (1 + kBackwardStages);
};

/// dK and dV of 128 keys of a key-value head: over all query heads that read it, over the queries
/// that see the keys, 64 at a time. Maps: k and v in boxes of 128 rows, q and d_out in boxes of 64.
template <int kDqk, int kDv, bool kTable>
__global__ void __launch_bounds__(kThreads, 1)
    keys_kernel(const __grid_constant__ CUtensorMap map_k,
                const __grid_constant__ CUtensorMap map_v,
                const __grid_constant__ CUtensorMap map_q,
                const __grid_constant__ CUtensorMap map_d_out,
                const BackwardArguments<kTable> arguments) {
  using Memory = KeysMemory<kDqk, kDv>;
  const std::uint32_t memory = aligned_shared();
  const std::uint32_t gates = memory + Memory::gates;
  const Gate gate_kv = gate(gates, 0);
  const auto stage_gate = [&](int stage) { return gate(gates, 1 + stage); };
  const auto part = [&](int offset, int stage, int bytes) {
    return memory + static_cast<std::uint32_t>(offset + stage * bytes);
  };
  const Shape<kTable>& shape = arguments.shape;
  const AttentionWork& work = arguments.work;
  const int items = work.tiles * work.heads;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int group = shape.heads / shape.kv_heads;
  // Sums take kDqk / 2 + kDv / 2 registers. Only where these are few is there room for both S and
  // dP.
  constexpr bool kTogether = kDqk + kDv <= 256;
  const int steps = (shape.q_len + kStep - 1) / kStep;

  if (threadIdx.x == 0) init_gates(gates, 1 + kBackwardStages);
  __syncthreads();

  if (warpgroup == kConsumers) {
    give_registers_back<kProducerRegisters>();
    if (thread == 0) {
      prefetch_map(&map_k);
      prefetch_map(&map_v);
      prefetch_map(&map_q);
      prefetch_map(&map_d_out);
      Ring<1> ring_kv;
      Ring<kBackwardStages> ring;
      for (int index = static_cast<int>(blockIdx.x); index < items;
           index += static_cast<int>(gridDim.x)) {
        const AttentionItem item = item_of(work, index);
        const int sequence = item.head / shape.kv_heads;
        const int kv_head = item.head % shape.kv_heads;
        const int first_key = item.tile * kAttentionTile;
        reserve(gate_kv, ring_kv.parity,
                kTileBytes<kAttentionTile, kDqk> + kTileBytes<kAttentionTile, kDv>);
        load_tile<kAttentionTile, kDqk>(memory + Memory::k, &map_k, kv_head, first_key, sequence,
                                        gate_kv.full);
        load_tile<kAttentionTile, kDv>(memory + Memory::v, &map_v, kv_head, first_key, sequence,
                                       gate_kv.full);
        ring_kv.next();
        const int first = first_step(shape, first_key);
        for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          const std::int64_t numbers =
              static_cast<std::int64_t>(sequence * shape.heads + head) * arguments.padded;
          for (int step = first; step < steps; ++step) {
            if (kTable && shape.most_seen(step) <= first_key) continue;
            const Gate g = stage_gate(ring.stage);
            reserve(
                g, ring.parity,
                kTileBytes<kStep, kDqk> + kTileBytes<kStep, kDv> + (kTable ? 3 : 2) * kStep * 4);
            load_tile<kStep, kDqk>(part(Memory::q, ring.stage, kTileBytes<kStep, kDqk>), &map_q,
                                   head, step * kStep, sequence, g.full);
            load_tile<kStep, kDv>(part(Memory::d_out, ring.stage, kTileBytes<kStep, kDv>),
                                  &map_d_out, head, step * kStep, sequence, g.full);
            load_bytes(part(Memory::lse, ring.stage, kStep * 4),
                       arguments.lse_log2 + numbers + step * kStep, kStep * 4, g.full);
            load_bytes(part(Memory::row_sums, ring.stage, kStep * 4),
                       arguments.row_sums + numbers + step * kStep, kStep * 4, g.full);
            if constexpr (kTable) {
              load_bytes(part(Memory::seen_by, ring.stage, kStep * 4), shape.seen_by + step * kStep,
                         kStep * 4, g.full);
            }
            ring.next();
          }
        }
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    const int warp = thread / 32;
    const int lane = thread % 32;
    const float scale_log2 = shape.scale * kLog2OfE;
    Ring<1> ring_kv;
    Ring<kBackwardStages> ring;
    for (int index = static_cast<int>(blockIdx.x); index < items;
         index += static_cast<int>(gridDim.x)) {
      const AttentionItem item = item_of(work, index);
      const int first_key = item.tile * kAttentionTile;
      const int own_rows = warpgroup * kRowsOfWarpgroup;
      const int key = row_of(first_key + own_rows, warp, lane);
      const int first = first_step(shape, first_key);

      float d_k[kDqk / 2];
      float d_v[kDv / 2];
#pragma unroll
      for (float& x : d_k) x = 0;
#pragma unroll
      for (float& x : d_v) x = 0;

      wait_for(gate_kv.full, ring_kv.parity);
      for (int head = 0; head < group; ++head) {
        for (int step = first; step < steps; ++step) {
          if (kTable && shape.most_seen(step) <= first_key) continue;
          const Gate g = stage_gate(ring.stage);
          const std::uint32_t tile_q = part(Memory::q, ring.stage, kTileBytes<kStep, kDqk>);
          const std::uint32_t tile_d_out = part(Memory::d_out, ring.stage, kTileBytes<kStep, kDv>);
          const std::uint32_t pair = static_cast<std::uint32_t>(lane % 4 * 8);
          const std::uint32_t lse = part(Memory::lse, ring.stage, kStep * 4) + pair;
          const std::uint32_t sums = part(Memory::row_sums, ring.stage, kStep * 4) + pair;
          wait_for(g.full, ring.parity);

          float s[kStep / 2];  // (keys, queries)
          float dp[kStep / 2];
          std::uint32_t p[kStep / 4];
          start_scores<kAttentionTile, kStep, kDqk>(s, memory + Memory::k, own_rows, tile_q);
          if constexpr (kTogether) {
            start_scores<kAttentionTile, kStep, kDv>(dp, memory + Memory::v, own_rows, tile_d_out);
            wgmma_wait<1>();
          } else {
            wgmma_wait<0>();
          }
          pin_all(s);
          // Keys behind the last one get rows of their own, which nobody stores.
          const bool all_seen = (!kTable && !shape.causal) ||
                                shape.least_seen(step) >= first_key + own_rows + kRowsOfWarpgroup;
          const std::uint32_t seen_by = part(Memory::seen_by, ring.stage, kStep * 4) + pair;
          const int seen_by_first =
              step * kStep + lane % 4 * 2 + 1 + shape.kv_len - shape.q_len;  // without a table
#pragma unroll
          for (int j = 0; j < kStep / 8; ++j) {
            float norm[2];
            load_pair(lse + static_cast<std::uint32_t>(32 * j), norm[0], norm[1]);
            int seen[2] = {seen_by_first + 8 * j, seen_by_first + 8 * j + 1};
            if constexpr (kTable) {
              load_pair(seen_by + static_cast<std::uint32_t>(32 * j), seen[0], seen[1]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float& x = s[4 * j + i];
              x = exp2_of(x * scale_log2 - norm[i % 2]);
              if (!all_seen && key + i / 2 * 8 >= seen[i % 2]) x = 0;
            }
          }
          pack(s, p);
          if constexpr (!kTogether) {
            start_scores<kAttentionTile, kStep, kDv>(dp, memory + Memory::v, own_rows, tile_d_out);
          }
          start_product<kStep, kDv>(d_v, p, tile_d_out);
          wgmma_wait<1>();
          pin_all(dp);
          // dS = P (dP - row sums), with P as rounded for dV: it saves the registers of another P.
          std::uint32_t ds[kStep / 4];
#pragma unroll
          for (int j = 0; j < kStep / 8; ++j) {
            float sum0;
            float sum1;
            load_pair(sums + static_cast<std::uint32_t>(32 * j), sum0, sum1);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const std::uint32_t both = p[2 * j + half];
              ds[2 * j + half] = pack_bf16x2(low_half(both) * (dp[4 * j + 2 * half] - sum0),
                                             high_half(both) * (dp[4 * j + 2 * half + 1] - sum1));
            }
          }
          start_product<kStep, kDqk>(d_k, ds, tile_q);
          wgmma_wait<0>();
          pin_all(d_v);
          pin_all(d_k);
          release(g, lane);
          ring.next();
        }
      }
      release(gate_kv, lane);
      ring_kv.next();

      const int sequence = item.head / shape.kv_heads;
      const int kv_head = item.head % shape.kv_heads;
      const std::int64_t base = static_cast<std::int64_t>(sequence) * shape.kv_len;
      store_rows<kDqk>(d_k, shape.scale, shape.scale,
                       arguments.d_k + base * arguments.d_k_pitch + kv_head * kDqk,
                       arguments.d_k_pitch, key, shape.kv_len, lane);
      store_rows<kDv>(d_v, 1.0F, 1.0F, arguments.d_v + base * arguments.d_v_pitch + kv_head * kDv,
                      arguments.d_v_pitch, key, shape.kv_len, lane);
    }
  }
}

template <int kDqk, int kDv>
struct QueriesMemory {
  static constexpr int q = 0;
  static constexpr int d_out = q + kTileBytes<kAttentionTile, kDqk>;
  static constexpr int k = d_out + kTileBytes<kAttentionTile, kDv>;
  static constexpr int v = k + kBackwardStages * kTileBytes<kStep, kDqk>;
  static constexpr int gates = v + kBackwardStages * kTileBytes<kStep, kDv>;
  static constexpr int bytes = kAlignment + gates + kGateBytes * (1 + kBackwardStages);
};

/// dQ of 128 queries of a head, over the keys that they see, 64 at a time. Maps: q and d_out in
/// boxes of 128 rows, k and v in boxes of 64.
template <int kDqk, int kDv, bool kTable>
__global__ void __launch_bounds__(kThreads, 1)
    queries_kernel(const __grid_constant__ CUtensorMap map_q,
                   const __grid_constant__ CUtensorMap map_d_out,
                   const __grid_constant__ CUtensorMap map_k,
                   const __grid_constant__ CUtensorMap map_v,
                   const BackwardArguments<kTable> arguments) {
  using Memory = QueriesMemory<kDqk, kDv>;
  const std::uint32_t memory = aligned_shared();
  const std::uint32_t gates = memory + Memory::gates;
  const Gate gate_q = gate(gates, 0);
  const auto stage_gate = [&](int stage) { return gate(gates, 1 + stage); };
  const auto part = [&](int offset, int stage, int bytes) {
    return memory + static_cast<std::uint32_t>(offset + stage * bytes);
  };
  const Shape<kTable>& shape = arguments.shape;
  const AttentionWork& work = arguments.work;
  const int items = work.tiles * work.heads;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;

  if (threadIdx.x == 0) init_gates(gates, 1 + kBackwardStages);
  __syncthreads();

  if (warpgroup == kConsumers) {
    give_registers_back<kProducerRegisters>();
    if (thread == 0) {
      prefetch_map(&map_q);
      prefetch_map(&map_d_out);
      prefetch_map(&map_k);
      prefetch_map(&map_v);
      Ring<1> ring_q;
      Ring<kBackwardStages> ring;
      for (int index = static_cast<int>(blockIdx.x); index < items;
           index += static_cast<int>(gridDim.x)) {
        const AttentionItem item = item_of(work, index);
        const int sequence = item.head / shape.heads;
        const int head = item.head % shape.heads;
        const int kv_head = head / (shape.heads / shape.kv_heads);
        const int first_row = item.tile * kAttentionTile;
        const int keys = shape.most_seen_of_tile(item.tile);
        reserve(gate_q, ring_q.parity,
                kTileBytes<kAttentionTile, kDqk> + kTileBytes<kAttentionTile, kDv>);
        load_tile<kAttentionTile, kDqk>(memory + Memory::q, &map_q, head, first_row, sequence,
                                        gate_q.full);
        load_tile<kAttentionTile, kDv>(memory + Memory::d_out, &map_d_out, head, first_row,
                                       sequence, gate_q.full);
        ring_q.next();
        for (int block = 0; block < (keys + kStep - 1) / kStep; ++block) {
          const Gate g = stage_gate(ring.stage);
          reserve(g, ring.parity, kTileBytes<kStep, kDqk> + kTileBytes<kStep, kDv>);
          load_tile<kStep, kDqk>(part(Memory::k, ring.stage, kTileBytes<kStep, kDqk>), &map_k,
                                 kv_head, block * kStep, sequence, g.full);
          load_tile<kStep, kDv>(part(Memory::v, ring.stage, kTileBytes<kStep, kDv>), &map_v,
                                kv_head, block * kStep, sequence, g.full);
          ring.next();
        }
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    const int warp = thread / 32;
    const int lane = thread % 32;
    const float scale_log2 = shape.scale * kLog2OfE;
    Ring<1> ring_q;
    Ring<kBackwardStages> ring;
    for (int index = static_cast<int>(blockIdx.x); index < items;
         index += static_cast<int>(gridDim.x)) {
      const AttentionItem item = item_of(work, index);
      const int sequence = item.head / shape.heads;
      const int head = item.head % shape.heads;
      const int first_row = item.tile * kAttentionTile;
      const int keys = shape.most_seen_of_tile(item.tile);
      const int own_rows = warpgroup * kRowsOfWarpgroup;
      const int row = row_of(first_row + own_rows, warp, lane);
      const int seen[2] = {shape.seen(row), shape.seen(row + 8)};
      const int least = shape.least_seen((first_row + own_rows) / kRangeQueries);
      const std::int64_t numbers = static_cast<std::int64_t>(item.head) * arguments.padded + row;
      const float norm[2] = {arguments.lse_log2[numbers], arguments.lse_log2[numbers + 8]};
      const float sums[2] = {arguments.row_sums[numbers], arguments.row_sums[numbers + 8]};

      float d_q[kDqk / 2];
#pragma unroll
      for (float& x : d_q) x = 0;

      wait_for(gate_q.full, ring_q.parity);
      for (int block = 0; block < (keys + kStep - 1) / kStep; ++block) {
        const Gate g = stage_gate(ring.stage);
        const std::uint32_t tile_k = part(Memory::k, ring.stage, kTileBytes<kStep, kDqk>);
        const std::uint32_t tile_v = part(Memory::v, ring.stage, kTileBytes<kStep, kDv>);
        wait_for(g.full, ring.parity);
        float s[kStep / 2];
        float dp[kStep / 2];
        start_scores<kAttentionTile, kStep, kDqk>(s, memory + Memory::q, own_rows, tile_k);
        start_scores<kAttentionTile, kStep, kDv>(dp, memory + Memory::d_out, own_rows, tile_v);
        wgmma_wait<1>();
        pin_all(s);
        if ((block + 1) * kStep > least) hide(s, seen, block * kStep, lane);
#pragma unroll
        for (int i = 0; i < kStep / 2; ++i) s[i] = exp2_of(s[i] * scale_log2 - norm[i / 2 % 2]);
        wgmma_wait<0>();
        pin_all(dp);
        std::uint32_t ds[kStep / 4];
#pragma unroll
        for (int i = 0; i < kStep / 2; ++i) dp[i] = s[i] * (dp[i] - sums[i / 2 % 2]);
        pack(dp, ds);
        start_product<kStep, kDqk>(d_q, ds, tile_k);
        wgmma_wait<0>();
        pin_all(d_q);
        release(g, lane);
        ring.next();
      }
      release(gate_q, lane);
      ring_q.next();

      const std::int64_t base = static_cast<std::int64_t>(sequence) * shape.q_len;
      store_rows<kDqk>(d_q, shape.scale, shape.scale,
                       arguments.d_q + base * arguments.d_q_pitch + head * kDqk,
                       arguments.d_q_pitch, row, shape.q_len, lane);
    }
  }
}

// A block of compute capability 9.0 has at most 227 KiB.
inline constexpr int kSharedBytes = 227 * 1024;
static_assert(ForwardMemory<192, 128>::bytes <= kSharedBytes);
static_assert(KeysMemory<192, 128>::bytes <= kSharedBytes);
static_assert(QueriesMemory<192, 128>::bytes <= kSharedBytes);

// ---------------------------------------------------------------------------------------------
// What a launch passes, from the call.

/// A matrix of (batch * length, heads * d) for the copy engine: d, heads, length and batch in this
/// order, so that what lies behind a sequence's last row is outside, and zero.
struct MapGeometry {
  void* data;
  std::int64_t dims[4];
  std::int64_t strides[4];  ///< in elements; the first is 1
  int box[4];
};
inline MapGeometry geometry_of(const Matrix& matrix, const AttentionShape& shape,
                               std::int64_t heads, std::int64_t length, int box_rows) {
  const std::int64_t d = matrix.columns / heads;
  return {matrix.data,
          {d, heads, length, shape.batch},
          {1, d, matrix.pitch, length * matrix.pitch},
          {kPanelColumns, 1, box_rows, 1}};
}

inline std::int32_t padded_queries(const AttentionShape& shape) {
  return static_cast<std::int32_t>((shape.q_len + kAttentionTile - 1) / kAttentionTile *
                                   kAttentionTile);
}

/// `table`: attention_table_bytes() of device memory, where the call has one.
inline SeenArguments seen_arguments(const AttentionShape& shape, void* table) {
  SeenArguments a{};
  a.positions = shape.query_positions;
  a.q_len = static_cast<std::int32_t>(shape.q_len);
  a.kv_len = static_cast<std::int32_t>(shape.kv_len);
  a.padded = padded_queries(shape);
  a.seen_by = static_cast<std::int32_t*>(table);
  a.ranges = reinterpret_cast<SeenRange*>(a.seen_by + a.padded);
  return a;
}
template <bool kTable>
Shape<kTable> shape_of(const AttentionShape& shape, void* table) {
  Shape<kTable> s{};
  s.q_len = static_cast<std::int32_t>(shape.q_len);
  s.kv_len = static_cast<std::int32_t>(shape.kv_len);
  s.heads = static_cast<std::int32_t>(shape.heads);
  s.kv_heads = static_cast<std::int32_t>(shape.kv_heads);
  s.scale = shape.scale;
  s.causal = shape.causal;
  if (kTable) {
    const SeenArguments seen = seen_arguments(shape, table);
    s.seen_by = seen.seen_by;
    s.ranges = seen.ranges;
  }
  return s;
}
inline std::uint16_t* bf16_data(const Matrix& matrix) {
  return static_cast<std::uint16_t*>(matrix.data);
}

template <bool kTable>
ForwardArguments<kTable> forward_arguments(const AttentionForward& call, void* table,
                                           const AttentionDevice& device) {
  const AttentionShape& s = call.shape;
  ForwardArguments<kTable> a{};
  a.shape = shape_of<kTable>(s, table);
  // What the heads of a section read again and again: keys and values, shared by a group.
  const std::int64_t bytes = s.kv_len * (s.d_qk + s.d_v) * 2 * s.kv_heads / s.heads;
  a.work = choose_work(s.q_len, s.batch * s.heads, bytes, s.causal, device);
  a.out = bf16_data(call.out);
  a.out_pitch = call.out.pitch;
  a.lse = call.lse;
  return a;
}

inline RowSumArguments row_sum_arguments(const AttentionBackward& call) {
  const AttentionShape& s = call.shape;
  RowSumArguments a{};
  a.out = bf16_data(call.out);
  a.d_out = bf16_data(call.d_out);
  a.out_pitch = call.out.pitch;
  a.d_out_pitch = call.d_out.pitch;
  a.lse = call.lse;
  a.batch = static_cast<std::int32_t>(s.batch);
  a.heads = static_cast<std::int32_t>(s.heads);
  a.q_len = static_cast<std::int32_t>(s.q_len);
  a.padded = padded_queries(s);
  a.lse_log2 = static_cast<float*>(call.workspace);
  a.row_sums = a.lse_log2 + s.batch * s.heads * a.padded;
  return a;
}

/// `over_keys`: for keys_kernel, else for queries_kernel.
template <bool kTable>
BackwardArguments<kTable> backward_arguments(const AttentionBackward& call, bool over_keys,
                                             void* table, const AttentionDevice& device) {
  const AttentionShape& s = call.shape;
  BackwardArguments<kTable> a{};
  a.shape = shape_of<kTable>(s, table);
  const std::int64_t group = s.heads / s.kv_heads;
  a.work = over_keys ? choose_work(s.kv_len, s.batch * s.kv_heads,
                                   s.q_len * (s.d_qk + s.d_v) * 2 * group, false, device)
                     : choose_work(s.q_len, s.batch * s.heads,
                                   s.kv_len * (s.d_qk + s.d_v) * 2 / group, s.causal, device);
  const RowSumArguments sums = row_sum_arguments(call);
  a.lse_log2 = sums.lse_log2;
  a.row_sums = sums.row_sums;
  a.padded = sums.padded;
  a.d_q = bf16_data(call.d_q);
  a.d_k = bf16_data(call.d_k);
  a.d_v = bf16_data(call.d_v);
  a.d_q_pitch = call.d_q.pitch;
  a.d_k_pitch = call.d_k.pitch;
  a.d_v_pitch = call.d_v.pitch;
  return a;
}

}  // namespace orrery::kernels::cuda::attention
