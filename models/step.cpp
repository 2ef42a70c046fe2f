#include "models/step.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "models/cell.hpp"
#include "models/plan_rules.hpp"
#include "models/schedule.hpp"
#include "models/step_parts.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

/// How slots of a position appear in the Program: one representative, or all of them.
struct Replicas {
  std::int64_t count = 1;  ///< simulated ranks of a position
  RankId rank(int position, std::int64_t slot) const {
    return RankId(static_cast<std::size_t>(position * count + slot));
  }
};

/// Ops that were added for one template op or transfer: one per replica (or per group of replicas).
struct Ids {
  std::uint32_t base = 0;
  bool present = false;
};

class StepBuilder {
 public:
  StepBuilder(const Scenario& scenario, const StepOptions& options)
      : scenario_(scenario),
        plan_(scenario.plan),
        layout_(plan_.parallelism, scenario.cluster.gpus_per_node),
        schedule_(make_schedule(schedule_shape(plan_))),
        held_(stages_by_rank(schedule_)),
        replicas_{options.all_ranks ? layout_.slots() : 1},
        builder_(std::vector<std::int64_t>(
            static_cast<std::size_t>(plan_.parallelism.pp * replicas_.count),
            options.all_ranks ? 1 : layout_.slots())),
        factory_(scenario, layout_) {
    index_groups();
    prepare_loads();
    slow_down();
    for (int s = 0; s < schedule_.shape.stages(); ++s) {
      parameters_.push_back(stage_parameters(scenario, s));
    }
  }

  Program step() {
    compile_templates();
    reserve();
    add_static_memory();
    add_checkpoint();
    add_pipeline();
    add_optimizer();
    return std::move(builder_).seal();
  }

  Program cell(int position, const Action& action) {
    stamp(compile(action), position, action, {}, {});
    return std::move(builder_).seal();
  }

 private:
  using TemplateKey = std::tuple<ActionKind, int, int>;

  // ---- groups of replicas ----

  /// group_[kind][slot] and the members of each group, for the replicas that are simulated. With
  /// rank classes every group is the one representative.
  void index_groups() {
    constexpr GroupKind kKinds[] = {
        GroupKind::tensor,        GroupKind::context,     GroupKind::data,    GroupKind::expert,
        GroupKind::expert_tensor, GroupKind::expert_data, GroupKind::position};
    for (GroupKind kind : kKinds) {
      Groups& g = groups_[static_cast<std::size_t>(kind)];
      if (replicas_.count == 1) {
        g.of_slot = {0};
        g.members = {{0}};
        continue;
      }
      for (std::int64_t slot = 0; slot < replicas_.count; ++slot) {
        g.of_slot.push_back(layout_.group_of(kind, slot));
      }
      for (std::int64_t i = 0; i < layout_.group_count(kind); ++i) {
        g.members.push_back(layout_.members(kind, i));
      }
    }
  }

  struct Groups {
    std::vector<std::int64_t> of_slot;
    std::vector<std::vector<std::int64_t>> members;
  };
  const Groups& groups(GroupKind kind) const { return groups_[static_cast<std::size_t>(kind)]; }

  // ---- uneven experts ----

  void prepare_loads() {
    if (!factory_.uneven()) return;
    const std::int64_t layers = scenario_.model.layers + scenario_.model.mtp_modules;
    draws_.emplace(expert_loads(scenario_));
    loads_.resize(static_cast<std::size_t>(layers * plan_.micro_batches()));
    fullest_.resize(held_.size());
    for (std::int64_t slot = 0; slot < replicas_.count; ++slot) {
      const Coordinates c = layout_.coordinates(slot);
      places_.push_back(
          {static_cast<std::uint32_t>(c.expert_dp), static_cast<std::uint32_t>(c.ep)});
    }
  }

