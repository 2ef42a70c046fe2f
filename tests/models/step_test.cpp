// The step as a whole, against the schedule alone (a second implementation of its timing), against
// all ranks, and against the event engine.

#include "models/step.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <set>

#include "models/layer_work.hpp"
#include "sim/memory.hpp"
#include "sim/timeline.hpp"
#include "tests/models/schedules_for_tests.hpp"

namespace orrery {
namespace {

/// A small mixture-of-experts model with as many layers as asked for.
Model small_model(std::int64_t layers) {
  Model m;
  m.name = "small";
  m.hidden = 512;
  m.vocabulary = 1024;
  m.layers = layers;
  m.attention = {.heads = 8, .kv_heads = 8, .head_dim = 64};
  m.intermediate = 1024;
  m.moe = Moe{.routed_experts = 16,
              .top_k = 2,
              .expert_intermediate = 256,
              .shared_experts = 1,
              .shared_intermediate = 256};
  m.layer_is_moe.assign(static_cast<std::size_t>(layers), true);
  return m;
}

/// Equal stages: every stage one layer; embedding and head at the ends.
Scenario small_scenario(ScheduleKind kind, int ranks, int chunks, int micro_batches) {
  Scenario s;
  const int stages = ScheduleShape{kind, ranks, chunks, micro_batches}.stages();
  s.model = small_model(stages);
  s.cluster.nodes = 64;
  s.cluster.gpus_per_node = 4;
  s.profile.device.sms = 132;
  s.plan.parallelism = {.pp = ranks, .dp = 4, .ep = 4};
  s.plan.schedule = kind;
  s.plan.chunks = chunks;
  for (int i = 0; i < stages; ++i) {
    s.plan.stages.push_back(
        {.first_layer = i, .layers = 1, .embedding = i == 0, .head = i + 1 == stages});
  }
  s.plan.sequence_length = 256;
  s.plan.global_batch_sequences = 4 * micro_batches;
  s.plan.communication_sms = 20;
  return s;
}

PriceList price_by(const Program& program, const std::function<Picoseconds(const Shape&)>& rule) {
  PriceList list;
  for (const Shape& shape : program.shapes()) list.prices.push_back({.time_ps = rule(shape)});
  return list;
}

/// Some price for every shape that depends on all of it.
Picoseconds arbitrary_price(const Shape& shape) {
  std::uint64_t hash = 1469598103934665603ULL;
  for (char c : describe(shape) + shape.label) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;
  }
  return static_cast<Picoseconds>(1'000 + hash % 1'000'000);
}

/// The chunks argument of ScheduleShape as each schedule wants it.
Scenario scenario_of(const test::SmallSchedule& c) {
  return small_scenario(c.kind, c.ranks, c.chunks, c.micro_batches);
}

// Only the expert GEMMs cost anything: 1 a forward, 1 an input gradient, 1 a weight gradient. Then
// the step must take exactly as long as the bare schedule does with F = 1, B_input = 1, W = 1, pair
// = 3.
TEST(Step, TakesAsLongAsItsScheduleWhenOnlyOneKernelCosts) {
  for (const test::SmallSchedule& c : test::kSmallSchedules) {
    const Scenario s = scenario_of(c);
    const Program program = build_step(s);
    const PriceList prices = price_by(
        program, [](const Shape& shape) { return shape.label == "routed_up" ? kPsPerUs : 0; });
    const Schedule schedule = make_schedule({c.kind, c.ranks, c.chunks, c.micro_batches});
    const double expected = run_abstract(schedule, {1, 1, 1, 3}).makespan;
    EXPECT_EQ(sweep(program, prices).makespan_ps(), static_cast<Picoseconds>(expected) * kPsPerUs)
        << name_of(c.kind);
  }
}

// One rank per class stands for all of them: every simulated slot of the full Program runs as the
// representative does.
TEST(Step, AllRanksRunAsTheirRepresentatives) {
  for (const test::SmallSchedule& c : test::kSmallSchedules) {
    const Scenario s = scenario_of(c);
    const Program one = build_step(s);
    const Program all = build_step(s, {.all_ranks = true});
    ASSERT_EQ(one.ranks(), static_cast<std::size_t>(c.ranks));
    ASSERT_EQ(all.ranks(), static_cast<std::size_t>(4 * c.ranks));
    const Timeline t_one = sweep(one, price_by(one, arbitrary_price));
    const Timeline t_all = sweep(all, price_by(all, arbitrary_price));
    EXPECT_EQ(t_one.makespan_ps(), t_all.makespan_ps()) << name_of(c.kind);
    // Busy intervals of the compute stream, per rank.
    const auto intervals = [](const Program& p, const Timeline& t) {
      std::map<std::uint32_t, std::vector<std::pair<Picoseconds, Picoseconds>>> by_rank;
      for (std::size_t i = 0; i < p.size(); ++i) {
        const OpId op(i);
        for (StreamId stream : p.streams_of(op)) {
          if (kind_of(stream) != StreamKind::compute) continue;
          by_rank[rank_of(stream).value].push_back({t.start_ps[op], t.end_ps[op]});
        }
      }
      return by_rank;
    };
    const auto rank_one = intervals(one, t_one);
    const auto rank_all = intervals(all, t_all);
    for (const auto& [rank, list] : rank_all) {
      EXPECT_EQ(list, rank_one.at(rank / 4)) << name_of(c.kind) << " rank " << rank;
    }
  }
}

TEST(Step, EngineAndSweepAgreeBitForBit) {
  for (const test::SmallSchedule& c : test::kSmallSchedules) {
    for (bool all_ranks : {false, true}) {
      const Program program = build_step(scenario_of(c), {.all_ranks = all_ranks});
      const PriceList prices = price_by(program, arbitrary_price);
      EXPECT_EQ(sweep(program, prices).fingerprint(), simulate(program, prices).fingerprint())
          << name_of(c.kind);
    }
  }
}

TEST(Step, ReleasesEveryActivationItSaved) {
  for (const test::SmallSchedule& c : test::kSmallSchedules) {
    const Program program = build_step(scenario_of(c));
    std::map<std::uint32_t, std::int64_t> left;
    for (const MemoryEffect& e : program.memory_effects()) {
      if (e.kind == MemoryKind::activations) left[e.rank.value] += e.bytes;
    }
    ASSERT_EQ(left.size(), static_cast<std::size_t>(c.ranks)) << name_of(c.kind);
    for (const auto& [rank, bytes] : left) EXPECT_EQ(bytes, 0) << name_of(c.kind) << " " << rank;
  }
}

// Peak activations: 1F1B keeps P - r micro-batches on rank r (arXiv 2104.04473), DualPipe PP + 1
// chunks on every rank (V3 report, Table 2), of one layer each here.
TEST(Step, PeakActivationsAreThePapersMultiples) {
  const auto peaks = [](const Scenario& s) {
    const Program program = build_step(s);
    const PriceList prices = price_by(
        program, [](const Shape& shape) { return shape.label == "routed_up" ? kPsPerUs : 0; });
    const MemoryTimeline memory = trace_memory(program, sweep(program, prices));
    std::vector<std::int64_t> list;
    for (const MemoryPeak& p : memory.peaks) {
      list.push_back(p.bytes_by_kind[static_cast<std::size_t>(MemoryKind::activations)]);
    }
    return list;
  };
  const Scenario s = small_scenario(ScheduleKind::one_f_one_b, 4, 1, 8);
  const std::int64_t layer = transformer_layer(s.model, s.plan, 4, true).memory.saved_bytes;
  const std::vector<std::int64_t> one = peaks(s);
  EXPECT_EQ(one[0], 4 * layer);
  EXPECT_EQ(one[1], 3 * layer);
  EXPECT_EQ(one[2], 2 * layer);
  const std::vector<std::int64_t> dual = peaks(small_scenario(ScheduleKind::dual_pipe, 4, 2, 12));
  EXPECT_EQ(dual[1], 5 * layer);
  EXPECT_EQ(dual[2], 5 * layer);
}

// An overlapped pair issues its kernels in the order of the V3 report's figure 4 and the published
// trace.
TEST(Step, OverlappedPairInterleavesInThePublishedOrder) {
  const Scenario s = small_scenario(ScheduleKind::dual_pipe, 4, 2, 12);
  const Program cell = build_cell(s, 1,
                                  {.kind = ActionKind::overlapped,
                                   .stage = 1,
                                   .micro_batch = 0,
                                   .pair_stage = 2,
                                   .pair_micro_batch = 6});
  const auto order = [&](StreamKind kind) {
    std::vector<Phase> phases;
    for (std::size_t i = 0; i < cell.size(); ++i) {
      const OpId op(i);
      if (kind_of(cell.streams_of(op)[0]) != kind) continue;
      if (phases.empty() || phases.back() != cell.tag(op).phase)
        phases.push_back(cell.tag(op).phase);
    }
    return phases;
  };
  EXPECT_EQ(order(StreamKind::compute),
            (std::vector<Phase>{Phase::attn_forward, Phase::mlp_backward, Phase::mlp_weight,
                                Phase::mlp_forward, Phase::attn_backward, Phase::attn_weight}));
  EXPECT_EQ(order(StreamKind::expert_exchange),
            (std::vector<Phase>{Phase::combine_backward, Phase::dispatch_forward,
                                Phase::dispatch_backward, Phase::combine_forward}));
}

// mlp(W) fills the time of dispatch(B) and attn(W) that of the next combine(B): when only these
// four cost anything, two expert layers' full backward takes combine + (mlp(W) | dispatch) +
// (attn(W) | combine) + (mlp(W) | dispatch) + attn(W).
TEST(Step, WeightGradientsHideTheBackwardExchanges) {
  Scenario s = small_scenario(ScheduleKind::one_f_one_b, 2, 1, 4);
  s.model = small_model(4);
  s.plan.stages = {{.first_layer = 0, .layers = 2, .embedding = true},
                   {.first_layer = 2, .layers = 2, .head = true}};
  const Program cell =
      build_cell(s, 0, {.kind = ActionKind::backward, .stage = 0, .micro_batch = 0});
  const auto one_of = [&](Phase phase) {  // the last op of each phase costs 1
    std::set<std::uint32_t> ops;
    std::map<int, std::uint32_t> last;
    for (std::size_t i = 0; i < cell.size(); ++i) {
      if (cell.tag(OpId(i)).phase == phase)
        last[cell.tag(OpId(i)).layer] = static_cast<std::uint32_t>(i);
    }
    for (const auto& [layer, op] : last) ops.insert(cell.shape(OpId(op)).value);
    return ops;
  };
  std::set<std::uint32_t> priced;
  for (Phase phase :
       {Phase::combine_backward, Phase::mlp_weight, Phase::dispatch_backward, Phase::attn_weight}) {
    priced.merge(one_of(phase));
  }
  PriceList prices;
  for (std::size_t i = 0; i < cell.shapes().size(); ++i) {
    prices.prices.push_back(
        {.time_ps = priced.count(static_cast<std::uint32_t>(i)) > 0 ? kPsPerUs : 0});
  }
  EXPECT_EQ(sweep(cell, prices).makespan_ps(), 5 * kPsPerUs);
}

// ZeRO-3 (arXiv 1910.02054, 7): every layer's parameters come in once forward and once backward,
// for each micro-batch, in order. With free computation only the gathers of experts count.
TEST(Step, Zero3GathersEveryLayerTwiceAMicroBatch) {
  Scenario s = small_scenario(ScheduleKind::gpipe, 1, 1, 3);
  s.model = small_model(5);
  s.plan.stages = {{.first_layer = 0, .layers = 5, .embedding = true, .head = true}};
  s.plan.parallelism = {.dp = 4, .ep = 1, .zero_stage = 3};
  const Program program = build_step(s);
  const PriceList prices = price_by(program, [](const Shape& shape) {
    return shape.label == "expert parameters" ? kPsPerUs : 0;
  });
  EXPECT_EQ(sweep(program, prices).makespan_ps(), 2 * 5 * 3 * kPsPerUs);
}

// A gather is hidden behind the layer before it: when a layer's forward takes as long as its
// gather, and its backward twice as long, only the first gather is exposed.
TEST(Step, Zero3PrefetchesOneLayerAhead) {
  Scenario s = small_scenario(ScheduleKind::gpipe, 1, 1, 1);
  s.model = small_model(5);
  s.plan.stages = {{.first_layer = 0, .layers = 5, .embedding = true, .head = true}};
  s.plan.parallelism = {.dp = 4, .ep = 1, .zero_stage = 3};
  const Program program = build_step(s);
  const PriceList prices = price_by(program, [](const Shape& shape) {
    return shape.label == "expert parameters" || shape.label == "routed_up" ? kPsPerUs : 0;
  });
  EXPECT_EQ(sweep(program, prices).makespan_ps(), (1 + 5 + 2 * 5) * kPsPerUs);
}

// Gradients of a stage are reduced over all its copies: DualPipe holds each stage at two positions.
TEST(Step, GradientsAreReducedOverEveryCopy) {
  const Scenario dual = small_scenario(ScheduleKind::dual_pipe, 4, 2, 12);
  const Program program = build_step(dual);
  int reductions = 0;
  for (std::size_t i = 0; i < program.size(); ++i) {
    const OpId op(i);
    if (program.tag(op).phase != Phase::gradient_sync) continue;
    const Collective& c = std::get<Collective>(program.shapes()[program.shape(op)].work);
    const std::string& label = program.shapes()[program.shape(op)].label;
    EXPECT_EQ(c.kind, CollectiveKind::reduce_scatter);
    EXPECT_EQ(c.ranks, label == "dense gradients" ? 2 * 4 : 2 * 1);
    const StageParameters p = stage_parameters(dual, program.tag(op).stage);
    EXPECT_EQ(c.bytes, 4 * (label == "dense gradients" ? p.dense : p.expert));
    std::set<std::uint32_t> ranks;
    for (StreamId stream : program.streams_of(op)) ranks.insert(rank_of(stream).value);
    const std::uint32_t stage = program.tag(op).stage;
    EXPECT_EQ(ranks,
              (std::set<std::uint32_t>{std::min(stage, 3 - stage), std::max(stage, 3 - stage)}));
    ++reductions;
  }
  EXPECT_EQ(reductions, 2 * 4);
}

TEST(Step, StageParametersAddUpToTheModel) {
  for (const test::SmallSchedule& c : test::kSmallSchedules) {
    const Scenario s = scenario_of(c);
    std::int64_t total = 0;
    for (std::size_t i = 0; i < s.plan.stages.size(); ++i) {
      const StageParameters p = stage_parameters(s, static_cast<int>(i));
      total += p.dense + 4 * p.expert;  // 4 ranks hold different experts
    }
    EXPECT_EQ(total, count_parameters(s.model).total()) << name_of(c.kind);
  }
}

// The counts were checked against published totals; a tied head is a second copy once it is on
// another stage than the embedding.
TEST(Step, StageParametersOfShippedModelsAddUpToTheirCounts) {
  for (const char* name :
       {"gpt3_175b", "qwen2_5_1_5b", "llama3_8b", "mixtral_8x7b", "deepseek_v3"}) {
    Problems problems;
    Scenario s;
    s.model = read_model(
        read_document(std::string(ORRERY_SOURCE_DIR) + "/scenarios/models/" + name + ".yaml",
                      problems),
        problems);
    problems.throw_if_any();
    const std::int64_t layers = s.model.layers;
    const std::int64_t mtp = s.model.mtp_modules;
    const std::int64_t expected = count_parameters(s.model).total() + count_parameters(s.model).mtp;
    s.plan.stages = {{.layers = layers, .embedding = true, .head = true, .mtp_modules = mtp}};
    const StageParameters whole = stage_parameters(s, 0);
    EXPECT_EQ(whole.dense + whole.expert, expected) << name;
    s.plan.stages = {{.layers = 1, .embedding = true},
                     {.first_layer = 1, .layers = layers - 1, .head = true, .mtp_modules = mtp}};
    const StageParameters a = stage_parameters(s, 0);
    const StageParameters b = stage_parameters(s, 1);
    const std::int64_t copy = s.model.tied_embeddings ? s.model.vocabulary * s.model.hidden : 0;
    EXPECT_EQ(a.dense + a.expert + b.dense + b.expert, expected + copy) << name;
  }
}

}  // namespace
}  // namespace orrery
