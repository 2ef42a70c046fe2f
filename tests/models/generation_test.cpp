#include "models/generation.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "models/generation_layer.hpp"
#include "models_for_tests.hpp"

namespace orrery {
namespace {

template <class T, class Read>
T read_shipped(const std::string& name, const Read& read) {
  Problems problems;
  const std::string path = std::string(ORRERY_SOURCE_DIR) + "/scenarios/" + name;
  T value = read(read_document(path, problems), problems);
  problems.throw_if_any();
  return value;
}

Instance on_h800(const std::string& model, const ServingPlan& plan) {
  return {shipped(model), read_shipped<Cluster>("clusters/h800_2048.yaml", read_cluster),
          read_shipped<Profile>("profiles/h800.yaml", read_profile), plan};
}

ServingPlan v3_decode() {
  return {.dp = 144,
          .ep = 144,
          .redundant_experts = 32,
          .linear = NumberFormat::fp8_block,
          .dispatch = NumberFormat::fp8_block,
          .decode_exchange = ExchangeMode::low_latency,
          .micro_batches = 2};
}

ServingPlan v3_prefill() {
  ServingPlan plan = v3_decode();
  plan.dp = plan.ep = 32;
  plan.communication_sms = 24;
  return plan;
}

/// Nothing but peak rates: no tables, no launch gap.
Profile peak_rates(double flops_per_s, double bytes_per_s) {
  Profile profile;
  profile.name = "peak";
  profile.device = {.name = "peak",
                    .sms = 100,
                    .memory_bytes = 1e12,
                    .memory_bytes_per_s = bytes_per_s,
                    .bf16_flops_per_s = flops_per_s,
                    .fp8_flops_per_s = 2 * flops_per_s,
                    .source = ""};
  return profile;
}

// ---- cache: arXiv 2505.09343, Table 1

TEST(GenerationCache, IsAsPublished) {
  EXPECT_DOUBLE_EQ(cache_bytes_per_token(shipped("deepseek_v3"), NumberFormat::bf16), 70'272);
  EXPECT_DOUBLE_EQ(cache_bytes_per_token(shipped("llama3_405b"), NumberFormat::bf16), 516'096);
  Model qwen = shipped("qwen2_5_32b");  // Qwen2.5-72B: 80 layers, 8 heads of 128 (its config.json)
  qwen.layers = 80;
  qwen.attention = {.heads = 64, .kv_heads = 8, .head_dim = 128, .qkv_bias = true};
  EXPECT_DOUBLE_EQ(cache_bytes_per_token(qwen, NumberFormat::bf16), 327'680);
}

TEST(GenerationCache, OfAnIndexerIsAsInItsCode) {
  // inference/model.py of V3.2-Exp: an FP8 key of 128 and an FP32 scale, 132 bytes a layer.
  EXPECT_DOUBLE_EQ(cache_bytes_per_layer(shipped("deepseek_v3_2_exp"), NumberFormat::bf16) -
                       cache_bytes_per_layer(shipped("deepseek_v3"), NumberFormat::bf16),
                   132);
  EXPECT_EQ(count_indexer(shipped("deepseek_v3_2_exp")),
            1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64);
}

// ---- work

double gemm_flops(const Instance& instance, const GenerationStep& step) {
  const Program program = generation_program(instance, step);
  double flops = 0;
  for (OpId op; op.value < program.size(); ++op.value) {
    const Shape& shape = program.shapes()[program.shape(op)];
    if (std::holds_alternative<Gemm>(shape.work)) flops += flops_of(shape);
  }
  return flops;
}

/// 2 FLOPs for each active parameter that is part of a matrix.
double matrix_flops(const Model& model, bool head) {
  const auto real = [](std::int64_t v) { return static_cast<double>(v); };
  const ActiveParameters active = count_active_parameters(model);
  double parameters = real(head ? active.with_head : active.body);
  parameters -= real(count_parameters(model).norms);
  if (model.moe && model.moe->router_bias) {
    parameters -= real(model.moe_layers() * model.moe->routed_experts);
  }
  return 2 * parameters;
}

TEST(GenerationWork, IsTwiceTheActiveParameters) {
  for (const char* name : {"llama3_70b", "llama3_8b", "deepseek_67b"}) {
    const Instance instance = on_h800(name, {.tp = 8});
    // Decode has logits of every token; a prompt only of its last.
    EXPECT_NEAR(gemm_flops(instance, {.sequences = 64, .context = 1000}) * 8 /
                    (64 * matrix_flops(instance.model, true)),
                1, 1e-3)
        << name;
    EXPECT_NEAR(gemm_flops(instance, {.prefill = true, .sequences = 2, .new_tokens = 1024}) * 8 /
                    (2048 * matrix_flops(instance.model, false)),
                1, 2e-3)
        << name;
  }
}

// With experts on other GPUs each GPU does the work of its own tokens' experts on average; absorbed
// attention has the same products as the up-projections it stands for.
TEST(GenerationWork, OfExpertsAndLatentsToo) {
  const Instance decode = on_h800("deepseek_v3", v3_decode());
  EXPECT_NEAR(gemm_flops(decode, {.sequences = 128, .context = 5000}) /
                  (128 * matrix_flops(decode.model, true)),
              1, 2e-3);
  const Instance prefill = on_h800("deepseek_v3", v3_prefill());
  EXPECT_NEAR(gemm_flops(prefill, {.prefill = true, .sequences = 4, .new_tokens = 4096}) /
                  (16384 * matrix_flops(prefill.model, false)),
              1, 2e-3);
  // A cached prefix costs the up-projection of its latents once more, and nothing else.
  const double extra =
      gemm_flops(prefill, {.prefill = true, .sequences = 4, .new_tokens = 2048, .context = 2048}) -
      gemm_flops(prefill, {.prefill = true, .sequences = 4, .new_tokens = 2048});
  EXPECT_NEAR(extra / (2.0 * 4 * 2048 * 61 * 512 * 128 * 256), 1, 1e-3);
}

TEST(GenerationWork, AttentionSeesTheContext) {
  const Instance instance = on_h800("deepseek_v3", v3_decode());
  const auto all = [&](std::int64_t context) {
    return step_cost(instance, {.sequences = 64, .context = context}).flops;
  };
  EXPECT_NEAR((all(8191) - all(4095)) / (2.0 * 64 * 128 * 4096 * 1088 * 61), 1, 1e-9);
}

TEST(GenerationWork, OfTwoMicroBatchesIsThatOfOne) {
  ServingPlan plan = v3_prefill();
  const GenerationStep step{.prefill = true, .sequences = 4, .new_tokens = 4096};
  const StepCost two = step_cost(on_h800("deepseek_v3", plan), step);
  plan.micro_batches = 1;
  const StepCost one = step_cost(on_h800("deepseek_v3", plan), step);
  EXPECT_NEAR(two.flops / one.flops, 1, 1e-3);
  // What is overlapped is no longer waited for.
  EXPECT_LT(two.exposed_s, 0.3 * one.exposed_s);
  EXPECT_LT(two.seconds, one.seconds);
}

TEST(GenerationWork, FewTokensDoNotReadAllExperts) {
  const Instance instance = on_h800("deepseek_v3", {.dp = 8, .ep = 8});
  const auto groups = [&](std::int64_t sequences) {
    const GenerationBatch batch{.sequences = sequences, .context = 100};
    for (const WorkItem& item : generation_layer(instance, batch, true).mlp) {
      if (item.shape.label == "routed_up") return std::get<Gemm>(item.shape.work).groups;
    }
    return std::int64_t{0};
  };
  // 8 rows on 32 experts: 32 (1 - (31/32)^8) = 7.2 of them.
  EXPECT_EQ(groups(1), 7);
  EXPECT_EQ(groups(64), 32);
}

TEST(GenerationWork, SparseAttentionReadsTopK) {
  const Instance dense = on_h800("deepseek_v3", v3_decode());
  const Instance sparse = on_h800("deepseek_v3_2_exp", v3_decode());
  const auto core = [](const Instance& i, std::int64_t context) {
    return step_cost(i, {.sequences = 64, .context = context}).core_s;
  };
  // All of a short context is taken, and no scores are needed.
  EXPECT_NEAR(core(sparse, 1000) / core(dense, 1000), 1, 0.02);
  // At 128K what is left is the indexer's keys, 132 of 1152 bytes a token, 2048 picked rows of
  // 131,072, and the scores that are written and read.
  const double scores = 132.0 / 1152;
  EXPECT_GT(core(sparse, 131'072), scores * core(dense, 131'072));
  EXPECT_LT(core(sparse, 131'072), 1.6 * scores * core(dense, 131'072));
}

// ---- time

TEST(GenerationTime, OfOneSequenceIsReadingTheWeights) {
  // At peak rates a decode step of one sequence reads every weight but the embedding once, and the
  // cache; the activations of one token are nothing beside them.
  Instance instance = on_h800("llama3_70b", {});
  instance.profile = peak_rates(1e15, 1e12);
  const ServingMemory memory = serving_memory(instance, {.decode_tokens = 1});
  const double embedding = 2.0 * 128256 * 8192;
  const std::int64_t context = 10'000;
  const double bytes = memory.weights_bytes - embedding +
                       static_cast<double>(context) * memory.cache_bytes_per_token;
  const StepCost cost = step_cost(instance, {.sequences = 1, .context = context});
  EXPECT_NEAR(cost.seconds * 1e12 / bytes, 1, 2e-3);
  EXPECT_EQ(cost.limit, GenerationLimit::memory_bandwidth);
}

TEST(GenerationTime, OfALongPromptIsItsProducts) {
  Instance instance = on_h800("llama3_8b", {});
  instance.profile = peak_rates(1e14, 1e13);
  const GenerationStep step{.prefill = true, .sequences = 1, .new_tokens = 8192};
  const StepCost cost = step_cost(instance, step);
  const double attention = 32.0 * 32 * 2 * (8192.0 * 8193 / 2) * 256;
  const double flops = 8192 * matrix_flops(instance.model, false) + attention;
  EXPECT_NEAR(cost.flops / flops, 1, 1e-3);
  EXPECT_NEAR(cost.seconds * 1e14 / flops, 1, 0.05);  // and what norms and the like move
  EXPECT_EQ(cost.limit, GenerationLimit::compute);
}

// arXiv 2505.09343, 2.3.2: with computation hidden, 32 tokens a micro-batch, 9 experts each (the
// shared one is sent too), 7000 wide, 1 byte out and 2 back over 50 GB/s take 120.96 us a
// micro-batch and layer: 14.76 ms for two and 61 layers. On NVL72's 900 GB/s: 0.82 ms.
TEST(GenerationTime, IsBoundedByTheExchangeAsPublished) {
  Instance instance = on_h800("deepseek_v3", {});
  instance.model.hidden = 7000;
  instance.model.moe->top_k = 9;
  instance.model.layer_is_moe.assign(61, true);
  instance.plan = v3_decode();
  instance.plan.dispatch = NumberFormat::fp8_tensor;
  instance.profile = peak_rates(1e30, 1e30);
  LowLatencyTable& table = instance.profile.low_latency;
  table.id = "links";
  table.tokens = {1, 1024};
  table.dispatch = {
      .latency_s = 0, .kernel_bytes_per_s = 1e30, .remote_latency_s = 0, .nic_share = 1};
  table.combine = table.dispatch;
  instance.cluster.gpus_per_node = 1;  // everything but a GPU's own experts goes through the NIC
  instance.cluster.nic.bandwidth_bytes_per_s = 50e9;
  const GenerationStep step{.sequences = 64, .context = 1};
  EXPECT_NEAR(step_cost(instance, step).seconds, 14.76e-3 * 143 / 144, 0.003 * 14.76e-3);
  EXPECT_EQ(step_cost(instance, step).limit, GenerationLimit::exchange);
  instance.cluster.gpus_per_node = 144;
  instance.cluster.nvlink.bandwidth_bytes_per_s = 900e9;
  EXPECT_NEAR(step_cost(instance, step).seconds, 0.82e-3 * 143 / 144, 0.01 * 0.82e-3);
}

TEST(GenerationTime, GrowsWithWhatIsAsked) {
  for (const bool mla : {true, false}) {
    const Instance instance =
        mla ? on_h800("deepseek_v3", v3_decode()) : on_h800("llama3_70b", {.tp = 8});
    double before = 0;
    for (const std::int64_t context : {1000, 4000, 16'000, 64'000}) {
      const double now = step_cost(instance, {.sequences = 32, .context = context}).seconds;
      EXPECT_GT(now, before);
      before = now;
    }
    before = 0;
    double rate = 0;
    for (const std::int64_t sequences : {1, 8, 64, 256}) {
      const double now = step_cost(instance, {.sequences = sequences, .context = 4000}).seconds;
      EXPECT_GT(now, before) << sequences;
      // and yet a larger batch gives more tokens a second
      EXPECT_GT(static_cast<double>(sequences) / now, rate) << sequences;
      rate = static_cast<double>(sequences) / now;
      before = now;
    }
  }
}

TEST(GenerationTime, UnevenExpertsCostTime) {
  ServingPlan plan = v3_decode();
  const double even =
      step_cost(on_h800("deepseek_v3", plan), {.sequences = 128, .context = 4000}).seconds;
  plan.busiest = 2;
  const double uneven =
      step_cost(on_h800("deepseek_v3", plan), {.sequences = 128, .context = 4000}).seconds;
  EXPECT_GT(uneven, 1.05 * even);
}

TEST(GenerationTime, OfManyStepsIsInterpolated) {
  const Instance instance = on_h800("llama3_8b", {});
  DecodeTimes times(instance);
  for (const auto& [sequences, context] :
       {std::pair{1, 100}, std::pair{3, 3000}, std::pair{50, 1234}, std::pair{100, 20'000}}) {
    const double exact = step_cost(instance, {.sequences = sequences, .context = context}).seconds;
    EXPECT_NEAR(times.seconds(sequences, context) / exact, 1, 0.03) << sequences << " " << context;
  }
  EXPECT_GT(times.seconds(2.5, 100), times.seconds(2, 100) * 0.99);
}

// ---- drafts

TEST(Speculation, GainsTheGeometricSum) {
  EXPECT_DOUBLE_EQ(Speculation{}.tokens_per_step(), 1);
  EXPECT_DOUBLE_EQ((Speculation{1, 0.85}).tokens_per_step(), 1.85);
  EXPECT_DOUBLE_EQ((Speculation{3, 0.5}).tokens_per_step(), 1.875);
  EXPECT_DOUBLE_EQ((Speculation{4, 1}).tokens_per_step(), 5);
}

// V3 report 5.4.3: 85 to 90 % acceptance give 1.8 times the tokens per second.
TEST(Speculation, SpeedsV3UpAboutAsPublished) {
  ServingPlan plan = v3_decode();
  const auto rate = [&](std::int64_t sequences) {
    const Instance instance = on_h800("deepseek_v3", plan);
    const std::int64_t q = 1 + plan.speculation.drafts;
    return plan.speculation.tokens_per_step() /
           step_cost(instance, {.sequences = sequences, .new_tokens = q, .context = 4096}).seconds;
  };
  const double without = rate(8);
  plan.speculation = {1, 0.875};
  // Small batches wait for weights and launches, so that a second token is nearly free.
  EXPECT_NEAR(rate(8) / without, 1.8, 0.15);
}

TEST(Speculation, DraftsTakeTimeAndCache) {
  ServingPlan plan = v3_decode();
  const ServingMemory without =
      serving_memory(on_h800("deepseek_v3", plan), {.decode_tokens = 128});
  plan.speculation = {1, 0.85};
  const Instance instance = on_h800("deepseek_v3", plan);
  const ServingMemory with = serving_memory(instance, {.decode_tokens = 128});
  EXPECT_NEAR(with.cache_bytes_per_token / without.cache_bytes_per_token, 62.0 / 61, 1e-12);
  EXPECT_GT(with.weights_bytes, without.weights_bytes);
  const StepCost cost = step_cost(instance, {.sequences = 64, .new_tokens = 2, .context = 4000});
  EXPECT_GT(cost.draft_s, 0.5 * cost.attention_s / 61);
  EXPECT_LT(cost.draft_s, 0.1 * cost.seconds);
}

// ---- memory

TEST(GenerationMemory, HoldsTheModelOnce) {
  // 671 B parameters in FP8 (those that are in BF16 twice) over the GPUs that hold them once: each
  // of 32 has 9 of 288 experts a layer, and attention, dense layers, embedding and head whole.
  const Instance instance = on_h800("deepseek_v3", v3_prefill());
  const ParameterCount p = count_parameters(instance.model);
  const auto real = [](std::int64_t v) { return static_cast<double>(v); };
  const double experts = real(p.routed_experts) * 288 / 256 / 32;
  const double up = 61.0 * 512 * 128 * 256;  // in BF16, absorbed
  const double whole = real(p.attention + p.dense_feed_forward + p.shared_experts) + up +
                       2 * real(p.embedding + p.head + p.norms + p.router);
  EXPECT_NEAR(serving_memory(instance, {.decode_tokens = 1}).weights_bytes / (experts + whole), 1,
              1e-3);
  // Dense: all of it over tp.
  const Instance dense = on_h800("llama3_70b", {.tp = 8});
  const double bytes = 2 * real(count_parameters(dense.model).total()) / 8;
  EXPECT_NEAR(serving_memory(dense, {.decode_tokens = 1}).weights_bytes / bytes, 1, 1e-3);
}

TEST(GenerationMemory, LimitsTheBatch) {
  const Instance instance = on_h800("llama3_70b", {.tp = 8});
  const ServingMemory memory = serving_memory(instance, {.decode_tokens = 64});
  // 80 layers, 8 key-value heads of 128, one of them on each GPU.
  EXPECT_DOUBLE_EQ(memory.cache_bytes_per_token, 80 * 2 * 128 * 2);
  const std::int64_t fit = memory.sequences(4096);
  EXPECT_GT(fit, 0);
  EXPECT_LE(static_cast<double>(fit) * 4096 * memory.cache_bytes_per_token,
            memory.left_for_cache());
  EXPECT_GT(static_cast<double>(fit + 1) * 4096 * memory.cache_bytes_per_token,
            memory.left_for_cache());
  EXPECT_EQ(serving_memory(on_h800("llama3_405b", {}), {.decode_tokens = 1}).sequences(1),
            0);  // 810 GB on one GPU
}

// Tensor parallelism does not split latents: every GPU has them whole.
TEST(GenerationMemory, LatentsAreOnEveryGpu) {
  ServingPlan plan = v3_prefill();
  const double one =
      serving_memory(on_h800("deepseek_v3", plan), {.decode_tokens = 1}).cache_bytes_per_token;
  plan.tp = 4;
  plan.dp = 8;
  const ServingMemory four = serving_memory(on_h800("deepseek_v3", plan), {.decode_tokens = 1});
  EXPECT_DOUBLE_EQ(four.cache_bytes_per_token, one);
}

// ---- the Program

TEST(GenerationProgram, HandsOverBetweenMicroBatches) {
  const Instance instance = on_h800("deepseek_v3", v3_decode());
  const Program program = generation_program(instance, {.sequences = 64, .context = 1000});
  // Each of two micro-batches dispatches and combines in 58 layers.
  std::int64_t exchanges = 0;
  std::set<int> micro_batches;
  for (OpId op; op.value < program.size(); ++op.value) {
    if (kind_of(program.streams_of(op)[0]) == StreamKind::expert_exchange) ++exchanges;
    micro_batches.insert(program.tag(op).micro_batch);
  }
  EXPECT_EQ(exchanges, 2 * 2 * 58);
  EXPECT_EQ(micro_batches.size(), 2u);
  // One sequence cannot be split.
  const Program one = generation_program(instance, {.sequences = 1, .context = 1000});
  EXPECT_LT(one.size(), program.size() * 6 / 10);
}

TEST(GenerationProgram, TensorParallelGpusMeetTwiceALayer) {
  const Instance dense = on_h800("llama3_8b", {.tp = 2});
  const Program program = generation_program(dense, {.sequences = 4, .context = 10});
  std::int64_t reduces = 0;
  for (OpId op; op.value < program.size(); ++op.value) {
    const Shape& shape = program.shapes()[program.shape(op)];
    if (const auto* c = std::get_if<Collective>(&shape.work)) {
      reduces += c->kind == CollectiveKind::all_reduce ? 1 : 0;
    }
  }
  EXPECT_EQ(reduces, 2 * 32 + 1);  // and the embedding's
}

}  // namespace
}  // namespace orrery
