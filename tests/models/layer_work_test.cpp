// The kernels of a layer, against the arithmetic of the model: FLOPs from parameter counts, kernel
// counts from DeepSeek's published trace (deepseek-ai/profile-data, train), bytes from closed
// forms.

#include "models/layer_work.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <functional>
#include <string>

namespace orrery {
namespace {

Model deepseek_v3() {
  Problems problems;
  Model model = read_model(
      read_document(ORRERY_SOURCE_DIR "/scenarios/models/deepseek_v3.yaml", problems), problems);
  problems.throw_if_any();
  return model;
}

/// The published layout of one rank (arXiv 2412.19437, sections 3.2 and 3.3).
Plan deepseek_plan() {
  Plan plan;
  plan.parallelism = {.pp = 16, .dp = 128, .ep = 64};
  plan.schedule = ScheduleKind::dual_pipe;
  plan.sequence_length = 4096;
  plan.global_batch_sequences = 15360;
  plan.precision = make_precision(PrecisionKind::fp8_deepseek);
  plan.recompute = {.norms = true, .mla_up_projection = true, .activation = true};
  plan.communication_sms = 20;
  return plan;
}

double gemm_flops(const Work& work, Pass pass) {
  double flops = 0;
  for (const WorkItem& item : work) {
    const Gemm* g = std::get_if<Gemm>(&item.shape.work);
    if (g != nullptr && g->pass == pass) flops += flops_of(item.shape);
  }
  return flops;
}

int count(const Work& work, const std::function<bool(const Shape&)>& which) {
  return static_cast<int>(std::count_if(work.begin(), work.end(),
                                        [&](const WorkItem& item) { return which(item.shape); }));
}

bool is_streaming(const Shape& s, StreamingKind kind) {
  const Streaming* streaming = std::get_if<Streaming>(&s.work);
  return streaming != nullptr && streaming->kind == kind;
}

int count_streaming(const Work& work, StreamingKind kind, const std::string& ending = "") {
  return count(work, [&](const Shape& s) {
    return is_streaming(s, kind) && s.label.size() >= ending.size() &&
           s.label.compare(s.label.size() - ending.size(), ending.size(), ending) == 0;
  });
}

// A linear layer of N parameters costs 2 N FLOPs a token in each of the three passes; a token meets
// top_k experts of E. Norm gains (7168 + 7168 + 1536 + 512) are no GEMMs.
TEST(LayerWork, EachPassOfAnExpertLayerCostsTwoFlopsPerActiveParameterAndToken) {
  const Model model = deepseek_v3();
  const LayerWork w = transformer_layer(model, deepseek_plan(), 8, true);
  const double attention =
      7168. * 1536 + 1536. * 24576 + 7168. * 576 + 512. * 32768 + 16384. * 7168;
  const double experts = 9 * 3. * 7168 * 2048;
  const double router = 256. * 7168;
  const double flops = 2 * 4096. * (attention + experts + router);
  EXPECT_DOUBLE_EQ(
      gemm_flops(w.attn_forward, Pass::forward) + gemm_flops(w.mlp_forward, Pass::forward), flops);
  EXPECT_DOUBLE_EQ(gemm_flops(w.attn_backward, Pass::backward_input) +
                       gemm_flops(w.mlp_backward, Pass::backward_input),
                   flops);
  EXPECT_DOUBLE_EQ(gemm_flops(w.attn_weight, Pass::backward_weight) +
                       gemm_flops(w.mlp_weight, Pass::backward_weight) +
                       gemm_flops(w.attn_backward, Pass::backward_weight),  // the router's
                   flops);
}

TEST(LayerWork, RecomputationRepeatsJustTheUpProjections) {
  const LayerWork w = transformer_layer(deepseek_v3(), deepseek_plan(), 8, true);
  EXPECT_DOUBLE_EQ(gemm_flops(w.attn_backward, Pass::forward),
                   2 * 4096. * (1536. * 24576 + 512. * 32768));
  EXPECT_EQ(gemm_flops(w.mlp_backward, Pass::forward), 0);
}

// Counts per layer of the published trace: trace_train kernels by phase. Where we count less,
// ARCHITECTURE says what is left out.
TEST(LayerWork, RunsTheKernelsThatThePublishedTraceShows) {
  const LayerWork w = transformer_layer(deepseek_v3(), deepseek_plan(), 8, true);
  using K = StreamingKind;
  EXPECT_EQ(count_streaming(w.attn_forward, K::quantize), 6);
  EXPECT_EQ(count_streaming(w.attn_forward, K::norm_forward), 4);
  EXPECT_EQ(count_streaming(w.attn_forward, K::pack_e5m6), 1);
  EXPECT_EQ(count_streaming(w.attn_backward, K::quantize), 7);
  EXPECT_EQ(count_streaming(w.attn_backward, K::norm_forward), 3);
  EXPECT_EQ(count_streaming(w.attn_backward, K::norm_backward), 4);
  EXPECT_EQ(count_streaming(w.attn_backward, K::transpose, "recast"), 10);
  EXPECT_EQ(count_streaming(w.attn_backward, K::transpose, "weight transpose"), 5);
  EXPECT_EQ(count_streaming(w.attn_backward, K::copy), 4);  // 3 concatenations, one plain copy
  EXPECT_EQ(count_streaming(w.attn_backward, K::dequantize), 1);
  EXPECT_EQ(count_streaming(w.mlp_forward, K::transpose, "weight transpose"), 2);
  EXPECT_EQ(count_streaming(w.mlp_forward, K::permute), 1);
  EXPECT_EQ(count_streaming(w.mlp_forward, K::unpermute), 1);
  EXPECT_EQ(count_streaming(w.mlp_backward, K::transpose, "recast"), 6);
  EXPECT_EQ(count_streaming(w.mlp_backward, K::transpose, "weight transpose"), 2);
  EXPECT_EQ(count_streaming(w.mlp_backward, K::activation_backward), 2);
  EXPECT_EQ(count_streaming(w.mlp_backward, K::quantize), 3);
  EXPECT_EQ(count_streaming(w.mlp_weight, K::transpose, "recast"), 2);
  const auto gemm = [](const Shape& s) { return std::holds_alternative<Gemm>(s.work); };
  EXPECT_EQ(count(w.attn_forward, gemm), 6);   // q_a, kv_a, q_b, kv_b, o, gate
  EXPECT_EQ(count(w.attn_backward, gemm), 9);  // 5 input gradients, 2 recomputed, 2 of the gate
  EXPECT_EQ(count(w.attn_weight, gemm), 5);
  EXPECT_EQ(count(w.mlp_forward, gemm), 4);
  EXPECT_EQ(count(w.mlp_backward, gemm), 4);
  EXPECT_EQ(count(w.mlp_weight, gemm), 4);
  EXPECT_EQ(count_streaming(w.combine_backward, K::quantize), 1);
}

TEST(LayerWork, ExpertRowsAreBalancedOverTheGroup) {
  const LayerWork w = transformer_layer(deepseek_v3(), deepseek_plan(), 8, true);
  for (const WorkItem& item : w.mlp_forward) {
    if (item.shape.label != "routed_up") continue;
    const Gemm& g = std::get<Gemm>(item.shape.work);
    EXPECT_EQ(g.groups, 4);  // 256 experts over 64 GPUs
    EXPECT_EQ(g.m, 8192);    // 64 x 4096 tokens x 8 of 256 experts
    EXPECT_EQ(g.n, 2 * 2048);
    EXPECT_EQ(g.k, 7168);
  }
}

TEST(LayerWork, RowsFollowTheLoadOfTheGpu) {
  const LayerWork w = transformer_layer(deepseek_v3(), deepseek_plan(), 8, true, 1.25);
  for (const WorkItem& item : w.mlp_weight) {
    if (item.shape.label != "routed_down") continue;
    EXPECT_EQ(std::get<Gemm>(item.shape.work).k, 10240);  // 1.25 x 8192 rows
  }
  // The shared expert and attention do not depend on the routing.
  const LayerWork balanced = transformer_layer(deepseek_v3(), deepseek_plan(), 8, true);
  EXPECT_EQ(gemm_flops(w.attn_forward, Pass::forward),
            gemm_flops(balanced.attn_forward, Pass::forward));
  const double routed = 8 * 3. * 7168 * 2048 * 2 * 4096;
  EXPECT_DOUBLE_EQ(gemm_flops(w.mlp_forward, Pass::forward),
                   gemm_flops(balanced.mlp_forward, Pass::forward) + 0.25 * routed);
}

// What is marked as sized by the plan alone has the same shape at every load, there are as many
// operations at each, and every GEMM of routed experts is marked as sized by their rows.
TEST(LayerWork, OnlyWhatIsMarkedFollowsTheLoad) {
  for (const bool full : {false, true}) {
    for (const std::int64_t expert_tp : {1, 2}) {
      Plan plan = deepseek_plan();
      plan.recompute.full = full;
      plan.parallelism.expert_tp = expert_tp;
      const LayerWork a = transformer_layer(deepseek_v3(), plan, 8, true);
      const LayerWork b = transformer_layer(deepseek_v3(), plan, 8, true, 1.5);
      std::size_t differ = 0;
      for (Work LayerWork::*part :
           {&LayerWork::attn_forward, &LayerWork::dispatch_forward, &LayerWork::mlp_forward,
            &LayerWork::combine_forward, &LayerWork::combine_backward, &LayerWork::mlp_backward,
            &LayerWork::mlp_weight, &LayerWork::dispatch_backward, &LayerWork::attn_backward,
            &LayerWork::attn_weight}) {
        ASSERT_EQ((a.*part).size(), (b.*part).size());
        for (std::size_t i = 0; i < (a.*part).size(); ++i) {
          const WorkItem& x = (a.*part)[i];
          const WorkItem& y = (b.*part)[i];
          EXPECT_EQ(x.shape.label, y.shape.label);
          EXPECT_EQ(x.sized_by, y.sized_by);
          const bool differs = x.shape != y.shape;
          differ += differs;
          EXPECT_FALSE(differs && x.sized_by == SizedBy::plan) << x.shape.label;
          if (x.shape.label.rfind("routed", 0) == 0 && std::holds_alternative<Gemm>(x.shape.work)) {
            EXPECT_EQ(x.sized_by, SizedBy::expert_rows) << x.shape.label;
          }
        }
      }
      EXPECT_GT(differ, 20u);
    }
  }
}

TEST(LayerWork, FewTokensOnManyExpertsStillRunOneRowEach) {
  Plan plan = deepseek_plan();
  plan.parallelism.ep = 1;
  plan.sequence_length = 8;
  const LayerWork w = transformer_layer(deepseek_v3(), plan, 8, true);
  for (const WorkItem& item : w.mlp_forward) {
    const Gemm* g = std::get_if<Gemm>(&item.shape.work);
    if (g == nullptr) continue;
    EXPECT_GE(g->m, 1) << item.shape.label;
  }
}

TEST(LayerWork, GradientsAreDispatchedInFp8AndCombinedInBf16) {
  const LayerWork w = transformer_layer(deepseek_v3(), deepseek_plan(), 8, true);
  const auto exchange = [](const Work& work) {
    return std::get<ExpertExchange>(work.back().shape.work);
  };
  EXPECT_EQ(exchange(w.dispatch_forward).format, NumberFormat::fp8_block);
  EXPECT_TRUE(exchange(w.dispatch_forward).new_layout);
  EXPECT_EQ(exchange(w.combine_forward).format, NumberFormat::bf16);
  EXPECT_EQ(exchange(w.combine_backward).format, NumberFormat::fp8_block);
  EXPECT_FALSE(exchange(w.combine_backward).combine);
  EXPECT_FALSE(exchange(w.combine_backward).new_layout);
  EXPECT_TRUE(exchange(w.dispatch_backward).combine);
  EXPECT_EQ(exchange(w.dispatch_forward).node_limit, 4);
}

TEST(LayerWork, Bf16NeedsNoQuantisationAndNoTransposes) {
  Plan plan = deepseek_plan();
  plan.precision = make_precision(PrecisionKind::bf16);
  const LayerWork w = transformer_layer(deepseek_v3(), plan, 8, true);
  for (const Work* work : {&w.attn_forward, &w.mlp_forward, &w.mlp_backward, &w.attn_backward,
                           &w.mlp_weight, &w.attn_weight, &w.combine_backward}) {
    EXPECT_EQ(count_streaming(*work, StreamingKind::quantize), 0);
    EXPECT_EQ(count_streaming(*work, StreamingKind::transpose), 0);
    EXPECT_EQ(count_streaming(*work, StreamingKind::dequantize), 0);
  }
}

TEST(LayerWork, TensorParallelRanksShareTheWorkEvenly) {
  Problems problems;
  const Model llama = read_model(
      read_document(ORRERY_SOURCE_DIR "/scenarios/models/llama3_70b.yaml", problems), problems);
  problems.throw_if_any();
  Plan plan;
  plan.sequence_length = 8192;
  plan.global_batch_sequences = 8;
  const LayerWork whole = transformer_layer(llama, plan, 8, false);
  plan.parallelism.tp = 8;
  const LayerWork shard = transformer_layer(llama, plan, 8, false);
  for (auto part : {&LayerWork::attn_forward, &LayerWork::mlp_forward, &LayerWork::mlp_backward,
                    &LayerWork::mlp_weight}) {
    for (Pass pass : {Pass::forward, Pass::backward_input, Pass::backward_weight}) {
      EXPECT_DOUBLE_EQ(gemm_flops(whole.*part, pass), 8 * gemm_flops(shard.*part, pass));
    }
  }
  // Korthikanti et al. (arXiv 2205.05198), section 4.2.2: two all-gathers and two reduce-scatters
  // forward.
  const auto collective = [](const Shape& s) { return std::holds_alternative<Collective>(s.work); };
  EXPECT_EQ(count(shard.attn_forward, collective) + count(shard.mlp_forward, collective), 4);
  EXPECT_EQ(count(whole.attn_forward, collective) + count(whole.mlp_forward, collective), 0);
}

// Context parallelism balances causal work: cp ranks together execute as many products as one
// would.
TEST(LayerWork, ContextParallelRanksExecuteTheCausalHalfTogether) {
  Problems problems;
  const Model llama = read_model(
      read_document(ORRERY_SOURCE_DIR "/scenarios/models/llama3_8b.yaml", problems), problems);
  problems.throw_if_any();
  const auto core_flops = [&](std::int64_t cp) {
    Plan plan;
    plan.sequence_length = 8192;
    plan.parallelism.cp = cp;
    const LayerWork w = transformer_layer(llama, plan, 8, false);
    double flops = 0;
    for (const WorkItem& item : w.attn_forward) {
      if (std::holds_alternative<AttentionCore>(item.shape.work)) flops += flops_of(item.shape);
    }
    return flops;
  };
  EXPECT_DOUBLE_EQ(core_flops(1), 4 * core_flops(4));
  EXPECT_DOUBLE_EQ(core_flops(1), 2. * 32 * (128 + 128) * (8192. * 8193 / 2));
}

// Saved bytes of one token of an expert layer under the published recipe, added up by hand:
// residual stream twice in BF16 (2 x 14336), latents (1536 + 512 + 64) in BF16, log-sum-exp of 128
// heads, E5M6 output of 16384 elements (12 bits and a 4-byte scale per 128), 256 FP32 scores, eight
// rows dispatched in FP8 (7168 + 224), SwiGLU inputs of eight routed rows and the shared expert in
// FP8 (4096 + 128 each).
TEST(LayerWork, KeepsWhatTheReportSaysItKeeps) {
  const LayerWork w = transformer_layer(deepseek_v3(), deepseek_plan(), 8, true);
  const double per_token = 2 * 14336 + 2 * 2112 + 4 * 128 + 16384 * 1.5 + 128 * 4 + 4 * 256 +
                           8 * (7168 + 224) + 9 * (4096 + 128);
  EXPECT_NEAR(static_cast<double>(w.memory.saved_bytes), 4096 * per_token, 1e-3 * 4096 * per_token);
}

TEST(LayerWork, FullRecomputationKeepsTheInputOnly) {
  Plan plan = deepseek_plan();
  plan.recompute = {.full = true};
  const LayerWork w = transformer_layer(deepseek_v3(), plan, 8, true);
  EXPECT_EQ(w.memory.saved_bytes, 2 * 4096 * 7168);
  EXPECT_DOUBLE_EQ(
      gemm_flops(w.combine_backward, Pass::forward),
      gemm_flops(w.attn_forward, Pass::forward) + gemm_flops(w.mlp_forward, Pass::forward));
}

const Collective* find_collective(const Work& work, const std::string& label) {
  for (const WorkItem& item : work) {
    if (item.shape.label == label) return std::get_if<Collective>(&item.shape.work);
  }
  return nullptr;
}

// Megatron-LM splits the vocabulary: partial rows of the embedding are added up and scattered over
// the sequence, and the loss needs three numbers of each rank for each token (the largest logit,
// the sum of exponentials, the target's logit).
TEST(LayerWork, TensorParallelRanksAddUpWhatTheyHaveOfTheVocabulary) {
  const Model model = deepseek_v3();
  Plan plan = deepseek_plan();
  plan.parallelism = {.tp = 4, .dp = 2};
  plan.precision = make_precision(PrecisionKind::bf16);
  const EdgeWork embedding = embedding_work(model, plan, 8);
  const Collective* reduce = find_collective(embedding.forward, "embedding reduce");
  ASSERT_NE(reduce, nullptr);
  EXPECT_EQ(reduce->kind, CollectiveKind::reduce_scatter);
  EXPECT_EQ(reduce->bytes, 2 * 4096 * 7168);
  const Collective* gather = find_collective(embedding.backward, "embedding gradient gather");
  ASSERT_NE(gather, nullptr);
  EXPECT_EQ(gather->kind, CollectiveKind::all_gather);
  const EdgeWork head = head_work(model, plan, 8);
  const Collective* loss = find_collective(head.forward, "cross-entropy gather");
  ASSERT_NE(loss, nullptr);
  EXPECT_EQ(loss->bytes, 4 * 4096 * 3 * 4);
  plan.parallelism.sequence_parallel = false;
  reduce = nullptr;
  const EdgeWork replicated = embedding_work(model, plan, 8);
  reduce = find_collective(replicated.forward, "embedding reduce");
  ASSERT_NE(reduce, nullptr);
  EXPECT_EQ(reduce->kind, CollectiveKind::all_reduce);
  EXPECT_EQ(find_collective(replicated.backward, "embedding gradient gather"), nullptr);
}

// With sequence parallelism norms, the router (its 256 biases too) and the latent down-projections
// see a part of the tokens on each rank, so that their gradients are partial sums. They are not
// split.
TEST(LayerWork, TensorParallelRanksSumGradientsOfWhatTheyAllHold) {
  const Model model = deepseek_v3();
  Plan plan = deepseek_plan();
  plan.parallelism = {.tp = 4, .dp = 2};
  const std::int64_t down = 7168 * (1536 + 512 + 64);
  const std::int64_t norms = 2 * 7168 + 1536 + 512;
  const std::int64_t router = 256 * 7168 + 256;
  EXPECT_EQ(layer_shard(model, plan, true).tensor_summed, down + norms + router);
  EXPECT_EQ(layer_shard(model, plan, false).tensor_summed, down + norms);
  const std::int64_t split = 1536 * 24576 + 512 * 32768 + 16384 * 7168 + 3 * 7168 * 18432;
  EXPECT_EQ(layer_shard(model, plan, false).dense, split / 4 + down + norms);
  plan.parallelism.sequence_parallel = false;
  EXPECT_EQ(layer_shard(model, plan, true).tensor_summed, 0);
  plan.parallelism = {.dp = 8};
  EXPECT_EQ(layer_shard(model, plan, true).tensor_summed, 0);
}

// FP32 has twice the bytes of BF16 wherever a kernel reads or writes activations, and nothing is
// quantised.
TEST(LayerWork, FullPrecisionMovesTwiceTheBytesOfHalf) {
  const Model model = deepseek_v3();
  Plan plan = deepseek_plan();
  plan.parallelism = {.dp = 8};
  plan.recompute = {};
  plan.precision = make_precision(PrecisionKind::bf16);
  const LayerWork half = transformer_layer(model, plan, 8, false);
  plan.precision = make_precision(PrecisionKind::fp32);
  const LayerWork full = transformer_layer(model, plan, 8, false);
  ASSERT_EQ(half.attn_backward.size(), full.attn_backward.size());
  for (std::size_t i = 0; i < half.attn_backward.size(); ++i) {
    const Shape& h = half.attn_backward[i].shape;
    const Shape& f = full.attn_backward[i].shape;
    EXPECT_EQ(h.label, f.label);
    if (const auto* s = std::get_if<Streaming>(&h.work)) {
      EXPECT_EQ(std::get<Streaming>(f.work).bytes_read, 2 * s->bytes_read) << h.label;
      EXPECT_EQ(std::get<Streaming>(f.work).bytes_written, 2 * s->bytes_written) << h.label;
    } else if (std::holds_alternative<Gemm>(h.work)) {
      EXPECT_EQ(std::get<Gemm>(f.work).inputs, NumberFormat::fp32);
      EXPECT_EQ(flops_of(f), flops_of(h));
    }
  }
}

}  // namespace
}  // namespace orrery
