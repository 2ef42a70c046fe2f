#pragma once
// Seeded random numbers that are the same with every compiler and standard library, which those of
// <random>'s distributions are not.

#include <cmath>
#include <cstdint>
#include <initializer_list>

namespace orrery {

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
/// Cheap to seed, so that every item of a large set can have a generator of its own, and what is
/// drawn for one item does not depend on what was drawn for others.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  /// A generator for the item that the keys name.
  static Random of(std::initializer_list<std::uint64_t> keys) {
    Random mixed(0);
    for (const std::uint64_t key : keys) mixed = Random(mixed.next() ^ key);
    mixed.next();
    return mixed;
  }

  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15U);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }

  /// In (0, 1), never 0 or 1.
  double uniform() { return (static_cast<double>(next() >> 11) + 0.5) * 0x1p-53; }

  /// In [0, count).
  std::uint64_t below(std::uint64_t count) {
    return static_cast<std::uint64_t>(uniform() * static_cast<double>(count));
  }

  /// Standard normal (Box and Muller 1958; the second of each pair is kept).
  double normal() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    const double radius = std::sqrt(-2 * std::log(uniform()));
    const double angle = 6.283185307179586 * uniform();
    spare_ = radius * std::sin(angle);
    has_spare_ = true;
    return radius * std::cos(angle);
  }

  /// Exponential with mean 1.
  double exponential() { return -std::log(uniform()); }

  /// Gamma with scale 1; shape at least 1 (Marsaglia and Tsang, ACM TOMS 26, 2000).
  double gamma(double shape) {
    const double d = shape - 1.0 / 3;
    const double c = 1 / std::sqrt(9 * d);
    while (true) {
      const double x = normal();
      const double root = 1 + c * x;
      if (root <= 0) continue;
      const double v = root * root * root;
      if (std::log(uniform()) < 0.5 * x * x + d - d * v + d * std::log(v)) return d * v;
    }
  }

  /// Successes of `trials` independent trials. Where both outcomes are expected 32 times or more,
  /// the rounded normal approximation (its distribution function is within 0.02 of the binomial's
  /// there); else by inversion, exactly.
  std::int64_t binomial(std::int64_t trials, double probability) {
    if (trials <= 0 || probability <= 0) return 0;
    if (probability >= 1) return trials;
    if (probability > 0.5) return trials - binomial(trials, 1 - probability);
    const auto n = static_cast<double>(trials);
    const double mean = n * probability;
    if (mean >= 32) {
      const double draw = std::nearbyint(mean + std::sqrt(mean * (1 - probability)) * normal());
      return static_cast<std::int64_t>(draw < 0 ? 0 : draw > n ? n : draw);
    }
    double left = uniform();
    double mass = std::exp(n * std::log1p(-probability));
    const double odds = probability / (1 - probability);
    std::int64_t k = 0;
    while (left > mass && k < trials) {
      left -= mass;
      mass *= odds * static_cast<double>(trials - k) / static_cast<double>(k + 1);
      ++k;
    }
    return k;
  }

 private:
  std::uint64_t state_;
  double spare_ = 0;
  bool has_spare_ = false;
};

}  // namespace orrery
