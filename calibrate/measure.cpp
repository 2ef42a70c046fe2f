#include "calibrate/measure.hpp"

#include <algorithm>
#include <cmath>

namespace orrery {
namespace {

/// A single reference run is as noisy as any other; of three the middle one is not an outlier.
double reference_s(Timed& timed) {
  return median({timed.reference(), timed.reference(), timed.reference()});
}

int repeats_for(double one_run_s, const MeasureOptions& options) {
  if (one_run_s <= 0) return options.max_repeats;
  const double wanted = std::ceil(options.sample_s / one_run_s);
  return static_cast<int>(std::clamp(wanted, 1.0, static_cast<double>(options.max_repeats)));
}

Measurement attempt(Timed& timed, const MeasureOptions& options, int repeats, double until_s,
                    std::vector<double>& references) {
  const double before_s = reference_s(timed);
  std::vector<double> samples;
  do {
    samples.push_back(timed.run(repeats) / repeats);
  } while (!enough_samples(samples, options.rule) && timed.now_s() < until_s);
  const double after_s = reference_s(timed);
  references.push_back(before_s);
  references.push_back(after_s);
  const double usual_s = median(references);
  const Summary summary = summarise_samples(samples);
  Measurement m{.seconds = summary.median,
                .error = median_error(summary),
                .samples = summary.samples,
                .repeats = repeats};
  const double moved = std::abs(after_s / before_s - 1);
  const double unusual = std::abs(std::max(before_s, after_s) / usual_s - 1);
  m.drift = std::max(moved, unusual);
  m.steady = m.drift <= options.largest_drift;
  return m;
}

/// Seconds of one run, once caches know what comes again.
double warm_up(Timed& timed, const MeasureOptions& options, double until_s) {
  const int runs = std::min(timed.period(), options.max_repeats);
  double s = timed.run(runs);
  for (int i = 1; i < options.max_periods && timed.now_s() < until_s; ++i) {
    const double last_s = s;
    s = timed.run(runs);
    if (s > (1 - options.settled) * last_s) break;
  }
  return s / runs;
}

}  // namespace

Measurement measure(Timed& timed, const MeasureOptions& options, std::vector<double>& references) {
  // The first run loads code and touches pages.
  const double until_s = timed.now_s() + options.limit_s;
  const double first_s = timed.run(1);
  if (first_s >= options.limit_s) {
    // There is no time for more. How well a single run is known, it does not tell.
    return {.seconds = first_s, .error = 1, .samples = 1};
  }
  const double warm_s = warm_up(timed, options, until_s - options.limit_s / 2);
  const int repeats = repeats_for(warm_s, options);
  Measurement best = attempt(timed, options, repeats, until_s, references);
  for (int i = 1; i < options.attempts && !best.steady && timed.now_s() < until_s; ++i) {
    const Measurement next = attempt(timed, options, repeats, until_s, references);
    if (next.drift < best.drift) best = next;
    best.attempts = i + 1;
  }
  return best;
}

}  // namespace orrery
