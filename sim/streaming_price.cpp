// Prices of kernels that do little but move bytes: launches * (launch_s + gap) + bytes / bandwidth,
// the bandwidth being what this kind reaches on the whole device times the share that fewer SMs can
// draw.

#include <fmt/core.h>

#include "sim/check.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {

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

Price price_streaming(const Streaming& s, int sms, const Profile& profile) {
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
  const double seconds =
      launches * (rate.launch_s + profile.launch_gap_s) + bytes / (rate.bytes_per_s * share);
  Price price{.time_ps = from_seconds(seconds), .spread = rate.spread, .note = rate.id};
  price.source =
      rate.derived || sms != profile.device.sms ? PriceSource::derived : PriceSource::interpolated;
  if (sms != profile.device.sms) price.note += fmt::format(", {}/{} SMs", sms, profile.device.sms);
  return price;
}

}  // namespace orrery
