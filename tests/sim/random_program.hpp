#pragma once
// Programs for tests. Every op has a shape of its own, so ShapeId k is "the k-th op that was added"
// in any numbering that seal() chooses, and its duration can be set freely.

#include <fmt/format.h>
#include <rapidcheck.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "sim/timeline.hpp"

namespace orrery::test {

struct Sketch {
  explicit Sketch(std::size_t ranks) : builder(std::vector<std::int64_t>(ranks, 1)) {}

  OpId op(Picoseconds duration_ps, const std::vector<StreamId>& streams,
          const std::vector<OpId>& predecessors, Phase phase = Phase::attn_forward,
          OpKind kind = OpKind::compute) {
    const ShapeId shape = builder.intern({Mark{}, fmt::format("op{}", builder.size()), 0});
    durations_ps.push_back(duration_ps);
    return builder.add(kind, shape, OpTag{0, 0, 0, phase}, streams, predecessors);
  }

  PriceList prices() const {
    PriceList list;
    for (const Picoseconds duration : durations_ps) {
      list.prices.push_back(Price{duration, PriceSource::measured, 0, false, ""});
    }
    return list;
  }

  ProgramBuilder builder;
  std::vector<Picoseconds> durations_ps;
};

/// A step that can run: ops in an order in which they could happen, each on streams of any ranks
/// and waiting for earlier ones. What a builder makes of it is another matter (see build()).
struct RandomProgram {
  struct Op {
    Picoseconds duration_ps = 0;
    std::vector<StreamId> streams;
    std::vector<std::size_t> predecessors;  ///< smaller indices; may repeat
    bool predecessors_late = false;         ///< told by depend()
  };
  std::size_t ranks = 1;
  std::vector<Op> ops;
};

inline RandomProgram random_program() {
  using rc::gen::inRange;
  RandomProgram program;
  program.ranks = *inRange<std::size_t>(1, 5);
  program.ops.resize(*inRange<std::size_t>(0, 40));
  for (std::size_t i = 0; i < program.ops.size(); ++i) {
    RandomProgram::Op& op = program.ops[i];
    op.duration_ps = *inRange<Picoseconds>(0, 6);  // many zeros and many ties
    std::set<StreamId> streams;
    const auto places = *rc::gen::weightedElement<int>({{1, 0}, {8, 1}, {4, 2}, {2, 4}});
    for (int k = 0; k < places; ++k) {
      const RankId rank(*inRange<std::size_t>(0, program.ranks));
      streams.insert(stream_of(rank, static_cast<StreamKind>(*inRange(0, 3))));
    }
    op.streams.assign(streams.begin(), streams.end());
    if (i > 0) {
      op.predecessors.resize(*inRange<std::size_t>(0, 4));
      for (std::size_t& p : op.predecessors) p = *inRange<std::size_t>(0, i);
    }
    op.predecessors_late = *inRange(0, 4) == 0;
  }
  return program;
}

/// The rank with which build() adds an op: its first.
inline std::size_t home_of(const RandomProgram& program, std::size_t i) {
  const auto& streams = program.ops[i].streams;
  return streams.empty() ? i % program.ranks : rank_of(streams[0]).value;
}

/// The order in which build() adds the ops, rank after rank: an op is added with its first rank, so
/// ids are in another order than time whenever there are several ranks.
inline std::vector<std::size_t> order_of_adding(const RandomProgram& program) {
  std::vector<std::size_t> order;
  for (std::size_t rank = 0; rank < program.ranks; ++rank) {
    for (std::size_t i = 0; i < program.ops.size(); ++i) {
      if (home_of(program, i) == rank) order.push_back(i);
    }
  }
  return order;
}

/// Emits the program rank by rank, as models do: forward references to ops of later ranks,
/// collectives joined when a later rank reaches them.
inline Sketch build(const RandomProgram& program) {
  const std::vector<std::size_t> order = order_of_adding(program);
  std::vector<OpId> id(program.ops.size());
  for (std::size_t k = 0; k < order.size(); ++k) id[order[k]] = OpId(k);

  Sketch s(program.ranks);
  for (std::size_t rank = 0; rank < program.ranks; ++rank) {
    for (std::size_t i = 0; i < program.ops.size(); ++i) {
      const RandomProgram::Op& op = program.ops[i];
      std::vector<StreamId> here;
      for (const StreamId stream : op.streams) {
        if (rank_of(stream).value == rank) here.push_back(stream);
      }
      if (home_of(program, i) == rank) {
        std::vector<OpId> predecessors;
        for (const std::size_t p : op.predecessors) predecessors.push_back(id[p]);
        s.op(op.duration_ps, here, op.predecessors_late ? std::vector<OpId>{} : predecessors);
      } else {
        for (const StreamId stream : here) s.builder.join(id[i], stream);
      }
    }
  }
  for (std::size_t i = 0; i < program.ops.size(); ++i) {
    if (!program.ops[i].predecessors_late) continue;
    for (const std::size_t p : program.ops[i].predecessors) s.builder.depend(id[i], id[p]);
  }
  return s;
}

/// All pairs (earlier, later) that must not overlap, stream order included.
inline std::vector<std::pair<std::size_t, std::size_t>> edges_of(const RandomProgram& program) {
  std::vector<std::pair<std::size_t, std::size_t>> edges;
  for (std::size_t i = 0; i < program.ops.size(); ++i) {
    for (const std::size_t p : program.ops[i].predecessors) edges.emplace_back(p, i);
    for (std::size_t j = 0; j < i; ++j) {
      for (const StreamId stream : program.ops[i].streams) {
        const auto& others = program.ops[j].streams;
        if (std::find(others.begin(), others.end(), stream) != others.end()) {
          edges.emplace_back(j, i);
        }
      }
    }
  }
  return edges;
}

/// Start of every op by relaxing all edges until nothing moves (Bellman-Ford on longest paths).
inline std::vector<Picoseconds> longest_path_starts(const RandomProgram& program) {
  const auto edges = edges_of(program);
  std::vector<Picoseconds> start(program.ops.size(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (const auto& [from, to] : edges) {
      const Picoseconds end = start[from] + program.ops[from].duration_ps;
      if (end > start[to]) {
        start[to] = end;
        moved = true;
      }
    }
  }
  return start;
}

/// (start, end) of the ops in the order of time of RandomProgram, out of a timeline of build()'s
/// program.
inline std::vector<std::pair<Picoseconds, Picoseconds>> spans(const RandomProgram& random,
                                                              const Program& program,
                                                              const Timeline& timeline) {
  const std::vector<std::size_t> order = order_of_adding(random);
  std::vector<std::pair<Picoseconds, Picoseconds>> result(random.ops.size());
  for (OpId op; op.value < program.size(); ++op) {
    result[order[program.shape(op).value]] = {timeline.start_ps[op], timeline.end_ps[op]};
  }
  return result;
}

}  // namespace orrery::test
