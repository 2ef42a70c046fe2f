#include "calibrate/transport/collectives.hpp"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <random>
#include <thread>

#include "kernels/format.hpp"
#include "tests/calibrate/collective_checks.hpp"

namespace orrery {
namespace {

using namespace std::chrono_literals;
using collective_checks::bytes;

constexpr auto kLong = 60s;

TEST(Parts, CoverEverythingEvenly) {
  for (const std::size_t elements : {0, 1, 5, 16, 1001}) {
    for (std::size_t members = 1; members <= 8; ++members) {
      std::size_t end = 0;
      for (std::size_t m = 0; m < members; ++m) {
        const Part part = part_of(elements, m, members);
        EXPECT_EQ(part.begin, end);
        end = part.end;
        EXPECT_LE(part.end - part.begin, (elements + members - 1) / members);
        EXPECT_GE(part.end - part.begin, elements / members);
      }
      EXPECT_EQ(end, elements);
    }
  }
}

TEST(Collectives, GiveClosedFormsAndPlainLoopsOnOneToEightRanks) {
  for (int ranks = 1; ranks <= 8; ++ranks) {
    SCOPED_TRACE(ranks);
    EXPECT_NO_THROW(run_in_process(ranks, kLong, [](Transport& t) {
      collective_checks::check_all(t, {0, 1, 3, 7, 513, 2048, 5003});
    }));
  }
}

TEST(Collectives, OfSeveralChunks) {
  // Shards of 1.2 and 2.4 MB, of which a megabyte is summed at a time.
  EXPECT_NO_THROW(run_in_process(2, kLong, [](Transport& t) {
    const std::array group{0, 1};
    collective_checks::check_sums<collective_checks::Fp32>(
        {.transport = t, .group = group, .tag = 1, .name = "chunks"},
        static_cast<std::size_t>(t.rank()), 600'001);
  }));
}

TEST(Collectives, SumInTheOrderOfTheGroup) {
  // ((1e8 + 1) - 1e8) is 0 in FP32 while ((1e8 - 1e8) + 1) is 1.
  const std::array held{1e8F, 1.0F, -1e8F};
  for (const auto& [group, wanted] :
       {std::pair{std::array{0, 1, 2}, 0.0F}, std::pair{std::array{0, 2, 1}, 1.0F},
        std::pair{std::array{2, 0, 1}, 1.0F}}) {
    run_in_process(3, kLong, [&, group = group, wanted = wanted](Transport& t) {
      std::vector<float> value{held[static_cast<std::size_t>(t.rank())]};
      all_reduce({.transport = t, .group = group, .tag = 1, .name = "order"}, ElementType::fp32,
                 bytes(value));
      EXPECT_EQ(value[0], wanted);
    });
  }
}

TEST(Collectives, RoundBf16OnceAndAsTheKernelsDo) {
  // 256 + 1 + 1: rounded after each addition it stays 256 (ties to even), once it is 258.
  std::vector<std::uint16_t> a{kernels::bf16_of(256)};
  std::vector<std::uint16_t> one{kernels::bf16_of(1)};
  const auto byte = [](std::vector<std::uint16_t>& v) {
    return reinterpret_cast<const std::byte*>(v.data());
  };
  std::vector<std::uint16_t> sum(1);
  sum_in_order(ElementType::bf16, std::array{byte(a), byte(one), byte(one)},
               reinterpret_cast<std::byte*>(sum.data()), 1);
  EXPECT_EQ(kernels::float_of_bf16(sum[0]), 258);

  // Sums of two of all kinds of codes, infinities and NaN among them.
  std::mt19937 random(5);
  std::vector<std::uint16_t> x(100'000);
  std::vector<std::uint16_t> y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<std::uint16_t>(random());
    y[i] = static_cast<std::uint16_t>(i % 3 == 0 ? x[i] ^ (random() & 0x83) : random());
  }
  std::vector<std::uint16_t> sums(x.size());
  sum_in_order(ElementType::bf16, std::array{byte(x), byte(y)},
               reinterpret_cast<std::byte*>(sums.data()), x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float wanted = kernels::float_of_bf16(x[i]) + kernels::float_of_bf16(y[i]);
    if (std::isnan(wanted)) {
      EXPECT_TRUE(std::isnan(kernels::float_of_bf16(sums[i])));
    } else {
      ASSERT_EQ(sums[i], kernels::bf16_of(wanted)) << i;
    }
  }
}

/// Counts what goes through it.
class Counting final : public Transport {
 public:
  explicit Counting(Transport& inner)
      : Transport(inner.rank(), inner.ranks(), inner.timeout()), inner_(inner) {}
  Request post_send(int to, std::uint64_t tag, std::span<const std::byte> b) override {
    sent += b.size();
    return inner_.post_send(to, tag, b);
  }
  Request post_receive(int from, std::uint64_t tag, std::span<std::byte> b) override {
    received += b.size();
    return inner_.post_receive(from, tag, b);
  }
  void wait_all(std::span<const Request> requests, OpName op) override {
    inner_.wait_all(requests, op);
  }
  void check(std::span<const int> peers, OpName op) override { inner_.check(peers, op); }
  void abort(const std::string& why) override { inner_.abort(why); }
  std::size_t sent = 0;
  std::size_t received = 0;

 private:
  Transport& inner_;
};

TEST(Collectives, MoveTheBytesThatRingsMove) {
  constexpr std::size_t kEach = 60'000;  // bytes, for each of 5
  constexpr std::size_t kWhole = 5 * kEach;
  const std::array group{0, 1, 2, 3, 4};
  run_in_process(5, kLong, [&](Transport& inner) {
    std::vector<std::byte> whole(kWhole);
    const std::vector<std::uint64_t> even(5, kEach);
    const auto moved = [&](const auto& run) {
      Counting t(inner);
      run(GroupOp{.transport = t, .group = group, .tag = 1, .name = "volume"});
      return std::pair(t.sent, t.received);
    };
    const std::pair once{kWhole * 4 / 5, kWhole * 4 / 5};
    std::vector<std::byte> own(kEach);
    std::vector<std::byte> other(kWhole);
    EXPECT_EQ(moved([&](const GroupOp& op) { all_reduce(op, ElementType::fp32, whole); }),
              std::pair(2 * once.first, 2 * once.second));
    EXPECT_EQ(moved([&](const GroupOp& op) { reduce_scatter(op, ElementType::fp32, whole, own); }),
              once);
    EXPECT_EQ(moved([&](const GroupOp& op) { all_gather(op, own, whole); }), once);
    EXPECT_EQ(moved([&](const GroupOp& op) { all_to_all(op, whole, even, other, even); }), once);
    const auto [sent, received] = moved([&](const GroupOp& op) { broadcast(op, 2, whole); });
    EXPECT_LE(sent, 2 * once.first);
    EXPECT_EQ(received, inner.rank() == 2 ? 0 : kWhole);
  });
}

TEST(Collectives, OfSeveralThreadsOfARankDoNotMix) {
  run_in_process(4, kLong, [](Transport& t) {
    std::vector<std::thread> threads;
    for (std::uint64_t thread = 0; thread < 3; ++thread) {
      threads.emplace_back([&t, thread] {
        const std::array group{0, 1, 2, 3};
        for (std::uint64_t step = 0; step < 20; ++step) {
          std::vector<double> sum(1000, static_cast<double>(thread * 100 + step));
          all_reduce({.transport = t,
                      .group = group,
                      .tag = tag_of(step, OpId(static_cast<std::size_t>(thread))),
                      .name = "threads"},
                     ElementType::fp64, bytes(sum));
          EXPECT_EQ(sum, std::vector<double>(1000, 4.0 * static_cast<double>(thread * 100 + step)));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  });
}

TEST(Collectives, FailWithTheNameOfARankThatStopsInTheMiddle) {
  // Rank 1 takes part in the first and not in the second.
  const auto began = std::chrono::steady_clock::now();
  std::atomic<int> failed{0};
  std::array<std::string, 3> errors;
  const auto body = [&](Transport& t) {
    const std::array group{0, 1, 2};
    std::vector<float> buffer(100'000, 1);
    const auto reduce = [&](std::uint64_t tag) {
      all_reduce({.transport = t, .group = group, .tag = tag, .name = "gradients of layer 4"},
                 ElementType::fp32, bytes(buffer));
    };
    reduce(1);
    if (t.rank() == 1) {
      while (failed.load() < 2) std::this_thread::sleep_for(5ms);
      return;
    }
    try {
      reduce(2);
    } catch (const TransportError& error) {
      errors[static_cast<std::size_t>(t.rank())] = error.what();
      ++failed;
      throw;
    }
  };
  EXPECT_THROW(run_in_process(3, 1s, body), TransportError);
  EXPECT_LT(std::chrono::steady_clock::now() - began, 20s);
  for (const std::size_t rank : {0U, 2U}) {
    EXPECT_NE(errors[rank].find("gradients of layer 4: nothing from rank 1, and rank 1 has not "
                                "taken what was sent within 1 s"),
              std::string::npos)
        << errors[rank];
  }
}

}  // namespace
}  // namespace orrery
