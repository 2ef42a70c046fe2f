#pragma once
// A device that runs nothing: calls take the time that a formula says, of a clock of its own.
// Memory is address space that nothing has to back until it is touched.

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <new>
#include <random>
#include <stdexcept>
#include <vector>

#include "kernels/device.hpp"

namespace orrery {

class KnownDevice : public kernels::Device, public kernels::Recorder {
 public:
  explicit KnownDevice(int sms = 8) : sms_(sms) {}
  ~KnownDevice() override {
    for (const auto& [memory, bytes] : allocated) munmap(memory, bytes);
  }
  KnownDevice(const KnownDevice&) = delete;
  KnownDevice& operator=(const KnownDevice&) = delete;

  // ---- what a test sets and sees
  double flops_per_s = 1e12;
  double bytes_per_s = 1e11;
  double launch_s = 2e-6;
  double noise = 0;  ///< standard deviation of a call's time, relative
  std::size_t memory_bytes = std::size_t{1} << 44;
  bool copies = true;  ///< uploads of more than 1 MB write memory, too
  std::function<void(const kernels::Call&)> seen = [](const kernels::Call&) {};

  bool has_recorder = false;
  double enqueue_s = 0;  ///< that the host takes for a call, while the device waits

  std::map<void*, std::size_t> allocated;
  std::size_t allocated_bytes = 0;
  std::size_t calls = 0;
  std::size_t flushes = 0;

  /// The device is busy with something else.
  void wait_ns(double ns) { now_ns_ += ns; }

  /// Seconds of one call on so many SMs, without noise.
  double seconds_of(const kernels::Call& call, int sms) const {
    const kernels::Cost cost = kernels::cost_of(call);
    const double share = sms > 0 ? static_cast<double>(sms) / sms_ : 1;
    return launch_s + std::max(cost.flops / (flops_per_s * share),
                               cost.bytes / (bytes_per_s * std::sqrt(share)));
  }

  // ---- Device
  std::string name() const override { return "Known device"; }
  int sms() const override { return sms_; }
  void* allocate(std::size_t bytes) override {
    if (bytes > memory_bytes - allocated_bytes) throw std::bad_alloc();
    void* memory = mmap(nullptr, std::max<std::size_t>(bytes, 1), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    allocated[memory] = std::max<std::size_t>(bytes, 1);
    allocated_bytes += std::max<std::size_t>(bytes, 1);
    return memory;
  }
  void release(void* memory) override {
    const auto found = allocated.find(memory);
    if (found == allocated.end()) throw std::logic_error("released what was not allocated");
    allocated_bytes -= found->second;
    munmap(memory, found->second);
    allocated.erase(found);
  }
  void upload(void* to, const void* from, std::size_t bytes) override {
    if (copies || bytes <= (1 << 20)) std::memcpy(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  kernels::StreamHandle create_stream() override { return {streams_++}; }
  kernels::EventHandle create_event() override {
    reached_.push_back(-1);
    return {static_cast<int>(reached_.size()) - 1};
  }
  void enqueue(kernels::StreamHandle, const kernels::Call& call, int sms) override {
    const std::string why = kernels::why_impossible(call);
    if (!why.empty()) throw std::logic_error(kernels::describe(call) + ": " + why);
    const auto run = [this, call, sms] {
      ++calls;
      seen(call);
      now_ns_ += 1e9 * seconds_of(call, sms) * (1 + noise * normal_(random_));
    };
    if (recording_) {
      recordings_.back().push_back(run);
    } else {
      now_ns_ += 1e9 * enqueue_s;
      run();
    }
  }
  void enqueue_host(kernels::StreamHandle, std::function<void()> work) override { work(); }
  void enqueue_copy_from(kernels::StreamHandle, void*, const kernels::Device&, const void*,
                         std::size_t) override {}
  bool reached(kernels::EventHandle) const override { return true; }
  void record(kernels::StreamHandle, kernels::EventHandle event) override {
    const auto reach = [this, event] {
      reached_[static_cast<std::size_t>(event.index)] = std::llround(now_ns_);
    };
    if (recording_) {
      recordings_.back().push_back(reach);
    } else {
      reach();
    }
  }
  void wait(kernels::StreamHandle, kernels::EventHandle) override {}
  void synchronize() override {}
  std::int64_t reached_ns(kernels::EventHandle event) const override {
    return reached_[static_cast<std::size_t>(event.index)];
  }
  void flush_cache(kernels::StreamHandle) override {
    ++flushes;
    now_ns_ += 1e5;
  }

  kernels::Recorder* recorder() override { return has_recorder ? this : nullptr; }

  // ---- Recorder
  void begin() override {
    recording_ = true;
    recordings_.emplace_back();
  }
  kernels::RecordingHandle end() override {
    recording_ = false;
    return {static_cast<int>(recordings_.size()) - 1};
  }
  void enqueue(kernels::RecordingHandle recording) override {
    for (const auto& step : recordings_[static_cast<std::size_t>(recording.index)]) step();
  }

 private:
  bool recording_ = false;
  std::vector<std::vector<std::function<void()>>> recordings_;
  int sms_;
  int streams_ = 0;
  double now_ns_ = 1e12;
  std::vector<std::int64_t> reached_;
  std::mt19937_64 random_{3};
  std::normal_distribution<double> normal_;
};

}  // namespace orrery
