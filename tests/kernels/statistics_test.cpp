#include "kernels/statistics.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace orrery {
namespace {

TEST(Statistics, MedianOfOddAndEvenCounts) {
  EXPECT_DOUBLE_EQ(median({3}), 3);
  EXPECT_DOUBLE_EQ(median({9, 1, 5}), 5);
  EXPECT_DOUBLE_EQ(median({8, 2, 4, 100}), 6);
}

TEST(Statistics, OneOutlierMovesNeitherMedianNorMad) {
  // Distances from 3: 2, 1, 0, 1, 997.
  const Summary s = summarise_samples({1, 2, 3, 4, 1000});
  EXPECT_DOUBLE_EQ(s.median, 3);
  EXPECT_DOUBLE_EQ(s.mad, 1);
  EXPECT_EQ(s.samples, 5u);
}

/// Half of the samples 1 - spread, half 1 + spread: median 1, MAD `spread`.
std::vector<double> two_values(std::size_t count, double spread) {
  std::vector<double> samples;
  for (std::size_t i = 0; i < count; ++i) samples.push_back(1 + (i % 2 == 0 ? spread : -spread));
  return samples;
}

TEST(Statistics, StopsAtTheWantedError) {
  // Error of the median = 1.4826 * 1.2533 * MAD / sqrt(n) = 1.8582 MAD / sqrt(n); 0.001 is wanted.
  // n = 100: MAD 0.001 / 1.8582 * 10 = 0.005382.
  EXPECT_TRUE(enough_samples(two_values(100, 0.0053)));
  EXPECT_FALSE(enough_samples(two_values(100, 0.0055)));
  // n = 20: 0.001 / 1.8582 * 4.4721 = 0.002407.
  EXPECT_TRUE(enough_samples(two_values(20, 0.0024)));
  EXPECT_FALSE(enough_samples(two_values(20, 0.0025)));
}

TEST(Statistics, TakesTwentySamplesAtLeastAndThreeHundredAtMost) {
  EXPECT_FALSE(enough_samples(std::vector<double>(19, 1.0)));
  EXPECT_TRUE(enough_samples(std::vector<double>(20, 1.0)));
  EXPECT_FALSE(enough_samples(two_values(298, 0.5)));
  EXPECT_TRUE(enough_samples(two_values(300, 0.5)));
}

TEST(Statistics, TheRuleCanBeAnother) {
  const StoppingRule rule{.min_samples = 4, .max_samples = 8, .wanted_error = 0.01};
  EXPECT_FALSE(enough_samples({1, 1, 1}, rule));
  EXPECT_TRUE(enough_samples({1, 1, 1, 1}, rule));
  // n = 4: MAD 0.01 / 1.8582 * 2 = 0.01076.
  EXPECT_TRUE(enough_samples(two_values(4, 0.0107), rule));
  EXPECT_FALSE(enough_samples(two_values(4, 0.0108), rule));
  EXPECT_TRUE(enough_samples(two_values(8, 0.5), rule));
}

TEST(Statistics, TheErrorOfTheMedianIsWhatRepetitionsShow) {
  // 2000 medians of 25 normal samples of mean 10 and standard deviation 1: the medians scatter as
  // the formula says, on average over the samples' own MADs.
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal(10, 1);
  double foretold = 0;
  double sum = 0;
  double squares = 0;
  const int repetitions = 2000;
  for (int r = 0; r < repetitions; ++r) {
    std::vector<double> samples(25);
    for (double& s : samples) s = normal(random);
    const Summary summary = summarise_samples(samples);
    foretold += median_error(summary) * summary.median / repetitions;
    sum += summary.median / repetitions;
    squares += summary.median * summary.median / repetitions;
  }
  const double seen = std::sqrt(squares - sum * sum);
  EXPECT_NEAR(foretold / seen, 1, 0.08);
}

}  // namespace
}  // namespace orrery
