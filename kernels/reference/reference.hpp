#pragma once
// The truth: every Call in the plainest C++ that computes it, in double where it sums, one loop
// after the other, on one thread. Tests compare everything else with it.

#include "kernels/call.hpp"

namespace orrery::kernels::reference {

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

}  // namespace orrery::kernels::reference
