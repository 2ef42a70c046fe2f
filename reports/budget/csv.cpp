#include <fmt/format.h>

#include "reports/budget/budget.hpp"

namespace orrery {

namespace {

/// RFC 4180: quoted where the text holds a comma, a quote or a line's end.
std::string field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string out(1, '"');
  for (const char c : text) {
    if (c == '"') out += '"';
    out += c;
  }
  out += '"';
  return out;
}

}  // namespace

std::string to_csv(const Budget& budget) {
  std::string text =
      "BilledCost,BillingCurrency,ChargeCategory,ChargeDescription,ConsumedQuantity,ConsumedUnit,"
      "EffectiveCost,ListUnitPrice,PricingQuantity,PricingUnit,ResourceName,ResourceType,"
      "ServiceCategory,x_Recipe,x_StageKind,x_Gpus,x_Tokens,x_Steps,x_WallSeconds,x_EnergyKwh,"
      "x_EvaluationSeconds,x_LostSeconds,x_Fits\n";
  for (const StageBudget& stage : budget.stages) {
    // Rent is billed; what was bought is written off, which FOCUS has as effective cost only.
    std::string billed;
    std::string effective;
    std::string unit_price;
    if (budget.recipe.money) {
      effective = fmt::format("{}", stage.bill.cost_usd);
      if (const auto* rent = std::get_if<Rent>(&budget.recipe.money->kind)) {
        billed = effective;
        unit_price = fmt::format("{}", rent->usd_per_gpu_hour);
      } else {
        billed.assign(1, '0');
      }
    }
    const std::string hours = fmt::format("{}", stage.bill.gpu_hours);
    text += fmt::format(
        "{},USD,Usage,{},{},GPU-Hours,{},{},{},GPU-Hours,{},GPU,AI and Machine "
        "Learning,{},{},{},{},"
        "{},{},{},{},{},{}\n",
        billed, field(stage.name), hours, effective, unit_price, hours, field(stage.device),
        field(budget.recipe.name), name_of(stage.kind), stage.gpus, stage.tokens, stage.steps,
        stage.bill.wall_s, budget.recipe.power ? fmt::format("{}", stage.bill.energy_kwh) : "",
        stage.evaluation_s, stage.lost_s, stage.unfit ? "false" : "true");
  }
  return text;
}

}  // namespace orrery
