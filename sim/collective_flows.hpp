#pragma once
// One collective alone on the fabric, every transfer a flow of its own.
//
// The formulas of network_prices.hpp know links, not fabrics: their price is what endpoints and
// protocol reach where the network between them does not limit. Here each transfer is a flow that
// alone would take the price (its own limit is its bytes over the price) and that shares the
// fabric's links, at what they achieve, max-min fairly with the others. So the result is the price
// on a non-blocking fabric, and more where the fabric is thin, over-subscribed or broken.
//
// Unlike in sim/traffic.hpp, transfers do not keep pace: one that shares a thin link falls behind,
// and what it leaves elsewhere the others take. With P the price and busy(l) the time that link l
// needs for all its bytes, an op whose transfers keep pace takes
//   T = max(P, busy of the busiest link),
// which no sharing can beat; and a flow is at its own limit for at most P in all and otherwise held
// back by a saturated link of its path, which cannot last longer than the link is busy. So
//   T <= time as flows <= P + sum of busy(l) over the links l of a path that can limit.
// For symmetric patterns all flows of the busiest links are alike, and the result is T.

#include <span>
#include <vector>

#include "sim/cluster.hpp"
#include "sim/fabric.hpp"
#include "sim/network_prices.hpp"
#include "sim/shape.hpp"
#include "sim/transfers.hpp"

namespace orrery {

/// Who sends how many bytes to whom; `members` node by node, in the order of their rails.
std::vector<Transfer> transfers_of(const Communication& moves, std::span<const GpuId> members,
                                   const Fabric& fabric);

/// Time until the last of the transfers is done. `priced`: the volumes that `price_ps` is the price
/// of (communication_of), so that what it lets a GPU send over its own links is known: these do
/// not limit below that, unless the fabric's are slower than the cluster's. A transfer that is
/// hashed as cluster.ecmp_flows is that many flows; a sprayed one is a flow on all its links.
/// Throws InputError where failed links leave two GPUs without a path.
Picoseconds time_as_flows(std::span<const Transfer> transfers, const Communication& priced,
                          Picoseconds price_ps, const Cluster& cluster, const Fabric& fabric);

/// The same for an ExpertExchange, Collective or Send among `members`, which are as many as its
/// shape says; `price_ps` for any other shape.
Picoseconds time_as_flows(const Shape& shape, std::span<const GpuId> members, Picoseconds price_ps,
                          const Cluster& cluster, const Fabric& fabric);

}  // namespace orrery
