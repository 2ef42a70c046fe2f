// Results do not depend on how many threads work on them.

#include <gtest/gtest.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>

#include <string>

#include "reports/json.hpp"
#include "reports/study.hpp"

namespace orrery {
namespace {

/// What `work` returns when so many threads do it, even where the machine has fewer cores.
template <class Work>
std::string with_threads(int threads, Work work) {
  const tbb::global_control limit(tbb::global_control::max_allowed_parallelism,
                                  static_cast<std::size_t>(threads));
  tbb::task_arena arena(threads);
  return arena.execute([&] {
    EXPECT_EQ(tbb::this_task_arena::max_concurrency(), threads);
    return work();
  });
}

void expect_same_report(const std::string& name, bool all_ranks) {
  const std::string file = ORRERY_SOURCE_DIR "/scenarios/" + name + ".yaml";
  const auto study = [&] {
    return study_step(read_scenario(file), {.all_ranks = all_ranks, .isolated = true});
  };
  const auto whole = [&] { return to_json(study().report, {}); };
  EXPECT_EQ(with_threads(4, whole), with_threads(1, whole));

  // Where threads meet, over and over: who comes first differs from time to time.
  const Study s = study();
  const auto again = [&] {
    return to_json(summarise(s.scenario, s.program, s.run.prices, s.run.timeline), {});
  };
  const std::string one = with_threads(1, again);
  for (int repeat = 0; repeat < 20; ++repeat) ASSERT_EQ(with_threads(4, again), one);
}

TEST(Threads, OneRankPerPositionOfDeepSeekV3) {
  expect_same_report("deepseek_v3_2048_h800", false);
}

TEST(Threads, AllRanksOfLlama70B) {
  expect_same_report("llama3_70b_64_h100", true);
}

}  // namespace
}  // namespace orrery
