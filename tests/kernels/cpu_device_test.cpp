#include "kernels/cpu/cpu_device.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <ctime>
#include <future>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

namespace orrery::kernels {
namespace {

std::int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * std::int64_t{1'000'000'000} + now.tv_nsec;
}

/// Blocks a stream until opened.
struct Gate {
  std::promise<void> promise;
  std::shared_future<void> future = promise.get_future().share();
  void open() { promise.set_value(); }
  std::function<void()> work() {
    return [waits = future] { waits.wait(); };
  }
};

TEST(CpuDevice, NamesItselfAndItsThreads) {
  CpuDevice one(1);
  EXPECT_EQ(one.sms(), 1);
  EXPECT_NE(one.name().find(", 1 thread"), std::string::npos) << one.name();
  EXPECT_GE(open_cpu_device()->sms(), 1);
}

TEST(CpuDevice, MemoryIsAlignedAndComesBackAsItWas) {
  CpuDevice device(1);
  std::vector<void*> all;
  for (const std::size_t bytes : {0, 1, 255, 256, 257, 100'000}) {
    void* memory = device.allocate(bytes);
    ASSERT_NE(memory, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 256, 0u);
    std::vector<unsigned char> in(bytes);
    std::iota(in.begin(), in.end(), static_cast<unsigned char>(1));
    std::vector<unsigned char> out(bytes);
    device.upload(memory, in.data(), bytes);
    device.download(out.data(), memory, bytes);
    EXPECT_EQ(in, out);
    all.push_back(memory);
  }
  for (void* memory : all) device.release(memory);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // these end the program
  EXPECT_THROW(device.allocate(std::size_t{1} << 60), std::bad_alloc);
#endif
}

TEST(CpuDevice, AStreamRunsInOrder) {
  CpuDevice device(2);
  const StreamHandle stream = device.create_stream();
  std::vector<int> seen;
  std::vector<int> expected(5000);
  std::iota(expected.begin(), expected.end(), 0);
  for (const int i : expected) device.enqueue_host(stream, [&seen, i] { seen.push_back(i); });
  device.synchronize();
  EXPECT_EQ(seen, expected);
}

TEST(CpuDevice, KernelsAndHostWorkShareTheOrder) {
  CpuDevice device(2);
  const StreamHandle stream = device.create_stream();
  auto* bytes = static_cast<unsigned char*>(device.allocate(1000));
  std::memset(bytes, 7, 1000);
  int sum_before = 0;
  int sum_after = 0;
  const auto add_up = [bytes](int& sum) {
    return [bytes, &sum] { sum = std::accumulate(bytes, bytes + 1000, 0); };
  };
  device.enqueue_host(stream, add_up(sum_before));
  device.enqueue(stream, Fill{.data = bytes, .bytes = 999}, 0);
  device.enqueue_host(stream, add_up(sum_after));
  device.enqueue(stream, Fill{.data = bytes, .bytes = 1000}, 1);
  device.synchronize();
  EXPECT_EQ(sum_before, 7000);
  EXPECT_EQ(sum_after, 7);
  EXPECT_EQ(bytes[999], 0);
  device.release(bytes);
}

TEST(CpuDevice, StreamsRunBesideEachOther) {
  CpuDevice device(1);
  const StreamHandle a = device.create_stream();
  const StreamHandle b = device.create_stream();
  // Each waits for the other to have begun.
  Gate a_began;
  Gate b_began;
  device.enqueue_host(a, [&] {
    a_began.open();
    b_began.future.wait();
  });
  device.enqueue_host(b, [&] {
    b_began.open();
    a_began.future.wait();
  });
  device.synchronize();
}

TEST(CpuDevice, AStreamWaitsForAnEventOfAnother) {
  CpuDevice device(1);
  const StreamHandle a = device.create_stream();
  const StreamHandle b = device.create_stream();
  const EventHandle event = device.create_event();
  Gate gate;
  int value = 0;
  int seen = -1;
  device.enqueue_host(a, gate.work());
  device.enqueue_host(a, [&] { value = 5; });
  device.record(a, event);
  device.wait(b, event);
  std::atomic<bool> ran = false;
  device.enqueue_host(b, [&] {
    seen = value;
    ran = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(ran);
  gate.open();
  device.synchronize();
  EXPECT_EQ(seen, 5);
}

TEST(CpuDevice, WhatNothingHasRecordedIsNotWaitedFor) {
  CpuDevice device(1);
  const StreamHandle stream = device.create_stream();
  const EventHandle event = device.create_event();
  EXPECT_THROW(device.wait(stream, event), std::logic_error);
  device.record(stream, event);
  device.synchronize();
  // Recorded before the last synchronize(): reached. Recording it behind the wait is no deadlock.
  Gate gate;
  device.enqueue_host(stream, gate.work());
  device.wait(stream, event);
  device.record(stream, event);
  gate.open();
  device.synchronize();
  EXPECT_THROW(device.enqueue_host({7}, [] {}), std::out_of_range);
  EXPECT_THROW(device.record(stream, {7}), std::out_of_range);
}

TEST(CpuDevice, EventsTellWhenTheyWereReached) {
  CpuDevice device(1);
  const StreamHandle stream = device.create_stream();
  const EventHandle first = device.create_event();
  const EventHandle second = device.create_event();
  for (int round = 0; round < 3; ++round) {
    const std::int64_t before = now_ns();
    device.record(stream, first);
    device.enqueue_host(stream, [] { std::this_thread::sleep_for(std::chrono::milliseconds(5)); });
    device.record(stream, second);
    device.synchronize();
    EXPECT_GE(device.reached_ns(first), before);
    EXPECT_GE(device.reached_ns(second), device.reached_ns(first) + 5'000'000);
    EXPECT_LE(device.reached_ns(second), now_ns());
  }
}

/// A random schedule: op i runs on a stream and waits for some ops before it. Each notes that all
/// it depends on were done.
TEST(CpuDevice, ManyEventsBetweenManyStreams) {
  constexpr int kStreams = 6;
  constexpr int kOps = 3000;
  CpuDevice device(2);
  std::mt19937 random(3);
  std::vector<StreamHandle> streams;
  for (int i = 0; i < kStreams; ++i) streams.push_back(device.create_stream());
  std::vector<EventHandle> events;
  for (int i = 0; i < kOps; ++i) events.push_back(device.create_event());
  for (int round = 0; round < 3; ++round) {
    // Plain ints: the device has to order what touches them, which ThreadSanitizer checks.
    std::vector<int> done(kOps, 0);
    std::vector<int> missing(kOps, 0);
    for (int i = 0; i < kOps; ++i) {
      const StreamHandle stream = streams[random() % kStreams];
      std::vector<int> needed;
      for (int n = 0; n < 2 && i > 0; ++n) {
        const int back = 1 + static_cast<int>(random() % 20);
        if (back <= i) needed.push_back(i - back);
      }
      for (const int n : needed) device.wait(stream, events[static_cast<std::size_t>(n)]);
      device.enqueue_host(stream, [i, needed, &done, &missing] {
        for (const int n : needed) {
          missing[static_cast<std::size_t>(i)] += 1 - done[static_cast<std::size_t>(n)];
        }
        done[static_cast<std::size_t>(i)] = 1;
      });
      device.record(stream, events[static_cast<std::size_t>(i)]);
    }
    device.synchronize();
    EXPECT_EQ(std::accumulate(done.begin(), done.end(), 0), kOps);
    EXPECT_EQ(std::accumulate(missing.begin(), missing.end(), 0), 0);
  }
}

TEST(CpuDevice, AnErrorStopsAllStreamsAndIsThrownOnce) {
  CpuDevice device(2);
  const StreamHandle a = device.create_stream();
  const StreamHandle b = device.create_stream();
  const EventHandle never = device.create_event();
  const EventHandle behind = device.create_event();
  std::atomic<bool> ran = false;
  for (int round = 0; round < 20; ++round) {
    Gate gate;
    device.enqueue_host(a, gate.work());
    device.enqueue_host(a, [] { throw std::runtime_error("the dog ate it"); });
    device.record(a, never);
    device.wait(b, never);  // would wait for ever
    device.enqueue_host(b, [&] { ran = true; });
    device.record(b, behind);
    gate.open();
    try {
      device.synchronize();
      FAIL() << "nothing thrown";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "the dog ate it");
    }
    EXPECT_FALSE(ran);
    EXPECT_EQ(device.reached_ns(never), 0);
    EXPECT_EQ(device.reached_ns(behind), 0);
    device.synchronize();  // the error is gone
    bool again = false;
    device.record(a, never);
    device.wait(b, never);
    device.enqueue_host(b, [&] { again = true; });
    device.synchronize();
    EXPECT_TRUE(again);
  }
}

TEST(CpuDevice, OfTwoErrorsTheFirstIsThrown) {
  CpuDevice device(1);
  const StreamHandle a = device.create_stream();
  device.enqueue_host(a, [] { throw std::runtime_error("first"); });
  device.enqueue_host(a, [] { throw std::runtime_error("second"); });
  EXPECT_THROW(
      {
        try {
          device.synchronize();
        } catch (const std::runtime_error& error) {
          EXPECT_STREQ(error.what(), "first");
          throw;
        }
      },
      std::runtime_error);
  device.synchronize();
}

TEST(CpuDevice, WorkThatHasNotBegunEndsWithTheDevice) {
  std::atomic<int> ran = 0;
  {
    CpuDevice device(1);
    const StreamHandle a = device.create_stream();
    const StreamHandle b = device.create_stream();
    const EventHandle event = device.create_event();
    std::promise<void> began;
    device.enqueue_host(a, [&] {
      began.set_value();
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      ++ran;
    });
    device.enqueue_host(a, [&] { ++ran; });
    device.record(a, event);
    device.wait(b, event);
    device.enqueue_host(b, [&] { ++ran; });
    began.get_future().wait();
  }
  EXPECT_EQ(ran, 1);
}

TEST(CpuDevice, FlushesItsCacheInOrder) {
  CpuDevice device(2);
  const StreamHandle stream = device.create_stream();
  const EventHandle before = device.create_event();
  const EventHandle after = device.create_event();
  device.record(stream, before);
  device.flush_cache(stream);
  device.record(stream, after);
  device.synchronize();
  EXPECT_GT(device.reached_ns(after), device.reached_ns(before));
}

}  // namespace
}  // namespace orrery::kernels
