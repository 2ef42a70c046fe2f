// The search against brute force: every candidate of a small space simulated in full.

#include <fmt/core.h>
#include <gtest/gtest.h>
#include <tbb/global_control.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "models/plan_rules.hpp"
#include "reports/search/questions.hpp"
#include "reports/search/search.hpp"
#include "reports/study.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

const std::string kScenarios = std::string(ORRERY_SOURCE_DIR) + "/scenarios/";

const char* const kMoe =
    "{name: small, source: test, hidden: 1024, vocabulary: 32000, layers: 8, max_positions: 65536, "
    "mtp_modules: 1, attention: {heads: 8, mla: {q_lora_rank: 96, kv_lora_rank: 64, "
    "qk_nope_head_dim: 32, qk_rope_head_dim: 16, v_head_dim: 32}}, feed_forward: {activation: "
    "swiglu, intermediate: 2048}, moe: {dense_layers: 1, routed_experts: 16, top_k: 4, "
    "expert_intermediate: 512, shared_experts: 1}}";
const char* const kDense =
    "{name: small, source: test, hidden: 2048, vocabulary: 32000, layers: 8, max_positions: 65536, "
    "attention: {heads: 16, kv_heads: 4, head_dim: 128}, feed_forward: {activation: swiglu, "
    "intermediate: 8192}}";

Scenario small(const char* model, const std::string& more = "") {
  return read_scenario_text(
      fmt::format("name: small\nmodel: {}\ncluster: clusters/h100_64.yaml\nplan:\n"
                  "  layout: {{pp: 2, tp: 2}}\n  schedule: 1f1b\n  sequence_length: 2048\n"
                  "  global_batch: 96\n  precision: bf16\n{}",
                  model, more),
      kScenarios + "small.yaml", kScenarios);
}

SearchSpace small_space(const Scenario& scenario) {
  SearchSpace space = default_space(scenario);
  space.nodes = {2};
  space.tp = {1, 4};
  space.pp = {1, 2, 4};
  space.ep = scenario.model.moe ? std::vector<std::int64_t>{1, 8} : std::vector<std::int64_t>{1};
  space.zero = {1, 3};
  space.micro_batch = {1, 2};
  space.recomputes = {{}, {.full = true}};
  space.virtual_stages = {2};
  space.lighter_last = {0, 1};
  return space;
}

std::vector<std::size_t> all_of(const Search& search) {
  std::vector<std::size_t> indices(search.candidates().size());
  std::iota(indices.begin(), indices.end(), std::size_t{0});
  return indices;
}

std::vector<std::size_t> indices_of(const std::vector<Ranked>& list) {
  std::vector<std::size_t> indices;
  for (const Ranked& r : list) indices.push_back(r.index);
  return indices;
}

/// Of all that fit: the n fastest, and those that no other one beats in time and memory.
struct BruteForce {
  std::vector<std::size_t> fastest;
  std::vector<std::size_t> front;

  BruteForce(const std::vector<Evaluation>& all, std::size_t first, std::size_t n,
             double front_time) {
    std::vector<std::size_t> order;
    for (std::size_t i = first; i < all.size(); ++i) {
      if (all[i].fits) order.push_back(i);
    }
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return std::pair(all[a].step_time_s, a) < std::pair(all[b].step_time_s, b);
    });
    fastest.assign(order.begin(),
                   order.begin() + static_cast<std::ptrdiff_t>(std::min(n, order.size())));
    std::int64_t smallest = std::numeric_limits<std::int64_t>::max();
    for (std::size_t k = 0; k < order.size(); ++k) {
      const Evaluation& e = all[order[k]];
      if (e.step_time_s > front_time * all[order[0]].step_time_s) break;
      // Of equal times the smallest counts, of equal times and memory the first.
      bool beaten = e.memory_peak_bytes >= smallest;
      for (std::size_t l = k + 1; l < order.size() && all[order[l]].step_time_s == e.step_time_s;
           ++l) {
        beaten |= all[order[l]].memory_peak_bytes < e.memory_peak_bytes;
      }
      if (beaten) continue;
      smallest = e.memory_peak_bytes;
      front.push_back(order[k]);
    }
  }
};

