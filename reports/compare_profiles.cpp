#include "reports/compare_profiles.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "reports/terminal.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

/// Logarithms of predicted over measured, by kind of kernel.
using Ratios = std::map<std::string, std::vector<double>>;

bool is_memory_bound(const GemmTable& table, const Gemm& g, int sms, double share) {
  GemmModel faster = table.model;
  faster.bytes_per_s *= 2;
  const double change =
      gemm_skeleton_s(faster, g, sms, share) / gemm_skeleton_s(table.model, g, sms, share);
  return change < 0.75;  // half of the time is the memory's
}

void add_gemms(const Profile& measured, const Profile& predicted, Ratios& ratios) {
  for (const GemmTable& table : measured.gemms) {
    if (table.derived) continue;
    for (const GemmPoint& p : table.points) {
      const Gemm g = gemm_of(table, p);
      const double s = seconds(price_gemm(g, p.sms, predicted).time_ps) - predicted.launch_gap_s;
      const double ratio = std::log(s / p.seconds);
      const std::string kind =
          fmt::format("{}GEMM {}{}", table.grouped ? "grouped " : "", name_of(table.inputs),
                      table.pass == Pass::backward_weight ? " weight gradient" : "");
      ratios[kind].push_back(ratio);
      if (is_memory_bound(table, g, p.sms, bandwidth_share(measured, p.sms))) {
        ratios[kind + ", memory bound"].push_back(ratio);
      } else {
        ratios[kind + ", the others"].push_back(ratio);
      }
    }
  }
}

void add_attention(const Profile& measured, const Profile& predicted, Ratios& ratios) {
  for (const AttentionTable& table : measured.attention) {
    if (table.derived) continue;
    const std::string kind = fmt::format("attention {}{}", name_of(table.inputs),
                                         table.backward ? " backward" : " forward");
    for (const AttentionPoint& p : table.points) {
      const double s =
          seconds(price_attention(p.shape, p.sms, predicted).time_ps) - predicted.launch_gap_s;
      ratios[kind].push_back(std::log(s / p.seconds));
    }
  }
}

void add_streaming(const Profile& measured, const Profile& predicted, Ratios& ratios) {
  constexpr std::int64_t kBytes = std::int64_t{64} << 20;
  for (const auto& [kind, rate] : measured.streaming) {
    if (rate.derived) continue;
    const std::string name(name_of(kind));
    const auto add = [&](const Streaming& s, std::string_view label, int sms, double measured_s) {
      const double predicted_s =
          seconds(price_streaming(s, label, sms, predicted).time_ps) - predicted.launch_gap_s;
      ratios[name].push_back(std::log(predicted_s / measured_s));
    };
    for (const StreamingPoint& p : rate.points) {
      add({.kind = kind,
           .bytes_read = p.bytes_read,
           .bytes_written = p.bytes_written,
           .launches = p.launches},
          p.label, p.sms, p.seconds);
    }
    if (rate.points.empty()) {
      const Streaming s{.kind = kind, .bytes_read = kBytes, .bytes_written = kBytes, .launches = 1};
      const int sms = measured.device.sms;
      add(s, "", sms,
          seconds(price_streaming(s, "", sms, measured).time_ps) - measured.launch_gap_s);
    }
  }
}

ProfileError error_of(const std::string& kernel, const std::vector<double>& logs) {
  ProfileError e{.kernel = kernel, .points = logs.size()};
  std::vector<double> off;
  for (const double log : logs) {
    off.push_back(std::abs(std::expm1(log)));
    e.bias += log / static_cast<double>(logs.size());
  }
  e.bias = std::expm1(e.bias);
  std::sort(off.begin(), off.end());
  e.median = off[off.size() / 2];
  e.percentile_90 = off[std::min(off.size() - 1, off.size() * 9 / 10)];
  return e;
}

Profile read_one(const std::string& file, Problems& problems) {
  const Node document = read_document(file, problems);
  return document.at().file.empty() ? Profile{} : read_profile(document, problems);
}

}  // namespace

std::vector<ProfileError> profile_errors(const Profile& measured, const Profile& predicted) {
  Ratios ratios;
  add_gemms(measured, predicted, ratios);
  add_attention(measured, predicted, ratios);
  add_streaming(measured, predicted, ratios);
  std::vector<ProfileError> errors;
  for (const auto& [kernel, logs] : ratios) errors.push_back(error_of(kernel, logs));
  return errors;
}

std::string compare_profiles(std::span<const std::string> files) {
  Problems problems;
  std::vector<Profile> profiles;
  for (const std::string& file : files) profiles.push_back(read_one(file, problems));
  problems.throw_if_any();

  std::vector<std::string> heading{"median, 90th percentile, bias", "points"};
  std::string align = "lr";
  std::vector<std::vector<std::string>> rows;
  for (std::size_t i = 1; i < profiles.size(); ++i) {
    heading.insert(heading.end(), {profiles[i].name, "", ""});
    align += "rrr";
    const std::vector<ProfileError> errors = profile_errors(profiles[0], profiles[i]);
    rows.resize(errors.size());
    for (std::size_t e = 0; e < errors.size(); ++e) {
      if (i == 1) rows[e] = {errors[e].kernel, fmt::format("{}", errors[e].points)};
      const bool same = errors[e].percentile_90 < 0.0005;  // files round rates
      rows[e].push_back(same ? "the same" : fmt::format("{:.1f} %", 100 * errors[e].median));
      rows[e].push_back(same ? "" : fmt::format("{:.1f} %", 100 * errors[e].percentile_90));
      rows[e].push_back(same ? "" : fmt::format("{:+.1f} %", 100 * errors[e].bias));
    }
  }
  rows.insert(rows.begin(), heading);
  return fmt::format("What {} measured on {}, as others price it\n\n", profiles[0].name,
                     profiles[0].device.name) +
         format_table(rows, align);
}

bool is_profile(const std::string& file) {
  Problems ignored;
  const Node root = read_document(file, ignored);
  return root.find("device") && !root.find("plan");
}

}  // namespace orrery
