#include "reports/search/coarse.hpp"

#include <tbb/concurrent_unordered_map.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <type_traits>
#include <utility>
#include <variant>

#include "models/cell.hpp"
#include "models/layout.hpp"
#include "models/plan_rules.hpp"
#include "models/schedule.hpp"
#include "models/step.hpp"
#include "models/step_parts.hpp"
#include "models/stragglers.hpp"
#include "sim/check.hpp"
#include "sim/price.hpp"

namespace orrery {
namespace {

// ---- prices by shape ------------------------------------------------------------------------

void mix(std::size_t& hash, std::size_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15U;
  hash ^= hash >> 32;
}

struct ShapeHash {
  std::size_t operator()(const Shape& shape) const {
    std::size_t hash = std::hash<std::string>()(shape.label);
    mix(hash, shape.work.index());
    mix(hash, static_cast<std::size_t>(shape.sms));
    const auto all = [&](auto... values) { (mix(hash, static_cast<std::size_t>(values)), ...); };
    std::visit(
        [&](const auto& w) {
          using Work = std::decay_t<decltype(w)>;
          if constexpr (std::is_same_v<Work, Gemm>) {
            all(w.inputs, w.pass, w.accumulate, w.groups, w.m, w.n, w.k);
          } else if constexpr (std::is_same_v<Work, AttentionCore>) {
            all(w.inputs, w.backward, w.batch, w.heads, w.q_len, w.kv_len);
          } else if constexpr (std::is_same_v<Work, Streaming>) {
            all(w.kind, w.bytes_read, w.bytes_written, w.launches);
          } else if constexpr (std::is_same_v<Work, ExpertExchange>) {
            all(w.combine, w.format, w.tokens, w.ep, w.gpus_per_node, w.stride);
          } else if constexpr (std::is_same_v<Work, Collective>) {
            all(w.kind, w.bytes, w.ranks, w.ranks_per_node, w.stride);
          } else if constexpr (std::is_same_v<Work, Send>) {
            all(w.bytes, w.same_node);
          } else if constexpr (std::is_same_v<Work, StorageWrite>) {
            all(w.bytes, w.bytes_per_s);
          }
        },
        shape.work);
    return hash;
  }
};

class PriceCache {
 public:
  explicit PriceCache(const Scenario& scenario) : scenario_(scenario) {}

  Picoseconds operator()(const Shape& shape) {
    const auto known = prices_.find(shape);
    if (known != prices_.end()) return known->second;
    const Picoseconds time_ps = price(shape, scenario_.profile, scenario_.cluster).time_ps;
    return prices_.emplace(shape, time_ps).first->second;
  }

 private:
  const Scenario& scenario_;
  tbb::concurrent_unordered_map<Shape, Picoseconds, ShapeHash> prices_;
};

// ---- schedules as arrays --------------------------------------------------------------------

constexpr int kNobody = -1;

/// All actions of a schedule in issue order. What differs from one micro-batch to the next stands
/// in the entries, the rest in the rows that they point to.
struct FlatSchedule {
  /// What one position does again and again: an action on these stages.
  struct Row {
    int position = 0;
    ActionKind kind{};
    int stage = 0;             ///< of the forward half of a pair
    int backward_stage = 0;    ///< = stage but for pairs
    int forward_to = kNobody;  ///< the position that gets the result
    int backward_to = kNobody;
    std::int64_t count = 0;

    bool makes_gradients() const {
      return kind == ActionKind::backward || kind == ActionKind::backward_weight ||
             kind == ActionKind::overlapped;
    }
  };
  struct Entry {
    std::uint32_t row = 0;
    std::uint32_t forward = 0;  ///< stage * micro-batches + micro-batch, of each half
    std::uint32_t backward = 0;
  };

