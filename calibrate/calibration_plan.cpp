#include "calibrate/calibration_plan.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <tuple>

#include "calibrate/journal.hpp"
#include "models/layer_work.hpp"
#include "models/step.hpp"
#include "sim/memory.hpp"
#include "sim/price.hpp"

namespace orrery {
namespace {

bool is_compute(const Shape& shape) {
  return std::holds_alternative<Gemm>(shape.work) ||
         std::holds_alternative<AttentionCore>(shape.work) ||
         std::holds_alternative<Streaming>(shape.work);
}

class Planner {
 public:
  explicit Planner(int device_sms) : device_sms_(device_sms) {}

  /// `weight`: the step's part of all shares.
  void add_step(const Scenario& scenario, double weight) {
    const Program program = build_step(scenario);
    const PriceList prices = price_all(program, scenario.profile, scenario.cluster);
    const OpSetting setting{&scenario.model, &scenario.plan};
    const auto counts = program.shape_counts();
    double sum = 0;
    std::vector<CalibrationItem> items;
    for (std::size_t i = 0; i < program.shapes().size(); ++i) {
      const ShapeId id(i);
      if (!is_compute(program.shapes()[id])) continue;
      const double s = static_cast<double>(counts[id]) * seconds(prices.prices[id].time_ps);
      sum += s;
      items.push_back({on_device(program.shapes()[id]), setting, s});
    }
    for (CalibrationItem& item : items) {
      item.share *= weight / std::max(sum, 1e-30);
      add(std::move(item));
    }
    const MemoryTimeline memory = trace_memory(program, sweep(program, prices));
    for (const MemoryPeak& peak : memory.peaks) {
      // The optimizer's states are touched once a step.
      const std::int64_t states =
          peak.bytes_by_kind[static_cast<std::size_t>(MemoryKind::optimizer_state)];
      plan_.pass_bytes = std::max(plan_.pass_bytes, peak.bytes - states);
    }
  }

  /// Costliest first; equal ones as they came.
  void sort_by_share() {
    std::stable_sort(plan_.items.begin(), plan_.items.end(),
                     [](const auto& a, const auto& b) { return a.share > b.share; });
    steps_ = plan_.items.size();
  }

  void add_gemm_grid() {
    using Family = std::tuple<NumberFormat, Pass, bool, bool>;
    struct Range {
      std::array<std::int64_t, 3> low{}, high{};
      std::int64_t groups = 1;
      double flops = 0;
      OpSetting setting;
    };
    std::map<Family, Range> families;
    for (std::size_t i = 0; i < steps_; ++i) {
      const auto* g = std::get_if<Gemm>(&plan_.items[i].shape.work);
      if (g == nullptr) continue;
      Range& r = families[{g->inputs, g->pass, g->accumulate, g->groups > 1}];
      const std::array<std::int64_t, 3> d{g->m, g->n, g->k};
      const bool first = r.flops == 0;
      for (std::size_t j = 0; j < 3; ++j) {
        r.low[j] = first ? d[j] : std::min(r.low[j], d[j]);
        r.high[j] = std::max(r.high[j], d[j]);
      }
      r.groups = std::max(r.groups, g->groups);
      r.flops = std::max(r.flops, flops_of(plan_.items[i].shape));
      if (first) r.setting = plan_.items[i].setting;
    }
    for (const auto& [family, r] : families) {
      const auto [inputs, pass, accumulate, grouped] = family;
      const std::int64_t step = inputs == NumberFormat::fp8_block ? 128 : 16;
      std::array<std::vector<std::int64_t>, 3> values;
      for (std::size_t j = 0; j < 3; ++j) values[j] = three_values(r.low[j], r.high[j], step);
      std::vector<CalibrationItem> items;
      for (const std::int64_t m : values[0]) {
        for (const std::int64_t n : values[1]) {
          for (const std::int64_t k : values[2]) {
            const Gemm g{inputs, pass, accumulate, grouped ? r.groups : 1, m, n, k};
            Shape shape{.work = g, .label = "", .sms = 0};
            if (flops_of(shape) <= 2 * r.flops) items.push_back({std::move(shape), r.setting});
          }
        }
      }
      std::stable_sort(items.begin(), items.end(), [](const auto& a, const auto& b) {
        return flops_of(a.shape) < flops_of(b.shape);
      });
      for (CalibrationItem& item : items) add(std::move(item));
    }
  }

  void add_attention_grid() {
    for (std::size_t i = 0; i < steps_; ++i) {
      const CalibrationItem item = plan_.items[i];
      const auto* a = std::get_if<AttentionCore>(&item.shape.work);
      if (a == nullptr) continue;
      for (const double factor : {0.25, 0.5, 2.0}) {
        AttentionCore other = *a;
        other.q_len = std::llround(static_cast<double>(a->q_len) * factor);
        other.kv_len = std::llround(static_cast<double>(a->kv_len) * factor);
        if (other.q_len >= 16) add({{other, "", 0}, item.setting});
      }
      if (a->heads % 2 == 0 && a->kv_heads % 2 == 0) {
        AttentionCore other = *a;
        other.heads /= 2;
        other.kv_heads /= 2;
        add({{other, "", 0}, item.setting});
      }
    }
  }

