#pragma once
// Runs a Program for real, on one rank: real tensors, real loss, optimizer step.

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "calibrate/execute/lowering.hpp"
#include "kernels/communicator.hpp"
#include "kernels/device.hpp"
#include "models/scenario.hpp"
#include "sim/program.hpp"
#include "sim/timeline.hpp"

namespace orrery {

class DeviceCommunication;
class Transport;
class Watch;

/// Token ids of a sequence of the global batch of a step: sequence_length + 1 + mtp_modules of
/// them.
using Tokens = std::function<std::vector<std::int32_t>(std::int64_t step, std::int64_t sequence)>;

/// When an op of this rank began and ended, of a clock that all ranks share.
struct OpTimes {
  OpId op;
  std::int64_t begin_ns = 0;
  std::int64_t end_ns = 0;
};

/// What one step came to on this rank. Losses are sums over its tokens, so that those of all ranks
/// add up to the sum over the global batch.
struct RankStep {
  double loss_sum = 0;
  double mtp_loss_sum = 0;     ///< of all modules
  double gradient_norm = 0;    ///< of all ranks' gradients, before clipping
  std::vector<OpTimes> times;  ///< in id order
};

class Execution {
 public:
  /// A rank of a Program with all ranks. All arguments outlive it. `transport`: null for a single
  /// rank. Without `nccl` messages go from and into host memory, which the device's has to be; with
  /// it from device to device, and all ranks construct theirs at the same time.
  Execution(const Scenario& scenario, const Program& program, RankId rank, kernels::Device& device,
            Transport* transport, std::shared_ptr<const kernels::Nccl> nccl = nullptr);
  /// A rank whose peers are not there (lower_alone).
  Execution(const Scenario& scenario, const Program& program, RankId world_rank,
            kernels::Device& device);
  ~Execution();

  /// One step of training. The device's and the transport's errors come through.
  RankStep step(std::int64_t number, const Tokens& tokens);
  /// The same up to the gradients, reduced between ranks: parameters stay as they are.
  RankStep gradients(std::int64_t number, const Tokens& tokens);

  const Lowered& lowered() const { return lowered_; }
  const Tensors& tensors() const { return tensors_; }

 private:
  void prepare(std::shared_ptr<const kernels::Nccl> nccl);
  void load(std::int64_t number, const Tokens& tokens);
  RankStep run(std::int64_t number, const Tokens& tokens, bool update);
  std::size_t enqueue_all(std::int64_t number, bool update);
  void wait_for_peers();
  void stop(const std::string& why) noexcept;
  void enqueue(const LoweredOp& op, std::int64_t number);

  const Scenario& scenario_;
  const Program& program_;
  kernels::Device& device_;
  Transport* transport_;
  Tensors tensors_;
  Lowered lowered_;
  std::vector<kernels::StreamHandle> streams_;  ///< by StreamKind; made where used
  struct Events {
    kernels::EventHandle begin, end;
    std::vector<kernels::EventHandle> joined;  ///< of its further streams, before it begins
  };
  std::vector<Events> events_;                   ///< by index in lowered_.ops
  std::vector<std::vector<std::size_t>> waits_;  ///< indices of ops on other streams
  std::unique_ptr<Watch> watch_;                 ///< where devices talk to each other, as the next
  std::unique_ptr<DeviceCommunication> communication_;
};

/// The timelines of all ranks as one: an op of several ranks begins when the last of them has, and
/// ends with the last. Starts at 0.
Timeline merge_times(const Program& program, std::span<const std::vector<OpTimes>> ranks);

}  // namespace orrery