void expect_as_brute_force(const Scenario& scenario, const SearchSpace& space,
                           double memory_share) {
  SearchOptions options;
  options.memory_share = memory_share;
  options.full = 1000;
  const Search search(scenario, space, options);
  const std::vector<Evaluation> coarse = search.evaluate(all_of(search), Fidelity::coarse);
  const std::vector<Evaluation> full = search.evaluate(all_of(search), Fidelity::full);
  std::size_t fit = 0;
  for (std::size_t i = 0; i < full.size(); ++i) {
    const std::string key = key_of(search.candidates().at(i));
    // What is ruled out by the bound of memory does not fit.
    if (full[i].fits) {
      EXPECT_TRUE(coarse[i].fits) << key;
      ++fit;
    }
    EXPECT_LE(coarse[i].memory_peak_bytes, full[i].memory_peak_bytes) << key;
    if (coarse[i].fits) {
      EXPECT_LE(coarse[i].step_time_s, full[i].step_time_s) << key;
    }
  }
  const std::size_t first = search.candidates().own_is_in_space() ? 0 : 1;
  const BruteForce expected(full, first, options.best, options.front_time);
  const SearchResult result = search.run();
  EXPECT_EQ(indices_of(result.best), expected.fastest);
  EXPECT_EQ(indices_of(result.time_and_memory), expected.front);
  EXPECT_TRUE(result.certain) << result.why_uncertain;
  fmt::print("{} candidates, {} fit, {} simulated, front of {}\n", full.size(), fit,
             result.counts.simulated, result.time_and_memory.size());
  // Else the test shows nothing.
  EXPECT_GT(fit, 20u);
  EXPECT_LT(fit, full.size());
  EXPECT_LT(result.counts.simulated, full.size() / 2);
}

TEST(Search, FindsWhatBruteForceFinds) {
  const Scenario dense = small(kDense);
  expect_as_brute_force(dense, small_space(dense), 0.06);
  const Scenario moe = small(kMoe);
  expect_as_brute_force(moe, small_space(moe), 0.05);
}

TEST(Search, FindsWhatBruteForceFindsWhereLinksAreShared) {
  const Scenario moe = small(kMoe, "fabric: fabrics/h100_64.yaml\n");
  SearchSpace space = small_space(moe);
  space.recomputes = {{}};
  space.tp = {1};
  expect_as_brute_force(moe, space, 0.05);
}

/// All that is printed of a result.
std::string text_of(const SearchResult& result) {
  std::string text;
  const auto add = [&](const std::vector<Ranked>& list) {
    for (const Ranked& r : list) {
      text += fmt::format("{} {} {} {} {}\n", r.index, r.key, r.full->step_time_s,
                          r.full->memory_peak_bytes, r.coarse.phases_s.bubble);
    }
    text += '\n';
  };
  add(result.best);
  add(result.time_and_memory);
  add(result.time_and_gpus);
  add(result.gpu_hours_and_gpus);
  for (const PhaseDifference& d : result.against_second) {
    text += fmt::format("{} {} {}\n", d.phase, d.winner_s, d.other_s);
  }
  return text + fmt::format("{} {}", result.counts.too_large, result.counts.simulated);
}

TEST(Search, DoesNotDependOnThreads) {
  const Scenario scenario = small(kMoe);
  SearchSpace space = small_space(scenario);
  space.nodes = {1, 2};
  std::vector<std::string> texts;
  for (const std::size_t threads : {1, 2, 7}) {
    const tbb::global_control limit(tbb::global_control::max_allowed_parallelism, threads);
    texts.push_back(text_of(Search(scenario, space).run()));
  }
  EXPECT_EQ(texts[0], texts[1]);
  EXPECT_EQ(texts[0], texts[2]);
}

