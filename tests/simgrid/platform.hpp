#pragma once
// What simgrid_flows reads, and running it. A platform is hosts, one-way links, a route for each
// pair of hosts that communicates (and one back, for SimGrid's cross traffic), and flows by start.

#include <sys/wait.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sim/flows.hpp"

namespace orrery::test {

struct SimGridRoute {
  std::size_t from = 0;
  std::size_t to = 0;
  std::vector<LinkId> links;
};

struct SimGridFlow {
  std::size_t from = 0;
  std::size_t to = 0;
  Picoseconds start_ps = 0;
  std::uint64_t bytes = 0;
};

struct SimGridPlatform {
  std::size_t hosts = 0;
  IdVector<LinkId, Link> links;
  std::vector<SimGridRoute> routes;
  std::vector<SimGridFlow> flows;
};

/// SimGrid's model in which links are shared max-min fairly, with what a flow takes on its way back
/// (its default) or without.
inline std::vector<std::string> simgrid_options(bool cross_traffic) {
  return {"--cfg=network/model:CM02",
          std::string("--cfg=network/crosstraffic:") + (cross_traffic ? "1" : "0"),
          "--log=root.thres:error"};
}

inline void write(const SimGridPlatform& platform, const std::string& path) {
  std::ofstream out(path);
  out.precision(17);
  out << platform.hosts << '\n' << platform.links.size() << '\n';
  for (const Link& link : platform.links) {
    out << link.bytes_per_s << ' ' << seconds(link.latency_ps) << '\n';
  }
  out << platform.routes.size() << '\n';
  for (const SimGridRoute& route : platform.routes) {
    out << route.from << ' ' << route.to << ' ' << route.links.size();
    for (const LinkId link : route.links) out << ' ' << link.value;
    out << '\n';
  }
  out << platform.flows.size() << '\n';
  for (const SimGridFlow& flow : platform.flows) {
    out << flow.from << ' ' << flow.to << ' ' << seconds(flow.start_ps) << ' ' << flow.bytes
        << '\n';
  }
  if (!out.flush()) throw std::runtime_error("cannot write " + path);
}

struct SimGridRun {
  double platform_s = 0;  ///< processor time to build the platform
  double simulate_s = 0;  ///< and to simulate
  std::vector<double> end_s;
};

/// `program` simgrid_flows, `description` what write() wrote.
inline SimGridRun run_simgrid(const std::string& program, const std::string& description,
                              const std::vector<std::string>& options) {
  std::string command = "'" + program + "'";
  for (const std::string& option : options) command += " " + option;
  command += " < '" + description + "'";
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error("cannot run " + command);
  SimGridRun run;
  const bool timed = std::fscanf(pipe, "%lf %lf", &run.platform_s, &run.simulate_s) == 2;
  for (double end_s = 0; std::fscanf(pipe, "%lf", &end_s) == 1;) run.end_s.push_back(end_s);
  const int status = pclose(pipe);
  if (!timed || status != 0) throw std::runtime_error(command + " failed");
  return run;
}

}  // namespace orrery::test
