// Uneven experts and slow GPUs in the step: one rank a class against all ranks, what adds up, and
// that nothing of it shows where experts are even.

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>

#include "models/step.hpp"
#include "sim/memory.hpp"
#include "sim/timeline.hpp"
#include "tests/models/schedules_for_tests.hpp"

namespace orrery {
namespace {

constexpr std::int64_t kExperts = 16;
constexpr std::int64_t kTopK = 2;
constexpr std::int64_t kTokens = 512;  // of a rank's micro-batch

/// `ep` GPUs a group on nodes of 4; stages of one layer.
Scenario scenario_of(ScheduleKind kind, int ranks, int chunks, int micro_batches, Routing routing,
                     std::int64_t dp = 4) {
  Scenario s;
  const int stages = ScheduleShape{kind, ranks, chunks, micro_batches}.stages();
  s.model.hidden = 512;
  s.model.vocabulary = 1024;
  s.model.layers = stages;
  s.model.attention = {.heads = 8, .kv_heads = 8, .head_dim = 64};
  s.model.intermediate = 1024;
  s.model.moe = Moe{.routed_experts = kExperts,
                    .top_k = kTopK,
                    .expert_intermediate = 256,
                    .shared_experts = 1,
                    .shared_intermediate = 256};
  s.model.layer_is_moe.assign(static_cast<std::size_t>(stages), true);
  s.cluster.nodes = 64;
  s.cluster.gpus_per_node = 4;
  s.profile.device.sms = 132;
  s.plan.parallelism = {.pp = ranks, .dp = dp, .ep = 4};
  s.plan.schedule = kind;
  s.plan.chunks = chunks;
  for (int i = 0; i < stages; ++i) {
    s.plan.stages.push_back(
        {.first_layer = i, .layers = 1, .embedding = i == 0, .head = i + 1 == stages});
  }
  s.plan.sequence_length = kTokens;
  s.plan.global_batch_sequences = dp * micro_batches;
  s.plan.communication_sms = 20;
  s.plan.routing = std::move(routing);
  return s;
}

Routing skewed() {
  return {ZipfPopularity{0.6}, 64};
}

Scenario scenario_of(const test::SmallSchedule& c, Routing routing, std::int64_t dp = 4) {
  return scenario_of(c.kind, c.ranks, c.chunks, c.micro_batches, std::move(routing), dp);
}

PriceList price_by(const Program& program, const std::function<Picoseconds(const Shape&)>& rule) {
  PriceList list;
  for (const Shape& shape : program.shapes()) list.prices.push_back({.time_ps = rule(shape)});
  return list;
}

/// In proportion to the rows of routed experts and to the bytes of exchanges; all else alike.
Picoseconds proportional(const Shape& shape) {
  if (const auto* g = std::get_if<Gemm>(&shape.work); g != nullptr && g->groups > 1) {
    return 1000 * g->groups * (g->pass == Pass::backward_weight ? g->k : g->m);
  }
  if (const auto* e = std::get_if<ExpertExchange>(&shape.work)) {
    return 100 * (e->busiest_gpu_per_mille + e->busiest_node_per_mille);
  }
  return std::holds_alternative<Mark>(shape.work) ? 0 : 20'000;
}

Picoseconds time_of(const Scenario& s, bool all_ranks,
                    const std::function<Picoseconds(const Shape&)>& rule) {
  const Program program = build_step(s, {.all_ranks = all_ranks});
  return sweep(program, price_by(program, rule)).makespan_ps();
}

// Only the forward GEMMs of routed experts cost anything, each between two exchanges at which the
// group waits for its busiest GPU, on one stage: the step is the sum of the busiest loads, in both
// ways of simulating it, and that sum is known from the loads alone.
TEST(UnevenStep, WithAnExchangeBehindEveryCostTheBusiestDecides) {
  const Scenario s = scenario_of(ScheduleKind::gpipe, 1, 1, 10, skewed());
  const auto forward = [](const Shape& shape) -> Picoseconds {
    const auto* g = std::get_if<Gemm>(&shape.work);
    const bool costs = shape.label == "routed_up" && g != nullptr && g->pass == Pass::forward;
    return costs ? 1000 * g->m : 0;
  };
  const ExpertLoads loads = expert_loads(s);
  const double mean_rows = double{kTokens} * kTopK * 4 / kExperts;  // of one expert
  Picoseconds expected = 0;
  for (std::int64_t m = 0; m < 10; ++m) {
    expected += 1000 * std::llround(mean_rows * load_of(loads.group_load(0, m, 0).busiest_gpu));
  }
  EXPECT_EQ(time_of(s, false, forward), expected);
  EXPECT_EQ(time_of(s, true, forward), expected);
}

// With all costs in proportion to rows:
//   even <= all ranks: some chain of ops is the even step; over the GPUs its mean time is the same
//   with
//     uneven rows, and the step is no shorter than the chain of any GPU.
//   all ranks <= one rank a class: every op of a representative takes as long as the longest of its
//   class.
// How far all ranks lie below is what weight gradients and overlap absorb, which do not wait.
TEST(UnevenStep, AllRanksLieBetweenEvenAndOneRankAClass) {
  for (const test::SmallSchedule& c : test::kSmallSchedules) {
    const Picoseconds even = time_of(scenario_of(c, {}), true, proportional);
    const Scenario s = scenario_of(c, skewed());
    const Picoseconds one = time_of(s, false, proportional);
    const Picoseconds all = time_of(s, true, proportional);
    const auto rounding = static_cast<Picoseconds>(static_cast<double>(even) / kLoadLevels);
    EXPECT_GE(all, even - rounding) << name_of(c.kind);
    EXPECT_LE(all, one) << name_of(c.kind);
    EXPECT_GT(one, even + even / 20) << name_of(c.kind);
    // Forward and input gradient, two of the three passes over the rows, lie between exchanges at
    // which everyone waits: at least half of what the class pays is there with all ranks.
    EXPECT_GT(all - even, (one - even) / 2) << name_of(c.kind);
  }
}

// Rows of every layer and micro-batch over the GPUs of each group: tokens times top_k, to the
// rounding of half a level a GPU and half a row an expert.
TEST(UnevenStep, RowsOfAGroupAddUp) {
  const Scenario s = scenario_of(test::kSmallSchedules[5], skewed(), 8);
  const Program program = build_step(s, {.all_ranks = true});
  std::map<std::tuple<int, int, std::uint32_t>, double> rows;
  for (std::size_t i = 0; i < program.size(); ++i) {
    const OpId op(i);
    const Shape& shape = program.shapes()[program.shape(op)];
    const auto* g = std::get_if<Gemm>(&shape.work);
    if (shape.label != "routed_up" || g == nullptr || g->pass != Pass::forward) continue;
    const std::uint32_t rank = rank_of(program.streams_of(op).front()).value;
    const OpTag& tag = program.tag(op);
    rows[{tag.layer, tag.micro_batch, rank % 8 / 4}] += static_cast<double>(g->m * g->groups);
  }
  EXPECT_EQ(rows.size(), static_cast<std::size_t>(s.model.layers * s.plan.micro_batches() * 2));
  const double expected = 4 * kTokens * kTopK;
  const double rounding = 4 * (0.5 / kLoadLevels * kTokens * kTopK + 0.5 * kExperts / 4);
  for (const auto& [key, sum] : rows) EXPECT_NEAR(sum, expected, rounding);
}

// With all ranks an exchange says what each GPU of its group is sent: the tokens drawn for its
// experts. With one rank a class it says only what the busiest is.
TEST(UnevenStep, ExchangesSayWhatEachMemberIsSent) {
  const Scenario s = scenario_of(test::kSmallSchedules[5], skewed(), 8);
  const ExpertLoads loads = expert_loads(s);
  const Program program = build_step(s, {.all_ranks = true});
  std::size_t exchanges = 0;
  for (OpId op; op.value < program.size(); ++op) {
    const auto members = program.member_loads(op);
    const Shape& shape = program.shapes()[program.shape(op)];
    const auto* e = std::get_if<ExpertExchange>(&shape.work);
    if (e == nullptr) {
      EXPECT_TRUE(members.empty()) << program.name(op);
      continue;
    }
    ++exchanges;
    const auto streams = program.streams_of(op);
    ASSERT_EQ(members.size(), streams.size()) << program.name(op);
    const OpTag& tag = program.tag(op);
    std::int64_t busiest = 0;
    for (std::size_t i = 0; i < streams.size(); ++i) {
      const std::int64_t slot = rank_of(streams[i]).value % 8;
      const auto tokens = loads.tokens_of_experts(tag.layer, tag.micro_batch, slot / 4);
      const auto first = tokens.begin() + slot % 4 * (kExperts / 4);
      const auto rows = std::accumulate(first, first + kExperts / 4, std::int64_t{0});
      const double over_mean = static_cast<double>(rows) / (kTokens * kTopK);
      EXPECT_NEAR(members[i], 1000 * over_mean, 1000 * 0.5 / kLoadLevels + 0.5);
      busiest = std::max<std::int64_t>(busiest, members[i]);
    }
    EXPECT_EQ(busiest, e->busiest_gpu_per_mille) << program.name(op);
  }
  // Dispatch and combine, forward and backward, of each layer, micro-batch and group of experts.
  EXPECT_EQ(exchanges, static_cast<std::size_t>(4 * s.model.layers * s.plan.micro_batches() * 2));
  const Program one = build_step(s);
  for (OpId op; op.value < one.size(); ++op) EXPECT_TRUE(one.member_loads(op).empty());
}

// The representative's rows are rounded like everyone's. Rounding is to the nearest, so over a
// step's draws it averages out: here the mean of the busiest loads is kept to a tenth of a level.
TEST(UnevenStep, RoundingToLevelsAveragesOut) {
  const Scenario s = scenario_of(ScheduleKind::gpipe, 1, 1, 2000, Routing{ZipfPopularity{0.6}, {}});
  const ExpertLoads loads = expert_loads(s);
  double exact = 0;
  double rounded = 0;
  for (std::int64_t m = 0; m < 2000; ++m) {
    const auto tokens = loads.tokens_of_experts(0, m, 0);
    std::int64_t most = 0;
    for (std::size_t g = 0; g < 4; ++g) {
      most =
          std::max(most, tokens[4 * g] + tokens[4 * g + 1] + tokens[4 * g + 2] + tokens[4 * g + 3]);
    }
    exact += static_cast<double>(most) / (kTokens * kTopK);
    rounded += load_of(loads.group_load(0, m, 0).busiest_gpu);
  }
  EXPECT_NEAR(rounded / 2000, exact / 2000, 0.1 / kLoadLevels);
}

TEST(UnevenStep, EngineAndSweepAgreeBitForBit) {
  for (const test::SmallSchedule& c : test::kSmallSchedules) {
    for (const bool all_ranks : {false, true}) {
      Scenario s = scenario_of(c, skewed());
      s.stragglers = {SlowGpu{2, 1.1}, SpeedSpread{0.02}};
      const Program program = build_step(s, {.all_ranks = all_ranks});
      const PriceList prices = price_by(program, proportional);
      EXPECT_EQ(sweep(program, prices).fingerprint(), simulate(program, prices).fingerprint())
          << name_of(c.kind);
    }
  }
}

TEST(UnevenStep, ReleasesWhatItSavedAndKeepsWhatItsRowsNeed) {
  for (const test::SmallSchedule& c : test::kSmallSchedules) {
    for (const bool all_ranks : {false, true}) {
      const Program program = build_step(scenario_of(c, skewed()), {.all_ranks = all_ranks});
      const Program even = build_step(scenario_of(c, {}), {.all_ranks = all_ranks});
      std::map<std::uint32_t, std::int64_t> left;
      std::int64_t saved = 0;
      std::int64_t saved_even = 0;
      for (const MemoryEffect& e : program.memory_effects()) {
        if (e.kind != MemoryKind::activations) continue;
        left[e.rank.value] += e.bytes;
        if (e.bytes > 0) saved += e.bytes;
      }
      for (const MemoryEffect& e : even.memory_effects()) {
        if (e.kind == MemoryKind::activations && e.bytes > 0) saved_even += e.bytes;
      }
      for (const auto& [rank, bytes] : left) EXPECT_EQ(bytes, 0) << name_of(c.kind) << rank;
      if (all_ranks) {  // what all keep together is the same, but for rounding
        EXPECT_NEAR(static_cast<double>(saved), static_cast<double>(saved_even),
                    0.01 * static_cast<double>(saved_even));
      } else {  // the fullest keeps more than the mean
        EXPECT_GT(saved, saved_even);
      }
    }
  }
}

// With a popularity of exponent 0 and no variation every load is exactly the mean: the same
// Program.
TEST(UnevenStep, EvenLoadsAreBalanced) {
  for (const test::SmallSchedule& c : test::kSmallSchedules) {
    for (const bool all_ranks : {false, true}) {
      const Routing drawn{ZipfPopularity{0}, 0};
      const Program a = build_step(scenario_of(c, {}), {.all_ranks = all_ranks});
      const Program b = build_step(scenario_of(c, drawn), {.all_ranks = all_ranks});
      EXPECT_EQ(a.shapes().size(), b.shapes().size());
      EXPECT_EQ(sweep(a, price_by(a, proportional)).fingerprint(),
                sweep(b, price_by(b, proportional)).fingerprint());
    }
  }
}

// One GPU holds all experts: whatever is popular, its rows are the same.
TEST(UnevenStep, OneGpuAGroupIsAlwaysEven) {
  Scenario s = scenario_of(test::kSmallSchedules[1], skewed());
  s.plan.parallelism.ep = 1;
  Scenario even = s;
  even.plan.routing = {};
  EXPECT_EQ(time_of(s, true, proportional), time_of(even, true, proportional));
}

TEST(UnevenStep, StatedImbalanceIsThatOfEveryLayer) {
  const Scenario s = scenario_of(ScheduleKind::gpipe, 1, 1, 10, Routing{StatedImbalance{1.5}, {}});
  const auto routed = [](const Shape& shape) -> Picoseconds {
    const auto* g = std::get_if<Gemm>(&shape.work);
    return shape.label == "routed_up" && g != nullptr && g->pass == Pass::forward ? g->m : 0;
  };
  EXPECT_EQ(time_of(s, false, routed), 10 * 3 * kTokens * kTopK * 4 / kExperts / 2);
}

// --- stragglers ----------------------------------------------------------------------------------

// One stage, all cost on the compute stream between exchanges: the slowest decides.
TEST(SlowGpus, TheSlowestOfAGroupDecides) {
  Scenario s = scenario_of(ScheduleKind::gpipe, 1, 1, 10, {});
  const auto forward = [](const Shape& shape) -> Picoseconds {
    const auto* g = std::get_if<Gemm>(&shape.work);
    return shape.label == "routed_up" && g != nullptr && g->pass == Pass::forward ? 1000 : 0;
  };
  EXPECT_EQ(time_of(s, true, forward), 10'000);
  s.stragglers = {SlowGpu{2, 1.25}, SlowGpu{1, 1.125}};
  EXPECT_EQ(time_of(s, true, forward), 12'500);
  EXPECT_EQ(time_of(s, false, forward), 12'500);
}

TEST(SlowGpus, AllRanksLieBetweenNoneAndOneRankAClass) {
  for (const test::SmallSchedule& c : test::kSmallSchedules) {
    Scenario s = scenario_of(c, {});
    const Picoseconds none = time_of(s, true, proportional);
    s.stragglers = {SlowGpu{5, 1.2}};
    const Picoseconds one = time_of(s, false, proportional);
    const Picoseconds all = time_of(s, true, proportional);
    EXPECT_LT(none, all) << name_of(c.kind);
    EXPECT_LE(all, one) << name_of(c.kind);
    EXPECT_LE(one, none + none / 5 + 1) << name_of(c.kind);
  }
}

}  // namespace
}  // namespace orrery
