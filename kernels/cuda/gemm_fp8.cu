#include <stdexcept>

#include "kernels/cuda/gemm_hopper.cuh"
#include "kernels/cuda/gemm_parts.hpp"

namespace orrery::kernels::cuda {

namespace {

template <Scaling kScalingB, int kTileM, int kTileN>
bool launch_if(const Gemm& call, const GemmPlan& plan, const LaunchContext& context) {
  const TileLayout& t = plan.layout;
  if (t.scaling_b != kScalingB || t.tile_m != kTileM || t.tile_n != kTileN) return false;
  launch_hopper<HopperTraits<Element::e4m3, kScalingB, kTileM, kTileN>>(call, plan, context);
  return true;
}

}  // namespace

void launch_hopper_fp8(const Gemm& call, const GemmPlan& plan, const LaunchContext& context) {
  const bool launched = launch_if<Scaling::blocks, 128, 64>(call, plan, context) ||
                        launch_if<Scaling::blocks, 128, 128>(call, plan, context) ||
                        launch_if<Scaling::blocks, 128, 192>(call, plan, context) ||
                        launch_if<Scaling::blocks, 256, 128>(call, plan, context) ||
                        launch_if<Scaling::rows, 128, 64>(call, plan, context) ||
                        launch_if<Scaling::rows, 128, 128>(call, plan, context);
  if (!launched) throw std::logic_error("no kernel for " + describe(plan));
}

}  // namespace orrery::kernels::cuda
