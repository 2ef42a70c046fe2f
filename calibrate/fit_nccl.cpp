#include "calibrate/fit_nccl.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iterator>
#include <map>
#include <set>

#include "calibrate/minimise.hpp"
#include "sim/price.hpp"

namespace orrery {
namespace {

constexpr double kClip = 0.5;  // a row further off than this counts, but no more

struct Quantity {
  std::string_view name;
  double& (*of)(Cluster&);
  double scale;
  std::string_view unit;
  Dimension dimension;
};

constexpr Quantity kQuantities[] = {
    {"nvlink.bandwidth", [](Cluster& c) -> double& { return c.nvlink.bandwidth_bytes_per_s; }, 1e9,
     "GB/s", Dimension::bytes_per_s},
    {"nic.bandwidth", [](Cluster& c) -> double& { return c.nic.bandwidth_bytes_per_s; }, 1e9,
     "GB/s", Dimension::bytes_per_s},
    {"collectives.base", [](Cluster& c) -> double& { return c.collectives.base_s; }, 1e-6, "us",
     Dimension::seconds},
    {"collectives.nvlink_hop", [](Cluster& c) -> double& { return c.collectives.nvlink_hop_s; },
     1e-6, "us", Dimension::seconds},
    {"collectives.low_latency_rate",
     [](Cluster& c) -> double& { return c.collectives.low_latency_bytes_per_s; }, 1e9, "GB/s",
     Dimension::bytes_per_s},
    {"collectives.bulk_latency", [](Cluster& c) -> double& { return c.collectives.bulk_latency_s; },
     1e-6, "us", Dimension::seconds},
    {"collectives.copy_rate", [](Cluster& c) -> double& { return c.collectives.copy_bytes_per_s; },
     1e9, "GB/s", Dimension::bytes_per_s},
    {"collectives.nvlink_pipeline",
     [](Cluster& c) -> double& { return c.collectives.nvlink_pipeline_bytes; }, 1e6, "MB",
     Dimension::bytes},
    {"collectives.peer_rate", [](Cluster& c) -> double& { return c.collectives.peer_bytes_per_s; },
     1e9, "GB/s", Dimension::bytes_per_s},
    {"collectives.peer_latency", [](Cluster& c) -> double& { return c.collectives.peer_latency_s; },
     1e-6, "us", Dimension::seconds},
    {"collectives.nvls_share", [](Cluster& c) -> double& { return c.collectives.nvls_share; }, 1,
     "", Dimension::scalar},
    {"collectives.nic_tree_hop", [](Cluster& c) -> double& { return c.collectives.nic_tree_hop_s; },
     1e-6, "us", Dimension::seconds},
    {"collectives.nic_ring_hop", [](Cluster& c) -> double& { return c.collectives.nic_ring_hop_s; },
     1e-6, "us", Dimension::seconds},
    {"collectives.nic_peer", [](Cluster& c) -> double& { return c.collectives.nic_peer_s; }, 1e-6,
     "us", Dimension::seconds},
    {"collectives.nic_pipeline",
     [](Cluster& c) -> double& { return c.collectives.nic_pipeline_bytes; }, 1e3, "kB",
     Dimension::bytes},
};

struct Row {
  Shape shape;
  std::int64_t bytes = 0;
  bool one_node = true;
  double seconds = 0;
};

double log_seconds(const Row& row, const Cluster& cluster) {
  static const Profile kNoKernels;  // collectives and sends need none
  return std::log(seconds(price(row.shape, kNoKernels, cluster).time_ps));
}

/// "all_reduce on 8 (node0.txt, NCCL 2.27.3, NVIDIA H100 80GB HBM3)"
std::string cited(const NcclTable& table) {
  std::string out = fmt::format("{} on {} ({}", name_of(table.op), table.ranks,
                                std::filesystem::path(table.at.file).filename().string());
  if (!table.nccl_version.empty()) out += ", NCCL " + table.nccl_version;
  if (!table.device.empty()) out += ", " + table.device;
  if (!table.date.empty()) out += ", " + table.date;
  return out + ")";
}

class Fit {
 public:
  Fit(const Cluster& before, const NcclFitOptions& options, Problems& problems)
      : options_(options), problems_(problems) {
    fit_.cluster = before;
  }

  NcclFit run(const std::vector<NcclTable>& tables) {
    check_names();
    std::vector<Row> rows;
    for (const NcclTable& table : tables) add_rows(table, rows);
    if (!problems_.empty()) return std::move(fit_);
    if (rows.empty()) {
      problems_.add(Location{tables.empty() ? "" : tables[0].at.file, 0, 0},
                    "no table has a row to fit to");
      return std::move(fit_);
    }
    hold_out(rows);
    const Cluster before = fit_.cluster;
    std::set<std::size_t> free;
    // What the rows can tell depends on where the cluster is: look again from where they led.
    for (int round = 0; round < 2; ++round) {
      for (const std::size_t q : determined(free)) free.insert(q);
      minimise_over({free.begin(), free.end()});
    }
    round_off(free);
    describe(before, free);
    write_sources(before, free, tables);
    return std::move(fit_);
  }

