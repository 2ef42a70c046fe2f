#include "sim/program.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>

#include "sim/check.hpp"

namespace orrery {

namespace {

constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

template <class T>
std::size_t bytes_of_array(const std::vector<T>& array) {
  return array.capacity() * sizeof(T);
}

/// `from` must end before `to` starts; `stream`: because of the order on that stream, or kNone.
struct Edge {
  std::uint32_t from = 0;
  std::uint32_t to = 0;
  std::uint32_t stream = kNone;
};

/// The edges of one cycle of a graph of `nodes` nodes, each edge's `to` the next one's `from`, that
/// with the smallest `to` first; empty if there is none. Only runs to explain a failure.
std::vector<Edge> find_cycle(std::size_t nodes, const std::vector<Edge>& edges) {
  std::vector<std::vector<std::uint32_t>> successors(nodes);
  std::vector<std::uint32_t> waits(nodes, 0);
  for (const Edge& e : edges) {
    successors[e.from].push_back(e.to);
    ++waits[e.to];
  }
  std::vector<std::uint32_t> ready;
  for (std::uint32_t n = 0; n < nodes; ++n) {
    if (waits[n] == 0) ready.push_back(n);
  }
  while (!ready.empty()) {
    const std::uint32_t n = ready.back();
    ready.pop_back();
    for (const std::uint32_t s : successors[n]) {
      if (--waits[s] == 0) ready.push_back(s);
    }
  }
  // What is left waits for something that is left: following those edges back must close a circle.
  std::vector<std::uint32_t> blocked_by(nodes, kNone);  // index of an edge
  for (std::uint32_t i = 0; i < edges.size(); ++i) {
    const Edge& e = edges[i];
    if (waits[e.from] == 0 || waits[e.to] == 0) continue;
    std::uint32_t& by = blocked_by[e.to];
    if (by == kNone || e.from < edges[by].from) by = i;
  }
  const auto first = std::find_if(waits.begin(), waits.end(), [](auto w) { return w > 0; });
  if (first == waits.end()) return {};
  std::vector<bool> seen(nodes, false);
  auto n = static_cast<std::uint32_t>(first - waits.begin());
  for (; !seen[n]; n = edges[blocked_by[n]].from) seen[n] = true;
  std::vector<Edge> cycle;
  const std::uint32_t start = n;
  do {
    cycle.push_back(edges[blocked_by[n]]);
    n = cycle.back().from;
  } while (n != start);
  const auto smallest = std::min_element(cycle.begin(), cycle.end(),
                                         [](const Edge& a, const Edge& b) { return a.to < b.to; });
  std::rotate(cycle.begin(), smallest, cycle.end());
  return cycle;
}

std::string_view direction_of(Phase phase) {
  switch (phase) {
    case Phase::embedding_forward:
    case Phase::attn_forward:
    case Phase::mlp_forward:
    case Phase::dispatch_forward:
    case Phase::combine_forward:
    case Phase::head_forward:
    case Phase::pipeline_forward:
      return "F";
    case Phase::head_backward:
    case Phase::combine_backward:
    case Phase::mlp_backward:
    case Phase::dispatch_backward:
    case Phase::attn_backward:
    case Phase::embedding_backward:
    case Phase::pipeline_backward:
      return "B";
    case Phase::head_weight:
    case Phase::mlp_weight:
    case Phase::attn_weight:
      return "W";
    case Phase::tensor_exchange:
      return "micro-batch ";
    case Phase::gradient_sync:
    case Phase::parameter_gather:
    case Phase::optimizer:
    case Phase::checkpoint:
      return "";  // once per step
  }
  return "";
}

std::string describe_stream(StreamId stream) {
  return fmt::format("rank {} {}", rank_of(stream).value, name_of(kind_of(stream)));
}

}  // namespace

std::string_view name_of(OpKind kind) {
  switch (kind) {
    case OpKind::compute:
      return "compute";
    case OpKind::transfer:
      return "transfer";
    case OpKind::collective:
      return "collective";
    case OpKind::sync:
      return "sync";
  }
  return "?";
}

std::string_view name_of(StreamKind kind) {
  switch (kind) {
    case StreamKind::compute:
      return "compute";
    case StreamKind::weight_gradient:
      return "weight_gradient";
    case StreamKind::expert_exchange:
      return "expert_exchange";
    case StreamKind::tensor:
      return "tensor";
    case StreamKind::send_next:
      return "send_next";
    case StreamKind::send_previous:
      return "send_previous";
    case StreamKind::receive_previous:
      return "receive_previous";
    case StreamKind::receive_next:
      return "receive_next";
    case StreamKind::data:
      return "data";
    case StreamKind::storage:
      return "storage";
  }
  return "?";
}

std::string_view name_of(Phase phase) {
  switch (phase) {
    case Phase::embedding_forward:
      return "embedding(F)";
    case Phase::attn_forward:
      return "attn(F)";
    case Phase::mlp_forward:
      return "mlp(F)";
    case Phase::dispatch_forward:
      return "dispatch(F)";
    case Phase::combine_forward:
      return "combine(F)";
    case Phase::head_forward:
      return "head(F)";
    case Phase::head_backward:
      return "head(B)";
    case Phase::head_weight:
      return "head(W)";
    case Phase::combine_backward:
      return "combine(B)";
    case Phase::mlp_backward:
      return "mlp(B)";
    case Phase::mlp_weight:
      return "mlp(W)";
    case Phase::dispatch_backward:
      return "dispatch(B)";
    case Phase::attn_backward:
      return "attn(B)";
    case Phase::attn_weight:
      return "attn(W)";
    case Phase::embedding_backward:
      return "embedding(B)";
    case Phase::pipeline_forward:
      return "PP(F)";
    case Phase::pipeline_backward:
      return "PP(B)";
    case Phase::tensor_exchange:
      return "tensor";
    case Phase::gradient_sync:
      return "gradient_sync";
    case Phase::parameter_gather:
      return "parameter_gather";
    case Phase::optimizer:
      return "optimizer";
    case Phase::checkpoint:
      return "checkpoint";
  }
  return "?";
}

std::string_view name_of(CellKind kind) {
  switch (kind) {
    case CellKind::forward:
      return "forward";
    case CellKind::backward:
      return "backward";
    case CellKind::backward_input:
      return "backward_input";
    case CellKind::weight:
      return "weight";
    case CellKind::overlapped:
      return "overlapped";
    case CellKind::optimizer:
      return "optimizer";
  }
  return "?";
}

std::string_view name_of(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::parameters:
      return "parameters";
    case MemoryKind::gradients:
      return "gradients";
    case MemoryKind::optimizer_state:
      return "optimizer_state";
    case MemoryKind::activations:
      return "activations";
    case MemoryKind::workspace:
      return "workspace";
    case MemoryKind::communication_buffers:
      return "communication_buffers";
  }
  return "?";
}

