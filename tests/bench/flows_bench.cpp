// All-to-all between N nodes of 8 GPUs as flows: the workload whose completion SimGrid 3.32 (S4U,
// model CM02) gives as its second argument, in 0.26 s (8 nodes), 3.2 s (16) and 264 s (32) of wall
// time on two cores of the Sapphire Rapids class.
//
//   flows_bench --benchmark_counters_tabular=true

#include <benchmark/benchmark.h>

#include <array>
#include <cmath>

#include "sim/flows.hpp"

namespace orrery {
namespace {

constexpr std::size_t kGpusPerNode = 8;

/// Links of GPU g: 4 g + {NVLink up, NVLink down, NIC up, NIC down}.
IdVector<LinkId, Link> links_of(std::size_t nodes) {
  IdVector<LinkId, Link> links;
  for (std::size_t gpu = 0; gpu < nodes * kGpusPerNode; ++gpu) {
    links.insert(links.end(), 2, Link{200e9, 1 * kPsPerUs});
    links.insert(links.end(), 2, Link{50e9, 2 * kPsPerUs});
  }
  return links;
}

void all_to_all(benchmark::State& state) {
  const auto nodes = static_cast<std::size_t>(state.range(0));
  const double expected_us = static_cast<double>(state.range(1));
  const std::size_t gpus = nodes * kGpusPerNode;
  double last_us = 0;
  double recomputations = 0;
  for (auto _ : state) {
    FlowNetwork network(links_of(nodes));
    for (std::size_t a = 0; a < gpus; ++a) {
      for (std::size_t b = 0; b < gpus; ++b) {
        if (a == b) continue;
        const std::size_t kind = a / kGpusPerNode == b / kGpusPerNode ? 0 : 2;
        const std::array path{LinkId(4 * a + kind), LinkId(4 * b + kind + 1)};
        const double bytes = 1e6 * (1 + 0.1 * static_cast<double>((7 * a + 13 * b) % 5));
        network.start(0, path, bytes);
      }
    }
    last_us = static_cast<double>(network.run_until_idle().back().at_ps) / kPsPerUs;
    recomputations = static_cast<double>(network.recomputations());
  }
  if (std::abs(last_us - expected_us) > 0.5) {
    state.SkipWithError("completes at another time than SimGrid says");
  }
  state.counters["flows"] = static_cast<double>(gpus * (gpus - 1));
  state.counters["recomputations"] = recomputations;
  state.counters["completes_us"] = last_us;
}
BENCHMARK(all_to_all)
    ->ArgNames({"nodes", "simgrid_us"})
    ->Args({1, 48})
    ->Args({2, 210})
    ->Args({4, 615})
    ->Args({8, 1423})
    ->Args({16, 3036})
    ->Args({32, 6262})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

}  // namespace
}  // namespace orrery
