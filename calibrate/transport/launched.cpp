#include "calibrate/transport/launched.hpp"

#include <cstdlib>

namespace orrery {

std::optional<std::string> launched_by(const std::function<const char*(const char*)>& variable) {
  // srun sets a step's number of tasks; SLURM_NTASKS is set in a batch script too.
  constexpr struct {
    const char* size;
    const char* launcher;
  } kLaunchers[] = {{"OMPI_COMM_WORLD_SIZE", "mpirun"},  // Open MPI
                    {"PMI_SIZE", "mpirun"},              // MPICH, Intel MPI, srun --mpi=pmi2
                    {"SLURM_STEP_NUM_TASKS", "srun"}};
  for (const auto& [size, launcher] : kLaunchers) {
    const char* value = variable ? variable(size) : std::getenv(size);
    if (value != nullptr && std::atoi(value) > 1) {
      return std::string(launcher) + " (" + size + "=" + value + ")";
    }
  }
  return std::nullopt;
}

}  // namespace orrery
