#include "models/plan.hpp"

#include "sim/check.hpp"

namespace orrery {

std::string_view name_of(PrecisionKind kind) {
  switch (kind) {
    case PrecisionKind::fp32:
      return "fp32";
    case PrecisionKind::bf16:
      return "bf16";
    case PrecisionKind::fp8_tensor:
      return "fp8_tensor";
    case PrecisionKind::fp8_deepseek:
      return "fp8_deepseek";
  }
  return "?";
}

Precision make_precision(PrecisionKind kind) {
  Precision
      precision;  // the defaults are Megatron-LM's BF16 recipe: 2 + 4 + 4 + 8 = 18 bytes/parameter
  precision.kind = kind;
  switch (kind) {
    case PrecisionKind::fp32:
      precision.activations = NumberFormat::fp32;
      precision.linear = NumberFormat::fp32;
      precision.saved = NumberFormat::fp32;
      precision.saved_attention = NumberFormat::fp32;
      precision.dispatch = NumberFormat::fp32;
      precision.combine = NumberFormat::fp32;
      precision.parameter_bytes = 4;
      precision.master_bytes = 0;
      return precision;
    case PrecisionKind::bf16:
      return precision;
    case PrecisionKind::fp8_tensor:
      // Transformer Engine casts BF16 weights on use and keeps the FP8 casts of linear-layer
      // inputs.
      precision.linear = NumberFormat::fp8_tensor;
      precision.saved = NumberFormat::fp8_tensor;
      precision.saved_attention = NumberFormat::fp8_tensor;
      return precision;
    case PrecisionKind::fp8_deepseek:
      precision.linear = NumberFormat::fp8_block;      // 3.3.2: 1x128 tiles, 128x128 blocks
      precision.saved = NumberFormat::fp8_block;       // 3.3.3: activations cached in FP8,
      precision.saved_attention = NumberFormat::e5m6;  // but E5M6 after the attention
      precision.dispatch = NumberFormat::fp8_block;    // 3.3.3: FP8 before the up-projections and
      precision.combine = NumberFormat::bf16;          // before the gradients' down-projections
      precision.moment_bytes = 4;                      // 3.3.3: BF16 first and second moments
      return precision;
  }
  ORRERY_CHECK(false, "unknown precision {}", static_cast<int>(kind));
  return precision;
}

}  // namespace orrery
