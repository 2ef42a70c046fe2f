// Any scenario that the reader accepts must come out of the whole chain whole: no abort, the same
// answer from the sweep and the event engine, phases that add up to the step, all activations
// released.

#include <fmt/core.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "models/step.hpp"
#include "reports/study.hpp"
#include "sim/timeline.hpp"

namespace orrery {
namespace {

const std::string kScenarios = std::string(ORRERY_SOURCE_DIR) + "/scenarios/";

template <class T>
T any_of(const std::vector<T>& values) {
  return values[*rc::gen::inRange<std::size_t>(0, values.size())];
}

/// A small model with every feature that blocks look at.
std::string random_model() {
  const bool mla = *rc::gen::arbitrary<bool>();
  const bool moe = *rc::gen::arbitrary<bool>();
  const int layers = *rc::gen::inRange(1, 13);
  std::string text = fmt::format(
      "{{name: random, source: test, hidden: {}, vocabulary: {}, layers: {}, max_positions: 65536, "
      "norm: {}, "
      "positions: {}, tied_embeddings: {}, mtp_modules: {}, ",
      any_of<int>({256, 512, 1024}), any_of<int>({512, 1000, 32000}), layers,
      any_of<std::string>({"rms", "layer"}),
      mla ? "rotary" : any_of<std::string>({"rotary", "learned"}),
      any_of<std::string>({"true", "false"}), mla ? *rc::gen::inRange(0, 2) : 0);
  text += mla ? fmt::format(
                    "attention: {{heads: 8, mla: {{q_lora_rank: {}, kv_lora_rank: 64, "
                    "qk_nope_head_dim: 32, "
                    "qk_rope_head_dim: 16, v_head_dim: 32}}}}, ",
                    any_of<int>({0, 96}))
              : fmt::format("attention: {{heads: 8, kv_heads: {}, head_dim: 64}}, ",
                            any_of<int>({1, 2, 8}));
  text += fmt::format("feed_forward: {{activation: {}, intermediate: 768}}",
                      any_of<std::string>({"swiglu", "gelu"}));
  if (moe) {
    text += fmt::format(
        ", moe: {{dense_layers: {}, routed_experts: 16, top_k: {}, expert_intermediate: 128, "
        "shared_experts: "
        "{}, groups: 4, group_limit: {}}}",
        *rc::gen::inRange(0, layers), any_of<int>({1, 2, 4}), *rc::gen::inRange(0, 3),
        any_of<int>({2, 4}));
  }
  return text + "}";
}

std::string random_scenario() {
  const std::string schedule = any_of<std::string>(
      {"gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "dual_pipe", "dual_pipe_v"});
  const int pp = any_of<int>({1, 2, 4});
  const int dp = any_of<int>({1, 2, 4});
  const int micro_batch = any_of<int>({1, 2});
  const int micro_batches = any_of<int>({1, 2, 4, 8, 9, 16});
  const std::string device = any_of<std::string>({"h800_2048", "h100_64", "a100_64"});
  std::string text = fmt::format(
      "name: random\nmodel: {}\ncluster: clusters/{}.yaml\nplan:\n"
      "  layout: {{pp: {}, dp: {}, tp: {}, cp: {}, ep: {}, expert_tp: {}, zero: {}, "
      "sequence_parallel: {}}}\n"
      "  schedule: {}\n{}"
      "  sequence_length: {}\n  micro_batch: {}\n  global_batch: {}\n  precision: {}\n  recompute: "
      "{}\n"
      "  communication_sms: {}\n",
      random_model(), device, pp, dp, any_of<int>({1, 2, 4}), any_of<int>({1, 2}),
      any_of<int>({1, 1, 2, 4}), any_of<int>({1, 1, 2}), *rc::gen::inRange(0, 4),
      any_of<std::string>({"true", "false"}), schedule,
      schedule == "interleaved_1f1b" ? "  virtual_stages: 2\n" : "", any_of<int>({64, 512, 4096}),
      micro_batch, micro_batch * dp * micro_batches,
      any_of<std::string>({"bf16", "fp8_tensor", "fp8_deepseek"}),
      any_of<std::string>({"none", "selective", "full", "[norms, activation]"}),
      any_of<int>({0, 20}));
  return text;
}

TEST(RandomScenarios, ComeOutOfTheChainWhole) {
  int accepted = 0;
  const bool ok = rc::check("every accepted scenario simulates", [&] {
    const std::string text = random_scenario();
    Scenario scenario;
    try {
      scenario = read_scenario_text(text, kScenarios + "random.yaml", kScenarios);
    } catch (const InputError&) {
      return;  // most combinations are impossible, and said to be
    }
    ++accepted;
    RC_LOG() << text;
    for (const bool all_ranks : {false, true}) {
      const Program program = build_step(scenario, {.all_ranks = all_ranks});
      const PriceList prices = price_all(program, scenario.profile, scenario.cluster);
      const Timeline timeline = sweep(program, prices);
      RC_ASSERT(timeline.fingerprint() == simulate(program, prices).fingerprint());
      // Streams run in order, so whatever takes longer makes nothing end earlier.
      const Timeline shared = run_program(scenario, program, Network::flows).timeline;
      RC_ASSERT(shared.makespan_ps() >= timeline.makespan_ps());
      const Report report = summarise(scenario, program, prices, timeline);
      for (const RankReport& rank : report.ranks) {
        RC_ASSERT(std::abs(rank.phases_s.sum() - report.step_time_s) < 1e-9 * report.step_time_s);
      }
      std::map<std::uint32_t, std::int64_t> activations;
      for (const MemoryEffect& e : program.memory_effects()) {
        if (e.kind == MemoryKind::activations) activations[e.rank.value] += e.bytes;
      }
      for (const auto& [rank, bytes] : activations) RC_ASSERT(bytes == 0);
    }
    const Program one = build_step(scenario);
    const Program all = build_step(scenario, {.all_ranks = true});
    RC_ASSERT(sweep(one, price_all(one, scenario.profile, scenario.cluster)).makespan_ps() ==
              sweep(all, price_all(all, scenario.profile, scenario.cluster)).makespan_ps());
  });
  EXPECT_TRUE(ok);
  RecordProperty("accepted", accepted);
  EXPECT_GE(accepted, 5);  // else the generator has drifted away from what is possible
}

}  // namespace
}  // namespace orrery
