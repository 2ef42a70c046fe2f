#pragma once
// What communication takes from the computation beside it on the same GPU.
//
// Two things are shared. Memory: a kernel that moves bytes at u of the GPU's memory bandwidth
// leaves 1 - u to the others, and a kernel that waits for memory during m of its time runs at 1 - u
// m of its speed. SMs: NCCL's blocks do not share an SM with other kernels (NVIDIA/nccl issue 689),
// so a kernel loses their share of the device, as far as it does not wait for memory. The SMs of
// dispatch and combine are the plan's (communication_sms) and in the prices already.
//
// Nothing here is fitted. What memory traffic communication causes follows from what it does
// (Communication::memory_bytes); m of a kernel is the bytes it must touch over what the memory
// could move in its time, 1 for streaming kernels. Published cases: a GEMM of 8192^3 beside an
// all-gather by copy engines, which hold no SM, takes 2 % longer (pytorch pull requests 172714 and
// 182850), this says 1.5 %. The other way round, communication beside computation, public figures
// are few and not clean (all-to-all 0 to 11 % slower), so nothing is taken.

#include "sim/price.hpp"
#include "sim/program.hpp"

namespace orrery {

struct GpuShare {
  double memory_taken = 0;  ///< of communication: share of the GPU's memory bandwidth
  double sms_taken = 0;     ///< of communication: share of the GPU's SMs
  double memory_bound = 0;  ///< of computation: share of its time that it waits for memory

  /// Speed of computation that is this memory-bound while others take what they do.
  double speed_beside(double memory, double sms) const {
    return (1 - sms * (1 - memory_bound)) * (1 - memory * memory_bound);
  }
};

/// By shape. All zero where the profile's kernels were measured beside communication.
IdVector<ShapeId, GpuShare> gpu_shares(const Program& program, const PriceList& prices,
                                       const Profile& profile, const Cluster& cluster);

}  // namespace orrery
