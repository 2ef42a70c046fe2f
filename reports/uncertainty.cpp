#include "reports/uncertainty.hpp"

#include <fmt/format.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string_view>
#include <variant>

#include "models/step.hpp"
#include "reports/json_object.hpp"
#include "reports/study.hpp"
#include "reports/terminal.hpp"
#include "sim/check.hpp"
#include "sim/random.hpp"

namespace orrery {

namespace {

constexpr double kDecile = 1.2815515655446004;  // of the standard normal distribution

/// FNV-1a: a word as a key of a generator.
std::uint64_t hash_of(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  for (const char c : text) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  }
  return hash;
}

/// The family that a shape's price errs with.
std::string family_of(const Shape& shape) {
  struct Visitor {
    std::string operator()(const Mark&) const { return ""; }
    std::string operator()(const Gemm& g) const {
      return fmt::format("{}GEMM {}{}", g.groups > 1 ? "grouped " : "", name_of(g.inputs),
                         g.pass == Pass::backward_weight ? ", weight gradients" : "");
    }
    std::string operator()(const AttentionCore& a) const {
      return fmt::format("attention {} {}", name_of(a.inputs), a.backward ? "backward" : "forward");
    }
    std::string operator()(const CachedAttention& a) const {
      return fmt::format("attention {} over a cache", name_of(a.inputs));
    }
    std::string operator()(const Streaming& s) const { return std::string(name_of(s.kind)); }
    std::string operator()(const ExpertExchange& e) const {
      return e.combine ? "combine" : "dispatch";
    }
    std::string operator()(const Collective& c) const {
      return fmt::format("{} {}", name_of(c.kind),
                         c.ranks > c.ranks_per_node ? "across nodes" : "in a node");
    }
    std::string operator()(const Send& s) const {
      return s.same_node ? "send in a node" : "send across nodes";
    }
    std::string operator()(const StorageWrite&) const { return "checkpoint"; }
  };
  return std::visit(Visitor{}, shape.work);
}

/// The operation that a shape belongs to, whatever the load of experts it is sized by: its own
/// error.
std::string operation_of(const Shape& shape, const std::string& family) {
  int pass = 0;
  if (const auto* gemm = std::get_if<Gemm>(&shape.work)) pass = static_cast<int>(gemm->pass);
  return fmt::format("{} {} {} {}", family, shape.label, pass, shape.sms);
}

// kFamilySpread: mean logarithms of the times of one family on two machines of the same die, or in
// two releases.
//
// - H200 over H100, ai-dynamo/aiconfigurator @095f58a5, m >= 2048, n, k >= 1024: GEMM FP8 per
// tensor
//   -0.084, FP8 blocks +0.001, BF16 +0.037; attention forward longer than 0.5 ms, KV in BF16
//   -0.016, in FP8 -0.009; DeepEP in a node, 1024 tokens or more, dispatch -0.016, combine -0.007.
// - NCCL all-reduce of 1 GB and more: 8 A100, stas00/ml-engineering over VIA-Research/vTrain
// +0.015;
//   32 H100, GTC over arXiv 2411.13055 +0.053.
// - DeepGEMM, FP8 blocks, m >= 2048: H800 README of February 2025 over April +0.154;
// aiconfigurator's
//   H100 over the README of February -0.082, of the last values +0.061. These three tables also
//   price DeepSeek-V3, so its intervals are not independent of them.
//
// Root mean square 0.062. What the H100 and the H200 share over their families is small (mean
// -0.014, standard deviation 0.036 over the seven), so there is no term that all families have in
// common. Within a family the same pairs differ from shape to shape by 0.10 for GEMMs and 0.05 for
// attention, over the root of 2 for one machine: what held-out errors say, too.

/// Standard deviations of the logarithm of truth over price.
struct Errors {
  double own = 0;
  double family = 0;
};

Errors errors_of(const Price& price) {
  const double of_formula = [&] {
    switch (price.source) {
      case PriceSource::measured:
      case PriceSource::interpolated:
        return 0.0;
      case PriceSource::derived:
        return 0.5;
      case PriceSource::roofline:
        return 1.0;
    }
    return 1.0;
  }();
  return {.own = price.spread * std::sqrt(1 - of_formula),
          .family = std::hypot(price.spread * std::sqrt(of_formula), kFamilySpread)};
}

/// A Program's prices and how they err.
class ErringPrices {
 public:
  ErringPrices(const Program& program, const PriceList& prices) : prices_(prices) {
    const auto& shapes = program.shapes();
    for (ShapeId id; id.value < shapes.size(); ++id) {
      const std::string family = family_of(shapes[id]);
      errors_.push_back(errors_of(prices.prices[id]));
      families_.push_back(family);
      family_keys_.push_back(hash_of(family));
      operation_keys_.push_back(hash_of(operation_of(shapes[id], family)));
    }
  }