  /// The same layers on other numbers of tokens.
  void add_streaming_grid(const Scenario& scenario) {
    const Plan& plan = scenario.plan;
    for (const auto& [times, over] : {std::pair{1, 4}, std::pair{1, 2}, std::pair{2, 1}}) {
      // Sequences must still divide among ranks.
      const std::int64_t parts = over * plan.parallelism.cp * 2 * plan.parallelism.tp;
      if (plan.sequence_length % parts != 0) continue;
      plan_.plans.push_back(std::make_unique<Plan>(plan));
      Plan& other = *plan_.plans.back();
      other.sequence_length = plan.sequence_length * times / over;
      const OpSetting setting{&scenario.model, &other};
      const std::int64_t gpus = scenario.cluster.gpus_per_node;
      const auto add_work = [&](const Work& work) {
        for (const WorkItem& item : work) {
          if (!std::holds_alternative<Streaming>(item.shape.work)) continue;
          if (!labels_.contains(item.shape.label)) continue;  // the step has none
          add({on_device(item.shape), setting});
        }
      };
      for (const bool moe : {false, true}) {
        const auto& layers = scenario.model.layer_is_moe;
        if (std::find(layers.begin(), layers.end(), moe) == layers.end()) continue;
        const LayerWork w = transformer_layer(scenario.model, other, gpus, moe);
        for (const Work* part :
             {&w.attn_forward, &w.dispatch_forward, &w.mlp_forward, &w.combine_forward,
              &w.combine_backward, &w.mlp_backward, &w.mlp_weight, &w.dispatch_backward,
              &w.attn_backward, &w.attn_weight}) {
          add_work(*part);
        }
      }
      std::vector<EdgeWork> edges{embedding_work(scenario.model, other, gpus),
                                  head_work(scenario.model, other, gpus)};
      if (scenario.model.mtp_modules > 0) {
        edges.push_back(mtp_front_work(scenario.model, other, gpus));
      }
      for (const EdgeWork& edge : edges) {
        for (const Work* part : {&edge.forward, &edge.backward, &edge.weight}) add_work(*part);
      }
    }
  }

  /// Optimizers of fewer elements. Their bytes have to be whole elements', so the elements are
  /// scaled.
  void add_optimizer_grid() {
    for (std::size_t i = 0; i < steps_; ++i) {
      const CalibrationItem item = plan_.items[i];
      const auto* s = std::get_if<Streaming>(&item.shape.work);
      if (s == nullptr) continue;
      const Precision& p = item.setting.plan->precision;
      const std::int64_t state = p.master_bytes + p.moment_bytes;
      for (const std::int64_t part : {4, 16}) {
        Streaming other = *s;
        if (s->kind == StreamingKind::reduction) {
          other.bytes_read = s->bytes_read / 4 / part * 4;
        } else if (s->kind == StreamingKind::optimizer) {
          const std::int64_t elements = s->bytes_read / (p.gradient_bytes + state);
          const std::int64_t cleared = s->bytes_written - elements * (state + p.parameter_bytes);
          other.bytes_read = elements / part * (p.gradient_bytes + state);
          other.bytes_written =
              elements / part * (state + p.parameter_bytes) + cleared / 4 / part * 4;
        } else {
          continue;
        }
        if (other.bytes_read > 0) add({{other, item.shape.label, item.shape.sms}, item.setting});
      }
    }
  }

  CalibrationPlan take() { return std::move(plan_); }

 private:
  Shape on_device(Shape shape) const {
    if (shape.sms >= device_sms_) shape.sms = 0;
    return shape;
  }

  void add(CalibrationItem item) {
    const auto* streaming = std::get_if<Streaming>(&item.shape.work);
    if (streaming != nullptr) {
      if (streaming->bytes_read + streaming->bytes_written == 0) return;
      if (steps_ == 0) labels_.insert(item.shape.label);
    }
    const auto [at, is_new] = index_.emplace(measured_key(item.shape), plan_.items.size());
    if (is_new) {
      plan_.items.push_back(std::move(item));
    } else {
      plan_.items[at->second].share += item.share;
    }
  }

  /// Ends and geometric middle, in multiples of `step`; a single value gets neighbours.
  static std::vector<std::int64_t> three_values(std::int64_t low, std::int64_t high,
                                                std::int64_t step) {
    if (low == high) {
      low = std::max<std::int64_t>(1, low / 2);
      high *= 2;
    }
    std::set<std::int64_t> values;
    const double middle = std::sqrt(static_cast<double>(low) * static_cast<double>(high));
    for (const double v : {static_cast<double>(low), middle, static_cast<double>(high)}) {
      const auto steps = std::max<std::int64_t>(1, std::llround(v / static_cast<double>(step)));
      values.insert(steps * step);
    }
    return {values.begin(), values.end()};
  }

  int device_sms_;
  CalibrationPlan plan_;
  std::map<std::string, std::size_t> index_;  ///< of items, by measured_key; until sorted
  std::set<std::string> labels_;              ///< of streaming ops of the steps
  std::size_t steps_ = 0;                     ///< items of the steps; the grids follow
};

}  // namespace

CalibrationPlan plan_calibration(std::span<const Scenario> scenarios, int device_sms) {
  Planner planner(device_sms);
  const double weight = 1 / static_cast<double>(scenarios.size());
  for (const Scenario& scenario : scenarios) planner.add_step(scenario, weight);
  planner.sort_by_share();
  planner.add_gemm_grid();
  planner.add_attention_grid();
  for (const Scenario& scenario : scenarios) planner.add_streaming_grid(scenario);
  planner.add_optimizer_grid();
  return planner.take();
}

}  // namespace orrery