IdVector<ShapeId, std::int64_t> Program::shape_counts() const {
  IdVector<ShapeId, std::int64_t> counts(shapes_.size(), 0);
  for (const ShapeId shape : shape_) ++counts[shape];
  return counts;
}

std::string Program::name(OpId op) const {
  std::vector<std::uint32_t> ranks;
  for (const StreamId stream : streams_of(op)) ranks.push_back(rank_of(stream).value);
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());

  std::string text = "no rank";
  if (ranks.size() == 1) {
    text = fmt::format("rank {}", ranks[0]);
  } else if (ranks.size() > 1 && ranks.back() - ranks.front() + 1 == ranks.size()) {
    text = fmt::format("ranks {}-{}", ranks.front(), ranks.back());
  } else if (ranks.size() == 2) {
    text = fmt::format("ranks {} and {}", ranks.front(), ranks.back());
  } else if (ranks.size() > 2) {
    text = fmt::format("rank {} and {} others", ranks.front(), ranks.size() - 1);
  }
  const OpTag& t = tag(op);
  if (const std::string_view direction = direction_of(t.phase); !direction.empty()) {
    text += fmt::format(" {}{}", direction, t.micro_batch);
  }
  if (t.layer != kNoLayer) text += fmt::format(" layer {}", t.layer);
  text += fmt::format(" {}", name_of(t.phase));
  if (const std::string& label = shapes_[shape(op)].label; !label.empty()) text += " " + label;
  return text;
}

std::size_t Program::memory_bytes() const {
  return bytes_of_array(kind_) + bytes_of_array(shape_) + bytes_of_array(tag_) +
         bytes_of_array(stream_begin_) + bytes_of_array(streams_) +
         bytes_of_array(predecessor_begin_) + bytes_of_array(predecessors_) +
         bytes_of_array(shapes_) + bytes_of_array(cells_) + bytes_of_array(memory_effects_) +
         bytes_of_array(multiplicity_) + bytes_of_array(slowdown_) + bytes_of_array(load_rows_) +
         bytes_of_array(member_loads_);
}

