#include "reports/search/search_report.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <functional>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "reports/json_object.hpp"
#include "sim/units.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

/// Rows of a Pareto set that the terminal shows.
constexpr std::size_t kFrontRows = 12;

// ---- a candidate in words

std::string recompute_words(const Recompute& r) {
  if (r.full) return "full";
  if (r == Recompute{.attention_core = true}) return "selective";
  if (r == Recompute{.norms = true, .mla_up_projection = true, .activation = true}) {
    return "deepseek";
  }
  std::string words;
  const auto add = [&](bool is, const char* word) {
    if (is) words += fmt::format("{}{}", words.empty() ? "" : "+", word);
  };
  add(r.norms, "norms");
  add(r.mla_up_projection, "mla_up_projection");
  add(r.activation, "activation");
  add(r.attention_core, "attention_core");
  return words.empty() ? "none" : words;
}

/// "15x4 1": fifteen stages of four layers, then one of one.
std::string layers_words(const Plan& plan) {
  std::string words;
  for (std::size_t i = 0; i < plan.stages.size();) {
    std::size_t end = i;
    while (end < plan.stages.size() && plan.stages[end].layers == plan.stages[i].layers) ++end;
    if (i > 0) words += " ";
    words += end - i > 1 ? fmt::format("{}x{}", end - i, plan.stages[i].layers)
                         : fmt::format("{}", plan.stages[i].layers);
    i = end;
  }
  return words;
}

std::string schedule_words(const Plan& plan) {
  std::string words(name_of(plan.schedule));
  if (plan.schedule == ScheduleKind::interleaved_1f1b) words += fmt::format(" v{}", plan.chunks);
  return words;
}

/// What a plan decides, in the order of columns: heading, then value.
using Choices = std::vector<std::pair<const char*, std::string>>;
Choices choices_of(const Ranked& ranked) {
  const Plan& plan = ranked.candidate.plan;
  const Parallelism& p = plan.parallelism;
  const auto number = [](std::int64_t n) { return fmt::format("{}", n); };
  return {{"GPUs", number(ranked.gpus)},
          {"TP", number(p.tp)},
          {"CP", number(p.cp)},
          {"PP", number(p.pp)},
          {"DP", number(p.dp)},
          {"EP", number(p.ep)},
          {"ETP", number(p.expert_tp)},
          {"ZeRO", number(p.zero_stage)},
          {"mb", number(plan.micro_batch_sequences)},
          {"schedule", schedule_words(plan)},
          {"layers", layers_words(plan)},
          {"precision", std::string(name_of(plan.precision.kind))},
          {"recompute", recompute_words(plan.recompute)},
          {"SMs", number(plan.communication_sms)}};
}

// ---- the terminal

std::string paint_bold(const std::string& text, const TerminalOptions& options) {
  return options.colour ? fmt::format("\x1b[1m{}\x1b[0m", text) : text;
}

/// Of a part of the summary.
std::string title(const std::string& text, const TerminalOptions& options) {
  return fmt::format("\n{}\n", paint_bold(text, options));
}

std::string seconds_text(double s) {
  return s > 0 ? fmt::format("{:.3f} s", s) : "-";
}

/// Where not all rows have the same.
std::vector<std::size_t> varying_columns(const std::vector<Choices>& rows) {
  std::vector<std::size_t> varying;
  for (std::size_t c = 0; c < rows.front().size(); ++c) {
    const auto same = [&](const Choices& row) { return row[c].second == rows.front()[c].second; };
    if (!std::all_of(rows.begin(), rows.end(), same)) varying.push_back(c);
  }
  return varying;
}

/// The line below a table that says what all rows have in common.
std::string common_columns(const std::vector<Choices>& rows) {
  const std::vector<std::size_t> varying = varying_columns(rows);
  std::string common;
  for (std::size_t c = 0; c < rows.front().size(); ++c) {
    if (std::find(varying.begin(), varying.end(), c) != varying.end()) continue;
    common += fmt::format("{}{} {}", common.empty() ? "" : ", ", rows.front()[c].first,
                          rows.front()[c].second);
  }
  return common.empty() ? "" : fmt::format("  all: {}\n", common);
}

char alignment_of(std::string_view heading) {
  const auto words = {"schedule", "layers", "precision", "recompute"};
  return std::find(words.begin(), words.end(), heading) == words.end() ? 'r' : 'l';
}

