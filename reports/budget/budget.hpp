#pragma once
// What a recipe comes to: GPU-hours, days, energy and money of each stage.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "reports/budget/recipe.hpp"
#include "reports/interval.hpp"

namespace orrery {

/// Steps of one size and what one takes.
struct PricedRun {
  std::int64_t batch = 0;  ///< sequences
  std::int64_t steps = 0;
  double step_s = 0;
};

/// A stage that needs more memory than the GPU has.
struct Unfit {
  double peak_bytes = 0;
  double capacity_bytes = 0;
  std::string where;    ///< what is largest, and on which pipeline position
  std::string nearest;  ///< the nearest plan that fits, in words; empty: none was found
};

struct Bill {
  double gpu_hours = 0;
  double wall_s = 0;
  double energy_kwh = 0;  ///< of the facility; 0 where the recipe gives no power
  double cost_usd = 0;    ///< 0 where the recipe gives no money
};

/// The rest of reinforcement learning's time.
struct RolloutBudget {
  std::int64_t rollouts = 0;
  RolloutEstimate one;      ///< of them
  double tokens = 0;        ///< of one, prompts included
  double generation_s = 0;  ///< of all
  double reference_s = 0;
  double switch_s = 0;

  double sum() const { return generation_s + reference_s + switch_s; }
};

struct StageBudget {
  std::string name;
  StageKind kind{};
  std::string plan;  ///< "2048 x NVIDIA H800 SXM, TP1 CP1 PP16 ..."
  std::string device;
  std::int64_t gpus = 0;
  double tokens = 0;
  std::int64_t steps = 0;
  std::vector<PricedRun> runs;
  double training_s = 0;    ///< forward, backward and optimizer of all steps
  double evaluation_s = 0;  ///< forward passes only
  std::optional<RolloutBudget> rollouts;
  double lost_s = 0;  ///< wall time beyond those: what goodput leaves out (its median, if drawn)
  Bill bill;
  std::optional<Interval> goodput;    ///< simulated, of the recipe's reliability
  std::optional<Interval> gpu_hours;  ///< where prices' errors or failures were drawn
  double peak_bytes = 0;              ///< the largest of all runs
  double capacity_bytes = 0;
  std::optional<Unfit> unfit;

  double mean_step_s() const { return steps == 0 ? 0 : training_s / static_cast<double>(steps); }
};

struct PublishedRow {
  Published published;
  double predicted = 0;
  double error() const { return predicted / published.value - 1; }
  bool met() const { return error() <= published.aim && error() >= -published.aim; }
};

struct Budget {
  Recipe recipe;
  std::vector<StageBudget> stages;
  Bill total;                         ///< stages one after another
  std::optional<Interval> gpu_hours;  ///< of all stages, which err together
  double tokens = 0;
  std::vector<PublishedRow> published;

  bool fits() const;
  bool aims_met() const;
};

struct BudgetOptions {
  bool nearest = true;        ///< look for plans near one that does not fit
  bool uncertainty = false;   ///< carry the prices' errors through a step of each stage
  std::int64_t trials = 200;  ///< of failures
};

/// Simulates one step of each size of each stage, equal ones once, in parallel.
Budget make_budget(Recipe recipe, const BudgetOptions& options = {});

/// Of a stage that trains for `seconds` on `gpus`, of which a node has `gpus_per_node`.
Bill bill_of(const Recipe& recipe, double wall_s, std::int64_t gpus, std::int64_t gpus_per_node);

std::string to_terminal(const Budget& budget);
std::string to_json(const Budget& budget);
/// Stages as rows, in columns of FOCUS 1.2 (FinOps Open Cost and Usage Specification) where one
/// means the same, the rest as custom columns (x_...). What a bill has and a forecast has not
/// (dates, accounts) is left out.
std::string to_csv(const Budget& budget);

}  // namespace orrery