  ScheduleShape shape;
  std::vector<Row> rows;
  std::vector<Entry> entries;
};

FlatSchedule flatten(const ScheduleShape& shape) {
  const Schedule schedule = make_schedule(shape);
  FlatSchedule flat;
  flat.shape = shape;
  const int stages = shape.stages();
  const auto micro_batches = static_cast<std::uint32_t>(shape.micro_batches);
  std::map<std::tuple<int, ActionKind, int, int>, std::uint32_t> row_of;
  for (const ActionId& id : issue_order(schedule)) {
    const Action& a =
        schedule.actions[static_cast<std::size_t>(id.rank)][static_cast<std::size_t>(id.index)];
    const bool pair = a.kind == ActionKind::overlapped;
    const int backward_stage = pair ? a.pair_stage : a.stage;
    const int backward_mb = pair ? a.pair_micro_batch : a.micro_batch;
    const auto [known, inserted] = row_of.try_emplace({id.rank, a.kind, a.stage, backward_stage},
                                                      static_cast<std::uint32_t>(flat.rows.size()));
    if (inserted) {
      FlatSchedule::Row row{
          .position = id.rank, .kind = a.kind, .stage = a.stage, .backward_stage = backward_stage};
      const bool forward = pair || a.kind == ActionKind::forward;
      const bool backward =
          pair || a.kind == ActionKind::backward || a.kind == ActionKind::backward_input;
      // In DualPipe a position's stage tells the direction, so this holds for all micro-batches.
      if (forward && a.stage + 1 < stages) {
        row.forward_to = schedule.rank_of(a.stage + 1, a.micro_batch);
      }
      if (backward && backward_stage > 0) {
        row.backward_to = schedule.rank_of(backward_stage - 1, backward_mb);
      }
      flat.rows.push_back(row);
    }
    ++flat.rows[known->second].count;
    flat.entries.push_back({.row = known->second,
                            .forward = static_cast<std::uint32_t>(a.stage) * micro_batches +
                                       static_cast<std::uint32_t>(a.micro_batch),
                            .backward = static_cast<std::uint32_t>(backward_stage) * micro_batches +
                                        static_cast<std::uint32_t>(backward_mb)});
  }
  return flat;
}

class ScheduleCache {
 public:
  std::shared_ptr<const FlatSchedule> operator()(const ScheduleShape& shape) {
    const Key key{shape.kind, shape.ranks, shape.chunks, shape.micro_batches};
    {
      const std::scoped_lock lock(mutex_);
      const auto known = schedules_.find(key);
      if (known != schedules_.end()) return known->second;
    }
    auto made = std::make_shared<const FlatSchedule>(flatten(shape));
    const std::scoped_lock lock(mutex_);
    if (entries_ > kMaxEntries) {
      schedules_.clear();
      entries_ = 0;
    }
    entries_ += made->entries.size();
    return schedules_.emplace(key, std::move(made)).first->second;
  }