/// Rows of candidates: what they come to, then in what they differ; below it what they have in
/// common. `labels` begin the rows.
std::string table_of(const std::vector<const Ranked*>& rows, const std::vector<std::string>& labels,
                     const Ranked& own) {
  std::vector<Choices> choices;
  for (const Ranked* row : rows) choices.push_back(choices_of(*row));
  const std::vector<std::size_t> varying = varying_columns(choices);
  const double own_s = own.best_known().fits ? own.best_known().step_time_s : 0;
  std::vector<std::vector<std::string>> cells = {{"", "step time", "vs own", "memory", "GPU-h/T"}};
  std::string align = "rrrrr";
  for (const std::size_t c : varying) {
    cells[0].emplace_back(choices.front()[c].first);
    align += alignment_of(choices.front()[c].first);
  }
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const Evaluation& e = rows[r]->best_known();
    cells.push_back(
        {labels[r], seconds_text(e.step_time_s),
         own_s > 0 && e.step_time_s > 0
             ? fmt::format("{:+.1f} %", 100 * (e.step_time_s / own_s - 1))
             : "-",
         format_bytes(static_cast<double>(e.memory_peak_bytes)) + (e.fits ? "" : "!"),
         e.step_time_s > 0 ? format_count(rows[r]->gpu_hours_per_trillion_tokens) : "-"});
    for (const std::size_t c : varying) cells.back().push_back(choices[r][c].second);
  }
  return format_table(cells, align, "  ") + common_columns(choices);
}

std::string head(const SearchAnswer& answer, const Search& search, const TerminalOptions& options) {
  const SearchCounts& counts = answer.result.counts;
  const Scenario& scenario = search.scenario();
  std::string text = paint_bold(shorten(scenario.name, 91) + ": layouts", options) + "\n";
  text += fmt::format(
      "{} candidates (of {} combinations, {} impossible): {} do not fit, {} timed, {} simulated\n",
      counts.candidates, counts.combinations, counts.impossible, counts.too_large, counts.timed,
      counts.simulated);
  return text;
}

std::string best(const SearchAnswer& answer, const TerminalOptions& options) {
  const SearchResult& result = answer.result;
  std::vector<const Ranked*> rows;
  std::vector<std::string> labels;
  bool own_is_there = false;
  for (std::size_t i = 0; i < result.best.size(); ++i) {
    const bool own = result.best[i].index == result.own.index;
    own_is_there |= own;
    rows.push_back(&result.best[i]);
    labels.push_back(fmt::format("{}{}", own ? "own " : "", i + 1));
  }
  if (!own_is_there) {
    rows.push_back(&result.own);
    labels.push_back(answer.own_place > 0 ? fmt::format("own {}", answer.own_place) : "own");
  }
  std::string text =
      title(fmt::format("The best {}, and the scenario's own plan", result.best.size()), options);
  text += table_of(rows, labels, result.own);
  if (!result.own.best_known().fits) text += "  ! the scenario's own plan does not fit in memory\n";
  text += result.certain ? "  certain: no other candidate of the space can be among them\n"
                         : fmt::format("  not certain: {}\n", result.why_uncertain);
  return text;
}

std::string why(const SearchResult& result, const TerminalOptions& options) {
  const auto rows = [](const std::vector<PhaseDifference>& differences, const char* than) {
    std::vector<std::vector<std::string>> cells = {{"", "winner", than, "saved"}};
    for (const PhaseDifference& d : differences) {
      if (std::abs(d.other_s - d.winner_s) < 0.0005) continue;
      cells.push_back({d.phase, fmt::format("{:.3f} s", d.winner_s),
                       fmt::format("{:.3f} s", d.other_s),
                       fmt::format("{:+.3f} s", d.other_s - d.winner_s)});
    }
    return format_table(cells, "lrrr", "  ");
  };
  std::string text;
  if (!result.against_own.empty()) {
    text += title("Why the winner wins, against the scenario's own plan", options);
    text += rows(result.against_own, "own plan");
  }
  if (!result.against_second.empty()) {
    text += title("Why the winner wins, against the second", options);
    text += rows(result.against_second, "second");
  }
  return text;
}

