#pragma once
// A recipe: a whole training programme, stage by stage, and what GPUs and their power cost.
//
//   name, source
//   price: {gpu_hour: 2 USD, source}, or (none)
//   purchase: {gpu: USD with its share of servers and network, life: 1461 days, utilisation (1),
//              energy: USD per kWh (0), operation: USD per GPU-hour (0), source}
//   power: {node: W of a node under training, network: W per GPU beside that (0),
//           pue: facility over IT (1), source}                                            (none)
//   goodput: {factor: of the time that is spent on steps which count, source}, or            (1)
//   reliability: a file of what fails (models/reliability.hpp), from which it is simulated
//   stages: a list of
//     name, kind: pre_training | context_extension | fine_tuning | distillation |
//                 reinforcement_learning, source, assumptions (list of words)
//     scenario: a file; set: overrides of it, [PATH=VALUE, ...] (none); sim/overrides.hpp
//     one of tokens, steps and samples: {count, epochs (1), mean_tokens, packing (1)}
//     ramp: {from, increment, tokens}: of the global batch up to the plan's, as batches() says;
//           below: {batch, set}: more overrides for batches below that one
//     evaluation: {every: steps, tokens}: forward passes only
//     rollout: {generation: a file (models/generation_scenario.hpp) with a rollout, set (none),
//               steps: that train on one rollout, packing (1), reference: forward passes over all
//               tokens (1, of the reference policy), switch: time between the two (0)}; the batch
//               then follows from the tokens of a step, and its samples from the rollout
//   published: a list of {of: names of stages (all), quantity, value, aim, source, note (none)};
//              quantity: gpu_hours | gpu_hours_per_trillion_tokens | cost_usd | days | step_time_s
//
// models/scenario.hpp says what a scenario is.

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "models/generation_scenario.hpp"
#include "models/scenario.hpp"
#include "sim/config.hpp"

namespace orrery {

enum class StageKind : std::uint8_t {
  pre_training,
  context_extension,
  fine_tuning,
  distillation,
  reinforcement_learning
};
std::string_view name_of(StageKind kind);

/// GPU-hours at a price; energy is in it.
struct Rent {
  double usd_per_gpu_hour = 0;
};

/// GPUs that are bought, and written off evenly over the hours they are used.
struct Purchase {
  double usd_per_gpu = 0;  ///< with its share of servers and network
  double life_s = 0;
  double utilisation = 1;  ///< of the life that is sold to some programme
  double usd_per_kwh = 0;  ///< at the meter
  double operation_usd_per_gpu_hour = 0;

  double usd_per_gpu_hour() const {  ///< without energy
    return usd_per_gpu / (life_s / 3600 * utilisation) + operation_usd_per_gpu_hour;
  }
};

struct Money {
  std::variant<Rent, Purchase> kind;
  std::string source;
};

/// Mean power while a stage runs.
struct Power {
  double node_w = 0;             ///< one node with all its GPUs
  double network_w_per_gpu = 0;  ///< switches and what else is not in the node
  double pue = 1;                ///< facility energy over that of the equipment
  std::string source;
};

struct StatedGoodput {
  double factor = 1;  ///< steps that count over wall time
  std::string source;
};

/// What a stage trains on: tokens, steps, or samples.
struct TokenCount {
  std::int64_t tokens = 0;
};
struct StepCount {
  std::int64_t steps = 0;
};
struct SampleSet {
  std::int64_t samples = 0;
  double epochs = 1;
  double mean_tokens = 0;  ///< of a sample
  double packing = 1;      ///< tokens of samples over tokens of the sequences they are packed into
};
using Amount = std::variant<TokenCount, StepCount, SampleSet>;

struct Ramp {
  std::int64_t from = 0;  ///< sequences
  std::int64_t increment = 0;
  std::int64_t tokens = 0;  ///< that the whole ramp takes
};

/// Steps of one size.
struct BatchRun {
  std::int64_t batch = 0;  ///< sequences
  std::int64_t steps = 0;

  friend bool operator==(const BatchRun&, const BatchRun&) = default;
};

/// Steps of a stage in order, the last one whole. The ramp is Megatron-LM's (--rampup-batch-size):
/// batches from, from + increment, ... below `batch` are each kept for the same number of samples,
/// which together are the ramp's tokens; a size ends with the step that reaches its share.
std::vector<BatchRun> batches(const Amount& amount, const std::optional<Ramp>& ramp,
                              std::int64_t batch, std::int64_t sequence_length);

/// Outputs that are generated, judged and trained on, in turns on the same GPUs.
struct Rollouts {
  Instance instance;
  std::int64_t instances = 0;
  RolloutWork work;
  std::int64_t steps = 1;             ///< of training, on the outputs of one rollout
  double packing = 1;                 ///< as SampleSet's
  std::int64_t reference_passes = 1;  ///< forward, over all tokens
  double switch_s = 0;                ///< from generating to training and back

  double tokens() const {  ///< of a rollout, prompts included
    return static_cast<double>(work.sequences()) *
           (static_cast<double>(work.prompt_tokens) + work.output.mean());
  }
};

struct EvaluationOverhead {
  std::int64_t every_steps = 0;
  std::int64_t tokens = 0;  ///< each time
};

/// Steps of one size with the scenario of one.
struct StageRun {
  Scenario scenario;
  std::int64_t steps = 0;
};

struct Stage {
  std::string name;
  StageKind kind{};
  std::string source;
  std::vector<std::string> assumptions;
  std::string scenario;  ///< its file
  Overrides overrides;
  Amount amount;
  std::vector<StageRun> runs;
  std::optional<EvaluationOverhead> evaluation;
  std::optional<Rollouts> rollouts;
};

enum class Quantity : std::uint8_t {
  gpu_hours,
  gpu_hours_per_trillion_tokens,
  cost_usd,
  days,
  step_time_s
};
std::string_view name_of(Quantity quantity);

/// A figure that somebody published of some of the stages.
struct Published {
  std::vector<std::size_t> stages;  ///< indices
  std::string of;                   ///< their names, or "total"
  Quantity quantity{};
  double value = 0;
  double aim = 0;  ///< relative error
  std::string source;
  std::string note;
};

struct Recipe {
  std::string name;
  std::string file;
  std::string source;
  std::optional<Money> money;
  std::optional<Power> power;
  StatedGoodput goodput;
  std::optional<Reliability> reliability;  ///< instead
  std::vector<Stage> stages;
  std::vector<Published> published;
  std::vector<std::string> notes;  ///< of the scenarios' readers, with the stage's name
};

/// Reads and checks a recipe and every scenario of it; all problems together (InputError).
Recipe read_recipe(const std::string& path);

}  // namespace orrery
