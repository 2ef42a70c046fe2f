#pragma once
// The network between the devices of one machine: collectives over their communicators, and copies
// from one's memory to another's.

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "calibrate/measure_network.hpp"
#include "kernels/communicator.hpp"

namespace orrery {

/// Operations of measure_network between devices, a communicator for each size of group. Timed by
/// the device, from what comes before the operation in its stream to its end, as executed steps
/// time theirs. All ranks construct theirs at the same time; the arguments outlive it.
class DeviceOperations final : public GroupOperations {
 public:
  DeviceOperations(Transport& transport, kernels::Device& device,
                   std::shared_ptr<const kernels::Nccl> nccl, std::int64_t most_bytes);
  ~DeviceOperations() override;
  DeviceOperations(const DeviceOperations&) = delete;
  DeviceOperations& operator=(const DeviceOperations&) = delete;

  void prepare(NcclOp op, int members, std::size_t bytes) override;
  RunSpan run() override;

 private:
  using Clock = std::chrono::steady_clock;
  void enqueue();
  void look(const char* what);
  std::byte* next_buffer();

  Transport& transport_;
  kernels::Device& device_;
  kernels::StreamHandle stream_;
  kernels::EventHandle begin_, end_;
  std::vector<std::pair<int, std::unique_ptr<kernels::Communicator>>> by_members_;
  kernels::Communicator* communicator_ = nullptr;
  std::byte* memory_ = nullptr;
  std::size_t memory_bytes_ = 0;
  std::size_t at_ = 0;
  NcclOp op_ = NcclOp::other;
  std::vector<int> group_;
  std::size_t bytes_ = 0;
  std::chrono::steady_clock::time_point since_;
};

/// Bytes a second from one device's memory to another's: alone, and each way while both go.
struct PeerCopy {
  int from = 0;
  int to = 0;
  double bytes_per_s = 0;
  double both_ways_bytes_per_s = 0;
};

/// Of all ordered pairs of these devices, by `from`, then `to`: medians of several copies of
/// `bytes` each. One process has all of them.
std::vector<PeerCopy> measure_peer_copies(std::span<kernels::Device* const> devices,
                                          std::int64_t bytes);

/// Bytes a second that a device copies inside its own memory.
double measure_own_copies(kernels::Device& device, std::int64_t bytes);

/// What ranks with a GPU each measure; all of it on rank 0.
struct GpuNetwork {
  std::vector<NetworkPoint> points;
  double copy_bytes_per_s = 0;  ///< inside a GPU's memory, while all do: the median of all
  std::vector<PeerCopy> peers;  ///< none where launchers show each process its own GPU only
  std::string device;
};

/// All ranks call it, on one machine. Throws std::runtime_error where there is not a GPU for each,
/// and says what to do instead.
GpuNetwork measure_gpu_network(Transport& transport, std::shared_ptr<const kernels::Nccl> nccl,
                               const NetworkMeasureOptions& options);

/// A table of the pairs.
std::string peer_copy_report(std::span<const PeerCopy> copies);

}  // namespace orrery
