#include "kernels/choose_attention.hpp"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace orrery::kernels {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

/// Operands with their heads' width, for messages.
struct Operand {
  const char* name;
  const Matrix* matrix;
};
std::vector<Operand> operands_of(const AttentionForward& call) {
  return {{"q", &call.q}, {"k", &call.k}, {"v", &call.v}, {"out", &call.out}};
}
std::vector<Operand> operands_of(const AttentionBackward& call) {
  return {{"q", &call.q},         {"k", &call.k},     {"v", &call.v},     {"out", &call.out},
          {"d_out", &call.d_out}, {"d_q", &call.d_q}, {"d_k", &call.d_k}, {"d_v", &call.d_v}};
}

/// All of `format`, and every row at a multiple of 16 bytes.
std::string why_not_vectors(const std::vector<Operand>& operands) {
  for (const Operand& operand : operands) {
    const Matrix& m = *operand.matrix;
    if (m.format != Format::bf16) {
      return std::string(operand.name) + " is " + std::string(name_of(m.format)) + ", not bf16";
    }
    if (reinterpret_cast<std::uintptr_t>(m.data) % 16 != 0 || m.pitch % 8 != 0) {
      return std::string("rows of ") + operand.name + " do not begin at multiples of 16 bytes";
    }
  }
  return {};
}

/// What holds for forward and backward alike.
std::string why_not_fused(const std::vector<Operand>& operands, const AttentionDevice& device) {
  if (device.compute_capability != 90) return "the GPU is not of compute capability 9.0";
  return why_not_vectors(operands);
}

std::string why_not_cudnn(const AttentionShape& shape, const std::vector<Operand>& operands,
                          const AttentionDevice& device) {
  if (!device.cudnn) return "it is not there";
  if (shape.query_positions != nullptr) return "query_positions: its mask has no table";
  if (shape.causal && shape.q_len > shape.kv_len) return "queries that see no key";
  if (shape.d_qk % 8 != 0 || shape.d_v % 8 != 0) return "head dimensions not a multiple of 8";
  if (shape.d_qk > 256 || shape.d_v > 256) return "head dimensions beyond 256";
  if (shape.q_len == 1 && shape.kv_len == 1) return "one query and one key";
  if (device.sms < device.all_sms) return "its engines cannot be kept to some of the SMs";
  return why_not_fused(operands, device);
}

std::string why_not_tensor_cores(const AttentionShape& shape, const std::vector<Operand>& operands,
                                 const AttentionDevice& device) {
  const bool known = (shape.d_qk == 192 && shape.d_v == 128) ||
                     (shape.d_qk == shape.d_v && (shape.d_qk == 64 || shape.d_qk == 128));
  if (!known) return "head dimensions other than 192/128, 128/128 and 64/64";
  if (shape.query_positions != nullptr && attention_table_bytes(shape) > device.workspace_bytes) {
    return "query_positions: the stream's workspace has no room for what queries see";
  }
  if (!(shape.scale > 0)) return "a scale that is not positive";  // it looks for the largest before
  return why_not_fused(operands, device);
}

/// Same formats throughout, fp32 or bf16.
std::string why_not_cuda_cores(const AttentionShape& shape, const std::vector<Operand>& operands) {
  if (shape.d_qk > 256 || shape.d_v > 256) return "head dimensions beyond 256";
  const Format format = operands.front().matrix->format;
  for (const Operand& operand : operands) {
    const Format other = operand.matrix->format;
    if (other != Format::fp32 && other != Format::bf16) {
      return std::string(operand.name) + " is " + std::string(name_of(other));
    }
    if (other != format) {
      return std::string(operand.name) + " is " + std::string(name_of(other)) + ", q is " +
             std::string(name_of(format));
    }
  }
  return {};
}

std::string why_not_workspace(const void* workspace) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(workspace) % 16 == 0;
  return aligned ? "" : "the workspace does not begin at a multiple of 16 bytes";
}

template <class CallType>
AttentionKernel first_that_can(const CallType& call, const AttentionDevice& device) {
  std::string why;
  for (const AttentionKernel kernel : kAttentionKernels) {
    const std::string reason = why_not(kernel, call, device);
    if (reason.empty()) return kernel;
    why += (why.empty() ? "" : "; ") + std::string(name_of(kernel)) + ": " + reason;
  }
  throw std::invalid_argument("no attention kernel: " + why);
}

}  // namespace

std::string_view name_of(AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::cudnn:
      return "cudnn";
    case AttentionKernel::tensor_cores:
      return "tensor_cores";
    case AttentionKernel::cuda_cores:
      return "cuda_cores";
  }
  return "";
}