  /// Which GPU of the first group gets the most rows over a position's layers and all
  /// micro-batches.
  std::uint32_t fullest_gpu(int position) {
    std::optional<std::uint32_t>& fullest = fullest_[static_cast<std::size_t>(position)];
    if (fullest) return *fullest;
    std::vector<std::int64_t> rows(static_cast<std::size_t>(plan_.parallelism.ep), 0);
    for (const int stage : held_[static_cast<std::size_t>(position)]) {
      for_each_load(stage, [&](const std::vector<GroupLoad>& loads) {
        for (std::size_t g = 0; g < rows.size(); ++g) rows[g] += loads.front().gpu[g];
      });
    }
    fullest = static_cast<std::uint32_t>(std::max_element(rows.begin(), rows.end()) - rows.begin());
    return *fullest;
  }

  /// visit(loads of all groups) for each layer with experts of a stage, in each micro-batch.
  template <class Visit>
  void for_each_load(int stage, Visit visit) {
    const StageContents& s = plan_.stages[static_cast<std::size_t>(stage)];
    for (std::int64_t layer = s.first_layer; layer < s.first_layer + s.layers; ++layer) {
      if (!scenario_.model.is_moe(layer)) continue;
      for (std::int64_t m = 0; m < plan_.micro_batches(); ++m) visit(loads_at(layer, m));
    }
  }

  /// A slot's place among the experts: which group of GPUs with all experts, and which of its GPUs.
  struct Place {
    std::uint32_t group = 0;
    std::uint32_t gpu = 0;
  };

  /// The loads of all groups that are simulated, drawn when first asked for. With rank classes that
  /// is the first group: it is a fair draw of all, whose times hardly differ over a step, while the
  /// busiest of all groups in each layer would be one that does not exist.
  const std::vector<GroupLoad>& loads_at(std::int64_t layer, std::int64_t micro_batch) {
    std::vector<GroupLoad>& of_groups =
        loads_[static_cast<std::size_t>(layer * plan_.micro_batches() + micro_batch)];
    if (of_groups.empty()) {
      const std::int64_t groups = replicas_.count == 1 ? 1
                                                       : layout_.group_count(GroupKind::expert) /
                                                             plan_.parallelism.expert_tp;
      for (std::int64_t g = 0; g < groups; ++g) {
        of_groups.push_back(draws_->group_load(layer, micro_batch, g));
      }
    }
    return of_groups;
  }

  const GroupLoad& group_load(const std::vector<GroupLoad>& loads, std::int64_t slot) const {
    return loads[places_[static_cast<std::size_t>(slot)].group];
  }

  /// A representative has the rows of the busiest of its group, for whom all others wait.
  LoadLevel rows_of(const std::vector<GroupLoad>& loads, std::int64_t slot) const {
    const GroupLoad& group = group_load(loads, slot);
    return replicas_.count == 1 ? group.busiest_gpu
                                : group.gpu[places_[static_cast<std::size_t>(slot)].gpu];
  }

  /// Rows whose activations a slot keeps. No GPU is the busiest in all layers, so a representative
  /// keeps those of the GPU that gets the most in all of its layers together.
  LoadLevel kept_rows_of(const std::vector<GroupLoad>& loads, int position, std::int64_t slot) {
    return replicas_.count == 1 ? loads.front().gpu[fullest_gpu(position)] : rows_of(loads, slot);
  }

  /// Of an op that one or several slots share, `slot` among them. Those of one expert-tensor group
  /// have the same rows.
  ShapeId shape_of(const CellOp& op, const OpTag& tag, std::int64_t slot) {
    switch (op.sized_by) {
      case SizedBy::plan:
        return op.shape;
      case SizedBy::expert_rows:
        return factory_.shape(op, rows_of(loads_at(tag.layer, tag.micro_batch), slot), builder_);
      case SizedBy::expert_exchange:
        return factory_.shape(op, group_load(loads_at(tag.layer, tag.micro_batch), slot), builder_);
    }
    return op.shape;
  }

