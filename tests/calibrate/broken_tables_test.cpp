// Every .txt in tests/calibrate/broken is output of nccl-tests that cannot be used; what a user is
// told stands beside it in NAME.expected, word for word. ORRERY_UPDATE_GOLDENS=1 rewrites the
// expectations; read the diff.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "calibrate/read_nccl.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

std::string contents(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

TEST(BrokenTables, AreExplainedWordForWord) {
  const char* update = std::getenv("ORRERY_UPDATE_GOLDENS");
  const bool rewrite = update != nullptr && std::string(update) == "1";
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(ORRERY_SOURCE_DIR "/tests/calibrate/broken")) {
    if (entry.path().extension() == ".txt") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  ASSERT_GE(files.size(), 4u);
  for (const fs::path& file : files) {
    Problems problems;
    read_nccl_text(contents(file), file.filename().string(), problems);
    const std::string said = format_problems(problems.list());
    EXPECT_NE(said, "") << file << " is not broken";
    const fs::path expected = fs::path(file).replace_extension(".expected");
    if (rewrite) {
      std::ofstream(expected, std::ios::binary) << said;
    } else {
      EXPECT_EQ(said, contents(expected)) << file;
    }
  }
}

}  // namespace
}  // namespace orrery
