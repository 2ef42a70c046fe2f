#pragma once
// What a kernel's launcher gets, and one launcher for each Call. A launcher asks the host-side
// chooser of its family (kernels/choose_*.hpp, plain C++) what to run, and enqueues it; it neither
// allocates nor waits. Only .cu files include this.

#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/call.hpp"

namespace orrery::kernels::cuda {

/// Of the device, read once.
struct Limits {
  int sms = 0;
  int shared_bytes_per_block = 0;  ///< opt-in
  std::size_t l2_bytes = 0;
  int compute_capability = 0;  ///< 90 for Hopper
};

struct LaunchContext {
  cudaStream_t stream = nullptr;
  int sms = 0;  ///< it may use; never 0 here
  Limits limits;
  void* workspace = nullptr;  ///< this stream's own
  std::size_t workspace_bytes = 0;
  void* libraries = nullptr;  ///< handles of cuBLASLt and cuDNN, kernels/cuda/libraries.hpp
};

void launch(const Gemm& call, const LaunchContext& context);
void launch(const AttentionForward& call, const LaunchContext& context);
void launch(const AttentionBackward& call, const LaunchContext& context);
void launch(const NormForward& call, const LaunchContext& context);
void launch(const NormBackward& call, const LaunchContext& context);
void launch(const Rope& call, const LaunchContext& context);
void launch(const HeadCopy& call, const LaunchContext& context);
void launch(const ActivationForward& call, const LaunchContext& context);
void launch(const ActivationBackward& call, const LaunchContext& context);
void launch(const RowDot& call, const LaunchContext& context);
void launch(const Quantize& call, const LaunchContext& context);
void launch(const Dequantize& call, const LaunchContext& context);
void launch(const Transpose& call, const LaunchContext& context);
void launch(const Add& call, const LaunchContext& context);
void launch(const Copy& call, const LaunchContext& context);
void launch(const Router& call, const LaunchContext& context);
void launch(const RouterBackward& call, const LaunchContext& context);
void launch(const RoutingMap& call, const LaunchContext& context);
void launch(const Permute& call, const LaunchContext& context);
void launch(const Unpermute& call, const LaunchContext& context);
void launch(const Embedding& call, const LaunchContext& context);
void launch(const EmbeddingBackward& call, const LaunchContext& context);
void launch(const CrossEntropyPartial& call, const LaunchContext& context);
void launch(const CrossEntropyLoss& call, const LaunchContext& context);
void launch(const CrossEntropyBackward& call, const LaunchContext& context);
void launch(const AdamW& call, const LaunchContext& context);
void launch(const SquareSum& call, const LaunchContext& context);
void launch(const Fill& call, const LaunchContext& context);
void launch(const Loopback& call, const LaunchContext& context);

/// Throws std::runtime_error with the name of the error and of what was tried.
void check(cudaError_t result, const char* what);

}  // namespace orrery::kernels::cuda
