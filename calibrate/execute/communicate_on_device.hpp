#pragma once
// What a lowered op sends and receives, from device to device: NCCL's communicators in the device's
// streams.

#include <functional>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "calibrate/execute/lowering.hpp"
#include "calibrate/execute/watch.hpp"
#include "kernels/communicator.hpp"
#include "sim/program.hpp"

namespace orrery {

class Transport;

/// One rank's communicators: one for each list of streams that ops of the Program sit on, which is
/// kernels/communicator.hpp's (a). An Execution enqueues in the order of ids, which the Program has
/// the same on all ranks and where everything comes after what it waits for: (b). The kinds of
/// streams that communicate share the SMs evenly, and a stream runs one op at a time: (c).
///
/// The host knows how many rows go to whom: a dispatch of the forward pass waits for its router,
/// reads the choice (a few bytes a token), sends the counts over the Transport, and then enqueues
/// what it now knows the sizes of. (b) holds for this wait, too: what the router waits for is
/// enqueued, here and on all ranks that it depends on, or they wait for what comes earlier still.
/// The same ops' three other exchanges use the same route and wait for nothing. Rows are packed,
/// and sums taken, by the device.
class DeviceCommunication {
 public:
  /// Opens communicators with all ranks that this one's ops talk to; all ranks call it. All
  /// arguments outlive it; `streams`: by StreamKind.
  DeviceCommunication(Transport& transport, kernels::Device& device,
                      std::shared_ptr<const kernels::Nccl> nccl, const Program& program,
                      const Lowered& lowered, Tensors& tensors, Watch& watch,
                      const std::vector<kernels::StreamHandle>& streams);
  ~DeviceCommunication();

  /// Enqueues the op's communication, and an event ahead of what waits for other ranks, which it
  /// returns. May wait, looking at the watch; throws what that throws.
  kernels::EventHandle enqueue(const LoweredOp& op, std::int64_t step);
  /// Throws what went wrong on a communicator.
  void check();
  /// Nothing that is enqueued waits for other ranks any more.
  void abort();

 private:
  /// Of a route's tokens, on the device.
  struct RouteRows {
    std::int32_t* token = nullptr;  ///< of each row sent, member by member: (tokens * slots)
    std::int32_t* row = nullptr;    ///< (tokens, slots): its rows, by member; -1: fewer
  };
  /// Memory that all exchanges of a stream use, one after the other.
  struct Room {
    kernels::Matrix rows;          ///< packed: sent by a dispatch, or come back to a combine
    float* scales_sent = nullptr;  ///< of rows in FP8: for each member (tiles, rows)
    float* scales_received = nullptr;
    std::int32_t* experts = nullptr;  ///< of each row: (rows, top_k)
    float* values = nullptr;          ///< weights, or gradients of them: (rows, top_k)
  };

  void open(const LoweredOp& op, int max_ctas);
  void ask_who_failed();
  Room room_of(const LoweredOp& op);
  void find_route(const LoweredOp& op, std::int64_t step);
  void transfer_or_collective(const LoweredOp& op);
  void dispatch(const LoweredOp& op, std::int64_t step);
  void combine(const LoweredOp& op);
  kernels::StreamHandle stream_of(const LoweredOp& op) const;
  /// For what the op waits for others in: from here on it talks.
  kernels::Communicator& communicator_of(const LoweredOp& op);

  Transport& transport_;
  kernels::Device& device_;
  std::shared_ptr<const kernels::Nccl> nccl_;
  const Program& program_;
  Tensors& tensors_;
  Watch& watch_;
  const std::vector<kernels::StreamHandle>& streams_;
  std::function<void()> look_;  ///< while NCCL makes this rank wait
  /// By the streams that their ops sit on.
  std::map<std::vector<StreamId>, std::unique_ptr<kernels::Communicator>> communicators_;
  std::unordered_map<const ExchangeRoute*, RouteRows> routes_;
  std::unordered_map<std::uint64_t, kernels::EventHandle> routed_;  ///< by op: the choice is made
  std::unordered_map<std::uint64_t, kernels::EventHandle> talks_;   ///< by op
};

}  // namespace orrery
