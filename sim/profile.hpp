#pragma once
// A Profile: what kernels cost on a device. Measured points with provenance; nothing in it is fitted to a
// run that it is checked against. The files live in scenarios/profiles/ and are derived from public tables
// by calibrate/ (which states the held-out error) or measured by `orrery calibrate`.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sim/config.hpp"
#include "sim/exchange.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// Data-sheet figures; dense rates.
struct Device {
  std::string name;
  int sms = 0;
  double memory_bytes = 0;
  double memory_bytes_per_s = 0;
  double bf16_flops_per_s = 0;
  double fp8_flops_per_s = 0;  ///< 0: the device has none
  std::string source;
};

/// One measured GEMM: `sms` the SMs it ran on.
struct GemmPoint {
  std::int64_t groups = 1;
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  int sms = 0;
  double seconds = 0;
};

/// Measured points of one kernel family, all comparable with each other.
struct GemmTable {
  std::string id;      ///< "deepgemm-2025-02"
  std::string source;  ///< citation
  NumberFormat inputs{};
  Pass pass{};
  bool grouped = false;
  bool accumulate = false;  ///< D += A B with FP32 D
  double spread = 0;        ///< held-out relative error of the interpolation
  std::vector<GemmPoint> points;
};

struct AttentionPoint {
  AttentionCore shape;
  int sms = 0;
  double seconds = 0;
};

struct AttentionTable {
  std::string id;
  std::string source;
  double spread = 0;
  std::vector<AttentionPoint> points;
};

/// seconds = launches * launch_s + bytes / bytes_per_s (on all SMs).
struct StreamingRate {
  double bytes_per_s = 0;
  double launch_s = 0;  ///< floor of one launch: what a kernel on a tiny tensor takes
  double spread = 0;
  std::string id;
  std::string source;
};

struct Profile {
  std::string name;
  std::string file;
  Device device;
  double launch_gap_s = 0;  ///< between dependent kernels of one stream, added to every compute op's launch
  std::string launch_gap_source;
  /// Share of full memory bandwidth a streaming kernel reaches on a share of the SMs: points (sms, share).
  std::vector<std::pair<int, double>> bandwidth_by_sms;
  std::vector<GemmTable> gemms;
  std::vector<AttentionTable> attention;
  std::map<StreamingKind, StreamingRate> streaming;
  ExchangeTable exchange;
};

/// Reads scenarios/profiles/*.yaml. Every table must cite its source; problems are located.
Profile read_profile(const Node& node, Problems& problems);

}  // namespace orrery