  const IdVector<ShapeId, std::string>& families() const { return families_; }
  const Errors& errors(ShapeId id) const { return errors_[id]; }
  std::uint64_t operation(ShapeId id) const { return operation_keys_[id]; }

  PriceList draw(std::uint64_t seed, std::uint64_t number) const {
    PriceList drawn = prices_;
    for (ShapeId id; id.value < errors_.size(); ++id) {
      const auto normal = [&](std::uint64_t key) {
        return Random::of({0x756e6365, seed, number, key}).normal();
      };
      const Errors& e = errors_[id];
      scale(drawn.prices[id],
            std::exp(e.family * normal(family_keys_[id]) + e.own * normal(operation_keys_[id])));
    }
    return drawn;
  }

  PriceList with_family(const std::string& family, double factor) const {
    PriceList scaled = prices_;
    for (ShapeId id; id.value < errors_.size(); ++id) {
      if (families_[id] == family) scale(scaled.prices[id], factor);
    }
    return scaled;
  }

 private:
  static void scale(Price& price, double factor) {
    price.time_ps = std::llround(static_cast<double>(price.time_ps) * factor);
  }

  const PriceList& prices_;
  IdVector<ShapeId, Errors> errors_;
  IdVector<ShapeId, std::string> families_;
  IdVector<ShapeId, std::uint64_t> family_keys_;
  IdVector<ShapeId, std::uint64_t> operation_keys_;
};

double swept_s(const Program& program, const PriceList& prices) {
  return seconds(sweep(program, prices).makespan_ps());
}

/// As many at a time as fit in some memory: a sweep needs 16 bytes an op.
template <class Work>
void for_each_sweep(const Program& program, std::size_t count, Work work) {
  constexpr double kMemoryBytes = 2e9;
  const double each_bytes = 16.0 * static_cast<double>(std::max<std::size_t>(program.size(), 1));
  const int at_once =
      static_cast<int>(std::clamp(kMemoryBytes / each_bytes, 1.0,
                                  static_cast<double>(tbb::this_task_arena::max_concurrency())));
  tbb::task_arena arena(at_once);
  arena.execute([&] { tbb::parallel_for(std::size_t{0}, count, work); });
}

bool draws_loads(const Scenario& scenario) {
  return scenario.model.moe.has_value() && !stated_load(scenario.plan.routing);
}

/// Of all priced op time, by shape.
IdVector<ShapeId, double> op_seconds(const Program& program, const PriceList& prices) {
  IdVector<ShapeId, double> sums(program.shapes().size(), 0.0);
  const auto gpus = program.multiplicity();
  for (OpId op; op.value < program.size(); ++op) {
    const auto streams = program.streams_of(op);
    if (streams.empty()) continue;
    std::int64_t times = 0;
    for (const StreamId s : streams) times += gpus[rank_of(s).value];
    if (program.kind(op) == OpKind::transfer) times = gpus[rank_of(streams.front()).value];
    const ShapeId shape = program.shape(op);
    sums[shape] += static_cast<double>(times) * seconds(prices.prices[shape].time_ps);
  }
  return sums;
}

/// The families of the Program, with the spread of each one's op time.
std::vector<Contribution> families(const Program& program, const PriceList& prices,
                                   const ErringPrices& erring) {
  struct Sum {
    double all_s = 0;
    double together = 0;                         // sum of op time x family's error
    std::map<std::uint64_t, double> operations;  // op time x own error
  };
  std::map<std::string, Sum> sums;
  const auto op_s = op_seconds(program, prices);
  double all_s = 0;
  for (ShapeId id; id.value < op_s.size(); ++id) {
    if (op_s[id] <= 0) continue;
    Sum& sum = sums[erring.families()[id]];
    const Errors& e = erring.errors(id);
    sum.all_s += op_s[id];
    sum.together += op_s[id] * e.family;
    sum.operations[erring.operation(id)] += op_s[id] * e.own;
    all_s += op_s[id];
  }
  std::vector<Contribution> found;
  for (const auto& [family, sum] : sums) {
    double variance = sum.together * sum.together;
    for (const auto& [operation, own] : sum.operations) variance += own * own;
    found.push_back(
        {.family = family, .share = sum.all_s / all_s, .spread = std::sqrt(variance) / sum.all_s});
  }
  return found;
}

}  // namespace

