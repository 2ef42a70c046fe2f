#pragma once
// A Call is one kernel with its operands bound: plain data. The executor lowers the ops of a
// Program to Calls once and enqueues them on a Device every step; calibration times the same Calls
// on scratch operands. Sizes that routing decides live in device memory (`used_rows`,
// `group_rows`), so nothing on the host waits for them.
//
// Rules for every implementation (kernels/reference is the truth, kernels/cpu and kernels/cuda have
// to agree with it within the formats' rounding):
//   * Operands are read in their format, arithmetic is in FP32 or wider, results are rounded once
//   to
//     the output's format, to the nearest, ties to even.
//   * No operand is read or written outside of its rows and columns. Rows from `used_rows` on are
//   not
//     read, and not written.
//   * The order of a sum is the implementation's own, but the same in every run (no atomics that
//   race).
//   * Inputs and outputs do not overlap unless the call says that it works in place.
// Matrices are row-major.

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "kernels/format.hpp"

namespace orrery::kernels {

/// How the FP32 scales of an e4m3 or e5m6 matrix are laid out; value = code * scale.
///   rows: one per 1x128 tile, that of (row r, tile t) at scales[t * scale_pitch + r] (the row runs
///         fastest, as cuBLASLt's VEC128_32F and DeepGEMM read it); scale_pitch >= rows.
///   blocks: one per 128x128 block, that of (block row b, block column t) at scales[b * scale_pitch
///   +
///         t], scale_pitch = columns / 128 rounded up to a multiple of 4 (cuBLASLt's
///         BLK128x128_32F).
/// Quantising sets a tile's scale to its largest magnitude / 448 (e5m6: to the power of two that
/// brings it to at most 1 from above), in FP32, and 1 for a tile of zeros (DeepSeek-V3
/// report 3.3.2).
enum class Scaling : std::uint8_t { none, rows, blocks };

inline constexpr std::int64_t kTile = 128;

/// A view. `pitch`: elements from one row to the next. For e5m6 columns and pitch are even.
struct Matrix {
  void* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t pitch = 0;
  Format format = Format::fp32;
  Scaling scaling = Scaling::none;
  float* scales = nullptr;
  std::int64_t scale_pitch = 0;

