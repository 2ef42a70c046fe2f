#pragma once

#include "kernels/profiler.hpp"

namespace orrery::kernels::cuda {

/// CUPTI's activity interface, of which a process has one.
Profiler& profiler();

}  // namespace orrery::kernels::cuda
