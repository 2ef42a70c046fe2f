#pragma once
// What a rank's step goes to: every instant is given to one cell, to exposed communication or to
// the bubble, in integer picoseconds, so that the parts add up to the step exactly.
//
// The rules, per simulated rank:
//   1. A cell spans from its first op's start to its last op's end on this rank (marks do not
//   count).
//   2. An instant belongs to the first cell (by start) that covers it. The optimizer's cell may
//   start its
//      gradient traffic early, under the pipeline: it owns nothing before the last other cell has
//      ended.
//   3. An instant of a cell in which no op runs on the rank's compute streams (compute and
//      weight_gradient, of whichever cell), while one runs on any of its other streams, is exposed
//      communication of that cell's kind.
//      Where several do, it is put down to the first of: expert exchange, tensor- and
//      context-parallel collectives, gradients and parameters, pipeline sends.
//   4. An instant of the optimizer's cell in which nothing runs on the rank is waiting for slower
//   ranks:
//      bubble. Within the other cells it counts as the cell's.
//   5. Instants in no cell are bubble.

#include <array>
#include <cstdint>
#include <vector>

#include "sim/program.hpp"
#include "sim/timeline.hpp"

namespace orrery {

/// One cell on one rank: where it ran, and the part of that which rule 2 gives to it.
struct CellSpan {
  std::uint32_t cell = 0;  ///< index into Program::cells()
  Picoseconds start_ps = 0;
  Picoseconds end_ps = 0;
  Picoseconds owned_from_ps =
      0;  ///< owned: [owned_from_ps, end_ps), empty if owned_from_ps >= end_ps
};

/// Spans of every simulated rank's cells, [rank], ordered by start.
std::vector<std::vector<CellSpan>> cell_spans(const Program& program, const Timeline& timeline);

/// The spans of one rank that own anything, by where that begins. Outlived by `spans`.
std::vector<const CellSpan*> owned_in_order(const std::vector<CellSpan>& spans);

/// What exposed communication is put down to.
enum class Exposed : std::uint8_t { expert, tensor, data, pipeline };
inline constexpr int kExposed = 4;

/// The parts of one rank's step. covered + exposed + bubble = makespan.
struct Attribution {
  std::array<Picoseconds, kCellKinds> covered_ps{};  ///< by kind, exposed communication taken out
  std::array<Picoseconds, kCellKinds>
      exposed_ps{};  ///< exposed communication within cells of a kind
  std::array<Picoseconds, kExposed> exposed_by_ps{};  ///< the same, by what is exposed
  Picoseconds bubble_ps = 0;
  std::array<Picoseconds, kCellKinds> span_ps{};  ///< sum of whole spans, as they ran
  std::array<std::int64_t, kCellKinds> cells{};   ///< number of cells

  Picoseconds sum_ps() const;
  Picoseconds exposed_sum_ps() const;
};

/// Linear in the ops; `spans` is cell_spans() of the same arguments.
std::vector<Attribution> attribute(const Program& program, const Timeline& timeline,
                                   const std::vector<std::vector<CellSpan>>& spans);

}  // namespace orrery