 private:
  double& value(Cluster& cluster, std::size_t q) const { return kQuantities[q].of(cluster); }

  bool kept(std::size_t q) const {
    return std::find(options_.keep.begin(), options_.keep.end(), kQuantities[q].name) !=
           options_.keep.end();
  }

  void check_names() {
    std::vector<std::string> names;
    for (const Quantity& q : kQuantities) names.emplace_back(q.name);
    for (const std::string& name : options_.keep) {
      if (std::find(names.begin(), names.end(), name) != names.end()) continue;
      const auto near = nearest(name, names);
      problems_.add(Location{"command line", 0, 0},
                    fmt::format("--keep: there is no quantity '{}'", name),
                    near ? fmt::format("did you mean '{}'?", *near)
                         : fmt::format("one of {}", fmt::join(names, ", ")));
    }
  }

  void add_rows(const NcclTable& table, std::vector<Row>& rows) {
    const Cluster& c = fit_.cluster;
    for (const std::string& note : table.notes) fit_.notes.push_back(note);
    if (table.op == NcclOp::other) {
      problems_.add(table.at, "which operation is this? no line before the table names its program",
                    "put it into the file's name, as in all_gather.txt");
      return;
    }
    if (table.ranks < 2) {
      problems_.add(table.at,
                    table.ranks == 1 ? "one rank communicates with nobody"
                                     : "on how many ranks was this? the table does not tell",
                    "keep the lines '# Rank ... on HOST device ...' that nccl-tests prints");
      return;
    }
    std::int64_t per_node = table.ranks_per_node;
    if (per_node == 0) per_node = options_.ranks_per_node;
    if (per_node == 0) per_node = c.gpus_per_node;
    per_node = std::min(per_node, table.ranks);
    if (per_node > c.gpus_per_node || table.ranks > c.gpus()) {
      problems_.add(table.at, fmt::format("{} ranks, {} per node, do not fit on {} {} of {} GPUs",
                                          table.ranks, per_node, c.nodes,
                                          c.nodes == 1 ? "node" : "nodes", c.gpus_per_node));
      return;
    }
    if (table.ranks > per_node && c.nic.bandwidth_bytes_per_s <= 0) {
      problems_.add(table.at, fmt::format("{} ranks over several nodes, and '{}' has no NIC",
                                          table.ranks, c.name));
      return;
    }
    std::size_t wrong = 0;
    for (const NcclRow& r : table.rows) {
      const auto shape = shape_of(table.op, r.size_bytes, table.ranks, per_node);
      if (!shape) {
        fit_.notes.push_back(fmt::format("{}: left out, there is no formula for {}", table.at.file,
                                         name_of(table.op)));
        return;
      }
      const NcclTiming& t = r.out_of_place ? *r.out_of_place : *r.in_place;
      if (t.wrong.value_or(0) > 0) {
        ++wrong;
        continue;
      }
      rows.push_back({*shape, r.size_bytes, table.ranks <= per_node, t.time_us * 1e-6});
    }
    if (wrong > 0) {
      fit_.notes.push_back(
          fmt::format("{}: left out {} rows with wrong elements", table.at.file, wrong));
    }
  }

  void hold_out(const std::vector<Row>& rows) {
    std::set<std::int64_t> sizes;
    for (const Row& row : rows) sizes.insert(row.bytes);
    for (const Row& row : rows) {
      const auto place = std::distance(sizes.begin(), sizes.find(row.bytes));
      (place % 3 == 2 ? held_out_ : fitted_).push_back(row);
    }
  }

  /// d log t / d log q of every row fitted to.
  std::vector<double> effect(std::size_t q) {
    constexpr double kStep = 0.05;
    std::vector<double> out;
    out.reserve(fitted_.size());
    Cluster more = fit_.cluster;
    Cluster less = fit_.cluster;
    value(more, q) *= std::exp(kStep);
    value(less, q) *= std::exp(-kStep);
    for (const Row& row : fitted_) {
      out.push_back((log_seconds(row, more) - log_seconds(row, less)) / (2 * kStep));
    }
    return out;
  }

