#pragma once
// A shape is what is priced: a kernel or a transfer with its dimensions, number formats and SM share.
// A Program interns shapes, so a step of millions of operations has some hundreds of them.
//
// Dimensions are those of the kernel that runs, not of the layer: the input gradient of a linear layer
// y[m,n] = x[m,k] w[k,n] is the GEMM (m, n=k, k=n), its weight gradient is the GEMM (m=n, n=k, k=m).

#include <compare>
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>

namespace orrery {

/// What an element occupies in memory. fp8_block carries FP32 scales per 1x128 tile or 128x128 block;
/// e5m6 is the 12-bit format of the DeepSeek-V3 report 3.3.3 with a scale per 1x128 tile.
enum class NumberFormat : std::uint8_t { fp32, bf16, fp8_tensor, fp8_block, e5m6 };

/// Bytes an element of a large tensor occupies, 1x128 scales included: fp8_block 1 + 4/128.
double bytes_per_element(NumberFormat format);
std::string_view name_of(NumberFormat format);

/// Which gradient a kernel belongs to. Recomputed forward work is priced as forward.
enum class Pass : std::uint8_t { forward, backward_input, backward_weight };
std::string_view name_of(Pass pass);

/// `groups` GEMMs D[m,n] = A[m,k] B[k,n] in one kernel (groups = 1: dense). With balanced experts m (for
/// weight gradients k) is the rows of one expert. `inputs` is the format of A and B; `accumulate`: D is
/// FP32 and D += A B (weight gradients over micro-batches).
struct Gemm {
  NumberFormat inputs{};
  Pass pass{};
  bool accumulate = false;
  std::int64_t groups = 1;
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  friend auto operator<=>(const Gemm&, const Gemm&) = default;
};

/// Attention core softmax(Q K^T) V on (batch, heads, q_len, d_qk) x (batch, kv_heads, kv_len, d_qk/d_v).
/// Causal: query i of q_len attends to keys up to kv_len - q_len + i.
struct AttentionCore {
  NumberFormat inputs{};
  bool backward = false;
  bool causal = true;
  std::int64_t batch = 1;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t q_len = 0;
  std::int64_t kv_len = 0;
  std::int64_t d_qk = 0;
  std::int64_t d_v = 0;
  friend auto operator<=>(const AttentionCore&, const AttentionCore&) = default;
};

/// Attention of a few new tokens of each sequence over what is cached of it: softmax(Q K^T) V on
/// (batch, heads, q_len, d_qk) x (batch, kv_heads, kv_len, d_qk/d_v), no mask worth counting. With
/// `latent` (absorbed multi-head latent attention, DeepSeek-V2 paper 2.1.3) all heads read the same
/// row of d_qk elements, the first d_v of which are the value too. With `gathered` every query has
/// kv_len rows of its own, picked from the cache (DeepSeek-V3.2-Exp's sparse attention).
struct CachedAttention {
  NumberFormat inputs{};  ///< of the arithmetic
  NumberFormat cache{};   ///< of the cached rows
  bool latent = false;
  bool gathered = false;
  std::int64_t batch = 1;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t q_len = 1;
  std::int64_t kv_len = 0;
  std::int64_t d_qk = 0;
  std::int64_t d_v = 0;
  friend auto operator<=>(const CachedAttention&, const CachedAttention&) = default;
};

/// Bytes of one token in the cache of one layer, all kv_heads. A latent row in fp8_block has its
/// rotary part (d_qk - d_v elements) in BF16: V3 656 bytes, as in FlashMLA's format.
double cached_row_bytes(const CachedAttention& attention);

/// Kernels whose time is bytes over achieved bandwidth. One kind per access pattern and arithmetic, since
/// each kind reaches its own share of the memory bandwidth.
enum class StreamingKind : std::uint8_t {
  norm_forward,
  norm_backward,
  quantize,       ///< BF16 -> FP8 with 1x128 scales (online absolute maximum)
  dequantize,     ///< FP8 (or E5M6) -> BF16
  pack_e5m6,      ///< BF16 -> E5M6
  transpose,      ///< FP8 1x128 -> FP8 128x1 (recast) or a plain transpose, for weight gradients
  rope,
  activation_forward,   ///< SwiGLU or GELU
  activation_backward,
  elementwise,    ///< residual additions, scaling
  copy,           ///< concatenation, contiguous copies
  permute,        ///< tokens expanded to (token, expert) rows
  unpermute,      ///< (token, expert) rows reduced to tokens
  router,         ///< scores, bias, group-limited top-k, routing maps
  embedding_forward,
  embedding_backward,
  cross_entropy,
  optimizer,      ///< AdamW
  reduction,      ///< gradient norm, zeroing
};
std::string_view name_of(StreamingKind kind);

struct Streaming {
  StreamingKind kind{};
  std::int64_t bytes_read = 0;
  std::int64_t bytes_written = 0;
  std::int64_t launches = 1;  ///< kernels this op stands for (small ones come in dozens)
  friend auto operator<=>(const Streaming&, const Streaming&) = default;
};

/// Expert-parallel all-to-all, as DeepEP does it: each token goes once over InfiniBand to every node that
/// holds one of its experts (at most `node_limit`), is then forwarded over NVLink to the GPUs that do.
/// dispatch: tokens out, one copy per destination; combine: reduced on the way back.
/// `low_latency`: instead each token goes straight to the GPU of each of its experts, once for each.
struct ExpertExchange {
  bool combine = false;
  bool low_latency = false;
  NumberFormat format{};
  bool new_layout = false;    ///< dispatch that also computes the layout (forward); else a cached handle
  std::int64_t tokens = 0;    ///< per GPU
  std::int64_t hidden = 0;
  std::int64_t top_k = 0;
  std::int64_t experts = 0;
  std::int64_t ep = 1;             ///< GPUs in the group
  std::int64_t gpus_per_node = 1;  ///< of this group
  std::int64_t node_limit = 0;     ///< 0: no limit
  /// What the busiest GPU and node of the group are sent (or send back) over the mean, per mille.
  std::int64_t busiest_gpu_per_mille = 1000;
  std::int64_t busiest_node_per_mille = 1000;
  std::int64_t stride = 1;         ///< ranks from one member to the next
  friend auto operator<=>(const ExpertExchange&, const ExpertExchange&) = default;
};

enum class CollectiveKind : std::uint8_t { all_reduce, all_gather, reduce_scatter, all_to_all, broadcast };
std::string_view name_of(CollectiveKind kind);

/// `bytes` is nccl-tests' size: the full buffer (all_gather: of the output; reduce_scatter: of the input).
struct Collective {
  CollectiveKind kind{};
  std::int64_t bytes = 0;
  std::int64_t ranks = 1;
  std::int64_t ranks_per_node = 1;  ///< members that share a node
  std::int64_t stride = 1;          ///< ranks from one member of a pipeline position to the next
  friend auto operator<=>(const Collective&, const Collective&) = default;
};

/// Pipeline activations or gradients from one rank to another.
struct Send {
  std::int64_t bytes = 0;
  bool same_node = false;
  friend auto operator<=>(const Send&, const Send&) = default;
};

/// A checkpoint's part of one GPU on its way to storage, at the rate that storage takes it. It leaves
/// through the GPU's NIC, or over a network of its own, of which nothing is modelled but the rate.
struct StorageWrite {
  std::int64_t bytes = 0;
  std::int64_t bytes_per_s = 0;
  bool own_network = false;
  friend auto operator<=>(const StorageWrite&, const StorageWrite&) = default;
};

/// Takes no time: a join or a mark.
struct Mark {
  friend auto operator<=>(const Mark&, const Mark&) = default;
};

struct Shape {
  std::variant<Mark, Gemm, AttentionCore, CachedAttention, Streaming, ExpertExchange, Collective,
               Send, StorageWrite>
      work;
  std::string label;  ///< the operation in the model: "q_b", "o", "routed_up", "dispatch"
  int sms = 0;        ///< SMs this kernel may use; 0: all of the device
  friend auto operator<=>(const Shape&, const Shape&) = default;
};

/// Floating-point operations the kernel executes: 2 m n k per GEMM; attention cores count the causal half
/// (exactly: the key-query pairs that are not masked), 2 products forward and 5 backward (one of them
/// recomputes the scores). Streaming kernels and transfers count 0.
double flops_of(const Shape& shape);

/// Bytes read from and written to the GPU's memory when each operand is touched once.
double bytes_of(const Shape& shape);
double bytes_of(const Gemm& gemm);
double bytes_of(const AttentionCore& core);
double bytes_of(const CachedAttention& attention);

/// "GEMM fp8_block 4096x24576x1536 on 112 SMs" (without the label).
std::string describe(const Shape& shape);

}  // namespace orrery
