// Every file in tests/cli/broken/recipes is a broken recipe; what a user is told stands beside it
// in NAME.expected, word for word. ORRERY_UPDATE_GOLDENS=1 rewrites the expectations; read the
// diff.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "reports/budget/recipe.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

std::string problems_of(const fs::path& recipe) {
  try {
    read_recipe(recipe.generic_string());
  } catch (const InputError& error) {
    return format_problems(error.problems());
  }
  return "";
}

std::string contents(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

TEST(BrokenRecipes, AreExplainedWordForWord) {
  const fs::path before = fs::current_path();
  fs::current_path(ORRERY_SOURCE_DIR);  // messages name files as the user does
  const char* update = std::getenv("ORRERY_UPDATE_GOLDENS");
  const bool rewrite = update != nullptr && std::string(update) == "1";
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator("tests/cli/broken/recipes")) {
    if (entry.path().extension() == ".yaml") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  EXPECT_GE(files.size(), 5u);
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
  fs::current_path(before);
}

}  // namespace
}  // namespace orrery
