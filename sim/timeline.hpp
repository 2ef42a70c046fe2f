#pragma once
// A Timeline: when every op of a Program started and ended. Simulated, executed and imported runs
// all end here.

#include <cstdint>

#include "sim/ids.hpp"
#include "sim/price.hpp"
#include "sim/program.hpp"
#include "sim/units.hpp"

namespace orrery {

struct Timeline {
  IdVector<OpId, Picoseconds> start_ps;
  IdVector<OpId, Picoseconds> end_ps;
  std::uint64_t events = 0;  ///< events handled (engine) or ops visited (sweep)

  Picoseconds makespan_ps() const;
  /// 64-bit hash of all starts and ends in op order: equal results, equal fingerprints.
  std::uint64_t fingerprint() const;
};

/// How long each op takes: the price of its shape and, for computation, that times the slowdown of
/// its rank. Checks that every shape has a price and none is negative. Outlived by both arguments.
class Durations {
 public:
  Durations(const Program& program, const PriceList& prices);

  Picoseconds operator[](OpId op) const {
    const Picoseconds time_ps = by_shape_ps_[program_.shape(op)];
    return program_.slowdown().empty() ? time_ps : slowed(op, time_ps);
  }

 private:
  Picoseconds slowed(OpId op, Picoseconds time_ps) const;

  const Program& program_;
  IdVector<ShapeId, Picoseconds> by_shape_ps_;
};

/// Topological sweep: one pass over the ids. Exact where ops do not contend for anything but
/// streams.
Timeline sweep(const Program& program, const PriceList& prices);

/// Discrete-event engine: events ordered by (time, phase, op id). Equals sweep() bit for bit
/// without contention; it is what contention models plug into.
Timeline simulate(const Program& program, const PriceList& prices);

}  // namespace orrery
