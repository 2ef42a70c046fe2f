#pragma once

#include <memory>

#include "kernels/device.hpp"

namespace orrery::kernels {

/// Runs the streaming kernels of kernels/cuda in the emulator, as they are enqueued, on `sms` SMs.
/// Products and attention throw: their kernels are made of instructions that it does not know.
std::unique_ptr<Device> open_emulated_device(int sms = 3, bool backwards = false);

}  // namespace orrery::kernels
