#pragma once
// Every Call for real use on a CPU: vectorised loops over tiles, oneTBB for threads (as many as the
// surrounding task_arena has), OpenBLAS for products of FP32. Sums have an order that does not
// depend on the number of threads.

#include "kernels/call.hpp"

namespace orrery::kernels::cpu {

void run(const Gemm& call);
void run(const AttentionForward& call);
void run(const AttentionBackward& call);
void run(const NormForward& call);
void run(const NormBackward& call);
void run(const Rope& call);
void run(const HeadCopy& call);
void run(const ActivationForward& call);
void run(const ActivationBackward& call);
void run(const RowDot& call);
void run(const Quantize& call);
void run(const Dequantize& call);
void run(const Transpose& call);
void run(const Add& call);
void run(const Copy& call);
void run(const Router& call);
void run(const RouterBackward& call);
void run(const RoutingMap& call);
void run(const Permute& call);
void run(const Unpermute& call);
void run(const Embedding& call);
void run(const EmbeddingBackward& call);
void run(const CrossEntropyPartial& call);
void run(const CrossEntropyLoss& call);
void run(const CrossEntropyBackward& call);
void run(const AdamW& call);
void run(const SquareSum& call);
void run(const Fill& call);
void run(const Loopback& call);

/// Operands are in this process's memory.
inline void run(const Call& call) {
  std::visit([](const auto& c) { run(c); }, call);
}

}  // namespace orrery::kernels::cpu
