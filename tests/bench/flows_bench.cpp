// Flows that share links: one large component that every completion changes (all-to-all; an error
// if it completes at another time than SimGrid says), and many small ones that change one by one.
// How long SimGrid takes for the same: simgrid_ratio, where it is installed.
//
//   flows_bench --benchmark_counters_tabular=true

#include <benchmark/benchmark.h>

#include <array>
#include <cmath>
#include <vector>

#include "sim/flows.hpp"
#include "tests/sim/all_to_all.hpp"

namespace orrery {
namespace {

void run_all_to_all(benchmark::State& state, double back) {
  const auto nodes = static_cast<std::size_t>(state.range(0));
  const auto expected_us = static_cast<double>(state.range(1));
  double last_us = 0;
  std::uint64_t recomputations = 0;
  for (auto _ : state) {
    FlowNetwork network = test::all_to_all(nodes, back);
    last_us = test::last_completion_us(network);
    recomputations = network.recomputations();
  }
  if (expected_us > 0 && std::abs(last_us - expected_us) > 0.5) {
    state.SkipWithError("completes at another time than SimGrid says");
  }
  const auto gpus = static_cast<double>(nodes * 8);
  state.counters["flows"] = gpus * (gpus - 1);
  state.counters["recomputations"] = static_cast<double>(recomputations);
  state.counters["completes_us"] = last_us;
}

void all_to_all(benchmark::State& state) {
  run_all_to_all(state, test::kNoCrossTraffic);
}
BENCHMARK(all_to_all)
    ->ArgNames({"nodes", "simgrid_us"})
    ->Args({8, 1356})
    ->Args({16, 2892})
    ->Args({32, 5964})
    ->Args({64, 0})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

void all_to_all_cross_traffic(benchmark::State& state) {
  run_all_to_all(state, test::kFivePercentBack);
}
BENCHMARK(all_to_all_cross_traffic)
    ->ArgNames({"nodes", "simgrid_us"})
    ->Args({8, 1423})
    ->Args({16, 3036})
    ->Args({32, 6262})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

/// 2048 GPUs in a ring of NICs; each sends 50 messages of various sizes, one after the other, to
/// the next: driven from outside, event by event.
void ring_of_sends(benchmark::State& state) {
  constexpr std::size_t kGpus = 2048;
  constexpr std::size_t kMessages = 50;
  for (auto _ : state) {
    FlowNetwork network(IdVector<LinkId, Link>(2 * kGpus, Link{50e9, 2 * kPsPerUs}));
    std::vector<std::size_t> sent(kGpus, 0);
    IdVector<FlowId, std::size_t> sender;
    const auto send = [&](Picoseconds at_ps, std::size_t gpu) {
      const std::array path{LinkId(2 * gpu), LinkId(2 * ((gpu + 1) % kGpus) + 1)};
      const double bytes = 1e6 + 1e3 * static_cast<double>((gpu * 37 + sent[gpu] * 11) % 997);
      ++sent[gpu];
      network.start(at_ps, path, bytes);
      sender.push_back(gpu);
    };
    for (std::size_t gpu = 0; gpu < kGpus; ++gpu) send(0, gpu);
    while (const auto next = network.next_event_ps()) {
      for (const Completion& done : network.advance_to(*next)) {
        const std::size_t gpu = sender[done.flow];
        if (sent[gpu] < kMessages) send(done.at_ps, gpu);
      }
    }
    benchmark::DoNotOptimize(network.now_ps());
  }
  state.counters["per_flow"] =
      benchmark::Counter(kGpus * kMessages, benchmark::Counter::kIsIterationInvariantRate |
                                                benchmark::Counter::kInvert);
}
BENCHMARK(ring_of_sends)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace orrery
