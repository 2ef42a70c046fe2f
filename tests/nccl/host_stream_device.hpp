#pragma once
// The CPU as a device whose streams the fake NCCL knows.

#include <deque>

#include "kernels/cpu/cpu_device.hpp"
#include "tests/nccl/host_stream.hpp"

namespace orrery {

class HostStreamDevice : public kernels::CpuDevice {
 public:
  explicit HostStreamDevice(int threads = 1) : CpuDevice(threads) {}
  void* native_stream(kernels::StreamHandle stream) override {
    while (streams_.size() <= static_cast<std::size_t>(stream.index)) {
      streams_.push_back({this, {static_cast<int>(streams_.size())}});
    }
    return &streams_[static_cast<std::size_t>(stream.index)];
  }

 private:
  std::deque<HostStream> streams_;
};

}  // namespace orrery
