#pragma once
// A cell: the operations of one scheduled action on one rank, compiled once per kind of cell and
// stamped into the Program for every micro-batch (and, with all ranks, for every slot).

#include <cstdint>
#include <optional>
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
  std::optional<GroupKind> group;    ///< the ranks that share this op
  std::vector<std::uint32_t> after;  ///< ops of the cell it waits for, beyond its stream's order
};

/// Memory saved at the start of an op or released at the end of one.
struct CellMemory {
  std::uint32_t op = 0;
  bool at_end = false;
  std::int64_t bytes = 0;
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
  CellTemplate make(ActionKind kind, int stage, int pair_stage, ProgramBuilder& builder) const;

  /// Largest workspace of any layer or head of the stage.
  std::int64_t workspace_bytes(int stage) const;
  /// Parameters on this rank of the largest layer, embedding or head of the stage.
  std::int64_t largest_unit_parameters(int stage) const;

 private:
  struct Units;

  const Scenario& scenario_;
  LayerWork dense_layer_;
  LayerWork moe_layer_;
  EdgeWork embedding_;
  EdgeWork head_;
  EdgeWork mtp_front_;
  ShardTraffic dense_shards_, moe_shards_, embedding_shards_, head_shards_, mtp_front_shards_;
};

}  // namespace orrery
