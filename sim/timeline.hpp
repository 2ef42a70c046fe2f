#pragma once
// A Timeline: when every op of a Program started and ended. Simulated, executed and imported runs
// all end here.

#include <cstdint>

#include "sim/gpu_share.hpp"
#include "sim/ids.hpp"
#include "sim/price.hpp"
#include "sim/program.hpp"
#include "sim/traffic.hpp"
#include "sim/units.hpp"

namespace orrery {

struct Timeline {
  IdVector<OpId, Picoseconds> start_ps;
  IdVector<OpId, Picoseconds> end_ps;
  std::uint64_t events = 0;  ///< events handled (engine) or ops visited (sweep)
  /// With flows: by how long each link of the Traffic held ops back (FlowNetwork::held_back_s).
  IdVector<LinkId, double> held_back_s;

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

/// What ops share beyond their streams; null: nothing of the kind.
struct Contention {
  const Traffic* traffic = nullptr;                     ///< links of the network
  const IdVector<ShapeId, GpuShare>* shares = nullptr;  ///< memory and SMs of a GPU
};

/// Discrete-event engine: ends of ops, ordered by (time, op id). Ops that put something on shared
/// links end when their flow does, not before their price has passed; computation runs slower while
/// communication takes memory bandwidth and SMs from it. Without contention, or where nothing ever
/// is shared, it equals sweep() bit for bit.
Timeline simulate(const Program& program, const PriceList& prices,
                  const Contention& contention = {});

}  // namespace orrery
