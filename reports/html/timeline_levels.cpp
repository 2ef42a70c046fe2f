#include "reports/html/timeline_levels.hpp"

#include <tbb/parallel_for.h>

#include <algorithm>

#include "reports/attribution.hpp"
#include "reports/ops_by_stream.hpp"

namespace orrery {

namespace {

Picoseconds unit_for(Picoseconds step_ps) {
  Picoseconds unit = kPsPerNs;
  while (step_ps / unit >= std::int64_t{1} << 31) unit *= 10;
  return unit;
}

/// Gaps and durations of entries that follow each other. Both ends are rounded, which is monotone,
/// so that what touches in picoseconds touches here.
class Spans {
 public:
  Spans(std::map<std::string, PackedColumn>& level, Picoseconds unit_ps)
      : gap_(level["gap"]), duration_(level["duration"]), unit_ps_(unit_ps) {}

  void push(Picoseconds start_ps, Picoseconds end_ps) {
    const std::int64_t start = (start_ps + unit_ps_ / 2) / unit_ps_;
    const std::int64_t end = (end_ps + unit_ps_ / 2) / unit_ps_;
    gap_.push(start - at_);
    duration_.push(end - start);
    at_ = end;
  }
  void begin_lane() { at_ = 0; }

 private:
  PackedColumn& gap_;
  PackedColumn& duration_;
  Picoseconds unit_ps_;
  std::int64_t at_ = 0;
};

class LevelsBuilder {
 public:
  LevelsBuilder(const Program& program, const Timeline& timeline, bool with_ops)
      : program_(program), timeline_(timeline), with_ops_(with_ops) {
    levels_.step_ps = timeline.makespan_ps();
    levels_.unit_ps = unit_for(levels_.step_ps);
  }

  TimelineLevels build(std::span<const std::uint32_t> ranks, const OpsByStream& by_stream) {
    const auto cells = cell_spans(program_, timeline_);
    Spans cell_spans(levels_.cells, levels_.unit_ps);
    Spans phase_spans(levels_.phases, levels_.unit_ps);
    std::map<std::string, PackedColumn> unused;
    Spans op_spans(with_ops_ ? levels_.ops : unused, levels_.unit_ps);
    for (const std::uint32_t rank : ranks) {
      TimelineRow row{.rank = rank};
      cell_spans.begin_lane();
      row.cells = add_cells(cells[rank], cell_spans);
      for (int k = 0; k < kStreamsPerRank; ++k) {
        const auto kind = static_cast<StreamKind>(k);
        phase_spans.begin_lane();
        op_spans.begin_lane();
        const TimelineLane lane =
            add_lane(kind, by_stream.of(stream_of(RankId(rank), kind)), phase_spans, op_spans);
        if (lane.phases > 0) row.lanes.push_back(lane);
      }
      levels_.rows.push_back(std::move(row));
    }
    return std::move(levels_);
  }

 private:
  std::size_t add_cells(const std::vector<CellSpan>& spans, Spans& to) {
    const std::vector<const CellSpan*> owned = owned_in_order(spans);
    for (const CellSpan* span : owned) {
      const Cell& cell = program_.cells()[span->cell];
      to.push(span->owned_from_ps, span->end_ps);
      levels_.cells["kind"].push(static_cast<std::int64_t>(cell.kind));
      levels_.cells["stage"].push(cell.stage);
      levels_.cells["pair_stage"].push(cell.pair_stage);
      levels_.cells["micro_batch"].push(cell.micro_batch);
      levels_.cells["pair_micro_batch"].push(cell.pair_micro_batch);
    }
    return owned.size();
  }

