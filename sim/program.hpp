#pragma once
// The Program: every operation of one step, compiled. The simulator and the executor share it.
//
// A Program is a sealed, immutable struct of arrays indexed by OpId. After seal():
//   * every predecessor has a smaller id than its successor, and
//   * the operations of one stream run in id order (stream order is thus also edges, kept
//   implicit),
// so the graph is acyclic by construction and one forward pass over the ids is a valid sweep.
// A collective is ONE op that sits on one stream of every member; it starts when all members are
// ready. Names are not stored: they are formatted from shapes and tags on demand.

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sim/ids.hpp"
#include "sim/shape.hpp"

namespace orrery {

enum class OpKind : std::uint8_t { compute, transfer, collective, sync };
inline constexpr int kOpKinds = 4;
std::string_view name_of(OpKind kind);

/// The in-order queues of one rank.
enum class StreamKind : std::uint8_t {
  compute,
  weight_gradient,  ///< used where the plan gives weight gradients a stream of their own
  expert_exchange,  ///< dispatch and combine
  tensor,           ///< tensor- and context-parallel collectives
  send_next,        ///< pipeline sends to the next pipeline rank, ...
  send_previous,
  receive_previous,  ///< ... and where they arrive
  receive_next,
  data,     ///< gradient and parameter traffic (data parallel, ZeRO)
  storage,  ///< checkpoints
};
inline constexpr int kStreamsPerRank = 10;
std::string_view name_of(StreamKind kind);

constexpr StreamId stream_of(RankId rank, StreamKind kind) {
  return StreamId(std::size_t{rank.value} * kStreamsPerRank + static_cast<std::size_t>(kind));
}
constexpr RankId rank_of(StreamId stream) {
  return RankId(stream.value / kStreamsPerRank);
}
constexpr StreamKind kind_of(StreamId stream) {
  return static_cast<StreamKind>(stream.value % kStreamsPerRank);
}

/// What a user reads in a timeline, named as in DeepSeek's published trace. There and here,
/// combine(B) is the gradient's way into the experts (a dispatch kernel) and dispatch(B) its way
/// back (a combine).
enum class Phase : std::uint8_t {
  embedding_forward,
  attn_forward,      ///< attn(F): attention block up to and including the router
  mlp_forward,       ///< mlp(F)
  dispatch_forward,  ///< dispatch(F)
  combine_forward,   ///< combine(F)
  head_forward,
  head_backward,
  head_weight,
  combine_backward,   ///< combine(B)
  mlp_backward,       ///< mlp(B)
  mlp_weight,         ///< mlp(W)
  dispatch_backward,  ///< dispatch(B)
  attn_backward,      ///< attn(B)
  attn_weight,        ///< attn(W)
  embedding_backward,
  pipeline_forward,   ///< PP(F)
  pipeline_backward,  ///< PP(B)
  tensor_exchange,    ///< tensor- and context-parallel collectives
  gradient_sync,
  parameter_gather,
  optimizer,
  checkpoint,
};
inline constexpr int kPhases = 22;
std::string_view name_of(Phase phase);

/// Where an op belongs; layer is the model's layer index (kNoLayer for embedding, head, optimizer).
struct OpTag {
  std::uint16_t micro_batch = 0;
  std::uint16_t layer = 0;
  std::uint16_t stage = 0;
  Phase phase{};
  friend bool operator==(const OpTag&, const OpTag&) = default;
};
inline constexpr std::uint16_t kNoLayer = 0xFFFF;

/// One scheduled action of one rank, or of several symmetric ranks that were emitted together: the
/// ops [first, last) that sit on the streams of those ranks. Transfers lie outside of cells.
enum class CellKind : std::uint8_t {
  forward,
  backward,
  backward_input,
  weight,
  overlapped,
  optimizer
};
inline constexpr int kCellKinds = 6;
std::string_view name_of(CellKind kind);

struct Cell {
  CellKind kind{};
  std::uint16_t stage = 0;       ///< of the forward half if overlapped
  std::uint16_t pair_stage = 0;  ///< of the backward half if overlapped, else = stage
  std::uint16_t micro_batch = 0;
  std::uint16_t pair_micro_batch = 0;
  OpId first;
  OpId last;  ///< one past
};

enum class MemoryKind : std::uint8_t {
  parameters,
  gradients,
  optimizer_state,
  activations,  ///< saved for the backward pass
  workspace,    ///< live within an action: logits, attention buffers
  communication_buffers,
};
inline constexpr int kMemoryKinds = 6;
std::string_view name_of(MemoryKind kind);

/// A change of a rank's memory when an op starts (allocation) or ends (release).
struct MemoryEffect {
  OpId op;
  RankId rank;
  MemoryKind kind{};
  bool at_end = false;
  std::int64_t bytes = 0;  ///< negative: release
};

class ProgramBuilder;

class Program {
 public:
  std::size_t size() const { return kind_.size(); }
  std::size_t ranks() const { return ranks_; }
  std::size_t streams() const { return ranks_ * kStreamsPerRank; }

  OpKind kind(OpId op) const { return kind_[op]; }
  ShapeId shape(OpId op) const { return shape_[op]; }
  const OpTag& tag(OpId op) const { return tag_[op]; }
  std::span<const StreamId> streams_of(OpId op) const {
    return {streams_.data() + stream_begin_[op.value],
            streams_.data() + stream_begin_[op.value + 1]};
  }
  /// Explicit predecessors; stream order comes on top.
  std::span<const OpId> predecessors_of(OpId op) const {
    return {predecessors_.data() + predecessor_begin_[op.value],
            predecessors_.data() + predecessor_begin_[op.value + 1]};
  }