  /// What each GPU of a group gets, for the links of an exchange whose shape only says what the
  /// busiest gets. A representative stands for the busiest: then that is all there is to say.
  void add_member_loads(OpId op, const OpTag& tag, const std::vector<std::int64_t>& members) {
    if (replicas_.count == 1) return;
    const std::vector<GroupLoad>& loads = loads_at(tag.layer, tag.micro_batch);
    member_loads_.clear();
    bool even = true;
    for (const std::int64_t slot : members) {
      const LoadLevel level = rows_of(loads, slot);
      even &= level == kLoadLevels;
      member_loads_.push_back(static_cast<std::uint32_t>(std::lround(1000 * load_of(level))));
    }
    if (!even) builder_.member_loads(op, member_loads_);
  }

  /// Most rows that a slot keeps in any layer of a stage and any micro-batch.
  LoadLevel most_rows(int stage, int position, std::int64_t slot) {
    LoadLevel most = kLoadLevels;
    if (!factory_.uneven()) return most;
    for_each_load(stage, [&](const std::vector<GroupLoad>& loads) {
      most = std::max(most, kept_rows_of(loads, position, slot));
    });
    return most;
  }

  // ---- stragglers ----

  /// A representative computes as slowly as the slowest of its class.
  void slow_down() {
    const std::vector<double> of_gpu = slowdowns(scenario_.stragglers, layout_.world(),
                                                 scenario_.cluster.gpus_per_node, scenario_.seed);
    if (of_gpu.empty()) return;
    if (replicas_.count == layout_.slots()) {
      builder_.set_slowdown(of_gpu);
      return;
    }
    std::vector<double> of_position;
    for (std::int64_t p = 0; p < layout_.positions(); ++p) {
      const auto first = of_gpu.begin() + static_cast<std::ptrdiff_t>(layout_.rank(p, 0));
      of_position.push_back(
          *std::max_element(first, first + static_cast<std::ptrdiff_t>(layout_.slots())));
    }
    builder_.set_slowdown(std::move(of_position));
  }

  // ---- templates ----

  CellTemplate compile(const Action& a) {
    return factory_.make(a.kind, a.stage, a.pair_stage, builder_);
  }

  static TemplateKey key_of(const Action& a) { return {a.kind, a.stage, a.pair_stage}; }

  void compile_templates() {
    for (const auto& actions : schedule_.actions) {
      for (const Action& a : actions) {
        const auto [it, inserted] = templates_.try_emplace(key_of(a));
        if (inserted) it->second = compile(a);
      }
    }
  }

  void reserve() {
    std::size_t ops = 0, edges = 0;
    for (const auto& actions : schedule_.actions) {
      for (const Action& a : actions) {
        const CellTemplate& cell = templates_.at(key_of(a));
        ops += cell.ops.size() + 2;
        edges += cell.ops.size() / 4 + 8;
      }
    }
    const auto n = static_cast<std::size_t>(replicas_.count);
    builder_.reserve((ops + 64) * n, (edges + 64) * n);
  }

  // ---- stamping ----

