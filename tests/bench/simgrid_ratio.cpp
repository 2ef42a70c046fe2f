// How much faster than SimGrid FlowNetwork runs the all-to-all of tests/sim/all_to_all.hpp: both in
// one go, completions compared flow by flow. Built where SimGrid is found.
//
//   simgrid_ratio [nodes]    32 nodes without a number: 65,280 flows
//
// Times are processor times on one core, so that what others do on the machine counts little; both
// include building the platform. SimGrid once, driven in two ways (simgrid_flows.cpp): most of what
// sendto_async costs is a list of all transfers that SimGrid 3.32 walks at every completion, so the
// ratio to mailboxes is the one of the sharing itself. We: the median of eleven.

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <string>
#include <vector>

#include "tests/sim/all_to_all.hpp"
#include "tests/simgrid/all_to_all_platform.hpp"

namespace orrery {
namespace {

double processor_s() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Run {
  double processor_s = 0;
  std::vector<Completion> completions;
};

Run run_here(std::size_t nodes, double back) {
  constexpr std::size_t kRuns = 11;
  Run run;
  std::vector<double> times;
  for (std::size_t i = 0; i < kRuns; ++i) {
    const double begin_s = processor_s();
    FlowNetwork network = test::all_to_all(nodes, back);
    run.completions = network.run_until_idle();
    times.push_back(processor_s() - begin_s);
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  run.processor_s = times[kRuns / 2];
  return run;
}

int compare(std::size_t nodes) {
  const auto description = std::filesystem::temp_directory_path() / "orrery_simgrid_ratio.txt";
  test::write(test::all_to_all_platform(nodes), description);
  bool same = true;
  for (const bool cross_traffic : {false, true}) {
    const Run here =
        run_here(nodes, cross_traffic ? test::kFivePercentBack : test::kNoCrossTraffic);
    for (const bool sendto : {true, false}) {
      std::vector<std::string> options = test::simgrid_options(cross_traffic);
      if (sendto) options.emplace_back("--sendto_async");
      const auto simgrid = test::run_simgrid(ORRERY_SIMGRID_FLOWS, description, options);
      double worst = simgrid.end_s.size() == here.completions.size() ? 0 : INFINITY;
      for (const Completion& done : here.completions) {
        if (std::isinf(worst)) break;
        const double end_s = simgrid.end_s[done.flow.value];
        worst = std::max(worst, std::abs(seconds(done.at_ps) / end_s - 1));
      }
      const double simgrid_s = simgrid.platform_s + simgrid.simulate_s;
      fmt::print(
          "{} flows, cross traffic {}: last after {:.3f} us; {:.1f} ms here, {:.2f} s by SimGrid "
          "({}): {:.0f} times; completions within {:.1e}\n",
          here.completions.size(), cross_traffic ? "on" : "off",
          seconds(here.completions.back().at_ps) * 1e6, here.processor_s * 1e3, simgrid_s,
          sendto ? "sendto_async" : "mailboxes", simgrid_s / here.processor_s, worst);
      same = same && worst < 1e-3;
    }
  }
  std::filesystem::remove(description);
  return same ? 0 : 1;
}

}  // namespace
}  // namespace orrery

int main(int argc, char** argv) {
  const int nodes = argc > 1 ? std::atoi(argv[1]) : 32;
  if (nodes < 1) {
    fmt::print(stderr, "usage: simgrid_ratio [nodes]\n");
    return 2;
  }
  return orrery::compare(static_cast<std::size_t>(nodes));
}
