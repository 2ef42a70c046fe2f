#include "models/cell.hpp"

#include <algorithm>
#include <deque>
#include <map>
#include <tuple>

#include "sim/check.hpp"

namespace orrery {
namespace {

/// A run of chained ops of one phase. Issue order within a stream is the order in which segments
/// are appended; between streams only `after` orders them.
struct Segment {
  const Work* work = nullptr;
  Phase phase{};
  std::uint16_t layer = kNoLayer;
};

/// A layer, embedding or head of a stage, as the segments of each pass. Within a pass segments
/// depend on each other in the order given; weight gradients depend on the segment they are listed
/// behind.
struct Unit {
  bool paired = false;  ///< a transformer layer, which overlapped pairs interleave with another
  std::uint16_t layer = kNoLayer;
  // forward: attn, dispatch, mlp, combine; backward: combine, mlp, dispatch, attn.
  const Work* forward[4] = {};
  const Work* backward[4] = {};
  const Work* mlp_weight = nullptr;
  const Work* attn_weight = nullptr;
  Phase forward_phase[4] = {Phase::attn_forward, Phase::dispatch_forward, Phase::mlp_forward,
                            Phase::combine_forward};
  Phase backward_phase[4] = {Phase::combine_backward, Phase::mlp_backward, Phase::dispatch_backward,
                             Phase::attn_backward};
  Phase weight_phase[2] = {Phase::mlp_weight, Phase::attn_weight};
  std::int64_t saved_bytes = 0;
};

Unit layer_unit(const LayerWork& w, std::int64_t layer) {
  Unit u;
  u.paired = true;
  u.layer = static_cast<std::uint16_t>(layer);
  u.forward[0] = &w.attn_forward;
  u.forward[1] = &w.dispatch_forward;
  u.forward[2] = &w.mlp_forward;
  u.forward[3] = &w.combine_forward;
  u.backward[0] = &w.combine_backward;
  u.backward[1] = &w.mlp_backward;
  u.backward[2] = &w.dispatch_backward;
  u.backward[3] = &w.attn_backward;
  u.mlp_weight = &w.mlp_weight;
  u.attn_weight = &w.attn_weight;
  u.saved_bytes = w.memory.saved_bytes;
  return u;
}

Unit edge_unit(const EdgeWork& w, Phase forward, Phase backward, Phase weight) {
  Unit u;
  u.forward[0] = &w.forward;
  u.forward_phase[0] = forward;
  u.backward[3] = &w.backward;
  u.backward_phase[3] = backward;
  u.attn_weight = &w.weight;
  u.weight_phase[1] = weight;
  u.saved_bytes = w.memory.saved_bytes;
  return u;
}

/// Appends segments to a template. `chain` remembers the last op of a dependency chain, per half.
class CellWriter {
 public:
  /// SMs of the chains' kernels, of weight gradients, and of exchanges; 0: the whole device.
  CellWriter(CellTemplate& cell, ProgramBuilder& builder, int chain_sms, int aside_sms,
             int exchange_sms)
      : cell_(cell),
        builder_(builder),
        chain_sms_(chain_sms),
        aside_sms_(aside_sms),
        exchange_sms_(exchange_sms) {}

  /// One segment of the forward or backward chain: it waits for the chain's previous segment.
  void chained(const Work* work, Phase phase, std::uint16_t layer, Half half) {
    if (work == nullptr || work->empty()) return;
    std::optional<std::uint32_t>& last = last_[static_cast<int>(half)];
    const std::uint32_t first = append(*work, phase, layer, half, last, chain_sms_);
    last = static_cast<std::uint32_t>(cell_.ops.size() - 1);
    auto& entry = half == Half::forward ? cell_.forward_entry : cell_.backward_entry;
    auto& exit = half == Half::forward ? cell_.forward_exit : cell_.backward_exit;
    if (!entry) entry = first;
    exit = last;
  }

  /// Weight gradients: wait for the chain so far, nothing in the chain waits for them.
  void aside(const Work* work, Phase phase, std::uint16_t layer) {
    if (work == nullptr || work->empty()) return;
    append(*work, phase, layer, Half::backward, last_[static_cast<int>(Half::backward)],
           aside_sms_);
  }

  void memory(bool at_end, std::int64_t bytes) {
    if (bytes == 0) return;
    const auto op = static_cast<std::uint32_t>(at_end ? cell_.ops.size() - 1 : cell_.ops.size());
    cell_.memory.push_back({.op = op, .at_end = at_end, .bytes = bytes});
  }

