// Cost per op of building, sealing, sweeping and simulating a Program of two million ops; compare
// with the limits of the machine (a bare struct-of-arrays sweep: 16-30 ns, a bare event engine: 150
// ns).
//
//   engine_bench --benchmark_counters_tabular=true

#include <benchmark/benchmark.h>

#include <array>
#include <chrono>
#include <vector>

#include "sim/critical_path.hpp"
#include "sim/memory.hpp"
#include "sim/timeline.hpp"

namespace orrery {
namespace {

constexpr std::size_t kRanks = 128;
constexpr std::size_t kOps = 2'000'000;

/// Layers of attention, dispatch, experts, combine on two streams of every rank, and a transfer to
/// the next rank after every layer: 1.3 predecessors per op. `by_rank`: emitted rank after rank, so
/// that receivers refer forward and everything is renumbered; else in an order in which it could
/// happen.
struct Synthetic {
  explicit Synthetic(bool by_rank) : builder(std::vector<std::int64_t>(kRanks, 1)) {
    for (std::size_t i = 0; i < 200; ++i) {
      shapes.push_back(builder.intern(
          {Gemm{NumberFormat::bf16, Pass::forward, false, 1, static_cast<std::int64_t>(i), 1, 1},
           "synthetic", 112}));
    }
    builder.reserve(kOps, kOps * 4 / 3);
    if (by_rank) {
      for (std::size_t rank = kRanks; rank-- > 0;) {
        for (std::size_t layer = 0; layer < kLayers; ++layer) add_layer(rank, layer, true);
      }
    } else {
      for (std::size_t layer = 0; layer < kLayers; ++layer) {
        for (std::size_t rank = 0; rank < kRanks; ++rank) add_layer(rank, layer, false);
      }
    }
  }

  static constexpr std::size_t kOpsPerLayer = 10;
  static constexpr std::size_t kLayers = kOps / kRanks / kOpsPerLayer;

  /// Id of the k-th op of a layer.
  OpId id(std::size_t rank, std::size_t layer, std::size_t k, bool by_rank) const {
    const std::size_t block =
        by_rank ? (kRanks - 1 - rank) * kLayers + layer : layer * kRanks + rank;
    return OpId(block * kOpsPerLayer + k);
  }

  void add_layer(std::size_t rank, std::size_t layer, bool by_rank) {
    const RankId r(rank);
    const std::array compute{stream_of(r, StreamKind::compute)};
    const std::array exchange{stream_of(r, StreamKind::expert_exchange)};
    const OpTag tag{static_cast<std::uint16_t>(layer % 128), static_cast<std::uint16_t>(layer % 61),
                    static_cast<std::uint16_t>(rank), Phase::mlp_forward};
    const auto shape = [&](std::size_t k) { return shapes[(layer * 7 + k * 31 + rank) % 200]; };
    const auto op = [&](std::size_t k) { return id(rank, layer, k, by_rank); };
    const auto add = [&](std::size_t k, const auto& streams, std::initializer_list<OpId> waits) {
      builder.add(OpKind::compute, shape(k), tag, streams, std::span(waits.begin(), waits.size()));
    };
    if (rank > 0 && layer > 0) {
      add(0, compute, {id(rank - 1, layer - 1, 9, by_rank)});
    } else {
      add(0, compute, {});
    }
    builder.memory({op(0), r, MemoryKind::activations, false, 1000});
    add(1, compute, {op(0)});
    add(2, exchange, {op(1)});
    add(3, compute, {op(1)});
    add(4, compute, {op(2), op(3)});
    add(5, compute, {op(4)});
    add(6, exchange, {op(4), op(5)});
    add(7, compute, {op(5), op(3)});
    add(8, compute, {op(6), op(7)});
    builder.memory({op(8), r, MemoryKind::activations, true, -1000});
    const std::array link{stream_of(r, StreamKind::send_next),
                          stream_of(RankId((rank + 1) % kRanks), StreamKind::receive_previous)};
    // Rank by rank the receiver would join later; that the sender names both streams is enough
    // here.
    builder.add(OpKind::transfer, shape(9), tag, link, std::array{op(8)});
  }

