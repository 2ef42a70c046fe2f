#pragma once
// A profile measured on one die, for another one with the same SMs beside another memory or at
// another clock: H200 to H100 or H800. In a profile file:
//
//   name: h800_from_h200
//   device: {...}               # of what it is for
//   scaled:
//     from: h200.yaml           # what was measured
//     spread: 6 %               # what scaling adds to every price's spread
//     source: "..."             # why the rules hold here, and who saw how far they are off
//     bandwidth: {from: 4.3 TB/s, to: 3.0 TB/s}      # of memory, as achieved (the data sheets')
//     clock: {from: 1755 MHz, to: 1620 MHz}          # of SMs, as sustained under load (the same)
//
// Tables of its own come before scaled ones; launch_gap, bandwidth_by_sms, streaming kinds and
// expert_exchange of its own replace them.
//
// The rules, b being the ratio of bandwidths (to / from) and c that of clocks:
//
// - GEMM: a measured time changes as its table's skeleton does (gemm_price.cpp) when the memory's
//   rate is multiplied by b, what an SM computes and loads by c, and a tile's fill and drain
//   divided by c. The launch stays. So where the tiles' time decides, only the store of the tiles
//   changes with b, and where the bytes decide, all but the launch does.
// - Attention: as its skeleton at c; it knows no memory, but no price is below the bytes at the
//   device's peak.
// - Streaming: bytes over the rate times b; launches stay.
// - Few SMs: what they can draw of memory is theirs, not the memory's, so share(n) becomes the
//   lesser of share(n) / b and 1 (bandwidth_by_sms).
// - Exchanges: as measured; they go by the cluster's links.
//
// Tables of GEMMs and attention that the base only carries over itself (`derived`) are carried on as
// they are: theirs was another memory already.
// What neither says (L2, the power limit beyond the stated clock) is taken as the same.

#include "sim/profile.hpp"

namespace orrery {

struct DieChange {
  double bandwidth = 1;  ///< to / from
  double clock = 1;
  double spread = 0;
  std::string source;
};

/// `base`, prepared, for the device `to` with as many SMs; its points count as derived, and their
/// tables' ids say by which rules. Not prepared.
Profile scale_profile(Profile base, const Device& to, const DieChange& change);

/// Reads the map under the key `scaled`: the change, and the file's profile as scaled. An empty
/// profile where it has problems: among them another number of SMs, and a base that is itself
/// scaled.
Profile read_scaled_profile(const Node& node, const Device& to, Problems& problems);

}  // namespace orrery
