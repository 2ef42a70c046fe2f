#pragma once
// Attention as graphs of cuDNN 9's backend API: which operations, which engine, which plan. No
// device is needed to build a graph and to ask which engines would run it on a described one, so
// this is plain C++ and tests/kernels/cudnn_attention_test.cpp checks it without a GPU. Only built
// where cuDNN is found (ORRERY_HAS_CUDNN).
//
// The patterns that cuDNN recognises as flash attention are those of NVIDIA's cudnn-frontend (MIT,
// include/cudnn_frontend/node/scaled_dot_product_flash_attention.h, softmax.h and
// diagonal_band_mask.h at 3929da2).

#include <cudnn.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/choose_attention.hpp"

namespace orrery::kernels::cuda {

/// A descriptor of cuDNN's backend; destroyed with its owner. Setters throw std::runtime_error with
/// cuDNN's own message.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(cudnnBackendDescriptorType_t type);
  Descriptor(Descriptor&&) noexcept;
  Descriptor& operator=(Descriptor&&) noexcept;
  ~Descriptor();

  cudnnBackendDescriptor_t get() const { return handle_; }
  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count,
           const void* values);
  void set(cudnnBackendAttributeName_t name, std::int64_t value);
  void set(cudnnBackendAttributeName_t name, cudnnDataType_t value);
  void set(cudnnBackendAttributeName_t name, bool value);
  void set(cudnnBackendAttributeName_t name, const Descriptor& value);
  void finalize();

 private:
  cudnnBackendDescriptor_t handle_ = nullptr;
};

/// Tensors that are bound when a plan runs. The last five are numbers in the host's memory.
enum class AttentionTensor : std::int64_t {
  q = 1,
  k,
  v,
  out,
  lse,
  d_out,
  d_q,
  d_k,
  d_v,
  row_sums,
  scale,
  one,
  minus_infinity,
  q_len,
  kv_len,
};

/// What a plan depends on: one batch entry or all, some heads or all of them.
struct AttentionGraphShape {
  AttentionShape shape;  ///< scale and query_positions do not matter
  /// Elements from one row to the next of q, k, v, out and, for the backward pass, of d_out, d_q,
  /// d_k, d_v.
  std::array<std::int64_t, 4> pitches{};
  std::array<std::int64_t, 4> gradient_pitches{};
  /// Heads that lse has, of which these are some.
  std::int64_t lse_heads = 0;
  bool backward = false;

  bool operator==(const AttentionGraphShape& other) const;
};

/// The operations of a graph, and what they refer to.
class AttentionGraph {
 public:
  /// `handle` null: for asking only (engine_configs with a described device).
  AttentionGraph(const AttentionGraphShape& shape, cudnnHandle_t handle);

  const Descriptor& graph() const { return graph_; }
  /// Tensors to bind.
  const std::vector<AttentionTensor>& bound() const { return bound_; }

 private:
  friend class GraphBuilder;
  std::vector<Descriptor> parts_;
  std::vector<AttentionTensor> bound_;
  Descriptor graph_;
};

/// A device as cuDNN's JSON describes it: an H100 SXM by default. For asking without a GPU.
Descriptor described_device(int multiprocessors = 132);

/// Engine configurations that cuDNN's heuristics offer, best first, without those whose sums depend
/// on the order in which blocks run. `device` null: the handle's.
std::vector<Descriptor> engine_configs(const AttentionGraph& graph, const Descriptor* device);

/// Bytes of workspace that a configuration takes.
std::int64_t workspace_of(const Descriptor& engine_config);

/// A compiled plan: the first configuration that the device takes.
class AttentionPlan {
 public:
  /// Throws std::runtime_error if no engine takes the graph.
  AttentionPlan(const AttentionGraphShape& shape, cudnnHandle_t handle);

  std::int64_t workspace_bytes() const { return workspace_bytes_; }
  const AttentionGraphShape& shape() const { return shape_; }
  /// `pointers` by AttentionTensor, device memory. `scale` of the scores.
  void run(cudnnHandle_t handle, const std::array<void*, 16>& pointers, float scale,
           void* workspace) const;

 private:
  AttentionGraphShape shape_;
  AttentionGraph graph_;
  Descriptor plan_;
  std::int64_t workspace_bytes_ = 0;
};

}  // namespace orrery::kernels::cuda
