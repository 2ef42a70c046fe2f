#include <stdexcept>

#include "kernels/cuda/gemm_hopper.cuh"
#include "kernels/cuda/gemm_parts.hpp"

namespace orrery::kernels::cuda {

namespace {

template <int kTileM, Major kMajorA, Major kMajorB>
bool launch_if(const Gemm& call, const GemmPlan& plan, const LaunchContext& context) {
  if (plan.layout.tile_m != kTileM || plan.layout.tile_n != 128 ||
      call.a_transposed != (kMajorA == Major::other) ||
      call.b_transposed != (kMajorB == Major::other)) {
    return false;
  }
  launch_hopper<HopperTraits<Element::bf16, Scaling::none, kTileM, 128, kMajorA, kMajorB>>(
      call, plan, context);
  return true;
}

}  // namespace

void launch_hopper_bf16(const Gemm& call, const GemmPlan& plan, const LaunchContext& context) {
  constexpr Major kContraction = Major::contraction, kOther = Major::other;
  const bool launched = launch_if<128, kContraction, kContraction>(call, plan, context) ||
                        launch_if<256, kContraction, kContraction>(call, plan, context) ||
                        launch_if<128, kContraction, kOther>(call, plan, context) ||
                        launch_if<256, kContraction, kOther>(call, plan, context) ||
                        launch_if<128, kOther, kOther>(call, plan, context) ||
                        launch_if<256, kOther, kOther>(call, plan, context);
  if (!launched) throw std::logic_error("no kernel for " + describe(plan));
}

}  // namespace orrery::kernels::cuda
