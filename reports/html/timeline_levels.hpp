#pragma once
// A Timeline in three levels of detail, for a page that zooms: cells (F12, F12&B3), phases
// (attn(F), dispatch(F): runs of ops with the same tag) and ops. Each level is exact over the whole
// step, not a sample; what makes it small is that neighbours are alike (PackedColumn): the 937,000
// ops of DeepSeek-V3's step take a quarter of a megabyte.

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "reports/html/packed.hpp"
#include "reports/json_object.hpp"
#include "sim/program.hpp"
#include "sim/timeline.hpp"

namespace orrery {

/// One stream of a row, and how many entries of the columns are its.
struct TimelineLane {
  StreamKind stream{};
  std::size_t phases = 0;
  std::size_t ops = 0;
};

struct TimelineRow {
  std::uint32_t rank = 0;
  std::size_t cells = 0;
  std::vector<TimelineLane> lanes;  ///< those with ops
};

/// Columns hold the rows one after another, within a row lane after lane. `gap` is from the end of
/// the entry before it in its lane (the step's begin for the first), in units, as is `duration`.
struct TimelineLevels {
  Picoseconds unit_ps = 0;  ///< a power of ten; the step has fewer than 2^31
  Picoseconds step_ps = 0;
  std::vector<TimelineRow> rows;
  /// gap, duration, kind, stage, pair_stage, micro_batch, pair_micro_batch
  std::map<std::string, PackedColumn> cells;
  /// gap, duration, phase, layer (-1: none), stage, micro_batch, ops (how many, of the next level)
  std::map<std::string, PackedColumn> phases;
  /// gap, duration, shape (ShapeId); empty where there are more than kMostTimelineOps
  std::map<std::string, PackedColumn> ops;
};

inline constexpr std::size_t kMostTimelineOps = 4'000'000;

/// Of these simulated ranks, in this order. Ops that took no time are left out.
TimelineLevels timeline_levels(const Program& program, const Timeline& timeline,
                               std::span<const std::uint32_t> ranks,
                               std::size_t most_ops = kMostTimelineOps);

/// The columns' texts are made in parallel.
void write_timeline(JsonWriter& writer, const TimelineLevels& levels, const Program& program);

}  // namespace orrery
