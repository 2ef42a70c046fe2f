#include "sim/price.hpp"

#include "sim/kernel_prices.hpp"
#include "sim/network_prices.hpp"

namespace orrery {

std::string_view name_of(PriceSource source) {
  switch (source) {
    case PriceSource::measured: return "measured";
    case PriceSource::interpolated: return "interpolated";
    case PriceSource::derived: return "derived";
    case PriceSource::roofline: return "roofline";
  }
  return "?";
}

Price price(const Shape& shape, const Profile& profile, const Cluster& cluster) {
  struct Visitor {
    const std::string& label;
    int sms;
    const Profile& profile;
    const Cluster& cluster;
    Price operator()(const Mark&) const { return {0, PriceSource::measured, 0, false, ""}; }
    Price operator()(const Gemm& g) const { return price_gemm(g, sms, profile); }
    Price operator()(const AttentionCore& a) const { return price_attention(a, sms, profile); }
    Price operator()(const CachedAttention& a) const {
      return price_cached_attention(a, sms, profile);
    }
    Price operator()(const Streaming& s) const { return price_streaming(s, label, sms, profile); }
    Price operator()(const ExpertExchange& e) const {
      return e.low_latency ? price_low_latency(e, profile, cluster)
                           : price_exchange(e, sms, profile, cluster);
    }
    Price operator()(const Collective& c) const { return price_collective(c, cluster); }
    Price operator()(const Send& s) const { return price_send(s, cluster); }
    Price operator()(const StorageWrite& w) const { return price_storage_write(w); }
  };
  return std::visit(Visitor{shape.label, shape.sms, profile, cluster}, shape.work);
}

PriceList price_all(const Program& program, const Profile& profile, const Cluster& cluster) {
  PriceList list;
  list.prices.reserve(program.shapes().size());
  for (const Shape& shape : program.shapes()) list.prices.push_back(price(shape, profile, cluster));
  return list;
}

}  // namespace orrery
