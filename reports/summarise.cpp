#include <fmt/format.h>
#include <tbb/parallel_invoke.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <tuple>

#include "models/layer_work.hpp"
#include "models/layout.hpp"
#include "models/step.hpp"
#include "reports/attribution.hpp"
#include "reports/report.hpp"
#include "reports/study.hpp"
#include "sim/check.hpp"
#include "sim/critical_path.hpp"
#include "sim/memory.hpp"

namespace orrery {

namespace {

double part(const std::array<Picoseconds, kCellKinds>& by_kind,
            std::initializer_list<CellKind> kinds) {
  Picoseconds sum = 0;
  for (const CellKind k : kinds) sum += by_kind[static_cast<std::size_t>(k)];
  return seconds(sum);
}

PhaseTimes phase_times(const Attribution& a) {
  return {.forward = part(a.covered_ps, {CellKind::forward}),
          .backward = part(a.covered_ps, {CellKind::backward, CellKind::backward_input}),
          .weight = part(a.covered_ps, {CellKind::weight}),
          .overlapped = part(a.covered_ps, {CellKind::overlapped}),
          .bubble = seconds(a.bubble_ps),
          .optimizer = part(a.covered_ps, {CellKind::optimizer}),
          .exposed_communication = seconds(a.exposed_sum_ps())};
}

CellTimes cell_times(const Attribution& a) {
  std::array<Picoseconds, kCellKinds> whole{};
  for (std::size_t k = 0; k < kCellKinds; ++k) whole[k] = a.covered_ps[k] + a.exposed_ps[k];
  return {.forward = part(whole, {CellKind::forward}),
          .backward = part(whole, {CellKind::backward, CellKind::backward_input}),
          .weight = part(whole, {CellKind::weight}),
          .overlapped = part(whole, {CellKind::overlapped}),
          .bubble = seconds(a.bubble_ps),
          .optimizer = part(whole, {CellKind::optimizer})};
}

void add(PhaseTimes& sum, const PhaseTimes& t, double weight) {
  sum.forward += weight * t.forward;
  sum.backward += weight * t.backward;
  sum.weight += weight * t.weight;
  sum.overlapped += weight * t.overlapped;
  sum.bubble += weight * t.bubble;
  sum.optimizer += weight * t.optimizer;
  sum.exposed_communication += weight * t.exposed_communication;
}

ExposedTimes exposed_times(const Attribution& a) {
  const auto by = [&](Exposed cause) {
    return seconds(a.exposed_by_ps[static_cast<std::size_t>(cause)]);
  };
  return {.expert = by(Exposed::expert),
          .tensor = by(Exposed::tensor),
          .data = by(Exposed::data),
          .pipeline = by(Exposed::pipeline)};
}

void add(ExposedTimes& sum, const ExposedTimes& t, double weight) {
  sum.expert += weight * t.expert;
  sum.tensor += weight * t.tensor;
  sum.data += weight * t.data;
  sum.pipeline += weight * t.pipeline;
}

void add(CellTimes& sum, const CellTimes& t, double weight) {
  sum.forward += weight * t.forward;
  sum.backward += weight * t.backward;
  sum.weight += weight * t.weight;
  sum.overlapped += weight * t.overlapped;
  sum.bubble += weight * t.bubble;
  sum.optimizer += weight * t.optimizer;
}

std::string describe_plan(const Plan& plan) {
  const Parallelism& p = plan.parallelism;
  std::string text = fmt::format("TP{} CP{} PP{} DP{} EP{}", p.tp, p.cp, p.pp, p.dp, p.ep);
  if (p.expert_tp > 1) text += fmt::format(" ETP{}", p.expert_tp);
  return text + fmt::format(" ZeRO-{}, {}, {}", p.zero_stage, name_of(plan.schedule),
                            name_of(plan.precision.kind));
}

/// On all GPUs, by shape.
struct Executions {
  IdVector<ShapeId, std::int64_t> count;
  IdVector<ShapeId, double> beyond_s;  ///< sum of what they took longer than their price
};

Executions executions(const Program& program, const PriceList& prices, const Timeline& timeline) {
  const std::size_t shapes = program.shapes().size();
  Executions executed{IdVector<ShapeId, std::int64_t>(shapes, 0),
                      IdVector<ShapeId, double>(shapes, 0.0)};
  const Durations duration_ps(program, prices);
  const auto gpus = program.multiplicity();
  for (OpId op{}; op.value < program.size(); ++op) {
    const auto streams = program.streams_of(op);
    if (streams.empty()) continue;
    const ShapeId shape = program.shape(op);
    std::int64_t times = 0;
    if (program.kind(op) == OpKind::transfer) {
      times = gpus[rank_of(streams.front()).value];
    } else {
      for (const StreamId s : streams) times += gpus[rank_of(s).value];
    }
    executed.count[shape] += times;
    const Picoseconds beyond_ps = timeline.end_ps[op] - timeline.start_ps[op] - duration_ps[op];
    executed.beyond_s[shape] += static_cast<double>(times) * seconds(beyond_ps);
  }
  return executed;
}

/// Labels of the operations whose size follows the load of experts, if loads differ.
std::set<std::string> labels_sized_by_load(const Scenario& scenario) {
  std::set<std::string> labels;
  if (!scenario.model.moe || stated_load(scenario.plan.routing)) return labels;
  const LayerWork w =
      transformer_layer(scenario.model, scenario.plan, scenario.cluster.gpus_per_node, true);
  for (const Work* part :
       {&w.dispatch_forward, &w.mlp_forward, &w.combine_forward, &w.combine_backward,
        &w.mlp_backward, &w.mlp_weight, &w.dispatch_backward}) {
    for (const WorkItem& item : *part) {
      if (item.sized_by != SizedBy::plan) labels.insert(item.shape.label);
    }
  }
  return labels;
}

/// What is the same of one operation at all loads.
using Operation = std::tuple<std::string, int, std::size_t, int, PriceSource, bool>;

Operation operation_of(const Shape& shape, const Price& price) {
  int kind = 0;
  if (const auto* gemm = std::get_if<Gemm>(&shape.work)) kind = static_cast<int>(gemm->pass);
  if (const auto* s = std::get_if<Streaming>(&shape.work)) kind = static_cast<int>(s->kind);
  if (const auto* e = std::get_if<ExpertExchange>(&shape.work)) kind = e->combine ? 1 : 0;
  if (const auto* c = std::get_if<Collective>(&shape.work)) kind = static_cast<int>(c->kind);
  return {shape.label, shape.sms, shape.work.index(), kind, price.source, price.extrapolated};
}

/// One row for the shapes of one operation at different loads: their sum, named after the
/// costliest.
PriceRow merge(const std::vector<PriceRow>& loads) {
  PriceRow row = *std::max_element(
      loads.begin(), loads.end(),
      [](const PriceRow& a, const PriceRow& b) { return a.per_gpu_s < b.per_gpu_s; });
  if (loads.size() == 1) return row;
  row.shape += fmt::format(" and {} other loads", loads.size() - 1);
  row.count = 0;
  row.per_gpu_s = 0;
  double all_s = 0;
  double lasted_s = 0;
  double spread_s = 0;
  for (const PriceRow& load : loads) {
    const double time_s = static_cast<double>(load.count) * load.time_s;
    row.count += load.count;
    row.per_gpu_s += load.per_gpu_s;
    all_s += time_s;
    lasted_s += static_cast<double>(load.count) * load.lasted_s;
    spread_s += time_s * load.spread;
  }
  row.time_s = all_s / static_cast<double>(row.count);
  row.lasted_s = lasted_s / static_cast<double>(row.count);
  row.spread = spread_s / all_s;
  return row;
}

std::vector<PriceRow> price_rows(const Scenario& scenario, const Program& program,
                                 const PriceList& prices, const Timeline& timeline, double gpus) {
  const auto [count, beyond_s] = executions(program, prices, timeline);
  const std::set<std::string> by_load = labels_sized_by_load(scenario);
  std::map<Operation, std::vector<PriceRow>> loads;
  std::vector<PriceRow> rows;
  double sum = 0;
  for (ShapeId s{}; s.value < program.shapes().size(); ++s) {
    const Price& price = prices.prices[s];
    if (price.time_ps == 0 || count[s] == 0) continue;  // marks
    PriceRow row{.label = program.shapes()[s].label,
                 .shape = describe(program.shapes()[s]),
                 .count = count[s],
                 .time_s = seconds(price.time_ps),
                 .lasted_s = seconds(price.time_ps) + beyond_s[s] / static_cast<double>(count[s]),
                 .source = price.source,
                 .spread = price.spread,
                 .extrapolated = price.extrapolated,
                 .note = price.note};
    row.per_gpu_s = static_cast<double>(row.count) * row.time_s / gpus;
    sum += row.per_gpu_s;
    if (by_load.contains(row.label)) {
      loads[operation_of(program.shapes()[s], price)].push_back(std::move(row));
    } else {
      rows.push_back(std::move(row));
    }
  }
  for (const auto& [operation, of_operation] : loads) rows.push_back(merge(of_operation));
  for (PriceRow& row : rows) row.share = row.per_gpu_s / sum;
  std::sort(rows.begin(), rows.end(), [](const PriceRow& a, const PriceRow& b) {
    return std::tie(b.per_gpu_s, a.label, a.shape) < std::tie(a.per_gpu_s, b.label, b.shape);
  });
  return rows;
}

NetworkReport network_report(const Traffic& traffic, const Timeline& timeline) {
  const double step_s = seconds(timeline.makespan_ps());
  NetworkReport network{.flows = true, .fabric = traffic.fabric};
  for (std::size_t t = 0; t < kLinkTiers; ++t) {
    const TierUse& use = traffic.tiers[t];
    if (use.links == 0) continue;
    TierReport tier{.tier = std::string(name_of(static_cast<LinkTier>(t))),
                    .links = use.links,
                    .mean_use = use.busy_s / static_cast<double>(use.links) / step_s,
                    .busiest_use = use.busiest_s / step_s,
                    .busiest = use.busiest};
    for (LinkId link; link.value < traffic.links.size(); ++link) {
      if (traffic.links[link].tier != static_cast<LinkTier>(t)) continue;
      if (timeline.held_back_s[link] <= tier.held_back_s) continue;
      tier.held_back_s = timeline.held_back_s[link];
      tier.limiting = traffic.links[link].name;
    }
    network.tiers.push_back(std::move(tier));
  }
  return network;
}

std::vector<std::pair<std::string, double>> critical_phases(const Program& program,
                                                            const Timeline& timeline) {
  const CriticalPath path = find_critical_path(program, timeline);
  std::vector<std::pair<std::string, double>> phases;
  for (int p = 0; p < kPhases; ++p) {
    const Picoseconds time = path.time_by_phase_ps[static_cast<std::size_t>(p)];
    if (time > 0) phases.emplace_back(name_of(static_cast<Phase>(p)), seconds(time));
  }
  if (path.gaps_ps > 0) phases.emplace_back("gaps", seconds(path.gaps_ps));
  std::stable_sort(phases.begin(), phases.end(),
                   [](const auto& a, const auto& b) { return a.second > b.second; });
  return phases;
}

/// What makes up most of a peak: "activations 41.2 GB, optimizer_state 12.1 GB".
std::string largest_parts(const std::array<std::int64_t, kMemoryKinds>& parts) {
  std::array<std::size_t, kMemoryKinds> order{};
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return parts[a] > parts[b]; });
  std::string text;
  for (const std::size_t k : {order[0], order[1]}) {
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", name_of(static_cast<MemoryKind>(k)),
                        format_bytes(static_cast<double>(parts[k])));
  }
  return text;
}

