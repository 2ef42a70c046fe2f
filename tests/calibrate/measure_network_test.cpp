#include "calibrate/measure_network.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "tests/calibrate/measured_points.hpp"

namespace orrery {
namespace {

using namespace std::chrono_literals;

TEST(MeasureNetwork, MeasuresEveryOperationOnEveryGroupOnRankZero) {
  run_in_process(4, 60s, [](Transport& t) {
    const auto points = measure_network(t, quick_measurement());
    expect_all_of_four_ranks(t, points);
  });
}

TEST(MeasureNetwork, LeavesOutGroupsThatDoNotDivideAndRoundsSizes) {
  run_in_process(3, 60s, [](Transport& t) {
    for (const NetworkPoint& point : measure_network(t, quick_measurement())) {
      EXPECT_EQ(point.members, 3);
      EXPECT_EQ(point.bytes % 48, 0);
      EXPECT_GT(point.bytes, 200);
    }
  });
}

/// Waits take this long on one rank.
class Slow final : public Transport {
 public:
  Slow(Transport& inner, std::chrono::nanoseconds delay)
      : Transport(inner.rank(), inner.ranks(), inner.timeout()), inner_(inner), delay_(delay) {}
  Request post_send(int to, std::uint64_t tag, std::span<const std::byte> b) override {
    return inner_.post_send(to, tag, b);
  }
  Request post_receive(int from, std::uint64_t tag, std::span<std::byte> b) override {
    return inner_.post_receive(from, tag, b);
  }
  void wait_all(std::span<const Request> requests, OpName op) override {
    if (op.str() == "measuring") std::this_thread::sleep_for(delay_);
    inner_.wait_all(requests, op);
  }
  void check(std::span<const int> peers, OpName op) override { inner_.check(peers, op); }
  void abort(const std::string& why) override { inner_.abort(why); }

 private:
  Transport& inner_;
  std::chrono::nanoseconds delay_;
};

TEST(MeasureNetwork, TheSlowestMemberCounts) {
  run_in_process(2, 60s, [](Transport& t) {
    Slow slow(t, t.rank() == 1 ? 4ms : 0ms);
    auto options = quick_measurement();
    options.most_bytes = 256;
    for (const NetworkPoint& point : measure_network(slow, options)) {
      // One wait, or two where sums come back. The delay is a lower bound, and most of it.
      const double waits = point.op == NcclOp::all_reduce ? 2 : 1;
      EXPECT_GE(point.seconds.median, waits * 3.9e-3) << name_of(point.op);
      EXPECT_LE(point.seconds.median, waits * 4e-3 + 20e-3) << name_of(point.op);
    }
  });
}

TEST(MeasureNetwork, CopiesAtSomeRate) {
  run_in_process(2, 60s, [](Transport& t) {
    const double rate = measure_copy_rate(t);
    if (t.rank() == 0) {
      EXPECT_GT(rate, 1e8);
      EXPECT_LT(rate, 1e12);
    } else {
      EXPECT_EQ(rate, 0);
    }
  });
}

}  // namespace
}  // namespace orrery
