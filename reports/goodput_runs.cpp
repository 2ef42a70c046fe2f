#include "reports/goodput_runs.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "models/reliability.hpp"
#include "reports/goodput.hpp"
#include "reports/json_object.hpp"
#include "reports/terminal.hpp"

namespace orrery {

namespace {

namespace fs = std::filesystem;

/// The reliability that `node` holds or names.
Reliability inline_or_named(const Node& node, const fs::path& folder, Problems& problems) {
  if (node.kind() != Node::Kind::scalar) return read_reliability(node, problems);
  const std::string path = (folder / node.text()).lexically_normal().string();
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) {
    problems.add(node, fmt::format("there is no reliability file '{}'", path));
    return {};
  }
  const Node document = read_document(path, problems);
  return document.kind() == Node::Kind::map ? read_reliability(document, problems) : Reliability();
}

struct Rates {
  Reliability reliability;
  bool counted_here = false;
};

/// What a file says about one run.
struct Request {
  std::string name;
  std::int64_t gpus = 0;
  double calendar_s = 0;
  Reliability recovery;
  std::vector<Rates> rates;
  std::vector<GoodputRow> rows;
};

std::vector<Node> elements(const Node& node, std::string_view what, Problems& problems) {
  std::vector<Node> list;
  if (node.kind() == Node::Kind::sequence) {
    for (std::size_t i = 0; i < node.size(); ++i) list.push_back(node[i]);
  } else if (node.kind() != Node::Kind::null) {
    problems.add(node, fmt::format("{} must be a list", what));
  }
  return list;
}

GoodputRow read_row(const Node& node, Problems& problems) {
  MapReader map(node, problems, "row");
  GoodputRow row;
  if (node.kind() != Node::Kind::map) return row;
  row.quantity =
      map.choice("quantity", {std::pair<std::string_view, std::string>{"goodput", "goodput"},
                              {"interruptions", "interruptions"}});
  row.at_least = map.has("at_least");
  if (row.at_least == map.has("published")) {
    problems.add(node, "a row has either a published value or one that it is at_least");
  } else {
    row.published = map.quantity(row.at_least ? "at_least" : "published", Dimension::scalar);
  }
  row.source = map.text("source");
  row.note = map.text_or("note", "");
  map.finish();
  return row;
}

Request read_request(const Node& node, const fs::path& folder, Problems& problems) {
  MapReader map(node, problems, "run");
  Request request;
  if (node.kind() != Node::Kind::map) return request;
  request.name = map.text("name");
  request.gpus = map.integer("gpus", 1, 1 << 24);
  request.calendar_s = map.quantity("days", Dimension::seconds);
  request.recovery = inline_or_named(map.require("recovery"), folder, problems);
  const std::vector<Node> counted = map.has("counted_here")
                                        ? elements(map.at("counted_here"), "counted_here", problems)
                                        : std::vector<Node>();
  for (const Node& file : elements(map.require("rates"), "rates", problems)) {
    const bool here = std::any_of(counted.begin(), counted.end(), [&](const Node& c) {
      return c.kind() == Node::Kind::scalar && file.kind() == Node::Kind::scalar &&
             c.text() == file.text();
    });
    request.rates.push_back({inline_or_named(file, folder, problems), here});
  }
  for (const Node& row : elements(map.require("rows"), "rows", problems)) {
    request.rows.push_back(read_row(row, problems));
  }
  if (!request.recovery.failures.empty()) {
    problems.add(map.at("recovery"), "the failures of a run are those of its rates",
                 "failures: []");
  }
  if (map.has("recovery") && !request.recovery.checkpoint.bytes) {
    problems.add(map.at("recovery"), "a run without a scenario says how large its checkpoints are",
                 "checkpoint: {bytes: 5.2 TB, ...}");
  }
  map.finish();
  return request;
}

std::vector<Request> read_requests(const std::string& path) {
  Problems problems;
  const Node document = read_document(path, problems);
  problems.throw_if_any();
  std::vector<Request> requests;
  MapReader map(document, problems, "the file");
  map.text("name");
  const fs::path folder = fs::path(path).parent_path();
  for (const Node& run : elements(map.require("runs"), "runs", problems)) {
    requests.push_back(read_request(run, folder, problems));
  }
  map.finish();
  problems.throw_if_any();
  return requests;
}

/// The run with these failures, in its calendar time.
Goodput predict(const Request& request, const Rates& rates) {
  Reliability r = request.recovery;
  r.failures = rates.reliability.failures;
  r.rate_spread = rates.counted_here ? 0 : rates.reliability.rate_spread;
  const auto parts = [&](std::int64_t each) {
    return each > 0 ? (request.gpus + each - 1) / each : 0;
  };
  const std::int64_t of_node =
      r.gpus_per_node > 0 ? r.gpus_per_node : rates.reliability.gpus_per_node;
  const Job job{.gpus = request.gpus,
                .hosts = parts(of_node),
                .switches = parts(r.gpus_per_switch),
                .checkpoint_bytes = *r.checkpoint.bytes};
  // What can be done in that time is not known before; failures hardly change by the second round.
  const double share = goodput(r, job, request.calendar_s, {.trials = 100}).goodput.p50;
  return goodput(r, job, request.calendar_s * share, {.trials = 300});
}

std::string format_value(const GoodputRow& row, double value) {
  return row.quantity == "goodput" ? fmt::format("{:.1f} %", 100 * value)
                                   : fmt::format("{:.0f}", value);
}

}  // namespace

