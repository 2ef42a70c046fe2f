#pragma once
// A Scenario is everything a simulation needs, read from a file that names a model, a cluster and a
// plan (each inline or a path relative to the file).

#include <cstdint>
#include <string>
#include <vector>

#include "models/model.hpp"
#include "models/plan.hpp"
#include "sim/cluster.hpp"
#include "sim/config.hpp"
#include "sim/profile.hpp"

namespace orrery {

struct Scenario {
  std::string name;
  std::string file;
  Model model;
  Cluster cluster;
  Profile profile;
  Plan plan;
  std::uint64_t seed = 0;
  std::vector<std::string> notes;  ///< of readers: what was assumed or ignored
};

/// Reads and checks a scenario file and everything it names. All problems of all files are reported
/// together (InputError): unknown, duplicate and missing keys, wrong units, and impossible
/// combinations with their arithmetic at the line of the offending key.
Scenario read_scenario(const std::string& path);

/// As read_scenario, from text; relative paths resolve against `directory`.
Scenario read_scenario_text(std::string text, const std::string& name,
                            const std::string& directory);

/// The resolved scenario as YAML, model and cluster inline and defaults filled in. Read from the
/// directory of the original it gives an equal scenario; the profile is named relative to that.
std::string to_yaml(const Scenario& scenario);

}  // namespace orrery
