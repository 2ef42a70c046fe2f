// The GEMM kernels of kernels/cuda, run in the emulator, against sums in double.

#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda.h"
#include "gemm_cases.hpp"
#include "kernels/choose_gemm.hpp"
#include "kernels/cuda/gemm_parts.hpp"

namespace orrery::kernels {

namespace cuda {
void check(cudaError_t result, const char* what) {
  if (result != cudaSuccess) throw std::runtime_error(what);
}
}  // namespace cuda

namespace {

struct Mode {
  int sms = 3;
  bool late = false, backwards = false;
};

void run(const GemmProblem& problem, const GemmPlan& plan, const Mode& mode) {
  const std::unique_ptr<GemmOperand> d = problem.make_d();
  cuda::LaunchContext context;
  context.sms = mode.sms;
  context.limits = {mode.sms, kHopperSharedBytes, 0, 90};
  emulator::backwards = mode.backwards;
  emulator::hopper::be_late(mode.late);
  ASSERT_LE(plan.blocks, mode.sms);
  cuda::launch_own(problem.call(*d), plan, context);
  problem.compare(*d);
}

class EmulatedGemm : public testing::TestWithParam<NamedGemmCase> {};

/// All plans of the wgmma kernel, with one SM and with several, and in all orders of events.
TEST_P(EmulatedGemm, IsExact) {
  const GemmProblem problem(GetParam().c);
  std::vector<Mode> modes{{1, false, false}, {3, true, false}, {4, true, true}};
  if (GetParam().c.k > 1024) modes = {{2, true, false}};  // takes long
  for (const Mode& mode : modes) {
    const std::unique_ptr<GemmOperand> d = problem.make_d();
    const Gemm call = problem.call(*d);
    ASSERT_EQ(why_impossible(call), "");
    const std::vector<GemmPlan> all = hopper_plans(call, {mode.sms, kHopperSharedBytes, 90});
    EXPECT_EQ(all.size(), mode.sms == 1 ? GetParam().plans : 2 * GetParam().plans);
    for (const GemmPlan& plan : all) {
      SCOPED_TRACE(describe(plan) + ", " + std::to_string(mode.sms) + " SMs" +
                   (mode.late ? ", late" : "") + (mode.backwards ? ", backwards" : ""));
      ASSERT_NO_FATAL_FAILURE(run(problem, plan, mode));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Wgmma, EmulatedGemm, testing::ValuesIn(wgmma_cases()),
                         [](const auto& named) { return std::string(named.param.name); });

TEST(EmulatedPlainGemm, IsExact) {
  for (const NamedGemmCase& named : odd_cases()) {
    SCOPED_TRACE(named.name);
    const GemmProblem problem(named.c);
    const std::unique_ptr<GemmOperand> d = problem.make_d();
    ASSERT_EQ(why_impossible(problem.call(*d)), "");
    for (const int sms : {1, 3}) {
      const GemmPlan plan = choose_own_gemm(problem.call(*d), {sms, kHopperSharedBytes, 80});
      ASSERT_EQ(plan.path, GemmPath::plain);
      ASSERT_NO_FATAL_FAILURE(run(problem, plan, {sms, false, false}));
    }
  }
}

}  // namespace
}  // namespace orrery::kernels
