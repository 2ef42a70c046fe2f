#pragma once
// What stands for cudaStream_t between a CPU device and the NCCL of these tests.

#include <functional>

#include "kernels/device.hpp"

namespace orrery {

/// A stream that runs functions in order.
struct HostStream {
  kernels::Device* device = nullptr;
  kernels::StreamHandle stream;
  void run(std::function<void()> work) const { device->enqueue_host(stream, std::move(work)); }
};

}  // namespace orrery
