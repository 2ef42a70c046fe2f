#include "reports/capacity.hpp"

#include <fmt/format.h>
#include <rapidjson/document.h>
#include <rapidjson/error/en.h>
#include <tbb/parallel_invoke.h>

#include <algorithm>
#include <filesystem>
#include <initializer_list>

#include "reports/html/timeline_levels.hpp"
#include "reports/json.hpp"
#include "reports/json_object.hpp"
#include "reports/measured_timeline.hpp"
#include "reports/trace.hpp"
#include "reports/uncertainty.hpp"

namespace orrery {

namespace {

/// Line and column (of bytes) of an offset, with the text of the line.
Problem problem_at(const std::string& file, const std::string& text, std::size_t offset,
                   std::string message, std::string hint) {
  offset = std::min(offset, text.size());
  const std::size_t begin = offset == 0 ? 0 : text.rfind('\n', offset - 1) + 1;
  const auto line =
      1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(offset), '\n');
  constexpr std::size_t kShown = 120;
  const std::size_t end = std::min({text.find('\n', begin), text.size(), begin + kShown});
  return {{file, static_cast<int>(line), static_cast<int>(offset - begin) + 1},
          std::move(message),
          std::move(hint),
          text.substr(begin, end - begin)};
}

/// `verb` writes objects with these keys; `body` is handed the one that was read.
template <class Body>
OtherDocument read_other(const std::string& file, const char* verb,
                         std::initializer_list<const char*> keys, Problems& problems, Body body) {
  OtherDocument other{.file = std::filesystem::path(file).filename().string()};
  if (file.empty()) return other;
  std::optional<std::string> text = read_text(file, problems);
  if (!text) return other;
  const std::string hint = fmt::format("what orrery {} --json FILE wrote", verb);
  if (text->rfind("SQLite format 3", 0) == 0) {
    problems.add({file, 0, 0}, "a store, not JSON",
                 "orrery search SCENARIO --store STORE --json FILE writes what it knows");
    return other;
  }
  rapidjson::Document document;
  document.Parse<rapidjson::kParseIterativeFlag | rapidjson::kParseValidateEncodingFlag>(
      text->data(), text->size());
  if (document.HasParseError()) {
    problems.add(problem_at(
        file, *text, document.GetErrorOffset(),
        fmt::format("no JSON: {}", rapidjson::GetParseError_En(document.GetParseError())), hint));
    return other;
  }
  for (const char* key : keys) {
    if (!document.IsObject() || !document.HasMember(key)) {
      problems.add({file, 0, 0}, fmt::format("no JSON of {}: it has no '{}'", verb, key), hint);
      return other;
    }
  }
  body(document);
  other.json = std::move(*text);
  return other;
}

/// A number, or the middle of an interval; 0 where there is none.
double number_in(const rapidjson::Value& object, std::initializer_list<const char*> path) {
  const rapidjson::Value* at = &object;
  for (const char* key : path) {
    if (!at->IsObject()) return 0;
    const auto found = at->FindMember(key);
    if (found == at->MemberEnd()) return 0;
    at = &found->value;
  }
  if (at->IsObject() && at->HasMember("p50")) at = &(*at)["p50"];
  return at->IsNumber() ? at->GetDouble() : 0;
}

/// visit(predicted / published - 1) for each published step of the JSON of validate.
template <class Visit>
void for_each_step_error(const rapidjson::Document& validation, Visit visit) {
  const rapidjson::Value& runs = validation["runs"];
  if (!runs.IsArray()) return;
  for (const rapidjson::Value& run : runs.GetArray()) {
    if (!run.IsObject() || !run.HasMember("rows") || !run["rows"].IsArray()) continue;
    for (const rapidjson::Value& row : run["rows"].GetArray()) {
      if (!row.IsObject() || !row.HasMember("quantity") || !row["quantity"].IsString()) continue;
      const double error = number_in(row, {"error"});
      if (std::string_view(row["quantity"].GetString()) == "step_time_s" && error > -1)
        visit(error);
    }
  }
}

void add_run(CapacityScenario& scenario, const TargetContext& context) {
  if (context.tokens <= 0) return;
  const Report& r = scenario.study.report;
  scenario.tokens = context.tokens;
  scenario.gpu_hours = context.tokens * 1e-12 * r.gpu_hours_per_trillion_tokens / context.goodput;
  scenario.days = context.tokens / (r.tokens_per_day * context.goodput);
  scenario.cost_usd = scenario.gpu_hours * context.usd_per_gpu_hour;
}

/// What hangs on a step that was simulated.
void study_around(CapacityScenario& scenario) {
  scenario.assumptions = assumptions_of(scenario.study);
  if (!scenario.study.report.executed_on.empty()) return;
  tbb::parallel_invoke([&] { scenario.scaling = scaling(scenario.study); },
                       [&] { scenario.sensitivity = sensitivity(scenario.study); });
}

/// Relative standard deviation of the step: of draws where there are any.
double spread_of(const CapacityScenario& scenario) {
  const auto& drawn = scenario.study.report.uncertainty;
  if (!drawn) return scenario.sensitivity.spread();
  constexpr double kTenthToTenth = 2 * 1.2816;  // of a normal distribution, in standard deviations
  const Interval& step = drawn->step_time_s;
  return (step.p90 - step.p10) / (kTenthToTenth * step.p50);
}

MeasuredStep read_measured(const std::string& file, const Study& study) {
  Problems problems;
  MeasuredStep step{.file = std::filesystem::path(file).filename().string(),
                    .timeline = read_measured_timeline(file, study.program, problems)};
  problems.throw_if_any();
  step.joined = join_timelines(study.scenario, study.program, study.run.prices, study.run.timeline,
                               step.timeline);
  return step;
}

void write_raw(JsonObject& o, const char* key, const std::string& json) {
  o.name(key).RawValue(json.data(), json.size(), rapidjson::kObjectType);
}

void write_curve(JsonWriter& writer, const ScalingCurve& curve) {
  JsonObject o(writer);
  o.array("points", curve.points, [&](const ScalingPoint& point) {
    JsonObject p(writer);
    p("gpus", point.gpus);
    p("dp", point.dp);
    p("global_batch", point.global_batch);
    p("micro_batches", point.micro_batches);
    p("network", point.flows ? "flows" : "formula");
    p("step_time_s", point.step_time_s);
    p("tokens_per_day", point.tokens_per_day);
    p("efficiency", point.efficiency);
    p("memory_peak_bytes", point.memory_peak_bytes);
    p("fits", point.fits);
  });
  o.array("left_out", curve.left_out, [&](const ScalingGap& gap) {
    JsonObject g(writer);
    g("gpus", gap.gpus);
    g("why", gap.why);
  });
}

void write_sensitivity(JsonWriter& writer, const Sensitivity& s) {
  JsonObject o(writer);
  o("step_time_s", s.step_s);
  o("change", kSensitivityChange);
  o("spread", s.spread());
  o.array("rows", s.rows, [&](const SensitivityRow& row) {
    JsonObject r(writer);
    r("kind", row.kind);
    r("share", row.share);
    r("spread", row.spread);
    r("faster_s", row.faster_s);
    r("slower_s", row.slower_s);
    r("by_spread_s", row.by_spread_s());
  });
}

void write_judgement(JsonWriter& writer, const Judgement& j) {
  JsonObject o(writer);
  o("target", j.target.text);
  o("quantity", name_of(j.target.quantity));
  o("at_least", j.target.at_least);
  o("aim", j.target.value);
  o("value", j.value);
  o("low", j.low);
  o("high", j.high);
  o("verdict", name_of(j.verdict));
  o("margin", j.margin);
  o("answer", answer_of(j));
}

void write_scenario(JsonWriter& writer, const CapacityScenario& scenario) {
  const Study& study = scenario.study;
  JsonObject o(writer);
  o("file", std::filesystem::path(study.scenario.file).filename().string());
  o.array("targets", scenario.judgements,
          [&](const Judgement& judgement) { write_judgement(writer, judgement); });
  if (scenario.tokens > 0) {
    JsonObject run(o.name("run"));
    run("tokens", scenario.tokens);
    run("gpu_hours", scenario.gpu_hours);
    run("days", scenario.days);
    if (scenario.cost_usd > 0) run("cost_usd", scenario.cost_usd);
  }
  write_raw(o, "report", to_json(study.report));
  o.array("assumptions", scenario.assumptions, [&](const Assumption& a) {
    JsonObject row(writer);
    row("group", a.group);
    row("what", a.what);
    row("value", a.value);
    row("source", a.source);
    if (a.share >= 0) row("share", a.share);
  });
  if (!scenario.scaling.same_batch.points.empty()) {
    JsonObject s(o.name("scaling"));
    write_curve(s.name("same_batch"), scenario.scaling.same_batch);
    write_curve(s.name("growing_batch"), scenario.scaling.growing_batch);
  }
  if (!scenario.sensitivity.rows.empty()) {
    write_sensitivity(o.name("sensitivity"), scenario.sensitivity);
  }
  const std::vector<std::uint32_t> ranks = representative_ranks(study.report);
  write_timeline(o.name("timeline"), timeline_levels(study.program, study.run.timeline, ranks),
                 study.program);
  if (scenario.measured) {
    JsonObject m(o.name("measured"));
    m("file", scenario.measured->file);
    write_timeline(m.name("timeline"),
                   timeline_levels(study.program, scenario.measured->timeline, ranks),
                   study.program);
    write_raw(m, "joined", to_json(scenario.measured->joined));
  }
}

}  // namespace