std::span<const std::uint32_t> Program::member_loads(OpId op) const {
  if (load_rows_.empty()) return {};
  const auto row = std::lower_bound(load_rows_.begin(), load_rows_.end(), op,
                                    [](const LoadRow& r, OpId wanted) { return r.op < wanted; });
  if (row == load_rows_.end() || row->op != op) return {};
  return {member_loads_.data() + row->begin, streams_of(op).size()};
}

ProgramBuilder::ProgramBuilder(std::vector<std::int64_t> multiplicity) {
  program_.ranks_ = multiplicity.size();
  program_.multiplicity_ = std::move(multiplicity);
  program_.stream_begin_.push_back(0);
  program_.predecessor_begin_.push_back(0);
}

void ProgramBuilder::set_slowdown(std::vector<double> slowdown) {
  ORRERY_CHECK(slowdown.empty() || slowdown.size() == program_.ranks_, "{} factors for {} ranks",
               slowdown.size(), program_.ranks_);
  for (const double factor : slowdown) ORRERY_CHECK(factor > 0, "slowdown {}", factor);
  program_.slowdown_ = std::move(slowdown);
}

void ProgramBuilder::member_loads(OpId op, std::span<const std::uint32_t> per_mille) {
  program_.load_rows_.push_back({op, static_cast<std::uint32_t>(program_.member_loads_.size())});
  program_.member_loads_.insert(program_.member_loads_.end(), per_mille.begin(), per_mille.end());
}

void ProgramBuilder::reserve(std::size_t ops, std::size_t predecessors) {
  program_.kind_.reserve(ops);
  program_.shape_.reserve(ops);
  program_.tag_.reserve(ops);
  program_.stream_begin_.reserve(ops + 1);
  program_.streams_.reserve(ops + ops / 4);  // most ops sit on one stream
  program_.predecessor_begin_.reserve(ops + 1);
  program_.predecessors_.reserve(predecessors);
}

ShapeId ProgramBuilder::intern(const Shape& shape) {
  const auto [at, is_new] = interned_.try_emplace(shape, ShapeId(program_.shapes_.size()));
  if (is_new) program_.shapes_.push_back(shape);
  return at->second;
}

void ProgramBuilder::join(OpId op, StreamId stream) {
  ORRERY_CHECK(op.value < size(), "join of op {} of {}", op.value, size());
  const bool joined_since = !late_joins_.empty() && late_joins_.back().after == size();
  if (op.value + 1 == size() && !joined_since) {  // as if add() had been given this stream
    program_.streams_.push_back(stream);
    ++program_.stream_begin_.back();
  } else {
    late_joins_.push_back({op, stream, size()});
  }
}

void ProgramBuilder::depend(OpId op, OpId predecessor) {
  ORRERY_CHECK(op.value < size(), "depend of op {} of {}", op.value, size());
  if (op.value + 1 == size()) {
    program_.predecessors_.push_back(predecessor);
    ++program_.predecessor_begin_.back();
  } else {
    late_predecessors_.push_back({op, predecessor});
  }
}

void ProgramBuilder::begin_cell(const Cell& cell) {
  ORRERY_CHECK(!in_cell_, "begin_cell within a cell, at op {}", size());
  in_cell_ = true;
  program_.cells_.push_back(cell);
  program_.cells_.back().first = OpId(size());
}

void ProgramBuilder::end_cell() {
  ORRERY_CHECK(in_cell_, "end_cell without begin_cell, at op {}", size());
  in_cell_ = false;
  Cell& cell = program_.cells_.back();
  cell.last = OpId(size());
  if (cell.first == cell.last) program_.cells_.pop_back();
}

/// Calls visit(op, stream) for every op on every one of its streams; for each stream in its order.
template <class Visit>
void ProgramBuilder::for_each_placement(Visit visit) const {
  std::size_t next_join = 0;
  for (std::size_t i = 0; i < size(); ++i) {
    for (; next_join < late_joins_.size() && late_joins_[next_join].after <= i; ++next_join) {
      visit(late_joins_[next_join].op, late_joins_[next_join].stream);
    }
    for (const StreamId stream : program_.streams_of(OpId(i))) visit(OpId(i), stream);
  }
  for (; next_join < late_joins_.size(); ++next_join) {
    visit(late_joins_[next_join].op, late_joins_[next_join].stream);
  }
}

