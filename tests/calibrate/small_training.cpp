#include "tests/calibrate/small_training.hpp"

#include <fmt/core.h>

#include <mutex>

#include "calibrate/transport/transport.hpp"
#include "models/step.hpp"
#include "sim/random.hpp"

namespace orrery {

const char* const kTinyDeepSeek = R"(
  name: tiny DeepSeek
  source: made up
  hidden: 32
  vocabulary: 64
  layers: 4
  max_positions: 128
  attention:
    heads: 4
    mla: {q_lora_rank: 24, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 8}
  feed_forward: {activation: swiglu, intermediate: 48}
  moe:
    dense_layers: 1
    routed_experts: 8
    top_k: 2
    groups: 4
    group_limit: 2
    expert_intermediate: 16
    shared_experts: 1
    scores: sigmoid
    router_bias: true
  mtp_modules: 1
)";

const char* const kTinyLlama = R"(
  name: tiny Llama
  source: made up
  hidden: 32
  vocabulary: 64
  layers: 4
  max_positions: 128
  attention: {heads: 4, kv_heads: 2, head_dim: 8}
  feed_forward: {activation: swiglu, intermediate: 48}
)";

const char* const kTinyQwenMoe = R"(
  name: tiny Qwen with experts
  source: made up
  hidden: 32
  vocabulary: 64
  layers: 4
  max_positions: 128
  attention: {heads: 4, kv_heads: 2, head_dim: 8, qk_norm: true}
  feed_forward: {activation: swiglu}
  moe: {routed_experts: 8, top_k: 2, expert_intermediate: 16}
)";

Scenario small_scenario(const std::string& model, const std::string& plan) {
  const std::string text = fmt::format(
      "name: small\nseed: 7\nmodel:{}\ncluster: clusters/h800_node.yaml\nplan:{}\n", model, plan);
  return read_scenario_text(text, "small.yaml", ORRERY_SOURCE_DIR "/scenarios");
}

std::vector<std::int32_t> random_tokens(const Scenario& scenario, std::int64_t step,
                                        std::int64_t sequence) {
  Random random =
      Random::of({11, static_cast<std::uint64_t>(step), static_cast<std::uint64_t>(sequence)});
  const auto vocabulary = static_cast<std::uint64_t>(scenario.model.vocabulary);
  const std::int64_t count = scenario.plan.sequence_length + 1 + scenario.model.mtp_modules;
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<std::int32_t>(random.below(vocabulary)));
  }
  return tokens;
}

namespace {

/// Puts a rank's share of a stage's gradients into the whole parameters.
void collect(const Scenario& scenario, const Lowered& lowered, Trained& trained) {
  const Parallelism& p = scenario.plan.parallelism;
  for (const StageState& stage : lowered.stages) {
    for (const bool expert : {false, true}) {
      const float* values = expert ? stage.expert_gradients : stage.dense_gradients;
      const ArrayPart part = owned_part(scenario, stage, expert, lowered.rank);
      for (const ParameterShard& shard : expert ? stage.shards.expert : stage.shards.dense) {
        std::vector<float>& whole = trained.gradients[shard.parameter.name];
        whole.resize(static_cast<std::size_t>(shard.parameter.elements()), 0.0F);
        for (std::int64_t r = 0; r < shard.rows(); ++r) {
          for (std::int64_t c = 0; c < shard.columns; ++c) {
            const std::int64_t at = shard.offset + r * shard.columns + c;
            if (p.zero_stage > 0 && (at < part.begin || at >= part.end)) continue;
            whole[static_cast<std::size_t>(shard.whole_index(r, c))] = values[at];
          }
        }
      }
    }
  }
}

}  // namespace

Trained train_small(const Scenario& scenario, int steps, const SmallRanks& small) {
  const Program program = build_step(scenario, {.all_ranks = true});
  const auto ranks = static_cast<int>(scenario.plan.parallelism.world());
  const Tokens tokens = [&](std::int64_t step, std::int64_t sequence) {
    return random_tokens(scenario, step, sequence);
  };
  const int rounds = std::max(steps, 1);
  Trained trained;
  trained.losses.assign(static_cast<std::size_t>(rounds), 0);
  trained.mtp_losses.assign(static_cast<std::size_t>(rounds), 0);
  trained.gradient_norms.assign(static_cast<std::size_t>(rounds), 0);
  std::vector<std::vector<OpTimes>> times(static_cast<std::size_t>(ranks));
  // By step and rank: added up in the order of ranks, not in that in which they come.
  std::vector<std::vector<RankStep>> all(
      static_cast<std::size_t>(rounds), std::vector<RankStep>(static_cast<std::size_t>(ranks)));
  const double batch_tokens = static_cast<double>(scenario.plan.global_batch_sequences) *
                              static_cast<double>(scenario.plan.sequence_length);
  std::mutex mutex;
  run_in_process(ranks, std::chrono::minutes(2), [&](Transport& transport) {
    const auto r = static_cast<std::size_t>(transport.rank());
    const std::unique_ptr<kernels::Device> device = small.open_device();
    Execution execution(scenario, program, RankId(r), *device, &transport, small.nccl);
    for (int s = 0; s < rounds; ++s) {
      RankStep& step = all[static_cast<std::size_t>(s)][r];
      step = steps == 0 ? execution.gradients(s, tokens) : execution.step(s, tokens);
      times[r] = step.times;
    }
    // As train() does: a rank that has done its part is not gone while others still look at theirs.
    transport.barrier("end of training");
    const std::lock_guard lock(mutex);
    trained.reuse_waits += execution.lowered().reuse_waits;
    if (steps == 0) collect(scenario, execution.lowered(), trained);
  });
  // Tensor-parallel ranks all have the loss.
  const double share = 1 / (batch_tokens * static_cast<double>(scenario.plan.parallelism.tp));
  for (std::size_t s = 0; s < all.size(); ++s) {
    for (const RankStep& step : all[s]) {
      trained.losses[s] += share * step.loss_sum;
      trained.mtp_losses[s] += share * step.mtp_loss_sum;
      trained.gradient_norms[s] = step.gradient_norm;
    }
  }
  trained.timeline = merge_times(program, times);
  return trained;
}

}  // namespace orrery
