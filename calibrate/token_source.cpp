#include "calibrate/token_source.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <utility>

#include "sim/check.hpp"
#include "sim/random.hpp"

namespace orrery {
namespace {

/// Where `index` of `count` items stands in a random order. A Feistel network permutes the numbers
/// of an even number of bits whatever its round function is; those outside are walked on from until
/// one is inside, at most four times as many numbers as there are items, so a few steps on average
/// (Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002).
std::uint64_t shuffled(std::uint64_t index, std::uint64_t count, std::uint64_t seed,
                       std::uint64_t pass) {
  constexpr int kRounds = 6;
  const int half = std::max(1, (static_cast<int>(std::bit_width(count - 1)) + 1) / 2);
  const std::uint64_t mask = (std::uint64_t{1} << half) - 1;
  do {
    std::uint64_t left = index >> half;
    std::uint64_t right = index & mask;
    for (std::uint64_t round = 0; round < kRounds; ++round) {
      left ^= Random::of({seed, pass, round, right}).next() & mask;
      std::swap(left, right);
    }
    index = left << half | right;
  } while (index >= count);
  return index;
}

std::uint64_t number_of(const SequencePlan& plan, std::int64_t step, std::int64_t index) {
  ORRERY_CHECK(step >= 0 && index >= 0 && index < plan.per_step, "step {}, sequence {} of {}", step,
               index, plan.per_step);
  return static_cast<std::uint64_t>(step * plan.per_step + index);
}

std::vector<std::int32_t> sequence(const TextTokens& source, std::uint64_t number) {
  const auto windows = static_cast<std::uint64_t>(source.windows());
  const std::uint64_t window =
      shuffled(number % windows, windows, source.plan.seed, number / windows);
  const auto tokens = static_cast<std::size_t>(source.plan.tokens);
  std::vector<std::int32_t> out(tokens);
  for (std::size_t i = 0; i < tokens; ++i) {
    out[i] = static_cast<unsigned char>(source.text[window * tokens + i]);
  }
  return out;
}

std::vector<std::int32_t> sequence(const ZipfTokens& source, std::uint64_t number) {
  Random random = Random::of({source.plan.seed, number});
  std::vector<std::int32_t> out(static_cast<std::size_t>(source.plan.tokens));
  for (std::int32_t& token : out) {
    const auto at = std::upper_bound(source.up_to.begin(), source.up_to.end() - 1,
                                     random.uniform() * source.up_to.back());
    token = static_cast<std::int32_t>(at - source.up_to.begin());
  }
  return out;
}

void check(const SequencePlan& plan) {
  ORRERY_CHECK(plan.vocabulary > 0 && plan.tokens > 0 && plan.per_step > 0,
               "{} sequences of {} tokens out of {}", plan.per_step, plan.tokens, plan.vocabulary);
}

/// The first byte that is no token.
void check_bytes(const std::string& text, const std::string& path, std::int64_t vocabulary,
                 Problems& problems) {
  int line = 1;
  std::size_t line_begin = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const int byte = static_cast<unsigned char>(text[i]);
    if (byte >= vocabulary) {
      problems.add(Location{path, line, static_cast<int>(i - line_begin) + 1},
                   fmt::format("byte {} is not in a vocabulary of {}", byte, vocabulary),
                   "every byte is a token: with a vocabulary of 256, any text can be read");
      return;
    }
    if (text[i] == '\n') {
      ++line;
      line_begin = i + 1;
    }
  }
}

}  // namespace

std::optional<TokenSource> read_text_tokens(const SequencePlan& plan, const std::string& path,
                                            const Node& where, Problems& problems) {
  check(plan);
  const std::size_t before = problems.size();
  const auto report = [&](const std::string& message, const std::string& hint) {
    if (where.at().file.empty()) {
      problems.add(Location{path}, message, hint);
    } else {
      problems.add(where, fmt::format("text '{}': {}", path, message), hint);
    }
  };
  Problems reading;
  std::optional<std::string> text = read_text(path, reading);
  for (const Problem& problem : reading.list()) report(problem.message, problem.hint);
  if (!text) return std::nullopt;
  if (static_cast<std::int64_t>(text->size()) < plan.tokens) {
    report(fmt::format("{} bytes are less than a sequence of {} tokens", text->size(), plan.tokens),
           "a sequence takes sequence_length + 1 tokens, and one more for each MTP module");
  }
  check_bytes(*text, path, plan.vocabulary, problems);
  if (problems.size() != before) return std::nullopt;
  return TextTokens{plan, std::move(*text)};
}

TokenSource zipf_tokens(const SequencePlan& plan, double exponent) {
  check(plan);
  ZipfTokens source{plan, {}};
  double sum = 0;
  for (std::int64_t token = 0; token < plan.vocabulary; ++token) {
    sum += std::pow(static_cast<double>(token + 1), -exponent);
    source.up_to.push_back(sum);
  }
  for (double& p : source.up_to) p /= sum;
  return source;
}

std::vector<std::int32_t> sequence_of(const TokenSource& source, std::int64_t step,
                                      std::int64_t index) {
  return std::visit(
      [&](const auto& tokens) { return sequence(tokens, number_of(tokens.plan, step, index)); },
      source);
}

}  // namespace orrery