  /// Adds the cell's ops for every replica of a position, op by op: op t of replica i gets id
  /// base[t] + i, or base[t] + group of i where a group shares it. `forward_input` and
  /// `backward_input` are the transfers (or local ops) that the two halves wait for.
  void stamp(const CellTemplate& cell, int position, const Action& action, Ids forward_input,
             Ids backward_input) {
    const std::int64_t replicas = replicas_.count;
    const bool pair = cell.kind == CellKind::overlapped;
    const auto forward_mb = static_cast<std::uint16_t>(action.micro_batch);
    const auto backward_mb =
        static_cast<std::uint16_t>(pair ? action.pair_micro_batch : action.micro_batch);
    builder_.begin_cell({.kind = cell.kind,
                         .stage = static_cast<std::uint16_t>(cell.stage),
                         .pair_stage = static_cast<std::uint16_t>(cell.pair_stage),
                         .micro_batch = forward_mb,
                         .pair_micro_batch = backward_mb,
                         .first = {},
                         .last = {}});
    base_.resize(cell.ops.size());
    for (std::size_t t = 0; t < cell.ops.size(); ++t) {
      const CellOp& op = cell.ops[t];
      base_[t] = static_cast<std::uint32_t>(builder_.size());
      const OpTag tag{.micro_batch = op.half == Half::forward ? forward_mb : backward_mb,
                      .layer = op.layer,
                      .stage = static_cast<std::uint16_t>(
                          op.half == Half::forward ? cell.stage : cell.pair_stage),
                      .phase = op.phase};
      Ids input;
      if (cell.forward_entry && *cell.forward_entry == t) input = forward_input;
      if (cell.backward_entry && *cell.backward_entry == t) input = backward_input;
      if (op.group) {
        for (const auto& members : groups(*op.group).members) {
          streams_.clear();
          predecessors_.clear();
          for (std::int64_t slot : members) {
            streams_.push_back(stream_of(replicas_.rank(position, slot), op.stream));
            collect_predecessors(cell, op, slot, input);
          }
          drop_duplicates(predecessors_);
          const OpId added = builder_.add(op.kind, shape_of(op, tag, members.front()), tag,
                                          streams_, predecessors_);
          if (op.sized_by == SizedBy::expert_exchange) add_member_loads(added, tag, members);
        }
      } else {
        for (std::int64_t slot = 0; slot < replicas; ++slot) {
          predecessors_.clear();
          collect_predecessors(cell, op, slot, input);
          const StreamId stream = stream_of(replicas_.rank(position, slot), op.stream);
          builder_.add(op.kind, shape_of(op, tag, slot), tag, {&stream, 1}, predecessors_);
        }
      }
    }
    builder_.end_cell();
    for (const CellMemory& m : cell.memory) {
      const std::uint16_t micro_batch = m.half == Half::forward ? forward_mb : backward_mb;
      for (std::int64_t slot = 0; slot < replicas; ++slot) {
        std::int64_t bytes = m.bytes;
        if (m.sized_by_rows) {
          bytes =
              factory_.saved_bytes(kept_rows_of(loads_at(m.layer, micro_batch), position, slot));
          if (m.at_end) bytes = -bytes;
        }
        builder_.memory({.op = OpId(id_of(cell, m.op, slot)),
                         .rank = replicas_.rank(position, slot),
                         .kind = MemoryKind::activations,
                         .at_end = m.at_end,
                         .bytes = bytes});
      }
    }
  }

  void collect_predecessors(const CellTemplate& cell, const CellOp& op, std::int64_t slot,
                            Ids input) {
    for (std::uint32_t before : op.after) predecessors_.push_back(OpId(id_of(cell, before, slot)));
    if (input.present) {
      predecessors_.push_back(OpId(input.base + static_cast<std::size_t>(slot)));
    }
  }

  std::uint32_t id_of(const CellTemplate& cell, std::uint32_t t, std::int64_t slot) const {
    const CellOp& op = cell.ops[t];
    const std::int64_t offset =
        op.group ? groups(*op.group).of_slot[static_cast<std::size_t>(slot)] : slot;
    return base_[t] + static_cast<std::uint32_t>(offset);
  }

  static void drop_duplicates(std::vector<OpId>& ids) {
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  }

  // ---- the pipeline ----

  /// Emits actions in an order in which every op follows what it waits for.
  void add_pipeline() {
    const std::size_t cells = static_cast<std::size_t>(schedule_.shape.stages()) *
                              static_cast<std::size_t>(schedule_.shape.micro_batches);
    forward_input_.assign(cells, {});
    backward_input_.assign(cells, {});
    for (const ActionId& id : issue_order(schedule_)) {
      add_action(
          id.rank,
          schedule_.actions[static_cast<std::size_t>(id.rank)][static_cast<std::size_t>(id.index)]);
    }
  }

