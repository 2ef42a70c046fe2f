// Any text is either a scenario or an explained InputError. A scenario keeps the promises that the
// rest of the program relies on, and reads back to itself.
//   build/tests/fuzz_scenario -max_total_time=60 build/corpus_scenario tests/fuzz/corpus/scenario

#include <cstddef>
#include <cstdint>
#include <string>

#include "models/layout.hpp"
#include "models/scenario.hpp"
#include "sim/check.hpp"

namespace {

using namespace orrery;

void check_promises(const Scenario& scenario) {
  const Plan& plan = scenario.plan;
  const Parallelism& p = plan.parallelism;
  ORRERY_CHECK(p.world() >= 1 && p.world() <= scenario.cluster.gpus(), "world {}", p.world());
  ORRERY_CHECK(
      plan.micro_batches() * plan.micro_batch_sequences * p.dp == plan.global_batch_sequences,
      "{} micro-batches", plan.micro_batches());
  ScheduleShape shape;
  shape.kind = plan.schedule;
  shape.ranks = static_cast<int>(p.pp);
  shape.chunks = plan.chunks;
  shape.micro_batches = static_cast<int>(plan.micro_batches());
  ORRERY_CHECK(why_impossible(shape).empty(), "{}", why_impossible(shape));
  ORRERY_CHECK(static_cast<int>(plan.stages.size()) == shape.stages(), "{} stages",
               plan.stages.size());
  std::int64_t layers = 0;
  std::int64_t mtp_modules = 0;
  for (const StageContents& stage : plan.stages) {
    ORRERY_CHECK(stage.first_layer == layers, "stage begins at {}, not {}", stage.first_layer,
                 layers);
    layers += stage.layers;
    mtp_modules += stage.mtp_modules;
  }
  ORRERY_CHECK(layers == scenario.model.layers, "{} layers", layers);
  ORRERY_CHECK(mtp_modules == scenario.model.mtp_modules, "{} MTP modules", mtp_modules);
  const Layout layout(p, scenario.cluster.gpus_per_node);
  ORRERY_CHECK(layout.group_size(GroupKind::expert) == p.ep, "ep {}", p.ep);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // The seeds name files below scenarios/; run from the source directory for them to be found.
  const std::string directory = "scenarios";
  const std::string name = directory + "/fuzz.yaml";
  Scenario scenario;
  try {
    scenario =
        read_scenario_text(std::string(reinterpret_cast<const char*>(data), size), name, directory);
  } catch (const InputError& error) {
    ORRERY_CHECK(!error.problems().empty(), "an InputError without a problem");
    ORRERY_CHECK(!format_problems(error.problems()).empty(), "nothing is said");
    return 0;
  }
  check_promises(scenario);
  const std::string yaml = to_yaml(scenario);
  const Scenario again = read_scenario_text(yaml, name, directory);
  ORRERY_CHECK(again.name == scenario.name && again.seed == scenario.seed &&
                   again.plan == scenario.plan && again.model == scenario.model &&
                   again.cluster == scenario.cluster && again.profile.file == scenario.profile.file,
               "does not read back:\n{}", yaml);
  ORRERY_CHECK(to_yaml(again) == yaml, "is not a fixed point:\n{}", yaml);
  return 0;
}