  TimelineLane add_lane(StreamKind kind, std::span<const OpId> ops, Spans& phases, Spans& singles) {
    TimelineLane lane{.stream = kind};
    PackedColumn& phase = levels_.phases["phase"];
    PackedColumn& layer = levels_.phases["layer"];
    PackedColumn& stage = levels_.phases["stage"];
    PackedColumn& micro_batch = levels_.phases["micro_batch"];
    PackedColumn& count = levels_.phases["ops"];
    for (std::size_t i = 0; i < ops.size();) {
      const OpTag& tag = program_.tag(ops[i]);
      const std::size_t first = i;
      std::size_t shown = 0;
      for (; i < ops.size() && program_.tag(ops[i]) == tag; ++i) {
        if (timeline_.start_ps[ops[i]] == timeline_.end_ps[ops[i]]) continue;
        ++shown;
        if (!with_ops_) continue;
        singles.push(timeline_.start_ps[ops[i]], timeline_.end_ps[ops[i]]);
        levels_.ops["shape"].push(program_.shape(ops[i]).value);
      }
      if (shown == 0) continue;
      phases.push(timeline_.start_ps[ops[first]], timeline_.end_ps[ops[i - 1]]);
      phase.push(static_cast<std::int64_t>(tag.phase));
      layer.push(tag.layer == kNoLayer ? -1 : std::int64_t{tag.layer});
      stage.push(tag.stage);
      micro_batch.push(tag.micro_batch);
      count.push(static_cast<std::int64_t>(shown));
      ++lane.phases;
      lane.ops += shown;
    }
    return lane;
  }

  const Program& program_;
  const Timeline& timeline_;
  bool with_ops_;
  TimelineLevels levels_;
};

}  // namespace

TimelineLevels timeline_levels(const Program& program, const Timeline& timeline,
                               std::span<const std::uint32_t> ranks, std::size_t most_ops) {
  std::vector<bool> chosen(program.ranks(), false);
  for (const std::uint32_t rank : ranks) chosen[rank] = true;
  const OpsByStream by_stream = group_ops(program, chosen);
  return LevelsBuilder(program, timeline, by_stream.ops.size() <= most_ops).build(ranks, by_stream);
}

void write_timeline(JsonWriter& writer, const TimelineLevels& levels, const Program& program) {
  using Level = std::map<std::string, PackedColumn>;
  std::vector<const PackedColumn*> columns;
  for (const Level* level : {&levels.cells, &levels.phases, &levels.ops}) {
    for (const auto& [name, column] : *level) columns.push_back(&column);
  }
  std::vector<std::string> texts(columns.size());
  tbb::parallel_for(std::size_t{0}, columns.size(),
                    [&](std::size_t i) { texts[i] = columns[i]->text(); });

  JsonObject o(writer);
  o("unit_s", seconds(levels.unit_ps));
  o("step", (levels.step_ps + levels.unit_ps / 2) / levels.unit_ps);
  const auto text = [&](std::string_view value) {
    writer.String(value.data(), static_cast<rapidjson::SizeType>(value.size()));
  };
  std::vector<std::string_view> kinds;
  for (int k = 0; k < kCellKinds; ++k) kinds.push_back(name_of(static_cast<CellKind>(k)));
  o.array("cell_kinds", kinds, text);
  std::vector<std::string_view> phases;
  for (int k = 0; k < kPhases; ++k) phases.push_back(name_of(static_cast<Phase>(k)));
  o.array("phases", phases, text);
  if (!levels.ops.empty()) {
    o.array("shapes", program.shapes(), [&](const Shape& shape) {
      JsonObject s(writer);
      s("label", shape.label);
      s("shape", describe(shape));
    });
  }
  o.array("rows", levels.rows, [&](const TimelineRow& row) {
    JsonObject r(writer);
    r("rank", std::int64_t{row.rank});
    r("cells", static_cast<std::int64_t>(row.cells));
    r.array("lanes", row.lanes, [&](const TimelineLane& lane) {
      JsonObject l(writer);
      l("stream", name_of(lane.stream));
      l("phases", static_cast<std::int64_t>(lane.phases));
      l("ops", static_cast<std::int64_t>(lane.ops));
    });
  });
  std::size_t next = 0;
  const auto level = [&](const char* key, const Level& columns_of) {
    if (columns_of.empty()) return;
    JsonObject l(o.name(key));
    for (const auto& [name, column] : columns_of) l(name, texts[next++]);
  };
  level("cell", levels.cells);
  level("phase", levels.phases);
  level("op", levels.ops);
}

}  // namespace orrery