  std::size_t at(int stage, int micro_batch) const {
    return static_cast<std::size_t>(stage) *
               static_cast<std::size_t>(schedule_.shape.micro_batches) +
           static_cast<std::size_t>(micro_batch);
  }

  void add_action(int position, const Action& a) {
    const CellTemplate& cell = templates_.at(key_of(a));
    const bool pair = a.kind == ActionKind::overlapped;
    const bool has_forward = a.kind == ActionKind::forward || pair;
    const bool has_backward =
        a.kind != ActionKind::forward && a.kind != ActionKind::backward_weight;
    const int backward_stage = pair ? a.pair_stage : a.stage;
    const int backward_mb = pair ? a.pair_micro_batch : a.micro_batch;
    stamp(cell, position, a, has_forward ? forward_input_[at(a.stage, a.micro_batch)] : Ids{},
          has_backward ? backward_input_[at(backward_stage, backward_mb)] : Ids{});
    const auto last = static_cast<std::uint32_t>(cell.ops.size() - 1);
    remember_last(position, cell, last);
    if (has_forward && a.stage + 1 < schedule_.shape.stages()) {
      forward_input_[at(a.stage + 1, a.micro_batch)] =
          send(position, schedule_.rank_of(a.stage + 1, a.micro_batch), cell, *cell.forward_exit,
               a.stage, a.micro_batch, Phase::pipeline_forward);
    }
    if (has_backward && backward_stage > 0) {
      backward_input_[at(backward_stage - 1, backward_mb)] =
          send(position, schedule_.rank_of(backward_stage - 1, backward_mb), cell,
               *cell.backward_exit, backward_stage, backward_mb, Phase::pipeline_backward);
    }
    const bool makes_gradients =
        a.kind == ActionKind::backward || a.kind == ActionKind::backward_weight || pair;
    if (makes_gradients) {
      const int stage = pair ? a.pair_stage : a.stage;
      gradients_ready_[{position, stage}] = last_ids_[static_cast<std::size_t>(position)];
    }
  }

  /// Sends an exit op's result to another position: op i from slot i to slot i. Stages that lie on
  /// the same rank (the turn of a V) hand it over directly.
  Ids send(int from, int to, const CellTemplate& cell, std::uint32_t exit, int stage,
           int micro_batch, Phase phase) {
    if (from == to) {
      // Only ungrouped exits have ids that run with the slots; a join op restores that.
      return join_per_slot(from, cell, exit, stage, micro_batch, phase);
    }
    const ShapeId shape =
        builder_.intern(send_shape(scenario_.model, plan_, phase, layout_.same_node(from, to)));
    const int ranks = schedule_.shape.ranks;
    const bool forwards = to == (from + 1) % ranks;
    const Ids ids{.base = static_cast<std::uint32_t>(builder_.size()), .present = true};
    for (std::int64_t slot = 0; slot < replicas_.count; ++slot) {
      const std::array<StreamId, 2> streams = {
          stream_of(replicas_.rank(from, slot),
                    forwards ? StreamKind::send_next : StreamKind::send_previous),
          stream_of(replicas_.rank(to, slot),
                    forwards ? StreamKind::receive_previous : StreamKind::receive_next)};
      const OpId exit_op(id_of(cell, exit, slot));
      builder_.add(OpKind::transfer, shape,
                   {.micro_batch = static_cast<std::uint16_t>(micro_batch),
                    .layer = kNoLayer,
                    .stage = static_cast<std::uint16_t>(stage),
                    .phase = phase},
                   streams, {&exit_op, 1});
    }
    return ids;
  }

