// Every file in tests/cli/broken is a broken scenario; what a user is told stands beside it in
// NAME.expected, word for word. ORRERY_UPDATE_GOLDENS=1 rewrites the expectations; read the diff.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "models/scenario.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

const fs::path kBroken = fs::path("tests") / "cli" / "broken";  // from the source directory

/// Messages name files as the user does, so the test reads them from the source directory.
class FromSourceDirectory {
 public:
  FromSourceDirectory() : before_(fs::current_path()) { fs::current_path(ORRERY_SOURCE_DIR); }
  ~FromSourceDirectory() { fs::current_path(before_); }
  FromSourceDirectory(const FromSourceDirectory&) = delete;
  FromSourceDirectory& operator=(const FromSourceDirectory&) = delete;

 private:
  fs::path before_;
};

std::vector<fs::path> files_ending(const std::string& extension) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(kBroken)) {
    if (entry.path().extension() == extension) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::string problems_of(const fs::path& scenario) {
  try {
    read_scenario(scenario.generic_string());
  } catch (const InputError& error) {
    return format_problems(error.problems());
  }
  return "";
}

std::string contents(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

TEST(BrokenScenarios, AreExplainedWordForWord) {
  const FromSourceDirectory here;
  const char* update = std::getenv("ORRERY_UPDATE_GOLDENS");
  const bool rewrite = update != nullptr && std::string(update) == "1";
  const std::vector<fs::path> files = files_ending(".yaml");
  ASSERT_GE(files.size(), 30u);
  for (const fs::path& file : files) {
    const std::string said = problems_of(file);
    EXPECT_NE(said, "") << file << " is not broken";
    const fs::path expected = fs::path(file).replace_extension(".expected");
    if (rewrite) {
      std::ofstream(expected, std::ios::binary) << said;
    } else {
      EXPECT_EQ(said, contents(expected)) << file;
    }
  }
  for (const fs::path& expected : files_ending(".expected")) {
    EXPECT_TRUE(fs::exists(fs::path(expected).replace_extension(".yaml")))
        << expected << " belongs to no scenario";
  }
}

}  // namespace
}  // namespace orrery
