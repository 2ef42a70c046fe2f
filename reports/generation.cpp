#include "reports/generation.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "reports/json.hpp"
#include "reports/json_object.hpp"
#include "reports/terminal.hpp"

namespace orrery {
namespace {

double real(std::int64_t value) {
  return static_cast<double>(value);
}

/// Of GPU-seconds a token.
double dollars_per_million(double seconds, double per_hour) {
  return 1e6 * seconds / 3600 * per_hour;
}

GenerationStep prefill_step(const Workload& work) {
  return {.prefill = true,
          .sequences = work.prompts,
          .new_tokens = work.prompt - work.cached,
          .context = work.cached};
}

GenerationStep decode_step(const GenerationScenario& scenario, std::int64_t sequences) {
  return {.sequences = sequences,
          .new_tokens = 1 + scenario.instance.plan.speculation.drafts,
          .context = static_cast<std::int64_t>(scenario.workload.mean_context())};
}

std::int64_t prefill_tokens(const Workload& work) {
  return work.prefill ? work.prompts * (work.prompt - work.cached) : 0;
}

LargestSteps largest_steps(const GenerationScenario& scenario, std::int64_t sequences) {
  const std::int64_t each = 1 + scenario.instance.plan.speculation.drafts;
  return {.prefill_tokens = prefill_tokens(scenario.workload),
          .decode_tokens = scenario.workload.decode ? sequences * each : 1};
}

[[noreturn]] void does_not_fit(const GenerationScenario& scenario, const ServingMemory& memory,
                               const std::string& what) {
  throw InputError({Problem{
      {scenario.file, 0, 0},
      fmt::format("{}: weights {}, buffers {}, {} of cache a token, in {} of {}", what,
                  format_bytes(memory.weights_bytes), format_bytes(memory.buffer_bytes),
                  format_bytes(memory.cache_bytes_per_token), format_bytes(memory.usable_bytes),
                  scenario.instance.profile.device.name),
      "more tp, ep or FP8 make the weights of a GPU smaller; fewer tokens at once the buffers",
      ""}});
}

void study_prefill(GenerationReport& report) {
  const GenerationScenario& s = report.scenario;
  PrefillReport p;
  p.step = prefill_step(s.workload);
  p.cost = step_cost(s.instance, p.step);
  const double gpus = real(s.instance.plan.tp);
  const double tokens = real(p.step.sequences * p.step.new_tokens);
  p.tokens_per_gpu_s = tokens / gpus / p.cost.seconds;
  p.input_tokens_per_gpu_s = p.tokens_per_gpu_s * real(s.workload.prompt) / real(p.step.new_tokens);
  p.input_tokens_per_node_s = p.input_tokens_per_gpu_s * real(s.instance.cluster.gpus_per_node);
  p.dollars_per_million =
      dollars_per_million(1 / p.tokens_per_gpu_s, s.workload.dollars_per_gpu_hour);
  report.prefill = p;
}

void study_decode(GenerationReport& report) {
  const GenerationScenario& s = report.scenario;
  DecodeReport d;
  d.most_sequences =
      most_sequences(s.instance, s.workload.mean_context(), prefill_tokens(s.workload));
  if (d.most_sequences == 0) {
    does_not_fit(s, report.memory, "not one sequence fits");
  }
  d.step = decode_step(s, s.workload.batch.value_or(d.most_sequences));
  d.cost = step_cost(s.instance, d.step);
  const double per_step = s.instance.plan.speculation.tokens_per_step();
  d.tpot_s = d.cost.seconds / per_step;
  d.tokens_per_gpu_s = real(d.step.sequences) / d.tpot_s / real(s.instance.plan.tp);
  d.tokens_per_node_s = d.tokens_per_gpu_s * real(s.instance.cluster.gpus_per_node);
  d.dollars_per_million =
      dollars_per_million(1 / d.tokens_per_gpu_s, s.workload.dollars_per_gpu_hour);
  report.memory = serving_memory(s.instance, largest_steps(s, d.step.sequences));
  d.cache_bytes =
      report.memory.cache_bytes_per_token * real(d.step.sequences) * real(d.step.context);
  if (d.step.sequences > d.most_sequences) {
    report.warnings.push_back(
        fmt::format("{} sequences of {} tokens need {} of cache, {} are left: at most {} fit",
                    d.step.sequences, d.step.context, format_bytes(d.cache_bytes),
                    format_bytes(report.memory.left_for_cache()), d.most_sequences));
  }
  report.decode = d;
}

/// A prefill step of as many tokens whose mean position is the one asked for: the chunk around it,
/// or near the start so many shorter prompts.
GenerationStep around(GenerationStep step, std::int64_t position) {
  constexpr std::int64_t kShortest = 256;
  if (2 * position >= step.new_tokens) {
    step.context = position - step.new_tokens / 2;
    return step;
  }
  const std::int64_t tokens = step.sequences * step.new_tokens;
  step.context = 0;
  step.new_tokens = std::min(step.new_tokens, std::max(kShortest, 2 * position));
  step.sequences = std::max<std::int64_t>(1, tokens / step.new_tokens);
  return step;
}

void study_contexts(GenerationReport& report) {
  const GenerationScenario& s = report.scenario;
  const double tp = real(s.instance.plan.tp);
  for (const std::int64_t context : s.workload.contexts) {
    ContextCost c{.context = context};
    if (report.prefill) {
      const GenerationStep step = around(report.prefill->step, context);
      c.prefill_s_per_token =
          step_cost(s.instance, step).seconds * tp / real(step.sequences * step.new_tokens);
    }
    if (report.decode) {
      GenerationStep step = report.decode->step;
      step.context = std::max<std::int64_t>(context, 1);
      const StepCost& mixed = report.decode->cost;
      const double seconds = mixed.seconds - mixed.core_s + step_cost(s.instance, step).core_s;
      c.decode_s_per_token =
          seconds * tp / real(step.sequences) / s.instance.plan.speculation.tokens_per_step();
    }
    c.prefill_dollars_per_million =
        dollars_per_million(c.prefill_s_per_token, s.workload.dollars_per_gpu_hour);
    c.decode_dollars_per_million =
        dollars_per_million(c.decode_s_per_token, s.workload.dollars_per_gpu_hour);
    const ContextCost& first = report.contexts.empty() ? c : report.contexts.front();
    c.prefill_dollars_above_first =
        c.prefill_dollars_per_million - first.prefill_dollars_per_million;
    c.decode_dollars_above_first = c.decode_dollars_per_million - first.decode_dollars_per_million;
    report.contexts.push_back(c);
  }
}

void study_rollout(GenerationReport& report) {
  const GenerationScenario& s = report.scenario;
  report.rollout = estimate_rollout(s.instance, s.rollout_instances, *s.rollout);
}

// ---- writing

std::string plan_text(const GenerationScenario& s) {
  const ServingPlan& p = s.instance.plan;
  std::string text = fmt::format("{} GPUs: tp {}, dp {}", p.gpus(), p.tp, p.dp);
  if (s.instance.model.moe) {
    text += fmt::format(", ep {}", p.ep);
    if (p.redundant_experts > 0) text += fmt::format(", {} redundant experts", p.redundant_experts);
  }
  text += fmt::format("; weights {}, cache {}", name_of(p.linear), name_of(p.cache));
  if (p.ep > 1 && s.workload.decode && p.decode_exchange == ExchangeMode::low_latency) {
    text += "; low-latency exchange";
  }
  if (p.communication_sms > 0) text += fmt::format("; exchange on {} SMs", p.communication_sms);
  if (p.micro_batches > 1) text += fmt::format("; {} micro-batches overlapped", p.micro_batches);
  if (p.speculation.drafts > 0) {
    text += fmt::format("; {} draft{} accepted at {:.3g} %", p.speculation.drafts,
                        p.speculation.drafts == 1 ? "" : "s", 100 * p.speculation.acceptance);
  }
  return text;
}

std::string percent(double part, double whole) {
  return fmt::format("{:.1f} %", 100 * part / whole);
}

void add_cost_rows(std::vector<std::vector<std::string>>& rows, const StepCost& c) {
  const auto row = [&](const char* what, double s) {
    if (s > 0) rows.push_back({what, format_seconds(s), percent(s, c.seconds)});
  };
  row("attention blocks", c.attention_s);
  row("  of these the core", c.core_s);
  row("feed-forward", c.feed_forward_s);
  row("embedding, head, sampling", c.edges_s);
  row("drafts", c.draft_s);
  row("dispatch and combine", c.exchange_s);
  row("tensor-parallel collectives", c.tensor_s);
  row("nothing computes", c.exposed_s);
  rows.push_back({"limited by", std::string(name_of(c.limit)), ""});
  rows.push_back({"error known of the prices", fmt::format("+-{:.0f} %", 100 * c.spread), ""});
}

std::string step_text(const StepCost& c) {
  std::vector<std::vector<std::string>> rows{{"in a step", "time", "of it"}};
  add_cost_rows(rows, c);
  return format_table(rows, "lrr", "  ");
}

std::string contexts_text(const GenerationReport& report) {
  const bool dollars = report.scenario.workload.dollars_per_gpu_hour > 0;
  std::vector<std::vector<std::string>> rows{{"context"}};
  const auto column = [&](std::size_t row, std::string cell) {
    rows[row].push_back(std::move(cell));
  };
  for (const ContextCost& c : report.contexts) rows.push_back({fmt::format("{}", c.context)});
  const auto columns = [&](const char* phase, auto seconds, auto price) {
    column(0, phase);
    if (dollars) column(0, "$ a million");
    for (std::size_t i = 0; i < report.contexts.size(); ++i) {
      column(i + 1, format_seconds(report.contexts[i].*seconds));
      if (dollars) column(i + 1, fmt::format("{:.4f}", report.contexts[i].*price));
    }
  };
  if (report.prefill) {
    columns("prefill", &ContextCost::prefill_s_per_token,
            &ContextCost::prefill_dollars_per_million);
  }
  if (report.decode) {
    columns("decode", &ContextCost::decode_s_per_token, &ContextCost::decode_dollars_per_million);
  }
  return "\nGPU time of a token by its position\n" +
         format_table(rows, std::string(rows[0].size(), 'r'), "  ");
}

void write_cost(JsonObject& parent, const StepCost& c) {
  parent.name("step");
  JsonObject o(parent.writer());
  o("time_s", c.seconds);
  o("attention_s", c.attention_s);
  o("core_s", c.core_s);
  o("feed_forward_s", c.feed_forward_s);
  o("edges_s", c.edges_s);
  o("draft_s", c.draft_s);
  o("exchange_s", c.exchange_s);
  o("tensor_s", c.tensor_s);
  o("exposed_s", c.exposed_s);
  o("memory_bound_s", c.memory_bound_s);
  o("compute_bound_s", c.compute_bound_s);
  o("launch_bound_s", c.launch_bound_s);
  o("flops", c.flops);
  o("bytes", c.bytes);
  o("spread", c.spread);
  o("limit", name_of(c.limit));
}

}  // namespace

GenerationReport study_generation(GenerationScenario scenario) {
  GenerationReport report;
  report.scenario = std::move(scenario);
  const GenerationScenario& s = report.scenario;
  report.cache_bytes_per_token = cache_bytes_per_token(s.instance.model, s.instance.plan.cache);
  report.memory = serving_memory(s.instance, largest_steps(s, s.workload.batch.value_or(1)));
  if (report.memory.left_for_cache() <= 0) {
    does_not_fit(s, report.memory, "weights and buffers do not fit");
  }
  if (s.workload.prefill) study_prefill(report);
  if (s.workload.decode) study_decode(report);
  if (report.prefill) report.ttft_s = report.prefill->cost.seconds;
  study_contexts(report);
  if (s.rollout) study_rollout(report);
  return report;
}

std::string to_terminal(const GenerationReport& report) {
  const GenerationScenario& s = report.scenario;
  const double per_hour = s.workload.dollars_per_gpu_hour;
  const auto dollars = [&](double d) {
    return per_hour > 0 ? fmt::format(", ${:.4g} a million", d) : std::string();
  };
  std::string text = fmt::format("{}\n{} on {}\n{}\n\n", s.name, s.instance.model.name,
                                 s.instance.profile.device.name, plan_text(s));
  const ServingMemory& m = report.memory;
  text += fmt::format(
      "Memory of a GPU: weights {}, buffers {}, {} for the cache; a token has {} (the whole model "
      "{})\n",
      format_bytes(m.weights_bytes), format_bytes(m.buffer_bytes), format_bytes(m.left_for_cache()),
      format_bytes(m.cache_bytes_per_token), format_bytes(report.cache_bytes_per_token));
  if (const auto& p = report.prefill) {
    text += fmt::format("\nPrefill: {} x {} new tokens a replica", p->step.sequences,
                        p->step.new_tokens);
    if (p->step.context > 0) text += fmt::format(" after {} cached", p->step.context);
    text += fmt::format(" in {}\n  {} tokens/s a GPU computed{}; {} input tokens/s a node\n",
                        format_seconds(p->cost.seconds), format_count(p->tokens_per_gpu_s),
                        dollars(p->dollars_per_million), format_count(p->input_tokens_per_node_s));
    text +=
        fmt::format("  time to first token {} without queueing\n", format_seconds(report.ttft_s));
    text += step_text(p->cost);
  }
  if (const auto& d = report.decode) {
    text += fmt::format(
        "\nDecode: {} sequences a replica with {} tokens of context in {} (at most {} fit)\n",
        d->step.sequences, d->step.context, format_seconds(d->cost.seconds), d->most_sequences);
    text += fmt::format("  TPOT {}: {:.3g} tokens/s a sequence; {} tokens/s a GPU, {} a node{}\n",
                        format_seconds(d->tpot_s), 1 / d->tpot_s, format_count(d->tokens_per_gpu_s),
                        format_count(d->tokens_per_node_s), dollars(d->dollars_per_million));
    text += step_text(d->cost);
  }
  if (!report.contexts.empty()) text += contexts_text(report);
  if (const auto& r = report.rollout) {
    const RolloutWork& work = *s.rollout;
    text += fmt::format(
        "\nRollout: {} prompts x {} outputs of {:.0f} tokens on average (longest {}), {} GPUs\n",
        work.prompts, work.outputs_per_prompt, work.output.mean(), work.output.longest(),
        s.rollout_instances * s.instance.plan.gpus());
    text += fmt::format(
        "  {}: prefill {}, the last sequences alone {}; {} GPU-hours\n"
        "  {} sequences a replica at once, {:.3g} on average; {} tokens/s a GPU\n",
        format_seconds(r->seconds), format_seconds(r->prefill_s), format_seconds(r->tail_s),
        format_count(r->gpu_seconds / 3600), r->slots, r->mean_sequences,
        format_count(r->tokens_per_gpu_s()));
  }
  return text;
}

std::string to_json(const GenerationReport& report) {
  return json_document([&](JsonObject& o) {
    const GenerationScenario& s = report.scenario;
    const ServingPlan& plan = s.instance.plan;
    o("schema_version", kReportSchemaVersion);
    o("scenario", s.name);
    o("model", s.instance.model.name);
    o("device", s.instance.profile.device.name);
    {
      o.name("plan");
      JsonObject p(o.writer());
      p("gpus", plan.gpus());
      p("tp", plan.tp);
      p("dp", plan.dp);
      p("ep", plan.ep);
      p("redundant_experts", plan.redundant_experts);
      p("linear", name_of(plan.linear));
      p("cache", name_of(plan.cache));
      p("decode_exchange", name_of(plan.decode_exchange));
      p("micro_batches", plan.micro_batches);
      p("tokens_per_step", plan.speculation.tokens_per_step());
    }
    {
      o.name("memory");
      JsonObject m(o.writer());
      m("weights_bytes", report.memory.weights_bytes);
      m("buffer_bytes", report.memory.buffer_bytes);
      m("left_for_cache_bytes", report.memory.left_for_cache());
      m("cache_bytes_per_token", report.memory.cache_bytes_per_token);
      m("model_cache_bytes_per_token", report.cache_bytes_per_token);
    }
    if (const auto& p = report.prefill) {
      o.name("prefill");
      JsonObject d(o.writer());
      d("sequences", p->step.sequences);
      d("new_tokens", p->step.new_tokens);
      d("context", p->step.context);
      d("ttft_s", report.ttft_s);
      d("tokens_per_gpu_s", p->tokens_per_gpu_s);
      d("tokens_per_node_s", p->tokens_per_gpu_s * real(s.instance.cluster.gpus_per_node));
      d("input_tokens_per_node_s", p->input_tokens_per_node_s);
      d("dollars_per_million", p->dollars_per_million);
      write_cost(d, p->cost);
    }
    if (const auto& p = report.decode) {
      o.name("decode");
      JsonObject d(o.writer());
      d("sequences", p->step.sequences);
      d("most_sequences", p->most_sequences);
      d("context", p->step.context);
      d("cache_bytes", p->cache_bytes);
      d("tpot_s", p->tpot_s);
      d("tokens_per_sequence", 1 / p->tpot_s);
      d("tokens_per_gpu_s", p->tokens_per_gpu_s);
      d("tokens_per_node_s", p->tokens_per_node_s);
      d("dollars_per_million", p->dollars_per_million);
      write_cost(d, p->cost);
    }
    if (!report.contexts.empty()) {
      o.array("contexts", report.contexts, [&](const ContextCost& c) {
        JsonObject d(o.writer());
        d("context", c.context);
        d("prefill_s_per_token", c.prefill_s_per_token);
        d("decode_s_per_token", c.decode_s_per_token);
        d("prefill_dollars_per_million", c.prefill_dollars_per_million);
        d("decode_dollars_per_million", c.decode_dollars_per_million);
        d("prefill_dollars_above_first", c.prefill_dollars_above_first);
        d("decode_dollars_above_first", c.decode_dollars_above_first);
      });
    }
    if (const auto& r = report.rollout) {
      o.name("rollout");
      JsonObject d(o.writer());
      d("replicas", r->replicas);
      d("slots", r->slots);
      d("time_s", r->seconds);
      d("gpu_time_s", r->gpu_seconds);
      d("prefill_s", r->prefill_s);
      d("tail_s", r->tail_s);
      d("output_tokens", r->output_tokens);
      d("mean_sequences", r->mean_sequences);
      d("tokens_per_gpu_s", r->tokens_per_gpu_s());
      d("tokens_per_s", r->output_tokens / r->seconds);
    }
    o.array("warnings", report.warnings, [&](const std::string& w) {
      o.writer().String(w.data(), static_cast<rapidjson::SizeType>(w.size()));
    });
  });
}

}  // namespace orrery
