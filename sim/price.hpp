#pragma once
// The price list: every distinct shape priced once. A reader looks here first when a number is odd.

#include <cstdint>
#include <string>
#include <string_view>

#include "sim/cluster.hpp"
#include "sim/ids.hpp"
#include "sim/profile.hpp"
#include "sim/program.hpp"
#include "sim/units.hpp"

namespace orrery {

/// Where a price comes from, best first.
enum class PriceSource : std::uint8_t {
  measured,      ///< this very shape, on this device, in a cited table
  interpolated,  ///< between measured shapes of the same kernel
  derived,       ///< a stated formula over measured figures (another SM share, extrapolation, another die)
  roofline,      ///< peak rates only
};
std::string_view name_of(PriceSource source);

struct Price {
  Picoseconds time_ps = 0;  ///< from start to end of the op, launch gap included
  PriceSource source{};
  double spread = 0;        ///< relative error (about one standard deviation) known or stated for it
  bool extrapolated = false;  ///< outside the measured range: worth a warning
  std::string note;           ///< "DeepGEMM 2025-02, 112/132 SMs", short, cites the profile's source id
};

struct PriceList {
  IdVector<ShapeId, Price> prices;
};

Price price(const Shape& shape, const Profile& profile, const Cluster& cluster);
PriceList price_all(const Program& program, const Profile& profile, const Cluster& cluster);

}  // namespace orrery
