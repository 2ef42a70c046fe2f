#include "calibrate/measured_profile.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <set>
#include <tuple>

#include "calibrate/fit_attention.hpp"
#include "calibrate/minimise.hpp"
#include "sim/check.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

constexpr std::size_t kFolds = 5;
constexpr double kRooflineSpread = 0.5;
constexpr double kLeastSpread = 0.005;  // the error that samples stop at (MeasureOptions)
constexpr double kMostSpread = 10;      // of a profile
/// A kernel's inner loop may be this much faster than the best whole kernel of a table.
constexpr double kHeadroom = 1.5;

constexpr double kLeastSeconds = 1e-9;

/// `fold_of[i]`: points of one fold are held out together. Calls predict(kept, held out) for each
/// fold, which gives predicted / measured of each point held out.
template <class Point, class Predict>
std::vector<double> fold_ratios(const std::vector<Point>& points,
                                const std::vector<std::size_t>& fold_of, const Predict& predict) {
  std::vector<double> ratios;
  for (std::size_t fold = 0; fold < kFolds; ++fold) {
    std::vector<Point> kept;
    std::vector<Point> held_out;
    for (std::size_t i = 0; i < points.size(); ++i) {
      (fold_of[i] == fold ? held_out : kept).push_back(points[i]);
    }
    if (held_out.empty() || kept.size() < 2) continue;
    for (const double ratio : predict(kept, held_out)) ratios.push_back(ratio);
  }
  return ratios;
}

double spread_of(const HeldOutError& error) {
  if (error.points == 0) return kRooflineSpread;
  return std::clamp(error.percentile_68, kLeastSpread, kMostSpread);
}

// ---- GEMM

double flops_of(const GemmTable& table, const GemmPoint& p) {
  return orrery::flops_of(Shape{gemm_of(table, p), "", 0});
}

void fit(GemmTable& table, const std::vector<GemmPoint>& points, const Limits& limits) {
  const double rate = limits.flops_per_s_per_sm / kHeadroom;
  double launch_s = points.front().seconds;
  for (const GemmPoint& p : points) launch_s = std::min(launch_s, p.seconds / 2);
  // The small tiles are for kernels that hardly go by tiles, as a CPU's.
  table.model = {.tiles = {{16, 16}, {64, 64}, {64, 128}, {128, 128}, {128, 256}, {256, 128}},
                 .flops_per_s_per_sm = rate,
                 .operand_bytes_per_s_per_sm = rate / 20,
                 .tile_s = 1e-6,
                 .launch_s = launch_s,
                 .bytes_per_s = limits.bytes_per_s / kHeadroom};
  // Few points say little about a tile's inside.
  fit_model(table, points, limits, points.size() < 8 ? std::vector<int>{1, 2} : std::vector<int>{});
}

/// Layers (n, k) keep together, unless there are fewer of them than folds.
std::vector<std::size_t> folds_of(const std::vector<GemmPoint>& points) {
  std::set<std::pair<std::int64_t, std::int64_t>> layers;
  for (const GemmPoint& p : points) layers.insert({p.n, p.k});
  std::vector<std::size_t> folds;
  for (std::size_t i = 0; i < points.size(); ++i) {
    const auto layer = std::distance(layers.begin(), layers.find({points[i].n, points[i].k}));
    folds.push_back((layers.size() < kFolds ? i : static_cast<std::size_t>(layer)) % kFolds);
  }
  return folds;
}

HeldOutError finish(GemmTable& table, const Profile& profile) {
  std::vector<GemmPoint> all;  // on all SMs: constants and errors come from these
  for (const GemmPoint& p : table.points) {
    if (p.sms == profile.device.sms) all.push_back(p);
  }
  if (all.empty()) all = table.points;
  Limits limits;
  for (const GemmPoint& p : all) {
    limits.flops_per_s_per_sm =
        std::max(limits.flops_per_s_per_sm, kHeadroom * flops_of(table, p) / (p.seconds * p.sms));
    limits.bytes_per_s =
        std::max(limits.bytes_per_s, kHeadroom * bytes_of(gemm_of(table, p)) / p.seconds);
  }
  const auto predict = [&](const std::vector<GemmPoint>& kept,
                           const std::vector<GemmPoint>& held_out) {
    GemmTable others = table;
    others.points = kept;
    fit(others, kept, limits);
    prepare(others, profile);
    std::vector<double> ratios;
    for (const GemmPoint& p : held_out) {
      ratios.push_back(table_seconds(others, gemm_of(table, p), p.sms, 1) / p.seconds);
    }
    return ratios;
  };
  const HeldOutError error = summarise(table.id, fold_ratios(all, folds_of(all), predict));
  fit(table, all, limits);
  table.spread = spread_of(error);
  return error;
}

