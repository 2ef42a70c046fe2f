// What one step of DeepSeek-V3 on 2048 H800 costs to model, part by part, at kernel granularity:
// from YAML to the Report. `representative`: one rank per pipeline position; `all_ranks`: all 2048,
// some 115 million ops and 5 GB, which only runs when it is asked for by name.
//
//   step_bench --benchmark_counters_tabular=true
//   step_bench --benchmark_filter=all_ranks
//
// items_per_second are ops of the step. bytes/op: what the Program and its Timeline keep. The table
// in the README is made by speed_table.py.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "models/step.hpp"
#include "reports/study.hpp"
#include "sim/timeline.hpp"

namespace orrery {
namespace {

const std::string kScenario = ORRERY_SOURCE_DIR "/scenarios/deepseek_v3_2048_h800.yaml";

/// A Study of the scenario, kept from one benchmark to the next (all ranks take seconds to build)
/// until another one is wanted or the memory is.
std::optional<Study> kept;

const Study& study(bool all_ranks) {
  const bool holds_all = kept && kept->program.ranks() == 2048;
  if (!kept || holds_all != all_ranks) {
    kept.reset();
    kept =
        study_step(read_scenario(kScenario), {.all_ranks = all_ranks, .network = Network::formula});
  }
  return *kept;
}

void count(benchmark::State& state, const Program& program) {
  const auto ops = static_cast<double>(program.size());
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(program.size()));
  state.counters["ops"] = ops;
  state.counters["bytes/op"] =
      static_cast<double>(program.memory_bytes()) / ops + 2 * sizeof(Picoseconds);
}

void read(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(read_scenario(kScenario).model.layers);
}

void whole(benchmark::State& state, bool all_ranks) {
  kept.reset();
  std::optional<Study> s;
  for (auto _ : state) {
    s.reset();  // one at a time fits in memory
    s = study_step(read_scenario(kScenario), {.all_ranks = all_ranks, .network = Network::formula});
  }
  count(state, s->program);
}

void build(benchmark::State& state, bool all_ranks) {
  kept.reset();
  const Scenario scenario = read_scenario(kScenario);
  Program program;
  for (auto _ : state) {
    program = Program{};
    program = build_step(scenario, {.all_ranks = all_ranks});
  }
  count(state, program);
}

template <class Part>
void measure(benchmark::State& state, bool all_ranks, Part part) {
  const Study& s = study(all_ranks);
  for (auto _ : state) part(s);
  count(state, s.program);
}

void price(benchmark::State& state, bool all_ranks) {
  measure(state, all_ranks, [](const Study& s) {
    const PriceList list = price_all(s.program, s.scenario.profile, s.scenario.cluster);
    benchmark::DoNotOptimize(list.prices.size());
  });
}

void run_sweep(benchmark::State& state, bool all_ranks) {
  measure(state, all_ranks, [](const Study& s) {
    benchmark::DoNotOptimize(sweep(s.program, s.run.prices).end_ps.back());
  });
}

void run_events(benchmark::State& state, bool all_ranks) {
  measure(state, all_ranks, [](const Study& s) {
    benchmark::DoNotOptimize(simulate(s.program, s.run.prices).end_ps.back());
  });
}

void run_traffic(benchmark::State& state, bool all_ranks) {
  measure(state, all_ranks, [](const Study& s) {
    const Traffic traffic = traffic_of(s.program, s.scenario.cluster, *s.scenario.fabric);
    benchmark::DoNotOptimize(traffic.loads.size());
  });
}

void run_flows(benchmark::State& state, bool all_ranks) {
  measure(state, all_ranks, [](const Study& s) {
    const ProgramRun run = run_program(s.scenario, s.program, Network::flows);
    benchmark::DoNotOptimize(run.timeline.end_ps.back());
  });
}

void run_summarise(benchmark::State& state, bool all_ranks) {
  measure(state, all_ranks, [](const Study& s) {
    const Report report = summarise(s.scenario, s.program, s.run.prices, s.run.timeline);
    benchmark::DoNotOptimize(report.fingerprint);
  });
}

void add_benchmarks(bool all_ranks) {
  const std::string prefix = all_ranks ? "all_ranks/" : "representative/";
  const auto add = [&](const char* name, void (*part)(benchmark::State&, bool)) {
    auto* added = benchmark::RegisterBenchmark((prefix + name).c_str(), part, all_ranks);
    added->Unit(benchmark::kMillisecond)->UseRealTime();
    if (all_ranks) added->Iterations(1);
  };
  add("whole", whole);
  add("build_step", build);
  add("price_all", price);
  add("sweep", run_sweep);
  if (!all_ranks) add("simulate", run_events);  // all ranks: many seconds more, the same per op
  add("traffic_of", run_traffic);
  add("run_flows", run_flows);
  add("summarise", run_summarise);
}

}  // namespace
}  // namespace orrery

int main(int argc, char** argv) {
  const auto names_all_ranks = [](std::string_view a) {
    return a.find("--benchmark_filter") == 0 && a.find("all_ranks") != a.npos;
  };
  const bool all_ranks = std::any_of(argv + 1, argv + argc, names_all_ranks);
  benchmark::RegisterBenchmark("read_scenario", orrery::read)->Unit(benchmark::kMillisecond);
  orrery::add_benchmarks(false);
  if (all_ranks) orrery::add_benchmarks(true);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
