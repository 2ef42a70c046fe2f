// Every file in tests/cli/broken is a broken scenario, and in tests/cli/broken/generation a broken
// serving plan; what a user is told stands beside it in NAME.expected, word for word. ORRERY_UPDATE_GOLDENS=1 rewrites the expectations; read the diff.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "models/generation_scenario.hpp"
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

std::vector<fs::path> files_ending(const fs::path& folder, const std::string& extension) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == extension) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

template <class Read>
std::string problems_of(const fs::path& scenario, const Read& read) {
  try {
    read(scenario.generic_string());
  } catch (const InputError& error) {
    return format_problems(error.problems());
  }
  return "";
}

std::string contents(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

template <class Read>
void expect_explained(const fs::path& folder, std::size_t least, const Read& read) {
  const FromSourceDirectory here;
  const char* update = std::getenv("ORRERY_UPDATE_GOLDENS");
  const bool rewrite = update != nullptr && std::string(update) == "1";
  const std::vector<fs::path> files = files_ending(folder, ".yaml");
  ASSERT_GE(files.size(), least);
  for (const fs::path& file : files) {
    const std::string said = problems_of(file, read);
    EXPECT_NE(said, "") << file << " is not broken";
    const fs::path expected = fs::path(file).replace_extension(".expected");
    if (rewrite) {
      std::ofstream(expected, std::ios::binary) << said;
    } else {
      EXPECT_EQ(said, contents(expected)) << file;
    }
  }
  for (const fs::path& expected : files_ending(folder, ".expected")) {
    EXPECT_TRUE(fs::exists(fs::path(expected).replace_extension(".yaml")))
        << expected << " belongs to no scenario";
  }
}

TEST(BrokenScenarios, AreExplainedWordForWord) {
  expect_explained(kBroken, 30, [](const std::string& path) { read_scenario(path); });
}

TEST(BrokenServingPlans, AreExplainedWordForWord) {
  expect_explained(kBroken / "generation", 12,
                   [](const std::string& path) { read_generation(path); });
}

}  // namespace
}  // namespace orrery
