#pragma once
// A Scenario is everything a simulation needs, read from a file that names a model, a cluster and a
// plan (each inline or a path relative to the file):
//
//   name, seed (0), model, cluster, profile and fabric (the cluster's) and
//   plan:
//     layout: {tp, cp, pp, ep, expert_tp (1), dp (what the cluster leaves), zero (1),
//              sequence_parallel (true)}
//     schedule: gpipe | 1f1b | interleaved_1f1b | zb_h1 | zb_v | dual_pipe | dual_pipe_v
//     virtual_stages: stages per rank, of interleaved_1f1b only
//     layers_per_stage: of all stages in model order (as even as it goes, the longer ones first)
//     mtp_stage: the stage of the MTP modules (the last)
//     sequence_length (tokens), micro_batch (1) and global_batch (sequences)
//     precision: fp32 | bf16 | fp8_tensor | fp8_deepseek, or {recipe: one of them, and what
//     differs:
//                activations: fp32 or bf16; linear, saved, saved_attention, dispatch, combine: a
//                number format; parameters, gradients, gradient_sync, master, moments: fp32, bf16,
//                fp8 or none}
//     recompute: none | selective | full | deepseek, or a list of norms, mla_up_projection,
//                activation and attention_core (none)
//     communication_sms (0)
//     checkpoint: {bandwidth: of one GPU, network: shared (NICs, with the rest) | own} (none)
//     routing: balanced | {imbalance} | {popularity: zipf, exponent, independent_tokens} |
//              {counts, independent_tokens} | {router: {...}, independent_tokens} (balanced);
//              models/routing.hpp and models/router.hpp say what each is
//   stragglers: [{gpu | node | share, slowdown}, {sigma}] (none); models/stragglers.hpp
//   reliability: what fails, and what that costs (none); models/reliability.hpp
//   training: of a step that is executed (defaults); models/training.hpp
//   search: what layouts a search may choose (defaults); reports/search/space.hpp reads it
//   set: overrides of all that and of the files it names, [PATH=VALUE, ...] (none);
//   sim/overrides.hpp
//   generation: of `orrery generate`; models/generation_scenario.hpp

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "models/model.hpp"
#include "models/plan.hpp"
#include "models/reliability.hpp"
#include "models/stragglers.hpp"
#include "models/training.hpp"
#include "sim/cluster.hpp"
#include "sim/config.hpp"
#include "sim/fabric.hpp"
#include "sim/overrides.hpp"
#include "sim/profile.hpp"

namespace orrery {

struct Scenario {
  std::string name;
  std::string file;
  Model model;
  Cluster cluster;
  Profile profile;
  std::shared_ptr<const Fabric> fabric;  ///< null where the cluster names none; large, so shared
  Plan plan;
  Stragglers stragglers;
  std::optional<Reliability> reliability;
  Training training;
  std::uint64_t seed = 0;              ///< of routing and stragglers
  std::vector<std::string> notes;      ///< of readers: what was assumed or ignored
  std::vector<std::string> overrides;  ///< of profile and fabric, which to_yaml() only names
  Node search;                         ///< the section as it stands, or the name of its file
};

/// What of a scenario's parts was read without problems, so that checks can rely on it.
struct IntactParts {
  bool model = false;
  bool cluster = false;
  bool device = false;
};

/// Reads what every kind of scenario names, the keys name, seed, model, cluster, profile and fabric,
/// into `scenario`.
IntactParts read_parts(MapReader& reader, Scenario& scenario);

/// The document with the overrides under its own key `set`, and then with those that are given.
Node with_scenario_overrides(const Node& document, const Overrides& given, Problems& problems);

/// Reads and checks a scenario file and everything it names. All problems of all files are reported
/// together (InputError): unknown, duplicate and missing keys, wrong units, and impossible
/// combinations with their arithmetic at the line of the offending key. `overrides` come after
/// those under the scenario's own key `set`. A path that begins with profile or fabric, where the
/// scenario names none, goes on in its cluster's.
Scenario read_scenario(const std::string& path, const Overrides& overrides = {});

/// As read_scenario, from text; relative paths resolve against `directory`.
Scenario read_scenario_text(std::string text, const std::string& name, const std::string& directory,
                            const Overrides& overrides = {});

/// A scenario file that is read many times, each time with other overrides: it and the files that
/// it names are parsed once. Threads may share one.
class ScenarioFile {
 public:
  explicit ScenarioFile(std::string path);
  Scenario read(const Overrides& overrides = {}) const;  ///< as read_scenario
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::shared_ptr<DocumentCache> documents_;
};

/// The resolved scenario as YAML, model and cluster inline and defaults filled in. Read from the
/// directory of the original it gives an equal scenario; the profile is named relative to that.
std::string to_yaml(const Scenario& scenario);

}  // namespace orrery
