#include "reports/budget/recipe.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <system_error>

namespace orrery {

namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kMaxTokens = 1'000'000'000'000'000'000;  // exact sums in int64 and in double
constexpr std::int64_t kMaxSteps = 1'000'000'000'000;
constexpr std::int64_t kMaxBatch = std::int64_t{1} << 32;
constexpr std::int64_t kMaxRampSizes = 256;  // each size is a step to simulate
constexpr double kMaxMoney = 1e15;

const std::initializer_list<std::pair<std::string_view, StageKind>> kKinds = {
    {"pre_training", StageKind::pre_training},
    {"context_extension", StageKind::context_extension},
    {"fine_tuning", StageKind::fine_tuning},
    {"distillation", StageKind::distillation},
    {"reinforcement_learning", StageKind::reinforcement_learning}};

const std::initializer_list<std::pair<std::string_view, Quantity>> kQuantities = {
    {"gpu_hours", Quantity::gpu_hours},
    {"gpu_hours_per_trillion_tokens", Quantity::gpu_hours_per_trillion_tokens},
    {"cost_usd", Quantity::cost_usd},
    {"days", Quantity::days},
    {"step_time_s", Quantity::step_time_s}};

template <class E>
std::string_view word_for(std::initializer_list<std::pair<std::string_view, E>> words, E value) {
  for (const auto& [word, meaning] : words) {
    if (meaning == value) return word;
  }
  return "?";
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return a / b + (a % b == 0 ? 0 : 1);
}

}  // namespace

std::string_view name_of(StageKind kind) {
  return word_for(kKinds, kind);
}
std::string_view name_of(Quantity quantity) {
  return word_for(kQuantities, quantity);
}

std::vector<BatchRun> batches(const Amount& amount, const std::optional<Ramp>& ramp,
                              std::int64_t batch, std::int64_t sequence_length) {
  // What is wanted, in steps or in sequences; the other is no limit.
  std::int64_t steps_left = kMaxSteps;
  double sequences_left = std::numeric_limits<double>::infinity();
  const auto length = static_cast<double>(sequence_length);
  if (const auto* steps = std::get_if<StepCount>(&amount)) steps_left = steps->steps;
  if (const auto* tokens = std::get_if<TokenCount>(&amount)) {
    sequences_left = static_cast<double>(tokens->tokens) / length;
  }
  if (const auto* set = std::get_if<SampleSet>(&amount)) {
    sequences_left =
        static_cast<double>(set->samples) * set->epochs * set->mean_tokens / set->packing / length;
  }
  std::vector<BatchRun> runs;
  const auto run = [&](std::int64_t size, double sequences) {
    const double wanted =
        std::ceil(std::min(sequences, sequences_left) / static_cast<double>(size));
    const std::int64_t steps =
        wanted < static_cast<double>(steps_left) ? static_cast<std::int64_t>(wanted) : steps_left;
    if (steps <= 0) return std::int64_t{0};
    runs.push_back({size, steps});
    steps_left -= steps;
    sequences_left -= static_cast<double>(steps * size);
    return steps * size;
  };
  if (ramp) {
    const std::int64_t sizes = ceil_div(batch - ramp->from, ramp->increment);
    const double share = static_cast<double>(ramp->tokens) / length / static_cast<double>(sizes);
    double done = 0;
    for (std::int64_t i = 0; i < sizes; ++i) {
      done += static_cast<double>(
          run(ramp->from + i * ramp->increment, share * static_cast<double>(i + 1) - done));
    }
  }
  run(batch, sequences_left);
  return runs;
}

namespace {

Money read_price(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "price");
  Money money;
  money.kind = Rent{reader.quantity("gpu_hour", Dimension::dollars)};
  money.source = reader.text("source");
  reader.finish();
  return money;
}

Money read_purchase(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "purchase");
  Purchase purchase;
  purchase.usd_per_gpu = reader.quantity("gpu", Dimension::dollars);
  purchase.life_s = reader.quantity("life", Dimension::seconds);
  purchase.utilisation = reader.quantity_or("utilisation", 1, Dimension::scalar);
  if (purchase.utilisation > 1) {
    problems.add(reader.at("utilisation"), "utilisation is a share of the GPUs' life, at most 1");
  }
  purchase.usd_per_kwh = reader.quantity_or("energy", 0, Dimension::dollars);
  purchase.operation_usd_per_gpu_hour = reader.quantity_or("operation", 0, Dimension::dollars);
  Money money;
  money.kind = purchase;
  money.source = reader.text("source");
  reader.finish();
  return money;
}