StepUncertainty uncertainty(const Study& study, const UncertaintyOptions& options) {
  ORRERY_CHECK(options.draws > 0 && options.checked >= 0, "{} draws", options.draws);
  const Scenario& scenario = study.scenario;
  const Program& program = study.program;
  const PriceList& prices = study.run.prices;
  const ErringPrices erring(program, prices);
  const double step_s = study.report.step_time_s;
  const double plain_s = swept_s(program, prices);

  StepUncertainty out;
  out.draws = options.draws;
  out.factors.assign(static_cast<std::size_t>(options.draws), 1);
  const auto number_of = [](std::size_t i) { return static_cast<std::uint64_t>(i); };
  for_each_sweep(program, out.factors.size(), [&](std::size_t i) {
    const PriceList drawn = erring.draw(scenario.seed, number_of(i));
    out.factors[i] = swept_s(program, drawn) / plain_s;
  });

  if (draws_loads(scenario)) {
    // Other loads of experts, each with prices as they are; a draw of prices meets one of them.
    constexpr std::size_t kLoads = 16;
    std::vector<double> loads(std::min(kLoads, out.factors.size()), 1);
    const bool all_ranks = static_cast<std::int64_t>(program.ranks()) == study.report.gpus;
    for_each_sweep(program, loads.size(), [&](std::size_t i) {
      Scenario other = scenario;
      other.seed = Random::of({0x6c6f6164, scenario.seed, number_of(i)}).next() >> 1;
      const Program redrawn = build_step(other, {.all_ranks = all_ranks});
      loads[i] = swept_s(redrawn, price_all(redrawn, other.profile, other.cluster)) / plain_s;
    });
    for (std::size_t i = 0; i < out.factors.size(); ++i) out.factors[i] *= loads[i % loads.size()];
    const Interval of_loads = interval_of(loads);
    out.tornado.push_back({.family = "which experts are popular",
                           .step_p10_s = of_loads.p10 * step_s,
                           .step_p90_s = of_loads.p90 * step_s});
  }

  out.step_time_s = interval_of(out.factors).scaled(step_s);
  out.gpu_hours_per_trillion_tokens =
      interval_of(out.factors).scaled(study.report.gpu_hours_per_trillion_tokens);

  std::vector<Contribution> found = families(program, prices, erring);
  for_each_sweep(program, 2 * found.size(), [&](std::size_t i) {
    Contribution& family = found[i / 2];
    const bool slow = i % 2 == 1;
    const double factor = std::exp((slow ? kDecile : -kDecile) * family.spread);
    const double swept = swept_s(program, erring.with_family(family.family, factor));
    (slow ? family.step_p90_s : family.step_p10_s) = step_s * swept / plain_s;
  });
  out.tornado.insert(out.tornado.end(), found.begin(), found.end());
  std::stable_sort(
      out.tornado.begin(), out.tornado.end(),
      [](const Contribution& a, const Contribution& b) { return a.swing_s() > b.swing_s(); });

  if (study.run.traffic && !draws_loads(scenario)) {
    out.checked = std::min(options.checked, options.draws);
    std::vector<double> difference(static_cast<std::size_t>(out.checked), 0);
    tbb::parallel_for(std::size_t{0}, difference.size(), [&](std::size_t i) {
      const PriceList drawn = erring.draw(scenario.seed, number_of(i));
      const auto shares = gpu_shares(program, drawn, scenario.profile, scenario.cluster);
      const Timeline timeline = simulate(program, drawn, {&*study.run.traffic, &shares});
      difference[i] = seconds(timeline.makespan_ps()) / (step_s * out.factors[i]) - 1;
    });
    for (const double d : difference) {
      if (std::abs(d) > std::abs(out.largest_difference)) out.largest_difference = d;
    }
  }
  return out;
}

