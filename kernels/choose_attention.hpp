#pragma once
// Which of the attention kernels of kernels/cuda runs a call, and how the work is laid out. Plain
// C++.

#include <array>
#include <cstdint>
#include <string>

#include "kernels/call.hpp"

namespace orrery::kernels {

/// Best first, as far as is known without a measurement.
///   cudnn: cuDNN's fused attention. BF16, causal or not.
///   tensor_cores: our own for Hopper, kernels/cuda/attention_hopper.cuh. BF16, 192/128, 128/128
///   and
///     64/64, any mask that a Call can have, on as many SMs as it is given.
///   cuda_cores: kernels/cuda/attention_simple.cuh. FP32 and BF16, any mask, any length; slow.
enum class AttentionKernel : std::uint8_t { cudnn, tensor_cores, cuda_cores };
inline constexpr std::array<AttentionKernel, 3> kAttentionKernels = {
    AttentionKernel::cudnn, AttentionKernel::tensor_cores, AttentionKernel::cuda_cores};
std::string_view name_of(AttentionKernel kernel);

/// What the choice depends on besides the call.
struct AttentionDevice {
  int compute_capability = 90;
  std::int64_t l2_bytes = 50 << 20;  ///< of the last-level cache
  std::int64_t workspace_bytes = 0;  ///< of the stream
  int sms = 132;                     ///< that may be used
  int all_sms = 132;                 ///< that there are
  bool cudnn = true;                 ///< it is there
};

/// Why this kernel cannot run the call ("query_positions: its mask has no table"), or
/// empty. The call itself is possible (why_impossible).
std::string why_not(AttentionKernel kernel, const AttentionForward& call,
                    const AttentionDevice& device);
std::string why_not(AttentionKernel kernel, const AttentionBackward& call,
                    const AttentionDevice& device);

/// The first kernel that can. Throws std::invalid_argument with the reason of each if none can.
AttentionKernel choose_attention(const AttentionForward& call, const AttentionDevice& device);
AttentionKernel choose_attention(const AttentionBackward& call, const AttentionDevice& device);

// ---------------------------------------------------------------------------------------------
// cuDNN's backward pass.

/// Bytes that cuDNN 9.19 takes on Hopper for a backward pass that adds dQ up in a fixed order: it
/// keeps the gradient of all scores, BF16, lengths rounded up to 128, and with grouped queries dK
/// and dV of every query head, and a few bytes. (128 heads of 16384 tokens: 64 GiB, the allocation
/// that fails in
/// benchmark/sdpa_benchmark_training/results/h200_919_only_cudnn/dsv3_20260227_034744.csv of
/// NVIDIA/cudnn-frontend@3929da2.)
std::int64_t cudnn_backward_bytes(const AttentionShape& shape);

/// A pass over some heads of one sequence, or over all of all sequences.
struct AttentionPiece {
  std::int64_t batch = 0, heads = 0;
};
/// As much at once as fits into `bytes` beside the row sums; a multiple of the query heads of a
/// key-value head that divides the heads. heads = 0: not even that fits.
AttentionPiece choose_piece(const AttentionShape& shape, std::int64_t bytes);

/// Where parts of the workspace of AttentionBackward begin for cuDNN: row sums from 0 on, the rest
/// from `rest` on, so aligned to 256 bytes.
std::int64_t cudnn_rest_offset(const AttentionShape& shape);

// ---------------------------------------------------------------------------------------------
// The own kernels: a work list of tiles, longest first, in sections of key-value heads whose
// operands stay in the last-level cache.

/// Rows of queries, or of keys, of a tile of the kernel for tensor cores.
inline constexpr int kAttentionTile = 128;

struct AttentionWork {
  std::int32_t tiles = 0;     ///< of one head
  std::int32_t heads = 0;     ///< batch * heads
  std::int32_t section = 1;   ///< heads that are worked on together; a divisor of nothing: the last
                              ///< section may be smaller
  std::int32_t grid = 1;      ///< blocks; each takes every grid-th item
  bool longest_last = false;  ///< causal: the last tile of queries sees most keys
};
/// Item `index` of tiles * heads: which tile of which head.
struct AttentionItem {
  std::int32_t tile = 0, head = 0;
};

#ifdef __CUDACC__
#define ORRERY_HOST_DEVICE __host__ __device__
#else
#define ORRERY_HOST_DEVICE
#endif

ORRERY_HOST_DEVICE inline AttentionItem item_of(const AttentionWork& work, std::int32_t index) {
  const std::int32_t per_section = work.section * work.tiles;
  const std::int32_t section = index / per_section;
  const std::int32_t first = section * work.section;
  const std::int32_t left = work.heads - first;
  const std::int32_t heads = left < work.section ? left : work.section;
  const std::int32_t within = index - section * per_section;
  const std::int32_t tile = within / heads;
  return {work.longest_last ? work.tiles - 1 - tile : tile, first + within - tile * heads};
}

/// `rows` of each head in tiles. `bytes_per_head`: that all tiles of a head read. `longest_last`:
/// which end of a head's tiles has the most to do.
AttentionWork choose_work(std::int64_t rows, std::int64_t heads, std::int64_t bytes_per_head,
                          bool longest_last, const AttentionDevice& device);

/// Keys that some query of rows [first, first + rows) sees: 0 .. this.
ORRERY_HOST_DEVICE inline std::int32_t keys_seen(std::int32_t first_row, std::int32_t rows,
                                                 std::int32_t q_len, std::int32_t kv_len,
                                                 bool causal) {
  if (!causal) return kv_len;
  const std::int32_t last = (first_row + rows < q_len ? first_row + rows : q_len) - 1;
  const std::int32_t keys = last + kv_len - q_len + 1;
  return keys < 0 ? 0 : keys < kv_len ? keys : kv_len;
}
/// The first query that sees key `key`.
ORRERY_HOST_DEVICE inline std::int32_t first_query(std::int32_t key, std::int32_t q_len,
                                                   std::int32_t kv_len, bool causal) {
  const std::int32_t query = causal ? key - (kv_len - q_len) : 0;
  return query < 0 ? 0 : query;
}

/// Of the stream's workspace, for the kernel for tensor cores and a call with query_positions: how
/// many keys each query sees, and the least and the most of every 64.
std::int64_t attention_table_bytes(const AttentionShape& shape);

/// Of the workspace of AttentionBackward, for the kernel for tensor cores: FP32 (batch, heads, rows
/// of queries rounded up to kAttentionTile) twice, log-sum-exp in units of log 2 and row sums.
std::int64_t tensor_core_backward_bytes(const AttentionShape& shape);

}  // namespace orrery::kernels
