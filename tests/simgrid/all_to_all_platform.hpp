#pragma once
// The all-to-all of tests/sim/all_to_all.hpp as SimGrid has it: flows in the same order.

#include "tests/simgrid/platform.hpp"

namespace orrery::test {

inline SimGridPlatform all_to_all_platform(std::size_t nodes) {
  constexpr std::size_t kGpusPerNode = 8;
  SimGridPlatform platform;
  platform.hosts = nodes * kGpusPerNode;
  for (std::size_t gpu = 0; gpu < platform.hosts; ++gpu) {
    platform.links.insert(platform.links.end(), 2, Link{200e9, 1 * kPsPerUs});
    platform.links.insert(platform.links.end(), 2, Link{50e9, 2 * kPsPerUs});
  }
  for (std::size_t a = 0; a < platform.hosts; ++a) {
    for (std::size_t b = 0; b < platform.hosts; ++b) {
      if (a == b) continue;
      const std::size_t up = a / kGpusPerNode == b / kGpusPerNode ? 0 : 2;
      platform.routes.push_back({a, b, {LinkId(4 * a + up), LinkId(4 * b + up + 1)}});
      platform.flows.push_back({a, b, 0, 1'000'000 + 100'000 * ((7 * a + 13 * b) % 5)});
    }
  }
  return platform;
}

}  // namespace orrery::test
