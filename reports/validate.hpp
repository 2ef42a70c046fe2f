#pragma once
// Predicted against published: files in scenarios/runs/ name a scenario and what was measured of
// it.
//
//   name: DeepSeek-V3
//   scenario: ../deepseek_v3_2048_h800.yaml
//   profile: ../profiles/other.yaml      # optional: prices from this profile instead
//   rows:
//     - {quantity: step_time_s, published: 19.926 s, aim: 5 %, source: "...", note: "..."}
//
// (`generation`, a serving plan or the path of one, in the place of `scenario`: its quantities are paths
// into the JSON of `generate`) or, several in one file, `name` and `runs: [{name, scenario, profile, rows}, ...]`. Paths are
// relative to the file. A quantity is a path into the JSON of `run` ("cells_s.overlapped"), or one
// of a cell of the middle pipeline position alone: "cell.KIND.time_s"; "phase.PHASE" is the mean
// time from first start to last end of a phase per layer in the overlapped pair (else the first
// cell that has it), and "phase.PHASE.busy" the mean sum of its op times.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "reports/interval.hpp"
#include "reports/report.hpp"
#include "sim/units.hpp"

namespace orrery {

struct ValidationRow {
  std::string quantity;
  Dimension dimension = Dimension::scalar;
  double published = 0;
  double aim = 0;  ///< relative error that was aimed at
  std::string source;
  std::string note;
  double predicted = 0;
  /// Of the prices' errors, where draws were asked for and the quantity follows from the step's time.
  std::optional<Interval> interval;

  double error() const { return predicted / published - 1; }
  bool met() const { return error() <= aim && error() >= -aim; }
};

struct Validation {
  std::string file;
  std::string name;
  std::string scenario;  ///< name of the scenario
  std::vector<ValidationRow> rows;
};

/// Reads one file and simulates what it names, each scenario with these overrides, and with so many
/// draws of the prices' errors. Throws InputError.
std::vector<Validation> validate(const std::string& path, const Overrides& overrides = {},
                                 std::int64_t draws = 0);

std::string validation_table(std::span<const Validation> validations);
std::string validation_json(std::span<const Validation> validations);

}  // namespace orrery