Power read_power(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "power");
  Power power;
  power.node_w = reader.quantity("node", Dimension::watts);
  power.network_w_per_gpu = reader.quantity_or("network", 0, Dimension::watts);
  power.pue = reader.number_or("pue", 1, 1, 10);
  power.source = reader.text("source");
  reader.finish();
  return power;
}

StatedGoodput read_goodput(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "goodput");
  StatedGoodput goodput;
  goodput.factor = reader.quantity("factor", Dimension::scalar);
  if (goodput.factor > 1) {
    problems.add(reader.at("factor"), "goodput is a share of the time, at most 1");
  }
  goodput.source = reader.text("source");
  reader.finish();
  return goodput;
}

SampleSet read_samples(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "samples");
  SampleSet samples;
  samples.samples = reader.integer("count", 1, kMaxTokens);
  samples.epochs = reader.number_or("epochs", 1, 0.01, 1e6);
  samples.mean_tokens = reader.number("mean_tokens", 1, 1e9);
  samples.packing = reader.quantity_or("packing", 1, Dimension::scalar);
  if (samples.packing > 1) {
    problems.add(reader.at("packing"),
                 "packing is the share of a sequence that samples fill, at most 1");
  }
  reader.finish();
  return samples;
}

Amount read_amount(MapReader& reader) {
  Problems& problems = reader.problems();
  const int given =
      int{reader.has("tokens")} + int{reader.has("steps")} + int{reader.has("samples")};
  if (given != 1) {
    problems.add(reader.node(), fmt::format("{} of tokens, steps and samples in {}: one is wanted",
                                            given == 0 ? "none" : "more than one", reader.what()));
  }
  if (reader.has("tokens")) return TokenCount{reader.integer("tokens", 1, kMaxTokens)};
  if (reader.has("samples")) return read_samples(reader.at("samples"), problems);
  if (reader.has("steps")) return StepCount{reader.integer("steps", 1, kMaxSteps)};
  return StepCount{1};
}

EvaluationOverhead read_evaluation(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "evaluation");
  EvaluationOverhead evaluation;
  evaluation.every_steps = reader.integer("every", 1, kMaxSteps);
  evaluation.tokens = reader.integer("tokens", 1, kMaxTokens);
  reader.finish();
  return evaluation;
}

std::vector<std::string> read_words(MapReader& reader, std::string_view key) {
  std::vector<std::string> words;
  if (!reader.has(key)) return words;
  const Node list = reader.at(key);
  if (list.kind() != Node::Kind::sequence) {
    reader.problems().add(list, fmt::format("{} must be a list", key));
    return words;
  }
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (list[i].kind() == Node::Kind::scalar) {
      words.push_back(list[i].text());
    } else {
      reader.problems().add(list[i], fmt::format("an element of {} must be text", key));
    }
  }
  return words;
}

/// A ramp, and what it overrides for its batches below a size.
struct ReadRamp {
  Node node;
  Ramp ramp;
  std::int64_t below = 0;
  Overrides overrides;
};

ReadRamp read_ramp(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "ramp");
  ReadRamp read{.node = node};
  read.ramp.from = reader.integer("from", 1, kMaxBatch);
  read.ramp.increment = reader.integer("increment", 1, kMaxBatch);
  read.ramp.tokens = reader.integer("tokens", 1, kMaxTokens);
  if (reader.has("below")) {
    MapReader below(reader.at("below"), problems, "ramp.below");
    read.below = below.integer("batch", 1, kMaxBatch);
    read.overrides = read_overrides(below.require("set"), problems);
    below.finish();
  }
  reader.finish();
  return read;
}

ScheduleShape shape_of(const Plan& plan) {
  ScheduleShape shape;
  shape.kind = plan.schedule;
  shape.ranks = static_cast<int>(plan.parallelism.pp);
  shape.chunks = plan.chunks;
  shape.micro_batches = static_cast<int>(plan.micro_batches());
  return shape;
}

