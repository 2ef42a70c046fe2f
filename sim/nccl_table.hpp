#pragma once
// Tables of nccl-tests (NVIDIA/nccl-tests@a0b82b2): what calibrate/read_nccl.hpp reads and
// format_nccl_table writes. Sizes are the full buffer, as in Collective (sim/shape.hpp); bandwidths
// are 1e9 bytes/s; bus bandwidth is algorithm bandwidth times bus_factor.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "sim/config.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// The programs NAME_perf of nccl-tests; `other` has no bus_factor here.
enum class NcclOp : std::uint8_t {
  all_reduce,
  all_gather,
  reduce_scatter,
  alltoall,
  broadcast,
  reduce,
  gather,
  scatter,
  sendrecv,
  other
};
std::string_view name_of(NcclOp op);

/// Bus bandwidth over algorithm bandwidth (nccl-tests doc/PERFORMANCE.md): all_reduce 2(n-1)/n;
/// all_gather, reduce_scatter, alltoall, gather, scatter (n-1)/n; broadcast, reduce, sendrecv 1.
/// 0 for `other`.
double bus_factor(NcclOp op, std::int64_t ranks);

struct NcclTiming {
  double time_us = 0;
  double algbw_gbps = 0;
  double busbw_gbps = 0;
  std::optional<std::int64_t> wrong;  ///< N/A when nothing was verified

  friend bool operator==(const NcclTiming&, const NcclTiming&) = default;
};

struct NcclRow {
  std::int64_t size_bytes = 0;
  std::int64_t count = 0;  ///< elements, of one rank where each gives or gets a part
  std::string type;
  std::string redop;  ///< "none" where nothing is reduced
  std::int64_t root = -1;
  std::optional<NcclTiming> out_of_place;
  std::optional<NcclTiming> in_place;

  friend bool operator==(const NcclRow&, const NcclRow&) = default;
};

struct NcclTable {
  NcclOp op = NcclOp::other;
  std::int64_t ranks = 0;           ///< 0: not told
  std::int64_t ranks_per_node = 0;  ///< 0: not told
  std::string nccl_version;         ///< "2.27.3"; these may be empty
  std::string device;
  std::string date;
  Location at;                     ///< of its first row
  std::vector<std::string> notes;  ///< of the reader: what was inferred
  std::vector<NcclRow> rows;
};

/// What is priced (sim/price.hpp) for an operation of `bytes` on `ranks` GPUs, of which
/// `ranks_per_node` share a node. In sendrecv each rank sends to the next: its slowest link.
/// nullopt for operations without a formula: reduce, gather, scatter, other.
std::optional<Shape> shape_of(NcclOp op, std::int64_t bytes, std::int64_t ranks,
                              std::int64_t ranks_per_node);

/// Seconds that an operation on `bytes` takes.
using SecondsOf = std::function<double(std::int64_t bytes)>;

/// Rows for `sizes` (bytes), FP32, in-place as out-of-place, nothing verified. Sizes are rounded
/// down as nccl-tests does: to 4 bytes, and to 16 a rank where each rank gives or gets a part;
/// those of zero and repeated ones are left out.
NcclTable simulated_nccl_table(NcclOp op, std::int64_t ranks, std::int64_t ranks_per_node,
                               const std::vector<std::int64_t>& sizes, const SecondsOf& seconds);

/// In nccl-tests' columns, with `#` lines before and after that its readers skip; `remarks` are
/// lines of text to be put among them.
std::string format_nccl_table(const NcclTable& table, const std::vector<std::string>& remarks = {});

/// "13.67", "  123.8", " 62648": `width` characters, with as many of two decimals as fit, the way
/// nccl-tests prints times and bandwidths.
std::string nccl_number(double value, int width);

}  // namespace orrery
