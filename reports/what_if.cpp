#include "reports/what_if.hpp"

#include <fmt/format.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>

#include "reports/compare.hpp"
#include "reports/json.hpp"
#include "reports/json_object.hpp"
#include "reports/study.hpp"
#include "reports/terminal.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxWhatIfs = 1000;
constexpr std::size_t kNameColumns = 26;
constexpr std::size_t kExplanations = 4;
constexpr double kLeastExplanation_s = 0.0005;  // what a millisecond's rounding hides

WhatIf read_what_if(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "what_if");
  WhatIf out;
  out.name = reader.text("name");
  out.note = reader.text_or("note", "");
  const Node set = reader.require("set");
  if (set.kind() != Node::Kind::null) out.overrides = read_overrides(set, problems);
  reader.finish();
  return out;
}

/// Where the comma is that ends the override which begins at `begin`.
std::size_t end_of_override(std::string_view text, std::size_t begin) {
  int depth = 0;
  char quote = 0;
  for (std::size_t i = begin; i < text.size(); ++i) {
    const char c = text[i];
    if (quote != 0) {
      if (c == quote) quote = 0;
    } else if (c == '"' || c == '\'') {
      quote = c;
    } else if (c == '{' || c == '[') {
      ++depth;
    } else if (c == '}' || c == ']') {
      --depth;
    } else if (c == ',' && depth <= 0) {
      return i;
    }
  }
  return text.size();
}

double memory_peak(const Report& report) {
  std::int64_t peak = 0;
  for (const RankReport& rank : report.ranks) peak = std::max(peak, rank.memory_peak_bytes);
  return static_cast<double>(peak);
}

WhatIfRow simulate_variant(const ScenarioFile& file, Overrides overrides, const WhatIf& what_if,
                           std::optional<Network> network) {
  WhatIfRow row{.what_if = what_if, .report = {}, .why_not = {}, .problems = {}, .notes = {}};
  overrides.insert(overrides.end(), what_if.overrides.begin(), what_if.overrides.end());
  Scenario scenario;
  try {
    scenario = file.read(overrides);
  } catch (const InputError& error) {
    row.problems = error.problems();
    row.why_not = row.problems.front().message;
    if (row.problems.size() > 1) {
      row.why_not += fmt::format(" (and {} more)", row.problems.size() - 1);
    }
    return row;
  }
  row.notes = scenario.notes;
  try {
    row.report = study_step(std::move(scenario), {.network = network}).report;
  } catch (const InputError& error) {
    row.problems = error.problems();
    row.why_not = row.problems.front().message;
    return row;
  }
  const double peak = memory_peak(*row.report);
  if (peak > row.report->memory_capacity_bytes) {
    row.why_not = fmt::format("out of memory: {} of {}", format_bytes(peak),
                              format_bytes(row.report->memory_capacity_bytes));
  }
  return row;
}

std::string change(double value, double base) {
  return base == 0 ? "" : fmt::format("{:+.1f} %", 100 * (value / base - 1));
}

std::vector<std::string> cells_of(const WhatIfRow& row, const Report* base) {
  std::vector<std::string> cells{shorten(row.what_if.name, kNameColumns)};
  if (!row.report) return cells;
  const Report& r = *row.report;
  const auto number = [&](double v) { cells.push_back(fmt::format("{:.3f}", v)); };
  number(r.step_time_s);
  cells.push_back(base == nullptr ? "" : change(r.step_time_s, base->step_time_s));
  number(r.phases_s.forward);
  number(r.phases_s.backward);
  number(r.phases_s.weight);
  number(r.phases_s.overlapped);
  number(r.phases_s.exposed_communication);
  number(r.phases_s.optimizer);
  number(r.phases_s.bubble);
  const double peak = memory_peak(r);
  cells.push_back(fmt::format("{:.1f}", peak / 1e9));
  cells.push_back(fmt::format("{:.0f}{}", r.memory_capacity_bytes / 1e9,
                              peak > r.memory_capacity_bytes ? " !" : ""));
  cells.push_back(format_count(r.gpu_hours_per_trillion_tokens));
  cells.push_back(base == nullptr ? ""
                                  : change(r.gpu_hours_per_trillion_tokens,
                                           base->gpu_hours_per_trillion_tokens));
  return cells;
}

/// "dispatch(F) -0.123, combine(F) -0.100": what changed most, largest first.
std::string explanation(const Report& report, const Report& base) {
  std::map<std::string, double> change = op_seconds_by_label(report);
  for (const auto& [label, seconds] : op_seconds_by_label(base)) change[label] -= seconds;
  std::vector<std::pair<std::string, double>> sorted(change.begin(), change.end());
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return std::abs(a.second) > std::abs(b.second);
  });
  std::string text;
  for (std::size_t i = 0; i < std::min(kExplanations, sorted.size()); ++i) {
    if (std::abs(sorted[i].second) < kLeastExplanation_s) break;
    text +=
        fmt::format("{}{} {:+.3f}", text.empty() ? "" : ", ", sorted[i].first, sorted[i].second);
  }
  return text.empty() ? "no operation" : text;
}

}  // namespace

WhatIfs read_what_ifs(const std::string& path) {
  Problems problems;
  const Node root = read_document(path, problems);
  WhatIfs out;
  MapReader reader(root, problems, "the file");
  out.scenario = (fs::path(root.folder()) / reader.text("scenario")).lexically_normal().string();
  const Node list = reader.require("what_if");
  if (list.kind() != Node::Kind::sequence && list.kind() != Node::Kind::null) {
    problems.add(list, "what_if must be a list of {name, set: [PATH=VALUE, ...]}");
  } else if (list.size() > kMaxWhatIfs) {
    problems.add(list, fmt::format("more than {} questions in one file", kMaxWhatIfs));
  } else {
    for (std::size_t i = 0; i < list.size(); ++i) {
      out.list.push_back(read_what_if(list[i], problems));
    }
  }
  reader.finish();
  problems.throw_if_any();
  return out;
}

