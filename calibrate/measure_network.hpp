#pragma once
// How long the ranks' own collectives take on the machine (or machines) they run on.

#include <cstdint>
#include <functional>
#include <vector>

#include "calibrate/transport/transport.hpp"
#include "kernels/statistics.hpp"
#include "sim/nccl_table.hpp"

namespace orrery {

/// One operation on groups of `members` ranks: ranks 0 .. members-1 and so on, all groups at once,
/// as the groups of a step are. `bytes` is nccl-tests' size (NcclRow): the whole buffer.
struct NetworkPoint {
  NcclOp op = NcclOp::other;
  std::int64_t members = 0;
  std::int64_t bytes = 0;
  Summary seconds;
};

/// When one rank began and ended its part, on its machine's clock (CLOCK_MONOTONIC).
struct RunSpan {
  std::int64_t begin_ns = 0;
  std::int64_t end_ns = 0;
};

/// One rank's part in operations of groups: over messages of the host (the Transport), or over
/// communicators of devices (measure_devices.hpp).
class GroupOperations {
 public:
  virtual ~GroupOperations() = default;
  /// Runs are of this operation from now on. All ranks call it.
  virtual void prepare(NcclOp op, int members, std::size_t bytes) = 0;
  virtual RunSpan run() = 0;
};

/// The ranks of a group that a rank is in, where groups are of so many.
std::vector<int> group_of(int rank, int members);

struct NetworkMeasureOptions {
  std::int64_t least_bytes = 256;
  std::int64_t most_bytes = std::int64_t{16} << 20;  ///< from one to the next by factors of two
  double limit_s = 60;  ///< for all; a point gets its share, or what its fewest samples take
  StoppingRule rule;    ///< what is enough
  std::function<void(const NetworkPoint&)> progress;  ///< on rank 0
};

/// All ranks call it with the same options; rank 0 gets the points, others none. all_reduce,
/// all_gather, reduce_scatter, alltoall and sendrecv (each member sends to the next), on groups of
/// every size above 1 that divides the number of ranks. FP32; sizes are rounded down as nccl-tests
/// rounds them (simulated_nccl_table).
///
/// A sample begins when the last member of a group has begun and ends when the last one is done,
/// which is what a Program's op lasts; ranks meet in a barrier before each, and take new memory in
/// turns of 64 MiB.
std::vector<NetworkPoint> measure_network(Transport& transport,
                                          const NetworkMeasureOptions& options);
/// The same of other operations than the transport's, which still carries what is measured.
std::vector<NetworkPoint> measure_network(Transport& transport,
                                          const NetworkMeasureOptions& options,
                                          GroupOperations& operations);

/// Bytes a second that each rank copies from one large buffer of its own to another while all do:
/// what no message between them can exceed. All ranks call it; on rank 0, the median of all.
double measure_copy_rate(Transport& transport);

}  // namespace orrery
