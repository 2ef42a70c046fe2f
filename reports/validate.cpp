#include "reports/validate.hpp"

#include <fmt/format.h>
#include <rapidjson/document.h>
#include <rapidjson/prettywriter.h>
#include <rapidjson/stringbuffer.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <optional>

#include "models/generation_scenario.hpp"
#include "reports/generation.hpp"
#include "reports/json.hpp"
#include "reports/study.hpp"
#include "reports/terminal.hpp"
#include "reports/uncertainty.hpp"

namespace orrery {

namespace {

namespace fs = std::filesystem;

bool starts_with(std::string_view text, std::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}
bool ends_with(std::string_view text, std::string_view suffix) {
  return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

/// Of the middle position's cells alone, not of the step.
bool is_isolated(std::string_view quantity) {
  return starts_with(quantity, "cell.") || starts_with(quantity, "phase.");
}

Dimension dimension_of(std::string_view quantity) {
  if (quantity.find("tokens_per_") != std::string_view::npos) return Dimension::scalar;
  const bool within_s = quantity.find("phases_s.") != std::string_view::npos ||
                        quantity.find("cells_s.") != std::string_view::npos;
  if (ends_with(quantity, "_s") || is_isolated(quantity) || within_s) {
    return Dimension::seconds;
  }
  if (starts_with(quantity, "memory_peak_bytes.") || ends_with(quantity, "_bytes_per_token")) {
    return Dimension::bytes;
  }
  return Dimension::scalar;
}

std::vector<std::string> split(std::string_view path) {
  std::vector<std::string> parts;
  while (true) {
    const std::size_t dot = path.find('.');
    parts.emplace_back(path.substr(0, dot));
    if (dot == std::string_view::npos) return parts;
    path.remove_prefix(dot + 1);
  }
}

/// A predicted value, and what the prices' errors make of it where draws were asked for.
struct Found {
  double value = 0;
  std::optional<Interval> interval;
};

std::optional<Found> find_isolated(const std::vector<IsolatedCell>& cells,
                                   const std::vector<std::string>& path) {
  if (path[0] == "cell") {
    if (path.size() != 3 || path[2] != "time_s") return std::nullopt;
    for (const IsolatedCell& cell : cells) {
      if (name_of(cell.kind) == path[1]) return Found{cell.time_s, cell.drawn_s};
    }
    return std::nullopt;
  }
  const bool busy = path.size() == 3 && path[2] == "busy";
  if (path.size() != 2 && !busy) return std::nullopt;
  std::optional<Found> found;
  for (const IsolatedCell& cell : cells) {
    for (const PhaseSpan& phase : cell.phases) {
      if (key_of(phase.phase) != path[1]) continue;
      const Found value =
          busy ? Found{phase.mean_busy_s, {}} : Found{phase.mean_span_s, phase.span_s};
      if (cell.kind == CellKind::overlapped) return value;
      if (!found) found = value;
    }
  }
  return found;
}

/// Keys of objects, indices of arrays.
std::optional<double> find_number(const rapidjson::Value& document,
                                  const std::vector<std::string>& path) {
  const rapidjson::Value* value = &document;
  for (const std::string& part : path) {
    if (value->IsObject()) {
      const auto member = value->FindMember(part.c_str());
      if (member == value->MemberEnd()) return std::nullopt;
      value = &member->value;
    } else if (value->IsArray() && !part.empty() && part.size() < 8 &&
               std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; }) &&
               std::stoul(part) < value->Size()) {
      value = &(*value)[static_cast<rapidjson::SizeType>(std::stoul(part))];
    } else {
      return std::nullopt;
    }
  }
  if (!value->IsNumber()) return std::nullopt;
  return value->GetDouble();
}

struct Row {
  ValidationRow row;
  Node quantity;  // for messages
};

/// What a file says about one scenario.
struct Request {
  std::string name;
  std::string scenario;
  Node serving_plan;    // a map, or the path that names it; null: a training scenario
  Overrides overrides;  // its profile, if it is not the scenario's
  std::vector<Row> rows;
};

std::string resolve(const std::string& file, const std::string& path) {
  return fs::path(path).is_absolute() ? path : (fs::path(file).parent_path() / path).string();
}

Row read_row(const Node& node, Problems& problems) {
  MapReader reader(node, problems, "row");
  Row row;
  row.row.quantity = reader.text("quantity");
  row.quantity = reader.at("quantity");
  row.row.dimension = dimension_of(row.row.quantity);
  row.row.published = reader.quantity("published", row.row.dimension);
  row.row.aim = reader.quantity("aim", Dimension::scalar);
  row.row.source = reader.text("source");
  row.row.note = reader.text_or("note", "");
  reader.finish();
  return row;
}

void read_request(MapReader& reader, const std::string& file, std::vector<Request>& requests) {
  Request request;
  request.name = reader.text("name");
  if (reader.has("generation")) {
    request.serving_plan = reader.at("generation");
    if (request.serving_plan.kind() == Node::Kind::scalar) {
      request.scenario = resolve(file, reader.text("generation"));
    }
  } else {
    request.scenario = resolve(file, reader.text("scenario"));
  }
  if (reader.has("profile")) {
    const fs::path profile = fs::absolute(resolve(file, reader.text("profile")));
    request.overrides.push_back(
        {.text = "profile=" + in_quotes(profile.string()), .at = reader.at("profile").at()});
  }
  const Node rows = reader.require("rows");
  if (rows.kind() == Node::Kind::sequence) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      request.rows.push_back(read_row(rows[i], reader.problems()));
    }
  } else if (rows.kind() != Node::Kind::null) {
    reader.problems().add(rows, "rows must be a list");
  }
  requests.push_back(std::move(request));
}

