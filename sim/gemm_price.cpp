// GEMM prices.
//
// The skeleton. A kernel cuts D[m,n] into tiles of bm x bn and gives one tile at a time to each SM,
// so it runs in waves = ceil(tiles / sms) and the last wave costs as much as a full one. A tile
// takes
//   tile_s                                         filling and draining the pipeline
//   + k 2 bm bn / flops_per_s_per_sm               tensor cores (and, for block-scaled FP8,
//   promotion)
//   + k (bm + bn) / operand_bytes_per_s_per_sm     loading operands: why small tiles are slow
//   + bm bn out_bytes sms / bytes_per_s            its share of the store, when all SMs store at
//   once
// and the kernel launch_s + max(waves * tile time, all bytes / bytes_per_s), for the tile that is
// best. Only this part knows of SM shares: 112 of 132 SMs enter through the waves and the bandwidth
// they reach.
//
// The residual ln(measured / skeleton) is averaged over the points of the table near in ln(m),
// ln(n), ln(k), ln(groups) (local_mean.hpp), and multiplies the skeleton. A shape that was measured
// as such on that many SMs has its measured time. The five constants are fitted by calibrate/ per
// table, on points that held-out layers (n, k) are not among.

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "sim/check.hpp"
#include "sim/kernel_prices.hpp"
#include "sim/local_mean.hpp"

