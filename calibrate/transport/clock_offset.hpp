#pragma once
// Timelines of several machines on one clock.

#include <cstdint>
#include <functional>
#include <string>

#include "calibrate/transport/transport.hpp"

namespace orrery {

/// A clock, and what tells it from others: ranks with equal identity read the same one.
struct MachineClock {
  std::string identity;
  std::function<std::int64_t()> now_ns;
};

/// CLOCK_MONOTONIC. It begins at boot and is shared by all processes of a machine but those in
/// another time namespace, so its identity is the boot's and the namespace's.
MachineClock monotonic_clock();

/// What to add to this rank's clock to get rank 0's; 0 exactly where it is the same clock. Else of
/// kRoundTrips to rank 0 the quickest says it, with an error of at most half of that round trip
/// (Cristian, Probabilistic clock synchronization, 1989). All ranks call it at once.
std::int64_t clock_offset_ns(Transport& transport, const MachineClock& clock = monotonic_clock());

}  // namespace orrery
