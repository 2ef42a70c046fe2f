// Attention core prices.
//
// The skeleton. The kernel gives one block of 128 queries of one head at a time to each SM; the
// block walks over blocks of 128 keys and skips those that are masked as a whole (a block on the
// diagonal is computed in full: why short causal sequences are slow). A block takes
//   block_s + key blocks * 2 * 128 * 128 * depth / flops_per_s_per_sm
// with depth d_qk + d_v forward and 3 d_qk + 2 d_v backward. Without a mask all blocks are alike
// and run in waves = ceil(blocks / sms); with one, the long blocks go first and the SMs end
// together, so the time is the sum over blocks / sms, at least that of the longest. The memory
// bandwidth only matters for tiny query lengths: the price is never below bytes / peak bandwidth.
// Compute bound, so an SM share scales it.
//
// The residual ln(measured / skeleton) is averaged over points near in ln(kv_len), mask, ln(query
// rows of all heads) and ln(d_qk + d_v).

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "sim/check.hpp"
#include "sim/kernel_prices.hpp"
#include "sim/local_mean.hpp"

namespace orrery {
namespace {

constexpr std::int64_t kBlock = 128;
constexpr std::array<double, 4> kWidth{0.5, 0.25, 0.8, 0.2};

std::array<double, 4> position(const AttentionCore& a) {
  return {std::log(static_cast<double>(a.kv_len)), a.causal ? 0.0 : 1.0,
          std::log(static_cast<double>(a.batch * a.heads) * static_cast<double>(a.q_len)),
          std::log(static_cast<double>(a.d_qk + a.d_v))};
}

double ceil_div(std::int64_t a, std::int64_t b) {
  const std::int64_t whole = (a + b - 1) / b;
  return static_cast<double>(whole);
}

const AttentionTable* choose_table(const Profile& profile, const AttentionCore& a) {
  for (const AttentionTable& table : profile.attention) {
    if (table.inputs == a.inputs && table.backward == a.backward && !table.points.empty()) {
      return &table;
    }
  }
  return nullptr;
}

/// The point that measured this core, if there is one on this many SMs; null if there is none.
const AttentionPoint* find_point(const AttentionTable& table, const AttentionCore& a, int sms) {
  const AttentionPoint* found = nullptr;
  for (const AttentionPoint& p : table.points) {
    if (p.shape == a && (found == nullptr || (p.sms == sms && found->sms != sms))) found = &p;
  }
  return found;
}

bool far_outside(const AttentionTable& table, const std::array<double, 4>& x) {
  return far_outside(table.box, x, 0) || far_outside(table.box, x, 3);
}

}  // namespace

double attention_skeleton_s(const AttentionModel& model, const AttentionCore& a, int sms) {
  const std::int64_t query_blocks = (a.q_len + kBlock - 1) / kBlock;
  const double depth = static_cast<double>(a.backward ? 3 * a.d_qk + 2 * a.d_v : a.d_qk + a.d_v);
  const double key_block_s = 2.0 * kBlock * kBlock * depth / model.flops_per_s_per_sm;
  const double longest = ceil_div(a.kv_len, kBlock);
  const double blocks = static_cast<double>(a.batch * a.heads * query_blocks);
  if (!a.causal) {
    return model.launch_s + std::ceil(blocks / sms) * (model.block_s + longest * key_block_s);
  }
  // Key blocks of one head: query block i sees keys up to kv_len - q_len + (i + 1) 128.
  double key_blocks = 0;
  for (std::int64_t i = 0; i < query_blocks; ++i) {
    const std::int64_t last_query = std::min(a.q_len, (i + 1) * kBlock);
    const std::int64_t keys = std::max<std::int64_t>(0, a.kv_len - a.q_len + last_query);
    key_blocks += ceil_div(keys, kBlock);
  }
  const double total =
      blocks * model.block_s + static_cast<double>(a.batch * a.heads) * key_blocks * key_block_s;
  return model.launch_s + std::max(total / sms, model.block_s + longest * key_block_s);
}

double table_seconds(const AttentionTable& table, const AttentionCore& a, int sms) {
  const double residual =
      local_mean(std::span<const AttentionPoint>(table.points), position(a), kWidth);
  return attention_skeleton_s(table.model, a, sms) * std::exp(residual);
}

void prepare(AttentionTable& table) {
  for (AttentionPoint& p : table.points) {
    p.at.x = position(p.shape);
    p.at.residual = std::log(p.seconds / attention_skeleton_s(table.model, p.shape, p.sms));
  }
  table.box = box_of(std::span<const AttentionPoint>(table.points));
}

Price price_attention(const AttentionCore& a, int sms, const Profile& profile) {
  if (sms <= 0) sms = profile.device.sms;
  ORRERY_CHECK(a.batch > 0 && a.heads > 0 && a.q_len > 0 && a.kv_len > 0 && a.d_qk > 0,
               "attention {}x{} {}x{}", a.batch, a.heads, a.q_len, a.kv_len);
  const Shape shape{.work = a, .label = "", .sms = sms};
  const double floor_s =
      bytes_of(shape) / (profile.device.memory_bytes_per_s * bandwidth_share(profile, sms));
  const AttentionTable* table = choose_table(profile, a);
  if (table == nullptr) {
    const double share = static_cast<double>(sms) / profile.device.sms;
    const double peak = peak_flops_per_s(a.inputs, profile.device);
    const double s = std::max(flops_of(shape) / (peak * share), floor_s);
    return {.time_ps = from_seconds(s + profile.launch_gap_s),
            .source = PriceSource::roofline,
            .spread = 0.5,
            .extrapolated = true,
            .note = fmt::format("no {} attention table: peak rates", name_of(a.inputs))};
  }
  Price price{.spread = table->spread, .note = table->id};
  if (const AttentionPoint* p = find_point(*table, a, sms)) {
    const double change = p->sms == sms ? 1
                                        : attention_skeleton_s(table->model, a, sms) /
                                              attention_skeleton_s(table->model, a, p->sms);
    price.time_ps = from_seconds(std::max(p->seconds * change, floor_s) + profile.launch_gap_s);
    price.source = p->sms == sms && !table->derived ? PriceSource::measured : PriceSource::derived;
    if (p->sms != sms) price.note += fmt::format(", {}/{} SMs", sms, p->sms);
    return price;
  }
  price.time_ps =
      from_seconds(std::max(table_seconds(*table, a, sms), floor_s) + profile.launch_gap_s);
  price.extrapolated = far_outside(*table, position(a));
  const int measured_sms = table->points.front().sms;
  price.source = table->derived || measured_sms != sms || price.extrapolated
                     ? PriceSource::derived
                     : PriceSource::interpolated;
  if (measured_sms != sms) price.note += fmt::format(", {}/{} SMs", sms, measured_sms);
  return price;
}

}  // namespace orrery
