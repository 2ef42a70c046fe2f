#pragma once
// The capacity report: what a planning review reads about one or several scenarios. The study runs
// each scenario's step and what hangs on it; the writers format it as a page (html/page.hpp), as
// Markdown or as CSV.

#include <optional>
#include <string>
#include <vector>

#include "reports/joined.hpp"
#include "reports/provenance.hpp"
#include "reports/scaling.hpp"
#include "reports/sensitivity.hpp"
#include "reports/study.hpp"
#include "reports/target.hpp"

namespace orrery {

struct CapacityQuestion {
  std::vector<std::string> scenarios;
  std::vector<std::string> targets;
  double tokens = 0;            ///< of the run; 0: not said
  double usd_per_gpu_hour = 0;  ///< 0: not said
  std::string measured;         ///< trace of the first scenario's step as it ran; empty: none
  /// JSON that `search`, `budget`, `reliability` and `validate` wrote; empty: none.
  std::string search, budget, reliability, validation;
  Overrides overrides;             ///< of all scenarios
  std::optional<Network> network;  ///< as in StudyOptions
  std::int64_t draws = 0;          ///< of the prices' errors (reports/uncertainty.hpp); 0: none
};

/// JSON of another verb, read and checked to be that, otherwise as it is.
struct OtherDocument {
  std::string file;
  std::string json;  ///< empty: there is none
  explicit operator bool() const { return !json.empty(); }
};

struct MeasuredStep {
  std::string file;
  Timeline timeline;
  Joined joined;  ///< with the simulated one
};

struct CapacityScenario {
  Study study;
  std::vector<Assumption> assumptions;
  Sensitivity sensitivity;
  Scaling scaling;
  std::optional<MeasuredStep> measured;
  std::vector<Judgement> judgements;
  /// Of a run over so many tokens; 0: unknown.
  double tokens = 0, gpu_hours = 0, days = 0, cost_usd = 0;
};

struct CapacityReport {
  CapacityQuestion question;
  TargetContext context;  ///< of the first scenario: each has a spread of its own
  std::vector<CapacityScenario> scenarios;
  OtherDocument search, budget, reliability, validation;
};

/// Throws InputError with all problems of all files and targets.
CapacityReport capacity_report(const CapacityQuestion& question);
/// Of a step that was studied already, simulated or executed.
CapacityReport capacity_report(Study study);

/// What the answer box says: "Yes: 310 G tokens/day ...", a line a target.
std::string answer_of(const Judgement& judgement);

/// The page's data; the contract is described at the top of html/report.js.
std::string to_json(const CapacityReport& report);
std::string to_markdown(const CapacityReport& report);
/// A row a scenario; the columns of FOCUS 1.2 (FinOps Open Cost and Usage Specification) where they
/// mean the same, others with x_ before them.
std::string to_csv(const CapacityReport& report);

}  // namespace orrery
