// The capacity report for those who paste into documents.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "reports/capacity.hpp"
#include "reports/terminal.hpp"
#include "sim/units.hpp"

namespace orrery {

namespace {

/// Nothing in it starts a table's cell, a tag or a link.
std::string in_markdown(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '\n' || c == '\r') {
      out += ' ';
      continue;
    }
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else {
      if (std::string_view("\\`*_[]|#").find(c) != std::string_view::npos) out += '\\';
      out += c;
    }
  }
  return out;
}

/// The first row is the heading; of numbers all columns but the first are right-aligned. Cells are
/// Markdown already.
std::string markdown_table(const std::vector<std::vector<std::string>>& rows, bool numbers) {
  std::string text;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    text += "|";
    for (const std::string& cell : rows[r]) text += " " + cell + " |";
    text += "\n";
    if (r > 0) continue;
    text += "|";
    for (std::size_t c = 0; c < rows[0].size(); ++c) text += numbers && c > 0 ? "---:|" : "---|";
    text += "\n";
  }
  return text + "\n";
}

std::string percent(double share) {
  return fmt::format("{:.1f} %", 100 * share);
}

std::int64_t peak_of(const Report& report) {
  std::int64_t peak = 0;
  for (const RankReport& rank : report.ranks) peak = std::max(peak, rank.memory_peak_bytes);
  return peak;
}

std::string summary(const CapacityScenario& s) {
  const Report& r = s.study.report;
  std::vector<std::vector<std::string>> rows = {
      {"", ""},
      {"step time", format_seconds(r.step_time_s)},
      {"tokens/day", format_count(r.tokens_per_day)},
      {"tokens/s/GPU", fmt::format("{:.1f}", r.tokens_per_s_per_gpu)},
      {"MFU, causal and non-causal", percent(r.mfu_causal) + ", " + percent(r.mfu_noncausal)},
      {"GPU-hours for a trillion tokens", format_count(r.gpu_hours_per_trillion_tokens)},
      {"memory at its peak", fmt::format("{} of {}", format_bytes(static_cast<double>(peak_of(r))),
                                         format_bytes(r.memory_capacity_bytes))}};
  if (s.tokens > 0) {
    rows.push_back({fmt::format("{} tokens take", format_count(s.tokens)),
                    fmt::format("{:.1f} days, {} GPU-hours", s.days, format_count(s.gpu_hours))});
    if (s.cost_usd > 0) rows.push_back({"and cost", format_count(s.cost_usd) + " USD"});
  }
  return markdown_table(rows, true);
}

std::string phases(const Report& r) {
  const PhaseTimes& p = r.phases_s;
  std::vector<std::vector<std::string>> rows = {{"Where the step goes, mean of GPUs", "s", "%"}};
  const auto row = [&](const char* name, double time_s) {
    rows.push_back(
        {name, fmt::format("{:.3f}", time_s), fmt::format("{:.1f}", 100 * time_s / r.step_time_s)});
  };
  row("forward", p.forward);
  row("backward", p.backward);
  row("weight gradients", p.weight);
  row("overlapped F&amp;B", p.overlapped);
  row("exposed communication", p.exposed_communication);
  row("optimizer", p.optimizer);
  row("bubble", p.bubble);
  row("step", p.sum());
  return markdown_table(rows, true);
}

std::string memory(const Report& r) {
  std::vector<std::vector<std::string>> rows = {{"Position", "stages", "peak"}};
  for (int k = 0; k < kMemoryKinds; ++k) {
    rows[0].push_back(in_markdown(name_of(static_cast<MemoryKind>(k))));
  }
  int last = -1;
  for (const RankReport& rank : r.ranks) {
    if (rank.position == last) continue;  // its peers are alike
    last = rank.position;
    rows.push_back({fmt::format("{}", rank.position),
                    fmt::format("{}", fmt::join(rank.stages, ", ")),
                    format_bytes(static_cast<double>(rank.memory_peak_bytes))});
    for (const std::int64_t bytes : rank.memory_at_peak) {
      rows.back().push_back(format_bytes(static_cast<double>(bytes)));
    }
  }
  return markdown_table(rows, true);
}

std::string network(const NetworkReport& n) {
  if (n.tiers.empty()) return "";
  std::vector<std::vector<std::string>> rows = {
      {"Network", "links", "mean use", "busiest", "ops held up"}};
  for (const TierReport& tier : n.tiers) {
    rows.push_back({in_markdown(tier.tier), fmt::format("{}", tier.links), percent(tier.mean_use),
                    percent(tier.busiest_use), format_seconds(tier.held_back_s)});
  }
  return markdown_table(rows, true);
}