  Ids join_per_slot(int position, const CellTemplate& cell, std::uint32_t exit, int stage,
                    int micro_batch, Phase phase) {
    const ShapeId mark = builder_.intern({.work = Mark{}, .label = "hand over", .sms = 0});
    const Ids ids{.base = static_cast<std::uint32_t>(builder_.size()), .present = true};
    for (std::int64_t slot = 0; slot < replicas_.count; ++slot) {
      const StreamId stream = stream_of(replicas_.rank(position, slot), StreamKind::send_next);
      const OpId exit_op(id_of(cell, exit, slot));
      builder_.add(OpKind::sync, mark,
                   {.micro_batch = static_cast<std::uint16_t>(micro_batch),
                    .layer = kNoLayer,
                    .stage = static_cast<std::uint16_t>(stage),
                    .phase = phase},
                   {&stream, 1}, {&exit_op, 1});
    }
    return ids;
  }

  /// The last op of the newest cell of a position, per slot: what "after this cell" means.
  void remember_last(int position, const CellTemplate& cell, std::uint32_t last) {
    last_ids_.resize(static_cast<std::size_t>(plan_.parallelism.pp));
    std::vector<OpId>& ids = last_ids_[static_cast<std::size_t>(position)];
    ids.clear();
    for (std::int64_t slot = 0; slot < replicas_.count; ++slot) {
      ids.push_back(OpId(id_of(cell, last, slot)));
    }
  }

  // ---- data parallelism ----

  /// `ready(position, slot)` appends what a member waits for.
  template <class Ready>
  void add_collectives(int stage, const std::vector<StageCollective>& list, Phase phase,
                       Ready ready) {
    for (const StageCollective& c : list) {
      const ShapeId shape = builder_.intern(c.shape);
      for (const auto& members : groups(c.group).members) {
        streams_.clear();
        predecessors_.clear();
        for (int position : c.positions) {
          for (std::int64_t slot : members) {
            streams_.push_back(stream_of(replicas_.rank(position, slot), StreamKind::data));
            ready(position, slot);
          }
        }
        drop_duplicates(predecessors_);
        builder_.add(OpKind::collective, shape,
                     {.micro_batch = 0,
                      .layer = kNoLayer,
                      .stage = static_cast<std::uint16_t>(stage),
                      .phase = phase},
                     streams_, predecessors_);
      }
    }
  }

  RankElements elements_of(int position) const {
    std::vector<HeldStage> held;
    for (int s : held_[static_cast<std::size_t>(position)]) {
      held.push_back({parameters_[static_cast<std::size_t>(s)],
                      static_cast<std::int64_t>(holders_of(schedule_, s).size())});
    }
    return rank_elements(plan_, layout_, held);
  }

