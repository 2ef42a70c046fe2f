#include "models/rollout.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <numeric>
#include <vector>

#include "models_for_tests.hpp"
#include "sim/random.hpp"

namespace orrery {
namespace {

/// A small model on GPUs with peak rates only: what a step costs is not the matter here.
Instance small(std::int64_t dp, double memory_bytes = 80e9) {
  Instance instance;
  instance.model = shipped("llama3_8b");
  instance.cluster.name = "small";
  instance.cluster.nodes = 64;
  instance.profile.name = "peak";
  instance.profile.device = {.name = "peak",
                             .sms = 132,
                             .memory_bytes = memory_bytes,
                             .memory_bytes_per_s = 3e12,
                             .bf16_flops_per_s = 8e14,
                             .source = ""};
  instance.plan.dp = dp;
  return instance;
}

/// Second implementation: sequence by sequence, step by step, with drawn lengths. Instances run on
/// their own, the replicas of one in step, for as long as the one with the most sequences needs. A
/// free slot takes the next sequence at once; prompts are prefilled before all else.
struct Simulated {
  double decode_s = 0;  ///< until the last instance is done
  double tail_s = 0;
  double busy = 0;  ///< sequences x seconds of all
};

Simulated simulate(const Instance& instance, std::int64_t instances, const RolloutWork& work,
                   std::int64_t slots, std::uint64_t seed) {
  struct Sequence {
    double left = 0;
    double age = 0;
  };
  Random random(seed);
  std::deque<Sequence> queue;
  for (std::int64_t i = 0; i < work.sequences(); ++i) {
    double u = random.uniform();
    std::int64_t tokens = work.output.bins.back().tokens;
    for (const auto& bin : work.output.bins) {
      if (u < bin.share) {
        tokens = bin.tokens;
        break;
      }
      u -= bin.share;
    }
    queue.push_back({static_cast<double>(tokens), 0});
  }
  DecodeTimes times(instance);
  const double per_step = instance.plan.speculation.tokens_per_step();
  std::vector<std::vector<std::vector<Sequence>>> running(
      static_cast<std::size_t>(instances),
      std::vector<std::vector<Sequence>>(static_cast<std::size_t>(instance.plan.dp)));
  std::vector<double> clock(running.size(), 0.0);
  std::vector<double> last_start(running.size(), 0.0);
  const auto fill = [&](std::size_t i) {
    bool took = true;
    while (took && !queue.empty()) {
      took = false;
      auto& replica =
          *std::min_element(running[i].begin(), running[i].end(),
                            [](const auto& a, const auto& b) { return a.size() < b.size(); });
      if (static_cast<std::int64_t>(replica.size()) < slots) {
        replica.push_back(queue.front());
        queue.pop_front();
        last_start[i] = clock[i];
        took = true;
      }
    }
  };
  // Deal the first out evenly, then always the instance that is behind goes on.
  for (std::int64_t round = 0; round < slots * instance.plan.dp; ++round) {
    for (auto& replicas : running) {
      if (queue.empty()) break;
      auto& replica =
          *std::min_element(replicas.begin(), replicas.end(),
                            [](const auto& a, const auto& b) { return a.size() < b.size(); });
      if (static_cast<std::int64_t>(replica.size()) >= slots) continue;
      replica.push_back(queue.front());
      queue.pop_front();
    }
  }
  Simulated s;
  std::vector<bool> done(running.size(), false);
  while (true) {
    std::size_t i = running.size();
    for (std::size_t j = 0; j < running.size(); ++j) {
      if (!done[j] && (i == running.size() || clock[j] < clock[i])) i = j;
    }
    if (i == running.size()) break;
    std::size_t most = 0;
    double ages = 0;
    double count = 0;
    for (const auto& replica : running[i]) {
      most = std::max(most, replica.size());
      for (const Sequence& q : replica) ages += q.age;
      count += static_cast<double>(replica.size());
    }
    if (most == 0) {
      done[i] = true;
      continue;
    }
    const double context = static_cast<double>(work.prompt_tokens) + ages / count;
    const double step_s = times.seconds(static_cast<double>(most), context);
    clock[i] += step_s;
    s.busy += count * step_s;
    for (auto& replica : running[i]) {
      for (Sequence& q : replica) {
        q.left -= per_step;
        q.age += per_step;
      }
      std::erase_if(replica, [](const Sequence& q) { return q.left <= 1e-9; });
    }
    fill(i);
  }
  s.decode_s = *std::max_element(clock.begin(), clock.end());
  s.tail_s = s.decode_s - *std::max_element(last_start.begin(), last_start.end());
  return s;
}

struct Case {
  const char* name;
  std::int64_t dp;
  std::int64_t instances;
  std::int64_t prompts;
  std::int64_t outputs;
  std::int64_t most;  // sequences of a replica
  LengthDistribution output;
  double within;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name;
}

class Rollouts : public testing::TestWithParam<Case> {};

TEST_P(Rollouts, AgreeWithASimulationOfEverySequence) {
  const Case& c = GetParam();
  Instance instance = small(c.dp);
  RolloutWork work{.prompts = c.prompts,
                   .outputs_per_prompt = c.outputs,
                   .prompt_tokens = 500,
                   .output = c.output,
                   .most_sequences = c.most};
  const RolloutEstimate e = estimate_rollout(instance, c.instances, work);
  double decode_s = 0;
  double tail_s = 0;
  double busy = 0;
  constexpr int kRuns = 30;
  for (int run = 0; run < kRuns; ++run) {
    const Simulated s =
        simulate(instance, c.instances, work, e.slots, 100 + static_cast<std::uint64_t>(run));
    decode_s += s.decode_s / kRuns;
    tail_s += s.tail_s / kRuns;
    busy += s.busy / kRuns;
  }
  EXPECT_NEAR((e.seconds - e.prefill_s) / decode_s, 1, c.within);
  EXPECT_NEAR(e.tail_s / decode_s, tail_s / decode_s, c.within + 0.02);
  const double mean = busy / static_cast<double>(e.replicas) / decode_s;
  EXPECT_NEAR(e.mean_sequences / mean, 1, c.within);
}

INSTANTIATE_TEST_SUITE_P(
    Lengths, Rollouts,
    testing::Values(
        Case{"all alike", 1, 1, 64, 1, 16, fixed_length(300), 0.02},
        Case{"two lengths, all at once", 2, 1, 64, 4, 0, {{{100, 0.5}, {1000, 0.5}}}, 0.03},
        Case{"long tail, all at once", 2, 2, 64, 8, 0, log_normal_length(600, 1500, 4000), 0.05},
        Case{"long tail, three times the slots", 2, 2, 96, 8, 64,
             log_normal_length(600, 1500, 4000), 0.06},
        Case{"many for few slots", 1, 2, 500, 4, 32, log_normal_length(300, 700, 2000), 0.04},
        Case{"hardly more than slots", 2, 1, 75, 2, 60, log_normal_length(400, 900, 2000), 0.06}),
    [](const testing::TestParamInfo<Case>& each) {
      std::string name = each.param.name;
      std::replace_if(
          name.begin(), name.end(),
          [](char c) { return !std::isalnum(static_cast<unsigned char>(c)); }, '_');
      return name;
    });

TEST(Rollout, OfEqualLengthsIsAClosedForm) {
  // Three rounds of 16 sequences, 200 steps each; the estimate's context is the mean over a slice.
  const Instance instance = small(1);
  const RolloutWork work{
      .prompts = 48, .prompt_tokens = 500, .output = fixed_length(200), .most_sequences = 16};
  const RolloutEstimate e = estimate_rollout(instance, 1, work);
  double one_round = 0;
  for (std::int64_t t = 0; t < 200; ++t) {
    one_round += step_cost(instance, {.sequences = 16, .context = 500 + t}).seconds;
  }
  EXPECT_NEAR((e.seconds - e.prefill_s) / (3 * one_round), 1, 0.01);
  EXPECT_EQ(e.slots, 16);
  EXPECT_DOUBLE_EQ(e.output_tokens, 48 * 200);
  EXPECT_DOUBLE_EQ(e.gpu_seconds, e.seconds);
}

TEST(Rollout, LeavesRoomForTheFullestMoment) {
  // Sequences that start together are all at their longest together.
  const Instance instance = small(1);
  RolloutWork work{.prompts = 4000, .prompt_tokens = 500, .output = fixed_length(2000)};
  EXPECT_EQ(estimate_rollout(instance, 1, work).slots,
            most_sequences(instance, 2500, work.prefill_tokens));
  // Of mixed lengths the short ones make room before the long ones are long.
  work.output = {{{500, 0.75}, {2000, 0.25}}};
  const std::int64_t slots = estimate_rollout(instance, 1, work).slots;
  EXPECT_GT(slots, most_sequences(instance, 2500, work.prefill_tokens));
  EXPECT_LT(slots, most_sequences(instance, 500, work.prefill_tokens));
}

TEST(Rollout, PrefillsSharedPromptsOnce) {
  const Instance instance = small(1);
  RolloutWork work{.prompts = 8,
                   .outputs_per_prompt = 4,
                   .prompt_tokens = 1000,
                   .output = fixed_length(10),
                   .prefill_tokens = 4000};
  const RolloutEstimate shared = estimate_rollout(instance, 1, work);
  work.share_prompts = false;
  const RolloutEstimate each = estimate_rollout(instance, 1, work);
  EXPECT_NEAR(each.prefill_s / shared.prefill_s, 4, 1e-9);
  // 8 prompts, 4 at a time.
  EXPECT_NEAR(
      shared.prefill_s,
      2 * step_cost(instance, {.prefill = true, .sequences = 4, .new_tokens = 1000}).seconds, 1e-9);
}

TEST(Rollout, OfMoreGpusTakesLessTimeAndMoreOfThem) {
  const RolloutWork work{.prompts = 256,
                         .outputs_per_prompt = 8,
                         .prompt_tokens = 500,
                         .output = log_normal_length(800, 2500, 8000)};
  double before = 1e30;
  double gpu_before = 0;
  for (const std::int64_t instances : {1, 2, 4, 8, 16}) {
    const RolloutEstimate e = estimate_rollout(small(1), instances, work);
    EXPECT_LT(e.seconds, before) << instances;
    EXPECT_GT(e.gpu_seconds, gpu_before) << instances;
    before = e.seconds;
    gpu_before = e.gpu_seconds;
  }
}

TEST(Rollout, WithoutRoomForASequenceSaysSo) {
  const RolloutWork work{.prompts = 1, .prompt_tokens = 500, .output = fixed_length(200)};
  try {
    estimate_rollout(small(1, 16e9), 1, work);
    FAIL() << "16 GB of weights in 14.4";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("weights (16.1 GB)"), std::string::npos)
        << error.what();
  }
}

// ---- lengths

TEST(Lengths, LogNormalHasItsMoments) {
  for (const auto& [mean, p95] :
       {std::pair{1000.0, 2500.0}, std::pair{8000.0, 20'000.0}, std::pair{500.0, 550.0}}) {
    const LengthDistribution d = log_normal_length(mean, p95, std::int64_t{1} << 30, 2000);
    EXPECT_NEAR(d.mean() / mean, 1, 1e-3);
    double below = 0;
    for (const auto& bin : d.bins) below += static_cast<double>(bin.tokens) <= p95 ? bin.share : 0;
    EXPECT_NEAR(below, 0.95, 0.002);
    double sum = 0;
    for (const auto& bin : d.bins) sum += bin.share;
    EXPECT_NEAR(sum, 1, 1e-9);
  }
}

TEST(Lengths, AreCutOff) {
  const LengthDistribution d = log_normal_length(1000, 2500, 3000);
  EXPECT_EQ(d.longest(), 3000);
  EXPECT_LT(d.mean(), 1000);
  // Against draws of min(x, 3000), x log-normal.
  const double z = 1.6448536269514722;
  const double sigma = z - std::sqrt(z * z - 2 * std::log(2.5));
  const double mu = std::log(1000.0) - sigma * sigma / 2;
  double sum = 0;
  constexpr int kDraws = 200'000;
  for (int i = 0; i < kDraws; ++i) {
    // Quantiles in place of draws: the midpoints of equal probabilities, by bisection of erfc.
    const double p = (i + 0.5) / kDraws;
    double low = -10;
    double high = 10;
    for (int k = 0; k < 40; ++k) {
      const double middle = (low + high) / 2;
      (0.5 * std::erfc(-middle / std::sqrt(2.0)) < p ? low : high) = middle;
    }
    sum += std::min(3000.0, std::exp(mu + sigma * low));
  }
  EXPECT_NEAR(d.mean() / (sum / kDraws), 1, 1e-3);
}

TEST(Lengths, WithoutSpreadAreFixed) {
  EXPECT_EQ(log_normal_length(700, 700, 1000), fixed_length(700));
}

}  // namespace
}  // namespace orrery
