#pragma once
// Goodput: the useful time of a training job over its calendar time, with failures.
//
// A job computes for an interval of useful time, stands still for a checkpoint's blocking part, and
// goes on while the rest is written. Parts fail independently, as Poisson processes, whenever the
// job runs or restarts. A failure stops the job when it is noticed; all work since the last
// checkpoint that was completely written when the failure happened is done again, after a host has
// been found, the job restarted and the checkpoint read. Failures strike restarts, too.
//
// Two answers: a simulation (trials with a generator each, the same bytes whatever the threads) of
// all that models/reliability.hpp describes, and a closed form of the part that is a renewal
// process (failures that stop the job, hosts always at hand, no maintenance).

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "models/reliability.hpp"
#include "models/scenario.hpp"
#include "reports/interval.hpp"

namespace orrery {

/// What a job has that can fail, and what it saves.
struct Job {
  std::int64_t gpus = 0;
  std::int64_t hosts = 0;
  std::int64_t switches = 0;
  double checkpoint_bytes = 0;
};

/// Master weights (parameters where there are none) and both moments of all parameters, once: what
/// plan.checkpoint's writes add up to.
double checkpoint_bytes(const Scenario& scenario);

/// The scenario's GPUs, the hosts and switches that they need, and its checkpoint.
Job job_of(const Scenario& scenario, const Reliability& reliability);

/// Parts of the kind that the job has.
std::int64_t parts_of(const Job& job, FailingPart part);

/// Times of one checkpoint and the interval, in seconds.
struct CheckpointTimes {
  double write_s = 0;     ///< from begin to safely written
  double blocking_s = 0;  ///< that training stands still
  double read_s = 0;
  double interval_s = 0;  ///< useful time from one to the next, as used
  double optimum_s = 0;   ///< that the closed form is best at, at least what a write needs
  double young_s = 0;     ///< sqrt(2 blocking mtbf) (Young 1974)
  double daly_s = 0;      ///< its higher-order form (Daly 2006, equation 37)
};

/// Where calendar time goes, in seconds; the parts add up to it.
struct TimeParts {
  double useful = 0;
  double checkpoint = 0;  ///< standing still for checkpoints
  double rework = 0;  ///< lost between the last checkpoint and a failure, or until it was noticed
  double detection = 0;  ///< from failures to the job's stop
  double restart = 0;    ///< restarting and reading the checkpoint
  double waiting = 0;    ///< for a host, when all spares are in repair
  double maintenance = 0;
  double slow = 0;  ///< that slow hosts added
  double sum() const {
    return useful + checkpoint + rework + detection + restart + waiting + maintenance + slow;
  }
};

/// What one kind of failure does in the mean of all trials.
struct KindOfFailure {
  std::string what;
  double mtbf_s = 0;  ///< of the whole job, by this kind alone
  double events = 0;  ///< a trial
};

struct GoodputOptions {
  std::int64_t trials = 1000;
  std::uint64_t seed = 0;
};

struct Goodput {
  Job job;
  double useful_s = 0;
  double mtbf_s = 0;  ///< of the job: failures that stop it
  CheckpointTimes checkpoint;
  Interval goodput;  ///< useful over calendar time, of all trials
  Interval calendar_s;
  Interval interruptions;            ///< stops for failures and maintenance
  TimeParts mean_s;                  ///< over trials
  std::vector<KindOfFailure> kinds;  ///< most frequent first
  double expected_goodput = 0;       ///< closed form: useful time over expected calendar time
  double expected_calendar_s = 0;
  std::vector<double> goodputs;  ///< by trial, to be joined with other draws
};

/// Simulates a run of `useful_s` seconds of training (its steps as they take alone). Throws
/// std::runtime_error where no interval lets a job of this size get anywhere.
Goodput goodput(const Reliability& reliability, const Job& job, double useful_s,
                const GoodputOptions& options = {});

/// What a user asks about a scenario.
struct GoodputQuestion {
  std::string file;         ///< the scenario
  std::string reliability;  ///< a file of what fails; empty: the scenario's own
  double tokens = 0;        ///< to train on, at the rate of the simulated step; or
  double useful_s = 0;      ///< so much training
  GoodputOptions options;   ///< the seed is the scenario's
};

/// Throws InputError, and as goodput().
Goodput ask_goodput(const GoodputQuestion& question);

/// "Goodput 91.2 % (88.0 to 93.9)", where the rest goes, and the failures.
std::string to_terminal(const Goodput& goodput);
std::string to_json(const Goodput& goodput);

}  // namespace orrery