  explicit operator bool() const { return data != nullptr; }
};

/// So many elements from `data` on, as one row without scales.
inline Matrix row_of(void* data, std::int64_t elements, Format format) {
  return {.data = data, .rows = 1, .columns = elements, .pitch = elements, .format = format};
}

/// Elements of `scales` that a contiguous matrix of this size has, with the smallest pitch.
std::int64_t scale_elements(std::int64_t rows, std::int64_t columns, Scaling scaling);
/// Smallest scale_pitch.
std::int64_t scale_pitch_of(std::int64_t rows, std::int64_t columns, Scaling scaling);
/// Bytes of the elements of a contiguous matrix, without scales.
std::int64_t element_bytes(std::int64_t rows, std::int64_t columns, Format format);

/// One matrix product for each of `groups` experts. Group g's rows are [group_begin[g],
/// group_begin[g]
/// + group_rows[g]) of the operand that is split; both arrays are in device memory. group_begin[g +
/// 1]
/// >= group_begin[g] + group_rows[g]; what lies between is padding, zero in the inputs.
///   rows: A (rows, k) and D (rows, n) are split by rows, B is `groups` matrices below each other.
///   contraction: A (k rows, m) and B (k rows, n) are split by the contraction, D is `groups`
///   matrices
///         below each other; a group without rows leaves D as it is (or zero without accumulate).
enum class Grouping : std::uint8_t { none, rows, contraction };

/// D[m, n] = A[m, k] B[n, k]^T, plus D if `accumulate` (then D is FP32). A is stored (m, k), or (k,
/// m) if a_transposed; B is stored (n, k), or (k, n) if b_transposed. e4m3 operands are never
/// transposed: their scales run along the contraction. A has rows scales and B rows or blocks
/// scales. With Grouping::contraction and e4m3, group_begin and the number of rows stored are
/// multiples of 128 and the operands are (m, k rows) and (n, k rows); a group's padding is zero.
struct Gemm {
  Matrix a, b, d;
  bool a_transposed = false;
  bool b_transposed = false;
  bool accumulate = false;
  Grouping grouping = Grouping::none;
  std::int64_t groups = 1;
  const std::int32_t* group_begin = nullptr;
  const std::int32_t* group_rows = nullptr;
};

/// Softmax attention. Query i of a sequence sees keys 0 .. kv_len - q_len + i if causal, or 0 ..
/// query_positions[i] (device memory, the same for all sequences) where given. Query head h reads
/// key-value head h / (heads / kv_heads). Rows are batch * length, sequence by sequence; columns
/// are heads times d_qk or d_v.
struct AttentionShape {
  std::int64_t batch = 1;
  std::int64_t heads = 0, kv_heads = 0;
  std::int64_t q_len = 0, kv_len = 0;
  std::int64_t d_qk = 0, d_v = 0;
  bool causal = true;
  float scale = 1;  ///< of the scores: 1 / sqrt(d_qk)
  const std::int32_t* query_positions = nullptr;
};

/// lse: natural log-sum-exp of the scaled scores, (batch, heads, q_len).
struct AttentionForward {
  AttentionShape shape;
  Matrix q, k, v, out;
  float* lse = nullptr;
};

/// The scores are recomputed. `workspace`: attention_workspace_bytes() of device memory.
struct AttentionBackward {
  AttentionShape shape;
  Matrix q, k, v, out, d_out;
  const float* lse = nullptr;
  Matrix d_q, d_k, d_v;
  void* workspace = nullptr;
};
/// FP32 (batch, heads, q_len) for the row sums of d_out * out, then FP32 like d_q.
std::int64_t attention_workspace_bytes(const AttentionShape& shape);

/// y = x / rms(x) * gain with x the sum of the terms that are there; rms over each of `segments`
/// equal parts of a row, mean of squares plus epsilon. `sum` gets x where it is there (in its
/// format; y is computed from the rounded sum). `centred`: LayerNorm, with its mean taken off and
/// `bias` added. gain and bias: (1, columns / segments).
struct NormForward {
  std::array<Matrix, 4> terms;
  Matrix sum;
  Matrix gain, bias;
  Matrix y;
  float epsilon = 1e-6F;
  std::int64_t segments = 1;
  bool centred = false;
};

/// d_x = gradient of x + `add` (where it is there); d_gain, d_bias (FP32) are added to. Means and
/// root mean squares are recomputed from x. In place: d_x may be d_y or `add`.
struct NormBackward {
  Matrix d_y, x, gain;
  Matrix add;
  Matrix d_x;
  float* d_gain = nullptr;
  float* d_bias = nullptr;
  float epsilon = 1e-6F;
  std::int64_t segments = 1;
  bool centred = false;
};

/// Rotates, in place, pairs (2i, 2i + 1) of `dim` columns from `offset` on in every head by
/// position * theta^(-2i / dim) (RoFormer, arXiv 2104.09864; DeepSeek's pairing of neighbours). x:
/// (rows, heads * head_dim). `inverse` rotates back, which is the gradient.
struct Rope {
  Matrix x;
  std::int64_t heads = 1, head_dim = 0, offset = 0, dim = 0;
  const std::int32_t* positions = nullptr;  ///< (rows)
  double theta = 10000;
  bool inverse = false;
};

/// to[r, to_offset + h * to_stride + c] = from[r, from_offset + h * from_stride + c] for all heads
/// h and c < width. from_stride 0 gives every head the same. sum_heads: to[r, to_offset + c] = the
/// sum over heads of from.
struct HeadCopy {
  Matrix from, to;
  std::int64_t heads = 1, width = 0;
  std::int64_t from_offset = 0, from_stride = 0;
  std::int64_t to_offset = 0, to_stride = 0;
  bool sum_heads = false;
};

/// swiglu: in (rows, 2w) = [gate | up], out (rows, w) = silu(gate) * up. gelu (exact): in and out
/// (rows, w). With row_weight, out is multiplied by it; rows of weight 0 give zeros, in both
/// directions, whatever they hold: padding, which no product writes. out may be e4m3 with rows
/// scales.
enum class Activation : std::uint8_t { swiglu, gelu };
struct ActivationForward {
  Activation kind{};
  Matrix in, out;
  const float* row_weight = nullptr;
  const std::int32_t* used_rows = nullptr;
};

/// d_in from d_out; `out_again` gets the forward's output where it is there. In place: d_in may be
/// in.
struct ActivationBackward {
  Activation kind{};
  Matrix in, d_out, d_in, out_again;
  const float* row_weight = nullptr;
  const std::int32_t* used_rows = nullptr;
};

/// out[r] = dot(a[r], b[r]) / row_weight[r], 0 where row_weight is 0: the gradient of a row's
/// weight from the weighted row a and its gradient b.
struct RowDot {
  Matrix a, b;
  const float* row_weight = nullptr;
  float* out = nullptr;
  const std::int32_t* used_rows = nullptr;
};

/// fp32 or bf16 -> e4m3 or e5m6.
struct Quantize {
  Matrix from, to;
  const std::int32_t* used_rows = nullptr;
};
/// e4m3 or e5m6 -> fp32 or bf16.
struct Dequantize {
  Matrix from, to;
  const std::int32_t* used_rows = nullptr;
};

/// to (columns, rows) = from (rows, columns) transposed, both e4m3. blocks -> blocks: exact. rows
/// -> rows: dequantised and quantised again along the other dimension; with used_rows, only the
/// tiles of 128 from-rows that it touches are written, and from-rows behind it count as zero in
/// them.
struct Transpose {
  Matrix from, to;
  const std::int32_t* used_rows = nullptr;
};

/// out = the sum of the terms that are there, in FP32. In place: out may be a term.
struct Add {
  std::array<Matrix, 4> terms;
  Matrix out;
};

/// Converts between fp32 and bf16 where formats differ; equal e4m3 formats copy codes and scales.
struct Copy {
  Matrix from, to;
};

/// Scores of experts and the choice of top_k (DeepSeek-V3 report 2.1.2 and DeepSeek-V2
/// report 2.2.2).
///   score = sigmoid(logit), or softmax over the experts.
///   Choice by score + bias. With group_limit < groups, groups of experts are ranked first: by the
///   sum of their two best biased scores with a bias, else by their best; experts of other groups
///   are out. Ties go to the smaller index. weight = score of the chosen (without bias), over the
///   sum of all chosen if `normalise`, * scale.
/// `experts` come in the order of falling biased score. balanced: token t gets experts (t * top_k +
/// i) mod experts, i < top_k, whatever its scores (for runs that stand for a whole group of ranks).
struct Router {
  Matrix logits;                ///< (tokens, experts)
  const float* bias = nullptr;  ///< (experts)
  bool sigmoid = true;
  bool normalise = true;
  bool balanced = false;
  float scale = 1;
  std::int64_t groups = 1, group_limit = 1, top_k = 1;
  float* scores = nullptr;          ///< (tokens, experts)
  std::int32_t* experts = nullptr;  ///< (tokens, top_k)
  float* weights = nullptr;         ///< (tokens, top_k)
};
/// d_logits from the gradients of the weights; the choice has none.
struct RouterBackward {
  bool sigmoid = true;
  bool normalise = true;
  float scale = 1;
  std::int64_t top_k = 1;
  const float* scores = nullptr;
  const std::int32_t* experts = nullptr;
  const float* d_weights = nullptr;
  Matrix d_logits;
};

/// Orders (received token, choice) pairs by local expert. experts[t, i] is a local expert, or
/// negative: somebody else's. Rows of an expert stand in the order of (t, i), its first row at a
/// multiple of `alignment`. Writes, all in device memory:
///   group_begin[experts + 1], group_rows[experts], used_rows[1] = group_begin[experts],
///   row_source[row]: the token, or -1 for padding; row_weight[row]: its weight, 0 for padding;
///   both
///       for rows < used_rows,
///   slot_row[t, i]: the row, or -1.
/// `capacity`: rows there is room for; what does not fit is left out, and overflow[0] set to the
/// number of rows left out (else 0).
struct RoutingMap {
  const std::int32_t* experts = nullptr;  ///< (tokens, top_k)
  const float* weights = nullptr;         ///< (tokens, top_k)
  const std::int32_t* tokens = nullptr;   ///< [1]: received; null: max_tokens
  std::int64_t max_tokens = 0, top_k = 1, local_experts = 0, alignment = 1, capacity = 0;
  std::int32_t* group_begin = nullptr;
  std::int32_t* group_rows = nullptr;
  std::int32_t* used_rows = nullptr;
  std::int32_t* row_source = nullptr;
  float* row_weight = nullptr;
  std::int32_t* slot_row = nullptr;
  std::int32_t* overflow = nullptr;
};
/// to[row] = from[row_source[row]], zero (and scale 1) for padding; formats are equal.
struct Permute {
  Matrix from, to;
  const std::int32_t* row_source = nullptr;
  const std::int32_t* used_rows = nullptr;
};
/// to[t] = sum over i of from[slot_row[t, i]] (zero if it has none), in FP32 in the order of i.
/// Where given, slot_values[t, i] = row_values[slot_row[t, i]] (0 if it has none).
struct Unpermute {
  Matrix from, to;
  const std::int32_t* slot_row = nullptr;
  const std::int32_t* tokens = nullptr;  ///< [1]; null: all rows of `to`
  std::int64_t top_k = 1;
  const float* row_values = nullptr;
  float* slot_values = nullptr;
};

/// out[r] = table[tokens[r] - first_row], zero where the token is not in the table's rows.
struct Embedding {
  Matrix table, out;
  const std::int32_t* tokens = nullptr;
  std::int64_t first_row = 0;
};
/// d_table (FP32, rows like the table) is added to, in the order of r for each row.
struct EmbeddingBackward {
  Matrix d_out, d_table;
  const std::int32_t* tokens = nullptr;
  std::int64_t first_row = 0;
};

/// A part of the vocabulary: per row (largest logit, sum of exp(logit - largest), logit of the
/// target or 0 if it is not among the columns). targets < 0 have no loss.
struct CrossEntropyPartial {
  Matrix logits;
  const std::int32_t* targets = nullptr;
  std::int64_t first_column = 0;
  float* partial = nullptr;  ///< (rows, 3)
};
/// lse[r] and the loss's sum over rows from the partials of all parts, (parts, rows, 3).
struct CrossEntropyLoss {
  const float* partials = nullptr;
  std::int64_t parts = 1, rows = 0;
  const std::int32_t* targets = nullptr;
  float* lse = nullptr;
  double* loss = nullptr;  ///< [1], added to
};
/// In place: logits become (exp(logit - lse) - [column is the target]) * scale, 0 without target.
struct CrossEntropyBackward {
  Matrix logits;
  const std::int32_t* targets = nullptr;
  const float* lse = nullptr;
  std::int64_t first_column = 0;
  float scale = 1;
};

/// What a step of AdamW needs beyond its tensors, in device memory, since it changes every step.
struct AdamScalars {
  float learning_rate = 0;
  float beta1 = 0.9F, beta2 = 0.95F;
  float beta1_power = 0, beta2_power = 0;  ///< beta^step
  float epsilon = 1e-8F;
  float weight_decay = 0.1F;
  float max_norm = 0;  ///< gradients are scaled to at most this norm; 0: never
};
/// AdamW (Loshchilov and Hutter, arXiv 1711.05101): g *= min(1, max_norm / sqrt(square_sum)), m =
/// b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, master -= lr (m_hat / (sqrt(v_hat) + eps) + decay *
/// master), parameter = master rounded. Moments fp32 or bf16. `decay` false: no weight decay
/// (norms).
struct AdamW {
  std::int64_t elements = 0;
  const float* gradient = nullptr;
  float* master = nullptr;
  void* first_moment = nullptr;
  void* second_moment = nullptr;
  Format moments = Format::fp32;
  void* parameter = nullptr;  ///< null: `master` is the parameter
  Format parameters = Format::fp32;
  const AdamScalars* scalars = nullptr;
  const double* square_sum = nullptr;  ///< [1], of all gradients; null: no clipping
  bool decay = true;
};

/// out[0] = sum of squares (plus out[0] if accumulate), in double.
struct SquareSum {
  const float* values = nullptr;
  std::int64_t elements = 0;
  double* out = nullptr;
  bool accumulate = false;
};

struct Fill {
  void* data = nullptr;  ///< bytes become 0
  std::int64_t bytes = 0;
};

/// Bytes copied by a kernel on `sms` SMs (0: all): a dispatch, combine or send whose peers are this
/// device (loop-back) or, with peer memory as an operand, a GPU of this node over NVLink.
struct Loopback {
  const void* from = nullptr;
  void* to = nullptr;
  std::int64_t bytes = 0;
};

using Call = std::variant<Gemm, AttentionForward, AttentionBackward, NormForward, NormBackward,
                          Rope, HeadCopy, ActivationForward, ActivationBackward, RowDot, Quantize,
                          Dequantize, Transpose, Add, Copy, Router, RouterBackward, RoutingMap,
                          Permute, Unpermute, Embedding, EmbeddingBackward, CrossEntropyPartial,
                          CrossEntropyLoss, CrossEntropyBackward, AdamW, SquareSum, Fill, Loopback>;

/// "gemm", "attention_forward", ...
std::string_view name_of(const Call& call);
/// "gemm e4m3 4096x24576x1536", for messages.
std::string describe(const Call& call);

/// Floating-point operations (GEMM 2 m n k over all groups, attention as counted in sim/shape.hpp;
/// 0 for the rest) and bytes that have to be touched once. Where sizes are decided on the device,
/// all rows of the operands count.
struct Cost {
  double flops = 0;
  double bytes = 0;
};
Cost cost_of(const Call& call);

/// Why this call is not possible ("k of A is 128, of B 256"), or empty. Device memory is not read.
std::string why_impossible(const Call& call);

/// A piece of memory that a call touches. Rows with gaps count as one piece from the first byte to
/// the last, unless they are the columns of a wider matrix: then `pitch_bytes` > `row_bytes`.
struct Touch {
  const void* begin = nullptr;
  std::int64_t rows = 1;
  std::int64_t row_bytes = 0;
  std::int64_t pitch_bytes = 0;
  bool written = false;  ///< else only read
};
std::vector<Touch> touches_of(const Call& call);

}  // namespace orrery::kernels
