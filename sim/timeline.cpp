#include "sim/timeline.hpp"

#include <algorithm>
#include <cmath>

#include "sim/check.hpp"

namespace orrery {

Picoseconds Timeline::makespan_ps() const {
  Picoseconds last = 0;
  for (const Picoseconds end : end_ps) last = std::max(last, end);
  return last;
}

std::uint64_t Timeline::fingerprint() const {
  // FNV-1a (Fowler, Noll, Vo; draft-eastlake-fnv) over 64-bit words instead of bytes; the shift
  // lets the high bits of a word, which a multiplication only carries upwards, reach the low bits
  // of the hash.
  std::uint64_t hash = 0xcbf29ce484222325U;
  const auto mix = [&](Picoseconds time) {
    hash = (hash ^ static_cast<std::uint64_t>(time)) * 0x100000001b3U;
    hash ^= hash >> 32;
  };
  for (std::size_t i = 0; i < start_ps.size(); ++i) {
    mix(start_ps[OpId(i)]);
    mix(end_ps[OpId(i)]);
  }
  return hash;
}

Durations::Durations(const Program& program, const PriceList& prices)
    : program_(program), by_shape_ps_(program.shapes().size()) {
  const std::size_t shapes = program.shapes().size();
  ORRERY_CHECK(prices.prices.size() == shapes, "{} prices for {} shapes", prices.prices.size(),
               shapes);
  for (ShapeId shape; shape.value < shapes; ++shape) {
    const Picoseconds time = prices.prices[shape].time_ps;
    ORRERY_CHECK(time >= 0, "shape {} takes {} ps", shape.value, time);
    by_shape_ps_[shape] = time;
  }
}

Picoseconds Durations::slowed(OpId op, Picoseconds time_ps) const {
  const auto streams = program_.streams_of(op);
  if (program_.kind(op) != OpKind::compute || streams.empty()) return time_ps;
  const double factor = program_.slowdown()[rank_of(streams.front()).value];
  return std::llround(static_cast<double>(time_ps) * factor);
}

}  // namespace orrery
