#include "sim/gpu_share.hpp"

#include <algorithm>
#include <variant>

#include "sim/network_prices.hpp"

namespace orrery {

IdVector<ShapeId, GpuShare> gpu_shares(const Program& program, const PriceList& prices,
                                       const Profile& profile, const Cluster& cluster) {
  constexpr double kNcclSms = 16;  // of a collective in a DGX node (NVIDIA/nccl issue 689)
  constexpr double kMost = 0.5;    // tiny transfers: the time is latency, not bytes
  const auto& shapes = program.shapes();
  IdVector<ShapeId, GpuShare> shares(shapes.size());
  if (profile.beside_communication) return shares;
  for (ShapeId id; id.value < shapes.size(); ++id) {
    const double memory_could_move =
        seconds(prices.prices[id].time_ps) * profile.device.memory_bytes_per_s;
    if (memory_could_move <= 0) continue;
    GpuShare& share = shares[id];
    const auto& work = shapes[id].work;
    if (const auto moves = communication_of(shapes[id], cluster)) {
      share.memory_taken = std::min(kMost, moves->memory_bytes / memory_could_move);
      if (std::holds_alternative<Collective>(work)) {
        share.sms_taken = std::min(kMost, kNcclSms / profile.device.sms);
      }
    } else if (std::holds_alternative<Streaming>(work)) {
      share.memory_bound = 1;
    } else {
      share.memory_bound = std::min(1.0, bytes_of(shapes[id]) / memory_could_move);
    }
  }
  return shares;
}

}  // namespace orrery
