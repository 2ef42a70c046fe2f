#include "calibrate/device_timer.hpp"

#include <chrono>
#include <utility>

#include "sim/check.hpp"

namespace orrery {

TimingStream make_timing_stream(kernels::Device& device) {
  return {device.create_stream(), device.create_event(), device.create_event()};
}

double steady_now_s() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

DeviceTimer::DeviceTimer(kernels::Device& device, const TimingStream& stream,
                         std::vector<OpCalls> slots, int sms, OpCalls reference, bool flush)
    : device_(device),
      stream_(stream),
      slots_(std::move(slots)),
      sms_(sms),
      reference_{std::move(reference)},
      flush_(flush) {
  ORRERY_CHECK(!slots_.empty(), "nothing to time");
}

double DeviceTimer::run(int repeats) {
  return time(repeats, slots_, next_slot_, sms_);
}

double DeviceTimer::reference() {
  std::size_t next = 0;
  return time(1, reference_, next, 0);
}

double DeviceTimer::now_s() {
  return steady_now_s();
}

double DeviceTimer::time(int repeats, const std::vector<OpCalls>& slots, std::size_t& next,
                         int sms) {
  if (flush_) device_.flush_cache(stream_.stream);
  device_.record(stream_.stream, stream_.begin);
  for (int i = 0; i < repeats; ++i) {
    for (const kernels::Call& call : slots[next]) device_.enqueue(stream_.stream, call, sms);
    next = (next + 1) % slots.size();
  }
  device_.record(stream_.stream, stream_.end);
  device_.synchronize();
  const std::int64_t ns = device_.reached_ns(stream_.end) - device_.reached_ns(stream_.begin);
  return static_cast<double>(ns) * 1e-9;
}

}  // namespace orrery
