// In the place of mpi.cpp where MPI is not found.
#include <stdexcept>

#include "calibrate/transport/launched.hpp"
#include "calibrate/transport/transport.hpp"

namespace orrery {

std::unique_ptr<Transport> open_mpi_transport(std::chrono::nanoseconds) {
  if (const auto launched = launched_by()) {
    throw std::runtime_error("started by " + *launched +
                             " with others, but built without MPI: configure with -DORRERY_MPI=ON");
  }
  return nullptr;
}

bool built_with_mpi() {
  return false;
}

}  // namespace orrery
