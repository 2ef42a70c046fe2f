#include "reports/json.hpp"

#include "reports/budget/budget.hpp"
#include "reports/json_object.hpp"

namespace orrery {

namespace {

void write_interval(JsonObject& o, std::string_view key, const std::optional<Interval>& interval) {
  if (!interval) return;
  JsonObject i(o.name(key));
  i("p10", interval->p10);
  i("p50", interval->p50);
  i("p90", interval->p90);
  i("mean", interval->mean);
}

void write_bill(JsonObject& o, const Budget& budget, const Bill& bill) {
  o("gpu_hours", bill.gpu_hours);
  o("wall_s", bill.wall_s);
  if (budget.recipe.power) o("energy_kwh", bill.energy_kwh);
  if (budget.recipe.money) o("cost_usd", bill.cost_usd);
}

void write_stage(JsonWriter& writer, const Budget& budget, const StageBudget& stage,
                 const Stage& source) {
  JsonObject o(writer);
  o("name", stage.name);
  o("kind", name_of(stage.kind));
  o("gpus", stage.gpus);
  o("device", stage.device);
  o("plan", stage.plan);
  o("tokens", stage.tokens);
  o("steps", stage.steps);
  write_bill(o, budget, stage.bill);
  o("training_s", stage.training_s);
  o("evaluation_s", stage.evaluation_s);
  if (stage.rollouts) {
    const RolloutBudget& rollouts = *stage.rollouts;
    JsonObject r(o.name("rollouts"));
    r("count", rollouts.rollouts);
    r("tokens", rollouts.tokens);
    r("output_tokens", rollouts.one.output_tokens);
    r("seconds", rollouts.one.seconds);
    r("tail_s", rollouts.one.tail_s);
    r("tokens_per_gpu_s", rollouts.one.tokens_per_gpu_s());
    r("generation_s", rollouts.generation_s);
    r("reference_s", rollouts.reference_s);
    r("switch_s", rollouts.switch_s);
  }
  o("lost_s", stage.lost_s);
  write_interval(o, "goodput", stage.goodput);
  write_interval(o, "gpu_hours_interval", stage.gpu_hours);
  o.array("runs", stage.runs, [&](const PricedRun& run) {
    JsonObject r(writer);
    r("global_batch", run.batch);
    r("steps", run.steps);
    r("step_time_s", run.step_s);
  });
  o("memory_peak_bytes", stage.peak_bytes);
  o("memory_capacity_bytes", stage.capacity_bytes);
  o("fits", !stage.unfit.has_value());
  if (stage.unfit) o("nearest_that_fits", stage.unfit->nearest);
  o("source", source.source);
  o.array("assumptions", source.assumptions, [&](const std::string& words) {
    writer.String(words.data(), static_cast<rapidjson::SizeType>(words.size()));
  });
}

}  // namespace

std::string to_json(const Budget& budget) {
  return json_document([&](JsonObject& o) {
    JsonWriter& writer = o.writer();
    const Recipe& recipe = budget.recipe;
    o("schema_version", kReportSchemaVersion);
    o("recipe", recipe.name);
    o("source", recipe.source);
    {
      JsonObject total(o.name("total"));
      total("tokens", budget.tokens);
      write_bill(total, budget, budget.total);
      write_interval(total, "gpu_hours_interval", budget.gpu_hours);
    }
    std::size_t i = 0;
    o.array("stages", budget.stages, [&](const StageBudget& stage) {
      write_stage(writer, budget, stage, recipe.stages[i++]);
    });
    o.array("published", budget.published, [&](const PublishedRow& row) {
      JsonObject p(writer);
      p("of", row.published.of);
      p("quantity", name_of(row.published.quantity));
      p("predicted", row.predicted);
      p("published", row.published.value);
      p("error", row.error());
      p("aim", row.published.aim);
      p("met", row.met());
      p("source", row.published.source);
      p("note", row.published.note);
    });
    JsonObject assumed(o.name("assumptions"));
    if (recipe.reliability) {
      assumed("reliability", recipe.reliability->name);
      assumed("goodput_source", recipe.reliability->source);
    } else {
      assumed("goodput", recipe.goodput.factor);
      assumed("goodput_source", recipe.goodput.source);
    }
    if (recipe.power) {
      assumed("node_w", recipe.power->node_w);
      assumed("network_w_per_gpu", recipe.power->network_w_per_gpu);
      assumed("pue", recipe.power->pue);
      assumed("power_source", recipe.power->source);
    }
    if (recipe.money) {
      if (const auto* rent = std::get_if<Rent>(&recipe.money->kind)) {
        assumed("usd_per_gpu_hour", rent->usd_per_gpu_hour);
      } else {
        const auto& purchase = std::get<Purchase>(recipe.money->kind);
        assumed("usd_per_gpu_hour", purchase.usd_per_gpu_hour());
        assumed("usd_per_kwh", purchase.usd_per_kwh);
      }
      assumed("money_source", recipe.money->source);
    }
  });
}

}  // namespace orrery
