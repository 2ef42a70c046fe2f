#include "calibrate/shape_calls.hpp"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>

#include "models/scenario.hpp"
#include "models/step.hpp"
#include "tests/calibrate/known_device.hpp"

namespace orrery {
namespace {

bool is_compute(const Shape& shape) {
  return std::holds_alternative<Gemm>(shape.work) ||
         std::holds_alternative<AttentionCore>(shape.work) ||
         std::holds_alternative<Streaming>(shape.work);
}

class ScenarioShapes : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { device_.copies = false; }

  static Scenario scenario() {
    return read_scenario(std::string(ORRERY_SOURCE_DIR) + "/scenarios/" + GetParam() + ".yaml");
  }

  KnownDevice device_{132};
};

/// Operations and bytes of the calls of one op.
kernels::Cost cost_of(const OpCalls& calls) {
  kernels::Cost sum;
  for (const kernels::Call& call : calls) {
    const kernels::Cost cost = kernels::cost_of(call);
    sum.flops += cost.flops;
    sum.bytes += cost.bytes;
  }
  return sum;
}

/// Every op of the step has calls that are possible, with the operations that the shape counts and
/// bytes like those that it counts: layer_work.cpp and shape_calls.cpp derive both by themselves.
TEST_P(ScenarioShapes, HaveCallsOfTheSameWork) {
  const Scenario s = scenario();
  const Program program = build_step(s);
  Scratch scratch(device_, std::int64_t{1} << 30, std::int64_t{1} << 42, 1);
  const OpSetting setting{&s.model, &s.plan};
  int seen = 0;
  for (const Shape& shape : program.shapes()) {
    if (!is_compute(shape)) continue;
    ++seen;
    scratch.begin_op();
    const auto calls = calls_of(shape, setting, scratch);
    ASSERT_TRUE(calls.has_value()) << shape.label << " " << describe(shape);
    ASSERT_FALSE(calls->empty());
    for (const kernels::Call& call : *calls) {
      EXPECT_EQ(kernels::why_impossible(call), "") << shape.label << " " << describe(shape);
    }
    const kernels::Cost cost = cost_of(*calls);
    if (!std::holds_alternative<Streaming>(shape.work)) {
      // Experts' rows are padded to whole tiles in FP8.
      EXPECT_GE(cost.flops / flops_of(shape), 0.999) << shape.label << " " << describe(shape);
      EXPECT_LE(cost.flops / flops_of(shape), 1.1) << shape.label << " " << describe(shape);
    }
    const auto* streaming = std::get_if<Streaming>(&shape.work);
    // The router's shape stands for three dozen small kernels of other people, ours is one; a table
    // is counted whole by its call and by the rows that are touched in the shape.
    if (streaming != nullptr && (streaming->kind == StreamingKind::router ||
                                 streaming->kind == StreamingKind::embedding_forward ||
                                 streaming->kind == StreamingKind::embedding_backward)) {
      continue;
    }
    // Our rotation is in place and leaves MLA's heads alone but for their rotary part; the shape
    // has whole heads, as DeepSeek's kernel rewrites them.
    const bool partial = streaming != nullptr && streaming->kind == StreamingKind::rope &&
                         s.model.attention.mla.has_value();
    EXPECT_GT(cost.bytes / bytes_of(shape), partial ? 0.3 : 0.65)
        << shape.label << " " << describe(shape);
    EXPECT_LT(cost.bytes / bytes_of(shape), 1.6) << shape.label << " " << describe(shape);
  }
  EXPECT_GT(seen, 20);
}

INSTANTIATE_TEST_SUITE_P(All, ScenarioShapes,
                         testing::Values("deepseek_v3_2048_h800", "deepseek_v2_2048_h800",
                                         "gpt3_175b_64_a100", "llama3_405b_576_h100",
                                         "llama3_70b_64_h100", "mixtral_8x7b_64_h100",
                                         "qwen3_235b_256_h100"),
                         [](const auto& param_info) { return std::string(param_info.param); });

}  // namespace
}  // namespace orrery
