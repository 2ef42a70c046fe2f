#pragma once
// A scenario against changes of it: what if NVLink were twice as fast, what if it trained in BF16?
//
// Questions in a file (scenarios/what_if/):
//
//   scenario: ../deepseek_v3_2048_h800.yaml   # relative to the file
//   what_if:
//     - name: NVLink doubled
//       note: "..."                           # optional: what is assumed, or known of the answer
//       set: [cluster.nvlink.bandwidth=*2, cluster.nvlink.peak=*2]   # sim/overrides.hpp

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/scenario.hpp"
#include "reports/report.hpp"

namespace orrery {

struct WhatIf {
  std::string name;
  Overrides overrides;
  std::string note;
};

struct WhatIfs {
  std::string scenario;  ///< path
  std::vector<WhatIf> list;
};

/// Throws InputError.
WhatIfs read_what_ifs(const std::string& path);

/// "NAME: PATH=VALUE, PATH=VALUE", located at --what-if:`number`. Commas inside of brackets, braces
/// and quotes are part of a value. Without a name it is called by its overrides. Throws InputError.
WhatIf parse_what_if(std::string_view text, int number);

/// What came of one question.
struct WhatIfRow {
  WhatIf what_if;
  std::optional<Report> report;  ///< none: it cannot be simulated
  /// Empty: it can run. Else why not, in one line: a layout that does not come out, or more memory
  /// than there is (then with a report of what the step would be).
  std::string why_not;
  std::vector<Problem> problems;   ///< all of them, located, where there is no report
  std::vector<std::string> notes;  ///< of the scenario's readers
};

struct WhatIfAnswer {
  WhatIfRow base;
  std::vector<WhatIfRow> rows;  ///< in the order of the questions
};

/// Simulates one step of the scenario with `set`, and of each variant with its overrides after
/// these, on all processors. Throws InputError where the base has problems; a variant that has some
/// is a row.
WhatIfAnswer ask_what_ifs(const ScenarioFile& scenario, const Overrides& set,
                          std::span<const WhatIf> list, std::optional<Network> network = {});

std::string to_terminal(const WhatIfAnswer& answer);

/// {"schema_version", "base": as `run --json`, "variants": [{"name", "note", "set", "feasible",
/// "why_not", "step_change", "gpu_hours_change", "report"}]}; changes are ratios minus 1.
std::string to_json(const WhatIfAnswer& answer);

}  // namespace orrery
