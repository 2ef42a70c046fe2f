#include "calibrate/shape_calls.hpp"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <tuple>

#include "calibrate/execute/lowering.hpp"
#include "models/scenario.hpp"
#include "models/step.hpp"
#include "tests/calibrate/known_device.hpp"
#include "tests/calibrate/toy_scenarios.hpp"

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
    // A recast whose input was not kept in FP8 quantises it first, which the shape does not count.
    const bool recast = shape.label.find(" input recast") != std::string::npos;
    EXPECT_LT(cost.bytes / bytes_of(shape), recast ? 2.5 : 1.6)
        << shape.label << " " << describe(shape);
  }
  EXPECT_GT(seen, 20);
}

INSTANTIATE_TEST_SUITE_P(All, ScenarioShapes,
                         testing::Values("deepseek_v3_2048_h800", "deepseek_v2_2048_h800",
                                         "gpt3_175b_64_a100", "llama3_405b_576_h100",
                                         "llama3_70b_64_h100", "mixtral_8x7b_64_h100",
                                         "qwen3_235b_256_h100"),
                         [](const auto& param_info) { return std::string(param_info.param); });

std::vector<std::string> described(const std::vector<kernels::Call>& calls, bool names_only) {
  std::vector<std::string> text;
  for (const kernels::Call& call : calls) {
    text.push_back(names_only ? std::string(kernels::name_of(call)) : kernels::describe(call));
  }
  return text;
}

bool sized_by_routing(const std::string& label) {
  for (const char* word : {"routed", "expert permute", "expert gradient permute", "expert reduce",
                           "expert gradient reduce", "routing map", "router weight gradient"}) {
    if (label.find(word) != std::string::npos) return true;
  }
  return false;
}

/// What calibration times is what the executor runs: the same calls in the same order.
class LikeTheExecutor
    : public testing::TestWithParam<std::tuple<const char*, const char*, const char*>> {};

/// What the optimizer touches; the executor goes stage by stage, and updates norms apart.
std::int64_t optimizer_elements(const std::vector<kernels::Call>& calls) {
  std::int64_t elements = 0;
  for (const kernels::Call& call : calls) {
    if (const auto* adam = std::get_if<kernels::AdamW>(&call)) elements += adam->elements;
    if (const auto* sum = std::get_if<kernels::SquareSum>(&call)) elements += sum->elements;
    if (const auto* fill = std::get_if<kernels::Fill>(&call)) elements += fill->bytes / 4;
  }
  return elements;
}

TEST_P(LikeTheExecutor, CallsAreThoseOfALoweredStep) {
  const auto [precision, layout, recompute] = GetParam();
  const Scenario s = toy_scenario(precision, layout, recompute);
  ASSERT_TRUE(why_not_executable(s).empty()) << why_not_executable(s)[0];
  const Program program = build_step(s, {.all_ranks = true});
  KnownDevice device;
  Tensors tensors(device);
  const Lowered lowered = lower(s, program, RankId(0), tensors);
  Scratch scratch(device, 1 << 20, std::int64_t{1} << 40, 1);
  std::map<ShapeId, OpCalls> made;
  std::set<std::string> seen;
  for (const LoweredOp& op : lowered.ops) {
    const ShapeId id = program.shape(op.op);
    const Shape& shape = program.shapes()[id];
    if (!is_compute(shape)) continue;
    if (!made.contains(id)) {
      const auto calls = calls_of(shape, {&s.model, &s.plan}, scratch);
      ASSERT_TRUE(calls.has_value()) << shape.label;
      made[id] = *calls;
    }
    seen.insert(shape.label);
    if (shape.label == "AdamW" || shape.label == "gradient norm") {
      const auto elements = static_cast<double>(optimizer_elements(made[id]));
      EXPECT_NEAR(static_cast<double>(optimizer_elements(op.calls)) / elements, 1, 0.01);
      continue;
    }
    // Operands that routing sizes have room for the worst case there, and the even case's rows
    // here.
    const bool names_only = sized_by_routing(shape.label);
    EXPECT_EQ(described(made[id], names_only), described(op.calls, names_only))
        << shape.label << " " << describe(shape);
  }
  EXPECT_GT(seen.size(), 40u);
}

INSTANTIATE_TEST_SUITE_P(All, LikeTheExecutor,
                         testing::Values(std::tuple{"fp32", "dp: 1", "none"},
                                         std::tuple{"bf16", "tp: 2, dp: 1", "selective"},
                                         std::tuple{"bf16", "dp: 2, ep: 2", "full"},
                                         std::tuple{"fp8_deepseek", "dp: 1", "none"},
                                         std::tuple{"fp8_deepseek", "dp: 2, ep: 2", "deepseek"},
                                         std::tuple{"fp8_deepseek", "dp: 2, ep: 2", "full"}));

}  // namespace
}  // namespace orrery