/// True if ids already ascend along all edges. Late predecessors must have been merged.
bool ProgramBuilder::check() {
  ORRERY_CHECK(!in_cell_, "seal within a cell, at op {}", size());
  ORRERY_CHECK(size() < kNone && program_.streams_.size() + late_joins_.size() < kNone &&
                   program_.predecessors_.size() < kNone,
               "{} ops, {} stream places, {} predecessors do not fit 32-bit offsets", size(),
               program_.streams_.size() + late_joins_.size(), program_.predecessors_.size());
  bool ordered = true;
  for (std::size_t i = 0; i < size(); ++i) {
    for (const OpId predecessor : program_.predecessors_of(OpId(i))) {
      ORRERY_CHECK(predecessor.value < size(), "op {} waits for op {} of {}", i, predecessor.value,
                   size());
      ordered &= predecessor.value < i;
    }
    ORRERY_CHECK(program_.shape_[OpId(i)].value < program_.shapes_.size(),
                 "op {} has shape {} of {}", i, program_.shape_[OpId(i)].value,
                 program_.shapes_.size());
  }
  const std::size_t streams = program_.streams();
  std::vector<std::uint32_t> last_on_stream(streams, kNone);
  for_each_placement([&](OpId op, StreamId stream) {
    ORRERY_CHECK(stream.value < streams, "op {} on stream {} of {}", op.value, stream.value,
                 streams);
    std::uint32_t& last = last_on_stream[stream.value];
    ORRERY_CHECK(last != op.value, "op {} is twice on {}", op.value, describe_stream(stream));
    ordered &= last == kNone || last < op.value;
    last = op.value;
  });
  for (const auto& row : program_.load_rows_) {
    ORRERY_CHECK(row.op.value < size(), "member loads of op {} of {}", row.op.value, size());
  }
  for (const MemoryEffect& effect : program_.memory_effects_) {
    ORRERY_CHECK(effect.op.value < size() && effect.rank.value < program_.ranks_,
                 "memory effect of op {} of {} on rank {} of {}", effect.op.value, size(),
                 effect.rank.value, program_.ranks_);
  }
  return ordered;
}

namespace {

/// Appends to the rows of a CSR array: values[i] to row rows[i], in the given order.
template <class T>
void append_to_rows(std::vector<std::uint32_t>& begin, std::vector<T>& values,
                    const std::vector<std::pair<std::uint32_t, T>>& late) {
  const std::size_t rows = begin.size() - 1;
  std::vector<std::uint32_t> added(rows + 1, 0);
  for (const auto& [row, value] : late) ++added[row];
  std::vector<T> merged(values.size() + late.size());
  std::vector<std::uint32_t> write(rows);
  std::uint32_t to = 0;
  std::uint32_t from = 0;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::uint32_t end = begin[row + 1];
    begin[row] = to;
    while (from < end) merged[to++] = values[from++];
    write[row] = to;
    to += added[row];
  }
  begin[rows] = to;
  for (const auto& [row, value] : late) merged[write[row]++] = value;
  values = std::move(merged);
}

}  // namespace

void ProgramBuilder::merge_late_predecessors() {
  std::vector<std::pair<std::uint32_t, OpId>> late;
  late.reserve(late_predecessors_.size());
  for (const LatePredecessor& l : late_predecessors_) late.emplace_back(l.op.value, l.predecessor);
  append_to_rows(program_.predecessor_begin_, program_.predecessors_, late);
  late_predecessors_.clear();
}

void ProgramBuilder::merge_late_joins() {
  std::vector<std::pair<std::uint32_t, StreamId>> late;
  late.reserve(late_joins_.size());
  for (const LateJoin& l : late_joins_) late.emplace_back(l.op.value, l.stream);
  append_to_rows(program_.stream_begin_, program_.streams_, late);
  late_joins_.clear();
}