std::string front(const char* what, const std::vector<Ranked>& set, const Ranked& own,
                  const TerminalOptions& options) {
  if (set.size() < 2) return "";
  std::vector<const Ranked*> rows;
  std::vector<std::string> labels;
  // The ends and what lies evenly between them.
  const std::size_t shown = std::min(set.size(), kFrontRows);
  for (std::size_t i = 0; i < shown; ++i) {
    rows.push_back(&set[i * (set.size() - 1) / (shown - 1)]);
    labels.emplace_back(rows.back()->index == own.index ? "own" : "");
  }
  const std::string some = shown < set.size() ? fmt::format(" ({} of {})", shown, set.size()) : "";
  return title(what + some, options) + table_of(rows, labels, own);
}

// ---- JSON

void write_plan(JsonObject& object, const Ranked& ranked) {
  const Plan& plan = ranked.candidate.plan;
  const Parallelism& p = plan.parallelism;
  JsonObject json(object.name("plan"));
  json("nodes", ranked.candidate.nodes);
  json("tp", p.tp);
  json("cp", p.cp);
  json("pp", p.pp);
  json("dp", p.dp);
  json("ep", p.ep);
  json("expert_tp", p.expert_tp);
  json("zero", p.zero_stage);
  json("micro_batch", plan.micro_batch_sequences);
  json("schedule", name_of(plan.schedule));
  json("stages_per_rank", plan.chunks);
  json.array("layers_per_stage", plan.stages,
             [&](const StageContents& stage) { json.writer().Int64(stage.layers); });
  json("precision", name_of(plan.precision.kind));
  json("recompute", recompute_words(plan.recompute));
  json("communication_sms", plan.communication_sms);
}

void write_evaluation(JsonWriter& writer, const Evaluation& e) {
  JsonObject json(writer);
  json("fits", e.fits);
  json("memory_peak_bytes", e.memory_peak_bytes);
  if (e.step_time_s > 0) {
    json("step_time_s", e.step_time_s);
    write_phases(json.name("phases_s"), e.phases_s);
  } else {
    json.null("step_time_s");
  }
}

void write_ranked(JsonWriter& writer, const Ranked& ranked, std::size_t place = 0) {
  JsonObject json(writer);
  if (place > 0) json("place", static_cast<std::uint64_t>(place));
  json("candidate", ranked.key);
  json("gpus", ranked.gpus);
  const Evaluation& e = ranked.best_known();
  json("fits", e.fits);
  if (e.step_time_s > 0) {
    json("step_time_s", e.step_time_s);
    json("gpu_hours_per_trillion_tokens", ranked.gpu_hours_per_trillion_tokens);
  } else {
    json.null("step_time_s");
    json.null("gpu_hours_per_trillion_tokens");
  }
  json("memory_peak_bytes", e.memory_peak_bytes);
  write_plan(json, ranked);
  write_evaluation(json.name("coarse"), ranked.coarse);
  if (ranked.full) {
    write_evaluation(json.name("full"), *ranked.full);
  } else {
    json.null("full");
  }
}

// ---- CSV

/// In quotes where commas would break the row. No value here has quotes of its own.
std::string csv_cell(const std::string& text) {
  return text.find(',') == std::string::npos ? text : fmt::format("\"{}\"", text);
}

std::string csv_evaluation(const Evaluation* e) {
  if (e == nullptr) return ",,,,,,,,,,";
  std::string text = fmt::format(",{},{}", e->fits ? 1 : 0, e->memory_peak_bytes);
  const PhaseTimes& p = e->phases_s;
  for (const double s : {e->step_time_s, p.forward, p.backward, p.weight, p.overlapped, p.bubble,
                         p.optimizer, p.exposed_communication}) {
    text += e->step_time_s > 0 ? fmt::format(",{}", s) : ",";
  }
  return text;
}

}  // namespace

std::string to_terminal(const SearchAnswer& answer, const Search& search,
                        const TerminalOptions& options) {
  const SearchResult& result = answer.result;
  std::string text = head(answer, search, options);
  if (result.best.empty()) {
    text += "\nNo candidate fits in memory.";
    if (answer.nearest) {
      const double needed = static_cast<double>(answer.nearest->best_known().memory_peak_bytes);
      text += fmt::format(" Nearest, with {} of {}:\n", format_bytes(needed),
                          format_bytes(search.scenario().profile.device.memory_bytes));
      text += table_of({&*answer.nearest}, {""}, result.own);
    } else {
      text += "\n";
    }
    return text;
  }
  text += best(answer, options) + why(result, options);
  text +=
      front("Faster or smaller: nothing else is both", result.time_and_memory, result.own, options);
  text += front("Faster or on fewer GPUs", result.time_and_gpus, result.own, options);
  text += front("Fewer GPU-hours or fewer GPUs", result.gpu_hours_and_gpus, result.own, options);
  return text;
}