  PriceList prices() const {
    PriceList list;
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      list.prices.push_back({static_cast<Picoseconds>(1'000 + i * 7'919 % 50'000),
                             PriceSource::derived, 0, false, ""});
    }
    return list;
  }

  ProgramBuilder builder;
  std::vector<ShapeId> shapes;
};

void count(benchmark::State& state, std::size_t ops) {
  state.counters["s/op"] =
      benchmark::Counter(static_cast<double>(ops), benchmark::Counter::kIsIterationInvariantRate |
                                                       benchmark::Counter::kInvert);
}

void build(benchmark::State& state) {
  std::size_t ops = 0;
  for (auto _ : state) {
    Synthetic s(false);
    ops = s.builder.size();
    benchmark::DoNotOptimize(ops);
  }
  count(state, ops);
}
BENCHMARK(build)->Unit(benchmark::kMillisecond)->UseRealTime();

void seal(benchmark::State& state, bool by_rank) {
  std::size_t ops = 0;
  for (auto _ : state) {
    Synthetic s(by_rank);
    const auto begin = std::chrono::steady_clock::now();
    const Program program = std::move(s.builder).seal();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    state.SetIterationTime(took.count());
    ops = program.size();
  }
  count(state, ops);
}
BENCHMARK_CAPTURE(seal, ascending, false)->Unit(benchmark::kMillisecond)->UseManualTime();
BENCHMARK_CAPTURE(seal, renumbering, true)->Unit(benchmark::kMillisecond)->UseManualTime();

template <class Function>
void on_sealed(benchmark::State& state, Function function) {
  Synthetic s(false);
  const PriceList prices = s.prices();
  const Program program = std::move(s.builder).seal();
  std::size_t predecessors = 0;
  for (OpId op; op.value < program.size(); ++op) predecessors += program.predecessors_of(op).size();
  const Timeline timeline = sweep(program, prices);
  for (auto _ : state) benchmark::DoNotOptimize(function(program, prices, timeline));
  const auto ops = static_cast<double>(program.size());
  count(state, program.size());
  const std::size_t effects = program.memory_effects().size() * sizeof(MemoryEffect);
  state.counters["bytes/op"] =
      static_cast<double>(program.memory_bytes() - effects) / ops + 2 * sizeof(Picoseconds);
  state.counters["predecessors/op"] = static_cast<double>(predecessors) / ops;
}

void sweep_2m(benchmark::State& state) {
  on_sealed(state, [](const Program& program, const PriceList& prices, const Timeline&) {
    return sweep(program, prices).end_ps.back();
  });
}
BENCHMARK(sweep_2m)->Unit(benchmark::kMillisecond)->UseRealTime();

void simulate_2m(benchmark::State& state) {
  on_sealed(state, [](const Program& program, const PriceList& prices, const Timeline&) {
    return simulate(program, prices).end_ps.back();
  });
}
BENCHMARK(simulate_2m)->Unit(benchmark::kMillisecond)->UseRealTime();

void fingerprint_2m(benchmark::State& state) {
  on_sealed(state, [](const Program&, const PriceList&, const Timeline& timeline) {
    return timeline.fingerprint();
  });
}
BENCHMARK(fingerprint_2m)->Unit(benchmark::kMillisecond)->UseRealTime();

void trace_memory_2m(benchmark::State& state) {
  on_sealed(state, [](const Program& program, const PriceList&, const Timeline& timeline) {
    return trace_memory(program, timeline).peaks.size();
  });
}
BENCHMARK(trace_memory_2m)->Unit(benchmark::kMillisecond)->UseRealTime();

void critical_path_2m(benchmark::State& state) {
  on_sealed(state, [](const Program& program, const PriceList&, const Timeline& timeline) {
    return find_critical_path(program, timeline).ops.size();
  });
}
BENCHMARK(critical_path_2m)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace orrery
