#pragma once
// How many threads the streaming kernels of kernels/cuda start, and how they share rows. Plain C++.

#include <cstdint>

namespace orrery::kernels {

/// Elements that a thread handles at a time: 16 bytes of bf16, two loads of 16 bytes of fp32.
inline constexpr int kOctet = 8;

/// Rows that are reduced (norms): a group of threads holds a row, or a segment of one, in
/// registers.
struct RowPlan {
  int threads_per_row = 32;  ///< 32 (no barriers), or 128 .. block
  int octets = 1;  ///< a thread has at most: 1, 2 or 4; 0: the row is read again and again
  int block = 1024;
  int grid = 1;
  int groups() const { return grid * (block / threads_per_row); }
};

/// `units` rows of `width` elements on `sms` SMs, one block on each, whose threads hold at most
/// `max_octets` each.
RowPlan choose_rows(std::int64_t units, std::int64_t width, int sms, int block, int max_octets);

/// Blocks for `threads` of work: one for each SM, fewer where there is less to do.
int choose_grid(std::int64_t threads, int sms, int block, int blocks_per_sm = 1);

/// Warps of a block, at most 32, that each need so much of its shared memory. Throws if not even
/// one has room.
int warps_that_fit(std::int64_t bytes_per_warp, std::int64_t shared_bytes);

/// Pieces that pairs are split into for counting (RoutingMap), a warp each, in order.
struct ChunkPlan {
  std::int64_t pairs_per_chunk = 0;  ///< a multiple of 32
  std::int64_t chunks = 0;
};
ChunkPlan choose_chunks(std::int64_t pairs, std::int64_t counters, std::int64_t workspace_bytes);

}  // namespace orrery::kernels