std::vector<GoodputRun> goodput_runs(const std::string& path) {
  std::vector<GoodputRun> runs;
  for (const Request& request : read_requests(path)) {
    GoodputRun run{.name = request.name};
    for (const Rates& rates : request.rates) {
      const Goodput predicted = predict(request, rates);
      for (GoodputRow row : request.rows) {
        row.rates = rates.reliability.name;
        row.counted_here = rates.counted_here;
        row.predicted = row.quantity == "goodput" ? predicted.goodput : predicted.interruptions;
        run.rows.push_back(std::move(row));
      }
    }
    runs.push_back(std::move(run));
  }
  return runs;
}

std::string goodput_table(std::span<const GoodputRun> runs) {
  std::string text;
  std::size_t values = 0, bounds = 0, covered = 0, reached = 0;
  for (const GoodputRun& run : runs) {
    std::vector<std::vector<std::string>> rows{
        {"quantity", "predicted", "P10 to P90", "published", "error", "", "rates of"}};
    for (const GoodputRow& row : run.rows) {
      const auto value = [&](double v) { return format_value(row, v); };
      std::string rates = row.rates;
      if (row.counted_here && row.quantity == "interruptions") rates += ", counted here";
      if (!row.note.empty()) rates += fmt::format(" ({})", row.note);
      rows.push_back({row.quantity, value(row.predicted.p50),
                      fmt::format("{} to {}", value(row.predicted.p10), value(row.predicted.p90)),
                      fmt::format("{}{}", row.at_least ? "> " : "", value(row.published)),
                      row.at_least ? "" : fmt::format("{:+.1f} %", 100 * row.error()),
                      row.covered() ? "in" : "OUT", rates});
      if (row.counted_here && row.quantity == "interruptions") continue;  // in-sample
      (row.at_least ? bounds : values) += 1;
      if (row.covered()) (row.at_least ? reached : covered) += 1;
    }
    text += fmt::format("{}\n{}\n", run.name, format_table(rows, "lrrrrll", "  "));
  }
  return text +
         fmt::format(
             "not counted here: {} of {} values between P10 and P90, {} of {} bounds reached\n",
             covered, values, reached, bounds);
}

std::string goodput_json(std::span<const GoodputRun> runs) {
  return json_document([&](JsonObject& o) {
    o.array("runs", runs, [&](const GoodputRun& run) {
      JsonObject r(o.writer());
      r("name", run.name);
      r.array("rows", run.rows, [&](const GoodputRow& row) {
        JsonObject w(o.writer());
        w("quantity", row.quantity);
        w("rates", row.rates);
        w("counted_here", row.counted_here);
        write_interval(w, "predicted", row.predicted);
        w(row.at_least ? "at_least" : "published", row.published);
        if (!row.at_least) w("error", row.error());
        w("covered", row.covered());
        w("source", row.source);
        w("note", row.note);
      });
    });
  });
}

}  // namespace orrery