TEST(Search, AsksForEachEvaluationOnceAndTakesAnyOnes) {
  const Scenario scenario = small(kDense);
  const Search search(scenario, small_space(scenario));
  std::set<std::pair<std::size_t, Fidelity>> asked;
  const SearchResult result =
      search.run([&](std::span<const std::size_t> indices, Fidelity fidelity) {
        EXPECT_TRUE(std::is_sorted(indices.begin(), indices.end()));
        for (const std::size_t i : indices) EXPECT_TRUE(asked.insert({i, fidelity}).second) << i;
        // One by one, as other processes would.
        std::vector<Evaluation> evaluations;
        for (const std::size_t i : indices) {
          evaluations.push_back(search.evaluate({&i, 1}, fidelity).front());
        }
        return evaluations;
      });
  EXPECT_EQ(text_of(result), text_of(search.run()));
}

TEST(Search, SaysWhatTheWinnerSaves) {
  const Scenario scenario = small(kDense);
  const SearchResult result = Search(scenario, small_space(scenario)).run();
  ASSERT_GE(result.best.size(), 2u);
  double saved_s = 0;
  for (const PhaseDifference& d : result.against_second) saved_s += d.other_s - d.winner_s;
  EXPECT_NEAR(saved_s, result.best[1].full->step_time_s - result.best[0].full->step_time_s, 1e-9);
  ASSERT_TRUE(result.own.full.has_value());
  double against_own_s = 0;
  for (const PhaseDifference& d : result.against_own) against_own_s += d.other_s - d.winner_s;
  EXPECT_NEAR(against_own_s, result.own.full->step_time_s - result.best[0].full->step_time_s, 1e-9);
}

// ---- candidates -----------------------------------------------------------------------------

TEST(Candidates, ArePossibleAndDistinct) {
  const Scenario scenario = small(kMoe);
  SearchSpace space = default_space(scenario);
  space.nodes = {1, 3, 8};
  const Candidates candidates(scenario, space);
  std::set<std::string> keys;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const Candidate candidate = candidates.at(i);
    EXPECT_TRUE(keys.insert(key_of(candidate)).second) << key_of(candidate);
    // The reader of scenarios has nothing against it.
    if (i % 997 != 0) continue;
    const Scenario changed = with_candidate(scenario, candidate);
    const Scenario read = read_scenario_text(to_yaml(changed), scenario.file, kScenarios);
    EXPECT_EQ(read.plan, candidate.plan) << key_of(candidate);
  }
  EXPECT_GT(keys.size(), 1000u);
  EXPECT_EQ(key_of(candidates.at(0)),
            "n8 tp2 cp1 pp2 dp16 ep1 etp1 z1 mb1 1f1b L2x4 bf16 r=none sms0");
}

/// Counts by trying all combinations with the reader itself.
TEST(Candidates, AreAllThatTheReaderAccepts) {
  const Scenario scenario = small(kMoe);
  SearchSpace space = small_space(scenario);
  space.lighter_last = {0};
  space.schedules = {ScheduleKind::one_f_one_b, ScheduleKind::dual_pipe, ScheduleKind::zb_v};
  space.recomputes = {{}};
  std::set<std::string> accepted;
  for (const std::int64_t tp : {1, 4})
    for (const std::int64_t pp : {1, 2, 4})
      for (const std::int64_t ep : {1, 8})
        for (const std::int64_t zero : {1, 3})
          for (const std::int64_t mb : {1, 2})
            for (const char* schedule : {"1f1b", "dual_pipe", "zb_v"}) {
              const std::string text = fmt::format(
                  "name: small\nmodel: {}\ncluster: clusters/h100_64.yaml\nplan:\n  layout: {{tp: "
                  "{}, pp: {}, ep: {}, zero: {}, dp: {}}}\n  schedule: {}\n  sequence_length: "
                  "2048\n  global_batch: 96\n  precision: bf16\n  micro_batch: {}\n  "
                  "communication_sms: {}\n",
                  kMoe, tp, pp, ep, zero, 16 / (tp * pp), schedule, mb, ep > 1 ? 24 : 0);
              if (16 % (tp * pp) != 0) continue;
              try {
                Scenario s = read_scenario_text(text, kScenarios + "small.yaml", kScenarios);
                s.cluster.nodes = 2;
                accepted.insert(key_of({2, s.plan}));
              } catch (const InputError&) {
                continue;
              }
            }
  const Candidates candidates(scenario, space);
  std::set<std::string> found;
  for (std::size_t i = 1; i < candidates.size(); ++i) found.insert(key_of(candidates.at(i)));
  EXPECT_EQ(found, accepted);
}

