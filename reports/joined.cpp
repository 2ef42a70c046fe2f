#include "reports/joined.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "reports/json_object.hpp"
#include "reports/terminal.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

/// Sums over the ops of one shape.
struct Sums {
  std::int64_t ops = 0;
  double predicted_s = 0;
  double measured_s = 0;
};

double percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double at = share * static_cast<double>(values.size() - 1);
  const auto low = static_cast<std::size_t>(std::floor(at));
  const auto high = std::min(low + 1, values.size() - 1);
  return values[low] + (at - static_cast<double>(low)) * (values[high] - values[low]);
}

/// One row of all shapes in the map.
JoinedRow row_of(std::string what, const std::map<ShapeId, Sums>& by_shape) {
  JoinedRow row;
  row.what = std::move(what);
  row.shapes = static_cast<std::int64_t>(by_shape.size());
  std::vector<double> errors;
  for (const auto& [shape, sums] : by_shape) {
    row.ops += sums.ops;
    row.predicted_s += sums.predicted_s;
    row.measured_s += sums.measured_s;
    if (sums.measured_s > 0) errors.push_back(std::abs(sums.predicted_s / sums.measured_s - 1));
  }
  row.median_error = percentile(errors, 0.5);
  row.p90_error = percentile(errors, 0.9);
  return row;
}

void sort_by_time(std::vector<JoinedRow>& rows) {
  std::stable_sort(rows.begin(), rows.end(),
                   [](const auto& a, const auto& b) { return a.measured_s > b.measured_s; });
}

std::string percent(double value) {
  return fmt::format("{:+.1f} %", 100 * value);
}

std::vector<std::string> cells_of(const JoinedRow& row) {
  return {row.what,
          fmt::format("{}", row.ops),
          fmt::format("{}", row.shapes),
          format_seconds(row.predicted_s),
          format_seconds(row.measured_s),
          percent(row.error()),
          fmt::format("{:.1f}", 100 * row.median_error),
          fmt::format("{:.1f}", 100 * row.p90_error)};
}

std::string table_of(const std::string& title, const std::vector<JoinedRow>& rows) {
  std::vector<std::vector<std::string>> cells = {
      {title, "ops", "shapes", "predicted", "measured", "error", "median %", "90th %"}};
  for (const JoinedRow& row : rows) cells.push_back(cells_of(row));
  return format_table(cells, "lrrrrrrr", "  ");
}

void write(JsonWriter& writer, const JoinedRow& row) {
  JsonObject o(writer);
  o("what", row.what);
  o("ops", row.ops);
  o("shapes", row.shapes);
  o("predicted_s", row.predicted_s);
  o("measured_s", row.measured_s);
  o("error", row.error());
  o("median_error", row.median_error);
  o("p90_error", row.p90_error);
}

constexpr std::size_t kShapeRows = 10;

}  // namespace

std::string kind_of_work(const Shape& shape) {
  struct Visitor {
    std::string operator()(const Mark&) const { return ""; }
    std::string operator()(const Gemm& g) const {
      return fmt::format("{}GEMM {}", g.groups > 1 ? "grouped " : "", name_of(g.pass));
    }
    std::string operator()(const AttentionCore& a) const {
      return a.backward ? "attention backward" : "attention forward";
    }
    std::string operator()(const CachedAttention&) const { return "attention over cache"; }
    std::string operator()(const Streaming& s) const { return std::string(name_of(s.kind)); }
    std::string operator()(const ExpertExchange& e) const {
      return e.combine ? "combine" : "dispatch";
    }
    std::string operator()(const Collective& c) const { return std::string(name_of(c.kind)); }
    std::string operator()(const Send&) const { return "send"; }
    std::string operator()(const StorageWrite&) const { return "checkpoint"; }
  };
  return std::visit(Visitor{}, shape.work);
}

