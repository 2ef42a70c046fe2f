#include "calibrate/token_source.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <fstream>
#include <set>
#include <string>
#include <vector>

namespace orrery {
namespace {

const std::string kAlice = std::string(ORRERY_SOURCE_DIR) + "/scenarios/texts/alice.txt";

std::string as_text(const std::vector<std::int32_t>& tokens) {
  std::string text;
  for (const std::int32_t token : tokens) text.push_back(static_cast<char>(token));
  return text;
}

/// The 148,476 bytes of the text are 1142 windows of 130 and 16 bytes more.
TEST(TextTokens, EachPassIsAllWindowsInAnotherOrder) {
  Problems problems;
  const SequencePlan plan = {.vocabulary = 128, .tokens = 130, .per_step = 571, .seed = 7};
  const auto source = read_text_tokens(plan, kAlice, Node(), problems);
  ASSERT_EQ(format_problems(problems.list()), "");
  std::ifstream in(kAlice, std::ios::binary);
  std::set<std::string> windows;
  std::vector<char> buffer(130);
  while (in.read(buffer.data(), 130)) windows.insert(std::string(buffer.begin(), buffer.end()));
  ASSERT_EQ(windows.size(), 1142U);
  std::vector<std::string> passes[2];
  for (std::int64_t step = 0; step < 4; ++step) {
    for (std::int64_t i = 0; i < 571; ++i) {
      passes[step / 2].push_back(as_text(sequence_of(*source, step, i)));
    }
  }
  for (const std::vector<std::string>& pass : passes) {
    EXPECT_EQ(std::set<std::string>(pass.begin(), pass.end()), windows);
  }
  EXPECT_NE(passes[0], passes[1]);
  // In order, nearly all windows would be followed by their neighbour.
  std::string text;
  for (const std::string& window : passes[0]) text += window;
  std::ifstream again(kAlice, std::ios::binary);
  const std::string all((std::istreambuf_iterator<char>(again)), {});
  int in_order = 0;
  for (std::size_t i = 0; i + 1 < passes[0].size(); ++i) {
    if (all.find(passes[0][i] + passes[0][i + 1]) != std::string::npos) ++in_order;
  }
  EXPECT_LT(in_order, 10);  // one is expected
}

TEST(TextTokens, DependOnSeedAndNumberOnly) {
  Problems problems;
  const SequencePlan plan = {.vocabulary = 256, .tokens = 65, .per_step = 8, .seed = 7};
  SequencePlan other_batch = plan;
  other_batch.per_step = 4;
  SequencePlan other_seed = plan;
  other_seed.seed = 8;
  const auto a = read_text_tokens(plan, kAlice, Node(), problems);
  const auto b = read_text_tokens(other_batch, kAlice, Node(), problems);
  const auto c = read_text_tokens(other_seed, kAlice, Node(), problems);
  EXPECT_EQ(sequence_of(*a, 1, 5), sequence_of(*b, 3, 1));
  EXPECT_NE(sequence_of(*a, 1, 5), sequence_of(*c, 1, 5));
}

TEST(TextTokens, AnySmallNumberOfWindowsIsPermuted) {
  for (std::size_t windows = 1; windows <= 40; ++windows) {
    std::string text;
    for (std::size_t i = 0; i < windows; ++i) text.push_back(static_cast<char>('0' + i));
    const auto count = static_cast<std::int64_t>(windows);
    const TokenSource source =
        TextTokens{{.vocabulary = 256, .tokens = 1, .per_step = count, .seed = 3}, text};
    std::set<std::int32_t> seen;
    for (std::int64_t i = 0; i < count; ++i) seen.insert(sequence_of(source, 2, i).front());
    EXPECT_EQ(seen.size(), windows);
  }
}

TEST(TextTokens, ProblemsSayWhere) {
  Problems problems;
  const Node scenario = read_document_text("text: none.txt\n", "mine.yaml", problems);
  const Node where = *scenario.find("text");
  const SequencePlan plan = {.vocabulary = 100, .tokens = 1'000'000};
  EXPECT_FALSE(read_text_tokens(plan, "/nowhere/none.txt", where, problems));
  EXPECT_FALSE(read_text_tokens(plan, "/nowhere/none.txt", Node(), problems));
  EXPECT_FALSE(read_text_tokens(plan, kAlice, where, problems));
  const std::string said = format_problems(problems.list());
  EXPECT_NE(said.find("mine.yaml:1:7: error: text '/nowhere/none.txt': cannot open the file: No "
                      "such file or directory\n"),
            std::string::npos)
      << said;
  EXPECT_NE(said.find("/nowhere/none.txt: error: cannot open the file"), std::string::npos) << said;
  EXPECT_NE(said.find("mine.yaml:1:7: error: text '" + kAlice +
                      "': 148476 bytes are less than a sequence of 1000000 tokens\n"),
            std::string::npos)
      << said;
  // The e of the third line's "Lewis Carroll".
  EXPECT_NE(said.find("alice.txt:3:28: error: byte 101 is not in a vocabulary of 100\n"),
            std::string::npos)
      << said;
}

TEST(ZipfTokens, HaveTheFrequenciesOfTheLaw) {
  const TokenSource source =
      zipf_tokens({.vocabulary = 6, .tokens = 1000, .per_step = 100, .seed = 5}, 1);
  std::vector<double> counts(6);
  for (std::int64_t i = 0; i < 100; ++i) {
    for (const std::int32_t token : sequence_of(source, 0, i)) {
      counts.at(static_cast<std::size_t>(token)) += 1;
    }
  }
  const double harmonic = 1 + 1.0 / 2 + 1.0 / 3 + 1.0 / 4 + 1.0 / 5 + 1.0 / 6;  // 2.45
  for (std::size_t token = 0; token < 6; ++token) {
    const double p = 1 / (static_cast<double>(token + 1) * harmonic);
    EXPECT_NEAR(counts[token] / 1e5, p, 5 * std::sqrt(p * (1 - p) / 1e5));
  }
  EXPECT_EQ(sequence_of(source, 3, 7), sequence_of(source, 3, 7));
  EXPECT_NE(sequence_of(source, 3, 7), sequence_of(source, 3, 8));
  EXPECT_NE(sequence_of(source, 3, 7), sequence_of(source, 4, 7));
}

}  // namespace
}  // namespace orrery