WhatIf parse_what_if(std::string_view text, int number) {
  constexpr const char* kHint = "\"BF16: plan.precision=bf16, plan.communication_sms=8\"";
  WhatIf out;
  const std::string line(text);
  const auto reject = [&](std::size_t byte, std::string message) {
    Problems problems;
    problems.add(Problem{{"--what-if", number, static_cast<int>(byte) + 1},
                         std::move(message),
                         fmt::format("such as {}", kHint),
                         line});
    problems.throw_if_any();
  };
  const std::size_t equals = text.find('=');
  if (equals == std::string_view::npos) reject(0, "a what-if is NAME: PATH=VALUE, PATH=VALUE");
  std::size_t at = 0;
  const std::size_t colon = text.rfind(": ", equals);
  if (colon != std::string_view::npos) {
    out.name = text.substr(0, colon);
    at = colon + 2;
  }
  while (at < text.size()) {
    while (at < text.size() && text[at] == ' ') ++at;
    const std::size_t end = end_of_override(text, at);
    const std::string_view part = text.substr(at, end - at);
    if (part.find('=') == std::string_view::npos) {
      reject(at, "an override is PATH=VALUE; a value with a comma stands in quotes or brackets");
    }
    out.overrides.push_back({.text = std::string(part),
                             .at = {"--what-if", number, static_cast<int>(at) + 1},
                             .source_line = line});
    at = end + 1;
  }
  if (out.name.empty()) out.name = line.substr(colon == std::string_view::npos ? 0 : colon + 2);
  return out;
}

WhatIfAnswer ask_what_ifs(const ScenarioFile& scenario, const Overrides& set,
                          std::span<const WhatIf> list, std::optional<Network> network) {
  WhatIfAnswer answer;
  answer.rows.resize(list.size());
  const WhatIf as_it_is{.name = "as it is", .overrides = {}, .note = {}};
  // Rows go where they belong, so the order of the threads does not show. The base is one of them.
  tbb::parallel_for(std::size_t{0}, list.size() + 1, [&](std::size_t i) {
    if (i == 0) {
      answer.base = simulate_variant(scenario, set, as_it_is, network);
    } else {
      answer.rows[i - 1] = simulate_variant(scenario, set, list[i - 1], network);
    }
  });
  if (!answer.base.report) throw InputError(answer.base.problems);
  return answer;
}

std::string to_terminal(const WhatIfAnswer& answer) {
  const Report& base = *answer.base.report;
  std::vector<std::vector<std::string>> rows{{"what if", "step s", "", "forward", "backward",
                                              "weight", "F&B", "exposed", "opt.", "bubble", "GB",
                                              "of", "GPU-h/10^12", ""}};
  rows.push_back(cells_of(answer.base, nullptr));
  for (const WhatIfRow& row : answer.rows) {
    if (row.report) rows.push_back(cells_of(row, &base));
  }
  std::string text = fmt::format("{}\n{}\n\n", base.scenario, base.plan);
  text += format_table(rows, "lrrrrrrrrrrrrr");

  rows.clear();
  for (const WhatIfRow& row : answer.rows) {
    if (!row.why_not.empty())
      rows.push_back({shorten(row.what_if.name, kNameColumns), row.why_not});
  }
  if (!answer.base.why_not.empty()) rows.insert(rows.begin(), {"as it is", answer.base.why_not});
  if (!rows.empty()) text += "\nCannot run\n" + format_table(rows, "ll");

  rows.clear();
  for (const WhatIfRow& row : answer.rows) {
    if (!row.report) continue;
    rows.push_back({shorten(row.what_if.name, kNameColumns), explanation(*row.report, base)});
  }
  if (!rows.empty()) {
    text += "\nOperations that change most, op seconds per GPU and step (overlapped or not)\n" +
            format_table(rows, "ll");
  }
  return text;
}

std::string to_json(const WhatIfAnswer& answer) {
  const Report& base = *answer.base.report;
  return json_document([&](JsonObject& o) {
    JsonWriter& writer = o.writer();
    const auto raw = [&](const Report& report) {
      const std::string text = to_json(report);
      writer.RawValue(text.data(), text.size() - 1, rapidjson::kObjectType);  // without the newline
    };
    const auto ratio = [](double value, double of) {
      return of > 0 ? value / of - 1 : std::nan("");
    };
    o("schema_version", kReportSchemaVersion);
    o.name("base");
    raw(base);
    o.array("variants", answer.rows, [&](const WhatIfRow& row) {
      JsonObject v(writer);
      v("name", row.what_if.name);
      v("note", row.what_if.note);
      v.array("set", row.what_if.overrides, [&](const Override& set) {
        writer.String(set.text.data(), static_cast<rapidjson::SizeType>(set.text.size()));
      });
      v("feasible", row.why_not.empty());
      v("why_not", row.why_not);
      if (!row.report) {
        v.null("step_change");
        v.null("gpu_hours_change");
        v.null("report");
        return;
      }
      v("step_change", ratio(row.report->step_time_s, base.step_time_s));
      v("gpu_hours_change",
        ratio(row.report->gpu_hours_per_trillion_tokens, base.gpu_hours_per_trillion_tokens));
      v.name("report");
      raw(*row.report);
    });
  });
}

}  // namespace orrery
