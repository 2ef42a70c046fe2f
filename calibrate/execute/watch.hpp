#pragma once
// Waiting for a device whose streams wait for other ranks' devices: who fails or hangs there is not
// seen by this one, which would wait for ever.

#include <chrono>
#include <optional>
#include <vector>

#include "kernels/device.hpp"
#include "sim/program.hpp"

namespace orrery {

class Transport;

/// How far one rank's device has come in a step. An op that talks to other ranks, and whose own
/// part before that is done, may take as long as a wait of the Transport.
class Watch {
 public:
  Watch(Transport& transport, const kernels::Device& device, const Program& program, RankId rank)
      : transport_(transport), device_(device), program_(program), rank_(rank) {}

  /// A new step: nothing is enqueued.
  void begin();
  /// Enqueued, its events recorded; in id order. `talks`: when it begins to talk to other ranks, if
  /// it does.
  void add(OpId op, std::optional<kernels::EventHandle> talks, kernels::EventHandle ended);
  /// To be called again and again while waiting. Throws TransportError if a rank has failed, or one
  /// that is waited for has left; and std::runtime_error where nothing has come for too long, with
  /// the rank to look at: the one that does not answer, or that has not come as far as all others.
  void look();
  bool all_done();

 private:
  struct Enqueued {
    OpId op;
    std::optional<kernels::EventHandle> talks;
    kernels::EventHandle ended;
  };
  using Clock = std::chrono::steady_clock;
  void advance();
  [[noreturn]] void time_out(OpId op);

  Transport& transport_;
  const kernels::Device& device_;
  const Program& program_;
  RankId rank_;
  std::vector<Enqueued> enqueued_;
  std::size_t first_ = 0;  ///< that has not ended
  bool timed_ = false;     ///< since it talks
  Clock::time_point since_;
};

}  // namespace orrery
