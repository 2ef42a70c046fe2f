#include "kernels/choose_gemm.hpp"
#include "kernels/cuda/gemm_parts.hpp"

namespace orrery::kernels::cuda {

void launch_own(const Gemm& call, const GemmPlan& plan, const LaunchContext& context) {
  if (plan.path == GemmPath::plain) {
    launch_plain(call, plan, context);
  } else if (call.a.format == Format::e4m3) {
    launch_hopper_fp8(call, plan, context);
  } else {
    launch_hopper_bf16(call, plan, context);
  }
}

}  // namespace orrery::kernels::cuda
