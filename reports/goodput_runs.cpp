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
  std::vector<PublishedValue> published;
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

PublishedValue read_published(const Node& node, Problems& problems) {
  MapReader map(node, problems, "row");
  PublishedValue row;
  if (node.kind() != Node::Kind::map) return row;
  row.interruptions = map.choice(
      "quantity", {std::pair<std::string_view, bool>{"goodput", false}, {"interruptions", true}});
  row.at_least = map.has("at_least");
  if (row.at_least == map.has("published")) {
    problems.add(node, "a row has either a published value or one that it is at_least");
  } else {
    row.value = map.quantity(row.at_least ? "at_least" : "published", Dimension::scalar);
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
    request.published.push_back(read_published(row, problems));
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

std::string format_value(const PublishedValue& of, double value) {
  return of.interruptions ? fmt::format("{:.0f}", value) : fmt::format("{:.1f} %", 100 * value);
}

const Interval& predicted(const GoodputPrediction& prediction, const PublishedValue& of) {
  return of.interruptions ? prediction.interruptions : prediction.goodput;
}

/// No prediction where the interruptions are what the rates were counted from.
bool is_prediction(const GoodputPrediction& prediction, const PublishedValue& of) {
  return !(of.interruptions && prediction.counted_here);
}

}  // namespace

std::vector<GoodputRun> goodput_runs(const std::string& path) {
  std::vector<GoodputRun> runs;
  for (const Request& request : read_requests(path)) {
    GoodputRun run{.name = request.name, .published = request.published};
    for (const Rates& rates : request.rates) {
      const Goodput g = predict(request, rates);
      run.predictions.push_back(
          {rates.reliability.name, rates.counted_here, g.goodput, g.interruptions});
    }
    runs.push_back(std::move(run));
  }
  return runs;
}

std::string goodput_table(std::span<const GoodputRun> runs) {
  std::string text;
  std::size_t values = 0, covered = 0, bounds = 0, reached = 0;
  for (const GoodputRun& run : runs) {
    text += run.name + "\n";
    std::vector<std::vector<std::string>> rows{{"rates of"}};
    std::string align = "l";
    for (const PublishedValue& p : run.published) {
      text += fmt::format("  published: {} {}{}{}\n", p.interruptions ? "interruptions" : "goodput",
                          p.at_least ? "> " : "", format_value(p, p.value),
                          p.note.empty() ? "" : fmt::format(" ({})", p.note));
      align += "rrrl";
      rows[0].insert(rows[0].end(),
                     {p.interruptions ? "interruptions" : "goodput", "P10 to P90", "error", ""});
    }
    for (const GoodputPrediction& prediction : run.predictions) {
      std::vector<std::string> row{prediction.rates};
      for (const PublishedValue& p : run.published) {
        const Interval& interval = predicted(prediction, p);
        const bool counts = is_prediction(prediction, p);
        const bool in = p.covered_by(interval);
        row.insert(
            row.end(),
            {format_value(p, interval.p50),
             fmt::format("{} to {}", format_value(p, interval.p10), format_value(p, interval.p90)),
             p.at_least ? "" : fmt::format("{:+.1f} %", 100 * (interval.p50 / p.value - 1)),
             !counts ? "own"
             : in    ? "in"
                     : "OUT"});
        if (!counts) continue;
        (p.at_least ? bounds : values) += 1;
        if (in) (p.at_least ? reached : covered) += 1;
      }
      rows.push_back(std::move(row));
    }
    text += fmt::format("{}\n", format_table(rows, align, "  "));
  }
  return text + fmt::format("{} of {} values between P10 and P90, {} of {} bounds reached\n",
                            covered, values, reached, bounds);
}

std::string goodput_json(std::span<const GoodputRun> runs) {
  return json_document([&](JsonObject& o) {
    o.array("runs", runs, [&](const GoodputRun& run) {
      JsonObject r(o.writer());
      r("name", run.name);
      r.array("published", run.published, [&](const PublishedValue& p) {
        JsonObject w(o.writer());
        w("quantity", p.interruptions ? "interruptions" : "goodput");
        w(p.at_least ? "at_least" : "value", p.value);
        w("source", p.source);
        w("note", p.note);
      });
      r.array("predictions", run.predictions, [&](const GoodputPrediction& p) {
        JsonObject w(o.writer());
        w("rates", p.rates);
        w("counted_here", p.counted_here);
        write_interval(w, "goodput", p.goodput);
        write_interval(w, "interruptions", p.interruptions);
      });
    });
  });
}

}  // namespace orrery
