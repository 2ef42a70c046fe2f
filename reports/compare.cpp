#include "reports/compare.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string_view>

#include "reports/json.hpp"
#include "reports/terminal.hpp"

namespace orrery {

namespace {

constexpr std::size_t kExplanations = 10;

using Format = std::string (*)(double);

std::string as_seconds(double s) {
  return fmt::format("{:.3f} s", s);
}
std::string as_percent(double share) {
  return fmt::format("{:.1f} %", 100 * share);
}

/// One row: a value of each report, and how far the others are from the first.
std::vector<std::string> row(std::string name, std::span<const double> values, Format format) {
  std::vector<std::string> cells{std::move(name), format(values[0])};
  for (const double value : values.subspan(1)) {
    cells.push_back(format(value));
    cells.push_back(values[0] == 0 ? "" : fmt::format("{:+.1f} %", 100 * (value / values[0] - 1)));
  }
  return cells;
}

double memory_peak(const Report& report) {
  std::int64_t peak = 0;
  for (const RankReport& rank : report.ranks) peak = std::max(peak, rank.memory_peak_bytes);
  return static_cast<double>(peak);
}

const TierReport* tier_of(const Report& report, std::string_view tier) {
  for (const TierReport& t : report.network.tiers) {
    if (t.tier == tier) return &t;
  }
  return nullptr;
}

/// Op seconds by label, of all reports; labels in order of how much they change.
std::vector<std::pair<std::string, std::vector<double>>> by_label(std::span<const Report> reports) {
  std::map<std::string, std::vector<double>> sums;
  for (std::size_t r = 0; r < reports.size(); ++r) {
    for (const auto& [label, seconds] : op_seconds_by_label(reports[r])) {
      auto& of_label = sums[label];
      of_label.resize(reports.size());
      of_label[r] = seconds;
    }
  }
  const auto change = [](const std::vector<double>& values) {
    double largest = 0;
    for (const double v : values) largest = std::max(largest, std::abs(v - values[0]));
    return largest;
  };
  std::vector<std::pair<std::string, std::vector<double>>> labels(sums.begin(), sums.end());
  labels.erase(std::remove_if(labels.begin(), labels.end(),
                              [&](const auto& l) { return change(l.second) == 0; }),
               labels.end());
  std::stable_sort(labels.begin(), labels.end(), [&](const auto& a, const auto& b) {
    return change(a.second) > change(b.second);
  });
  return labels;
}

}  // namespace

std::map<std::string, double> op_seconds_by_label(const Report& report) {
  std::map<std::string, double> sums;
  for (const PriceRow& price : report.prices) {
    if (price.time_s > 0) sums[price.label] += price.per_gpu_s * price.lasted_s / price.time_s;
  }
  return sums;
}

std::string compare(std::span<const Report> reports, std::span<const std::string> names) {
  std::string align = "lr";
  std::vector<std::string> heading{"", shorten(names[0], 28)};
  for (std::size_t r = 1; r < reports.size(); ++r) {
    align += "rr";
    heading.push_back(shorten(names[r], 28));
    heading.emplace_back("");
  }
  std::vector<std::vector<std::string>> rows{heading};
  const auto line = [&](std::string name, Format format,
                        const std::function<double(const Report&)>& value) {
    std::vector<double> values;
    for (const Report& report : reports) values.push_back(value(report));
    rows.push_back(row(std::move(name), values, format));
  };
  line("GPUs", format_count, [](const Report& r) { return static_cast<double>(r.gpus); });
  line("tokens a step", format_count, [](const Report& r) { return r.tokens_per_step; });
  line("step time", as_seconds, [](const Report& r) { return r.step_time_s; });
  line("tokens/s/GPU", format_count, [](const Report& r) { return r.tokens_per_s_per_gpu; });
  line("tokens/day", format_count, [](const Report& r) { return r.tokens_per_day; });
  line("GPU-hours per 10^12 tokens", format_count,
       [](const Report& r) { return r.gpu_hours_per_trillion_tokens; });
  line("TFLOPS/GPU causal", format_count, [](const Report& r) { return r.tflops_per_gpu_causal; });
  line("MFU causal", as_percent, [](const Report& r) { return r.mfu_causal; });
  line("memory peak", format_bytes, memory_peak);
  line("forward", as_seconds, [](const Report& r) { return r.phases_s.forward; });
  line("backward", as_seconds, [](const Report& r) { return r.phases_s.backward; });
  line("weight gradients", as_seconds, [](const Report& r) { return r.phases_s.weight; });
  line("overlapped F&B", as_seconds, [](const Report& r) { return r.phases_s.overlapped; });
  line("exposed communication", as_seconds,
       [](const Report& r) { return r.phases_s.exposed_communication; });
  line("  of experts", as_seconds, [](const Report& r) { return r.exposed_s.expert; });
  line("  tensor parallel", as_seconds, [](const Report& r) { return r.exposed_s.tensor; });
  line("  gradients and parameters", as_seconds, [](const Report& r) { return r.exposed_s.data; });
  line("  pipeline", as_seconds, [](const Report& r) { return r.exposed_s.pipeline; });
  line("optimizer", as_seconds, [](const Report& r) { return r.phases_s.optimizer; });
  line("bubble", as_seconds, [](const Report& r) { return r.phases_s.bubble; });
  for (int t = 0; t < kLinkTiers; ++t) {
    const std::string tier(name_of(static_cast<LinkTier>(t)));
    if (std::none_of(reports.begin(), reports.end(),
                     [&](const Report& r) { return tier_of(r, tier) != nullptr; })) {
      continue;
    }
    line(tier + ", busiest link's use", as_percent, [&](const Report& r) {
      const TierReport* found = tier_of(r, tier);
      return found == nullptr ? 0 : found->busiest_use;
    });
    line(tier + ", time lost to one link", as_seconds, [&](const Report& r) {
      const TierReport* found = tier_of(r, tier);
      return found == nullptr ? 0 : found->held_back_s;
    });
  }
  line("op time lost to sharing", as_seconds,
       [](const Report& r) { return r.network.stretched_s; });
  std::string text = format_table(rows, align);

  const auto labels = by_label(reports);
  if (labels.empty()) return text + "\nNo operation differs in its time per GPU and step.\n";
  rows.assign(1, heading);
  for (std::size_t i = 0; i < std::min(kExplanations, labels.size()); ++i) {
    rows.push_back(row(labels[i].first, labels[i].second, as_seconds));
  }
  text += "\nOperations that differ most, op time per GPU and step (overlapped or not)\n";
  text += format_table(rows, align);
  for (std::size_t r = 0; r < reports.size(); ++r) {
    for (const std::string& warning : reports[r].warnings) {
      text += fmt::format("warning: {}: {}\n", shorten(names[r], 28), warning);
    }
  }
  return text;
}

std::string compare_json(std::span<const Report> reports) {
  std::string text =
      fmt::format("{{\n\"schema_version\": {},\n\"reports\": [\n", kReportSchemaVersion);
  for (std::size_t r = 0; r < reports.size(); ++r) {
    text += to_json(reports[r]);
    if (r + 1 < reports.size()) text += ",";
  }
  return text + "]\n}\n";
}

}  // namespace orrery