/// The scenario with another batch, and why that is impossible, if it is.
std::string set_batch(Scenario& scenario, std::int64_t batch) {
  Plan& plan = scenario.plan;
  const std::int64_t unit = plan.micro_batch_sequences * plan.parallelism.dp;
  plan.global_batch_sequences = batch;
  if (batch % unit != 0) {
    return fmt::format(
        "a batch of {} sequences is not a whole number of micro-batches: micro_batch x dp = {}",
        batch, unit);
  }
  const std::string why = why_impossible(shape_of(plan));
  return why.empty() ? "" : fmt::format("a batch of {} sequences: {}", batch, why);
}

/// The path of the file under `key`, relative to the recipe; empty, and a problem, where there is
/// none.
std::string read_path(MapReader& reader, std::string_view key, const std::string& recipe) {
  const std::string named = reader.text(key);
  if (named.empty()) return "";
  const fs::path path = (fs::path(recipe).parent_path() / named).lexically_normal();
  std::error_code ignored;
  if (fs::is_regular_file(path, ignored)) return path.string();
  reader.problems().add(reader.at(key),
                        fmt::format("there is no {} file '{}'", key, path.string()));
  return "";
}

class StageReader {
 public:
  StageReader(const Node& node, const std::string& recipe, Problems& problems)
      : reader_(node, problems, "stage"), recipe_(recipe), problems_(problems) {}

  Stage read() {
    before_ = problems_.size();
    stage_.name = reader_.text("name");
    stage_.kind = reader_.choice<StageKind>("kind", kKinds);
    stage_.source = reader_.text_or("source", "");
    stage_.assumptions = read_words(reader_, "assumptions");
    stage_.amount = read_amount(reader_);
    if (reader_.has("evaluation")) {
      stage_.evaluation = read_evaluation(reader_.at("evaluation"), problems_);
    }
    const bool learns = stage_.kind == StageKind::reinforcement_learning;
    if (learns != reader_.has("rollout")) {
      problems_.add(reader_.node(), learns ? "reinforcement_learning needs a rollout"
                                           : "a rollout belongs to reinforcement_learning");
    }
    if (reader_.has("rollout")) {
      read_rollout(reader_.at("rollout"));
      if (!std::holds_alternative<StepCount>(stage_.amount)) {
        problems_.add(reader_.node(), "a stage with a rollout is counted in steps");
      }
    }
    std::optional<ReadRamp> ramp;
    if (reader_.has("ramp")) ramp = read_ramp(reader_.at("ramp"), problems_);
    if (reader_.has("set")) stage_.overrides = read_overrides(reader_.at("set"), problems_);
    stage_.scenario = read_path(reader_, "scenario", recipe_);
    reader_.finish();
    if (sound()) fill_runs(ramp);
    return stage_;
  }

 private:
  void read_rollout(const Node& node) {
    MapReader reader(node, problems_, "rollout");
    Rollouts rollouts;
    const std::string file = read_path(reader, "generation", recipe_);
    Overrides overrides;
    if (reader.has("set")) overrides = read_overrides(reader.at("set"), problems_);
    rollouts.steps = reader.integer("steps", 1, kMaxSteps);
    rollouts.packing = reader.quantity_or("packing", 1, Dimension::scalar);
    if (rollouts.packing > 1) {
      problems_.add(reader.at("packing"),
                    "packing is the share of a sequence that samples fill, at most 1");
    }
    rollouts.reference_passes = reader.integer_or("reference", 1, 0, 100);
    rollouts.switch_s = reader.quantity_or("switch", 0, Dimension::seconds);
    reader.finish();
    if (file.empty()) return;
    try {
      GenerationScenario generation = read_generation(file, overrides);
      if (!generation.rollout) {
        problems_.add(reader.at("generation"), fmt::format("'{}' has no rollout", file));
        return;
      }
      rollouts.instance = std::move(generation.instance);
      rollouts.instances = generation.rollout_instances;
      rollouts.work = *generation.rollout;
      stage_.rollouts = std::move(rollouts);
    } catch (const InputError& error) {
      for (const Problem& problem : error.problems()) problems_.add(problem);
    }
  }

