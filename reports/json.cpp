#include "reports/json.hpp"

#include <fmt/format.h>

#include "reports/json_object.hpp"

namespace orrery {

void write_phases(JsonWriter& writer, const PhaseTimes& t) {
  JsonObject o(writer);
  o("forward", t.forward);
  o("backward", t.backward);
  o("weight", t.weight);
  o("overlapped", t.overlapped);
  o("bubble", t.bubble);
  o("optimizer", t.optimizer);
  o("exposed_communication", t.exposed_communication);
}

namespace {

void write_exposed(JsonWriter& writer, const ExposedTimes& times) {
  JsonObject o(writer);
  o("expert", times.expert);
  o("tensor", times.tensor);
  o("data", times.data);
  o("pipeline", times.pipeline);
}

void write_cells(JsonWriter& writer, const CellTimes& t) {
  JsonObject o(writer);
  o("forward", t.forward);
  o("backward", t.backward);
  o("weight", t.weight);
  o("overlapped", t.overlapped);
  o("bubble", t.bubble);
  o("optimizer", t.optimizer);
}

void write_rank(JsonWriter& writer, const RankReport& rank) {
  JsonObject o(writer);
  o("rank", std::int64_t{rank.rank});
  o("multiplicity", rank.multiplicity);
  o("position", rank.position);
  o.array("stages", rank.stages, [&](int stage) { writer.Int(stage); });
  o("parameters", rank.parameters);
  write_phases(o.name("phases_s"), rank.phases_s);
  write_exposed(o.name("exposed_by_s"), rank.exposed_s);
  write_cells(o.name("cells_s"), rank.cells_s);
  o.array("cell_durations", rank.cell_durations, [&](const CellDuration& duration) {
    JsonObject d(writer);
    d("kind", name_of(duration.kind));
    d("count", duration.count);
    d("mean_s", duration.mean_s);
  });
}

void write_network(JsonWriter& writer, const NetworkReport& network) {
  JsonObject o(writer);
  o("fidelity", network.flows ? "flows" : "formula");
  o("fabric", network.fabric);
  o("stretched_s", network.stretched_s);
  o.array("tiers", network.tiers, [&](const TierReport& tier) {
    JsonObject t(writer);
    t("tier", tier.tier);
    t("links", tier.links);
    t("mean_use", tier.mean_use);
    t("busiest_use", tier.busiest_use);
    t("busiest", tier.busiest);
    t("held_back_s", tier.held_back_s);
    t("limiting", tier.limiting);
  });
}

void write_memory(JsonWriter& writer, const Report& report) {
  std::int64_t overall = 0;
  for (const RankReport& rank : report.ranks) overall = std::max(overall, rank.memory_peak_bytes);
  JsonObject o(writer);
  o("overall", overall);
  o("capacity", report.memory_capacity_bytes);
  o.array("per_stage", report.ranks, [&](const RankReport& rank) {
    JsonObject m(writer);
    m("rank", std::int64_t{rank.rank});
    m("position", rank.position);
    m.array("stages", rank.stages, [&](int stage) { writer.Int(stage); });
    m("peak", rank.memory_peak_bytes);
    m("at_s", rank.memory_peak_at_s);
    m("in", rank.memory_peak_in);
    JsonObject parts(m.name("at_peak"));
    for (std::size_t k = 0; k < kMemoryKinds; ++k) {
      parts(name_of(static_cast<MemoryKind>(k)), rank.memory_at_peak[k]);
    }
  });
}

void write_isolated(JsonWriter& writer, const IsolatedCell& cell) {
  JsonObject o(writer);
  o("position", cell.position);
  o("kind", name_of(cell.kind));
  o("what", cell.what);
  o("time_s", cell.time_s);
  o.array("phases", cell.phases, [&](const PhaseSpan& phase) {
    JsonObject p(writer);
    p("phase", key_of(phase.phase));
    p("name", name_of(phase.phase));
    p("layers", phase.layers);
    p("mean_span_s", phase.mean_span_s);
    p("mean_busy_s", phase.mean_busy_s);
  });
}

void write_price(JsonWriter& writer, const PriceRow& row) {
  JsonObject o(writer);
  o("label", row.label);
  o("shape", row.shape);
  o("count", row.count);
  o("time_s", row.time_s);
  o("lasted_s", row.lasted_s);
  o("per_gpu_s", row.per_gpu_s);
  o("share", row.share);
  o("source", name_of(row.source));
  o("spread", row.spread);
  o("extrapolated", row.extrapolated);
  o("note", row.note);
}

void write_report(JsonObject& o, const Report& report, const JsonOptions& options) {
  JsonWriter& writer = o.writer();
  o("schema_version", kReportSchemaVersion);
  o("scenario", report.scenario);
  o("plan", report.plan);
  o("gpus", report.gpus);
  o("device", report.device);
  if (!report.executed_on.empty()) o("executed_on", report.executed_on);
  if (!report.training.empty()) {
    o.array("training", report.training, [&](const TrainedStep& step) {
      JsonObject s(writer);
      s("step", step.number);
      s("loss", step.loss);
      s("mtp_loss", step.mtp_loss);
      s("gradient_norm", step.gradient_norm);
      s("seconds", step.seconds);
    });
  }
  o("peak_flops_per_s", report.peak_flops_per_s);
  o("step_time_s", report.step_time_s);
  o("tokens_per_step", report.tokens_per_step);
  o("tokens_per_s_per_gpu", report.tokens_per_s_per_gpu);
  o("tokens_per_day", report.tokens_per_day);
  o("gpu_hours_per_trillion_tokens", report.gpu_hours_per_trillion_tokens);
  o("tflops_per_gpu_causal", report.tflops_per_gpu_causal);
  o("tflops_per_gpu_noncausal", report.tflops_per_gpu_noncausal);
  o("mfu_causal", report.mfu_causal);
  o("mfu_noncausal", report.mfu_noncausal);
  write_phases(o.name("phases_s"), report.phases_s);
  write_cells(o.name("cells_s"), report.cells_s);
  o("exposed_communication_s", report.phases_s.exposed_communication);
  write_exposed(o.name("exposed_by_s"), report.exposed_s);
  write_network(o.name("network"), report.network);
  write_memory(o.name("memory_peak_bytes"), report);
  o.array("critical_path", report.critical_path_s, [&](const auto& item) {
    JsonObject c(writer);
    c("phase", item.first);
    c("time_s", item.second);
  });
  o.array("ranks", report.ranks, [&](const RankReport& rank) { write_rank(writer, rank); });
  o.array("cells", report.cells, [&](const IsolatedCell& cell) { write_isolated(writer, cell); });
  o.array("prices", report.prices, [&](const PriceRow& row) { write_price(writer, row); });
  if (report.uncertainty) write_uncertainty(o.name("uncertainty"), *report.uncertainty);
  o.array("warnings", report.warnings, [&](const std::string& text) {
    writer.String(text.c_str(), static_cast<rapidjson::SizeType>(text.size()));
  });
  o("fingerprint", fmt::format("{:016x}", report.fingerprint));
  JsonObject engine(o.name("engine"));
  engine("operations", report.engine.operations);
  engine("events", report.engine.events);
  engine("ranks_simulated", report.engine.ranks_simulated);
  engine("program_bytes", report.engine.program_bytes);
  if (options.timing) engine("wall_s", report.engine.wall_s);
}

}  // namespace

void write_interval(JsonObject& o, std::string_view key, const Interval& interval) {
  JsonObject i(o.name(key));
  i("p10", interval.p10);
  i("p50", interval.p50);
  i("p90", interval.p90);
  i("mean", interval.mean);
}

std::string_view key_of(Phase phase) {
  switch (phase) {
    case Phase::embedding_forward:
      return "embedding_forward";
    case Phase::attn_forward:
      return "attn_forward";
    case Phase::mlp_forward:
      return "mlp_forward";
    case Phase::dispatch_forward:
      return "dispatch_forward";
    case Phase::combine_forward:
      return "combine_forward";
    case Phase::head_forward:
      return "head_forward";
    case Phase::head_backward:
      return "head_backward";
    case Phase::head_weight:
      return "head_weight";
    case Phase::combine_backward:
      return "combine_backward";
    case Phase::mlp_backward:
      return "mlp_backward";
    case Phase::mlp_weight:
      return "mlp_weight";
    case Phase::dispatch_backward:
      return "dispatch_backward";
    case Phase::attn_backward:
      return "attn_backward";
    case Phase::attn_weight:
      return "attn_weight";
    case Phase::embedding_backward:
      return "embedding_backward";
    case Phase::pipeline_forward:
      return "pipeline_forward";
    case Phase::pipeline_backward:
      return "pipeline_backward";
    case Phase::tensor_exchange:
      return "tensor_exchange";
    case Phase::gradient_sync:
      return "gradient_sync";
    case Phase::parameter_gather:
      return "parameter_gather";
    case Phase::optimizer:
      return "optimizer";
    case Phase::checkpoint:
      return "checkpoint";
  }
  return "?";
}

std::string to_json(const Report& report, const JsonOptions& options) {
  return json_document([&](JsonObject& o) { write_report(o, report, options); });
}

}  // namespace orrery