 private:
  static constexpr std::size_t kMaxEntries = 20'000'000;  // 240 MB
  using Key = std::tuple<ScheduleKind, int, int, int>;
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<const FlatSchedule>> schedules_;
  std::size_t entries_ = 0;
};

// ---- cells as matrices ----------------------------------------------------------------------

/// Streams that ops of cells sit on.
enum CellStream : std::size_t { kCompute, kExchange, kTensor, kData, kCellStreams };

CellStream cell_stream(StreamKind kind) {
  switch (kind) {
    case StreamKind::compute:
      return kCompute;
    case StreamKind::expert_exchange:
      return kExchange;
    case StreamKind::tensor:
      return kTensor;
    case StreamKind::data:
      return kData;
    default:
      ORRERY_CHECK(false, "a cell with an op on stream {}", name_of(kind));
      return kCompute;
  }
}

// What a cell starts from: when its streams are free, and its inputs.
constexpr std::size_t kForwardInput = kCellStreams;
constexpr std::size_t kBackwardInput = kCellStreams + 1;
constexpr std::size_t kColumns = kCellStreams + 2;
// What it leaves: when its streams are free, and its results.
constexpr std::size_t kForwardExit = kCellStreams;
constexpr std::size_t kBackwardExit = kCellStreams + 1;
constexpr std::size_t kLastOp = kCellStreams + 2;
constexpr std::size_t kRows = 8;  // one more than there are: two to a vector register

// Times are doubles that hold whole picoseconds: exact up to 2^53 ps = 2.5 h, and minus infinity is
// what does not matter.
constexpr double kNever = -std::numeric_limits<double>::infinity();
using TimeVector = std::array<double, kColumns>;
using ResultVector = std::array<double, kRows>;

struct CellMap {
  /// Result i = max over j of start j + column[j][i].
  std::array<std::array<double, kRows>, kColumns> column{};
  int columns = kColumns;              ///< those behind have no effect
  std::int64_t memory_peak_bytes = 0;  ///< over what is held before, in the cell's own order
  std::int64_t memory_net_bytes = 0;
  // Alone, from time 0:
  double computing_ps = 0;
  double span_ps = 0;
};

/// Of a stage, as far as its cells and parameters depend on it: two stages with equal ones are
/// exchangeable.
bool same_kind(const StageContents& a, const StageContents& b, const Model& model) {
  if (a.layers != b.layers || a.embedding != b.embedding || a.head != b.head ||
      a.mtp_modules != b.mtp_modules) {
    return false;
  }
  for (std::int64_t i = 0; i < a.layers; ++i) {
    if (model.is_moe(a.first_layer + i) != model.is_moe(b.first_layer + i)) return false;
  }
  return true;
}

/// All that cells depend on, but for the stages.
struct WorkKey {
  Parallelism degrees;  ///< pp and dp taken out, ZeRO only where cells have its traffic
  std::array<std::int64_t, 6> per_node{};
  std::array<std::int64_t, 2> copies{};
  std::int64_t micro_batch_sequences = 0;
  std::int64_t sequence_length = 0;
  Precision precision;
  Recompute recompute;
  int communication_sms = 0;

  friend bool operator==(const WorkKey&, const WorkKey&) = default;
};

WorkKey work_key(const Plan& plan, const Layout& layout) {
  WorkKey key;
  key.degrees = plan.parallelism;
  key.degrees.pp = key.degrees.dp = 1;
  constexpr GroupKind kKinds[] = {GroupKind::tensor, GroupKind::context,
                                  GroupKind::expert, GroupKind::expert_tensor,
                                  GroupKind::data,   GroupKind::expert_data};
  const bool traffic = plan.parallelism.zero_stage >= 2;
  if (!traffic) key.degrees.zero_stage = 0;
  for (std::size_t i = 0; i < (traffic ? 6 : 4); ++i) {
    key.per_node[i] = layout.members_per_node(kKinds[i]);
  }
  if (traffic) {
    key.copies = {layout.group_size(GroupKind::data), layout.group_size(GroupKind::expert_data)};
  }
  key.micro_batch_sequences = plan.micro_batch_sequences;
  key.sequence_length = plan.sequence_length;
  key.precision = plan.precision;
  key.recompute = plan.recompute;
  key.communication_sms = plan.communication_sms;
  return key;
}

/// The cells of one WorkKey, compiled when first asked for.
class CellSet {
 public:
  struct Stage {
    StageParameters parameters;
    std::int64_t transient_bytes = 0;
  };

  CellSet(const Scenario& scenario, const Plan& plan, WorkKey key, PriceCache& prices)
      : key_(std::move(key)),
        scenario_(lean(scenario, plan)),
        layout_(plan.parallelism, scenario.cluster.gpus_per_node),
        builder_({1}),
        factory_(scenario_, layout_),
        prices_(prices) {}

  CellSet(const CellSet&) = delete;  // its factory refers to its scenario
  CellSet& operator=(const CellSet&) = delete;

  const WorkKey& key() const { return key_; }

  /// Number of the stages like this one.
  std::size_t kind_of(const StageContents& contents) {
    std::vector<StageContents>& kinds = scenario_.plan.stages;
    for (std::size_t k = 0; k < kinds.size(); ++k) {
      if (same_kind(kinds[k], contents, scenario_.model)) return k;
    }
    kinds.push_back(contents);
    const int k = static_cast<int>(kinds.size() - 1);
    stages_.push_back({stage_parameters(scenario_, k),
                       transient_bytes(scenario_.plan, factory_.workspace_bytes(k, kLoadLevels),
                                       factory_.largest_unit_parameters(k))});
    return static_cast<std::size_t>(k);
  }
  const Stage& stage(std::size_t kind) const { return stages_[kind]; }