  /// Gradient reduction, gradient norm and clipping, AdamW, and the new parameters back to all
  /// copies.
  void add_optimizer() {
    const Parallelism& par = plan_.parallelism;
    const int positions = static_cast<int>(par.pp);
    builder_.begin_cell({.kind = CellKind::optimizer,
                         .stage = 0,
                         .pair_stage = 0,
                         .micro_batch = 0,
                         .pair_micro_batch = 0,
                         .first = {},
                         .last = {}});
    const int stages = schedule_.shape.stages();
    for (int s = 0; s < stages; ++s) {
      add_collectives(s,
                      gradient_reductions(plan_, layout_, parameters_[static_cast<std::size_t>(s)],
                                          holders_of(schedule_, s)),
                      Phase::gradient_sync, [&](int position, std::int64_t slot) {
                        predecessors_.push_back(
                            gradients_ready_.at({position, s})[static_cast<std::size_t>(slot)]);
                      });
    }
    const OpTag tag{.micro_batch = 0, .layer = kNoLayer, .stage = 0, .phase = Phase::optimizer};
    const auto every_rank = [&](auto visit) {
      for (int p = 0; p < positions; ++p) {
        for (std::int64_t slot = 0; slot < replicas_.count; ++slot) visit(p, slot);
      }
    };
    // Sum of squares of the local shard; on the data stream, so it follows this rank's reductions.
    const auto local = [&](auto shape_of, std::optional<OpId> everyone_after, bool changes_state) {
      every_rank([&](int p, std::int64_t slot) {
        const ShapeId shape = builder_.intern(shape_of(p));
        const std::array<StreamId, 2> streams = {
            stream_of(replicas_.rank(p, slot), StreamKind::compute),
            stream_of(replicas_.rank(p, slot), StreamKind::data)};
        predecessors_.clear();
        if (everyone_after) predecessors_.push_back(*everyone_after);
        if (changes_state && checkpoint_) {
          predecessors_.push_back(
              OpId(checkpoint_->value + static_cast<std::size_t>(p * replicas_.count + slot)));
        }
        builder_.add(OpKind::compute, shape, tag, streams, predecessors_);
      });
    };
    local([&](int p) { return gradient_norm_shape(elements_of(p)); }, std::nullopt, false);
    streams_.clear();
    every_rank([&](int p, std::int64_t slot) {
      streams_.push_back(stream_of(replicas_.rank(p, slot), StreamKind::data));
    });
    const ShapeId norm =
        builder_.intern(norm_reduction_shape(plan_, scenario_.cluster.gpus_per_node));
    std::optional<OpId> reduced;
    if (par.world() > 1) reduced = builder_.add(OpKind::collective, norm, tag, streams_, {});
    local([&](int p) { return adamw_shape(plan_, elements_of(p)); }, reduced, true);
    for (int s = 0; s < stages; ++s) {
      add_collectives(s,
                      parameter_gathers(plan_, layout_, parameters_[static_cast<std::size_t>(s)],
                                        holders_of(schedule_, s)),
                      Phase::parameter_gather, [](int, std::int64_t) {});
    }
    builder_.end_cell();
  }

  // ---- what goes on in the background ----

  void add_checkpoint() {
    if (!plan_.checkpoint) return;
    checkpoint_ = OpId(builder_.size());
    for (int p = 0; p < static_cast<int>(plan_.parallelism.pp); ++p) {
      const ShapeId shape = builder_.intern(checkpoint_shape(plan_, elements_of(p)));
      for (std::int64_t slot = 0; slot < replicas_.count; ++slot) {
        const StreamId stream = stream_of(replicas_.rank(p, slot), StreamKind::storage);
        builder_.add(OpKind::transfer, shape,
                     {.micro_batch = 0, .layer = kNoLayer, .stage = 0, .phase = Phase::checkpoint},
                     {&stream, 1}, {});
      }
    }
  }

  // ---- memory that is there all the time ----

  void add_static_memory() {
    const Parallelism& par = plan_.parallelism;
    const ShapeId mark = builder_.intern({.work = Mark{}, .label = "begin", .sms = 0});
    for (int p = 0; p < static_cast<int>(par.pp); ++p) {
      const RankElements elements = elements_of(p);
      const auto workspace_of = [&](std::int64_t slot) {
        std::int64_t transient = 0;
        for (int s : held_[static_cast<std::size_t>(p)]) {
          transient = std::max(
              transient, transient_bytes(plan_, factory_.workspace_bytes(s, most_rows(s, p, slot)),
                                         factory_.largest_unit_parameters(s)));
        }
        return transient;
      };
      for (std::int64_t slot = 0; slot < replicas_.count; ++slot) {
        const RankId rank = replicas_.rank(p, slot);
        const StreamId stream = stream_of(rank, StreamKind::compute);
        const OpId op = builder_.add(
            OpKind::sync, mark,
            {.micro_batch = 0, .layer = kNoLayer, .stage = 0, .phase = Phase::optimizer},
            {&stream, 1}, {});
        const auto bytes = static_memory(scenario_.model, plan_, elements, workspace_of(slot));
        for (std::size_t kind = 0; kind < bytes.size(); ++kind) {
          if (bytes[kind] == 0) continue;
          builder_.memory({.op = op,
                           .rank = rank,
                           .kind = static_cast<MemoryKind>(kind),
                           .at_end = false,
                           .bytes = bytes[kind]});
        }
      }
    }
  }

