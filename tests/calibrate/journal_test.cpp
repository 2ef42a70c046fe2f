#include "calibrate/journal.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>

#include "sim/config.hpp"

namespace orrery {
namespace {

class JournalFile : public testing::Test {
 protected:
  void SetUp() override {
    path_ = testing::TempDir() + "orrery_journal_" + std::to_string(getpid());
    std::remove(path_.c_str());
  }
  void TearDown() override { std::remove(path_.c_str()); }

  std::string text() const {
    std::ostringstream out;
    out << std::ifstream(path_).rdbuf();
    return out.str();
  }
  void write(const std::string& content) const { std::ofstream(path_) << content; }

  std::string path_;
};

Measurement some(double seconds) {
  return {.seconds = seconds,
          .error = 0.0025,
          .samples = 17,
          .repeats = 8,
          .attempts = 2,
          .drift = 0.0125,
          .steady = false};
}

TEST_F(JournalFile, ResumesWithEveryResult) {
  {
    Journal journal(path_, "toy, 2 threads", false);
    journal.add("gemm 1", some(1.25e-3));
    journal.add("streaming copy 1 2 1 0 key concat", some(2e-6));
  }
  const Journal again(path_, "toy, 2 threads", true);
  EXPECT_EQ(again.size(), 2u);
  EXPECT_EQ(again.damaged(), 0u);
  const auto m = again.find("gemm 1");
  ASSERT_TRUE(m.has_value());
  EXPECT_DOUBLE_EQ(m->seconds, 1.25e-3);
  EXPECT_DOUBLE_EQ(m->error, 0.0025);
  EXPECT_EQ(m->samples, 17u);
  EXPECT_EQ(m->repeats, 8);
  EXPECT_EQ(m->attempts, 2);
  EXPECT_DOUBLE_EQ(m->drift, 0.0125);
  EXPECT_FALSE(m->steady);
  EXPECT_TRUE(again.find("streaming copy 1 2 1 0 key concat").has_value());
  EXPECT_FALSE(again.find("gemm 2").has_value());
}

TEST_F(JournalFile, EveryResultIsThereBeforeTheNextIsMeasured) {
  Journal journal(path_, "toy", false);
  journal.add("gemm 1", some(1e-3));
  // A process killed now leaves this behind.
  const Journal killed(path_, "toy", true);
  EXPECT_EQ(killed.size(), 1u);
}

TEST_F(JournalFile, AHalfLineIsIgnoredAndWhatFollowsIsWhole) {
  {
    Journal journal(path_, "toy", false);
    journal.add("gemm 1", some(1e-3));
    journal.add("gemm 2", some(2e-3));
  }
  // Cut anywhere within the last line.
  const std::string whole = text();
  const std::size_t last = whole.rfind('\n', whole.size() - 2) + 1;
  for (std::size_t length = last + 1; length < whole.size(); length += 7) {
    write(whole.substr(0, length));
    {
      Journal journal(path_, "toy", true);
      EXPECT_EQ(journal.size(), 1u) << length;
      EXPECT_EQ(journal.damaged(), 1u);
      journal.add("gemm 3", some(3e-3));
    }
    const Journal again(path_, "toy", true);
    EXPECT_EQ(again.size(), 2u) << length;
    EXPECT_TRUE(again.find("gemm 1").has_value());
    EXPECT_TRUE(again.find("gemm 3").has_value());
  }
}

TEST_F(JournalFile, AChangedDigitIsDamage) {
  {
    Journal journal(path_, "toy", false);
    journal.add("gemm 1", some(1.5e-3));
    journal.add("gemm 2", some(2e-3));
  }
  std::string changed = text();
  const std::size_t digit = changed.find("1.5000");
  ASSERT_NE(digit, std::string::npos);
  changed[digit] = '7';
  write(changed);
  const Journal journal(path_, "toy", true);
  EXPECT_EQ(journal.size(), 1u);
  EXPECT_EQ(journal.damaged(), 1u);
}

TEST_F(JournalFile, WithoutResumeItBeginsAnew) {
  {
    Journal journal(path_, "toy", false);
    journal.add("gemm 1", some(1e-3));
  }
  const Journal journal(path_, "another", false);
  EXPECT_EQ(journal.size(), 0u);
  EXPECT_EQ(text(), "orrery calibration journal 1: another\n");
}

TEST_F(JournalFile, ResumingWhereThereIsNoneBeginsOne) {
  const Journal journal(path_, "toy", true);
  EXPECT_EQ(text(), "orrery calibration journal 1: toy\n");
}

TEST_F(JournalFile, ResultsOfAnotherDeviceAreRefused) {
  { const Journal journal(path_, "toy, 2 threads", false); }
  try {
    const Journal journal(path_, "toy, 4 threads", true);
    FAIL();
  } catch (const InputError& error) {
    ASSERT_EQ(error.problems().size(), 1u);
    EXPECT_EQ(error.problems()[0].at.line, 1);
    EXPECT_EQ(error.problems()[0].message, "these results are not of toy, 4 threads");
  }
  write("name: h100\n");
  EXPECT_THROW(Journal(path_, "toy", true), InputError);
  EXPECT_EQ(text(), "name: h100\n");
}

TEST_F(JournalFile, RemovesItself) {
  Journal journal(path_, "toy", false);
  journal.remove();
  EXPECT_NE(access(path_.c_str(), F_OK), 0);
}

TEST(Journal, SaysWhereItCannotWrite) {
  try {
    const Journal journal("/nonexistent/journal", "toy", false);
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("/nonexistent/journal"), std::string::npos);
  }
}

TEST(MeasuredKey, TellsApartWhatIsMeasuredApart) {
  const Gemm g{.inputs = NumberFormat::bf16, .m = 1, .n = 2, .k = 3};
  Gemm backward = g;
  backward.pass = Pass::backward_input;
  EXPECT_NE(measured_key({g, "", 0}), measured_key({backward, "", 0}));
  EXPECT_NE(measured_key({g, "", 0}), measured_key({g, "", 4}));
  // Which linear layer it is does not matter; which streaming op does.
  EXPECT_EQ(measured_key({g, "q_a", 0}), measured_key({g, "kv_a", 0}));
  const Streaming s{.kind = StreamingKind::copy, .bytes_read = 8, .bytes_written = 8};
  EXPECT_NE(measured_key({s, "key concat", 0}), measured_key({s, "value copy", 0}));
}

}  // namespace
}  // namespace orrery