  /// `slowdown`: of the rank's computation. The reference stays valid.
  const CellMap& cell(ActionKind kind, std::size_t stage, std::size_t backward_stage,
                      double slowdown) {
    for (const Known& k : known_) {
      if (k.kind == kind && k.stage == stage && k.backward_stage == backward_stage &&
          k.slowdown == slowdown) {
        return k.map;
      }
    }
    known_.push_back(
        {kind, stage, backward_stage, slowdown,
         compile(kind, static_cast<int>(stage), static_cast<int>(backward_stage), slowdown)});
    return known_.back().map;
  }

 private:
  struct Known {
    ActionKind kind{};
    std::size_t stage = 0;
    std::size_t backward_stage = 0;
    double slowdown = 1;
    CellMap map;
  };

  /// What a CellFactory reads of a scenario, with even loads where they are drawn.
  static Scenario lean(const Scenario& scenario, const Plan& plan) {
    Scenario copy;
    copy.model = scenario.model;
    copy.cluster = scenario.cluster;
    copy.profile.device = scenario.profile.device;
    copy.plan = plan;
    copy.plan.stages.clear();
    if (!stated_load(plan.routing)) copy.plan.routing = {};
    return copy;
  }

  double price_of(ShapeId shape) {
    while (times_.size() <= shape.value) {
      times_.push_back(static_cast<double>(prices_(builder_.shapes()[ShapeId(times_.size())])));
    }
    return times_[shape.value];
  }

  CellMap compile(ActionKind kind, int stage, int backward_stage, double slowdown) {
    const CellTemplate cell = factory_.make(kind, stage, backward_stage, builder_);
    constexpr TimeVector kNothing = {kNever, kNever, kNever, kNever, kNever, kNever};
    std::array<TimeVector, kCellStreams> streams;
    for (std::size_t s = 0; s < kCellStreams; ++s) {
      streams[s] = kNothing;
      streams[s][s] = 0;
    }
    CellMap map;
    ends_.resize(cell.ops.size());
    const auto wait_for = [](TimeVector& start, const TimeVector& end) {
      for (std::size_t j = 0; j < kColumns; ++j) start[j] = std::max(start[j], end[j]);
    };
    for (std::size_t i = 0; i < cell.ops.size(); ++i) {
      const CellOp& op = cell.ops[i];
      ORRERY_CHECK(op.sized_by == SizedBy::plan || !factory_.uneven(), "loads are drawn");
      TimeVector& stream = streams[cell_stream(op.stream)];
      TimeVector end = stream;
      for (const std::uint32_t before : op.after) wait_for(end, ends_[before]);
      if (cell.forward_entry == i) end[kForwardInput] = std::max(end[kForwardInput], 0.0);
      if (cell.backward_entry == i) end[kBackwardInput] = std::max(end[kBackwardInput], 0.0);
      double time_ps = price_of(op.shape);
      if (op.kind == OpKind::compute && slowdown != 1) {
        time_ps = static_cast<double>(std::llround(time_ps * slowdown));
      }
      for (double& e : end) e += time_ps;
      if (op.stream == StreamKind::compute) map.computing_ps += time_ps;
      ends_[i] = stream = end;
    }
    const auto result = [&](std::size_t row, const TimeVector& end) {
      for (std::size_t j = 0; j < kColumns; ++j) {
        map.column[j][row] = end[j];
        map.span_ps = std::max(map.span_ps, end[j]);
      }
    };
    result(kRows - 1, kNothing);
    for (std::size_t s = 0; s < kCellStreams; ++s) result(s, streams[s]);
    result(kForwardExit, cell.forward_exit ? ends_[*cell.forward_exit] : kNothing);
    result(kBackwardExit, cell.backward_exit ? ends_[*cell.backward_exit] : kNothing);
    result(kLastOp, ends_[cell.ops.size() - 1]);
    for (const CellMemory& m : cell.memory) {
      map.memory_net_bytes += m.bytes;
      map.memory_peak_bytes = std::max(map.memory_peak_bytes, map.memory_net_bytes);
    }
    return map;
  }

