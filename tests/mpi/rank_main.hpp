#pragma once
// What the programs that check_mpi.cmake starts under mpirun have in common.

#include <chrono>
#include <cstdio>
#include <exception>
#include <string>

#include "calibrate/transport/transport.hpp"

namespace orrery {

/// Runs `run(transport, what)` as one rank of MPI, `what` being the program's argument; waits end
/// after a second if that is "hang", else after a minute. Without mpirun it says "alone". An
/// exception is printed, and ends all ranks.
template <class Run>
int rank_main(int argc, char** argv, const Run& run) {
  using namespace std::chrono_literals;
  const std::string what = argc > 1 ? argv[1] : "";
  try {
    const auto transport = open_mpi_transport(what == "hang" ? 1s : 60s);
    if (!transport) {
      std::printf("alone\n");
      return 0;
    }
    try {
      run(*transport, what);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "error: %s\n", error.what());
      transport->abort(error.what());
      return 1;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace orrery
