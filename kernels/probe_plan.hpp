#pragma once
// The host's part of orrery_probe (probe.cu): what to measure, when enough has been measured, and
// how the result is written. Nothing here needs a GPU.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/statistics.hpp"

namespace orrery {

/// Numbers of SMs to measure the bandwidth of, ascending, the last one all of the device's.
std::vector<int> sms_to_measure(int device_sms);

/// Words of each of two buffers: kWantedBufferBytes, or a quarter of the free memory if that is
/// less, in whole chunks. Zero if not even one chunk fits.
std::uint64_t buffer_words(std::uint64_t free_bytes, std::uint64_t wanted_bytes,
                           std::uint64_t word_bytes, std::uint64_t chunk_words);
constexpr std::uint64_t kWantedBufferBytes = std::uint64_t{4} << 30;

/// What one block of a kernel read off the device's nanosecond timer, first and last thing.
struct Stamp {
  std::uint64_t begin_ns;
  std::uint64_t end_ns;
};

/// A chain of dependent kernels: a kernel begins with its first block and ends with its last.
struct ChainTimes {
  std::vector<double> duration_ns;  ///< begin to end
  std::vector<double> gap_ns;       ///< end to the next one's begin; one less than kernels
  std::vector<double> period_ns;    ///< begin to the next one's begin; one less than kernels
};

/// `stamps` holds those of `blocks` blocks for the first kernel, then for the second, and so on.
ChainTimes chain_times(const std::vector<Stamp>& stamps, std::size_t blocks);

/// The middle of times read off a timer that counts in steps of `step_ns`: the median, unless a
/// step is more than a tenth of it. Then the median is a multiple of the step and says little,
/// while the mean is still right, because where in a step a kernel begins is chance.
double centre_ns(const std::vector<double>& times_ns, double step_ns);

/// "580.159.04" out of the text of /proc/driver/nvidia/version; "unknown" if there is none.
std::string driver_release(const std::string& proc_text);

/// "13.0" for 13000, as cudaDriverGetVersion and cudaRuntimeGetVersion count.
std::string cuda_version(int version);

/// One chain of tiny dependent kernels, measured.
struct ChainResult {
  Summary gap_ns;
  double gap_centre_ns = 0;
  double period_centre_ns = 0;
  double duration_centre_ns = 0;
  double event_period_ns = 0;  ///< the same period by events around the chain
};

/// Bandwidth reached on `sms` SMs, in bytes read plus bytes written a second.
struct BandwidthPoint {
  int sms = 0;
  int sms_seen = 0;  ///< distinct ones that the kernel ran on
  Summary copy;
  Summary read;
  Summary write;
};

/// A copy of `bytes` (from one buffer to another of this size), many in a row.
struct CopyPeriod {
  std::uint64_t bytes = 0;
  double seconds = 0;
};

struct ProbeResult {
  std::string device;
  int sms = 0;
  std::string driver;   ///< release of the kernel module
  int driver_cuda = 0;  ///< as cudaDriverGetVersion gives it: 13000 is 13.0
  int runtime_cuda = 0;
  double rated_sm_mhz = 0;
  double rated_memory_mhz = 0;
  double sm_mhz_before = 0;  ///< measured
  double sm_mhz_after = 0;
  double timer_step_ns = 0;
  std::uint64_t buffer_bytes = 0;
  ChainResult stream;
  ChainResult graph;
  std::vector<BandwidthPoint> bandwidth;  ///< as sms_to_measure, all SMs last
  std::vector<CopyPeriod> copies;
};

/// Seconds that a Profile's rate for copies gives: launch + gap + (bytes read and written) / rate.
double predicted_copy_s(const ProbeResult& result, std::uint64_t bytes);

/// Keys of a profile (sim/profile.hpp): launch_gap, bandwidth_by_sms and streaming.copy, each with
/// its source; everything else that was measured in comments. A point whose kernel did not run on
/// the SMs it was meant for is left out, and a comment says so.
std::string to_yaml(const ProbeResult& result);

}  // namespace orrery
