#include "calibrate/local_cluster.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <variant>

#include "sim/check.hpp"

namespace orrery {
namespace {

double bytes_sent(const NetworkPoint& point) {
  return bus_factor(point.op, point.members) * static_cast<double>(point.bytes);
}

/// a + b x with the least sum of (a + b x - t)^2 / t^2.
struct Line {
  double a = 0;
  double b = 0;
};
Line least_squares(const std::vector<const NetworkPoint*>& points) {
  double w = 0;
  double wx = 0;
  double wxx = 0;
  double wt = 0;
  double wxt = 0;
  for (const NetworkPoint* p : points) {
    const double t = p->seconds.median;
    const double x = bytes_sent(*p);
    const double weight = 1 / (t * t);
    w += weight;
    wx += weight * x;
    wxx += weight * x * x;
    wt += weight * t;
    wxt += weight * x * t;
  }
  const double b = (w * wxt - wx * wt) / (w * wxx - wx * wx);
  const double a = (wt - b * wx) / w;
  if (a >= 0 && b > 0) return {a, b};
  return b > 0 ? Line{0, wxt / wxx} : Line{wt / w, 0};
}

using Groups = std::map<std::pair<std::int64_t, NcclOp>, std::vector<NetworkPoint>>;

Groups by_group(const std::vector<NetworkPoint>& points) {
  Groups groups;
  for (const NetworkPoint& point : points) groups[{point.members, point.op}].push_back(point);
  return groups;
}

/// As nccl-tests would have written it, for fit_nccl.
std::vector<NcclTable> tables_of(const Groups& groups) {
  std::vector<NcclTable> tables;
  for (const auto& [key, points] : groups) {
    NcclTable table;
    table.op = key.second;
    table.ranks = key.first;
    table.ranks_per_node = key.first;
    for (const NetworkPoint& point : points) {
      const double rate = static_cast<double>(point.bytes) / point.seconds.median * 1e-9;
      NcclRow row;
      row.size_bytes = point.bytes;
      row.out_of_place = NcclTiming{.time_us = point.seconds.median * 1e6,
                                    .algbw_gbps = rate,
                                    .busbw_gbps = rate * bus_factor(table.op, table.ranks)};
      table.rows.push_back(row);
    }
    tables.push_back(std::move(table));
  }
  return tables;
}

/// To the four digits that are written.
double rounded(double value, double scale, std::string_view unit, Dimension dimension) {
  return parse_quantity(fmt::format("{:.4g} {}", value / scale, unit), dimension).value_or(value);
}
double rounded_rate(double v) {
  return rounded(v, 1e9, "GB/s", Dimension::bytes_per_s);
}
double rounded_time(double v) {
  return rounded(v, 1e-6, "us", Dimension::seconds);
}

const LinearFit& line_of(const std::vector<LinearFit>& lines, NcclOp op, std::int64_t members) {
  const auto found = std::find_if(lines.begin(), lines.end(), [&](const LinearFit& line) {
    return line.op == op && line.members == members;
  });
  ORRERY_CHECK(found != lines.end(), "{} on {} was not measured", name_of(op), members);
  return *found;
}

/// Where fit_nccl begins: every rate as the lines have it, protocols with thresholds in between.
Cluster first_guess(const LocalClusterInputs& in, const std::vector<LinearFit>& lines) {
  const LinearFit& exchange = line_of(lines, NcclOp::alltoall, in.ranks);
  const LinearFit& reduction = line_of(lines, NcclOp::all_reduce, in.ranks);
  constexpr double kLeastSeconds = 1e-7;
  Cluster c;
  c.name = in.name;
  c.gpus_per_node = in.ranks;
  c.profile = in.profile;
  c.nvlink_peak_bytes_per_s = in.link_copy_bytes_per_s;
  for (const NetworkPoint& point : in.points) {
    c.nvlink_peak_bytes_per_s =
        std::max(c.nvlink_peak_bytes_per_s, bytes_sent(point) / point.seconds.median);
  }
  c.nvlink_peak_bytes_per_s = rounded_rate(1.001 * c.nvlink_peak_bytes_per_s);
  c.nvlink.bandwidth_bytes_per_s = exchange.bytes_per_s;
  c.nvlink.latency_s = rounded_time(std::max(exchange.base_s, kLeastSeconds));
  CollectiveRates& r = c.collectives;
  r.base_s = std::max(exchange.base_s / 2, kLeastSeconds);
  r.nvlink_hop_s = std::max(
      (reduction.base_s - r.base_s) / (2.0 * static_cast<double>(in.ranks - 1)), kLeastSeconds);
  r.low_latency_bytes_per_s = reduction.bytes_per_s;
  r.bulk_latency_s = r.base_s;
  r.copy_bytes_per_s = rounded_rate(in.copy_bytes_per_s);
  r.nvlink_pipeline_bytes = 1;  // nothing waits for a first chunk
  r.peer_bytes_per_s = exchange.bytes_per_s;
  r.peer_latency_s = r.base_s;
  return c;
}

/// As the cluster file has it; of NcclOp those that are measured.
MeasuredLine measured_line(const LinearFit& fit) {
  constexpr double kLeastSeconds = 1e-9;
  MeasuredLine line;
  if (const auto shape = shape_of(fit.op, 1, fit.members, fit.members)) {
    if (const auto* collective = std::get_if<Collective>(&shape->work))
      line.kind = collective->kind;
  }
  line.ranks = fit.members;
  line.base_s = rounded_time(std::max(fit.base_s, kLeastSeconds));
  line.bytes_per_s = rounded_rate(fit.bytes_per_s);
  line.spread = std::min(1.0, std::ceil(fit.held_out.percentile_68 * 1000) / 1000);
  return line;
}

}  // namespace

LinearFit fit_linear(const std::vector<NetworkPoint>& points) {
  ORRERY_CHECK(points.size() >= 3, "{} points", points.size());
  std::vector<const NetworkPoint*> fitted;
  std::vector<const NetworkPoint*> held_out;
  for (const NetworkPoint& point : points) {
    ORRERY_CHECK(point.op == points[0].op && point.members == points[0].members, "{} among {}",
                 name_of(point.op), name_of(points[0].op));
    (&point - points.data()) % 3 == 1 ? held_out.push_back(&point) : fitted.push_back(&point);
  }
  const Line line = least_squares(fitted);
  std::vector<double> ratios;
  ratios.reserve(held_out.size());
  for (const NetworkPoint* p : held_out) {
    ratios.push_back((line.a + line.b * bytes_sent(*p)) / p->seconds.median);
  }
  return {.op = points[0].op,
          .members = points[0].members,
          .base_s = line.a,
          .bytes_per_s = line.b > 0 ? 1 / line.b : INFINITY,
          .held_out = summarise(std::string(name_of(points[0].op)), std::move(ratios))};
}

LocalClusterInputs measure_ranks(Transport& transport, const NetworkMeasureOptions& options) {
  LocalClusterInputs inputs;
  inputs.ranks = transport.ranks();
  inputs.points = measure_network(transport, options);
  inputs.copy_bytes_per_s = measure_copy_rate(transport);
  inputs.link_copy_bytes_per_s = inputs.copy_bytes_per_s;  // all ranks' memory is the machine's
  if (transport.rank() == 0) inputs.machine = kernels::open_cpu_device()->name();
  return inputs;
}

LocalClusterInputs measure_gpus(Transport& transport, std::shared_ptr<const kernels::Nccl> nccl,
                                NetworkMeasureOptions options) {
  options.most_bytes = std::int64_t{256} << 20;
  const std::string library = nccl->name();
  GpuNetwork measured = measure_gpu_network(transport, std::move(nccl), options);
  LocalClusterInputs inputs;
  inputs.ranks = transport.ranks();
  inputs.points = std::move(measured.points);
  inputs.copy_bytes_per_s = measured.copy_bytes_per_s;
  for (const PeerCopy& copy : measured.peers) {
    inputs.link_copy_bytes_per_s = std::max(inputs.link_copy_bytes_per_s, copy.bytes_per_s);
  }
  inputs.peers = std::move(measured.peers);
  inputs.machine = fmt::format("{}, {}", measured.device, library);
  return inputs;
}

LocalCluster fit_local_cluster(const LocalClusterInputs& inputs, Problems& problems) {
  LocalCluster local;
  local.peers = inputs.peers;
  const Groups groups = by_group(inputs.points);
  for (const auto& [key, points] : groups) local.lines.push_back(fit_linear(points));
  std::vector<double> noise;
  noise.reserve(inputs.points.size());
  for (const NetworkPoint& p : inputs.points) noise.push_back(p.seconds.mad / p.seconds.median);
  local.typical_noise = median(noise);
  local.largest_noise = *std::max_element(noise.begin(), noise.end());
  // What was measured by itself, or is not there, is left alone.
  const NcclFitOptions options{.keep = {"collectives.copy_rate", "collectives.nvlink_pipeline"}};
  local.fit = fit_nccl(first_guess(inputs, local.lines), tables_of(groups), options, problems);
  Cluster& c = local.fit.cluster;
  for (const LinearFit& line : local.lines) c.collectives.lines.push_back(measured_line(line));
  const HeldOutError& error = local.fit.node_held_out;
  c.collectives.source = fmt::format(
      "measured on this machine ({}): all_reduce, all_gather, reduce_scatter, alltoall and "
      "sendrecv "
      "of {} sizes, samples within {:.0f} % of their median (MAD, largest {:.0f} %); copy_rate: "
      "each "
      "rank in its own memory, all at once; error on every third size, held out: median {:.1f} %, "
      "90th percentile {:.1f} %",
      inputs.provenance, groups.begin()->second.size(), 100 * local.typical_noise,
      100 * local.largest_noise, 100 * error.median, 100 * error.percentile_90);
  c.nvlink.source = fmt::format(
      "measured on this machine ({}): bandwidth as the collectives; latency: base of base + bytes "
      "/ "
      "bandwidth of alltoalls on {}; peak: the best rate that a message or a copy from rank to "
      "rank "
      "reached",
      inputs.provenance, inputs.ranks);
  return local;
}

std::string local_cluster_report(const LocalCluster& local) {
  std::string out = local.peers.empty() ? "" : peer_copy_report(local.peers) + "\n";
  out += fmt::format("{:<16} {:>5} {:>11} {:>14} {:>10} {:>8} {:>8}\n", "base + bytes/bw", "ranks",
                     "base", "bandwidth", "held out", "median", "90 %");
  for (const LinearFit& line : local.lines) {
    out += fmt::format("{:<16} {:>5} {:>8.2f} us {:>9.3f} GB/s {:>10} {:>6.1f} % {:>6.1f} %\n",
                       name_of(line.op), line.members, line.base_s * 1e6, line.bytes_per_s * 1e-9,
                       line.held_out.points, 100 * line.held_out.median,
                       100 * line.held_out.percentile_90);
  }
  out += fmt::format("samples lie within {:.1f} % of their median (MAD), at most {:.1f} %\n",
                     100 * local.typical_noise, 100 * local.largest_noise);
  return out + "\nThe cluster's formulas, to all of them at once\n" + fit_report(local.fit);
}

}  // namespace orrery