  WorkKey key_;
  Scenario scenario_;  ///< its plan's stages: one of each kind
  Layout layout_;
  ProgramBuilder builder_;  ///< only interns
  CellFactory factory_;
  PriceCache& prices_;
  std::vector<double> times_;  ///< by ShapeId
  std::vector<Stage> stages_;  ///< by kind
  std::deque<Known> known_;
  std::vector<TimeVector> ends_;  // scratch
};

}  // namespace

struct CoarseModel::Shared {
  explicit Shared(const Scenario& s) : scenario(s), prices(s) {}
  const Scenario& scenario;
  PriceCache prices;
  ScheduleCache schedules;
};

namespace {

/// A pipeline rank between two actions.
struct Position {
  std::array<double, kCellStreams> free{};  ///< when streams are, by CellStream
  double send_next = 0, send_previous = 0, receive_previous = 0, receive_next = 0;
  double storage = 0;

  double last() const {
    double end = std::max({send_next, send_previous, receive_previous, receive_next, storage});
    for (const double f : free) end = std::max(end, f);
    return end;
  }
};

/// What a position spends its time on, in picoseconds.
struct Spent {
  PhaseTimes ps;
  double pipeline_end = 0;

  void communicate(double start, double end) {
    ps.exposed_communication += std::max(0.0, end - std::max(start, pipeline_end));
  }
  void optimize(double time_ps) { ps.optimizer += time_ps; }
};

class CoarseRun {
 public:
  CoarseRun(CoarseModel::Shared& shared, CellSet& cells, const Candidate& candidate,
            const Layout& layout)
      : scenario_(shared.scenario),
        plan_(candidate.plan),
        prices_(shared.prices),
        cells_(cells),
        layout_(layout),
        schedules_(shared.schedules),
        positions_(static_cast<std::size_t>(plan_.parallelism.pp)) {
    for (const StageContents& stage : plan_.stages) kinds_.push_back(cells.kind_of(stage));
    const Schedule places{schedule_shape(plan_), {}};  // where stages live does not take actions
    held_ = stages_by_rank(places);
    for (std::size_t s = 0; s < plan_.stages.size(); ++s) {
      holders_.push_back(holders_of(places, static_cast<int>(s)));
    }
    slowdown_.assign(positions_.size(), 1.0);
    slow_down();
    hold_parameters();
  }

  /// Where one micro-batch is too much already, what that takes.
  std::int64_t memory_peak_bytes(double limit_bytes) {
    const std::int64_t least = least_bytes();
    if (static_cast<double>(least) > limit_bytes) return least;
    schedule_ = schedules_(schedule_shape(plan_));
    choose_cells();
    const std::size_t n = positions_.size();
    std::vector<std::int64_t> held(n, 0);
    std::vector<std::int64_t> peak(n, 0);
    for (const FlatSchedule::Entry& entry : schedule_->entries) {
      const Rank& rank = ranks_[entry.row];
      peak[rank.position] =
          std::max(peak[rank.position], held[rank.position] + rank.map->memory_peak_bytes);
      held[rank.position] += rank.map->memory_net_bytes;
    }
    std::int64_t most = 0;
    for (std::size_t p = 0; p < n; ++p) most = std::max(most, static_bytes_[p] + peak[p]);
    return most;
  }

  void time(CoarseStep& step) {
    write_checkpoint();
    run_pipeline();
    run_optimizer();
    double end = 0;
    for (const Position& p : positions_) end = std::max(end, p.last());
    step.time_ps = static_cast<Picoseconds>(end);
    add_phases(end, step.phases_s);
  }

 private:
  /// A row of the schedule with its cell.
  struct Rank {
    const CellMap* map = nullptr;
    std::size_t position = 0;
  };

  double price_of(const Shape& shape) { return static_cast<double>(prices_(shape)); }