namespace orrery {
namespace {

// Residuals are alike over about a factor of two of each dimension; the number of groups matters
// less.
constexpr std::array<double, 4> kWidth{0.6, 0.6, 0.6, 1.2};

std::array<double, 4> position(double m, double n, double k, double groups) {
  return {std::log(m), std::log(n), std::log(k), std::log(groups)};
}

std::array<double, 4> position(const Gemm& g) {
  return position(static_cast<double>(g.m), static_cast<double>(g.n), static_cast<double>(g.k),
                  static_cast<double>(g.groups));
}

double ceil_div(std::int64_t a, int b) {
  const std::int64_t whole = (a + b - 1) / b;
  return static_cast<double>(whole);
}

/// How far a table is from what is asked for; 0 is the same kernel, none above kUnusable is used.
constexpr int kUnusable = 100;
int mismatch(const GemmTable& table, const Gemm& g) {
  if (table.inputs != g.inputs || table.points.empty()) return kUnusable;
  int cost = 0;
  // The input gradient is the forward kernel on other operands; a weight gradient is not.
  const bool weight = g.pass == Pass::backward_weight;
  if (weight != (table.pass == Pass::backward_weight)) cost += 8;
  if (table.accumulate != g.accumulate) cost += 4;
  if (table.grouped != (g.groups > 1)) cost += 2;
  if (table.pass != g.pass && cost == 0) cost += 1;
  return cost;
}

const GemmTable* choose_table(const Profile& profile, const Gemm& g) {
  const GemmTable* best = nullptr;
  int best_cost = kUnusable;
  for (const GemmTable& table : profile.gemms) {
    const int cost = mismatch(table, g);
    if (cost < best_cost) {
      best = &table;
      best_cost = cost;
    }
  }
  return best;
}

bool far_outside(const GemmTable& table, const std::array<double, 4>& x) {
  return far_outside(table.box, x, 0) || far_outside(table.box, x, 1) ||
         far_outside(table.box, x, 2);
}

/// The point that measured this shape, if there is one on this many SMs; null if there is none.
const GemmPoint* find_point(const GemmTable& table, const Gemm& g, int sms) {
  const GemmPoint* found = nullptr;
  for (const GemmPoint& p : table.points) {
    if (p.groups != g.groups || p.m != g.m || p.n != g.n || p.k != g.k) continue;
    if (found == nullptr || (p.sms == sms && found->sms != sms)) found = &p;
  }
  return found;
}

Price roofline(const Gemm& g, int sms, const Profile& profile) {
  const double share = static_cast<double>(sms) / profile.device.sms;
  const double peak = peak_flops_per_s(g.inputs, profile.device);
  const Shape shape{.work = g, .label = "", .sms = sms};
  const double s = std::max(
      flops_of(shape) / (peak * share),
      bytes_of(shape) / (profile.device.memory_bytes_per_s * bandwidth_share(profile, sms)));
  return {.time_ps = from_seconds(s + profile.launch_gap_s),
          .source = PriceSource::roofline,
          .spread = 0.5,
          .extrapolated = true,
          .note = fmt::format("no {} GEMM table: peak rates", name_of(g.inputs))};
}

}  // namespace

double peak_flops_per_s(NumberFormat format, const Device& device) {
  if (format == NumberFormat::fp32) {
    // Without a rate of their own FP32 operands go through TF32.
    return device.fp32_flops_per_s > 0 ? device.fp32_flops_per_s : device.bf16_flops_per_s / 2;
  }
  const bool fp8 = format == NumberFormat::fp8_block || format == NumberFormat::fp8_tensor;
  return fp8 && device.fp8_flops_per_s > 0 ? device.fp8_flops_per_s : device.bf16_flops_per_s;
}

Gemm gemm_of(const GemmTable& table, const GemmPoint& p) {
  return {.inputs = table.inputs,
          .pass = table.pass,
          .accumulate = table.accumulate,
          .groups = p.groups,
          .m = p.m,
          .n = p.n,
          .k = p.k};
}

double gemm_skeleton_s(const GemmModel& model, const Gemm& g, int sms, double bandwidth_share) {
  const double bytes_per_s = model.bytes_per_s * bandwidth_share;
  const double element = bytes_per_element(g.inputs);
  const double out = g.accumulate ? 8 : g.inputs == NumberFormat::fp32 ? 4 : 2;
  const double k = static_cast<double>(g.k);
  double best = std::numeric_limits<double>::infinity();
  for (const GemmTile& tile : model.tiles) {
    const double area = static_cast<double>(tile.m) * tile.n;
    const double tiles =
        static_cast<double>(g.groups) * ceil_div(g.m, tile.m) * ceil_div(g.n, tile.n);
    const double waves = std::ceil(tiles / sms);
    const double tile_s = model.tile_s + k * 2 * area / model.flops_per_s_per_sm +
                          k * element * (tile.m + tile.n) / model.operand_bytes_per_s_per_sm +
                          area * out * std::min<double>(sms, tiles) / bytes_per_s;
    best = std::min(best, waves * tile_s);
  }
  return model.launch_s + std::max(best, bytes_of(g) / bytes_per_s);
}

double table_seconds(const GemmTable& table, const Gemm& g, int sms, double share) {
  const double residual = local_mean(std::span<const GemmPoint>(table.points), position(g), kWidth);
  return gemm_skeleton_s(table.model, g, sms, share) * std::exp(residual);
}

void prepare(GemmTable& table, const Profile& profile) {
  for (GemmPoint& p : table.points) {
    const Gemm g = gemm_of(table, p);
    p.at.x = position(g);
    p.at.residual = std::log(
        p.seconds / gemm_skeleton_s(table.model, g, p.sms, bandwidth_share(profile, p.sms)));
  }
  table.box = box_of(std::span<const GemmPoint>(table.points));
}

Price price_gemm(const Gemm& g, int sms, const Profile& profile) {
  if (sms <= 0) sms = profile.device.sms;
  ORRERY_CHECK(g.groups > 0 && g.m > 0 && g.n > 0 && g.k > 0, "GEMM {}x {}x{}x{}", g.groups, g.m,
               g.n, g.k);
  const GemmTable* table = choose_table(profile, g);
  if (table == nullptr) return roofline(g, sms, profile);
  const double share = bandwidth_share(profile, sms);
  const int cost = mismatch(*table, g);
  const bool same_kernel = cost <= 1;

  Price price{.spread = table->spread, .note = table->id};
  if (const GemmPoint* p = same_kernel ? find_point(*table, g, sms) : nullptr) {
    // The same shape; on another number of SMs the skeleton says how the time changes.
    const double change = p->sms == sms ? 1
                                        : gemm_skeleton_s(table->model, g, sms, share) /
                                              gemm_skeleton_s(table->model, g, p->sms,
                                                              bandwidth_share(profile, p->sms));
    price.time_ps = from_seconds(p->seconds * change + profile.launch_gap_s);
    price.source = p->sms == sms && !table->derived ? PriceSource::measured : PriceSource::derived;
    if (p->sms != sms) price.note += fmt::format(", {}/{} SMs", sms, p->sms);
    return price;
  }
  price.time_ps = from_seconds(table_seconds(*table, g, sms, share) + profile.launch_gap_s);
  price.extrapolated = far_outside(*table, position(g));
  const int measured_sms = table->points.front().sms;
  const bool direct = same_kernel && !table->derived && measured_sms == sms && !price.extrapolated;
  price.source = direct ? PriceSource::interpolated : PriceSource::derived;
  if (measured_sms != sms) price.note += fmt::format(", {}/{} SMs", sms, measured_sms);
  if (!same_kernel) {
    // Another kernel of the same library: the skeleton carries the difference, less surely.
    price.spread = std::hypot(price.spread, 0.1);
    price.note += g.pass == Pass::backward_weight && table->pass != Pass::backward_weight
                      ? ", weight gradient from forward"
                  : g.groups > 1 && !table->grouped ? ", grouped from dense"
                                                    : ", related kernel";
  }
  return price;
}

}  // namespace orrery