TEST(Candidates, HoldThePublishedLayoutOfV3) {
  const Scenario scenario = read_scenario(kScenarios + "deepseek_v3_2048_h800.yaml");
  Scenario other = scenario;  // so that the published one has to come from the space
  other.plan.parallelism.zero_stage = 2;
  const Candidates candidates(other, default_space(other));
  const std::string published = key_of({scenario.cluster.nodes, scenario.plan});
  EXPECT_EQ(published,
            "n256 tp1 cp1 pp16 dp128 ep64 etp1 z1 mb1 dual_pipe L15x4,1 fp8_deepseek r=deepseek "
            "sms20");
  int found = 0;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    found += key_of(candidates.at(i)) == published;
  }
  EXPECT_EQ(found, 1);
}

// ---- the section ----------------------------------------------------------------------------

class SpaceFile {
 public:
  explicit SpaceFile(const std::string& text)
      : path_(fs::temp_directory_path() /
              fmt::format("orrery_space_{}_{}.yaml", ::getpid(),
                          ::testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::ofstream(path_) << text;
  }
  ~SpaceFile() { fs::remove(path_); }
  SpaceFile(const SpaceFile&) = delete;
  SpaceFile& operator=(const SpaceFile&) = delete;
  std::string path() const { return path_.string(); }

 private:
  fs::path path_;
};

TEST(SearchSpace, IsReadWithDefaultsForWhatItLeavesOut) {
  const Scenario scenario = small(kMoe);
  const SpaceFile file(
      "tp: [4, 2, 4]\nschedule: [dual_pipe, 1f1b]\nrecompute: full\nzero: 1\nprecision: [bf16, "
      "fp8_deepseek]\n");
  const SearchSpace space = read_search_space(file.path(), scenario);
  SearchSpace expected = default_space(scenario);
  expected.tp = {2, 4};
  expected.schedules = {ScheduleKind::dual_pipe, ScheduleKind::one_f_one_b};
  expected.recomputes = {{.full = true}};
  expected.zero = {1};
  expected.precisions = {make_precision(PrecisionKind::bf16),
                         make_precision(PrecisionKind::fp8_deepseek)};
  EXPECT_EQ(space, expected);
}

TEST(SearchSpace, SaysAllThatIsWrongAtItsPlace) {
  const Scenario scenario = small(kDense);
  const SpaceFile file(
      "tp: [0, 2]\npp: []\nschedules: [1f1b]\nschedule: [1f1b, dualpipe]\nrecompute: deepseek\n"
      "communication_sms: [20, 132]\nmicro_batch: 1.5\n");
  try {
    read_search_space(file.path(), scenario);
    FAIL() << "accepted";
  } catch (const InputError& error) {
    std::string text;
    for (const Problem& p : error.problems()) {
      text += fmt::format("{}:{}: {} ({})\n", p.at.line, p.at.column, p.message, p.hint);
    }
    EXPECT_EQ(
        text,
        "1:6: element 1 of 'tp' must be a whole number from 1 to 1048576, got 0 ()\n"
        "2:5: 'pp' is empty: nothing to choose from ()\n"
        "7:14: 'micro_batch' must be a whole number from 1 to 268435456, got 1.5 ()\n"
        "4:18: 'schedule' lists words of gpipe, 1f1b, interleaved_1f1b, zb_h1, zb_v, "
        "dual_pipe, dual_pipe_v (did you mean 'dual_pipe'?)\n"
        "5:12: mla_up_projection cannot be recomputed: small has no latent attention ()\n"
        "6:20: communication_sms 132 leaves no SM to compute: NVIDIA H100 SXM5 80GB has 132 ()\n"
        "3:1: unknown key 'schedules' in search (did you mean 'schedule'?)\n");
  }
}

// ---- questions ------------------------------------------------------------------------------

TEST(Questions, TheSmallestClusterIsTheFirstThatIsFastEnough) {
  const Scenario scenario = small(kMoe);
  SearchSpace space = small_space(scenario);
  space.zero = {1};
  QuestionOptions options;
  options.nodes = {1, 2, 3, 4, 6, 8};
  const double tokens = 1e12;
  // All sizes, one by one.
  std::vector<double> days;
  for (const std::int64_t nodes : options.nodes) {
    SearchSpace of_size = space;
    of_size.nodes = {nodes};
    const SearchResult result = Search(scenario, of_size).run();
    ASSERT_FALSE(result.best.empty());
    days.push_back(tokens / (96 * 2048) * result.best[0].full->step_time_s / 86400);
  }
  // What a search over doublings relies on. (6 nodes are slower here than 4.)
  for (const auto& [less, more] : {std::pair{0, 1}, {1, 3}, {3, 5}, {2, 4}}) {
    EXPECT_LT(days[static_cast<std::size_t>(more)], days[static_cast<std::size_t>(less)]);
  }
  for (const double goal : days) {
    const auto first =
        std::find_if(days.begin(), days.end(), [&](double d) { return d <= goal * 1.0001; });
    const Answer answer = smallest_cluster(scenario, space, tokens, goal * 1.0001, options);
    ASSERT_TRUE(answer.met);
    EXPECT_EQ(answer.choice->nodes, options.nodes[static_cast<std::size_t>(first - days.begin())]);
    EXPECT_NEAR(answer.choice->days, *first, 1e-9 * *first);
  }
  const auto fastest = std::min_element(days.begin(), days.end());
  const Answer never = smallest_cluster(scenario, space, tokens, *fastest / 2, options);
  EXPECT_FALSE(never.met);
  ASSERT_TRUE(never.choice.has_value());
  EXPECT_EQ(never.choice->nodes, options.nodes[static_cast<std::size_t>(fastest - days.begin())]);
}

TEST(Questions, ABudgetBuysTheFastestLayoutThatItPays) {
  const Scenario scenario = small(kMoe);
  SearchSpace space = small_space(scenario);
  space.zero = {1};
  QuestionOptions options;
  options.nodes = {1, 2, 4, 8};
  const double tokens = 1e12;
  std::vector<double> gpu_hours;
  for (const std::int64_t nodes : options.nodes) {
    SearchSpace of_size = space;
    of_size.nodes = {nodes};
    gpu_hours.push_back(Search(scenario, of_size).run().best.at(0).gpu_hours_per_trillion_tokens);
    ASSERT_TRUE(gpu_hours.size() < 2 || gpu_hours.back() > gpu_hours[gpu_hours.size() - 2]);
  }
  for (std::size_t i = 0; i < gpu_hours.size(); ++i) {
    const Answer answer = best_for_budget(scenario, space, tokens, gpu_hours[i] * 1.0001, options);
    ASSERT_TRUE(answer.met);
    EXPECT_EQ(answer.choice->nodes, options.nodes[i]);
  }
  const Answer none = best_for_budget(scenario, space, tokens, gpu_hours[0] * 0.9, options);
  EXPECT_FALSE(none.met);
  ASSERT_TRUE(none.choice.has_value());
  EXPECT_EQ(none.choice->nodes, 1);
}

}  // namespace
}  // namespace orrery