void warn(Report& report) {
  double roofline = 0;
  double extrapolated = 0;
  const PriceRow* worst_roofline = nullptr;
  const PriceRow* worst_extrapolated = nullptr;
  for (const PriceRow& row : report.prices) {  // largest share first
    if (row.source == PriceSource::roofline) {
      roofline += row.share;
      if (worst_roofline == nullptr) worst_roofline = &row;
    }
    if (row.extrapolated) {
      extrapolated += row.share;
      if (worst_extrapolated == nullptr) worst_extrapolated = &row;
    }
  }
  std::vector<const RankReport*> too_large;
  for (const RankReport& rank : report.ranks) {
    if (static_cast<double>(rank.memory_peak_bytes) > report.memory_capacity_bytes) {
      too_large.push_back(&rank);
    }
  }
  if (!too_large.empty()) {
    const RankReport& rank = **std::max_element(
        too_large.begin(), too_large.end(), [](const RankReport* a, const RankReport* b) {
          return a->memory_peak_bytes < b->memory_peak_bytes;
        });
    report.warnings.push_back(fmt::format(
        "out of memory on {} of {} simulated ranks; worst: position {} needs {} of {} ({}), in {}",
        too_large.size(), report.ranks.size(), rank.position,
        format_bytes(static_cast<double>(rank.memory_peak_bytes)),
        format_bytes(report.memory_capacity_bytes), largest_parts(rank.memory_at_peak),
        rank.memory_peak_in));
  }
  if (worst_roofline != nullptr) {
    report.warnings.push_back(
        fmt::format("{:.1f} % of op time is priced by roofline only, most of it {} ({})",
                    100 * roofline, worst_roofline->label, worst_roofline->shape));
  }
  if (worst_extrapolated != nullptr) {
    report.warnings.push_back(
        fmt::format("{:.1f} % of op time is priced outside the measured range, most of it {} ({})",
                    100 * extrapolated, worst_extrapolated->label, worst_extrapolated->shape));
  }
}

}  // namespace

