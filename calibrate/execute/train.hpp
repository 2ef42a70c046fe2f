#pragma once
// Trains a scenario's model for some steps, on as many ranks as its plan has: threads of this
// process, MPI processes where it was started by mpirun, or one rank alone whose peers are made up.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "models/scenario.hpp"
#include "sim/program.hpp"
#include "sim/timeline.hpp"

namespace orrery {

enum class DeviceKind : std::uint8_t { cpu, cuda };

struct TrainOptions {
  DeviceKind device = DeviceKind::cpu;
  int steps = 5;
  int threads = 0;                    ///< of a rank, on a CPU; 0: this machine's, shared out evenly
  double timeout_s = 120;             ///< for which a rank waits for another before it gives up
  std::optional<std::int64_t> alone;  ///< only this world rank, its peers made up
  std::function<void(const TrainedStep&)>
      progress;  ///< after each step; of MPI ranks, on the first
};

struct TrainingRun {
  std::vector<TrainedStep> steps;
  Program program;
  /// Of the step whose duration is the median of the last 33, without the first of all.
  Timeline timeline;
  std::string device;             ///< "Intel Xeon Processor, 2 threads; 4 ranks"
  std::int64_t memory_bytes = 0;  ///< largest of a rank
  std::int64_t reuse_waits = 0;   ///< Lowered's, of all ranks
  bool first_rank = true;  ///< of MPI processes, the one that has all this; others have none of it
};

/// Throws InputError where the scenario cannot be executed, std::runtime_error where something
/// fails on the way: a device, a rank that died or was silent for too long (its number is in the
/// message).
TrainingRun train(const Scenario& scenario, const TrainOptions& options);

}  // namespace orrery
