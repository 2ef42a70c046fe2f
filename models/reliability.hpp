#pragma once
// What fails on a cluster, and what a failure costs a training job.
//
// Scenario key reliability, a map or the path of a file that holds one (scenarios/reliability/):
//
// - name
// - gpus_per_node, gpus_per_switch: of the job's failing parts; a scenario's own come first
// - failures: a list of
//   - what: in words
//   - of: gpu | nic | host | switch | job. One NIC a GPU; a rate `of: job` does not grow with it
//   - mtbf: mean time between failures of one of them, if that is known; or
//   - events, device_time: so many counted in so much time of devices ("884736 days")
//   - detection (0): from the failure to the job's stop; what the job does in between is lost.
//     Crashes 0, hangs a watchdog's time-out, silent corruption until somebody notices
//   - repair: the host leaves the job and is back after so long; left out: it stays
//   - slowdown: the job goes on, its steps so many times as long, until `detection` has passed
//     and it is restarted from a checkpoint
//   - source: who says so
// - rate_spread (0): standard deviation of the logarithm of a factor that all rates share: how far
//   the job's cluster may be from the one whose rates these are
// - restart: from stop to reading the checkpoint; scheduling, start of processes, communicators
// - checkpoint:
//   - write, read: storage's rate for the whole job
//   - bytes: left out, what the scenario's parameters and optimizer need
//   - blocking: how long training stands still for one; left out, all of it
//   - interval: of useful time; left out, the optimum
// - spare_hosts: that take the place of those in repair; left out, always one
// - maintenance: {every, takes}, planned stops, checkpointed first (none)
// - source: of what has no source of its own
//
// A time is "10 min", or {median: 4 min, mean: 39 min}: log-normal.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sim/config.hpp"

namespace orrery {

/// How long something takes, in seconds: always the same, or log-normal where mean and median
/// differ.
struct RandomTime {
  double median_s = 0;
  double mean_s = 0;  ///< never below the median

  double sigma() const;  ///< of the logarithm; 0: always the same

  friend bool operator==(const RandomTime&, const RandomTime&) = default;
};

/// The part that fails. Of a job with G GPUs: G GPUs and NICs, G / gpus_per_node hosts,
/// G / gpus_per_switch switches (both rounded up), 1 job.
enum class FailingPart : std::uint8_t { gpu, nic, host, network_switch, job };
std::string_view name_of(FailingPart part);

struct FailureKind {
  std::string what;
  FailingPart of{};
  double events = 0;         ///< that were counted in device_time_s; 0: the rate is known
  double device_time_s = 0;  ///< of all parts together; with a known rate, for one failure
  RandomTime detection;
  std::optional<RandomTime> repair;  ///< none: the host stays in the job
  double slowdown = 1;               ///< above 1: the job goes on
  std::string source;

  /// Mean time between failures of one part.
  double mtbf_s() const { return events > 0 ? device_time_s / events : device_time_s; }

  friend bool operator==(const FailureKind&, const FailureKind&) = default;
};

struct CheckpointPolicy {
  double write_bytes_per_s = 0;  ///< of the whole job
  double read_bytes_per_s = 0;
  std::optional<double> bytes;       ///< none: the scenario's
  std::optional<double> blocking_s;  ///< none: the whole write
  std::optional<double> interval_s;  ///< useful time from one to the next; none: the optimum

  friend bool operator==(const CheckpointPolicy&, const CheckpointPolicy&) = default;
};

struct Maintenance {
  double every_s = 0;  ///< calendar time from the end of one to the begin of the next
  RandomTime takes;

  friend bool operator==(const Maintenance&, const Maintenance&) = default;
};

struct Reliability {
  std::string name;
  std::int64_t gpus_per_node = 0;    ///< 0: the scenario's
  std::int64_t gpus_per_switch = 0;  ///< 0: as the scenario's fabric has them
  std::vector<FailureKind> failures;
  double rate_spread = 0;
  RandomTime restart;
  CheckpointPolicy checkpoint;
  std::optional<std::int64_t> spare_hosts;  ///< none: there is always one
  std::optional<Maintenance> maintenance;
  std::string source;

  friend bool operator==(const Reliability&, const Reliability&) = default;
};

/// Reads the map; all problems located.
Reliability read_reliability(const Node& node, Problems& problems);

/// As a block of YAML that reads back equal.
std::string to_yaml(const Reliability& reliability);

}  // namespace orrery
