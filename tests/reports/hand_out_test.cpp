// Tasks reach every rank's threads, results come back once, whoever vanishes or fails.

#include "reports/search/hand_out.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "tests/reports/in_process_peers.hpp"

namespace orrery {
namespace {

using namespace std::chrono_literals;
using testing::HasSubstr;

std::string squared(const std::string& task) {
  const long n = std::stol(task);
  return std::to_string(n * n);
}

std::vector<std::string> numbers(int count) {
  std::vector<std::string> tasks;
  for (int i = 0; i < count; ++i) tasks.push_back(std::to_string(i));
  return tasks;
}

/// Runs the tasks; every result must be right and come once.
void expect_squares(HandOut& hand_out, const std::vector<std::string>& tasks) {
  std::set<std::size_t> seen;
  hand_out.run(tasks, [&](std::span<const TaskResult> results) {
    for (const TaskResult& result : results) {
      EXPECT_TRUE(seen.insert(result.task).second) << result.task << " twice";
      EXPECT_EQ(result.result, squared(tasks[result.task]));
    }
  });
  EXPECT_EQ(seen.size(), tasks.size());
}

TEST(HandOut, OneProcessDoesAllTasksOnce) {
  for (const int threads : {1, 3}) {
    HandOut hand_out(nullptr, "q", squared, {.threads = threads, .batch = 1ms});
    EXPECT_EQ(hand_out.threads(), threads);
    expect_squares(hand_out, numbers(200));
    expect_squares(hand_out, numbers(1));
    expect_squares(hand_out, {});
  }
}

TEST(HandOut, ComesBackInBatchesOnTheCallingThread) {
  HandOut hand_out(nullptr, "q", squared, {.threads = 2, .batch = 30ms});
  const auto caller = std::this_thread::get_id();
  int calls = 0;
  std::size_t most = 0;
  hand_out.run(numbers(5000), [&](std::span<const TaskResult> results) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    ++calls;
    most = std::max(most, results.size());
  });
  EXPECT_GT(most, 100u);
  EXPECT_LT(calls, 500);
}

TEST(HandOut, TicksWhileNothingComes) {
  HandOut hand_out(nullptr, "q",
                   [](const std::string&) {
                     std::this_thread::sleep_for(200ms);
                     return std::string();
                   },
                   {.threads = 1, .batch = 10ms});
  int empty = 0;
  hand_out.run(numbers(1), [&](std::span<const TaskResult> results) { empty += results.empty(); });
  EXPECT_GE(empty, 3);
}

/// Ranks 1 .. n-1 as threads that serve.
class Served {
 public:
  explicit Served(
      int ranks, const std::function<Prepared(int)>& prepare =
                     [](int) {
                       return Prepared{"q", squared};
                     })
      : peers(InProcessPeers::make(ranks)) {
    for (std::size_t r = 1; r < peers.size(); ++r) {
      threads_.emplace_back([this, r, prepare] {
        try {
          serve(*peers[r], [&] { return prepare(static_cast<int>(r)); }, {.threads = 2});
        } catch (const std::exception& error) {
          const std::lock_guard lock(mutex_);
          errors_[static_cast<int>(r)] = error.what();
        }
      });
    }
  }
  /// Rank 0 leaves (its end is destroyed), and so do all.
  std::map<int, std::string> end() {
    peers[0].reset();
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
    return errors_;
  }
  ~Served() { end(); }

  std::vector<std::unique_ptr<InProcessPeers>> peers;