/// The old ids in their new order.
std::vector<OpId> ProgramBuilder::topological_order() {
  const std::size_t n = size();
  // A unit is what moves as a whole: a cell, or one op outside of cells.
  std::vector<std::uint32_t> unit_of(n);
  std::vector<std::uint32_t> unit_begin;
  for (std::size_t i = 0, c = 0; i < n;) {
    const bool is_cell = c < program_.cells_.size() && program_.cells_[c].first.value == i;
    const std::size_t end = is_cell ? program_.cells_[c++].last.value : i + 1;
    const auto unit = static_cast<std::uint32_t>(unit_begin.size());
    unit_begin.push_back(static_cast<std::uint32_t>(i));
    for (; i < end; ++i) unit_of[i] = unit;
  }
  const std::size_t units = unit_begin.size();
  unit_begin.push_back(static_cast<std::uint32_t>(n));

  std::vector<std::uint32_t> last_on_stream(program_.streams());
  const auto for_each_edge = [&](auto visit) {  // visit(from, to)
    for (std::uint32_t i = 0; i < n; ++i) {
      for (const OpId p : program_.predecessors_of(OpId(i))) visit(p.value, i);
    }
    std::fill(last_on_stream.begin(), last_on_stream.end(), kNone);
    for_each_placement([&](OpId op, StreamId stream) {
      std::uint32_t& last = last_on_stream[stream.value];
      if (last != kNone) visit(last, op.value);
      last = op.value;
    });
  };
  std::vector<std::uint32_t> waits(n, 0);           // edges into the op
  std::vector<std::uint32_t> unit_waits(units, 0);  // edges into the unit from other units
  std::vector<std::size_t> successor_begin(n + 1, 0);
  for_each_edge([&](std::uint32_t from, std::uint32_t to) {
    ++waits[to];
    if (unit_of[from] != unit_of[to]) ++unit_waits[unit_of[to]];
    ++successor_begin[from];
  });
  std::size_t edges = 0;
  for (std::size_t& begin : successor_begin) begin = (edges += begin);  // ends, stepped down below
  std::vector<std::uint32_t> successors(edges);
  for_each_edge(
      [&](std::uint32_t from, std::uint32_t to) { successors[--successor_begin[from]] = to; });

  using MinHeap =
      std::priority_queue<std::uint32_t, std::vector<std::uint32_t>, std::greater<std::uint32_t>>;
  MinHeap ready_units;
  MinHeap ready_ops;  // of the unit at hand
  for (std::uint32_t u = 0; u < units; ++u) {
    if (unit_waits[u] == 0) ready_units.push(u);
  }
  std::vector<OpId> order;
  order.reserve(n);
  while (!ready_units.empty()) {
    const std::uint32_t unit = ready_units.top();
    ready_units.pop();
    for (std::uint32_t i = unit_begin[unit]; i < unit_begin[unit + 1]; ++i) {
      if (waits[i] == 0) ready_ops.push(i);
    }
    while (!ready_ops.empty()) {
      const std::uint32_t op = ready_ops.top();
      ready_ops.pop();
      order.push_back(OpId(op));
      for (std::size_t e = successor_begin[op]; e < successor_begin[op + 1]; ++e) {
        const std::uint32_t successor = successors[e];
        const std::uint32_t its_unit = unit_of[successor];
        const bool free = --waits[successor] == 0;
        if (its_unit == unit) {
          if (free) ready_ops.push(successor);
        } else if (--unit_waits[its_unit] == 0) {
          ready_units.push(its_unit);
        }
      }
    }
  }
  if (order.size() < n) throw_cycle(unit_of, unit_begin);
  return order;
}

void ProgramBuilder::throw_cycle(const std::vector<std::uint32_t>& unit_of,
                                 const std::vector<std::uint32_t>& unit_begin) {
  std::vector<Edge> edges;
  for (std::uint32_t i = 0; i < size(); ++i) {
    for (const OpId p : program_.predecessors_of(OpId(i))) edges.push_back({p.value, i, kNone});
  }
  std::vector<std::uint32_t> last_on_stream(program_.streams(), kNone);
  for_each_placement([&](OpId op, StreamId stream) {
    std::uint32_t& last = last_on_stream[stream.value];
    if (last != kNone) edges.push_back({last, op.value, stream.value});
    last = op.value;
  });
  merge_late_joins();  // so that names show all members

  const std::vector<Edge> cycle = find_cycle(size(), edges);
  if (!cycle.empty()) {
    std::string text = "deadlock: these operations wait for each other";
    for (const Edge& e : cycle) {
      const std::string why = e.stream == kNone
                                  ? std::string("it needs the result of")
                                  : "is before it on " + describe_stream(StreamId(e.stream));
      text += fmt::format("\n  #{} {} waits for #{} {}, which ", e.to, program_.name(OpId(e.to)),
                          e.from, program_.name(OpId(e.from)));
      text += why;
    }
    throw std::runtime_error(text);
  }

  std::vector<Edge> unit_edges;
  for (const Edge& e : edges) {
    const Edge between{unit_of[e.from], unit_of[e.to], e.stream};
    if (between.from != between.to) unit_edges.push_back(between);
  }
  std::string text = "no order of the operations keeps these cells contiguous";
  for (const Edge& e : find_cycle(unit_begin.size() - 1, unit_edges)) {
    const auto describe_unit = [&](std::uint32_t unit) {
      return fmt::format("#{}..#{} (from {})", unit_begin[unit], unit_begin[unit + 1] - 1,
                         program_.name(OpId(unit_begin[unit])));
    };
    text += fmt::format("\n  {} waits for {}", describe_unit(e.to), describe_unit(e.from));
  }
  throw std::runtime_error(text);
}

