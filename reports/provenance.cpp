#include "reports/provenance.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "reports/terminal.hpp"
#include "sim/units.hpp"

namespace orrery {

namespace {

std::string rate(double bytes_per_s) {
  return format_bytes(bytes_per_s) + "/s";
}

std::string flops(double per_s) {
  return fmt::format("{:.1f} TFLOP/s", per_s * 1e-12);
}

class AssumptionList {
 public:
  explicit AssumptionList(const Study& study)
      : study_(study), scenario_(study.scenario), cluster_(scenario_.cluster) {}

  std::vector<Assumption> list() {
    model();
    plan();
    cluster();
    gpu();
    kernel_times();
    for (const std::string& note : scenario_.notes) add("Noted", "reader", note, "");
    for (const std::string& text : study_.report.warnings) add("Noted", "warning", text, "");
    return std::move(list_);
  }

 private:
  void add(std::string group, std::string what, std::string value, std::string source,
           double share = -1) {
    list_.push_back(
        {std::move(group), std::move(what), std::move(value), std::move(source), share});
  }

  void model() {
    const ParameterCount count = count_parameters(scenario_.model);
    const ActiveParameters active = count_active_parameters(scenario_.model);
    add("Model", scenario_.model.name,
        fmt::format("{} layers, {:.1f} B parameters, {:.1f} B active a token",
                    scenario_.model.layers, static_cast<double>(count.total()) * 1e-9,
                    static_cast<double>(active.with_head_and_embedding) * 1e-9),
        "");
  }

  void plan() {
    const Plan& p = scenario_.plan;
    add("Plan", "layout, schedule, precision", study_.report.plan, "");
    add("Plan", "batch",
        fmt::format("{} sequences of {} tokens a step, micro-batches of {}",
                    p.global_batch_sequences, p.sequence_length, p.micro_batch_sequences),
        "");
    std::vector<std::int64_t> layers;
    for (const StageContents& stage : p.stages) layers.push_back(stage.layers);
    add("Plan", "layers of stages", fmt::format("{}", fmt::join(layers, " ")), "");
    if (p.communication_sms > 0) {
      add("Plan", "SMs of dispatch and combine",
          fmt::format("{} of {}", p.communication_sms, scenario_.profile.device.sms), "");
    }
    if (p.checkpoint) {
      add("Plan", "checkpoint",
          fmt::format("{} a GPU, {} network", rate(p.checkpoint->bytes_per_s),
                      p.checkpoint->own_network ? "a storage" : "the training"),
          "");
    }
    if (scenario_.model.moe) {
      add("Plan", "load of experts",
          std::holds_alternative<BalancedRouting>(p.routing.kind) ? "even" : "drawn or stated", "");
    }
    if (!scenario_.stragglers.empty()) add("Plan", "slow GPUs", "as the scenario states", "");
  }

  void cluster() {
    add("Cluster", cluster_.name,
        fmt::format("{} nodes of {} GPUs", cluster_.nodes, cluster_.gpus_per_node), "");
    const auto link = [&](const char* name, const LinkRate& l, double peak) {
      if (l.bandwidth_bytes_per_s <= 0) return;
      add("Cluster", name,
          fmt::format("{} of {}, {} latency", rate(l.bandwidth_bytes_per_s), rate(peak),
                      format_seconds(l.latency_s)),
          l.source);
    };
    link("NVLink, each way", cluster_.nvlink, cluster_.nvlink_peak_bytes_per_s);
    link("NIC, each way", cluster_.nic, cluster_.nic_peak_bytes_per_s);
    const NetworkReport& network = study_.report.network;
    add("Cluster", "network",
        network.flows ? network.fabric + ", transfers share its links"
                      : "each transfer by formula, alone",
        "");
    add("Cluster", "collectives",
        fmt::format("spread {:.0f} % in a node, {:.0f} % across", 100 * cluster_.collectives.spread,
                    100 * cluster_.collectives.nic_spread),
        cluster_.collectives.source);
  }

  void gpu() {
    const Profile& profile = scenario_.profile;
    const Device& d = profile.device;
    add("GPU", d.name,
        fmt::format("{} SMs, {} at {}, {} BF16{}", d.sms, format_bytes(d.memory_bytes),
                    rate(d.memory_bytes_per_s), flops(d.bf16_flops_per_s),
                    d.fp8_flops_per_s > 0 ? fmt::format(", {} FP8", flops(d.fp8_flops_per_s)) : ""),
        d.source);
    if (profile.launch_gap_s > 0) {
      add("GPU", "gap between kernels", format_seconds(profile.launch_gap_s),
          profile.launch_gap_source);
    }
    if (!profile.bandwidth_by_sms.empty()) {
      add("GPU", "memory bandwidth on some SMs",
          fmt::format("{} points", profile.bandwidth_by_sms.size()),
          profile.bandwidth_by_sms_source);
    }
  }

  struct Table {
    double spread = 0;
    bool derived = false;
    std::string source;
  };

  void kernel_times() {
    const Profile& p = scenario_.profile;
    std::map<std::string, Table, std::less<>> tables;
    for (const GemmTable& t : p.gemms) tables[t.id] = {t.spread, t.derived, t.source};
    for (const AttentionTable& t : p.attention) tables[t.id] = {t.spread, t.derived, t.source};
    for (const auto& [kind, t] : p.streaming) tables[t.id] = {t.spread, t.derived, t.source};
    tables[p.exchange.id] = {p.exchange.spread, false, p.exchange.source};
    // A price's note begins with the id of the table that it is from.
    std::map<std::string, double, std::less<>> shares;
    std::map<PriceSource, double> by_source;
    for (const PriceRow& row : study_.report.prices) {
      by_source[row.source] += row.share;
      const std::string id = row.note.substr(0, row.note.find(','));
      if (tables.contains(id)) shares[id] += row.share;
    }
    for (const auto& [source, share] : by_source) {
      add("Prices", std::string(name_of(source)), fmt::format("{:.1f} % of op time", 100 * share),
          meaning(source), share);
    }
    std::vector<std::pair<std::string, double>> sorted(shares.begin(), shares.end());
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const auto& a, const auto& b) { return a.second > b.second; });
    for (const auto& [id, share] : sorted) {
      const Table& t = tables.find(id)->second;
      add("Kernel times", id,
          fmt::format("{:.1f} % of op time, spread {:.0f} %{}", 100 * share, 100 * t.spread,
                      t.derived ? ", from another device or kernel" : ""),
          t.source, share);
    }
  }

  static const char* meaning(PriceSource source) {
    switch (source) {
      case PriceSource::measured:
        return "this very shape, on this device, in a cited table";
      case PriceSource::interpolated:
        return "between measured shapes of the same kernel";
      case PriceSource::derived:
        return "a stated formula over measured figures: another share of the SMs, another die, a "
               "related kernel";
      case PriceSource::roofline:
        return "peak rates only";
    }
    return "";
  }

  const Study& study_;
  const Scenario& scenario_;
  const Cluster& cluster_;
  std::vector<Assumption> list_;
};

}  // namespace

std::vector<Assumption> assumptions_of(const Study& study) {
  return AssumptionList(study).list();
}

}  // namespace orrery
