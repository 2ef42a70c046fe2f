#pragma once
// A Profile: what kernels cost on a device. Measured points with provenance; nothing in it is
// fitted to a run that it is checked against. The files live in scenarios/profiles/ and are derived
// from public tables by calibrate/ (which states the held-out error) or measured by `orrery
// calibrate`.

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sim/config.hpp"
#include "sim/exchange.hpp"
#include "sim/low_latency.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// Data-sheet figures; dense rates.
struct Device {
  std::string name;
  int sms = 0;
  double memory_bytes = 0;
  double memory_bytes_per_s = 0;
  double bf16_flops_per_s = 0;
  double fp8_flops_per_s = 0;   ///< 0: the device has none
  double fp32_flops_per_s = 0;  ///< of GEMMs on FP32 operands; 0: TF32's, half of BF16's
  std::string source;
};

/// Where a point lies in the space that prices are interpolated in, and what is interpolated there.
struct LogPosition {
  std::array<double, 4> x{};  ///< natural logarithms of the dimensions
  double residual = 0;        ///< ln(measured / skeleton)
};

/// The box that a table's points span, in the coordinates of LogPosition.
struct LogBox {
  std::array<double, 4> low{};
  std::array<double, 4> high{};
};

/// Output tile of a GEMM kernel.
struct GemmTile {
  int m = 0;
  int n = 0;
};

/// The skeleton that GEMM points are interpolated around (formula in gemm_price.cpp).
struct GemmModel {
  std::vector<GemmTile> tiles;            ///< what the library may choose from
  double flops_per_s_per_sm = 0;          ///< inside the k loop, large tile
  double operand_bytes_per_s_per_sm = 0;  ///< operands streamed to one SM
  double tile_s = 0;                      ///< pipeline fill and drain of one tile
  double launch_s = 0;                    ///< floor of one kernel
  double bytes_per_s = 0;                 ///< achieved memory bandwidth, all SMs
};

/// One measured GEMM: `sms` the SMs it ran on.
struct GemmPoint {
  std::int64_t groups = 1;
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  int sms = 0;
  double seconds = 0;
  LogPosition at;  ///< filled by prepare()
};

/// Measured points of one kernel family, all comparable with each other.
struct GemmTable {
  std::string id{};      ///< "deepgemm-2025-02"
  std::string source{};  ///< citation
  NumberFormat inputs{};
  Pass pass{};
  bool grouped = false;
  bool accumulate = false;  ///< D += A B with FP32 D
  bool derived = false;     ///< the points are computed from other measurements, as `source` says
  double spread = 0;        ///< held-out relative error of the interpolation
  GemmModel model{};
  std::vector<GemmPoint> points{};
  LogBox box{};  ///< filled by prepare()
};

struct AttentionPoint {
  AttentionCore shape;
  int sms = 0;
  double seconds = 0;
  LogPosition at;  ///< filled by prepare()
};

/// The skeleton that attention points are interpolated around (formula in attention_price.cpp).
struct AttentionModel {
  double flops_per_s_per_sm = 0;  ///< inside the loop over key blocks
  double block_s = 0;             ///< prologue and epilogue of one 128-query block
  double launch_s = 0;            ///< floor of one call
};

/// One number format and one direction; head dimensions and masks differ from point to point.
struct AttentionTable {
  std::string id{};
  std::string source{};
  NumberFormat inputs{};
  bool backward = false;
  bool derived = false;
  double spread = 0;
  AttentionModel model{};
  std::vector<AttentionPoint> points{};
  LogBox box{};  ///< filled by prepare()
};

struct CachedPoint {
  CachedAttention shape;
  int sms = 0;
  double seconds = 0;
  LogPosition at;  ///< filled by prepare()
};

/// The skeleton of attention over a cache (formula in cached_attention_price.cpp).
struct CachedModel {
  double launch_s = 0;     ///< floor of one call, and what splitting a sequence over SMs costs
  double bytes_per_s = 0;  ///< achieved memory bandwidth, all SMs
  double flops_per_s = 0;  ///< achieved on rows filled up to whole tensor-core tiles, all SMs
};

/// One kernel of attention over a cache: its formats, and whether it reads latents, and picked
/// rows.
struct CachedTable {
  std::string id{};
  std::string source{};
  NumberFormat inputs{};
  NumberFormat cache{};
  bool latent = false;
  bool gathered = false;
  bool derived = false;
  double spread = 0;
  CachedModel model{};
  std::vector<CachedPoint> points{};
  LogBox box{};  ///< filled by prepare()
};

/// One measured op of a kind: `seconds` from the start of its first kernel to the end of its last.
struct StreamingPoint {
  std::string label{};  ///< the op in the model, as Shape::label; empty: any of these bytes
  std::int64_t bytes_read = 0;
  std::int64_t bytes_written = 0;
  std::int64_t launches = 1;  ///< as in Streaming: what the op stands for
  int sms = 0;
  double seconds = 0;
  LogPosition at{};  ///< filled by prepare()
};

/// seconds = launches * launch_s + bytes / bytes_per_s (on all SMs), times what measured points
/// nearby say.
struct StreamingRate {
  double bytes_per_s = 0;
  double launch_s = 0;   ///< floor of one launch: what a kernel on a tiny tensor takes
  bool derived = false;  ///< from another device or another kind, as `source` says
  double spread = 0;
  std::string id;
  std::string source;
  std::vector<StreamingPoint> points;  ///< may be none
};

struct Profile {
  std::string name;
  std::string file;
  Device device;
  /// Between dependent kernels of one stream, added to every compute op's launch. 0: the points
  /// contain it (they were measured begin to begin).
  double launch_gap_s = 0;
  std::string launch_gap_source;
  /// Share of full memory bandwidth a streaming kernel reaches on a share of the SMs: points (sms,
  /// share). Ascending; straight lines between, through (0, 0).
  std::vector<std::pair<int, double>> bandwidth_by_sms;
  std::string bandwidth_by_sms_source;
  std::vector<GemmTable> gemms;
  std::vector<AttentionTable> attention;
  std::vector<CachedTable> cached_attention;
  std::map<StreamingKind, StreamingRate> streaming;
  /// The kernels were measured beside communication, so what that takes from them is in their
  /// times.
  bool beside_communication = false;
  ExchangeTable exchange;
  LowLatencyTable low_latency;
};

/// Fills in what pricing looks up (LogPosition of every point, LogBox of every table). read_profile
/// calls it; whoever builds a Profile in memory calls it once all fields are set.
void prepare(Profile& profile);

/// Reads scenarios/profiles/*.yaml. Every table must cite its source; problems are located.
Profile read_profile(const Node& node, Problems& problems);

}  // namespace orrery
