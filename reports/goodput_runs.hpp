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

struct GoodputRow {
  std::string quantity;  ///< "goodput", "interruptions"
  double published = 0;
  bool at_least = false;  ///< all that is published is a bound from below
  std::string source;
  std::string note;
  std::string rates;  ///< name of the cluster whose failures they are
  bool counted_here = false;
  Interval predicted;

  double error() const { return predicted.p50 / published - 1; }
  /// In the interval; of a bound: the interval reaches it.
  bool covered() const {
    return at_least ? predicted.p90 >= published : predicted.contains(published);
  }
};

struct GoodputRun {
  std::string name;
  std::vector<GoodputRow> rows;
};

/// Reads one file and simulates what it lists. Throws InputError.
std::vector<GoodputRun> goodput_runs(const std::string& path);

std::string goodput_table(std::span<const GoodputRun> runs);
std::string goodput_json(std::span<const GoodputRun> runs);

}  // namespace orrery
