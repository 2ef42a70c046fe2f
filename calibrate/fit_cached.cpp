#include "calibrate/fit_cached.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "calibrate/minimise.hpp"
#include "calibrate/table_file.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

constexpr double kClip = 1;  // a point further off counts, but no more

bool power_of_four(std::int64_t v) {
  while (v > 1 && v % 4 == 0) v /= 4;
  return v == 1;
}

/// 128, 512, 2048, ...
bool on_grid(const CachedAttention& a) {
  return power_of_four(a.batch) && a.kv_len % 2 == 0 && power_of_four(a.kv_len / 2) &&
         (a.heads == 16 || a.heads == 64 || a.heads == 128);
}

// ---- low latency

struct Row {
  ExpertExchange shape;
  double seconds = 0;
};

/// The machine that DeepEP's README was measured on, as the cluster files have it.
constexpr double kH800Nvlink = 160e9;
constexpr double kH800Nic = 48e9;
constexpr double kH200Nvlink = 450e9;  // nominal: the kernels stay far below

std::vector<Row> one_node_rows(const std::string& folder, bool combine, bool held_out_rows) {
  const TableFile file(folder + "/kernels/h200_sxm-deepep-lowlatency.csv.gz");
  const auto whole = [&](std::size_t row, const char* column) {
    return static_cast<std::int64_t>(file.number(row, file.column(column)));
  };
  std::vector<Row> rows;
  for (std::size_t i = 0; i < file.size(); ++i) {
    Row row;
    row.shape = {.combine = combine,
                 .low_latency = true,
                 .format = combine ? NumberFormat::bf16 : NumberFormat::fp8_block,
                 .tokens = whole(i, "num_token"),
                 .hidden = whole(i, "hidden_size"),
                 .top_k = whole(i, "num_topk"),
                 .experts = whole(i, "num_experts"),
                 .ep = 8 * whole(i, "node_num"),
                 .gpus_per_node = 8};
    row.seconds =
        1e-6 * file.number(i, file.column(combine ? "combine_avg_t_us" : "dispatch_avg_t_us"));
    if ((row.shape.hidden == 7168) == held_out_rows) rows.push_back(row);
  }
  return rows;
}

/// 128 tokens, hidden 7168, top 8 of 256 experts (DeepEP README, low-latency kernels).
std::vector<Row> published_rows(const std::string& folder, bool combine) {
  const TableFile file(folder + "/deepseek/deepep_perf.csv");
  std::vector<Row> rows;
  for (std::size_t i = 0; i < file.size(); ++i) {
    if (file.text(i, file.column("version")) != "v1-current" ||
        file.text(i, file.column("kernel_kind")) != "low-latency NVLink+RDMA") {
      continue;
    }
    Row row;
    row.shape = {.combine = combine,
                 .low_latency = true,
                 .format = combine ? NumberFormat::bf16 : NumberFormat::fp8_block,
                 .tokens = 128,
                 .hidden = 7168,
                 .top_k = 8,
                 .experts = 256,
                 .ep = static_cast<std::int64_t>(file.number(i, file.column("EP"))),
                 .gpus_per_node = 8};
    row.seconds = 1e-6 * file.number(i, file.column(combine ? "combine_us" : "dispatch_us"));
    rows.push_back(row);
  }
  return rows;
}

double predicted_s(const LowLatencyCost& cost, const Row& row, double nvlink, double nic) {
  return low_latency_s(cost, low_latency_bytes(row.shape), nvlink, nic);
}

template <class With>
void fit_two(LowLatencyCost& cost, std::vector<double> x, const std::vector<Row>& rows,
             double nvlink, const With& with) {
  const auto loss = [&](const std::vector<double>& logs) {
    LowLatencyCost trial = cost;
    with(trial, std::exp(logs[0]), std::exp(logs[1]));
    double sum = 0;
    for (const Row& row : rows) {
      sum += std::min(std::abs(std::log(predicted_s(trial, row, nvlink, kH800Nic) / row.seconds)),
                      kClip);
    }
    return sum;
  };
  for (int restart = 0; restart < 3; ++restart) minimise(x, 0.3, 200, loss);
  with(cost, std::exp(x[0]), std::exp(x[1]));
}