  /// What a rank holds all the time, and one micro-batch of one stage, all of which there is
  /// between its forward and its backward.
  std::int64_t least_bytes() {
    std::int64_t least = 0;
    for (std::size_t p = 0; p < positions_.size(); ++p) {
      for (const int s : held_[p]) {
        const std::size_t kind = kinds_[static_cast<std::size_t>(s)];
        const CellMap& forward = cells_.cell(ActionKind::forward, kind, kind, slowdown_[p]);
        least = std::max(least, static_bytes_[p] + forward.memory_net_bytes);
      }
    }
    return least;
  }

  void slow_down() {
    const std::vector<double> of_gpu = slowdowns(scenario_.stragglers, layout_.world(),
                                                 scenario_.cluster.gpus_per_node, scenario_.seed);
    if (of_gpu.empty()) return;
    for (std::size_t p = 0; p < slowdown_.size(); ++p) {
      const auto first = of_gpu.begin() + layout_.rank(static_cast<std::int64_t>(p), 0);
      slowdown_[p] = *std::max_element(first, first + layout_.slots());
    }
  }

  void hold_parameters() {
    for (const std::vector<int>& stages : held_) {
      std::vector<HeldStage> held;
      std::int64_t transient = 0;
      for (const int s : stages) {
        const auto stage = static_cast<std::size_t>(s);
        const CellSet::Stage& kind = cells_.stage(kinds_[stage]);
        held.push_back({kind.parameters, static_cast<std::int64_t>(holders_[stage].size())});
        transient = std::max(transient, kind.transient_bytes);
      }
      elements_.push_back(rank_elements(plan_, layout_, held));
      std::int64_t bytes = 0;
      for (const std::int64_t b :
           static_memory(scenario_.model, plan_, elements_.back(), transient)) {
        bytes += b;
      }
      static_bytes_.push_back(bytes);
    }
  }

  void choose_cells() {
    for (const FlatSchedule::Row& row : schedule_->rows) {
      const auto position = static_cast<std::size_t>(row.position);
      ranks_.push_back(
          {&cells_.cell(row.kind, kinds_[static_cast<std::size_t>(row.stage)],
                        kinds_[static_cast<std::size_t>(row.backward_stage)], slowdown_[position]),
           position});
    }
  }

  void write_checkpoint() {
    if (!plan_.checkpoint) return;
    for (std::size_t p = 0; p < positions_.size(); ++p) {
      positions_[p].storage = price_of(checkpoint_shape(plan_, elements_[p]));
    }
  }

  void run_pipeline() {
    const FlatSchedule& schedule = *schedule_;
    const auto micro_batches = static_cast<std::uint32_t>(schedule.shape.micro_batches);
    const std::size_t results = static_cast<std::size_t>(schedule.shape.stages()) * micro_batches;
    forward_ready_.assign(results, 0);
    backward_ready_.assign(results, 0);
    gradients_ready_.assign(positions_.size() * plan_.stages.size(), 0);
    const std::array<double, 2> send_ps = send_prices(Phase::pipeline_forward);
    const std::array<double, 2> send_back_ps = send_prices(Phase::pipeline_backward);

    for (const FlatSchedule::Entry& entry : schedule.entries) {
      const FlatSchedule::Row& row = schedule.rows[entry.row];
      const CellMap& map = *ranks_[entry.row].map;
      Position& position = positions_[static_cast<std::size_t>(row.position)];
      TimeVector start;
      std::copy(position.free.begin(), position.free.end(), start.begin());
      start[kForwardInput] = forward_ready_[entry.forward];
      start[kBackwardInput] = backward_ready_[entry.backward];
      const ResultVector result = apply(map, start);
      std::copy(result.begin(), result.begin() + kCellStreams, position.free.begin());
      if (row.forward_to != kNobody) {
        forward_ready_[entry.forward + micro_batches] =
            send(row.position, row.forward_to, result[kForwardExit], send_ps);
      }
      if (row.backward_to != kNobody) {
        backward_ready_[entry.backward - micro_batches] =
            send(row.position, row.backward_to, result[kBackwardExit], send_back_ps);
      }
      if (row.makes_gradients()) {
        gradients_ready_[static_cast<std::size_t>(row.position) * plan_.stages.size() +
                         static_cast<std::size_t>(row.backward_stage)] = result[kLastOp];
      }
    }
  }