 private:
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::map<int, std::string> errors_;
};

TEST(HandOut, AllRanksTakePart) {
  std::mutex mutex;
  std::map<int, int> done_by;
  const auto compute_of = [&](int rank) -> Compute {
    return [&, rank](const std::string& task) {
      std::this_thread::sleep_for(1ms);
      const std::lock_guard lock(mutex);
      ++done_by[rank];
      return squared(task);
    };
  };
  Served served(3, [&](int rank) { return Prepared{"q", compute_of(rank)}; });
  {
    HandOut hand_out(served.peers[0].get(), "q", compute_of(0), {.threads = 1, .batch = 5ms});
    expect_squares(hand_out, numbers(400));
    expect_squares(hand_out, numbers(400));
    EXPECT_EQ(hand_out.threads(), 5);
  }
  EXPECT_TRUE(served.end().empty());
  EXPECT_EQ(done_by[0] + done_by[1] + done_by[2], 800);
  for (const int rank : {0, 1, 2}) EXPECT_GT(done_by[rank], 20) << rank;
}

TEST(HandOut, WhatALostRankWasAtIsHandedOutAgain) {
  // Rank 1 takes tasks and never answers.
  auto peers = InProcessPeers::make(2);
  std::size_t taken = 0;
  std::thread lost([&] {
    // What serve() says first: it has three threads. (The format is known here on purpose.)
    std::string hello = "h" + std::string("\3\0\0\0\0\0\0\0", 8) + "q";
    peers[1]->send(0, hello);
    while (peers[1]->receive(300ms)) ++taken;
    peers[1]->vanish();
  });
  std::vector<std::string> notes;
  HandOut hand_out(peers[0].get(), "q",
                   [](const std::string& task) {
                     std::this_thread::sleep_for(5ms);
                     return squared(task);
                   },
                   {.threads = 1, .batch = 5ms, .note = [&](const std::string& text) {
                      notes.push_back(text);
                    }});
  expect_squares(hand_out, numbers(40));
  lost.join();
  EXPECT_EQ(taken, 6u);  // twice its threads, and no more without a result
  EXPECT_THAT(notes,
              testing::ElementsAre("rank 1 is lost; what it was at (6 tasks) is handed out again"));
  EXPECT_EQ(hand_out.threads(), 1);
  expect_squares(hand_out, numbers(10));
}

TEST(HandOut, RanksMustAgreeOnTheQuestion) {
  Served served(3, [](int rank) { return Prepared{rank == 2 ? "other" : "q", squared}; });
  HandOut hand_out(served.peers[0].get(), "q",
                   [](const std::string& task) {
                     std::this_thread::sleep_for(2ms);
                     return squared(task);
                   },
                   {.threads = 1});
  try {
    expect_squares(hand_out, numbers(2000));
    FAIL() << "nothing thrown";
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr("rank 2 has another input"));
  }
}

TEST(HandOut, FailuresSayWhoAndWhy) {
  const Compute fails = [](const std::string& task) -> std::string {
    std::this_thread::sleep_for(1ms);
    if (task == "150") throw std::runtime_error("out of luck");
    return squared(task);
  };
  const auto message = [&](Peers* peers, const Compute& own) {
    HandOut hand_out(peers, "q", own, {.threads = 1, .batch = 5ms});
    try {
      hand_out.run(numbers(300), [](std::span<const TaskResult>) {});
    } catch (const std::runtime_error& error) {
      // The run is over, the ranks are not: the next one works.
      expect_squares(hand_out, numbers(20));
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message(nullptr, fails), "out of luck");
  const Compute slow = [](const std::string& task) {
    std::this_thread::sleep_for(50ms);
    return squared(task);
  };
  Served served(2, [&](int) { return Prepared{"q", fails}; });
  EXPECT_EQ(message(served.peers[0].get(), slow), "rank 1: out of luck");

  Served broken(2, [&](int) -> Prepared { throw std::runtime_error("no such file"); });
  HandOut hand_out(broken.peers[0].get(), "q", slow, {.threads = 1, .batch = 5ms});
  EXPECT_THROW(expect_squares(hand_out, numbers(20)), std::runtime_error);
}

TEST(HandOut, WhatDoneThrowsEndsTheRun) {
  HandOut hand_out(nullptr, "q", squared, {.threads = 2, .batch = 1ms});
  EXPECT_THROW(hand_out.run(numbers(1000),
                            [](std::span<const TaskResult>) { throw std::logic_error("enough"); }),
               std::logic_error);
  expect_squares(hand_out, numbers(100));
}

TEST(HandOut, AfterAFailureNothingIsComputedAnyMore) {
  std::atomic<int> at = 0;
  HandOut hand_out(nullptr, "q",
                   [&](const std::string& task) {
                     ++at;
                     std::this_thread::sleep_for(20ms);
                     --at;
                     return squared(task);
                   },
                   {.threads = 3, .batch = 1ms});
  for (int i = 0; i < 5; ++i) {
    EXPECT_THROW(
        hand_out.run(numbers(100), [](std::span<const TaskResult>) { throw std::logic_error(""); }),
        std::logic_error);
    EXPECT_EQ(at, 0);
  }
}

TEST(HandOut, RanksGoHomeAlsoWithoutWork) {
  Served served(4);
  EXPECT_TRUE(served.end().empty());
}

TEST(HandOut, ARankWithoutRankZeroFails) {
  Served served(2);
  served.peers[0]->vanish();
  EXPECT_EQ(served.end()[1], "rank 1: rank 0 is lost");
}

TEST(HandOut, ThreadsAreSharedOutAmongRanksOfAMachine) {
  auto peers = InProcessPeers::make(1000);
  EXPECT_EQ(threads_of(peers[0].get(), 0), 1);
  EXPECT_EQ(threads_of(peers[0].get(), 7), 7);
  EXPECT_GE(threads_of(nullptr, 0), 1);
}

}  // namespace
}  // namespace orrery