/// `order`: the old ids in their new order. Late joins must have been merged.
void ProgramBuilder::renumber(const std::vector<OpId>& order) {
  IdVector<OpId, OpId> new_id(size());
  for (std::size_t i = 0; i < order.size(); ++i) new_id[order[i]] = OpId(i);

  const auto permute = [&](auto& values) {
    auto permuted = values;
    for (std::size_t i = 0; i < order.size(); ++i) permuted[OpId(i)] = values[order[i]];
    values = std::move(permuted);
  };
  permute(program_.kind_);
  permute(program_.shape_);
  permute(program_.tag_);
  const auto permute_rows = [&](std::vector<std::uint32_t>& begin, auto& values) {
    auto permuted = values;
    std::vector<std::uint32_t> permuted_begin(begin.size(), 0);
    std::uint32_t to = 0;
    for (std::size_t i = 0; i < order.size(); ++i) {
      for (std::uint32_t k = begin[order[i].value]; k < begin[order[i].value + 1]; ++k) {
        permuted[to++] = values[k];
      }
      permuted_begin[i + 1] = to;
    }
    begin = std::move(permuted_begin);
    values = std::move(permuted);
  };
  permute_rows(program_.stream_begin_, program_.streams_);
  permute_rows(program_.predecessor_begin_, program_.predecessors_);
  for (OpId& predecessor : program_.predecessors_) predecessor = new_id[predecessor];

  for (MemoryEffect& effect : program_.memory_effects_) effect.op = new_id[effect.op];
  for (auto& row : program_.load_rows_) row.op = new_id[row.op];
  for (Cell& cell : program_.cells_) {
    // Contiguous as a whole, but its ops may have changed places among themselves.
    const std::uint32_t length = cell.last.value - cell.first.value;
    OpId first = new_id[cell.first];
    for (OpId op = cell.first; op < cell.last; ++op) first = std::min(first, new_id[op]);
    cell.first = first;
    cell.last = OpId(std::size_t{first.value} + length);
  }
  std::sort(program_.cells_.begin(), program_.cells_.end(),
            [](const Cell& a, const Cell& b) { return a.first < b.first; });
}

/// Rows were added one after the other, so each ends where the next one begins. Streams must be
/// final.
void ProgramBuilder::sort_member_loads() {
  auto& rows = program_.load_rows_;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::size_t end = i + 1 < rows.size() ? rows[i + 1].begin : program_.member_loads_.size();
    ORRERY_CHECK(end - rows[i].begin == program_.streams_of(rows[i].op).size(),
                 "{} loads of op {} on {} streams", end - rows[i].begin, rows[i].op.value,
                 program_.streams_of(rows[i].op).size());
  }
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.op < b.op; });
  for (std::size_t i = 1; i < rows.size(); ++i) {
    ORRERY_CHECK(rows[i - 1].op < rows[i].op, "op {} has loads twice", rows[i].op.value);
  }
}

Program ProgramBuilder::seal() && {
  if (!late_predecessors_.empty()) merge_late_predecessors();
  if (check()) {
    if (!late_joins_.empty()) merge_late_joins();
  } else {
    const std::vector<OpId> order = topological_order();
    if (!late_joins_.empty()) merge_late_joins();
    renumber(order);
  }
  sort_member_loads();
  return std::move(program_);
}

}  // namespace orrery
