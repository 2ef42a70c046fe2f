// Results do not depend on how many threads work on them.

#include <gtest/gtest.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>

#include <string>

#include "reports/json.hpp"
#include "reports/study.hpp"

namespace orrery {
namespace {

/// The report of a scenario, made by so many threads even where the machine has fewer cores.
std::string report_with(int threads, const std::string& scenario, bool all_ranks) {
  const tbb::global_control limit(tbb::global_control::max_allowed_parallelism,
                                  static_cast<std::size_t>(threads));
  tbb::task_arena arena(threads);
  return arena.execute([&] {
    EXPECT_EQ(tbb::this_task_arena::max_concurrency(), threads);
    const std::string file = ORRERY_SOURCE_DIR "/scenarios/" + scenario + ".yaml";
    const StudyOptions options{.all_ranks = all_ranks, .isolated = true};
    return to_json(study_step(read_scenario(file), options).report, {});
  });
}

TEST(Threads, OneRankPerPositionOfDeepSeekV3) {
  const std::string one = report_with(1, "deepseek_v3_2048_h800", false);
  for (int repeat = 0; repeat < 3; ++repeat) {
    EXPECT_EQ(report_with(4, "deepseek_v3_2048_h800", false), one);
  }
}

TEST(Threads, AllRanksOfMixtral) {
  const std::string one = report_with(1, "mixtral_8x7b_64_h100", true);
  for (int repeat = 0; repeat < 3; ++repeat) {
    EXPECT_EQ(report_with(4, "mixtral_8x7b_64_h100", true), one);
  }
}

}  // namespace
}  // namespace orrery