  /// The smallest batch that holds a step's outputs and that the plan can run.
  std::int64_t batch_of_rollout(Scenario scenario) {
    const Rollouts& r = *stage_.rollouts;
    const Plan& plan = scenario.plan;
    const std::int64_t unit = plan.micro_batch_sequences * plan.parallelism.dp;
    const double sequences = r.tokens() / static_cast<double>(r.steps) / r.packing /
                             static_cast<double>(plan.sequence_length);
    const auto least = std::max<std::int64_t>(
        1, static_cast<std::int64_t>(std::ceil(sequences / static_cast<double>(unit))));
    constexpr std::int64_t kTried = 4096;  // more than any schedule needs beyond what is there
    for (std::int64_t count = least; count < least + kTried; ++count) {
      if (set_batch(scenario, count * unit).empty()) return count * unit;
    }
    return plan.global_batch_sequences;
  }

  /// The stage's scenario with more overrides; none, and all its problems, if it cannot be read.
  std::optional<Scenario> read_with(const Overrides& more) {
    Overrides overrides = stage_.overrides;
    overrides.insert(overrides.end(), more.begin(), more.end());
    try {
      return read_scenario(stage_.scenario, overrides);
    } catch (const InputError& error) {
      for (const Problem& problem : error.problems()) problems_.add(problem);
      return std::nullopt;
    }
  }

  void fill_runs(const std::optional<ReadRamp>& ramp) {
    std::optional<Scenario> read_full = read_with({});
    if (!read_full) return;
    if (stage_.rollouts) {
      if (!fits_the_gpus(*read_full)) return;
      set_batch(*read_full, batch_of_rollout(*read_full));
    }
    const Scenario& full = *read_full;
    std::optional<Scenario> small = full;
    if (ramp && ramp->below > 0) small = read_with(ramp->overrides);
    if (!small) return;
    const std::int64_t batch = full.plan.global_batch_sequences;
    if (ramp && !possible(*ramp, batch)) return;
    for (const BatchRun& run :
         batches(stage_.amount, ramp ? std::optional(ramp->ramp) : std::nullopt, batch,
                 full.plan.sequence_length)) {
      StageRun stage_run{ramp && run.batch < ramp->below ? *small : full, run.steps};
      const std::string why = set_batch(stage_run.scenario, run.batch);
      if (!why.empty()) {
        problems_.add(ramp->node, why, "another increment, or below: {batch, set: [plan. ...]}");
        return;
      }
      stage_.runs.push_back(std::move(stage_run));
    }
  }

  bool sound() const { return problems_.size() == before_; }

  /// Rollouts and training take turns on the same GPUs.
  bool fits_the_gpus(const Scenario& scenario) {
    const std::int64_t generating =
        stage_.rollouts->instances * stage_.rollouts->instance.plan.gpus();
    const std::int64_t training = scenario.plan.parallelism.world();
    if (generating == training) return true;
    problems_.add(reader_.at("rollout"),
                  fmt::format("{} GPUs generate, but {} train: they take turns on the same ones",
                              generating, training),
                  "generation.rollout.instances says how many generate");
    return false;
  }

  bool possible(const ReadRamp& ramp, std::int64_t batch) {
    if (ramp.ramp.from >= batch) {
      problems_.add(ramp.node.find("from").value_or(ramp.node),
                    fmt::format("a ramp from {} does not lead up to the plan's batch of {}",
                                ramp.ramp.from, batch));
    } else if (ceil_div(batch - ramp.ramp.from, ramp.ramp.increment) > kMaxRampSizes) {
      problems_.add(ramp.node.find("increment").value_or(ramp.node),
                    fmt::format("{} sizes of batches from {} to {} by {}, more than {}",
                                ceil_div(batch - ramp.ramp.from, ramp.ramp.increment),
                                ramp.ramp.from, batch, ramp.ramp.increment, kMaxRampSizes));
    }
    return sound();
  }

  MapReader reader_;
  const std::string& recipe_;
  Problems& problems_;
  std::size_t before_ = 0;  ///< problems of others
  Stage stage_;
};