void fit_near(LowLatencyCost& cost, const std::vector<Row>& rows) {
  fit_two(cost, {std::log(1e-5), std::log(2.5e11)}, rows, kH200Nvlink,
          [](LowLatencyCost& c, double latency_s, double bytes_per_s) {
            c.latency_s = latency_s;
            c.kernel_bytes_per_s = bytes_per_s;
          });
}

void fit_far(LowLatencyCost& cost, const std::vector<Row>& rows) {
  fit_two(cost, {std::log(4e-5), 0.0}, rows, kH800Nvlink,
          [](LowLatencyCost& c, double latency_s, double share) {
            c.remote_latency_s = latency_s;
            c.nic_share = share;
          });
}

}  // namespace

void fit_cached(CachedTable& table, const Profile& profile) {
  const double most_flops = peak_flops_per_s(table.inputs, profile.device);
  const double most_bytes = profile.device.memory_bytes_per_s;
  const auto model = [](const std::vector<double>& logs) {
    return CachedModel{std::exp(logs[0]), std::exp(logs[1]), std::exp(logs[2])};
  };
  std::vector<double> x{std::log(1e-5), std::log(0.9 * most_bytes), std::log(0.7 * most_flops)};
  const auto loss = [&](const std::vector<double>& logs) {
    const CachedModel m = model(logs);
    double sum = 0;
    for (const CachedPoint& p : table.points) {
      const double s = cached_skeleton_s(m, p.shape, p.sms, profile);
      sum += std::min(std::abs(std::log(p.seconds / s)), kClip);
    }
    return sum / static_cast<double>(table.points.size()) +
           std::max(0.0, std::log(m.bytes_per_s / most_bytes)) +
           std::max(0.0, std::log(m.flops_per_s / most_flops));
  };
  for (int restart = 0; restart < 3; ++restart) minimise(x, 0.3, 200, loss);
  table.model = model(x);
  prepare(table, profile);
}

std::pair<CachedTable, HeldOutError> read_latent_decode(const std::string& path,
                                                        const Profile& profile, CachedTable table) {
  const TableFile file(path);
  const char* const word = table.cache == NumberFormat::bf16 ? "bfloat16" : "fp8";
  std::vector<CachedPoint> unseen;
  for (std::size_t i = 0; i < file.size(); ++i) {
    if (file.text(i, file.column("kv_cache_dtype")) != word) continue;
    const auto whole = [&](const char* column) {
      return static_cast<std::int64_t>(file.number(i, file.column(column)));
    };
    CachedPoint p{.shape = {.inputs = table.inputs,
                            .cache = table.cache,
                            .latent = true,
                            .batch = whole("batch_size"),
                            .heads = whole("num_heads"),
                            .kv_heads = 1,
                            .q_len = 1,
                            .kv_len = whole("step") + whole("isl"),
                            .d_qk = 576,
                            .d_v = 512},
                  .sms = profile.device.sms,
                  .seconds = 1e-3 * file.number(i, file.column("latency")),
                  .at = {}};
    if (p.shape.kv_len < 128 || p.shape.heads < 16) continue;
    (on_grid(p.shape) ? table.points : unseen).push_back(p);
  }
  std::sort(table.points.begin(), table.points.end(),
            [](const CachedPoint& a, const CachedPoint& b) { return a.shape < b.shape; });
  fit_cached(table, profile);
  std::vector<double> ratios;
  for (const CachedPoint& p : unseen) {
    ratios.push_back(table_seconds(table, p.shape, p.sms, profile) / p.seconds);
  }
  HeldOutError error = summarise(table.id, std::move(ratios));
  table.spread = error.percentile_68;
  return {std::move(table), std::move(error)};
}

