#include "models/cell.hpp"

#include <algorithm>
#include <cmath>
#include <deque>
#include <utility>

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
  bool has_experts = false;
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
  const ShardTraffic* shards = nullptr;
  std::int64_t saved_bytes = 0;
};

Unit layer_unit(const LayerWork& w, const ShardTraffic& shards, std::int64_t layer, bool moe) {
  Unit u;
  u.has_experts = moe;
  u.shards = &shards;
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

Unit edge_unit(const EdgeWork& w, const ShardTraffic& shards, Phase forward, Phase backward,
               Phase weight) {
  Unit u;
  u.shards = &shards;
  u.forward[0] = &w.forward;
  u.forward_phase[0] = forward;
  u.backward[3] = &w.backward;
  u.backward_phase[3] = backward;
  u.attn_weight = &w.weight;
  u.weight_phase[1] = weight;
  u.saved_bytes = w.memory.saved_bytes;
  return u;
}

}  // namespace

/// Appends segments to a template. `chain` remembers the last op of a dependency chain, per half.
class CellWriter {
 public:
  /// SMs of the chains' kernels, of weight gradients, and of exchanges; 0: the whole device.
  CellWriter(CellTemplate& cell, CellFactory& factory, ProgramBuilder& builder, int chain_sms,
             int aside_sms, int exchange_sms)
      : cell_(cell),
        factory_(factory),
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

  /// ZeRO-3: the parameters of the unit whose chain follows come in, while at most the one before
  /// it runs: the gather waits for the end of the last unit but one.
  void gather(const Work& work, std::uint16_t layer, Half half) {
    if (!work.empty()) {
      std::optional<std::uint32_t> gate;
      if (unit_ends_.size() >= 2) gate = unit_ends_[unit_ends_.size() - 2];
      append(work, Phase::parameter_gather, layer, half, gate, 0);
      gathered_[static_cast<int>(half)] = static_cast<std::uint32_t>(cell_.ops.size() - 1);
    }
    finish();
  }

  /// ZeRO-2 and -3: the unit's gradients, complete with the newest op, are reduced to their shards.
  /// Issued behind the next unit's gather, which must not wait for them.
  void scatter(const Work& work, std::uint16_t layer) {
    finish();
    scatter_ = {&work, layer, static_cast<std::uint32_t>(cell_.ops.size() - 1)};
  }

  /// Issues what is still owed.
  void finish() {
    const Scatter owed = std::exchange(scatter_, {});
    if (owed.work == nullptr || owed.work->empty()) return;
    append(*owed.work, Phase::gradient_sync, owed.layer, Half::backward, owed.complete_with, 0);
  }

  /// Ends a unit's chain of one half.
  void end_unit(Half half) {
    if (last_[static_cast<int>(half)]) unit_ends_.push_back(*last_[static_cast<int>(half)]);
  }

  /// Weight gradients: wait for the chain so far, nothing in the chain waits for them.
  void aside(const Work* work, Phase phase, std::uint16_t layer) {
    if (work == nullptr || work->empty()) return;
    append(*work, phase, layer, Half::backward, last_[static_cast<int>(Half::backward)],
           aside_sms_);
  }

  /// What a unit keeps for its backward pass, from here on.
  void save(const Unit& u) { memory(u, Half::forward, u.saved_bytes); }
  /// ... until here.
  void release(const Unit& u) { memory(u, Half::backward, -u.saved_bytes); }

 private:
  void memory(const Unit& u, Half half, std::int64_t bytes) {
    const bool at_end = half == Half::backward;
    if (bytes == 0) return;
    ORRERY_CHECK(!at_end || !cell_.ops.empty(), "{} bytes released by no op", bytes);
    const auto op = static_cast<std::uint32_t>(at_end ? cell_.ops.size() - 1 : cell_.ops.size());
    cell_.memory.push_back({.op = op,
                            .at_end = at_end,
                            .bytes = bytes,
                            .sized_by_rows = u.has_experts && factory_.uneven(),
                            .half = half,
                            .layer = u.layer});
  }

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
      std::optional<std::uint32_t>& gathered = gathered_[static_cast<int>(half)];
      if (item.stream != StreamKind::data && gathered) {
        op.after.push_back(*gathered);
        gathered.reset();
      }
      int sms = item.stream == StreamKind::expert_exchange ? exchange_sms_ : compute_sms;
      if (std::holds_alternative<Collective>(item.shape.work)) sms = 0;
      if (item.sized_by != SizedBy::plan && factory_.uneven()) {
        op.sized_by = item.sized_by;
        op.sizes = factory_.sized(work, index - first, sms);
      } else {
        Shape shape = item.shape;
        shape.sms = sms;
        op.shape = builder_.intern(shape);
      }
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
  CellFactory& factory_;
  ProgramBuilder& builder_;
  int chain_sms_;
  int aside_sms_;
  int exchange_sms_;
  std::optional<std::uint32_t> last_[2];
  struct Scatter {
    const Work* work = nullptr;
    std::uint16_t layer = kNoLayer;
    std::uint32_t complete_with = 0;
  };
  Scatter scatter_;
  std::vector<std::uint32_t> unit_ends_;
  std::optional<std::uint32_t> gathered_[2];  ///< what the next op of a chain has to wait for
};

