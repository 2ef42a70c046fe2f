// Layouts a second of the search over DeepSeek-V3 on 2048 H800 with all defaults: how many are
// looked at (most do not fit in memory, which costs less) and how many are timed.
//
//   search_bench --benchmark_filter=all     # all of the space
//   search_bench --benchmark_filter=timed   # every 40th of those that fit, without any cache

#include <benchmark/benchmark.h>

#include <numeric>
#include <string>
#include <vector>

#include "reports/search/search.hpp"

namespace orrery {
namespace {

const std::string kScenario = ORRERY_SOURCE_DIR "/scenarios/deepseek_v3_2048_h800.yaml";

void all(benchmark::State& state) {
  const Scenario scenario = read_scenario(kScenario);
  std::size_t layouts = 0;
  for ([[maybe_unused]] const auto _ : state) {
    const Search search(scenario, default_space(scenario));
    std::vector<std::size_t> indices(search.candidates().size());
    std::iota(indices.begin(), indices.end(), std::size_t{0});
    benchmark::DoNotOptimize(search.evaluate(indices, Fidelity::coarse));
    layouts += indices.size();
  }
  state.counters["layouts/s"] =
      benchmark::Counter(static_cast<double>(layouts), benchmark::Counter::kIsRate);
}
BENCHMARK(all)->Unit(benchmark::kMillisecond)->UseRealTime()->Iterations(1);

void timed(benchmark::State& state) {
  const Scenario scenario = read_scenario(kScenario);
  const Search search(scenario, default_space(scenario));
  std::vector<std::size_t> indices(search.candidates().size());
  std::iota(indices.begin(), indices.end(), std::size_t{0});
  const std::vector<Evaluation> known = search.evaluate(indices, Fidelity::coarse);
  std::vector<Candidate> candidates;
  std::size_t fit = 0;
  for (const std::size_t i : indices) {
    if (known[i].fits && fit++ % 40 == 0) candidates.push_back(search.candidates().at(i));
  }
  for ([[maybe_unused]] const auto _ : state) {
    benchmark::DoNotOptimize(CoarseModel(scenario).evaluate(candidates, 1e18));
  }
  state.counters["layouts/s"] = benchmark::Counter(static_cast<double>(candidates.size()),
                                                   benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(timed)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace orrery
