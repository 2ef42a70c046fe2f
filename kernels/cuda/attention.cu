#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/choose_attention.hpp"
#include "kernels/cuda/attention_hopper.cuh"
#include "kernels/cuda/attention_simple.cuh"
#include "kernels/cuda/device_code.cuh"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/libraries.hpp"
#include "kernels/cuda/tensor_map.hpp"

#ifdef ORRERY_HAS_CUDNN
#include "kernels/cuda/cudnn_attention.hpp"
#endif

namespace orrery::kernels::cuda {
namespace {

AttentionDevice device_of(const LaunchContext& context) {
  AttentionDevice device;
  device.compute_capability = context.limits.compute_capability;
  device.l2_bytes = static_cast<std::int64_t>(context.limits.l2_bytes);
  device.workspace_bytes = static_cast<std::int64_t>(context.workspace_bytes);
  device.sms = context.sms;
  device.all_sms = context.limits.sms;
#ifdef ORRERY_HAS_CUDNN
  // Before 9.16 its backward pass wants a padding mask where keys are no multiple of 128
  // (scaled_dot_product_flash_attention.h of NVIDIA/cudnn-frontend@3929da2); tried is 9.19.
  device.cudnn = context.libraries != nullptr && cudnnGetVersion() >= 91900;
#else
  device.cudnn = false;
#endif
  return device;
}

// ---------------------------------------------------------------------------------------------
// cuDNN.

#ifdef ORRERY_HAS_CUDNN

/// The device's handle, and a plan for each shape that was asked for.
class CudnnAttention {
 public:
  CudnnAttention() {
    if (const cudnnStatus_t status = cudnnCreate(&handle_); status != CUDNN_STATUS_SUCCESS) {
      throw std::runtime_error(std::string("cudnnCreate: ") + cudnnGetErrorString(status));
    }
  }
  ~CudnnAttention() {
    plans_.clear();
    cudnnDestroy(handle_);
  }
  CudnnAttention(const CudnnAttention&) = delete;
  CudnnAttention& operator=(const CudnnAttention&) = delete;

  /// For work on this stream.
  cudnnHandle_t handle(cudaStream_t stream) {
    if (const cudnnStatus_t status = cudnnSetStream(handle_, stream);
        status != CUDNN_STATUS_SUCCESS) {
      throw std::runtime_error(std::string("cudnnSetStream: ") + cudnnGetErrorString(status));
    }
    return handle_;
  }
  /// Compiled the first time, which takes seconds.
  const AttentionPlan& plan(const AttentionGraphShape& shape) {
    for (const auto& plan : plans_) {
      if (plan->shape() == shape) return *plan;
    }
    return *plans_.emplace_back(std::make_unique<AttentionPlan>(shape, handle_));
  }

