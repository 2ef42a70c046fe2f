// A budget for people: a table like DeepSeek-V3's Table 1, what was published beside it, and what
// was assumed.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "reports/budget/budget.hpp"
#include "reports/terminal.hpp"

namespace orrery {

namespace {

constexpr std::size_t kColumns = 100;

std::string format_usd(double usd) {
  return fmt::format("${}", format_count(usd));
}

std::string format_energy(double kwh) {
  return kwh >= 1e6 ? fmt::format("{:.3g} GWh", kwh * 1e-6)
                    : (kwh >= 1e3 ? fmt::format("{:.3g} MWh", kwh * 1e-3)
                                  : fmt::format("{:.3g} kWh", kwh));
}

std::string format_days(double s) {
  return fmt::format("{:.{}f}", s / 86400, s < 10 * 86400 ? 2 : 1);
}

std::string format_of(Quantity quantity, double value) {
  switch (quantity) {
    case Quantity::cost_usd:
      return format_usd(value);
    case Quantity::days:
      return fmt::format("{:.3g} days", value);
    case Quantity::step_time_s:
      return format_seconds(value);
    case Quantity::gpu_hours:
    case Quantity::gpu_hours_per_trillion_tokens:
      break;
  }
  return format_count(value);
}

/// `text` in lines of kColumns, the first after `head`, the others indented by as much as it.
std::string wrapped(const std::string& head, const std::string& text) {
  std::string out = head;
  std::size_t column = head.size();
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find(' ', begin), text.size());
    if (column + 1 + (end - begin) > kColumns && column > head.size()) {
      out += fmt::format("\n{:{}}", "", head.size());
      column = head.size();
    }
    if (end > begin) {
      out += fmt::format(" {}", text.substr(begin, end - begin));
      column += 1 + end - begin;
    }
    begin = end + 1;
  }
  return out + "\n";
}

using Rows = std::vector<std::vector<std::string>>;

std::string stages_table(const Budget& b) {
  Rows rows{{"stage", "GPUs", "tokens", "steps", "step", "GPU-hours", "%", "days"}};
  std::string align = "lrrrrrrr";
  const auto add_bill = [&](std::vector<std::string>& row, const Bill& bill) {
    row.push_back(format_count(bill.gpu_hours));
    row.push_back(fmt::format("{:.1f}", 100 * bill.gpu_hours / b.total.gpu_hours));
    row.push_back(format_days(bill.wall_s));
    if (b.recipe.power) row.push_back(format_energy(bill.energy_kwh));
    if (b.recipe.money) row.push_back(format_usd(bill.cost_usd));
  };
  if (b.recipe.power) {
    rows[0].emplace_back("energy");
    align += 'r';
  }
  if (b.recipe.money) {
    rows[0].emplace_back("cost");
    align += 'r';
  }
  std::int64_t steps = 0;
  for (const StageBudget& stage : b.stages) {
    std::vector<std::string> row{stage.name, fmt::format("{}", stage.gpus),
                                 format_count(stage.tokens), fmt::format("{}", stage.steps),
                                 format_seconds(stage.mean_step_s())};
    add_bill(row, stage.bill);
    rows.push_back(std::move(row));
    steps += stage.steps;
  }
  std::vector<std::string> total{"total", "", format_count(b.tokens), fmt::format("{}", steps), ""};
  add_bill(total, b.total);
  rows.push_back(std::move(total));
  return format_table(rows, align, "  ");
}

/// What a stage's time is made of, where that is more than steps of one size.
std::string parts(const Budget& b) {
  std::string text;
  for (const StageBudget& stage : b.stages) {
    std::vector<std::string> words;
    if (stage.runs.size() > 1) {
      const auto& first = stage.runs.front();
      const auto& last = stage.runs.back();
      double ramp_s = 0;
      double ramp_sequences = 0;
      for (std::size_t i = 0; i + 1 < stage.runs.size(); ++i) {
        ramp_s += static_cast<double>(stage.runs[i].steps) * stage.runs[i].step_s;
        ramp_sequences += static_cast<double>(stage.runs[i].steps * stage.runs[i].batch);
      }
      const double full_s = last.step_s / static_cast<double>(last.batch);  // a sequence
      words.push_back(
          fmt::format("batch {} to {}: {} to {} a step; the ramp costs {:.1f} % more time than its "
                      "tokens would "
                      "at the full batch",
                      first.batch, last.batch, format_seconds(first.step_s),
                      format_seconds(last.step_s), 100 * (ramp_s / (ramp_sequences * full_s) - 1)));
    }
    const double wall_s = stage.bill.wall_s;
    if (stage.rollouts) {
      const RolloutBudget& r = *stage.rollouts;
      const auto each = [&](double all_s) {
        return format_seconds(all_s / static_cast<double>(r.rollouts));
      };
      words.push_back(fmt::format(
          "{} rollouts of {} output tokens, each {}: generation {} ({:.0f} tokens/s a GPU), "
          "reference {}, training {}, switching {}",
          r.rollouts, format_count(r.one.output_tokens), each(stage.training_s + r.sum()),
          each(r.generation_s), r.one.tokens_per_gpu_s(), each(r.reference_s),
          each(stage.training_s), each(r.switch_s)));
      words.push_back(fmt::format(
          "a replica has {} slots and runs {:.3g} outputs in the mean, while the longest end",
          r.one.slots, r.one.mean_sequences));
    }
    if (stage.evaluation_s > 0) {
      words.push_back(
          fmt::format("evaluation takes {:.2f} % of it", 100 * stage.evaluation_s / wall_s));
    }
    if (stage.lost_s > 0) {
      words.push_back(
          fmt::format("failures and restarts take {:.1f} %", 100 * stage.lost_s / wall_s));
    }
    if (stage.gpu_hours) {
      words.push_back(fmt::format("{} to {} GPU-hours, of 80 % of the draws",
                                  format_count(stage.gpu_hours->p10),
                                  format_count(stage.gpu_hours->p90)));
    }
    for (const std::string& word : words) {
      text += wrapped(fmt::format("  {}:", stage.name), word);
    }
  }
  if (b.gpu_hours && b.stages.size() > 1) {
    text += wrapped("  total:",
                    fmt::format("{} to {} GPU-hours, where all stages err together",
                                format_count(b.gpu_hours->p10), format_count(b.gpu_hours->p90)));
  }
  return text.empty() ? "" : "Where the time goes\n" + text + "\n";
}

