// In the place of peers_mpi.cpp where MPI is not found.
#include <stdexcept>

#include "reports/search/peers.hpp"

namespace orrery {

std::unique_ptr<Peers> open_mpi_peers(const std::string& launcher, std::chrono::milliseconds) {
  throw std::runtime_error("started by " + launcher +
                           " with others, but built without MPI: configure with -DORRERY_MPI=ON");
}

}  // namespace orrery
