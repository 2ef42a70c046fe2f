#include "reports/budget/budget.hpp"

#include <fmt/format.h>
#include <tbb/parallel_for.h>
#include <algorithm>
#include <map>
#include <stdexcept>

#include "reports/goodput.hpp"
#include "reports/study.hpp"
#include "reports/uncertainty.hpp"
#include "sim/units.hpp"

namespace orrery {

namespace {

/// What a budget keeps of a step.
struct StepOutcome {
  double step_s = 0;
  double peak_bytes = 0;
  double capacity_bytes = 0;
  std::string where;
  std::string plan;
  std::string device;
  bool fits() const { return peak_bytes <= capacity_bytes; }
};

StepOutcome outcome_of(const Scenario& scenario) {
  const Report report = study_step(scenario).report;
  StepOutcome outcome{.step_s = report.step_time_s,
                      .capacity_bytes = report.memory_capacity_bytes,
                      .plan = report.plan,
                      .device = report.device};
  for (const RankReport& rank : report.ranks) {
    if (static_cast<double>(rank.memory_peak_bytes) <= outcome.peak_bytes) continue;
    outcome.peak_bytes = static_cast<double>(rank.memory_peak_bytes);
    const auto& parts = rank.memory_at_peak;
    const auto largest = std::max_element(parts.begin(), parts.end());
    outcome.where = fmt::format("at pipeline position {}, {} of it {}", rank.position,
                                format_bytes(static_cast<double>(*largest)),
                                name_of(static_cast<MemoryKind>(largest - parts.begin())));
  }
  return outcome;
}

/// All of `scenarios`, each distinct one simulated once.
std::vector<StepOutcome> simulate_all(const std::vector<const Scenario*>& scenarios) {
  std::map<std::string, std::size_t> known;  // by what they resolve to
  std::vector<const Scenario*> distinct;
  std::vector<std::size_t> index;
  for (const Scenario* scenario : scenarios) {
    const auto [at, is_new] = known.emplace(to_yaml(*scenario), distinct.size());
    if (is_new) distinct.push_back(scenario);
    index.push_back(at->second);
  }
  std::vector<StepOutcome> outcomes(distinct.size());
  tbb::parallel_for(std::size_t{0}, distinct.size(),
                    [&](std::size_t i) { outcomes[i] = outcome_of(*distinct[i]); });
  std::vector<StepOutcome> all;
  for (const std::size_t i : index) all.push_back(outcomes[i]);
  return all;
}

/// Forward passes alone, the pipeline kept full: a middle position's forward cell for each
/// micro-batch and stage it holds of one.
double forward_s(const Scenario& scenario, double tokens) {
  const Plan& plan = scenario.plan;
  const int middle[] = {middle_position(scenario)};
  for (const IsolatedCell& cell :
       isolated_cells(scenario, middle, network_of(scenario, std::nullopt))) {
    if (cell.kind != CellKind::forward) continue;
    const double micro_batches =
        tokens / static_cast<double>(plan.micro_batch_sequences * plan.sequence_length *
                                     plan.parallelism.dp);
    const double passes =
        static_cast<double>(plan.stages.size()) / static_cast<double>(plan.parallelism.pp);
    return micro_batches * passes * cell.time_s;
  }
  throw std::runtime_error(
      fmt::format("{}: no forward cell to price evaluations by", scenario.name));
}

double per_step_evaluations(const Stage& stage, std::int64_t steps) {
  return static_cast<double>(steps / stage.evaluation->every_steps);
}

// --- plans near one that does not fit ------------------------------------------------------------

struct Nearby {
  std::vector<std::string> changes;  ///< overrides
  int distance = 0;
};

/// One change each at distance 1, a change with full recomputation at 2, larger splits further out.
std::vector<Nearby> nearby_plans(const Plan& plan) {
  std::vector<Nearby> list;
  const Parallelism& p = plan.parallelism;
  const std::string full = "plan.recompute=full";
  const auto add = [&](std::vector<std::string> changes, int distance) {
    list.push_back({changes, distance});
    if (plan.recompute.full) return;
    changes.push_back(full);
    list.push_back({changes, distance + 1});
  };
  if (!plan.recompute.full) list.push_back({{full}, 1});
  if (plan.micro_batch_sequences > 1) {
    add({fmt::format("plan.micro_batch={}", plan.micro_batch_sequences / 2)}, 1);
  }
  if (p.zero_stage == 0) add({"plan.layout.zero=1"}, 1);
  if (p.zero_stage < 3 && p.pp == 1) add({"plan.layout.zero=3"}, 1);
  for (std::int64_t factor = 2, distance = 1; p.dp % factor == 0 && factor <= 64;
       factor *= 2, ++distance) {
    const auto split = [&](const char* name, std::int64_t degree) {
      add({fmt::format("plan.layout.{}={}", name, degree * factor),
           fmt::format("plan.layout.dp={}", p.dp / factor)},
          static_cast<int>(distance));
    };
    split("cp", p.cp);
    if (factor <= 8) split("tp", p.tp);
    if (plan.stages.size() > 1) split("pp", p.pp);
  }
  std::stable_sort(list.begin(), list.end(),
                   [](const Nearby& a, const Nearby& b) { return a.distance < b.distance; });
  return list;
}

/// The fastest of the nearest changes of the plan with which the stage fits.
std::string nearest_that_fits(const Stage& stage, const Plan& plan) {
  const std::vector<Nearby> candidates = nearby_plans(plan);
  for (std::size_t begin = 0; begin < candidates.size();) {
    std::vector<Scenario> scenarios;
    std::vector<std::string> changes;
    std::size_t end = begin;
    for (; end < candidates.size() && candidates[end].distance == candidates[begin].distance;
         ++end) {
      Overrides overrides = stage.overrides;
      for (const std::string& text : candidates[end].changes) overrides.push_back({text});
      try {
        scenarios.push_back(read_scenario(stage.scenario, overrides));
        changes.push_back(fmt::format("[{}]", fmt::join(candidates[end].changes, ", ")));
      } catch (const InputError&) {
        continue;  // impossible for another reason
      }
    }
    std::vector<const Scenario*> pointers;
    for (const Scenario& s : scenarios) pointers.push_back(&s);
    const std::vector<StepOutcome> outcomes = simulate_all(pointers);
    const StepOutcome* best = nullptr;
    for (const StepOutcome& outcome : outcomes) {
      if (outcome.fits() && (best == nullptr || outcome.step_s < best->step_s)) best = &outcome;
    }
    if (best != nullptr) {
      return fmt::format("set: {} fits, with {} and a step of {}",
                         changes[static_cast<std::size_t>(best - outcomes.data())],
                         format_bytes(best->peak_bytes), format_seconds(best->step_s));
    }
    begin = end;
  }
  return "";
}

// --- sums ----------------------------------------------------------------------------------------

RolloutBudget rollouts_of(const Rollouts& rollouts, std::int64_t steps, const Scenario& scenario) {
  RolloutBudget budget;
  budget.rollouts = (steps + rollouts.steps - 1) / rollouts.steps;
  budget.one = estimate_rollout(rollouts.instance, rollouts.instances, rollouts.work);
  budget.tokens = rollouts.tokens();
  const auto count = static_cast<double>(budget.rollouts);
  budget.generation_s = count * budget.one.seconds;
  if (rollouts.reference_passes > 0) {
    budget.reference_s = count * static_cast<double>(rollouts.reference_passes) *
                         forward_s(scenario, budget.tokens / rollouts.packing);
  }
  budget.switch_s = count * rollouts.switch_s;
  return budget;
}

/// Draws of the time of a stage over its useful time as simulated: step times, and failures.
struct Draws {
  std::vector<double> step_factors;  ///< empty: not drawn
  std::vector<double> goodputs;      ///< likewise
};

/// Every step time with every goodput: they are independent.
Interval gpu_hours_of(const Draws& draws, double useful_gpu_hours) {
  const std::vector<double> one{1.0};
  std::vector<double> hours;
  for (const double factor : draws.step_factors.empty() ? one : draws.step_factors) {
    for (const double goodput : draws.goodputs.empty() ? one : draws.goodputs) {
      hours.push_back(useful_gpu_hours * factor / goodput);
    }
  }
  return interval_of(std::move(hours));
}

StageBudget budget_of(const Recipe& recipe, const Stage& stage, const StepOutcome* outcomes,
                      const BudgetOptions& options) {
  StageBudget budget{.name = stage.name, .kind = stage.kind};
  for (std::size_t i = 0; i < stage.runs.size(); ++i) {
    const StageRun& run = stage.runs[i];
    const Plan& plan = run.scenario.plan;
    budget.runs.push_back({plan.global_batch_sequences, run.steps, outcomes[i].step_s});
    budget.steps += run.steps;
    budget.tokens += static_cast<double>(run.steps) *
                     static_cast<double>(plan.global_batch_sequences * plan.sequence_length);
    budget.training_s += static_cast<double>(run.steps) * outcomes[i].step_s;
    if (outcomes[i].peak_bytes > budget.peak_bytes) {
      budget.peak_bytes = outcomes[i].peak_bytes;
      if (!outcomes[i].fits()) {
        budget.unfit = Unfit{.peak_bytes = outcomes[i].peak_bytes,
                             .capacity_bytes = outcomes[i].capacity_bytes,
                             .where = outcomes[i].where};
      }
    }
  }
  const Scenario& last = stage.runs.back().scenario;
  const StepOutcome& outcome = outcomes[stage.runs.size() - 1];
  budget.plan = outcome.plan;
  budget.device = outcome.device;
  budget.capacity_bytes = outcome.capacity_bytes;
  budget.gpus = last.plan.parallelism.world();
  if (stage.evaluation) {
    budget.evaluation_s = per_step_evaluations(stage, budget.steps) *
                          forward_s(last, static_cast<double>(stage.evaluation->tokens));
  }
  if (stage.rollouts) budget.rollouts = rollouts_of(*stage.rollouts, budget.steps, last);
  const double useful_s =
      budget.training_s + budget.evaluation_s + (budget.rollouts ? budget.rollouts->sum() : 0.0);
  Draws draws;
  double factor = recipe.goodput.factor;
  if (recipe.reliability) {
    Goodput failing = goodput(*recipe.reliability, job_of(last, *recipe.reliability), useful_s,
                              {.trials = options.trials, .seed = last.seed});
    budget.goodput = failing.goodput;
    factor = failing.goodput.p50;
    draws.goodputs = std::move(failing.goodputs);
  }
  if (options.uncertainty) draws.step_factors = uncertainty(study_step(last)).factors;
  budget.lost_s = useful_s / factor - useful_s;
  if (!draws.step_factors.empty() || !draws.goodputs.empty()) {
    const double stated = recipe.reliability ? 1 : factor;
    budget.gpu_hours =
        gpu_hours_of(draws, useful_s / stated / 3600 * static_cast<double>(budget.gpus));
  }
  budget.bill = bill_of(recipe, useful_s + budget.lost_s, budget.gpus, last.cluster.gpus_per_node);
  return budget;
}

double predicted(const Budget& budget, const Published& row) {
  Bill sum;
  double tokens = 0;
  double steps = 0;
  double training_s = 0;
  for (const std::size_t i : row.stages) {
    const StageBudget& stage = budget.stages[i];
    sum.gpu_hours += stage.bill.gpu_hours;
    sum.wall_s += stage.bill.wall_s;
    sum.cost_usd += stage.bill.cost_usd;
    tokens += stage.tokens;
    steps += static_cast<double>(stage.steps);
    training_s += stage.training_s;
  }
  switch (row.quantity) {
    case Quantity::gpu_hours:
      return sum.gpu_hours;
    case Quantity::gpu_hours_per_trillion_tokens:
      return sum.gpu_hours / tokens * 1e12;
    case Quantity::cost_usd:
      return sum.cost_usd;
    case Quantity::days:
      return sum.wall_s / 86400;
    case Quantity::step_time_s:
      return training_s / steps;
  }
  return 0;
}

}  // namespace

bool Budget::fits() const {
  return std::none_of(stages.begin(), stages.end(),
                      [](const StageBudget& stage) { return stage.unfit.has_value(); });
}

bool Budget::aims_met() const {
  return std::all_of(published.begin(), published.end(),
                     [](const PublishedRow& row) { return row.met(); });
}

Bill bill_of(const Recipe& recipe, double wall_s, std::int64_t gpus, std::int64_t gpus_per_node) {
  Bill bill{.gpu_hours = wall_s / 3600 * static_cast<double>(gpus), .wall_s = wall_s};
  if (recipe.power) {
    const double gpu_w =
        recipe.power->node_w / static_cast<double>(gpus_per_node) + recipe.power->network_w_per_gpu;
    bill.energy_kwh = bill.gpu_hours * gpu_w / 1000 * recipe.power->pue;
  }
  if (recipe.money) {
    if (const auto* rent = std::get_if<Rent>(&recipe.money->kind)) {
      bill.cost_usd = bill.gpu_hours * rent->usd_per_gpu_hour;
    } else {
      const auto& purchase = std::get<Purchase>(recipe.money->kind);
      bill.cost_usd =
          bill.gpu_hours * purchase.usd_per_gpu_hour() + bill.energy_kwh * purchase.usd_per_kwh;
    }
  }
  return bill;
}

Budget make_budget(Recipe recipe, const BudgetOptions& options) {
  std::vector<const Scenario*> scenarios;
  for (const Stage& stage : recipe.stages) {
    for (const StageRun& run : stage.runs) scenarios.push_back(&run.scenario);
  }
  const std::vector<StepOutcome> outcomes = simulate_all(scenarios);
  Budget budget;
  std::size_t first = 0;
  for (const Stage& stage : recipe.stages) {
    StageBudget& added =
        budget.stages.emplace_back(budget_of(recipe, stage, &outcomes[first], options));
    first += stage.runs.size();
    if (added.unfit && options.nearest) {
      added.unfit->nearest = nearest_that_fits(stage, stage.runs.back().scenario.plan);
    }
    if (added.gpu_hours) {
      if (!budget.gpu_hours) budget.gpu_hours = Interval{};
      budget.gpu_hours->p10 += added.gpu_hours->p10;
      budget.gpu_hours->p50 += added.gpu_hours->p50;
      budget.gpu_hours->p90 += added.gpu_hours->p90;
      budget.gpu_hours->mean += added.gpu_hours->mean;
    }
    budget.tokens += added.tokens;
    budget.total.gpu_hours += added.bill.gpu_hours;
    budget.total.wall_s += added.bill.wall_s;
    budget.total.energy_kwh += added.bill.energy_kwh;
    budget.total.cost_usd += added.bill.cost_usd;
  }
  for (const Published& row : recipe.published) {
    budget.published.push_back({row, predicted(budget, row)});
  }
  budget.recipe = std::move(recipe);
  return budget;
}

}  // namespace orrery
