// One collective with every transfer as a flow of its own, on fabrics of 2048 GPUs that do not
// limit it and one of 1024 with leaves 3:1 that does. Reading the fabric and its shortest-path
// trees are not counted.
//
//   collective_flows_bench --benchmark_counters_tabular=true

#include <benchmark/benchmark.h>

#include <string>
#include <utility>
#include <vector>

#include "sim/collective_flows.hpp"
#include "tests/sim/networks_for_tests.hpp"

namespace orrery {
namespace {

void run(benchmark::State& state, const std::string& machine, const std::string& fabric_name,
         const Shape& shape, std::size_t gpus, std::size_t step, Picoseconds price_ps) {
  const Cluster cluster = test::cluster_named(machine);
  const Fabric fabric = test::fabric_named(fabric_name);
  std::vector<GpuId> members;
  for (std::size_t node = 0; 8 * node < gpus; ++node) {
    for (std::size_t i = 0; i < 8; ++i) members.emplace_back(8 * step * node + i);
  }
  Picoseconds time_ps = time_as_flows(shape, members, price_ps, cluster, fabric);
  for (auto _ : state) {
    benchmark::DoNotOptimize(time_ps = time_as_flows(shape, members, price_ps, cluster, fabric));
  }
  state.counters["over_price"] = static_cast<double>(time_ps) / static_cast<double>(price_ps);
}

/// DeepSeek-V3's, in 1.8 ms; neighbouring nodes, and nodes under all leaves.
void ep64_dispatch(benchmark::State& state) {
  ExpertExchange e;
  e.format = NumberFormat::fp8_block;
  e.tokens = 4096;
  e.hidden = 7168;
  e.top_k = 8;
  e.experts = 256;
  e.ep = 64;
  e.gpus_per_node = 8;
  e.node_limit = 4;
  const auto step = static_cast<std::size_t>(state.range(0));
  run(state, "h800_2048", "h800_2048_mpft", {.work = e}, 64, step, 1'800 * kPsPerUs);
}
BENCHMARK(ep64_dispatch)->ArgName("step")->Arg(1)->Arg(32)->Unit(benchmark::kMillisecond);

const Shape kAllToAll{.work = Collective{CollectiveKind::all_to_all, 1 << 28, 512, 8}};

void all_to_all_512(benchmark::State& state) {
  run(state, "h800_2048", "h800_2048_mpft", kAllToAll, 512, 1, 8'000 * kPsPerUs);
}
BENCHMARK(all_to_all_512)->Unit(benchmark::kMillisecond);

void all_to_all_512_three_to_one(benchmark::State& state) {
  run(state, "h100_1024", "h100_1024_3to1", kAllToAll, 512, 2, 8'000 * kPsPerUs);
}
BENCHMARK(all_to_all_512_three_to_one)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace orrery
