// A step on a network: what is published of it, and what must hold between fidelities.

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "models/step.hpp"
#include "reports/compare.hpp"
#include "reports/study.hpp"

namespace orrery {
namespace {

const std::string kScenarios = ORRERY_SOURCE_DIR "/scenarios/";

Report report_of(const std::string& name, const StudyOptions& options = {}) {
  return study_step(read_scenario(kScenarios + name + ".yaml"), options).report;
}

const TierReport& tier(const Report& report, const std::string& name) {
  for (const TierReport& t : report.network.tiers) {
    if (t.tier == name) return t;
  }
  throw std::runtime_error("no tier " + name);
}

TEST(StepNetwork, MultiPlaneAndMultiRailGiveTheSameStep) {
  // arXiv 2505.09343, Table 4: 19.926 and 19.946 s, 0.1 % apart.
  const Report mpft = report_of("deepseek_v3_2048_h800");
  const Report mrft = report_of("deepseek_v3_2048_h800_mrft");
  EXPECT_NEAR(mrft.step_time_s / mpft.step_time_s, 1, 0.002);
  // The reason: nothing of the step crosses a spine but sends between leaves and gradients, once.
  EXPECT_LT(tier(mpft, "leaf-spine").busiest_use, 0.05);
  EXPECT_LT(tier(mrft, "leaf-spine").busiest_use, 0.05);
  EXPECT_GT(tier(mpft, "NIC").busiest_use, 0.3);
  // 2048 GPUs, 2048 NICs, each way; 96 switches joined by 2048 cables (the paper's FT2), of which
  // planes of 8 leaves use as many as they are, in bundles.
  EXPECT_EQ(tier(mpft, "NVLink").links, 4096);
  EXPECT_EQ(tier(mpft, "NIC").links, 4096);
  EXPECT_EQ(tier(mrft, "leaf-spine").links, 4096);
}

TEST(StepNetwork, SharingMakesNothingFaster) {
  for (const std::string name : {"deepseek_v3_2048_h800", "qwen3_235b_256_h100",
                                 "llama3_70b_64_h100", "mixtral_8x7b_64_h100"}) {
    const Report formula = report_of(name, {.network = Network::formula});
    const Report flows = report_of(name, {.network = Network::flows});
    EXPECT_GE(flows.step_time_s, formula.step_time_s) << name;
    EXPECT_LT(flows.step_time_s, 1.05 * formula.step_time_s) << name;
    EXPECT_FALSE(formula.network.flows);
    EXPECT_TRUE(flows.network.flows);
    EXPECT_GE(flows.network.stretched_s, 0);
    EXPECT_EQ(formula.network.stretched_s, 0);
    for (const PriceRow& row : flows.prices) EXPECT_GE(row.lasted_s, row.time_s * (1 - 1e-9));
  }
}

TEST(StepNetwork, ExposedCommunicationIsExposedBySomething) {
  for (const std::string name : {"deepseek_v3_2048_h800", "llama3_70b_64_h100"}) {
    const Report r = report_of(name);
    for (const RankReport& rank : r.ranks) {
      const ExposedTimes& e = rank.exposed_s;
      EXPECT_NEAR(e.expert + e.tensor + e.data + e.pipeline, rank.phases_s.exposed_communication,
                  1e-9);
    }
  }
  EXPECT_EQ(report_of("llama3_70b_64_h100").exposed_s.expert, 0);
  EXPECT_GT(report_of("llama3_70b_64_h100").exposed_s.tensor, 0);
  EXPECT_EQ(report_of("deepseek_v3_2048_h800").exposed_s.tensor, 0);
}

TEST(StepNetwork, OneRankOfAClassCarriesWhatAllRanksDo) {
  const Report one = report_of("mixtral_8x7b_64_h100");
  const Report all = report_of("mixtral_8x7b_64_h100", {.all_ranks = true});
  EXPECT_NEAR(all.step_time_s / one.step_time_s, 1, 1e-3);
  ASSERT_EQ(one.network.tiers.size(), all.network.tiers.size());
  for (std::size_t t = 0; t < one.network.tiers.size(); ++t) {
    EXPECT_EQ(one.network.tiers[t].links, all.network.tiers[t].links);
    EXPECT_NEAR(all.network.tiers[t].mean_use / one.network.tiers[t].mean_use, 1, 2e-3);
    EXPECT_NEAR(all.network.tiers[t].busiest_use / one.network.tiers[t].busiest_use, 1, 2e-3);
  }
}

TEST(StepNetwork, AFailedCableOfOneGpuHoldsUpItsPosition) {
  // NIC 3 of node 5 at a tenth of its rate: the exchanges of its group wait for it.
  Problems problems;
  const std::string text =
      read_text(kScenarios + "fabrics/h800_2048_mpft.yaml", problems).value_or("") +
      "faults: [{link: node5/nic3, capacity_share: 0.1}]\n";
  Scenario scenario = read_scenario(kScenarios + "deepseek_v3_2048_h800.yaml");
  const double before = study_step(scenario).report.step_time_s;
  auto slow = read_fabric(read_document_text(text, "slow.yaml", problems), problems);
  problems.throw_if_any();
  scenario.fabric = std::make_shared<const Fabric>(*std::move(slow));
  const Report after = study_step(scenario).report;
  EXPECT_GT(after.step_time_s, 1.5 * before);
  EXPECT_NE(tier(after, "NIC").limiting.find("node5/nic3"), std::string::npos);
}

TEST(StepNetwork, TheOptimizerWaitsForACheckpoint) {
  Scenario scenario = read_scenario(kScenarios + "llama3_70b_64_h100.yaml");
  const double before = study_step(scenario).report.step_time_s;
  // 70.6 B parameters, 4 bytes of master weight and 8 of moments each, over 64 GPUs: 13.2 GB, of
  // which 1 GB/s takes as long as the step or so, and 0.1 GB/s ten times as long.
  scenario.plan.checkpoint = Checkpoint{0.1e9, false};
  const double stalled = study_step(scenario).report.step_time_s;
  EXPECT_GT(stalled, 70.6e9 * 12 / 64 / 0.1e9 * 0.9);
  EXPECT_LT(stalled, 70.6e9 * 12 / 64 / 0.1e9 * 1.3);
  scenario.plan.checkpoint = Checkpoint{5e9, true};
  EXPECT_NEAR(study_step(scenario).report.step_time_s / before, 1, 2e-3);
  scenario.plan.checkpoint =
      Checkpoint{40e9, false};  // most of what the NIC has, for a third of a second
  EXPECT_GE(study_step(scenario).report.step_time_s, before);
}

TEST(StepNetwork, CompareSaysWhatTheNetworkCost) {
  const Report reports[] = {report_of("mixtral_8x7b_64_h100", {.network = Network::formula}),
                            report_of("mixtral_8x7b_64_h100")};
  const std::string names[] = {"formula", "flows"};
  const std::string text = compare(reports, names);
  for (const char* row : {"NIC, busiest link's use", "NIC, time lost to one link", "of experts",
                          "op time lost to sharing"}) {
    EXPECT_NE(text.find(row), std::string::npos) << text;
  }
}

/// The same ops, without what each member of an exchange is sent: its links then carry what those
/// of the busiest do.
Program with_the_busiest_on_all_links(const Program& program) {
  ProgramBuilder builder({program.multiplicity().begin(), program.multiplicity().end()});
  for (const Shape& shape : program.shapes()) builder.intern(shape);
  for (OpId op; op.value < program.size(); ++op) {
    builder.add(program.kind(op), program.shape(op), program.tag(op), program.streams_of(op),
                program.predecessors_of(op));
  }
  return std::move(builder).seal();
}

TEST(StepNetwork, WithAllRanksLinksCarryWhatTheirGpusAreSent) {
  Scenario scenario = read_scenario(kScenarios + "qwen3_235b_256_h100.yaml");
  scenario.plan.communication_sms = 20;
  scenario.plan.global_batch_sequences = 16 * 8;
  const Program even = build_step(scenario, {.all_ranks = true});
  scenario.plan.routing = {ZipfPopularity{0.4}, {}};
  const Program program = build_step(scenario, {.all_ranks = true});
  const Program busiest = with_the_busiest_on_all_links(program);

  const auto flows = [&](const Program& p) { return run_program(scenario, p, Network::flows); };
  const ProgramRun formula = run_program(scenario, program, Network::formula);
  const ProgramRun run = flows(program);
  const ProgramRun most = flows(busiest);
  EXPECT_GE(run.timeline.makespan_ps(), formula.timeline.makespan_ps());
  EXPECT_LE(run.timeline.makespan_ps(), most.timeline.makespan_ps());
  EXPECT_EQ(run.timeline.fingerprint(), flows(program).timeline.fingerprint());

  // What goes over all links together is what goes there with even experts: some get more, others
  // less, and rounding loads to 1/128 averages out. Only a node that would be sent a token twice is
  // cut off, which with 8 choices of a token and 4 nodes happens.
  const Traffic of_even = traffic_of(even, scenario.cluster, *scenario.fabric);
  for (const LinkTier t : {LinkTier::nvlink, LinkTier::pcie, LinkTier::nic}) {
    const auto tier = static_cast<std::size_t>(t);
    const TierUse& expected = of_even.tiers[tier];
    const TierUse& use = run.traffic->tiers[tier];
    const double cut_off = t == LinkTier::nvlink ? 0 : 0.01;
    EXPECT_LT(use.busy_s, 1.001 * expected.busy_s) << name_of(t);
    EXPECT_GT(use.busy_s, (0.999 - cut_off) * expected.busy_s) << name_of(t);
    EXPECT_GT(use.busiest_s, expected.busiest_s) << name_of(t);
    EXPECT_GT(most.traffic->tiers[tier].busy_s, 1.02 * expected.busy_s) << name_of(t);
    EXPECT_GT(most.traffic->tiers[tier].busiest_s, 1.02 * use.busiest_s) << name_of(t);
  }
}

TEST(StepNetwork, FlowsNeedAFabric) {
  Scenario scenario = read_scenario(kScenarios + "mixtral_8x7b_64_h100.yaml");
  scenario.fabric = nullptr;
  EXPECT_FALSE(study_step(scenario).report.network.flows);
  EXPECT_THROW(study_step(scenario, {.network = Network::flows}), InputError);
}

}  // namespace
}  // namespace orrery
