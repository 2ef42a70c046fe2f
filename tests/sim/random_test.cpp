#include "sim/random.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace orrery {
namespace {

// First outputs of SplitMix64 for the seed 1234567, as its reference implementation by S. Vigna
// (prng.di.unimi.it/splitmix64.c) is published to give them.
TEST(Random, IsSplitMix64) {
  Random random(1234567);
  EXPECT_EQ(random.next(), 6457827717110365317U);
  EXPECT_EQ(random.next(), 3203168211198807973U);
  EXPECT_EQ(random.next(), 9817491932198370423U);
}

TEST(Random, KeysMakeGeneratorsOfTheirOwn) {
  EXPECT_EQ(Random::of({1, 2, 3}).next(), Random::of({1, 2, 3}).next());
  EXPECT_NE(Random::of({1, 2, 3}).next(), Random::of({1, 3, 2}).next());
  EXPECT_NE(Random::of({1, 2, 3}).next(), Random::of({1, 2}).next());
  EXPECT_NE(Random::of({0, 0}).next(), Random::of({0}).next());
}

/// Mean and variance of many draws, within 5 standard errors of what they should be.
template <class Draw>
void expect_moments(Draw draw, double mean, double variance) {
  constexpr int kDraws = 20000;
  double sum = 0;
  double squares = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double x = draw();
    sum += x;
    squares += (x - mean) * (x - mean);
  }
  EXPECT_NEAR(sum / kDraws, mean, 5 * std::sqrt(variance / kDraws));
  EXPECT_NEAR(squares / kDraws, variance, 5 * variance * std::sqrt(3.0 / kDraws));
}

TEST(Random, HasTheMomentsOfItsDistributions) {
  Random random(42);
  expect_moments([&] { return random.uniform(); }, 0.5, 1.0 / 12);
  expect_moments([&] { return random.normal(); }, 0, 1);
  // Fourth moments are larger than a normal's, hence more room than five standard errors of one.
  expect_moments([&] { return random.exponential() / 2; }, 0.5, 0.25);
  for (const double shape : {1.0, 2.5, 54.0, 4342.0}) {
    expect_moments([&, shape] { return random.gamma(shape); }, shape, shape);
  }
  for (const auto& [n, p] : {std::pair<std::int64_t, double>{10, 0.3},
                             {1000, 0.004},
                             {5000, 0.2},
                             {40, 0.9},
                             {3, 0.5},
                             {2'000'000, 0.003}}) {
    const auto trials = static_cast<double>(n);
    expect_moments(
        [&, count = n, share = p] { return static_cast<double>(random.binomial(count, share)); },
        trials * p, trials * p * (1 - p));
  }
}

// Of shape 1 it is the exponential, of shape 2 the sum of two: P(X > 2) = exp(-2) (1 + 2).
TEST(Random, GammasOfWholeShapesHaveTheirTails) {
  Random random(7);
  constexpr int kDraws = 100000;
  int one = 0;
  int two = 0;
  for (int i = 0; i < kDraws; ++i) {
    one += random.gamma(1) > 2 ? 1 : 0;
    two += random.gamma(2) > 2 ? 1 : 0;
  }
  const double tail = std::exp(-2.0);
  EXPECT_NEAR(one / double{kDraws}, tail, 5 * std::sqrt(tail * (1 - tail) / kDraws));
  EXPECT_NEAR(two / double{kDraws}, 3 * tail, 5 * std::sqrt(3 * tail * (1 - 3 * tail) / kDraws));
}

// Against the probabilities themselves, where draws are exact.
TEST(Random, SmallBinomialsAreExact) {
  Random random(5);
  constexpr int kDraws = 100000;
  std::vector<int> seen(6, 0);
  for (int i = 0; i < kDraws; ++i) ++seen[static_cast<std::size_t>(random.binomial(5, 0.3))];
  const double choose[] = {1, 5, 10, 10, 5, 1};
  for (int k = 0; k <= 5; ++k) {
    const double p = choose[k] * std::pow(0.3, k) * std::pow(0.7, 5 - k);
    EXPECT_NEAR(seen[static_cast<std::size_t>(k)] / double{kDraws}, p,
                5 * std::sqrt(p * (1 - p) / kDraws));
  }
  EXPECT_EQ(random.binomial(0, 0.5), 0);
  EXPECT_EQ(random.binomial(7, 0), 0);
  EXPECT_EQ(random.binomial(7, 1), 7);
}

}  // namespace
}  // namespace orrery
