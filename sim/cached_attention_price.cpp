// Prices of attention over a cache.
//
// The skeleton. One block of queries of a sequence, 64 rows (heads that share a key-value head,
// times query tokens) high on a tensor core, walks over that sequence's rows, which several SMs
// split among them. So a kernel takes
//   launch_s + max(bytes / bytes_per_s, padded FLOPs / flops_per_s),
// the FLOPs with the rows of each block filled up to 64. On fewer SMs the bandwidth falls by what
// they can draw, the FLOPs in proportion.
//
// The residual ln(measured / skeleton) is averaged over points near in ln(sequences x key-value
// heads), ln(kv_len), ln(rows) and ln(d_qk + d_v).

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "sim/check.hpp"
#include "sim/kernel_prices.hpp"
#include "sim/local_mean.hpp"

namespace orrery {
namespace {

constexpr std::int64_t kRows = 64;
constexpr std::array<double, 4> kWidth{0.6, 0.6, 0.6, 0.4};

std::int64_t rows_of(const CachedAttention& a) {
  return a.heads / std::max<std::int64_t>(1, a.kv_heads) * (a.gathered ? 1 : a.q_len);
}

std::array<double, 4> position(const CachedAttention& a) {
  const std::int64_t queries = a.gathered ? a.batch * a.q_len : a.batch;
  return {std::log(static_cast<double>(queries * a.kv_heads)),
          std::log(static_cast<double>(a.kv_len)), std::log(static_cast<double>(rows_of(a))),
          std::log(static_cast<double>(a.d_qk + a.d_v))};
}

/// How unlike a table's kernel is to the one that is asked for; above 3 it says nothing of it.
int mismatch(const CachedTable& t, const CachedAttention& a) {
  int cost = 0;
  if (t.gathered != a.gathered) cost += 4;
  if (t.latent != a.latent) cost += 2;
  if (t.cache != a.cache)
    cost += bytes_per_element(t.cache) < 1.5 && bytes_per_element(a.cache) < 1.5 ? 1 : 2;
  if (t.inputs != a.inputs) cost += 1;
  return cost;
}

const CachedTable* choose_table(const Profile& profile, const CachedAttention& a, int& cost) {
  const CachedTable* best = nullptr;
  cost = 4;
  for (const CachedTable& table : profile.cached_attention) {
    const int c = mismatch(table, a);
    if (c < cost && !table.points.empty()) {
      cost = c;
      best = &table;
    }
  }
  return best;
}

bool far_outside(const CachedTable& table, const std::array<double, 4>& x) {
  return far_outside(table.box, x, 0) || far_outside(table.box, x, 1) ||
         far_outside(table.box, x, 2) || far_outside(table.box, x, 3);
}

}  // namespace

double cached_skeleton_s(const CachedModel& model, const CachedAttention& a, int sms,
                         const Profile& profile) {
  const std::int64_t rows = rows_of(a);
  const double padded =
      static_cast<double>((rows + kRows - 1) / kRows * kRows) / static_cast<double>(rows);
  const double flops = flops_of({.work = a, .label = "", .sms = 0}) * padded;
  const double share = static_cast<double>(sms) / profile.device.sms;
  return model.launch_s +
         std::max(bytes_of(a) / (model.bytes_per_s * bandwidth_share(profile, sms)),
                  flops / (model.flops_per_s * share));
}

double table_seconds(const CachedTable& table, const CachedAttention& a, int sms,
                     const Profile& profile) {
  const double residual =
      local_mean(std::span<const CachedPoint>(table.points), position(a), kWidth);
  return cached_skeleton_s(table.model, a, sms, profile) * std::exp(residual);
}

void prepare(CachedTable& table, const Profile& profile) {
  for (CachedPoint& p : table.points) {
    p.at.x = position(p.shape);
    p.at.residual = std::log(p.seconds / cached_skeleton_s(table.model, p.shape, p.sms, profile));
  }
  table.box = box_of(std::span<const CachedPoint>(table.points));
}

Price price_cached_attention(const CachedAttention& a, int sms, const Profile& profile) {
  if (sms <= 0) sms = profile.device.sms;
  ORRERY_CHECK(a.batch > 0 && a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 &&
                   a.q_len > 0 && a.kv_len > 0 && a.d_qk > 0,
               "attention {}x{}/{} {} over {}", a.batch, a.heads, a.kv_heads, a.q_len, a.kv_len);
  const double floor_s =
      bytes_of(a) / (profile.device.memory_bytes_per_s * bandwidth_share(profile, sms));
  int cost = 0;
  const CachedTable* table = choose_table(profile, a, cost);
  if (table == nullptr) {
    const double peak = peak_flops_per_s(a.inputs, profile.device) * sms / profile.device.sms;
    const double s = std::max(floor_s, flops_of({.work = a, .label = "", .sms = sms}) / peak);
    return {.time_ps = from_seconds(s + profile.launch_gap_s),
            .source = PriceSource::roofline,
            .spread = 0.5,
            .extrapolated = true,
            .note = "no table of attention over a cache: peak rates"};
  }
  // What another format or head costs, the skeleton says; the points' residual is of their kernel.
  const bool same = cost == 0;
  const double s = cost >= 2 ? cached_skeleton_s(table->model, a, sms, profile)
                             : table_seconds(*table, a, sms, profile);
  Price price{.spread = same ? table->spread : std::hypot(table->spread, 0.15), .note = table->id};
  price.time_ps = from_seconds(std::max(s, floor_s) + profile.launch_gap_s);
  price.extrapolated = same && far_outside(*table, position(a));
  const int measured_sms = table->points.front().sms;
  const bool direct = same && !table->derived && measured_sms == sms && !price.extrapolated;
  price.source = direct ? PriceSource::interpolated : PriceSource::derived;
  if (measured_sms != sms) price.note += fmt::format(", {}/{} SMs", sms, measured_sms);
  if (!same) price.note += ", related kernel";
  return price;
}

}  // namespace orrery