std::string to_terminal(const Answer& answer, const AskedQuestion& asked, const Scenario& scenario,
                        const TerminalOptions& options) {
  const std::string what =
      asked.days ? fmt::format("fewest nodes for {} tokens in {} days", format_count(asked.tokens),
                               *asked.days)
                 : fmt::format("soonest {} tokens for {} GPU-hours", format_count(asked.tokens),
                               format_count(*asked.gpu_hours));
  std::string text =
      paint_bold(shorten(scenario.name, 40) + ": " + what, options) + "\n" + answer.why + "\n";
  if (answer.searched.empty()) return text;
  std::vector<Choices> choices;
  for (const ClusterChoice& choice : answer.searched) choices.push_back(choices_of(choice.layout));
  const std::vector<std::size_t> columns = varying_columns(choices);
  std::vector<std::vector<std::string>> cells = {
      {"", "nodes", "days", "GPU-hours", "step time", "memory"}};
  std::string align = "lrrrrr";
  for (const std::size_t c : columns) {
    cells[0].emplace_back(choices.front()[c].first);
    align += alignment_of(choices.front()[c].first);
  }
  for (std::size_t i = 0; i < answer.searched.size(); ++i) {
    const ClusterChoice& choice = answer.searched[i];
    const Evaluation& e = choice.layout.best_known();
    const bool chosen = answer.choice && answer.choice->nodes == choice.nodes;
    cells.push_back({chosen ? (answer.met ? "->" : "nearest") : "", fmt::format("{}", choice.nodes),
                     fmt::format("{:.2f}", choice.days), format_count(choice.gpu_hours),
                     seconds_text(e.step_time_s),
                     format_bytes(static_cast<double>(e.memory_peak_bytes))});
    for (const std::size_t c : columns) cells.back().push_back(choices[i][c].second);
  }
  text += title("The fastest layout on each size that was searched", options);
  text += format_table(cells, align, "  ") + common_columns(choices);
  if (!answer.nothing_fits.empty()) {
    text +=
        fmt::format("  nothing fits in memory on {} nodes\n", fmt::join(answer.nothing_fits, ", "));
  }
  return text;
}

std::string to_json(const Answer& answer, const AskedQuestion& asked, const Scenario& scenario) {
  return json_document([&](JsonObject& json) {
    const auto number = [&](const char* key, const std::optional<double>& value) {
      if (value) {
        json(key, *value);
      } else {
        json.null(key);
      }
    };
    const auto write = [](JsonWriter& writer, const ClusterChoice& choice) {
      JsonObject row(writer);
      row("nodes", choice.nodes);
      row("gpus", choice.layout.gpus);
      row("days", choice.days);
      row("gpu_hours", choice.gpu_hours);
      write_ranked(row.name("layout"), choice.layout);
    };
    json("scenario", scenario.name);
    json("tokens", asked.tokens);
    number("days", asked.days);
    number("gpu_hours", asked.gpu_hours);
    json("met", answer.met);
    json("why", answer.why);
    if (answer.choice) {
      write(json.name("choice"), *answer.choice);
    } else {
      json.null("choice");
    }
    json.array("searched", answer.searched,
               [&](const ClusterChoice& choice) { write(json.writer(), choice); });
    json.array("nothing_fits_on_nodes", answer.nothing_fits,
               [&](std::int64_t nodes) { json.writer().Int64(nodes); });
  });
}

std::string progress_text(const SearchProgress& p) {
  const bool coarse = p.fidelity == Fidelity::coarse;
  std::string text = p.gpus > 0 ? fmt::format("{} GPUs: ", p.gpus) : "";
  text +=
      coarse ? fmt::format("coarse {} of {}", p.done, p.of) : fmt::format("simulated {}", p.done);
  text += fmt::format(", {:.{}f} a second on {} thread{}", p.per_s, p.per_s < 100 ? 1 : 0,
                      p.threads, p.threads == 1 ? "" : "s");
  // How many will be simulated, the results decide.
  if (coarse && p.per_s > 0 && p.of > p.done) {
    text += fmt::format(", {} left", format_seconds(static_cast<double>(p.of - p.done) / p.per_s));
  }
  return text;
}

