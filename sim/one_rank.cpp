#include "sim/one_rank.hpp"

#include <limits>
#include <vector>

#include "sim/check.hpp"

namespace orrery {

Program one_rank_of(const Program& program, RankId rank) {
  ORRERY_CHECK(rank.value < program.ranks(), "rank {} of {}", rank.value, program.ranks());
  constexpr auto kAbsent = std::numeric_limits<std::uint32_t>::max();
  ProgramBuilder builder({1});
  std::vector<std::uint32_t> kept(program.size(), kAbsent);
  const auto cells = program.cells();
  std::size_t next_cell = 0;
  bool in_cell = false;
  std::vector<StreamId> streams;
  std::vector<OpId> predecessors;
  for (std::size_t i = 0; i < program.size(); ++i) {
    const OpId op(i);
    if (in_cell && cells[next_cell].last == op) {
      builder.end_cell();
      ++next_cell;
      in_cell = false;
    }
    if (next_cell < cells.size() && cells[next_cell].first == op) {
      builder.begin_cell(cells[next_cell]);
      in_cell = true;
    }
    streams.clear();
    for (const StreamId stream : program.streams_of(op)) {
      if (rank_of(stream) == rank) streams.push_back(stream_of(RankId(0), kind_of(stream)));
    }
    if (streams.empty()) continue;
    predecessors.clear();
    for (const OpId before : program.predecessors_of(op)) {
      if (kept[before.value] != kAbsent) predecessors.push_back(OpId(kept[before.value]));
    }
    kept[i] = static_cast<std::uint32_t>(builder.size());
    builder.add(program.kind(op), builder.intern(program.shapes()[program.shape(op)]),
                program.tag(op), streams, predecessors);
  }
  if (in_cell) builder.end_cell();
  for (MemoryEffect effect : program.memory_effects()) {
    if (effect.rank != rank) continue;
    effect.op = OpId(kept[effect.op.value]);
    effect.rank = RankId(0);
    builder.memory(effect);
  }
  if (!program.slowdown().empty()) builder.set_slowdown({program.slowdown()[rank.value]});
  return std::move(builder).seal();
}

}  // namespace orrery