std::string why_not(AttentionKernel kernel, const AttentionForward& call,
                    const AttentionDevice& device) {
  const std::vector<Operand> operands = operands_of(call);
  switch (kernel) {
    case AttentionKernel::cudnn:
      return why_not_cudnn(call.shape, operands, device);
    case AttentionKernel::tensor_cores:
      return why_not_tensor_cores(call.shape, operands, device);
    case AttentionKernel::cuda_cores:
      return why_not_cuda_cores(call.shape, operands);
  }
  return "unknown kernel";
}

std::string why_not(AttentionKernel kernel, const AttentionBackward& call,
                    const AttentionDevice& device) {
  const std::vector<Operand> operands = operands_of(call);
  switch (kernel) {
    case AttentionKernel::cudnn: {
      std::string why = why_not_cudnn(call.shape, operands, device);
      if (why.empty()) why = why_not_workspace(call.workspace);
      if (!why.empty()) return why;
      const std::int64_t bytes =
          std::max(attention_workspace_bytes(call.shape) - cudnn_rest_offset(call.shape),
                   device.workspace_bytes);
      if (choose_piece(call.shape, bytes).heads == 0) {
        return "the gradients of one head's scores do not fit into the workspace";
      }
      return {};
    }
    case AttentionKernel::tensor_cores: {
      std::string why = why_not_tensor_cores(call.shape, operands, device);
      if (why.empty()) why = why_not_workspace(call.workspace);
      if (!why.empty()) return why;
      if (tensor_core_backward_bytes(call.shape) > attention_workspace_bytes(call.shape)) {
        return "so few queries that their rounded-up rows do not fit into the workspace";
      }
      return {};
    }
    case AttentionKernel::cuda_cores:
      return why_not_cuda_cores(call.shape, operands);
  }
  return "unknown kernel";
}

AttentionKernel choose_attention(const AttentionForward& call, const AttentionDevice& device) {
  return first_that_can(call, device);
}
AttentionKernel choose_attention(const AttentionBackward& call, const AttentionDevice& device) {
  return first_that_can(call, device);
}

std::int64_t cudnn_backward_bytes(const AttentionShape& shape) {
  const std::int64_t all = shape.batch * shape.heads;
  const std::int64_t scores = all * round_up(shape.q_len, 128) * round_up(shape.kv_len, 128) * 2;
  const bool grouped = shape.heads != shape.kv_heads;
  return scores + (grouped ? all * shape.kv_len * (shape.d_qk + shape.d_v) * 2 : 0) + 256;
}

AttentionPiece choose_piece(const AttentionShape& shape, std::int64_t bytes) {
  if (cudnn_backward_bytes(shape) <= bytes) return {shape.batch, shape.heads};
  const std::int64_t queries = shape.heads / shape.kv_heads;
  for (std::int64_t parts = 1; parts <= shape.kv_heads; ++parts) {
    if (shape.kv_heads % parts != 0) continue;
    AttentionShape piece = shape;
    piece.batch = 1;
    piece.kv_heads = shape.kv_heads / parts;
    piece.heads = piece.kv_heads * queries;
    if (cudnn_backward_bytes(piece) <= bytes) return {1, piece.heads};
  }
  return {0, 0};
}

std::int64_t cudnn_rest_offset(const AttentionShape& shape) {
  return round_up(shape.batch * shape.heads * shape.q_len * 4, 256);
}

AttentionWork choose_work(std::int64_t rows, std::int64_t heads, std::int64_t bytes_per_head,
                          bool longest_last, const AttentionDevice& device) {
  AttentionWork work;
  work.tiles = static_cast<std::int32_t>((rows + kAttentionTile - 1) / kAttentionTile);
  work.heads = static_cast<std::int32_t>(heads);
  // Half of the cache: the tiles' own rows and results pass through the rest.
  work.section = static_cast<std::int32_t>(std::clamp<std::int64_t>(
      device.l2_bytes / 2 / std::max<std::int64_t>(bytes_per_head, 1), 1, heads));
  work.grid = static_cast<std::int32_t>(
      std::min<std::int64_t>(device.sms, static_cast<std::int64_t>(work.tiles) * heads));
  work.longest_last = longest_last;
  return work;
}

std::int64_t attention_table_bytes(const AttentionShape& shape) {
  const std::int64_t padded = round_up(shape.q_len, kAttentionTile);
  return padded * 4 + padded / 64 * 8;
}

std::int64_t tensor_core_backward_bytes(const AttentionShape& shape) {
  return 2 * shape.batch * shape.heads * round_up(shape.q_len, kAttentionTile) * 4;
}

}  // namespace orrery::kernels