std::string to_json(const SearchAnswer& answer, const Search& search) {
  const SearchResult& result = answer.result;
  return json_document([&](JsonObject& json) {
    json("scenario", search.scenario().name);
    json("memory_capacity_bytes", search.scenario().profile.device.memory_bytes);
    {
      JsonObject counts(json.name("counts"));
      counts("combinations", result.counts.combinations);
      counts("impossible", result.counts.impossible);
      counts("candidates", result.counts.candidates);
      counts("too_large", result.counts.too_large);
      counts("timed", result.counts.timed);
      counts("simulated", result.counts.simulated);
    }
    json("certain", result.certain);
    json("why_uncertain", result.why_uncertain);
    std::size_t place = 0;
    json.array("best", result.best,
               [&](const Ranked& ranked) { write_ranked(json.writer(), ranked, ++place); });
    write_ranked(json.name("own"), result.own, answer.own_place);
    const auto set = [&](const char* key, const std::vector<Ranked>& ranked) {
      json.array(key, ranked, [&](const Ranked& one) { write_ranked(json.writer(), one); });
    };
    set("time_and_memory", result.time_and_memory);
    set("time_and_gpus", result.time_and_gpus);
    set("gpu_hours_and_gpus", result.gpu_hours_and_gpus);
    const auto differences = [&](const char* key, const std::vector<PhaseDifference>& list) {
      json.array(key, list, [&](const PhaseDifference& difference) {
        JsonObject row(json.writer());
        row("phase", difference.phase);
        row("winner_s", difference.winner_s);
        row("other_s", difference.other_s);
      });
    };
    differences("against_second", result.against_second);
    differences("against_own", result.against_own);
    if (answer.nearest) {
      write_ranked(json.name("nearest"), *answer.nearest);
    } else {
      json.null("nearest");
    }
  });
}

std::string to_csv(const SearchAnswer& answer, const Search& search) {
  // In the order of choices_of().
  std::string text =
      "candidate,gpus,tp,cp,pp,dp,ep,expert_tp,zero,micro_batch,schedule,layers,precision,"
      "recompute,"
      "communication_sms";
  const auto ranked = [&](std::size_t index) {
    Ranked r{.index = index, .candidate = search.candidates().at(index)};
    r.key = key_of(r.candidate);
    r.gpus = r.candidate.plan.parallelism.world();
    return r;
  };
  for (const char* fidelity : {"coarse", "full"}) {
    for (const char* column :
         {"fits", "memory_peak_bytes", "step_time_s", "forward_s", "backward_s", "weight_s",
          "overlapped_s", "bubble_s", "optimizer_s", "exposed_communication_s"}) {
      text += fmt::format(",{}_{}", fidelity, column);
    }
  }
  text += "\n";
  for (std::size_t i = 0; i < search.candidates().size(); ++i) {
    const Ranked r = ranked(i);
    text += csv_cell(r.key);
    for (const auto& [name, value] : choices_of(r)) text += fmt::format(",{}", csv_cell(value));
    text += csv_evaluation(&answer.table.coarse[i]);
    const auto full = answer.table.full.find(i);
    text += csv_evaluation(full == answer.table.full.end() ? nullptr : &full->second);
    text += "\n";
  }
  return text;
}

std::string scenario_of(const Candidate& candidate, const Scenario& scenario,
                        const std::string& path) {
  Scenario best = with_candidate(scenario, candidate);
  const fs::path from = fs::absolute(fs::path(scenario.file).parent_path());
  const fs::path to = fs::absolute(fs::path(path).parent_path());
  // Profile and fabric are paths from here, and to_yaml names them as seen from the file's folder;
  // counts and text are as the scenario names them.
  if (auto* counts = std::get_if<RecordedCounts>(&best.plan.routing.kind)) {
    counts->file = (from / counts->file).lexically_normal().lexically_relative(to).string();
  }
  best.file = (to / fs::path(path).filename()).string();
  for (std::string* named : {&best.cluster.profile, &best.cluster.fabric, &best.training.text}) {
    if (!named->empty()) *named = fs::absolute(*named).lexically_normal().string();
  }
  best.name += ", best layout";
  if (best.fabric == nullptr) best.cluster.fabric.clear();  // of a cluster with more nodes than it
  return to_yaml(best);
}

}  // namespace orrery
