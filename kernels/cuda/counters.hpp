#pragma once
// Hardware counters by CUPTI's range profiler.

#include <cupti.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace orrery::kernels::cuda {

/// Throws std::runtime_error with CUPTI's name of the error, and what to do about it where that is
/// known.
void check(CUptiResult result, const char* what);

/// What the GPU has to be told to count metrics, made on the host alone.
struct CounterConfig {
  std::vector<std::uint8_t> image;
  std::size_t passes = 0;
};

/// `chip`: "GH100". `availability`: what cuptiProfilerGetCounterAvailability says, or empty. Throws
/// where the chip does not know a metric.
CounterConfig counter_config(const std::string& chip, const std::vector<std::uint8_t>& availability,
                             const std::vector<std::string>& metrics);

/// See Profiler::count.
std::vector<double> count_on_this_device(const std::vector<std::string>& metrics,
                                         const std::function<void()>& work);

}  // namespace orrery::kernels::cuda
