#pragma once
// What kernels ran when, seen from outside of the program that enqueued them (CUPTI on NVIDIA).

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace orrery::kernels {

struct KernelRecord {
  std::uint64_t external_id = 0;  ///< of the innermost push_external() around the launch; 0: none
  std::string name;               ///< as the compiler mangled it
  std::int64_t start_ns = 0;      ///< of CLOCK_MONOTONIC, like Device::reached_ns
  std::int64_t end_ns = 0;
  std::uint32_t stream = 0;       ///< the profiler's number of the stream
  std::uint64_t graph_node = 0;   ///< 0: launched by itself, not by a Recording
  int registers = 0;              ///< a thread
  std::int64_t shared_bytes = 0;  ///< a block, static and dynamic
  std::array<int, 3> grid{};
  std::array<int, 3> block{};
};

/// One in a process, of one device at a time.
class Profiler {
 public:
  virtual ~Profiler() = default;
  /// Kernels are recorded from here on, without making them run one after the other. Throws
  /// std::runtime_error with the reason where that is not possible (another profiler, say).
  virtual void begin() = 0;
  /// What this thread enqueues until the matching pop gets this number.
  virtual void push_external(std::uint64_t id) = 0;
  virtual void pop_external() = 0;
  /// Ends recording: synchronises and returns all kernels since begin(), by start. Throws if
  /// records were lost.
  virtual std::vector<KernelRecord> collect() = 0;

  /// Hardware counters ("dram__bytes_read.sum", as NVIDIA Nsight Compute names them) over all that
  /// `work` enqueues on this thread's device, one value a metric. `work` is run as often as the
  /// counters need passes, and has to do the same each time; kernels of different streams still run
  /// together. Not between begin() and collect(). Throws std::runtime_error with the reason: most
  /// often that the driver lets only the administrator read counters.
  virtual std::vector<double> count(const std::vector<std::string>& metrics,
                                    const std::function<void()>& work) = 0;
};

}  // namespace orrery::kernels
