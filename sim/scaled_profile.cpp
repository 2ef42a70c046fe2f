#include "sim/scaled_profile.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <system_error>

#include "sim/kernel_prices.hpp"
#include "sim/overrides.hpp"

namespace orrery {
namespace {

GemmModel scaled(GemmModel model, const DieChange& change) {
  model.flops_per_s_per_sm *= change.clock;
  model.operand_bytes_per_s_per_sm *= change.clock;
  model.tile_s /= change.clock;
  model.bytes_per_s *= change.bandwidth;
  return model;
}

AttentionModel scaled(AttentionModel model, const DieChange& change) {
  model.flops_per_s_per_sm *= change.clock;
  model.block_s /= change.clock;
  return model;
}

std::string compute_rule(const DieChange& change) {
  return change.clock == 1 ? "compute as it is" : fmt::format("compute x{:.3g}", change.clock);
}

/// from and to of one quantity; their ratio.
double read_ratio(MapReader& reader, std::string_view key, Dimension dimension, double otherwise) {
  if (!reader.has(key)) return otherwise;
  MapReader map(reader.at(key), reader.problems(), fmt::format("scaled.{}", key));
  const double from = map.quantity("from", dimension);
  const double to = map.quantity("to", dimension);
  map.finish();
  return to / from;
}

}  // namespace

Profile scale_profile(Profile base, const Device& to, const DieChange& change) {
  const Profile before = base;
  Profile& p = base;
  p.device = to;
  for (auto& [sms, share] : p.bandwidth_by_sms) share = std::min(1.0, share / change.bandwidth);
  p.bandwidth_by_sms_source += fmt::format("; over {:.3g} of the memory", change.bandwidth);

  const std::string memory_rule = fmt::format("memory x{:.3g}", change.bandwidth);
  const std::string from = fmt::format(", of {}: ", before.name);
  const std::string source =
      fmt::format("; measured on {}, scaled: {}", before.device.name, change.source);
  const auto spread = [&](double own) { return std::hypot(own, change.spread); };

  for (GemmTable& table : p.gemms) {
    if (table.derived) continue;
    const GemmModel model = scaled(table.model, change);
    for (GemmPoint& point : table.points) {
      const Gemm g = gemm_of(table, point);
      const double was =
          gemm_skeleton_s(table.model, g, point.sms, bandwidth_share(before, point.sms));
      point.seconds *= gemm_skeleton_s(model, g, point.sms, bandwidth_share(p, point.sms)) / was;
    }
    table.model = model;
    table.derived = true;
    table.spread = spread(table.spread);
    table.id += fmt::format("{}{}, {}", from, compute_rule(change), memory_rule);
    table.source += source;
  }
  for (AttentionTable& table : p.attention) {
    if (table.derived) continue;
    const AttentionModel model = scaled(table.model, change);
    for (AttentionPoint& point : table.points) {
      point.seconds *= attention_skeleton_s(model, point.shape, point.sms) /
                       attention_skeleton_s(table.model, point.shape, point.sms);
    }
    table.model = model;
    table.derived = true;
    table.spread = spread(table.spread);
    table.id += fmt::format("{}{}", from, compute_rule(change));
    table.source += source;
  }
  for (auto& [kind, rate] : p.streaming) {
    StreamingRate now = rate;
    now.bytes_per_s *= change.bandwidth;
    for (StreamingPoint& point : now.points) {
      const Streaming s{.kind = kind,
                        .bytes_read = point.bytes_read,
                        .bytes_written = point.bytes_written,
                        .launches = point.launches};
      point.seconds *= streaming_skeleton_s(now, s, point.sms, p) /
                       streaming_skeleton_s(rate, s, point.sms, before);
    }
    now.derived = true;
    now.spread = spread(rate.spread);
    now.id += from + memory_rule;
    now.source += source;
    rate = std::move(now);
  }
  return base;
}

Profile read_scaled_profile(const Node& node, const Device& to, Problems& problems) {
  const std::size_t before = problems.size();
  MapReader reader(node, problems, "scaled");
  const std::string file = reader.text("from");
  DieChange change;
  change.spread = reader.quantity("spread", Dimension::scalar);
  change.source = reader.text("source");
  change.clock = read_ratio(reader, "clock", Dimension::hertz, 1);
  change.bandwidth = read_ratio(reader, "bandwidth", Dimension::bytes_per_s, 0);
  reader.finish();
  if (problems.size() != before) return {};

  const Node named = reader.at("from");
  const std::string path =
      (std::filesystem::path(named.folder()) / file).lexically_normal().string();
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) {
    problems.add(named, fmt::format("there is no profile file '{}'", path));
    return {};
  }
  const Node document = read_named_document(named, path, problems);
  if (problems.size() != before) return {};
  if (document.find("scaled")) {
    problems.add(named, fmt::format("{} is itself scaled", file), "scale what was measured");
    return {};
  }
  Profile base = read_profile(document, problems);
  if (problems.size() != before) return {};
  if (base.device.sms != to.sms) {
    problems.add(named, fmt::format("{} has {} SMs and {} has {}: scaling is for the same SMs",
                                    base.device.name, base.device.sms, to.name, to.sms));
    return {};
  }
  // The same SM does the same per clock; what data sheets call the clock is in their peaks.
  const double peaks = to.bf16_flops_per_s / base.device.bf16_flops_per_s;
  if (!reader.has("clock") && std::abs(peaks - 1) > 0.02) {
    problems.add(
        node,
        fmt::format(
            "{} has {:.3g} times the peak of {}: its SMs run at another clock, or are others",
            to.name, peaks, base.device.name),
        "clock: {from: 1755 MHz, to: 1620 MHz}");
    return {};
  }
  if (change.bandwidth == 0) {
    change.bandwidth = to.memory_bytes_per_s / base.device.memory_bytes_per_s;
  }
  return scale_profile(std::move(base), to, change);
}

}  // namespace orrery