  const IdVector<ShapeId, Shape>& shapes() const { return shapes_; }
  /// In id order; cells do not overlap.
  std::span<const Cell> cells() const { return cells_; }
  std::span<const MemoryEffect> memory_effects() const { return memory_effects_; }

  /// How many real GPUs each simulated rank stands for.
  std::span<const std::int64_t> multiplicity() const { return multiplicity_; }

  /// What each simulated rank's computation takes, over its price; empty: all as priced.
  std::span<const double> slowdown() const { return slowdown_; }

  /// What each member of an op is sent over the mean of all, per mille, in the order of its
  /// streams; empty where all are sent the same. Of a combine: what comes from it.
  std::span<const std::uint32_t> member_loads(OpId op) const;

  /// How often each shape occurs (ops, not multiplied by multiplicity).
  IdVector<ShapeId, std::int64_t> shape_counts() const;

  /// "rank 3 F12 layer 17 mlp(F) routed_up"; an op of several ranks begins with "ranks 0-7",
  /// "ranks 0 and 2" or "rank 0 and 3 others".
  std::string name(OpId op) const;
  /// Bytes the Program's arrays occupy.
  std::size_t memory_bytes() const;

 private:
  friend class ProgramBuilder;
  std::size_t ranks_ = 0;
  IdVector<OpId, OpKind> kind_;
  IdVector<OpId, ShapeId> shape_;
  IdVector<OpId, OpTag> tag_;
  std::vector<std::uint32_t> stream_begin_;  // size() + 1
  std::vector<StreamId> streams_;
  std::vector<std::uint32_t> predecessor_begin_;  // size() + 1
  std::vector<OpId> predecessors_;
  IdVector<ShapeId, Shape> shapes_;
  std::vector<Cell> cells_;
  std::vector<MemoryEffect> memory_effects_;
  std::vector<std::int64_t> multiplicity_;
  std::vector<double> slowdown_;
  struct LoadRow {
    OpId op;
    std::uint32_t begin = 0;  // into member_loads_, as many as the op has streams
  };
  std::vector<LoadRow> load_rows_;  // ascending by op, few ops have one
  std::vector<std::uint32_t> member_loads_;
};

class ProgramBuilder {
 public:
  /// `multiplicity[r]`: real GPUs that simulated rank r stands for.
  explicit ProgramBuilder(std::vector<std::int64_t> multiplicity);

  void reserve(std::size_t ops, std::size_t predecessors);
  ShapeId intern(const Shape& shape);
  /// Those interned so far.
  const IdVector<ShapeId, Shape>& shapes() const { return program_.shapes_; }
  std::size_t size() const { return program_.kind_.size(); }

  /// Appends an op to the ends of the given streams. Predecessors may have ids not added yet (they
  /// must exist at seal()).
  OpId add(OpKind kind, ShapeId shape, const OpTag& tag, std::span<const StreamId> streams,
           std::span<const OpId> predecessors) {
    const OpId op(size());
    program_.kind_.push_back(kind);
    program_.shape_.push_back(shape);
    program_.tag_.push_back(tag);
    for (const StreamId stream : streams) program_.streams_.push_back(stream);
    for (const OpId predecessor : predecessors) program_.predecessors_.push_back(predecessor);
    // Offsets that outgrow 32 bits wrap here and are caught by seal(), before anyone reads them.
    program_.stream_begin_.push_back(static_cast<std::uint32_t>(program_.streams_.size()));
    program_.predecessor_begin_.push_back(
        static_cast<std::uint32_t>(program_.predecessors_.size()));
    return op;
  }
  /// Appends an existing op to the end of one more stream (members of a collective that arrive
  /// later).
  void join(OpId op, StreamId stream);
  /// Adds a predecessor to an existing op. Like those of add() it may not exist yet.
  void depend(OpId op, OpId predecessor);

  /// A factor above 0 for each rank, or none at all.
  void set_slowdown(std::vector<double> slowdown);

  /// Program::member_loads() of an op: one for each of its streams. At most once an op.
  void member_loads(OpId op, std::span<const std::uint32_t> per_mille);

  void memory(const MemoryEffect& effect) { program_.memory_effects_.push_back(effect); }
  /// The ops added between begin_cell and end_cell make up the cell; `first` and `last` of the
  /// argument are ignored. Cells do not nest, and one without ops is dropped.
  void begin_cell(const Cell& cell);
  void end_cell();

  /// Checks and freezes, in one pass where every op follows its predecessors. Otherwise the ops are
  /// renumbered: a topological sort by smallest old id that moves a cell as a whole, so that cells
  /// stay contiguous whenever an order exists in which they are. Throws std::runtime_error
  ///   - on a cycle (a deadlock: two ranks that enter two collectives in opposite order), naming
  ///   the ops
  ///     on it by the ids that add() gave them, or
  ///   - when the ops could run but no order keeps the cells whole (two cells wait for each other:
  ///   a
  ///     collective joined late from within another cell), naming the cells.
  Program seal() &&;

 private:
  struct LateJoin {
    OpId op;
    StreamId stream;
    std::size_t after = 0;  ///< ops added before the join
  };
  struct LatePredecessor {
    OpId op;
    OpId predecessor;
  };

  template <class Visit>
  void for_each_placement(Visit visit) const;
  bool check();
  void merge_late_predecessors();
  void merge_late_joins();
  std::vector<OpId> topological_order();
  [[noreturn]] void throw_cycle(const std::vector<std::uint32_t>& unit_of,
                                const std::vector<std::uint32_t>& unit_begin);
  void renumber(const std::vector<OpId>& order);
  void sort_member_loads();

  Program program_;
  std::map<Shape, ShapeId> interned_;
  std::vector<LateJoin> late_joins_;  // in call order
  std::vector<LatePredecessor> late_predecessors_;
  bool in_cell_ = false;
};

}  // namespace orrery
