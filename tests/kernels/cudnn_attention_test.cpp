// cuDNN's engines for the attention graphs, asked for on a described H100: no GPU is needed.
// Skipped where cuDNN, or anything that passes for libcuda, is missing.

#include <gtest/gtest.h>

#ifndef ORRERY_HAS_CUDNN

TEST(CudnnAttention, IsThere) {
  GTEST_SKIP() << "built without cuDNN";
}

#else

#include <dlfcn.h>

#include "kernels/cuda/cudnn_attention.hpp"

namespace orrery::kernels::cuda {
namespace {

struct Case {
  const char* name;
  AttentionShape shape;
};

class CudnnAttention : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL) != nullptr) return;
#ifdef ORRERY_CUDA_STUB
    // Its name is libcuda.so.1, so that who looks for that finds it loaded.
    if (dlopen(ORRERY_CUDA_STUB, RTLD_NOW | RTLD_GLOBAL) != nullptr) return;
#endif
    GTEST_SKIP() << "no libcuda, and no stub of it";
  }

  static AttentionGraphShape contiguous(const AttentionShape& s, bool backward) {
    AttentionGraphShape graph;
    graph.shape = s;
    graph.pitches = {s.heads * s.d_qk, s.kv_heads * s.d_qk, s.kv_heads * s.d_v, s.heads * s.d_v};
    graph.gradient_pitches = {s.heads * s.d_v, s.heads * s.d_qk, s.kv_heads * s.d_qk,
                              s.kv_heads * s.d_v};
    graph.lse_heads = s.heads;
    graph.backward = backward;
    return graph;
  }
};

TEST_P(CudnnAttention, HasAnEngineForwards) {
  const AttentionGraph graph(contiguous(GetParam().shape, false), nullptr);
  const Descriptor device = described_device();
  EXPECT_FALSE(engine_configs(graph, &device).empty());
}

TEST_P(CudnnAttention, HasAnEngineBackwardsWithSumsOfAFixedOrderThatTakesTheWorkspaceWeExpect) {
  const AttentionShape& shape = GetParam().shape;
  const AttentionGraph graph(contiguous(shape, true), nullptr);
  const Descriptor device = described_device();
  const std::vector<Descriptor> configs = engine_configs(graph, &device);
  ASSERT_FALSE(configs.empty());
  for (const Descriptor& config : configs) {
    EXPECT_GE(workspace_of(config), cudnn_backward_bytes(shape) - 256);
    EXPECT_LE(workspace_of(config), cudnn_backward_bytes(shape));
  }
}

/// A piece of a wider call: some heads of one sequence, with the pitches of all.
TEST_P(CudnnAttention, TakesPiecesOfHeads) {
  const AttentionShape& whole = GetParam().shape;
  AttentionGraphShape graph = contiguous(whole, true);
  const std::int64_t bytes = cudnn_backward_bytes(whole) / whole.kv_heads / whole.batch * 2;
  const AttentionPiece piece = choose_piece(whole, bytes);
  ASSERT_GT(piece.heads, 0);
  graph.shape.batch = piece.batch;
  graph.shape.heads = piece.heads;
  graph.shape.kv_heads = piece.heads / (whole.heads / whole.kv_heads);
  const AttentionGraph pieces(graph, nullptr);
  const Descriptor device = described_device();
  const std::vector<Descriptor> configs = engine_configs(pieces, &device);
  ASSERT_FALSE(configs.empty());
  EXPECT_LE(workspace_of(configs.front()), bytes);
}

AttentionShape shape_of(std::int64_t batch, std::int64_t heads, std::int64_t kv_heads,
                        std::int64_t q_len, std::int64_t kv_len, std::int64_t d_qk,
                        std::int64_t d_v, bool causal = true) {
  return {.batch = batch,
          .heads = heads,
          .kv_heads = kv_heads,
          .q_len = q_len,
          .kv_len = kv_len,
          .d_qk = d_qk,
          .d_v = d_v,
          .causal = causal};
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudnnAttention,
    ::testing::Values(Case{"DeepSeekV3", shape_of(1, 128, 128, 4096, 4096, 192, 128)},
                      Case{"DeepSeekV3Short", shape_of(2, 128, 128, 1024, 1024, 192, 128)},
                      Case{"DeepSeekV3Odd", shape_of(1, 16, 16, 333, 333, 192, 128)},
                      Case{"Llama3Heads", shape_of(1, 32, 32, 4096, 4096, 128, 128)},
                      Case{"Llama3Grouped", shape_of(1, 32, 8, 8192, 8192, 128, 128)},
                      Case{"Small", shape_of(4, 12, 12, 1024, 1024, 64, 64)},
                      Case{"SmallGroupedOdd", shape_of(2, 8, 2, 1000, 1000, 64, 64)},
                      Case{"MoreKeysThanQueries", shape_of(1, 8, 8, 256, 768, 192, 128)},
                      Case{"NotCausal", shape_of(1, 8, 8, 512, 512, 128, 128, false)}),
    [](const ::testing::TestParamInfo<Case>& one) { return one.param.name; });

/// What the source of cudnn_backward_bytes logged: 64.01 GiB and 256.02 GiB could not be allocated.
TEST(CudnnBackwardBytes, AreThoseThatDidNotFitOnAnH200) {
  const double gib = 1024.0 * 1024.0 * 1024.0;
  const auto bytes = [&](std::int64_t length) {
    return static_cast<double>(
        cudnn_backward_bytes(shape_of(1, 128, 128, length, length, 192, 128)));
  };
  EXPECT_NEAR(bytes(16384) / gib, 64.01, 0.02);
  EXPECT_NEAR(bytes(32768) / gib, 256.02, 0.04);
}

}  // namespace
}  // namespace orrery::kernels::cuda

#endif
