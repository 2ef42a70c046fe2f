#pragma once
// The seam between the program and liborrery_cuda.so, which it loads when a GPU is asked for. Both
// are built from one tree; kCudaModuleVersion tells if they were not.

#include <cstddef>

namespace orrery::kernels {

class Device;

/// Counted up whenever Device, Call or what they are made of change.
inline constexpr int kCudaModuleVersion = 2;

inline constexpr const char* kCudaModuleFile = "liborrery_cuda.so";
inline constexpr const char* kCudaModuleVersionSymbol = "orrery_cuda_module_version";
inline constexpr const char* kCudaModuleCountSymbol = "orrery_count_cuda_devices";
inline constexpr const char* kCudaModuleOpenSymbol = "orrery_open_cuda_device";

using CudaModuleVersion = int();
using CudaModuleCount = int();
/// A Device to delete, or null and why, cut to `reason_bytes` with its closing zero.
using CudaModuleOpen = Device*(int ordinal, char* reason, std::size_t reason_bytes);

}  // namespace orrery::kernels