  static ResultVector apply(const CellMap& map, const TimeVector& start) {
    ResultVector result;
    for (std::size_t i = 0; i < kRows; ++i) result[i] = map.column[0][i] + start[0];
    for (std::size_t j = 1; j < kColumns; ++j) {
      for (std::size_t i = 0; i < kRows; ++i) {
        const double end = map.column[j][i] + start[j];
        result[i] = end > result[i] ? end : result[i];
      }
    }
    return result;
  }

  /// Across nodes, inside one.
  std::array<double, 2> send_prices(Phase phase) {
    if (positions_.size() == 1) return {};
    return {price_of(send_shape(scenario_.model, plan_, phase, false)),
            price_of(send_shape(scenario_.model, plan_, phase, true))};
  }

  /// When the result is there.
  double send(int from, int to, double ready, const std::array<double, 2>& prices_ps) {
    Position& sender = positions_[static_cast<std::size_t>(from)];
    if (from == to) return sender.send_next = std::max(sender.send_next, ready);
    Position& receiver = positions_[static_cast<std::size_t>(to)];
    const bool forwards = to == (from + 1) % static_cast<int>(positions_.size());
    double& out = forwards ? sender.send_next : sender.send_previous;
    double& in = forwards ? receiver.receive_previous : receiver.receive_next;
    const double end = std::max({ready, out, in}) + prices_ps[layout_.same_node(from, to) ? 1 : 0];
    return out = in = end;
  }

  /// `ready(position)`: what a member waits for.
  template <class Ready>
  void run_collectives(const std::vector<StageCollective>& list, Ready ready) {
    for (const StageCollective& c : list) {
      double start = 0;
      for (const int p : c.positions) {
        start = std::max({start, positions_[static_cast<std::size_t>(p)].free[kData], ready(p)});
      }
      const double end = start + price_of(c.shape);
      for (const int p : c.positions) {
        positions_[static_cast<std::size_t>(p)].free[kData] = end;
        spent_[static_cast<std::size_t>(p)].communicate(start, end);
      }
    }
  }

  /// An op on the compute and data streams of a position, not before `after`.
  void run_local(std::size_t p, const Shape& shape, double after) {
    double time_ps = price_of(shape);
    if (slowdown_[p] != 1) time_ps = static_cast<double>(std::llround(time_ps * slowdown_[p]));
    Position& position = positions_[p];
    const double end = std::max({position.free[kCompute], position.free[kData], after}) + time_ps;
    position.free[kCompute] = position.free[kData] = end;
    spent_[p].optimize(time_ps);
  }

  void run_optimizer() {
    const std::size_t n = positions_.size();
    spent_.assign(n, {});
    for (std::size_t p = 0; p < n; ++p) {
      const Position& position = positions_[p];
      spent_[p].pipeline_end =
          std::max({position.free[kCompute], position.free[kExchange], position.free[kTensor]});
    }
    const std::size_t stages = plan_.stages.size();
    for (std::size_t s = 0; s < stages; ++s) {
      run_collectives(
          gradient_reductions(plan_, layout_, parameters_of(s), holders_[s]),
          [&](int p) { return gradients_ready_[static_cast<std::size_t>(p) * stages + s]; });
    }
    for (std::size_t p = 0; p < n; ++p) run_local(p, gradient_norm_shape(elements_[p]), 0);
    double reduced = 0;
    if (plan_.parallelism.world() > 1) {
      for (const Position& p : positions_) reduced = std::max(reduced, p.free[kData]);
      const double start = reduced;
      reduced += price_of(norm_reduction_shape(plan_, scenario_.cluster.gpus_per_node));
      for (std::size_t p = 0; p < n; ++p) {
        positions_[p].free[kData] = reduced;
        spent_[p].communicate(start, reduced);
      }
    }
    for (std::size_t p = 0; p < n; ++p) {
      run_local(p, adamw_shape(plan_, elements_[p]), std::max(reduced, positions_[p].storage));
    }
    for (std::size_t s = 0; s < stages; ++s) {
      run_collectives(parameter_gathers(plan_, layout_, parameters_of(s), holders_[s]),
                      [](int) { return 0.0; });
    }
  }