LowLatencyFit fit_low_latency(const std::string& folder) {
  LowLatencyFit fit;
  LowLatencyTable& table = fit.table;
  table.id = "deepep-low-latency-hopper";
  table.source =
      "near legs: ai-dynamo/aiconfigurator systems/data, commit 095f58a5, SGLang, DeepEP "
      "low-latency "
      "kernels on one node of H200, 1 to 1,024 tokens, hidden sizes other than 7168; far legs: "
      "DeepEP "
      "README (2025-06-05, commit de8cfca3), H800, 128 tokens, hidden 7168, top 8, EP16 to EP256, "
      "over "
      "the 48 GB/s that a NIC achieves";
  table.tokens = {1, 1024};
  for (const bool combine : {false, true}) {
    LowLatencyCost& cost = combine ? table.combine : table.dispatch;
    const std::string name = combine ? "combine" : "dispatch";
    fit_near(cost, one_node_rows(folder, combine, false));
    std::vector<double> ratios;
    for (const Row& row : one_node_rows(folder, combine, true)) {
      ratios.push_back(predicted_s(cost, row, kH200Nvlink, 0) / row.seconds);
    }
    fit.errors.push_back(summarise(name + ", one node of H200, hidden 7168", std::move(ratios)));
    std::vector<Row> across = published_rows(folder, combine);
    std::vector<double> one_node;
    std::erase_if(across, [&](const Row& row) {
      if (row.shape.ep > 8) return false;
      one_node.push_back(predicted_s(cost, row, kH800Nvlink, 0) / row.seconds);
      return true;
    });
    std::vector<double> left_out;
    for (std::size_t i = 0; i < across.size(); ++i) {
      std::vector<Row> others = across;
      others.erase(others.begin() + static_cast<std::ptrdiff_t>(i));
      LowLatencyCost trial = cost;
      fit_far(trial, others);
      left_out.push_back(predicted_s(trial, across[i], kH800Nvlink, kH800Nic) / across[i].seconds);
    }
    fit_far(cost, across);
    fit.errors.push_back(summarise(name + ", H800 EP16 to EP256 (leave one out)", left_out));
    fit.errors.push_back(summarise(name + ", H800 EP8", one_node));
    const std::size_t last = fit.errors.size() - 1;
    table.spread = std::max(table.spread, fit.errors[last - 1].percentile_90);
    for (const std::size_t near : {last - 2, last}) {
      table.near_spread = std::max(table.near_spread, fit.errors[near].percentile_90);
    }
  }
  return fit;
}

std::string to_yaml(const LowLatencyFit& fit) {
  std::string text =
      "# Written by orrery_derive; change calibrate/fit_cached.cpp, not this file.\n"
      "# Low-latency dispatch (FP8) and combine (BF16) of DeepEP V1 on Hopper. The value of a "
      "profile's "
      "key\n# `low_latency_exchange`. sim/low_latency.hpp states the formula.\n"
      "# |predicted / measured - 1| on points not used:\n";
  for (const HeldOutError& e : fit.errors) {
    text += fmt::format(
        "#   {:<46} {:>3} points, median {:4.1f} %, 90th percentile {:4.1f} %, bias "
        "{:+.1f} %\n",
        e.family, e.points, 100 * e.median, 100 * e.percentile_90, 100 * e.bias);
  }
  const LowLatencyTable& t = fit.table;
  text += fmt::format("id: {}\nsource: {}\nspread: {:.3f}\nnear_spread: {:.3f}\ntokens: [{}, {}]\n",
                      t.id, in_quotes(t.source), t.spread, t.near_spread, t.tokens[0], t.tokens[1]);
  for (const bool combine : {false, true}) {
    const LowLatencyCost& c = combine ? t.combine : t.dispatch;
    text += fmt::format(
        "{}:\n  latency: {:.4g} us\n  kernel_bandwidth: {:.4g} GB/s\n  remote_latency: {:.4g} us\n"
        "  nic_share: {:.4g}\n",
        combine ? "combine" : "dispatch", 1e6 * c.latency_s, c.kernel_bytes_per_s / 1e9,
        1e6 * c.remote_latency_s, c.nic_share);
  }
  return text;
}

}  // namespace orrery
