#pragma once
// Goodput predicted beside published: what fails is taken from one cluster, the job from another.
//
//   name
//   runs: a list of
//     name
//     gpus                      of the job
//     days                      of calendar time, "54 days"
//     recovery: {...}           restart, checkpoint, ... of the job itself, or a file: as
//     models/reliability.hpp,
//                               without failures
//     rates: [FILE, ...]        whose failures; a prediction each
//     counted_here: [FILE, ...] those of them that were counted in this very run (default: none);
//     the spread between
//                               clusters does not apply to them
//     rows: a list of {quantity: goodput | interruptions, published or at_least, source, note}
//
// Paths are relative to the file. Only the goodput of a run is never counted in: it follows from
// rates and recovery.

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "reports/interval.hpp"

namespace orrery {

/// What is published of a run.
struct PublishedValue {
  bool interruptions = false;  ///< how many; else the goodput
  double value = 0;
  bool at_least = false;  ///< all that is published is a bound from below
  std::string source;
  std::string note;

  /// Between P10 and P90; of a bound: P90 reaches it.
  bool covered_by(const Interval& predicted) const {
    return at_least ? predicted.p90 >= value : predicted.contains(value);
  }
};

/// What failures of one cluster predict for a run.
struct GoodputPrediction {
  std::string rates;          ///< name of the cluster
  bool counted_here = false;  ///< in this very run: its interruptions are no prediction
  Interval goodput;
  Interval interruptions;
};

struct GoodputRun {
  std::string name;
  std::vector<PublishedValue> published;
  std::vector<GoodputPrediction> predictions;
};

/// Reads one file and simulates what it lists. Throws InputError.
std::vector<GoodputRun> goodput_runs(const std::string& path);

std::string goodput_table(std::span<const GoodputRun> runs);
std::string goodput_json(std::span<const GoodputRun> runs);

}  // namespace orrery
