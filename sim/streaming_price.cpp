// Prices of kernels that do little but move bytes.
//
// The skeleton is launches * (launch_s + gap) + bytes / bandwidth, the bandwidth being what this
// kind reaches on the whole device times the share that fewer SMs can draw.
//
// Where ops of the kind were measured, one that was measured as such (bytes, launches, and label
// where the point has one) has its measured time, and around them the residual ln(measured /
// skeleton) is averaged over the points near in ln(bytes): those of the op's own label if they
// reach this far, else all of the kind. Without points nearby the skeleton stands alone.

#include <fmt/core.h>

#include <cmath>
#include <span>
#include <vector>

#include "sim/check.hpp"
#include "sim/kernel_prices.hpp"
#include "sim/local_mean.hpp"

namespace orrery {
namespace {

// Bandwidth is alike over about a factor of two of the bytes; the other coordinates are unused.
constexpr std::array<double, 4> kWidth{0.6, 1, 1, 1};

std::array<double, 4> position(const Streaming& s) {
  const double bytes = static_cast<double>(s.bytes_read) + static_cast<double>(s.bytes_written);
  return {std::log(std::max(bytes, 1.0)), 0, 0, 0};
}

bool same_bytes(const StreamingPoint& p, const Streaming& s) {
  return p.bytes_read == s.bytes_read && p.bytes_written == s.bytes_written &&
         p.launches == s.launches;
}

/// The point that measured this very op, best of all on this many SMs; null if there is none.
const StreamingPoint* find_point(const StreamingRate& rate, const Streaming& s,
                                 std::string_view label, int sms) {
  const StreamingPoint* best = nullptr;
  int best_cost = 0;
  for (const StreamingPoint& p : rate.points) {
    if (!same_bytes(p, s) || (!p.label.empty() && p.label != label)) continue;
    const int cost = (p.sms == sms ? 0 : 2) + (p.label.empty() ? 1 : 0);
    if (best == nullptr || cost < best_cost) {
      best = &p;
      best_cost = cost;
    }
  }
  return best;
}

}  // namespace

double bandwidth_share(const Profile& profile, int sms) {
  if (profile.bandwidth_by_sms.empty()) return static_cast<double>(sms) / profile.device.sms;
  double low_sms = 0;
  double low_share = 0;
  for (const auto& [high_sms, high_share] : profile.bandwidth_by_sms) {
    if (sms <= high_sms) {
      const double part = (sms - low_sms) / (high_sms - low_sms);
      return low_share + part * (high_share - low_share);
    }
    low_sms = high_sms;
    low_share = high_share;
  }
  return low_share;
}

double streaming_skeleton_s(const StreamingRate& rate, const Streaming& s, int sms,
                            const Profile& profile) {
  const double bytes = static_cast<double>(s.bytes_read) + static_cast<double>(s.bytes_written);
  const double launches = static_cast<double>(s.launches);
  return launches * rate.launch_s + std::max(launches - 1, 0.0) * profile.launch_gap_s +
         bytes / (rate.bytes_per_s * bandwidth_share(profile, sms));
}

std::optional<double> table_seconds(const StreamingRate& rate, const Streaming& s,
                                    std::string_view label, int sms, const Profile& profile) {
  const std::array<double, 4> x = position(s);
  const auto near = [&](std::span<const StreamingPoint> points) {
    return !points.empty() && !far_outside(box_of(points), x, 0);
  };
  std::vector<StreamingPoint> points;
  for (const StreamingPoint& p : rate.points) {
    if (p.label == label) points.push_back(p);
  }
  if (!near(points)) points = rate.points;
  if (!near(points)) return std::nullopt;
  return streaming_skeleton_s(rate, s, sms, profile) *
         std::exp(local_mean(std::span<const StreamingPoint>(points), x, kWidth));
}

void prepare(StreamingKind kind, StreamingRate& rate, const Profile& profile) {
  for (StreamingPoint& p : rate.points) {
    const Streaming s{.kind = kind,
                      .bytes_read = p.bytes_read,
                      .bytes_written = p.bytes_written,
                      .launches = p.launches};
    p.at.x = position(s);
    p.at.residual = std::log(p.seconds / streaming_skeleton_s(rate, s, p.sms, profile));
  }
}

Price price_streaming(const Streaming& s, std::string_view label, int sms, const Profile& profile) {
  if (sms <= 0) sms = profile.device.sms;
  ORRERY_CHECK(s.bytes_read >= 0 && s.bytes_written >= 0 && s.launches >= 0,
               "{} reads {} B, writes {} B, {} launches", name_of(s.kind), s.bytes_read,
               s.bytes_written, s.launches);
  const double bytes = static_cast<double>(s.bytes_read) + static_cast<double>(s.bytes_written);
  const double launches = static_cast<double>(s.launches);
  const double share = bandwidth_share(profile, sms);
  const auto found = profile.streaming.find(s.kind);
  if (found == profile.streaming.end()) {
    const double seconds =
        launches * profile.launch_gap_s + bytes / (profile.device.memory_bytes_per_s * share);
    return {.time_ps = from_seconds(seconds),
            .source = PriceSource::roofline,
            .spread = 0.5,
            .extrapolated = true,
            .note = fmt::format("no {} rate: peak bandwidth", name_of(s.kind))};
  }
  const StreamingRate& rate = found->second;
  Price price{.spread = rate.spread, .note = rate.id};
  if (const StreamingPoint* p = find_point(rate, s, label, sms)) {
    // The same op; on another number of SMs the skeleton says how the time changes.
    const double change = p->sms == sms ? 1
                                        : streaming_skeleton_s(rate, s, sms, profile) /
                                              streaming_skeleton_s(rate, s, p->sms, profile);
    price.time_ps = from_seconds(p->seconds * change + profile.launch_gap_s);
    price.source = p->sms == sms && !rate.derived ? PriceSource::measured : PriceSource::derived;
    if (p->sms != sms) price.note += fmt::format(", {}/{} SMs", sms, p->sms);
    return price;
  }
  if (const auto seconds = table_seconds(rate, s, label, sms, profile)) {
    price.time_ps = from_seconds(*seconds + profile.launch_gap_s);
  } else {
    price.time_ps = from_seconds(launches * (rate.launch_s + profile.launch_gap_s) +
                                 bytes / (rate.bytes_per_s * share));
  }
  price.source =
      rate.derived || sms != profile.device.sms ? PriceSource::derived : PriceSource::interpolated;
  if (sms != profile.device.sms) price.note += fmt::format(", {}/{} SMs", sms, profile.device.sms);
  return price;
}

}  // namespace orrery
