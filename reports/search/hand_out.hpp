#pragma once
// Tasks for the threads of one process, and of others where there are any: rank 0 hands tasks out
// as threads become free, and gets the results. Tasks and results are bytes; the same result must
// come of a task wherever it is computed. A rank that is lost costs time only: its tasks go to
// others.

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "reports/search/peers.hpp"

namespace orrery {

/// Called by several threads at once; what it calls of TBB runs on the calling thread alone.
using Compute = std::function<std::string(const std::string& task)>;

struct TaskResult {
  std::size_t task = 0;  ///< index into the tasks
  std::string result;
};

struct HandOutOptions {
  int threads = 0;  ///< of this process; 0: the machine's, shared out among the ranks on it
  /// Between two calls of `done`: short enough that little is computed again after a kill, long
  /// enough that writing (a synchronous commit takes some 10 ms) is a small part of the time.
  std::chrono::milliseconds batch{200};
  std::function<void(const std::string&)> note;  ///< to be told what is worth knowing
};

/// A failure of another rank, "rank 3: out of memory"; or of this one, in its own words.
class HandOut {
 public:
  /// `peers` may be null: this process is alone. Other ranks must be in serve(). `question` is what
  /// all ranks must agree on, such as a fingerprint of the input and the program.
  HandOut(Peers* peers, std::string question, Compute compute, HandOutOptions options);
  /// Sends the others home. Tasks that threads are at are waited for.
  ~HandOut();
  HandOut(const HandOut&) = delete;
  HandOut& operator=(const HandOut&) = delete;

  /// Returns when `done` has been given the result of each task once, in any order. It is called on
  /// this thread, about once in options.batch, with what has come meanwhile, which may be nothing.
  /// What it throws ends the run; so does what Compute throws, on any rank, as std::runtime_error.
  /// Then too it returns when this process is at no task any more.
  void run(std::span<const std::string> tasks,
           const std::function<void(std::span<const TaskResult>)>& done);

  /// Threads that are known to compute, of all ranks.
  int threads() const;

 private:
  class State;
  std::unique_ptr<State> state_;
};

/// The other ranks' side: computes what rank 0 hands out, and returns when it says so. `prepare`
/// reads the input; what it throws is told to rank 0, which fails with it, unless it has failed
/// itself. Throws where rank 0 is lost.
struct Prepared {
  std::string question;
  Compute compute;
};
void serve(Peers& peers, const std::function<Prepared()>& prepare, HandOutOptions options);

/// So many threads if not 0, else this rank's share of the machine's.
int threads_of(const Peers* peers, int wanted);

}  // namespace orrery
