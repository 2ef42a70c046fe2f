#include "reports/explain.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "models/layout.hpp"
#include "models/step.hpp"
#include "reports/terminal.hpp"

namespace orrery {

namespace {

using Rows = std::vector<std::vector<std::string>>;

std::string whole(std::int64_t value) {
  return fmt::format("{}", value);
}

std::string parameters(const Scenario& scenario) {
  const ParameterCount count = count_parameters(scenario.model);
  const ActiveParameters active = count_active_parameters(scenario.model);
  const FlopsPerToken flops =
      training_flops_per_token(scenario.model, scenario.plan.sequence_length);
  const auto billions = [](std::int64_t n) {
    return fmt::format("{:.4f} B", static_cast<double>(n) * 1e-9);
  };
  const auto gflop = [](double f) { return fmt::format("{:.1f} GFLOP", f * 1e-9); };
  return "Parameters\n" +
         format_table({{"embedding", billions(count.embedding)},
                       {"head", billions(count.head)},
                       {"attention", billions(count.attention)},
                       {"dense feed-forward", billions(count.dense_feed_forward)},
                       {"routed experts", billions(count.routed_experts)},
                       {"shared experts", billions(count.shared_experts)},
                       {"router", billions(count.router)},
                       {"norms", billions(count.norms)},
                       {"total, without MTP", billions(count.total())},
                       {"MTP modules", billions(count.mtp)},
                       {"active a token, layers and norm", billions(active.body)},
                       {"... with head", billions(active.with_head)},
                       {"... with head and embedding", billions(active.with_head_and_embedding)},
                       {"training FLOPs a token, causal", gflop(flops.causal)},
                       {"training FLOPs a token, non-causal", gflop(flops.noncausal)}},
                      "lr", "  ");
}

std::string stages(const Scenario& scenario) {
  Rows rows{{"stage", "layers", "MoE", "also", "dense parameters", "expert parameters"}};
  for (std::size_t s = 0; s < scenario.plan.stages.size(); ++s) {
    const StageContents& stage = scenario.plan.stages[s];
    const StageParameters p = stage_parameters(scenario, static_cast<int>(s));
    std::int64_t moe = 0;
    for (std::int64_t l = stage.first_layer; l < stage.first_layer + stage.layers; ++l) {
      moe += scenario.model.is_moe(l) ? 1 : 0;
    }
    std::string also;
    const auto append = [&also](const std::string& what) {
      if (!also.empty()) also += ' ';
      also += what;
    };
    if (stage.embedding) append("embedding");
    if (stage.mtp_modules > 0) append(fmt::format("MTP x{}", stage.mtp_modules));
    if (stage.head) append("head");
    rows.push_back({fmt::format("{}", s),
                    stage.layers == 0 ? "none"
                                      : fmt::format("{}..{}", stage.first_layer,
                                                    stage.first_layer + stage.layers - 1),
                    whole(moe), also, whole(p.dense), whole(p.expert)});
  }
  return "Stages, parameters on one GPU\n" + format_table(rows, "rlrlrr", "  ");
}

std::string memory(const Report& report) {
  Rows rows{{"position", "stages", "peak", "at"}};
  for (int k = 0; k < kMemoryKinds; ++k) {
    rows[0].emplace_back(name_of(static_cast<MemoryKind>(k)));
  }
  int last_position = -1;
  for (const RankReport& rank : report.ranks) {
    if (rank.position == last_position) continue;  // its peers are alike
    last_position = rank.position;
    std::vector<std::string> row{whole(rank.position),
                                 fmt::format("{}", fmt::join(rank.stages, ",")),
                                 format_bytes(static_cast<double>(rank.memory_peak_bytes)),
                                 format_seconds(rank.memory_peak_at_s)};
    for (const std::int64_t bytes : rank.memory_at_peak) {
      row.push_back(format_bytes(static_cast<double>(bytes)));
    }
    rows.push_back(std::move(row));
  }
  return fmt::format("Memory at its peak, of {}\n", format_bytes(report.memory_capacity_bytes)) +
         format_table(rows, "rlrrrrrrrr", "  ");
}

std::string groups(const Scenario& scenario) {
  const Layout layout(scenario.plan.parallelism, scenario.cluster.gpus_per_node);
  constexpr std::array<std::pair<GroupKind, const char*>, 7> kKinds = {
      {{GroupKind::tensor, "tensor"},
       {GroupKind::context, "context"},
       {GroupKind::data, "data"},
       {GroupKind::expert, "expert"},
       {GroupKind::expert_tensor, "expert_tensor"},
       {GroupKind::expert_data, "expert_data"},
       {GroupKind::position, "position"}}};
  Rows rows{{"group", "ranks", "groups", "ranks a node", "ranks of the first"}};
  for (const auto& [kind, name] : kKinds) {
    auto members = layout.members(kind, 0);
    const bool cut = members.size() > 5;
    if (cut) members.resize(5);
    rows.push_back({name, whole(layout.group_size(kind)), whole(layout.group_count(kind)),
                    whole(layout.members_per_node(kind)),
                    fmt::format("{}{}", fmt::join(members, " "), cut ? " ..." : "")});
  }
  std::string text = fmt::format("Layout: {} GPUs = {} positions of {} slots\n", layout.world(),
                                 layout.positions(), layout.slots()) +
                     format_table(rows, "lrrrl", "  ");
  rows = {{"rank", "node", "pp", "dp", "cp", "tp", "expert_dp", "ep", "expert_tp"}};
  for (const std::int64_t rank : {std::int64_t{0}, std::int64_t{1}, layout.world() - 1}) {
    if (rank >= layout.world()) continue;
    const Coordinates c = layout.coordinates(rank);
    rows.push_back({whole(rank), whole(layout.node(rank)), whole(c.pp), whole(c.dp), whole(c.cp),
                    whole(c.tp), whole(c.expert_dp), whole(c.ep), whole(c.expert_tp)});
  }
  return text + format_table(rows, "rrrrrrrrr", "  ");
}

/// Mean and greatest of the busiest GPU and node of the first group, over all layers with experts
/// and micro-batches.
std::string routing(const Scenario& scenario) {
  if (!scenario.model.moe || stated_load(scenario.plan.routing)) return "";
  const ExpertLoads loads = expert_loads(scenario);
  Rows rows;
  const auto row = [&](const char* what, const std::string& value) {
    rows.push_back({what, value});
  };
  const auto number = [](double value) { return fmt::format("{:.3f}", value); };
  if (const RouterOutcome* router = loads.router()) {
    const auto most = std::max_element(router->popularity.begin(), router->popularity.end());
    row("router: violation in the first batch",
        router->max_violation.empty() ? "" : number(router->max_violation.front()));
    row("router: violation in the last batch",
        router->max_violation.empty() ? "" : number(router->max_violation.back()));
    row("router: violation over all batches at the end",
        number(*most * static_cast<double>(router->popularity.size()) - 1));
    row("router: correlation of a sequence's tokens", fmt::format("{:.5f}", router->correlation));
  }
  row("independent tokens of a GPU's micro-batch", whole(loads.independent_tokens()));
  double gpu = 0;
  double node = 0;
  double most_gpu = 0;
  double most_node = 0;
  double count = 0;
  const Model& model = scenario.model;
  for (std::int64_t layer = 0; layer < model.layers; ++layer) {
    if (!model.is_moe(layer)) continue;
    for (std::int64_t m = 0; m < scenario.plan.micro_batches(); ++m) {
      const GroupLoad load = loads.group_load(layer, m, 0);
      gpu += load_of(load.busiest_gpu);
      node += load_of(load.busiest_node);
      most_gpu = std::max(most_gpu, load_of(load.busiest_gpu));
      most_node = std::max(most_node, load_of(load.busiest_node));
      ++count;
    }
  }
  row("rows of the busiest GPU over the mean, on average", number(gpu / count));
  row("... at most", number(most_gpu));
  row("rows of the busiest node over the mean, on average", number(node / count));
  row("... at most", number(most_node));
  return "Routing, loads of one expert-parallel group\n" + format_table(rows, "lr", "  ");
}

std::string stragglers(const Scenario& scenario) {
  const std::int64_t world = scenario.plan.parallelism.world();
  const std::vector<double> factors =
      slowdowns(scenario.stragglers, world, scenario.cluster.gpus_per_node, scenario.seed);
  if (factors.empty()) return "";
  std::vector<std::pair<double, std::int64_t>> slowest;
  for (std::int64_t g = 0; g < world; ++g) {
    const double factor = factors[static_cast<std::size_t>(g)];
    if (factor > 1) slowest.emplace_back(-factor, g);
  }
  std::sort(slowest.begin(), slowest.end());
  Rows rows{{"rank", "node", "slowdown"}};
  for (std::size_t i = 0; i < std::min<std::size_t>(slowest.size(), 5); ++i) {
    rows.push_back({whole(slowest[i].second),
                    whole(slowest[i].second / scenario.cluster.gpus_per_node),
                    fmt::format("{:.3f}", -slowest[i].first)});
  }
  return fmt::format("Stragglers: {} of {} GPUs slower than priced, the slowest\n", slowest.size(),
                     world) +
         format_table(rows, "rrr", "  ");
}

std::string program(const Study& study) {
  const Program& p = study.program;
  std::array<std::int64_t, kOpKinds> by_kind{};
  std::int64_t predecessors = 0;
  for (OpId op{}; op.value < p.size(); ++op) {
    ++by_kind[static_cast<std::size_t>(p.kind(op))];
    predecessors += static_cast<std::int64_t>(p.predecessors_of(op).size());
  }
  std::string text =
      fmt::format("Program: {} ops on {} simulated ranks, {} dependencies, {} shapes, {}\n  ",
                  p.size(), p.ranks(), predecessors, p.shapes().size(),
                  format_bytes(static_cast<double>(p.memory_bytes())));
  for (int k = 0; k < kOpKinds; ++k) {
    text += fmt::format("{}{} {}", k == 0 ? "" : ", ", by_kind[static_cast<std::size_t>(k)],
                        name_of(static_cast<OpKind>(k)));
  }
  struct OfKind {
    std::int64_t cells = 0;
    std::int64_t ops = 0;
  };
  std::array<OfKind, kCellKinds> cells{};
  for (const Cell& cell : p.cells()) {
    OfKind& of_kind = cells[static_cast<std::size_t>(cell.kind)];
    ++of_kind.cells;
    of_kind.ops += cell.last.value - cell.first.value;
  }
  Rows rows{{"cells", "number", "ops", "ops a cell"}};
  for (std::size_t k = 0; k < kCellKinds; ++k) {
    if (cells[k].cells == 0) continue;
    rows.push_back({std::string(name_of(static_cast<CellKind>(k))), whole(cells[k].cells),
                    whole(cells[k].ops), whole(cells[k].ops / cells[k].cells)});
  }
  return text + "\n" + format_table(rows, "lrrr", "  ");
}

std::string isolated(const Report& report) {
  if (report.cells.empty()) return "";
  Rows rows{{"cell", "time", "phase", "layers", "span a layer", "busy a layer"}};
  for (const IsolatedCell& cell : report.cells) {
    rows.push_back({cell.what, format_seconds(cell.time_s), "", "", "", ""});
    for (const PhaseSpan& phase : cell.phases) {
      rows.push_back({"", "", std::string(name_of(phase.phase)), whole(phase.layers),
                      format_seconds(phase.mean_span_s), format_seconds(phase.mean_busy_s)});
    }
  }
  return fmt::format("Cells of position {}, each alone\n", report.cells.front().position) +
         format_table(rows, "lrlrrr", "  ");
}

std::string prices(const Report& report) {
  Rows rows{{"share", "per GPU", "count", "each", "source", "spread", "label", "shape", "note"}};
  for (const PriceRow& row : report.prices) {
    rows.push_back({fmt::format("{:.2f} %", 100 * row.share), format_seconds(row.per_gpu_s),
                    whole(row.count), format_seconds(row.time_s),
                    fmt::format("{}{}", name_of(row.source), row.extrapolated ? "*" : ""),
                    row.spread > 0 ? fmt::format("{:.0f} %", 100 * row.spread) : "", row.label,
                    row.shape, row.note});
  }
  return "Prices (*: outside the measured range)\n" + format_table(rows, "rrrrlrlll", "  ");
}

/// Every line of `text` as a comment.
std::string comment(const std::string& text) {
  std::string out;
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t end = text.find('\n', begin);
    const std::string line = text.substr(begin, end - begin);
    out += line.empty() ? "#" : "# ";
    out += line;
    out += '\n';
    begin = end == std::string::npos ? text.size() : end + 1;
  }
  return out;
}

}  // namespace

std::string explain(const Study& study) {
  std::string text = to_yaml(study.scenario);
  for (const std::string& section :
       {parameters(study.scenario), stages(study.scenario), memory(study.report),
        groups(study.scenario), routing(study.scenario), stragglers(study.scenario), program(study),
        isolated(study.report), prices(study.report)}) {
    if (!section.empty()) text += fmt::format("\n{}", comment(section));
  }
  for (const std::string& note : study.scenario.notes)
    text += comment(fmt::format("note: {}", note));
  for (const std::string& warning : study.report.warnings)
    text += comment(fmt::format("warning: {}", warning));
  return text;
}

}  // namespace orrery