Joined join_timelines(const Scenario& scenario, const Program& program, const PriceList& prices,
                      const Timeline& predicted, const Timeline& measured) {
  ORRERY_CHECK(
      predicted.start_ps.size() == program.size() && measured.start_ps.size() == program.size(),
      "timelines of {} and {} ops for a Program of {}", predicted.start_ps.size(),
      measured.start_ps.size(), program.size());
  std::map<std::string, std::map<ShapeId, Sums>> kinds, phases;
  std::map<ShapeId, Sums> shapes;
  for (std::size_t i = 0; i < program.size(); ++i) {
    const OpId op(i);
    const ShapeId shape = program.shape(op);
    const std::string kind = kind_of_work(program.shapes()[shape]);
    if (kind.empty()) continue;
    const auto add = [&](Sums& sums) {
      ++sums.ops;
      sums.predicted_s += seconds(predicted.end_ps[op] - predicted.start_ps[op]);
      sums.measured_s += seconds(measured.end_ps[op] - measured.start_ps[op]);
    };
    add(kinds[kind][shape]);
    add(phases[std::string(name_of(program.tag(op).phase))][shape]);
    add(shapes[shape]);
  }
  Joined joined;
  joined.predicted_s = seconds(predicted.makespan_ps());
  joined.measured_s = seconds(measured.makespan_ps());
  for (const auto& [kind, by_shape] : kinds) joined.kinds.push_back(row_of(kind, by_shape));
  for (const auto& [phase, by_shape] : phases) joined.phases.push_back(row_of(phase, by_shape));
  for (const auto& [shape, sums] : shapes) {
    const Shape& s = program.shapes()[shape];
    joined.shapes.push_back(row_of(fmt::format("{} {}", s.label, describe(s)), {{shape, sums}}));
  }
  sort_by_time(joined.kinds);
  sort_by_time(joined.phases);
  std::stable_sort(joined.shapes.begin(), joined.shapes.end(), [](const auto& a, const auto& b) {
    return std::abs(a.predicted_s - a.measured_s) > std::abs(b.predicted_s - b.measured_s);
  });
  joined.all = row_of("all ops", shapes);
  joined.predicted_phases_s = summarise(scenario, program, prices, predicted).phases_s;
  joined.measured_phases_s = summarise(scenario, program, prices, measured).phases_s;
  return joined;
}

std::string to_terminal(const Joined& joined) {
  std::vector<JoinedRow> kinds = joined.kinds;
  kinds.push_back(joined.all);
  std::string text = table_of("kind of operation", kinds);
  text += '\n';
  text += table_of("phase, times of its ops", joined.phases);
  const std::size_t rows = std::min(kShapeRows, joined.shapes.size());
  std::vector<JoinedRow> shapes(joined.shapes.begin(),
                                joined.shapes.begin() + static_cast<std::ptrdiff_t>(rows));
  for (JoinedRow& row : shapes) row.what = shorten(row.what, 60);
  text += '\n';
  text += table_of("largest differences", shapes);
  std::vector<std::vector<std::string>> cells = {
      {"where the step goes, mean of ranks", "predicted", "measured", "error"}};
  const auto part = [&](const char* name, double PhaseTimes::*time) {
    const double p = joined.predicted_phases_s.*time, m = joined.measured_phases_s.*time;
    if (p == 0 && m == 0) return;
    cells.push_back({name, format_seconds(p), format_seconds(m), m > 0 ? percent(p / m - 1) : ""});
  };
  part("forward", &PhaseTimes::forward);
  part("backward", &PhaseTimes::backward);
  part("weight gradients", &PhaseTimes::weight);
  part("overlapped F&B", &PhaseTimes::overlapped);
  part("optimizer", &PhaseTimes::optimizer);
  part("exposed communication", &PhaseTimes::exposed_communication);
  part("bubble", &PhaseTimes::bubble);
  cells.push_back({"step", format_seconds(joined.predicted_s), format_seconds(joined.measured_s),
                   percent(joined.step_error())});
  if (joined.relative_speed > 0) {
    cells.push_back({"step, predicted for that speed",
                     format_seconds(joined.predicted_s / joined.relative_speed),
                     format_seconds(joined.measured_s), percent(joined.step_error_at_one_speed())});
  }
  text += '\n';
  text += format_table(cells, "lrrr", "  ");
  if (joined.relative_speed > 0) {
    text += fmt::format(
        "  executed at {:.1f} % of the speed that the machine had while it was calibrated (of a "
        "product of matrices)\n",
        100 * joined.relative_speed);
  }
  return text;
}

std::string to_json(const Joined& joined) {
  return json_document([&](JsonObject& o) {
    const auto row = [&](const JoinedRow& r) { write(o.writer(), r); };
    o("predicted_step_s", joined.predicted_s);
    o("measured_step_s", joined.measured_s);
    if (joined.relative_speed > 0) {
      o("relative_speed", joined.relative_speed);
      o("step_error_at_one_speed", joined.step_error_at_one_speed());
    }
    write_phases(o.name("predicted_phases_s"), joined.predicted_phases_s);
    write_phases(o.name("measured_phases_s"), joined.measured_phases_s);
    write(o.name("all"), joined.all);
    o.array("kinds", joined.kinds, row);
    o.array("phases", joined.phases, row);
    o.array("shapes", joined.shapes, row);
  });
}

}  // namespace orrery
