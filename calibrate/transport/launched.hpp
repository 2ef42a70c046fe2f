#pragma once
// Whether this process was started as one of several.

#include <functional>
#include <optional>
#include <string>

namespace orrery {

/// "mpirun (OMPI_COMM_WORLD_SIZE=4)", "srun (SLURM_STEP_NUM_TASKS=16)"; nothing where the process
/// is alone, or among others that a batch script started by hand. `variable` reads the environment.
std::optional<std::string> launched_by(
    const std::function<const char*(const char*)>& variable = nullptr);

}  // namespace orrery