  /// Quantities that the rows tell apart, the most telling first: Gram-Schmidt with pivoting on
  /// their effects, those of `already` first.
  std::vector<std::size_t> determined(const std::set<std::size_t>& already) {
    constexpr double kRowError = 0.05;  // what is left of good fits
    constexpr double kLeast = kRowError / 0.5;
    const auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
      double sum = 0;
      for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
      return sum;
    };
    std::map<std::size_t, std::vector<double>> left;
    for (std::size_t q = 0; q < std::size(kQuantities); ++q) {
      if (!kept(q) && value(fit_.cluster, q) > 0) left[q] = effect(q);
    }
    std::vector<std::size_t> chosen;
    while (!left.empty()) {
      const auto rank = [&](const auto& entry) {
        return std::pair(already.count(entry.first), dot(entry.second, entry.second));
      };
      const auto best =
          std::max_element(left.begin(), left.end(),
                           [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
      const std::vector<double> axis = best->second;
      const double length2 = dot(axis, axis);
      const bool telling = length2 >= kLeast * kLeast;
      if (!telling && already.count(best->first) == 0) break;
      if (telling) chosen.push_back(best->first);
      left.erase(best);
      if (length2 <= 0) continue;
      for (auto& [q, other] : left) {
        const double along = dot(other, axis) / length2;
        for (std::size_t i = 0; i < other.size(); ++i) other[i] -= along * axis[i];
      }
    }
    return chosen;
  }

  Cluster with(const std::vector<std::size_t>& free, const std::vector<double>& logs) const {
    Cluster c = fit_.cluster;
    for (std::size_t i = 0; i < free.size(); ++i) value(c, free[i]) = std::exp(logs[i]);
    return c;
  }

  /// Zero for clusters that can be; grows outside.
  static double beyond(const Cluster& c) {
    const auto over = [](double v, double most) { return std::max(0.0, std::log(v / most)); };
    double sum = over(c.nvlink.bandwidth_bytes_per_s, c.nvlink_peak_bytes_per_s);
    if (c.nic.bandwidth_bytes_per_s > 0) {
      sum += over(c.nic.bandwidth_bytes_per_s, c.nic_peak_bytes_per_s);
    }
    if (c.nvls) sum += over(c.collectives.nvls_share, 2) + over(0.01, c.collectives.nvls_share);
    return sum;
  }

  void minimise_over(const std::vector<std::size_t>& free) {
    if (free.empty() || fitted_.empty()) return;
    std::vector<double> logs;
    logs.reserve(free.size());
    for (const std::size_t q : free) logs.push_back(std::log(value(fit_.cluster, q)));
    const auto loss = [&](const std::vector<double>& x) {
      for (const double v : x) {
        if (std::abs(v) > 60) return 1e9;  // far from any unit
      }
      const Cluster c = with(free, x);
      double sum = 0;
      for (const Row& row : fitted_) {
        sum += std::min(std::abs(log_seconds(row, c) - std::log(row.seconds)), kClip);
      }
      return sum / static_cast<double>(fitted_.size()) + beyond(c);
    };
    for (int restart = 0; restart < 6; ++restart) minimise(logs, 0.3, 300, loss);
    fit_.cluster = with(free, logs);
  }

  /// To the four digits that are written.
  void round_off(const std::set<std::size_t>& free) {
    for (const std::size_t q : free) {
      double& v = value(fit_.cluster, q);
      const auto& [name, of, scale, unit, dimension] = kQuantities[q];
      v = parse_quantity(fmt::format("{:.4g} {}", v / scale, unit), dimension).value_or(v);
    }
    Cluster& c = fit_.cluster;
    const auto at_most = [](double& v, double most) { v = std::min(v, most); };
    at_most(c.nvlink.bandwidth_bytes_per_s, c.nvlink_peak_bytes_per_s);
    at_most(c.nic.bandwidth_bytes_per_s, c.nic_peak_bytes_per_s);
  }

  HeldOutError error(const std::vector<Row>& rows, bool one_node) const {
    std::vector<double> ratios;
    for (const Row& row : rows) {
      if (row.one_node != one_node) continue;
      ratios.push_back(std::exp(log_seconds(row, fit_.cluster)) / row.seconds);
    }
    return summarise(one_node ? "inside a node" : "across nodes", std::move(ratios));
  }

  void describe(const Cluster& before, const std::set<std::size_t>& free) {
    Cluster old = before;
    for (std::size_t q = 0; q < std::size(kQuantities); ++q) {
      const double was = value(old, q);
      if (was <= 0) continue;
      FittedQuantity f{.name = std::string(kQuantities[q].name),
                       .before = was,
                       .after = value(fit_.cluster, q),
                       .scale = kQuantities[q].scale,
                       .unit = std::string(kQuantities[q].unit)};
      using Outcome = FittedQuantity::Outcome;
      f.outcome = free.count(q) > 0 ? Outcome::fitted
                  : kept(q)         ? Outcome::kept
                                    : Outcome::undetermined;
      const std::vector<double> effects = effect(q);
      f.rows = static_cast<std::size_t>(std::count_if(
          effects.begin(), effects.end(), [](double e) { return std::abs(e) >= 0.025; }));
      fit_.quantities.push_back(std::move(f));
    }
    fit_.node_fitted = error(fitted_, true);
    fit_.node_held_out = error(held_out_, true);
    fit_.nodes_fitted = error(fitted_, false);
    fit_.nodes_held_out = error(held_out_, false);
    const auto set_spread = [&](double& spread, const HeldOutError& fitted,
                                const HeldOutError& held_out) {
      if (held_out.points > 0) {
        spread = std::min(1.0, std::ceil(held_out.percentile_68 * 1000) / 1000);
      } else if (fitted.points > 0) {
        fit_.notes.push_back(fmt::format(
            "{}: fewer than three sizes, so none is held out and the spread stays", fitted.family));
      }
    };
    set_spread(fit_.cluster.collectives.spread, fit_.node_fitted, fit_.node_held_out);
    set_spread(fit_.cluster.collectives.nic_spread, fit_.nodes_fitted, fit_.nodes_held_out);
  }

  void write_sources(const Cluster& before, const std::set<std::size_t>& free,
                     const std::vector<NcclTable>& tables) {
    std::string cites;
    for (const NcclTable& table : tables) {
      const std::string text = cited(table);
      if (cites.find(text) == std::string::npos) cites += (cites.empty() ? "" : ", ") + text;
    }
    const auto errors = [](const HeldOutError& e) {
      return e.points == 0 ? std::string()
                           : fmt::format(
                                 "; error on every third size, held out, {}: median {:.1f} "
                                 "%, 90th percentile {:.1f} %",
                                 e.family, 100 * e.median, 100 * e.percentile_90);
    };
    const std::string held = errors(fit_.node_held_out) + errors(fit_.nodes_held_out);
    const auto cite = [&](std::string& source, const std::string& old, std::string_view prefix) {
      std::vector<std::string> names;
      for (const std::size_t q : free) {
        const std::string_view name = kQuantities[q].name;
        if (name.substr(0, prefix.size()) == prefix) names.emplace_back(name.substr(prefix.size()));
      }
      if (names.empty()) return;
      source = fmt::format("{}: fit by orrery calibrate to nccl-tests, {}{}; the rest: {}",
                           fmt::join(names, ", "), cites, held, old);
    };
    Cluster& c = fit_.cluster;
    cite(c.nvlink.source, before.nvlink.source, "nvlink.");
    cite(c.nic.source, before.nic.source, "nic.");
    cite(c.collectives.source, before.collectives.source, "collectives.");
  }

  const NcclFitOptions& options_;
  Problems& problems_;
  NcclFit fit_;
  std::vector<Row> fitted_;
  std::vector<Row> held_out_;
};

}  // namespace

NcclFit fit_nccl(const Cluster& before, const std::vector<NcclTable>& tables,
                 const NcclFitOptions& options, Problems& problems) {
  return Fit(before, options, problems).run(tables);
}

std::string fit_report(const NcclFit& fit) {
  std::string out =
      fmt::format("{:<30} {:>13} {:>13} {:>10}\n", "quantity", "before", "after", "rows used");
  for (const FittedQuantity& q : fit.quantities) {
    const auto in_units = [&](double v) {
      return fmt::format("{:.4g}{}{}", v / q.scale, q.unit.empty() ? "" : " ", q.unit);
    };
    using Outcome = FittedQuantity::Outcome;
    const bool fitted = q.outcome == Outcome::fitted;
    out += fmt::format("{:<30} {:>13} {:>13} {:>10}\n", q.name, in_units(q.before),
                       fitted                       ? in_units(q.after)
                       : q.outcome == Outcome::kept ? "kept"
                                                    : "not told",
                       fitted ? fmt::to_string(q.rows) : "");
  }
  out += fmt::format("\n{:<30} {:>13} {:>13} {:>10}\n", "error", "median", "90 %", "rows");
  const auto line = [&](const HeldOutError& e, std::string_view which) {
    if (e.points == 0) return;
    out += fmt::format("{:<30} {:>11.1f} % {:>11.1f} % {:>10}\n",
                       fmt::format("{}, {}", e.family, which), 100 * e.median,
                       100 * e.percentile_90, e.points);
  };
  line(fit.node_fitted, "fitted");
  line(fit.node_held_out, "held out");
  line(fit.nodes_fitted, "fitted");
  line(fit.nodes_held_out, "held out");
  return out;
}

std::string calibrated_yaml(const NcclFit& fit, const std::string& input,
                            const std::string& folder) {
  std::string out;
  for (std::size_t begin = 0; begin < input.size() && input[begin] == '#';) {
    const std::size_t end = std::min(input.find('\n', begin), input.size());
    out += input.substr(begin, end - begin) + "\n";
    begin = end + 1;
  }
  return out + to_yaml(fit.cluster, folder);
}

}  // namespace orrery