// ---- Attention

double flops_of(const AttentionPoint& p) {
  return orrery::flops_of(Shape{p.shape, "", 0});
}

std::vector<std::size_t> one_after_the_other(std::size_t count) {
  std::vector<std::size_t> folds;
  for (std::size_t i = 0; i < count; ++i) folds.push_back(i % kFolds);
  return folds;
}

void fit(AttentionTable& table, double peak_flops_per_s_per_sm) {
  fit_attention(table, peak_flops_per_s_per_sm);
  // Few points may leave nothing to a constant; the file's are above zero.
  table.model.block_s = std::max(table.model.block_s, kLeastSeconds);
  table.model.launch_s = std::max(table.model.launch_s, kLeastSeconds);
  prepare(table);
}

HeldOutError finish(AttentionTable& table) {
  double peak = 0;
  for (const AttentionPoint& p : table.points) {
    peak = std::max(peak, kHeadroom * flops_of(p) / (p.seconds * p.sms));
  }
  const auto predict = [&](const std::vector<AttentionPoint>& kept,
                           const std::vector<AttentionPoint>& held_out) {
    AttentionTable others = table;
    others.points = kept;
    fit(others, peak);
    std::vector<double> ratios;
    for (const AttentionPoint& p : held_out) {
      ratios.push_back(table_seconds(others, p.shape, p.sms) / p.seconds);
    }
    return ratios;
  };
  const HeldOutError error = summarise(
      table.id, fold_ratios(table.points, one_after_the_other(table.points.size()), predict));
  fit(table, peak);
  table.spread = spread_of(error);
  return error;
}

// ---- Streaming kernels

Streaming streaming_of(StreamingKind kind, const StreamingPoint& p) {
  return {.kind = kind,
          .bytes_read = p.bytes_read,
          .bytes_written = p.bytes_written,
          .launches = p.launches};
}

double bytes_of(const StreamingPoint& p) {
  return static_cast<double>(p.bytes_read) + static_cast<double>(p.bytes_written);
}

/// Bandwidth and launch that leave the least mean |ln(measured / formula)|.
void fit(StreamingKind kind, StreamingRate& rate, const std::vector<StreamingPoint>& points,
         const Profile& profile) {
  double bytes_per_s = 0;
  double launch_s = points.front().seconds;
  for (const StreamingPoint& p : points) {
    bytes_per_s = std::max(bytes_per_s, bytes_of(p) / p.seconds);
    launch_s = std::min(launch_s, p.seconds / (2 * static_cast<double>(p.launches)));
  }
  std::vector<double> x{std::log(bytes_per_s), std::log(launch_s)};
  const auto with = [&](const std::vector<double>& logs) {
    StreamingRate r = rate;
    r.bytes_per_s = std::exp(logs[0]);
    r.launch_s = std::exp(logs[1]);
    return r;
  };
  const auto loss = [&](const std::vector<double>& logs) {
    const StreamingRate r = with(logs);
    double sum = 0;
    for (const StreamingPoint& p : points) {
      const double s = streaming_skeleton_s(r, streaming_of(kind, p), p.sms, profile);
      sum += std::abs(std::log(p.seconds / s));
    }
    // Nothing else keeps a launch from vanishing.
    return sum / static_cast<double>(points.size()) +
           std::max(0.0, std::log(kLeastSeconds / r.launch_s));
  };
  for (int restart = 0; restart < 3; ++restart) minimise(x, 0.3, 100, loss);
  rate = with(x);
}

HeldOutError finish(StreamingKind kind, StreamingRate& rate, const Profile& profile) {
  std::vector<StreamingPoint> all;
  for (const StreamingPoint& p : rate.points) {
    if (p.sms == profile.device.sms) all.push_back(p);
  }
  if (all.empty()) all = rate.points;
  const auto predict = [&](const std::vector<StreamingPoint>& kept,
                           const std::vector<StreamingPoint>& held_out) {
    StreamingRate others = rate;
    others.points = kept;
    fit(kind, others, kept, profile);
    prepare(kind, others, profile);
    std::vector<double> ratios;
    for (const StreamingPoint& p : held_out) {
      const Streaming s = streaming_of(kind, p);
      const double seconds = table_seconds(others, s, p.label, p.sms, profile)
                                 .value_or(streaming_skeleton_s(others, s, p.sms, profile));
      ratios.push_back(seconds / p.seconds);
    }
    return ratios;
  };
  const HeldOutError error =
      summarise(rate.id, fold_ratios(all, one_after_the_other(all.size()), predict));
  fit(kind, rate, all, profile);
  rate.spread = spread_of(error);
  return error;
}

// ---- The device

