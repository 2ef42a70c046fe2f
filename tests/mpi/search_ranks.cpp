// A rank of mpirun that takes part in a hand-out of tasks; check_mpi.cmake looks at what comes of
// it.
//
//   check    400 tasks, twice; rank 0 prints "fine: ..." with how many ranks computed
//   kill     rank 2 is killed (SIGKILL) at its fifth task: where MPI goes on without it (mpirun
//            --enable-recovery), the others do its tasks
//   hang     rank 2 stops (SIGSTOP) at its fifth task, for good
//   other    rank 2 has another question
//   throw    rank 2 throws at its fifth task
//   prepare  rank 2 cannot read its input

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "reports/search/hand_out.hpp"

namespace {

using namespace orrery;
using namespace std::chrono_literals;

/// The task's number squared, and by whom; a message of 100 kB now and then.
Compute compute_of(int rank, const std::string& what) {
  return [rank, what](const std::string& task) {
    static std::atomic<int> tasks = 0;
    const int number = std::stoi(task);
    std::this_thread::sleep_for(3ms);
    if (rank == 2 && ++tasks == 5) {
      if (what == "kill") std::raise(SIGKILL);
      if (what == "hang") std::raise(SIGSTOP);
      if (what == "throw") throw std::runtime_error("not a number in layer 5");
    }
    return std::to_string(rank) + " " + std::to_string(number * number) +
           (number % 100 == 7 ? std::string(100'000, 'x') : "");
  };
}

void hand_out(Peers& peers, const std::string& what) {
  HandOut hand_out(&peers, "question", compute_of(0, what),
                   {.threads = 1, .batch = 10ms, .note = [](const std::string& text) {
                      std::printf("note: %s\n", text.c_str());
                    }});
  std::set<int> computed;
  for (int round = 0; round < 2; ++round) {
    std::vector<std::string> tasks;
    for (int i = 0; i < 400; ++i) tasks.push_back(std::to_string(i));
    std::set<std::size_t> seen;
    hand_out.run(tasks, [&](std::span<const TaskResult> results) {
      for (const TaskResult& result : results) {
        const int number = static_cast<int>(result.task);
        const std::size_t space = result.result.find(' ');
        computed.insert(std::stoi(result.result));
        if (std::stoi(result.result.substr(space)) != number * number ||
            !seen.insert(result.task).second) {
          throw std::runtime_error("a wrong result of task " + std::to_string(number));
        }
      }
    });
    if (seen.size() != tasks.size()) throw std::runtime_error("tasks are missing");
  }
  std::printf("fine: %zu ranks computed\n", computed.size());
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  try {
    const auto peers = open_mpi_peers("mpirun", what == "check" ? 30s : 2s);
    if (peers->rank() == 0) {
      hand_out(*peers, what);
      return 0;
    }
    serve(*peers,
          [&]() -> Prepared {
            if (peers->rank() == 2 && what == "prepare") throw std::runtime_error("no such file");
            return {.question = peers->rank() == 2 && what == "other" ? "another" : "question",
                    .compute = compute_of(peers->rank(), what)};
          },
          {.threads = 1});
    return 0;
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    std::fflush(stdout);
    return 1;
  }
}