std::string curve(const char* title, const ScalingCurve& curve) {
  if (curve.points.size() < 2) return "";
  std::vector<std::vector<std::string>> rows = {
      {title, "DP", "batch", "step", "tokens/day", "efficiency"}};
  for (const ScalingPoint& p : curve.points) {
    rows.push_back({fmt::format("{} GPUs{}", p.gpus, p.fits ? "" : " (memory too small)"),
                    fmt::format("{}", p.dp), fmt::format("{}", p.global_batch),
                    format_seconds(p.step_time_s), format_count(p.tokens_per_day),
                    percent(p.efficiency)});
  }
  return markdown_table(rows, true);
}

std::string tornado(const Sensitivity& s) {
  if (s.rows.empty()) return "";
  constexpr std::size_t kShown = 12;
  std::vector<std::vector<std::string>> rows = {
      {"Ops of a kind", "of op time", "10 % faster", "10 % slower", "spread of prices"}};
  for (std::size_t i = 0; i < std::min(kShown, s.rows.size()); ++i) {
    const SensitivityRow& row = s.rows[i];
    rows.push_back({in_markdown(row.kind), percent(row.share),
                    fmt::format("{:+.2f} %", 100 * (row.faster_s / s.step_s - 1)),
                    fmt::format("{:+.2f} %", 100 * (row.slower_s / s.step_s - 1)),
                    percent(row.spread)});
  }
  return markdown_table(rows, true);
}

std::string provenance(const std::vector<Assumption>& list) {
  std::vector<std::vector<std::string>> rows = {{"", "What", "Value", "Source"}};
  std::string last;
  for (const Assumption& a : list) {
    rows.push_back({a.group == last ? "" : in_markdown(a.group), in_markdown(a.what),
                    in_markdown(a.value), in_markdown(a.source)});
    last = a.group;
  }
  return markdown_table(rows, false);
}

/// RFC 4180. What a spreadsheet would take for a formula gets a quote in front.
std::string in_csv(std::string text) {
  if (!text.empty() && std::string_view("=+-@\t\r").find(text.front()) != std::string_view::npos) {
    text.insert(text.begin(), '\'');
  }
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"') out += '"';
    out += c;
  }
  return out + "\"";
}

std::string number(double value) {
  return value > 0 ? fmt::format("{}", value) : "";
}

}  // namespace

std::string to_markdown(const CapacityReport& report) {
  std::string text;
  for (const CapacityScenario& s : report.scenarios) {
    const Report& r = s.study.report;
    text += fmt::format("# {}\n\n{} x {}, {}\n\n", in_markdown(r.scenario), r.gpus,
                        in_markdown(r.device), in_markdown(r.plan));
    for (const Judgement& j : s.judgements) {
      text += fmt::format("**{}**\n\n", in_markdown(answer_of(j)));
    }
    text += summary(s) + phases(r) + memory(r) + network(r.network) +
            curve("The same batch on", s.scaling.same_batch) +
            curve("A batch that grows with the GPUs", s.scaling.growing_batch) +
            tornado(s.sensitivity) + "## What this rests on\n\n" + provenance(s.assumptions);
  }
  return text;
}

std::string to_csv(const CapacityReport& report) {
  std::string text =
      "BilledCost,BillingCurrency,ChargeCategory,ChargeDescription,ConsumedQuantity,ConsumedUnit,"
      "EffectiveCost,ListUnitPrice,PricingQuantity,PricingUnit,ResourceName,ResourceType,"
      "ServiceCategory,x_Plan,x_Gpus,x_Tokens,x_Days,x_StepSeconds,x_TokensPerDay,"
      "x_TokensPerSecondPerGpu,x_MfuCausal,x_GpuHoursPerTrillionTokens,x_MemoryPeakBytes,"
      "x_MemoryCapacityBytes,x_Targets\n";
  for (const CapacityScenario& s : report.scenarios) {
    const Report& r = s.study.report;
    const std::string cost = number(s.cost_usd);
    const std::string hours = number(s.gpu_hours);
    std::string verdicts;
    for (const Judgement& j : s.judgements) {
      verdicts +=
          fmt::format("{}{}: {}", verdicts.empty() ? "" : "; ", j.target.text, name_of(j.verdict));
    }
    text += fmt::format(
        "{},USD,Usage,{},{},GPU-Hours,{},{},{},GPU-Hours,{},GPU,AI and Machine "
        "Learning,{},{},{},{},{},{},{},"
        "{},{},{},{},{}\n",
        cost, in_csv(r.scenario), hours, cost, number(report.context.usd_per_gpu_hour), hours,
        in_csv(r.device), in_csv(r.plan), r.gpus, number(s.tokens), number(s.days), r.step_time_s,
        r.tokens_per_day, r.tokens_per_s_per_gpu, r.mfu_causal, r.gpu_hours_per_trillion_tokens,
        peak_of(r), r.memory_capacity_bytes, in_csv(verdicts));
  }
  return text;
}

}  // namespace orrery