 private:
  cudnnHandle_t handle_ = nullptr;
  std::vector<std::unique_ptr<AttentionPlan>> plans_;
};

struct Scratch {
  void* data = nullptr;
  std::int64_t bytes = 0;
};
void require(const Scratch& scratch, const AttentionPlan& plan) {
  if (plan.workspace_bytes() > scratch.bytes) {
    throw std::runtime_error("cuDNN's attention wants a workspace of " +
                             std::to_string(plan.workspace_bytes()) + " bytes, there are " +
                             std::to_string(scratch.bytes));
  }
}

void* slot(std::array<void*, 16>& pointers, AttentionTensor tensor, const void* data) {
  return pointers[static_cast<std::size_t>(tensor)] = const_cast<void*>(data);
}
/// Rows of a sequence from a head on, in BF16.
const void* part(const Matrix& matrix, std::int64_t row, std::int64_t column) {
  return static_cast<const std::uint16_t*>(matrix.data) + row * matrix.pitch + column;
}

void launch_cudnn(const AttentionForward& call, const LaunchContext& context) {
  auto& cudnn = static_cast<Libraries*>(context.libraries)->get<CudnnAttention>();
  const AttentionGraphShape shape{
      .shape = call.shape,
      .pitches = {call.q.pitch, call.k.pitch, call.v.pitch, call.out.pitch},
      .lse_heads = call.shape.heads};
  const cudnnHandle_t handle = cudnn.handle(context.stream);
  const AttentionPlan& plan = cudnn.plan(shape);
  require({context.workspace, static_cast<std::int64_t>(context.workspace_bytes)}, plan);
  std::array<void*, 16> pointers{};
  slot(pointers, AttentionTensor::q, call.q.data);
  slot(pointers, AttentionTensor::k, call.k.data);
  slot(pointers, AttentionTensor::v, call.v.data);
  slot(pointers, AttentionTensor::out, call.out.data);
  slot(pointers, AttentionTensor::lse, call.lse);
  plan.run(handle, pointers, call.shape.scale, context.workspace);
}

/// In pieces of as many heads as the workspace has room for.
void launch_cudnn(const AttentionBackward& call, const LaunchContext& context) {
  auto& cudnn = static_cast<Libraries*>(context.libraries)->get<CudnnAttention>();
  const AttentionShape& s = call.shape;
  const std::int64_t rest = cudnn_rest_offset(s);
  Scratch scratch{static_cast<char*>(call.workspace) + rest, attention_workspace_bytes(s) - rest};
  if (static_cast<std::int64_t>(context.workspace_bytes) > scratch.bytes) {
    scratch = {context.workspace, static_cast<std::int64_t>(context.workspace_bytes)};
  }
  const AttentionPiece piece = choose_piece(s, scratch.bytes);
  const std::int64_t group = s.heads / s.kv_heads;
  AttentionGraphShape shape{
      .shape = s,
      .pitches = {call.q.pitch, call.k.pitch, call.v.pitch, call.out.pitch},
      .gradient_pitches = {call.d_out.pitch, call.d_q.pitch, call.d_k.pitch, call.d_v.pitch},
      .lse_heads = s.heads,
      .backward = true};
  shape.shape.batch = piece.batch;
  shape.shape.heads = piece.heads;
  shape.shape.kv_heads = piece.heads / group;
  const cudnnHandle_t handle = cudnn.handle(context.stream);
  const AttentionPlan& plan = cudnn.plan(shape);
  require(scratch, plan);
  for (std::int64_t sequence = 0; sequence < s.batch; sequence += piece.batch) {
    for (std::int64_t head = 0; head < s.heads; head += piece.heads) {
      const std::int64_t kv = head / group;
      const std::int64_t query = sequence * s.q_len;
      const std::int64_t key = sequence * s.kv_len;
      std::array<void*, 16> pointers{};
      slot(pointers, AttentionTensor::q, part(call.q, query, head * s.d_qk));
      slot(pointers, AttentionTensor::k, part(call.k, key, kv * s.d_qk));
      slot(pointers, AttentionTensor::v, part(call.v, key, kv * s.d_v));
      slot(pointers, AttentionTensor::out, part(call.out, query, head * s.d_v));
      slot(pointers, AttentionTensor::lse, call.lse + (sequence * s.heads + head) * s.q_len);
      slot(pointers, AttentionTensor::d_out, part(call.d_out, query, head * s.d_v));
      slot(pointers, AttentionTensor::d_q, part(call.d_q, query, head * s.d_qk));
      slot(pointers, AttentionTensor::d_k, part(call.d_k, key, kv * s.d_qk));
      slot(pointers, AttentionTensor::d_v, part(call.d_v, key, kv * s.d_v));
      slot(pointers, AttentionTensor::row_sums, call.workspace);
      plan.run(handle, pointers, s.scale, scratch.data);
    }
  }
}

#endif

// ---------------------------------------------------------------------------------------------
// The tensor cores.

CUtensorMap map_of(const Matrix& matrix, const AttentionShape& shape, std::int64_t heads,
                   std::int64_t length, int box_rows) {
  const attention::MapGeometry g = attention::geometry_of(matrix, shape, heads, length, box_rows);
  return make_map(g.data, g.dims, g.strides, g.box);
}

/// Where the call has a table: what queries see, in the stream's workspace.
template <bool kTable>
void start_table(const AttentionShape& shape, const LaunchContext& context) {
  if constexpr (kTable) {
    constexpr int kThreads = 256;
    const attention::SeenArguments arguments = attention::seen_arguments(shape, context.workspace);
    const int warps = arguments.padded / attention::kRangeQueries;
    start(context, "attention, seen keys", attention::seen_kernel,
          (warps * 32 + kThreads - 1) / kThreads, kThreads, 0, arguments);
  }
}

template <int kDqk, int kDv, bool kTable>
void launch_tensor_cores(const AttentionForward& call, const AttentionDevice& device,
                         const LaunchContext& context) {
  const AttentionShape& s = call.shape;
  start_table<kTable>(s, context);
  const auto arguments = attention::forward_arguments<kTable>(call, context.workspace, device);
  start(context, "attention forward", attention::forward_kernel<kDqk, kDv, kTable>,
        arguments.work.grid, attention::kThreads, attention::ForwardMemory<kDqk, kDv>::bytes,
        map_of(call.q, s, s.heads, s.q_len, kAttentionTile),
        map_of(call.k, s, s.kv_heads, s.kv_len, attention::kKeys),
        map_of(call.v, s, s.kv_heads, s.kv_len, attention::kKeys), arguments);
}

template <int kDqk, int kDv, bool kTable>
void launch_tensor_cores(const AttentionBackward& call, const AttentionDevice& device,
                         const LaunchContext& context) {
  const AttentionShape& s = call.shape;
  start_table<kTable>(s, context);
  constexpr int kRowSumThreads = 1024;
  start(context, "attention backward, row sums", attention::row_sum_kernel<kDv>, device.sms,
        kRowSumThreads, 0, attention::row_sum_arguments(call));
  const auto over_keys =
      attention::backward_arguments<kTable>(call, true, context.workspace, device);
  start(context, "attention backward, keys", attention::keys_kernel<kDqk, kDv, kTable>,
        over_keys.work.grid, attention::kThreads, attention::KeysMemory<kDqk, kDv>::bytes,
        map_of(call.k, s, s.kv_heads, s.kv_len, kAttentionTile),
        map_of(call.v, s, s.kv_heads, s.kv_len, kAttentionTile),
        map_of(call.q, s, s.heads, s.q_len, attention::kStep),
        map_of(call.d_out, s, s.heads, s.q_len, attention::kStep), over_keys);
  const auto over_queries =
      attention::backward_arguments<kTable>(call, false, context.workspace, device);
  start(context, "attention backward, queries", attention::queries_kernel<kDqk, kDv, kTable>,
        over_queries.work.grid, attention::kThreads, attention::QueriesMemory<kDqk, kDv>::bytes,
        map_of(call.q, s, s.heads, s.q_len, kAttentionTile),
        map_of(call.d_out, s, s.heads, s.q_len, kAttentionTile),
        map_of(call.k, s, s.kv_heads, s.kv_len, attention::kStep),
        map_of(call.v, s, s.kv_heads, s.kv_len, attention::kStep), over_queries);
}

template <int kDqk, int kDv, class CallType>
void launch_tensor_cores_of(const CallType& call, const AttentionDevice& device,
                            const LaunchContext& context) {
  if (call.shape.query_positions != nullptr) {
    launch_tensor_cores<kDqk, kDv, true>(call, device, context);
  } else {
    launch_tensor_cores<kDqk, kDv, false>(call, device, context);
  }
}

/// why_not has let no other dimensions through.
template <class CallType>
void launch_tensor_cores(const CallType& call, const AttentionDevice& device,
                         const LaunchContext& context) {
  if (call.shape.d_qk == 192) {
    launch_tensor_cores_of<192, 128>(call, device, context);
  } else if (call.shape.d_qk == 128) {
    launch_tensor_cores_of<128, 128>(call, device, context);
  } else {
    launch_tensor_cores_of<64, 64>(call, device, context);
  }
}

// ---------------------------------------------------------------------------------------------
// The CUDA cores.

/// Blocks are small, several to an SM: only with less than all SMs there is one for each.
int simple_grid(std::int64_t length, std::int64_t heads, const AttentionDevice& device) {
  const std::int64_t items = (length + attention::kSimpleRows - 1) / attention::kSimpleRows * heads;
  const std::int64_t most = device.sms < device.all_sms ? device.sms : 1 << 20;
  return static_cast<int>(std::min(items, most));
}

template <class T, int kColumns>
void launch_cuda_cores(const AttentionForward& call, const AttentionDevice& device,
                       const LaunchContext& context) {
  const AttentionShape& s = call.shape;
  start(context, "attention forward, CUDA cores", attention::simple_forward_kernel<T, kColumns>,
        simple_grid(s.q_len, s.batch * s.heads, device), attention::kSimpleThreads,
        attention::simple_shared_bytes(s.d_qk, s.d_v), attention::simple_arguments<T>(call));
}
template <class T, int kColumns>
void launch_cuda_cores(const AttentionBackward& call, const AttentionDevice& device,
                       const LaunchContext& context) {
  const AttentionShape& s = call.shape;
  const int bytes = attention::simple_shared_bytes(s.d_qk, s.d_v);
  const attention::SimpleArguments<T> arguments = attention::simple_arguments<T>(call);
  start(context, "attention backward, queries, CUDA cores",
        attention::simple_queries_kernel<T, kColumns>,
        simple_grid(s.q_len, s.batch * s.heads, device), attention::kSimpleThreads, bytes,
        arguments);
  start(context, "attention backward, keys, CUDA cores", attention::simple_keys_kernel<T, kColumns>,
        simple_grid(s.kv_len, s.batch * s.kv_heads, device), attention::kSimpleThreads, bytes,
        arguments);
}

template <class T, class CallType>
void launch_cuda_cores_of(const CallType& call, const AttentionDevice& device,
                          const LaunchContext& context) {
  // Columns of a thread, of four in a row.
  const std::int64_t columns = std::max(call.shape.d_qk, call.shape.d_v);
  if (columns <= 64) {
    launch_cuda_cores<T, 16>(call, device, context);
  } else if (columns <= 128) {
    launch_cuda_cores<T, 32>(call, device, context);
  } else {
    launch_cuda_cores<T, 64>(call, device, context);
  }
}

template <class CallType>
void launch_any(const CallType& call, const LaunchContext& context) {
  const AttentionDevice device = device_of(context);
  switch (choose_attention(call, device)) {
    case AttentionKernel::cudnn:
#ifdef ORRERY_HAS_CUDNN
      launch_cudnn(call, context);
#endif
      return;
    case AttentionKernel::tensor_cores:
      launch_tensor_cores(call, device, context);
      return;
    case AttentionKernel::cuda_cores:
      if (call.q.format == Format::fp32) {
        launch_cuda_cores_of<float>(call, device, context);
      } else {
        launch_cuda_cores_of<std::uint16_t>(call, device, context);
      }
      return;
  }
}

}  // namespace

void launch(const AttentionForward& call, const LaunchContext& context) {
  launch_any(call, context);
}
void launch(const AttentionBackward& call, const LaunchContext& context) {
  launch_any(call, context);
}

}  // namespace orrery::kernels::cuda
