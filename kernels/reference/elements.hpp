#pragma once
// Elements of a Matrix one by one, with their scales, in double.

#include "kernels/call.hpp"

namespace orrery::kernels::reference {

/// Scale of the tile or block of element (row, column); 1 without scales.
inline double scale_at(const Matrix& m, std::int64_t row, std::int64_t column) {
  switch (m.scaling) {
    case Scaling::none:
      return 1;
    case Scaling::rows:
      return double{m.scales[column / kTile * m.scale_pitch + row]};
    case Scaling::blocks:
      return double{m.scales[row / kTile * m.scale_pitch + column / kTile]};
  }
  return 1;
}

/// Exact: the product of a code's value and a scale fits a double.
double element_at(const Matrix& m, std::int64_t row, std::int64_t column);

/// Rounds once, from double to the format. Matrices without scales only.
void set_element(const Matrix& m, std::int64_t row, std::int64_t column, double value);

}  // namespace orrery::kernels::reference