std::vector<Request> read_requests(const std::string& path) {
  Problems problems;
  const Node document = read_document(path, problems);
  problems.throw_if_any();
  std::vector<Request> requests;
  MapReader reader(document, problems, "run");
  if (reader.has("runs")) {
    reader.text("name");
    const Node runs = reader.at("runs");
    if (runs.kind() != Node::Kind::sequence) problems.add(runs, "runs must be a list");
    for (std::size_t i = 0; runs.kind() == Node::Kind::sequence && i < runs.size(); ++i) {
      MapReader run(runs[i], problems, "run");
      read_request(run, path, requests);
      run.finish();
    }
  } else {
    read_request(reader, path, requests);
  }
  reader.finish();
  problems.throw_if_any();
  return requests;
}

/// How a quantity follows from the step's time: as a power of it; nothing if it does not.
std::optional<double> power_of_step(std::string_view quantity) {
  if (quantity == "step_time_s" || quantity == "gpu_hours_per_trillion_tokens") return 1;
  for (const std::string_view rate : {"tokens_per_", "tflops_per_gpu_", "mfu_"}) {
    if (starts_with(quantity, rate) && quantity != "tokens_per_step") return -1;
  }
  return std::nullopt;
}

Interval interval_of_power(const StepUncertainty& uncertainty, double predicted, double power) {
  std::vector<double> draws;
  for (const double factor : uncertainty.factors) {
    draws.push_back(predicted * std::pow(factor, power));
  }
  return interval_of(std::move(draws));
}

void parse(rapidjson::Document& report, const std::string& json) {
  report.Parse<rapidjson::kParseFullPrecisionFlag>(json.c_str());
}

/// Fills in what is predicted of each row; `find` is asked for it.
template <class Find>
void fill_in(Request& request, Validation& validation, const char* verb, const Find& find) {
  Problems problems;
  for (Row& row : request.rows) {
    const std::optional<Found> found = find(row);
    if (!found) {
      problems.add(row.quantity, fmt::format("'{}' is no number in the report", row.row.quantity),
                   fmt::format("see `orrery {} --json -`", verb));
      continue;
    }
    row.row.predicted = found->value;
    row.row.interval = found->interval;
    validation.rows.push_back(std::move(row.row));
  }
  problems.throw_if_any();
}

Validation predict_generation(const std::string& file, Request request) {
  GenerationScenario scenario;
  if (request.scenario.empty()) {
    Problems problems;
    scenario = read_generation(request.serving_plan, request.overrides, problems);
    problems.throw_if_any();
  } else {
    scenario = read_generation(request.scenario, request.overrides);
  }
  Validation validation{.file = file, .name = request.name, .scenario = scenario.name};
  rapidjson::Document report;
  parse(report, to_json(study_generation(std::move(scenario))));
  fill_in(request, validation, "generate", [&](const Row& row) -> std::optional<Found> {
    const auto number = find_number(report, split(row.row.quantity));
    return number ? std::optional(Found{*number, {}}) : std::nullopt;
  });
  return validation;
}

Validation predict(const std::string& file, Request request, const Overrides& overrides,
                   std::int64_t draws) {
  request.overrides.insert(request.overrides.end(), overrides.begin(), overrides.end());
  if (request.serving_plan.kind() != Node::Kind::null) {
    return predict_generation(file, std::move(request));
  }
  const Scenario scenario = read_scenario(request.scenario, request.overrides);
  const auto wants_isolated = [](const Row& r) { return is_isolated(r.row.quantity); };
  std::vector<IsolatedCell> cells;
  if (std::any_of(request.rows.begin(), request.rows.end(), wants_isolated)) {
    const int middle[] = {middle_position(scenario)};
    cells = isolated_cells(scenario, middle, network_of(scenario, std::nullopt), draws);
  }
  rapidjson::Document report;
  report.SetObject();
  std::optional<StepUncertainty> errors;
  if (!std::all_of(request.rows.begin(), request.rows.end(), wants_isolated)) {
    const Study study = study_step(scenario);
    parse(report, to_json(study.report));
    if (draws > 0) errors = uncertainty(study, {.draws = draws, .checked = 0});
  }
  Validation validation{.file = file, .name = request.name, .scenario = scenario.name};
  fill_in(request, validation, "run", [&](const Row& row) -> std::optional<Found> {
    const auto path = split(row.row.quantity);
    if (wants_isolated(row)) return find_isolated(cells, path);
    const auto number = find_number(report, path);
    if (!number) return std::nullopt;
    Found found{*number, {}};
    const auto power = power_of_step(row.row.quantity);
    if (power && errors) found.interval = interval_of_power(*errors, *number, *power);
    return found;
  });
  return validation;
}

