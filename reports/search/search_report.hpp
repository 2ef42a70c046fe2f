#pragma once
// What a search found, for people, for programs, as a table and as a scenario.

#include <optional>
#include <string>

#include "reports/search/search.hpp"
#include "reports/search/search_session.hpp"
#include "reports/terminal.hpp"

namespace orrery {

std::string to_terminal(const SearchAnswer& answer, const Search& search,
                        const TerminalOptions& options = {});

/// Of a question about the size of a cluster: what was asked, as it is printed.
struct AskedQuestion {
  double tokens = 0;
  std::optional<double> days;       ///< the smallest cluster that takes no more
  std::optional<double> gpu_hours;  ///< the fastest layout that takes no more
};
std::string to_terminal(const Answer& answer, const AskedQuestion& asked, const Scenario& scenario,
                        const TerminalOptions& options = {});
/// Keys: scenario, tokens, days, gpu_hours, met, why, choice, searched, nothing_fits_on_nodes.
std::string to_json(const Answer& answer, const AskedQuestion& asked, const Scenario& scenario);

/// "coarse 12345 of 31104, 1204 a second on 8 threads, 16 s left", on one line.
std::string progress_text(const SearchProgress& progress);

/// Keys do not change their names: scenario, counts, certain, best, own, time_and_memory,
/// time_and_gpus, gpu_hours_and_gpus, against_second, against_own, nearest.
std::string to_json(const SearchAnswer& answer, const Search& search);

/// Every candidate, one a line, in the order of the space, with a heading: its key and plan, and
/// both evaluations, empty where there was none. Times in seconds with all their digits.
std::string to_csv(const SearchAnswer& answer, const Search& search);

/// The candidate as a scenario file at `path` (which is not written): the same step as the search
/// evaluated. Files that it names are named relative to the folder of `path`.
std::string scenario_of(const Candidate& candidate, const Scenario& scenario,
                        const std::string& path);

}  // namespace orrery
