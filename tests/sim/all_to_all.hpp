#pragma once
// All-to-all between nodes of 8 GPUs, whose completion another simulator gives. Every GPU has an
// NVLink up and an NVLink down link (200 GB/s, 1 us) used inside its node, and a NIC up and a NIC
// down link (50 GB/s, 2 us) used across nodes. At time 0 GPU a sends
// 10^6 x (1 + 0.1 x ((7 a + 13 b) mod 5)) bytes to every other GPU b, over up(a) and down(b).
//
// The last flow completes, by SimGrid 3.32 (S4U sendto_async, --cfg=network/model:CM02), at
//   nodes                                  1      2              4       8      16             32
//   --cfg=network/crosstraffic:0, us      46    200            586    1356    2892           5964
//   the default, crosstraffic:1, us   48.175  209.7  614.931157896  1423.4  3036.1 6261.551870211
// Cross traffic: a flow also takes 5 % of its rate on the links of the way back.

#include <array>
#include <cstddef>

#include "sim/flows.hpp"

namespace orrery::test {

/// What a flow takes of its rate on the links of the way back.
inline constexpr double kNoCrossTraffic = 0;
inline constexpr double kFivePercentBack = 0.05;

/// All flows started, no time passed.
inline FlowNetwork all_to_all(std::size_t nodes, double back) {
  constexpr std::size_t kGpusPerNode = 8;
  const std::size_t gpus = nodes * kGpusPerNode;
  IdVector<LinkId, Link> links;  // 4 gpu + {NVLink up, down, NIC up, down}; latencies in the starts
  for (std::size_t gpu = 0; gpu < gpus; ++gpu) {
    links.insert(links.end(), 2, Link{200e9, 0});
    links.insert(links.end(), 2, Link{50e9, 0});
  }
  FlowNetwork network(links);
  for (std::size_t a = 0; a < gpus; ++a) {
    for (std::size_t b = 0; b < gpus; ++b) {
      if (a == b) continue;
      const bool inside = a / kGpusPerNode == b / kGpusPerNode;
      const std::size_t up = inside ? 0 : 2;
      const std::array hops{FlowHop{LinkId(4 * a + up), 1}, FlowHop{LinkId(4 * b + up + 1), 1},
                            FlowHop{LinkId(4 * b + up), back},
                            FlowHop{LinkId(4 * a + up + 1), back}};
      const double bytes = 1e6 * (1 + 0.1 * static_cast<double>((7 * a + 13 * b) % 5));
      network.start((inside ? 2 : 4) * kPsPerUs, hops, bytes, 0);
    }
  }
  return network;
}

inline double last_completion_us(FlowNetwork& network) {
  return static_cast<double>(network.run_until_idle().back().at_ps) / kPsPerUs;
}

}  // namespace orrery::test