CapacityReport capacity_report(const CapacityQuestion& question) {
  CapacityReport report{.question = question};
  TargetContext& context = report.context;
  context.tokens = question.tokens;
  context.usd_per_gpu_hour = question.usd_per_gpu_hour;
  Problems problems;
  const auto nothing = [](const rapidjson::Document&) {};
  report.search = read_other(question.search, "search", {"best", "own"}, problems, nothing);
  report.validation =
      read_other(question.validation, "validate", {"runs"}, problems,
                 [&](const rapidjson::Document& validation) {
                   for_each_step_error(validation, [&](double error) {
                     context.published_least = std::min(context.published_least, 1 / (1 + error));
                     context.published_most = std::max(context.published_most, 1 / (1 + error));
                   });
                 });
  report.budget = read_other(question.budget, "budget", {"stages", "total"}, problems,
                             [&](const rapidjson::Document& budget) {
                               context.budget_gpu_hours = number_in(budget, {"total", "gpu_hours"});
                               context.budget_days = number_in(budget, {"total", "wall_s"}) / 86400;
                               context.budget_cost_usd = number_in(budget, {"total", "cost_usd"});
                               const double goodput = number_in(budget, {"assumptions", "goodput"});
                               context.budget_has_goodput = goodput > 0 && goodput < 1;
                             });
  report.reliability =
      read_other(question.reliability, "reliability", {"goodput", "calendar_s"}, problems,
                 [&](const rapidjson::Document& reliability) {
                   const double middle = number_in(reliability, {"goodput", "p50"});
                   if (!(middle > 0)) return;
                   context.goodput = middle;
                   context.goodput_low = number_in(reliability, {"goodput", "p10"});
                   context.goodput_high = number_in(reliability, {"goodput", "p90"});
                 });
  std::vector<Target> targets;
  for (const std::string& text : question.targets) {
    if (auto target = parse_target(text, problems)) targets.push_back(std::move(*target));
  }
  std::vector<Scenario> scenarios;
  for (const std::string& file : question.scenarios) {
    try {
      scenarios.push_back(read_scenario(file, question.overrides));
    } catch (const InputError& error) {
      for (const Problem& problem : error.problems()) problems.add(problem);
    }
  }
  problems.throw_if_any();

  for (Scenario& scenario : scenarios) {
    CapacityScenario s{
        .study = study_step(std::move(scenario), {.network = question.network, .isolated = true})};
    study_around(s);
    if (question.draws > 0) {
      s.study.report.uncertainty = uncertainty(s.study, {.draws = question.draws});
    }
    if (report.scenarios.empty() && !question.measured.empty()) {
      s.measured = read_measured(question.measured, s.study);
    }
    TargetContext own = context;
    own.spread = spread_of(s);
    for (const Target& target : targets) {
      s.judgements.push_back(judge(target, s.study.report, own));
    }
    add_run(s, own);
    report.scenarios.push_back(std::move(s));
  }
  return report;
}

