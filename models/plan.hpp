#pragma once
// The plan: how a model is laid out over a cluster and trained. Everything a user decides.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "models/routing.hpp"
#include "models/schedule.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// Degrees of parallelism; world = tp * cp * pp * dp. Experts are laid over the same tp * cp * dp
/// ranks of a pipeline position: ep * expert_tp of them hold one copy of all routed experts.
struct Parallelism {
  std::int64_t tp = 1;
  std::int64_t cp = 1;
  std::int64_t pp = 1;
  std::int64_t dp = 1;
  std::int64_t ep = 1;
  std::int64_t expert_tp = 1;
  bool sequence_parallel = true;  ///< with tp > 1: norms and residuals split over the sequence
  int zero_stage = 1;             ///< 0: replicated; 1: optimizer; 2: + gradients; 3: + parameters
  std::int64_t world() const { return tp * cp * pp * dp; }
  std::int64_t ranks_per_position() const { return tp * cp * dp; }

  friend bool operator==(const Parallelism&, const Parallelism&) = default;
};

/// What one pipeline stage holds: layers [first_layer, first_layer + layers).
struct StageContents {
  std::int64_t first_layer = 0;
  std::int64_t layers = 0;
  bool embedding = false;
  bool head = false;
  std::int64_t mtp_modules = 0;

  friend bool operator==(const StageContents&, const StageContents&) = default;
};

/// Number formats of a training recipe.
enum class PrecisionKind : std::uint8_t { fp32, bf16, fp8_tensor, fp8_deepseek };
std::string_view name_of(PrecisionKind kind);

struct Precision {
  PrecisionKind kind{};
  NumberFormat activations = NumberFormat::bf16;  ///< the residual stream and all between kernels
  NumberFormat linear = NumberFormat::bf16;  ///< GEMM inputs of linear layers, all three passes
  NumberFormat saved = NumberFormat::bf16;   ///< linear-layer inputs kept for the weight gradients
  NumberFormat saved_attention = NumberFormat::bf16;  ///< input of the output projection, kept
  NumberFormat dispatch = NumberFormat::bf16;         ///< tokens to experts, gradients to experts
  NumberFormat combine = NumberFormat::bf16;          ///< results back, both directions
  std::int64_t parameter_bytes = 2;                   ///< resident working copy
  std::int64_t gradient_bytes = 4;                    ///< accumulated over micro-batches
  std::int64_t gradient_sync_bytes = 4;               ///< as reduced between data-parallel ranks
  std::int64_t master_bytes = 4;
  std::int64_t moment_bytes = 8;  ///< both moments

  friend bool operator==(const Precision&, const Precision&) = default;
};

/// fp32: everything, without master weights, for checking numerics; bf16: Megatron-LM's mixed
/// precision; fp8_tensor: Transformer Engine's per-tensor scaling;
/// fp8_deepseek: V3 report 3.3 (E4M3 everywhere, 1x128 and 128x128 scales, FP8 cache and dispatch,
/// E5M6 after attention, BF16 combine and moments).
Precision make_precision(PrecisionKind kind);

/// What is computed again in the backward pass instead of being kept.
struct Recompute {
  bool norms = false;              ///< outputs of RMSNorm
  bool mla_up_projection = false;  ///< q_b and kv_b outputs
  bool activation = false;         ///< SwiGLU / GELU output
  bool attention_core = false;     ///< the whole core again (Megatron's "selective")
  bool full = false;               ///< the whole layer from its input

  friend bool operator==(const Recompute&, const Recompute&) = default;
};

/// A checkpoint written in the background of the step: master weights (parameters where there are
/// none) and moments, by each GPU its own share, once for all copies. The optimizer, which changes
/// them, waits for it.
struct Checkpoint {
  double bytes_per_s = 0;    ///< that storage takes from one GPU
  bool own_network = false;  ///< not through the NICs that training uses

  friend bool operator==(const Checkpoint&, const Checkpoint&) = default;
};

struct Plan {
  Parallelism parallelism;
  ScheduleKind schedule{};
  int chunks = 1;  ///< virtual stages a rank (interleaved); fixed by the schedule otherwise
  std::vector<StageContents> stages;
  std::int64_t sequence_length = 0;
  std::int64_t micro_batch_sequences = 1;
  std::int64_t global_batch_sequences = 0;
  Precision precision;
  Recompute recompute;
  /// SMs that dispatch and combine kernels hold while they overlap computation.
  int communication_sms = 0;
  std::optional<Checkpoint> checkpoint;
  Routing routing;  ///< which experts tokens choose

  /// Tokens of one micro-batch on one rank (the sequence is split over cp).
  std::int64_t micro_batch_tokens() const {
    return micro_batch_sequences * sequence_length / parallelism.cp;
  }
  /// Micro-batches a pipeline runs per step (DualPipe: both directions together).
  std::int64_t micro_batches() const {
    return global_batch_sequences / (micro_batch_sequences * parallelism.dp);
  }

  friend bool operator==(const Plan&, const Plan&) = default;
};

}  // namespace orrery