  const StageParameters& parameters_of(std::size_t stage) const {
    return cells_.stage(kinds_[stage]).parameters;
  }

  void add_phases(double end, PhaseTimes& phases) {
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      const FlatSchedule::Row& row = schedule_->rows[i];
      const auto count = static_cast<double>(row.count);
      const CellMap& map = *ranks_[i].map;
      PhaseTimes& ps = spent_[ranks_[i].position].ps;
      double& part = row.kind == ActionKind::forward           ? ps.forward
                     : row.kind == ActionKind::backward_weight ? ps.weight
                     : row.kind == ActionKind::overlapped      ? ps.overlapped
                                                               : ps.backward;
      part += count * map.computing_ps;
      ps.exposed_communication += count * (map.span_ps - map.computing_ps);
    }
    const double weight = 1e-12 / static_cast<double>(positions_.size());
    for (const Spent& spent : spent_) {
      const PhaseTimes& ps = spent.ps;
      // Cells that overlap at their ends expose less than they do alone.
      const double computing = ps.forward + ps.backward + ps.weight + ps.overlapped + ps.optimizer;
      const double exposed = std::min(ps.exposed_communication, end - computing);
      phases.forward += weight * ps.forward;
      phases.backward += weight * ps.backward;
      phases.weight += weight * ps.weight;
      phases.overlapped += weight * ps.overlapped;
      phases.optimizer += weight * ps.optimizer;
      phases.exposed_communication += weight * exposed;
      phases.bubble += weight * (end - computing - exposed);
    }
  }

  const Scenario& scenario_;
  const Plan& plan_;
  PriceCache& prices_;
  CellSet& cells_;
  const Layout& layout_;
  ScheduleCache& schedules_;
  std::shared_ptr<const FlatSchedule> schedule_;  ///< once memory has not ruled the plan out
  std::vector<std::vector<int>> held_;            ///< stages by position
  std::vector<std::vector<int>> holders_;         ///< positions by stage
  std::vector<std::size_t> kinds_;                ///< by stage
  std::vector<Rank> ranks_;                       ///< by row of the schedule
  std::vector<double> slowdown_;                  ///< by position, as all that follow
  std::vector<RankElements> elements_;
  std::vector<std::int64_t> static_bytes_;
  std::vector<Position> positions_;
  std::vector<Spent> spent_;
  std::vector<double> forward_ready_;  ///< by (stage, micro-batch)
  std::vector<double> backward_ready_;
  std::vector<double> gradients_ready_;  ///< by (position, stage)
};

}  // namespace

CoarseModel::CoarseModel(const Scenario& scenario) : shared_(std::make_unique<Shared>(scenario)) {}
CoarseModel::~CoarseModel() = default;

bool CoarseModel::exact() const {
  return !shared_->scenario.model.moe || stated_load(shared_->scenario.plan.routing).has_value();
}

std::vector<CoarseStep> CoarseModel::evaluate(std::span<const Candidate> candidates,
                                              double memory_limit_bytes) const {
  std::vector<CoarseStep> steps;
  steps.reserve(candidates.size());
  std::optional<CellSet> cells;
  for (const Candidate& candidate : candidates) {
    const Plan& plan = candidate.plan;
    const Layout layout(plan.parallelism, shared_->scenario.cluster.gpus_per_node);
    WorkKey key = work_key(plan, layout);
    if (!cells || cells->key() != key) {
      cells.emplace(shared_->scenario, plan, std::move(key), shared_->prices);
    }
    CoarseRun run(*shared_, *cells, candidate, layout);
    CoarseStep step;
    step.memory_peak_bytes = run.memory_peak_bytes(memory_limit_bytes);
    if (static_cast<double>(step.memory_peak_bytes) <= memory_limit_bytes) run.time(step);
    steps.push_back(step);
  }
  return steps;
}

}  // namespace orrery
