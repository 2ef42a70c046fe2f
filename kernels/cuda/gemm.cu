#include "kernels/choose_gemm.hpp"
#include "kernels/cuda/gemm_parts.hpp"
#include "kernels/cuda/launch.hpp"

namespace orrery::kernels::cuda {

void launch(const Gemm& call, const LaunchContext& context) {
  if (call.d.rows == 0 || call.d.columns == 0) return;
  const GemmDevice device{context.sms, context.limits.shared_bytes_per_block,
                          context.limits.compute_capability};
  const GemmPlan plan = choose_gemm(call, device);
  if (plan.path != GemmPath::library) {
    launch_own(call, plan, context);
  } else if (!launch_library(call, context)) {
    launch_own(call, choose_own_gemm(call, device), context);
  }
}

}  // namespace orrery::kernels::cuda