namespace {

void write_forward(CellWriter& w, const Unit& u) {
  w.gather(u.shards->gather, u.layer, Half::forward);
  w.save(u);
  for (int i = 0; i < 4; ++i) w.chained(u.forward[i], u.forward_phase[i], u.layer, Half::forward);
  w.end_unit(Half::forward);
}

void write_weight(CellWriter& w, const Unit& u) {
  w.aside(u.mlp_weight, u.weight_phase[0], u.layer);
  w.aside(u.attn_weight, u.weight_phase[1], u.layer);
  w.release(u);
  w.scatter(u.shards->scatter, u.layer);
}

/// The gradient's way back. Weight gradients, if wanted here, fill the time of the exchange behind
/// them: mlp(W) that of dispatch(B), attn(W) that of the next layer's combine(B).
void write_backward(CellWriter& w, const Unit& u, bool with_weight) {
  const auto step = [&](int i) {
    w.chained(u.backward[i], u.backward_phase[i], u.layer, Half::backward);
  };
  w.gather(u.shards->gather, u.layer, Half::backward);
  step(0);
  step(1);
  if (with_weight) w.aside(u.mlp_weight, u.weight_phase[0], u.layer);
  step(2);
  step(3);
  w.end_unit(Half::backward);
  if (with_weight) {
    w.aside(u.attn_weight, u.weight_phase[1], u.layer);
    w.release(u);
    w.scatter(u.shards->scatter, u.layer);
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
  w.gather(b.shards->gather, b.layer, Half::backward);
  w.gather(f.shards->gather, f.layer, Half::forward);
  w.save(f);
  backward(0);  // combine(B)
  forward(0);   // attn(F)
  forward(1);   // dispatch(F)
  backward(1);  // mlp(B)
  w.aside(b.mlp_weight, b.weight_phase[0], b.layer);
  backward(2);  // dispatch(B)
  forward(2);   // mlp(F)
  forward(3);   // combine(F)
  backward(3);  // attn(B)
  w.end_unit(Half::backward);
  w.aside(b.attn_weight, b.weight_phase[1], b.layer);
  w.release(b);
  w.scatter(b.shards->scatter, b.layer);
}

}  // namespace

namespace {

ShardTraffic shard_traffic(const LayerShard& shard, const Plan& plan, const Layout& layout) {
  ShardTraffic traffic;
  const auto add = [&](Work& work, CollectiveKind kind, GroupKind group, std::int64_t bytes,
                       const char* label) {
    const std::int64_t ranks = layout.group_size(group);
    if (ranks == 1 || bytes == 0) return;
    work.push_back({.shape = {.work = Collective{.kind = kind,
                                                 .bytes = bytes,
                                                 .ranks = ranks,
                                                 .ranks_per_node = layout.members_per_node(group),
                                                 .stride = layout.stride(group)},
                              .label = label},
                    .stream = StreamKind::data,
                    .group = group});
  };
  const Precision& p = plan.precision;
  if (plan.parallelism.zero_stage >= 3) {
    add(traffic.gather, CollectiveKind::all_gather, GroupKind::data,
        shard.dense * p.parameter_bytes, "dense parameters");
    add(traffic.gather, CollectiveKind::all_gather, GroupKind::expert_data,
        shard.expert * p.parameter_bytes, "expert parameters");
  }
  if (plan.parallelism.zero_stage >= 2) {
    add(traffic.scatter, CollectiveKind::all_reduce, GroupKind::tensor,
        shard.tensor_summed * p.gradient_sync_bytes, "tensor-parallel gradients");
    add(traffic.scatter, CollectiveKind::reduce_scatter, GroupKind::data,
        shard.dense * p.gradient_sync_bytes, "dense gradients");
    add(traffic.scatter, CollectiveKind::reduce_scatter, GroupKind::expert_data,
        shard.expert * p.gradient_sync_bytes, "expert gradients");
  }
  return traffic;
}

}  // namespace

CellFactory::CellFactory(const Scenario& scenario, const Layout& layout) : scenario_(scenario) {
  const Model& model = scenario.model;
  const Plan& plan = scenario.plan;
  const std::int64_t per_node = scenario.cluster.gpus_per_node;
  const bool any_moe = std::find(model.layer_is_moe.begin(), model.layer_is_moe.end(), true) !=
                       model.layer_is_moe.end();
  const bool any_dense = std::find(model.layer_is_moe.begin(), model.layer_is_moe.end(), false) !=
                         model.layer_is_moe.end();
  if (any_dense) {
    dense_layer_ = transformer_layer(model, plan, per_node, false);
    dense_shards_ = shard_traffic(layer_shard(model, plan, false), plan, layout);
  }
  if (any_moe) {
    const std::optional<double> stated = stated_load(plan.routing);
    uneven_ = !stated && plan.parallelism.ep > 1;
    moe_layer_ = transformer_layer(model, plan, per_node, true, stated.value_or(1));
    moe_shards_ = shard_traffic(layer_shard(model, plan, true), plan, layout);
  }
  embedding_ = embedding_work(model, plan, per_node);
  embedding_shards_ = shard_traffic(embedding_shard(model, plan), plan, layout);
  head_ = head_work(model, plan, per_node);
  head_shards_ = shard_traffic(head_shard(model, plan), plan, layout);
  if (model.mtp_modules > 0) {
    mtp_front_ = mtp_front_work(model, plan, per_node);
    mtp_front_shards_ = shard_traffic(mtp_front_shard(model, plan), plan, layout);
  }
}

/// The units of a stage in forward order: embedding, layers, head, and per MTP module its front,
/// its block and the head once more (V3 report 2.2: embedding and head are shared).
struct CellFactory::Units : std::deque<Unit> {
  Units(const CellFactory& f, int stage) {
    const Model& model = f.scenario_.model;
    const StageContents& s = f.scenario_.plan.stages[static_cast<std::size_t>(stage)];
    const auto add_layer = [&](bool moe, std::int64_t layer) {
      push_back(moe ? layer_unit(f.moe_layer_, f.moe_shards_, layer, true)
                    : layer_unit(f.dense_layer_, f.dense_shards_, layer, false));
    };
    const auto add_head = [&] {
      push_back(edge_unit(f.head_, f.head_shards_, Phase::head_forward, Phase::head_backward,
                          Phase::head_weight));
    };
    if (s.embedding) {
      push_back(edge_unit(f.embedding_, f.embedding_shards_, Phase::embedding_forward,
                          Phase::embedding_backward, Phase::embedding_backward));
    }
    for (std::int64_t l = s.first_layer; l < s.first_layer + s.layers; ++l) {
      add_layer(model.is_moe(l), l);
    }
    if (s.head) add_head();
    for (std::int64_t i = 0; i < s.mtp_modules; ++i) {
      const std::int64_t layer = model.layers + i;
      push_back(edge_unit(f.mtp_front_, f.mtp_front_shards_, Phase::attn_forward,
                          Phase::attn_backward, Phase::attn_weight));
      back().layer = static_cast<std::uint16_t>(layer);
      add_layer(model.is_moe(model.layers - 1), layer);
      add_head();
    }
  }
};

namespace {

constexpr Work LayerWork::*kParts[] = {&LayerWork::attn_forward,     &LayerWork::dispatch_forward,
                                       &LayerWork::mlp_forward,      &LayerWork::combine_forward,
                                       &LayerWork::combine_backward, &LayerWork::mlp_backward,
                                       &LayerWork::mlp_weight,       &LayerWork::dispatch_backward,
                                       &LayerWork::attn_backward,    &LayerWork::attn_weight};

}  // namespace

std::uint32_t CellFactory::sized(const Work& work, std::size_t item, int sms) {
  const auto [known, inserted] =
      sized_of_.try_emplace({&work[item], sms}, static_cast<std::uint32_t>(sized_.size()));
  if (!inserted) return known->second;
  for (Work LayerWork::*const part : kParts) {
    if (&(moe_layer_.*part) != &work) continue;
    sized_.push_back({.part = part, .item = item, .sms = sms});
    return known->second;
  }
  ORRERY_CHECK(false, "item {} is of no part of the layer", item);
  return 0;
}

const LayerWork& CellFactory::layer_at(LoadLevel rows) {
  if (rows == kLoadLevels) return moe_layer_;
  const auto [known, inserted] = layers_at_.try_emplace(rows);
  if (inserted) {
    known->second = transformer_layer(scenario_.model, scenario_.plan,
                                      scenario_.cluster.gpus_per_node, true, load_of(rows));
  }
  return known->second;
}

ShapeId CellFactory::intern_rows(const CellOp& op, LoadLevel rows, ProgramBuilder& builder) {
  Sized& sized = sized_[op.sizes];
  if (sized.by_rows.size() <= rows) sized.by_rows.resize(rows + std::size_t{1}, kNoShape);
  Shape shape = (layer_at(rows).*sized.part)[sized.item].shape;
  shape.sms = sized.sms;
  return sized.by_rows[rows] = builder.intern(shape);
}

ShapeId CellFactory::shape(const CellOp& op, const GroupLoad& group, ProgramBuilder& builder) {
  Sized& sized = sized_[op.sizes];
  const auto [known, inserted] =
      sized.exchanges.try_emplace({group.busiest_gpu, group.busiest_node});
  if (inserted) {
    Shape shape = (moe_layer_.*sized.part)[sized.item].shape;
    shape.sms = sized.sms;
    auto& exchange = std::get<ExpertExchange>(shape.work);
    exchange.busiest_gpu_per_mille = std::llround(1000 * load_of(group.busiest_gpu));
    exchange.busiest_node_per_mille = std::llround(1000 * load_of(group.busiest_node));
    known->second = builder.intern(shape);
  }
  return known->second;
}

CellTemplate CellFactory::make(ActionKind kind, int stage, int pair_stage,
                               ProgramBuilder& builder) {
  const bool overlapped = kind == ActionKind::overlapped;
  const int reserved = scenario_.plan.communication_sms;
  CellTemplate cell;
  cell.stage = stage;
  cell.pair_stage = overlapped ? pair_stage : stage;
  // Computation gives up the communication SMs only where it runs beside an exchange: everything in
  // an overlapped pair, the weight gradients in a full backward.
  const int rest = reserved > 0 ? scenario_.profile.device.sms - reserved : 0;
  CellWriter writer(cell, *this, builder, overlapped ? rest : 0,
                    overlapped || kind == ActionKind::backward ? rest : 0, reserved);
  switch (kind) {
    case ActionKind::forward:
      cell.kind = CellKind::forward;
      for (const Unit& u : Units(*this, stage)) write_forward(writer, u);
      break;
    case ActionKind::backward:
    case ActionKind::backward_input: {
      const bool with_weight = kind == ActionKind::backward;
      cell.kind = with_weight ? CellKind::backward : CellKind::backward_input;
      const Units u(*this, stage);
      for (auto it = u.rbegin(); it != u.rend(); ++it) write_backward(writer, *it, with_weight);
      break;
    }
    case ActionKind::backward_weight: {
      cell.kind = CellKind::weight;
      const Units u(*this, stage);
      for (auto it = u.rbegin(); it != u.rend(); ++it) {
        write_weight(writer, *it);
      }
      break;
    }
    case ActionKind::overlapped: {
      cell.kind = CellKind::overlapped;
      Units f(*this, stage);
      Units b(*this, pair_stage);
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
  writer.finish();
  return cell;
}

std::int64_t CellFactory::workspace_bytes(int stage, LoadLevel rows) {
  const StageContents& s = scenario_.plan.stages[static_cast<std::size_t>(stage)];
  std::int64_t bytes = s.head ? head_.memory.workspace_bytes : 0;
  for (std::int64_t l = s.first_layer; l < s.first_layer + s.layers; ++l) {
    const LayerWork& w = scenario_.model.is_moe(l) ? layer_at(rows) : dense_layer_;
    bytes = std::max(bytes, w.memory.workspace_bytes);
  }
  return bytes;
}

std::int64_t CellFactory::largest_unit_parameters(int stage) const {
  const Model& model = scenario_.model;
  const Plan& plan = scenario_.plan;
  const StageContents& s = plan.stages[static_cast<std::size_t>(stage)];
  std::int64_t most = 0;
  const auto look_at = [&](const LayerShard& shard) {
    most = std::max(most, shard.dense + shard.expert);
  };
  if (s.embedding) look_at(embedding_shard(model, plan));
  if (s.head) look_at(head_shard(model, plan));
  for (std::int64_t l = s.first_layer; l < s.first_layer + s.layers; ++l) {
    look_at(layer_shard(model, plan, model.is_moe(l)));
  }
  return most;
}

}  // namespace orrery
