#pragma once
// The fast evaluation of a candidate: a step of whole cells in place of single operations.
//
// Where every operation takes its price and nothing is shared but streams, a sweep is linear in the
// (max, +) algebra: an operation starts at the maximum of what it waits for and ends a constant
// later. So a whole cell is a small matrix: from when its rank's streams are free and its two
// inputs are there, to when the streams are free again and its two results are ready. A cell is
// compiled by the same CellFactory that the Program's cells come from, swept once with a vector in
// place of a time, and a step is then as many products of a matrix with a vector as the schedule
// has actions, with the sends between them, gradient reduction and optimizer as in models/step.cpp.
// Nothing is approximated: the time is study_step's to the picosecond.
//
// Two things it does not see. Links and GPUs that operations share (Network::flows): shared, an
// operation takes longer, so that the time is a lower bound. Loads of experts that are drawn: each
// cell of the step is another one; the time is that of even loads.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "models/scenario.hpp"
#include "reports/report.hpp"
#include "reports/search/space.hpp"
#include "sim/units.hpp"

namespace orrery {

struct CoarseStep {
  /// Of the fullest rank, in the order in which its computation runs: never more than the step
  /// needs, and less only where an exchange starts, and what its layer keeps with it, before
  /// computation in front of it has ended.
  std::int64_t memory_peak_bytes = 0;
  /// 0 where that is more than the limit: then nothing was timed.
  Picoseconds time_ps = 0;
  /// Mean over ranks; they add up to the step. Computation goes to the kind of cell that it belongs
  /// to, what communication adds to cells that run alone is exposed, the rest is bubble. A Report
  /// gives an instant to the cell that covers it first (reports/attribution.hpp): the two differ by
  /// the ends of cells that overlap, and by waiting inside of cells.
  PhaseTimes phases_s;
};

/// Prices, cells and schedules that candidates of one scenario have in common. Thread-safe; results
/// do not depend on what was asked for before.
class CoarseModel {
 public:
  /// `scenario` outlives it.
  explicit CoarseModel(const Scenario& scenario);
  ~CoarseModel();
  CoarseModel(const CoarseModel&) = delete;
  CoarseModel& operator=(const CoarseModel&) = delete;

  /// Fastest where candidates whose cells are the same follow each other (all but pp, dp, schedule,
  /// split and ZeRO 0 and 1). Candidates that need more than `memory_limit_bytes` are not timed.
  std::vector<CoarseStep> evaluate(std::span<const Candidate> candidates,
                                   double memory_limit_bytes) const;

  /// Whether the time is study_step's by formula, and not that of even loads.
  bool exact() const;

  struct Shared;

 private:
  std::unique_ptr<Shared> shared_;
};

}  // namespace orrery
