#include "reports/sensitivity.hpp"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "reports/joined.hpp"
#include "sim/timeline.hpp"

namespace orrery {

namespace {

struct Kind {
  std::vector<ShapeId> shapes;
  double time = 0;
  double spread_time = 0;
};

Picoseconds swept(const Program& program, PriceList prices, const std::vector<ShapeId>& shapes,
                  double factor) {
  for (const ShapeId shape : shapes) {
    Picoseconds& time = prices.prices[shape].time_ps;
    time = static_cast<Picoseconds>(std::llround(static_cast<double>(time) * factor));
  }
  return sweep(program, prices).makespan_ps();
}

}  // namespace

double SensitivityRow::by_spread_s() const {
  return spread * (slower_s - faster_s) / (2 * kSensitivityChange);
}

double Sensitivity::spread() const {
  double squares = 0;
  for (const SensitivityRow& row : rows) squares += row.by_spread_s() * row.by_spread_s();
  return step_s > 0 ? std::sqrt(squares) / step_s : 0;
}

Sensitivity sensitivity(const Study& study) {
  const Program& program = study.program;
  const PriceList& prices = study.run.prices;
  const IdVector<ShapeId, std::int64_t> counts = program.shape_counts();
  std::map<std::string, Kind> kinds;
  double all = 0;
  for (ShapeId s{}; s.value < program.shapes().size(); ++s) {
    const std::string name = kind_of_work(program.shapes()[s]);
    if (name.empty()) continue;
    Kind& kind = kinds[name];
    const double time = static_cast<double>(counts[s]) * seconds(prices.prices[s].time_ps);
    kind.shapes.push_back(s);
    kind.time += time;
    kind.spread_time += time * prices.prices[s].spread;
    all += time;
  }
  Sensitivity result{.step_s = study.report.step_time_s};
  std::vector<const Kind*> list;
  for (const auto& [name, kind] : kinds) {
    if (kind.time <= 0) continue;
    list.push_back(&kind);
    result.rows.push_back(
        {.kind = name, .share = kind.time / all, .spread = kind.spread_time / kind.time});
  }
  std::vector<Picoseconds> steps(1 + 2 * list.size());
  tbb::parallel_for(std::size_t{0}, steps.size(), [&](std::size_t i) {
    if (i == 0) {
      steps[i] = swept(program, prices, {}, 1);
    } else {
      const double sign = i % 2 == 1 ? -1 : 1;
      steps[i] = swept(program, prices, list[(i - 1) / 2]->shapes, 1 + sign * kSensitivityChange);
    }
  });
  const double scale = result.step_s / static_cast<double>(steps[0]);
  for (std::size_t k = 0; k < list.size(); ++k) {
    result.rows[k].faster_s = scale * static_cast<double>(steps[1 + 2 * k]);
    result.rows[k].slower_s = scale * static_cast<double>(steps[2 + 2 * k]);
  }
  std::stable_sort(result.rows.begin(), result.rows.end(),
                   [](const SensitivityRow& a, const SensitivityRow& b) {
                     return a.slower_s - a.faster_s > b.slower_s - b.faster_s;
                   });
  return result;
}

}  // namespace orrery