Published read_published(const Node& node, const std::vector<Stage>& stages, Problems& problems) {
  MapReader reader(node, problems, "published");
  Published row;
  std::vector<std::string> names;
  for (const Stage& stage : stages) names.push_back(stage.name);
  if (reader.has("of")) {
    const Node of = reader.at("of");
    for (const std::string& word : read_words(reader, "of")) {
      const auto found = std::find(names.begin(), names.end(), word);
      if (found == names.end()) {
        const auto near = nearest(word, names);
        problems.add(of, fmt::format("there is no stage '{}'", word),
                     near ? fmt::format("did you mean '{}'?", *near) : "");
        continue;
      }
      row.stages.push_back(static_cast<std::size_t>(found - names.begin()));
      row.of += (row.of.empty() ? "" : " + ") + word;
    }
  } else {
    row.stages.resize(stages.size());
    std::iota(row.stages.begin(), row.stages.end(), std::size_t{0});
    row.of = "total";
  }
  row.quantity = reader.choice<Quantity>("quantity", kQuantities);
  row.value = reader.number("value", 1e-12, kMaxMoney);
  row.aim = reader.quantity("aim", Dimension::scalar);
  row.source = reader.text("source");
  row.note = reader.text_or("note", "");
  reader.finish();
  return row;
}

/// read(element) of each element of the list under `key`.
template <class Read>
void read_list(MapReader& reader, std::string_view key, Read read) {
  const Node list = reader.at(key);
  if (list.kind() == Node::Kind::sequence) {
    for (std::size_t i = 0; i < list.size(); ++i) read(list[i]);
  } else if (list.kind() != Node::Kind::null) {
    reader.problems().add(list, fmt::format("{} must be a list", key));
  }
}

}  // namespace

Recipe read_recipe(const std::string& path) {
  Problems problems;
  const Node document = read_document(path, problems);
  problems.throw_if_any();
  MapReader reader(document, problems, "the recipe");
  Recipe recipe;
  recipe.file = path;
  recipe.name = reader.text("name");
  recipe.source = reader.text_or("source", "");
  if (reader.has("price")) recipe.money = read_price(reader.at("price"), problems);
  if (reader.has("purchase")) {
    if (recipe.money) {
      problems.add(reader.at("purchase"), "GPUs are rented (price) or bought (purchase), not both");
    }
    recipe.money = read_purchase(reader.at("purchase"), problems);
  }
  if (reader.has("power")) recipe.power = read_power(reader.at("power"), problems);
  if (reader.has("goodput")) recipe.goodput = read_goodput(reader.at("goodput"), problems);
  if (reader.has("reliability")) {
    if (reader.has("goodput")) {
      problems.add(reader.at("reliability"),
                   "goodput is stated or follows from reliability, not both");
    }
    const std::string file = read_path(reader, "reliability", path);
    if (!file.empty()) {
      const Node node = read_document(file, problems);
      if (!node.at().file.empty()) recipe.reliability = read_reliability(node, problems);
    }
  }
  reader.require("stages");
  read_list(reader, "stages", [&](const Node& node) {
    Stage stage = StageReader(node, path, problems).read();
    const auto same = [&](const Stage& other) { return other.name == stage.name; };
    if (std::any_of(recipe.stages.begin(), recipe.stages.end(), same)) {
      problems.add(node, fmt::format("two stages are called '{}'", stage.name));
    }
    if (!stage.runs.empty()) {
      for (const std::string& text : stage.runs.back().scenario.notes) {
        recipe.notes.push_back(stage.name + ": " + text);
      }
    }
    recipe.stages.push_back(std::move(stage));
  });
  if (reader.at("stages").kind() == Node::Kind::sequence && recipe.stages.empty()) {
    problems.add(reader.at("stages"), "a recipe has at least one stage");
  }
  if (reader.has("published")) {
    read_list(reader, "published", [&](const Node& node) {
      recipe.published.push_back(read_published(node, recipe.stages, problems));
      if (recipe.published.back().quantity == Quantity::cost_usd && !recipe.money) {
        problems.add(node, "no cost without a price or a purchase");
      }
    });
  }
  reader.finish();
  problems.throw_if_any();
  return recipe;
}

}  // namespace orrery