/// The best of what was measured, where no data sheet says more.
Device device_of(const MeasuredDevice& measured, std::span<const MeasuredShape> shapes,
                 const std::string& source) {
  Device d;
  if (measured.data_sheet) d = *measured.data_sheet;
  d.name = measured.name;
  d.sms = measured.sms;
  if (measured.data_sheet) return d;
  d.memory_bytes = measured.memory_bytes;
  d.source = "peak rates are the best of what was measured: " + source;
  double any_flops_per_s = 0;
  for (const MeasuredShape& m : shapes) {
    const double flops_per_s = orrery::flops_of(m.shape) / m.seconds;
    d.memory_bytes_per_s = std::max(d.memory_bytes_per_s, bytes_of(m.shape) / m.seconds);
    any_flops_per_s = std::max(any_flops_per_s, flops_per_s);
    NumberFormat inputs = NumberFormat::e5m6;  // of no arithmetic
    if (const auto* g = std::get_if<Gemm>(&m.shape.work)) inputs = g->inputs;
    if (const auto* a = std::get_if<AttentionCore>(&m.shape.work)) inputs = a->inputs;
    const auto best = [&](NumberFormat format, double& rate) {
      if (inputs == format) rate = std::max(rate, flops_per_s);
    };
    best(NumberFormat::bf16, d.bf16_flops_per_s);
    best(NumberFormat::fp8_block, d.fp8_flops_per_s);
    best(NumberFormat::fp32, d.fp32_flops_per_s);
  }
  // A profile has to name a BF16 rate; without any it is that of other formats, or 1 operation a
  // byte moved.
  if (d.bf16_flops_per_s == 0) {
    d.bf16_flops_per_s = any_flops_per_s > 0 ? any_flops_per_s : d.memory_bytes_per_s;
  }
  return d;
}

std::string id_of(const GemmTable& t) {
  return fmt::format("measured-{}gemm-{}-{}{}", t.grouped ? "grouped-" : "", name_of(t.inputs),
                     name_of(t.pass), t.accumulate ? "-accumulating" : "");
}

}  // namespace

MeasuredProfile make_profile(const std::string& name, const MeasuredDevice& device,
                             std::span<const MeasuredShape> shapes,
                             std::vector<std::pair<int, double>> bandwidth_by_sms,
                             const std::string& source) {
  ORRERY_CHECK(!shapes.empty(), "nothing was measured");
  MeasuredProfile result;
  Profile& profile = result.profile;
  profile.name = name;
  profile.device = device_of(device, shapes, source);
  profile.launch_gap_source = "contained in every time, from begin to begin: " + source;
  profile.bandwidth_by_sms = std::move(bandwidth_by_sms);
  profile.bandwidth_by_sms_source = source;

  std::map<std::tuple<NumberFormat, Pass, bool, bool>, GemmTable> gemms;
  std::map<std::pair<NumberFormat, bool>, AttentionTable> attention;
  for (const MeasuredShape& m : shapes) {
    const int sms = m.shape.sms > 0 ? m.shape.sms : device.sms;
    if (const auto* g = std::get_if<Gemm>(&m.shape.work)) {
      GemmTable& t = gemms[{g->inputs, g->pass, g->groups > 1, g->accumulate}];
      t.inputs = g->inputs;
      t.pass = g->pass;
      t.grouped = g->groups > 1;
      t.accumulate = g->accumulate;
      t.points.push_back({g->groups, g->m, g->n, g->k, sms, m.seconds, {}});
    } else if (const auto* a = std::get_if<AttentionCore>(&m.shape.work)) {
      AttentionTable& t = attention[{a->inputs, a->backward}];
      t.inputs = a->inputs;
      t.backward = a->backward;
      t.points.push_back({*a, sms, m.seconds, {}});
    } else if (const auto* s = std::get_if<Streaming>(&m.shape.work)) {
      profile.streaming[s->kind].points.push_back(
          {m.shape.label, s->bytes_read, s->bytes_written, s->launches, sms, m.seconds, {}});
    }
  }
  for (auto& [family, table] : gemms) {
    table.id = id_of(table);
    table.source = source;
    result.errors.push_back(finish(table, profile));
    profile.gemms.push_back(std::move(table));
  }
  for (auto& [family, table] : attention) {
    table.id = fmt::format("measured-attention-{}-{}", name_of(table.inputs),
                           table.backward ? "backward" : "forward");
    table.source = source;
    result.errors.push_back(finish(table));
    profile.attention.push_back(std::move(table));
  }
  for (auto& [kind, rate] : profile.streaming) {
    rate.id = fmt::format("measured-{}", name_of(kind));
    rate.source = source;
    result.errors.push_back(finish(kind, rate, profile));
  }
  prepare(profile);
  return result;
}

}  // namespace orrery
