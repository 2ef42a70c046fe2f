#pragma once
// Small programs for tests of reports: cells whose ops have given durations.

#include <fmt/format.h>

#include <string>
#include <utility>
#include <vector>

#include "sim/price.hpp"
#include "sim/program.hpp"
#include "sim/timeline.hpp"

namespace orrery::test {

/// Every op has a shape of its own, so its duration can be set freely.
struct Sketch {
  explicit Sketch(std::size_t ranks) : builder(std::vector<std::int64_t>(ranks, 1)) {}

  OpId op(Picoseconds duration_ps, const std::vector<StreamId>& streams,
          const std::vector<OpId>& predecessors = {}, OpTag tag = {}) {
    const StreamKind stream = kind_of(streams.front());
    const bool computes = stream == StreamKind::compute || stream == StreamKind::weight_gradient;
    const bool sends = stream == StreamKind::send_next || stream == StreamKind::send_previous;
    const std::string label = fmt::format("op \"{}\"", builder.size());  // quotes must be escaped
    const ShapeId shape = builder.intern({Streaming{StreamingKind::copy, 1, 1, 1}, label, 0});
    prices.prices.push_back({.time_ps = duration_ps, .source = PriceSource::derived});
    return builder.add(computes ? OpKind::compute
                       : sends  ? OpKind::transfer
                                : OpKind::collective,
                       shape, tag, streams, predecessors);
  }
  void begin(CellKind kind, std::uint16_t micro_batch = 0) {
    builder.begin_cell({.kind = kind, .micro_batch = micro_batch});
  }
  void end() { builder.end_cell(); }

  /// Call once. No op waits for one added after it, so ids and prices keep their order.
  std::pair<Program, Timeline> run() {
    Program program = std::move(builder).seal();
    Timeline timeline = sweep(program, prices);
    return {std::move(program), std::move(timeline)};
  }

  ProgramBuilder builder;
  PriceList prices;
};

inline StreamId on(StreamKind kind, std::size_t rank = 0) {
  return stream_of(RankId(rank), kind);
}

}  // namespace orrery::test
