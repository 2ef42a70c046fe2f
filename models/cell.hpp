#pragma once
// A cell: the operations of one scheduled action on one rank, compiled once per kind of cell and
// stamped into the Program for every micro-batch (and, with all ranks, for every slot).

#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "models/layer_work.hpp"
#include "models/layout.hpp"
#include "models/scenario.hpp"
#include "models/schedule.hpp"
#include "sim/program.hpp"

namespace orrery {

/// Which micro-batch an op of a cell works for: an overlapped pair carries two.
enum class Half : std::uint8_t { forward, backward };

struct CellOp {
  ShapeId shape;
  OpKind kind{};
  StreamKind stream{};
  Half half{};
  Phase phase{};
  std::uint16_t layer = kNoLayer;
  SizedBy sized_by = SizedBy::plan;  ///< if not plan, CellFactory has the shape of each load
  std::uint32_t sizes = 0;           ///< which of CellFactory's sized items
  std::optional<GroupKind> group;    ///< the ranks that share this op
  std::vector<std::uint32_t> after;  ///< ops of the cell it waits for, beyond its stream's order
};

/// Memory saved at the start of an op or released at the end of one.
struct CellMemory {
  std::uint32_t op = 0;
  bool at_end = false;
  std::int64_t bytes = 0;
  /// In layers with experts whose loads are drawn: `bytes` is of the mean load, that of others is
  /// CellFactory::saved_bytes, of this layer in the micro-batch that the half works for.
  bool sized_by_rows = false;
  Half half{};
  std::uint16_t layer = kNoLayer;
};

struct CellTemplate {
  CellKind kind{};
  int stage = 0;
  int pair_stage = 0;
  std::vector<CellOp> ops;
  std::vector<CellMemory> memory;
  /// First and last op of each direction; the first waits for the stage's input, the last is sent
  /// on. Absent where the cell has no such half.
  std::optional<std::uint32_t> forward_entry, forward_exit;
  std::optional<std::uint32_t> backward_entry, backward_exit;
};

/// What ZeRO moves for one unit (a layer, embedding or head): its parameters in before it runs
/// (stage 3), its gradients out after its weight gradients (stages 2 and 3). Empty otherwise.
struct ShardTraffic {
  Work gather;
  Work scatter;
};

/// Compiles cells of one scenario. Layers of one kind share their work.
class CellFactory {
 public:
  CellFactory(const Scenario& scenario, const Layout& layout);

  /// `stage` is the forward half's, `pair_stage` the backward half's for ActionKind::overlapped.
  CellTemplate make(ActionKind kind, int stage, int pair_stage, ProgramBuilder& builder);

  /// Whether loads are drawn, so that ops and memory of layers with experts have sizes by load.
  bool uneven() const { return uneven_; }
  /// Shape of an op that is sized by the rows of a GPU, at its load.
  ShapeId shape(const CellOp& op, LoadLevel rows, ProgramBuilder& builder) {
    std::vector<ShapeId>& known = sized_[op.sizes].by_rows;
    if (rows < known.size() && known[rows] != kNoShape) return known[rows];
    return intern_rows(op, rows, builder);
  }
  /// Shape of an exchange.
  ShapeId shape(const CellOp& op, const GroupLoad& group, ProgramBuilder& builder);
  /// What a layer with experts keeps for the backward pass.
  std::int64_t saved_bytes(LoadLevel rows) { return layer_at(rows).memory.saved_bytes; }

  /// Largest workspace of any layer or head of the stage, if its experts get no more than `rows`.
  std::int64_t workspace_bytes(int stage, LoadLevel rows);
  /// Parameters on this rank of the largest layer, embedding or head of the stage.
  std::int64_t largest_unit_parameters(int stage) const;

 private:
  struct Units;
  friend class CellWriter;

  static constexpr ShapeId kNoShape{0xFFFFFFFF};

  /// A work item of moe_layer_ on so many SMs, and its shapes at the loads it was asked for.
  struct Sized {
    Work LayerWork::*part = nullptr;
    std::size_t item = 0;
    int sms = 0;
    std::vector<ShapeId> by_rows;                                  // by level
    std::map<std::pair<LoadLevel, LoadLevel>, ShapeId> exchanges;  // by busiest GPU and node
  };

  std::uint32_t sized(const Work& work, std::size_t item, int sms);
  ShapeId intern_rows(const CellOp& op, LoadLevel rows, ProgramBuilder& builder);
  const LayerWork& layer_at(LoadLevel rows);

  const Scenario& scenario_;
  bool uneven_ = false;
  std::vector<Sized> sized_;
  std::map<std::pair<const WorkItem*, int>, std::uint32_t> sized_of_;
  std::map<LoadLevel, LayerWork> layers_at_;  ///< moe_layer_ at other loads
  LayerWork dense_layer_;
  LayerWork moe_layer_;
  EdgeWork embedding_;
  EdgeWork head_;
  EdgeWork mtp_front_;
  ShardTraffic dense_shards_, moe_shards_, embedding_shards_, head_shards_, mtp_front_shards_;
};

}  // namespace orrery