Report summarise(const Scenario& scenario, const Program& program, const PriceList& prices,
                 const Timeline& timeline, const Traffic* traffic) {
  const Plan& plan = scenario.plan;
  const Layout layout(plan.parallelism, scenario.cluster.gpus_per_node);
  const Picoseconds makespan = timeline.makespan_ps();
  const auto gpus = static_cast<double>(layout.world());

  Report report;
  report.scenario = scenario.name;
  report.plan = describe_plan(plan);
  report.gpus = layout.world();
  report.device = scenario.profile.device.name;
  report.peak_flops_per_s = scenario.profile.device.bf16_flops_per_s;
  report.memory_capacity_bytes = scenario.profile.device.memory_bytes;
  report.step_time_s = seconds(makespan);
  report.tokens_per_step =
      static_cast<double>(plan.global_batch_sequences) * static_cast<double>(plan.sequence_length);
  const double tokens_per_s = report.tokens_per_step / report.step_time_s;
  report.tokens_per_s_per_gpu = tokens_per_s / gpus;
  report.tokens_per_day = tokens_per_s * 86400;
  report.gpu_hours_per_trillion_tokens = 1e12 / report.tokens_per_s_per_gpu / 3600;
  const FlopsPerToken flops = training_flops_per_token(scenario.model, plan.sequence_length);
  report.tflops_per_gpu_causal = flops.causal * report.tokens_per_s_per_gpu * 1e-12;
  report.tflops_per_gpu_noncausal = flops.noncausal * report.tokens_per_s_per_gpu * 1e-12;
  report.mfu_causal = report.tflops_per_gpu_causal * 1e12 / report.peak_flops_per_s;
  report.mfu_noncausal = report.tflops_per_gpu_noncausal * 1e12 / report.peak_flops_per_s;

  // Passes over all ops that know nothing of each other: no result depends on the threads.
  std::vector<std::vector<CellSpan>> spans;
  std::vector<Attribution> attributions;
  MemoryTimeline memory;
  tbb::parallel_invoke(
      [&] {
        spans = cell_spans(program, timeline);
        attributions = attribute(program, timeline, spans);
      },
      [&] { memory = trace_memory(program, timeline); },
      [&] { report.critical_path_s = critical_phases(program, timeline); },
      [&] { report.prices = price_rows(scenario, program, prices, timeline, gpus); },
      [&] { report.fingerprint = timeline.fingerprint(); });
  const bool one_rank_per_position =
      static_cast<std::int64_t>(program.ranks()) == layout.positions();
  for (std::size_t r = 0; r < program.ranks(); ++r) {
    const Attribution& a = attributions[r];
    ORRERY_CHECK(a.sum_ps() == makespan, "rank {}: parts add up to {} ps, the step takes {} ps", r,
                 a.sum_ps(), makespan);
    RankReport rank;
    rank.rank = static_cast<std::uint32_t>(r);
    rank.multiplicity = program.multiplicity()[r];
    rank.position =
        static_cast<int>(one_rank_per_position ? r : r / static_cast<std::size_t>(layout.slots()));
    std::set<int> stages;
    for (const CellSpan& span : spans[r]) {
      const Cell& cell = program.cells()[span.cell];
      if (cell.kind == CellKind::optimizer) continue;
      stages.insert({cell.stage, cell.pair_stage});
    }
    rank.stages.assign(stages.begin(), stages.end());
    for (const int stage : rank.stages) {
      const StageParameters p = stage_parameters(scenario, stage);
      rank.parameters += p.dense + p.expert;
    }
    rank.phases_s = phase_times(a);
    rank.exposed_s = exposed_times(a);
    rank.cells_s = cell_times(a);
    for (std::size_t k = 0; k < kCellKinds; ++k) {
      if (a.cells[k] == 0) continue;
      rank.cell_durations.push_back({static_cast<CellKind>(k), a.cells[k],
                                     seconds(a.span_ps[k]) / static_cast<double>(a.cells[k])});
    }
    const MemoryPeak& peak = memory.peaks[RankId(r)];
    rank.memory_peak_bytes = peak.bytes;
    rank.memory_peak_at_s = seconds(peak.at_ps);
    rank.memory_at_peak = peak.bytes_by_kind;
    if (peak.bytes > 0) rank.memory_peak_in = program.name(peak.op);
    const double weight = static_cast<double>(rank.multiplicity) / gpus;
    add(report.phases_s, rank.phases_s, weight);
    add(report.exposed_s, rank.exposed_s, weight);
    add(report.cells_s, rank.cells_s, weight);
    report.ranks.push_back(std::move(rank));
  }

  if (traffic != nullptr) report.network = network_report(*traffic, timeline);
  for (const PriceRow& row : report.prices) {
    report.network.stretched_s +=
        static_cast<double>(row.count) * (row.lasted_s - row.time_s) / gpus;
  }
  report.engine = {.operations = program.size(),
                   .events = timeline.events,
                   .ranks_simulated = program.ranks(),
                   .program_bytes = program.memory_bytes()};
  warn(report);
  return report;
}

