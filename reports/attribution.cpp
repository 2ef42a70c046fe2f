#include "reports/attribution.hpp"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <span>

namespace orrery {

namespace {

struct Interval {
  Picoseconds start = 0;
  Picoseconds end = 0;
};

constexpr int kComputeStreams = 2;  // compute and weight_gradient come first
static_assert(static_cast<int>(StreamKind::compute) == 0 &&
              static_cast<int>(StreamKind::weight_gradient) == 1);

/// When each stream was busy: ascending, and disjoint since ops that follow each other without a
/// pause make up one interval (so most of them do).
using BusyTimes = IdVector<StreamId, std::vector<Interval>>;

BusyTimes busy_times(const Program& program, const Timeline& timeline) {
  BusyTimes busy(program.streams());
  for (OpId op{}; op.value < program.size(); ++op) {
    const Interval ran{timeline.start_ps[op], timeline.end_ps[op]};
    if (ran.start == ran.end) continue;
    for (const StreamId stream : program.streams_of(op)) {
      std::vector<Interval>& before = busy[stream];
      if (!before.empty() && ran.start <= before.back().end) {
        before.back().end = std::max(before.back().end, ran.end);
      } else {
        before.push_back(ran);
      }
    }
  }
  return busy;
}

/// The union of two ascending lists as disjoint ascending intervals. `out` is overwritten.
void unite(std::span<const Interval> a, std::span<const Interval> b, std::vector<Interval>& out) {
  out.clear();
  std::size_t i = 0;
  std::size_t j = 0;
  while (i < a.size() || j < b.size()) {
    const bool from_a = j == b.size() || (i < a.size() && a[i].start <= b[j].start);
    const Interval& next = from_a ? a[i++] : b[j++];
    if (!out.empty() && next.start <= out.back().end) {
      out.back().end = std::max(out.back().end, next.end);
    } else {
      out.push_back(next);
    }
  }
}

/// When any of a rank's streams of these kinds was busy.
std::vector<Interval> unite_streams(const BusyTimes& busy, RankId rank, int first_kind,
                                    int last_kind) {
  std::vector<Interval> united, scratch;
  for (int kind = first_kind; kind < last_kind; ++kind) {
    const auto& stream = busy[stream_of(rank, static_cast<StreamKind>(kind))];
    if (stream.empty()) continue;
    unite(united, stream, scratch);
    united.swap(scratch);
  }
  return united;
}

/// The streams whose work is exposed by this cause, as [first, last).
std::pair<int, int> streams_of(Exposed cause) {
  const auto range = [](StreamKind first, StreamKind last) {
    return std::pair(static_cast<int>(first), static_cast<int>(last) + 1);
  };
  switch (cause) {
    case Exposed::expert:
      return range(StreamKind::expert_exchange, StreamKind::expert_exchange);
    case Exposed::tensor:
      return range(StreamKind::tensor, StreamKind::tensor);
    case Exposed::data:
      return range(StreamKind::data, StreamKind::storage);
    case Exposed::pipeline:
      return range(StreamKind::send_next, StreamKind::receive_next);
  }
  return {0, 0};
}

/// a \ b, both disjoint ascending. `out` is overwritten.
void subtract(std::span<const Interval> a, std::span<const Interval> b,
              std::vector<Interval>& out) {
  out.clear();
  std::size_t j = 0;
  for (const Interval& i : a) {
    Picoseconds from = i.start;
    while (j < b.size() && b[j].end <= from) ++j;
    for (std::size_t k = j; k < b.size() && b[k].start < i.end; ++k) {
      if (b[k].start > from) out.push_back({from, b[k].start});
      from = std::max(from, b[k].end);
    }
    if (from < i.end) out.push_back({from, i.end});
  }
}

/// Length of `window` within disjoint ascending intervals; `next` is where the search goes on,
/// windows must come in ascending order.
Picoseconds overlap(const Interval& window, std::span<const Interval> intervals,
                    std::size_t& next) {
  while (next < intervals.size() && intervals[next].end <= window.start) ++next;
  Picoseconds sum = 0;
  for (std::size_t i = next; i < intervals.size() && intervals[i].start < window.end; ++i) {
    sum += std::min(intervals[i].end, window.end) - std::max(intervals[i].start, window.start);
  }
  return sum;
}

}  // namespace

std::vector<std::vector<CellSpan>> cell_spans(const Program& program, const Timeline& timeline) {
  const auto cells = program.cells();
  std::vector<std::vector<CellSpan>> spans(program.ranks());
  constexpr auto kNever = std::numeric_limits<std::uint32_t>::max();
  // The cell each rank is in, side by side: that is the memory every op touches.
  std::vector<CellSpan> current(program.ranks(), CellSpan{.cell = kNever});
  for (std::uint32_t c = 0; c < cells.size(); ++c) {
    for (OpId op = cells[c].first; op < cells[c].last; ++op) {
      const Picoseconds start = timeline.start_ps[op];
      const Picoseconds end = timeline.end_ps[op];
      if (start == end) continue;
      for (const StreamId s : program.streams_of(op)) {
        const std::uint32_t rank = rank_of(s).value;
        CellSpan& span = current[rank];
        if (span.cell != c) {
          if (span.cell != kNever) spans[rank].push_back(span);
          span = {c, start, end, start};
        } else {
          span.start_ps = std::min(span.start_ps, start);
          span.end_ps = std::max(span.end_ps, end);
        }
      }
    }
  }
  for (std::size_t rank = 0; rank < spans.size(); ++rank) {
    if (current[rank].cell != kNever) spans[rank].push_back(current[rank]);
  }
  for (auto& of_rank : spans) {
    const auto is_optimizer = [&](const CellSpan& s) {
      return cells[s.cell].kind == CellKind::optimizer;
    };
    const auto by_start = [](const CellSpan& a, const CellSpan& b) {
      return a.start_ps != b.start_ps ? a.start_ps < b.start_ps : a.cell < b.cell;
    };
    std::sort(of_rank.begin(), of_rank.end(), by_start);
    Picoseconds covered_until = 0;
    for (CellSpan& span : of_rank) {
      if (is_optimizer(span)) continue;
      span.owned_from_ps = std::max(span.start_ps, covered_until);
      covered_until = std::max(covered_until, span.end_ps);
    }
    for (CellSpan& span : of_rank) {
      if (!is_optimizer(span)) continue;
      span.owned_from_ps = std::max(span.start_ps, covered_until);
      covered_until = std::max(covered_until, span.end_ps);
    }
  }
  return spans;
}

Picoseconds Attribution::sum_ps() const {
  return std::accumulate(covered_ps.begin(), covered_ps.end(), exposed_sum_ps() + bubble_ps);
}

Picoseconds Attribution::exposed_sum_ps() const {
  return std::accumulate(exposed_ps.begin(), exposed_ps.end(), Picoseconds{0});
}

namespace {

Attribution attribute_rank(std::span<const Cell> cells, const std::vector<CellSpan>& spans,
                           const BusyTimes& busy_times, RankId rank, Picoseconds makespan) {
  // Starts as what computation hides; whatever a cause exposes is not exposed by the next one.
  std::vector<Interval> busy = unite_streams(busy_times, rank, 0, kComputeStreams);
  std::array<std::vector<Interval>, kExposed> exposed;
  for (std::size_t cause = 0; cause < kExposed; ++cause) {
    const auto [first, last] = streams_of(static_cast<Exposed>(cause));
    const std::vector<Interval> streams = unite_streams(busy_times, rank, first, last);
    if (streams.empty()) continue;
    subtract(streams, busy, exposed[cause]);
    std::vector<Interval> united;
    unite(busy, streams, united);
    busy = std::move(united);
  }

  Attribution of_rank;
  Picoseconds covered = 0;
  std::array<std::size_t, kExposed> next_exposed{};
  std::size_t next_busy = 0;
  const auto take = [&](const CellSpan& span) {
    const auto kind = static_cast<std::size_t>(cells[span.cell].kind);
    of_rank.span_ps[kind] += span.end_ps - span.start_ps;
    ++of_rank.cells[kind];
    const Interval owned{span.owned_from_ps, span.end_ps};
    if (owned.start >= owned.end) return;
    Picoseconds length = owned.end - owned.start;
    if (cells[span.cell].kind == CellKind::optimizer) length = overlap(owned, busy, next_busy);
    Picoseconds hidden_by_nothing = 0;
    for (std::size_t cause = 0; cause < kExposed; ++cause) {
      const Picoseconds time = overlap(owned, exposed[cause], next_exposed[cause]);
      of_rank.exposed_by_ps[cause] += time;
      hidden_by_nothing += time;
    }
    of_rank.exposed_ps[kind] += hidden_by_nothing;
    of_rank.covered_ps[kind] += length - hidden_by_nothing;
    covered += length;
  };
  // What the optimizer owns comes after what the others own, so both passes ascend in time.
  for (const CellSpan& span : spans) {
    if (cells[span.cell].kind != CellKind::optimizer) take(span);
  }
  for (const CellSpan& span : spans) {
    if (cells[span.cell].kind == CellKind::optimizer) take(span);
  }
  of_rank.bubble_ps = makespan - covered;
  return of_rank;
}

}  // namespace

std::vector<const CellSpan*> owned_in_order(const std::vector<CellSpan>& spans) {
  std::vector<const CellSpan*> owned;
  for (const CellSpan& span : spans) {
    if (span.owned_from_ps < span.end_ps) owned.push_back(&span);
  }
  std::stable_sort(owned.begin(), owned.end(), [](const CellSpan* a, const CellSpan* b) {
    return a->owned_from_ps < b->owned_from_ps;
  });
  return owned;
}

std::vector<Attribution> attribute(const Program& program, const Timeline& timeline,
                                   const std::vector<std::vector<CellSpan>>& spans) {
  const Picoseconds makespan = timeline.makespan_ps();
  const BusyTimes busy = busy_times(program, timeline);
  std::vector<Attribution> result(program.ranks());
  tbb::parallel_for(std::size_t{0}, program.ranks(), [&](std::size_t rank) {
    result[rank] = attribute_rank(program.cells(), spans[rank], busy, RankId(rank), makespan);
  });
  return result;
}

}  // namespace orrery
