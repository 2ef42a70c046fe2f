#pragma once
// Times Calls on a device, begin to begin, as they follow each other in a step.

#include <optional>
#include <vector>

#include "calibrate/measure.hpp"
#include "kernels/device.hpp"

namespace orrery {

/// One op on other operands: what it runs, in order.
using OpCalls = std::vector<kernels::Call>;

/// What a device needs once for all measurements.
struct TimingStream {
  kernels::StreamHandle stream;
  kernels::EventHandle begin, end;
};
TimingStream make_timing_stream(kernels::Device& device);

/// Of a clock that never goes back.
double steady_now_s();

/// Runs go through `slots`, one after the other, each with operands of its own, so that repeated
/// runs find as little in the caches as the op does in a step, where much else is touched between
/// two of its executions. A sample is the time between two events of one stream around all its
/// runs: what the device and its queue take from one op's begin to the next one's.
class DeviceTimer final : public Timed {
 public:
  /// The device outlives it. `sms`: as Device::enqueue. `reference`: fixed work of some fraction of
  /// a millisecond. `flush`: the cache is written over before each sample, which also keeps the
  /// device busy while the host enqueues the runs.
  DeviceTimer(kernels::Device& device, const TimingStream& stream, std::vector<OpCalls> slots,
              int sms, OpCalls reference, bool flush);

  double run(int repeats) override;
  int period() const override { return static_cast<int>(slots_.size()); }
  double reference() override;
  double now_s() override;

 private:
  /// Events and runs on the stream, from slot `next` on.
  void enqueue(int repeats, const std::vector<OpCalls>& slots, std::size_t& next, int sms);
  double time_between_events();

  kernels::Device& device_;
  TimingStream stream_;
  std::vector<OpCalls> slots_;
  int sms_;
  std::vector<OpCalls> reference_;
  bool flush_;
  std::size_t next_slot_ = 0;
  std::optional<kernels::RecordingHandle> recording_;
  int recorded_repeats_ = 0;
};

}  // namespace orrery