std::string published_table(const Budget& b) {
  if (b.published.empty()) return "";
  Rows rows{{"of", "quantity", "predicted", "published", "error", "aim", "", "source"}};
  std::size_t met = 0;
  for (const PublishedRow& row : b.published) {
    const Published& p = row.published;
    rows.push_back({shorten(p.of, 32), std::string(name_of(p.quantity)),
                    format_of(p.quantity, row.predicted), format_of(p.quantity, p.value),
                    fmt::format("{:+.1f} %", 100 * row.error()),
                    fmt::format("{:.3g} %", 100 * p.aim), row.met() ? "met" : "MISSED",
                    p.note.empty() ? p.source : p.source + " (" + p.note + ")"});
    met += row.met() ? 1 : 0;
  }
  return "Against what is published\n" + format_table(rows, "llrrrrll", "  ") +
         fmt::format("  {} of {} within their aim\n\n", met, rows.size() - 1);
}

std::string assumptions(const Budget& b) {
  const Recipe& r = b.recipe;
  std::string text;
  const auto add = [&](const std::string& of, const std::string& words) {
    if (!words.empty()) text += wrapped(fmt::format("  {}:", of), words);
  };
  if (r.money) {
    if (const auto* rent = std::get_if<Rent>(&r.money->kind)) {
      add("price", fmt::format("${:.4g} a GPU-hour, energy included; {}", rent->usd_per_gpu_hour,
                               r.money->source));
    } else {
      const auto& bought = std::get<Purchase>(r.money->kind);
      add("price",
          fmt::format("${:.4g} a GPU-hour: ${} a GPU over {:.3g} years at {:.0f} % use, ${:.3g} to "
                      "operate; energy at ${:.3g} a kWh beside it; {}",
                      bought.usd_per_gpu_hour(), format_count(bought.usd_per_gpu),
                      bought.life_s / (365.25 * 86400), 100 * bought.utilisation,
                      bought.operation_usd_per_gpu_hour, bought.usd_per_kwh, r.money->source));
    }
  }
  if (r.power) {
    add("power",
        fmt::format("{:.0f} W a node, {:.0f} W a GPU for the network, PUE {:.3g}; {}",
                    r.power->node_w, r.power->network_w_per_gpu, r.power->pue, r.power->source));
  }
  if (r.reliability) {
    add("goodput", fmt::format("as {} fails; {}", r.reliability->name, r.reliability->source));
  } else {
    add("goodput", r.goodput.source.empty()
                       ? "1: no failures, restarts or idle GPUs are in these figures"
                       : fmt::format("{:.3g}; {}", r.goodput.factor, r.goodput.source));
  }
  for (const Stage& stage : r.stages) {
    add(stage.name, stage.source);
    for (const std::string& words : stage.assumptions) add(stage.name, words);
  }
  return "Assumptions\n" + text;
}

std::string unfit(const Budget& b) {
  std::string text;
  for (const StageBudget& stage : b.stages) {
    if (!stage.unfit) continue;
    text += wrapped(
        "  " + stage.name + ":",
        fmt::format("needs {} of {} {}; {}", format_bytes(stage.unfit->peak_bytes),
                    format_bytes(stage.unfit->capacity_bytes), stage.unfit->where,
                    stage.unfit->nearest.empty() ? "no plan near it fits" : stage.unfit->nearest));
  }
  return text.empty() ? "" : "Does not fit into memory\n" + text + "\n";
}

}  // namespace

std::string to_terminal(const Budget& b) {
  std::string text = shorten(b.recipe.name, kColumns) + "\n";
  std::vector<std::string> plans;
  for (const StageBudget& stage : b.stages) {
    std::string plan = fmt::format("{} x {}, {}", stage.gpus, stage.device, stage.plan);
    if (std::find(plans.begin(), plans.end(), plan) == plans.end()) plans.push_back(plan);
  }
  for (const std::string& plan : plans) text += shorten(plan, kColumns) + "\n";
  return text + "\n" + stages_table(b) + "\n" + unfit(b) + parts(b) + published_table(b) +
         assumptions(b);
}

}  // namespace orrery