 private:
  std::uint32_t append(const Work& work, Phase phase, std::uint16_t layer, Half half,
                       std::optional<std::uint32_t> previous, int compute_sms) {
    const auto first = static_cast<std::uint32_t>(cell_.ops.size());
    for (const WorkItem& item : work) {
      const auto index = static_cast<std::uint32_t>(cell_.ops.size());
      CellOp op;
      op.stream = item.stream;
      op.kind = item.group ? OpKind::collective : OpKind::compute;
      op.half = half;
      op.phase = item.stream == StreamKind::tensor ? Phase::tensor_exchange : phase;
      op.layer = layer;
      op.group = item.group;
      if (previous && needs_edge(*previous, item.stream)) op.after.push_back(*previous);
      Shape shape = item.shape;
      shape.sms = item.stream == StreamKind::expert_exchange ? exchange_sms_ : compute_sms;
      if (std::holds_alternative<Collective>(shape.work)) shape.sms = 0;
      op.shape = builder_.intern(shape);
      cell_.ops.push_back(std::move(op));
      previous = index;
    }
    return first;
  }

  /// Ops of one stream run in order anyway.
  bool needs_edge(std::uint32_t previous, StreamKind stream) const {
    return cell_.ops[previous].stream != stream;
  }

  CellTemplate& cell_;
  ProgramBuilder& builder_;
  int chain_sms_;
  int aside_sms_;
  int exchange_sms_;
  std::optional<std::uint32_t> last_[2];
};

void write_forward(CellWriter& w, const Unit& u) {
  w.memory(false, u.saved_bytes);
  for (int i = 0; i < 4; ++i) w.chained(u.forward[i], u.forward_phase[i], u.layer, Half::forward);
}

void write_weight(CellWriter& w, const Unit& u) {
  w.aside(u.mlp_weight, u.weight_phase[0], u.layer);
  w.aside(u.attn_weight, u.weight_phase[1], u.layer);
}

/// The gradient's way back. Weight gradients, if wanted here, fill the time of the exchange behind
/// them: mlp(W) that of dispatch(B), attn(W) that of the next layer's combine(B).
void write_backward(CellWriter& w, const Unit& u, bool with_weight) {
  const auto step = [&](int i) {
    w.chained(u.backward[i], u.backward_phase[i], u.layer, Half::backward);
  };
  step(0);
  step(1);
  if (with_weight) w.aside(u.mlp_weight, u.weight_phase[0], u.layer);
  step(2);
  step(3);
  if (with_weight) {
    w.aside(u.attn_weight, u.weight_phase[1], u.layer);
    w.memory(true, -u.saved_bytes);
  }
}

/// An overlapped pair of layers (V3 report 3.2.1, figure 4; order as in the published trace):
///   compute:  attn(F)  mlp(B)  mlp(W)  mlp(F)  attn(B)  attn(W)
///   exchange: combine(B)  dispatch(F)  dispatch(B)  combine(F)
void write_pair(CellWriter& w, const Unit& f, const Unit& b) {
  const auto forward = [&](int i) {
    w.chained(f.forward[i], f.forward_phase[i], f.layer, Half::forward);
  };
  const auto backward = [&](int i) {
    w.chained(b.backward[i], b.backward_phase[i], b.layer, Half::backward);
  };
  w.memory(false, f.saved_bytes);
  backward(0);  // combine(B)
  forward(0);   // attn(F)
  forward(1);   // dispatch(F)
  backward(1);  // mlp(B)
  w.aside(b.mlp_weight, b.weight_phase[0], b.layer);
  backward(2);  // dispatch(B)
  forward(2);   // mlp(F)
  forward(3);   // combine(F)
  backward(3);  // attn(B)
  w.aside(b.attn_weight, b.weight_phase[1], b.layer);
  w.memory(true, -b.saved_bytes);
}

}  // namespace

CellFactory::CellFactory(const Scenario& scenario) : scenario_(scenario) {
  const Model& model = scenario.model;
  const Plan& plan = scenario.plan;
  const std::int64_t per_node = scenario.cluster.gpus_per_node;
  const bool any_moe = std::find(model.layer_is_moe.begin(), model.layer_is_moe.end(), true) !=
                       model.layer_is_moe.end();
  const bool any_dense = std::find(model.layer_is_moe.begin(), model.layer_is_moe.end(), false) !=
                         model.layer_is_moe.end();
  if (any_dense) dense_layer_ = transformer_layer(model, plan, per_node, false);
  if (any_moe) moe_layer_ = transformer_layer(model, plan, per_node, true);
  embedding_ = embedding_work(model, plan);
  head_ = head_work(model, plan, per_node);
  if (model.mtp_modules > 0) mtp_front_ = mtp_front_work(model, plan);
}

namespace {

/// The units of a stage in forward order: embedding, layers, head, and per MTP module its front,
/// its block and the head once more (V3 report 2.2: embedding and head are shared).
std::deque<Unit> units_of(const Scenario& scenario, int stage, const LayerWork& dense,
                          const LayerWork& moe, const EdgeWork& embedding, const EdgeWork& head,
                          const EdgeWork& mtp_front) {
  const Model& model = scenario.model;
  const StageContents& s = scenario.plan.stages[static_cast<std::size_t>(stage)];
  std::deque<Unit> units;
  const auto add_head = [&] {
    units.push_back(edge_unit(head, Phase::head_forward, Phase::head_backward, Phase::head_weight));
  };
  if (s.embedding) {
    units.push_back(edge_unit(embedding, Phase::embedding_forward, Phase::embedding_backward,
                              Phase::embedding_backward));
  }
  for (std::int64_t l = s.first_layer; l < s.first_layer + s.layers; ++l) {
    units.push_back(layer_unit(model.is_moe(l) ? moe : dense, l));
  }
  if (s.head) add_head();
  for (std::int64_t i = 0; i < s.mtp_modules; ++i) {
    const std::int64_t layer = model.layers + i;
    Unit front =
        edge_unit(mtp_front, Phase::attn_forward, Phase::attn_backward, Phase::attn_weight);
    front.layer = static_cast<std::uint16_t>(layer);
    units.push_back(front);
    units.push_back(layer_unit(model.is_moe(model.layers - 1) ? moe : dense, layer));
    add_head();
  }
  return units;
}

}  // namespace

CellTemplate CellFactory::make(ActionKind kind, int stage, int pair_stage,
                               ProgramBuilder& builder) const {
  const auto units = [&](int s) {
    return units_of(scenario_, s, dense_layer_, moe_layer_, embedding_, head_, mtp_front_);
  };
  const bool overlapped = kind == ActionKind::overlapped;
  const int reserved = scenario_.plan.communication_sms;
  CellTemplate cell;
  cell.stage = stage;
  cell.pair_stage = overlapped ? pair_stage : stage;
  // Computation gives up the communication SMs only where it runs beside an exchange: everything in
  // an overlapped pair, the weight gradients in a full backward.
  const int rest = reserved > 0 ? scenario_.profile.device.sms - reserved : 0;
  CellWriter writer(cell, builder, overlapped ? rest : 0,
                    overlapped || kind == ActionKind::backward ? rest : 0, reserved);
  switch (kind) {
    case ActionKind::forward:
      cell.kind = CellKind::forward;
      for (const Unit& u : units(stage)) write_forward(writer, u);
      break;
    case ActionKind::backward:
    case ActionKind::backward_input: {
      const bool with_weight = kind == ActionKind::backward;
      cell.kind = with_weight ? CellKind::backward : CellKind::backward_input;
      const std::deque<Unit> u = units(stage);
      for (auto it = u.rbegin(); it != u.rend(); ++it) write_backward(writer, *it, with_weight);
      break;
    }
    case ActionKind::backward_weight: {
      cell.kind = CellKind::weight;
      const std::deque<Unit> u = units(stage);
      for (auto it = u.rbegin(); it != u.rend(); ++it) {
        write_weight(writer, *it);
        if (!cell.ops.empty()) writer.memory(true, -it->saved_bytes);
      }
      break;
    }
    case ActionKind::overlapped: {
      cell.kind = CellKind::overlapped;
      std::deque<Unit> f = units(stage);
      std::deque<Unit> b = units(pair_stage);
      // Layers are paired in the order in which they come; embeddings and heads go in between.
      while (!f.empty() || !b.empty()) {
        if (!b.empty() && !b.back().paired) {
          write_backward(writer, b.back(), true);
          b.pop_back();
        } else if (!f.empty() && !f.front().paired) {
          write_forward(writer, f.front());
          f.pop_front();
        } else if (f.empty()) {
          write_backward(writer, b.back(), true);
          b.pop_back();
        } else if (b.empty()) {
          write_forward(writer, f.front());
          f.pop_front();
        } else {
          write_pair(writer, f.front(), b.back());
          f.pop_front();
          b.pop_back();
        }
      }
      break;
    }
  }
  return cell;
}

std::int64_t CellFactory::workspace_bytes(int stage) const {
  const StageContents& s = scenario_.plan.stages[static_cast<std::size_t>(stage)];
  std::int64_t bytes = s.head ? head_.memory.workspace_bytes : 0;
  for (std::int64_t l = s.first_layer; l < s.first_layer + s.layers; ++l) {
    const LayerWork& w = scenario_.model.is_moe(l) ? moe_layer_ : dense_layer_;
    bytes = std::max(bytes, w.memory.workspace_bytes);
  }
  return bytes;
}

}  // namespace orrery
