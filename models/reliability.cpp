#include "models/reliability.hpp"

#include <fmt/format.h>

#include <cmath>
#include <initializer_list>
#include <string_view>
#include <utility>

namespace orrery {
namespace {

constexpr std::int64_t kMostGpus = 1 << 24;
const std::initializer_list<std::pair<std::string_view, FailingPart>> kParts = {
    {"gpu", FailingPart::gpu},
    {"nic", FailingPart::nic},
    {"host", FailingPart::host},
    {"switch", FailingPart::network_switch},
    {"job", FailingPart::job}};

RandomTime time_of(MapReader& map, std::string_view key) {
  const Node node = map.require(key);
  if (node.kind() != Node::Kind::map) {
    const double s = map.quantity(key, Dimension::seconds);
    return {s, s};
  }
  MapReader reader(node, map.problems(), std::string(key));
  RandomTime time;
  const std::size_t before = map.problems().size();
  time.median_s = reader.quantity("median", Dimension::seconds);
  time.mean_s = reader.quantity("mean", Dimension::seconds);
  if (map.problems().size() == before && time.mean_s < time.median_s) {
    map.problems().add(
        reader.at("mean"),
        fmt::format("a mean of {} below the median of {}: a log-normal time's is not",
                    format_seconds(time.mean_s), format_seconds(time.median_s)));
  }
  reader.finish();
  return time;
}

/// Of one part, known or counted.
void read_rate(MapReader& map, FailureKind& kind) {
  const bool known = map.has("mtbf");
  const bool counted = map.has("events") || map.has("device_time");
  if (known == counted) {
    map.problems().add(map.node(), "a failure has an mtbf, or events counted in a device_time",
                       "mtbf: 2100 days, or events: 148 and device_time: 884736 days");
    map.allow("events");
    map.allow("device_time");
    return;
  }
  if (known) {
    kind.device_time_s = map.quantity("mtbf", Dimension::seconds);
  } else {
    kind.events = static_cast<double>(map.integer("events", 1, 1'000'000'000));
    kind.device_time_s = map.quantity("device_time", Dimension::seconds);
  }
}

FailureKind read_failure(const Node& node, Problems& problems) {
  MapReader map(node, problems, "a failure");
  FailureKind kind;
  if (node.kind() != Node::Kind::map) return kind;
  kind.what = map.text("what");
  kind.of = map.choice("of", kParts);
  read_rate(map, kind);
  if (map.has("detection")) kind.detection = time_of(map, "detection");
  if (map.has("repair")) {
    kind.repair = time_of(map, "repair");
    if (kind.of == FailingPart::network_switch || kind.of == FailingPart::job) {
      problems.add(
          map.at("repair"),
          fmt::format("repair takes a host out of the job, and a {} is none", name_of(kind.of)),
          "leave it out");
    }
  }
  kind.slowdown = map.number_or("slowdown", 1, 1, 100);
  if (kind.slowdown > 1 && !map.has("detection")) {
    problems.add(map.at("slowdown"), "a slow part slows the job until it is found",
                 "add detection, the time that takes");
  }
  kind.source = map.text_or("source", "");
  map.finish();
  return kind;
}

CheckpointPolicy read_policy(const Node& node, Problems& problems) {
  MapReader map(node, problems, "checkpoint");
  CheckpointPolicy policy;
  policy.write_bytes_per_s = map.quantity("write", Dimension::bytes_per_s);
  policy.read_bytes_per_s = map.quantity("read", Dimension::bytes_per_s);
  if (map.has("bytes")) policy.bytes = map.quantity("bytes", Dimension::bytes);
  if (map.has("blocking")) policy.blocking_s = map.quantity("blocking", Dimension::seconds);
  if (map.has("interval")) policy.interval_s = map.quantity("interval", Dimension::seconds);
  map.finish();
  return policy;
}

std::string yaml_of(const RandomTime& time) {
  if (time.sigma() == 0) return fmt::format("{} s", time.median_s);
  return fmt::format("{{median: {} s, mean: {} s}}", time.median_s, time.mean_s);
}

}  // namespace

double RandomTime::sigma() const {
  return mean_s > median_s ? std::sqrt(2 * std::log(mean_s / median_s)) : 0;
}

std::string_view name_of(FailingPart part) {
  for (const auto& [word, value] : kParts) {
    if (value == part) return word;
  }
  return "?";
}

Reliability read_reliability(const Node& node, Problems& problems) {
  Reliability reliability;
  MapReader map(node, problems, "reliability");
  if (node.kind() != Node::Kind::map) return reliability;
  reliability.name = map.text("name");
  reliability.source = map.text("source");
  reliability.gpus_per_node = map.integer_or("gpus_per_node", 0, 1, 1024);
  reliability.gpus_per_switch = map.integer_or("gpus_per_switch", 0, 1, kMostGpus);
  const Node failures = map.require("failures");
  if (failures.kind() == Node::Kind::sequence) {
    for (std::size_t i = 0; i < failures.size(); ++i) {
      reliability.failures.push_back(read_failure(failures[i], problems));
    }
  } else if (failures.kind() != Node::Kind::null) {
    problems.add(failures, "failures must be a list",
                 "failures: [{what: GPUs, of: gpu, mtbf: 2100 days}]");
  }
  reliability.rate_spread = map.number_or("rate_spread", 0, 0, 3);
  reliability.restart = time_of(map, "restart");
  reliability.checkpoint = read_policy(map.require("checkpoint"), problems);
  if (map.has("spare_hosts")) {
    reliability.spare_hosts = map.integer("spare_hosts", 0, 1'000'000);
  }
  if (map.has("maintenance")) {
    MapReader stops(map.at("maintenance"), problems, "maintenance");
    Maintenance maintenance;
    maintenance.every_s = stops.quantity("every", Dimension::seconds);
    maintenance.takes = time_of(stops, "takes");
    stops.finish();
    reliability.maintenance = maintenance;
  }
  map.finish();
  return reliability;
}

std::string to_yaml(const Reliability& r) {
  std::string out = fmt::format("name: {}\nsource: {}\n", in_quotes(r.name), in_quotes(r.source));
  if (r.gpus_per_node > 0) out += fmt::format("gpus_per_node: {}\n", r.gpus_per_node);
  if (r.gpus_per_switch > 0) out += fmt::format("gpus_per_switch: {}\n", r.gpus_per_switch);
  out += r.failures.empty() ? "failures: []\n" : "failures:\n";
  for (const FailureKind& kind : r.failures) {
    out += fmt::format("  - what: {}\n    of: {}\n", in_quotes(kind.what), name_of(kind.of));
    if (kind.events > 0) {
      out +=
          fmt::format("    events: {}\n    device_time: {} s\n", kind.events, kind.device_time_s);
    } else {
      out += fmt::format("    mtbf: {} s\n", kind.device_time_s);
    }
    if (kind.detection.median_s > 0) {
      out += fmt::format("    detection: {}\n", yaml_of(kind.detection));
    }
    if (kind.repair) out += fmt::format("    repair: {}\n", yaml_of(*kind.repair));
    if (kind.slowdown > 1) out += fmt::format("    slowdown: {}\n", kind.slowdown);
    if (!kind.source.empty()) out += fmt::format("    source: {}\n", in_quotes(kind.source));
  }
  if (r.rate_spread > 0) out += fmt::format("rate_spread: {}\n", r.rate_spread);
  out += fmt::format("restart: {}\n", yaml_of(r.restart));
  const CheckpointPolicy& c = r.checkpoint;
  out += fmt::format("checkpoint: {{write: {} B/s, read: {} B/s", c.write_bytes_per_s,
                     c.read_bytes_per_s);
  if (c.bytes) out += fmt::format(", bytes: {} B", *c.bytes);
  if (c.blocking_s) out += fmt::format(", blocking: {} s", *c.blocking_s);
  if (c.interval_s) out += fmt::format(", interval: {} s", *c.interval_s);
  out += "}\n";
  if (r.spare_hosts) out += fmt::format("spare_hosts: {}\n", *r.spare_hosts);
  if (r.maintenance) {
    out += fmt::format("maintenance: {{every: {} s, takes: {}}}\n", r.maintenance->every_s,
                       yaml_of(r.maintenance->takes));
  }
  return out;
}

}  // namespace orrery