  const Scenario& scenario_;
  const Plan& plan_;
  Layout layout_;
  Schedule schedule_;
  std::vector<std::vector<int>> held_;  ///< stages by position
  Replicas replicas_;
  ProgramBuilder builder_;
  CellFactory factory_;
  std::array<Groups, 7> groups_;
  std::optional<ExpertLoads> draws_;                   ///< none: experts are even, or evenly uneven
  std::vector<std::vector<GroupLoad>> loads_;          ///< by (layer, micro-batch), as asked for
  std::vector<Place> places_;                          ///< by slot
  std::vector<std::optional<std::uint32_t>> fullest_;  ///< by position: GPU of its first group
  std::optional<OpId> checkpoint_;                     ///< the first of one op per simulated rank
  std::vector<StageParameters> parameters_;
  std::map<TemplateKey, CellTemplate> templates_;
  std::vector<Ids> forward_input_;  ///< by (stage, micro-batch)
  std::vector<Ids> backward_input_;
  std::vector<std::vector<OpId>> last_ids_;                           ///< by position, slot
  std::map<std::pair<int, int>, std::vector<OpId>> gradients_ready_;  ///< by (position, stage)
  // Scratch, kept to save allocations.
  std::vector<std::uint32_t> base_;
  std::vector<StreamId> streams_;
  std::vector<OpId> predecessors_;
  std::vector<std::uint32_t> member_loads_;
};

}  // namespace

StageParameters stage_parameters(const Scenario& scenario, int stage) {
  const Model& model = scenario.model;
  const Plan& plan = scenario.plan;
  const StageContents& s = plan.stages[static_cast<std::size_t>(stage)];
  StageParameters p;
  const auto add = [&](const LayerShard& shard) {
    p.dense += shard.dense;
    p.expert += shard.expert;
    p.tensor_summed += shard.tensor_summed;
  };
  if (s.embedding) add(embedding_shard(model, plan));
  for (std::int64_t l = s.first_layer; l < s.first_layer + s.layers; ++l) {
    add(layer_shard(model, plan, model.is_moe(l)));
  }
  if (s.head) {
    add(head_shard(model, plan));
    // On one stage with the embedding a tied head is no copy.
    if (model.tied_embeddings && s.embedding) {
      p.dense -= model.vocabulary * model.hidden / plan.parallelism.tp;
    }
  }
  for (std::int64_t i = 0; i < s.mtp_modules; ++i) {
    add(layer_shard(model, plan, model.is_moe(model.layers - 1)));
    add(mtp_front_shard(model, plan));
  }
  return p;
}

ExpertLoads expert_loads(const Scenario& scenario) {
  const Model& model = scenario.model;
  const Parallelism& p = scenario.plan.parallelism;
  const Layout layout(p, scenario.cluster.gpus_per_node);
  ExpertGroupShape shape;
  shape.gpus = p.ep;
  shape.gpus_per_node =
      std::min({scenario.cluster.gpus_per_node, layout.members_per_node(GroupKind::expert), p.ep});
  shape.groups = layout.group_count(GroupKind::expert) / p.expert_tp;
  // Ranks that share an expert's columns share its rows.
  shape.tokens_per_gpu =
      scenario.plan.micro_batch_tokens() / (p.sequence_parallel ? p.tp : 1) * p.expert_tp;
  shape.tokens = shape.tokens_per_gpu * p.ep;
  std::int64_t last = model.layers - 1;
  while (last > 0 && !model.is_moe(last)) --last;
  return {scenario.plan.routing, *model.moe, shape, last, scenario.seed};
}

Program build_step(const Scenario& scenario, const StepOptions& options) {
  return StepBuilder(scenario, options).step();
}

Program build_cell(const Scenario& scenario, int position, const Action& action) {
  return StepBuilder(scenario, {}).cell(position, action);
}

}  // namespace orrery