CapacityReport capacity_report(Study study) {
  CapacityReport report;
  CapacityScenario scenario{.study = std::move(study)};
  study_around(scenario);
  report.scenarios.push_back(std::move(scenario));
  return report;
}

std::string answer_of(const Judgement& j) {
  const char* verdict = "";
  switch (j.verdict) {
    case Verdict::met:
      verdict = "Yes";
      break;
    case Verdict::met_closely:
      verdict = "Probably";
      break;
    case Verdict::missed_closely:
      verdict = "Probably not";
      break;
    case Verdict::missed:
      verdict = "No";
      break;
  }
  const TargetQuantity q = j.target.quantity;
  std::string text = fmt::format(
      "{}: {}, {} {} are asked for", verdict, format_target_value(q, j.value),
      j.target.at_least ? "at least" : "at most", format_target_value(q, j.target.value));
  if (j.high > j.low) {
    text += fmt::format("; {} to {} with what is known of the errors",
                        format_target_value(q, j.low), format_target_value(q, j.high));
  }
  return text + ".";
}

std::string to_json(const CapacityReport& report) {
  return json_document([&](JsonObject& o) {
    o("kind", "orrery capacity report");
    o("schema_version", kReportSchemaVersion);
    if (report.context.goodput < 1) o("goodput", report.context.goodput);
    o.array("scenarios", report.scenarios,
            [&](const CapacityScenario& scenario) { write_scenario(o.writer(), scenario); });
    const auto other = [&](const char* key, const OtherDocument& document) {
      if (document) write_raw(o, key, document.json);
    };
    other("search", report.search);
    other("budget", report.budget);
    other("reliability", report.reliability);
    other("validation", report.validation);
  });
}

}  // namespace orrery