std::string format_value(double value, Dimension dimension) {
  if (dimension == Dimension::seconds) return format_seconds(value);
  if (dimension == Dimension::bytes) return format_bytes(value);
  return std::abs(value) < 1 ? fmt::format("{:.3g}", value) : format_count(value);
}

}  // namespace

std::vector<Validation> validate(const std::string& path, const Overrides& overrides,
                                 std::int64_t draws) {
  std::vector<Validation> validations;
  for (Request& request : read_requests(path)) {
    validations.push_back(predict(path, std::move(request), overrides, draws));
  }
  return validations;
}

std::string validation_table(std::span<const Validation> validations) {
  std::string text;
  std::size_t met = 0;
  std::size_t total = 0;
  std::size_t held = 0;
  std::size_t intervals = 0;
  for (const Validation& validation : validations) {
    std::vector<std::vector<std::string>> rows{
        {"quantity", "predicted", "published", "error", "aim", "", "source"}};
    const bool drawn = std::any_of(validation.rows.begin(), validation.rows.end(),
                                   [](const ValidationRow& row) { return row.interval; });
    if (drawn) rows[0].insert(rows[0].begin() + 2, {"P10 to P90", ""});
    for (const ValidationRow& row : validation.rows) {
      rows.push_back({row.quantity, format_value(row.predicted, row.dimension),
                      format_value(row.published, row.dimension),
                      fmt::format("{:+.1f} %", 100 * row.error()),
                      fmt::format("{:.3g} %", 100 * row.aim), row.met() ? "met" : "MISSED",
                      row.note.empty() ? row.source : row.source + " (" + row.note + ")"});
      met += row.met() ? 1 : 0;
      ++total;
      if (!drawn) continue;
      std::vector<std::string> columns{"", ""};
      if (row.interval) {
        const bool holds = row.interval->contains(row.published);
        columns = {fmt::format("{} to {}", format_value(row.interval->p10, row.dimension),
                               format_value(row.interval->p90, row.dimension)),
                   holds ? "in" : "OUT"};
        held += holds ? 1 : 0;
        ++intervals;
      }
      rows.back().insert(rows.back().begin() + 2, columns.begin(), columns.end());
    }
    text += fmt::format("{}\n{}\n", validation.name,
                        format_table(rows, drawn ? "lrrlrrrll" : "lrrrrll", "  "));
  }
  text += fmt::format("{} of {} within their aim\n", met, total);
  if (intervals > 0) {
    text += fmt::format("{} of {} between P10 and P90 of the prices' errors\n", held, intervals);
  }
  return text;
}

std::string validation_json(std::span<const Validation> validations) {
  rapidjson::StringBuffer buffer;
  rapidjson::PrettyWriter<rapidjson::StringBuffer> writer(buffer);
  writer.SetIndent(' ', 2);
  const auto text = [&](const char* key, std::string_view value) {
    writer.Key(key);
    writer.String(value.data(), static_cast<rapidjson::SizeType>(value.size()));
  };
  const auto number = [&](const char* key, double value) {
    writer.Key(key);
    writer.Double(value);
  };
  writer.StartObject();
  writer.Key("schema_version");
  writer.Int(kReportSchemaVersion);
  writer.Key("runs");
  writer.StartArray();
  for (const Validation& validation : validations) {
    writer.StartObject();
    text("file", validation.file);
    text("name", validation.name);
    text("scenario", validation.scenario);
    writer.Key("rows");
    writer.StartArray();
    for (const ValidationRow& row : validation.rows) {
      writer.StartObject();
      text("quantity", row.quantity);
      number("predicted", row.predicted);
      number("published", row.published);
      number("error", row.error());
      number("aim", row.aim);
      writer.Key("met");
      writer.Bool(row.met());
      if (row.interval) {
        number("p10", row.interval->p10);
        number("p90", row.interval->p90);
      }
      text("source", row.source);
      text("note", row.note);
      writer.EndObject();
    }
    writer.EndArray();
    writer.EndObject();
  }
  writer.EndArray();
  writer.EndObject();
  return std::string(buffer.GetString(), buffer.GetSize()) + "\n";
}

}  // namespace orrery
