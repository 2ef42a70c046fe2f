#pragma once
// What a report rests on, with where it comes from: for readers who sign for it.

#include <string>
#include <string_view>
#include <vector>

#include "reports/study.hpp"

namespace orrery {

struct Assumption {
  std::string group;  ///< "Model", "Cluster", "GPU", "Kernel times", "Plan", "Noted"
  std::string what;
  std::string value;
  std::string source;  ///< citation; empty: the scenario says so, or it follows from what does
  double share = -1;   ///< of op time that rests on it; below 0: not a price
};

/// In the order of groups; price tables by share, largest first, those that price nothing left out.
std::vector<Assumption> assumptions_of(const Study& study);

}  // namespace orrery