PriceList drawn_prices(const Program& program, const PriceList& prices, std::uint64_t seed,
                       std::uint64_t number) {
  return ErringPrices(program, prices).draw(seed, number);
}

std::string to_terminal(const StepUncertainty& u) {
  constexpr std::size_t kShown = 8;
  constexpr std::size_t kBar = 25;
  std::string text = fmt::format(
      "How sure that is: {} draws of the prices' errors, P10 to P90\n"
      "  step time {} to {} (median {}), GPU-hours/10^12 {} to {}\n",
      u.draws, format_seconds(u.step_time_s.p10), format_seconds(u.step_time_s.p90),
      format_seconds(u.step_time_s.p50), format_count(u.gpu_hours_per_trillion_tokens.p10),
      format_count(u.gpu_hours_per_trillion_tokens.p90));
  std::vector<std::vector<std::string>> rows{
      {"What it hangs on, each alone", "op time %", "+- %", "step s", "to", ""}};
  const double widest = u.tornado.empty() ? 0 : u.tornado.front().swing_s();
  for (std::size_t i = 0; i < std::min(kShown, u.tornado.size()); ++i) {
    const Contribution& c = u.tornado[i];
    if (c.swing_s() <= 0) break;
    const double cells = c.swing_s() / widest * static_cast<double>(kBar);
    const bool priced = c.share > 0;
    rows.push_back(
        {fmt::format("  {}", c.family), priced ? fmt::format("{:.1f}", 100 * c.share) : "",
         priced ? fmt::format("{:.0f}", 100 * c.spread) : "", fmt::format("{:.3f}", c.step_p10_s),
         fmt::format("{:.3f}", c.step_p90_s),
         std::string(std::max<std::size_t>(1, static_cast<std::size_t>(cells + 0.5)), '#')});
  }
  text += format_table(rows, "lrrrrl");
  if (u.checked > 0) {
    text += fmt::format("  {} of the draws, simulated with flows, differ by at most {:.1f} %\n",
                        u.checked, 100 * std::abs(u.largest_difference));
  }
  return text;
}

void write_uncertainty(JsonWriter& writer, const StepUncertainty& u) {
  JsonObject o(writer);
  o("draws", u.draws);
  write_interval(o, "step_time_s", u.step_time_s);
  write_interval(o, "gpu_hours_per_trillion_tokens", u.gpu_hours_per_trillion_tokens);
  o.array("tornado", u.tornado, [&](const Contribution& c) {
    JsonObject row(writer);
    row("family", c.family);
    row("share", c.share);
    row("spread", c.spread);
    row("step_p10_s", c.step_p10_s);
    row("step_p90_s", c.step_p90_s);
  });
  o("checked", u.checked);
  o("largest_difference", u.largest_difference);
}

std::string to_json(const StepUncertainty& u) {
  return json_document([&](JsonObject& o) { write_uncertainty(o.name("uncertainty"), u); });
}

}  // namespace orrery
