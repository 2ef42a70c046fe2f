#pragma once
// From a table of measured GEMMs to a compact GemmTable: five constants of the skeleton, a few
// hundred points, and the error on layers that neither has seen.

#include <cstdint>
#include <string>
#include <vector>

#include "sim/profile.hpp"

namespace orrery {

struct HeldOutError {
  std::string family;
  std::size_t points = 0;
  double median = 0;         ///< of |predicted / measured - 1|
  double percentile_68 = 0;  ///< about one standard deviation
  double percentile_90 = 0;
  double bias = 0;  ///< median of predicted / measured - 1
};

/// Minimises mean(min(|ln(measured / skeleton)|, 0.5)) over the skeleton's constants, starting at
/// `table.model`, by the simplex method of Nelder and Mead on their logarithms. `fixed` names
/// constants to leave as they are, by position in GemmModel (0: flops_per_s_per_sm ... 4:
/// bytes_per_s). The data sheet's limits are respected: no fit may need a tensor core faster than
/// it is.
struct Limits {
  double flops_per_s_per_sm = 0;
  double bytes_per_s = 0;
};
void fit_model(GemmTable& table, const std::vector<GemmPoint>& points, const Limits& limits,
               const std::vector<int>& fixed = {});

/// True for one layer (n, k) in five; decided by a hash, so that whole layers are held out, not
/// rows.
bool held_out(std::int64_t n, std::int64_t k);

/// The point with the median residual in each cell of a logarithmic grid: robust against the
/// outliers that a table of 100,000 automatic measurements has, and still a measurement.
std::vector<GemmPoint> thin(const GemmTable& table, const std::vector<GemmPoint>& points);

HeldOutError error_on(const GemmTable& table, const std::vector<GemmPoint>& points,
                      const std::string& family);

/// Error of each point when the others predict it (for tables of a dozen points).
HeldOutError leave_one_out(const GemmTable& table, const std::string& family);

HeldOutError summarise(const std::string& family, std::vector<double> ratios);

}  // namespace orrery
