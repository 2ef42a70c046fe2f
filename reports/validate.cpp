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

std::optional<double> find_isolated(const std::vector<IsolatedCell>& cells,
                                    const std::vector<std::string>& path) {
  if (path[0] == "cell") {
    if (path.size() != 3 || path[2] != "time_s") return std::nullopt;
    for (const IsolatedCell& cell : cells) {
      if (name_of(cell.kind) == path[1]) return cell.time_s;
    }
    return std::nullopt;
  }
  const bool busy = path.size() == 3 && path[2] == "busy";
  if (path.size() != 2 && !busy) return std::nullopt;
  std::optional<double> found;
  for (const IsolatedCell& cell : cells) {
    for (const PhaseSpan& phase : cell.phases) {
      if (key_of(phase.phase) != path[1]) continue;
      const double value = busy ? phase.mean_busy_s : phase.mean_span_s;
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
  Node serving_plan;        // a map, or the path that names it; null: a training scenario
  std::string profile;      // empty: the scenario's
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
  if (reader.has("profile")) request.profile = resolve(file, reader.text("profile"));
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

/// The profile that replaces a scenario's, if the request names one.
void replace_profile(const Request& request, Profile& profile) {
  if (request.profile.empty()) return;
  Problems problems;
  const Node node = read_document(request.profile, problems);
  problems.throw_if_any();
  profile = read_profile(node, problems);
  problems.throw_if_any();
}

void parse(rapidjson::Document& report, const std::string& json) {
  report.Parse<rapidjson::kParseFullPrecisionFlag>(json.c_str());
}

/// Fills in what is predicted of each row; `find` is asked for the quantity as a path.
template <class Find>
void fill_in(Request& request, Validation& validation, const char* verb, const Find& find) {
  Problems problems;
  for (Row& row : request.rows) {
    const std::optional<double> value = find(row);
    if (!value) {
      problems.add(row.quantity, fmt::format("'{}' is no number in the report", row.row.quantity),
                   fmt::format("see `orrery {} --json -`", verb));
      continue;
    }
    row.row.predicted = *value;
    validation.rows.push_back(std::move(row.row));
  }
  problems.throw_if_any();
}

Validation predict_generation(const std::string& file, Request request) {
  GenerationScenario scenario;
  if (request.scenario.empty()) {
    Problems problems;
    scenario = read_generation(request.serving_plan, problems);
    problems.throw_if_any();
  } else {
    scenario = read_generation(request.scenario);
  }
  replace_profile(request, scenario.instance.profile);
  Validation validation{.file = file, .name = request.name, .scenario = scenario.name};
  rapidjson::Document report;
  parse(report, to_json(study_generation(std::move(scenario))));
  fill_in(request, validation, "generate",
          [&](const Row& row) { return find_number(report, split(row.row.quantity)); });
  return validation;
}

Validation predict(const std::string& file, Request request) {
  if (request.serving_plan.kind() != Node::Kind::null) return predict_generation(file, std::move(request));
  Scenario scenario = read_scenario(request.scenario);
  replace_profile(request, scenario.profile);
  const auto wants_isolated = [](const Row& r) { return is_isolated(r.row.quantity); };
  std::vector<IsolatedCell> cells;
  if (std::any_of(request.rows.begin(), request.rows.end(), wants_isolated)) {
    const int middle[] = {middle_position(scenario)};
    cells = isolated_cells(scenario, middle, network_of(scenario, std::nullopt));
  }
  rapidjson::Document report;
  report.SetObject();
  if (!std::all_of(request.rows.begin(), request.rows.end(), wants_isolated)) {
    parse(report, to_json(study_step(scenario).report));
  }
  Validation validation{.file = file, .name = request.name, .scenario = scenario.name};
  fill_in(request, validation, "run", [&](const Row& row) {
    const auto path = split(row.row.quantity);
    return wants_isolated(row) ? find_isolated(cells, path) : find_number(report, path);
  });
  return validation;
}

std::string format_value(double value, Dimension dimension) {
  if (dimension == Dimension::seconds) return format_seconds(value);
  if (dimension == Dimension::bytes) return format_bytes(value);
  return std::abs(value) < 1 ? fmt::format("{:.3g}", value) : format_count(value);
}

}  // namespace

std::vector<Validation> validate(const std::string& path) {
  std::vector<Validation> validations;
  for (Request& request : read_requests(path)) {
    validations.push_back(predict(path, std::move(request)));
  }
  return validations;
}

std::string validation_table(std::span<const Validation> validations) {
  std::string text;
  std::size_t met = 0;
  std::size_t total = 0;
  for (const Validation& validation : validations) {
    std::vector<std::vector<std::string>> rows{
        {"quantity", "predicted", "published", "error", "aim", "", "source"}};
    for (const ValidationRow& row : validation.rows) {
      rows.push_back({row.quantity, format_value(row.predicted, row.dimension),
                      format_value(row.published, row.dimension),
                      fmt::format("{:+.1f} %", 100 * row.error()),
                      fmt::format("{:.3g} %", 100 * row.aim), row.met() ? "met" : "MISSED",
                      row.note.empty() ? row.source : row.source + " (" + row.note + ")"});
      met += row.met() ? 1 : 0;
      ++total;
    }
    text += validation.name + "\n" + format_table(rows, "lrrrrll", "  ") + "\n";
  }
  return text + fmt::format("{} of {} within their aim\n", met, total);
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
