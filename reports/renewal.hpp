#pragma once
// Checkpoint and restart as a renewal process: exact expectations for failures that are a Poisson
// process.
//
// Useful work comes in intervals of tau, each followed by a checkpoint that stops training for
// `blocking` and is safely written `write` after it began, with write - blocking <= tau. A failure
// loses all since the last checkpoint that was written, and takes an outage: its detection, then a
// restart, which fails at the same rate and then begins again with a detection.
//
// With rate L, w = tau + blocking and a = write - blocking, the first checkpoint after a restart is
// written when w + a have passed without a failure, each further one after another w. Then
//   outage   O   = (D + E[1 - exp(-L R)] / L) / E[exp(-L R)],  D the mean detection, R the restart
//   first    E_f = (exp(L (w + a)) - 1) (1 / L + O)
//   further  E_r = (1 - exp(-L w)) (1 / L + O + E_f)
//   n of them    = E_f + (n - 1) E_r.
// With a = 0, D = 0 and a constant R both are exp(L R) (exp(L w) - 1) / L, the complete model of
// J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
// Future Generation Computer Systems 22 (2006) 303-312.

#include "models/reliability.hpp"

namespace orrery {

struct Renewal {
  double failures_per_s = 0;
  double detection_s = 0;  ///< mean
  RandomTime restart;      ///< to stop reading, `read_s` not included
  double read_s = 0;       ///< of a checkpoint, after each restart
  double blocking_s = 0;
  double write_s = 0;  ///< at least blocking_s

  /// Mean time from a failure to the resumption of work.
  double outage_s() const;
  /// Mean time from work's begin after a restart to the first checkpoint that is written, and from
  /// there to the next. Infinite where they outgrow doubles.
  double first_s(double interval_s) const;
  double further_s(double interval_s) const;
  /// Mean calendar time of so many intervals, the last one's checkpoint written.
  double total_s(double interval_s, double intervals) const;
};

/// The interval that takes the least calendar time per useful time, between what a write needs and
/// `most_s`.
double optimum_interval_s(const Renewal& renewal, double most_s);

/// sqrt(2 C M): J. W. Young, Communications of the ACM 17 (1974) 530.
double young_interval_s(double checkpoint_s, double mtbf_s);
/// Daly (2006): sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C, and M from C = 2 M on.
double daly_interval_s(double checkpoint_s, double mtbf_s);

}  // namespace orrery
