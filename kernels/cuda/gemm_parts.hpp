#pragma once
// What launch(Gemm) is made of. Only .cu files include this.

#include "kernels/choose_gemm.hpp"
#include "kernels/cuda/launch.hpp"

namespace orrery::kernels::cuda {

/// False where cuBLASLt has no algorithm for the call; nothing is enqueued then.
bool launch_library(const Gemm& call, const LaunchContext& context);

/// The plan is one of hopper_plans().
void launch_hopper_fp8(const Gemm& call, const GemmPlan& plan, const LaunchContext& context);
void launch_hopper_bf16(const Gemm& call, const GemmPlan& plan, const LaunchContext& context);

void launch_plain(const Gemm& call, const GemmPlan& plan, const LaunchContext& context);

/// Runs a plan of ours; what choose_own_gemm and hopper_plans give.
void launch_own(const Gemm& call, const GemmPlan& plan, const LaunchContext& context);

}  // namespace orrery::kernels::cuda