int middle_position(const Scenario& scenario) {
  return static_cast<int>((scenario.plan.parallelism.pp - 1) / 2);
}

namespace {

CellKind cell_kind(ActionKind kind) {
  switch (kind) {
    case ActionKind::forward:
      return CellKind::forward;
    case ActionKind::backward:
      return CellKind::backward;
    case ActionKind::backward_input:
      return CellKind::backward_input;
    case ActionKind::backward_weight:
      return CellKind::weight;
    case ActionKind::overlapped:
      return CellKind::overlapped;
  }
  return CellKind::forward;
}

std::string describe_action(const Action& action) {
  if (action.kind == ActionKind::overlapped) {
    return fmt::format("F of stage {} with B of stage {}", action.stage, action.pair_stage);
  }
  return fmt::format("{} of stage {}", name_of(action.kind), action.stage);
}

/// Spans and op times of every phase, averaged over the layers that have it.
std::vector<PhaseSpan> phase_spans(const Program& program, const Timeline& timeline) {
  struct Span {
    Picoseconds start = std::numeric_limits<Picoseconds>::max();
    Picoseconds end = 0;
    Picoseconds busy = 0;
  };
  std::map<std::tuple<Phase, std::uint16_t, std::uint16_t>, Span> by_layer;
  for (OpId op{}; op.value < program.size(); ++op) {
    const Picoseconds time = timeline.end_ps[op] - timeline.start_ps[op];
    if (time == 0) continue;
    const OpTag& tag = program.tag(op);
    Span& span = by_layer[{tag.phase, tag.stage, tag.layer}];
    span.start = std::min(span.start, timeline.start_ps[op]);
    span.end = std::max(span.end, timeline.end_ps[op]);
    span.busy += time;
  }
  std::vector<PhaseSpan> phases;
  for (const auto& [key, span] : by_layer) {
    if (phases.empty() || phases.back().phase != std::get<Phase>(key)) {
      phases.push_back({.phase = std::get<Phase>(key)});
    }
    ++phases.back().layers;
    phases.back().mean_span_s += seconds(span.end - span.start);
    phases.back().mean_busy_s += seconds(span.busy);
  }
  for (PhaseSpan& phase : phases) {
    phase.mean_span_s /= static_cast<double>(phase.layers);
    phase.mean_busy_s /= static_cast<double>(phase.layers);
  }
  return phases;
}

/// Sweeps with prices that err, over the sweep without: what errors do to the cell and to its
/// phases.
void draw_errors(IsolatedCell& cell, const Scenario& scenario, const Program& program,
                 const PriceList& prices, std::int64_t draws) {
  const Timeline plain = sweep(program, prices);
  const std::vector<PhaseSpan> plain_phases = phase_spans(program, plain);
  std::vector<double> times;
  std::vector<std::vector<double>> spans(plain_phases.size());
  for (std::int64_t i = 0; i < draws; ++i) {
    const auto number = static_cast<std::uint64_t>(i);
    const Timeline drawn = sweep(program, drawn_prices(program, prices, scenario.seed, number));
    times.push_back(cell.time_s * seconds(drawn.makespan_ps()) / seconds(plain.makespan_ps()));
    const std::vector<PhaseSpan> phases = phase_spans(program, drawn);
    for (std::size_t p = 0; p < spans.size(); ++p) {
      spans[p].push_back(cell.phases[p].mean_span_s * phases[p].mean_span_s /
                         plain_phases[p].mean_span_s);
    }
  }
  cell.drawn_s = interval_of(std::move(times));
  for (std::size_t p = 0; p < spans.size(); ++p) {
    cell.phases[p].span_s = interval_of(std::move(spans[p]));
  }
}

}  // namespace

std::vector<IsolatedCell> isolated_cells(const Scenario& scenario, std::span<const int> positions,
                                         Network network, std::int64_t draws) {
  const Plan& plan = scenario.plan;
  const Schedule schedule =
      make_schedule({.kind = plan.schedule,
                     .ranks = static_cast<int>(plan.parallelism.pp),
                     .chunks = plan.chunks,
                     .micro_batches = static_cast<int>(plan.micro_batches())});
  std::vector<IsolatedCell> cells;
  for (const int position : positions) {
    std::set<std::tuple<ActionKind, int, int>> seen;
    for (const Action& action : schedule.actions[static_cast<std::size_t>(position)]) {
      if (!seen.insert({action.kind, action.stage, action.pair_stage}).second) continue;
      const Program program = build_cell(scenario, position, action);
      const ProgramRun run = run_program(scenario, program, network);
      cells.push_back({.position = position,
                       .kind = cell_kind(action.kind),
                       .what = describe_action(action),
                       .time_s = seconds(run.timeline.makespan_ps()),
                       .phases = phase_spans(program, run.timeline)});
      if (draws > 0) draw_errors(cells.back(), scenario, program, run.prices, draws);
    }
  }
  return cells;
}

}  // namespace orrery
