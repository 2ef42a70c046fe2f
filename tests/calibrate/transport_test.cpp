#include "calibrate/transport/transport.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <thread>

#include "calibrate/transport/clock_offset.hpp"
#include "calibrate/transport/launched.hpp"

namespace orrery {
namespace {

using namespace std::chrono_literals;
using testing::HasSubstr;

constexpr auto kLong = 60s;

std::vector<std::byte> filled(std::size_t size, std::uint64_t seed) {
  std::vector<std::byte> bytes(size);
  std::mt19937_64 random(seed);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

/// What each rank's body threw, "" where it returned.
std::vector<std::string> errors_of(int ranks, std::chrono::nanoseconds timeout,
                                   const std::function<void(Transport&)>& body) {
  auto transports = make_in_process_transports(ranks, timeout);
  std::vector<std::string> errors(static_cast<std::size_t>(ranks));
  std::vector<std::thread> threads;
  for (auto& transport : transports) {
    threads.emplace_back([&, t = std::move(transport)]() mutable {
      try {
        body(*t);
      } catch (const std::exception& error) {
        errors[static_cast<std::size_t>(t->rank())] = error.what();
        t->abort(error.what());
      }
      t.reset();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

TEST(Tags, KeepStepsOpsAndPartsApart) {
  std::map<std::uint64_t, int> seen;
  for (const std::uint64_t step : {0, 1, 0x7FFF}) {
    for (const std::uint32_t op : {0U, 1U, 0xFFFFU, 0x10000U, 0xFFFFFFFFU}) {
      for (const std::uint32_t part : {0U, 1U, 0xFFFFU}) {
        const std::uint64_t tag = tag_of(step, OpId(op), part);
        EXPECT_EQ(++seen[tag], 1);
        EXPECT_EQ(tag & kOwnTags, 0U);
      }
    }
  }
  EXPECT_EQ(tag_of(0x8000, OpId(7), 3), tag_of(0, OpId(7), 3));
}

TEST(InProcess, DeliversAllSizesWhicheverSideComesFirst) {
  for (const bool send_first : {true, false}) {
    for (const std::size_t size : {std::size_t{0}, std::size_t{1}, Transport::kCopiedBytes,
                                   Transport::kCopiedBytes + 1, std::size_t{5'000'001}}) {
      run_in_process(2, kLong, [&](Transport& t) {
        if ((t.rank() == 0) != send_first) std::this_thread::sleep_for(5ms);
        if (t.rank() == 0) {
          const auto bytes = filled(size, size);
          t.wait(t.post_send(1, 5, bytes), "send");
        } else {
          std::vector<std::byte> bytes(size);
          t.wait(t.post_receive(0, 5, bytes), "receive");
          EXPECT_EQ(bytes, filled(size, size));
        }
      });
    }
  }
}

TEST(InProcess, SmallSendsDoNotWaitForTheirReceiver) {
  run_in_process(2, kLong, [](Transport& t) {
    // Both send before either receives; what is sent may change afterwards.
    auto bytes = filled(Transport::kCopiedBytes, 10 + static_cast<std::uint64_t>(t.rank()));
    t.wait(t.post_send(1 - t.rank(), 1, bytes), "send");
    bytes.assign(bytes.size(), std::byte{0});
    t.wait(t.post_receive(1 - t.rank(), 1, bytes), "receive");
    EXPECT_EQ(bytes, filled(bytes.size(), 11 - static_cast<std::uint64_t>(t.rank())));
  });
}

TEST(InProcess, MatchesByPeerAndTagAndInOrderOfPosting) {
  run_in_process(3, kLong, [](Transport& t) {
    constexpr std::size_t kSize = 3000;
    if (t.rank() > 0) {
      std::vector<std::vector<std::byte>> sent;
      std::vector<Request> requests;
      for (std::uint64_t i = 0; i < 20; ++i) {
        sent.push_back(filled(kSize, 100 * static_cast<std::uint64_t>(t.rank()) + i));
        requests.push_back(t.post_send(0, i % 2, sent.back()));
      }
      t.wait_all(requests, "sends");
    } else {
      // Tag 1 first, and rank 2 first: the others' messages have to wait.
      for (const std::uint64_t tag : {1U, 0U}) {
        for (const int from : {2, 1}) {
          for (std::uint64_t i = tag; i < 20; i += 2) {
            std::vector<std::byte> bytes(kSize);
            t.wait(t.post_receive(from, tag, bytes), "receive");
            EXPECT_EQ(bytes, filled(kSize, 100 * static_cast<std::uint64_t>(from) + i));
          }
        }
      }
    }
  });
}

TEST(InProcess, RanksMaySendToThemselves) {
  run_in_process(1, kLong, [](Transport& t) {
    const auto sent = filled(10'000, 3);
    std::vector<std::byte> got(sent.size());
    t.wait_all(std::array{t.post_send(0, 0, sent), t.post_receive(0, 0, got)}, "self");
    EXPECT_EQ(got, sent);
    t.barrier();
    EXPECT_EQ(t.gather(sent), std::vector<std::vector<std::byte>>{sent});
  });
}

TEST(InProcess, ManyThreadsOfARankAtOnce) {
  constexpr int kRanks = 3;
  constexpr int kThreads = 4;
  run_in_process(kRanks, kLong, [](Transport& t) {
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&t, thread] {
        std::mt19937_64 random(static_cast<std::uint64_t>(thread));  // the same on all ranks
        for (std::uint64_t i = 0; i < 50; ++i) {
          const std::size_t size = random() % 6000;
          const std::uint64_t tag = tag_of(i, OpId(static_cast<std::size_t>(thread)));
          const auto seed = [&](int from, int to) { return tag + 7 * from + 3 * to; };
          std::vector<std::vector<std::byte>> sent;
          std::vector<std::vector<std::byte>> got(kRanks, std::vector<std::byte>(size));
          std::vector<Request> requests;
          for (int peer = 0; peer < kRanks; ++peer) {
            sent.push_back(filled(size, seed(t.rank(), peer)));
          }
          for (int peer = 0; peer < kRanks; ++peer) {
            const auto p = static_cast<std::size_t>(peer);
            requests.push_back(t.post_send(peer, tag, sent[p]));
            requests.push_back(t.post_receive(peer, tag, got[p]));
          }
          t.wait_all(requests, "exchange");
          for (int peer = 0; peer < kRanks; ++peer) {
            ASSERT_EQ(got[static_cast<std::size_t>(peer)], filled(size, seed(peer, t.rank())));
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  });
}

TEST(InProcess, NobodyPassesABarrierBeforeAllHaveReachedIt) {
  for (int ranks = 1; ranks <= 8; ++ranks) {
    std::array<std::atomic<int>, 10> reached{};
    run_in_process(ranks, kLong, [&](Transport& t) {
      for (auto& count : reached) {
        ++count;
        t.barrier();
        EXPECT_EQ(count.load(), ranks);
      }
    });
  }
}

TEST(InProcess, GathersDifferentSizesOnRankZero) {
  run_in_process(5, kLong, [](Transport& t) {
    const auto own = filled(static_cast<std::size_t>(t.rank()) * 1500, 50);
    const auto all = t.gather(own);
    ASSERT_EQ(all.size(), t.rank() == 0 ? 5U : 0U);
    for (std::size_t r = 0; r < all.size(); ++r) EXPECT_EQ(all[r], filled(r * 1500, 50));
  });
}

TEST(InProcess, ARollCallTellsAllWhatAllSay) {
  run_in_process(3, kLong, [](Transport& t) {
    for (std::uint64_t round = 0; round < 3; ++round) {
      const std::uint64_t own = 10 * round + static_cast<std::uint64_t>(t.rank());
      EXPECT_EQ(t.roll_call(own),
                (std::vector<std::uint64_t>{10 * round, 10 * round + 1, 10 * round + 2}));
    }
  });
}

TEST(InProcess, ARollCallNamesWhoDoesNotAnswer) {
  const auto errors = errors_of(3, 100ms, [](Transport& t) {
    if (t.rank() == 2) return std::this_thread::sleep_for(500ms);
    t.roll_call(7, "op 5");
  });
  EXPECT_THAT(errors[0], HasSubstr("op 5"));
  EXPECT_THAT(errors[0], HasSubstr("nothing from rank 2 within 0.1 s"));
}

// Who waits elsewhere asks, and is told at once.
TEST(InProcess, ACheckSeesWhoHasFailedOrLeft) {
  std::atomic<bool> left = false;
  const auto errors = errors_of(3, kLong, [&](Transport& t) {
    const std::array peers{1};
    if (t.rank() == 1) {
      t.barrier();
      left = true;
      return;
    }
    t.check(peers, "op 5");
    t.barrier();
    const std::array others{2 - t.rank()};
    while (true) {
      t.check(others, "op 5");  // rank 1 is none of its peers, so that it may leave
      if (left && t.rank() == 0) t.check(peers, "op 6");
      std::this_thread::yield();
    }
  });
  EXPECT_EQ(errors[0], "rank 0: op 6: rank 1 left before");
  EXPECT_EQ(errors[1], "");
  EXPECT_EQ(errors[2], "rank 2: op 5: rank 0 failed: op 6: rank 1 left before");
}

TEST(InProcess, ARankThatHangsIsNamed) {
  const auto began = std::chrono::steady_clock::now();
  std::atomic<int> failed{0};
  const auto errors = errors_of(4, 1s, [&](Transport& t) {
    if (t.rank() == 2) {
      while (failed.load() < 3) std::this_thread::sleep_for(10ms);
      return;
    }
    try {
      t.barrier([] { return std::string("rank 1 F3 layer 2 dispatch(F)"); });
    } catch (...) {
      ++failed;
      throw;
    }
  });
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
  EXPECT_GE(took.count(), 0.9);
  EXPECT_LT(took.count(), 10);
  // In the barrier rank 3 waits for 2 directly, ranks 0 and 1 for 2 or for 3, which waits for 2.
  for (const std::size_t rank : {0U, 1U, 3U}) {
    EXPECT_THAT(errors[rank], HasSubstr("rank 1 F3 layer 2 dispatch(F)")) << rank;
  }
  EXPECT_THAT(
      errors[3],
      testing::AnyOf("rank 3: rank 1 F3 layer 2 dispatch(F): nothing from rank 2 within 1 s",
                     HasSubstr("failed")));
}

TEST(InProcess, TimeOutNamesBothDirections) {
  std::atomic<bool> done{false};
  const auto errors = errors_of(4, 200ms, [&](Transport& t) {
    if (t.rank() > 0) {
      while (!done) std::this_thread::sleep_for(5ms);
      return;
    }
    std::array<std::byte, 3> bytes{};
    const auto large = filled(5000, 1);
    const std::array requests{t.post_receive(1, 7, std::span(bytes).first(1)),
                              t.post_receive(3, 7, std::span(bytes).last(1)),
                              t.post_send(2, 7, large)};
    try {
      t.wait_all(requests, "op 7");
    } catch (...) {
      done = true;
      throw;
    }
  });
  EXPECT_EQ(errors[0],
            "rank 0: op 7: nothing from ranks 1 and 3, and rank 2 has not taken what was sent "
            "within 0.2 s");
}

TEST(InProcess, ARankThatThrowsFailsTheOthersAtOnceInItsOwnWords) {
  const auto began = std::chrono::steady_clock::now();
  const auto errors = errors_of(4, 60s, [](Transport& t) {
    if (t.rank() == 2) throw std::runtime_error("GEMM: not a number in row 5");
    std::array<std::byte, 1> byte{};
    t.wait(t.post_receive((t.rank() + 1) % 4, 1, byte), "op 9");
  });
  EXPECT_LT(std::chrono::steady_clock::now() - began, 10s);
  for (const std::size_t rank : {0U, 1U, 3U}) {
    EXPECT_THAT(errors[rank],
                testing::StartsWith("rank " + std::to_string(rank) +
                                    ": op 9: rank 2 failed: GEMM: not a number in row 5"));
  }
  EXPECT_THROW(run_in_process(3, 60s,
                              [](Transport& t) {
                                if (t.rank() == 1) throw std::domain_error("boom");
                                t.barrier();
                              }),
               std::domain_error);
}

TEST(InProcess, ARankThatLeavesIsNoticedAtOnce) {
  const auto errors = errors_of(3, 60s, [](Transport& t) {
    std::array<std::byte, 1> byte{};
    if (t.rank() == 1) {
      t.wait(t.post_send(0, 1, byte), "send");  // is still received
      return;
    }
    if (t.rank() == 0) {
      std::this_thread::sleep_for(50ms);
      t.wait(t.post_receive(1, 1, byte), "first");
      t.wait(t.post_receive(1, 1, byte), "second");
    } else {
      t.wait(t.post_receive(0, 1, byte), "third");
    }
  });
  EXPECT_EQ(errors[0], "rank 0: second: nothing from rank 1: left before");
  EXPECT_THAT(errors[2],
              testing::StartsWith(
                  "rank 2: third: rank 0 failed: second: nothing from rank 1: left before"));
}

TEST(InProcess, RanksThatWaitForEachOtherSayForWhom) {
  // Rank 0 waits for 1, which waits for 2, which hangs. Rank 0 gives up first.
  std::atomic<int> failed{0};
  const auto errors = errors_of(3, 1s, [&](Transport& t) {
    if (t.rank() == 2) {
      while (failed.load() < 2) std::this_thread::sleep_for(5ms);
      return;
    }
    if (t.rank() == 1) std::this_thread::sleep_for(100ms);
    std::array<std::byte, 1> byte{};
    try {
      t.wait(t.post_receive(t.rank() + 1, 1, byte), "PP(F)");
    } catch (...) {
      ++failed;
      throw;
    }
  });
  EXPECT_EQ(errors[0], "rank 0: PP(F): nothing from rank 1 within 1 s");
  EXPECT_EQ(errors[1],
            "rank 1: PP(F): rank 0 failed: PP(F): nothing from rank 1 within 1 s; here: nothing "
            "from rank 2");
}

TEST(InProcessDeathTest, ARankThatNeverComesBackEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(run_in_process(3, 100ms,
                             [](Transport& t) {
                               if (t.rank() == 1) std::this_thread::sleep_for(1h);
                               t.barrier("end of a step");
                             }),
              testing::ExitedWithCode(1),
              "error: rank [02]: end of a step: nothing from rank [0-2].*\n.*rank 1 did not end");
}

TEST(InProcess, AfterAFailureNothingTouchesTheMemoryOfRequests) {
  // Rank 0's receive into memory that is given back right after the failure; rank 1 sends to it
  // later. AddressSanitizer would see the copy.
  std::atomic<bool> gone{false};
  const auto errors = errors_of(2, 100ms, [&](Transport& t) {
    if (t.rank() == 0) {
      std::vector<std::byte> into(100'000);
      const Request request = t.post_receive(1, 1, into);
      try {
        t.wait(request, "receive");
      } catch (...) {
        into = {};
        into.shrink_to_fit();
        gone = true;
        throw;
      }
      return;
    }
    while (!gone) std::this_thread::sleep_for(1ms);
    const auto bytes = filled(100'000, 1);
    t.wait(t.post_send(0, 1, bytes), "send");
  });
  EXPECT_EQ(errors[0], "rank 0: receive: nothing from rank 1 within 0.1 s");
  EXPECT_EQ(errors[1], "rank 1: send: rank 0 failed: receive: nothing from rank 1 within 0.1 s");
}

TEST(InProcess, AfterAFailureEverythingFails) {
  auto transports = make_in_process_transports(2, 10ms);
  std::vector<std::byte> small(1);
  std::vector<std::byte> large(5000);
  EXPECT_THROW(transports[0]->wait(transports[0]->post_receive(1, 1, small), "first"),
               TransportError);
  for (const auto& t : transports) {
    const int other = 1 - t->rank();
    const bool is_echo = t->rank() == 1;
    for (const Request request : {t->post_send(other, 2, small), t->post_send(other, 2, large),
                                  t->post_receive(other, 3, large)}) {
      try {
        t->wait(request, "later");
        ADD_FAILURE() << t->rank();
      } catch (const TransportError& error) {
        EXPECT_THAT(error.what(), HasSubstr("first: nothing from rank 1 within 0.01 s"));
        EXPECT_EQ(error.is_echo(), is_echo);
      }
    }
  }
}

TEST(InProcess, SizesThatDoNotFitAreAnError) {
  const auto errors = errors_of(2, 60s, [](Transport& t) {
    std::vector<std::byte> bytes(t.rank() == 0 ? 12 : 16);
    if (t.rank() == 0) {
      t.wait(t.post_send(1, 1, bytes), "send");
      t.barrier("end");
    } else {
      t.wait(t.post_receive(0, 1, bytes), "op 3");
    }
  });
  EXPECT_EQ(errors[1], "rank 1: op 3: rank 0 sent 12 bytes where 16 were expected");
  EXPECT_THAT(errors[0], HasSubstr("rank 1 failed: rank 0 sent 12 bytes where 16 were expected"));
}

TEST(ClockOffset, IsZeroOnOneMachine) {
  const MachineClock clock = monotonic_clock();
  EXPECT_GT(clock.identity.size(), 30U);  // a boot id
  run_in_process(3, kLong, [](Transport& t) { EXPECT_EQ(clock_offset_ns(t), 0); });
}

TEST(ClockOffset, OfOtherMachinesIsFoundWithinARoundTrip) {
  // Rank 1 reads rank 0's clock; ranks 2 and 3 are other machines, hours ahead and behind.
  const std::array<std::int64_t, 4> ahead{0, 0, 3'600'000'000'000, -7'200'000'000'000};
  run_in_process(4, kLong, [&](Transport& t) {
    const std::int64_t shift = ahead[static_cast<std::size_t>(t.rank())];
    const MachineClock real = monotonic_clock();
    const MachineClock clock{.identity = t.rank() < 2 ? "one" : std::to_string(t.rank()),
                             .now_ns = [&] { return real.now_ns() + shift; }};
    const std::int64_t before = real.now_ns();
    const std::int64_t offset = clock_offset_ns(t, clock);
    const std::int64_t took = real.now_ns() - before;
    if (t.rank() < 2) {
      EXPECT_EQ(offset, 0);
    } else {
      EXPECT_LE(std::abs(offset + shift), took);
    }
  });
}

TEST(Launched, IsReadOffTheEnvironment) {
  using Variables = std::map<std::string, const char*>;
  const auto by = [](const Variables& variables) {
    return launched_by([&](const char* name) {
      const auto found = variables.find(name);
      return found == variables.end() ? nullptr : found->second;
    });
  };
  EXPECT_EQ(by({}), std::nullopt);
  EXPECT_EQ(by({{"OMPI_COMM_WORLD_SIZE", "1"}}), std::nullopt);
  EXPECT_EQ(by({{"SLURM_NTASKS", "8"}}), std::nullopt);
  EXPECT_EQ(by({{"OMPI_COMM_WORLD_SIZE", "4"}}), "mpirun (OMPI_COMM_WORLD_SIZE=4)");
  EXPECT_EQ(by({{"SLURM_STEP_NUM_TASKS", "16"}}), "srun (SLURM_STEP_NUM_TASKS=16)");
}

TEST(Ranks, AreListed) {
  EXPECT_EQ(list_ranks(std::array{3}), "rank 3");
  EXPECT_EQ(list_ranks(std::array{1, 4}), "ranks 1 and 4");
  EXPECT_EQ(list_ranks(std::array{1, 4, 5}), "ranks 1, 4 and 5");
}

}  // namespace
}  // namespace orrery
