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
  kernels::Recorder* const recorder = repeats > 1 ? device_.recorder() : nullptr;
  if (recorder != nullptr && recorded_repeats_ != repeats) {
    recorder->begin();
    enqueue(repeats, slots_, next_slot_, sms_);
    recording_ = recorder->end();
    recorded_repeats_ = repeats;
  }
  if (flush_) device_.flush_cache(stream_.stream);
  if (recorder != nullptr) {
    recorder->enqueue(*recording_);
  } else {
    enqueue(repeats, slots_, next_slot_, sms_);
  }
  return time_between_events();
}

double DeviceTimer::reference() {
  std::size_t next = 0;
  enqueue(1, reference_, next, 0);
  return time_between_events();
}

double DeviceTimer::now_s() {
  return steady_now_s();
}

void DeviceTimer::enqueue(int repeats, const std::vector<OpCalls>& slots, std::size_t& next,
                          int sms) {
  device_.record(stream_.stream, stream_.begin);
  for (int i = 0; i < repeats; ++i) {
    for (const kernels::Call& call : slots[next]) device_.enqueue(stream_.stream, call, sms);
    next = (next + 1) % slots.size();
  }
  device_.record(stream_.stream, stream_.end);
}

double DeviceTimer::time_between_events() {
  device_.synchronize();
  const std::int64_t ns = device_.reached_ns(stream_.end) - device_.reached_ns(stream_.begin);
  return static_cast<double>(ns) * 1e-9;
}

}  // namespace orrery
